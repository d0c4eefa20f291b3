"""JSON of which every reader understands the same."""

from __future__ import annotations

import json
import math
import stat
from pathlib import Path
from typing import Any

from .errors import FileError, os_error

LIMIT = 16 << 20  # bytes of a file


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


def read(path: Path, *, missing: str) -> dict[str, Any]:
    """The object in a file; `FileError` for all else, with the fix `missing` if there is no such file."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # a fifo would never end
            raise FileError("is not a file", where=path, fix="restore the file")
        if found.st_size > LIMIT:
            raise FileError(f"is larger than {LIMIT >> 20} MB", where=path, fix="a config has a few kB")
        config = parse(path.read_text("utf-8"))
    except FileNotFoundError:
        raise FileError("is missing", where=path, fix=missing) from None
    except OSError as e:
        raise os_error(e, path) from None
    except RecursionError:
        raise FileError("is nested too deeply", where=path, fix="restore the file") from None
    except ValueError as e:
        raise FileError(f"is not valid JSON ({e})", where=path, fix="restore the file") from None
    if not isinstance(config, dict):
        raise FileError("is not a JSON object", where=path, fix="restore the file")
    return config
