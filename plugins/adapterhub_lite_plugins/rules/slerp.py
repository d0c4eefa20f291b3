"""SLERP: along the arc between two changes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from adapterhub_lite import Delta, Part, Place, Rule, hookimpl
from adapterhub_lite.errors import NotMergeable
from adapterhub_lite.rule import Facts, shares


@dataclass(frozen=True, kw_only=True)
class Slerp(Rule):
    """Spherical linear interpolation (Shoemake, https://doi.org/10.1145/325334.325242) of two changes at each site.

    ΔW = sin(t₁θ)/sin θ · ΔW₁ + sin(t₂θ)/sin θ · ΔW₂, where θ is the angle between them and t₁ + t₂ = 1 are the shares
    of the weights; where θ is nearly 0, t₁ ΔW₁ + t₂ ΔW₂. The norms are not made equal before. θ comes from factors:
    ⟨B₁A₁, B₂A₂⟩ = tr((B₁ᵀB₂)(A₂A₁ᵀ)).
    """

    name = "slerp"
    paper = "https://doi.org/10.1145/325334.325242"
    takes = 2

    @property
    def weighs(self) -> Literal["sum", "average", "equal"]:
        return "average"

    def merge(self, parts: Sequence[Part], place: Place, facts: Facts) -> Delta:
        from adapterhub_lite import cores
        from adapterhub_lite.algebra import total

        t = shares(self, [part.weight for part in parts])
        G = cores.gram(parts)  # (2, 2)
        norms = math.sqrt(G[0, 0] * G[1, 1])
        cosine = max(-1.0, min(1.0, float(G[0, 1]) / norms)) if norms > 0 else 1.0
        if cosine < -1 + 1e-12:
            raise NotMergeable(
                "the two changes point in opposite directions: no arc between them is the shortest",
                where=place.name,
                fix="choose rule sum or mean",
            )
        theta = math.acos(cosine)
        c = t if theta < 1e-6 else [math.sin(share * theta) / math.sin(theta) for share in t]
        return total(part.delta.scaled(own) for part, own in zip(parts, c, strict=True))


@hookimpl
def rules() -> Iterable[type[Rule]]:
    return [Slerp]
