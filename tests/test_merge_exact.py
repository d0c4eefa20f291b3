"""The merged adapter is the float64 sum of the inputs, within the rounding that is reported, and PEFT agrees."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import TYPE_CHECKING, Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from peers import BERT, CONV, EMBEDDING, GPT2, LLAMA, PEERS, Peer, dense_delta
from safetensors.torch import load_file, save_file

import adapterhub_lite as ah

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from conftest import Done, Handmade, PeftAgrees

    Command = Callable[..., Done]
    Written = Callable[..., Path]
    from torch import Tensor

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
HALF_ULP = {"F64": 2.0**-53, "F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}
NAMES = ("net.layers.0.q", "net.layers.0.k", "net.layers.1.q", "net.layers.1.k", "net.conv", "net.point", "net.emb")

slow = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def adapters(draw: st.DrawFn, dtypes: tuple[str, ...] = tuple(DTYPES)) -> dict[str, Any]:
    """Arguments for `handmade`: any layers, ranks by pattern, alphas by pattern, any dtype."""
    names = draw(st.sets(st.sampled_from(NAMES), min_size=1))
    rank = draw(st.fixed_dictionaries({kind: st.integers(1, 4) for kind in ("q", "k", "else")}))
    patterns = {r"layers\.\d+\.q": rank["q"], "k": rank["k"]}
    alphas = [{}, {"q": 3, "layers.0.q": 99}, {"conv|emb": 0.75, r"net\.layers\.[0-9]\.k": 5}, {"^net\\.point": -2}]
    return {
        "layers": {name: rank.get(name[-1], rank["else"]) for name in sorted(names)},
        "seed": draw(st.integers(0, 99)),
        "dtype": DTYPES[draw(st.sampled_from(dtypes))],
        "scale": draw(st.sampled_from([1.0, 0.01])),
        "r": rank["else"],
        "rank_pattern": patterns,
        "lora_alpha": draw(st.sampled_from([1, 8, 16, 3, 0.5, -4])),
        "alpha_pattern": draw(st.sampled_from(alphas)),
        "use_rslora": draw(st.booleans()),
        "target_modules": draw(st.sampled_from([sorted(names), r".*\.(q|k|conv|point|emb)"])),
    }


Terms = list[tuple[dict[str, Any], float]]  # arguments for `handmade`, and a weight
WEIGHTS = st.sampled_from([1.0, 0.5, -0.5, 0.3, -1.7, 0.0, 1e-4, 300.0])


def weighted(folders: list[Path], weights: list[float]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Σ wᵢ ΔWᵢ in float64, and Σ |wᵢ| ‖ΔWᵢ‖: what rounding is relative to where the sum cancels."""
    exact: dict[str, Tensor] = {}
    size: Counter[str] = Counter()
    for folder, w in zip(folders, weights, strict=True):
        if w:
            for name, delta in dense_delta(folder).items():
                exact[name] = exact.get(name, 0.0) + w * delta
                size[name] += abs(w) * float(delta.norm())
    return exact, dict(size)


def norm(matrices: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(m.norm()) ** 2 for m in matrices.values()))


def check_error(
    report: dict[str, Any], out: Path, exact: dict[str, Tensor], size: dict[str, float]
) -> dict[str, Tensor]:
    """The reported error is the measured one, overall and for each module; returns what was stored minus the exact."""
    stored = dense_delta(out)
    lost = {name: stored.get(name, 0.0) - delta for name, delta in exact.items()}
    assert stored.keys() <= exact.keys()
    assert {name for name, module in report["modules"].items() if "error" in module} == exact.keys()
    for name, delta in exact.items():
        reported, of = report["modules"][name]["error"], float(delta.norm())
        if reported is None:  # relative to nothing
            assert of <= 1e-15 * size[name]
        else:
            assert float(lost[name].norm()) == pytest.approx(reported * of, rel=6e-6, abs=1e-13 * size[name]), name
    if report["error"] is not None:
        assert norm(lost) == pytest.approx(report["error"] * norm(exact), rel=6e-6, abs=1e-13 * sum(size.values()))
    return lost


