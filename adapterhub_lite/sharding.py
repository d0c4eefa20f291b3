"""Tensors of sharded models (FSDP2): step rules and saving meet DTensors, and see through them with these."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


def sharded(model: nn.Module) -> bool:
    """Whether `model` has shards, or gathers them for its calls."""
    gathers = any(hasattr(module, "reshard") for module in model.modules())
    return gathers or any(hasattr(p, "full_tensor") for p in model.parameters())


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
