"""Every method but DoRA, which has its own, through PEFT's files: what PEFT wrote, and what it reads of ours."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import BERT, CONV, EMBEDDING, GPT2, LLAMA, Peer, load_peft, output, write_peft
from peft import IA3Config, PeftConfig, VeraConfig
from safetensors.torch import load_file
from torch import nn

import adapterhub_lite as ah
from adapterhub_lite import NotMergeable

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FEEDFORWARD = {"llama": ["down_proj"], "gpt2": ["c_proj"], "bert": ["dense"], "conv": ["conv2d"]}
# PEFT's IA3 adapts no 1d or 3d convolution in our version of it, and VeRA no convolution at all.
CONV_2D = replace(CONV, targets=["conv2d", "pointwise", "head"])


def fill(model: nn.Module, seed: int = 0) -> None:
    """Move what is trained away from where it starts."""
    rng = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.2 * torch.randn(p.shape, generator=rng).to(p)


def vera(peer: Peer, **options: Any) -> Callable[[], PeftConfig]:
    return lambda: VeraConfig(r=5, target_modules=peer.targets, projection_prng_key=7, **peer.config, **options)


def ia3(peer: Peer) -> Callable[[], PeftConfig]:
    return lambda: IA3Config(target_modules=peer.targets, feedforward_modules=FEEDFORWARD[peer.name], **peer.config)


PEFT_S = [
    *(pytest.param(peer, vera(peer), id=f"{peer.name}-vera") for peer in (LLAMA, GPT2, BERT)),
    pytest.param(LLAMA, vera(LLAMA, save_projection=False), id="llama-vera-drawn-again"),
    *(pytest.param(peer, ia3(peer), id=f"{peer.name}-ia3") for peer in (LLAMA, GPT2, BERT, CONV_2D)),
]


@pytest.mark.parametrize(("peer", "config"), PEFT_S)
def test_what_peft_wrote_computes_here_what_it_does_there(tmp_path: Path, peer: Peer, config: Any) -> None:
    folder = write_peft(tmp_path / "x", peer, config, seed=3)
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


OURS = [
    *((peer, "vera", {"rank": 5}) for peer in (LLAMA, GPT2)),
    (LLAMA, "vera", {"rank": 5, "save_projection": False, "projection_prng_key": 3}),
    *((peer, "ia3", {"feedforward": tuple(FEEDFORWARD[peer.name])}) for peer in (LLAMA, GPT2, CONV_2D)),
    *((peer, "lora_plus", {"rank": 3, "ratio": 5.0}) for peer in (LLAMA, EMBEDDING)),
    *((peer, "lora_fa", {"rank": 3, "alpha": 5}) for peer in (GPT2, CONV, EMBEDDING)),
    *((peer, "delta_lora", {"rank": 3, "alpha": 5, "start": 2}) for peer in (LLAMA, GPT2, CONV, EMBEDDING)),
    (LLAMA, "delta_lora", {"rank": 4, "rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3}}),
    (LLAMA, "lora", {"rank": 4, "init_weights": "pissa", "alpha": 6}),
    (LLAMA, "lora", {"rank": 3, "init_weights": "olora", "rslora": True, "rank_pattern": {"q_proj": 2}}),
    (CONV, "lora", {"rank": 3, "init_weights": "pissa", "alpha_pattern": {"conv2d": 5}}),
]


@pytest.mark.parametrize(("peer", "name", "options"), OURS, ids=lambda v: v.name if isinstance(v, Peer) else str(v))
def test_what_is_saved_here_computes_in_peft_what_it_does_here_and_comes_back(
    tmp_path: Path, peer: Peer, name: str, options: dict[str, Any]
) -> None:
    model: Any = peer.build()
    base = output(model, peer)
    method = ah.method(name, **options)
    adapters = ah.adapt(model)
    adapters.add("a", method, peer.targets)
    fill(model)
    want = output(model, peer)
    assert (want - base).abs().max() > 1e-2
    assert float(adapters.save("a", tmp_path / "out")) == 0
    torch.testing.assert_close(output(load_peft(tmp_path / "out", peer), peer), want, rtol=1e-4, atol=1e-5)

    again: Any = peer.build()
    held = ah.adapt(again)
    held.load(tmp_path / "out", "a")
    (found,) = ah.load(tmp_path / "out").source.contents.values()
    assert all(found.method.at(site) == method.at(site) for site in found.sites)
    assert type(found.method) is type(method)
    assert torch.equal(output(again, peer), want)
    mine = {key: p for key, p in model.named_parameters() if p.requires_grad}
    theirs = {key: p for key, p in again.named_parameters() if p.requires_grad}
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(p, theirs[key]) for key, p in mine.items())
    held.save("a", tmp_path / "again")
    for file in (WEIGHTS, CONFIG):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()


def test_a_config_that_was_edited_holds_against_the_header(tmp_path: Path) -> None:
    model: Any = LLAMA.build()
    adapters = ah.adapt(model)
    adapters.add("a", ah.method("lora_fa", rank=3, alpha=6), ["q_proj"])
    fill(model)
    adapters.save("a", tmp_path / "a")
    path = tmp_path / "a" / CONFIG
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "lora_alpha": 12}))
    found = ah.load(tmp_path / "a").source.contents[str(tmp_path / "a")].method
    assert found == ah.method("lora", rank=3, alpha=12)


def test_vera_adds_up_as_files_where_the_file_tells_the_shapes(tmp_path: Path) -> None:
    dense: dict[str, torch.Tensor] = {}
    refs = []
    for seed, weight in ((0, 0.7), (1, -0.4)):
        model: Any = GPT2.build()
        adapters = ah.adapt(model)
        adapters.add("a", ah.method("vera", rank=4, projection_prng_key=seed), GPT2.targets)
        fill(model, seed)
        adapters.save("a", tmp_path / str(seed))
        refs.append(weight * ah.load(tmp_path / str(seed)))
        for site, module in model.named_modules():
            if hasattr(module, "nf"):
                own, shared = module.adapters.a, model.adapters.a
                A, B = shared.A.double()[:, : module.nx], shared.B.double()[: module.nf]
                change = own.b.double().diag() @ B @ own.d.double().diag() @ A
                dense[site] = dense.get(site, 0) + weight * change
    total = refs[0] + refs[1]
    total.save(tmp_path / "sum")
    assert dense
    for site, want in dense.items():
        torch.testing.assert_close(total.delta(site).dense(), want, rtol=0, atol=1e-12)
        torch.testing.assert_close(ah.load(tmp_path / "sum").delta(site).dense().double(), want, rtol=1e-4, atol=1e-6)


def test_files_that_do_not_tell_enough_are_refused_with_the_way_out(tmp_path: Path) -> None:
    a = ah.load(write_peft(tmp_path / "a", LLAMA, vera(LLAMA), seed=0))
    with pytest.raises(NotMergeable, match="does not tell the shape") as raised:
        (0.5 * a).save(tmp_path / "out")
    assert "adapters.load()" in str(raised.value)
    b = ah.load(write_peft(tmp_path / "b", LLAMA, ia3(LLAMA), seed=0))
    with pytest.raises(NotMergeable, match="depends on the base weights"):
        (0.5 * b).save(tmp_path / "out")
