"""`adapter diff` as people and programs use it; what it computes is tested in test_compare."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from peers import dense_delta

import adapterhub_lite as ah

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Done, Handmade

    Command = Callable[..., Done]

LAYERS = {"net.layers.0.q": 2, "net.layers.0.k": 2, "net.layers.1.q": 2, "net.layers.1.k": 2, "net.conv": 2}


@pytest.fixture
def abc(handmade: Handmade, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Adapters a, b and c in the working directory, which is returned; c lacks a module."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("abc"):
        layers = {k: r for k, r in LAYERS.items() if name != "c" or k != "net.conv"}
        handmade(tmp_path / name, layers, seed=seed, scale=1.0 + seed)
    return tmp_path


def cells(done: Done, head: str) -> list[list[str]]:
    """The rows below the line that starts with `head`, up to the next empty line."""
    lines = done.out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(head))
    rows = []
    for line in lines[start + 1 :]:
        if not line:
            break
        rows.append(line.split())
    return rows


def test_json_has_everything(adapter: Command, abc: Path) -> None:
    done = adapter("diff", "a", "b", "c", "--signs", "--json")
    expected = ah.diff(*map(ah.load, "abc"), signs=True).plain()
    assert done.json == expected
    pairs = {(pair["a"], pair["b"]): pair for pair in done.json["pairs"]}
    assert list(pairs) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert pairs["a", "c"]["only_a"] == ["net.conv"]
    A, B = (np.concatenate([W.numpy().ravel() for _, W in sorted(dense_delta(abc / n).items())]) for n in "ab")
    assert pairs["a", "b"]["cosine"] == pytest.approx(A @ B / np.linalg.norm(A) / np.linalg.norm(B), rel=1e-9)
    assert done.json["modules"]["net.conv"]["norms"][2] is None


def test_the_text_of_two(adapter: Command, abc: Path) -> None:
    done, plain = adapter("diff", "a", "b", "--signs"), adapter("diff", "a", "b", "--signs", "--json").json
    assert (done.code, done.err) == (0, "")
    pair = plain["pairs"][0]
    assert f"cosine       {pair['cosine']:.3f}" in done.out
    assert f"distance     {pair['distance']:.3g} of ‖a‖" in done.out
    assert f"overlap in   {pair['overlap_in']:.3f} (by chance {pair['chance_in']:.3f})" in done.out
    assert f"conflicts    {100 * pair['conflicts']:.1f} % of signs" in done.out
    assert f"advice       {pair['advice']}" in done.out
    rows = cells(done, "module ")
    gaps = [plain["modules"][row[0]]["pairs"][0]["gap"] for row in rows]
    assert len(gaps) == len(LAYERS)
    assert gaps == sorted(gaps, reverse=True)  # the most different first
    assert "conflicts" not in adapter("diff", "a", "b").out


def test_the_text_of_three(adapter: Command, abc: Path) -> None:
    done, plain = adapter("diff", "a", "b", "c"), adapter("diff", "a", "b", "c", "--json").json
    cosine = {(p["a"], p["b"]): p["cosine"] for p in plain["pairs"]}
    over = {(p["a"], p["b"]): (p["overlap_out"] + p["overlap_in"]) / 2 for p in plain["pairs"]}
    first, second, third = cells(done, "cosine \\ overlap")
    assert [float(x) for x in first[3:]] == pytest.approx([cosine["a", "b"], cosine["a", "c"]], abs=6e-4)
    assert float(third[2]) == pytest.approx(over["a", "c"], abs=6e-4)
    assert float(second[2]) == pytest.approx(over["a", "b"], abs=6e-4)
    assert "(4 in both, 1 in a only)" in done.out
    assert {row[0] for row in cells(done, "module ")} == LAYERS.keys()


def test_what_only_one_has_comes_last(adapter: Command, handmade: Handmade, abc: Path) -> None:
    handmade(abc / "few", {"net.layers.0.q": 2}, seed=9)
    rows = cells(adapter("diff", "a", "few"), "module ")
    assert rows[0][0] == "net.layers.0.q"
    assert all(row[2] == "-" for row in rows[1:])


def test_verbose_shows_every_module_by_number(adapter: Command, handmade: Handmade, abc: Path) -> None:
    def twelve(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {k.replace(".0.", f".{n}."): (1 + n) * t for k, t in tensors.items() for n in range(12)}

    names = [f"net.layers.{n}.q" for n in range(12)]
    for seed, name in enumerate(("x", "y")):
        handmade(abc / name, {"net.layers.0.q": 2}, seed=seed, tensors=twelve, target_modules=["q"])
    assert len(cells(adapter("diff", "x", "y"), "module ")) == 11  # ten, and how many more
    assert "… and 2 modules" in adapter("diff", "x", "y").out
    assert [row[0] for row in cells(adapter("diff", "x", "y", "-v"), "module ")] == names


def test_the_same_adapter_needs_no_table(adapter: Command, abc: Path) -> None:
    done = adapter("diff", "a", "a")
    assert "5 with the same bits" in done.out
    assert "the same bit by bit" in done.out
    assert "\nmodule " not in done.out
    assert "\nmodule " in adapter("diff", "a", "a", "-v").out
    assert done.out.splitlines()[2].split()[1:3] == ["a", "(2)"]


def test_zero_is_null_and_a_dash(adapter: Command, handmade: Handmade, abc: Path) -> None:
    handmade(abc / "zero", LAYERS, scale=0.0)
    done = adapter("diff", "a", "zero", "--json")
    assert done.json["pairs"][0]["cosine"] is None
    assert "NaN" not in done.out
    assert "cosine       -\n" in adapter("diff", "a", "zero").out


def test_quiet_prints_nothing(adapter: Command, abc: Path) -> None:
    assert adapter("diff", "a", "b", "-q") == (0, "", "")


def test_biases_and_whole_values_are_said(adapter: Command, handmade: Handmade, abc: Path) -> None:
    def with_head(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**tensors, "base_model.model.net.head.weight": torch.ones(3, 4)}

    handmade(abc / "head", LAYERS, tensors=with_head, modules_to_save=["head"])
    assert "head has whole values that are not compared: " in adapter("diff", "a", "head").out

    def with_bias(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**tensors, "base_model.model.net.layers.0.q.lora_B.bias": torch.ones(13)}

    handmade(abc / "bias", {"net.layers.0.q": 2}, tensors=with_bias, lora_bias=True)
    assert "bias changes biases too" in adapter("diff", "a", "bias").out


# Refusals -----------------------------------------------------------------------------------------------


def test_wrong_usage_and_refusals(adapter: Command, handmade: Handmade, abc: Path) -> None:
    assert adapter("diff").code == adapter("diff", "a").code == 2
    assert "give two or more" in adapter("diff", "a").err
    adapter("diff", "a", "nowhere").refused("nowhere", "no such adapter folder")
    handmade(abc / "other", LAYERS, base_model_name_or_path="other/model")
    handmade(abc / "one", LAYERS, base_model_name_or_path="one/base")
    adapter("diff", "one", "other").refused("one/base", "--any-base")
    assert adapter("diff", "one", "other", "--any-base", "-q").code == 0
    text = (abc / "a" / "adapter_config.json").read_text()
    (abc / "a" / "adapter_config.json").write_text(json.dumps(json.loads(text) | {"init_lora_weights": "pissa"}))
    adapter("diff", "a", "b").refused("a", "pissa")


def test_a_page_is_replaced_with_force_and_nothing_else_is(adapter: Command, abc: Path) -> None:
    assert adapter("diff", "a", "b", "--html", "new/page.html").out.endswith("wrote new/page.html\n")
    before = (abc / "new/page.html").read_bytes()
    adapter("diff", "a", "c", "--html", "new/page.html").refused("page.html", "exists", "--force")
    assert (abc / "new/page.html").read_bytes() == before
    assert adapter("diff", "a", "c", "--html", "new/page.html", "--force", "-q").code == 0
    assert (abc / "new/page.html").read_bytes() != before
    (abc / "letter.html").write_text("<p>Dear friend")
    adapter("diff", "a", "b", "--html", "letter.html", "--force").refused(
        "letter.html", "not deleted even with --force"
    )
    adapter("diff", "a", "b", "--html", "a", "--force").refused("this is a folder, not a file")
    assert (abc / "letter.html").read_text() == "<p>Dear friend"
    assert sorted(p.name for p in (abc / "new").iterdir()) == ["page.html"]
    with_json = adapter("diff", "a", "b", "--html", "other.html", "--json")
    assert with_json.json["pairs"][0]["both"] == 5
    assert (abc / "other.html").exists()


def test_a_failure_leaves_no_page(adapter: Command, abc: Path) -> None:
    tensors = abc / "b" / "adapter_model.safetensors"
    data = bytearray(tensors.read_bytes())
    data[-4:] = np.float32("nan").tobytes()
    tensors.write_bytes(data)
    adapter("diff", "a", "b", "--html", "page.html").refused("NaN")
    assert not (abc / "page.html").exists()
    assert not [p for p in abc.iterdir() if ".adapter-" in p.name]


def test_help_needs_no_torch(tmp_path: Path) -> None:
    code = "import sys; from adapterhub_lite.cli import run; sys.exit(run(sys.argv[1:]) or 'torch' in sys.modules)"
    env: dict[str, Any] = {**os.environ}
    done = subprocess.run([sys.executable, "-c", code, "diff", "--help"], capture_output=True, timeout=60, env=env)
    assert done.returncode == 0, done
    assert b"--html" in done.stdout
