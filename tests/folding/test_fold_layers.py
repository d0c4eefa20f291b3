"""Every kind of layer and every method that changes weights, against `adapters.merge()` and plain formulas."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import peers  # noqa: F401  # before transformers: no access to the Hub
import pytest
import torch
from fold_models import (
    draw,
    lora_delta,
    off_by,
    rounded,
    same_bits,
    tensors_of,
    weighted,
    write_adapter,
    write_lora,
    write_model,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import adapterhub_lite as ah
from adapterhub_lite import registry
from adapterhub_lite.folding import blocks

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

LINEAR = ["wide", "tall", "square", "plain"]
TRANSPOSED = ["c_wide", "c_tall", "c_square"]
CONV = ["conv1", "conv2", "conv3", "point"]
GROUPED = ["grouped1", "grouped2"]
EMBEDDING = ["emb"]
NORM = ["ln", "rms", "gn"]


class Net(nn.Module):
    """One layer of every kind; it is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.tall = nn.Linear(29, 11), nn.Linear(6, 23)
        self.square, self.plain = nn.Linear(12, 12), nn.Linear(10, 7, bias=False)
        self.c_wide, self.c_tall, self.c_square = Conv1D(9, 31), Conv1D(26, 8), Conv1D(14, 14)
        self.conv1, self.conv2 = nn.Conv1d(6, 10, 3), nn.Conv2d(5, 9, (3, 2))
        self.conv3, self.point = nn.Conv3d(4, 7, (2, 1, 3)), nn.Conv2d(8, 6, 1, bias=False)
        self.grouped1, self.grouped2 = nn.Conv1d(12, 8, 3, groups=4), nn.Conv2d(9, 15, (2, 3), groups=3)
        self.emb = nn.Embedding(37, 10)
        self.ln, self.rms, self.gn = nn.LayerNorm(13), nn.RMSNorm(9), nn.GroupNorm(3, 12)
        for i, p in enumerate(self.parameters()):
            p.data = draw(*p.shape, seed=i, std=0.5)


CASES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "lora": ("lora", {"rank": 3, "alpha": 5}, [*LINEAR, *CONV, *GROUPED, *EMBEDDING]),
    "lora on Conv1D": ("lora", {"rank": 3, "alpha": 5}, TRANSPOSED),
    "lora with a bias": ("lora", {"rank": 3, "alpha": 5, "lora_bias": True}, ["wide", "tall", "square"]),
    "lora with a bias on Conv1D": ("lora", {"rank": 2, "lora_bias": True}, TRANSPOSED),
    "lora with a bias on convolutions": ("lora", {"rank": 2, "lora_bias": True}, ["conv1", "conv2", "conv3"]),
    "rslora": ("lora", {"rank": 4, "alpha": 5, "rslora": True}, [*LINEAR, *CONV]),
    "patterns": ("lora", {"rank": 4, "rank_pattern": {"tall": 2}, "alpha_pattern": {"wide": 11}}, LINEAR),
    "pissa": ("lora", {"rank": 3, "init_weights": "pissa"}, LINEAR),
    "lora_fa": ("lora_fa", {"rank": 3}, LINEAR),
    "lora_plus": ("lora_plus", {"rank": 3}, LINEAR),
    "delta_lora": ("delta_lora", {"rank": 3}, LINEAR),
    "vera": ("vera", {"rank": 5}, LINEAR),
    "vera on Conv1D": ("vera", {"rank": 5}, TRANSPOSED),
    "vera without projections": ("vera", {"rank": 5, "save_projection": False}, LINEAR),
    "dora": ("dora", {"rank": 3, "alpha": 5}, [*LINEAR, *CONV]),
    "dora on Conv1D": ("dora", {"rank": 3, "alpha": 5}, TRANSPOSED),
    "dora on an embedding": ("dora", {"rank": 3, "alpha": 5}, EMBEDDING),
    "ia3": ("ia3", {}, ["wide", "tall", "square", "plain", "conv2", "point"]),
    "ia3 on Conv1D": ("ia3", {}, TRANSPOSED),
    "ia3 on inputs": ("ia3", {"feedforward": (*LINEAR, "conv2", "point")}, [*LINEAR, "conv2", "point"]),
    "ia3 on inputs of Conv1D": ("ia3", {"feedforward": tuple(TRANSPOSED)}, TRANSPOSED),
    "ia3 on groups": ("ia3", {}, ["grouped2"]),
    "ia3 on inputs of groups": ("ia3", {"feedforward": ("grouped2",)}, ["grouped2"]),
    "bitfit": ("bitfit", {}, ["wide", "square", "conv1", "conv2", "conv3", "grouped1", "ln", "gn"]),
    "bitfit on Conv1D": ("bitfit", {}, TRANSPOSED),
    "ln_tuning": ("ln_tuning", {}, NORM),
}


