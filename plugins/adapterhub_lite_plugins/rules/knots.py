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
        from adapterhub_lite import elementwise

        return elementwise.observe(self._aligned(parts)[1], facts)

    def conclude(self, observed: Mapping[str, Facts], facts: Facts) -> Facts:
        from adapterhub_lite import elementwise

        return elementwise.conclude(observed, facts, self.density)

    def merge(self, parts: Sequence[Part], place: Place, facts: Facts) -> Delta:
        from adapterhub_lite import LowRank, elementwise

        U, aligned = self._aligned(parts)  # (out, R), and of each adapter Σ Vᵀ (R, in)
        if self.passes:
            kept = [facts["thresholds"][part.number] for part in aligned]
        else:
            kept = [elementwise.threshold(part.delta, self.density) for part in aligned]

        def merged(D: Tensor, w: Tensor, which: slice) -> Tensor:  # D: (N, rows, in), w: (N, 1, 1)
            D = elementwise.trimmed(D, kept)
            return elementwise.vote(D, w).mul_(self.scale)

        return LowRank(U, elementwise.by_rows(aligned, (U.shape[1], place.shape[1]), merged).W)

    def _aligned(self, parts: Sequence[Part]) -> tuple[Tensor, list[Part]]:
        import torch

        from adapterhub_lite import Dense, cores

        own = cores.joint([part._replace(weight=1.0) for part in parts])
        U, _, _ = cores.singular(torch.cat(own.cores, 1))  # (R, k): that of [ΔW₁ … ΔW_N] is Q U
        aligned = [Dense(U.mT @ core @ own.P.mT) for core in own.cores]
        return own.Q @ U, [part._replace(delta=delta) for part, delta in zip(parts, aligned, strict=True)]


@hookimpl
def rules() -> Iterable[type[Rule]]:
    return [Knots]
