"""A composition in a folder: it comes back equal, is written whole or not at all, and strangers are not believed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_composition import Net, inputs, net, output
from test_gates import unipelt
from torch import nn
from toy import bits, llama, logits

import adapterhub_lite as ah
from adapterhub_lite import compose

TREE = ah.chain(0.7 * ah.use("a") - 0.1 * ah.use("b"), ah.mean("c", ah.Gate("g") * ah.use("a")))


def saved(out: Path, tree: Any = TREE) -> Net:
    model, adapters = net()
    g = adapters.add_gate("g", of=["a", "b"])
    assert g == ah.Gate("g")
    adapters.add_gate("unused", of="a")
    for key, p in model.named_parameters():
        if ".g." in key:
            p.data += 1
    adapters.activate(tree)
    adapters.save_composition(out)
    return model


def bare() -> Net:
    model, adapters = net()
    for name in adapters.names:
        adapters.remove(name)
    return model


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_it_comes_back_equal_and_the_bytes_are_always_the_same(tmp_path: Path) -> None:
    model = saved(tmp_path / "one")
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == [
        "adapters",
        "composition.json",
        "gates.safetensors",
    ]
    other = bare()
    adapters = ah.adapt(other)
    assert adapters.load_composition(tmp_path / "one") == TREE
    assert adapters.composition == TREE
    assert adapters.names == ("a", "b", "c")
    assert adapters.gates == {"g": ah.Gate("g")}
    assert torch.equal(output(other, inputs()), output(model, inputs()))
    mine, theirs = bits(model), bits(other)
    assert {key for key in mine if key not in theirs} == {
        key for key in mine if any(name in key.split(".") for name in ("d", "e", "unused"))
    }
    assert all(mine[key] == theirs[key] for key in theirs)
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    assert trained == {key for key, p in other.named_parameters() if p.requires_grad}
    adapters.save_composition(tmp_path / "two")
    saved(tmp_path / "three")
    first = files(tmp_path / "one")
    assert first == files(tmp_path / "two") == files(tmp_path / "three")
    assert not any(str(tmp_path).encode() in content for content in first.values())


def test_unipelt_comes_back(tmp_path: Path) -> None:
    model, adapters = unipelt(torch.float32)
    adapters.save_composition(tmp_path / "unipelt")
    again = llama()
    other = ah.adapt(again)
    assert other.load_composition(tmp_path / "unipelt") == adapters.composition
    assert torch.equal(logits(again), logits(model))
    loaded = ah.load(tmp_path / "unipelt" / "adapters" / "lora")  # each adapter is one of the usual folders
    assert len(loaded.sites) == 4


def test_a_route_and_a_tree_without_gates_come_back(tmp_path: Path) -> None:
    model, adapters = net()
    which = adapters.add_gate("which", of=["a", "e"], outputs=2, per="token", reads="output")
    for i, tree in enumerate((ah.route(which, "a", None), ah.mean("a", ah.chain("e", {"b": 0.3})), ah.use("d"))):
        adapters.activate(tree)
        adapters.save_composition(tmp_path / str(i))
        other = bare()
        assert ah.adapt(other).load_composition(tmp_path / str(i)) == tree
        assert torch.equal(output(other, inputs()), output(model, inputs()))
    assert not (tmp_path / "2" / "gates.safetensors").exists()


def test_writing_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    model = saved(out)
    before, adapters = files(out), ah.adapt(model)
    with pytest.raises(ah.OutputExists, match="the output exists"):
        adapters.save_composition(out)
    adapters.activate(ah.mean("a", "b", "c"))

    def broken(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(json, "dumps", broken)
        with pytest.raises(ah.FileError):
            adapters.save_composition(out, force=True)
    assert files(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    adapters.save_composition(out, force=True)
    assert json.loads((out / "composition.json").read_text())["composition"]["kind"] == "mean"
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ah.OutputExists, match="not deleted even with"):
        adapters.save_composition(out, force=True)


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    _, adapters = net()
    with pytest.raises(ah.ConfigError, match="no adapter is active"):
        adapters.save_composition(tmp_path / "out")
    for name, what in (("a b", "cannot be a folder"), ("A", "differ in capitals")):
        adapters.add(name, ah.method("lora"), "up")
        adapters.activate({name: 1, "a": 1})
        with pytest.raises(ah.ConfigError, match=what):
            adapters.save_composition(tmp_path / "out")
    adapters.activate("a")
    adapters.merge()
    with pytest.raises(ah.ConfigError, match="cannot save a composition while adapters are merged"):
        adapters.save_composition(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_base_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "out")
    other: Any = Net().double()
    with pytest.raises(ah.FileError, match="was trained on other weights"):
        ah.adapt(other).load_composition(tmp_path / "out")
    assert ah.adapt(other).load_composition(tmp_path / "out", any_base=True) == TREE


# Strangers --------------------------------------------------------------------------------------------------


def manifest(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "composition.json"
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value))

    return apply


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "gates.safetensors"
        value = load_file(path)
        change(value)
        save_file(value, path)

    return apply


def text(content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "composition.json").write_text(content) and None


def nested(value: dict[str, Any]) -> None:
    for _ in range(200):
        value["composition"] = {"kind": "chain", "of": [value["composition"]]}


def using(name: str) -> Callable[[Path], None]:
    return manifest(lambda v: v.update(composition={"kind": "use", "name": name}))


HOSTILE: dict[str, Callable[[Path], Any]] = {
    "no manifest": lambda folder: (folder / "composition.json").unlink(),
    "not JSON": text("{"),
    "a list": text("[]"),
    "twice": text('{"layout": 1, "layout": 1, "composition": {"kind": "use", "name": "a"}, "base": {}}'),
    "NaN": text('{"layout": NaN, "composition": {"kind": "use", "name": "a"}, "base": {}}'),
    "deep JSON": text("[" * 100_000),
    "another layout": manifest(lambda v: v.update(layout=2)),
    "true layout": manifest(lambda v: v.update(layout=True)),
    "more": manifest(lambda v: v.update(code="import os")),
    "less": manifest(lambda v: v.pop("base")),
    "no tree": manifest(lambda v: v.update(composition=None)),
    "nobody": manifest(lambda v: v.update(composition={"kind": "base"})),
    "deep": manifest(nested),
    "a path": using("../../etc"),
    "an absolute path": using("/etc"),
    "a backslash": using("..\\a"),
    "no name": using(""),
    "of a module": using("forward"),
    "not there": using("z"),
    "a sketch of text": manifest(lambda v: v.update(base="x")),
    "a sketch of less": manifest(lambda v: v.update(base={"up": [1.0]})),
    "another base": manifest(lambda v: v.update(base={name: [9.0] * 8 for name in v["base"]})),
    "no gates": lambda folder: (folder / "gates.safetensors").unlink(),
    "a gate less": tensors(lambda v: v.pop("up.g.b")),
    "a layer less": tensors(lambda v: [v.pop("up.g.b"), v.pop("up.g.W")]),
    "a gate more": tensors(lambda v: v.update({"up.h.b": torch.zeros(1)})),
    "a layer more": tensors(lambda v: v.update({"left.g.b": torch.zeros(1)})),
    "a tensor more": tensors(lambda v: v.update({"up.g.c": torch.zeros(1)})),
    "another shape": tensors(lambda v: v.update({"up.g.W": torch.zeros(1, 13)})),
    "integers": tensors(lambda v: v.update({"up.g.W": torch.zeros(1, 12, dtype=torch.int32)})),
    "not finite": tensors(lambda v: v.update({"up.g.b": torch.full((1,), float("nan"))})),
    "a pickle": lambda folder: torch.save({}, folder / "gates.safetensors"),
    "an adapter less": lambda folder: shutil.rmtree(folder / "adapters" / "a"),
    "a broken adapter": lambda folder: (folder / "adapters" / "a" / "adapter_config.json").write_text("{}"),
}


@pytest.mark.parametrize("spoil", HOSTILE.values(), ids=HOSTILE)
def test_what_is_wrong_is_refused_and_nothing_is_changed(spoil: Callable[[Path], Any], tmp_path: Path) -> None:
    saved(tmp_path / "out")
    spoil(tmp_path / "out")
    model = bare()
    adapters = ah.adapt(model)
    before = bits(model), [(key, p.requires_grad) for key, p in model.named_parameters()]
    with pytest.raises(ah.AdapterError) as error:
        adapters.load_composition(tmp_path / "out")
    assert "\n" not in str(error.value)
    assert (bits(model), [(key, p.requires_grad) for key, p in model.named_parameters()]) == before
    assert adapters.names == ()
    assert adapters.gates == {}


def test_names_that_are_taken_are_refused_and_what_was_on_stays(tmp_path: Path) -> None:
    saved(tmp_path / "out")
    model, adapters = net()
    adapters.activate("b")
    want = output(model, inputs())
    with pytest.raises(ah.ConfigError, match="there is an adapter 'a' already"):
        adapters.load_composition(tmp_path / "out")
    for name in "abc":
        adapters.remove(name)
    adapters.add("g", ah.method("lora"), "up")
    with pytest.raises(ah.ConfigError, match="there is an adapter 'g' already"):
        adapters.load_composition(tmp_path / "out")
    adapters.remove("g")
    adapters.activate("e")
    tensors(lambda v: [v.pop("up.g.b"), v.pop("up.g.W")])(tmp_path / "out")
    want = output(model, inputs())
    with pytest.raises(ah.ConfigError, match="up: the gate 'g' was not made for this layer"):
        adapters.load_composition(tmp_path / "out")
    assert adapters.names == ("d", "e")
    assert adapters.active == {"e": 1.0}
    assert torch.equal(output(model, inputs()), want)
    assert not any(isinstance(module, nn.Module) and name.endswith(".g") for name, module in model.named_modules())
    assert compose.names(adapters.composition) == ("e",)
