"""LoRA's ways to begin, against PEFT's own: distributions where they are drawn, values where the weight gives them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import LLAMA, dense_delta, load_peft, output
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import adapterhub_lite as ah
from adapterhub_lite import ConfigError

RANK, ALPHA = 16, 24
LAYERS = {
    "linear": lambda: nn.Linear(500, 700),
    "conv2d": lambda: nn.Conv2d(90, 300, (3, 2)),
    "embedding": lambda: nn.Embedding(600, 400),
}
DRAWN = {"kaiming": True, "gaussian": "gaussian", "orthogonal": "orthogonal", "random": False}


def net(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 9, bias=False))


def peft_of(model: nn.Module, **options: Any) -> Any:
    """The model with PEFT's LoRA; it changes `model`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return get_peft_model(model, LoraConfig(**options)).base_model.model  # type: ignore[arg-type]


def factors(layer: Any) -> tuple[Tensor, Tensor]:
    """A (r, in, …) and B (out, r, …) of PEFT's layer."""
    if len(layer.lora_embedding_A):
        return layer.lora_embedding_A["default"].detach(), layer.lora_embedding_B["default"].detach()
    return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()


@pytest.mark.parametrize(
    ("kind", "init"),  # PEFT has orthogonal for linear layers only
    [(kind, init) for kind in LAYERS for init in DRAWN if kind == "linear" or init != "orthogonal"],
)
def test_what_is_drawn_is_distributed_as_in_peft(kind: str, init: Any) -> None:
    model = nn.Sequential(LAYERS[kind]())
    ah.adapt(model).add("a", ah.method("lora", rank=RANK, alpha=ALPHA, init_weights=init), "0")
    options: dict[str, Any] = {"r": RANK, "lora_alpha": ALPHA, "init_lora_weights": DRAWN[init]}
    theirs = peft_of(nn.Sequential(LAYERS[kind]()), target_modules=["0"], **options)
    part: Any = model[0].adapters.a
    for own, other in zip((part.A, part.B), factors(theirs[0]), strict=True):
        own = own.detach()
        assert own.shape == other.shape
        if not other.any():
            assert not own.any()
            continue
        assert not torch.equal(own, other)
        mean, std = 4 * float(other.std()) / math.sqrt(other.numel()), float(other.std())
        assert abs(float(own.mean())) < mean
        assert float(own.std()) == pytest.approx(std, rel=0.06)
        probabilities = torch.tensor([0.01, 0.1, 0.3, 0.7, 0.9, 0.99])
        quantiles = [t.flatten().quantile(probabilities) for t in (own, other)]
        torch.testing.assert_close(*quantiles, rtol=0, atol=0.2 * std)
        # Bounded where PEFT's is: a uniform distribution and a normal one of the same width differ in their ends.
        assert float(own.abs().max() / std) == pytest.approx(float(other.abs().max() / std), rel=0.25)


def test_the_orthogonal_factors_have_a_zero_product() -> None:
    model = nn.Sequential(nn.Linear(50, 70))
    ah.adapt(model).add("a", ah.method("lora", rank=6, init_weights="orthogonal"), "0")
    part: Any = model[0].adapters.a
    A, B = part.A.detach(), part.B.detach()
    assert float((B @ A).abs().max()) < 1e-6
    assert float(A.norm()) > 1
    assert float(B.norm()) > 1


