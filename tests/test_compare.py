"""`diff`: every number against dense matrices in float64, by numpy, and what is said of it."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from peers import dense_delta
from safetensors.torch import load_file
from torch import Tensor, nn

import adapterhub_lite as ah
from adapterhub_lite import compare
from adapterhub_lite.advice import advice
from adapterhub_lite.delta import Delta, Dense, LowRank, Sparse
from adapterhub_lite.source import Piece

if TYPE_CHECKING:
    from conftest import Handmade

Q, K, CONV, POINT, EMB = "net.layers.0.q", "net.layers.0.k", "net.conv", "net.point", "net.emb"


# The oracle ---------------------------------------------------------------------------------------------


def spaces(W: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Orthonormal columns of U and V and the singular values that are not zero, of the dense matrix."""
    U, S, Vh = np.linalg.svd(W)
    r = int(np.count_nonzero(np.greater(S, 1e-9 * S.max(initial=0))))
    return U[:, :r], S[:r], Vh[:r].T


def overlap(X: np.ndarray, Y: np.ndarray) -> float:
    """Mean cos² of the principal angles, by the projectors: tr(P_X P_Y) / the smaller rank."""
    projectors = [Z @ np.linalg.pinv(Z) for Z in (X, Y)]
    return float(np.trace(projectors[0] @ projectors[1])) / min(X.shape[1], Y.shape[1])


def of_pair(A: np.ndarray | None, B: np.ndarray | None) -> dict[str, Any]:
    there = A if A is not None else B
    assert there is not None
    x, y = (np.zeros_like(there) if W is None else W for W in (A, B))
    na, nb, apart = np.linalg.norm(x), np.linalg.norm(y), np.linalg.norm(x - y)
    found: dict[str, Any] = dict.fromkeys(
        ("cosine", "overlap_out", "overlap_in", "chance_out", "chance_in", "conflicts"), None
    )
    found |= {"distance": apart / na if na else None, "gap": apart / (na + nb) if apart else 0.0}
    if na and nb:
        (ua, sa, va), (ub, sb, vb) = spaces(x), spaces(y)
        found["cosine"] = np.sum(x * y) / na / nb
        found["overlap_out"], found["overlap_in"] = overlap(ua, ub), overlap(va, vb)
        found["chance_out"], found["chance_in"] = (max(len(sa), len(sb)) / d for d in x.shape)
        found["conflicts"] = np.mean(np.sign(x) != np.sign(y))
    return found


def agrees(found: compare.Likeness, expected: dict[str, Any], signs: bool = True) -> None:
    for key, value in expected.items():
        own = getattr(found, key)
        if value is None or (key == "conflicts" and not signs):
            assert own is None, (key, own)
        else:
            assert own == pytest.approx(value, rel=1e-9, abs=1e-9), (key, own, value)


def check(folders: list[Path], *, signs: bool = True) -> compare.Diff:
    """Compare the folders, and every number with the oracle's."""
    dense = [{name: W.numpy() for name, W in dense_delta(folder).items()} for folder in folders]
    found = ah.diff(*map(ah.load, folders), signs=signs)
    assert list(found.modules) == sorted(set().union(*dense))
    for site, module in found.modules.items():
        for i, own in enumerate(dense):
            if site not in own:
                assert module.norms[i] is module.spectra[i] is None
                continue
            assert module.shape == own[site].shape
            assert module.norms[i] == pytest.approx(np.linalg.norm(own[site]), rel=1e-12)
            assert module.spectra[i] == pytest.approx(spaces(own[site])[1].tolist(), rel=1e-9)
        assert list(module.pairs) == list(itertools.combinations(range(len(folders)), 2))
        for (i, j), pair in module.pairs.items():
            if site in dense[i] or site in dense[j]:
                agrees(pair, of_pair(dense[i].get(site), dense[j].get(site)), signs)
    for (i, j), pair in found.pairs.items():
        whole(pair, dense[i], dense[j])
    return found


