"""IA3: the formula on keys, values and what is inside of feed-forward blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peers import LLAMA, output
from torch import nn

import adapterhub_lite as ah
from adapterhub_lite.testing.zoo import EXAMPLES


def fill(model: nn.Module, seed: int = 0) -> None:
    rng = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.4 * torch.randn(p.shape, generator=rng).to(p)


@pytest.mark.parametrize("kind", ["linear", "transposed_linear", "conv2d"])
@pytest.mark.parametrize("inside", [False, True], ids=["output", "input"])
def test_it_scales_outputs_with_their_bias_or_inputs(kind: str, inside: bool) -> None:
    example = EXAMPLES[kind]
    for name in ("first", "second", "third"):
        model = example.model()
        layer: Any = model.get_submodule(name)
        seen: list[Any] = []
        handle = layer.register_forward_hook(lambda m, args, y, seen=seen: seen.append(args[0]))
        model(example.input())
        handle.remove()
        ah.adapt(model).add("a", ah.method("ia3", feedforward=(name,) if inside else ()), [name])
        fill(model)
        l = layer.adapters.a.l.detach().flatten()  # noqa: E741
        view = (-1, 1, 1) if kind == "conv2d" else (-1,)
        x = seen[0]
        assert l.std() > 0.1
        plain = example.model().get_submodule(name)
        want = plain(x * l.reshape(view)) if inside else plain(x) * l.reshape(view)
        torch.testing.assert_close(layer(x), want, rtol=0, atol=1e-12)


def test_it_is_the_paper_s_on_a_llama() -> None:
    model: Any = LLAMA.build().double()
    adapters = ah.adapt(model)
    adapters.add("a", ah.method("ia3", feedforward=("down_proj",)), ["k_proj", "v_proj", "down_proj"])
    base = output(model, LLAMA)
    fill(model)
    config = model.config
    d_k = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    assert adapters.summary().trained == config.num_hidden_layers * (2 * d_k + config.intermediate_size)
    got = output(model, LLAMA)
    assert (got - base).abs().max() > 1e-2
    plain: Any = LLAMA.build().double()
    for i in range(config.num_hidden_layers):
        for name in ("self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj"):
            layer = plain.model.layers[i].get_submodule(name)
            factor = model.model.layers[i].get_submodule(name).adapters.a.l.flatten()
            if name == "mlp.down_proj":
                layer.register_forward_pre_hook(lambda m, args, factor=factor: (args[0] * factor,))
            else:
                layer.register_forward_hook(lambda m, args, y, factor=factor: y * factor)
    torch.testing.assert_close(got, output(plain, LLAMA), rtol=0, atol=1e-12)


def test_a_factor_of_zero_can_be_merged_and_undone() -> None:
    model = nn.Sequential(nn.Linear(6, 4)).double()
    adapters = ah.adapt(model)
    adapters.add("a", ah.method("ia3"), "0")
    layer: Any = model[0]
    layer.adapters.a.l.data[1] = 0
    x, was = torch.randn(3, 6, dtype=torch.float64), layer.weight.detach().clone()
    want = model(x)
    adapters.merge()
    torch.testing.assert_close(model(x), want, rtol=0, atol=1e-12)
    assert layer.weight[1].abs().max() == 0
    adapters.unmerge()
    assert torch.equal(layer.weight, was)


def test_the_layer_runs_once_where_it_is_alone_and_once_for_each_otherwise() -> None:
    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.inner(x)
            return y

    model = Counted()
    adapters = ah.adapt(model)
    for name in "ab":
        adapters.add(name, ah.method("ia3", feedforward=("inner",)), "inner")
    calls: list[int] = []
    model.inner.forward = lambda x: calls.append(1) or nn.functional.linear(x, model.inner.weight)  # type: ignore[assignment, func-returns-value]
    model(torch.ones(2, 6))
    assert len(calls) == 1
    adapters.activate({"a": 0.5, "b": 0.5})
    model(torch.ones(2, 6))
    assert len(calls) == 1 + 3


def test_half_precision_rounds_once() -> None:
    model = nn.Sequential(nn.Linear(6, 4)).bfloat16()
    ah.adapt(model).add("a", ah.method("ia3", feedforward=("0",)), "0")
    layer: Any = model[0]
    layer.adapters.a.l.data[:] = 1.00390625 + torch.arange(6) / 512  # between two of bfloat16
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    want = nn.functional.linear((x.float() * layer.adapters.a.l).bfloat16(), layer.weight, layer.bias)
    assert torch.equal(model(x), want)
