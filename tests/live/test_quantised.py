"""Adapters on layers of four bits (QLoRA): what is computed, trained, merged, saved and counted.

bitsandbytes is what quantises; its own dequantisation is the oracle only before it has rearranged a layer.
"""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toy import VOCABULARY, tokens
from transformers import LlamaConfig, LlamaForCausalLM

import adapterhub_lite as ah
from adapterhub_lite import FileError, NotMergeable
from adapterhub_lite.site.quantised import QuantisedLinearSite

METHODS: list[tuple[str, dict[str, Any]]] = [
    ("lora", {"rank": 4, "alpha": 6}),
    ("lora", {"rank": 4, "rslora": True}),
    ("lora", {"rank": 3, "init_weights": "pissa"}),
    ("lora_plus", {"rank": 4}),
    ("lora_fa", {"rank": 4}),
    ("delta_lora", {"rank": 3, "start": 1}),
    ("vera", {"rank": 6}),
    ("dora", {"rank": 4}),
    ("ia3", {}),
]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: "-".join([m[0], *map(str, m[1].values())]))


def quantised(layer: nn.Linear, double: bool = True) -> Any:
    """The layer in NF4, in blocks of 64."""
    new = bnb.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=torch.float32,
        quant_type="nf4",
        compress_statistics=double,
    )
    new.load_state_dict(layer.state_dict())
    return new.to("cpu").train(layer.training)


def net(double: bool = True) -> nn.Sequential:
    """Two layers of four bits, one without a bias, around one that has all; in != out. In eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first, middle, last = nn.Linear(128, 96), nn.Linear(96, 192), nn.Linear(192, 64, bias=False)
    return nn.Sequential(quantised(first, double), middle, nn.Tanh(), quantised(last, double)).eval()


def dense(layer: Any) -> Tensor:
    """bitsandbytes' own word on a layer that it has not rearranged."""
    state = copy.deepcopy(layer.weight.quant_state)
    assert not getattr(state, "packing_format_for_cpu", False)
    return bnb.functional.dequantize_4bit(layer.weight.data, state)


def adapted(method: tuple[str, dict[str, Any]], double: bool = True) -> tuple[nn.Sequential, ah.Adapters]:
    model = net(double)
    adapters = ah.adapt(model)
    adapters.add("a", ah.method(method[0], **method[1]), ["0", "3"])
    rng = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn(p.shape, generator=rng)
    return model, adapters


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 128, generator=torch.Generator().manual_seed(2))


def rearranged(layer: Any, x: Tensor) -> bool:
    """Call the layer in the way that lets bitsandbytes rearrange it; whether it did, which depends on the processor."""
    with torch.no_grad():
        layer.eval()(x)
    return bool(getattr(layer.weight.quant_state, "packing_format_for_cpu", False))