def trained(case: str, folder: Path, seed: int = 0) -> tuple[Path, dict[str, Tensor], dict[str, Tensor]]:
    """An adapter of that kind with random values, saved; the base's tensors, and those of the live merge."""
    method, options, targets = CASES[case]
    net = Net()
    base = {key: t.detach().clone() for key, t in net.state_dict().items()}
    adapters = ah.adapt(net)
    adapters.add("a", ah.method(method, **options), targets)
    adapters.activate("a")
    for i, p in enumerate(p for p in net.parameters() if p.requires_grad):
        with torch.no_grad():
            p.add_(draw(*p.shape, seed=1000 + 97 * seed + i, std=0.3))
    adapters.save("a", folder)
    adapters.merge()
    return folder, base, {key: t for key, t in adapters.base_state_dict().items() if key in base}


@pytest.mark.parametrize("case", CASES)
def test_as_the_live_merge(case: str, tmp_path: Path) -> None:
    part, base, want = trained(case, tmp_path / "a")
    result = ah.fold(write_model(tmp_path / "base", base, files=2), ah.load(part), tmp_path / "out")
    got = tensors_of(tmp_path / "out")
    assert got.keys() == base.keys()
    assert list(result.modules) == sorted(CASES[case][2])
    for name, tensor in got.items():
        if name.rpartition(".")[0] in CASES[case][2]:
            # the live one adds up the same float64 numbers, in another order perhaps
            other, worst = off_by(tensor, want[name])
            assert worst <= 1, name
            assert other <= 1e-2 * tensor.numel(), name
        else:
            assert same_bits(tensor, base[name]), name
    assert sum(not torch.equal(got[name], base[name]) for name in got) >= len(CASES[case][2])


