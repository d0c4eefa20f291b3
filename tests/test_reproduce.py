"""`adapter reproduce`: whatever a merge was asked for, its output says, and one changed bit is found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from peers import LLAMA, write_adapter
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import adapterhub_lite as ah
from adapterhub_lite.reproduction import differences, reproduce

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Done, Handmade

    Command = Callable[..., Done]

LAYERS = {"net.layers.0.q": 2, "net.layers.0.k": 3, "net.layers.1.q": 2, "net.conv": 2}
WEIGHTS = "adapter_model.safetensors"
A = {"weight": 1, "adapter": "a", "sha256": {WEIGHTS: "0" * 64}}
OF = {"rule": "sum", "terms": [A]}


@pytest.fixture
def ab(handmade: Handmade, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Adapters a, b and c in the working directory, which is returned."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("abc"):
        handmade(tmp_path / name, LAYERS, seed=seed, dtype=torch.float16 if name == "c" else torch.float32)
    return tmp_path


def header(folder: Path) -> dict[str, object]:
    with safe_open(folder / WEIGHTS, "pt") as file:
        found: dict[str, object] = json.loads(file.metadata()["adapterhub_lite"])
    return found


@pytest.mark.parametrize(
    "words",
    [
        "a b",
        "a",
        "a a --weights 1 -0.5",
        "a b c --weights 1 0 -0.5 --rank 2",
        "a b --dtype bf16 --max-error 0.3",
        "a c --budget 900 --dtype fp16",
        "a b c --rule ties --density 0.4 --rank 3",
        "a b --rule dare_linear --seed 7 --density 0.5 --max-error 0.4",
        "a b --rule slerp --weights 0.2 0.8",
    ],
)
def test_what_is_asked_for_is_stored(adapter: Command, ab: Path, words: str) -> None:
    assert adapter("merge", *words.split(), "-o", "out").code == 0
    done = adapter("reproduce", "out")
    assert done.code == 0, done
    assert "every bit is the same" in done.out


def test_a_recipe_with_all_that_differs_by_module(adapter: Command, ab: Path) -> None:
    (ab / "r.toml").write_text(
        'rule = "magnitude_prune"\nrank = 4\n[at."*.k"]\ndensity = 0.9\n'
        '[[adapters]]\npath = "a"\nweight = {"*.q" = [1, 2], "*" = 0.5}\n[[adapters]]\npath = "b"\nweight = 1\n'
    )
    assert adapter("merge", "--recipe", "r.toml", "-o", "out").code == 0
    assert adapter("reproduce", "out", "--json").json == {
        "out": "out", "same": True, "differences": [], "warnings": [],
    }  # fmt: skip


def test_sums_in_python_of_any_depth(ab: Path) -> None:
    a, b, c = (ah.load(ab / name) for name in "abc")
    inner = (a - 0.5 * b).truncate(budget=700) + ah.merge([b, c], "ties", density=0.7).truncate(rank=2)
    (0.3 * inner + a).save(ab / "out", dtype=torch.float64)
    assert reproduce(ab / "out").differences == ()


def test_inputs_are_found_by_what_they_are(adapter: Command, ab: Path) -> None:
    assert adapter("merge", "a", "b", "-o", "new/out").code == 0
    adapter("reproduce", "new/out").refused("new/out", "beside it", "'a'", "'b'", "--adapters")
    adapter("reproduce", "new/out", "--adapters", "a", "c").refused("'b'")
    (ab / "deep/er").mkdir(parents=True)
    shutil.move(ab / "a", ab / "deep/er/x")
    shutil.move(ab / "b", ab / "deep/y")
    assert adapter("reproduce", "new/out", "--in", "deep").code == 0
    assert adapter("reproduce", "--adapters", "deep/y", "c", "deep/er/x", "--", "new/out").code == 0
    config = ab / "deep/y/adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 4'))
    adapter("reproduce", "new/out", "--in", "deep").refused("'b'", "there")


def test_a_changed_bit_is_found(adapter: Command, ab: Path) -> None:
    assert adapter("merge", "a", "b", "-o", "out").code == 0
    path = ab / "out" / WEIGHTS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    done = adapter("reproduce", "out", "--json")
    assert done.code == 1
    (one,) = done.json["differences"]
    last = max(load_file(path), key=lambda key: len(key) and _place(path, key))
    assert (one["file"], one["tensor"]) == (WEIGHTS, last)
    assert "1 of " in one["what"]
    text = adapter("reproduce", "out")
    assert text.code == 1
    assert last in text.out
    assert text.err == "adapter: out: 1 difference from what its recipe makes\n"


def _place(path: Path, key: str) -> int:
    raw = path.read_bytes()
    entries = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return int(entries[key]["data_offsets"][1])


def test_all_that_can_differ_is_told(adapter: Command, ab: Path) -> None:
    assert adapter("merge", "a", "b", "-o", "out").code == 0
    shutil.copytree("out", "other")
    tensors = load_file(ab / "other" / WEIGHTS)
    first, second, third, *_ = sorted(tensors)
    del tensors[first]
    tensors[second] = tensors[second].half()
    tensors["more"] = torch.zeros(2)
    save_file(tensors, ab / "other" / WEIGHTS, {"format": "pt"})
    (ab / "other/adapter_config.json").unlink()
    found = {(d.file, d.tensor): d.what for d in differences(ab / "other", ab / "out")}
    assert found[WEIGHTS, first] == "is missing"
    assert found[WEIGHTS, second].startswith("is F16")
    assert found[WEIGHTS, "more"] == "is not made by the recipe"
    assert found[WEIGHTS, None] == "has another header"
    assert found["adapter_config.json", None] == "is missing"
    assert len(found) == 5
    assert (WEIGHTS, third) not in found


def test_another_version_is_a_warning(adapter: Command, ab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("adapterhub_lite.save.__version__", "0.0.1")
        assert adapter("merge", "a", "b", "-o", "out").code == 0
    done = adapter("reproduce", "out")
    assert done.code == 0, done
    assert "warning: it was made by version 0.0.1" in done.err


def rewritten(folder: Path, change: Callable[[dict[str, object]], object]) -> None:
    facts = header(folder)
    change(facts)
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, {"format": "pt", "adapterhub_lite": json.dumps(facts)})


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (None, "no recipe"),
        ({"rule": "sum", "terms": []}, "no merge"),
        ({"rule": "sum", "terms": [3]}, "no merge"),
        ({"rule": "sum", "terms": [{"weight": "1", "adapter": "a", "sha256": {"x": "y"}}]}, "no merge"),
        ({"rule": "sum", "terms": [{"weight": 1, "adapter": None}]}, "no merge"),
        ({"rule": "sum", "terms": [{"weight": 1, "adapter": "a", "sha256": {"../x": "y"}}]}, "no merge"),
        ({"rule": "sum", "terms": [{"weight": 1, "rule": "difference", "base": {}}]}, "no merge"),
        ({"rule": "sum", "terms": [{"weight": 1, "rule": "truncate", "rank": "1", "of": 3}]}, "no merge"),
        ({"rule": "sum", "dtype": "I8", "terms": [A]}, "no merge"),
        ({"rule": "sum", "terms": [{"weight": 1, "rule": "truncate", "rank": "1", "of": OF}]}, "no merge"),
        ({"rule": "sum", "terms": [{"weight": 1, "rule": "truncate", "budget": 1.5, "of": OF}]}, "no merge"),
        ({"rule": "sum", "terms": [{"weight": 1, "rule": "tise", "options": {}, "terms": [3]}]}, "no merge"),
    ],
)
def test_a_strangers_recipe(adapter: Command, ab: Path, recipe: object, said: str) -> None:
    assert adapter("merge", "a", "b", "-o", "out").code == 0
    rewritten(ab / "out", lambda facts: facts.pop("recipe") if recipe is None else facts.update(recipe=recipe))
    adapter("reproduce", "out").refused("out", said)


def test_what_is_kept(adapter: Command, tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        write_adapter(tmp_path / name, LLAMA, rank=2, alpha=3, seed=seed, modules_to_save=["lm_head"])
    for keep in (tmp_path / "b", "none"):
        given = [tmp_path / "a", tmp_path / "b", "--keep", keep, "--any-base", "-o", tmp_path / "out", "--force"]
        assert adapter("merge", *given).code == 0
        assert adapter("reproduce", tmp_path / "out").code == 0
    assert str(tmp_path) not in json.dumps(header(tmp_path / "out"))


@pytest.mark.parametrize(
    "words", ["--weights 0.7 0", "--rounding stochastic --rounding-seed 3 --at *.q_proj=1,-1 --any-base"]
)
def test_a_model(adapter: Command, tmp_path: Path, words: str) -> None:
    LLAMA.build().save_pretrained(tmp_path / "base")  # type: ignore[operator]
    for seed, name in enumerate("ab"):
        write_adapter(tmp_path / name, LLAMA, rank=2, alpha=3, seed=seed)
    given = [tmp_path / "a", tmp_path / "b", "--into", tmp_path / "base", *words.split()]
    assert adapter("merge", *given, "-o", tmp_path / "out").code == 0
    assert adapter("reproduce", tmp_path / "out").code == 0
    (tmp_path / "base").rename(tmp_path / "moved")
    adapter("reproduce", tmp_path / "out").refused("the base 'base'")
    assert adapter("reproduce", tmp_path / "out", "--base", tmp_path / "moved").code == 0
    path = tmp_path / "out/model.safetensors"
    tensors = load_file(path)
    name = max(tensors)
    tensors[name].view(-1)[0] += 1
    save_file(tensors, path, {"format": "pt"})
    done = adapter("reproduce", tmp_path / "out", "--base", tmp_path / "moved", "--json")
    assert done.code == 1
    assert [d["tensor"] for d in done.json["differences"] if d["tensor"]] == [name]