def whole(found: compare.Pair, A: dict[str, np.ndarray], B: dict[str, np.ndarray]) -> None:
    """Over all modules: the block diagonal matrix that they make up."""
    sites = sorted(A.keys() | B.keys())
    x, y = (
        np.concatenate([own[s].ravel() if s in own else np.zeros((A | B)[s].size) for s in sites]) for own in (A, B)
    )
    na, nb = np.linalg.norm(x), np.linalg.norm(y)
    assert found.cosine == pytest.approx(x @ y / na / nb, rel=1e-9, abs=1e-12)
    assert found.distance == pytest.approx(np.linalg.norm(x - y) / na, rel=1e-9)
    assert (set(found.only_a), set(found.only_b)) == (A.keys() - B.keys(), B.keys() - A.keys())
    both = A.keys() & B.keys()
    assert found.both == len(both)
    for overlapping, side in (("overlap_out", 0), ("overlap_in", 2)):
        cosines = [
            np.linalg.svd(spaces(A[s])[side].T @ spaces(B[s])[side], compute_uv=False) for s in both
        ]  # of all principal angles
        expected = np.concatenate([c**2 for c in cosines]).mean() if both else None
        assert getattr(found, overlapping) == (None if expected is None else pytest.approx(expected, rel=1e-9))


# Adapters -----------------------------------------------------------------------------------------------


def test_every_number_of_two_adapters(handmade: Handmade, tmp_path: Path) -> None:
    a = handmade(tmp_path / "a", {Q: 2, K: 3, CONV: 2, POINT: 1, EMB: 4}, seed=1)
    b = handmade(tmp_path / "b", {Q: 3, K: 1, CONV: 4, POINT: 2, EMB: 2}, seed=2, scale=3.0)
    found = check([a, b])
    assert found.names == (str(a), str(b))
    assert found.pairs[0, 1].same is None
    assert found.pairs[0, 1].equal == 0


def test_scalings_and_dtypes_count(handmade: Handmade, tmp_path: Path) -> None:
    layers = {Q: 2, K: 3, CONV: 2, EMB: 3}
    check(
        [
            handmade(tmp_path / "a", layers, seed=1, use_rslora=True, lora_alpha=5),
            handmade(tmp_path / "b", layers, seed=2, alpha_pattern={"q": 3, "conv": 7.5}),
            handmade(tmp_path / "c", layers, seed=3, dtype=torch.bfloat16),
            handmade(tmp_path / "d", layers, seed=4, dtype=torch.float16, use_rslora=True),
        ]
    )


def test_without_signs_nothing_else_changes(handmade: Handmade, tmp_path: Path) -> None:
    a, b = (handmade(tmp_path / str(seed), {Q: 2, K: 2, CONV: 3}, seed=seed) for seed in (1, 2))
    check([a, b], signs=False)


def test_modules_that_one_lacks_count_as_zero(handmade: Handmade, tmp_path: Path) -> None:
    a = handmade(tmp_path / "a", {Q: 2, K: 2, CONV: 2}, seed=1)
    b = handmade(tmp_path / "b", {K: 2, EMB: 3}, seed=2)
    c = handmade(tmp_path / "c", {POINT: 1}, seed=3)
    found = check([a, b, c])
    assert found.modules[Q].pairs[0, 1] == compare.Likeness(None, 1.0, 1.0, None, None, None, None, None, None)
    assert found.modules[Q].pairs[1, 2] == compare.Likeness(None, None, 0.0, None, None, None, None, None, None)
    assert found.modules[EMB].pairs[0, 1].distance is None
    assert (found.pairs[0, 2].cosine, found.pairs[0, 2].overlap_in, found.pairs[0, 2].both) == (0.0, None, 0)


def test_ranks_beyond_the_matrix(handmade: Handmade, tmp_path: Path) -> None:
    check([handmade(tmp_path / "a", {Q: 9, K: 8}, seed=1), handmade(tmp_path / "b", {Q: 3, K: 2}, seed=2)])


def test_dependent_columns_are_no_directions(handmade: Handmade, tmp_path: Path) -> None:
    """A rank in the config that the matrix does not have."""

    def repeated(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: t if "lora_A" in key else t[:, :1].expand_as(t).contiguous() for key, t in tensors.items()}

    a = handmade(tmp_path / "a", {Q: 4, K: 3}, seed=1, tensors=repeated)
    b = handmade(tmp_path / "b", {Q: 2, K: 2}, seed=2)
    found = check([a, b])
    assert [len(found.modules[Q].spectra[i] or ()) for i in (0, 1)] == [1, 2]


