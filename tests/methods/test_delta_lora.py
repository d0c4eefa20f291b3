"""Delta-LoRA against Algorithm 1 as the paper has it: W changed in place behind every step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterhub_lite as ah
from adapterhub_lite import ConfigError

WIDTHS = ((12, 20), (20, 9))
RANK, ALPHA = 3, 4.5
X = torch.randn(16, 12, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
Y = torch.randn(16, 9, generator=torch.Generator().manual_seed(6), dtype=torch.float64)


def base() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        (a, b), (c, d) = WIDTHS
        return nn.Sequential(nn.Linear(a, b), nn.Tanh(), nn.Linear(c, d, bias=False)).double()


def ours(**options: Any) -> tuple[nn.Sequential, ah.Adapters]:
    model = base()
    adapters = ah.adapt(model)
    adapters.add("a", ah.method("delta_lora", rank=RANK, alpha=ALPHA, **options), ["0", "2"])
    return model, adapters


class InPlace(nn.Module):
    """A layer that computes W x + s B A x + b, and whose W the training loop moves."""

    def __init__(self, layer: nn.Linear, A: Tensor, B: Tensor, s: float) -> None:
        super().__init__()
        self.W, self.bias, self.s = layer.weight.detach().clone(), layer.bias, s
        self.A, self.B = nn.Parameter(A.clone()), nn.Parameter(B.clone())

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.W.mT + self.s * (x @ self.A.mT @ self.B.mT)
        return y if self.bias is None else y + self.bias


def algorithm_1(start: int, ratio: float, kind: Any, steps: int, **options: Any) -> tuple[list[float], nn.Sequential]:
    model, _ = ours(start=start, update_ratio=ratio)
    parts: Any = [model[i].adapters.a for i in (0, 2)]
    layers = [InPlace(model[i], p.A.detach(), p.B.detach(), ALPHA / RANK) for i, p in zip((0, 2), parts, strict=True)]  # type: ignore[arg-type]
    net = nn.Sequential(layers[0], nn.Tanh(), layers[1])
    optimizer = kind([p for layer in layers for p in (layer.A, layer.B)], **options)
    losses = []
    for t in range(steps):
        optimizer.zero_grad()
        loss = (net(X) - Y).square().mean()
        loss.backward()
        before = [(layer.B @ layer.A).detach().clone() for layer in layers]
        optimizer.step()
        if t > start:
            with torch.no_grad():
                for layer, old in zip(layers, before, strict=True):
                    layer.W += ratio * layer.s * (layer.B @ layer.A - old)
        losses.append(loss.item())
    return losses, net


@pytest.mark.parametrize("start", [-1, 0, 5])
@pytest.mark.parametrize("ratio", [2.0, 0.5])
@pytest.mark.parametrize(
    ("kind", "options"),
    [(torch.optim.AdamW, {"lr": 2e-2, "weight_decay": 0.1}), (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9})],
    ids=["AdamW", "SGD"],
)
def test_it_is_algorithm_1(start: int, ratio: float, kind: Any, options: Any) -> None:
    steps = 40
    want, net = algorithm_1(start, ratio, kind, steps, **options)
    model, adapters = ours(start=start, update_ratio=ratio)
    frozen = {key: t.clone() for key, t in model.state_dict().items() if "adapters" not in key}
    optimizer = kind(adapters.param_groups(lr=options["lr"]), **options)
    adapters.register(optimizer)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(X) - Y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(want), rtol=0, atol=1e-12)
    assert abs(losses[-1] - losses[0]) > 0.01
    for i, layer in ((0, net[0]), (2, net[2])):
        adapters.merge()
        torch.testing.assert_close(model[i].weight, layer.W + layer.s * layer.B @ layer.A, rtol=0, atol=1e-12)
        adapters.unmerge()
    assert all(torch.equal(model.state_dict()[key], t) for key, t in frozen.items())
    grads = []
    for own in (model, net):
        x = X.clone().requires_grad_()
        own(x).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads, rtol=0, atol=1e-12)
    part: Any = model[0].adapters.a
    change = part.method.delta(part.params(), part.site).dense()
    assert int(torch.linalg.matrix_rank(change, rtol=1e-9)) == (RANK if start == -1 else 2 * RANK)  # B is 0 at first


def test_without_its_rule_it_stays_lora() -> None:
    model, adapters = ours(start=-1)
    part: Any = model[0].adapters.a
    want = part.A.detach().clone()
    optimizer = torch.optim.SGD(adapters.param_groups(lr=0.1))
    model(X).sum().backward()
    optimizer.step()
    assert torch.equal(part.A_K, want)
    assert int(part.step) == 0


def test_a_step_that_is_skipped_does_not_count() -> None:
    model, adapters = ours(start=0)
    optimizer: Any = torch.optim.SGD(adapters.param_groups(lr=0.1), fused=True)
    adapters.register(optimizer)
    part: Any = model[0].adapters.a
    counts = []
    for found_inf in (0.0, 1.0, 0.0):
        optimizer.found_inf = torch.tensor(found_inf)  # as a GradScaler tells a fused optimizer
        model(X).sum().backward()
        optimizer.step()
        counts.append(int(part.step))
    assert counts == [1, 1, 2]


def test_training_from_a_file_goes_on_with_the_snapshot_of_the_file(tmp_path: Path) -> None:
    model, adapters = ours(start=1)
    optimizer = torch.optim.SGD(adapters.param_groups(lr=0.1))
    adapters.register(optimizer)

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, n: int) -> Tensor:
        for _ in range(n):
            optimizer.zero_grad()
            (model(X) - Y).square().mean().backward()
            optimizer.step()
        y: Tensor = model(X).detach()
        return y

    steps(model, optimizer, 5)
    adapters.save("a", tmp_path / "a")
    again = base()
    held = ah.adapt(again)
    held.load(tmp_path / "a", "a")
    optimizer_again = torch.optim.SGD(held.param_groups(lr=0.1))
    held.register(optimizer_again)
    snapshots = [again[i].adapters.a.A_K.clone() for i in (0, 2)]  # type: ignore[union-attr, operator]
    assert torch.equal(steps(model, optimizer, 4), steps(again, optimizer_again, 4))
    assert all(
        torch.equal(again[i].adapters.a.A_K, t)  # type: ignore[union-attr, arg-type]
        for i, t in zip((0, 2), snapshots, strict=True)
    )


def test_under_adam_from_the_first_step_it_is_lora_with_a_larger_alpha() -> None:
    ends = []
    for name, options in (("delta_lora", {"start": -1, "update_ratio": 2.0}), ("lora", {})):
        model = base()
        adapters = ah.adapt(model)
        alpha = ALPHA if name == "delta_lora" else 3 * ALPHA
        adapters.add("a", ah.method(name, rank=RANK, alpha=alpha, **options), ["0", "2"])
        optimizer = torch.optim.Adam(adapters.param_groups(lr=1e-2), lr=1e-2, eps=1e-30)
        adapters.register(optimizer)
        for _ in range(100):
            optimizer.zero_grad()
            (model(X) - Y).square().mean().backward()
            optimizer.step()
        ends.append(model(X).detach())
    assert (ends[0] - base()(X)).abs().max() > 0.1
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-8)


def test_patterns_and_rslora_keep_the_scaling() -> None:
    for options in ({"rslora": True}, {"rank_pattern": {"2": 2}, "alpha_pattern": {"0": 7.5}}):
        model, _ = ours(**options)
        for p in model.parameters():
            if p.requires_grad:
                p.data += 0.1
        for i in (0, 2):
            part: Any = model[i].adapters.a
            here = part.method
            want = here.scaling * (3 * part.B @ part.A - 2 * (1.5 * part.C) @ part.A_K)
            got = here.delta(part.params(), part.site)
            torch.testing.assert_close(got.dense(), want, rtol=1e-12, atol=1e-12)
            peft = here.to_peft()
            s = peft["lora_alpha"] / (peft["r"] ** 0.5 if peft["use_rslora"] else peft["r"])
            assert s == pytest.approx(got.scale, rel=1e-12)


@pytest.mark.parametrize(
    "options",
    [{"dropout": 0.1}, {"lora_bias": True}, {"update_ratio": -1.0}, {"start": -2}, {"init_weights": "pissa"}],
    ids=str,
)
def test_what_contradicts_the_algorithm_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        ah.method("delta_lora", **options)
