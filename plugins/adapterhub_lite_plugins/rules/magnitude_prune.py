"""Magnitude pruning before the sum."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapterhub_lite import Delta, Part, Place, Rule, hookimpl
from adapterhub_lite.options import option
from adapterhub_lite.rule import Facts

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class MagnitudePrune(Rule):
    """ΔW = Σ wᵢ δ̂ᵢ, where δ̂ᵢ keeps the share `density` of the largest entries of a layer, and drops the rest.

    Pruning by magnitude (https://arxiv.org/abs/1506.02626), as PEFT merges by it.
    """

    name = "magnitude_prune"
    paper = "https://arxiv.org/abs/1506.02626"
    full_rank = True

    density: float = option(0.2, "The share of each layer's entries that is kept.", above=0, most=1)

    @property
    def keeps_one(self) -> bool:
        return self.density == 1

    def merge(self, parts: Sequence[Part], place: Place, facts: Facts) -> Delta:
        from adapterhub_lite import elementwise

        kept = [elementwise.threshold(part.delta, self.density) for part in parts]

        def merged(D: Tensor, w: Tensor, which: slice) -> Tensor:  # D: (N, rows, in), w: (N, 1, 1)
            return (w * elementwise.trimmed(D, kept)).sum(0)

        return elementwise.by_rows(parts, place.shape, merged)


@hookimpl
def rules() -> Iterable[type[Rule]]:
    return [MagnitudePrune]