def unpatterned_delta(folder: Path) -> dict[str, Tensor]:
    """What a reader gets that knows no patterns and scales everything by lora_alpha / r, as vLLM does."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    scale = config["lora_alpha"] / config["r"]
    return {
        key.removeprefix("base_model.model.").split(".lora_")[0]: scale
        * (tensors[key.replace("lora_A", "lora_B").replace("_A", "_B")].double().flatten(1) @ A.double().flatten(1))
        for key, A in tensors.items()
        if ".lora_A." in key or key.endswith("_A")
    }


# The sum ------------------------------------------------------------------------------------------


@slow
@given(st.lists(st.tuples(adapters(), WEIGHTS), min_size=1, max_size=4), st.sampled_from([None, *DTYPES]))
@example([({"layers": {"net.emb": 3}, "seed": 0, "dtype": torch.bfloat16}, 1.0)] * 2, "BF16")
@example([({"layers": {"net.layers.0.k": 4}, "seed": s, "dtype": torch.float16}, 0.3) for s in range(4)], None)
def test_sum_is_the_dense_sum(
    adapter: Command,
    handmade: Handmade,
    tmp_path_factory: pytest.TempPathFactory,
    terms: Terms,
    dtype: str | None,
) -> None:
    home = tmp_path_factory.mktemp("sum")
    folders = [handmade(home / str(i), **options) for i, (options, _) in enumerate(terms)]
    weights = [w for _, w in terms]
    assume(any(weights))
    choice = ["--dtype", {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16"}[dtype]] if dtype else []
    done = adapter("merge", *folders, f"--weights={','.join(map(str, weights))}", *choice, "-o", home / "out", "--json")
    exact, size = weighted(folders, weights)
    if done.code:
        done.refused("wider --dtype")
        largest = max(float(delta.abs().max()) for delta in exact.values())
        assert dtype in ("F16", None)
        assert 4 * largest > 65504 / 300  # a factor that float16 cannot hold
        return
    report = done.json
    used = {options["dtype"] for options, w in terms if w}
    widest = next((d for d in ("F64", "F32") if DTYPES[d] in used), "F32")
    if len(used) == 1:
        widest = next(d for d in DTYPES if DTYPES[d] in used)
    assert report["dtype"] == (dtype or widest)
    tensors = load_file(home / "out" / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {DTYPES[report["dtype"]]}
    assert sum(t.nbytes for t in tensors.values()) == report["bytes"]
    lost = check_error(report, home / "out", exact, size)
    if report["dtype"] != "F16":  # which has subnormals here
        for name, rest in lost.items():
            assert float(rest.norm()) <= 8 * HALF_ULP[report["dtype"]] * size[name]
    if [w for w in weights if w] != [1.0]:
        for name, delta in unpatterned_delta(home / "out").items():
            torch.testing.assert_close(delta, dense_delta(home / "out")[name], rtol=1e-12, atol=0)


# Truncation ---------------------------------------------------------------------------------------


def spectra(exact: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.linalg.svdvals(delta) for name, delta in exact.items()}


def truncated(
    adapter: Command,
    handmade: Handmade,
    home: Path,
    terms: Terms,
    *how: object,
) -> tuple[Done, Path, dict[str, Tensor], dict[str, float]]:
    folders = [handmade(home / str(i), **options) for i, (options, _) in enumerate(terms)]
    weights = [w for _, w in terms]
    out = home / "out"
    done = adapter("merge", *folders, "--weights", *weights, *how, "-o", out, "--json")
    return done, out, *weighted(folders, weights)


ADDED = st.lists(st.tuples(adapters(("F32", "BF16")), st.sampled_from([0.7, 1.0, -0.4])), min_size=1, max_size=3)


@slow
@given(ADDED, st.integers(1, 5))
def test_truncation_to_a_rank_is_optimal(
    adapter: Command,
    handmade: Handmade,
    tmp_path_factory: pytest.TempPathFactory,
    terms: Terms,
    rank: int,
) -> None:
    home = tmp_path_factory.mktemp("rank")
    done, out, exact, size = truncated(adapter, handmade, home, terms, "--rank", rank)
    lost = check_error(done.json, out, exact, size)
    rounding = 8 * HALF_ULP[done.json["dtype"]]
    for name, sigma in spectra(exact).items():
        assert done.json["modules"][name]["rank"] <= rank
        best = float(sigma[rank:].norm())
        assert best * (1 - 1e-6) - 1e-13 * size[name] <= float(lost[name].norm()) <= best + rounding * size[name]


@slow
@given(ADDED, st.sampled_from([0.9, 0.5, 0.1, 0.02, 5e-3, 1e-3]))
def test_promised_error_is_kept(
    adapter: Command,
    handmade: Handmade,
    tmp_path_factory: pytest.TempPathFactory,
    terms: Terms,
    promised: float,
) -> None:
    home = tmp_path_factory.mktemp("error")
    done, out, exact, size = truncated(adapter, handmade, home, terms, "--max-error", promised)
    if done.code:
        done.refused("rounding to BF16")
        assert promised < 2 * HALF_ULP["BF16"]
        return
    lost = check_error(done.json, out, exact, size)
    assert norm(lost) <= promised * norm(exact) * (1 + 1e-6)
    if done.json["dtype"] == "F32":  # one singular value less, anywhere, would be too much
        for name, sigma in spectra(exact).items():
            if kept := done.json["modules"][name].get("rank"):
                assert math.hypot(norm(lost), float(sigma[kept - 1])) > promised * norm(exact) * (1 - 1e-6)


@slow
@given(ADDED, st.integers(20, 3000))
def test_budget_is_kept_and_used(
    adapter: Command,
    handmade: Handmade,
    tmp_path_factory: pytest.TempPathFactory,
    terms: Terms,
    budget: int,
) -> None:
    home = tmp_path_factory.mktemp("budget")
    done, out, exact, size = truncated(adapter, handmade, home, terms, "--budget", budget)
    dtypes = {options["dtype"] for options, _ in terms}
    itemsize = 2 if dtypes == {torch.bfloat16} else 4
    cost = {name: itemsize * sum(delta.shape) for name, delta in exact.items()}
    if done.code:
        done.refused("hold no rank", str(min(cost.values())))
        assert budget < min(cost.values())
        return
    tensors = load_file(out / "adapter_model.safetensors")
    used = sum(t.nbytes for t in tensors.values())
    assert used == done.json["bytes"] <= budget
    check_error(done.json, out, exact, size)
    for name, sigma in spectra(exact).items():  # what is left over buys nothing more
        kept = done.json["modules"][name]["rank"]
        assert kept == len(sigma) or sigma[kept] < 1e-7 * size[name] or used + cost[name] > budget
    for name, delta in unpatterned_delta(out).items():
        torch.testing.assert_close(delta, dense_delta(out)[name], rtol=1e-12, atol=0)


def test_truncation_with_room_keeps_the_bits(adapter: Command, handmade: Handmade, tmp_path: Path) -> None:
    """A rank that suffices is no reason to decompose, and to round, what is exact as it is."""
    layers = {"net.layers.0.q": 2, "net.conv": 2}
    a, b = (handmade(tmp_path / x, layers, seed=i, dtype=torch.bfloat16) for i, x in enumerate("ab"))
    for how in (["--rank", 4], ["--budget", "1MB"], ["--max-error", 1e-9]):
        done = adapter("merge", a, b, "--weights", 1, 1, *how, "-o", tmp_path / "out", "--force", "--json")
        assert done.json["error"] == 0.0, how
        assert {m["rank"] for m in done.json["modules"].values()} == {4}


# Values: the same by other ways -------------------------------------------------------------------


def test_arithmetic_by_value(handmade: Handmade, tmp_path: Path) -> None:
    folders = [
        handmade(tmp_path / "a", {"net.layers.0.q": 3, "net.conv": 2, "net.emb": 1}, seed=1),
        handmade(tmp_path / "b", {"net.layers.0.q": 2, "net.conv": 4}, seed=2, use_rslora=True, lora_alpha=5),
        handmade(tmp_path / "c", {"net.layers.0.q": 4, "net.emb": 2}, seed=3, alpha_pattern={"emb": 3}),
    ]
    a, b, c = map(ah.load, folders)
    saved = iter(range(99))

    def value(x: ah.Adapter) -> dict[str, Tensor]:
        out = tmp_path / f"out{next(saved)}"
        x.save(out, dtype=torch.float64)
        return dense_delta(out)

    def close(x: ah.Adapter, y: ah.Adapter | dict[str, Tensor]) -> None:
        left, right = value(x), y if isinstance(y, dict) else value(y)
        assert left.keys() == right.keys()
        for name in left:
            torch.testing.assert_close(left[name], right[name], rtol=1e-11, atol=1e-12)

    def dense(*weights: float) -> dict[str, Tensor]:
        return weighted(folders, list(weights))[0]

    close(a + 0.5 * b - c, dense(1, 0.5, -1))
    close((a + b) * 0.5, 0.5 * a + b / 2)
    close((a + b) + c, a + (b + c))
    close(sum([a, b, c], start=0 * a), dense(1, 1, 1))
    close(sum([a, b, c]), dense(1, 1, 1))  # type: ignore[arg-type]
    close(-(a - b), b - a)
    close(a + a + a, 3 * a)
    close(a + b - b, a + 0 * b)
    close((a + b).truncate(rank=99), a + b)
    close((a + b + c).truncate(rank=3).truncate(rank=2), (a + b + c).truncate(rank=2))
    close((a + b).truncate(rank=2) * -2, ((a + b) * -2).truncate(rank=2))


def test_difference_with_itself_is_nothing(handmade: Handmade, tmp_path: Path) -> None:
    """From two folders, so that the parts are not known to be one."""
    for w in (1.0, 0.7):
        a = ah.load(handmade(tmp_path / "a", {"net.layers.0.q": 3, "net.conv": 2}, dtype=torch.bfloat16))
        b = ah.load(handmade(tmp_path / "b", {"net.layers.0.q": 3, "net.conv": 2}, dtype=torch.bfloat16))
        error = (w * a - w * b).save(tmp_path / "zero", force=True)
        assert error.overall == 0.0
        assert all(float(delta.abs().max()) < 1e-15 for delta in dense_delta(tmp_path / "zero").values())


def test_error_relative_to_nothing(adapter: Command, handmade: Handmade, tmp_path: Path) -> None:
    """257·3 − 771·1 is 0, but not once its factors are rounded to bfloat16; JSON has no infinity."""

    def filled(b: float, a: float) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
        return lambda tensors: {k: torch.full_like(t, a if "lora_A" in k else b) for k, t in tensors.items()}

    x = handmade(tmp_path / "x", {"net.layers.0.q": 1}, tensors=filled(257, 3), lora_alpha=1)
    y = handmade(tmp_path / "y", {"net.layers.0.q": 1}, tensors=filled(771, 1), lora_alpha=1)
    done = adapter("merge", x, y, "--weights", "1 -1", "--dtype", "bf16", "-o", tmp_path / "out", "--json")
    assert done.code == 0, done
    assert done.json["error"] is None
    assert done.json["modules"]["net.layers.0.q"]["error"] is None
    assert float(dense_delta(tmp_path / "out")["net.layers.0.q"].abs().max()) == 772 * 1 - 256 * 3
    assert adapter("info", tmp_path / "out", "--json").json["error"] is None


# Bits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize(
    ("weights", "alphas"), [((1, 1), (6, 6)), ((1, -1), (6, 6)), ((0.5, 2), (12, 3)), ((1, 0.25), (3, 48))]
)
def test_equal_scales_keep_the_bits(
    adapter: Command,
    handmade: Handmade,
    tmp_path: Path,
    dtype: str,
    weights: tuple[float, float],
    alphas: tuple[int, int],
) -> None:
    """Scales that differ by powers of two at most: the factors stand side by side, and nothing is rounded."""
    layers = {"net.layers.0.q": 3, "net.conv": 3}
    folders = [
        handmade(tmp_path / str(i), layers, seed=i, dtype=DTYPES[dtype], lora_alpha=alpha)
        for i, alpha in enumerate(alphas)
    ]
    out = tmp_path / "out"
    done = adapter("merge", *folders, "--weights", *weights, "-o", out, "--json")
    assert done.json["error"] == 0.0
    assert "input's bits" in adapter("merge", *folders, "--weights", *weights, "-o", tmp_path / "again").out
    merged, *parts = (load_file(folder / "adapter_model.safetensors") for folder in (out, *folders))
    for key, tensor in merged.items():
        if "lora_A" in key:
            assert torch.equal(tensor, torch.cat([part[key] for part in parts], 0))
        else:
            config = json.loads((out / "adapter_config.json").read_text())
            ratio = [w * a / 3 / (config["lora_alpha"] / config["r"]) for w, a in zip(weights, alphas, strict=True)]
            assert all(math.frexp(abs(x))[0] == 0.5 for x in ratio)
            assert torch.equal(tensor, torch.cat([x * part[key] for x, part in zip(ratio, parts, strict=True)], 1))


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_one_adapter_with_weight_one_is_itself(
    adapter: Command, handmade: Handmade, tmp_path: Path, dtype: str
) -> None:
    """Byte for byte, whatever its options; also one whose rank exceeds its layer's."""
    layers = {"net.layers.0.q": 3, "net.layers.1.q": 9, "net.emb": 2}
    options: dict[str, Any] = {"use_rslora": True, "lora_alpha": 7, "alpha_pattern": {"q": 5, "layers.0.q": 3}}
    a = handmade(tmp_path / "a", layers, dtype=DTYPES[dtype], **options)
    done = adapter("merge", a, "--weights", 1, "-o", tmp_path / "out", "--json")
    assert done.json["error"] == 0.0
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in (a, tmp_path / "out"))
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        assert tensor.dtype == two[key].dtype
        assert torch.equal(tensor, two[key])
    before, after = dense_delta(a), dense_delta(tmp_path / "out")
    for name, delta in before.items():
        assert torch.equal(delta, after[name])


