"""Which tensors of the base the whole values stand for that PEFT saves beside an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapterhub_lite import FileError

from .layout import PREFIX, within

ROWS = ".token_adapter.trainable_tokens_delta"
ROWS_OF = ".token_adapter.base_layer.weight"  # what those rows are of: the base's own


def replaced(kept: Mapping[str, Any], options: Mapping[str, Any]) -> list[tuple[str, Any, tuple[int, ...] | None]]:
    """Name of the base's tensor, the value, and of which rows it is (None: of all)."""
    found: list[tuple[str, Any, tuple[int, ...] | None]] = []
    for key, value in kept.items():
        inner = key.removeprefix(PREFIX)
        if inner.endswith(ROWS):
            module = inner.removesuffix(ROWS)
            found.append((f"{module}.weight", value, _rows(module, value, options)))
        elif not inner.endswith(ROWS_OF):
            found.append((inner, value, None))
    return found


def _rows(module: str, value: Any, options: Mapping[str, Any]) -> tuple[int, ...]:
    told = options.get("trainable_token_indices")
    lists = [rows for name, rows in told.items() if within(name, module)] if isinstance(told, dict) else [told or ()]
    if len(lists) != 1 or len(lists[0]) != value.shape[0]:
        raise FileError(
            f"trainable_token_indices do not tell the {value.shape[0]} rows of {module!r}",
            where=value.path,
            fix="correct the config",
        )
    return tuple(lists[0])
