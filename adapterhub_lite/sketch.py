"""A sketch of the base that an adapter was trained on: a few of its weights, enough to know another base by.

Values survive what names and hashes do not: another dtype, other shards, a renamed folder, quantisation. A base that
was merely trained further is taken for the same one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .sharding import whole

if TYPE_CHECKING:
    from torch import Tensor

SITES, VALUES = 32, 8  # sampled at most, and values of each
# Relative errors: bf16 rounds by 0.002, 4-bit quantisation by 0.1; two unrelated matrices differ by 1.4.
OVERALL, AT_ONE = 0.15, 0.6

Sketch = dict[str, list[float]]


def sampled(sites: Sequence[str]) -> list[str]:
    """The sites that a sketch of an adapter at `sites` looks at: evenly many of them, in the order of their names."""
    names = sorted(sites)
    return names if len(names) <= SITES else [names[i * len(names) // SITES] for i in range(SITES)]


def of(weights: Mapping[str, Tensor]) -> Sketch:
    """The sketch of these weights (out, in): values at fixed places, to four digits."""
    found = {}
    for name, weight in weights.items():
        W = whole(weight)
        rows, columns = zip(*places(*W.shape), strict=True)
        found[name] = rounded(W[list(rows), list(columns)].float().tolist())
    return found


def places(out: int, into: int) -> list[tuple[int, int]]:
    """Rows and columns of the values that are sampled of a weight (out, in)."""
    # Knuth's multiplier scatters them
    return [divmod((k * 2654435761 + k) % (out * into), into) for k in range(1, VALUES + 1)]


def rounded(values: Sequence[float]) -> list[float]:
    """As a sketch has them."""
    return [float(f"{value:.4g}") for value in values]


def told(facts: Mapping[str, Any]) -> Sketch:
    """The sketch in an adapter's facts; a stranger's header may hold anything, and what is no sketch is left out."""
    base = facts.get("base")
    if not isinstance(base, Mapping):
        return {}
    return {
        name: [float(v) for v in values]
        for name, values in base.items()
        if isinstance(values, list) and len(values) == VALUES and all(isinstance(v, (int, float)) for v in values)
    }


def differing(one: Sketch, other: Sketch) -> str | None:
    """The site that differs most, if the two are of different bases; None if they may be of the same."""
    off = {name: _distance(one[name], other[name]) for name in one.keys() & other.keys()}
    if not off:
        return None
    overall = math.sqrt(sum(d * d for d in off.values()) / len(off))
    worst = max(sorted(off), key=lambda name: off[name])
    return worst if overall > OVERALL or off[worst] > AT_ONE else None


def _distance(a: Sequence[float], b: Sequence[float]) -> float:
    size = max(math.hypot(*a), math.hypot(*b))
    return math.dist(a, b) / size if size else 0.0
