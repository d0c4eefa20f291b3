"""What a folded model's folder says of itself: how it was made, what rounding left, and the digest of every file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from .._version import __version__
from ..errors import FileError, os_error
from ..strict_json import parse
from .copying import write_at, writing

NAME = "adapterhub_lite.json"
MAX_BYTES = 100_000_000
DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Retained:
    """What rounding to the base's dtype left of a change of weights."""

    unchanged: float
    """The share of the weights that kept their value."""
    projection: float | None
    """Of the applied change along the intended one, over its length: 1 where nothing is lost; None where it is zero."""

    def plain(self) -> dict[str, Any]:
        return {"unchanged": self.unchanged, "projection": self.projection}


@dataclass(frozen=True)
class Folded:
    """A model that adapters were folded into."""

    recipe: Mapping[str, Any]
    files: Mapping[str, str]
    """SHA-256 of each file."""
    retained: Retained
    modules: Mapping[str, Retained] = field(default_factory=dict)
    replaced: tuple[str, ...] = ()
    """Tensors that were replaced by trained values that an adapter brought along."""
    left: tuple[str, ...] = ()
    """Files of the base that were not copied: the same weights in other formats, and pickles."""

    def plain(self) -> dict[str, Any]:
        """As JSON carries it; the same for the same inputs."""
        return {
            "version": __version__,
            "recipe": dict(self.recipe),
            "files": dict(self.files),
            "retained": self.retained.plain(),
            "modules": {name: own.plain() for name, own in self.modules.items()},
            "replaced": list(self.replaced),
            "left": list(self.left),
        }


def write(result: Folded, folder: Path) -> None:
    """Put the manifest into the folder."""
    text = json.dumps(result.plain(), indent=2, allow_nan=False)  # not sorted: of patterns the order decides + "\n"
    with writing(folder / NAME) as handle:
        write_at(handle, text.encode(), 0)


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a folder, as `plain` gave it. `FileError` if there is none, or it is broken.

    Believed are its form only: names of files in the folder, digests, a recipe that is an object.
    """
    path = folder / NAME
    if not path.is_file():
        raise FileError(f"has no {NAME}: it is not a model that adapters were folded into", where=folder)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError
        found = parse(path.read_text(encoding="utf-8"))
        files, recipe, replaced = found["files"], found["recipe"], found["replaced"]
        outside = [name for name in files if not _inside(name)]
        told = all(DIGEST.fullmatch(digest) for digest in files.values())
        if not told or not isinstance(recipe, dict) or not all(isinstance(name, str) for name in replaced):
            raise ValueError
    except OSError as error:
        raise os_error(error, path) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise FileError("is not a manifest of ours", where=path, fix="fold again") from None
    if outside:
        raise FileError(f"names {outside[0][:100]!r}, which is no file in the folder", where=path, fix="fold again")
    assert isinstance(found, dict)
    return found


def _inside(name: str) -> bool:
    """Whether that is the one way to write the path of a file in the folder, not hidden and not of the manifest."""
    path = PurePosixPath(name)
    plain = name.isprintable() and "\\" not in name and str(path) == name != NAME
    return plain and not path.is_absolute() and not any(part.startswith(".") for part in (name, *path.parts))