def test_an_adapter_that_changes_nothing(handmade: Handmade, tmp_path: Path) -> None:
    a = handmade(tmp_path / "a", {Q: 2, K: 3}, seed=1)
    zero = handmade(tmp_path / "zero", {Q: 2, K: 3}, seed=2, scale=0.0)
    other = handmade(tmp_path / "other", {Q: 2, K: 3}, seed=3, scale=0.0)
    found = ah.diff(ah.load(a), ah.load(zero), ah.load(other), signs=True)
    assert found.norms[1:] == (0.0, 0.0)
    for likeness in (found.pairs[0, 1], *(m.pairs[0, 1] for m in found.modules.values())):
        assert (likeness.cosine, likeness.distance, likeness.gap) == (None, 1.0, 1.0)
        assert (likeness.overlap_out, likeness.chance_in, likeness.conflicts) == (None, None, None)
    zeros = found.pairs[1, 2]
    assert (zeros.cosine, zeros.distance, zeros.gap, zeros.same) == (None, None, 0.0, "numbers")
    assert all(m.spectra[1:] == ((), ()) for m in found.modules.values())
    assert "zero changes no weight" in found.pairs[0, 1].advice
    text = json.dumps(found.plain(), allow_nan=False)
    assert "NaN" not in text
    assert found.plain()["pairs"][0]["cosine"] is None


def test_the_same_adapter(handmade: Handmade, tmp_path: Path) -> None:
    layers = {Q: 2, K: 3, CONV: 2, EMB: 2}
    a, b = (handmade(tmp_path / name, layers, seed=1) for name in "ab")
    found = ah.diff(ah.load(a), ah.load(b), signs=True)
    for likeness in (found.pairs[0, 1], *(m.pairs[0, 1] for m in found.modules.values())):
        assert (likeness.same, likeness.distance, likeness.gap, likeness.conflicts) == ("bits", 0.0, 0.0, 0.0)
        assert likeness.cosine == pytest.approx(1, abs=1e-14)
        assert likeness.overlap_in == pytest.approx(1, abs=1e-12)
    assert (found.pairs[0, 1].identical, found.pairs[0, 1].equal) == (4, 4)
    assert found.pairs[0, 1].advice.startswith("the same bit by bit")


def test_equal_numbers_in_other_factors(handmade: Handmade, tmp_path: Path) -> None:
    """Rows of A and columns of B in another order, half the factor at twice the scaling, another dtype."""

    def turned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: (t.flip(0) if "lora_A" in key else t.flip(1) / 2).contiguous() for key, t in tensors.items()}

    a = handmade(tmp_path / "a", {Q: 2, K: 2}, seed=1)
    b = handmade(tmp_path / "b", {Q: 2, K: 2}, seed=1, tensors=turned, lora_alpha=16)
    c = handmade(tmp_path / "c", {Q: 2, K: 2}, seed=1, dtype=torch.float64)
    found = ah.diff(ah.load(a), ah.load(b), ah.load(c))
    assert {pair.same for pair in found.pairs.values()} == {"numbers"}
    assert (found.pairs[0, 1].identical, found.pairs[0, 1].equal) == (0, 2)
    assert (found.pairs[0, 1].distance, found.modules[Q].pairs[0, 1].distance) == (0.0, 0.0)


def test_a_small_difference_keeps_its_digits(handmade: Handmade, tmp_path: Path) -> None:
    """‖A‖² + ‖B‖² − 2⟨A, B⟩ would have none left."""

    def nudged(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: t + 1e-9 * t.flip(-1) if "lora_A" in key else t for key, t in tensors.items()}

    a = handmade(tmp_path / "a", {Q: 2, K: 3}, seed=1, dtype=torch.float64)
    b = handmade(tmp_path / "b", {Q: 2, K: 3}, seed=1, dtype=torch.float64, tensors=lambda t: t)
    tensors = load_file(b / "adapter_model.safetensors")
    from safetensors.torch import save_file

    save_file(nudged(tensors), b / "adapter_model.safetensors")
    A, B = dense_delta(a), dense_delta(b)
    found = ah.diff(ah.load(a), ah.load(b))
    for site, module in found.modules.items():
        expected = float((A[site] - B[site]).norm() / A[site].norm())
        assert 1e-10 < expected < 1e-8
        assert module.pairs[0, 1].distance == pytest.approx(expected, rel=1e-5)
        assert module.pairs[0, 1].same is None


