"""Configurations of the literature that are two methods on one model: MAM (He et al. 2021, §4.6)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from toy import base_bits, llama, logits, tokens

import adapterhub_lite as ah

PREFIX = ah.method("prefix_tuning", num_virtual_tokens=6)
BESIDE = ah.method("bottleneck", placement="parallel", scaling=4.0, bottleneck_size=8)


def mam() -> tuple[Any, ah.Adapters]:
    """A prefix at attention, a scaled parallel bottleneck at the feed-forward net, both off their start."""
    model = llama()
    adapters = ah.adapt(model)
    adapters.add("prefix", PREFIX, targets="self_attn")
    adapters.add("beside", BESIDE, targets="mlp")
    adapters.activate({"prefix": 1, "beside": 1})
    rng = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.2 * torch.randn(p.shape, generator=rng)
    return model, adapters


class Beside(nn.Module):
    """The formula: y + 4 · U ReLU(D x + b) + 4 c."""

    def __init__(self, mlp: nn.Module, p: dict[str, Tensor]) -> None:
        super().__init__()
        self.mlp, self.p = mlp, p

    def forward(self, x: Tensor) -> Tensor:
        u = torch.relu(x @ self.p["down"].mT + self.p["down_bias"]) @ self.p["up"].mT + self.p["up_bias"]
        y: Tensor = self.mlp(x) + 4 * u
        return y


def test_mam_is_its_two_parts(tmp_path: Path) -> None:
    model, adapters = mam()
    both = logits(model)
    adapters.save("prefix", tmp_path / "prefix")
    alone = llama()
    for mine, layer in zip(model.model.layers, alone.model.layers, strict=True):
        p = {name: t.detach().clone() for name, t in mine.mlp.adapters.beside.named_parameters()}
        layer.mlp = Beside(layer.mlp, p)
    only = ah.adapt(alone)
    only.load(tmp_path / "prefix", "prefix")
    torch.testing.assert_close(logits(alone), both, rtol=1e-5, atol=1e-5)
    for name in ("prefix", "beside"):
        adapters.activate(name)
        assert (logits(model) - both).abs().max() > 1e-2
    adapters.activate(None)
    assert torch.equal(logits(model), logits(llama()))


def test_mam_trains_both_and_comes_back_from_two_files(tmp_path: Path) -> None:
    model, adapters = mam()
    before, ids = base_bits(model), tokens(4, 10)
    optimizer = torch.optim.AdamW(adapters.param_groups(lr=1e-2))
    losses = []
    for _ in range(15):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert base_bits(model) == before
    again = llama()
    other = ah.adapt(again)
    for name in ("prefix", "beside"):
        adapters.save(name, tmp_path / name)
        other.load(tmp_path / name, name)
    other.activate({"prefix": 1, "beside": 1})
    assert torch.equal(logits(again), logits(model))
