"""The largest singular values and vectors of a matrix that is read in blocks of rows, with a certificate.

The randomised method of Halko, Martinsson and Tropp (SIAM Review 53, 2011) with subspace iteration on AᵀA: from an
orthonormal V (columns, ℓ) one pass over the blocks of A makes Y = A V and Z = Aᵀ Y, and so

- the approximations A V Vᵀ of every rank r ≤ ℓ, the best in that subspace, by the eigenvalues θ of YᵀY (Ritz values;
  θᵢ ≤ σᵢ²). Their squared error is ‖A‖² - Σᵢ≤ᵣ θᵢ, exactly;
- the next subspace, that of Z;
- a bound on how far from the best of all matrices of that rank they are, below.

Let R = A - A V Vᵀ and G = Z - V YᵀY, which is orthogonal to V. In a basis that begins with V, AᵀA is
[[Θ, Gᵀ], [G, C]], with C ⪰ 0 of trace ‖R‖². For every s > 0 that is at most [[Θ + GᵀG/s, 0], [0, C + s]]. So the sum
of its r largest eigenvalues, Σᵢ≤ᵣ σᵢ², is at most that of the eigenvalues of Θ + GᵀG/s and of r numbers ‖R‖² + s; it
is also at most Σᵢ≤ᵣ θᵢ + ‖R‖². Both hold for certain, whatever the random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .seed import generator

PASSES = 8  # at most
SETTLED = 2e-3  # by which share of the squared error the last pass may still have changed it
SURE = 1e-2  # or which share of it may be more than the best
NOISE = 1e-15  # share of ‖A‖² that is rounding
SHIFTS = 24  # values of s that are tried


class Leading(NamedTuple):
    """A ≈ Y Vᵀ; the columns of Y are orthogonal, and `values` are their squared lengths."""

    Y: Tensor  # (rows, ℓ), in the dtype of the blocks
    V: Tensor  # (columns, ℓ), orthonormal, float64
    values: Tensor  # (ℓ,) Ritz values, descending, float64
    coupling: Tensor  # (ℓ, ℓ), GᵀG
    total: float  # ‖A‖²
    passes: int

    def error(self, rank: int) -> float:
        """The squared error of the best approximation of this rank in the subspace."""
        return max(self.total - math.fsum(self.values[:rank].tolist()), 0.0)

    def best(self, rank: int) -> float:
        """A squared error that no matrix of this rank is below."""
        rest, top = self.error(len(self.values)), float(self.values[0])
        highest = self.total - self.error(rank) + rest
        for k in range(SHIFTS if top > 0 else 0):
            s = top * 4.0**-k
            inner = torch.linalg.eigvalsh(torch.diag(self.values) + self.coupling / s)
            both = torch.cat([inner, inner.new_full((rank,), rest + s)])
            highest = min(highest, float(both.topk(rank).values.sum()))
        return max(self.total - highest, 0.0)


def leading(blocks: Callable[[], Iterator[Tensor]], columns: int, rank: int, *, width: int, seed: str) -> Leading:
    """The singular values and vectors from the largest on, good to `rank`, in a subspace of `width` ≥ `rank`.

    `blocks()` gives the rows of A from the first to the last, in the dtype to compute in. Passes until the error has
    settled, or is certain to be near the best. A `total` that is not finite says that a number is not.
    """
    before = math.inf
    V = torch.linalg.qr(torch.randn(columns, width, dtype=torch.float64, generator=generator(0, seed))).Q
    for count in range(1, PASSES + 1):
        found, Z = _pass(blocks, V, count)
        if not math.isfinite(found.total) or not found.total:
            break
        error = found.error(rank)
        if error <= NOISE * found.total or (count > 1 and before - error <= SETTLED * error):
            break
        if count > 1 and error <= found.best(rank) * (1 + SURE):
            break
        before = error
        V = torch.linalg.qr(Z).Q
    return found


def _pass(blocks: Callable[[], Iterator[Tensor]], V: Tensor, count: int) -> tuple[Leading, Tensor]:
    """One pass over A: what is known from the subspace V, and Z = AᵀA V in the basis of the Ritz vectors."""
    parts, squares = [], []
    Z = torch.zeros_like(V)
    for block in blocks():  # (n, columns)
        part = block @ V.to(block.dtype)
        Z += block.mT @ part
        squares.append(float(torch.linalg.vector_norm(block, dtype=torch.float64)) ** 2)
        parts.append(part)
    total, Y = math.fsum(squares), torch.cat(parts)
    if not math.isfinite(total):
        return Leading(Y, V, Y.new_zeros(len(V.mT)), Y.new_zeros(0), total, count), Z
    wide = Y.double()
    values, W = torch.linalg.eigh(wide.mT @ wide)
    values, W = values.flip(0).clamp_(min=0), W.flip(1)
    V, Z = V @ W, Z @ W
    G = Z - V * values
    return Leading((wide @ W).to(Y.dtype), V, values, G.mT @ G, total, count), Z
