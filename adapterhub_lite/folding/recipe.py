"""A fold's recipe read back: the adapters that it names, and the same sum of them again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..adapter import Adapter
from ..checkpoint import ITEMSIZE
from ..combine import Truncated, WeightedSum
from ..errors import ConfigError, FileError, printable
from ..merged import Merged
from ..options import build
from ..per_site import Weight
from ..plan import widest
from ..registry import registry
from ..source import Source, Stored, stored

DEEPEST = 32  # sums in sums

Leaf = Mapping[str, Any]


def leaves(recipe: Any, where: Path, depth: int = 0) -> Iterator[Leaf]:
    """The adapters of a recipe, each as `Stored.recipe` gives it. `FileError` for what is no recipe of ours."""
    match recipe:
        case {"adapter": str(), "sha256": {**digests}} if _digests(digests):
            yield recipe
        case {"adapter": None}:
            raise ConfigError("has an adapter in it that never was a file", where=where, fix="leave out --adapters")
        case {"rule": "truncate", "of": of} if depth < DEEPEST:
            yield from leaves(of, where, depth + 1)
        case {"rule": str(), "terms": [_, *_] as terms} if depth < DEEPEST:
            for term in terms:
                yield from leaves(term, where, depth + 1)
        case _:
            raise not_ours(where)


def found(recipe: Any, refs: Sequence[str | Path], where: Path) -> Callable[[Leaf], Stored]:
    """The given adapters as those of the recipe, told by their digests.

    `FileError` that names the first file that has another digest, or an adapter that is in the one and not the other.
    """
    given = [stored(ref) for ref in refs]
    own = [source.recipe() for source in given]
    by_digest = {_key(told["sha256"]): source for told, source in zip(own, given, strict=True)}
    wanted = list(leaves(recipe, where))
    for leaf in wanted:
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


def rebuilt(recipe: Any, source_of: Callable[[Leaf], Source], where: Path) -> tuple[Adapter, list[Weight]]:
    """The adapters that a recipe's sum has, merged as far as it merges them, and their weights.

    `FileError` where a rule is not the one that it was.
    """
    match recipe:
        case {"rule": "sum", "terms": [_, *_] as terms} if "options" not in recipe:
            try:
                made = Adapter(tuple((1.0, _source(term, source_of, where)) for term in terms))
                return made, [_weight(term, where) for term in terms]
            except (TypeError, ValueError, KeyError, AttributeError):
                raise not_ours(where) from None
        case _:
            raise not_ours(where)


def not_ours(where: Path) -> FileError:
    return FileError("the recipe is not one of ours", where=where, fix="merge again")


def _source(recipe: Any, source_of: Callable[[Leaf], Source], where: Path) -> Source:
    match recipe:
        case {"adapter": str()}:
            return source_of(recipe)
        case {"rule": "truncate", "of": of}:
            inner = _source(of, source_of, where)
            if not isinstance(inner, WeightedSum):
                raise not_ours(where)
            how = {key: _number(recipe[key], where) for key in ("rank", "max_error", "budget") if key in recipe}
            itemsize = _number(recipe.get("itemsize", ITEMSIZE[widest(inner)]), where)
            return Truncated(inner, **how, itemsize=itemsize)
        case {"rule": str(name), "options": {**options}, "terms": [_, *_] as terms}:
            given = {str(key): value for key, value in options.items()}
            rule = build(registry().rule(name), given, owner=f"rule {printable(name)!r}")
            if recipe.get("version") != rule.version:
                raise FileError(
                    f"was made by version {recipe.get('version')} of rule {name!r}, and this is {rule.version}",
                    where=where,
                    fix="install the version of the package, or of the plugin, that made it",
                )
            weights = [_weight(term, where) for term in terms]
            at = _table(recipe["at"]) if "at" in recipe else None
            return Merged(rule, [_source(term, source_of, where) for term in terms], weights, at)
        case {"rule": "sum", "terms": [_, *_] as terms}:
            return WeightedSum(tuple((_number(t["weight"], where), _source(t, source_of, where)) for t in terms))
        case _:
            raise not_ours(where)


def _weight(term: Any, where: Path) -> Weight:
    """A number, or a table of them by patterns."""
    weight = term["weight"]
    if not isinstance(weight, (dict, list)):
        number: float = _number(weight, where)
        return number
    found = _table(weight)
    for value in found.values():
        for number in value if isinstance(value, list) else [value]:
            _number(number, where)
    return found


def _table(told: Any) -> dict[str, Any]:
    """By patterns, in their order, which counts: an object, or a list of pairs."""
    found = dict(told)
    if not all(isinstance(pattern, str) for pattern in found):
        raise ValueError
    return found


def _number(value: Any, where: Path) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise not_ours(where)
    return value


def _digests(told: Mapping[Any, Any]) -> bool:
    return bool(told) and all(isinstance(word, str) for pair in told.items() for word in pair)


def _key(digests: Mapping[str, str]) -> frozenset[tuple[str, str]]:
    return frozenset(digests.items())


def _other(source: Stored, own: Mapping[str, str], told: Mapping[str, str]) -> FileError:
    first = min(name for name, _ in _key(own) ^ _key(told))
    what = "is not in the recipe" if first not in told else "is missing" if first not in own else ""
    what = what or f"has the SHA-256 {own[first][:12]}…, and in the recipe {told[first][:12]}…"
    return FileError(what, where=source.folder / first, fix="give the adapter as it was when it was merged")
