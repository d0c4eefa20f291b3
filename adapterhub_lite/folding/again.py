"""A folded model's tensors computed again, in samples, and compared bit by bit."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from ..checkpoint import BLOCK, TensorInfo, shown
from ..errors import FileError
from ..site import Site
from ..source import Source
from . import threads
from .blocks import Change, Rounding, Span
from .copying import read_at, reading
from .kinds import settled_all, site_for
from .numbers import Array, bits_of, bytes_of, stored
from .places import Layer
from .shards import Shard, Whole
from .task import pieces, read_part

if TYPE_CHECKING:
    from .planning import Plan

WINDOW = 1 << 16  # bytes of an untouched tensor that are compared

T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """How much is compared: so many blocks of each tensor, chosen by a seed; with None, all."""

    blocks: int | None
    seed: int

    def of(self, parts: Sequence[T], name: str) -> list[T]:
        if self.blocks is None or len(parts) <= self.blocks:
            return list(parts)
        return random.Random(f"{self.seed}:{name}").sample(parts, self.blocks)

    def windows(self, info: TensorInfo) -> Iterator[tuple[int, int]]:
        """Bytes of the file, first and behind the last."""
        if self.blocks is None:
            yield from ((at, min(at + BLOCK, info.stop)) for at in range(info.start, info.stop, BLOCK))
            return
        start = info.start + random.Random(f"{self.seed}:{info.name}").randint(0, max(0, info.nbytes - WINDOW))
        yield start, min(start + WINDOW, info.stop)


class Compared:
    """A plan, and the folder that it is said to have become. `FileError` for the first tensor that differs.

    `numbers`: of touched tensors that were compared; `copied`: tensors that no adapter changes, of which `whole` says
    whether all bytes were compared.
    """

    def __init__(self, plan: Plan, out: Path, rounding: Rounding, sample: Sample) -> None:
        self.plan, self.out, self.rounding, self.sample = plan, out, rounding, sample
        self.numbers = self.copied = 0
        self.whole = True

    def layers(self, step: Callable[[], None]) -> None:
        """Blocks of every layer that adapters change, and its bias."""
        sites = {name: site_for(layer, self.plan.sources) for name, layer in self.plan.layers.items()}
        terms = settled_all(self.plan, sites)
        with threads.torch_left_alone(), threads.one_each():  # as in folding: sums are added up in its order
            pool = ThreadPoolExecutor(threads.available(), initializer=threads.one_each)
            try:
                for layer in self.plan.layers.values():
                    self._layer(layer, sites[layer.name], terms, pool)
                    step()
            finally:
                pool.shutdown(cancel_futures=True)

    def _layer(self, layer: Layer, site: Site, terms: Sequence[Source], pool: ThreadPoolExecutor) -> None:
        change = Change(layer, site, terms)
        spans = list(change.spans())
        picked = self.sample.of(spans, layer.weight.name)
        biases = dict(zip(picked, pool.map(lambda span: self._block(change, span), picked), strict=True))
        if layer.bias is None or not layer.biased:
            return
        db = change.db
        if change.merges and any(db is not None for db in biases.values()):  # all of it, then
            rest = [span for span in spans if span not in biases]
            biases |= dict(zip(rest, pool.map(lambda span: self._block(change, span), rest), strict=True))
            db = np.concatenate([part for span in spans if (part := biases[span]) is not None])
        old = stored(layer.bias)
        self._same(layer.bias, layer.bias.start, old if db is None else change.bias(old, db, self.rounding))

    def _block(self, change: Change, span: Span) -> Array | None:
        info = change.layer.weight
        with reading(info.path) as old:
            part = read_part(old, info, span, change.site)
        new, db, _ = change.block(part, span, self.rounding)
        ours = self._ours(info)
        with reading(ours.path) as handle:
            got = read_part(handle, ours, span, change.site)
        self._equal(info, got, new)
        return db

    def wholes(self) -> None:
        """The values that adapters bring along, and of tensors of which they bring some rows a few others."""
        for whole in self.plan.wholes:
            for at, part in pieces(whole, self.rounding):
                self._same(whole.old, at, part)
            if whole.rows is not None:
                self._other_rows(whole)

    def _other_rows(self, whole: Whole) -> None:
        old, rows = whole.old, set(whole.rows or ())
        size = old.nbytes // old.shape[0]
        for i in self.sample.of([i for i in range(old.shape[0]) if i not in rows], old.name):
            self._copied(old, old.start + i * size, old.start + (i + 1) * size)
            self.numbers += old.numel // old.shape[0]

    def untouched(self) -> None:
        """Bytes of every tensor that no adapter changes."""
        for shard in self.plan.shards:
            self._untouched(shard)

    def _untouched(self, shard: Shard) -> None:
        touched = {info.name for info in shard.touched}
        for info in shard.checkpoint.tensors.values():
            if info.name not in touched:
                windows = list(self.sample.windows(info))
                for start, stop in windows:
                    self._copied(info, start, stop)
                self.copied += 1
                self.whole &= sum(stop - start for start, stop in windows) == info.nbytes

    def _copied(self, info: TensorInfo, start: int, stop: int) -> None:
        if _bytes(info.path, start, stop) != _bytes(self._ours(info).path, start, stop):
            raise FileError(
                f"tensor {shown(info.name)} is not the base's, and no adapter changes it",
                where=self._ours(info).path,
                fix="fold again, or give the base that it was made of",
            )

    def _same(self, info: TensorInfo, at: int, want: Array) -> None:
        """Whether a run of the file is `want`."""
        got = np.empty_like(want)
        with reading(self._ours(info).path) as handle:
            read_at(handle, bytes_of(got), at, self._ours(info).path)
        self._equal(info, got, want)

    def _equal(self, info: TensorInfo, got: Array, want: Array) -> None:
        other = int(np.count_nonzero(bits_of(got) != bits_of(want)))
        if other:
            raise FileError(
                f"tensor {shown(info.name)} is not what the recipe gives: "
                f"{other} of {got.size} numbers compared are others",
                where=self._ours(info).path,
                fix="fold again; a few on another machine may be its way to add up",
            )
        self.numbers += got.size

    def _ours(self, info: TensorInfo) -> TensorInfo:
        return replace(info, path=self.out / info.path.name)


def _bytes(path: Path, start: int, stop: int) -> bytes:
    with reading(path) as handle:
        return os.pread(handle, stop - start, start)
