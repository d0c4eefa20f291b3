"""An adapter on the Hub by its headers: configs and the first bytes of its safetensors, the rest when it is read."""

from __future__ import annotations

import shutil
import tempfile
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint import MAX_HEADER, later
from ..errors import HubError
from .listing import File, Listing, content, listed, remember
from .pull import ADAPTER, Pulled, cached, chosen, fetch, note_branch, resolve, told_of
from .reference import Reference
from .wire import Transfer, part

FIRST = 1 << 14  # bytes of a safetensors file that are asked for first
MAX_CONFIG = 100_000_000  # bytes of a config or an index
SMALL = 1 << 16  # other JSON than configs is taken up to here


@dataclass(frozen=True)
class Found:
    """A folder on the Hub, on this machine as far as its header."""

    reference: Reference
    """Pinned to its commit."""
    folder: Path
    files: Mapping[str, File]
    transfer: Transfer
    """What that took."""

    @property
    def nbytes(self) -> int:
        """Of all its files."""
        return sum(file.size for file in self.files.values())


def find(reference: Reference, patterns: Sequence[str] = ADAPTER, *, deep: bool = False) -> Found:
    """The folder's headers; of one that is in the cache already, its files, verified.

    What is not there yet is fetched, whole and verified, when a tensor is first read: see `checkpoint.later`. The
    headers are there as long as what is returned is.
    """
    from huggingface_hub import constants

    transfer = Transfer()
    pinned = resolve(reference, transfer)
    with told_of(reference):
        listing = listed(pinned.repo, pinned.commit, transfer, reference)
    files = chosen(listing, reference, patterns, deep=deep)
    note_branch(reference, pinned)
    if constants.HF_HUB_OFFLINE or cached(listing, list(files.values())) is not None:
        return Found(pinned, fetch(pinned, patterns=patterns, deep=deep).folder, files, transfer)
    remember(listing)
    folder = Path(tempfile.mkdtemp(prefix="adapter-headers-"))
    found = Found(pinned, folder, files, transfer)
    weakref.finalize(found, shutil.rmtree, folder, ignore_errors=True)
    rest = _Rest(pinned, patterns, deep)
    for name, file in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".safetensors"):
            with told_of(reference):
                header = _header(listing, file, transfer)
            (folder / name).write_bytes(header)
            later(folder / name, file.size, rest.of(name, header))
        elif name.endswith(("config.json", "index.json")) or (name.endswith(".json") and file.size <= SMALL):
            (folder / name).write_bytes(_whole(listing, file, transfer, reference))
    return found


def _header(listing: Listing, file: File, transfer: Transfer) -> bytes:
    """The header of a safetensors file, and its length before it."""
    first = part(listing.repo, listing.commit, file.path, 0, min(FIRST, file.size), transfer)
    length = int.from_bytes(first[:8], "little")
    if first[8:9] != b"{" or length > MAX_HEADER:
        return first  # which is refused when it is read
    stop = min(8 + length, file.size)
    if stop <= len(first):
        return first[:stop]
    return first + part(listing.repo, listing.commit, file.path, len(first), stop, transfer)


def _whole(listing: Listing, file: File, transfer: Transfer, reference: Reference) -> bytes:
    """A small file's bytes, verified."""
    if file.size > MAX_CONFIG:
        what = f"{file.path!r} has {file.size} bytes, the limit is {MAX_CONFIG}"
        raise HubError(what, where=reference, fix="a config has a few kB", reason="corrupt")
    with told_of(reference):
        found = content(listing.repo, listing.commit, file, transfer)
    if found is not None:
        return found
    what = f"{file.path!r} is not what the Hub announced, {file.size} bytes of {file.digest}"
    raise HubError(what, where=reference, fix="it was fetched twice: try later, or ask its owner", reason="corrupt")


class _Rest:
    """The whole folder, once anything of it is asked for."""

    def __init__(self, reference: Reference, patterns: Sequence[str], deep: bool) -> None:
        self.reference, self.patterns, self.deep = reference, patterns, deep
        self.lock = threading.Lock()
        self.pulled: Pulled | None = None

    def of(self, name: str, header: bytes) -> _One:
        return _One(self, name, header)

    def get(self) -> Pulled:
        with self.lock:
            if self.pulled is None:
                self.pulled = fetch(self.reference, patterns=self.patterns, deep=self.deep)
            return self.pulled


@dataclass(frozen=True)
class _One:
    """One file of it."""

    rest: _Rest
    name: str
    header: bytes

    def __call__(self) -> Path:
        pulled = self.rest.get()
        path = pulled.folder / self.name
        with open(path, "rb") as file:
            same = file.read(len(self.header)) == self.header
        if not same:
            what = f"{self.name!r} has another header than the Hub sent before"
            raise HubError(what, where=pulled.reference, fix="try again, or ask its owner", reason="corrupt")
        return path
