"""PHATGOOSE: each adapter gets a gate, trained by itself, whose vector then stands for it."""

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
class Phatgoose(Router):
    """Scores v̂·x̂ / √width, a softmax of the `top_k` largest (Muqeeth et al. 2024, section 3).

    v is trained for one adapter at a time, which is frozen, as its gate σ(v·x); it begins at zero. v̂ and x̂ are v and
    x less their mean, over their standard deviation.
    """

    name = "phatgoose"
    paper = "https://arxiv.org/abs/2402.05859"

    top_k: int = option(2, "How many ways a token goes; 0: all.", least=0)

    def init(self, delta: Delta, width: int, rng: Generator) -> Mapping[str, Tensor]:
        import torch

        return {"v": torch.nn.Parameter(torch.zeros(width))}

    def alone(self, way: Mapping[str, Tensor], h: Tensor) -> Tensor:
        return (h @ way["v"][:, None]).sigmoid()

    def weights(self, ways: Sequence[Mapping[str, Tensor]], h: Tensor) -> Tensor:
        import torch

        V = torch.stack([way["v"] for way in ways])  # (ways, width)
        width = V.shape[1:]
        V, h = (torch.nn.functional.layer_norm(t, width) for t in (V, h))
        return top(h @ V.mT, self.top_k, temperature=width.numel() ** 0.5)


@hookimpl
def routers() -> Iterable[type[Router]]:
    return [Phatgoose]
