"""Iso-C: all singular values of the sum made equal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from adapterhub_lite import Delta, Part, Place, Rule, hookimpl
from adapterhub_lite.options import option
from adapterhub_lite.rule import Facts


@dataclass(frozen=True, kw_only=True)
class IsoC(Rule):
    """Iso-C (https://arxiv.org/abs/2502.04959), on factors.

    The SVD of the sum is Σ wᵢ ΔWᵢ = U Σ Vᵀ; ΔW = `scale` · σ̄ U Vᵀ, where σ̄ is the mean singular value.

    For a change of rank R the mean depends on what it is taken over: with `over` "rank" the R singular values that are
    not zero; with "all" the min(out, in) of the whole matrix, as in the paper, which makes σ̄ smaller by
    R / min(out, in). In both the singular vectors of zeros, which are arbitrary, are left out, so that the rank
    stays R. The paper sums: weights are 1 each by default.
    """

    name = "iso_c"
    paper = "https://arxiv.org/abs/2502.04959"

    scale: float = option(1.0, "A factor of the result, α in the paper.")
    over: Literal["rank", "all"] = option("rank", "What the mean singular value is the mean of.")

    def default_weight(self, count: int) -> float:
        return 1.0

    @property
    def keeps_one(self) -> bool:
        return False

    def merge(self, parts: Sequence[Part], place: Place, facts: Facts) -> Delta:
        import torch

        from adapterhub_lite import LowRank, cores

        own = cores.joint(parts)
        U, S, Vh = cores.singular(torch.stack(own.cores).sum(0))  # (R, k), (k,), (k, R)
        over = len(S) if self.over == "rank" else min(place.shape)
        mean = float(S.sum()) / max(over, 1)
        return LowRank(own.Q @ (self.scale * mean * U), Vh @ own.P.mT)


@hookimpl
def rules() -> Iterable[type[Rule]]:
    return [IsoC]
