"""KnOTS: TIES in the basis that all adapters share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from adapterhub_lite import Delta, Part, Place, Rule, hookimpl
from adapterhub_lite.options import option
from adapterhub_lite.rule import Facts

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_lite.cores import Aligned


@dataclass(frozen=True, kw_only=True)
class Knots(Rule):
    """KnOTS-TIES (https://arxiv.org/abs/2410.19735), on factors.

    The SVD of all changes side by side is [ΔW₁ … ΔW_N] = U Σ [V₁ᵀ … V_Nᵀ]. The matrices Σ Vᵢᵀ = Uᵀ ΔWᵢ, of R rows,
    are merged by TIES as in rule `ties`: of each the share `density` of largest entries is kept (over all layers, or
    with `scope` "site" in each), signs are elected, what agrees is averaged, times `scale`. Then ΔW = U · that.
    """

    name = "knots"
    paper = "https://arxiv.org/abs/2410.19735"

    density: float = option(0.2, "The share of each adapter's entries that is kept.", above=0, most=1)
    scale: float = option(1.0, "A factor of the result.")
    scope: Literal["model", "site"] = option("model", "Where the largest entries are looked for.")

    @property
    def weighs(self) -> Literal["sum", "average", "equal"]:
        return "average"

    @property
    def keeps_one(self) -> bool:
        return self.density == 1 and self.scale == 1

    @property
    def passes(self) -> int:
        return 2 if self.scope == "model" and self.density < 1 else 0

    def observe(self, parts: Sequence[Part], place: Place, facts: Facts) -> Facts:
        from adapterhub_lite import cores, elementwise

        return elementwise.observe(self._small(parts, cores.aligned(parts)), facts)

    def conclude(self, observed: Mapping[str, Facts], facts: Facts) -> Facts:
        from adapterhub_lite import elementwise

        return elementwise.conclude(observed, facts, self.density)

    def merge(self, parts: Sequence[Part], place: Place, facts: Facts) -> Delta:
        from adapterhub_lite import LowRank, cores, elementwise

        own = cores.aligned(parts)
        small = self._small(parts, own)
        if self.passes:
            kept = [facts["thresholds"][part.number] for part in small]
        else:
            kept = [elementwise.threshold(part.delta, self.density) for part in small]

        def merged(D: Tensor, w: Tensor, which: slice) -> Tensor:  # D: (N, rows, in), w: (N, 1, 1)
            return elementwise.vote(elementwise.trimmed(D, kept), w).mul_(self.scale)

        U = own.U.dense()  # (out, R)
        return LowRank(U, elementwise.by_rows(small, (U.shape[1], place.shape[1]), merged).W)

    def _small(self, parts: Sequence[Part], own: Aligned) -> list[Part]:
        """Of each adapter Σ Vᵀ (R, in)."""
        from adapterhub_lite import LowRank

        deltas = [LowRank(left, A) for left, A in zip(own.left, own.A, strict=True)]
        return [part._replace(delta=delta) for part, delta in zip(parts, deltas, strict=True)]


@hookimpl
def rules() -> Iterable[type[Rule]]:
    return [Knots]
