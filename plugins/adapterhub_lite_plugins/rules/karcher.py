"""The Karcher mean: the middle on the sphere of directions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from adapterhub_lite import Delta, Part, Place, Rule, hookimpl
from adapterhub_lite.errors import NotMergeable
from adapterhub_lite.options import option
from adapterhub_lite.rule import Facts, shares


@dataclass(frozen=True, kw_only=True)
class Karcher(Rule):
    """The weighted Karcher mean of the directions (https://arxiv.org/abs/2603.04972), at each site.

    With uᵢ = ΔWᵢ / ‖ΔWᵢ‖ and shares αᵢ of the weights, m is the unit vector in which Σ αᵢ log_m(uᵢ) vanishes, and
    ΔW = Σ αᵢ ‖ΔWᵢ‖ · m. It is reached from the normalised mean of the uᵢ by steps m ← exp_m(Σ αᵢ log_m(uᵢ)), at most
    `iterations`, until a step is shorter than `tolerance`. With 0 iterations it is the normalised mean, mergekit's
    multi-SLERP. Changes of norm 0 have no direction and take no part in it. m is a mix of the uᵢ all along, so that
    nothing but their inner products is needed, which come from factors.
    """

    name = "karcher"
    paper = "https://arxiv.org/abs/2603.04972"

    iterations: int = option(100, "How many steps at most.", least=0)
    tolerance: float = option(1e-12, "The length of a step that is the last.", least=0)

    @property
    def weighs(self) -> Literal["sum", "average", "equal"]:
        return "average"

    def merge(self, parts: Sequence[Part], place: Place, facts: Facts) -> Delta:
        import torch

        from adapterhub_lite import cores
        from adapterhub_lite.algebra import total

        alpha = torch.tensor(shares(self, [part.weight for part in parts]), dtype=torch.float64)  # (N,)
        G = cores.gram(parts)  # (N, N)
        norms = G.diagonal().sqrt()
        there = norms > 0
        if not there.any():
            return total(part.delta.scaled(0.0) for part in parts)
        inverse = torch.where(there, 1 / torch.where(there, norms, 1.0), 0.0)
        cosines = G * inverse[:, None] * inverse[None, :]  # ⟨uᵢ, uⱼ⟩
        a = alpha * there
        a = a / a.sum() if a.sum() > 0 else a

        def length(c: torch.Tensor) -> float:
            """‖Σ cᵢ uᵢ‖."""
            return float((c @ cosines @ c).clamp(min=0).sqrt())

        if length(a) < 1e-8:
            raise NotMergeable(
                "the directions of the changes cancel: they have no mean", where=place.name, fix="change the weights"
            )
        c = a / length(a)  # m = Σ cᵢ uᵢ
        for _ in range(self.iterations):
            dots = (cosines @ c).clamp(-1, 1)  # ⟨m, uᵢ⟩
            theta = torch.acos(dots)
            f = torch.where(theta < 1e-8, 1.0, theta / torch.sin(theta).clamp(min=1e-300)) * a
            tangent = f - (f @ dots) * c  # Σ αᵢ θᵢ/sin θᵢ (uᵢ − ⟨m, uᵢ⟩ m), in the uᵢ
            step = length(tangent)
            if step <= self.tolerance:
                break
            c = torch.cos(torch.tensor(step)) * c + torch.sin(torch.tensor(step)) / step * tangent
            c = c / length(c)
        scale = float(alpha @ norms)
        return total(part.delta.scaled(scale * float(x)) for part, x in zip(parts, c * inverse, strict=True))


@hookimpl
def rules() -> Iterable[type[Rule]]:
    return [Karcher]
