"""What of a fold is done: a line for each shard, in the unfinished folder, so that a later run need not do it again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint import sha256
from ..errors import FileError
from .copying import writing

NAME = ".journal.jsonl"  # hidden: no file of a base is called so, for hidden ones are not copied


class Journal:
    """The journal in `folder`. What it says is believed only where a file's content still has the digest noted."""

    def __init__(self, folder: Path, work: Mapping[str, Any]) -> None:
        """`work`: what is folded into what, and how; entries of other work count for nothing."""
        self.folder, self.path = folder, folder / NAME
        self.key = hashlib.sha256(json.dumps(work).encode()).hexdigest()  # of patterns the order decides
        self._whole = 0  # bytes of whole lines
        self._done = self._read()

    def begin(self) -> None:
        """Start an empty one, unless there is one of the same work."""
        if self._done:
            with writing(self.path, new=False) as handle:
                os.ftruncate(handle, self._whole)  # or what is noted next would be glued to a torn line
            return
        with writing(self.path):
            pass
        self._append({"work": self.key})

    def note(self, file: str, digest: str, facts: Any) -> None:
        """A file is whole, and on the disk."""
        self._append({"file": file, "sha256": digest, "facts": facts})

    def done(self, file: str) -> tuple[str, Any] | None:
        """Digest and facts of a file that an earlier run finished and that still has the same content."""
        entry = self._done.get(file)
        if entry is None:
            return None
        try:
            same = sha256(self.folder / file) == entry[0]
        except FileError:
            return None
        return entry if same else None

    @property
    def names(self) -> frozenset[str]:
        """The files that an earlier run noted, and the journal itself."""
        return frozenset({NAME, *self._done} if self._done else ())

    def remove(self) -> None:
        self.path.unlink()

    def _append(self, entry: Mapping[str, Any]) -> None:
        with writing(self.path, new=False) as handle:
            os.lseek(handle, 0, os.SEEK_END)
            line = json.dumps(entry, sort_keys=True).encode() + b"\n"
            while line:
                line = line[os.write(handle, line) :]
            os.fsync(handle)

    def _read(self) -> dict[str, tuple[str, Any]]:
        try:
            lines = self.path.read_bytes().split(b"\n")[:-1]  # behind the last newline: torn, or nothing
            first, *entries = [json.loads(line) for line in lines]
            if first != {"work": self.key}:
                return {}
            self._whole = sum(len(line) + 1 for line in lines)
            return {entry["file"]: (entry["sha256"], entry["facts"]) for entry in entries}
        except (OSError, ValueError, KeyError, TypeError):
            return {}


def begun(folder: Path) -> bool:
    """Whether an unfinished folder has anything that a later run can use."""
    try:
        return b"\n" in (folder / NAME).read_bytes().partition(b"\n")[2]
    except OSError:
        return False
