"""DARE: drop at random and rescale, then the sum."""

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
class DareLinear(Rule):
    """DARE (https://arxiv.org/abs/2311.03099): ΔW = Σ wᵢ mᵢ ∘ δᵢ / density, with mᵢ ~ Bernoulli(density).

    `density` is the share that is kept, 1 − p in the paper. The masks depend on the `seed`, the layer's name and the
    adapter's own numbers, on no order. `variant` says whose rescaling it is: that of "paper", which is PEFT's too, or
    "mergekit", which restores each layer's sum of magnitudes instead.
    """

    name = "dare_linear"
    paper = "https://arxiv.org/abs/2311.03099"
    full_rank = True

    density: float = option(0.2, "The share of each adapter's entries that is kept.", above=0, most=1)
    seed: int = option(0, "What the masks are drawn from.", least=0)
    variant: Literal["paper", "mergekit", "peft"] = option("paper", "Whose DARE.")

    @property
    def keeps_one(self) -> bool:
        return self.density == 1

    def merge(self, parts: Sequence[Part], place: Place, facts: Facts) -> Delta:
        import torch

        from adapterhub_lite import elementwise

        m = [self.drawn(part, place, self.density) for part in parts]  # (out, in) each
        if self.variant == "mergekit" and self.density < 1:
            s = [elementwise.restoring(part.delta, own) for part, own in zip(parts, m, strict=True)]
        else:
            s = [1 / self.density] * len(parts)
        scale = torch.tensor(s, dtype=torch.float64)[:, None, None]

        def merged(D: Tensor, w: Tensor, which: slice) -> Tensor:  # D: (N, rows, in), w: (N, 1, 1)
            for own, mask in zip(D.mul_(w * scale), m, strict=True):
                own.mul_(mask[which])
            return D.sum(0)

        return elementwise.by_rows(parts, place.shape, merged)


@hookimpl
def rules() -> Iterable[type[Rule]]:
    return [DareLinear]
