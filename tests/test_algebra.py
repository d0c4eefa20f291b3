"""Arithmetic of deltas against dense float64 matrices, and against fractions where float64 is too coarse."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adapterhub_lite import algebra
from adapterhub_lite.algebra import inner, low_rank, norm, rounded, spectrum, total, truncate
from adapterhub_lite.delta import Delta, Dense, LowRank, Sparse
from adapterhub_lite.errors import ConfigError, NotMergeable

if TYPE_CHECKING:
    from collections.abc import Callable

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SCALES = (1.0, -1.7, 0.25, 0.0, 1e-30)
QUICK = settings(max_examples=60, deadline=None)


def f64(delta: Delta) -> torch.Tensor:
    """The matrix in float64, by the definition of each kind."""
    if isinstance(delta, LowRank):
        return delta.scale * (delta.B.double() @ delta.A.double())
    if isinstance(delta, Sparse):
        flat = torch.zeros(math.prod(delta.shape), dtype=torch.float64)
        for position, value in zip(delta.index.tolist(), delta.values.double().tolist(), strict=True):
            flat[position] += value
        return flat.reshape(delta.shape)
    return delta.W.double()


def size(delta: Delta) -> float:
    """The sum of the norms of the rank-one parts: what rounding errors are measured in."""
    if isinstance(delta, LowRank):
        lengths = delta.B.double().norm(dim=-2) * delta.A.double().norm(dim=-1)
        return abs(delta.scale) * lengths.sum().item()
    return f64(delta).norm().item()


def factors(shape: tuple[int, ...], rank: int, seed: int = 0, scale: float = 1.0, dtype: Any = None) -> LowRank:
    """A LowRank of random factors."""
    rng = torch.Generator().manual_seed(seed)
    B = torch.randn(*shape[:-2], shape[-2], rank, generator=rng, dtype=torch.float64)
    A = torch.randn(*shape[:-2], rank, shape[-1], generator=rng, dtype=torch.float64)
    return LowRank(B.to(dtype or B.dtype), A.to(dtype or A.dtype), scale)


@st.composite
def shapes(draw: st.DrawFn, batch: bool = True) -> tuple[int, ...]:
    matrix = (draw(st.integers(1, 7)), draw(st.integers(1, 7)))
    return (*draw(st.sampled_from([(), (), (2,), (2, 3)])), *matrix) if batch else matrix


@st.composite
def deltas(draw: st.DrawFn, shape: tuple[int, ...], kinds: tuple[type, ...] = (LowRank, Sparse, Dense)) -> Delta:
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kind = draw(st.sampled_from([k for k in kinds if len(shape) == 2 or k is not Sparse]))
    dtype, other = draw(st.sampled_from(FLOATS)), draw(st.sampled_from(FLOATS))
    if kind is LowRank:
        rank = draw(st.integers(0, min(shape[-2:]) + 2))
        B = torch.randn(*shape[:-1], rank, generator=rng).to(dtype)
        A = torch.randn(*shape[:-2], rank, shape[-1], generator=rng).to(other)
        return LowRank(B, A, draw(st.sampled_from(SCALES)))
    if kind is Sparse:
        count = draw(st.integers(0, math.prod(shape)))
        index = torch.randperm(math.prod(shape), generator=rng)[:count]
        return Sparse(index, torch.randn(count, generator=rng).to(dtype), shape)
    return Dense(torch.randn(*shape, generator=rng).to(dtype))


def same(x: torch.Tensor, y: torch.Tensor, within: float, relative: float = 1e-14) -> None:
    assert x.shape == y.shape
    assert x.numel() == 0 or (x - y).abs().max().item() <= relative * within


# --- sum ---------------------------------------------------------------------------------


@QUICK
@given(st.data())
def test_a_total_is_the_sum_of_the_matrices(data: st.DataObject) -> None:
    shape = data.draw(shapes())
    parts = data.draw(st.lists(deltas(shape), min_size=1, max_size=4))
    result = total(parts)
    same(f64(result), sum(f64(part) for part in parts), sum(map(size, parts)))
    assert result.shape == shape
    if all(isinstance(part, Sparse) for part in parts):
        assert isinstance(result, Sparse)
        assert torch.equal(result.index, result.index.unique())
    elif all(isinstance(part, LowRank) for part in parts):
        rank = sum(part.rank for part in parts)
        assert isinstance(result, LowRank if rank <= min(shape[-2:]) else Dense)
    else:
        assert isinstance(result, Dense)


def test_a_total_of_equal_scale_and_dtype_keeps_the_stored_bits() -> None:
    a, b = (factors((9, 8), rank, rank, -0.3, torch.bfloat16) for rank in (2, 3))
    result = total([a, b])
    assert isinstance(result, LowRank)
    assert (result.scale, result.B.dtype, result.A.dtype) == (-0.3, torch.bfloat16, torch.bfloat16)
    assert torch.equal(result.B, torch.cat([a.B, b.B], 1))
    assert torch.equal(result.A, torch.cat([a.A, b.A], 0))


@pytest.mark.parametrize(
    "other",
    [
        factors((9, 8), 3, 1, 0.1, torch.bfloat16),
        factors((9, 8), 3, 1, -0.3, torch.float16),
        LowRank(torch.ones(9, 3, dtype=torch.bfloat16), torch.ones(3, 8), -0.3),
    ],
    ids=["scale", "dtype", "mixed"],
)
def test_any_other_total_has_the_scales_multiplied_into_b_in_float64(other: LowRank) -> None:
    a = factors((9, 8), 2, 0, -0.3, torch.bfloat16)
    result = total([a, other])
    assert isinstance(result, LowRank)
    shared = torch.bfloat16 if other.A.dtype == torch.bfloat16 else torch.float64
    assert (result.scale, result.B.dtype, result.A.dtype) == (1.0, torch.float64, shared)
    assert torch.equal(result.B, torch.cat([-0.3 * a.B.double(), other.scale * other.B.double()], 1))
    assert torch.equal(result.A.double(), torch.cat([a.A.double(), other.A.double()]))


def test_a_total_needs_parts_of_one_shape() -> None:
    with pytest.raises(ConfigError, match="no deltas"):
        total([])
    with pytest.raises(NotMergeable, match=r"\(3, 4\) and \(4, 3\)"):
        total([factors((3, 4), 1), factors((4, 3), 1)])
    with pytest.raises(NotMergeable):
        inner(factors((3, 1), 1), factors((3, 4), 1))  # would broadcast


@QUICK
@given(st.data())
def test_low_rank_is_exact_and_of_the_lower_rank(data: st.DataObject) -> None:
    shape = data.draw(shapes())
    x = data.draw(deltas(shape))
    result = low_rank(x)
    if isinstance(x, LowRank):
        assert result is x
    else:
        assert torch.equal(f64(result), f64(x))
        assert (result.rank, result.shape) == (min(shape[-2:]), shape)


# --- inner product and norm --------------------------------------------------------------


@QUICK
@given(st.data())
def test_inner_and_norm_agree_with_the_matrices(data: st.DataObject) -> None:
    shape = data.draw(shapes())
    x, y = data.draw(deltas(shape)), data.draw(deltas(shape))
    assert inner(x, y) == pytest.approx((f64(x) * f64(y)).sum().item(), rel=0, abs=1e-14 * size(x) * size(y))
    assert inner(x, y) == pytest.approx(inner(y, x), rel=0, abs=1e-14 * size(x) * size(y))
    assert norm(x) == pytest.approx(f64(x).norm().item(), rel=0, abs=1e-14 * size(x))


def test_inner_of_sparse_and_low_rank_goes_over_the_positions_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(algebra, "_GATHER", 10)
    x, y = factors((6, 9), 3), Sparse(torch.arange(0, 54, 2), torch.arange(27.0), (6, 9))
    assert inner(x, y) == pytest.approx((f64(x) * f64(y)).sum().item(), rel=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_norm_of_an_exact_cancellation_is_zero_to_the_last_digits(dtype: torch.dtype) -> None:
    a, b = factors((300, 200), 16, 1, 0.7, dtype), factors((300, 200), 8, 2, 0.1, dtype)
    for parts in ([a, a.scaled(-1.0)], [a, b, a.scaled(-1.0), b.scaled(-1.0)]):
        assert norm(total(parts)) <= 1e-14 * sum(map(size, parts))


@pytest.mark.parametrize("exponent", [-10, -20, -30])
def test_the_norm_of_a_small_difference_is_accurate(exponent: int) -> None:
    B, A = torch.randn(300, 1).double(), torch.randint(-8, 8, (1, 200)).double()
    difference = total([LowRank(B, A * (1 + 2.0**exponent)), LowRank(B, -A)])
    expected = 2.0**exponent * B.norm().item() * A.norm().item()
    assert norm(difference) == pytest.approx(expected, rel=1e-14 * 2.0**-exponent)


def test_large_factors_of_a_small_product_are_no_cancellation(monkeypatch: pytest.MonkeyPatch) -> None:
    # As in [ΔB, B]·[A; ΔA], which every rounding gives: the slow way is not taken for it.
    monkeypatch.delattr(torch.linalg, "qr")
    x = LowRank(
        torch.cat([1e-9 * torch.eye(40, 5).double(), torch.eye(40, 5).double()], 1),
        torch.cat([torch.eye(5, 30).double(), 1e-9 * torch.eye(5, 30).double()], 0),
    )
    assert norm(x) == pytest.approx(2e-9 * math.sqrt(5), rel=1e-13)


# --- spectrum and truncation -------------------------------------------------------------


@QUICK
@given(st.data())
def test_the_spectrum_is_that_of_the_matrix(data: st.DataObject) -> None:
    x = data.draw(deltas(data.draw(shapes())))
    expected = torch.linalg.svdvals(f64(x))
    if isinstance(x, LowRank):
        expected = expected[..., : x.rank]
    same(spectrum(x), expected, size(x))


@QUICK
@given(st.data())
def test_truncation_is_optimal_and_its_parts_add_up(data: st.DataObject) -> None:
    shape = data.draw(shapes())
    x, rank = data.draw(deltas(shape)), data.draw(st.integers(0, 8))
    full = min(shape[-2:]) if not isinstance(x, LowRank) else min(x.rank, *shape[-2:])
    kept, dropped = truncate(x, rank)
    assert kept.rank == min(rank, full)
    assert kept.shape == dropped.shape == shape
    factored = [part for part in (kept, dropped) if isinstance(part, LowRank)]
    if isinstance(x, LowRank) and x.rank <= min(shape[-2:]):  # else the rest is written out, unless it is nothing
        assert [part.rank for part in factored] == [kept.rank, full - kept.rank]
    assert all(part.scale == 1.0 for part in factored)
    assert {t.dtype for part in (kept, dropped) for t in part if isinstance(t, torch.Tensor)} == {torch.float64}
    same(f64(kept) + f64(dropped), f64(x), size(x), 1e-13)
    best = torch.linalg.svdvals(f64(x))[..., kept.rank :].norm(dim=-1)
    same((f64(x) - f64(kept)).flatten(-2).norm(dim=-1), best, size(x), 1e-13)
    for part in factored:
        same(part.B.mT @ part.B, part.A @ part.A.mT, size(x), 1e-12)  # balanced, and
        same(part.B.mT @ part.B, torch.diag_embed((part.B**2).sum(-2)), size(x), 1e-12)  # orthogonal


def test_truncation_depends_on_the_matrix_and_not_on_its_factors() -> None:
    x = factors((40, 30), 6, scale=-0.5)
    mix = factors((6, 6), 6, 3).B
    other = LowRank(-3.0 * x.B @ mix, torch.linalg.solve(mix, x.A), x.scale / -3.0)
    for part, again in zip(truncate(x, 4), truncate(other, 4), strict=True):
        assert isinstance(part, LowRank)
        assert isinstance(again, LowRank)
        same(part.B, again.B, size(x), 1e-12)
        same(part.A, again.A, size(x), 1e-12)
    for part in (*truncate(x, 4), truncate(Dense(f64(x)), 4)[0]):
        assert isinstance(part, LowRank)
        largest = part.B.gather(0, part.B.abs().argmax(0, keepdim=True))
        assert (largest > 0).all()


def test_a_repeated_truncation_gives_the_same_bits() -> None:
    x = factors((70, 50), 9, dtype=torch.bfloat16)
    for part, again in zip(truncate(x, 4), truncate(x, 4), strict=True):
        assert isinstance(part, LowRank)
        assert isinstance(again, LowRank)
        assert torch.equal(part.B, again.B)
        assert torch.equal(part.A, again.A)


def test_truncated_factors_can_be_stored() -> None:
    tensors = [t for part in truncate(factors((20, 30), 5), 2) for t in (part.B, part.A)]
    assert all(t.is_contiguous() for t in tensors)
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == 4


def ill_conditioned(condition: float) -> LowRank:
    """Factors of 200 × 12 and 12 × 150 with singular values from 1 to 1 / condition."""
    x = factors((200, 150), 12, 5)
    spread = torch.logspace(0, -math.log10(condition), 12, dtype=torch.float64) if condition else torch.zeros(12)
    turn = torch.linalg.qr(factors((12, 12), 12, 6).B).Q
    B, A = torch.linalg.qr(x.B).Q * spread @ turn, turn.mT * spread @ torch.linalg.qr(x.A.mT).Q.mT
    return LowRank(B, A, 3.0)


@pytest.mark.parametrize(
    ("condition", "passes", "householder"),
    [(2, 2, 0), (1e4, 4, 0), (1e7, 2, 2), (1e12, 2, 2), (0, 2, 2)],
    ids=["one pass", "two passes", "nearly dependent", "dependent", "zero"],
)
def test_every_way_to_orthogonalize_is_as_accurate(
    condition: float, passes: int, householder: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, calls = ill_conditioned(condition), {"cholesky_ex": 0, "qr": 0}
    best = torch.linalg.svdvals(f64(x))[5:].norm().item()
    for name in calls:
        monkeypatch.setattr(torch.linalg, name, counted(getattr(torch.linalg, name), name, calls))
    kept, dropped = truncate(x, 5)
    assert calls == {"cholesky_ex": passes, "qr": householder}
    same(f64(kept) + f64(dropped), f64(x), size(x))
    assert (f64(x) - f64(kept)).norm().item() == pytest.approx(best, rel=0, abs=1e-14 * size(x))
    assert norm(dropped) == pytest.approx(best, rel=0, abs=1e-14 * size(x))


def counted(function: Callable[..., Any], name: str, calls: dict[str, int]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        calls[name] += 1
        return function(*args, **kwargs)

    return call


def test_dependent_columns_in_one_of_several_experts() -> None:
    x = factors((3, 30, 20), 4)
    x.B[1, :, 2] = x.B[1, :, 0]
    x.B[2] = 0
    kept, dropped = truncate(x, 3)
    same(f64(kept) + f64(dropped), f64(x), size(x))
    assert norm(LowRank(dropped.B[1:], dropped.A[1:])) <= 1e-14 * size(x)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("as_kind", [low_rank, lambda x: Dense(f64(x))], ids=["LowRank", "Dense"])
def test_what_is_not_finite_is_refused(bad: float, as_kind: Callable[[Delta], Delta]) -> None:
    x = factors((6, 5), 2)
    x.B[1, 1] = bad
    for compute in (spectrum, lambda d: truncate(d, 1)):
        with pytest.raises(NotMergeable, match="not finite"):
            compute(as_kind(x))
    assert not math.isfinite(norm(as_kind(x)))
    with pytest.raises(NotMergeable, match="not finite"):
        rounded(x, torch.float32)


def test_a_negative_rank_is_refused() -> None:
    with pytest.raises(ConfigError, match="-1"):
        truncate(factors((4, 3), 2), -1)


# --- rounding ----------------------------------------------------------------------------


def fractions(x: LowRank) -> list[list[Fraction]]:
    """The matrix without any rounding."""
    B, A = x.B.double().tolist(), x.A.double().tolist()
    columns = list(zip(*A, strict=True))
    return [
        [Fraction(x.scale) * sum(Fraction(b) * Fraction(a) for b, a in zip(row, c, strict=True)) for c in columns]
        for row in B
    ]


@pytest.mark.parametrize("scale", [1.0, -0.3, 1e-4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_rounding_loses_is_known_to_the_last_digits(dtype: torch.dtype, scale: float) -> None:
    x = LowRank(*factors((5, 4), 3, 7)[:2], scale)
    x = x._replace(B=x.B.float().double() if scale == 1.0 else x.B)
    folded = LowRank(scale * x.B, x.A)  # the scale goes into B in float64, before all else
    stored, lost = rounded(x, dtype)
    assert (stored.B.dtype, stored.A.dtype, stored.scale) == (dtype, dtype, 1.0)
    for got, new, old in zip(fractions(lost), fractions(stored), fractions(folded), strict=True):
        for g, n, o in zip(got, new, old, strict=True):
            assert abs(g - (n - o)) <= Fraction(1e-12) * abs(n - o) + Fraction(1e-12) * Fraction(norm(lost))


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 8), (torch.float16, 11), (torch.float32, 24)])
def test_factors_are_rounded_once(dtype: torch.dtype, bits: int) -> None:
    # Just above a tie, where rounding to float32 first would make it one, and lose it to the even side.
    above_tie = 1 + 2.0**-bits + 2.0**-45
    values = torch.tensor([above_tie, -above_tie, 2 - above_tie, 1 + 2.0**-bits, 1 + 3 * 2.0**-bits, 1e-3, 0.0])
    values = torch.cat([values.double(), factors((500, 1), 1).B[:, 0]])
    values[:3] = torch.tensor([above_tie, -above_tie, 2 - above_tie], dtype=torch.float64)
    stored, _ = rounded(LowRank(values[:, None], torch.ones(1, 2)), dtype)
    ulp = 2.0 ** -(bits - 1)
    assert stored.B[:2, 0].tolist() == [1 + ulp, -1 - ulp]
    assert stored.B[3:5, 0].tolist() == [1.0, 1 + 2 * ulp]  # true ties go to even
    half = 0.5 * ulp * torch.exp2(torch.floor(torch.log2(values.abs())))
    assert ((stored.B[:, 0].double() - values).abs() <= half).all()


def test_the_scale_is_multiplied_in_before_the_rounding() -> None:
    B = torch.tensor([[1.0], [3.0], [5.0]], dtype=torch.bfloat16)
    stored, _ = rounded(LowRank(B, torch.ones(1, 2), 1 / 3), torch.bfloat16)
    assert torch.equal(stored.B, torch.tensor([[1 / 3], [1.0], [5 / 3]], dtype=torch.bfloat16))


def test_a_half_that_rounds_exactly_is_left_out() -> None:
    exact, inexact = torch.ones(4, 2), torch.full((4, 2), 1 / 3)
    assert rounded(LowRank(exact, exact.T), torch.bfloat16)[1].rank == 0
    assert rounded(LowRank(exact, inexact.T), torch.bfloat16)[1].rank == 2
    assert rounded(LowRank(inexact, exact.T), torch.bfloat16)[1].rank == 2
    assert rounded(LowRank(inexact, inexact.T), torch.bfloat16)[1].rank == 4


def test_rounding_refuses_what_cannot_hold_the_factors() -> None:
    with pytest.raises(NotMergeable, match="float16"):
        rounded(LowRank(torch.full((3, 1), 7e4), torch.ones(1, 2)), torch.float16)
    for bad in (math.nan, math.inf):  # an infinity rounds to itself, without any loss
        for B, A in ((torch.tensor([[bad], [1.0]]), torch.ones(1, 2)), (torch.ones(2, 1), torch.tensor([[1.0, bad]]))):
            with pytest.raises(NotMergeable, match="not finite"):
                rounded(LowRank(B, A), torch.bfloat16)
    with pytest.raises(ConfigError, match="int8"):
        rounded(factors((3, 2), 1), torch.int8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rank", [0, 5, 16, 40])
def test_the_error_of_truncation_and_rounding_together(dtype: torch.dtype, rank: int) -> None:
    parts = [factors((90, 70), 12, seed, weight, torch.bfloat16) for seed, weight in ((1, 0.7), (2, 0.5), (3, -0.4))]
    x = total(parts)
    kept, dropped = truncate(x, rank)
    stored, lost = rounded(kept, dtype)
    error = norm(total([dropped, lost.scaled(-1.0)]))
    expected = (f64(x) - f64(stored)).norm().item()
    # The oracle subtracts matrices, so where only a float32 rounding is left it has fewer digits itself.
    assert error == pytest.approx(expected, rel=1e-12, abs=1e-15 * size(x) if rank > 36 else 0)
    assert expected > 0


# --- all of them -------------------------------------------------------------------------


def every_function(x: LowRank) -> list[Any]:
    small = min(x.rank, 2)
    return [
        total([x, x]), total([x, x.scaled(2.0)]), low_rank(Dense(x.A)), inner(x, x.scaled(0.5)), norm(x),
        norm(total([x, x.scaled(-1.0)])), spectrum(x), truncate(x, small), rounded(x, torch.bfloat16),
    ]  # fmt: skip


class Largest(TorchDispatchMode):
    """Watches how large the tensors get."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out


