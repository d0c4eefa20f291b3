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
_HALF = 1 << 15  # values of the upper or the lower half of a positive float32's bits


def blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Rows of the matrix, some at a time."""
    step = max(1, _BLOCK // max(1, shape[-1]))
    return (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))


def rows(delta: Delta, which: slice) -> Tensor:
    """Some rows of the matrix (rows, in), float64."""
    if isinstance(delta, LowRank):
        return (delta.scale * delta.B[which].double()) @ delta.A.double()
    return (delta.W if isinstance(delta, Dense) else delta.dense())[which].double()


@torch.no_grad()
def by_rows(
    parts: Sequence[Part], shape: tuple[int, int], function: Callable[[Tensor, Tensor, slice], Tensor]
) -> Dense:
    """`function` of all adapters' rows (N, rows, in), their weights (N, 1, 1) and which rows they are, put together.

    >>> parts = [Part(Dense(torch.eye(2)), 0.5), Part(Dense(torch.ones(2, 2)), 2.0)]
    >>> by_rows(parts, (2, 2), lambda D, w, which: (w * D).sum(0)).W.tolist()
    [[2.5, 2.0], [2.0, 2.5]]
    """
    W = torch.empty(shape, dtype=torch.float64)  # (out, in)
    w = torch.tensor([part.weight for part in parts], dtype=torch.float64)[:, None, None]
    for which in blocks(shape):
        W[which] = function(torch.stack([rows(part.delta, which) for part in parts]), w, which)
    return Dense(W)


@torch.no_grad()
def sizes(delta: Delta) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The magnitudes of all entries (out · in,), rounded to float32, in which they are compared."""
    found = np.empty(delta.shape, np.float32)
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
    """(N, rows, in) with 0 for the entries below the adapter's threshold."""
    return torch.where(largest(D, thresholds), D, 0.0)


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
    found = np.zeros(2 * _HALF if upper is None else _HALF, np.int64)
    for which in blocks(tuple(delta.shape)):
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
    total = votes.sum(0)
    positive, negative = total > 0, total < 0
    if tie > 0:
        positive |= total == 0
    return torch.where(positive, D > 0, negative & (D < 0))


def average(values: Tensor, weights: Tensor, agree: Tensor) -> Tensor:
    """Σ values / Σ weights (N, 1, 1) over the adapters that agree, entry by entry; 0 where the weights sum to 0."""
    total, found = torch.zeros_like(values[0]), torch.zeros_like(values[0])
    for own, w, here in zip(values, weights.flatten().tolist(), agree, strict=True):
        total.add_(here, alpha=w)
        found.add_(torch.where(here, own, 0.0))
    none = total == 0
    return found.div_(total.masked_fill_(none, 1.0)).masked_fill_(none, 0.0)


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
        m = torch.stack([rule.uniform(part, place) < density for part in parts]) / density

    def merged(D: Tensor, w: Tensor, which: slice) -> Tensor:  # D: (N, rows, in), w: (N, 1, 1)
        D = trimmed(D, kept) if inside == "ties" else D * m[:, which]
        return average(w * D, w, elected(D, w * D, 0.0) & (w != 0))

    return by_rows(parts, place.shape, merged).W


@torch.no_grad()
def restoring(delta: Delta, mask: Tensor) -> float:
    """Σ |δ| / Σ |mask ∘ δ|: what makes up for masked entries in the sum of magnitudes; 1 where nothing is left."""
    whole = left = 0.0
    for which in blocks(tuple(delta.shape)):
        size = rows(delta, which).abs()
        whole += float(size.sum())
        left += float((size * mask[which]).sum())
    return whole / left if left > 0 else 1.0
