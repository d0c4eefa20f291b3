"""What merge rules do entry by entry: thresholds, masks, elected signs. They write the matrices of one site out.

In blocks of rows, so that what is held beside the result is small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .delta import Delta, Dense, LowRank
from .rule import Part, Place, Rule

_BLOCK = 1 << 16  # entries of one adapter at once: what is computed with stays in the cache
_LEAST = 1e-300  # to divide 0 by
_HALF = 1 << 15  # values of the upper or the lower half of a positive float32's bits


def blocks(shape: tuple[int, ...], entries: int = _BLOCK) -> Iterator[slice]:
    """Rows of the matrix, some at a time."""
    step = max(1, entries // max(1, shape[-1]))
    return (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))


def ready(delta: Delta) -> LowRank | Dense:
    """The same delta with float64 factors, where rows are taken again and again; a Sparse one written out."""
    if isinstance(delta, LowRank):
        return LowRank(delta.B.detach().double(), delta.A.detach().double(), delta.scale)
    return delta if isinstance(delta, Dense) else Dense(delta.dense())


def rows(delta: Delta, which: slice, out: Tensor | None = None) -> Tensor:
    """Some rows of the matrix (rows, in), float64; into `out` if it is given."""
    if isinstance(delta, LowRank):
        return torch.mm(delta.scale * delta.B[which].double(), delta.A.double(), out=out)
    found = (delta.W if isinstance(delta, Dense) else delta.dense())[which].double()
    return found if out is None else out.copy_(found)


@torch.no_grad()
def by_rows(
    parts: Sequence[Part], shape: tuple[int, int], function: Callable[[Tensor, Tensor, slice], Tensor]
) -> Dense:
    """`function` of all adapters' rows (N, rows, in), their weights (N, 1, 1) and which rows they are, put together.

    The rows are the function's to overwrite.

    >>> parts = [Part(Dense(torch.eye(2)), 0.5), Part(Dense(torch.ones(2, 2)), 2.0)]
    >>> by_rows(parts, (2, 2), lambda D, w, which: (w * D).sum(0)).W.tolist()
    [[2.5, 2.0], [2.0, 2.5]]
    """
    W = torch.empty(shape, dtype=torch.float64)  # (out, in)
    w = torch.tensor([part.weight for part in parts], dtype=torch.float64)[:, None, None]
    deltas = [ready(part.delta) for part in parts]
    D: Tensor | None = None  # one for all blocks: fresh memory costs more than what is computed in it
    for which in blocks(shape):
        count = which.stop - which.start
        D = torch.empty(len(parts), count, shape[1], dtype=torch.float64) if D is None else D[:, :count]
        for i, delta in enumerate(deltas):
            rows(delta, which, D[i])
        W[which] = function(D, w, which)
    return Dense(W)


@torch.no_grad()
def sizes(delta: Delta) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The magnitudes of all entries (out · in,), rounded to float32, in which they are compared."""
    found, delta = np.empty(delta.shape, np.float32), ready(delta)
    for which in blocks(tuple(delta.shape)):
        found[which] = rows(delta, which).float().abs_().numpy()
    return found.reshape(-1)


def smallest_kept(values: np.ndarray[Any, np.dtype[np.float32]], kept: int) -> float:
    """The smallest of the `kept` largest values; infinite if none is kept.

    >>> smallest_kept(np.array([3, 1, 2], np.float32), 2)
    2.0
    """
    if kept <= 0:
        return float("inf")
    return 0.0 if kept >= len(values) else float(np.partition(values, len(values) - kept)[len(values) - kept])


def largest(D: Tensor, thresholds: Sequence[float]) -> Tensor:
    """Which entries of (N, rows, in) are at least as large as the adapter's threshold, compared in float32."""
    return D.float().abs_() >= torch.tensor(thresholds, dtype=torch.float32)[:, None, None]


def trimmed(D: Tensor, thresholds: Sequence[float]) -> Tensor:
    """(N, rows, in), in place, with 0 for the entries that are not among the `largest`."""
    for own, threshold in zip(D, thresholds, strict=True):
        torch.hardshrink(own, _below(threshold), out=own)
    return D


def _below(threshold: float) -> float:
    """The largest float64 that float32 rounds to less than this float32, which is not negative; 0 of 0.

    >>> [float(np.float32(x)) >= 1.0 for x in (_below(1.0), np.nextafter(_below(1.0), 2.0))]
    [False, True]
    """
    if threshold in (0.0, float("inf")):
        return threshold
    at = np.float32(threshold)
    middle = (float(np.nextafter(at, np.float32(0))) + float(at)) / 2  # rounded to the even one of the two
    return float(np.nextafter(middle, 0.0)) if np.float32(middle) >= at else middle


def threshold(delta: Delta, density: float) -> float:
    """What the share `density` of the entries is not below in magnitude; entries of equal magnitude stay together."""
    values = sizes(delta)
    return smallest_kept(values, int(density * len(values)))


# A threshold over all sites, exact, in two passes that never hold more than counts ------------------------


class Counts(NamedTuple):
    """How many entries have each value, without the values that none has."""

    values: np.ndarray[Any, np.dtype[np.int64]]  # ascending
    counts: np.ndarray[Any, np.dtype[np.int64]]


