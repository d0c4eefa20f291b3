"""Whether a folded model's folder is still what the fold wrote: every file, by its digest, and nothing more."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..base_model import BaseModel
from ..checkpoint import sha256
from ..errors import FileError
from . import manifest

FIX = "fold again, or copy the folder again from where it is whole"


@dataclass(frozen=True)
class Verified:
    """What was checked, and is right."""

    files: int
    """Files that have the SHA-256 that the manifest says."""
    nbytes: int
    tensors: int
    """Tensors that the strictly read headers of the weights have."""

    def plain(self) -> dict[str, Any]:
        return {"files": self.files, "bytes": self.nbytes, "tensors": self.tensors}


def verify(out: str | os.PathLike[str], *, progress: Callable[[int, int], None] = lambda done, total: None) -> Verified:
    """Check the folder `out` that `fold` wrote against its manifest, `adapterhub_lite.json`.

    Every file must have the digest noted, none may be missing and none be there too; headers and the index are read
    strictly. Hidden files are not looked at. The manifest is believed: who changes a file and the manifest is not
    found out. Raises `FileError` that names the first file that differs. `progress(done, total)` is told bytes.
    """
    folder = Path(out)
    if not folder.is_dir():
        raise FileError("there is no such folder", where=out, fix="give the folder that a fold wrote")
    digests = manifest.read(folder)["files"]
    for name in digests:
        _check_name(name, folder)
    there = _files(folder) - {manifest.NAME}
    if missing := sorted(digests.keys() - there):
        raise FileError("is missing", where=folder / missing[0], fix=FIX)
    if more := sorted(there - digests.keys()):
        raise FileError("is not in the manifest", where=folder / more[0], fix="remove it, if you know what it is")
    sizes = {name: (folder / name).stat().st_size for name in digests}
    done, total = 0, sum(sizes.values())
    for name, digest in sorted(digests.items()):
        if sha256(folder / name) != digest:
            raise FileError("is not what was written: its SHA-256 differs", where=folder / name, fix=FIX)
        done += sizes[name]
        progress(done, total)
    return Verified(len(digests), total, len(BaseModel.open(folder).tensors))


def _check_name(name: str, folder: Path) -> None:
    """A stranger's manifest names files in its own folder, or is refused."""
    path = PurePosixPath(name)
    if str(path) != name or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or name == ".":
        raise FileError(f"names {name[:100]!r}, which is no file in the folder", where=folder / manifest.NAME, fix=FIX)


def _files(folder: Path) -> set[str]:
    """All files in the folder and below, by their relative paths; nothing hidden."""
    found = set()
    for path, folders, files in os.walk(folder):
        inner = PurePosixPath(Path(path).relative_to(folder).as_posix())
        links = [name for name in folders if Path(path, name).is_symlink()]  # not walked through
        folders[:] = [name for name in folders if not name.startswith(".")]
        found |= {str(inner / name) for name in (*files, *links) if not name.startswith(".")}
    return found
