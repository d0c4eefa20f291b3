"""The options of a truncation, of which there is one at most: to a rank, an error or a size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import click

from .grouped import C, together
from .output import Size


def cut_options(rank: str, to: str = "Truncate to the") -> Callable[[C], C]:
    """`--rank`, `--max-error` and `--budget`; `rank` is the help of the first, `to` how that of the others begins."""
    return together(
        click.option("--rank", type=click.IntRange(min=1), help=rank),
        click.option(
            "--max-error",
            type=click.FloatRange(0, 1, min_open=True, max_open=True),
            help=f"{to} smallest adapter with at most this relative error, rounding included.",
        ),
        click.option("--budget", type=Size(), help=f"{to} nearest adapter of at most this size, say 80MB."),
    )


def refuse_two(cuts: Mapping[str, Any]) -> None:
    """More than one is wrong usage."""
    if sum(cut is not None for cut in cuts.values()) > 1:
        raise click.UsageError("--rank, --max-error and --budget exclude each other")