def test_the_order_of_the_adapters_turns_the_pairs_around(handmade: Handmade, tmp_path: Path) -> None:
    a = handmade(tmp_path / "a", {Q: 2, K: 2, CONV: 2}, seed=1)
    b = handmade(tmp_path / "b", {Q: 3, CONV: 1, EMB: 2}, seed=2, scale=2)
    one, other = (ah.diff(*map(ah.load, pair), signs=True) for pair in ((a, b), (b, a)))
    x, y = one.pairs[0, 1], other.pairs[0, 1]
    assert (x.only_a, x.only_b, x.conflicts) == (y.only_b, y.only_a, y.conflicts)
    for key in ("cosine", "gap", "overlap_out", "overlap_in", "chance_out", "chance_in"):
        assert getattr(x, key) == pytest.approx(getattr(y, key), rel=1e-12)
    assert (x.distance or 0) * one.norms[0] == pytest.approx((y.distance or 0) * other.norms[0], rel=1e-12)


def test_sums_are_compared_too(handmade: Handmade, tmp_path: Path) -> None:
    folders = [handmade(tmp_path / name, {Q: 2, K: 2}, seed=seed) for seed, name in enumerate("ab")]
    a, b = map(ah.load, folders)
    A, B = map(dense_delta, folders)
    found = ah.diff(0.7 * a + 0.3 * b, a - b, names=("mean", "difference"), signs=True)
    assert found.names == ("mean", "difference")
    for site, module in found.modules.items():
        agrees(module.pairs[0, 1], of_pair((0.7 * A[site] + 0.3 * B[site]).numpy(), (A[site] - B[site]).numpy()))
    assert ah.diff(a, a, a).names == (str(folders[0]), f"{folders[0]} (2)", f"{folders[0]} (3)")
    assert ah.diff(a, a - a + b).pairs[0, 1].cosine == pytest.approx(ah.diff(a, b).pairs[0, 1].cosine, rel=1e-9)


def test_huge_and_tiny_numbers(handmade: Handmade, tmp_path: Path) -> None:
    def times(factor: float) -> Any:
        return lambda tensors: {key: t.double() * (1 if "lora_A" in key else factor) for key, t in tensors.items()}

    a = handmade(tmp_path / "a", {Q: 2, K: 2}, seed=1, dtype=torch.float64, tensors=times(1e200))
    b = handmade(tmp_path / "b", {Q: 2, K: 2}, seed=2, dtype=torch.float64, tensors=times(1e-200))
    plain = handmade(tmp_path / "plain", {Q: 2, K: 2}, seed=1, dtype=torch.float64)
    other = handmade(tmp_path / "other", {Q: 2, K: 2}, seed=2, dtype=torch.float64)
    found, expected = ah.diff(ah.load(a), ah.load(b)), ah.diff(ah.load(plain), ah.load(other))
    assert found.pairs[0, 1].cosine == pytest.approx(expected.pairs[0, 1].cosine, rel=1e-9)
    assert found.pairs[0, 1].overlap_in == pytest.approx(expected.pairs[0, 1].overlap_in, rel=1e-9)
    backwards = ah.diff(ah.load(b), ah.load(a)).plain()["pairs"][0]
    assert backwards["distance"] is None  # infinite
    assert backwards["cosine"] == pytest.approx(expected.pairs[0, 1].cosine, rel=1e-9)


# Deltas of other forms ----------------------------------------------------------------------------------


def deltas(shape: tuple[int, ...], seed: int) -> list[Delta]:
    rng = torch.Generator().manual_seed(seed)
    low = LowRank(
        torch.randn(*shape[:-1], 2, generator=rng).double(),
        torch.randn(*shape[:-2], 2, shape[-1], generator=rng).double(),
        -1.5,
    )
    dense = Dense(torch.randn(shape, generator=rng, dtype=torch.float64))
    if len(shape) > 2:
        return [low, dense]
    index = torch.randperm(math.prod(shape), generator=rng)[:9]
    return [low, dense, Sparse(index, torch.randn(9, generator=rng).double(), shape)]


@pytest.mark.parametrize("entries", [1, 20, 10**6])
def test_every_form_of_delta(monkeypatch: pytest.MonkeyPatch, entries: int) -> None:
    monkeypatch.setattr(compare, "_ENTRIES", entries)
    found = deltas((7, 5), 1) + deltas((7, 5), 2)
    before = [delta.dense().clone() for delta in found]
    module = compare._compare("linear", (7, 5), [Piece(delta) for delta in found], True).module
    for (i, j), pair in module.pairs.items():
        A, B = (found[k].dense().double().numpy() for k in (i, j))
        expected = of_pair(A, B)
        changed = (A != 0) & (B != 0)  # the oracle's share above takes it that nothing is zero
        expected["conflicts"] = float(np.mean(np.sign(A[changed]) != np.sign(B[changed]))) if changed.any() else None
        agrees(pair, expected)
    assert all(torch.equal(delta.dense(), old) for delta, old in zip(found, before, strict=True))


