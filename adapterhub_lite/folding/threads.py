"""How many threads fold, and that each computes its products alone."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def available() -> int:
    """As many as torch uses, or would if it were imported."""
    if (torch := sys.modules.get("torch")) is not None:
        return int(torch.get_num_threads())
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if asked.isdecimal() and int(asked):
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_lock = threading.Lock()
_inside = 0
_limits: Any = None


@contextmanager
def one_each() -> Iterator[None]:
    """Inside, a product in numpy takes one thread. Several of this process may be inside at once."""
    # Else each of our threads would wait for the others' products, and the bits would depend on how many there are.
    global _inside, _limits
    with _lock:
        if not _inside:
            import numpy as np  # noqa: F401  # whose library is to be there
            from threadpoolctl import threadpool_limits

            _limits = threadpool_limits(1, user_api="blas")
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                _limits.restore_original_limits()


@contextmanager
def torch_left_alone() -> Iterator[None]:
    """What our threads ask of torch is the process's default for new ones: afterwards, it is as before."""
    threads = available()
    try:
        yield
    finally:
        if (torch := sys.modules.get("torch")) is not None:
            torch.set_num_threads(threads)


def one() -> None:
    """Let the thread that calls compute alone in torch."""
    import torch

    torch.set_num_threads(1)
