"""Every folded number is the rounded float64 sum, and every other byte is the base's."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from fold_models import (
    DTYPES,
    digests,
    draw,
    header,
    lora_delta,
    off_by,
    rounded,
    same_bits,
    tensors_of,
    weighted,
    write_lora,
    write_model,
)
from torch import Tensor

import adapterhub_lite as ah
from adapterhub_lite import rounding
from adapterhub_lite.folding import blocks

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LAYERS = {"net.0.q": (13, 7), "net.0.k": (5, 301), "net.1.q": (257, 3), "net.1.k": (1, 11), "net.1.v": (8, 1)}


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    return found


def base(folder: Path, dtype: torch.dtype, files: int = 1, std: float = 0.02) -> Path:
    tensors = {f"{name}.weight": draw(*shape, seed=i, std=std) for i, (name, shape) in enumerate(LAYERS.items())}
    tensors["net.norm.weight"] = draw(9, seed=50)
    tensors["net.emb.weight"] = draw(19, 6, seed=51)
    return write_model(folder, {key: t.to(dtype) for key, t in tensors.items()}, files=files)


@pytest.fixture
def abc(tmp_path: Path) -> list[Path]:
    """Adapters of other ranks, dtypes, scalings and layers."""
    names = list(LAYERS)
    return [
        write_lora(tmp_path / "a", LAYERS, rank=3, seed=1),
        write_lora(tmp_path / "b", {n: LAYERS[n] for n in names[:3]}, rank=5, seed=2, dtype=torch.bfloat16, alpha=7),
        write_lora(
            tmp_path / "c", {n: LAYERS[n] for n in names[1:]}, rank=2, seed=3, dtype=torch.float16, use_rslora=True
        ),
    ]


def summed(folder: Path, parts: list[Path], weights: list[float]) -> dict[str, np.ndarray[Any, Any]]:
    """W + Σ wᵢ ΔWᵢ in float64, of every layer that one of them adapts."""
    found = {}
    for name, tensor in tensors_of(folder).items():
        layer = name.removesuffix(".weight")
        have = [(p, w) for p, w in zip(parts, weights, strict=True) if layer in ah.load(p).sites]
        if have:
            deltas = [lora_delta(p, layer) for p, _ in have]
            found[name] = tensor.double().numpy() + weighted(deltas, [w for _, w in have])
    return found


def test_the_oracle_rounds_to_even_and_without_a_step_between() -> None:
    x = np.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-40, -1 - 2**-8, 255.5, 0.0])
    assert rounded(x, torch.bfloat16).tolist() == [1.0, 1 + 2**-6, 1 + 2**-7, -1.0, 256.0, 0.0]


@pytest.mark.parametrize("files", [1, 3])
def test_each_number_is_the_rounded_sum(tmp_path: Path, abc: list[Path], dtype: torch.dtype, files: int) -> None:
    weights = [0.7, -0.3, 1.0]
    folder = base(tmp_path / "base", dtype, files)
    a, b, c = map(ah.load, abc)
    ah.fold(folder, 0.7 * a - 0.3 * b + c, tmp_path / "out")
    got, old = tensors_of(tmp_path / "out"), tensors_of(folder)
    assert list(got) == list(old)
    want = summed(folder, abc, weights)
    assert want.keys() == {f"{name}.weight" for name in LAYERS}
    for name, tensor in got.items():
        if name in want:
            assert off_by(tensor, rounded(want[name], dtype)) == (0, 0), name
            assert not torch.equal(tensor, old[name])
        else:
            assert same_bits(tensor, old[name]), name
    for file in folder.glob("*.safetensors"):
        assert header(tmp_path / "out" / file.name) == header(file)
    index = "model.safetensors.index.json"
    if files > 1:
        assert (tmp_path / "out" / index).read_bytes() == (folder / index).read_bytes()


def test_many_numbers(tmp_path: Path, dtype: torch.dtype) -> None:
    """Of 800,000, none is off: torch's own casts to 16 bits, which round twice, would miss some."""
    tensors = {"big.weight": draw(1000, 800, std=0.02).to(dtype)}
    folder = write_model(tmp_path / "base", tensors)
    part = write_lora(tmp_path / "a", {"big": (1000, 800)}, rank=4, std=0.01, seed=5)
    ah.fold(folder, ah.load(part), tmp_path / "out")
    want = tensors["big.weight"].double().numpy() + lora_delta(part, "big")
    assert off_by(tensors_of(tmp_path / "out")["big.weight"], rounded(want, dtype)) == (0, 0)


