"""LayerNorm tuning: the norms' own values, through every model's own norm class, and PEFT's files both ways."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import BERT, GPT2, LLAMA, Peer, load_peft, output, write_peft
from peft import LNTuningConfig
from safetensors.torch import load_file, save_file
from torch import nn

import adapterhub_lite as ah

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NORMS = {
    "bert": ["LayerNorm"],
    "llama": ["input_layernorm", "post_attention_layernorm", "norm"],
    "gpt2": ["ln_1", "ln_2", "ln_f"],
}
PEERS = pytest.mark.parametrize("peer", [BERT, LLAMA, GPT2], ids=lambda p: p.name)


def build(peer: Peer) -> Any:
    """The norms' weights are 1 at init: moved, so that a lost one shows."""
    model = peer.build()
    rng = torch.Generator().manual_seed(7)
    for p in model.parameters():
        if p.ndim == 1:
            p.data += 0.2 * torch.randn(p.shape, generator=rng).to(p)
    return model


def fill(model: nn.Module, seed: int = 0) -> None:
    rng = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.3 * torch.randn(p.shape, generator=rng).to(p)


def norms(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if "norm" in type(m).__name__.lower()]


@PEERS
def test_it_is_the_model_with_other_norms_live_weighed_and_merged(peer: Peer) -> None:
    model: Any = build(peer).double()
    adapters = ah.adapt(model)
    base, w = output(model, peer), {"a": 0.7, "b": -0.4}
    for seed, name in enumerate(w):
        adapters.add(name, ah.method("ln_tuning"), "all")
        adapters.activate(name)
        torch.testing.assert_close(output(model, peer), base, rtol=0, atol=1e-12)
        fill(model, seed)
    trained = sum(p.numel() for p in norms(build(peer)) for p in p.parameters())
    assert adapters.summary().trained == trained
    before = {key: t.clone() for key, t in model.state_dict().items()}

    plain: Any = build(peer).double()
    values = [m.adapters for m in norms(model)]
    assert len(values) == len(norms(plain)) == 5
    start = copy.deepcopy(plain.state_dict())
    for active in ("a", "b", w):
        plain.load_state_dict(start)
        for layer, own in zip(norms(plain), values, strict=True):
            for key, p in layer.named_parameters():
                weights = {active: 1.0} if isinstance(active, str) else active
                p.data += sum(c * (getattr(getattr(own, n), key).data - p.data) for n, c in weights.items())
        adapters.activate(active)
        want = output(plain, peer)
        assert (want - base).abs().max() > 1e-2
        # Llama's norm computes in float32, whatever comes in.
        loose = 1e-5 if peer is LLAMA else 1e-12
        torch.testing.assert_close(output(model, peer), want, rtol=0, atol=loose)
        adapters.merge()
        torch.testing.assert_close(output(model, peer), want, rtol=0, atol=loose)
        adapters.unmerge()
        assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


def test_one_layer_is_the_formula() -> None:
    model = nn.Sequential(nn.LayerNorm(6)).double()
    adapters = ah.adapt(model)
    adapters.add("a", ah.method("ln_tuning"), "0")
    fill(model)
    own: Any = model[0].adapters.a  # type: ignore[union-attr]
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(model(x), own.weight * normed + own.bias, rtol=0, atol=1e-12)
    want = model(x)
    adapters.merge()
    torch.testing.assert_close(model(x), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@PEERS
def test_half_precision_is_near_and_comes_back_bit_by_bit(peer: Peer, dtype: torch.dtype) -> None:
    model: Any = build(peer).to(dtype)
    adapters = ah.adapt(model)
    adapters.add("a", ah.method("ln_tuning"), "all")
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
    assert torch.equal(output(model, peer), live)


def test_training_moves_it_and_nothing_else() -> None:
    model: Any = build(LLAMA)
    adapters = ah.adapt(model)
    adapters.add("a", ah.method("ln_tuning"), "all")
    before = {key: t.clone() for key, t in model.state_dict().items()}
    optimizer = torch.optim.AdamW(adapters.param_groups(lr=5e-2))
    ids, losses = LLAMA.inputs()["input_ids"], []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    moved = {key for key, t in model.state_dict().items() if not torch.equal(t, before[key])}
    assert moved == {key for key in before if "adapters" in key}


@PEERS
def test_what_peft_wrote_computes_here_what_it_does_there(tmp_path: Path, peer: Peer) -> None:
    folder = write_peft(tmp_path / "x", peer, lambda: LNTuningConfig(target_modules=NORMS[peer.name]), seed=3)
    model: Any = peer.build()
    base = output(model, peer)
    adapters = ah.adapt(model)
    adapters.load(folder, "a")
    want = output(load_peft(folder, peer), peer)
    assert (want - base).abs().max() > 1e-2
    torch.testing.assert_close(output(model, peer), want, rtol=1e-4, atol=1e-5)
    adapters.merge()
    torch.testing.assert_close(output(model, peer), want, rtol=1e-4, atol=1e-5)
    adapters.unmerge()
    adapters.save("a", tmp_path / "out")
    before, after = (load_file(f / WEIGHTS) for f in (folder, tmp_path / "out"))
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], t) for key, t in before.items())
    assert any(key.endswith(".bias") for key in after) == (peer is not LLAMA)


