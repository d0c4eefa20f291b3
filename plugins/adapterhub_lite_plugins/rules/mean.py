"""The exact weighted mean."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from adapterhub_lite import Delta, Part, Place, Rule, hookimpl
from adapterhub_lite.rule import Facts, shares


@dataclass(frozen=True, kw_only=True)
class Mean(Rule):
    """ΔW = Σ wᵢ ΔWᵢ / Σ wᵢ (model soups, https://arxiv.org/abs/2203.05482), exactly.

    The mean of the changes, not of their factors.
    """

    name = "mean"
    paper = "https://arxiv.org/abs/2203.05482"

    @property
    def weighs(self) -> Literal["sum", "average", "equal"]:
        return "average"

    def merge(self, parts: Sequence[Part], place: Place, facts: Facts) -> Delta:
        from adapterhub_lite.algebra import total

        w = shares(self, [part.weight for part in parts])
        return total(part.delta.scaled(share) for part, share in zip(parts, w, strict=True))


@hookimpl
def rules() -> Iterable[type[Rule]]:
    return [Mean]
