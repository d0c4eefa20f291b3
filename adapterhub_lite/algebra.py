"""What can be computed with deltas: sum, inner product, norm, spectrum, SVD, size, optimal truncation, rounding.

Every function is pure, but for `negated`: it changes no argument and records no gradient. Whatever the
dtype of the inputs, the arithmetic and the results are float64; only `total` and `rounded`
keep the dtype of a factor, where nothing was computed. A matrix (out, in) is written
out only where a delta has no smaller form.

For a low-rank delta s·BA, absolute errors below are in units of its size
S = |s| Σᵢ ‖bᵢ‖ ‖aᵢ‖, summed over the columns of B and the rows of A. It equals the
norm where nothing cancels, and nothing that starts from the factors can resolve less
than about 1e-16 · S.
"""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING, NamedTuple, TypeGuard

import torch
from torch import Tensor

from adapterhub_lite import krylov, rounding
from adapterhub_lite.delta import Delta, Dense, LowRank, Sparse
from adapterhub_lite.errors import ConfigError, NotMergeable

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

# Below this share of S², the squared norm from Gram matrices has lost too many digits.
_CANCELLED = 1e-4

# Below this share of S, float64 cannot tell a norm from zero.
_NOISE = 1e-14

# Ranks that `total` collects before it adds them to a matrix that is written out.
_AT_ONCE = 128

# Gathered rows and columns held at once by `inner(Sparse, LowRank)`: 32 MiB of float64.
_GATHER = 1 << 22

# How far the columns of a factor may be from orthogonal for the passes of `qr`.
_ONE_PASS, _TWO_PASSES = 32.0, 1e6

_ROWS = torch.contiguous_format


@torch.no_grad()
def total(deltas: Iterable[Delta]) -> Delta:
    """The exact sum. Deltas are taken one by one, and forgotten once the matrix is the smaller form.

    Low-rank deltas are summed by placing their factors side by side. If all have one
    dtype and one scale, the sum keeps both, and the stored bits; otherwise the scales are
    multiplied into B, in float64, and the A's keep a dtype that they share. Sparse deltas
    give a Sparse one, its index sorted. Anything mixed, and low-rank deltas whose ranks add
    up to more than min(out, in), is written out.

    >>> B, A = torch.ones(5, 1), torch.ones(1, 4)
    >>> both = total([LowRank(B, A, 2.0), LowRank(B, A, -0.5)])
    >>> both.shape, both.rank, both.dense().unique().tolist()
    ((5, 4), 2, [1.5])
    """
    parts: list[Delta] = []  # while they are smaller than the matrix
    written: Tensor | None = None
    shape: tuple[int, ...] | None = None
    rank = 0  # of the low-rank ones among the parts
    for delta in deltas:
        _same_shape(shape or delta.shape, delta.shape)
        shape = delta.shape
        parts.append(delta)
        if isinstance(delta, LowRank):
            rank += delta.rank
        if written is not None:
            if rank >= _AT_ONCE or not isinstance(delta, LowRank):
                _add(written, parts)
                parts, rank = [], 0
        elif not all(isinstance(part, Sparse) for part in parts) and (
            rank > min(shape[-2:]) or not all(isinstance(part, LowRank) for part in parts)
        ):
            written = torch.zeros(shape, dtype=torch.float64, device=_device(delta))
            _add(written, parts)
            parts, rank = [], 0
    if shape is None:
        raise ConfigError("a sum of no deltas has no shape", fix="give at least one")
    if written is not None:
        _add(written, parts)
        return Dense(written)
    sparse = [part for part in parts if isinstance(part, Sparse)]
    return _sparse_total(sparse) if sparse else _low_rank_total([part for part in parts if isinstance(part, LowRank)])


def _add(written: Tensor, parts: list[Delta]) -> None:
    """Add to a float64 matrix in place; low-rank parts together, for each pass over the matrix costs the same."""
    low = [part for part in parts if isinstance(part, LowRank)]
    if low:
        B, A = torch.cat([scaled_b(part) for part in low], -1), torch.cat([_f64(part.A) for part in low], -2)
        if written.ndim == 2:
            written.addmm_(B, A)
        else:
            written += B @ A
    for part in parts:
        if isinstance(part, Sparse):
            written.view(-1).index_add_(0, part.index, _f64(part.values))
        elif isinstance(part, Dense):
            written += part.W


