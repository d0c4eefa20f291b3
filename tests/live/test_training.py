"""Step rules through the optimizer's hooks, penalties, groups for what was unfrozen, and the summary."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

import adapterhub_lite as ah
from adapterhub_lite import ConfigError, LowRank, Method, Params, Site

X = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True, kw_only=True)
class Counting(Method):
    """A low-rank method that halves its gradients before a step and counts the steps behind it."""

    name = "counting"
    paper = "https://arxiv.org/abs/2106.09685"
    site_kinds = frozenset({"linear"})
    rank: int = 2

    def init(self, site: Site, rng: torch.Generator) -> Mapping[str, nn.Parameter | Tensor]:
        (out, into), r = site.shape, self.rank
        A, B = torch.randn(r, into, generator=rng), torch.randn(out, r, generator=rng)
        return {"A": nn.Parameter(A), "B": nn.Parameter(B), "steps": torch.zeros(1, dtype=torch.int64)}

    def delta(self, p: Params, site: Site) -> LowRank:
        return LowRank(p["B"], p["A"], 0.1)

    def penalty(self, p: Params, site: Site) -> Tensor | None:
        G = p["A"] @ p["A"].mT  # (r, r)
        return (G - torch.eye(self.rank)).square().sum() if site.shape[0] > 8 else None

    def before_step(self, p: Params, site: Site, optimizer: torch.optim.Optimizer) -> None:
        for name in ("A", "B"):
            if (grad := p[name].grad) is not None:
                grad.mul_(0.5)

    def after_step(self, p: Params, site: Site, optimizer: torch.optim.Optimizer) -> None:
        p["steps"].add_(1)


def made(*names: str) -> tuple[nn.Module, ah.Adapters]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8))
    adapters = ah.adapt(model)
    for seed, name in enumerate(names or ("a",)):
        adapters.add(name, Counting(), "all-linear", seed=seed)
    return model, adapters


def counts(model: nn.Module, name: str = "a") -> list[int]:
    return [int(t) for key, t in model.state_dict().items() if key.endswith(f"adapters.{name}.steps")]


def of(model: nn.Module, ends: str) -> dict[str, Tensor]:
    return {key: p for key, p in model.named_parameters() if key.endswith(ends)}


def test_rules_run_once_a_step_whatever_is_accumulated() -> None:
    model, adapters = made()
    optimizer = torch.optim.SGD(adapters.param_groups(lr=0.1))
    adapters.register(optimizer)
    twin = copy.deepcopy(model)
    for _ in range(3):
        model(X).square().mean().backward()
    assert counts(model) == [0, 0]
    grads = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    assert counts(model) == [1, 1]
    assert len(grads) == 4
    for key, grad in grads.items():  # half the gradient
        torch.testing.assert_close(model.get_parameter(key), twin.get_parameter(key) - 0.05 * grad)


def test_rules_end_with_their_handles() -> None:
    model, adapters = made()
    optimizer = torch.optim.SGD(adapters.param_groups(lr=0.1))
    for handle in adapters.register(optimizer):
        handle.remove()
    model(X).square().mean().backward()
    optimizer.step()
    assert counts(model) == [0, 0]


def test_rules_are_those_of_what_is_active_and_in_the_optimizer() -> None:
    model, adapters = made("a", "b", "c")
    adapters.activate({"a": 1.0, "b": 1.0})
    both = torch.optim.SGD(adapters.param_groups(lr=0.1))
    adapters.activate("c")
    other = torch.optim.SGD(adapters.param_groups(lr=0.1))
    adapters.register(both), adapters.register(other)
    adapters.activate("b")
    model(X).sum().backward()
    both.step()
    other.step()
    assert [counts(model, name) for name in "abc"] == [[0, 0], [1, 1], [0, 0]]


def test_an_optimizer_of_something_else_is_refused() -> None:
    _, adapters = made()
    with pytest.raises(ConfigError, match="no parameter of an adapter"):
        adapters.register(torch.optim.SGD([nn.Parameter(torch.zeros(1))]))
    with pytest.raises(ConfigError, match="int is no torch optimizer"):
        adapters.register(3)


def test_accelerate_wraps_the_optimizer_before_or_after() -> None:
    for early in (True, False):
        model, adapters = made()
        optimizer: Any = torch.optim.AdamW(adapters.param_groups(lr=0.1))
        if early:
            adapters.register(optimizer)
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        prepared, optimizer = accelerator.prepare(model, optimizer)
        if not early:
            adapters.register(optimizer)
        for _ in range(4):
            with accelerator.accumulate(prepared):
                accelerator.backward(prepared(X).square().mean())
                optimizer.step()
                optimizer.zero_grad()
        assert counts(model) == [2, 2]


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_skipped_for_infinite_gradients_does_not_count(fused: bool) -> None:
    model, adapters = made()
    optimizer = torch.optim.AdamW(adapters.param_groups(lr=0.1), fused=fused)
    adapters.register(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    ran = []
    optimizer.register_step_pre_hook(lambda *_: ran.append(1))
    for factor in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(model(X).square().mean() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
    assert len(ran) == (3 if fused else 2)  # fused optimizers skip inside of the step, and their hooks run
    assert counts(model) == [2, 2]


def test_penalty_is_the_sum_over_sites_and_active_adapters() -> None:
    model, adapters = made("a", "b")
    adapters.activate({"a": 0.5, "b": 2.0})
    A = [of(model, f"0.adapters.{name}.A")[f"0.adapters.{name}.A"].double() for name in "ab"]
    want = sum((W @ W.mT - torch.eye(2)).square().sum() for W in A)
    torch.testing.assert_close(adapters.penalty().double(), want, rtol=1e-5, atol=0)
    adapters.penalty().backward()
    assert all((p.grad is not None) == (key[0] == "0") for key, p in of(model, ".A").items())
    adapters.activate(None)
    assert float(adapters.penalty()) == 0.0


def test_what_was_unfrozen_is_a_group_of_its_own() -> None:
    model, adapters = made()
    head: Any = model[2]
    head.bias.requires_grad_(True)
    *own, last = adapters.param_groups(lr=0.3)
    assert last == {"params": [head.bias], "lr": 0.3}
    assert sum(len(group["params"]) for group in own) == 4
    adapters.add("b", ah.method("lora"), "0")
    assert head.bias.requires_grad


def test_summary_counts_what_is_there() -> None:
    model, adapters = made()
    model = model.to(torch.bfloat16)
    got = adapters.summary()
    assert (got.base, got.base_bytes) == (12 * 20 + 20 + 20 * 8 + 8, 2 * 428)
    assert got.trained == 2 * (12 + 20 + 20 + 8)
    assert got.frozen == 2
    assert (got.trained_bytes, got.frozen_bytes) == (2 * 120, 16)
    assert got.optimizer_bytes == 2 * got.trained_bytes
    assert (got.adapted, got.layers) == (12 * 20 + 20 * 8, 2)
    assert got.percent == pytest.approx(100 * 120 / 428)
    assert got.times_fewer == pytest.approx(400 / 120)
    assert "28.04 % of the base is trained; in the 2 adapted layers 3 times fewer parameters" in str(got)
    adapters.activate(None)
    assert (adapters.summary().trained, adapters.summary().frozen) == (0, 122)


def test_summary_counts_tied_weights_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(30, 6), nn.Linear(6, 30, bias=False)
            self.head.weight = self.embed.weight

    model = Tied()
    adapters = ah.adapt(model)
    adapters.add("a", ah.method("lora", rank=2), ["embed", "head"])
    assert (adapters.summary().base, adapters.summary().adapted) == (180, 180)
