"""The leading singular vectors of a large matrix, without the others.

A block Krylov method: with the eigenvectors of WᵀW in the space that Ω, WᵀW Ω, (WᵀW)² Ω, …
span (Golub and Underwood 1977; Musco and Musco 2015 for how good that is whatever the
spectrum). Its cost is a few dozen products with a narrow matrix, where a decomposition in
full takes as many as the matrix has columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

_EXTRA = 8  # columns of a block beside those that are wanted
_STEPS = 40  # and no more: then the decomposition in full is as quick
_RESIDUAL = 1e-6  # of the largest σ²; what is lost of the captured energy is about the square of it


def pays(shape: torch.Size, rank: int) -> bool:
    """Whether so few singular vectors of so large a matrix are better had this way."""
    return len(shape) == 2 and min(shape) >= 512 and 16 * rank <= min(shape)


def leading(W: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """U (m, rank), σ (rank,) and Vᵀ (rank, n) of W (m, n), float64; None where they do not converge.

    Of no matrix of that rank the distance from W is smaller by more than about 1e-12 of it. Deterministic. The space is
    found in float32, and the singular vectors in it, some more of them than are wanted, in float64: so those that have
    nearly the same singular value are told apart as well as they can be.

    >>> W = torch.diag(torch.arange(600.0, 0.0, -1.0, dtype=torch.float64))
    >>> U, S, Vh = leading(W, 3)
    >>> [round(s, 6) for s in S.tolist()]
    [600.0, 599.0, 598.0]
    """
    if W.shape[0] < W.shape[1]:
        found = leading(W.mT, rank)
        return None if found is None else (found[2].mT, found[1], found[0].mT)
    size = float(torch.linalg.vector_norm(W))
    V = _space(W.float() if 1e-20 < size < 1e20 else (W / (size or 1.0)).float(), rank)
    if V is None:
        return None
    U = torch.linalg.qr(W @ V.double()).Q  # (m, b)
    X, S, Vh = torch.linalg.svd(U.mT @ W, full_matrices=False)
    return U @ X[:, :rank], S[:rank], Vh[:rank]


def _space(W: Tensor, rank: int) -> Tensor | None:
    """A basis (n, b) that has the leading right singular vectors of W (m, n) in its span; None if not found."""
    m, n = W.shape
    b = rank + _EXTRA
    start = torch.randn(n, b, generator=torch.Generator().manual_seed(0), dtype=W.dtype).to(W.device)
    V = torch.linalg.qr(start).Q  # (n, b·k), orthonormal
    last, WV = V, W.new_zeros(m, 0)  # (n, b), (m, b·k)
    for step in range(1, _STEPS + 1):
        Y = W @ last  # (m, b)
        WV = torch.cat([WV, Y], 1)
        following, R = W.mT @ Y, torch.eye(b, dtype=W.dtype, device=W.device)
        for _ in range(3):  # where little is new, what is left is noise at first, and no more orthogonal than that
            following, factor = torch.linalg.qr(following - V @ (V.mT @ following))  # (n, b), (b, b)
            R = factor @ R
        if step > 1:
            values, C = torch.linalg.eigh(WV.mT @ WV)  # ascending
            # WᵀW v − σ² v of the approximate v = V C lies in the block that follows.
            residual = (R @ C[-b:, -rank:]).norm(dim=0)
            if bool((residual <= _RESIDUAL * values[-1].clamp(min=0)).all()):
                found: Tensor = V @ C[:, -b:]
                return found
        V, last = torch.cat([V, following], 1), following
        if V.shape[1] > n - b:
            return None
    return None