def _device(delta: Delta) -> torch.device:
    return (
        delta.W.device if isinstance(delta, Dense) else (delta.A if isinstance(delta, LowRank) else delta.values).device
    )


def _low_rank_total(deltas: list[LowRank]) -> LowRank:
    parts = [delta for delta in deltas if delta.rank] or deltas[:1]
    if len(parts) == 1:
        return parts[0]
    kinds = {(delta.B.dtype, delta.A.dtype, delta.scale) for delta in parts}
    if len(kinds) == 1 and parts[0].B.dtype == parts[0].A.dtype:
        return LowRank(
            torch.cat([delta.B for delta in parts], -1),
            torch.cat([delta.A for delta in parts], -2),
            parts[0].scale,
        )
    # The A's are only placed side by side, so they keep their bits, and a common dtype.
    same = len({delta.A.dtype for delta in parts}) == 1
    return LowRank(
        torch.cat([scaled_b(delta) for delta in parts], -1),
        torch.cat([delta.A.detach() if same else _f64(delta.A) for delta in parts], -2),
    )


def _sparse_total(deltas: list[Sparse]) -> Sparse:
    index, where = _positions([delta.index for delta in deltas])
    values = torch.cat([_f64(delta.values) for delta in deltas])
    summed = values.new_zeros(len(index)).index_add_(0, where, values)
    return Sparse(index, summed, deltas[0].shape)


@torch.no_grad()
def low_rank(delta: Delta) -> LowRank:
    """The same delta as a product of two factors, exactly.

    A LowRank is returned as it is. Otherwise one factor is the matrix and the other the
    identity, on the side that gives the lower rank.

    >>> low_rank(Dense(torch.ones(3, 5))).rank
    3
    """
    if isinstance(delta, LowRank):
        return delta
    W = _dense(delta)
    rank = min(W.shape[-2:])
    identity = torch.eye(rank, dtype=W.dtype, device=W.device).expand(*W.shape[:-2], rank, rank).contiguous()
    return LowRank(identity, W) if W.shape[-2] == rank else LowRank(W, identity)


@torch.no_grad()
def inner(x: Delta, y: Delta) -> float:
    """The Frobenius inner product ⟨X, Y⟩, over all batch entries.

    From the factors where there are any: s_x s_y Σ (B_xᵀ B_y) ∘ (A_x A_yᵀ).
    The error is about 1e-16 · S_x S_y.

    >>> x = LowRank(torch.ones(5, 1), torch.ones(1, 4))
    >>> inner(x, x.scaled(-0.5))
    -10.0
    """
    _same_shape(x.shape, y.shape)
    if isinstance(x, LowRank):
        return _low_rank_inner(x, y)
    if isinstance(y, LowRank):
        return _low_rank_inner(y, x)
    if isinstance(x, Sparse):
        return _sparse_inner(x, y)
    if isinstance(y, Sparse):
        return _sparse_inner(y, x)
    return _dot(_f64(x.W), _f64(y.W))