def block_diagonal(W: np.ndarray) -> np.ndarray:
    n, height, width = W.shape
    found = np.zeros((n, height, n, width))
    found[np.arange(n), :, np.arange(n), :] = W
    return found.reshape(n * height, n * width)


def test_a_delta_for_each_expert_is_a_block_diagonal_one() -> None:
    shape = (3, 6, 8)
    found = deltas(shape, 1) + deltas(shape, 2)
    module = compare._compare("linear", (6, 8), [Piece(delta) for delta in found], True).module
    for (i, j), pair in module.pairs.items():
        A, B = (found[k].dense().double().numpy() for k in (i, j))
        blocks = [
            np.block([[W[i] if i == j else np.zeros(shape[1:]) for j in range(3)] for i in range(3)]) for W in (A, B)
        ]
        expected = of_pair(*blocks)
        expected["conflicts"] = float(np.mean(np.sign(A) != np.sign(B)))
        agrees(pair, expected)


def test_chance_is_the_mean_of_random_spaces() -> None:
    rng = torch.Generator().manual_seed(0)
    pairs = []
    for _ in range(300):
        a, b = (LowRank(torch.randn(12, r, generator=rng), torch.randn(r, 20, generator=rng)) for r in (2, 5))
        pairs.append(compare._compare("linear", (12, 20), [Piece(a), Piece(b)], False).module.pairs[0, 1])
    for side in ("out", "in"):
        mean = np.mean([getattr(pair, f"overlap_{side}") for pair in pairs])
        assert mean == pytest.approx(getattr(pairs[0], f"chance_{side}"), rel=0.1)


# Biases and whole values --------------------------------------------------------------------------------


def with_bias(folder: Path, seed: int, bias: float) -> ah.Adapter:
    torch.manual_seed(seed)
    model = nn.ModuleDict({"q": nn.Linear(7, 5), "k": nn.Linear(5, 11)})
    adapters = ah.adapt(model)
    adapters.add("a", ah.method("lora", rank=2, lora_bias=True), ["q", "k"])
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.copy_(torch.full_like(p, bias) if "bias" in name else torch.randn(p.shape, generator=rng))
    adapters.save("a", folder)
    return ah.load(folder)


def test_biases_are_reported_apart(tmp_path: Path) -> None:
    a, b = with_bias(tmp_path / "a", 1, 0.5), with_bias(tmp_path / "b", 1, 0.25)
    c = with_bias(tmp_path / "c", 1, 0.5)
    scale = 4.0  # alpha / rank at the defaults
    found = ah.diff(a, b, c, any_base=True)
    q, k = found.modules["q"], found.modules["k"]
    assert q.bias_norms[0] == pytest.approx(scale * 0.5 * math.sqrt(5))
    assert k.bias_norms[1] == pytest.approx(scale * 0.25 * math.sqrt(11))
    assert found.bias_norms[0] == pytest.approx(scale * 0.5 * math.sqrt(16))
    assert (found.pairs[0, 1].distance, found.pairs[0, 1].same) == (0.0, None)  # the same ΔW, other biases
    assert (found.pairs[0, 2].distance, found.pairs[0, 2].same) == (0.0, "bits")


def test_whole_values_are_named_and_not_compared(handmade: Handmade, tmp_path: Path) -> None:
    def heads(value: float) -> Any:
        return lambda tensors: {**tensors, "base_model.model.net.head.weight": torch.full((3, 4), value)}

    a, b = (handmade(tmp_path / str(v), {Q: 2}, seed=1, tensors=heads(v), modules_to_save=["head"]) for v in (1.0, 2.0))
    found = ah.diff(ah.load(a), ah.load(b))
    assert [len(kept) for kept in found.kept] == [1, 1]
    assert "head" in found.kept[0][0]
    assert found.plain()["adapters"][0]["kept"] == list(found.kept[0])


# Refusals -----------------------------------------------------------------------------------------------