def test_a_low_rank_delta_is_never_written_out() -> None:
    x = factors((20_000, 20_000), 4, dtype=torch.bfloat16)
    with Largest() as largest:
        results = every_function(x)
        inner(x, Sparse(torch.arange(0, 400_000_000, 40_000_001), torch.ones(10), (20_000, 20_000)))
    assert len(results) == 9
    assert 80_000 <= largest.numel <= 20_000 * 20


def test_more_rank_than_the_matrix_has_is_written_out() -> None:
    x = factors((3, 4), 500)
    with Largest() as largest:
        total([x, x]), norm(x), spectrum(x), truncate(x, 2)
    assert largest.numel <= 500 * 4


@pytest.mark.parametrize("shape", [(6, 5), (2, 6, 5), (5, 1)])
def test_rank_zero_is_a_delta_like_any_other(shape: tuple[int, ...]) -> None:
    zero, x = factors(shape, 0), factors(shape, 1, scale=0.3)
    assert norm(zero) == inner(zero, x) == inner(x, zero) == inner(zero, Dense(f64(x))) == 0.0
    assert spectrum(zero).shape == (*shape[:-2], 0)
    for part in (*truncate(zero, 3), *rounded(zero, torch.bfloat16), total([zero, zero])):
        assert (part.rank, part.shape) == (0, shape)
    assert torch.equal(f64(total([zero, x])), f64(x))
    assert torch.equal(f64(total([zero, Dense(f64(x))])), f64(x))
    assert inner(zero, Sparse(torch.tensor([1]), torch.ones(1), shape[-2:])) == 0.0 if len(shape) == 2 else True


