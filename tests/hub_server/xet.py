"""Large files in Xet: the client writes them to a local store, which is looked into here."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from pathlib import Path

RECORD = 48  # bytes of everything in a shard
VERIFICATION, METADATA = 1 << 31, 1 << 30  # flags: another record for each of a file, and one for its SHA-256
LAST = b"\xff" * 32


class XetStore:
    """Xet's own local store in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = f"local://{folder}"
        self.expires = int(time.time()) + 3600

    def files(self) -> dict[str, str]:
        """SHA-256 to Xet's hash, of all that was uploaded."""
        shards = sorted((self.folder / "xet" / "xorbs" / "shards").glob("*.mdb"))
        return dict(pair for shard in shards for pair in _files(shard.read_bytes()))

    def read(self, xet: str, sha256: str) -> bytes:
        import hf_xet

        out = self.folder / f"{sha256}.out"
        group = hf_xet.XetSession().new_file_download_group(
            endpoint=self.url, token="-", token_expiry_unix_secs=self.expires
        )
        with group as downloads:
            downloads.start_download_file(hf_xet.XetFileInfo(xet, None), str(out))
        data = out.read_bytes()
        out.unlink()
        return data


def _files(shard: bytes) -> Iterator[tuple[str, str]]:
    """(SHA-256, Xet's hash) of each file that a shard tells of."""
    at = RECORD  # the header
    while shard[at : at + 32] != LAST:
        xet = _hash(shard[at : at + 32])
        flags, entries = struct.unpack("<II", shard[at + 32 : at + 40])
        at += RECORD * (1 + entries * (2 if flags & VERIFICATION else 1))
        if flags & METADATA:
            yield _hash(shard[at : at + 32]), xet
            at += RECORD


def _hash(raw: bytes) -> str:
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))
