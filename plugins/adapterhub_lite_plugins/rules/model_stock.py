"""Model Stock: how far to go from the base to the average, from the angle between the changes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from adapterhub_lite import Delta, Part, Place, Rule, hookimpl
from adapterhub_lite.rule import Facts


@dataclass(frozen=True, kw_only=True)
class ModelStock(Rule):
    """Model Stock (https://arxiv.org/abs/2403.19522), layer by layer.

    ΔW = t · (1/N) Σ ΔWᵢ with t = N cos θ / (1 + (N − 1) cos θ), where cos θ is the mean cosine of all pairs. One
    adapter has no pairs and is itself. The cosines come from factors. Where changes oppose each other so much that
    the denominator is 0, t is 0, as in mergekit.
    """

    name = "model_stock"
    paper = "https://arxiv.org/abs/2403.19522"

    @property
    def weighs(self) -> Literal["sum", "average", "equal"]:
        return "equal"

    def merge(self, parts: Sequence[Part], place: Place, facts: Facts) -> Delta:
        from adapterhub_lite import cores
        from adapterhub_lite.algebra import total

        N = len(parts)
        if N == 1:
            return parts[0].delta
        G = cores.gram(parts)  # (N, N)
        norms = G.diagonal().sqrt()
        products = norms[:, None] * norms[None, :]
        cosines = (G / products.where(products > 0, 1.0)).clamp(-1, 1)
        cosine = float((cosines.sum() - cosines.trace()) / (N * (N - 1)))
        below = 1 + (N - 1) * cosine
        t = N * cosine / below if abs(below) > 1e-6 else 0.0
        return total(part.delta.scaled(t / N) for part in parts)


@hookimpl
def rules() -> Iterable[type[Rule]]:
    return [ModelStock]
