"""DELLA: drop at random, small entries more often, rescale, elect, average."""

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
class Della(Rule):
    """DELLA-Merging (https://arxiv.org/abs/2406.11617).

    1. Drop (MagPrune): the entries of a row are ranked by magnitude, rank 0 the smallest of n. Entry i is kept with
       probability qᵢ = `density` − `window`/2 + `window` · rankᵢ / (n − 1), and divided by qᵢ. The draws depend on
       the `seed`, the layer's name and the adapter's own numbers, on no order.
    2. Elect and 3. Fuse: as in rule `ties`, times `scale`.

    `density` is 1 − p in the paper, `window` is ε there. mergekit's option epsilon is half of it, and it restores the
    layer's sum of magnitudes instead of dividing by qᵢ. With `density` 1 nothing is dropped.
    """

    name = "della"
    paper = "https://arxiv.org/abs/2406.11617"
    full_rank = True

    density: float = option(0.3, "The mean share of entries that is kept.", above=0, most=1)
    window: float = option(0.14, "How far apart the chances of the smallest and the largest are.", least=0, below=1)
    scale: float = option(1.0, "A factor of the result, λ in the paper.")
    seed: int = option(0, "What is drawn from.", least=0)

    def check(self) -> None:
        if self.density < 1 and not self.window / 2 < self.density <= 1 - self.window / 2:
            raise ConfigError(
                f"density {self.density} ± half of window {self.window} is not between 0 and 1",
                where="rule 'della'",
                fix="give a smaller window",
            )

    @property
    def weighs(self) -> Literal["sum", "average", "equal"]:
        return "average"

    @property
    def keeps_one(self) -> bool:
        return self.density == 1 and self.scale == 1

    def merge(self, parts: Sequence[Part], place: Place, facts: Facts) -> Delta:
        import torch

        from adapterhub_lite import elementwise

        u = torch.stack([self.uniform(part, place) for part in parts])  # (N, out, in)

        def merged(D: Tensor, w: Tensor, which: slice) -> Tensor:  # D: (N, rows, in), w: (N, 1, 1)
            if self.density < 1:
                rank = D.abs().argsort(dim=-1, stable=True).argsort(-1).double()  # of each entry in its row
                q = self.density - self.window / 2 + self.window * rank / max(D.shape[-1] - 1, 1)
                D = D * (u[:, which] < q) / q
            return elementwise.vote(D, w).mul_(self.scale)

        return elementwise.by_rows(parts, place.shape, merged)


@hookimpl
def rules() -> Iterable[type[Rule]]:
    return [Della]