# PEFT says so because it changed the base, and could not change it back.
@pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA with rank_pattern:UserWarning")
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_weight_s_own_directions_are_peft_s(init: Any, rslora: bool) -> None:
    """PEFT moves the base by s B₀ A₀; ours stays, and both compute the same from the same trained factors."""
    model = net()
    before = {key: t.clone() for key, t in model.state_dict().items()}
    scaled: dict[str, Any] = {"rank_pattern": {"2": 3}, "alpha_pattern": {"0": 9}}
    adapters = ah.adapt(model)
    method = ah.method("lora", rank=4, alpha=6, rslora=rslora, init_weights=init, **scaled)
    adapters.add("a", method, ["0", "2"])
    theirs = peft_of(
        net(), r=4, lora_alpha=6, use_rslora=rslora, init_lora_weights=init, target_modules=["0", "2"], **scaled
    )
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(x), net()(x), rtol=1e-5, atol=1e-6)
    for i, (rank, alpha) in ((0, (4, 9)), (2, (3, 6))):
        part: Any = model[i].adapters.a
        s = alpha / math.sqrt(rank) if rslora else alpha / rank
        W, residue = net()[i].weight, theirs[i].base_layer.weight  # type: ignore[union-attr]
        torch.testing.assert_close(s * part.B0 @ part.A0, W - residue, rtol=1e-4, atol=1e-5)
        A, B = factors(theirs[i])
        torch.testing.assert_close(part.B0 @ part.A0, B @ A, rtol=1e-4, atol=1e-5)
        for own, other in ((part.A0, A), (part.B0.mT, B.mT)):  # each direction as long as PEFT's, up to its sign
            torch.testing.assert_close(own.abs(), other.abs(), rtol=1e-4, atol=1e-5)
        rng = torch.Generator().manual_seed(i)
        moved = [t + 0.3 * torch.randn(t.shape, generator=rng) for t in (A, B)]
        for tensor, own, other in zip(moved, (part.A, part.B), (A, B), strict=True):
            own.data.copy_(tensor)
            other.copy_(tensor)
    got, want = model(x).detach(), theirs(x).detach()
    assert (want - net()(x)).abs().max() > 0.1
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(model.state_dict()[key], t) for key, t in before.items())


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_in_the_file_they_are_a_lora_of_twice_the_rank(tmp_path: Path, init: Any, rslora: bool) -> None:
    model: Any = LLAMA.build()
    patterns: dict[str, Any] = {
        "rank_pattern": {"q_proj": 2, "up_proj": 5},
        "alpha_pattern": {"k_proj": 3, "o_proj": 7},
    }
    method = ah.method("lora", rank=3, alpha=4, rslora=rslora, init_weights=init, **patterns)
    adapters = ah.adapt(model)
    adapters.add("a", method, LLAMA.targets)
    rng = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.2 * torch.randn(p.shape, generator=rng)
    adapters.save("a", tmp_path / "a")

    ranks, alphas = {"q_proj": 2, "up_proj": 5}, {"k_proj": 3, "o_proj": 7}
    deltas = dense_delta(tmp_path / "a")
    assert len(deltas) == 2 * len(LLAMA.targets)
    for site, delta in deltas.items():
        kind = site.rpartition(".")[2]
        rank, alpha = ranks.get(kind, 3), alphas.get(kind, 4)
        p = {name: t.detach().double() for name, t in model.get_submodule(f"{site}.adapters.a").named_parameters()}
        s = alpha / math.sqrt(rank) if rslora else alpha / rank
        torch.testing.assert_close(delta, s * (p["B"] @ p["A"] - p["B0"] @ p["A0"]), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        output(load_peft(tmp_path / "a", LLAMA), LLAMA), output(model, LLAMA), rtol=1e-4, atol=1e-5
    )

    again: Any = LLAMA.build()
    ah.adapt(again).load(tmp_path / "a", "a")
    for key, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    (contents,) = ah.load(tmp_path / "a").source.contents.values()
    assert all(contents.method.at(site) == method.at(site) for site in contents.sites)


def test_dropout_is_peft_s_with_the_same_random_numbers() -> None:
    model, other = net(), net()
    ah.adapt(model).add("a", ah.method("lora", rank=4, alpha=6, dropout=0.4), ["0", "2"])
    theirs = peft_of(other, r=4, lora_alpha=6, lora_dropout=0.4, target_modules=["0", "2"])
    for i in (0, 2):
        rng = torch.Generator().manual_seed(i)
        part: Any = model[i].adapters.a
        for own, tensor in zip((part.A, part.B), factors(theirs[i]), strict=True):
            own.data.copy_(torch.randn(own.shape, generator=rng))
            tensor.copy_(own.detach())
    x = torch.randn(40, 12, generator=torch.Generator().manual_seed(1))
    outputs: dict[bool, list[Tensor]] = {}
    for training in (True, False):
        for own in (model, theirs):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(7)
                outputs.setdefault(training, []).append(own.train(training)(x).detach())
        torch.testing.assert_close(*outputs[training], rtol=1e-5, atol=1e-5)
    assert (outputs[True][0] - outputs[False][0]).abs().max() > 0.1


@pytest.mark.parametrize("options", [{"alpha": 0.0}, {"alpha": -2.0}, {"alpha_pattern": {"q": -1.0}}], ids=str)
def test_pissa_without_a_positive_scaling_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="alpha must be positive"):
        ah.method("lora", init_weights="pissa", **options)
