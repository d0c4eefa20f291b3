"""What a delta is: the weight change ΔW of one site, in matrix form (out, in).

Three representations and nothing else. What is computed with them is in `algebra`,
which imports torch; this file does not, so that plugins and headers-only commands
stay light.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor


class LowRank(NamedTuple):
    """ΔW = scale · B A, the usual case.

    Leading batch dimensions are allowed: one delta for each expert of a fused layer.
    """

    B: Tensor  # (*batch, out, r)
    A: Tensor  # (*batch, r, in)
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.B.shape[:-1], self.A.shape[-1])

    @property
    def rank(self) -> int:
        return int(self.A.shape[-2])

    def scaled(self, weight: float) -> LowRank:
        return LowRank(self.B, self.A, self.scale * weight)

    def dense(self) -> Tensor:
        """The matrix itself, (*batch, out, in), in the wider of the factors' dtypes."""
        wide = (self.B[..., :1, :1] + self.A[..., :1, :1]).dtype  # as torch promotes
        return self.scale * (self.B.to(wide) @ self.A.to(wide))


class Sparse(NamedTuple):
    """ΔW is zero but at `index`, the positions in the flattened matrix, each named once."""

    index: Tensor  # type: ignore[assignment]  # (n,) int64; hides tuple.index, which nobody wants of a delta
    values: Tensor  # (n,)
    shape: tuple[int, ...]  # (out, in)

    def scaled(self, weight: float) -> Sparse:
        return Sparse(self.index, weight * self.values, self.shape)

    def dense(self) -> Tensor:
        """The matrix itself, (out, in), in the values' dtype."""
        flat = self.values.new_zeros(math.prod(self.shape))
        return flat.index_add(0, self.index, self.values).reshape(self.shape)


class Dense(NamedTuple):
    """ΔW written out, for methods whose change has no smaller form."""

    W: Tensor  # (*batch, out, in)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.W.shape)

    def scaled(self, weight: float) -> Dense:
        return Dense(weight * self.W)

    def dense(self) -> Tensor:
        """The matrix itself, (*batch, out, in)."""
        return self.W


Delta: TypeAlias = LowRank | Sparse | Dense


class Outline(NamedTuple):
    """What is known of a delta before any tensor is read."""

    rank: int | None = None  # None: not low rank
    scale: float = 1.0
    bias: bool = False  # whether the bias changes too
    factors: tuple[str, str] | None = None
    """The saved tensors that are B and A, if those two are all that the delta is made of.

    Axes behind the first are flattened. Who reads a file needs no torch then.
    """
