"""A lock file: which commit of an adapter on the Hub was pulled, and the digest of each of its files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import strict_json
from ..errors import FileError, HubError, nearest
from ..staging import staged_file
from .listing import digests_of
from .pull import Pulled
from .reference import Reference, parse

NAME = "adapterhub.lock"
VERSION = 1
_ENTRY = {"repo", "commit", "folder", "files"}


@dataclass(frozen=True)
class Locked:
    """One adapter in a lock file."""

    reference: Reference
    """Pinned to its commit."""
    files: Mapping[str, str]
    """SHA-256 of each file, by its name in the folder."""


def read(path: Path) -> dict[str, Locked]:
    """The adapters in a lock file, by the references that were pulled. `FileError` for anything else than a lock."""
    found = strict_json.read(path, missing="write it with `adapter pull REF --lock`")
    entries = found.get("adapters")
    if found.get("version") != VERSION or not isinstance(entries, dict) or found.keys() != {"version", "adapters"}:
        raise FileError("is not a lock file that is known here", where=path, fix="write it with `adapter pull --lock`")
    return {ref: _entry(ref, entry, path) for ref, entry in entries.items()}


def _entry(ref: str, entry: Any, path: Path) -> Locked:
    if isinstance(entry, dict) and entry.keys() == _ENTRY and isinstance(entry["files"], dict) and entry["files"]:
        folder = f":{entry['folder']}" if entry["folder"] else ""
        reference, own = parse(f"{entry['repo']}@{entry['commit']}{folder}"), parse(ref)
        same = (
            reference is not None and own is not None and (own.repo, own.folder) == (reference.repo, reference.folder)
        )
        if (
            reference is not None
            and same
            and reference.pinned
            and all(isinstance(d, str) for d in entry["files"].values())
        ):
            return Locked(reference, entry["files"])
    raise FileError(f"what it says of {ref!r} is no lock", where=path, fix="write it with `adapter pull --lock`")


def one(locked: Mapping[str, Locked], ref: str, path: Path) -> Locked:
    """What a lock file says of this reference."""
    if ref not in locked:
        raise FileError(f"does not have {ref!r}", where=path, fix=f"pull it with --lock; {nearest(ref, locked)}")
    return locked[ref]


def add(path: Path, ref: str, pulled: Pulled) -> None:
    """Write down what was pulled, beside what is in the file already."""
    now = read(path) if path.exists() else {}
    now[ref] = Locked(pulled.reference, _sha256(pulled))
    told = {
        name: {
            "repo": own.reference.repo,
            "commit": own.reference.revision,
            "folder": own.reference.folder,
            "files": dict(own.files),
        }
        for name, own in now.items()
    }
    text = json.dumps({"version": VERSION, "adapters": told}, indent=2, sort_keys=True) + "\n"
    with staged_file(path, force=True, replaceable=_is_lock) as file:
        file.write_text(text, encoding="utf-8")


def check(pulled: Pulled, locked: Locked, path: Path) -> None:
    """Raise `HubError` unless what was pulled is what is locked."""
    found = _sha256(pulled)
    for name in sorted(found.keys() | locked.files.keys()):
        if found.get(name) != locked.files.get(name):
            what = f"{name!r} is not the file that {path} has locked"
            fix = "do not use it, or lock it anew with --lock if you know why"
            raise HubError(what, where=pulled.reference, fix=fix, reason="corrupt")


def _sha256(pulled: Pulled) -> dict[str, str]:
    return {
        name: (pulled.digests[name] if name in pulled.digests else digests_of(pulled.folder / name, git=False)).sha256
        for name in sorted(pulled.files)
    }


def _is_lock(path: Path) -> bool:
    read(path)
    return True
