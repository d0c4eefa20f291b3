"""How many threads fold, and that each computes its products alone."""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any


def available() -> int:
    """As many as torch uses, or would if it were imported."""
    if (torch := sys.modules.get("torch")) is not None:
        return int(torch.get_num_threads())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return min(int(asked), cores) if asked.isdecimal() and int(asked) else cores


def one_each() -> AbstractContextManager[Any]:
    """Within it, what numpy multiplies takes one thread: else ours would wait for each other's products.

    Some of the libraries that numpy may have are told for the whole process, by one thread at a time; others for the
    thread that says so. So who makes threads enters it, and each of them enters it once more, or calls this.
    """
    limit: AbstractContextManager[Any] = _libraries().limit(limits=1)
    return limit


@functools.cache
def _libraries() -> Any:
    import numpy as np  # noqa: F401  # whose library is to be there
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api="blas")


_torchs: int | None = None  # how many torch takes where one of our threads was the first to import it
_first = threading.Lock()


@contextmanager
def torch_left_alone() -> Iterator[None]:
    """What our threads ask of torch is the process's default for new ones: afterwards, it is as before."""
    before = available() if "torch" in sys.modules else None
    try:
        yield
    finally:
        if threads := before or _torchs:
            import torch

            torch.set_num_threads(threads)


def one() -> None:
    """Let the thread that calls compute alone in torch."""
    import torch

    global _torchs
    with _first:
        _torchs = _torchs or torch.get_num_threads()
        torch.set_num_threads(1)