@pytest.mark.parametrize("case", CASES)
def test_in_many_blocks_as_in_one(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part, base, _ = trained(case, tmp_path / "a")
    for dtype in (torch.float32, torch.bfloat16):
        folder = write_model(tmp_path / f"base{dtype}", {key: t.to(dtype) for key, t in base.items()})
        outs = []
        for block, strip in ((1 << 18, 1 << 18), (1 << 18, 40), (40, 7), (1, 1)):
            monkeypatch.setattr(blocks, "BLOCK", block)
            monkeypatch.setattr(blocks, "STRIP", strip)
            out = tmp_path / f"out{dtype}{block}-{strip}"
            ah.fold(folder, ah.load(part), out)
            outs.append(tensors_of(out))
        for other in outs[1:]:
            for name, tensor in outs[0].items():
                assert same_bits(tensor, other[name]), name


@pytest.mark.parametrize("block", [1 << 18, 30])
def test_several_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """W + Σ wᵢ (Wᵢ − W) over a LoRA with a bias, a DoRA, an IA3 and a BitFit, at the layers that each has."""
    monkeypatch.setattr(blocks, "BLOCK", block)
    monkeypatch.setattr(blocks, "STRIP", block)
    cases, weights = ["lora with a bias", "dora", "ia3", "bitfit"], [0.7, -0.3, 0.5, 2.0]
    parts = [trained(case, tmp_path / case, seed=i) for i, case in enumerate(cases)]
    base = parts[0][1]
    value = sum((w * ah.load(part) for w, (part, _, _) in zip(weights, parts, strict=True)), start=0)
    ah.fold(write_model(tmp_path / "base", base), value, tmp_path / "out")  # type: ignore[arg-type]
    for name, tensor in tensors_of(tmp_path / "out").items():
        W = base[name].double()
        want = W + sum(w * (merged[name].double() - W) for w, (_, _, merged) in zip(weights, parts, strict=True))
        # the merged ones that the oracle adds up are rounded themselves
        torch.testing.assert_close(tensor.double(), want, rtol=0, atol=1e-6)
    moved = {name for name, t in tensors_of(tmp_path / "out").items() if not torch.equal(t, base[name])}
    assert {"wide.bias", "plain.weight", "conv3.weight", "gn.bias"} <= moved


def test_dora_by_its_formula(tmp_path: Path) -> None:
    """m (W + s B A) / ‖W + s B A‖ of each output, on a layer that is stored by inputs, in blocks of its rows."""
    rng = np.random.default_rng(0)
    into, out, r, s = 31, 9, 3, 5 / 3
    W, m = draw(into, out), torch.from_numpy(rng.uniform(0.5, 2, out)).float()
    A, B = draw(r, into, seed=1), draw(out, r, seed=2)
    keys = {"lora_A.weight": A, "lora_B.weight": B, "lora_magnitude_vector": m}
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 5, "use_dora": True, "target_modules": ["c"]}
    part = write_adapter(tmp_path / "a", {f"base_model.model.c.{key}": t for key, t in keys.items()}, config)
    ah.fold(write_model(tmp_path / "base", {"c.weight": W}), 0.4 * ah.load(part), tmp_path / "out")
    V = W.double().numpy().T + s * (B.double().numpy() @ A.double().numpy())
    merged = (m.double().numpy() / np.linalg.norm(V, axis=1))[:, None] * V
    want = W.double().numpy() + 0.4 * (merged.T - W.double().numpy())
    other, worst = off_by(tensors_of(tmp_path / "out")["c.weight"], rounded(want, torch.float32))
    assert worst <= 1
    assert other <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["dora", "dora on Conv1D", "ia3 on inputs", "ln_tuning", "lora with a bias"])