def test_halves_go_to_even(tmp_path: Path, dtype: torch.dtype) -> None:
    """Sums that lie exactly between two numbers, and a hair beside it."""
    step = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[dtype]
    hair = step * 2.0**-28
    W = (1 + step * torch.arange(64, dtype=torch.float64)).to(dtype)[:, None]
    A = torch.tensor([[1.0], [1.0]])
    factors = {
        "base_model.model.x.lora_A.weight": A,
        "base_model.model.x.lora_B.weight": torch.tensor([[step / 2, 0.0], [step / 2, hair], [step / 2, -hair]])
        .repeat(22, 1)[:64]
        .contiguous(),
    }
    folder = write_model(tmp_path / "base", {"x.weight": W})
    part = write_lora(tmp_path / "a", {}, rank=2, alpha=2, more=factors, target_modules=["x"])
    ah.fold(folder, ah.load(part), tmp_path / "out")
    got = tensors_of(tmp_path / "out")["x.weight"]
    ups = ((got.double() - W.double()) / step).flatten().tolist()
    odd = [float(i % 2) for i in range(64)]  # a number with an odd last bit goes up, to the even one
    assert ups == [[odd[i], 1.0, 0.0][i % 3] for i in range(64)]


def test_nothing_but_zeros_is_refused(tmp_path: Path, abc: list[Path]) -> None:
    folder = base(tmp_path / "base", torch.float32)
    with pytest.raises(ah.NotMergeable, match="all weights are zero"):
        ah.fold(folder, 0.0 * ah.load(abc[0]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_zero_beside_others_is_left_out(tmp_path: Path, abc: list[Path], dtype: torch.dtype) -> None:
    folder = base(tmp_path / "base", dtype)
    ah.fold(folder, ah.load(abc[0]) + 0 * ah.load(abc[2]), tmp_path / "both")
    ah.fold(folder, ah.load(abc[0]), tmp_path / "one")
    assert digests(tmp_path / "both")["model.safetensors"] == digests(tmp_path / "one")["model.safetensors"]


def test_files_without_a_touched_tensor_are_the_bases(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = base(tmp_path / "base", dtype, 7)
    part = write_lora(tmp_path / "a", {"net.0.k": (5, 301)}, seed=4)
    ah.fold(folder, ah.load(part), tmp_path / "out")
    new, old = digests(tmp_path / "out"), digests(folder)
    assert [name for name in old if new[name] != old[name]] == ["model-00002-of-00007.safetensors"]


@pytest.mark.parametrize("seed", [None, 7])
def test_two_runs_are_one(tmp_path: Path, abc: list[Path], seed: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of threads."""
    monkeypatch.setattr(blocks, "BLOCK", 64)
    monkeypatch.setattr(blocks, "STRIP", 64)
    folder = base(tmp_path / "base", torch.bfloat16, 2)
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 8):
            torch.set_num_threads(n)
            a, b, c = map(ah.load, abc)
            result = ah.fold(folder, 0.5 * a + b - c, tmp_path / f"out{n}", rounding="stochastic", seed=seed)
            found.append((digests(tmp_path / f"out{n}"), result.plain()))
            assert torch.get_num_threads() == n
    finally:
        torch.set_num_threads(threads)
    assert all(one == found[0] for one in found)


# At random ----------------------------------------------------------------------------------------


def neighbours(x: np.ndarray[Any, Any], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The numbers of the type below and above x; x itself twice if it is one."""
    near = rounded(x, dtype)
    exact = torch.from_numpy(x)
    whole = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    away, towards = ((near.view(whole) + d).view(dtype) for d in (1, -1))
    bigger, smaller = torch.maximum(away.double(), near.double()), torch.minimum(away.double(), near.double())
    above = torch.where(near > 0, bigger, torch.maximum(towards.double(), near.double()))
    below = torch.where(near > 0, torch.minimum(towards.double(), near.double()), smaller)
    same = near.double() == exact
    low = torch.where(near.double() > exact, below, near.double())
    high = torch.where(near.double() < exact, above, near.double())
    return torch.where(same, exact, low), torch.where(same, exact, high)


def test_at_random_it_is_one_of_the_two_and_right_on_average(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"big.weight": draw(300, 400, std=0.02).to(dtype)}
    folder = write_model(tmp_path / "base", tensors)
    part = write_lora(tmp_path / "a", {"big": (300, 400)}, rank=2, std=0.01, seed=5)
    ah.fold(folder, ah.load(part), tmp_path / "out", rounding="stochastic", seed=3)
    got = tensors_of(tmp_path / "out")["big.weight"].double()
    exact = tensors["big.weight"].double().numpy() + lora_delta(part, "big")
    low, high = neighbours(exact, dtype)
    assert bool(((got == low) | (got == high)).all())
    x = torch.from_numpy(exact)
    p = torch.where(high > low, (x - low) / (high - low), 0.0)
    up = (got == high).double()
    assert abs(float((up - p).sum())) < 5 * math.sqrt(float((p * (1 - p)).sum()))  # five standard deviations
    assert 0.2 < float((got != rounded(exact, dtype).double()).double().mean()) < 0.3  # of a uniform p, a quarter


def test_at_random_by_the_seed(tmp_path: Path, abc: list[Path]) -> None:
    folder = base(tmp_path / "base", torch.bfloat16)
    for name, seed in (("x", 0), ("y", 0), ("z", 1)):
        ah.fold(folder, ah.load(abc[0]), tmp_path / name, rounding="stochastic", seed=seed)
    x, y, z = (digests(tmp_path / name)["model.safetensors"] for name in "xyz")
    assert x == y != z
    files = base(tmp_path / "files", torch.bfloat16, 3)
    ah.fold(files, ah.load(abc[0]), tmp_path / "w", rounding="stochastic", seed=0)
    one, three = tensors_of(tmp_path / "x"), tensors_of(tmp_path / "w")
    assert all(same_bits(one[name], three[name]) for name in one)


def test_sizes_at_the_ends(dtype: torch.dtype) -> None:
    """At the largest, at the smallest and about zero, against numpy's cast and integer arithmetic."""
    top = torch.finfo(dtype)
    scale = np.geomspace(top.tiny * 1.0001, top.max * 0.99, 4001)
    x = np.concatenate([scale, -scale, [0.0, -0.0, top.max, -top.max]]).reshape(-1, 1)
    assert same_bits(rounding.nearest(torch.from_numpy(x), dtype), rounded(x, dtype))
    if dtype == torch.float16:  # subnormals too
        x = np.random.default_rng(0).uniform(-1e-4, 1e-4, (5000, 3))
        assert same_bits(rounding.nearest(torch.from_numpy(x), dtype), rounded(x, dtype))


# What is left of the change -----------------------------------------------------------------------


def test_what_rounding_leaves_is_measured(tmp_path: Path, dtype: torch.dtype) -> None:
    names = {"net.a": (40, 30), "net.b": (33, 50)}
    tensors = {f"{n}.weight": draw(*shape, seed=i, std=0.02).to(dtype) for i, (n, shape) in enumerate(names.items())}
    folder = write_model(tmp_path / "base", tensors)
    part = write_lora(tmp_path / "a", names, rank=2, std=0.004, seed=5)
    result = ah.fold(folder, ah.load(part), tmp_path / "out")
    got, facts = tensors_of(tmp_path / "out"), []
    for name in names:
        W, new = tensors[f"{name}.weight"].double(), got[f"{name}.weight"].double()
        D = torch.from_numpy(lora_delta(part, name))
        facts.append((W.numel(), int((new == W).sum()), float(((new - W) * D).sum()), float((D * D).sum())))
        n, unchanged, along, full = facts[-1]
        assert result.modules[name].unchanged == pytest.approx(unchanged / n, rel=1e-5)
        assert result.modules[name].projection == pytest.approx(along / full, rel=1e-5)
    n, unchanged, along, full = map(sum, zip(*facts, strict=True))
    assert result.retained.unchanged == pytest.approx(unchanged / n, rel=1e-5)
    assert result.retained.projection == pytest.approx(along / full, rel=1e-5)
    if dtype == torch.bfloat16:
        assert result.retained.unchanged > 0.5


@pytest.mark.parametrize("how", ["nearest", "stochastic", "float32"])
def test_a_warning_if_much_is_lost(tmp_path: Path, adapter: Callable[..., Any], how: str) -> None:
    W = draw(60, 50, std=0.02).to(torch.float32 if how == "float32" else torch.bfloat16)
    folder = write_model(tmp_path / "base", {"net.a.weight": W})
    part = write_lora(tmp_path / "a", {"net.a": (60, 50)}, rank=2, std=0.002, seed=5)
    more = ["--rounding", "stochastic", "--rounding-seed", "1"] if how == "stochastic" else []
    done = adapter("merge", part, "--into", folder, "-o", tmp_path / "out", *more)
    assert done.code == 0, done
    if how == "nearest":
        lost = 1 - ah.fold(folder, ah.load(part), tmp_path / "again").retained.projection  # type: ignore[operator]
        assert lost > 0.1
        assert f"warning: rounding loses {lost:.0%} of the change; --rounding stochastic" in done.err
    else:
        assert done.err == ""
    if how == "stochastic":
        kept = ah.fold(folder, ah.load(part), tmp_path / "again", rounding="stochastic", seed=1).retained.projection
        assert kept == pytest.approx(1, abs=0.5)
