"""A merge done again from the recipe that its output carries, and compared with the output bit by bit."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from ._version import __version__
from .adapter import Adapter
from .base_model import BaseModel
from .checkpoint import Checkpoint, TensorInfo, sha256
from .combine import Truncated, WeightedSum
from .errors import AdapterError, FileError, HubError
from .folding import fold, manifest
from .folding.planning import header_digest
from .hub.pull import ADAPTER, fetch, snapshot
from .hub.reference import parse
from .merged import Merged
from .options import build
from .registry import registry
from .source import Source, Stored, stored

CHUNK = 8 << 20  # bytes compared at once
DTYPES = ("F64", "F32", "F16", "BF16")  # that adapters are written in
MOST_FOLDERS = 10_000  # that are looked at for inputs

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Difference:
    """What is not as it was."""

    file: str
    what: str
    tensor: str | None = None


@dataclass(frozen=True)
class Reproduction:
    """What came of it."""

    differences: tuple[Difference, ...]
    warnings: tuple[str, ...]
    """Other versions than those that made the output: differences may be due to them."""


def reproduce(
    out: str | os.PathLike[str],
    *,
    adapters: Sequence[str | os.PathLike[str]] = (),
    within: str | os.PathLike[str] | None = None,
    base: str | os.PathLike[str] | None = None,
    progress: Progress = lambda done, total: None,
) -> Reproduction:
    """Merge again what the adapter or model in the folder `out` was made of, in a temporary folder, and compare.

    The inputs are found by their SHA-256: among `adapters`, in the folder `within` and two levels below, or by default
    beside `out`. A model's base is `base`, or is found there by its name and the headers of its files.

    Raises `FileError` if `out` carries no recipe, or an input is missing.
    """
    out = snapshot(out)
    made = manifest.read(out) if (out / manifest.NAME).is_file() else stored(out).own.facts
    recipe = made.get("recipe")
    if not isinstance(recipe, dict):
        raise FileError("carries no recipe", where=out, fix="only what `adapter merge` wrote can be made again")
    again = _Again(recipe, out, _Places(out, adapters, within))
    folded = recipe.get("rule") == "fold"
    model = again.base(base) if folded else None
    terms = again.terms(recipe.get("of") if folded else recipe, by_module=folded)
    seed, dtype = again.rest()
    again.check()
    version = made.get("version")
    if version != __version__:
        again.warn(f"it was made by version {version}, and this is {__version__}")
    with tempfile.TemporaryDirectory(prefix="adapter-reproduce-") as temporary:
        new = Path(temporary) / "again"
        asked: dict[str, Any] = {"any_base": recipe.get("any_base") is True, "keep": again.kept(terms)}
        if model is not None:
            weights = again.weights(recipe["of"])
            if seed is not None:
                asked |= {"rounding": "stochastic", "seed": seed}
            fold(model, Adapter(terms), new, weights=weights, progress=progress, **asked)
        else:
            from .save import save

            save(WeightedSum(terms), new, dtype=dtype, progress=progress, **asked)
        return Reproduction(tuple(differences(out, new)), tuple(again.warnings))


class _Places:
    """Where inputs may be."""

    def __init__(self, out: Path, adapters: Sequence[Any], within: Any) -> None:
        self.given = bool(adapters) or within is not None
        roots = [Path(within)] if within is not None else [] if adapters else [out.absolute().parent]
        for root in roots:
            if not root.is_dir():
                raise FileError("there is no such folder", where=root, fix="give the folder with the inputs")
        found = chain((snapshot(ref, patterns=ADAPTER, deep=False) for ref in adapters), *map(_below, roots))
        self.folders = [folder for folder, _ in zip(found, range(MOST_FOLDERS), strict=False)]
        self._digests: dict[Path, str] = {}

    def having(self, digests: Mapping[str, str]) -> Path | None:
        """The first folder with these files."""
        return next((folder for folder in self.folders if self.has(folder, digests)), None)

    def has(self, folder: Path, digests: Mapping[str, str]) -> bool:
        files = [folder / name for name in digests]
        if not all(file.is_file() for file in files):
            return False
        # The smallest first: configs tell most adapters apart.
        return all(self._digest(file) == digests[file.name] for file in sorted(files, key=lambda f: f.stat().st_size))

    def _digest(self, file: Path) -> str:
        if file not in self._digests:
            self._digests[file] = sha256(file)
        return self._digests[file]


def _below(root: Path, levels: int = 2) -> Iterator[Path]:
    yield root
    if levels:
        try:
            inside = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
        except PermissionError:
            return
        for folder in inside:
            yield from _below(folder, levels - 1)


class _Found(Stored):
    """An input that was found again; it is recorded as before, whatever its folder is called now."""

    def __init__(self, source: Stored, recorded: Mapping[str, Any]) -> None:
        super().__init__(source.folder, source.name, source.own, source.files)
        self.recorded = {key: recorded[key] for key in ("adapter", "sha256", "hub") if key in recorded}

    def recipe(self) -> dict[str, Any]:
        return dict(self.recorded)


class _Again:
    """A stored recipe, which a stranger may have written, and the sources that it names."""

    def __init__(self, recipe: Mapping[str, Any], out: Path, places: _Places) -> None:
        self.recipe, self.out, self.places = recipe, out, places
        self.missing: list[str] = []
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)

    def terms(self, node: Any, *, by_module: bool = False) -> tuple[tuple[float, Source], ...]:
        """The terms of a sum; with weights of 1 where `weights` tells them."""
        match node:
            case {"rule": "sum", "terms": [_, *_] as terms} if "options" not in node:
                return tuple((1.0 if by_module else self._number(term), self._source(term)) for term in terms)
        raise self._unknown()

    def weights(self, node: Mapping[str, Any]) -> list[Any]:
        """Those of the terms of a sum that was folded, which may differ by module."""
        return [
            self._weight(term) if isinstance(term.get("weight"), list) else self._number(term) for term in node["terms"]
        ]

    def _source(self, node: Any) -> Source:
        match node:
            case {"adapter": str(name), "sha256": {**found}} if found and all(map(_plain, found.items())):
                digests = {str(file): str(digest) for file, digest in found.items()}
                folder = self.places.having(digests) or self._fetched(node.get("hub"), digests)
                if folder is None:
                    tensors = max(digests, key=lambda file: file.endswith(".safetensors"))
                    self.missing.append(f"{name!r} ({tensors} of sha256 {digests[tensors][:16]}…)")
                    return _Missing
                return _Found(stored(folder), node)
            case {"rule": "sum"} if "options" not in node:
                terms = self.terms(node)
                return _Missing if self.missing else WeightedSum(terms)
            case {"rule": "truncate", "of": of}:
                cut = self.terms(of)
                how = {key: node.get(key) for key in ("rank", "max_error", "budget")}
                itemsize = node.get("itemsize", 4)
                whole = all(isinstance(v, int) for v in (how["rank"] or 1, how["budget"] or 1, itemsize))
                if not whole or not _number(how["max_error"] or 0):
                    raise self._unknown()
                return _Missing if self.missing else Truncated(WeightedSum(cut), **how, itemsize=itemsize)
            case {"rule": str(name), "options": {**options}, "terms": [_, *_] as terms}:
                inputs = [self._source(term) for term in terms]
                cls = registry().rule(name)
                if node.get("version") != cls.version:
                    self.warn(f"rule {name!r} was of version {node.get('version')}, and is of {cls.version}")
                if self.missing:
                    return _Missing
                given = {str(key): value for key, value in options.items()}
                rule = build(cls, given, owner=f"rule {name!r}")
                weights = [self._weight(term) for term in terms]
                at = self.table(node.get("at"))
                if not all(isinstance(own, dict) for own in at.values()):
                    raise self._unknown()
                return Merged(rule, inputs, weights, at)
        raise self._unknown()

    def _fetched(self, hub: Any, digests: Mapping[str, str]) -> Path | None:
        """The folder on the Hub that an adapter was, at the commit that it was, if it is still what it was."""
        reference = parse(hub) if isinstance(hub, str) else None
        if reference is None or not reference.pinned:
            return None
        try:
            folder = fetch(reference).folder
        except HubError as error:
            self.warn(str(error))
            return None
        return folder if self.places.has(folder, digests) else None

    def rest(self) -> tuple[int | None, str | None]:
        """The seed of a model's rounding, and the dtype of an adapter."""
        seed, dtype = self.recipe.get("seed"), self.recipe.get("dtype")
        if not (seed is None or isinstance(seed, int)) or dtype not in (None, *DTYPES):
            raise self._unknown()
        return seed, dtype

    def _weight(self, term: Any) -> Any:
        weight = term.get("weight")
        return self.table(weight) if isinstance(weight, list) else weight

    def table(self, pairs: Any) -> dict[str, Any]:
        """A table by patterns, as `per_site.pairs` wrote it down."""
        try:
            found = dict(pairs or ())
        except (TypeError, ValueError):
            found = {None: None}
        if not all(isinstance(pattern, str) for pattern in found):
            raise self._unknown()
        return found

    def _number(self, term: Any) -> float:
        weight = term.get("weight") if isinstance(term, dict) else None
        if weight is None or not _number(weight):
            raise self._unknown()
        return float(weight)

    def _unknown(self) -> AdapterError:
        return FileError(
            "its recipe is no merge of adapter files",
            where=self.out,
            fix="`adapter info` says how it was made",
        )

    def base(self, given: str | os.PathLike[str] | None) -> Path:
        """The base that adapters were folded into."""
        headers, name = self.recipe.get("headers"), self.recipe.get("base")
        if not isinstance(headers, dict) or not all(map(_plain, headers.items())) or not isinstance(name, str):
            raise self._unknown()
        if given is not None:
            folder = snapshot(given)
            found = {shard: header_digest(own.path) for shard, own in BaseModel.open(folder).shards.items()}
            if found != headers:
                raise FileError(f"is not the base {name!r} that was folded into", where=given, fix="give that one")
            return folder
        for folder in self.places.folders:
            files = {file: folder / file for file in headers}
            there = folder.name == name and all(path.is_file() for path in files.values())
            if there and all(header_digest(path) == headers[file] for file, path in files.items()):
                return folder
        self.missing.append(f"the base {name!r}")
        return self.out

    def check(self) -> None:
        """Raise `FileError` if an input was not found."""
        if self.missing:
            where = "there" if self.places.given else "beside it"
            more = f" and {len(self.missing) - 5} more" if len(self.missing) > 5 else ""
            raise FileError(
                f"was made of what is not found {where}: {', '.join(self.missing[:5])}{more}",
                where=self.out,
                fix="name the adapters with --adapters or their folder with --in, the base with --base",
            )

    def kept(self, terms: Sequence[tuple[float, Source]]) -> str | None:
        """The adapter that heads and the like are taken from, by its name now."""
        keep = self.recipe.get("keep")
        if keep is None or keep == "none":
            return keep
        for label, own in WeightedSum(terms).contents.items():
            if own.kept and sha256(next(iter(own.kept.values())).path) == keep:
                return label
        raise self._unknown()


