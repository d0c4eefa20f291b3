"""The adapters that somebody gives, as those that a recipe names: told by the digests of their files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError, FileError
from ..recorded import Leaf, Recorded
from ..source import Stored, stored


def reader(where: Path) -> Recorded:
    """Of recipes in the file or folder `where`. A rule of another version is refused."""

    def other(name: str, then: Any, now: int) -> None:
        raise FileError(
            f"was made by version {then} of rule {name!r}, and this is {now}",
            where=where,
            fix="install the version of the package, or of the plugin, that made it",
        )

    return Recorded(lambda: not_ours(where), other)


def found(recipe: Any, refs: Sequence[str | Path], where: Path) -> Callable[[Leaf], Stored]:
    """The given adapters as those of the recipe, told by their digests.

    `FileError` that names the first file that has another digest, or an adapter that is in the one and not the other.
    """
    given = [stored(ref) for ref in refs]
    own = [source.recipe() for source in given]
    by_digest = {_key(told["sha256"]): source for told, source in zip(own, given, strict=True)}
    wanted = list(reader(where).leaves(recipe))
    for leaf in wanted:
        if leaf["adapter"] is None:
            raise ConfigError("has an adapter in it that never was a file", where=where, fix="leave out --adapters")
        if _key(leaf["sha256"]) in by_digest:
            continue
        for told, source in zip(own, given, strict=True):
            if Path(told["adapter"]).name == Path(leaf["adapter"]).name:
                raise _other(source, told["sha256"], leaf["sha256"])
        fix = "give all adapters that were merged, as they were then"
        raise FileError(f"the adapter {leaf['adapter']!r} of the recipe is none of those given", where=where, fix=fix)
    used = {_key(leaf["sha256"]) for leaf in wanted}
    for told, source in zip(own, given, strict=True):
        if _key(told["sha256"]) not in used:
            raise FileError("no adapter of the recipe has its digests", where=source.name, fix="leave it out")
    return lambda leaf: by_digest[_key(leaf["sha256"])]


def not_ours(where: Path) -> FileError:
    return FileError("the recipe is not one of ours", where=where, fix="merge again")


def _key(digests: Mapping[str, str]) -> frozenset[tuple[str, str]]:
    return frozenset(digests.items())


def _other(source: Stored, own: Mapping[str, str], told: Mapping[str, str]) -> FileError:
    first = min(name for name, _ in _key(own) ^ _key(told))
    what = "is not in the recipe" if first not in told else "is missing" if first not in own else ""
    what = what or f"has the SHA-256 {own[first][:12]}…, and in the recipe {told[first][:12]}…"
    return FileError(what, where=source.folder / first, fix="give the adapter as it was when it was merged")
