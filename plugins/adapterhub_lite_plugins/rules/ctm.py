"""Compress-then-Merge: small matrices between bases of a given size that all adapters share, merged there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from adapterhub_lite import Delta, Part, Place, Rule, hookimpl
from adapterhub_lite.options import option
from adapterhub_lite.rule import Facts

if TYPE_CHECKING:
    from torch import Tensor

_STEPS, _TOLERANCE = 1000, 1e-6  # as in the authors' code: at most so often, and until the error changes by less


@dataclass(frozen=True, kw_only=True)
class CompressThenMerge(Rule):
    """Compress-then-Merge (https://arxiv.org/abs/2606.03723), on factors.

    U and V, of `dimensions` columns, are the bases in which the adapters lose least together: the Tucker-2
    decomposition of the ΔWᵢ · (`beta` + (1 − `beta`) · m / ‖ΔWᵢ‖), m the mean norm, which for `beta` 0 makes them
    count alike. It starts from the singular vectors of all of them side by side, and on top of each other, and
    improves U and V in turns. The ΔWᵢ as they are become Oᵢ = Uᵀ ΔWᵢ V. These are merged, and ΔW = `scale` · U O Vᵀ,
    of rank `dimensions` at most. `inside` says how: "ties" keeps the share `density` of largest entries of each Oᵢ,
    elects signs and averages what agrees, as rule `ties` does in each layer; "dare_ties" keeps entries at random, by
    `seed`, and divides by `density`, in place of the trimming.
    """

    name = "ctm"
    paper = "https://arxiv.org/abs/2606.03723"

    dimensions: int = option(0, "The rank of the result; 0 is the largest rank of the adapters.", least=0)
    beta: float = option(0.0, "How far adapters of a larger norm count more for the bases.", least=0, most=1)
    inside: Literal["ties", "dare_ties"] = option("ties", "How the small matrices are merged.")
    density: float = option(0.2, "The share of each small matrix's entries that is kept.", above=0, most=1)
    scale: float = option(1.0, "A factor of the result.")
    seed: int = option(0, "What the masks of dare_ties are drawn from.", least=0)

    @property
    def weighs(self) -> Literal["sum", "average", "equal"]:
        return "average"

    @property
    def keeps_one(self) -> bool:
        return self.density == 1 and self.scale == 1 and self.dimensions == 0

    def rank(self, ranks: Sequence[int], shape: tuple[int, int]) -> int:
        return min(self.dimensions or max(ranks, default=0), sum(ranks), *shape)

    def merge(self, parts: Sequence[Part], place: Place, facts: Facts) -> Delta:
        import torch

        from adapterhub_lite import Dense, LowRank, cores, elementwise

        own = cores.joint([part._replace(weight=1.0) for part in parts])
        D = torch.stack(own.cores)  # (N, R, R')
        norms = torch.linalg.matrix_norm(D)[:, None, None]
        alike = D * (self.beta + (1 - self.beta) * norms.mean() / norms.where(norms > 0, 1.0))
        U, V = _bases(alike, self.dimensions or int(torch.linalg.matrix_rank(D, rtol=1e-10).max()))  # (R, k), (R', k')
        small = [part._replace(delta=Dense(o)) for part, o in zip(parts, U.mT @ D @ V, strict=True)]
        merged = elementwise.voted(self, small, Place(place.name, (U.shape[1], V.shape[1])), self.density, self.inside)
        return LowRank(own.Q @ (self.scale * U @ merged), V.mT @ own.P.mT)


def _bases(D: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors of the Tucker-2 decomposition of (N, R, R'), by higher-order orthogonal iteration."""
    import torch

    from adapterhub_lite import cores

    U, V = (cores.singular(torch.cat([*M], 1))[0][:, :rank] for M in (D, D.mT))  # (R, k), (R', k')
    whole, last = float(D.square().sum()), float("inf")
    for step in range(_STEPS):
        U, _ = _left(D @ V, U.shape[1])
        V, held = _left(D.mT @ U, V.shape[1])
        lost = max(0.0, whole - held) ** 0.5
        if step > 1 and abs(last - lost) <= _TOLERANCE * whole**0.5:
            break
        last = lost
    return U, V


def _left(M: Tensor, k: int) -> tuple[Tensor, float]:
    """The k leading left singular vectors of (N, rows, columns) side by side, and their σ², summed up."""
    import torch

    flat = M.transpose(0, 1).flatten(1)
    values, vectors = torch.linalg.eigh(flat @ flat.mT)  # ascending
    own: Tensor = vectors[:, len(values) - k :]
    return own, float(values[len(values) - k :].sum())


@hookimpl
def rules() -> Iterable[type[Rule]]:
    return [CompressThenMerge]
