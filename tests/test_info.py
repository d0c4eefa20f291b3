"""`adapter info` of any method: what the header tells of it, and nothing that it does not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import adapterhub_lite as ah

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Done

    Command = Callable[..., Done]


def saved(folder: Path, name: str, **options: Any) -> Path:
    model = nn.ModuleDict({"down_proj": nn.Linear(7, 5), "up_proj": nn.Linear(5, 11, bias=False)})
    adapters = ah.adapt(model)
    adapters.add("a", ah.method(name, **options), ["down_proj", "up_proj"])
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.25
    adapters.save("a", folder)
    return folder


def lines(done: Done) -> dict[str, str]:
    """The table of a name and a value on each line, up to the table of modules."""
    assert done.code == 0, done
    rows = [line.partition("  ") for line in done.out.splitlines()]
    return {name: value.strip() for name, _, value in rows if value}


TABLES: list[tuple[str, dict[str, Any], dict[str, str | None]]] = [
    ("lora", {"rank": 3, "alpha": 6}, {"rank": "3", "scaling": "2", "options": "alpha=6"}),
    ("lora", {}, {"rank": "8", "scaling": "1", "options": None}),
    ("dora", {"rank": 3, "alpha": 7}, {"rank": "3", "scaling": "-", "options": "alpha=7"}),
    (
        "dora",
        {"rank": 3, "alpha": 7, "rslora": True, "rank_pattern": {"up_proj": 2}},
        {"rank": "2 to 3", "scaling": "-", "options": 'alpha=7, rslora=true, rank_pattern={"up_proj": 2}'},
    ),
    ("dora", {}, {"rank": "8", "scaling": "-", "options": None}),
    ("ia3", {"feedforward": ("down_proj",)}, {"rank": "-", "scaling": "-", "options": 'feedforward=["down_proj"]'}),
    ("ia3", {}, {"rank": "-", "scaling": "-", "options": None}),
    ("vera", {"rank": 4, "projection_prng_key": 5}, {"rank": "4", "scaling": "1", "options": "projection_prng_key=5"}),
]


@pytest.mark.parametrize(("name", "options", "shown"), TABLES, ids=lambda v: v if isinstance(v, str) else "")
def test_the_table_has_what_is_known(
    adapter: Command, tmp_path: Path, name: str, options: dict[str, Any], shown: dict[str, str | None]
) -> None:
    found = lines(adapter("info", saved(tmp_path / "a", name, **options)))
    assert found["method"] == name
    assert {key: found.get(key) for key in shown} == shown


def test_each_module_has_its_own_rank_and_a_dash_for_what_is_not_known(adapter: Command, tmp_path: Path) -> None:
    dora = saved(tmp_path / "dora", "dora", rank=3, rank_pattern={"up_proj": 2})
    *_, down, up = adapter("info", dora, "-v").out.splitlines()
    assert (down.split(), up.split()) == (
        ["down_proj", "linear", "5×7", "3", "-"],
        ["up_proj", "linear", "11×5", "2", "-"],
    )
    modules = adapter("info", dora, "--json").json["modules"]
    assert {name: (m["rank"], m["scaling"]) for name, m in modules.items()} == {
        "down_proj": (3, None),
        "up_proj": (2, None),
    }
    ia3 = saved(tmp_path / "ia3", "ia3")
    *_, up = adapter("info", ia3, "-v").out.splitlines()
    assert up.split() == ["up_proj", "linear", "11×5", "-", "-"]
    assert adapter("info", ia3, "--json").json["modules"]["up_proj"]["rank"] is None


@pytest.mark.parametrize("name", ["dora", "ia3"])
def test_it_needs_no_torch(tmp_path: Path, name: str) -> None:
    folder = saved(tmp_path / "a", name)
    code = "import sys; from adapterhub_lite.cli import run; sys.exit(run(sys.argv[1:]) or 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, "info", str(folder), "-v"], capture_output=True, timeout=60)
    assert done.returncode == 0, done
