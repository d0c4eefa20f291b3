"""LoRA-FA: the projected gradient, what is kept for the backward pass, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterhub_lite as ah
from adapterhub_lite import ConfigError


def made(rank: int = 4, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[nn.Sequential, ah.Adapters]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(10, 14), nn.Tanh(), nn.Linear(14, 7)).to(dtype)
    adapters = ah.adapt(model)
    adapters.add("a", ah.method("lora_fa", rank=rank, alpha=7, **options), ["0", "2"])
    for i in (0, 2):
        model[i].adapters.a.B.data += 0.1 * torch.randn(  # type: ignore[union-attr, operator]
            model[i].adapters.a.B.shape,
            generator=torch.Generator().manual_seed(i),  # type: ignore[union-attr, arg-type]
        )
    return model, adapters


X = torch.randn(9, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("rank", [1, 4, 12])  # 12 exceeds the first layer's width: A Aᵀ has no inverse
def test_the_step_of_W_is_the_gradient_projected_on_the_rows_of_A(rank: int) -> None:
    model, adapters = made(rank)
    optimizer = torch.optim.SGD(adapters.param_groups(lr=1.0))
    adapters.register(optimizer)
    inputs: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}
    for i in (0, 2):

        def keep(module: nn.Module, args: Any, y: Tensor, i: int = i) -> None:
            inputs[i], outputs[i] = args[0], y
            y.retain_grad()

        model[i].register_forward_hook(keep)
    model(X).square().sum().backward()
    before = {i: model[i].adapters.a.B.detach().clone() for i in (0, 2)}  # type: ignore[union-attr, operator]
    optimizer.step()
    for i in (0, 2):
        part: Any = model[i].adapters.a
        G = outputs[i].grad.mT @ inputs[i].detach()  # type: ignore[union-attr]  # (out, in)
        P = torch.linalg.pinv(part.A) @ part.A  # (in, in), on the rows of A
        step = before[i] - part.B.detach()
        torch.testing.assert_close(part.method.scaling * step @ part.A, G @ P, rtol=0, atol=1e-11)


@pytest.mark.parametrize("rank", [4, 40])
def test_where_the_rows_of_A_are_dependent_float32_projects_too(rank: int) -> None:
    layer = nn.Sequential(nn.Linear(24, 6))
    adapters = ah.adapt(layer)
    adapters.add("a", ah.method("lora_fa", rank=rank, alpha=rank), "0")
    part: Any = layer[0].adapters.a
    part.A.data[1] = part.A[0]
    optimizer = torch.optim.SGD(adapters.param_groups(lr=1.0))
    adapters.register(optimizer)
    layer(X.float().repeat(1, 3)[:, :24]).square().sum().backward()
    g, A = part.B.grad.double().clone(), part.A.double()
    optimizer.step()
    want = g @ torch.linalg.pinv(A @ A.mT, rtol=1e-6) @ A  # (out, in)
    torch.testing.assert_close(part.B.grad.double() @ A, want, rtol=0, atol=1e-4 * float(want.abs().max()))


def test_a_step_that_is_skipped_projects_nothing() -> None:
    model, adapters = made()
    optimizer: Any = torch.optim.SGD(adapters.param_groups(lr=1.0), fused=True)
    adapters.register(optimizer)
    model(X).square().sum().backward()
    part: Any = model[0].adapters.a
    want = part.B.grad.clone()
    optimizer.found_inf = torch.tensor(1.0)  # as a GradScaler tells a fused optimizer
    optimizer.step()
    assert torch.equal(part.B.grad, want)


def test_a_layer_that_was_not_used_is_passed_over() -> None:
    model, adapters = made()
    optimizer = torch.optim.SGD(adapters.param_groups(lr=1.0))
    adapters.register(optimizer)
    model[0](X).square().sum().backward()
    before = model[2].adapters.a.B.detach().clone()  # type: ignore[union-attr, operator]
    optimizer.step()
    assert torch.equal(model[2].adapters.a.B, before)  # type: ignore[union-attr, arg-type]


def test_without_the_projection_the_gradient_is_left_alone() -> None:
    model, adapters = made(projection=False)
    optimizer = torch.optim.SGD(adapters.param_groups(lr=1.0))
    adapters.register(optimizer)
    model(X).square().sum().backward()
    part: Any = model[0].adapters.a
    want = part.B.detach() - part.B.grad
    optimizer.step()
    torch.testing.assert_close(part.B, want, rtol=0, atol=0)


def test_the_projection_is_in_float32_under_autocast_and_on_a_half_base() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model, adapters = made(dtype=dtype)
        optimizer = torch.optim.SGD(adapters.param_groups(lr=1.0))
        adapters.register(optimizer)
        model(X.to(dtype)).float().square().sum().backward()
        part: Any = model[0].adapters.a
        g, A = part.B.grad.double().clone(), part.A.double()
        with torch.autocast("cpu", torch.bfloat16):
            optimizer.step()
        want = g @ torch.linalg.inv(A @ A.mT) / part.method.scaling**2
        torch.testing.assert_close(part.B.grad.double(), want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


def test_A_stays_and_is_no_parameter_of_the_optimizer() -> None:
    model, adapters = made()
    (group,) = adapters.param_groups(lr=0.1)
    assert {id(p) for p in group["params"]} == {id(model[i].adapters.a.B) for i in (0, 2)}  # type: ignore[union-attr]
    assert adapters.summary().trained == 4 * (14 + 7)


def test_no_input_is_kept_for_the_backward_pass() -> None:
    """A layer keeps A x, r numbers a token; LoRA keeps x too."""
    sizes = {}
    for name in ("lora", "lora_fa"):
        layer = nn.Sequential(nn.Linear(64, 96))
        ah.adapt(layer).add("a", ah.method(name, rank=4), "0")
        own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
        kept: dict[int, int] = {}

        def pack(t: Tensor, own: set[int] = own, kept: dict[int, int] = kept) -> Tensor:
            if t.untyped_storage().data_ptr() not in own:
                kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        x = torch.randn(32, 64, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            (layer(x * 1.0)).sum()
        sizes[name] = sum(kept.values()) // (32 * 4)
    assert sizes == {"lora": 64 + 4, "lora_fa": 4}


def test_embeddings_begin_with_a_random_A() -> None:
    model = nn.Sequential(nn.Embedding(30, 8))
    adapters = ah.adapt(model)
    ids = torch.arange(10)
    want = model(ids).detach()
    adapters.add("a", ah.method("lora_fa", rank=3), "0")
    assert torch.equal(model(ids), want)
    model(ids).sum().backward()
    part: Any = model[0].adapters.a
    assert part.A.std() > 0.5
    assert part.B.grad.abs().min() > 0


def test_dropout_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match="backward pass"):
        ah.method("lora_fa", dropout=0.1)
