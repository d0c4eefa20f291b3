"""What merge rules do with factors: bases that adapters share, polar factors, angles. Never a matrix (out, in)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import algebra
from .delta import LowRank
from .rule import Part

_RANK = 1e-10  # singular values below this share of the largest are zero


class Joint(NamedTuple):
    """Adapters in bases that they share: ΔWᵢ = Q coresᵢ Pᵀ."""

    Q: Tensor  # (out, R), orthonormal columns
    P: Tensor  # (in, R), orthonormal columns
    cores: list[Tensor]  # (R, R) each

    def back(self, core: Tensor) -> LowRank:
        """Q core Pᵀ."""
        return LowRank(self.Q @ core, self.P.mT)


@torch.no_grad()
def joint(parts: Sequence[Part]) -> Joint:
    """The adapters, times their weights, in orthonormal bases of all their columns and rows.

    >>> part = Part(LowRank(torch.ones(5, 1), torch.ones(1, 4)), 0.5)
    >>> own = joint([part, part])
    >>> own.Q.shape, round(float(own.back(own.cores[0] + own.cores[1]).dense()[0, 0]), 9)
    (torch.Size([5, 2]), 1.0)
    """
    low = [algebra.low_rank(part.scaled) for part in parts]
    Q, R_B = orthonormal(torch.cat([algebra.scaled_b(own) for own in low], -1))  # (out, R), (R, Σr)
    P, R_A = orthonormal(torch.cat([own.A.double() for own in low], -2).mT)  # (in, R), (R, Σr)
    ranks = [own.rank for own in low]
    pairs = zip(R_B.split(ranks, -1), R_A.split(ranks, -1), strict=True)
    return Joint(Q, P, [b @ a.mT for b, a in pairs])


class Aligned(NamedTuple):
    """Adapters in the left singular basis of all of them side by side: ΔWᵢ = U leftᵢ Aᵢ."""

    U: LowRank  # (out, k), as two factors: who needs it multiplies them
    left: list[Tensor]  # (k, rᵢ) each
    A: list[Tensor]  # (rᵢ, in) each, float64


@torch.no_grad()
def aligned(parts: Sequence[Part]) -> Aligned:
    """The adapters, without their weights, in the basis U of [ΔW₁ … ΔW_N] = U Σ [V₁ᵀ … V_Nᵀ].

    >>> part = Part(LowRank(torch.ones(5, 1), torch.ones(1, 4)), 0.5)
    >>> own = aligned([part, part])
    >>> own.left[0].shape, (own.U.dense() @ own.left[1] @ own.A[1]).round(decimals=9).unique().tolist()
    (torch.Size([1, 1]), [1.0])
    """
    low = [algebra.low_rank(part.delta) for part in parts]
    M, C, R = algebra.qr(torch.cat([algebra.scaled_b(own) for own in low], -1))
    A = [own.A.double() for own in low]
    right = [algebra.qr(own.mT).R if len(own) <= own.shape[1] else own.mT for own in A]
    left = R.split([own.rank for own in low], -1)  # (R, rᵢ) each
    U, _, _ = singular(torch.cat([b @ a.mT for b, a in zip(left, right, strict=True)], -1))  # (R, k)
    return Aligned(LowRank(M, C @ U), [U.mT @ b for b in left], A)


def orthonormal(M: Tensor) -> tuple[Tensor, Tensor]:
    """Q and R of M = Q R, with as many columns in Q as M has columns, or rows if those are fewer."""
    return algebra.orthonormal(M.double())


def singular(core: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, σ, Vᵀ with the singular values that are not zero; of each column of U the largest entry is positive."""
    U, S, Vh = torch.linalg.svd(core, full_matrices=False)
    rank = int((_RANK * S[0] < S).sum()) if S.numel() and S[0] > 0 else 0
    U, S, Vh = U[:, :rank], S[:rank], Vh[:rank]
    if rank:
        flip = torch.where(U.amax(0) < -U.amin(0), -1.0, 1.0)
        U, Vh = U * flip, Vh * flip[:, None]
    return U, S, Vh


def polar(M: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns, or on directions that M lacks, with zeros: M (MᵀM)^(-1/2).

    >>> polar(torch.tensor([[2.0, 0.0], [0.0, 0.0]])).tolist()
    [[1.0, 0.0], [0.0, 0.0]]
    """
    U, _, Vh = singular(M)
    return U @ Vh


@torch.no_grad()
def gram(parts: Sequence[Part]) -> Tensor:
    """⟨ΔWᵢ, ΔWⱼ⟩ (N, N) of all pairs, without their weights."""
    N = len(parts)
    G = torch.zeros(N, N, dtype=torch.float64)
    for i, own in enumerate(algebra.norms([part.delta for part in parts])):  # right where factors cancel, too
        G[i, i] = own**2
        for j in range(i):
            G[i, j] = G[j, i] = algebra.inner(parts[i].delta, parts[j].delta)
    return G
