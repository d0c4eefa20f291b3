"""Iso-CTS: a common subspace, and directions of each task beside it, all with one singular value."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from adapterhub_lite import Delta, Part, Place, Rule, hookimpl
from adapterhub_lite.options import option
from adapterhub_lite.rule import Facts


@dataclass(frozen=True, kw_only=True)
class IsoCts(Rule):
    """Iso-CTS (https://arxiv.org/abs/2502.04959), on factors.

    R is the sum of the N adapters' ranks, at most min(out, in); the paper has min(out, in) throughout. The top k
    singular directions Uₖ Σₖ Vₖᵀ of the sum Σ wᵢ ΔWᵢ are common; k is R times `common`, raised or lowered so that
    R − k is a multiple of N. Each adapter adds the top (R − k)/N singular directions of what is outside,
    (1 − Uₖ Uₖᵀ) wᵢ ΔWᵢ. All left and all right singular vectors are made orthonormal as in rule `tsv`, and
    ΔW = `scale` · σ̄ U⊥ V⊥ᵀ, where σ̄ is the mean of all R singular values.

    Directions whose singular value is 0 are arbitrary and left out, but count in the mean. The paper sums: weights
    are 1 each by default.
    """

    name = "iso_cts"
    paper = "https://arxiv.org/abs/2502.04959"

    common: float = option(0.8, "The share of directions that are common.", above=0, most=1)
    scale: float = option(1.0, "A factor of the result, α in the paper.")

    def default_weight(self, count: int) -> float:
        return 1.0

    @property
    def keeps_one(self) -> bool:
        return False

    def merge(self, parts: Sequence[Part], place: Place, facts: Facts) -> Delta:
        import torch

        from adapterhub_lite import LowRank, cores

        own, N = cores.joint(parts), len(parts)
        R = min(sum(len(cores.singular(core)[1]) for core in own.cores), *place.shape)
        outside = round((R - int(R * self.common)) / N)  # directions of each adapter
        k = R - outside * N
        U, S, Vh = cores.singular(torch.stack(own.cores).sum(0))
        kept = [(U[:, :k], S[:k], Vh[:k])]
        common = U[:, :k]  # (R, k)
        for core in own.cores:
            u, s, vh = cores.singular(core - common @ (common.mT @ core))
            kept.append((u[:, :outside], s[:outside], vh[:outside]))
        mean = sum(float(s.sum()) for _, s, _ in kept) / max(R, 1)
        left = cores.polar(torch.cat([u for u, _, _ in kept], 1))  # (R, ≤ R)
        right = cores.polar(torch.cat([vh for _, _, vh in kept], 0).mT)
        return LowRank(own.Q @ (self.scale * mean * left), right.mT @ own.P.mT)


@hookimpl
def rules() -> Iterable[type[Rule]]:
    return [IsoCts]
