"""LoRA+: which parameter learns at which rate, and that the optimizer's options hold for all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import adapterhub_lite as ah
from adapterhub_lite import ConfigError


def made(**options: Any) -> tuple[nn.Sequential, ah.Adapters]:
    model = nn.Sequential(nn.Embedding(30, 12), nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 6))
    adapters = ah.adapt(model)
    targets = ["1", "3"] if options.get("lora_bias") else ["0", "1", "3"]
    adapters.add("a", ah.method("lora_plus", rank=3, **options), targets)
    return model, adapters


def rates(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, float]:
    names = {id(p): key for key, p in model.named_parameters()}
    return {names[id(p)]: group["lr"] for group in groups for p in group["params"]}


def test_each_factor_has_its_rate() -> None:
    model, adapters = made(ratio=16.0, embedding_lr=1e-5)
    assert rates(model, adapters.param_groups(lr=1e-3)) == {
        "0.adapters.a.embedding_A": 1e-5,
        "0.adapters.a.embedding_B": 1e-5,
        "1.adapters.a.A": 1e-3,
        "1.adapters.a.B": 16e-3,
        "3.adapters.a.A": 1e-3,
        "3.adapters.a.B": 16e-3,
    }


def test_biases_and_heads_learn_at_the_base_rate() -> None:
    model, adapters = made(lora_bias=True)
    head: Any = model[3]
    head.weight.requires_grad_(True)
    head.bias.requires_grad_(True)
    found = rates(model, adapters.param_groups(lr=1e-3))
    assert {key: rate for key, rate in found.items() if not key.endswith((".A", ".B"))} == dict.fromkeys(
        ["1.adapters.a.bias", "3.adapters.a.bias", "3.weight", "3.bias"], 1e-3
    )


def test_weight_decay_is_the_optimizer_s() -> None:
    model, adapters = made(ratio=4.0)
    optimizer = torch.optim.AdamW(adapters.param_groups(lr=0.1), weight_decay=0.5)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.5}
    for p in model.parameters():
        if p.requires_grad:
            p.data.fill_(1.0)
            p.grad = torch.zeros_like(p)
    optimizer.step()  # nothing but the decay: 1 - lr · weight_decay
    part: Any = model[1].adapters.a
    assert part.A[0, 0].item() == pytest.approx(1 - 0.1 * 0.5)
    assert part.B[0, 0].item() == pytest.approx(1 - 0.4 * 0.5)


def test_it_computes_what_lora_does() -> None:
    ids, outputs = torch.arange(9), []
    for name in ("lora_plus", "lora"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Embedding(30, 12), nn.Linear(12, 20))
        ah.adapt(model).add("a", ah.method(name, rank=3, alpha=5), ["0", "1"])
        for i, key in ((0, "embedding_A" if name == "lora_plus" else "A"), (1, "B")):
            p = model[i].adapters.a.get_parameter(key)  # type: ignore[union-attr, operator]
            p.data += torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
        outputs.append(model(ids))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("options", [{"ratio": 0.0}, {"embedding_lr": -1.0}], ids=str)
def test_rates_are_positive(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        ah.method("lora_plus", **options)
