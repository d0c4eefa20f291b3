"""The factors of all rows of a batch side by side: for one product, or kept while `Adapters.inference` lasts.

They are copies, and to make them takes as long as to multiply with them. Between calls they are kept only where the
user says that nothing changes, and given up as soon as torch tells of a change in one of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from operator import attrgetter, getitem, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .kept import Kept

VERSION = attrgetter("_version")
SHAPES = 16  # that `Room` has memory for

Stacks = tuple[Tensor, ...]


class Sources(NamedTuple):
    """Where factors are: looked up anew at every call, for loading and sharding replace tensors."""

    holders: tuple[dict[str, Any], ...]
    names: tuple[str, ...]

    @property
    def first(self) -> Tensor:
        found: Tensor = self.holders[0][self.names[0]]
        return found

    def tensors(self) -> list[Tensor]:
        return list(map(getitem, self.holders, self.names))


class Value(NamedTuple):
    """What was made of which tensors, and how."""

    stacks: Stacks
    tensors: list[Tensor]
    versions: list[int]
    make: Callable[[list[Tensor]], Stacks]

    def stands(self, sources: Sources) -> bool:
        same = all(map(is_, map(getitem, sources.holders, sources.names), self.tensors))
        return same and list(map(VERSION, self.tensors)) == self.versions


class Held:
    """The stacks of one batch at one site, by the way in which they are multiplied."""

    def __init__(self) -> None:
        self.values: dict[bool, Value] = {}
        self.sources: Sources | None = None
        self.kept: Kept | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()  # copies and pickles of the model have none

    def __call__(self, kept: Kept, sources: Sources, together: bool, make: Callable[[list[Tensor]], Stacks]) -> Stacks:
        """What `make` gives of the sources' tensors, once while `kept` is what the layer has."""
        if self.kept is not kept:
            self.values, self.sources, self.kept = {}, sources, kept
            kept.held.add(self)
        found = self.values.get(together)
        if found is not None and found.stands(sources):
            return found.stacks
        tensors = sources.tensors()
        stacks = make(tensors)
        self.values.pop(together, None)
        if not any(t.is_inference() for t in tensors):  # those have no versions
            self.values[together] = Value(stacks, tensors, list(map(VERSION, tensors)), make)
        return stacks

    def right(self) -> bool:
        """Whether they are what would be made now, as far as torch counted no change."""
        return all(
            torch.equal(old, new)
            for value in self.values.values()
            if self.sources is not None and value.stands(self.sources)
            for old, new in zip(value.stacks, value.make(value.tensors), strict=True)
        )

    def drop(self) -> None:
        self.values, self.sources, self.kept = {}, None, None


class Room(threading.local):
    """Memory for what one product needs and the next overwrites: to get it anew takes as long as to fill it."""

    def __init__(self) -> None:
        self.kept: dict[Any, Tensor] = {}

    def of(self, tensors: Sequence[Tensor], use: int) -> Tensor:
        first, number = tensors[0], len(tensors)
        key = use, number, first.shape, first.dtype, torch.is_inference_mode_enabled()
        found = self.kept.get(key)
        if found is None:
            if len(self.kept) >= SHAPES:
                self.kept.clear()
            found = self.kept[key] = first.new_empty(number, *first.shape)
        return found


ROOM = Room()


def passing(tensors: list[Tensor], use: int) -> Tensor:
    """As `torch.stack`. Without gradients, and on a CPU, it holds until the next call for the same `use`."""
    if torch.is_grad_enabled() or tensors[0].device.type != "cpu" or torch.compiler.is_compiling():
        return torch.stack(tensors)
    return torch.stack(tensors, out=ROOM.of(tensors, use))
