"""VeRA: the shared matrices, the formula, and what is kept for the backward pass."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peers import BERT, LLAMA
from peft import VeraConfig, get_peft_model
from torch import Tensor, nn

import adapterhub_lite as ah


def made(dtype: torch.dtype = torch.float64, **options: Any) -> tuple[nn.Sequential, ah.Adapters]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(10, 14), nn.Tanh(), nn.Linear(14, 7, bias=False)).to(dtype)
    adapters = ah.adapt(model)
    adapters.add("a", ah.method("vera", **{"rank": 5, **options}), ["0", "2"])
    rng = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.3 * torch.randn(p.shape, generator=rng)
    return model, adapters


X = torch.randn(3, 4, 10, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def plain(model: Any, x: Tensor) -> Tensor:
    """Equation 2, layer by layer."""
    A, B = model.adapters.a.A, model.adapters.a.B
    for i in (0, 2):
        own, W = model[i].adapters.a, model[i].weight
        out, into = W.shape
        y = x @ (W + own.b.diag() @ B[:out] @ own.d.diag() @ A[:, :into]).mT
        x = torch.tanh(y + model[i].bias) if i == 0 else y
    return x


def test_it_is_the_formula_with_its_gradients() -> None:
    model, _ = made()
    twin = copy.deepcopy(model)
    x, z = X.clone().requires_grad_(), X.clone().requires_grad_()
    torch.testing.assert_close(model(x), plain(twin, z), rtol=0, atol=1e-12)
    model(x).square().sum().backward()
    plain(twin, z).square().sum().backward()
    torch.testing.assert_close(x.grad, z.grad, rtol=0, atol=1e-11)
    theirs = dict(twin.named_parameters())
    found = 0
    for key, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, theirs[key].grad, rtol=0, atol=1e-11)
            found += 1
    assert found == 4


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("peer", [LLAMA, BERT], ids=lambda p: p.name)
def test_the_matrices_are_those_that_peft_draws(peer: Any) -> None:
    config = VeraConfig(r=6, target_modules=peer.targets, projection_prng_key=11)
    with torch.random.fork_rng(devices=[]):
        theirs: Any = get_peft_model(peer.build(), config).base_model
    model: Any = peer.build()
    ah.adapt(model).add("a", ah.method("vera", rank=6, projection_prng_key=11), peer.targets)
    assert torch.equal(model.adapters.a.A, theirs.vera_A["default"])
    assert torch.equal(model.adapters.a.B, theirs.vera_B["default"])


def test_nothing_but_r_numbers_a_token_is_kept() -> None:
    model, _ = made(torch.float32)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: list[tuple[int, ...]] = []

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept.append(tuple(t.shape))
        return t

    x = X.float().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model[0](x * 1.0)
    assert kept == [(3, 4, 5)]


def test_parameters_are_those_of_two_vectors_a_layer() -> None:
    _, adapters = made()
    summary = adapters.summary()
    assert summary.trained == (14 + 5) + (7 + 5)
    assert summary.frozen == 5 * 14 + 14 * 5  # once for all layers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_half_bases_train(dtype: torch.dtype) -> None:
    model, _ = made(torch.float32)
    x = X.float()
    model(x).square().sum().backward()
    want = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with torch.autocast("cpu", dtype):
        loss = model(x).float().square().sum()
    loss.backward()
    for key, grad in want.items():
        got = model.get_parameter(key).grad
        assert got is not None
        torch.testing.assert_close(got, grad, rtol=0.1, atol=0.05 * float(grad.abs().max()))


def test_two_of_them_share_nothing_and_leave_nothing() -> None:
    model, adapters = made()
    before = set(dict(model.named_modules()))
    adapters.add("b", ah.method("vera", rank=3, projection_prng_key=9), ["2"])
    root: Any = model.adapters
    assert root.a.A.shape == (5, 14)
    assert root.b.A.shape == (3, 14)
    twin: Any = copy.deepcopy(model)
    assert twin[2].adapters.b.common is twin.adapters.b
    adapters.remove("b")
    assert set(dict(model.named_modules())) == before
    adapters.remove("a")
    assert not [key for key in model.state_dict() if "adapters" in key]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo does, for any Function
def test_compiles_in_one_graph() -> None:
    model, _ = made()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    x, z = X.clone().requires_grad_(), X.clone().requires_grad_()
    y = compiled(x)
    torch.testing.assert_close(y, model(z), rtol=0, atol=1e-12)
    y.sum().backward()
    model(z).sum().backward()
    torch.testing.assert_close(x.grad, z.grad, rtol=0, atol=1e-12)