def _low_rank_inner(x: LowRank, y: Delta) -> float:
    B, A = _f64(x.B), _f64(x.A)
    if isinstance(y, LowRank):
        return x.scale * y.scale * _dot(B.mT @ _f64(y.B), A @ _f64(y.A).mT)
    if isinstance(y, Dense):
        return x.scale * _dot(B.mT @ _f64(y.W), A)
    columns, step, result = y.shape[-1], max(1, _GATHER // max(1, x.rank)), 0.0
    for start in range(0, len(y.index), step):
        index, values = y.index[start : start + step], _f64(y.values[start : start + step])
        rows = B[torch.div(index, columns, rounding_mode="floor")]
        result += _dot(rows * values[:, None], A.mT[index % columns])
    return x.scale * result


def _sparse_inner(x: Sparse, y: Sparse | Dense) -> float:
    if isinstance(y, Dense):
        return _dot(_f64(x.values), _f64(y.W.reshape(-1)[x.index]))
    index, where = _positions([x.index, y.index])
    at_x, at_y = where.tensor_split([len(x.index)])
    zero = x.values.new_zeros(len(index), dtype=torch.float64)
    return _dot(zero.index_add(0, at_x, _f64(x.values)), zero.index_add(0, at_y, _f64(y.values)))


def _positions(indices: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The positions that occur, sorted, and for each of the given ones where it is there."""
    index, where = torch.unique(torch.cat(indices), return_inverse=True)
    return index, where


def norm(x: Delta) -> float:
    """The Frobenius norm, over all batch entries.

    For factors it comes from two Gram matrices, and where those cancel, from the
    triangles of two QR decompositions. The error is at most about 1e-14 · S, and what is
    below that is 0: so is the norm of `a - a`.

    >>> norm(LowRank(torch.ones(8, 1), torch.ones(1, 2), -0.5))
    2.0
    """
    return norms([x])[0]


@torch.no_grad()
def norms(deltas: Sequence[Delta]) -> list[float]:
    """The norms of several deltas; the Gram matrix of an A that they share is computed once."""
    grams: dict[int, Tensor] = {}
    return [_norm(delta, grams) for delta in deltas]


def _norm(x: Delta, grams: dict[int, Tensor]) -> float:
    if isinstance(x, Sparse):
        return _length(x.values)
    if isinstance(x, Dense) or x.rank > min(x.shape[-2:]):
        return _length(_dense(x))
    if id(x.A) not in grams:
        A = _f64(x.A)
        grams[id(x.A)] = A @ A.mT
    B, right = _f64(x.B), grams[id(x.A)]
    left = B.mT @ B
    squared = _dot(left, right)
    size = (left.diagonal(dim1=-2, dim2=-1) * right.diagonal(dim1=-2, dim2=-1)).sqrt().sum(-1)
    if squared >= _CANCELLED * _dot(size, size):
        return abs(x.scale) * math.sqrt(squared)
    length = _length(_core(x))
    return 0.0 if length <= _NOISE * abs(x.scale) * _length(size) else length


@torch.no_grad()
def size(x: Delta) -> float:
    """S, what errors are measured in: |s| Σᵢ ‖bᵢ‖ ‖aᵢ‖ of factors, and otherwise the norm.

    >>> size(LowRank(torch.ones(4, 2), torch.tensor([[1.0], [-1.0]])))  # of a delta that is zero
    4.0
    """
    if not isinstance(x, LowRank):
        return norm(x)
    products = torch.linalg.vector_norm(_f64(x.B), dim=-2) * torch.linalg.vector_norm(_f64(x.A), dim=-1)
    return abs(x.scale) * _length(products.sum(-1))


@torch.no_grad()
def rows(x: Delta, start: int, stop: int) -> Tensor:
    """Some rows of the matrix, (*batch, stop - start, in), in float64; no others are written out.

    >>> rows(LowRank(torch.arange(4.0)[:, None], torch.ones(1, 2)), 2, 4).tolist()
    [[2.0, 2.0], [3.0, 3.0]]
    """
    if isinstance(x, LowRank):
        return (x.scale * _f64(x.B[..., start:stop, :])) @ _f64(x.A)
    if isinstance(x, Dense):
        return _f64(x.W[..., start:stop, :])
    width = x.shape[-1]
    inside = (x.index >= start * width) & (x.index < stop * width)
    return Sparse(x.index[inside] - start * width, _f64(x.values[inside]), (stop - start, width)).dense()


@torch.no_grad()
def spectrum(x: Delta) -> Tensor:
    """The singular values, (*batch, min(r, out, in)), descending.

    The error of each is about 1e-15 · S.

    >>> spectrum(LowRank(torch.ones(8, 1), torch.ones(1, 2), -0.5)).round(decimals=9).tolist()
    [2.0]
    """
    values: Tensor = torch.linalg.svdvals(_finite(_core(x) if _has_core(x) else _dense(x)))
    return values


@torch.no_grad()
def largest_values(x: Delta, least: int) -> tuple[Tensor, float]:
    """At least so many singular values, descending, and the squares of all others, summed up.

    All of them, unless the matrix is large and `least` is a small part of its rank.

    >>> values, rest = largest_values(Dense(torch.diag(torch.arange(1.0, 601.0))), 2)
    >>> [round(value, 6) for value in values.tolist()], round(rest)
    ([600.0, 599.0], 71461299)
    """
    if not _has_core(x) and krylov.pays(torch.Size(x.shape), least):
        W = _finite(_dense(x))
        if (few := krylov.leading(W, least)) is not None:
            return few[1], max(0.0, _length(W) ** 2 - _dot(few[1], few[1]))
    return spectrum(x), 0.0


@torch.no_grad()
def truncate(x: Delta, rank: int) -> tuple[LowRank, Delta]:
    """The best approximation of at most this rank, and the exact rest: (kept, dropped).

    No matrix of that rank is nearer to `x` in the Frobenius norm (Eckart and Young). Both
    parts have balanced factors, B = U√Σ and A = √Σ Vᵀ, and scale 1; of each column of U
    the entry of largest magnitude is positive, so that the result depends on the matrix
    and not on how it was factored. Batch entries are truncated one by one. The rest is
    low-rank if `x` is, of rank 0 if nothing was cut off, and otherwise written out. Of a large
    matrix that is cut to a small part of its rank only the singular vectors that are kept are
    computed, to about 1e-12 of the error; the rest is exact.

    >>> kept, dropped = truncate(Dense(torch.diag(torch.tensor([3.0, 1.0, 2.0]))), 2)
    >>> kept.rank, round(norm(kept) ** 2, 9), round(norm(dropped), 9)
    (2, 13.0, 1.0)
    """
    if rank < 0:
        raise ConfigError(f"rank is {rank}", fix="give 0 or more")
    few = None
    if not _has_core(x) and krylov.pays(torch.Size(x.shape), rank):
        few = krylov.leading(_finite(_dense(x)), rank)
    U, S, Vh = few or svd(x)
    cut = min(rank, S.shape[-1])
    # With the matrix at hand the rest is a difference; otherwise it is what remains of the factors.
    written = few is not None or (not _has_core(x) and cut < S.shape[-1])
    end = cut if written else S.shape[-1]
    U, S, Vh = U[..., :, :end], S[..., :end], Vh[..., :end, :]
    root = torch.where(U.amax(-2) < -U.amin(-2), -S.sqrt(), S.sqrt()) if U.numel() else S.sqrt()
    B, A = U * root[..., None, :], root[..., :, None] * Vh
    # Copies, not views: two tensors of one storage cannot go into one file.
    kept = LowRank(B[..., :, :cut].clone(memory_format=_ROWS), A[..., :cut, :].clone(memory_format=_ROWS))
    if written:
        rest = _dense(x).clone()
        return kept, Dense(rest.addmm_(kept.B, kept.A, alpha=-1) if rest.ndim == 2 else rest - kept.dense())
    return kept, LowRank(B[..., :, cut:].clone(memory_format=_ROWS), A[..., cut:, :].clone(memory_format=_ROWS))


@torch.no_grad()
def negated(x: Delta) -> Delta:
    """-ΔW; the matrix of a Dense is negated itself, so that no other of its size is made: for one that nobody holds."""
    return Dense(x.W.neg_()) if isinstance(x, Dense) else x.scaled(-1.0)


@torch.no_grad()
def rounded(x: LowRank, dtype: torch.dtype) -> tuple[LowRank, LowRank]:
    """`x` as it is stored in `dtype`, and what that changes: (stored, lost), lost = stored - x.

    The scale is multiplied into B before the one rounding, so the stored scale is 1. With
    s·B + ΔB and A + ΔA stored, the change is [ΔB, s·B] · [A + ΔA; ΔA]: small factors from
    the start, where a difference of two products would cancel. A half that is zero is left
    out. What a truncation and its rounding miss of `x` together is thus dropped - lost:

    >>> kept, dropped = truncate(Dense(torch.tensor([[1.0, 0.3], [0.2, 3.0]])), 1)
    >>> stored, lost = rounded(kept, torch.bfloat16)
    >>> round(norm(total([dropped, lost.scaled(-1.0)])), 3)
    0.97

    >>> stored, lost = rounded(LowRank(torch.full((2, 1), 1 / 3), torch.ones(1, 3)), torch.bfloat16)
    >>> stored.B.dtype, lost.rank
    (torch.bfloat16, 1)
    """
    if not dtype.is_floating_point:
        raise ConfigError(f"{dtype} cannot hold an adapter", fix="choose a floating-point type")
    B, A = scaled_b(x), x.A.detach()
    B_new, B_lost = cast(B, dtype)
    A_new, A_lost = cast(A, dtype)
    lost = []
    if B_lost is not None:
        lost.append(LowRank(B_lost, x.A if A_lost is None else _f64(A_new)))
    if A_lost is not None:
        lost.append(LowRank(B, A_lost))
    return LowRank(B_new, A_new), _low_rank_total(lost or [LowRank(B[..., :0], _f64(A[..., :0, :]))])


@torch.no_grad()
def cast(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """A factor as stored, rounded once, and what that adds to it, in float64; None if nothing.

    Raises `NotMergeable` if a number is not finite in `dtype`.

    >>> new, lost = cast(torch.tensor([1.0, 1.01]), torch.bfloat16)
    >>> new.tolist(), round(lost[1].item(), 6)
    ([1.0, 1.0078125], -0.002187)
    """
    new = x.to(dtype)
    if not math.isfinite(_largest(new)):  # an infinity rounds to itself, as if nothing were lost
        raise NotMergeable(f"the factors are not finite in {dtype}", fix="choose a wider type")
    if x.dtype == dtype or torch.equal(new.to(x.dtype), x):
        return new, None
    new = rounding.nearest(_f64(x), dtype)
    return new, _f64(new) - _f64(x)


def nothing(shape: tuple[int, ...]) -> LowRank:
    """ΔW = 0, as factors of rank 0."""
    return LowRank(torch.zeros(*shape[:-1], 0), torch.zeros(*shape[:-2], 0, shape[-1]))


def on_cpu(x: Delta) -> Delta:
    """The same delta on the CPU, without gradients."""
    if isinstance(x, LowRank):
        return LowRank(x.B.detach().cpu(), x.A.detach().cpu(), x.scale)
    if isinstance(x, Dense):
        return Dense(x.W.detach().cpu())
    return Sparse(x.index.cpu(), x.values.detach().cpu(), x.shape)


@torch.no_grad()
def of_rank(x: Delta, rank: int) -> Delta | None:
    """The same delta as factors of exactly this rank, padded with zeros; None if its factors have more.

    At the full rank the matrix itself is written out, unless the factors are the same size.
    """
    if not isinstance(x, LowRank):
        return x if rank == min(x.shape[-2:]) else None
    if x.rank > min(x.shape[-2:]) == rank:
        return Dense(_dense(x))
    missing = rank - x.rank
    if missing < 0:
        return None
    B, A = x.B.detach(), x.A.detach()
    return LowRank(
        torch.cat([B, B.new_zeros(*B.shape[:-1], missing)], -1),
        torch.cat([A, A.new_zeros(*A.shape[:-2], missing, A.shape[-1])], -2),
        x.scale,
    )


def digest(x: Delta) -> str:
    """A hash of the numbers of a delta, as they are stored: of factors, not of their product.

    >>> x = LowRank(torch.ones(3, 1), torch.ones(1, 2))
    >>> digest(x) == digest(LowRank(torch.ones(3, 1), torch.ones(1, 2))), digest(x) == digest(x.scaled(2.0))
    (True, False)
    """
    found = hashlib.sha256()
    for own in x:
        if isinstance(own, Tensor):
            found.update(f"{own.dtype} {list(own.shape)} ".encode())
            found.update(own.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        else:
            found.update(repr(own).encode())
    return found.hexdigest()


@torch.no_grad()
def svd(x: Delta) -> tuple[Tensor, Tensor, Tensor]:
    """The thin singular value decomposition U (*batch, out, k), S (*batch, k), Vᴴ (*batch, k, in).

    k = min(r, out, in). A LowRank that is smaller than its matrix is not written out.

    >>> U, S, Vh = svd(LowRank(torch.ones(8, 1), torch.ones(1, 2), -0.5))
    >>> U.shape, S.round(decimals=9).tolist(), Vh.shape
    (torch.Size([8, 1]), [2.0], torch.Size([1, 2]))
    """
    if not _has_core(x):
        U, S, Vh = torch.linalg.svd(_finite(_dense(x)), full_matrices=False)
        return U, S, Vh
    QB, CB, RB = qr(_f64(x.B))
    QA, CA, RA = qr(_f64(x.A).mT)
    U, S, Vh = torch.linalg.svd(_finite(x.scale * (RB @ RA.mT)))
    return QB @ (CB @ U), S, (Vh @ CA.mT) @ QA.mT


def _has_core(x: Delta) -> TypeGuard[LowRank]:
    """Whether the factors are a smaller form than the matrix."""
    return isinstance(x, LowRank) and x.rank <= min(x.shape[-2:])


def _core(x: LowRank) -> Tensor:
    """An (r, r) matrix with the singular values of `x`."""
    RB, RA = (torch.linalg.qr(M, mode="r").R for M in (_f64(x.B), _f64(x.A).mT))
    core: Tensor = x.scale * (RB @ RA.mT)
    return core


class Factored(NamedTuple):
    """M = (Q C) R, where Q C has orthonormal columns; of a tall M (d, r) the other two are (r, r)."""

    Q: Tensor
    C: Tensor
    R: Tensor


@torch.no_grad()
def qr(M: Tensor) -> Factored:
    """The factors of M (d, r), float64, with Q C not multiplied out, which is not always needed.

    Householder's QR is the slowest step of a truncation, so it is left to columns that are
    nearly dependent. For the others R is the Cholesky factor of MᵀM. `growth` says how far
    the columns are from orthogonal, and with it how far rounding gets: M R⁻¹ is orthonormal
    to about 1e-16 · growth². Small growth is good enough, for an error there changes how
    well a truncation approximates only by its square, and never what the parts add up to.
    Otherwise a second pass starts from M R⁻¹: CholeskyQR2, analysed by Yamamoto et al. in
    ETNA 44 (2015), pages 306 to 326.
    """
    if M.shape[-1] > M.shape[-2]:
        Q, R = torch.linalg.qr(M)
        return Factored(Q, torch.eye(Q.shape[-1], dtype=M.dtype, device=M.device), R)
    gram = M.mT @ M
    identity = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
    first, failed = torch.linalg.cholesky_ex(gram, upper=True)
    inverse = torch.linalg.solve_triangular(first, identity, upper=True)
    lengths = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    growth = math.inf if failed.any() else _largest((lengths[..., None] * inverse.abs()).sum(-2))
    if growth < _ONE_PASS:
        return Factored(M, inverse, first)
    if growth < _TWO_PASSES:
        Q, C, R = qr(torch.linalg.solve_triangular(first, M, upper=True, left=False))
        return Factored(Q, C, R @ first)
    Q, R = torch.linalg.qr(M)
    return Factored(Q, identity, R)


def orthonormal(M: Tensor) -> tuple[Tensor, Tensor]:
    """Q and R of M (d, r) = Q R in float64, where Q (d, min(d, r)) has orthonormal columns."""
    Q, C, R = qr(_f64(M))
    return (Q if M.shape[-1] > M.shape[-2] else Q @ C), R


def _f64(x: Tensor) -> Tensor:
    """In float64; the tensor itself if it is that already, so that who shares it still does."""
    return x if x.dtype == torch.float64 and not x.requires_grad else x.detach().to(torch.float64)


def scaled_b(x: LowRank) -> Tensor:
    """S · B (*batch, out, r), float64."""
    return _f64(x.B) * x.scale


def _dense(x: Delta) -> Tensor:
    """The matrix in float64; of a Dense that is float64 already, its own tensor."""
    if isinstance(x, LowRank):
        return scaled_b(x) @ _f64(x.A)
    if isinstance(x, Dense):
        return _f64(x.W)
    return Sparse(x.index, _f64(x.values), x.shape).dense()


def _dot(x: Tensor, y: Tensor) -> float:
    return float((x * y).sum().item())


def _length(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64).item())


def _largest(x: Tensor) -> float:
    """The largest magnitude; NaN if there is one. One pass and no copy, unlike isfinite().all()."""
    if not x.numel():
        return 0.0
    low, high = (float(bound.item()) for bound in x.aminmax())
    return max(-low, high)


def _finite(x: Tensor) -> Tensor:
    if not math.isfinite(_largest(x)):
        raise NotMergeable("the delta has entries that are not finite", fix="check its tensors for NaN and inf")
    return x


def _same_shape(x: tuple[int, ...], y: tuple[int, ...]) -> None:
    if tuple(x) != tuple(y):
        raise NotMergeable(
            f"the deltas have shapes {tuple(x)} and {tuple(y)}", fix="combine adapters of one base model"
        )