def test_order_of_patterns_is_kept(adapter: Command, handmade: Handmade, tmp_path: Path) -> None:
    """The first key that matches wins, so sorting them would change alphas."""
    patterns = {"q": 5, "layers.0.q": 300}
    a = handmade(tmp_path / "a", {"net.layers.0.q": 2, "net.layers.1.q": 2}, alpha_pattern=patterns)
    assert adapter("merge", a, "-o", tmp_path / "out", "-q").code == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert list(config["alpha_pattern"].items()) == list(patterns.items())
    assert list(config) == sorted(config)


# PEFT writes, PEFT reads --------------------------------------------------------------------------


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {"rank": 4, "alpha": 5, "seed": 4}),
    "rslora": ({"use_rslora": True}, {"rank": 3, "alpha": 5, "seed": 4, "use_rslora": True}),
    "patterns": ({"patterned": True, "use_rslora": True}, {"rank": 2, "alpha": 3, "seed": 4, "patterned": True}),
    "half": ({"dtype": torch.float32}, {"rank": 2, "seed": 4, "dtype": torch.float16}),
}


def options_for(peer: Peer, given_: dict[str, Any]) -> dict[str, Any]:
    options = dict(given_)
    if options.pop("patterned", False):
        options["rank_pattern"] = dict(zip(peer.patterned, (3, 5), strict=True))
        options["alpha_pattern"] = dict(zip(peer.patterned, (4, 9), strict=True))
    return options


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("peer", PEERS, ids=lambda p: p.name)
def test_peft_computes_the_sum(
    adapter: Command,
    written: Written,
    peft_agrees: PeftAgrees,
    tmp_path: Path,
    peer: Peer,
    variant: str,
) -> None:
    a, b = (written(peer, **options_for(peer, given_)) for given_ in VARIANTS[variant])
    kept = ["--keep", "none"] if peer is EMBEDDING or peer is LLAMA else []
    done = adapter("merge", a, b, "--weights", 0.7, -0.4, "-o", tmp_path / "out", *kept, "--json")
    assert done.code == 0, done
    assert done.json["error"] < 1e-7
    peft_agrees(tmp_path / "out", peer, [a, b], [0.7, -0.4])


