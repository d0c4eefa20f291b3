"""`torch.nn.Embedding`: a lookup is a product with a one-hot row, so ΔW (dim, vocabulary) applies by lookup too."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..delta import Delta, LowRank
from ..errors import AdapterError
from ..hookspecs import hookimpl
from . import Site

if TYPE_CHECKING:
    from torch import Tensor, nn


class EmbeddingSite(Site):
    """The weight is (vocabulary, dim); the matrix form is its transpose, out = dim and in = vocabulary."""

    kind = "embedding"
    by_inputs = True

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        from torch import nn

        return type(module).forward is nn.Embedding.forward

    @property
    def shape(self) -> tuple[int, int]:
        vocabulary, dim = self.weight_shape
        return dim, vocabulary

    def width(self, end: str) -> int:
        return self.shape[0] if end == "output" else super().width(end)

    def fold(self, matrix: Tensor) -> Tensor:
        return matrix.mT

    def unfold(self, weight: Tensor) -> Tensor:
        return weight.mT

    def apply(self, delta: Delta, x: Tensor) -> Tensor:
        import torch

        F, module = torch.nn.functional, self._live()
        assert isinstance(module, torch.nn.Embedding)
        if module.max_norm is not None:
            # max_norm rescales rows of W in place during the forward: no delta commutes with that.
            raise AdapterError("an embedding with max_norm changes its own weight", where=self.name, fix="exclude it")
        if isinstance(delta, LowRank):
            return delta.scale * F.linear(F.embedding(x, delta.A.mT), delta.B)  # (…,) -> (…, r) -> (…, dim)
        return F.embedding(x, delta.dense().mT)

    def along(self, vector: Tensor) -> Tensor:
        return vector


@hookimpl
def site_kinds() -> list[type[Site]]:
    return [EmbeddingSite]