def test_refusals(handmade: Handmade, tmp_path: Path) -> None:
    a = ah.load(handmade(tmp_path / "a", {Q: 2}, seed=1, base_model_name_or_path="one/base"))
    b = ah.load(handmade(tmp_path / "b", {Q: 2}, seed=2, base_model_name_or_path="other/model"))
    with pytest.raises(ah.ConfigError, match="1 adapters"):
        ah.diff(a)
    with pytest.raises(ah.ConfigError, match="1 names for 2"):
        ah.diff(a, b, names=["x"])
    with pytest.raises(ah.NotMergeable, match="--any-base"):
        ah.diff(a, b)
    assert ah.diff(a, b, any_base=True).pairs[0, 1].cosine is not None

    def wider(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: torch.cat([t, t], 1) if "lora_A" in key else t for key, t in tensors.items()}

    wide = ah.load(handmade(tmp_path / "wide", {Q: 2}, tensors=wider))
    with pytest.raises(ah.NotMergeable, match="of one base model"):
        ah.diff(a, wide)


@pytest.mark.parametrize(("name", "words"), [("dora", "depends on the base weights"), ("ia3", "base weights|no sums")])
def test_methods_without_a_delta_are_refused(tmp_path: Path, name: str, words: str) -> None:
    model = nn.ModuleDict({"down_proj": nn.Linear(7, 5), "up_proj": nn.Linear(5, 11, bias=False)})
    adapters = ah.adapt(model)
    adapters.add("a", ah.method(name), ["down_proj", "up_proj"])
    adapters.save("a", tmp_path / "a")
    one = ah.load(tmp_path / "a")
    with pytest.raises(ah.NotMergeable, match=words):
        ah.diff(one, one)


# Advice -------------------------------------------------------------------------------------------------


def likeness(**changes: Any) -> compare.Likeness:
    numbers: dict[str, Any] = {
        "cosine": 0.0, "distance": 1.4, "gap": 0.7, "overlap_out": 0.1, "overlap_in": 0.1,
        "chance_out": 0.1, "chance_in": 0.1, "conflicts": None, "same": None,
    }  # fmt: skip
    return compare.Likeness(**(numbers | changes))


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (likeness(), "no interference is seen"),
        (likeness(cosine=-0.1), "pull against each other (cosine -0.10)"),
        (likeness(cosine=-0.0999), "no interference is seen"),
        (likeness(cosine=0.5), "largely agree"),
        (likeness(cosine=0.3), "larger than either had it"),
        (likeness(cosine=0.3, overlap_out=0.7), "they use the same output directions (overlap 0.70, by chance 0.10)"),
        (
            likeness(overlap_in=0.5),
            "same input directions (overlap 0.50, by chance 0.10, as adapters from one seed do)",
        ),
        (likeness(overlap_in=0.3, overlap_out=0.8), "same output directions"),
        (likeness(overlap_out=0.9, overlap_in=0.9), "one seed do) and output directions (overlap 0.90"),
        (likeness(overlap_in=1.0, chance_in=1.0), "no interference is seen"),
        (likeness(same="bits", cosine=1.0), "the same bit by bit"),
        (likeness(same="numbers", cosine=1.0), "the same in every number"),
    ],
)
def test_advice(found: compare.Likeness, words: str) -> None:
    said = advice(found, 1.0, 2.0, "one", "two", 3)
    assert words in said
    assert "times as large" not in said


def test_advice_on_size_and_on_nothing_in_common() -> None:
    assert advice(likeness(), 1.0, 5.0, "one", "two", 3).endswith(
        "two is 5 times as large as one: equal weights favour it"
    )
    assert "times" not in advice(likeness(), 1.0, 3.9, "one", "two", 3)
    assert "no module in common" in advice(likeness(overlap_in=None, overlap_out=None), 1.0, 1.0, "one", "two", 0)
    assert "one and two changes" not in advice(likeness(cosine=None), 0.0, 1.0, "one", "two", 3)
    assert "one changes no weight" in advice(likeness(cosine=None), 0.0, 1.0, "one", "two", 3)


def test_progress_comes_to_its_end(handmade: Handmade, tmp_path: Path) -> None:
    a = ah.load(handmade(tmp_path / "a", {Q: 2, K: 2, EMB: 2}))
    steps: list[tuple[int, int]] = []
    ah.diff(a, a, progress=lambda done, total: steps.append((done, total)))
    assert steps == [(1, 3), (2, 3), (3, 3)]
