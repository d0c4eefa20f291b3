"""Normalisation layers: a vector scales what was normalised, and another may be added.

Every model has a class of its own, so nothing is known here of what it computes: `rerun` has it computed by the class
itself, with other values.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import TYPE_CHECKING

from ..delta import Delta
from ..errors import AdapterError, NotMergeable
from ..hookspecs import hookimpl
from . import Site

if TYPE_CHECKING:
    from torch import Tensor, nn

OURS = "adapters"  # the submodule of a layer that has been adapted


class NormSite(Site):
    """A layer called after a norm whose `weight` is a vector (n,), as is its `bias` if it has one: (n, 1) as a matrix.

    Not batch norm, whose running statistics would be updated twice, and none that takes more than one input.
    """

    kind = "norm"

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        from torch.nn.modules.batchnorm import _NormBase

        own = module._parameters
        weight, bias = own.get("weight"), own.get("bias")
        if weight is None or not own.keys() <= {"weight", "bias"} or isinstance(module, _NormBase):
            return False
        if weight.ndim != 1 or (bias is not None and bias.shape != weight.shape):
            return False
        if not module._modules.keys() <= {OURS} or any(name.startswith("running") for name in module._buffers):
            return False
        return _is_norm(type(module).__mro__)

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight_shape[0], 1

    def width(self, end: str) -> int:
        return self.weight_shape[0] if _by_last_axis(self._live()) else super().width(end)

    def fold(self, matrix: Tensor) -> Tensor:
        return matrix[:, 0]

    def unfold(self, weight: Tensor) -> Tensor:
        return weight[:, None]

    def apply(self, delta: Delta, x: Tensor) -> Tensor:
        raise NotMergeable(
            "a norm is no product with a matrix, so no ΔW has a share of its output",
            where=self.name,
            fix="define forward(), with site.rerun(), or exclude it",
        )

    def along(self, vector: Tensor) -> Tensor:
        module = self._live()
        if _by_last_axis(module):
            return vector
        raise AdapterError(
            f"on which axis a {type(module).__name__} has its channels is not known",
            where=self.name,
            fix="use site.add_bias() or site.rerun()",
        )

    def add_bias(self, b: Tensor, x: Tensor, y: Tensor) -> Tensor:
        from torch import nn

        module = self._live()
        if _by_last_axis(module):
            return super().add_bias(b, x, y)
        if type(module).forward is nn.GroupNorm.forward:
            return y + b.reshape(-1, *(1 for _ in y.shape[2:])).to(y.dtype)  # (batch, n, …)
        new = b if self.bias is None else self.bias + b
        return y + (self.rerun(x, bias=new) - self.rerun(x)).to(y.dtype)


def _by_last_axis(module: nn.Module) -> bool:
    """Whether the channels are on the last axis, as is known of torch's own."""
    from torch import nn

    return type(module).forward in (nn.LayerNorm.forward, nn.RMSNorm.forward)


@cache
def _is_norm(classes: tuple[type, ...]) -> bool:
    """Whether a class, with its bases, is called so, and takes one input and nothing else."""
    inputs = list(inspect.signature(classes[0].forward).parameters.values())[1:]  # type: ignore[attr-defined]
    called = any("norm" in cls.__name__.lower() for cls in classes)
    return called and len(inputs) == 1 and inputs[0].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD


@hookimpl
def site_kinds() -> list[type[Site]]:
    return [NormSite]
