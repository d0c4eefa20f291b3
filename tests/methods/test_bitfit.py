"""BitFit: biases alone, at every layer that has one; nothing is kept for them; sums are LoRAs with a bias."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import BERT, CONV, GPT2, LLAMA, Peer, load_peft, output
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import adapterhub_lite as ah

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PEERS = pytest.mark.parametrize("peer", [BERT, GPT2, CONV], ids=lambda p: p.name)
LAYERS = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.LayerNorm)


def fill(model: nn.Module, seed: int = 0) -> None:
    rng = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.3 * torch.randn(p.shape, generator=rng).to(p)


def biases(model: nn.Module) -> dict[str, nn.Parameter]:
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LAYERS) and isinstance(module.bias, nn.Parameter):
            found[name] = module.bias
    return found


@PEERS
def test_it_is_the_model_with_other_biases_live_weighed_and_merged(peer: Peer) -> None:
    model: Any = peer.build().double()
    adapters = ah.adapt(model)
    base, w = output(model, peer), {"a": 0.7, "b": -0.4}
    for seed, name in enumerate(w):
        adapters.add(name, ah.method("bitfit"), "all")
        adapters.activate(name)
        assert torch.equal(output(model, peer), base)
        fill(model, seed)
    plain: Any = peer.build().double()
    want_names = [n for n, p in plain.named_parameters() if n.endswith("bias")]
    assert [f"{name}.bias" for name in biases(plain)] == want_names
    assert adapters.summary().trained == sum(p.numel() for p in biases(plain).values())
    before = {key: t.clone() for key, t in model.state_dict().items()}
    start = copy.deepcopy(plain.state_dict())
    for active in ("a", "b", w):
        weights = {active: 1.0} if isinstance(active, str) else active
        plain.load_state_dict(start)
        for name, bias in biases(plain).items():
            bias.data += sum(
                c * model.get_parameter(f"{name}.adapters.{adapter}.db").data for adapter, c in weights.items()
            )
        adapters.activate(active)
        want = output(plain, peer)
        assert (want - base).abs().max() > 1e-2
        torch.testing.assert_close(output(model, peer), want, rtol=0, atol=1e-12)
        adapters.merge()
        torch.testing.assert_close(output(model, peer), want, rtol=0, atol=1e-12)
        for name, bias in biases(plain).items():
            torch.testing.assert_close(model.get_parameter(f"{name}.bias"), bias, rtol=0, atol=1e-15)
            assert torch.equal(model.get_parameter(f"{name}.weight"), plain.get_parameter(f"{name}.weight"))
        adapters.unmerge()
        assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@PEERS
def test_half_precision_is_near_and_comes_back_bit_by_bit(peer: Peer, dtype: torch.dtype) -> None:
    model: Any = peer.build().to(dtype)
    adapters = ah.adapt(model)
    adapters.add("a", ah.method("bitfit"), "all")
    fill(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    base = {key: t.clone() for key, t in model.state_dict().items()}
    live = output(model, peer)
    assert live.dtype == dtype
    wide = output(copy.deepcopy(model).float(), peer)
    assert (live.float() - wide).abs().max() < 0.06 * wide.abs().max()
    adapters.merge()
    assert (output(model, peer).float() - wide).abs().max() < 0.06 * wide.abs().max()
    adapters.unmerge()
    assert all(torch.equal(t, base[key]) for key, t in model.state_dict().items())


def test_training_moves_it_and_nothing_else() -> None:
    model: Any = GPT2.build()
    adapters = ah.adapt(model)
    adapters.add("a", ah.method("bitfit"), "all")
    before = {key: t.clone() for key, t in model.state_dict().items()}
    optimizer = torch.optim.AdamW(adapters.param_groups(lr=1e-2))
    ids, losses = GPT2.inputs()["input_ids"], []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    moved = {key for key, t in model.state_dict().items() if not torch.equal(t, before[key])}
    assert moved == {key for key in before if "adapters" in key}


def test_the_gradient_is_that_of_a_bias_that_is_trained() -> None:
    plain: Any = GPT2.build().double().requires_grad_(False)
    for bias in biases(plain).values():
        bias.requires_grad_(True)
    model: Any = GPT2.build().double()
    ah.adapt(model).add("a", ah.method("bitfit"), "all")
    ids = GPT2.inputs()["input_ids"]
    for each in (plain, model):
        each(input_ids=ids, labels=ids).loss.backward()
    for name, bias in biases(plain).items():
        assert bias.grad is not None
        own = model.get_parameter(f"{name}.adapters.a.db").grad
        torch.testing.assert_close(own, bias.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_layer_keeps_nothing_for_it(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 8)).to(dtype)
    ah.adapt(model).add("a", ah.method("bitfit"), "all-linear")
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(torch.randn(5, 12, dtype=dtype, requires_grad=True) * 1.0)
    assert not kept
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@PEERS
def test_a_file_comes_back_bit_by_bit(tmp_path: Path, peer: Peer) -> None:
    model: Any = peer.build()
    adapters = ah.adapt(model)
    adapters.add("a", ah.method("bitfit"), "all")
    fill(model)
    want = output(model, peer)
    assert float(adapters.save("a", tmp_path / "out")) == 0
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    assert all(t.shape == (len(t),) for t in tensors.values())
    assert len(tensors) == len(biases(peer.build()))
    again: Any = peer.build()
    held = ah.adapt(again)
    held.load(tmp_path / "out", "a")
    assert torch.equal(output(again, peer), want)
    held.save("a", tmp_path / "again")
    for file in (WEIGHTS, CONFIG):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()


def test_sums_of_files_are_loras_with_a_bias_that_peft_reads(tmp_path: Path) -> None:
    model: Any = BERT.build()
    adapters = ah.adapt(model)
    adapters.add("a", ah.method("bitfit"), BERT.targets)
    adapters.add("b", ah.method("bitfit"), BERT.targets)
    adapters.add("c", ah.method("lora", rank=3), ["query", "value"])
    refs = []
    for seed, name in enumerate("abc"):
        adapters.activate(name)
        fill(model, seed)
        adapters.save(name, tmp_path / name)
        refs.append(ah.load(tmp_path / name))
    a, b, c = refs
    for total, weights in ((0.7 * a - 0.4 * b, {"a": 0.7, "b": -0.4}), (0.7 * a + 0.5 * c, {"a": 0.7, "c": 0.5})):
        adapters.activate(weights)
        want = output(model, BERT)
        total.save(tmp_path / "sum", force=True)
        again: Any = BERT.build()
        ah.adapt(again).load(tmp_path / "sum", "sum")
        torch.testing.assert_close(output(again, BERT), want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(output(load_peft(tmp_path / "sum", BERT), BERT), want, rtol=1e-4, atol=1e-5)
        other: Any = BERT.build()
        ah.adapt(other).load(total, "sum")
        torch.testing.assert_close(output(other, BERT), want, rtol=1e-4, atol=1e-5)


def test_a_sum_that_no_lora_can_hold_is_refused_by_name(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4))
    adapters = ah.adapt(model)
    adapters.add("a", ah.method("bitfit"), "all")
    fill(model)
    adapters.save("a", tmp_path / "a")
    a = ah.load(tmp_path / "a")
    with pytest.raises(ah.NotMergeable, match=r"1: a sum is saved as a 'lora' adapter, .* 'norm' cannot have"):
        (0.5 * a + 0.25 * a).save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_layers_without_a_bias_are_left_out_or_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4, bias=False), nn.RMSNorm(4), nn.GroupNorm(2, 4))
    adapters = ah.adapt(model)
    for targets, found in (("all", ["0", "3"]), ("all-linear", ["0"])):
        adapters.add("a", ah.method("bitfit"), targets)
        assert [name for name, m in model.named_children() if hasattr(m, "adapters")] == found
        adapters.remove("a")
    for name in ("1", "2"):
        with pytest.raises(ah.ConfigError, match=f"{name}: method 'bitfit' can do nothing here: the layer has no bias"):
            ah.adapt(model).add("a", ah.method("bitfit"), ["0", name])
        assert not hasattr(model[0], "adapters")
    llama: Any = LLAMA.build()
    with pytest.raises(ah.ConfigError, match="the layer has no bias"):
        ah.adapt(llama).add("a", ah.method("bitfit"), "all")


def test_a_file_for_a_layer_without_a_bias_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    adapters = ah.adapt(model)
    adapters.add("a", ah.method("bitfit"), "0")
    fill(model)
    adapters.save("a", tmp_path / "a")
    with pytest.raises(ah.ConfigError, match="0: method 'bitfit' can do nothing here: the layer has no bias"):
        ah.adapt(nn.Sequential(nn.Linear(6, 4, bias=False))).load(tmp_path / "a", "a", any_base=True)
    key = "base_model.model.0.bitfit_bias"
    save_file({key: torch.ones(4, 1)}, tmp_path / "a" / WEIGHTS)
    with pytest.raises(ah.FileError, match=r"bitfit_bias .* is not a vector"):
        ah.load(tmp_path / "a")
