"""Tables, sizes and progress for people; JSON for programs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

from ..recipe import nbytes
from ..recipe import size as size


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, sort_keys=True, allow_nan=False))


def table(rows: Sequence[Sequence[str]], head: Sequence[str], right: Sequence[int] = ()) -> str:
    """Columns as wide as their widest cell; those numbered in `right` are right-aligned."""
    lines = [head, *rows]
    width = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(line, width, strict=True))
        ).rstrip()
        for line in lines
    )


def number(x: float | None) -> str:
    """A size or a distance, to three digits; a dash for what is not defined."""
    return "-" if x is None else f"{x:.0f}" if 1000 <= x < 1e6 else f"{x:.3g}"


def share(x: float | None) -> str:
    """A cosine or an overlap, to three places."""
    return "-" if x is None else f"{x + 0.0:.3f}".replace("-0.000", "0.000")


class Size(click.ParamType[int]):
    """80MB, 1.5GB, 512KiB, 1000000."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            return nbytes(str(value))
        except ValueError as e:
            self.fail(str(e), param, ctx)


@contextmanager
def progress(label: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal's stderr, for work that takes over a second."""
    if quiet or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    start, shown = time.monotonic(), False

    def step(done: int, total: int) -> None:
        nonlocal shown
        if time.monotonic() - start > 1:
            shown = True
            filled = 30 * done // total
            click.echo(f"\r{label} [{'#' * filled}{'-' * (30 - filled)}] {done}/{total}", err=True, nl=False)

    try:
        yield step
    finally:
        if shown:
            click.echo("\r\033[K", err=True, nl=False)


@contextmanager
def transfer(label: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """As `progress`, for bytes: how many a second, and how long it will yet take."""
    if quiet or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    start = shown = time.monotonic()

    def step(done: int, total: int) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - start > 1 and now - shown > 0.1:
            shown = now
            speed = done / (now - start)
            left = (total - done) / speed if speed else 0.0
            filled = 30 * done // max(total, 1)
            text = f"{label} [{'#' * filled}{'-' * (30 - filled)}] {size(done)} of {size(total)}"
            click.echo(f"\r{text}, {size(int(speed))}/s, {left:.0f} s left\033[K", err=True, nl=False)

    try:
        yield step
    finally:
        if shown != start:
            click.echo("\r\033[K", err=True, nl=False)
