"""CAT of LoRA Soups: one trained weight for each adapter at each layer, whatever the input."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapterhub_lite import Delta, Router, hookimpl
from adapterhub_lite.options import option

if TYPE_CHECKING:
    from torch import Generator, Tensor


@dataclass(frozen=True, kw_only=True)
class Cat(Router):
    """ΔWˡ = Σ αᵢˡ ΔWᵢˡ at each layer l, with trained αᵢˡ and frozen adapters (Prabhakar et al. 2024, section 3).

    All αᵢˡ begin at 1/N. With `softmax` they are a softmax over the ways, as in the authors' code; without, each is a
    number by itself and may be negative.
    """

    name = "cat"
    paper = "https://arxiv.org/abs/2410.13025"

    softmax: bool = option(True, "Whether the weights at a layer are positive and add up to 1.")

    def init(self, delta: Delta, width: int, rng: Generator) -> Mapping[str, Tensor]:
        import torch

        return {"z": torch.nn.Parameter(torch.zeros(1))}

    def fixed(self, ways: Sequence[Mapping[str, Tensor]]) -> Tensor:
        import torch

        z = torch.cat([way["z"] for way in ways])  # (ways,)
        return z.softmax(-1) if self.softmax else z + 1 / len(ways)


@hookimpl
def routers() -> Iterable[type[Router]]:
    return [Cat]
