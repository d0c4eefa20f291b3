"""Arrow: each token goes where the adapter's change would be largest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapterhub_lite import Delta, Router, hookimpl
from adapterhub_lite.options import option
from adapterhub_lite.routing import top

if TYPE_CHECKING:
    from torch import Generator, Tensor


@dataclass(frozen=True, kw_only=True)
class Arrow(Router):
    """Scores |v·x| / `temperature`, a softmax of the `top_k` largest (Ostapenko et al. 2024, section 4.2).

    v is the first right singular vector of the way's ΔW: of all inputs of length 1, the one that ΔW changes most.
    Nothing is trained. v is computed from the factors, exactly. A way that adds nothing has v = 0.
    """

    name = "arrow"
    paper = "https://arxiv.org/abs/2405.11157"
    reads_delta = True

    top_k: int = option(3, "How many ways a token goes; 0: all.", least=0)
    temperature: float = option(1.0, "A divisor of the scores: higher is more even.", above=0)

    def init(self, delta: Delta, width: int, rng: Generator) -> Mapping[str, Tensor]:
        import torch

        from adapterhub_lite.algebra import svd

        _, S, Vh = svd(delta)  # (k,), (k, in)
        return {"v": Vh[0] if len(S) and S[0] > 0 else torch.zeros(width, dtype=torch.float64)}

    def weights(self, ways: Sequence[Mapping[str, Tensor]], h: Tensor) -> Tensor:
        import torch

        V = torch.stack([way["v"] for way in ways])  # (ways, width)
        return top((h @ V.mT).abs(), self.top_k, self.temperature)


@hookimpl
def routers() -> Iterable[type[Router]]:
    return [Arrow]
