"""What a commit on the Hub has: every file's size and digest, as the server tells them, remembered in the cache."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint import BLOCK
from ..errors import HubError, printable
from .wire import Transfer, api, part

_SHA1, _SHA256 = re.compile("[0-9a-f]{40}"), re.compile("[0-9a-f]{64}")
_ODD = re.compile(r"[\x00-\x1f\x7f\\]")
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # names that Windows keeps for itself
MAX_FILES = 100_000


@dataclass(frozen=True)
class File:
    """One file in a commit: of a large one its SHA-256 is known, of others the SHA-1 of git's blob."""

    path: str
    size: int
    sha256: str | None
    sha1: str | None

    @property
    def digest(self) -> str:
        return f"sha256 {self.sha256}" if self.sha256 is not None else f"git-sha1 {self.sha1}"


@dataclass(frozen=True)
class Digests:
    """What a file has in truth."""

    size: int
    sha256: str
    sha1: str | None
    """Of git's blob, where it was asked for."""

    def match(self, file: File) -> bool:
        if self.size != file.size:
            return False
        return self.sha256 == file.sha256 if file.sha256 is not None else self.sha1 == file.sha1


def digests(blocks: Iterable[bytes | memoryview], size: int, *, git: bool = True) -> Digests:
    """Of these bytes, said to be `size`; with that of git's blob, which only files that are not large are known by."""
    large, small, got = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False), 0
    for block in blocks:
        large.update(block)
        if git:
            small.update(block)
        got += len(block)
    return Digests(got, large.hexdigest(), small.hexdigest() if git else None)


def digests_of(path: Path, *, git: bool = True) -> Digests:
    """Of a file."""
    with open(path, "rb", buffering=0) as file:
        block = memoryview(bytearray(BLOCK))

        def blocks() -> Iterator[memoryview]:
            while got := file.readinto(block):
                yield block[:got]

        return digests(blocks(), os.fstat(file.fileno()).st_size, git=git)


def content(repo: str, commit: str, file: File, transfer: Transfer) -> bytes | None:
    """A small file's bytes, verified; None where the Hub sends others than it announces, twice."""
    for _ in range(2):
        found = part(repo, commit, file.path, 0, file.size, transfer)
        if digests([found], len(found)).match(file):
            return found
    return None


@dataclass
class Listing:
    """The files of a commit, and which of those in the cache have been found to be these."""

    repo: str
    commit: str
    files: Mapping[str, File]
    verified: dict[str, list[int]] = field(default_factory=dict)
    partial: bool = False
    """Whether it has only what is in the cache."""

    def within(self, folder: str) -> dict[str, File]:
        """The files right in a folder, by their names there."""
        inside = f"{folder}/" if folder else ""
        found = {path.removeprefix(inside): file for path, file in self.files.items() if path.startswith(inside)}
        return {name: file for name, file in found.items() if "/" not in name}

    def below(self, folder: str) -> dict[str, File]:
        """The files in a folder and in those in it."""
        inside = f"{folder}/" if folder else ""
        return {path.removeprefix(inside): file for path, file in self.files.items() if path.startswith(inside)}

    def knows(self, file: File, path: Path) -> bool:
        """Whether the file at `path` was verified, and has not been touched since."""
        return self.verified.get(file.path) == _stamp(path)

    def note(self, file: File, path: Path) -> None:
        self.verified[file.path] = _stamp(path)


def _stamp(path: Path) -> list[int]:
    """What changes when somebody writes to the file, or puts another in its place."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def checked_path(path: object, where: object) -> str:
    """A file's path as a server told it; `HubError` if it could lead out of a folder, or no file has such a name."""
    if isinstance(path, str) and 0 < len(path) < 4096 and not _ODD.search(path):
        parts = path.split("/")
        windows = os.name == "nt" and any(":" in part or _RESERVED.fullmatch(part) for part in parts)
        if not windows and not any(part in ("", ".", "..") or len(part.encode()) > 255 for part in parts):
            return path
    what = f"has a file of the name {printable(repr(path))[:100]}, which could lead anywhere"
    raise HubError(what, where=where, fix="do not trust that repository", reason="corrupt")


def listed(repo: str, commit: str, transfer: Transfer, where: object) -> Listing:
    """The files of a commit: from memory, else from the Hub; offline, those in the cache."""
    from huggingface_hub import constants

    known = remembered(repo, commit) or (_linked(repo, commit) if constants.HF_HUB_OFFLINE else None)
    if known is not None:
        return known
    files: dict[str, File] = {}
    pages = api(f"models/{repo}/tree/{commit}?recursive=true&expand=false", transfer)
    for entry in (entry for page in pages for entry in page):
        path = checked_path(entry["path"], where)
        if entry["type"] == "file":
            files[path] = _file(path, entry["size"], (entry.get("lfs") or {}).get("oid"), entry["oid"])
        if len(files) > MAX_FILES:
            raise HubError(f"has more than {MAX_FILES} files", where=where, fix="name another one", reason="corrupt")
    return Listing(repo, commit, files)


def _file(path: str, size: Any, sha256: Any, sha1: Any) -> File:
    if type(size) is not int or not 0 <= size < 1 << 62 or sha256 is sha1 is None:
        raise ValueError(f"{path!r} has no size and digest")
    for digest, pattern in ((sha256, _SHA256), (sha1, _SHA1)):
        if digest is not None and not pattern.fullmatch(str(digest)):
            raise ValueError(f"{path!r} has a digest that is none")
    return File(path, size, sha256, sha1)


# In the cache -------------------------------------------------------------------------------------------


def storage(repo: str) -> Path:
    """The folder that the client's cache keeps a model in."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"


def _memory(repo: str, commit: str) -> Path:
    return storage(repo) / "adapterhub_lite" / f"{commit}.json"


def remembered(repo: str, commit: str) -> Listing | None:
    """The listing as `remember` wrote it; None if there is none, or it is damaged."""
    try:
        text = _memory(repo, commit).read_text("utf-8")
        told = json.loads(text)
        files = {path: _file(checked_path(path, repo), *own) for path, own in told["files"].items()}
        verified = {path: [int(n) for n in stamp] for path, stamp in told["verified"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, HubError):
        return None
    return Listing(repo, commit, files, verified)


def _linked(repo: str, commit: str) -> Listing | None:
    """What the client itself has put into the cache: it calls a file by its digest, and links to it."""
    folder, files = storage(repo) / "snapshots" / commit, dict[str, File]()
    for place in sorted(folder.rglob("*")):
        if place.is_symlink() and place.is_file():
            path, digest = place.relative_to(folder).as_posix(), place.readlink().name
            large = digest if _SHA256.fullmatch(digest) else None
            small = digest if _SHA1.fullmatch(digest) else None
            if large or small:
                files[path] = File(path, place.stat().st_size, large, small)
    return Listing(repo, commit, files, partial=True) if files else None


def remember(listing: Listing) -> None:
    """Keep it for when there is no network. A cache that cannot be written keeps nothing."""
    if listing.partial:
        return
    files = {path: [file.size, file.sha256, file.sha1] for path, file in sorted(listing.files.items())}
    text = json.dumps({"files": files, "verified": listing.verified}, indent=0)
    path = _memory(listing.repo, listing.commit)
    with contextlib.suppress(OSError, ValueError):
        if path.is_file() and not path.is_symlink() and path.read_text("utf-8") == text:
            return
    with contextlib.suppress(OSError):
        replace_text(path, text)


def replace_text(path: Path, text: str) -> None:
    """Write a small file in the cache, whole or not at all; a link in its place is replaced, not followed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "x", encoding="utf-8") as file:
            file.write(text)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
