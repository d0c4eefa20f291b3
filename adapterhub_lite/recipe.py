"""A merge as a TOML file: which adapters, their weights, the rule and its options, what to write; strictly checked."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from . import options
from .checkpoint import sha256, whole
from .errors import ConfigError, FileError, nearest, os_error, printable
from .hub.reference import on_hub
from .options import option
from .per_site import first

if sys.version_info >= (3, 11):
    import tomllib
else:  # the same, as a package
    import tomli as tomllib

LIMIT = 1 << 20  # bytes of a recipe
UNITS = {"": 1, "b": 1, "k": 10**3, "kb": 10**3, "m": 10**6, "mb": 10**6, "g": 10**9, "gb": 10**9}
UNITS |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}
DIGEST = re.compile("[0-9a-fA-F]{64}")
Dtype = Literal["float32", "float16", "bfloat16", "float64"]
Weight = float | Mapping[str, float | tuple[float, ...]]


def nbytes(text: str) -> int:
    """Bytes of a size as people write it; `ValueError` if it is none.

    >>> nbytes("80MB"), nbytes("1.5 kB"), nbytes("1KiB")
    (80000000, 1500, 1024)
    """
    number = text.strip().lower().rstrip("abcdefghijklmnopqrstuvwxyz ")
    try:
        found = int(float(number) * UNITS[text.strip().lower()[len(number) :].strip()])
    except (KeyError, ValueError, OverflowError):
        raise ValueError(f"{text!r} is not a size; write 80MB or 512KiB") from None
    if found < 1:
        raise ValueError(f"{text!r} is not a positive size")
    return found


def size(nbytes: int) -> str:
    """Bytes as people read them: powers of ten, as disks and the Hub count."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.1f} {name}"
    return f"{nbytes} bytes"


@dataclass(frozen=True, kw_only=True)
class Input:
    """One of the adapters."""

    path: str
    weight: Weight | None = None
    sha256: str | Mapping[str, str] | None = None
    """Of the file of tensors, or of files by name."""

    def check(self, files: tuple[Path, ...], owner: str) -> None:
        """Raise `FileError` unless the adapter's files are those that are pinned."""
        if self.sha256 is None:
            return
        known = {file.name: file for file in files}
        tensors = next((name for name in known if name.endswith(".safetensors")), next(iter(known)))
        pinned = {tensors: self.sha256} if isinstance(self.sha256, str) else self.sha256
        for name, digest in pinned.items():
            if name not in known:
                raise ConfigError(
                    f"the adapter has no file {name!r}", where=f"{owner}.sha256", fix=nearest(name, known)
                )
            if (found := sha256(known[name])) != digest.lower():
                raise FileError(
                    f"its sha256 is {found}, and the recipe's {digest.lower()}",
                    where=whole(known[name]),
                    fix=f"get the file that is meant, or change {owner}.sha256",
                )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a file says. Paths are relative to its folder."""

    adapters: tuple[Input, ...]
    rule: str | None = None
    options: Mapping[str, object] = field(default_factory=dict)
    at: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    rank: int | None = option(None, "Truncate to this rank.", least=1)
    max_error: float | None = option(None, "Truncate to this error.", above=0, below=1)
    budget: int | str | None = option(None, "Truncate to this size.", least=1)
    dtype: Dtype | None = None
    keep: str | None = None
    any_base: bool = False
    into: str | None = None
    rounding: Literal["nearest", "stochastic"] | None = None
    rounding_seed: int | None = None
    file: Path

    def path(self, name: str) -> str:
        """Where `name`, which is relative to the recipe's folder, is; a reference to the Hub stays one."""
        path = os.path.normpath(self.file.parent / name)
        return name if not os.path.lexists(path) and on_hub(name) is not None else path

    def owner(self, key: str) -> str:
        """What to call a key in messages."""
        return f"{self.file}: {key}"

    def check_patterns(self, sites: Mapping[str, Any]) -> None:
        """Raise `ConfigError` for a pattern that no adapted module has: it is misspelt."""
        tables = {f"adapters[{i}].weight": own.weight for i, own in enumerate(self.adapters)}
        for key, table in {**tables, "at": self.at}.items():
            for pattern in table if isinstance(table, Mapping) else ():
                if pattern != "*" and not any(first({pattern: True}, site) for site in sites):
                    raise ConfigError(
                        f"no adapted module is called {pattern!r}", where=self.owner(key), fix=nearest(pattern, sites)
                    )