def test_in_half_precision(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Of a base in 16 bits, the merge is that of its numbers, rounded once."""
    part, base, _ = trained(case, tmp_path / "a")
    half = {key: t.to(dtype) for key, t in base.items()}
    ah.fold(write_model(tmp_path / "base", half), ah.load(part), tmp_path / "out")
    wide = {key: t.double() for key, t in half.items()}
    ah.fold(write_model(tmp_path / "wide", wide), ah.load(part), tmp_path / "exact")  # float64: not rounded
    exact = tensors_of(tmp_path / "exact")
    for name, tensor in tensors_of(tmp_path / "out").items():
        assert same_bits(tensor, rounded(exact[name].numpy(), dtype)), name


def test_bias_and_weight_in_two_files(tmp_path: Path) -> None:
    for case in ("lora with a bias", "ia3", "bitfit", "ln_tuning"):
        part, base, want = trained(case, tmp_path / case / "a")
        folder = write_model(tmp_path / case / "base", base, files=len(base))
        ah.fold(folder, ah.load(part), tmp_path / case / "out")
        for name, tensor in tensors_of(tmp_path / case / "out").items():
            assert off_by(tensor, want[name])[1] <= 1, name


# Which way a square layer lies ------------------------------------------------------------------------


def square(folder: Path, *, by_inputs: bool) -> Path:
    """A model with a square layer, and others with biases that tell how it stores them."""
    tensors = {"h.square.weight": draw(8, 8), "h.square.bias": draw(8, seed=1)}
    tensors["h.wide.weight"] = draw(*((8, 24) if by_inputs else (24, 8)), seed=2)
    tensors["h.wide.bias"] = draw(24, seed=3)
    return write_model(folder, tensors)


@pytest.mark.parametrize("by_inputs", [False, True])
@pytest.mark.parametrize("flag", [False, True, None])
def test_a_wrong_flag_does_not_matter_where_the_base_tells(tmp_path: Path, by_inputs: bool, flag: bool | None) -> None:
    """PEFT's fan_in_fan_out is that of the last layer it adapted: beside an output head it is wrong for GPT-2."""
    config = {} if flag is None else {"fan_in_fan_out": flag}
    part = write_lora(tmp_path / "a", {"h.square": (8, 8)}, **config)
    folder = square(tmp_path / "base", by_inputs=by_inputs)
    ah.fold(folder, ah.load(part), tmp_path / "out")
    delta = lora_delta(part, "h.square")
    want = tensors_of(folder)["h.square.weight"].double().numpy() + (delta.T if by_inputs else delta)
    assert same_bits(tensors_of(tmp_path / "out")["h.square.weight"], rounded(want, torch.float32))


@pytest.mark.parametrize("flag", [False, True])
def test_the_flag_tells_where_nothing_else_does(tmp_path: Path, flag: bool) -> None:
    part = write_lora(tmp_path / "a", {"square": (8, 8)}, fan_in_fan_out=flag)
    folder = write_model(tmp_path / "base", {"square.weight": draw(8, 8)})
    ah.fold(folder, ah.load(part), tmp_path / "out")
    delta = lora_delta(part, "square")
    want = tensors_of(folder)["square.weight"].double().numpy() + (delta.T if flag else delta)
    assert same_bits(tensors_of(tmp_path / "out")["square.weight"], rounded(want, torch.float32))


@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize("shape", [(6, 15), (15, 6)])
def test_shapes_tell_where_they_can(tmp_path: Path, flag: bool, shape: tuple[int, int]) -> None:
    part = write_lora(tmp_path / "a", {"x": (15, 6)}, fan_in_fan_out=flag)
    folder = write_model(tmp_path / "base", {"x.weight": draw(*shape)})
    ah.fold(folder, ah.load(part), tmp_path / "out")
    delta = lora_delta(part, "x")
    want = draw(*shape).double().numpy() + (delta if shape == (15, 6) else delta.T)
    assert same_bits(tensors_of(tmp_path / "out")["x.weight"], rounded(want, torch.float32))


# Weights by module ------------------------------------------------------------------------------------


def test_weights_by_module(tmp_path: Path) -> None:
    names = {f"l.{i}.{which}": (9, 5) for i in range(3) for which in ("q", "mlp.up")}
    parts = [write_lora(tmp_path / key, names, seed=i) for i, key in enumerate("ab")]
    folder = write_model(tmp_path / "base", {f"{n}.weight": draw(9, 5, seed=i) for i, n in enumerate(names)})
    at = {"l.2.q": [0, 0], "l.1.*": [-1, 0], "*.mlp.*": [0.5, 2], "*": [0.7, 0.3]}  # the first that matches counts
    own = [{glob: weights[i] for glob, weights in at.items()} for i in (0, 1)]
    a, b = map(ah.load, parts)
    result = ah.fold(folder, a + b, tmp_path / "out", weights=own)
    expected = {
        "l.0.q": [0.7, 0.3], "l.0.mlp.up": [0.5, 2], "l.1.q": [-1, 0], "l.1.mlp.up": [-1, 0], "l.2.q": [0, 0],
        "l.2.mlp.up": [0.5, 2],
    }  # fmt: skip
    old, got = tensors_of(folder), tensors_of(tmp_path / "out")
    for name, weights in expected.items():
        delta = weighted([lora_delta(part, name) for part in parts], weights)
        want = rounded(old[f"{name}.weight"].double().numpy() + delta, torch.float32)
        assert same_bits(got[f"{name}.weight"], want), name
    assert sorted(result.modules) == sorted(expected.keys() - {"l.2.q"})
    pairs = [[[*pair] for pair in weights.items()] for weights in own]  # the order counts
    assert [term["weight"] for term in result.recipe["of"]["terms"]] == pairs


def test_vera_without_projections_where_a_layer_has_weight_zero(tmp_path: Path) -> None:
    """Its matrices depend on the largest layer, which need not be one that changes."""
    part, base, want = trained("vera without projections", tmp_path / "a")
    ah.fold(write_model(tmp_path / "base", base), ah.load(part), tmp_path / "out", weights=[{"wide": 0, "*": 1}])
    got = tensors_of(tmp_path / "out")
    assert same_bits(got["wide.weight"], base["wide.weight"])
    for name in ("tall.weight", "square.weight", "plain.weight"):
        assert off_by(got[name], want[name])[1] <= 1, name


# A method of somebody's -------------------------------------------------------------------------------

CENTRED = '''
from collections.abc import Mapping
from dataclasses import dataclass

from adapterhub_lite import Method, hookimpl


@dataclass(frozen=True, kw_only=True)
class Centred(Method):
    """W + c - its mean over the outputs: a row depends on all others, so there are no `rows`."""

    name = "centred"
    paper = "https://example.org/centred"
    site_kinds = frozenset({"linear", "transposed_linear"})
    reads_weight = True
    peft_type = "CENTRED"

    def init(self, site, rng):
        import torch
        from torch import nn

        return {"c": nn.Parameter(torch.zeros(site.shape[0]))}

    def forward(self, p, x, y, site):
        W, b = self.merge(p, site.weight, site.bias, site)
        return site.rerun(x, W, b)

    def merge(self, p, weight, bias, site):
        new = weight + p["c"].to(weight.dtype)[:, None]
        return new - new.mean(0), None if bias is None else bias - p["c"].to(bias.dtype)

    def peft_keys(self):
        return {"": {"c": "centred_c"}}

    @classmethod
    def from_peft(cls, config):
        return cls()

    def to_peft(self):
        return {}

    def place(self, family, shapes):
        (out,) = shapes["c"]
        return "linear", (out, -1), (out, -1)


@hookimpl
def methods():
    return [Centred]
'''


@pytest.mark.parametrize("by_inputs", [False, True])
def test_a_method_without_rows(tmp_path: Path, by_inputs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 8)
    monkeypatch.setattr(blocks, "STRIP", 8)
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "centred.py").write_text(CENTRED)
    out, into = 11, 6
    W, b, c = draw(out, into), draw(out, seed=1), draw(out, seed=2)
    folder = write_model(tmp_path / "base", {"x.weight": W.T.contiguous() if by_inputs else W, "x.bias": b})
    part = write_adapter(tmp_path / "a", {"base_model.model.x.centred_c": c}, {"peft_type": "CENTRED"})
    registry.reset()
    try:
        registry.use_plugins_dir(tmp_path / "plugins")
        ah.fold(folder, 0.5 * ah.load(part), tmp_path / "out")
    finally:
        registry.reset()
    got: Mapping[str, Tensor] = tensors_of(tmp_path / "out")
    new = W.double() + c.double()[:, None]
    want = W.double() + 0.5 * (new - new.mean(0) - W.double())
    stored = want.T if by_inputs else want
    assert off_by(got["x.weight"], rounded(stored.numpy(), torch.float32))[1] <= 1
    assert off_by(got["x.bias"], rounded((b.double() - 0.5 * c.double()).numpy(), torch.float32))[1] <= 1


