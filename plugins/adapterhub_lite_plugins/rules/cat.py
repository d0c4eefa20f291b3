"""CAT of LoRA Soups: a sum whose weights differ from module to module."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from adapterhub_lite import Delta, Part, Place, Rule, hookimpl
from adapterhub_lite.rule import Facts


@dataclass(frozen=True, kw_only=True)
class Cat(Rule):
    """ΔWˡ = Σ αᵢˡ ΔWᵢˡ at each layer l (https://arxiv.org/abs/2410.13025).

    The αᵢˡ are the weights, given by patterns of site names; in the paper they were learned, here they are taken as
    they are. With the same weights everywhere it is the exact sum.
    """

    name = "cat"
    paper = "https://arxiv.org/abs/2410.13025"

    def merge(self, parts: Sequence[Part], place: Place, facts: Facts) -> Delta:
        from adapterhub_lite.algebra import total

        return total(part.scaled for part in parts)


@hookimpl
def rules() -> Iterable[type[Rule]]:
    return [Cat]
