"""Core Space: adapters as small matrices between bases that they share, merged there."""

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
class CoreSpace(Rule):
    """Core Space Merging (https://arxiv.org/abs/2509.17786), on factors.

    U is the left singular basis of all B side by side, V the right one of all A on top of each other; the adapters are
    Mᵢ = Uᵀ Bᵢ Aᵢ V (R, R), without loss. These are merged, and ΔW = `scale` · U M Vᵀ. `inside` says how: "ties" keeps
    the share `density` of largest entries of each Mᵢ, elects signs and averages what agrees, as rule `ties` does in
    each layer; "dare_ties" keeps entries at random, by `seed`, and divides by `density`, in place of the trimming.

    The paper's other inner rules are rules of their own, for they do not depend on the basis: the sum, `tsv`, and
    `iso_c`. Entries do: the result depends on how ΔWᵢ is factored, and is taken for the factors that the file has.
    """

    name = "core_space"
    paper = "https://arxiv.org/abs/2509.17786"
    reads_factors = True

    inside: Literal["ties", "dare_ties"] = option("ties", "How the small matrices are merged.")
    density: float = option(0.2, "The share of each small matrix's entries that is kept.", above=0, most=1)
    scale: float = option(1.0, "A factor of the result.")
    seed: int = option(0, "What the masks of dare_ties are drawn from.", least=0)

    @property
    def weighs(self) -> Literal["sum", "average", "equal"]:
        return "average"

    @property
    def keeps_one(self) -> bool:
        return self.density == 1 and self.scale == 1

    def merge(self, parts: Sequence[Part], place: Place, facts: Facts) -> Delta:
        import torch

        from adapterhub_lite import Dense, LowRank, algebra, elementwise

        low = [algebra.low_rank(part.delta) for part in parts]
        U = self._basis(torch.cat([algebra.scaled_b(own) for own in low], 1))  # (out, R)
        V = self._basis(torch.cat([own.A.double() for own in low], 0).mT)  # (in, R')
        M = [(U.mT @ algebra.scaled_b(own)) @ (own.A.double() @ V) for own in low]  # (R, R') each
        small = [part._replace(delta=Dense(core)) for part, core in zip(parts, M, strict=True)]
        merged = elementwise.voted(self, small, Place(place.name, (U.shape[1], V.shape[1])), self.density, self.inside)
        return LowRank(U @ (self.scale * merged), V.mT)

    def _basis(self, M: Tensor) -> Tensor:
        """The left singular vectors of M, those of zeros left out."""
        from adapterhub_lite import cores

        Q, R = cores.orthonormal(M)
        return Q @ cores.singular(R)[0]


@hookimpl
def rules() -> Iterable[type[Rule]]:
    return [CoreSpace]
