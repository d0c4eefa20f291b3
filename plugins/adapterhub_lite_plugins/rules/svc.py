"""SVC: singular values of the sum deflated where adapters share a direction."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from adapterhub_lite import Delta, Part, Place, Rule, hookimpl
from adapterhub_lite.options import option
from adapterhub_lite.rule import Facts

_NOTHING = 1e-10  # of the adapter's norm: what it does below that in a direction is rounding


@dataclass(frozen=True, kw_only=True)
class Svc(Rule):
    """Singular value calibration (https://arxiv.org/abs/2602.05536), of the sum, on factors.

    The SVD of the sum is `scale` · Σ ΔWᵢ = Σᵣ σᵣ uᵣ vᵣᵀ. In the direction uᵣ the adapters do aᵢ = uᵣᵀ ΔWᵢ, and the sum
    a = σᵣ vᵣᵀ, which is sᵢ = ⟨a, aᵢ⟩ / ‖aᵢ‖² times as much of the same: above 1 where adapters add up. σᵣ becomes
    σᵣ · N / Σ max(`alpha`, sᵢ); `alpha` is 1/N by default. With 1 no singular value grows.

    The paper has no weights; here N times their shares multiply the ΔWᵢ of the sum, 1 each if they are equal. An
    adapter that does nothing in a direction has sᵢ = 0 there. The paper calibrates what other rules give, too.
    """

    name = "svc"
    paper = "https://arxiv.org/abs/2602.05536"

    alpha: float | None = option(None, "What sᵢ is at least; 1 over the number of adapters if not given.", above=0)
    scale: float = option(1.0, "A factor of the sum, before it is calibrated.", above=0)

    @property
    def weighs(self) -> Literal["sum", "average", "equal"]:
        return "average"

    @property
    def keeps_one(self) -> bool:
        return self.scale >= (1.0 if self.alpha is None else self.alpha)

    def merge(self, parts: Sequence[Part], place: Place, facts: Facts) -> Delta:
        import torch

        from adapterhub_lite import LowRank, cores

        own, N = cores.joint([part._replace(weight=1.0) for part in parts]), len(parts)
        weights = torch.tensor([part.weight for part in parts], dtype=torch.float64)
        D = torch.stack(own.cores)  # (N, R, R)
        U, S, Vh = cores.singular(torch.tensordot(self.scale * N * weights / weights.sum(), D, 1))
        a = U.mT @ D  # (N, k, R)
        squares = a.square().sum(-1)  # (N, k)
        done = squares.sqrt() > _NOTHING * torch.linalg.matrix_norm(D)[:, None]
        s = torch.where(done, (a * (S[:, None] * Vh)).sum(-1) / squares.where(done, 1.0), 0.0)
        gamma = 1 / s.clamp(min=1 / N if self.alpha is None else self.alpha).mean(0)  # (k,)
        return LowRank(own.Q @ (U * (gamma * S)), Vh @ own.P.mT)


@hookimpl
def rules() -> Iterable[type[Rule]]:
    return [Svc]
