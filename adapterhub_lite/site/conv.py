"""Convolutions: `torch.nn.Conv1d`, `Conv2d` and `Conv3d`, any stride, padding, dilation and groups."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from ..delta import Delta, LowRank
from ..hookspecs import hookimpl
from . import Site

if TYPE_CHECKING:
    from torch import Tensor, nn


class ConvSite(Site):
    """The weight is (out, in/groups, *kernel); the matrix form flattens all but `out`."""

    axes: ClassVar[int]
    """Of the kernel."""

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        from torch import nn

        own = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[cls.axes - 1]
        return type(module).forward is own.forward

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight_shape[0], math.prod(self.weight_shape[1:])

    @property
    def kernel(self) -> tuple[int, ...]:
        return self.weight_shape[2:]

    def fold(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(self.weight_shape)

    def unfold(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def apply(self, delta: Delta, x: Tensor) -> Tensor:
        import torch
        from torch import nn

        F, conv = torch.nn.functional, self._live()
        assert isinstance(conv, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        if not isinstance(delta, LowRank):
            return self._convolve(conv, x, self.fold(delta.dense()))
        # A is a bank of r kernels, seen by every group; B then mixes within its group (a 1×1 convolution).
        r, g = delta.rank, conv.groups
        A = delta.A.reshape(r, *self.weight_shape[1:]).repeat(g, *(1 for _ in self.weight_shape[1:]))  # (g·r, in/g, *k)
        B = delta.B.reshape(*delta.B.shape, *(1 for _ in self.kernel))  # (out, r, 1, …)
        hidden = self._convolve(conv, x, A)  # (batch, g·r, *size)
        mix = (F.conv1d, F.conv2d, F.conv3d)[self.axes - 1]
        return delta.scale * mix(hidden, B, groups=g)

    def _convolve(self, conv: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor, weight: Tensor) -> Tensor:
        # The module's own convolution, so that its padding mode and stride are right; no bias.
        y: Tensor = conv._conv_forward(x, weight, None)
        return y


class Conv1dSite(ConvSite):
    kind, axes = "conv1d", 1


class Conv2dSite(ConvSite):
    kind, axes = "conv2d", 2


class Conv3dSite(ConvSite):
    kind, axes = "conv3d", 3


@hookimpl
def site_kinds() -> list[type[Site]]:
    return [Conv1dSite, Conv2dSite, Conv3dSite]
