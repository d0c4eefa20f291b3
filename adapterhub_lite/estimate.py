"""How long writing a plan may take, and how much memory: rough guesses from headers, without torch."""

from __future__ import annotations

import math
import os
from typing import NamedTuple

from .checkpoint import ITEMSIZE
from .combine import Truncated
from .plan import Plan

START = 2.0  # seconds until torch is imported
SPEED = 2e9  # float64 operations a second and core, those of small factorisations among them
DISK = 2e8  # bytes a second
TORCH = 250_000_000  # bytes that torch itself takes
ITEM = 8  # bytes of a float64


class Estimate(NamedTuple):
    """Within a factor of a few; what else runs on the machine is not known."""

    seconds: float
    nbytes: int
    """Memory at its peak, torch included."""


def estimate(planned: Plan) -> Estimate:
    """Of writing `planned`."""
    last = planned.source.terms[0][1]
    cut = len(planned.source.terms) == 1 and isinstance(last, Truncated)
    whole = last.of if cut and isinstance(last, Truncated) else planned.source
    tensors = [t for own in whole.contents.values() for part in own.sites.values() for t in part.tensors.values()]
    read = sum(math.prod(t.shape) * ITEMSIZE[t.dtype] for t in tensors)
    if planned.verbatim is not None or planned.recast is not None:
        return Estimate(START + 2 * read / DISK, TORCH + max(read // max(len(whole.sites), 1), 1))
    workers, inputs = os.cpu_count() or 1, len(whole.contents)
    work, largest = 0.0, 0
    for name, part in whole.sites.items():
        (out, into), rank = part.shape, whole.extent(name).rank
        if whole.written_out or rank == min(part.shape):  # a matrix
            kept = planned.ranks.get(name, rank)
            work += out * into * (100 * inputs + (40 * (kept + 10) if cut else 0))
            own = (inputs + 3) * out * into
        else:
            work += (out + into) * rank * (20 + (10 * rank if cut else 2 * rank))
            own = 4 * (out + into) * rank
        largest = max(largest, ITEM * own)
    return Estimate(START + (read + planned.nbytes) / DISK + work / SPEED / workers, TORCH + workers * largest)
