"""Pico: directions that many B's share scaled down, then the sum."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from adapterhub_lite import Delta, Part, Place, Rule, hookimpl
from adapterhub_lite.rule import Facts


@dataclass(frozen=True, kw_only=True)
class Pico(Rule):
    """Pico (https://arxiv.org/abs/2604.16826) before the sum, on factors.

    Of all B side by side, [s₁B₁ … s_N B_N] = U Σ Vᵀ, direction uⱼ holds the share sⱼ = σⱼ² / Σ σₖ². It is scaled by
    αⱼ = 1 / (1 + (N − 1) sⱼ): ΔWᵢ becomes (1 + U diag(α − 1) Uᵀ) ΔWᵢ. These are summed by their weights, and the sum
    is scaled to the mean norm of the ΔWᵢ that went in.

    That is the paper's Pico with task arithmetic, where the norm makes up for any factor, so that only ratios of
    weights matter. It has no weights; with equal ones this is it. The result depends on how ΔWᵢ is factored, and is
    taken for the factors that the file has, as in the paper. Equal adapters become another.
    """

    name = "pico"
    paper = "https://arxiv.org/abs/2604.16826"
    reads_factors = True

    @property
    def weighs(self) -> Literal["sum", "average", "equal"]:
        return "average"

    @property
    def keeps_equal(self) -> bool:
        return False

    def merge(self, parts: Sequence[Part], place: Place, facts: Facts) -> Delta:
        import torch

        from adapterhub_lite import LowRank, algebra, cores

        low, N = [algebra.low_rank(part.delta) for part in parts], len(parts)
        total = sum(part.weight for part in parts)
        shares = [part.weight / total for part in parts]
        B = torch.cat([algebra.scaled_b(own) for own in low], 1)  # (out, R)
        Q, R = cores.orthonormal(B)
        U, S, _ = cores.singular(R)  # (R, k), (k,)
        alpha = 1 / (1 + (N - 1) * S.square() / S.square().sum())
        B = B + Q @ (U * (alpha - 1)) @ (U.mT @ R)
        A = torch.cat([share * own.A.double() for share, own in zip(shares, low, strict=True)], 0)  # (R, in)
        summed = LowRank(B, A)
        before = sum(share * norm for share, norm in zip(shares, algebra.norms(low), strict=True))
        after = algebra.norm(summed)
        return LowRank(B * (before / after), A) if after > 0 else summed


@hookimpl
def rules() -> Iterable[type[Rule]]:
    return [Pico]
