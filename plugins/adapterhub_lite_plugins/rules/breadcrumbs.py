"""Model Breadcrumbs: neither the smallest entries nor the largest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from adapterhub_lite import Delta, Part, Place, Rule, hookimpl
from adapterhub_lite.errors import ConfigError
from adapterhub_lite.options import option
from adapterhub_lite.rule import Facts

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Breadcrumbs(Rule):
    """Model Breadcrumbs (https://arxiv.org/abs/2312.06795): ΔW = Σ wᵢ mᵢ ∘ δᵢ.

    The mask mᵢ drops the share `gamma` of the largest entries and of the others the smallest, so that the share
    `density` is left: in each layer, as the paper writes, or with `within` "row" in each of its rows, as the
    authors' code does. The defaults are ours.
    """

    name = "breadcrumbs"
    paper = "https://arxiv.org/abs/2312.06795"
    full_rank = True

    density: float = option(0.1, "The share of each adapter's entries that is kept.", above=0, most=1)
    gamma: float = option(0.01, "The share of the largest entries, which are dropped.", least=0, below=1)
    within: Literal["site", "row"] = option("site", "What entries are compared in.")

    def check(self) -> None:
        if self.density < 1 and self.density + self.gamma > 1:
            raise ConfigError(
                f"density {self.density} and gamma {self.gamma} are more than everything",
                where="rule 'breadcrumbs'",
                fix="make one smaller",
            )

    @property
    def keeps_one(self) -> bool:
        return self.density == 1

    def merge(self, parts: Sequence[Part], place: Place, facts: Facts) -> Delta:
        from adapterhub_lite import elementwise

        bounds = [self._bounds(part) for part in parts] if self.within == "site" else []

        def merged(D: Tensor, w: Tensor, which: slice) -> Tensor:  # D: (N, rows, in), w: (N, 1, 1)
            if self.density == 1:
                return (w * D).sum(0)
            if self.within == "site":
                low, high = ([own[i] for own in bounds] for i in (0, 1))
                return (w * D * elementwise.largest(D, low) * ~elementwise.largest(D, high)).sum(0)
            kept, dropped = self._counts(D.shape[-1])
            rank = D.abs().argsort(dim=-1, descending=True, stable=True).argsort(-1)
            return (w * D * ((rank >= dropped) & (rank < kept + dropped))).sum(0)

        return elementwise.by_rows(parts, place.shape, merged)

    def _counts(self, entries: int) -> tuple[int, int]:
        """How many are kept, and how many of the largest are dropped."""
        return int(self.density * entries), int(self.gamma * entries)

    def _bounds(self, part: Part) -> tuple[float, float]:
        from adapterhub_lite import elementwise

        values = elementwise.sizes(part.delta)
        kept, dropped = self._counts(len(values))
        return elementwise.smallest_kept(values, kept + dropped), elementwise.smallest_kept(values, dropped)


@hookimpl
def rules() -> Iterable[type[Rule]]:
    return [Breadcrumbs]
