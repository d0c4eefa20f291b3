"""`adapter merge --report`: the page against dense matrices, its refusals, and Chromium."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from browser import CHROMIUM, Browser
from peers import dense_delta
from torch import nn

import adapterhub_lite as ah

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Done, Handmade

    Command = Callable[..., Done]

LAYERS = {"net.layers.0.q": 3, "net.layers.0.k": 2, "net.layers.1.q": 3, "net.layers.1.k": 2, "net.conv": 2}
WEIGHTS = (0.7, -0.4)


@pytest.fixture
def ab(handmade: Handmade, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Adapters a and b in the working directory, which is returned; b lacks a module."""
    monkeypatch.chdir(tmp_path)
    handmade(tmp_path / "a", LAYERS, seed=1)
    handmade(tmp_path / "b", {name: r for name, r in LAYERS.items() if name != "net.conv"}, seed=2, scale=2.0)
    return tmp_path


def merged(adapter: Command, *args: object) -> Done:
    done = adapter("merge", "a", "b", "--weights", *WEIGHTS, "-o", "out", "--report", "page.html", *args)
    assert done.code == 0, done
    return done


def rows(page: Path) -> dict[str, list[str]]:
    """The table of all modules."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"<tr><th>([^<]*)</th>((?:<td>[^<]*</td>)+)</tr>", text)
    return {name: re.findall(r"<td>([^<]*)</td>", cells) for name, cells in found}


@pytest.mark.parametrize("truncation", [(), ("--rank", 2), ("--dtype", "bfloat16")])
def test_its_numbers_are_those_of_the_files(adapter: Command, ab: Path, truncation: tuple[object, ...]) -> None:
    errors = merged(adapter, *truncation, "--json").json
    A, B, R = (dense_delta(ab / name) for name in ("a", "b", "out"))
    found = rows(ab / "page.html")
    assert found.keys() == A.keys()
    for name, (shape, rank, error, norm, kept_a, kept_b) in found.items():
        out, into = R[name].shape
        assert shape == f"{out}×{into}"
        assert int(rank) == errors["modules"][name]["rank"]
        assert float(error) == pytest.approx(errors["modules"][name]["error"], rel=6e-3)
        assert float(norm) == pytest.approx(float(R[name].norm()), rel=6e-3)
        assert float(kept_a) == pytest.approx(float((R[name] * A[name]).sum() / A[name].norm() ** 2), abs=6e-4)
        if name in B:
            assert float(kept_b) == pytest.approx(float((R[name] * B[name]).sum() / B[name].norm() ** 2), abs=6e-4)
        else:
            assert kept_b == "-"
    text = (ab / "page.html").read_text(encoding="utf-8")
    whole = sum(float((R[n] * A[n]).sum()) for n in A) / sum(float(A[n].norm()) ** 2 for n in A)
    assert f"<dt>weight</dt><dd>0.7</dd><dt>kept</dt><dd>{whole:.3f}</dd>" in text
    assert "Layer by layer" in text


def test_a_module_that_was_dropped_keeps_nothing(adapter: Command, handmade: Handmade, ab: Path) -> None:
    handmade(ab / "b", {"net.layers.0.q": 2, "net.layers.1.k": 1}, seed=5, scale=1e-4)
    handmade(ab / "a", {"net.layers.0.k": 2}, seed=6, scale=100)
    merged(adapter, "--budget", 140, "-q")
    found = rows(ab / "page.html")
    dropped = [name for name in ("net.layers.0.q", "net.layers.1.k") if found[name][1] == "0"]
    assert dropped
    for name in dropped:
        assert found[name][2:] == ["1", "-", "-", "0.000"]


def test_what_is_said_and_what_is_not(adapter: Command, ab: Path) -> None:
    assert merged(adapter).out.endswith("wrote page.html\n")
    assert merged(adapter, "--force", "-q") == (0, "", "")
    before = (ab / "page.html").read_bytes(), (ab / "out" / "adapter_model.safetensors").read_bytes()
    adapter("merge", "a", "b", "-o", "new", "--report", "page.html").refused("page.html", "exists")
    assert not (ab / "new").exists()  # refused before anything was done
    adapter("merge", "a", "b", "-o", "out", "--report", "other.html").refused("out", "exists")
    assert not (ab / "other.html").exists()
    assert before == ((ab / "page.html").read_bytes(), (ab / "out" / "adapter_model.safetensors").read_bytes())


def test_wrong_usage(adapter: Command, ab: Path) -> None:
    for args, words in (
        (("-o", "out", "--dry-run"), "--dry-run writes nothing"),
        (("-o", "."), "is in OUT"),
        (("-o", "a", "--force"), "nothing is left to report on"),
    ):
        done = adapter("merge", "a", "b", "--report", "page.html", *args)
        assert done.code == 2
        assert words in done.err
    assert sorted(path.name for path in ab.iterdir()) == ["a", "b"]


def test_an_adapter_without_a_delta_has_no_report(adapter: Command, ab: Path) -> None:
    adapters = ah.adapt(nn.ModuleDict({"q_proj": nn.Linear(7, 5)}))
    adapters.add("a", ah.method("dora", rank=2), ["q_proj"])
    adapters.save("a", ab / "dora")
    done = adapter("merge", "dora", "--weights", "1", "-o", "out", "--dtype", "bfloat16", "--report", "page.html")
    done.refused("depends on the base weights")
    assert not (ab / "out").exists()
    assert not (ab / "page.html").exists()


def test_many_inputs_are_shown_by_weight(adapter: Command, handmade: Handmade, ab: Path) -> None:
    names = [f"n{i}" for i in range(14)]
    for i, name in enumerate(names):
        handmade(ab / name, {"net.layers.0.k": 1}, seed=i)
    weights = [1 + i for i in range(14)]
    done = adapter("merge", *names, "--weights", *weights, "-o", "many", "--report", "page.html", "-q")
    assert done.code == 0
    text = (ab / "page.html").read_text(encoding="utf-8")
    assert "The 12 adapters of the largest weights, of 14." in text
    cards = re.findall(r"<h3>(.*?)</h3>", text)
    assert cards == ["The result", *names[2:]]


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (on Debian: apt-get install chromium)")
def test_it_opens_in_chromium(adapter: Command, ab: Path, tmp_path: Path) -> None:
    merged(adapter, "--rank", 2, "-q")
    with Browser(tmp_path / "profile") as browser:
        for width, dark in ((390, False), (390, True), (1280, False), (1280, True)):
            found = browser.open(ab / "page.html", width=width, dark=dark, print_it=width > 390)
            assert "What the merge kept" in found.shown
            assert (found.complaints, found.requests) == ([], [])
            assert found.width <= width
            assert all(name in found.shown for name in LAYERS)
            assert len(found.screenshot) > 20_000
            assert width == 390 or found.pdf.startswith(b"%PDF-")


def test_without_a_report_no_page_is_imported(ab: Path) -> None:
    code = (
        "import sys; from adapterhub_lite.cli import run; "
        "sys.exit(run(sys.argv[1:]) or any('page' in name for name in sys.modules if name.startswith('adapterhub')))"
    )
    command = [sys.executable, "-c", code, "merge", "a", "b", "-o", "out", "-q"]
    assert subprocess.run(command, cwd=ab, timeout=120).returncode == 0
