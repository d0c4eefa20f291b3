"""Bytes from file to file, by the system where it can: nothing of them passes through this process."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..checkpoint import BLOCK, damaged, whole
from ..errors import FileError, os_error

AT_ONCE = 1 << 26  # bytes, between two reports of progress
_CANNOT = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EBADF}

Step = Callable[[int], None]


def no_step(nbytes: int) -> None:
    """Nobody is told."""


@contextmanager
def reading(path: Path) -> Iterator[int]:
    """A handle to read `path` by; errors of the system name the file."""
    yield from _opened(whole(path), os.O_RDONLY)


@contextmanager
def writing(path: Path, *, new: bool = True) -> Iterator[int]:
    """A handle to write `path` by, a file that is made, or one that is there."""
    yield from _opened(path, os.O_RDWR | (os.O_CREAT | os.O_TRUNC if new else 0))


def _opened(path: Path, flags: int) -> Iterator[int]:
    try:
        handle = os.open(path, flags | getattr(os, "O_BINARY", 0), 0o666)
        try:
            yield handle
        finally:
            os.close(handle)
    except OSError as error:
        raise os_error(error, path) from error


def copied(source: Path, target: Path, step: Step = no_step) -> None:
    """A copy of a file, put on the disk; of a link, what it leads to."""
    with reading(source) as old, writing(target) as new:
        copy_range(old, new, 0, os.fstat(old).st_size, source, step)
        os.fsync(new)


def linked(source: Path, target: Path) -> None:
    """The same file under another name."""
    try:
        os.link(source.resolve(), target)
    except OSError as error:
        if error.errno in (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
            raise FileError(
                "cannot be linked to from there", where=source, fix="leave out --link (link=True)"
            ) from None
        raise os_error(error, target) from error


def reserve(handle: int, nbytes: int) -> None:
    """Room on the disk for a file of that size; where the system cannot promise it, nothing."""
    if nbytes and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(handle, 0, nbytes)
        except OSError as error:
            if error.errno not in _CANNOT:
                raise


def copy_range(old: int, new: int, start: int, stop: int, source: Path, step: Step = no_step) -> None:
    """The bytes from `start` to `stop`, to the same place in another file."""
    by_system = hasattr(os, "copy_file_range")
    at = start
    while at < stop:
        todo = min(AT_ONCE, stop - at)
        if by_system:
            try:
                done = os.copy_file_range(old, new, todo, at, at)
            except OSError as error:
                if error.errno not in _CANNOT:
                    raise
                by_system = False
                continue
        else:
            done = write_at(new, os.pread(old, min(todo, BLOCK), at), at)
        if not done:
            raise damaged("truncated while it was copied", source)
        at += done
        step(done)


def read_at(handle: int, into: memoryview, at: int, source: Path) -> None:
    """Fill `into` with what stands at byte `at`."""
    while len(into):
        done = os.preadv(handle, [into], at)
        if not done:
            raise damaged("truncated while reading it", source)
        into, at = into[done:], at + done


def write_at(handle: int, data: bytes | memoryview, at: int) -> int:
    """Put all of `data` at byte `at`; how much that is."""
    view = memoryview(data)
    while len(view):
        done = os.pwrite(handle, view, at)
        view, at = view[done:], at + done
    return len(data)
