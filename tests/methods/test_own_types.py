"""A method whose peft_type PEFT does not have: in PEFT's layout all the same, and refused by PEFT by that name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from adapterhub_lite_plugins.formats.peft import PeftFormat
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

import adapterhub_lite as ah
from adapterhub_lite import FileError
from adapterhub_lite.format import Contents
from adapterhub_lite.protocol import Method, Params
from adapterhub_lite.site import Site
from adapterhub_lite.source import Stored

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True, kw_only=True)
class Shift(Method):
    """Adds a trained vector to the output, BitFit's biases.

    Options: `steps`, a number that changes nothing.
    """

    name = "shift"
    paper = "https://arxiv.org/abs/2106.10199"
    site_kinds = frozenset({"linear"})
    peft_type = "SHIFT"

    steps: int = 1

    def init(self, site: Site, rng: torch.Generator) -> Mapping[str, nn.Parameter | Tensor]:
        return {"b": nn.Parameter(torch.zeros(site.shape[0]))}

    def forward(self, p: Params, x: Tensor, y: Tensor, site: Site) -> Tensor:
        return y + site.along(p["b"])

    def merge(self, p: Params, weight: Tensor, bias: Tensor | None, site: Site) -> tuple[Tensor, Tensor | None]:
        return weight, p["b"] if bias is None else bias + p["b"]

    def peft_keys(self) -> Mapping[str, Mapping[str, str]]:
        return {"": {"b": "shift_b"}}

    @classmethod
    def from_peft(cls, config: dict[str, Any]) -> Shift | None:
        return cls(steps=config.pop("shift_steps"))

    def to_peft(self) -> dict[str, Any]:
        return {"shift_steps": self.steps}

    def place(self, family: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, tuple[int, ...], tuple[int, int]]:
        (out,) = shapes["b"]
        return "linear", (out, -1), (out, -1)


@dataclass(frozen=True, kw_only=True)
class Pathless(Shift):
    """One that forgot to say how it is read.

    Options: `steps`.
    """

    name = "pathless"

    @classmethod
    def from_peft(cls, config: dict[str, Any]) -> Shift | None:
        return None


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3, bias=False))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    adapters: Any = ah.adapt(model())
    adapters.add("a", Shift(steps=4), ["0", "2"])
    with torch.no_grad():
        for i, p in enumerate(p for p in adapters.model.parameters() if p.requires_grad):
            p.copy_(torch.arange(len(p)) - 1.5 * i - 1)
    assert float(adapters.save("a", tmp_path / "a")) == 0
    return tmp_path / "a"


def read(folder: Path, *methods: type[Method]) -> Contents:
    known = {cls.name: cls for cls in methods}
    return PeftFormat().read(folder, lambda name: known if name is None else known[name])


def test_it_has_peft_s_layout_and_comes_back(folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())
    assert {key: config[key] for key in ("peft_type", "shift_steps", "target_modules")} == {
        "peft_type": "SHIFT",
        "shift_steps": 4,
        "target_modules": ["0", "2"],
    }
    tensors = load_file(folder / WEIGHTS)
    assert {key: tuple(t.shape) for key, t in tensors.items()} == {
        "base_model.model.0.shift_b": (7,),
        "base_model.model.2.shift_b": (3,),
    }
    contents = read(folder, type(ah.method("lora")), Shift)
    assert contents.method == Shift(steps=4)
    assert {name: part.shape for name, part in contents.sites.items()} == {"0": (7, 5), "2": (3, 7)}
    stored = Stored(folder, "a", contents, [])
    for name in contents.sites:
        assert torch.equal(stored.saved(name)["b"], tensors[f"base_model.model.{name}.shift_b"])


def test_peft_refuses_it_and_loads_no_half_of_it(folder: Path) -> None:
    with pytest.raises((KeyError, ValueError), match="SHIFT"):
        PeftModel.from_pretrained(model(), folder)


def test_where_the_plugin_is_not_installed_the_type_is_named(folder: Path) -> None:
    with pytest.raises(FileError, match="no installed method reads peft_type 'SHIFT'"):
        ah.load(folder)


def test_a_method_that_reads_nothing_is_said_to(folder: Path) -> None:
    with pytest.raises(FileError, match="peft_type 'SHIFT' with these options"):
        read(folder, Pathless)


def test_what_is_no_weight_change_is_rounded_too(tmp_path: Path) -> None:
    """It has no delta, but does not read the weight either; what its merge does to the bias is what is measured."""
    adapters: Any = ah.adapt(model())
    adapters.add("a", Shift(), ["0", "2"])
    exact = {}
    with torch.no_grad():
        for name, p in adapters.model.named_parameters():
            if p.requires_grad:
                p.copy_(torch.linspace(0.3, 1.7, len(p)))
                exact[f"base_model.model.{name.partition('.')[0]}.shift_b"] = p.detach().double().clone()
    error = adapters.save("a", tmp_path / "a", dtype=torch.bfloat16)
    stored = load_file(tmp_path / "a" / WEIGHTS)
    assert stored.keys() == exact.keys()
    assert all(torch.equal(stored[key], b.bfloat16()) for key, b in exact.items())
    lost = torch.cat([stored[key].double() - b for key, b in exact.items()])
    assert error.of == "delta"
    assert error.overall == pytest.approx(float(lost.norm() / torch.cat([*exact.values()]).norm()), rel=1e-5)
