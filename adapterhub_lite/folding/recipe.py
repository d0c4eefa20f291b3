"""A recipe read back: the adapters that it names, and the same sum of them again."""

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


def rebuilt(recipe: Any, source_of: Callable[[Leaf], Source], where: Path) -> Adapter:
    """The value that a recipe's sum describes. `FileError` where a rule is not the one that it was."""
    match recipe:
        case {"rule": "sum", "terms": [_, *_] as terms}:
            try:
                made = Adapter(tuple((_weight(t, where), _source(t, source_of, where)) for t in terms))
            except (TypeError, ValueError, KeyError, AttributeError):
                raise not_ours(where) from None
        case _:
            raise not_ours(where)
    again = {"rule": "sum", "terms": [{"weight": w, **source.recipe()} for w, source in made.terms]}
    if _unnamed(again) != _unnamed(recipe):
        what = "a rule of the recipe is of another version here, or has other options"
        raise FileError(what, where=where, fix="install the version of the package, or the plugin, that made it")
    return made


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
            return Truncated(inner, **how, itemsize=ITEMSIZE[widest(inner)])
        case {"rule": str(name), "options": {**options}, "terms": [_, *_] as terms}:
            given = {str(key): value for key, value in options.items()}
            rule = build(registry().rule(name), given, owner=f"rule {printable(name)!r}")
            weights = [_weight(term, where, mapped=True) for term in terms]
            return Merged(rule, [_source(term, source_of, where) for term in terms], weights, recipe.get("at"))
        case {"rule": "sum", "terms": [_, *_] as terms}:
            return WeightedSum(tuple((_weight(t, where), _source(t, source_of, where)) for t in terms))
        case _:
            raise not_ours(where)


def _weight(term: Any, where: Path, *, mapped: bool = False) -> Any:
    weight = term.get("weight")
    return weight if mapped and isinstance(weight, dict) else _number(weight, where)


def _number(value: Any, where: Path) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise not_ours(where)
    return value


def _unnamed(recipe: Any) -> Any:
    """Without the names of the adapters, which may lie elsewhere today."""
    match recipe:
        case {**entries}:
            return {key: _unnamed(value) for key, value in entries.items() if key != "adapter"}
        case [*parts]:
            return [_unnamed(part) for part in parts]
        case _:
            return recipe


def _digests(told: Mapping[Any, Any]) -> bool:
    return bool(told) and all(isinstance(word, str) for pair in told.items() for word in pair)


def _key(digests: Mapping[str, str]) -> frozenset[tuple[str, str]]:
    return frozenset(digests.items())


def _other(source: Stored, own: Mapping[str, str], told: Mapping[str, str]) -> FileError:
    first = min(name for name, _ in _key(own) ^ _key(told))
    what = "is not in the recipe" if first not in told else "is missing" if first not in own else ""
    what = what or f"has the SHA-256 {own[first][:12]}…, and in the recipe {told[first][:12]}…"
    return FileError(what, where=source.folder / first, fix="give the adapter as it was when it was merged")
