"""How long writing a plan may take, and how much memory: rough guesses from headers, without torch."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, NamedTuple

from .checkpoint import ITEMSIZE
from .combine import Truncated
from .plan import Plan
from .source import Single

if TYPE_CHECKING:
    from .folding import Plan as FoldPlan
    from .source import Source

START, QUICK = 2.0, 0.2  # seconds until torch is imported; without it
SPEED = 2e9  # float64 operations a second and core, those of small factorisations among them
DISK = 5e8  # bytes a second
TORCH, NUMPY = 250_000_000, 50_000_000  # bytes that these themselves take
ITEM = 8  # bytes of a float64
MOST_THREADS, IN_WORK = 8, 15_000_000  # of a fold: threads, and bytes that each has in work


class Estimate(NamedTuple):
    """Within a factor of a few; what else runs on the machine is not known."""

    seconds: float
    nbytes: int
    """Memory at its peak, libraries included."""

    def plain(self) -> dict[str, float]:
        """JSON-able."""
        return {"seconds": round(self.seconds, 1), "memory": self.nbytes}


def estimate(planned: Plan) -> Estimate:
    """Of writing `planned`."""
    last = planned.source.terms[0][1]
    cut = len(planned.source.terms) == 1 and isinstance(last, Truncated)
    whole = last.of if cut and isinstance(last, Truncated) else planned.source
    tensors = [t for own in whole.contents.values() for part in own.sites.values() for t in part.tensors.values()]
    read = sum(math.prod(t.shape) * ITEMSIZE[t.dtype] for t in tensors)
    if planned.verbatim is not None or planned.recast is not None:
        return Estimate(START + 2 * read / DISK, TORCH + max(read // max(len(whole.sites), 1), 1))
    workers = os.cpu_count() or 1
    work, largest = 0.0, 0
    for name in whole.sites:
        kept = planned.ranks.get(name, whole.extent(name).rank) if cut else None
        own_work, own = _of_site(whole, name, kept)
        work, largest = work + own_work, max(largest, own)
    return Estimate(START + (read + planned.nbytes) / DISK + work / SPEED / workers, TORCH + workers * largest)


def estimate_fold(planned: FoldPlan) -> Estimate:
    """Of folding adapters into a base's files: all of it is read and written, what is touched is computed in blocks."""
    workers = min(os.cpu_count() or 1, MOST_THREADS)
    work, largest, light = 0.0, 0, True
    for layer in planned.layers.values():
        out_into = math.prod(layer.weight.shape)
        for part in layer.parts:
            source = planned.terms[part.term][1]
            if isinstance(source, Single) and source.factors(part.site) is not None:
                work += out_into * (3 + 0.1 * source.extent(part.site).rank)
                continue
            light = False
            work += out_into * (12 + 0.5 * source.extent(part.site).rank)
            if source.written_out:
                own_work, own = _of_site(source, part.site, None)
                work, largest = work + own_work, max(largest, own)
    moved = 2 * planned.model.nbytes / DISK
    start, library = (QUICK, NUMPY) if light else (START, TORCH)
    return Estimate(start + moved + work / SPEED / workers, library + workers * (IN_WORK + largest))


def _of_site(source: Source, name: str, kept: int | None) -> tuple[float, int]:
    """Operations, and bytes of memory, for what a source gives at one site; cut to a rank if that is given."""
    (out, into), rank, inputs = source.sites[name].shape, source.extent(name).rank, len(source.contents)
    if source.written_out or rank == min(out, into):  # a matrix
        work = out * into * (30 * inputs + (0 if kept is None else 4 * (kept + 10)))
        return work, ITEM * (inputs + 3) * out * into
    work = (out + into) * rank * (20 + (2 if kept is None else 10) * rank)
    return work, ITEM * 4 * (out + into) * rank
