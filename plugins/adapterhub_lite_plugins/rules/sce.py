"""SCE: select by variance, calculate weights, erase the minority."""

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
class Sce(Rule):
    """SCE of FuseChat (https://arxiv.org/abs/2408.07990), in each layer.

    1. Select: of the entries in which adapters differ, the share `select` with the largest variance among them, δ̂ᵢ.
    2. Calculate: the weight of an adapter is ηᵢ = Σ δ̂ᵢ² / Σⱼ Σ δ̂ⱼ².
    3. Erase: entries against the sign of Σ δ̂ᵢ; then ΔW = Σ ηᵢ δ̂ᵢ / Σ ηᵢ over those that are left.

    It is mergekit's, with `select_topk` called `select`; in the authors' first code the selection concerned the
    weights alone.
    """

    name = "sce"
    paper = "https://arxiv.org/abs/2408.07990"
    full_rank = True

    select: float = option(1.0, "The share of entries that is selected.", above=0, most=1)

    @property
    def weighs(self) -> Literal["sum", "average", "equal"]:
        return "equal"

    @property
    def keeps_one(self) -> bool:
        return self.select == 1

    def merge(self, parts: Sequence[Part], place: Place, facts: Facts) -> Delta:
        import torch

        from adapterhub_lite import elementwise

        def variance(D: Tensor, w: Tensor, which: slice) -> Tensor:
            return D.var(0, unbiased=False)

        least = 0.0
        if self.select < 1:
            values = elementwise.sizes(elementwise.by_rows(parts, place.shape, variance))
            least = elementwise.smallest_kept(values, int(self.select * int((values != 0).sum())))
        squares = torch.zeros(len(parts), 1, 1, dtype=torch.float64)

        def selected(D: Tensor) -> Tensor:  # (N, rows, in)
            return D * (D.var(0, unbiased=False).float() >= least) if self.select < 1 else D

        for which in elementwise.blocks(place.shape):
            D = selected(torch.stack([elementwise.rows(part.delta, which) for part in parts]))
            squares += D.square().sum((1, 2), keepdim=True)
        eta = squares / squares.sum() if squares.sum() > 0 else squares  # (N, 1, 1)

        def merged(D: Tensor, w: Tensor, which: slice) -> Tensor:
            D = selected(D)
            agree = elementwise.elected(D, D, 1.0)
            return elementwise.average(eta * D, eta, agree)

        return elementwise.by_rows(parts, place.shape, merged)


@hookimpl
def rules() -> Iterable[type[Rule]]:
    return [Sce]
