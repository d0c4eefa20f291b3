"""What methods compute from tensors alone, kept between calls while `Adapters.inference` lasts.

Nothing is kept outside of it, for torch cannot tell whether a tensor has changed: its version does not count what is
written through `.data`, and torch's fused optimizers, Trainer's default among them, do not count their steps either.
So it is the user who says that nothing changes; what does all the same is noticed where torch counts it, and else at
the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from weakref import WeakSet, ref

import torch
from torch import Tensor, UntypedStorage

from ..errors import AdapterError
from ..site import Site


class Mark(NamedTuple):
    """By which a tensor is known to be the same, as far as torch counts. Holds no memory: a layer may be offloaded."""

    tensor: ref[Tensor]
    storage: ref[UntypedStorage]
    state: tuple[Any, ...]

    def fits(self, t: Tensor) -> bool:
        return self.tensor() is t and self.storage() is t.untyped_storage() and self.state == _state(t)


class Value(NamedTuple):
    """What was computed, how, and from what."""

    value: Tensor
    compute: Callable[[], Tensor]
    autocast: tuple[bool, torch.dtype]
    marks: tuple[Mark, ...]

    def stands(self, sources: tuple[Tensor, ...]) -> bool:
        return len(sources) == len(self.marks) and all(
            mark.fits(t) for mark, t in zip(self.marks, sources, strict=True)
        )


class Kept:
    """The values of one adapter at one site, by their names."""

    def __init__(self, site: Site) -> None:
        self.site, self.values = site, dict[str, Value]()
        self.held = WeakSet[Any]()  # the stacks of batches that were made meanwhile

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # copies and pickles of the model know nothing of it

    def __call__(self, own: Mapping[str, Tensor], name: str, compute: Callable[[], Tensor]) -> Tensor:
        """What `compute` gives from the tensors `own` and the site's."""
        if torch.compiler.is_compiling():
            return compute()
        if torch.is_grad_enabled():  # they are being trained: forget
            self.values.clear()
            return compute()
        sources = (*own.values(), *self.site.sources)
        autocast = _autocast(sources)
        found = self.values.get(name)
        if found is not None and found.autocast == autocast and found.stands(sources):
            return found.value
        value, marks = compute(), tuple(mark for t in sources if (mark := _mark(t)) is not None)
        self.values.pop(name, None)
        if len(marks) == len(sources):
            self.values[name] = Value(value, compute, autocast, marks)
        return value

    def check(self, own: Mapping[str, Tensor]) -> None:
        """Raise `AdapterError` if a value is another one by now, although torch counted no change."""
        sources = (*own.values(), *self.site.sources)
        for kept in self.values.values():
            if not kept.stands(sources):
                continue  # that change was counted: it would not have been used again
            enabled, dtype = kept.autocast
            with torch.no_grad(), torch.autocast(sources[0].device.type, dtype, enabled):
                now = kept.compute()
            tolerance = torch.finfo(now.dtype).eps ** 0.5  # threads may be others, and sums in another order
            if not torch.allclose(now, kept.value, rtol=tolerance, atol=0, equal_nan=True):
                raise self._changed()
        if not all(held.right() for held in self.held):
            raise self._changed()

    def drop(self) -> None:
        """Give the batches' memory back."""
        for held in self.held:
            held.drop()

    def _changed(self) -> AdapterError:
        return AdapterError(
            "a tensor was changed inside of inference() in a way that torch does not count (through .data, by "
            "a fused optimizer, as a numpy array), so outputs from then on may be wrong",
            where=self.site.name,
            fix="change tensors outside of it, or in place under torch.no_grad()",
        )


def _mark(t: Tensor) -> Mark | None:
    """None for a tensor that has no memory of its own (functorch's, DTensors), or whose changes are not counted."""
    try:
        counted = not t.is_inference() and t.data_ptr() != 0
    except RuntimeError:
        counted = False
    return Mark(ref(t), ref(t.untyped_storage()), _state(t)) if counted else None


def _state(t: Tensor) -> tuple[Any, ...]:
    return t._version, t.data_ptr(), t.dtype, t.shape, t.stride()


def _autocast(sources: tuple[Tensor, ...]) -> tuple[bool, torch.dtype]:
    device = sources[0].device.type
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