def test_the_recipe_says_how(tmp_path: Path) -> None:
    part, base, _ = trained("lora", tmp_path / "a")
    result = ah.fold(
        write_model(tmp_path / "base", base), 0.25 * ah.load(part), tmp_path / "out", rounding="stochastic", seed=9
    )
    recipe = result.recipe
    assert (recipe["rule"], recipe["rounding"], recipe["seed"]) == ("fold", "stochastic", 9)
    assert [term["weight"] for term in recipe["of"]["terms"]] == [0.25]
    assert json.loads((tmp_path / "out" / "adapterhub_lite.json").read_text()) == result.plain()


SPARSE = '''
from dataclasses import dataclass

from adapterhub_lite import Method, hookimpl


@dataclass(frozen=True, kw_only=True)
class Picked(Method):
    """Some numbers of W change."""

    name = "picked"
    paper = "https://example.org/picked"
    site_kinds = frozenset({"linear", "transposed_linear"})
    peft_type = "PICKED"

    def delta(self, p, site):
        from adapterhub_lite import Sparse

        return Sparse(p["at"].long(), p["v"], site.shape)

    def peft_keys(self):
        return {"": {"at": "picked_at", "v": "picked_v"}}

    @classmethod
    def from_peft(cls, config):
        return cls()

    def to_peft(self):
        return {}

    def place(self, family, shapes):
        return "linear", (-1, -1), (-1, -1)


@hookimpl
def methods():
    return [Picked]
'''


