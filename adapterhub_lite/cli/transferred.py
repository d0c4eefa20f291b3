"""What came over the wire for a plan: headers instead of adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..source import OnHub
from .output import size

if TYPE_CHECKING:
    from ..source import Source


def of_hub(sources: Sequence[Source]) -> dict[str, Any] | None:
    """The adapters on the Hub among these, by their commits, and the bytes that they took; None if there are none."""
    found = [source.found for source in sources if isinstance(source, OnHub)]
    if not found:
        return None
    return {
        "adapters": [str(own.reference) for own in found],
        "requests": sum(own.transfer.requests for own in found),
        "transferred": sum(own.transfer.nbytes for own in found),
        "bytes": sum(own.nbytes for own in found),
    }


def spoken(told: dict[str, Any] | None) -> str:
    """The same in a line."""
    assert told is not None
    if not told["requests"]:
        return f"nothing: {size(told['bytes'])} are in the cache"
    return f"{size(told['transferred'])} of {size(told['bytes'])}, in {told['requests']} requests"
