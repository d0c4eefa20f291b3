"""`adapter extract`: against dense float64 decompositions of the differences, and on real models through PEFT."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from peers import CONV, GPT2, LLAMA, Peer, dense_delta, load_peft, minilm, minilm_folder, native, output
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import adapterhub_lite as ah
from adapterhub_lite import extraction, modules, subspace

if TYPE_CHECKING:
    from conftest import Done

    Command = Callable[..., Done]

SHAPES = {"net.0.q": (40, 24), "net.0.k": (12, 24), "net.1.q": (40, 24), "net.1.k": (12, 24)}


def model(folder: Path, tensors: Mapping[str, Tensor], shards: int = 1, **config: Any) -> Path:
    """A model's folder with these tensors, in one file or in several with an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
        return folder
    names, index = sorted(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name] for name in names[i::shards]}, folder / file, {"format": "pt"})
        index |= dict.fromkeys(names[i::shards], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def weights(shapes: Mapping[str, Sequence[int]] = SHAPES, seed: int = 0) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {f"{name}.weight": torch.randn(*shape, generator=rng) * 0.1 for name, shape in shapes.items()}


def decaying(out: int, into: int, seed: int, power: float = 1.0) -> Tensor:
    """A matrix (out, in) with the singular values 1, 2^-power, 3^-power, …"""
    rng = torch.Generator().manual_seed(seed)
    r = min(out, into)
    U = torch.linalg.qr(torch.randn(out, r, generator=rng, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(into, r, generator=rng, dtype=torch.float64)).Q
    return (U * torch.arange(1, r + 1, dtype=torch.float64) ** -power) @ V.T


def changed(tensors: Mapping[str, Tensor], names: Sequence[str] | None = None) -> dict[str, Tensor]:
    """The model fine-tuned: the named weights moved by matrices of full rank."""
    moved = {}
    for i, (key, W) in enumerate(tensors.items()):
        hit = names is None or key.removesuffix(".weight") in names
        moved[key] = (
            (W.double() + 0.1 * decaying(*W.flatten(1).shape, seed=i).reshape(W.shape)).to(W.dtype) if hit else W
        )
    return moved


def difference(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], name: str) -> np.ndarray:
    key = f"{name}.weight"
    return (tuned[key].double() - base[key].double()).flatten(1).numpy()


def tails(D: np.ndarray, rank: int) -> tuple[float, float]:
    """The squared error of the best approximation of this rank, and ‖D‖²: numpy's SVD."""
    s = np.linalg.svd(D, compute_uv=False)
    return float((s[rank:] ** 2).sum()), float((s**2).sum())


def missed(out: Path, base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> tuple[float, dict[str, float]]:
    """The relative error of the adapter in `out`, overall and by module, from the files alone."""
    stored = dense_delta(out)
    squares = {}
    for name, delta in stored.items():
        D = difference(base, tuned, name)
        squares[name] = (float(((delta.numpy() - D) ** 2).sum()), float((D**2).sum()))
    overall = math.sqrt(sum(lost for lost, _ in squares.values()) / sum(size for _, size in squares.values()))
    return overall, {name: math.sqrt(lost / size) for name, (lost, size) in squares.items()}


@pytest.fixture
def pair(tmp_path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A base and a fine-tune with the weights that are returned, in the folders `base` and `tuned`."""
    base = weights()
    tuned = changed(base)
    model(tmp_path / "base", base)
    model(tmp_path / "tuned", tuned)
    return base, tuned


Pair = tuple[dict[str, Tensor], dict[str, Tensor]]

# What is stored, and its error ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 5, 12, 24, 100])
def test_a_rank_is_optimal(adapter: Command, tmp_path: Path, pair: Pair, rank: int) -> None:
    base, tuned = pair
    done = adapter("extract", tmp_path / "base", tmp_path / "tuned", "--rank", rank, "-o", tmp_path / "out", "--json")
    assert done.code == 0, done
    overall, by_module = missed(tmp_path / "out", base, tuned)
    best = {name: tails(difference(base, tuned, name), rank) for name in SHAPES}
    expected = math.sqrt(sum(lost for lost, _ in best.values()) / sum(size for _, size in best.values()))
    assert overall == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert done.json["error"] == pytest.approx(overall, rel=1e-5, abs=1e-8)
    for name in SHAPES:
        assert done.json["modules"][name]["error"] == pytest.approx(by_module[name], rel=1e-5, abs=1e-8)
        assert done.json["modules"][name]["rank"] == min(rank, *SHAPES[name])
        lost, size = best[name]
        assert done.json["modules"][name]["error_at_least"] == pytest.approx(math.sqrt(lost / size), rel=1e-5, abs=1e-7)
    assert ah.load(tmp_path / "out").source.contents  # and it is an adapter


@pytest.mark.parametrize("max_error", [0.5, 0.1, 1e-3])
def test_an_error_is_kept_at_the_least_size(tmp_path: Path, pair: Pair, max_error: float) -> None:
    base, tuned = pair
    done = ah.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", max_error=max_error)
    overall, _ = missed_of_all(tmp_path / "out", base, tuned)
    assert overall <= max_error * (1 + 5e-6)
    # One unit of rank less anywhere misses it: what is dropped is the smallest, but for what a knapsack can gain.
    squares = {name: np.linalg.svd(difference(base, tuned, name), compute_uv=False) ** 2 for name in SHAPES}
    total = sum(s.sum() for s in squares.values())
    dropped = sum(s[done.plan.ranks.get(name, 0) :].sum() for name, s in squares.items())
    kept = [s[done.plan.ranks[name] - 1] for name, s in squares.items() if done.plan.ranks.get(name, 0)]
    assert dropped + min(kept) > max_error**2 * total * 0.98


def missed_of_all(out: Path, base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> tuple[float, float]:
    """As `missed`, where a module may have no part in the adapter; and ‖ΔW‖."""
    stored = dense_delta(out)
    lost = size = 0.0
    for key in base:
        D = difference(base, tuned, key.removesuffix(".weight"))
        delta = stored.get(key.removesuffix(".weight"))
        lost += float(((0.0 if delta is None else delta.numpy()) - D).__pow__(2).sum())
        size += float((D**2).sum())
    return math.sqrt(lost / size), math.sqrt(size)


def test_a_budget_is_shared_by_all_layers(adapter: Command, tmp_path: Path, pair: Pair) -> None:
    base, tuned = pair
    budget = 6000
    done = adapter(
        "extract", tmp_path / "base", tmp_path / "tuned", "--budget", budget, "-o", tmp_path / "out", "--json"
    )
    assert done.code == 0, done
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert sum(t.numel() * 4 for t in stored.values()) == done.json["bytes"] <= budget
    assert done.json["error"] == pytest.approx(missed_of_all(tmp_path / "out", base, tuned)[0], rel=1e-5)
    # No choice of equal ranks that fits is nearer.
    cost = 4 * sum(sum(shape) for shape in SHAPES.values())
    uniform = [tails(difference(base, tuned, name), budget // cost) for name in SHAPES]
    assert done.json["error"] <= math.sqrt(sum(t[0] for t in uniform) / sum(t[1] for t in uniform))


def test_without_a_size_it_is_rank_16_and_says_so(adapter: Command, tmp_path: Path, pair: Pair) -> None:
    done = adapter("extract", tmp_path / "base", tmp_path / "tuned", "-o", tmp_path / "out")
    assert done.code == 0
    assert "rank: 16 (say --rank" in done.err
    assert "ranks 12 to 16, 4 modules, F32" in done.out
    quiet = adapter("extract", tmp_path / "base", tmp_path / "tuned", "-o", tmp_path / "two", "-q")
    assert (quiet.out, quiet.err) == ("", "")
    assert (tmp_path / "out/adapter_model.safetensors").read_bytes() == (
        tmp_path / "two/adapter_model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lora_that_was_merged_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    """In float32 its rank; in bfloat16 what rounding the weights did to it is in the difference, and is an error."""
    rng = torch.Generator().manual_seed(5)
    base = {key: W.to(dtype) for key, W in weights({"a": (96, 64), "b": (50, 128)}).items()}
    tuned, rank = {}, 3
    for key, W in base.items():
        B, A = torch.randn(W.shape[0], rank, generator=rng), torch.randn(rank, W.shape[1], generator=rng)
        tuned[key] = (W.double() + 0.02 * B.double() @ A.double()).to(dtype)
    model(tmp_path / "base", base)
    model(tmp_path / "tuned", tuned)
    limit = 1e-5 if dtype == torch.float32 else 0.02
    done = ah.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", max_error=limit, dtype=torch.float32)
    assert set(done.plan.ranks.values()) == {rank}
    again = ah.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "again", rank=rank)
    assert again.plan.dtype == {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]  # the base's
    noise = [tails(difference(base, tuned, name), rank) for name in ("a", "b")]
    cut = math.sqrt(sum(lost for lost, _ in noise) / sum(size for _, size in noise))
    assert again.best == pytest.approx(cut, rel=1e-4)
    assert again.error.overall == pytest.approx(missed(tmp_path / "again", base, tuned)[0], rel=1e-4)
    assert (cut > 1e-3) == (dtype == torch.bfloat16)


def test_the_error_includes_the_rounding_of_the_factors(tmp_path: Path, pair: Pair) -> None:
    base, tuned = pair
    done = ah.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=24, dtype=torch.bfloat16)
    assert 1e-4 < done.error.overall == pytest.approx(missed(tmp_path / "out", base, tuned)[0], rel=1e-5)


def test_the_dtypes_of_the_models_may_differ(tmp_path: Path, pair: Pair) -> None:
    base, tuned = pair
    halved = {key: W.bfloat16() for key, W in tuned.items()}
    model(tmp_path / "half", halved)
    done = ah.extract(tmp_path / "base", tmp_path / "half", tmp_path / "out", rank=7)
    assert done.error.overall == pytest.approx(missed(tmp_path / "out", base, halved)[0], rel=1e-5)


# Large layers ---------------------------------------------------------------------------------------------------

LARGE = {"x": (200, 330), "y": (260, 150)}


@pytest.fixture
def large(tmp_path: Path) -> Pair:
    base = weights(LARGE)
    tuned = changed(base)
    model(tmp_path / "base", base)
    model(tmp_path / "tuned", tuned)
    return base, tuned


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ask", [{"rank": 8}, {"max_error": 0.3}, {"max_error": 0.45}, {"budget": 60_000}])
def test_the_randomised_path_is_as_good_as_the_exact_one(
    tmp_path: Path, dtype: torch.dtype, ask: dict[str, Any]
) -> None:
    base = {key: W.to(dtype) for key, W in weights(LARGE).items()}
    tuned = changed(base)
    model(tmp_path / "base", base)
    model(tmp_path / "tuned", tuned)
    found = {}
    for name, side in (("randomised", 0), ("exact", 1000)):
        compared = extraction.difference(tmp_path / "base", tmp_path / "tuned", exact_side=side)
        found[name] = extraction.write(compared, tmp_path / name, dtype="F32", **ask)
        assert {c.passes is None for c in compared.certificates.values()} == {name == "exact"}
    randomised, exact = found["randomised"], found["exact"]
    assert randomised.error.overall == pytest.approx(missed(tmp_path / "randomised", base, tuned)[0], rel=1e-5)
    if "max_error" in ask:
        assert randomised.error.overall <= ask["max_error"]
        assert randomised.plan.nbytes <= 1.03 * exact.plan.nbytes
    else:
        assert exact.error.overall <= randomised.error.overall * (1 + 1e-5)
        assert randomised.error.overall <= 1.005 * exact.error.overall
        assert randomised.best <= exact.error.overall * (1 + 1e-5)  # what is called certain is


def test_many_values_are_asked_for_until_the_error_is_met(tmp_path: Path, large: Pair) -> None:
    """The first 32 do not suffice: the subspace grows, and where it would be the whole, the layer is decomposed."""
    base, tuned = large
    compared = extraction.difference(tmp_path / "base", tmp_path / "tuned", exact_side=0)
    done = extraction.write(compared, tmp_path / "out", max_error=0.1)
    assert missed(tmp_path / "out", base, tuned)[0] == pytest.approx(done.error.overall, rel=1e-5)
    assert done.error.overall <= 0.1
    assert max(done.plan.ranks.values()) > 32


@pytest.mark.parametrize("rank", [1, 4, 15])
@pytest.mark.parametrize("shape", [(90, 60), (50, 170)])
@pytest.mark.parametrize("noise", [0.0, 1e-3, 1.0])
def test_the_certificate_holds(shape: tuple[int, int], rank: int, noise: float) -> None:
    """No matrix of the rank is nearer than `best`: numpy's SVD says so; and `error` is that of the factors given."""
    rng = torch.Generator().manual_seed(rank)
    D = decaying(*shape, seed=3, power=2.0)
    D += noise * torch.randn(*shape, generator=rng, dtype=torch.float64) / math.sqrt(shape[0] * shape[1])
    found = subspace.leading(lambda: iter(D.split(17)), shape[1], rank, width=rank + 3, seed="x")
    optimal, total = tails(D.numpy(), rank)
    assert found.best(rank) <= optimal * (1 + 1e-9) <= found.error(rank) * (1 + 2e-9)
    assert found.total == pytest.approx(total, rel=1e-12)
    approximation = found.Y[:, :rank] @ found.V[:, :rank].T
    assert float(((D - approximation) ** 2).sum()) == pytest.approx(found.error(rank), rel=1e-9)
    assert found.error(rank) <= 1.02 * optimal
    torch.testing.assert_close(found.V.T @ found.V, torch.eye(rank + 3, dtype=torch.float64), rtol=0, atol=1e-12)
    if noise == 1e-3 and rank < 15:  # far above the noise the certificate is sharp
        assert found.best(rank) >= 0.9 * optimal


def test_a_subspace_that_is_wrong_is_not_certified() -> None:
    """With one pass from random columns the error is far from the best, and `best` does not claim otherwise."""
    D = decaying(80, 60, seed=1, power=0.3)
    V = torch.linalg.qr(torch.randn(60, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    found, _ = subspace._pass(lambda: iter(D.split(20)), V, 1)
    optimal, _ = tails(D.numpy(), 6)
    assert found.best(6) <= optimal < 0.95 * found.error(6)


def test_the_result_does_not_depend_on_the_global_seed(tmp_path: Path, large: Pair) -> None:
    files = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        compared = extraction.difference(tmp_path / "base", tmp_path / "tuned", exact_side=0)
        extraction.write(compared, tmp_path / str(seed), rank=8)
        assert torch.equal(torch.get_rng_state(), state)
        files.append((tmp_path / str(seed) / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1]


MEMORY = """
import resource, sys
import adapterhub_lite.extraction as e
e.write(e.difference("small-base", "small-tuned"), __import__("pathlib").Path("warm-up"), rank=4)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
e.write(e.difference(sys.argv[1] + "-base", sys.argv[1] + "-tuned"), __import__("pathlib").Path("out-" + sys.argv[1]),
        rank=4)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_does_not_grow_with_the_number_of_layers(tmp_path: Path) -> None:
    """Two layers of 4.5 MB, and twelve times as many: 108 MB a model, and the peak is that of a few blocks."""
    for name, count in (("small", 2), ("big", 24)):
        base = weights({f"l.{i}": (800, 1400) for i in range(count)})
        model(tmp_path / f"{name}-base", base)
        model(tmp_path / f"{name}-tuned", {key: W + 0.01 * W.roll(1, 0) for key, W in base.items()})
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, "big"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done
    assert int(done.stdout) < 30_000  # kB, of 216,000 read


# Which layers ---------------------------------------------------------------------------------------------------


def test_equal_layers_are_left_out_and_targets_stay_short(tmp_path: Path) -> None:
    base = weights()
    for name, moved, targets in (
        ("all q", ["net.0.q", "net.1.q"], ["q"]),  # no other module ends so
        ("one q", ["net.0.q"], ["net.0.q"]),
    ):
        model(tmp_path / name / "base", base)
        model(tmp_path / name / "tuned", changed(base, moved))
        ah.extract(tmp_path / name / "base", tmp_path / name / "tuned", tmp_path / name / "out", rank=2)
        assert sorted(dense_delta(tmp_path / name / "out")) == moved
        config = json.loads((tmp_path / name / "out" / "adapter_config.json").read_text())
        assert config["target_modules"] == targets


def test_what_is_not_held_is_said(adapter: Command, tmp_path: Path) -> None:
    """Embeddings, output, norms, biases, and what is excluded: each with the norm of its change and the reason."""
    base = weights({**SHAPES, "embed_tokens": (30, 24), "lm_head": (30, 24)})
    base |= {"net.norm.weight": torch.ones(24), "net.0.q.bias": torch.zeros(40), "net.scale": torch.ones(3, 4)}
    tuned = {key: W + 0.1 for key, W in base.items()}
    model(tmp_path / "base", base)
    model(tmp_path / "tuned", tuned)
    command = ("extract", tmp_path / "base", tmp_path / "tuned", "--rank", 1, "--exclude", "1.k", "-o")
    done = adapter(*command, tmp_path / "out", "--json")
    assert done.code == 0, done
    assert sorted(done.json["modules"]) == ["net.0.k", "net.0.q", "net.1.q"]
    left = done.json["left"]
    assert {key: own["why"] for key, own in left.items()} == {
        "embed_tokens.weight": "an embedding",
        "lm_head.weight": "the model's output",
        "net.0.q.bias": "a bias",
        "net.1.k.weight": "excluded",
        "net.norm.weight": "no weight of a linear layer",
        "net.scale": "no weight of a linear layer",
    }
    for key, own in left.items():
        D = (tuned[key].double() - base[key].double()).norm()
        assert own["norm"] == pytest.approx(float(D), rel=1e-9)
        size = float(base[key].double().norm())
        assert own["relative"] == (pytest.approx(float(D) / size, rel=1e-9) if size else None)
    text = adapter(*command, tmp_path / "two")
    assert "changed and not in the adapter: 6 tensors" in text.out
    assert "net.norm.weight" in text.out


def test_targets_take_the_output_and_embeddings_too(tmp_path: Path) -> None:
    base = weights({**SHAPES, "embed_tokens": (30, 24), "lm_head": (30, 24)})
    model(tmp_path / "base", base)
    model(tmp_path / "tuned", changed(base))
    targets = ["embed_tokens", "lm_head", "net.1.*"]
    done = ah.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=24, targets=targets)
    stored = dense_delta(tmp_path / "out")
    assert sorted(stored) == ["embed_tokens", "lm_head", "net.1.k", "net.1.q"]
    D = difference(base, changed(base), "embed_tokens")
    np.testing.assert_allclose(stored["embed_tokens"].numpy(), D.T, atol=1e-6)  # an embedding's matrix form
    assert sorted(done.left) == ["net.0.k.weight", "net.0.q.weight"]


def test_a_vocabulary_is_known_by_its_size(tmp_path: Path) -> None:
    base = weights({**SHAPES, "output": (30, 24)})
    model(tmp_path / "base", base, vocab_size=30)
    model(tmp_path / "tuned", changed(base), vocab_size=30)
    done = ah.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=2)
    assert {key: own.why for key, own in done.left.items()} == {"output.weight": "the model's output"}


@pytest.mark.parametrize(
    ("key", "shape", "kind"),
    [
        ("transformer.h.0.attn.c_attn.weight", (8, 24), "transposed_linear"),
        ("transformer.h.0.attn.c_attn.bias", (24,), None),
        ("transformer.wte.weight", (50, 8), "embedding"),
        ("bert.embeddings.word_embeddings.weight", (50, 8), "embedding"),
        ("shared.weight", (50, 8), "embedding"),
        ("layers.0.mlp.shared_experts.up_proj.weight", (9, 8), "linear"),
        ("vision.patch_embed.proj.weight", (9, 3, 4, 4), "conv2d"),
        ("model.embed_vision.embedding_projection.weight", (9, 8), "linear"),
        ("layers.0.mlp.experts.gate_up_proj", (4, 8, 9), None),
        ("layers.0.in_proj_weight", (24, 8), None),
    ],
)
def test_kinds_of_layer(key: str, shape: tuple[int, ...], kind: str | None) -> None:
    assert modules.kind_of(key, shape, {"model_type": "gpt2"}) == kind


# Refusals -------------------------------------------------------------------------------------------------------


def test_models_that_do_not_fit_together(adapter: Command, tmp_path: Path, pair: Pair) -> None:
    _, tuned = pair
    fewer = {key: W for key, W in tuned.items() if key != "net.1.k.weight"}
    wider = tuned | {"net.1.k.weight": torch.zeros(14, 24)}
    gone = tuned | {"net.1.k.weight": tuned["net.1.k.weight"].where(tuned["net.1.k.weight"] < 0.2, torch.nan)}
    bytes_ = tuned | {"net.1.k.weight": torch.zeros(12, 24, dtype=torch.int8)}
    scaled = tuned | {"net.1.k.weight": torch.zeros(12, 24).to(torch.float8_e4m3fn)}
    more = {"fewer": fewer, "wider": wider, "nan": gone, "int8": bytes_, "fp8": scaled}
    for name, tensors in more.items():
        model(tmp_path / name, tensors)
    model(tmp_path / "four", tuned, quantization_config={"bits": 4})
    (tmp_path / "pickled").mkdir()
    torch.save(tuned, tmp_path / "pickled" / "pytorch_model.bin")
    expected = {
        "fewer": ("no tensor 'net.1.k.weight'", "--exclude"),
        "wider": ("'net.1.k.weight' has the shape [14, 24], and [12, 24] in the base", "--exclude net.1.k"),
        "nan": ("nan/model.safetensors", "'net.1.k.weight' has", "NaN"),
        "int8": ("'net.1.k.weight' differs and is I8", "dequantise"),
        "fp8": ("'net.1.k.weight' differs and is F8_E4M3", "dequantise"),
        "four": ("quantised",),
        "pickled": ("pickle",),
        "base": ("no weight differs",),
        "nowhere": ("no such model",),
    }
    for name, words in expected.items():
        done = adapter("extract", tmp_path / "base", tmp_path / name, "--rank", 2, "-o", tmp_path / "out", "-q")
        done.refused(*words)
        assert not (tmp_path / "out").exists()
    assert adapter("extract", tmp_path / "nan", tmp_path / "tuned", "--rank", 2, "-o", tmp_path / "out").code == 1
    for name in ("fewer", "wider"):
        command = ("extract", tmp_path / "base", tmp_path / name, "--rank", 2, "--exclude", "net.1.k", "--json")
        done = adapter(*command, "-o", tmp_path / f"{name}-out")
        assert done.code == 0, done
        assert done.json["left"]["net.1.k.weight"]["norm"] is None


def test_targets_that_name_nothing(adapter: Command, tmp_path: Path, pair: Pair) -> None:
    done = adapter(
        "extract", tmp_path / "base", tmp_path / "tuned", "--targets", "net.0.qq", "-o", tmp_path / "out", "-q"
    )
    done.refused("'net.0.qq' names no layer that changed", "did you mean", "net.0.q")


def test_wrong_usage(adapter: Command, tmp_path: Path, pair: Pair) -> None:
    command = ("extract", tmp_path / "base", tmp_path / "tuned")
    assert adapter(*command).code == 2
    assert adapter(*command, "-o", tmp_path / "out", "--rank", 2, "--budget", "1MB").code == 2
    assert adapter(*command, "-o", tmp_path / "out", "--rank", 0).code == 2


def test_an_output_that_exists(adapter: Command, tmp_path: Path, pair: Pair) -> None:
    command = ("extract", tmp_path / "base", tmp_path / "tuned", "--rank", 2, "-q", "-o")
    assert adapter(*command, tmp_path / "out").code == 0
    adapter(*command, tmp_path / "out").refused("the output exists", "--force")
    assert adapter(*command, tmp_path / "out", "--force").code == 0
    adapter(*command, tmp_path / "base", "--force").refused("does not look like an output of ours")


def test_a_dry_run_says_what_would_be_written(adapter: Command, tmp_path: Path, pair: Pair) -> None:
    command = ("extract", tmp_path / "base", tmp_path / "tuned", "--rank", 3, "--json")
    dry = adapter(*command, "--dry-run", "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    done = adapter(*command, "-o", tmp_path / "out")
    assert {dry.json[key] for key in ("bytes", "dtype", "method")} == {
        done.json[key] for key in ("bytes", "dtype", "method")
    }
    assert dry.json["modules"].keys() == done.json["modules"].keys()


# Files ----------------------------------------------------------------------------------------------------------


def test_shards_do_not_matter(tmp_path: Path, pair: Pair) -> None:
    base, tuned = pair
    model(tmp_path / "base-in-3", base, shards=3)
    model(tmp_path / "tuned-in-2", tuned, shards=2)
    ah.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "one", rank=4)
    ah.extract(tmp_path / "base-in-3", tmp_path / "tuned-in-2", tmp_path / "many", rank=4)
    one, many = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "many"))
    assert one.keys() == many.keys()
    assert all(torch.equal(one[key], many[key]) for key in one)


def test_the_recipe_names_the_inputs_with_their_hashes(tmp_path: Path, pair: Pair) -> None:
    import hashlib

    ah.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=4)
    contents = next(iter(ah.load(tmp_path / "out").source.contents.values()))
    of = contents.facts["recipe"]["terms"][0]["of"]
    assert contents.facts["recipe"]["terms"][0] | {"of": None} == {
        "rule": "truncate", "rank": 4, "of": None, "weight": 1.0,
    }  # fmt: skip
    for name in ("base", "tuned"):
        data = (tmp_path / name / "model.safetensors").read_bytes()
        assert of[name] == {"model": name, "sha256": {"model.safetensors": hashlib.sha256(data).hexdigest()}}


def test_the_base_of_the_adapter_is_known(tmp_path: Path, pair: Pair) -> None:
    """By its name on the Hub, where the folder is of the Hub's cache; and by a sketch of its weights."""
    base, _ = pair
    cached = tmp_path / "models--my-org--base-7b" / "snapshots" / "0123abcd"
    model(cached, base)
    ah.extract(cached, tmp_path / "tuned", tmp_path / "out", rank=4)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("my-org/base-7b", "0123abcd")
    for seed, right in ((0, True), (7, False)):
        net = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(24, 40), "k": nn.Linear(24, 12)}) for _ in range(2)])
        live = nn.ModuleDict({"net": net})
        live.load_state_dict(weights(seed=seed), strict=False)
        adapters = ah.adapt(live)
        if right:
            adapters.load(tmp_path / "out", name="x")
        else:
            with pytest.raises(ah.AdapterError, match="base"):
                adapters.load(tmp_path / "out", name="x")


# Real models ----------------------------------------------------------------------------------------------------


def tuned_copy(peer: Peer, moved: Callable[[str, nn.Module], bool]) -> nn.Module:
    """The peer after training, as far as a test needs it: the weights of some modules have moved."""
    live = peer.build()
    with torch.no_grad():
        for i, (name, module) in enumerate(live.named_modules()):
            if moved(name, module):
                W = module.get_parameter("weight")
                W += 0.3 * decaying(*W.flatten(1).shape, seed=i, power=1.5).reshape(W.shape).float()
    return live


def is_target(peer: Peer) -> Callable[[str, nn.Module], bool]:
    return lambda name, module: name.rpartition(".")[2] in peer.targets


@pytest.mark.parametrize("peer", [LLAMA, GPT2], ids=lambda peer: peer.name)
def test_peft_computes_the_fine_tune(adapter: Command, tmp_path: Path, peer: Peer) -> None:
    live = tuned_copy(peer, is_target(peer))
    peer.build().save_pretrained(tmp_path / "base")  # type: ignore[operator]
    live.save_pretrained(tmp_path / "tuned")  # type: ignore[operator]
    full = ("extract", tmp_path / "base", tmp_path / "tuned", "--max-error", "1e-5", "--json", "-o", tmp_path / "full")
    done = adapter(*full)
    assert done.code == 0, done
    assert done.json["left"] == {}
    expected, before = output(live, peer), output(peer.build(), peer)
    assert (expected - before).abs().max() > 0.01
    torch.testing.assert_close(output(load_peft(tmp_path / "full", peer), peer), expected, rtol=1e-4, atol=1e-5)
    # Cut, it is the base with what is stored folded in, whose error is the one that was said.
    done = adapter("extract", tmp_path / "base", tmp_path / "tuned", "--rank", 6, "--json", "-o", tmp_path / "cut")
    folded, lost, size = peer.build(), 0.0, 0.0
    with torch.no_grad():
        for name, delta in dense_delta(tmp_path / "cut").items():
            W = folded.get_submodule(name).get_parameter("weight")
            exact = live.get_submodule(name).get_parameter("weight").double() - W.double()
            own = native(delta, folded.get_submodule(name))
            lost, size = lost + float((own - exact).square().sum()), size + float(exact.square().sum())
            W += own.float()
    assert done.json["error"] == pytest.approx(math.sqrt(lost / size), rel=1e-4)
    torch.testing.assert_close(
        output(load_peft(tmp_path / "cut", peer), peer), output(folded, peer), rtol=1e-4, atol=1e-4
    )
    config = json.loads((tmp_path / "cut" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] == (peer is GPT2)
    assert config["task_type"] == "CAUSAL_LM"
    assert set(config["target_modules"]) == set(peer.targets)


def test_convolutions(tmp_path: Path) -> None:
    live = tuned_copy(CONV, is_target(CONV))
    model(tmp_path / "base", CONV.build().state_dict())
    model(tmp_path / "tuned", live.state_dict())
    done = ah.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", max_error=1e-6)
    assert done.left == {}
    found = output(load_peft(tmp_path / "out", CONV), CONV)
    torch.testing.assert_close(found, output(live, CONV), rtol=1e-4, atol=1e-5)


def test_minilm(adapter: Command, tmp_path: Path) -> None:
    """Real pretrained weights: what fine-tuning moved comes back, and PEFT embeds as the fine-tune does."""
    live, tokenizer = minilm()
    batch: dict[str, Any] = dict(tokenizer(["A man eats.", "Stocks fell."], padding=True, return_tensors="pt"))
    peer = Peer("minilm", lambda: minilm()[0], ["query", "value"], lambda: batch)
    tuned = {key: W.clone() for key, W in live.state_dict().items()}
    for i, (key, W) in enumerate(tuned.items()):
        if key.endswith(("query.weight", "value.weight")):
            W += 0.5 * decaying(*W.shape, seed=i)[:, :].float() @ decaying(*W.shape, seed=-i, power=4.0).float()
    shutil.copytree(minilm_folder(), tmp_path / "base")
    live.load_state_dict(tuned)
    live.save_pretrained(tmp_path / "tuned")
    done = adapter(
        "extract", tmp_path / "base", tmp_path / "tuned", "--max-error", 0.01, "-o", tmp_path / "out", "--json"
    )
    assert done.code == 0, done
    assert {key: own["why"] for key, own in done.json["left"].items()} == {
        "embeddings.position_ids": "only in the base"  # a buffer that transformers no longer saves
    }
    assert len(done.json["modules"]) == 12
    assert max(own["rank"] for own in done.json["modules"].values()) < 32
    expected, before = output(live, peer), output(minilm()[0], peer)
    error = (output(load_peft(tmp_path / "out", peer), peer) - expected).norm() / (expected - before).norm()
    assert error < 0.05


# Resizing -------------------------------------------------------------------------------------------------------


def test_resize_is_the_merge_of_one(adapter: Command, tmp_path: Path, pair: Pair) -> None:
    ah.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "a", rank=10)
    for i, ask in enumerate((["--rank", 4], ["--max-error", 0.3], ["--budget", 4000], ["--dtype", "bf16"])):
        done = adapter("resize", tmp_path / "a", *ask, "-o", tmp_path / f"r{i}", "--json")
        assert done.code == 0, done
        assert adapter("merge", tmp_path / "a", *ask, "-o", tmp_path / f"m{i}", "-q").code == 0
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            assert (tmp_path / f"r{i}" / file).read_bytes() == (tmp_path / f"m{i}" / file).read_bytes()
        stored, whole = dense_delta(tmp_path / f"r{i}"), dense_delta(tmp_path / "a")
        lost = sum(float((stored.get(n, torch.zeros_like(D)) - D).square().sum()) for n, D in whole.items())
        size = sum(float(D.square().sum()) for D in whole.values())
        assert done.json["error"] == pytest.approx(math.sqrt(lost / size), rel=1e-4)


def test_resize_pads_nothing(adapter: Command, tmp_path: Path, pair: Pair) -> None:
    ah.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "a", rank=10)
    done = adapter("resize", tmp_path / "a", "--rank", 64, "-o", tmp_path / "b", "--json")
    assert done.json["error"] == 0
    assert {own["rank"] for own in done.json["modules"].values()} == {10}
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_resize_to_nothing_in_particular(adapter: Command, tmp_path: Path, pair: Pair) -> None:
    ah.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "a", rank=10)
    done = adapter("resize", tmp_path / "a", "-o", tmp_path / "b")
    assert done.code == 2
    assert "to what size?" in done.err
    assert adapter("resize", tmp_path / "a", "--rank", 2).code == 2
