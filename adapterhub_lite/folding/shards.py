"""One file of the base: what changes in it, and its copy without that, made by the system."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..checkpoint import Checkpoint, TensorInfo
from .copying import Step, copy_range, linked, no_step, reading, reserve, writing
from .places import Layer


class Whole(NamedTuple):
    """A tensor that an adapter brings along in place of the base's, or of some of its rows."""

    old: TensorInfo
    new: TensorInfo
    rows: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Shard:
    """A file of the base, and what changes in it."""

    checkpoint: Checkpoint
    layers: tuple[Layer, ...] = ()
    wholes: tuple[Whole, ...] = ()

    @property
    def name(self) -> str:
        return self.checkpoint.path.name

    def has(self, info: TensorInfo | None) -> bool:
        return info is not None and info.path == self.checkpoint.path

    @property
    def touched(self) -> list[TensorInfo]:
        """The tensors of this file that change, in the order of their bytes."""
        here = {info.name: info for layer in self.layers for info in layer.touched if self.has(info)}
        here.update({whole.old.name: whole.old for whole in self.wholes})
        return sorted(here.values(), key=lambda info: info.start)

    @property
    def rewritten(self) -> list[TensorInfo]:
        """Those of which no byte stays."""
        in_part = {whole.old.name for whole in self.wholes if whole.rows is not None}
        return [info for info in self.touched if info.name not in in_part]


def lay_out(shard: Shard, target: Path, link: bool = False, step: Step = no_step) -> None:
    """Make the copy's file, with room for all of it, and copy the bytes that stay, those of the header too.

    With `link`, a file of which all bytes stay is another name of the base's.
    """
    source = shard.checkpoint.path
    if link and not shard.touched:
        linked(source, target)
        step(target.stat().st_size)
        return
    with reading(source) as old, writing(target) as new:
        size = os.fstat(old).st_size
        reserve(new, size)
        at = 0
        for info in shard.rewritten:
            copy_range(old, new, at, info.start, source, step)
            at = info.stop
        copy_range(old, new, at, size, source, step)
        if not shard.touched:  # else once all of it is written
            os.fsync(new)
