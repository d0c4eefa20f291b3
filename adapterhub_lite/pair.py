"""Two files' tensors of one name: whether they are equal, and their difference, in blocks of rows.

A difference is computed in float64, or in float32 where that suffices; what is in memory is a block of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .checkpoint import ITEMSIZE, TensorInfo, check_finite

BLOCK = 1 << 20  # numbers in a block
CHUNK = 4 << 20  # bytes compared at once
HALF = {"F16", "BF16"}
FIX = "look for what diverged, or download the model again"


@dataclass(frozen=True)
class Pair:
    """One tensor in two models, `tuned` of the shape of `base`. As a matrix all but the first dimension are columns."""

    base: TensorInfo
    tuned: TensorInfo

    @property
    def rows(self) -> int:
        return self.base.shape[0] if self.base.shape else 1

    @property
    def columns(self) -> int:
        return self.base.numel // self.rows if self.rows else 0

    @property
    def half(self) -> bool:
        """Whether both are in half precision, so that float32 resolves all that a difference means."""
        return {self.base.dtype, self.tuned.dtype} <= HALF

    def equal(self) -> bool:
        """Bit by bit, or number by number where the dtypes differ."""
        if self.base.dtype != self.tuned.dtype:
            return not any(bool(block.any()) for block in self.blocks(torch.float64))
        starts = range(0, self.base.nbytes, CHUNK)
        return all(_bytes(self.base, at) == _bytes(self.tuned, at) for at in starts)

    def blocks(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """Tuned - base from the first row to the last, (n, columns) each."""
        step = max(1, BLOCK // max(1, self.columns))
        for start in range(0, self.rows if self.columns else 0, step):
            stop = min(start + step, self.rows)
            block = _rows(self.tuned, start, stop).to(dtype)
            yield block.sub_(_rows(self.base, start, stop))

    def size(self) -> tuple[float, float]:
        """‖tuned - base‖² and ‖base‖². Raises `FileError` if a number is not finite."""
        lost = math.fsum(square(block) for block in self.blocks(torch.float64))
        step = max(1, BLOCK // max(1, self.columns))
        starts = range(0, self.rows if self.columns else 0, step)
        base = math.fsum(square(_rows(self.base, at, min(at + step, self.rows)).double()) for at in starts)
        self.check(lost)
        return lost, base

    def check(self, total: float) -> None:
        """Raise `FileError` naming file and tensor if the sum `total` shows that a number is not finite."""
        if not math.isfinite(total):
            for info in (self.base, self.tuned):
                check_finite(info.read(), info, fix=FIX)

    def at(self, index: int) -> float:
        """One number of `base`, by its place in the file."""
        size = ITEMSIZE[self.base.dtype]
        start = self.base.start + index * size
        return float(replace(self.base, shape=(), start=start, stop=start + size).read())


def square(x: Tensor) -> float:
    """‖x‖², summed in float64."""
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2


def _rows(info: TensorInfo, start: int, stop: int) -> Tensor:
    columns = info.numel // info.shape[0] if info.shape else 1
    width = columns * ITEMSIZE[info.dtype]
    first, last = info.start + start * width, info.start + stop * width
    return replace(info, shape=(stop - start, columns), start=first, stop=last).read()


def _bytes(info: TensorInfo, at: int) -> bytes:
    start = info.start + at
    return replace(info, shape=(), start=start, stop=min(start + CHUNK, info.stop)).read_bytes()
