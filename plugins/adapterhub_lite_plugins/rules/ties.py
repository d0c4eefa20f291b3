"""TIES: trim, elect signs, average what agrees."""

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
class Ties(Rule):
    """TIES-Merging (https://arxiv.org/abs/2306.01708).

    1. Trim: of each adapter the share `density` of largest entries is kept, δ̂ᵢ; over all layers together, or with
       `scope` "site" in each layer.
    2. Elect: the sign of each entry is γ = sgn Σ wᵢ δ̂ᵢ.
    3. Merge: ΔW = `scale` · the mean of the δ̂ᵢ of that sign, by their weights: Σ wᵢ δ̂ᵢ / Σ wᵢ.

    The paper has no weights; with equal ones this is it. `variant` says whose TIES it is. "mergekit" trims in each
    layer and keeps at least one entry, and a tie is positive. "peft" does so too, elects before weighing, by Σ δ̂ᵢ,
    and divides by the number of adapters that agree instead of their weights.
    """

    name = "ties"
    paper = "https://arxiv.org/abs/2306.01708"
    full_rank = True

    density: float = option(0.2, "The share of each adapter's entries that is kept.", above=0, most=1)
    scale: float = option(1.0, "A factor of the result, λ in the paper.")
    scope: Literal["model", "site"] = option("model", "Where the largest entries are looked for.")
    variant: Literal["paper", "mergekit", "peft"] = option("paper", "Whose TIES.")

    @property
    def weighs(self) -> Literal["sum", "average", "equal"]:
        return "sum" if self.variant == "peft" else "average"

    def default_weight(self, count: int) -> float:
        return 1.0 if self.variant == "peft" else 1 / count

    @property
    def keeps_one(self) -> bool:
        return self.density == 1 and self.scale == 1

    @property
    def passes(self) -> int:
        return 2 if self.scope == "model" and self.variant == "paper" and self.density < 1 else 0

    def observe(self, parts: Sequence[Part], place: Place, facts: Facts) -> Facts:
        from adapterhub_lite import elementwise

        return elementwise.observe(parts, facts)

    def conclude(self, observed: Mapping[str, Facts], facts: Facts) -> Facts:
        from adapterhub_lite import elementwise

        return elementwise.conclude(observed, facts, self.density)

    def merge(self, parts: Sequence[Part], place: Place, facts: Facts) -> Delta:
        import torch

        from adapterhub_lite import elementwise

        tie = 0.0 if self.variant == "paper" else 1.0
        kept = [self._threshold(part, facts) for part in parts]

        def merged(D: Tensor, w: Tensor, which: slice) -> Tensor:  # D: (N, rows, in), w: (N, 1, 1)
            D = elementwise.trimmed(D, kept)
            if self.variant == "peft":
                agree = elementwise.elected(D, D, tie)
                return self.scale * elementwise.average(w * D, torch.ones_like(w), agree)
            if tie:
                agree = elementwise.elected(D, w * D, tie) & (w != 0)
                return self.scale * elementwise.average(w * D, w, agree)
            return elementwise.vote(D, w).mul_(self.scale)

        return elementwise.by_rows(parts, place.shape, merged)

    def _threshold(self, part: Part, facts: Facts) -> float:
        from adapterhub_lite import elementwise

        if self.passes:
            found: float = facts["thresholds"][part.number]
            return found
        values = elementwise.sizes(part.delta)
        least = 1 if self.variant == "mergekit" else 0
        return elementwise.smallest_kept(values, max(least, int(self.density * len(values))))


@hookimpl
def rules() -> Iterable[type[Rule]]:
    return [Ties]
