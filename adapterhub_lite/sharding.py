"""Tensors of sharded models (FSDP2): step rules and saving meet DTensors, and see through them with these two."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def whole(t: Tensor) -> Tensor:
    """All of `t`: of a DTensor the gathered tensor, which every process must ask for; else `t` itself."""
    gather: Any = getattr(t, "full_tensor", None)
    found: Tensor = t if gather is None else gather()
    return found


def local(t: Tensor) -> Tensor:
    """The part of `t` that this process has, in the same memory; `t` itself if it is no DTensor."""
    part: Any = getattr(t, "to_local", None)
    found: Tensor = t if part is None else part()
    return found
