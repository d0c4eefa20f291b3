"""A recipe as an output carries it, which a stranger may have written: the adapters in it, and the same sum again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint import ITEMSIZE, sha256
from .combine import Truncated, WeightedSum
from .errors import AdapterError, printable
from .format import Contents
from .merged import Merged
from .options import build
from .per_site import Weight
from .plan import widest
from .registry import registry
from .source import Source

DEEPEST = 32  # sums in sums

Leaf = Mapping[str, Any]
"""An adapter: what it was called, as "adapter", and the digests of its files by name, as "sha256"."""


@dataclass(frozen=True)
class Recorded:
    """A reader of recipes.

    `refuse` makes the error for what is no recipe of ours; `other_version(rule, then, now)` is told of a rule that has
    changed since.
    """

    refuse: Callable[[], AdapterError]
    other_version: Callable[[str, Any, int], None]

    def leaves(self, node: Any, depth: int = 0) -> Iterator[Leaf]:
        """The adapters, those too that never were files, whose "adapter" is None. Reads all of the recipe's shape."""
        match node:
            case {"adapter": str(), "sha256": {**digests}} if digests and all(map(_plain, digests.items())):
                yield node
            case {"adapter": None}:
                yield node
            case {"rule": "truncate", "of": of} if depth < DEEPEST:
                self._cuts(node)
                yield from self.leaves(of, depth + 1)
            case {"rule": str(), "terms": [_, *_] as terms} if depth < DEEPEST:
                for term in terms:
                    self._weight(term)
                    yield from self.leaves(term, depth + 1)
            case _:
                raise self.refuse()

    def terms(self, node: Any, source_of: Callable[[Leaf], Source]) -> tuple[tuple[Weight, Source], ...]:
        """Those of a sum, its `leaves` found by `source_of`."""
        match node:
            case {"rule": "sum", "terms": [_, *_] as terms} if "options" not in node:
                return tuple((self._weight(term), self._source(term, source_of)) for term in terms)
        raise self.refuse()

    def sum(self, node: Any, source_of: Callable[[Leaf], Source]) -> WeightedSum:
        """The same where each weight is one number."""
        return WeightedSum(tuple((self._number(weight), own) for weight, own in self.terms(node, source_of)))

    def kept(self, recipe: Mapping[str, Any], contents: Mapping[str, Contents]) -> str | None:
        """Which of the adapters heads and the like are taken from, by the name that it has now: `keep` for a merge."""
        keep = recipe.get("keep")
        if keep is None or keep == "none":
            return keep
        for label, own in contents.items():
            if own.kept and sha256(next(iter(own.kept.values())).path) == keep:
                return label
        raise self.refuse()

    def _source(self, node: Any, source_of: Callable[[Leaf], Source]) -> Source:
        match node:
            case {"adapter": str()}:
                return source_of(node)
            case {"rule": "sum"} if "options" not in node:
                return self.sum(node, source_of)
            case {"rule": "truncate", "of": of}:
                whole, cuts = self.sum(of, source_of), self._cuts(node)
                return Truncated(whole, **{"itemsize": ITEMSIZE[widest(whole)], **cuts})
            case {"rule": str(name), "options": {**options}, "terms": [_, *_] as terms}:
                rule = build(
                    registry().rule(name), {str(key): value for key, value in options.items()},
                    owner=f"rule {printable(name)!r}",
                )  # fmt: skip
                if node.get("version") != rule.version:
                    self.other_version(name, node.get("version"), rule.version)
                weights = [self._weight(term) for term in terms]
                at = self._table(node.get("at") or {})
                if not all(isinstance(own, Mapping) for own in at.values()):
                    raise self.refuse()
                return Merged(rule, [self._source(term, source_of) for term in terms], weights, at or None)
        raise self.refuse()

    def _cuts(self, node: Mapping[str, Any]) -> dict[str, Any]:
        """How it is truncated."""
        found = {key: self._number(node[key]) for key in ("rank", "max_error", "budget", "itemsize") if key in node}
        if any(isinstance(number, float) for key, number in found.items() if key != "max_error"):
            raise self.refuse()
        return found

    def _weight(self, term: Any) -> Weight:
        """A number, or a table of them by patterns."""
        weight = term.get("weight") if isinstance(term, Mapping) else None
        if not isinstance(weight, (dict, list)):
            number: float = self._number(weight)
            return number
        found = self._table(weight)
        for value in found.values():
            for number in value if isinstance(value, list) else [value]:
                self._number(number)
        return found

    def _table(self, told: Any) -> dict[str, Any]:
        """By patterns, in their order, which counts: an object, or a list of pairs."""
        try:
            found = dict(told)
        except (TypeError, ValueError):
            raise self.refuse() from None
        if not all(isinstance(pattern, str) for pattern in found):
            raise self.refuse()
        return found

    def _number(self, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.refuse()
        return value


def _plain(item: tuple[Any, Any]) -> bool:
    """A file's name, not a path, and its digest."""
    name, digest = item
    return isinstance(name, str) and isinstance(digest, str) and name == Path(name).name
