"""DARE with the elected signs of TIES."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from adapterhub_lite import Delta, Part, Place, Rule, hookimpl
from adapterhub_lite.options import option
from adapterhub_lite.rule import Facts

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class DareTies(Rule):
    """DARE (https://arxiv.org/abs/2311.03099) in place of the trimming of TIES (https://arxiv.org/abs/2306.01708).

    δ̂ᵢ = mᵢ ∘ δᵢ / density with mᵢ ~ Bernoulli(density); then signs are elected and what agrees is averaged, as in
    rule `ties`, times `scale`. Nothing is trimmed besides. The masks depend on the `seed`, the layer's name and the
    adapter's own numbers, on no order. `variant`: "mergekit" restores each layer's sum of magnitudes instead of
    dividing by `density`, and does not divide by the weights that agree; "peft" elects before weighing and divides by
    the number of adapters that agree. A tie is positive in both.
    """

    name = "dare_ties"
    paper = "https://arxiv.org/abs/2311.03099"
    full_rank = True

    density: float = option(0.2, "The share of each adapter's entries that is kept.", above=0, most=1)
    scale: float = option(1.0, "A factor of the result.")
    seed: int = option(0, "What the masks are drawn from.", least=0)
    variant: Literal["paper", "mergekit", "peft"] = option("paper", "Whose DARE and TIES.")

    @property
    def weighs(self) -> Literal["sum", "average", "equal"]:
        return "average" if self.variant == "paper" else "sum"

    def default_weight(self, count: int) -> float:
        return 1.0 if self.variant == "peft" else 1 / count

    @property
    def keeps_one(self) -> bool:
        return self.density == 1 and self.scale == 1

    def merge(self, parts: Sequence[Part], place: Place, facts: Facts) -> Delta:
        import torch

        from adapterhub_lite import elementwise

        m = [self.drawn(part, place, self.density) for part in parts]  # (out, in) each
        if self.variant == "mergekit" and self.density < 1:
            s = [elementwise.restoring(part.delta, own) for part, own in zip(parts, m, strict=True)]
        else:
            s = [1 / self.density] * len(parts)
        rescale = torch.tensor(s, dtype=torch.float64)[:, None, None]

        def merged(D: Tensor, w: Tensor, which: slice) -> Tensor:  # D: (N, rows, in), w: (N, 1, 1)
            for own, mask in zip(D.mul_(rescale), m, strict=True):
                own.mul_(mask[which])
            if self.variant == "peft":
                agree = elementwise.elected(D, D, 1.0)
                return self.scale * elementwise.average(w * D, torch.ones_like(w), agree)
            if self.variant == "mergekit":
                return self.scale * (w * D * elementwise.elected(w * D, w * D, 1.0)).sum(0)
            return elementwise.vote(D, w).mul_(self.scale)

        return elementwise.by_rows(parts, place.shape, merged)


@hookimpl
def rules() -> Iterable[type[Rule]]:
    return [DareTies]
