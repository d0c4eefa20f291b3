"""Blocks: where hidden states are in what a module gives, how wide they are, and what is known of the base by."""

from __future__ import annotations

from typing import Any, NamedTuple

import peers  # noqa: F401  # before transformers: no access to the Hub
import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

import adapterhub_lite as ah
from adapterhub_lite.site.block import BlockSite

X = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))


class Pair(NamedTuple):
    hidden: Tensor
    weights: Tensor


GIVES: dict[str, Any] = {
    "tensor": lambda y, w: y,
    "tuple": lambda y, w: (y, w),
    "named tuple": Pair,
    "dict": lambda y, w: {"hidden": y, "weights": w},
    "model output": lambda y, w: BaseModelOutput(last_hidden_state=y, attentions=(w,)),
}


class Block(nn.Module):
    """A layer that gives its output in some way."""

    def __init__(self, give: Any) -> None:
        super().__init__()
        self.fc, self.give = nn.Linear(12, 20), give

    def forward(self, x: Tensor) -> Any:
        return self.give(self.fc(x), x.mean())


def first(out: Any) -> Tensor:
    if isinstance(out, Tensor):
        return out
    y: Tensor = out[0] if isinstance(out, tuple) else next(iter(out.values()))
    return y


@pytest.mark.parametrize("how", GIVES)
def test_hidden_states_are_changed_and_all_else_is_as_it_was(how: str) -> None:
    model = nn.ModuleDict({"block": Block(GIVES[how])})
    before = model["block"](X)
    adapters = ah.adapt(model)
    adapters.add("a", ah.method("bottleneck", init_weights="normal", std=0.5, reduction_factor=4), "block")
    got = model["block"](X)
    assert type(got) is type(before)
    assert (first(got) - first(before)).abs().max() > 1e-2
    if isinstance(got, tuple):
        assert torch.equal(got[1], before[1])
    elif not isinstance(got, Tensor):
        assert list(got) == list(before)
        rest, was = (list(out.values())[1] for out in (got, before))
        assert torch.equal(*((rest[0], was[0]) if isinstance(rest, tuple) else (rest, was)))
    if how == "model output":
        assert torch.equal(got.last_hidden_state, first(got))  # by its name too
    adapters.activate(None)
    assert torch.equal(first(model["block"](X)), first(before))


def test_what_has_no_tensor_first_is_refused_by_name() -> None:
    model = nn.ModuleDict({"block": Block(lambda y, w: ([y], w))})
    ah.adapt(model).add("a", ah.method("bottleneck"), "block")
    with pytest.raises(ah.AdapterError, match="block: gives a list, not a tensor"):
        model["block"](X)


def test_widths_are_those_of_the_first_and_last_layers() -> None:
    def widths(*layers: nn.Module) -> tuple[int, int]:
        return BlockSite.of("block", nn.ModuleDict({str(i): layer for i, layer in enumerate(layers)})).shape

    assert widths(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8)) == (8, 12)
    assert widths(nn.LayerNorm(12), nn.Linear(12, 20)) == (20, 12)
    assert widths(nn.Linear(12, 20), nn.Embedding(32, 4)) == (20, 12)  # distances, in T5's attention
    assert widths(nn.Embedding(32, 4)) == (4, 32)
    with pytest.raises(ah.ConfigError, match="block: has no layer that tells"):
        widths(nn.Tanh(), nn.Conv1d(3, 4, 2))


def test_a_block_without_values_is_refused() -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({"block": Block(GIVES["tensor"])})
    with pytest.raises(ah.ConfigError, match="block: the block has no values yet"):
        ah.adapt(model).add("a", ah.method("bottleneck"), "block")


def test_adapters_inside_of_a_block_are_no_part_of_it() -> None:
    """Neither its widths, its dtype nor what it is known by are those of an adapter."""
    model = nn.ModuleDict({"norm": nn.LayerNorm(12, dtype=torch.bfloat16)})
    before = BlockSite.of("norm", model["norm"])
    sample = before.sample
    adapters = ah.adapt(model)
    adapters.add("a", ah.method("bottleneck", around_norm=True, bottleneck_size=5), "norm")
    now = BlockSite.of("norm", model["norm"])
    assert now.shape == before.shape == (12, 12)
    assert now.like.dtype == torch.bfloat16
    assert torch.equal(now.sample, sample)
    assert adapters.summary().adapted == 12
    assert adapters.summary().trained == 2 * 5 * 12 + 5 + 12