@pytest.mark.parametrize("block", [1 << 18, 8])
@pytest.mark.parametrize("by_inputs", [False, True])
def test_a_sparse_change(tmp_path: Path, by_inputs: bool, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", block)
    monkeypatch.setattr(blocks, "STRIP", block)
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "picked.py").write_text(SPARSE)
    out, into = 11, 6
    W, v, at = draw(out, into), draw(4), torch.tensor([3, 17, 40, 65])
    tensors = {"x.weight": W.T.contiguous() if by_inputs else W, "x.bias": draw(out, seed=2)}
    folder = write_model(tmp_path / "base", tensors)
    keys = {"base_model.model.x.picked_at": at.float(), "base_model.model.x.picked_v": v}
    part = write_adapter(tmp_path / "a", keys, {"peft_type": "PICKED"})
    other = write_lora(tmp_path / "b", {"x": (out, into)})
    registry.reset()
    try:
        registry.use_plugins_dir(tmp_path / "plugins")
        ah.fold(folder, 0.5 * ah.load(part) + ah.load(other), tmp_path / "out", any_base=True)
    finally:
        registry.reset()
    want = W.double().flatten()
    want[at] += 0.5 * v.double()
    want = want.reshape(out, into) + torch.from_numpy(lora_delta(other, "x"))
    got = tensors_of(tmp_path / "out")
    assert off_by(got["x.weight"], rounded((want.T if by_inputs else want).numpy(), torch.float32))[1] <= 1
    assert same_bits(got["x.bias"], draw(out, seed=2))


@pytest.mark.parametrize("rule", ["ties", "knots", "slerp"])
def test_the_result_of_a_rule(tmp_path: Path, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 16)
    monkeypatch.setattr(blocks, "STRIP", 16)
    layers = {"l.wide": (9, 14), "l.square": (8, 8)}
    a, b = (ah.load(write_lora(tmp_path / key, layers, seed=i)) for i, key in enumerate("ab"))
    folder = write_model(
        tmp_path / "base", {f"{n}.weight": draw(*s, seed=i) for i, (n, s) in enumerate(layers.items())}
    )
    merged = ah.merge([a, b], rule)
    ah.fold(folder, 0.5 * merged, tmp_path / "out")
    for name in layers:
        delta = merged.delta(name)
        wide = type(delta)(*(t.double() if isinstance(t, Tensor) else t for t in delta)).dense()  # not in float32
        want = tensors_of(folder)[f"{name}.weight"].double() + 0.5 * wide
        got = tensors_of(tmp_path / "out")[f"{name}.weight"]
        assert off_by(got, rounded(want.numpy(), torch.float32))[1] <= 1