# The weight ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", [(128, 96), (64, 160), (192, 32)])
def test_the_weight_is_what_bitsandbytes_makes_of_it(double: bool, shape: tuple[int, int]) -> None:
    layer = quantised(nn.Linear(*shape), double)
    site = QuantisedLinearSite.of("q", layer)
    assert site.weight_shape == site.shape == (shape[1], shape[0])
    assert site.weight.dtype == torch.float32
    torch.testing.assert_close(site.weight, dense(layer), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("double", [True, False])
def test_the_weight_is_right_after_a_forward_in_eval_mode_too(double: bool, x: Tensor) -> None:
    layer = quantised(nn.Linear(128, 96), double)
    want = dense(layer)
    moved = rearranged(layer, x)
    got = QuantisedLinearSite.of("q", layer).weight
    # What is left of the scales is bfloat16, so that is all that can be had: garbage is off by more than the weight.
    torch.testing.assert_close(got, want, rtol=2**-8 if moved else 1e-6, atol=1e-6)


def test_what_is_rearranged_can_be_told_from_garbage(x: Tensor) -> None:
    layer = quantised(nn.Linear(128, 96))
    want = dense(layer)
    if not rearranged(layer, x):
        pytest.skip("this processor has no AVX512-BF16, so bitsandbytes rearranges nothing")
    theirs = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert theirs.shape != want.shape or (theirs.float() - want).abs().max() > 0.05


# Computing -------------------------------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("double", [True, False])
def test_forward_then_merge_gives_the_dequantised_sum(method: tuple[str, Any], double: bool, x: Tensor) -> None:
    model, adapters = adapted(method, double)
    before = {i: dense(model[i]) for i in (0, 3)}
    bits = {name: t.clone() for name, t in model.state_dict().items()}
    merged = {}
    with torch.no_grad():
        rough = model.eval()(x)  # on some processors in bfloat16
        live, h = model.train()(x), x
        for i in (0, 3):
            part: Any = model[i].adapters.a
            p = ah.Params({k: t.detach().double() if t.is_floating_point() else t for k, t in part.params().items()})
            bias = None if model[i].bias is None else model[i].bias.detach().double()
            merged[i], bias = part.method.merge(p, before[i].double(), bias, part.site)
            torch.testing.assert_close(
                model[i](h).double(), F.linear(h.double(), merged[i], bias), rtol=1e-4, atol=1e-5
            )
            h = torch.tanh(model[1](model[i](h))) if i == 0 else h
        model.eval()(x)
        adapters.merge()
        for i in (0, 3):
            assert type(model[i]) is nn.Linear
            assert model[i].weight.dtype == torch.float32
            torch.testing.assert_close(model[i].weight.double(), merged[i], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(model(x), live, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(rough, live, rtol=0.05, atol=0.02)
        adapters.unmerge()
        assert isinstance(model[0], bnb.nn.Linear4bit)
        assert torch.equal(model.eval()(x), rough)
        assert torch.equal(model.train()(x), live)
    now = model.state_dict()
    assert now.keys() == bits.keys()
    assert all(torch.equal(now[name], t) for name, t in bits.items())


def test_off_is_exact_and_remove_leaves_the_model_as_it_was(x: Tensor) -> None:
    model, plain = net(), net().requires_grad_(False)
    bits = {name: t.clone() for name, t in plain.state_dict().items()}
    adapters = ah.adapt(model)
    adapters.add("a", ah.LoRA(rank=4), ["0", "3"])
    adapters.activate(None)
    for training in (True, False, True):
        for gradients in (False, True):
            x.requires_grad_(gradients)
            theirs, ours = copy.deepcopy(plain).train(training)(x), model.train(training)(x)
            assert torch.equal(ours, theirs)
            if gradients:
                want, got = (torch.autograd.grad(y.square().sum(), x)[0] for y in (theirs, ours))
                assert torch.equal(want, got)
    with torch.no_grad():
        model.eval()(x)
    adapters.remove("a")
    now = model.state_dict()
    assert now.keys() == bits.keys()
    assert all(torch.equal(now[name], t) for name, t in bits.items())
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_state_dict_pre_hooks")
    assert not any(getattr(layer, name) for layer in model for name in hooks)
    assert [set(vars(layer)) for layer in model] == [set(vars(layer)) for layer in plain]


@pytest.mark.parametrize("training", [True, False])
def test_gradients_pass_through_layers_that_were_called_in_eval_mode(training: bool, x: Tensor) -> None:
    model = net()
    rearranged(model[3], torch.randn(2, 192))  # before there is any adapter
    want_W = QuantisedLinearSite.of("3", model[3]).weight.double()
    adapters = ah.adapt(model)
    adapters.add("a", ah.LoRA(rank=4, init_weights="random"), "1")  # below a layer of four bits without an adapter
    with torch.no_grad():
        model.eval()(x)
    model.train(training)
    model(x).square().sum().backward()
    part: Any = model[1].adapters.a
    A, B, h = part.A.detach().double(), part.B.detach().double(), model[0](x).detach().double()
    z = F.linear(h, model[1].weight.double() + part.method.scaling * B @ A, model[1].bias.double())
    g = 2 * F.linear(torch.tanh(z), want_W) @ want_W * (1 - torch.tanh(z) ** 2)  # dloss/dz
    want = part.method.scaling * g.mT @ F.linear(h, A)
    torch.testing.assert_close(part.B.grad.double(), want, rtol=2e-2, atol=1e-2 * float(want.abs().max()))
    assert part.B.grad.abs().max() > 0


@every_method
def test_a_copy_and_a_pickle_compute_the_same(method: tuple[str, Any], x: Tensor) -> None:
    model, _ = adapted(method)
    with torch.no_grad():
        want = model(x)
        assert torch.equal(copy.deepcopy(model)(x), want)
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), want)


# Files -----------------------------------------------------------------------------------------------------------


@every_method
def test_a_file_goes_from_four_bits_to_all_and_back(method: tuple[str, Any], tmp_path: Path, x: Tensor) -> None:
    model, adapters = adapted(method)
    adapters.save("a", tmp_path / "a")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        full = nn.Sequential(nn.Linear(128, 96), nn.Linear(96, 192), nn.Tanh(), nn.Linear(192, 64, bias=False)).eval()
    on_full = ah.adapt(full)
    on_full.load(tmp_path / "a", "a")  # the sketch takes rounding to four bits for the same base
    on_full.save("a", tmp_path / "b")
    again = net()
    ah.adapt(again).load(tmp_path / "b", "a")
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    other = nn.Sequential(nn.Linear(128, 96), nn.Linear(96, 192), nn.Tanh(), nn.Linear(192, 64, bias=False))
    with pytest.raises(FileError, match="another base model"):
        ah.adapt(other).load(tmp_path / "a", "a")


# Refusals --------------------------------------------------------------------------------------------------------


def test_a_layer_that_is_not_quantised_yet_is_refused() -> None:
    model = nn.Sequential(bnb.nn.Linear4bit(128, 96))
    with pytest.raises(ah.ConfigError, match="not been quantised yet"):
        ah.adapt(model).add("a", ah.LoRA(rank=2), "0")


def test_a_layer_that_bitsandbytes_computes_wrongly_is_refused() -> None:
    layer = nn.Linear(160, 64, bias=False)  # two and a half blocks a row
    nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(1)).data *= torch.arange(1, 65)[:, None]
    model = nn.Sequential(quantised(layer))
    h = torch.randn(50, 160, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        off = (model(h) - layer(h)).norm() / layer(h).norm()
    with pytest.raises(ah.ConfigError, match="no multiple of a block's 64"):
        ah.adapt(model).add("a", ah.LoRA(rank=2), "0")
    if off < 0.15:  # four bits round by 0.1
        pytest.skip("bitsandbytes computes this layer rightly on this processor: is it time to accept it?")
    assert off > 0.2


def test_scales_that_bitsandbytes_has_mixed_up_are_refused(x: Tensor) -> None:
    layer = quantised(nn.Linear(128, 96), double=False)
    if not rearranged(layer, x):
        pytest.skip("this processor has no AVX512-BF16, so bitsandbytes rearranges nothing")
    layer.state_dict()
    with pytest.raises(ah.ConfigError, match="mixed up its scales"):
        ah.adapt(nn.Sequential(layer)).add("a", ah.LoRA(rank=2), "0")


def test_four_bits_hold_no_sum() -> None:
    site = QuantisedLinearSite.of("q", quantised(nn.Linear(128, 96)))
    with pytest.raises(NotMergeable, match="four bits hold no sum"):
        site.fold(site.weight)


@pytest.mark.parametrize("double", [True, False])
def test_within_inference_a_weight_is_dequantised_once(
    double: bool, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, own = list[str](), QuantisedLinearSite.weight

    def weight(site: QuantisedLinearSite) -> Tensor:
        read.append(site.name)
        found: Tensor = own.fget(site)  # type: ignore[attr-defined]
        return found

    model = net(double)
    adapters = ah.adapt(model)
    adapters.add("a", ah.method("dora", rank=4), ["0", "3"])
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(p))))
        want = model(x)
    monkeypatch.setattr(QuantisedLinearSite, "weight", property(weight))
    with adapters.inference():
        first = model(x)
        seen = len(read)
        assert set(read) == {"0", "3"}
        assert torch.equal(first, want)
        assert torch.equal(model(x), want)
        assert len(read) == seen


