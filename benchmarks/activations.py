"""Activations that a method keeps for the backward pass, in elements a token: `python benchmarks/activations.py`.

Counted by torch's saved-tensor hooks, each storage once and parameters left out: one linear layer alone, and a small
transformer with adapters at all of its linear layers, or at the blocks or norms that a method is for. Bytes do not
depend on the machine, so there is nothing to time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import adapterhub_lite as ah
from adapterhub_lite.registry import registry

WIDTH, HEADS, LAYERS, VOCABULARY, BATCH, LENGTH = 128, 4, 4, 256, 4, 64
LINEAR = ["q", "k", "v", "o", "up", "down", "head"]
OPTIONS: dict[str, dict[str, Any]] = {
    "vera": {"rank": 64},
    "ia3": {"feedforward": ("down",)},
    "bottleneck": {"bottleneck_size": 8},
}
TARGETS: dict[str, Any] = {
    "bottleneck": ["o", "down"],  # where attention and the feed-forward net end
    "ln_tuning": "all",
}


class Block(nn.Module):
    """Attention and a feed-forward net, each behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, width) -> the same."""
        h = self.norms[0](x)
        q, k, v = (m(h).unflatten(-1, (HEADS, -1)).transpose(1, 2) for m in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        y: Tensor = x + self.down(F.gelu(self.up(self.norms[1](x))))
        return y


class ByteModel(nn.Module):
    """A language model of bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(LAYERS)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        """(batch, length) -> the loss, a scalar."""
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), ids.flatten())


def kept(model: nn.Module, x: Tensor) -> int:
    """Bytes kept for the backward pass of `model`, but for parameters and the input itself."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()} | {x.untyped_storage().data_ptr()}
    found: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            found[t.untyped_storage().data_ptr()] = t  # held, so that no other tensor takes its place
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    assert y.requires_grad
    return sum(t.untyped_storage().nbytes() for t in found.values())


def measure(name: str | None) -> dict[str, float]:
    """For a method, or for full fine-tuning: elements a token of one layer, bytes a token of the model."""
    torch.manual_seed(0)
    layer, model = nn.Sequential(nn.Identity(), nn.Linear(384, 384)), ByteModel()
    if name is not None:
        cls = registry().method(name)
        rank = {"rank": 8} if "rank" in {f.name for f in dataclasses.fields(cls)} else {}
        if cls.site_kinds == {"norm"}:
            layer[1] = nn.LayerNorm(384)
        method = ah.method(name, **rank | OPTIONS.get(name, {}))
        ah.adapt(layer).add("a", method, "1")
        ah.adapt(model).add("a", method, TARGETS.get(name, LINEAR))
    tokens = 512
    x = torch.randn(tokens, 384, requires_grad=True)

    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(x * 1.0)  # what comes in is somebody's output, and kept only if it is needed
            return y

    ids = torch.randint(0, VOCABULARY, (BATCH, LENGTH))
    return {
        "elements a token, one layer": kept(Alone(), x) / 4 / tokens,
        "bytes a token, model": kept(model, ids) / (BATCH * LENGTH),
    }


def bundled() -> dict[str, type[ah.Method]]:
    """The methods that are installed with the package."""
    found = registry().methods()
    return {name: cls for name, cls in found.items() if cls.__module__.startswith("adapterhub_lite_plugins")}


def left_out() -> dict[str, str]:
    """The methods that are not measured, and why: they declare that they wrap the call of a part of a transformer."""
    return {
        name: f"wraps the call of a whole {' or '.join(sorted(cls.site_kinds))}"
        for name, cls in bundled().items()
        if cls.wraps_call
    }


def everything() -> dict[str, dict[str, float]]:
    """The figures of full fine-tuning and of every bundled method but those left out."""
    measured = [name for name in bundled() if name not in left_out()]
    return {name or "full fine-tuning": measure(name) for name in (None, *measured)}


def table(found: dict[str, dict[str, float]]) -> str:
    """In Markdown, as docs/methods.md has it."""
    lora = found["lora"]["bytes a token, model"]
    lines = [
        "| method | one layer, elements a token | all linear layers, bytes a token | of LoRA's |",
        "|---|---|---|---|",
    ]
    for name, row in found.items():
        one, everywhere = row.values()
        lines.append(f"| {name} | {one:,.0f} | {everywhere:,.0f} | {everywhere / lora:.0%} |")
    lines += [f"| {name} | {why} | – | – |" for name, why in left_out().items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = everything()
    print(json.dumps(found, indent=2) if options.json else table(found))


if __name__ == "__main__":
    main()