def read(file: str | os.PathLike[str]) -> Recipe:
    """The recipe in a file. Raises `FileError` and `ConfigError`, which name the file and the key."""
    file = Path(file)
    try:
        with open(file, "rb") as handle:
            text = handle.read(LIMIT + 1)
        if len(text) > LIMIT:
            raise FileError(f"is larger than {LIMIT >> 20} MB", where=file, fix="a recipe has a few kB")
        table = tomllib.loads(text.decode("utf-8"))
    except OSError as e:
        raise os_error(e, file) from None
    except RecursionError:
        raise FileError("is nested too deeply", where=file, fix="write it as docs/recipes.md does") from None
    except ValueError as e:  # of which TOMLDecodeError and UnicodeDecodeError are
        raise FileError(f"is not valid TOML ({printable(str(e))})", where=file, fix="repair the file") from None
    if "file" in table:
        raise ConfigError("unknown option 'file'", where=file, fix=nearest("file", _keys(Recipe)))
    if not isinstance(table.get("adapters"), list) or not table["adapters"]:
        raise ConfigError("has no adapters", where=file, fix='write [[adapters]] and path = "…" for each')
    inputs = []
    for i, entry in enumerate(table["adapters"]):
        where = f"{file}: adapters[{i}]"
        if not isinstance(entry, dict) or "path" not in entry:
            raise ConfigError("names no path", where=where, fix='write [[adapters]] and path = "…" for each')
        inputs.append(_built(Input, entry, where))
    found: Recipe = _built(Recipe, {**table, "adapters": inputs, "file": file}, str(file))
    _check(found)
    return found


def _keys(cls: type[Any]) -> list[str]:
    return [name for name in cls.__dataclass_fields__ if name != "file"]


def _built(cls: type[Any], table: Mapping[str, Any], owner: str) -> Any:
    for name in table.keys() - {"file"}:
        if name not in _keys(cls):
            raise ConfigError(f"unknown key {name!r}", where=owner, fix=nearest(name, _keys(cls)))
    found = options.build(cls, {key: _tuples(v) if key == "weight" else v for key, v in table.items()}, owner=owner)
    options.validate(found, owner=owner)
    return found


def _tuples(weight: Any) -> Any:
    if not isinstance(weight, Mapping):
        return weight
    return {key: tuple(v) if isinstance(v, list) and v else v for key, v in weight.items()}


def _check(found: Recipe) -> None:
    """What no single key tells."""

    def refuse(key: str, what: str, fix: str) -> None:
        raise ConfigError(what, where=found.owner(key), fix=fix)

    cuts = [key for key in ("rank", "max_error", "budget") if getattr(found, key) is not None]
    if len(cuts) > 1:
        refuse(cuts[1], f"stands beside {cuts[0]}", "leave one of them out")
    if isinstance(found.budget, str):
        try:
            nbytes(found.budget)
        except ValueError as e:
            refuse("budget", str(e), "change budget")
    weighed = [own.weight is not None for own in found.adapters]
    if any(weighed) and not all(weighed):
        refuse(f"adapters[{weighed.index(False)}]", "has no weight, and others have", "give all of them one, or none")
    for i, own in enumerate(found.adapters):
        digests = [own.sha256] if isinstance(own.sha256, str) else list((own.sha256 or {}).values())
        if bad := [digest for digest in digests if not DIGEST.fullmatch(digest)]:
            refuse(f"adapters[{i}].sha256", f"{bad[0]!r} is not a SHA-256", "write its 64 hexadecimal digits")
    for key in ("options", "at"):
        if getattr(found, key) and found.rule is None:
            refuse(key, "is for a rule, and none is named", 'write rule = "NAME": `adapter rules` lists them')
    names = [own.path for own in found.adapters]
    if found.keep is not None and found.keep not in (*names, "none"):
        refuse("keep", f"{found.keep!r} is none of the adapters' paths", nearest(found.keep, [*names, "none"]))
    for key in ("rounding", "rounding_seed"):
        if getattr(found, key) is not None and found.into is None:
            refuse(key, "is for folding into a base", 'write into = "BASE"')
    if found.into is not None and found.dtype is not None:
        refuse("dtype", "is for adapters: a model's weights keep theirs", "leave dtype out, or into")


@contextmanager
def named(file: Path) -> Iterator[None]:
    """Errors of options say which recipe they stand in."""
    try:
        yield
    except ConfigError as e:
        raise ConfigError(e.what, where=f"{file}: {e.where}" if e.where else str(file), fix=e.fix) from None