@pytest.mark.parametrize("part", ["codes", "scales"])
def test_within_inference_another_weight_is_noticed(part: str, x: Tensor) -> None:
    model = nn.Sequential(quantised(nn.Linear(128, 96), double=False)).train()  # nothing is rearranged
    adapters, layer = ah.adapt(model), model[0]
    adapters.add("a", ah.method("dora", rank=4, alpha=4), "0")
    p = layer.adapters.a
    with torch.no_grad():
        p.B.add_(torch.randn(p.B.shape, generator=torch.Generator().manual_seed(0)))

    def want() -> Tensor:
        W = dense(layer).double()
        V = W + p.B.double() @ p.A.double()
        return p.m / V.norm(dim=1) * (x.double() @ V.T) + layer.bias

    with adapters.inference():
        for _ in range(2):
            torch.testing.assert_close(model(x).double(), want(), rtol=1e-4, atol=1e-4)
        before = want()
        if part == "codes":
            layer.weight.copy_(layer.weight.flip(0))
        else:
            layer.weight.quant_state.absmax.mul_(torch.linspace(0.5, 2, layer.weight.quant_state.absmax.numel()))
        assert (want() - before).abs().max() > 0.1
        torch.testing.assert_close(model(x).double(), want(), rtol=1e-4, atol=1e-4)