@torch.no_grad()
def count(delta: Delta, upper: int | None) -> Counts:
    """How many magnitudes have each value of the upper 16 bits; or with these upper bits, of the lower 15."""
    found, delta = np.zeros(2 * _HALF if upper is None else _HALF, np.int64), ready(delta)
    for which in blocks(tuple(delta.shape), 4 * _BLOCK):  # more at once than there are counts
        bits = rows(delta, which).float().abs_().numpy().view(np.uint32).reshape(-1)
        if upper is None:
            found += np.bincount(bits >> 15, minlength=len(found))
        else:
            found += np.bincount(bits[bits >> 15 == upper] & np.uint32(_HALF - 1), minlength=len(found))
    values = found.nonzero()[0]
    return Counts(values, found[values])


def at_least(counts: np.ndarray[Any, np.dtype[np.int64]], kept: int) -> tuple[int, int]:
    """The value that the `kept`-th largest has, and how many of the `kept` are larger than it."""
    above = counts[::-1].cumsum()
    at = int(np.searchsorted(above, kept))
    return len(counts) - 1 - at, int(above[at - 1]) if at else 0


def observe(parts: Sequence[Part], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Counts for each adapter, by its number: first of the upper bits, then of the lower ones."""
    upper = facts.get("upper")
    return {"counts": {part.number: count(part.delta, upper and upper[part.number]) for part in parts}}


def conclude(observed: Mapping[str, Mapping[str, Any]], facts: Mapping[str, Any], density: float) -> dict[str, Any]:
    """After the first pass the upper bits of each adapter's threshold, after the second the `thresholds`."""
    counts: dict[int, np.ndarray[Any, np.dtype[np.int64]]] = {}
    for site in observed.values():
        for index, (values, own) in site["counts"].items():
            counts.setdefault(index, np.zeros(2 * _HALF, np.int64))[values] += own
    if "upper" not in facts:
        kept = {index: int(density * int(own.sum())) for index, own in counts.items()}
        found = {index: at_least(own, kept[index]) for index, own in counts.items()}
        return {
            "kept": kept,
            "upper": {index: at for index, (at, _) in found.items()},
            "above": {index: above for index, (_, above) in found.items()},
        }
    thresholds = {}
    for index, own in counts.items():
        low, _ = at_least(own, facts["kept"][index] - facts["above"][index])
        bits = np.array([facts["upper"][index] << 15 | low], np.uint32)
        thresholds[index] = float(bits.view(np.float32)[0]) if facts["kept"][index] > 0 else float("inf")
    return {"thresholds": thresholds}


# Signs ------------------------------------------------------------------------------------------------


def elected(D: Tensor, votes: Tensor, tie: float) -> Tensor:
    """Which entries of (N, rows, in) have the sign of the summed `votes` there; `tie` is the sign of a sum of 0.

    An entry of 0 has no sign, and is in no majority.
    """
    sign = votes.sum(0).sign_()
    if tie > 0:
        sign.masked_fill_(sign == 0, tie)
    return D * sign > 0


def average(values: Tensor, weights: Tensor, agree: Tensor) -> Tensor:
    """Σ values / Σ weights (N, 1, 1) over the adapters that agree, entry by entry; 0 where the weights sum to 0."""
    total, found = torch.zeros_like(values[0]), torch.zeros_like(values[0])
    for own, w, here in zip(values, weights.flatten().tolist(), agree, strict=True):
        total.add_(here, alpha=w)
        found.add_(own * here)
    none = total == 0
    return found.div_(total.masked_fill_(none, 1.0)).masked_fill_(none, 0.0)


def vote(D: Tensor, weights: Tensor) -> Tensor:
    """The `average` by weights (N, 1, 1), none negative, of those `elected` by w D; D (N, rows, in) is overwritten.

    >>> vote(torch.tensor([[[4.0, 1.0]], [[-3.0, 2.0]]]), torch.full((2, 1, 1), 0.5)).tolist()
    [[4.0, 1.5]]
    """
    sign = D.mul_(weights).sum(0).sign_()
    D.mul_(sign).clamp_(min=0)  # what agrees, as positive numbers
    found = D.sum(0).mul_(sign)
    return found.div_(D.sign_().mul_(weights).sum(0).clamp_(min=_LEAST))


@torch.no_grad()
def voted(
    rule: Rule, parts: Sequence[Part], place: Place, density: float, inside: Literal["ties", "dare_ties"]
) -> Tensor:
    """TIES of matrices of shape `place.shape`: of each the largest entries, the sign of most, the mean of those.

    With "dare_ties" of each some entries at random, divided by `density`, in place of the largest.
    """
    if inside == "ties":
        kept = [threshold(part.delta, density) for part in parts]
    else:
        m = torch.stack([rule.drawn(part, place, density) for part in parts]) / density

    def merged(D: Tensor, w: Tensor, which: slice) -> Tensor:  # D: (N, rows, in), w: (N, 1, 1)
        D = trimmed(D, kept) if inside == "ties" else D.mul_(m[:, which])
        return vote(D, w)

    return by_rows(parts, place.shape, merged).W


@torch.no_grad()
def restoring(delta: Delta, mask: Tensor) -> float:
    """Σ |δ| / Σ |mask ∘ δ|: what makes up for masked entries in the sum of magnitudes; 1 where nothing is left."""
    whole, left, delta = 0.0, 0.0, ready(delta)
    for which in blocks(tuple(delta.shape)):
        size = rows(delta, which).abs()
        whole += float(size.sum())
        left += float((size * mask[which]).sum())
    return whole / left if left > 0 else 1.0
