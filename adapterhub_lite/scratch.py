"""Memory that is used again.

What malloc fetches from the system for each block, and gives back after it, costs more than to compute in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Scratch:
    """Tensors by what they are for. One is valid until the next is asked for, for the same; of one thread only."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, torch.dtype], Tensor] = {}

    def __call__(self, purpose: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Of that shape; its values are any."""
        numel = math.prod(shape)
        held = self._held.get((purpose, dtype))
        if held is None or len(held) < numel:
            held = self._held[purpose, dtype] = torch.empty(numel, dtype=dtype)
        return held[:numel].view(*shape)


def fresh(_: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The same, of memory that nothing else is in, nor will be."""
    return torch.empty(*shape, dtype=dtype)
