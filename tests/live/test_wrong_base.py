"""An adapter knows its base by a few of the weights, and is not loaded on another one."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterhub_lite as ah
from adapterhub_lite import FileError, NotMergeable


def base(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Embedding(40, 12), nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 9, bias=False))


def saved(folder: Path, seed: int = 0, targets: Any = ("0", "1", "3")) -> Path:
    model = base(seed)
    adapters = ah.adapt(model)
    adapters.add("a", ah.method("lora", rank=2), list(targets))
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.1
    adapters.save("a", folder)
    return folder


def facts(folder: Path) -> dict[str, Any]:
    data = (folder / "adapter_model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    found: dict[str, Any] = json.loads(header["__metadata__"]["adapterhub_lite"])
    return found


def quantised(W: Tensor) -> Tensor:
    """To 4 bits, with a scale for each block of 64, as NF4 nearly does."""
    blocks = W.reshape(-1, 4)
    top = blocks.abs().amax(1, keepdim=True)
    return ((blocks / top * 7).round() / 7 * top).reshape(W.shape)


def test_another_base_is_refused_unless_forced(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a")
    other = base(1)
    with pytest.raises(FileError, match="on another base model") as raised:
        ah.adapt(other).load(folder, "a")
    assert "any_base=True" in str(raised.value)
    assert ah.adapt(other).names == ()
    ah.adapt(other).load(folder, "a", any_base=True)
    assert ah.adapt(other).names == ("a",)


def test_one_layer_of_another_base_is_noticed(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a")
    model = base()
    model[3].weight.data = base(1)[3].weight.data
    with pytest.raises(FileError, match="'3'"):
        ah.adapt(model).load(folder, "a")


@pytest.mark.parametrize(
    "change",
    [lambda W: W.bfloat16(), lambda W: W.half(), quantised, lambda W: W + 0.02 * W.std() * torch.randn_like(W)],
    ids=["bfloat16", "float16", "4 bits", "trained further"],
)
def test_the_same_base_in_another_form_is_taken(tmp_path: Path, change: Any) -> None:
    folder = saved(tmp_path / "a")
    model = base()
    with torch.random.fork_rng(devices=[]):
        for p in model.parameters():
            p.data = change(p.data)
    ah.adapt(model).load(folder, "a")


def test_the_sketch_is_of_the_base_also_while_adapters_are_merged(tmp_path: Path) -> None:
    model = base()
    adapters = ah.adapt(model)
    adapters.add("a", ah.method("lora", rank=2, init_weights="random", alpha=900), ["1", "3"])
    adapters.save("a", tmp_path / "before")
    adapters.merge()
    adapters.save("a", tmp_path / "merged")
    assert facts(tmp_path / "before")["base"] == facts(tmp_path / "merged")["base"]
    assert facts(tmp_path / "before")["base"].keys() == {"1", "3"}


def test_sums_keep_the_sketch_and_refuse_parts_of_two_bases(tmp_path: Path) -> None:
    a, b = ah.load(saved(tmp_path / "a", targets=("0", "1"))), ah.load(saved(tmp_path / "b", targets=("1", "3")))
    (0.5 * a + 0.5 * b).save(tmp_path / "both")
    assert facts(tmp_path / "both")["base"].keys() == {"0", "1", "3"}
    ah.adapt(base()).load(tmp_path / "both", "ab")
    other = ah.load(saved(tmp_path / "other", seed=1))
    with pytest.raises(NotMergeable, match="on another base model") as raised:
        (a + other).save(tmp_path / "out")
    assert "--any-base" in str(raised.value)
    (a + other).save(tmp_path / "out", any_base=True)


def test_large_adapters_have_a_small_sketch(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(100)))
    adapters = ah.adapt(model)
    adapters.add("a", ah.method("lora", rank=1), "all-linear")
    adapters.save("a", tmp_path / "a")
    sketch = facts(tmp_path / "a")["base"]
    assert len(sketch) == 32
    assert {len(values) for values in sketch.values()} == {8}


@pytest.mark.parametrize("entry", [3, [], {"1": [1.0]}, {"1": ["x"] * 8}, {"1": None}, {"nowhere": [1.0] * 8}])
def test_what_is_no_sketch_says_nothing(tmp_path: Path, entry: Any) -> None:
    from adapterhub_lite import sketch

    told = sketch.told({"base": entry})
    assert sketch.differing(told, sketch.of({"1": base()[1].weight})) is None
