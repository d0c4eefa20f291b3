"""TSV-Merge: singular vectors of all adapters, made orthogonal to each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from adapterhub_lite import Delta, Part, Place, Rule, hookimpl
from adapterhub_lite.options import option
from adapterhub_lite.rule import Facts


@dataclass(frozen=True, kw_only=True)
class Tsv(Rule):
    """TSV-Merge (https://arxiv.org/abs/2412.00081), on factors.

    With the SVDs wᵢ ΔWᵢ = Uᵢ Σᵢ Vᵢᵀ, of each the `top` largest singular values: U = [U₁ … U_N], V = [V₁ … V_N] are
    replaced by the nearest matrices with orthonormal columns, U⊥ = U (UᵀU)^(−1/2) and V⊥, and ΔW = U⊥ Σ V⊥ᵀ.

    The paper keeps the N-th part of min(out, in), which for low-rank changes is more than they have; so `top` is 0
    by default, which means all that are not zero. Singular vectors of zeros, which are arbitrary, are left out, and so
    are directions that U or V lack. The paper sums: weights are 1 each by default.
    """

    name = "tsv"
    paper = "https://arxiv.org/abs/2412.00081"

    top: int = option(0, "How many singular values are kept of each adapter; 0 keeps all.", least=0)

    def default_weight(self, count: int) -> float:
        return 1.0

    @property
    def keeps_one(self) -> bool:
        return self.top == 0

    def rank(self, ranks: Sequence[int], shape: tuple[int, int]) -> int:
        return min(sum(min(rank, self.top or rank) for rank in ranks), *shape)

    def merge(self, parts: Sequence[Part], place: Place, facts: Facts) -> Delta:
        import torch

        from adapterhub_lite import LowRank, cores

        own = cores.joint(parts)
        found = [cores.singular(core) for core in own.cores]
        end = self.top or None
        U = cores.polar(torch.cat([u[:, :end] for u, _, _ in found], 1))  # (R, Σk)
        V = cores.polar(torch.cat([vh[:end] for _, _, vh in found], 0).mT)  # (R, Σk)
        S = torch.cat([s[:end] for _, s, _ in found])  # (Σk,)
        return LowRank(own.Q @ (U * S), V.mT @ own.P.mT)


@hookimpl
def rules() -> Iterable[type[Rule]]:
    return [Tsv]