def test_arguments_stay_as_they_are_and_no_gradient_is_recorded() -> None:
    x = factors((30, 20), 4, scale=0.5)
    dense, sparse = Dense(f64(x)), Sparse(torch.tensor([3, 1]), torch.tensor([1.0, 2.0]).double(), (30, 20))
    inputs = [x.B.requires_grad_(), x.A.requires_grad_(), dense.W, sparse.index, sparse.values]
    before = [(t.detach().clone(), t._version) for t in inputs]
    results = [
        low_rank(Dense(x.A)), every_function(x._replace(scale=1.0)), every_function(x),
        truncate(dense, 2), truncate(sparse, 2),
        total([dense, x, sparse]), total([sparse, sparse]), total([dense]), inner(sparse, sparse),
        rounded(x, torch.float64),
    ]  # fmt: skip
    for tensor, (copy, version) in zip(inputs, before, strict=True):
        assert torch.equal(tensor, copy)
        assert tensor._version == version
    assert not any(t.requires_grad for t in tree_leaves(results) if isinstance(t, torch.Tensor))


def test_factors_of_any_stride_are_taken() -> None:
    x = factors((20, 30), 4)
    y = LowRank(x.A.T, x.B.T, x.scale)  # a tied embedding's delta, seen from the head
    for part, again in zip(truncate(x, 2), truncate(y, 2), strict=True):
        same(f64(part), f64(again).T, size(x))
    assert torch.equal(rounded(y, torch.bfloat16)[0].B, x.A.T.bfloat16())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_deltas_on_an_accelerator_stay_there() -> None:
    x = factors((90, 70), 8, scale=0.5, dtype=torch.bfloat16)
    y = LowRank(x.B.cuda(), x.A.cuda(), x.scale)
    assert norm(y) == pytest.approx(norm(x), rel=1e-12)
    same(spectrum(y).cpu(), spectrum(x), size(x))
    for part, again in zip(truncate(y, 3), truncate(x, 3), strict=True):
        assert part.B.is_cuda
        same(f64(part).cpu(), f64(again), size(x), 1e-13)
    for tensor, again in zip(rounded(y, torch.bfloat16)[0][:2], rounded(x, torch.bfloat16)[0][:2], strict=True):
        assert torch.equal(tensor.cpu(), again)
    values = torch.ones(2, device="cuda")
    mixed = total([y, Sparse(torch.tensor([1, 5], device="cuda"), values, (90, 70))])
    assert mixed.dense().is_cuda
