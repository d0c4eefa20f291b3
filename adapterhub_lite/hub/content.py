"""What of a folder is published: read strictly, verified, no pickle, nothing hidden, nothing from outside."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Literal

from ..base_model import PICKLES
from ..checkpoint import unpickle
from ..errors import FileError, os_error
from ..folding import manifest
from ..folding.verify import ADAPTER, verify
from ..source import stored
from .card import NAME as CARD
from .listing import Digests, digests_of
from .listing import File as Announced

COMPOSITION = "composition.json"
ADAPTERS = "adapters"
WRITTEN = "give a folder with an adapter, a composition, or a model that adapters were folded into"
_PICKLED = tuple(b"\x80" + bytes([version]) for version in range(2, 6))

Kind = Literal["adapter", "composition", "model"]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class File:
    """A file as it is on the disk."""

    path: Path

    @cached_property
    def size(self) -> int:
        return self.path.stat().st_size

    @cached_property
    def _large(self) -> Digests:
        return digests_of(self.path, git=False)

    @cached_property
    def _small(self) -> Digests:
        return digests_of(self.path)

    def match(self, there: Announced) -> bool:
        """Whether the file on the Hub has the same bytes, by its digest."""
        if self.size != there.size:
            return False
        try:
            return (self._small if there.sha256 is None else self._large).match(there)
        except OSError as error:
            raise os_error(error, self.path) from error


@dataclass(frozen=True)
class Content:
    """A folder that may be published."""

    kind: Kind
    folder: Path
    files: Mapping[str, File]
    """By their names on the Hub. The card is not among them."""
    left: tuple[str, ...]
    """What is in the folder and stays there: hidden, links that lead out, no files."""
    card: Path | None = None
    """The card that is in the folder."""


def read(folder: Path, progress: Progress = lambda done, total: None) -> Content:
    """Read a folder strictly: all headers, all numbers of adapters, all digests of a model.

    Raises `FileError` for a folder that is none of ours, is broken, or has pickles.
    """
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "there is no such folder"
        raise FileError(what, where=folder, fix=WRITTEN)
    files, left = dict[str, File](), list[str]()
    for name, path in _walk(folder, PurePosixPath()):
        if path is None:
            left.append(name)
        else:
            _refuse_pickles(path)
            files[name] = File(path)
    card = files.pop(CARD, None)
    kind = _checked(folder, progress)
    lacking = [name for name in _needed(kind, folder) if name in left]
    if lacking:
        fix = "copy the folder, with 'cp -rL', and push the copy"
        raise FileError("is a link that leads out of the folder", where=folder / lacking[0], fix=fix)
    return Content(kind, folder, files, tuple(left), None if card is None else card.path)


def _checked(folder: Path, progress: Progress) -> Kind:
    if (folder / manifest.NAME).is_file():
        verify(folder, progress=progress)
        return "model"
    if (folder / COMPOSITION).is_file():
        from ..live.folder import read as composition  # imports torch

        composition(folder)
        for path in sorted((folder / ADAPTERS).iterdir()):
            if path.is_dir():
                verify(path, progress=progress)
        return "composition"
    if not (folder / ADAPTER).exists():
        what = "has no adapter, no composition and no manifest of a fold: it is not clear what it is"
        raise FileError(what, where=folder, fix=WRITTEN)
    verify(folder, progress=progress)
    return "adapter"


def _needed(kind: Kind, folder: Path) -> list[str]:
    """The names of the files that it is made of."""
    if kind == "model":
        return [manifest.NAME, *manifest.read(folder)["files"]]
    if kind == "composition":
        parts = sorted(path for path in (folder / ADAPTERS).iterdir() if path.is_dir())
        own = [file for path in parts for file in stored(path).files]
        return [COMPOSITION, "gates.safetensors", ADAPTERS, *(file.relative_to(folder).as_posix() for file in own)]
    return [file.name for file in stored(folder).files]


def _walk(folder: Path, inner: PurePosixPath) -> Iterator[tuple[str, Path | None]]:
    """Every file by its name, with None for what is not published."""
    try:
        entries = sorted(os.scandir(folder / inner), key=lambda entry: entry.name)
    except OSError as error:
        raise os_error(error, folder / inner) from None
    root = folder.resolve()
    for entry in entries:
        name, path = inner / entry.name, Path(entry.path)
        if entry.name.startswith("."):
            yield str(name), None
        elif entry.is_dir(follow_symlinks=False):
            yield from _walk(folder, name)
        elif path.is_file() and path.resolve().is_relative_to(root):
            if "\\" in entry.name or not entry.name.isprintable():
                raise FileError("no file on the Hub has such a name", where=path, fix="rename it")
            yield str(name), path
        else:
            yield str(name), None


def _refuse_pickles(path: Path) -> None:
    if path.suffix.lower() not in PICKLES and not _is_pickle(path):
        return
    fix = f"remove it, or, if it has the weights, {unpickle(path.name)}"
    raise FileError("is a pickle, which can run code on whoever reads it, and is not published", where=path, fix=fix)


def _is_pickle(path: Path) -> bool:
    """By its first bytes, and for those of a zip by what torch puts into it."""
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        raise os_error(error, path) from None
    if path.suffix == ".safetensors":  # a header of 640 bytes begins like a pickle; the strict reader tells
        return False
    return head.startswith(_PICKLED) or (head.startswith(b"PK\x03\x04") and b"/data.pkl" in head)
