"""RobustMerge: the A's and the B's pruned, small directions scaled up, and each of the two merged by itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from adapterhub_lite import Delta, Part, Place, Rule, hookimpl
from adapterhub_lite.options import option
from adapterhub_lite.rule import Facts

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RobustMerge(Rule):
    """RobustMerge (https://arxiv.org/abs/2502.17159), as its authors' code computes it, on adapters of one rank.

    Of each Aᵢ and each Bᵢ the largest entries are kept, a share of `density`. Direction k, a row of Aᵢ, lost
    sᵢₖ = Σ|row| / Σ|kept of it|; those below the quantile `floor` of an adapter's are raised to it. Then
    Ā = `factor` · Σ kept Aᵢ, B̄ = `factor` · Σ kept Bᵢ diag(sᵢ) / Σ sᵢ, and ΔW = B̄ Ā.

    That is not a sum of changes: it has products of one adapter's B with another's A, and depends on how each ΔWᵢ is
    factored. The factors in the file are taken, α/r in B. A direction of which nothing is kept, for which the code
    divides by 0, counts like the largest of the others.
    """

    name = "robust_merge"
    paper = "https://arxiv.org/abs/2502.17159"
    reads_factors = True
    same_rank = True

    density: float = option(0.2, "The share of the entries of each A and each B that is kept.", above=0, most=1)
    floor: float = option(0.8, "The quantile that smaller scalings of directions are raised to.", least=0, below=1)
    factor: float = option(2.0, "What the A's and the B's are multiplied by, each.", above=0)

    @property
    def weighs(self) -> Literal["sum", "average", "equal"]:
        return "equal"

    @property
    def keeps_one(self) -> bool:
        return self.density == self.factor == 1

    @property
    def keeps_equal(self) -> bool:
        return False

    def rank(self, ranks: Sequence[int], shape: tuple[int, int]) -> int:
        return min(max(ranks, default=0), *shape)

    def merge(self, parts: Sequence[Part], place: Place, facts: Facts) -> Delta:
        import torch

        from adapterhub_lite import LowRank, algebra

        low = [algebra.low_rank(part.delta) for part in parts]
        A = torch.stack([own.A.double() for own in low])  # (N, r, in)
        B = torch.stack([algebra.scaled_b(own) for own in low])  # (N, out, r)
        kept = self._kept(A)
        s = self._raised(A.abs().sum(2), kept.abs().sum(2))  # (N, r)
        B = (self._kept(B) * s[:, None]).sum(0) / s.sum(0)  # (out, r)
        return LowRank(self.factor * B, self.factor * kept.sum(0))

    def _kept(self, X: Tensor) -> Tensor:
        """The largest entries of each of the matrices (N, a, b), zeros in place of the others."""
        flat = X.abs().flatten(1)
        k = max(int(flat.shape[1] * (1 - self.density)), 1)  # that one is kept too
        least = flat.kthvalue(k, dim=1).values  # (N,)
        return X * (X.abs() >= least[:, None, None])

    def _raised(self, whole: Tensor, kept: Tensor) -> Tensor:
        """The scalings (N, r) of directions, from their sums of magnitudes before and after."""
        some = kept > 0
        s = (whole / kept).where(some, 0.0)
        s = s.where(some, s.amax(1, keepdim=True))
        s = s.where(s > 0, 1.0)  # an A that is zero
        floor = s.sort(dim=1).values[:, int(s.shape[1] * self.floor)]  # (N,)
        return s.maximum(floor[:, None])


@hookimpl
def rules() -> Iterable[type[Rule]]:
    return [RobustMerge]
