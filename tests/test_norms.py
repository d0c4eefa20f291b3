"""Norms as a kind of layer: which are known, and what their own forward gives with other values."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from peers import LLAMA, output
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated
from transformers.models.t5.modeling_t5 import T5LayerNorm

import adapterhub_lite as ah
from adapterhub_lite.delta import Dense
from adapterhub_lite.site.norm import NormSite


class ChannelsFirst(nn.LayerNorm):
    """As in ConvNeXt: (batch, n, length), and the forward is its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class Breaks(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("on purpose")


class Parent(nn.LayerNorm):
    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.inner = nn.Identity()


def filled(module: Any, seed: int = 0) -> Any:
    rng = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.data = torch.randn(p.shape, generator=rng)
    return module.double().requires_grad_(False)


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    "module",
    [
        nn.LayerNorm(6),
        nn.LayerNorm(6, bias=False),
        nn.RMSNorm(6),
        nn.GroupNorm(3, 6),
        LlamaRMSNorm(6),
        T5LayerNorm(6),
        Gemma3RMSNorm(6),
        ChannelsFirst(6),
    ],
    ids=lambda m: type(m).__name__,
)
def test_a_vector_that_scales_is_a_norm(module: nn.Module) -> None:
    assert NormSite.accepts(module)
    site = NormSite.of("x", module)
    assert site.shape == (6, 1)
    assert torch.equal(site.fold(site.weight), module.weight)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "module",
    [
        nn.BatchNorm1d(6),
        nn.BatchNorm2d(6),
        nn.SyncBatchNorm(6),
        nn.InstanceNorm1d(6, affine=True),
        nn.Linear(6, 1),
        nn.Embedding(6, 1),
        nn.PReLU(6),
        nn.LayerNorm((2, 3)),
        nn.LayerNorm(6, elementwise_affine=False),
        Parent(6),
        MambaRMSNormGated(6, 3),  # a second input, which no rule is given
    ],
    ids=lambda m: type(m).__name__,
)
def test_what_is_none_is_refused(module: nn.Module) -> None:
    assert not NormSite.accepts(module)


def test_a_norm_that_has_an_adapter_is_one_still() -> None:
    model = nn.Sequential(nn.LayerNorm(6))
    ah.adapt(model).add("a", ah.method("ln_tuning"), "0")
    assert NormSite.accepts(model[0])
    ah.adapt(model).add("b", ah.method("bitfit"), "0")
    assert ah.adapt(model).names == ("a", "b")


def rms(x: Tensor, eps: float = 1e-6) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def layer_norm(x: Tensor, eps: float = 1e-5) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + eps).sqrt()


FORMULAS: list[tuple[Any, Any]] = [
    (lambda: nn.LayerNorm(6), lambda x, w, b: w * layer_norm(x) + b),
    (lambda: nn.RMSNorm(6, eps=1e-6), lambda x, w, b: w * rms(x)),
    (
        lambda: nn.GroupNorm(3, 6),
        lambda x, w, b: w[:, None] * layer_norm(x.unflatten(1, (3, 2)).flatten(2)).reshape(x.shape) + b[:, None],
    ),
    (lambda: ChannelsFirst(6), lambda x, w, b: (w * layer_norm(x.mT) + b).mT),
    (lambda: T5LayerNorm(6), lambda x, w, b: w * rms(x)),
    (lambda: Gemma3RMSNorm(6), lambda x, w, b: (1 + w) * rms(x)),
]


@pytest.mark.parametrize(("make", "formula"), FORMULAS, ids=lambda f: None)
def test_the_layer_s_own_forward_runs_with_other_values(make: Any, formula: Any) -> None:
    module = filled(make())
    ran: list[int] = []
    module.register_forward_hook(lambda *args: ran.append(1))
    module.register_forward_pre_hook(lambda *args: ran.append(1))
    site, x = NormSite.of("x", module), draw(2, 6, 6)
    w = draw(6, seed=2).requires_grad_()
    b = draw(6, seed=3).requires_grad_() if site.bias is not None else None
    loose = 1e-5 if isinstance(module, (T5LayerNorm, Gemma3RMSNorm)) else 1e-12  # these compute in float32
    before = dict(vars(module))

    got = site.rerun(x, w[:, None], b)
    torch.testing.assert_close(got, formula(x, w, b), rtol=0, atol=loose)
    got.square().sum().backward()
    for t in (w, b):
        if t is not None:
            assert t.grad is not None
            assert t.grad.abs().min() > 0
    own: Any = site.bias
    torch.testing.assert_close(site.rerun(x, w[:, None]), formula(x, w, own), rtol=0, atol=loose)
    assert torch.equal(site.rerun(x), module.forward(x))
    if b is not None:
        y = module.forward(x)
        torch.testing.assert_close(site.add_bias(b, x, y), site.rerun(x, bias=own + b), rtol=0, atol=1e-12)
        torch.testing.assert_close(site.add_bias(b, x, y), formula(x, module.weight, own + b), rtol=0, atol=1e-12)
    assert not ran
    assert vars(module) == before


def test_what_is_not_given_is_in_the_input_s_dtype_and_frozen() -> None:
    module = nn.LayerNorm(6).bfloat16()
    site, x, w = NormSite.of("x", module), draw(3, 6).float(), draw(6, 1).float().requires_grad_()
    y = site.rerun(x, w)
    assert y.dtype == torch.float32
    y.sum().backward()
    assert module.bias.grad is None