@PEERS
def test_what_is_saved_here_computes_in_peft_what_it_does_here_and_comes_back(tmp_path: Path, peer: Peer) -> None:
    model: Any = peer.build()
    adapters = ah.adapt(model)
    base = output(model, peer)
    adapters.add("a", ah.method("ln_tuning"), "all")
    fill(model)
    want = output(model, peer)
    assert (want - base).abs().max() > 1e-2
    assert float(adapters.save("a", tmp_path / "out")) == 0
    torch.testing.assert_close(output(load_peft(tmp_path / "out", peer), peer), want, rtol=1e-4, atol=1e-5)
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert config["peft_type"] == "LN_TUNING"
    assert config.keys() <= vars(LNTuningConfig()).keys() | {"auto_mapping"}

    again: Any = peer.build()
    held = ah.adapt(again)
    held.load(tmp_path / "out", "a")
    assert torch.equal(output(again, peer), want)
    mine, theirs = ({k: p for k, p in m.named_parameters() if p.requires_grad} for m in (model, again))
    assert mine.keys() == theirs.keys() != set()
    assert all(torch.equal(p, theirs[key]) for key, p in mine.items())
    held.save("a", tmp_path / "again")
    for file in (WEIGHTS, CONFIG):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = nn.Sequential(nn.LayerNorm(6), nn.RMSNorm(6))
    adapters = ah.adapt(model)
    adapters.add("a", ah.method("ln_tuning"), "all")
    fill(model)
    adapters.save("a", tmp_path / "a")
    return tmp_path / "a"


def test_values_have_no_sum_without_the_base(saved: Path) -> None:
    a = ah.load(saved)
    with pytest.raises(ah.NotMergeable, match=r"depends on the base weights.*adapters.load\(\)"):
        (0.5 * a + 0.25 * a).save(saved.parent / "out")
    model = nn.Sequential(nn.LayerNorm(6), nn.RMSNorm(6))
    adapters = ah.adapt(model)
    adapters.load(saved, "a")
    adapters.merge()
    with pytest.raises(ah.ConfigError, match="merged into the weights"):
        adapters.save("a", saved.parent / "out")


def test_a_bias_more_or_less_is_refused_by_name(saved: Path) -> None:
    for model, what in (
        (nn.Sequential(nn.LayerNorm(6, bias=False), nn.RMSNorm(6)), "0: the file has a bias and the layer has none"),
        (nn.Sequential(nn.LayerNorm(6), nn.LayerNorm(6)), "1: the layer has a bias and the file has none"),
    ):
        with pytest.raises(ah.ConfigError, match=what):
            ah.adapt(model).load(saved, "a")
        assert not ah.adapt(model).names


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("weight", None, "ln_tuning_layers.weight' is missing"),
        ("weight", torch.ones(6, 1), "is not a vector"),
        ("bias", torch.ones(5), "does not fit the weight"),
        ("other", torch.ones(6), "no tensor of method 'ln_tuning'"),
    ],
)
def test_a_damaged_file_is_refused(saved: Path, key: str, value: Any, what: str) -> None:
    tensors = load_file(saved / WEIGHTS)
    tensors.pop(f"base_model.model.0.ln_tuning_layers.{key}", None)
    if value is not None:
        tensors[f"base_model.model.0.ln_tuning_layers.{key}"] = value
    save_file(tensors, saved / WEIGHTS)
    with pytest.raises(ah.FileError, match=what):
        ah.load(saved)
