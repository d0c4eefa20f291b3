"""What came over the wire for a plan: headers instead of adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from ..source import OnHub
from .output import size

if TYPE_CHECKING:
    from ..hub.headers import Found
    from ..source import Source


def told(sources: Sequence[Source], base: Found | None = None) -> dict[str, Any]:
    """What is on the Hub among these, by its commits, and the bytes that it took, JSON-able; empty if nothing is."""
    found = _found(sources, base)
    if not found:
        return {}
    requests, nbytes, whole = _sums(found)
    references = [str(own.reference) for own in found]
    return {"hub": {"references": references, "requests": requests, "transferred": nbytes, "bytes": whole}}


def spoken(sources: Sequence[Source], base: Found | None = None) -> None:
    """Print the same in a line."""
    found = _found(sources, base)
    if found:
        click.echo(f"transferred {line(found)}")


def line(found: Sequence[Found]) -> str:
    requests, nbytes, whole = _sums(found)
    if not requests:
        return f"nothing: {size(whole)} are in the cache"
    return f"{size(nbytes)} of {size(whole)}, in {requests} requests"


def _found(sources: Sequence[Source], base: Found | None) -> list[Found]:
    return [*(source.found for source in sources if isinstance(source, OnHub)), *([base] if base is not None else [])]


def _sums(found: Sequence[Found]) -> tuple[int, int, int]:
    transfers = [own.transfer for own in found]
    return sum(t.requests for t in transfers), sum(t.nbytes for t in transfers), sum(own.nbytes for own in found)