# The summary -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("double", "bits"), [(True, 4 + 8 / 64 + 32 / (64 * 256)), (False, 4 + 32 / 64)])
def test_bits_are_counted_as_they_are_stored(double: bool, bits: float) -> None:
    model = nn.Sequential(quantised(nn.Linear(1024, 768, bias=False), double), nn.Linear(768, 10))
    adapters = ah.adapt(model)
    adapters.add("a", ah.LoRA(rank=8), "0")
    found = adapters.summary()
    assert found.quantised == 1024 * 768
    assert found.base == 1024 * 768 + 768 * 10 + 10
    assert found.adapted == 1024 * 768
    assert found.quantised_bits == pytest.approx(bits, abs=1e-4)
    assert found.base_bytes == found.quantised_bytes + 4 * (768 * 10 + 10)
    text = str(found)
    assert f"{bits:.3f} bits a quantised parameter, {100 * (1 - bits / 16):.1f}% less than 16" in text
    assert ("4.127" in text and "74.2%" in text) == double
    assert "75" not in text.split("bits a quantised")[1].split("\n")[0]


# Training --------------------------------------------------------------------------------------------------------


def llama() -> Any:
    """Two layers, of widths that four bits are right for; always the same weights."""
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=VOCABULARY, tie_word_embeddings=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(config)
        for p in model.parameters():
            p.data += 0.1 * torch.randn(p.shape)
    return model


def trained(model: Any, seed: int) -> float:
    """The loss at the end of a short training of LoRA on all linear layers."""
    adapters = ah.adapt(model)
    adapters.add("a", ah.LoRA(rank=8, alpha=16), "all-linear", seed=seed)
    optimizer = torch.optim.AdamW(adapters.param_groups(lr=1e-2))
    ids = tokens(8, 12)
    for _ in range(40):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def test_a_model_of_four_bits_is_trained_as_well_as_the_full_one() -> None:
    """Over three seeds, the difference of the mean losses is within the spread of the full model's, or 5 % of it."""
    full, four = [], []
    for seed in range(3):
        for losses, change in ((full, False), (four, True)):
            model = llama().train()
            if change:
                for name, layer in list(model.named_modules()):
                    if isinstance(layer, nn.Linear) and name != "lm_head":
                        parent, _, own = name.rpartition(".")
                        setattr(model.get_submodule(parent), own, quantised(layer))
            losses.append(trained(model, seed))
    with torch.no_grad():
        start = float(llama()(input_ids=tokens(8, 12), labels=tokens(8, 12)).loss)
    spread = max(full) - min(full)
    assert max(full) < 0.8 * start
    assert abs(sum(four) - sum(full)) / 3 <= max(spread, 0.05 * sum(full) / 3), (start, full, four)
