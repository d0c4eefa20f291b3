"""Fully connected layers: `torch.nn.Linear`, and transformers' `Conv1D`, its transpose."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from ..delta import Delta, LowRank
from ..hookspecs import hookimpl
from . import Site

if TYPE_CHECKING:
    from torch import Tensor, nn


class LinearSite(Site):
    """`torch.nn.Linear`: the weight is the matrix form, (out, in)."""

    kind = "linear"

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        from torch import nn

        return type(module).forward is nn.Linear.forward

    @property
    def shape(self) -> tuple[int, int]:
        out, into = self.weight_shape
        return out, into

    def width(self, end: str) -> int:
        return self.shape[1] if end == "input" else self.shape[0]

    def fold(self, matrix: Tensor) -> Tensor:
        return matrix

    def unfold(self, weight: Tensor) -> Tensor:
        return weight

    def apply(self, delta: Delta, x: Tensor) -> Tensor:
        import torch

        F = torch.nn.functional
        if isinstance(delta, LowRank):
            return delta.scale * F.linear(F.linear(x, delta.A), delta.B)  # (…, in) -> (…, r) -> (…, out)
        return F.linear(x, delta.dense())

    def add(self, delta: Delta, x: Tensor, y: Tensor) -> Tensor:
        import torch

        F = torch.nn.functional
        if isinstance(delta, LowRank):
            B, A, scale = delta
            if x.dtype == y.dtype == B.dtype:  # one kernel for scaling and adding, and for the product with B too
                if x.ndim == 2:
                    return torch.addmm(y, F.linear(x, A), B.mT, alpha=scale)
                return torch.add(y, F.linear(F.linear(x, A), B), alpha=scale)
        return super().add(delta, x, y)


class TransposedLinearSite(LinearSite):
    """`transformers.pytorch_utils.Conv1D` (GPT-2): a linear layer that stores (in, out)."""

    kind = "transposed_linear"
    by_inputs = True

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        # The class can only be there if transformers was imported; we never import it.
        transformers = sys.modules.get("transformers.pytorch_utils")
        return transformers is not None and type(module).forward is transformers.Conv1D.forward

    @property
    def shape(self) -> tuple[int, int]:
        into, out = self.weight_shape
        return out, into

    def fold(self, matrix: Tensor) -> Tensor:
        return matrix.mT

    def unfold(self, weight: Tensor) -> Tensor:
        return weight.mT


@hookimpl
def site_kinds() -> list[type[Site]]:
    return [LinearSite, TransposedLinearSite]
