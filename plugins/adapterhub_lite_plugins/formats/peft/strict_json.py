"""JSON of which every reader understands the same."""

from __future__ import annotations

import json
import math
from typing import Any


def parse(text: str) -> Any:
    """As `json.loads`, but no name stands twice and every number is finite."""

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            raise ValueError("a name stands twice")
        return entries

    def finite(number: str) -> float:
        if not math.isfinite(value := float(number)):
            raise ValueError(f"{number} is not a finite number")
        return value

    return json.loads(text, object_pairs_hook=no_duplicates, parse_constant=finite, parse_float=finite)