class _MissingSource(Stored):
    """In the place of what was not found: nothing asks it for anything."""

    def __init__(self) -> None: ...


_Missing = _MissingSource()


def _plain(item: tuple[Any, Any]) -> bool:
    """A file's name, not a path, and its digest."""
    name, digest = item
    return isinstance(name, str) and isinstance(digest, str) and name == Path(name).name


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# Comparing ----------------------------------------------------------------------------------------------


def differences(old: Path, new: Path) -> Iterator[Difference]:
    """By file and tensor. Versions in files do not count, nor what a base is called, nor files only `old` has."""
    for path in sorted(path for path in new.rglob("*") if path.is_file()):
        name = str(path.relative_to(new))
        if not (old / name).is_file():
            yield Difference(name, "is missing")
        elif not _same(old / name, 0, path, 0, max((old / name).stat().st_size, path.stat().st_size)):
            if path.suffix == ".safetensors":
                yield from _in_tensors(name, Checkpoint.open(old / name), Checkpoint.open(path))
            elif name != manifest.NAME or _told(old / name) != _told(path):
                yield Difference(name, "has other bytes")


def _in_tensors(file: str, old: Checkpoint, new: Checkpoint) -> Iterator[Difference]:
    for name in sorted(old.tensors.keys() | new.tensors.keys()):
        one, two = old.tensors.get(name), new.tensors.get(name)
        if one is None or two is None:
            yield Difference(file, "is missing" if one is None else "is not made by the recipe", name)
        elif (one.dtype, one.shape) != (two.dtype, two.shape):
            what = f"is {one.dtype} {list(one.shape)}, and {two.dtype} {list(two.shape)} again"
            yield Difference(file, what, name)
        elif not _same(one.path, one.start, two.path, two.start, one.nbytes):
            yield Difference(file, _how_far(one, two), name)
    facts = [{k: _parsed(v) for k, v in own.metadata.items()} for own in (old, new)]
    if facts[0] != facts[1]:
        yield Difference(file, "has another header")


def _how_far(one: TensorInfo, two: TensorInfo) -> str:
    a, b = one.read().double(), two.read().double()
    return f"{int((a != b).sum())} of {a.numel()} numbers differ, by at most {float((a - b).abs().max()):.3g}"


def _same(one: Path, at: int, two: Path, there: int, nbytes: int) -> bool:
    with open(one, "rb") as a, open(two, "rb") as b:
        a.seek(at)
        b.seek(there)
        return all(a.read(n) == b.read(n) for i in range(0, nbytes, CHUNK) if (n := min(CHUNK, nbytes - i)))


def _told(path: Path) -> Any:
    """What a manifest says, but for what the base's folder was called."""
    found = _parsed(path.read_text(encoding="utf-8"))
    if isinstance(found, dict) and isinstance(found.get("recipe"), dict):
        found["recipe"].pop("base", None)
    return found


def _parsed(text: str) -> Any:
    try:
        found = json.loads(text)
    except ValueError:
        return text
    return {key: v for key, v in found.items() if key != "version"} if isinstance(found, dict) else found
