"""One file of the base folded: what a worker does, in this process or in another that sees the same files."""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..checkpoint import ITEMSIZE, TensorInfo, sha256
from ..errors import NotMergeable
from ..site import Site
from ..source import Source
from . import blocks, numbers, threads
from .blocks import Change, Kept, Rounding, Span
from .copying import Step, no_step, read_at, reading, write_at, writing
from .numbers import Array, Memory, Scratch, bytes_of, fresh, stored_type
from .places import no_bias
from .shards import Shard, Whole, lay_out


@dataclass(frozen=True)
class Job:
    """One shard's work: all that a worker needs, on this machine or another that sees the same files."""

    shard: Shard
    target: Path
    terms: Sequence[Source]
    sites: Mapping[str, Site]  # by layer
    rounding: Rounding
    threads: int
    link: bool = False
    laid_out: bool = False
    step: Step = no_step


class Done(NamedTuple):
    """What became of a shard."""

    sha256: str
    kept: dict[str, Kept]  # by layer, of those whose weight is here


def fold_shard(job: Job) -> Done:
    """Do it, put the file on the disk, and tell its SHA-256."""
    if not job.laid_out:
        lay_out(job.shard, job.target, job.link, job.step)
    if not job.shard.touched:  # a link to the base's own file, maybe, which nobody writes to
        return Done(sha256(job.target), {})
    with writing(job.target, new=False) as new:
        kept = _Folding(job, new).run()
        for whole in job.shard.wholes:
            _put_whole(whole, job, new)
        with ThreadPoolExecutor(1) as other:
            on_disk = other.submit(os.fsync, new)
            digest = sha256(job.target)  # meanwhile
            on_disk.result()
    return Done(digest, kept)


class _Folding:
    """Computes the layers of one shard, each in spans, on threads of its own."""

    def __init__(self, job: Job, new: int) -> None:
        self.job, self.new, self.own = job, new, threading.local()

    def run(self) -> dict[str, Kept]:
        kept: dict[str, Kept] = {}
        pool = ThreadPoolExecutor(self.job.threads, initializer=self._begin)
        waiting: deque[tuple[Change, list[Future[_Piece]]]] = deque()

        def finish() -> None:
            change, pieces = waiting.popleft()
            found = [piece.result() for piece in pieces]
            if self.job.shard.has(change.layer.weight):
                kept[change.layer.name] = Kept.total(piece.kept for piece in found)
            self._write_bias(change, found)

        with threads.one_each():
            try:
                for layer in self.job.shard.layers:
                    change = Change(layer, self.job.sites[layer.name], self.job.terms)
                    spans = change.spans() if self.job.shard.has(layer.weight) or change.merges else ()
                    waiting.append((change, [pool.submit(self._one, change, span) for span in spans]))
                    if len(waiting) > 1:  # the next one's factors are read meanwhile
                        finish()
                while waiting:
                    finish()
            finally:
                pool.shutdown(cancel_futures=True)
        return kept

    def _begin(self) -> None:
        threads.one_each()
        self.own.memory = Scratch()

    def _one(self, change: Change, span: Span) -> _Piece:
        info, memory = change.layer.weight, self.own.memory
        with reading(info.path) as old:
            stored = read_part(old, info, span, change.site, memory)
        new, db, kept = change.block(stored, span, self.job.rounding, memory)
        if self.job.shard.has(info):
            _write(self.new, info, new, span, change.site)
            self.job.step(new.nbytes)
        return _Piece(kept, db)

    def _write_bias(self, change: Change, found: Sequence[_Piece]) -> None:
        info = change.layer.bias
        changes = [piece.db for piece in found if piece.db is not None]
        db = np.concatenate(changes) if changes else change.db
        if db is None:
            if change.layer.biased and info is not None and self.job.shard.has(info):
                _put(self.new, info, numbers.stored(info))  # it might have changed, and did not
            return
        if info is None:
            raise no_bias(change.layer)
        if self.job.shard.has(info):
            _put(self.new, info, change.bias(numbers.stored(info), db, self.job.rounding))


class _Piece(NamedTuple):
    kept: Kept
    db: Array | None


def _runs(info: TensorInfo, span: Span, site: Site) -> Iterator[tuple[int, int]]:
    """The bytes of a span in the file, first and behind the last: one run, or one in each row that is stored."""
    rows, size = site.weight_shape[0], ITEMSIZE[info.dtype]
    row = info.nbytes // rows
    if span.outputs != site.by_inputs:
        yield info.start + span.start * row, info.start + span.stop * row
        return
    for i in range(rows):
        at = info.start + i * row
        yield at + span.start * size, at + span.stop * size


def read_part(handle: int, info: TensorInfo, span: Span, site: Site, memory: Memory = fresh) -> Array:
    """The part of a weight, as it is stored."""
    shape, n = list(site.weight_shape), span.stop - span.start
    shape[0 if span.outputs != site.by_inputs else 1] = n
    part = memory("stored", shape, stored_type(info.dtype))
    view, at = bytes_of(part), 0
    for start, stop in _runs(info, span, site):
        read_at(handle, view[at : at + stop - start], start, info.path)
        at += stop - start
    return part


def _write(handle: int, info: TensorInfo, part: Array, span: Span, site: Site) -> None:
    view, at = bytes_of(part), 0
    for start, stop in _runs(info, span, site):
        write_at(handle, view[at : at + stop - start], start)
        at += stop - start


def _put_whole(whole: Whole, job: Job, handle: int) -> None:
    for at, part in pieces(whole, job.rounding):
        write_at(handle, bytes_of(part), at)
        job.step(part.nbytes)


def pieces(whole: Whole, rounding: Rounding) -> Iterator[tuple[int, Array]]:
    """A value that an adapter brings along, in the base's dtype, and where it goes: a head can have a gigabyte."""
    old, new = whole.old, whole.new
    row = math.prod(new.shape[1:])
    step = 1 if whole.rows is not None else max(1, blocks.BLOCK // max(row, 1))
    for i in range(0, new.numel // max(row, 1), step):
        n = min(step, new.numel // row - i)
        at, size = new.start + i * row * ITEMSIZE[new.dtype], n * row * ITEMSIZE[new.dtype]
        part = numbers.read(replace(new, shape=(n * row,), start=at, stop=at + size))
        if old.dtype != new.dtype:
            rounded, value = rounding.of(old.name, Span(i, i + n, True)), numbers.exact(part, new.dtype)
            part = np.empty(part.shape, stored_type(old.dtype))
            if not rounded(part, old.dtype, value, None, fresh):
                raise NotMergeable(
                    f"the trained value of {old.name!r} does not fit {old.dtype}", fix="pass --keep none"
                )
        to = i if whole.rows is None else whole.rows[i]
        yield old.start + to * row * ITEMSIZE[old.dtype], part


def _put(handle: int, info: TensorInfo, values: Array) -> None:
    write_at(handle, bytes_of(values), info.start)