@pytest.mark.parametrize("peer", PEERS, ids=lambda p: p.name)
def test_peft_reads_varying_ranks(
    adapter: Command, written: Written, peft_agrees: PeftAgrees, tmp_path: Path, peer: Peer
) -> None:
    """The output of --budget, by PEFT's own delta and by a reader without patterns."""
    a, b = written(peer), written(peer, rank=4, alpha=5, seed=4)
    full = adapter("merge", a, b, "--dry-run", "--json").json["bytes"]
    out = tmp_path / "out"
    done = adapter("merge", a, b, "--budget", full // 2, "-o", out, "--json")
    if peer is not EMBEDDING:  # of three layers, which happen to get the same
        assert len({module["rank"] for module in done.json["modules"].values()}) > 1
    peft_agrees(out, peer, [out], [1.0])
    for name, delta in unpatterned_delta(out).items():
        torch.testing.assert_close(delta, dense_delta(out)[name], rtol=1e-12, atol=0)


def with_lora_bias(source: Path, folder: Path, seed: int) -> Path:
    """PEFT's file with lora_bias=True; PEFT 0.21.2 warns of its own when it writes one."""
    config = json.loads((source / "adapter_config.json").read_text())
    tensors = load_file(source / "adapter_model.safetensors")
    rng = torch.Generator().manual_seed(seed)
    for key in sorted(tensors):
        if key.endswith("lora_B.weight"):
            tensors[key.replace(".weight", ".bias")] = 0.1 * torch.randn(tensors[key].shape[0], generator=rng)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_bias": True}))
    return folder


def biases(folder: Path) -> dict[str, Tensor]:
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    assert not config["rank_pattern"]
    assert not config["use_rslora"]
    return {
        key.removeprefix("base_model.model.").removesuffix(".lora_B.bias"): config["lora_alpha"]
        / config["r"]
        * t.double()
        for key, t in tensors.items()
        if key.endswith("lora_B.bias")
    }


@pytest.mark.parametrize("peer", [BERT, GPT2], ids=lambda p: p.name)
def test_lora_bias_is_part_of_the_sum(
    adapter: Command, written: Written, peft_agrees: PeftAgrees, tmp_path: Path, peer: Peer
) -> None:
    a = with_lora_bias(written(peer), tmp_path / "a", 1)
    b = with_lora_bias(written(peer, rank=4, alpha=5, seed=4), tmp_path / "b", 2)
    c = written(peer, rank=2, alpha=5, seed=5)
    out = tmp_path / "out"
    done = adapter("merge", a, b, c, "--weights", 0.7, -0.4, 1, "-o", out, "--json")
    one, two = biases(a), biases(b)

    def add_biases(model: torch.nn.Module) -> None:
        for name in one:
            model.get_submodule(name).get_parameter("bias").add_(0.7 * one[name] - 0.4 * two[name])

    peft_agrees(out, peer, [a, b, c], [0.7, -0.4, 1.0], change=add_biases)

    # The error counts the bias as one more column; a coarse dtype makes it visible.
    done = adapter("merge", a, b, c, "--weights", 0.7, -0.4, 1, "--dtype", "bf16", "--force", "-o", out, "--json")
    exact, stored_delta, stored = weighted([a, b, c], [0.7, -0.4, 1.0])[0], dense_delta(out), biases(out)
    for name, delta in exact.items():
        bias = 0.7 * one[name] - 0.4 * two[name]
        lost = math.hypot(float((stored_delta[name] - delta).norm()), float((stored[name] - bias).norm()))
        size = math.hypot(float(delta.norm()), float(bias.norm()))
        assert done.json["modules"][name]["error"] == pytest.approx(lost / size, rel=6e-6)


def test_bias_of_a_module_that_a_budget_drops_is_lost_and_said_so(
    adapter: Command, handmade: Handmade, tmp_path: Path
) -> None:
    def with_bias(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        bias = {k.replace("weight", "bias"): torch.ones(len(t)) for k, t in tensors.items() if "lora_B" in k}
        tensors["base_model.model.net.layers.0.k.lora_B.weight"] *= 1e-3
        return {**tensors, **bias}

    a = handmade(tmp_path / "a", {"net.layers.0.q": 2, "net.layers.0.k": 2}, tensors=with_bias, lora_bias=True)
    fixed = 4 * (13 + 5)  # the two biases
    short = adapter("merge", a, "--budget", fixed + 4 * (5 + 11) - 1, "-o", tmp_path / "out")
    short.refused("hold no rank at all", str(fixed + 4 * (5 + 11)))
    budget = fixed + 4 * 2 * (13 + 7)
    done = adapter("merge", a, "--budget", budget, "-o", tmp_path / "out", "--json")
    assert sum(t.nbytes for t in load_file(tmp_path / "out" / "adapter_model.safetensors").values()) <= budget
    assert done.json["modules"]["net.layers.0.q"]["error"] < 1e-6
    assert done.json["modules"]["net.layers.0.k"] == {"rank": 0, "error": 1.0}


def test_layers_of_every_kind_in_one_sum(
    adapter: Command, written: Written, peft_agrees: PeftAgrees, tmp_path: Path
) -> None:
    """Parts that adapt different layers: convolutions of 1 to 3 dimensions, embeddings, transposed weights."""
    for peer in (CONV, EMBEDDING, GPT2, BERT):
        halves = peer.targets[::2], peer.targets[1::2]
        parts = [written(peer, target_modules=half, seed=i, rank=2 + i) for i, half in enumerate(halves)]
        out = tmp_path / peer.name
        assert adapter("merge", *parts, "--weights", 2, -1, "-o", out, "-q", "--keep", "none").code == 0
        assert set(json.loads((out / "adapter_config.json").read_text())["target_modules"]) == set(peer.targets)
        peft_agrees(out, peer, parts, [2.0, -1.0])