def test_a_group_norm_of_images_has_its_channels_in_front() -> None:
    module = filled(nn.GroupNorm(2, 6))
    site, x, b = NormSite.of("x", module), draw(2, 6, 3, 5), draw(6)
    torch.testing.assert_close(site.add_bias(b, x, module(x)), module(x) + b[:, None, None], rtol=0, atol=0)


def test_a_failure_leaves_nothing_behind() -> None:
    module = Breaks(6)
    before, values = dict(vars(module)), copy.deepcopy(module.state_dict())
    with pytest.raises(RuntimeError, match="on purpose"):
        NormSite.of("x", module).rerun(torch.ones(2, 6), torch.ones(6, 1))
    assert vars(module) == before
    assert all(torch.equal(t, values[key]) for key, t in module.state_dict().items())


def test_refusals_say_what_to_do() -> None:
    site = NormSite.of("x", nn.GroupNorm(2, 6))
    with pytest.raises(ah.NotMergeable, match=r"x: a norm is no product .* site.rerun\(\)"):
        site.apply(Dense(torch.ones(6, 1)), torch.ones(2, 6))
    with pytest.raises(ah.AdapterError, match=r"x: on which axis a GroupNorm .* site.add_bias\(\)"):
        site.along(torch.ones(6))
    with pytest.raises(ah.AdapterError, match="x: a RMSNorm has no bias"):
        NormSite.of("x", nn.RMSNorm(6)).rerun(torch.ones(2, 6), bias=torch.ones(6))
    model = nn.Sequential(nn.BatchNorm1d(6))
    with pytest.raises(ah.ConfigError, match="0: no site kind knows what a BatchNorm1d computes"):
        ah.adapt(model).add("a", ah.method("ln_tuning"), "0")
    model = nn.Sequential(nn.LayerNorm(6))
    with pytest.raises(ah.ConfigError, match="0: method 'lora' adapts no layer of kind 'norm'"):
        ah.adapt(model).add("a", ah.method("lora"), "0")


def tuned() -> tuple[Any, ah.Adapters]:
    """Two norms of a class of one's own and one of torch's around a layer, with two adapters moved off their start."""
    model = filled(nn.Sequential(T5LayerNorm(6), nn.Linear(6, 6), ChannelsFirst(6), nn.LayerNorm(6)))
    adapters = ah.adapt(model)
    adapters.add("a", ah.method("ln_tuning"), ["0", "2", "3"])
    adapters.add("b", ah.method("bitfit"), ["1", "2", "3"])
    rng = torch.Generator().manual_seed(5)
    for key, p in model.named_parameters():
        if "adapters" in key:
            p.data += 0.3 * torch.randn(p.shape, generator=rng, dtype=p.dtype)
    return model, adapters


def test_compiled_and_checkpointed_it_is_the_same() -> None:
    x = draw(2, 6, 6)
    results = []
    for run in (
        lambda model: model(x),
        lambda model: torch.compile(model, fullgraph=True, backend="eager")(x),
        lambda model: checkpoint(model, x.clone().requires_grad_(), use_reentrant=False),
        lambda model: checkpoint(model, x.clone().requires_grad_(), use_reentrant=True),
    ):
        for active in ("a", "b", {"a": 0.7, "b": -0.4}):
            torch._dynamo.reset()
            model, adapters = tuned()
            adapters.activate(active)
            y = run(model)
            y.square().sum().backward()
            grads = {key: p.grad for key, p in model.named_parameters() if p.requires_grad}
            assert all(g is not None for g in grads.values())
            results.append({"y": y.detach(), **grads})
    for found, want in zip(results[3:], results[:3] * 3, strict=True):
        assert found.keys() == want.keys()
        for key, t in want.items():
            torch.testing.assert_close(found[key], t, rtol=0, atol=1e-12)


def test_copies_and_pickles_compute_the_same() -> None:
    model, adapters = tuned()
    adapters.activate({"a": 0.7, "b": -0.4})
    x = draw(2, 6, 6)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
        other[3].adapters.a.weight.data += 1
        assert not torch.equal(other(x), model(x))


def test_all_means_every_layer_that_the_method_can_adapt_but_the_head() -> None:
    model: Any = LLAMA.build()
    adapters = ah.adapt(model)
    adapters.add("norms", ah.method("ln_tuning"), "all")
    adapters.add("layers", ah.method("lora", rank=2), "all")
    names: dict[str, list[str]] = {"norms": [], "layers": []}
    for name, module in model.named_modules():
        for adapter, found in names.items():
            if adapter in getattr(getattr(module, "adapters", None), "_modules", {}):
                found.append(name)
    plain = [name for name, m in LLAMA.build().named_modules() if list(m.parameters(recurse=False))]
    norms = [name for name in plain if name.endswith("norm")]
    assert len(norms) == 5
    assert names["norms"] == norms
    assert names["layers"] == [name for name in plain if name not in norms and name != "lm_head"]
    assert output(model, LLAMA).isfinite().all()


def test_all_finds_nothing_where_there_is_nothing() -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    with pytest.raises(ah.UnknownName, match="target 'all' names no module"):
        ah.adapt(model).add("a", ah.method("ln_tuning"), "all")


def test_a_block_is_refused_with_a_layer_in_it_that_the_method_adapts() -> None:
    for method, layer in ((ah.method("lora", rank=2), "self_attn.q_proj"), (ah.method("ln_tuning"), "input_layernorm")):
        with pytest.raises(ah.ConfigError, match=rf"target layers in it, say 'model\.layers\.0\.{layer}'"):
            ah.adapt(LLAMA.build()).add("a", method, "layers.0")
