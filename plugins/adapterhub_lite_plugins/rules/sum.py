"""The exact weighted sum."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from adapterhub_lite import Delta, Part, Place, Rule, hookimpl
from adapterhub_lite.rule import Facts


@dataclass(frozen=True, kw_only=True)
class Sum(Rule):
    """ΔW = Σ wᵢ ΔWᵢ, task arithmetic (https://arxiv.org/abs/2212.04089), exactly.

    It is what `adapter merge` does without a rule. A negative weight takes an adapter away.
    """

    name = "sum"
    paper = "https://arxiv.org/abs/2212.04089"

    def merge(self, parts: Sequence[Part], place: Place, facts: Facts) -> Delta:
        from adapterhub_lite.algebra import total

        return total(part.scaled for part in parts)


@hookimpl
def rules() -> Iterable[type[Rule]]:
    return [Sum]
