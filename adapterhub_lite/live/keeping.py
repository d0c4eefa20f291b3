"""The time in which the user says that nothing changes: `Adapters.inference`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..sharding import sharded
from .kept import Kept
from .tree import slots


@contextmanager
def keeping(model: nn.Module) -> Iterator[None]:
    """Without gradients, and with a `Kept` at every part; at the end `AdapterError` if one was wrong."""
    parts = [] if sharded(model) else [part for _, slot in slots(model) for part in slot.parts.values()]
    kept, former = [Kept(part.site) for part in parts], [part.kept for part in parts]
    for part, own in zip(parts, kept, strict=True):
        part.kept = own
    try:
        with torch.no_grad():
            yield
        for part, own in zip(parts, kept, strict=True):
            own.check(part.params())
    finally:
        for part, own, other in zip(parts, kept, former, strict=True):
            part.kept = other
            own.drop()
