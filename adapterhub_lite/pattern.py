"""Which modules a pattern names, as PEFT reads `rank_pattern` and `alpha_pattern`.

PEFT's keys are regular expressions that must match a module's whole name, or all of it
behind some dot; the first key that matches wins. A regular expression that comes with
somebody's adapter can be made to run for ever, so none is ever given to `re`: the flat
ones that people write (names, `.`, `\\d`, `[a-z]`, `*`, `+`, `?`, `{2,3}`, `(q|k|v)`) are
matched here, all at once, in time linear in the name, and others are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeVar

from .errors import ConfigError

MAX_KEY = 4096  # characters
MAX_ALTERNATIVES = 64  # of one key, when its groups are multiplied out
MAX_UNITS = 1 << 15  # single characters that all keys together may match, when counts are multiplied out
MAX_DEPTH = 32  # of groups in groups
SPECIAL = frozenset("|()[]{}*+?^$")
PLAIN = re.compile(r"[A-Za-z0-9_.]+")

T = TypeVar("T")


class Step(NamedTuple):
    """Some characters, and how many of them in a row."""

    chars: frozenset[str]
    classes: str = ""  # of "d" and "w", as in \d and \w
    negated: bool = False
    least: int = 1
    most: int | None = 1  # None: unbounded

    @property
    def units(self) -> int:
        return max(self.least, 1) if self.most is None else self.most


ANY = Step(frozenset(), negated=True)


class Patterns:
    """The keys of one pattern table, ready to be asked about many modules.

    >>> keys = Patterns(["k_proj", r"layers\\.\\d+\\.self_attn\\.(q|v)_proj"])
    >>> keys.first("model.layers.11.self_attn.v_proj")
    'layers\\\\.\\\\d+\\\\.self_attn\\\\.(q|v)_proj'
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._keys = list(keys)
        # Most keys are names, in which at most dots are wildcards. They are found by look-up: of names as long, with
        # wildcards at the same places, by the other characters.
        self._tails: dict[int, dict[tuple[int, ...], dict[str, int]]] = {}
        self._wholes: dict[int, dict[tuple[int, ...], dict[str, int]]] = {}
        others: list[tuple[int, bool, list[list[Step]]]] = []
        units = 0
        for number, key in enumerate(self._keys):
            if len(key) > MAX_KEY:
                raise _refusal(key, "it is too long")
            anchored, body = key.startswith("^"), key.removeprefix("^")
            if body.endswith("$") and not body.endswith("\\$"):
                body = body[:-1]
            name = _plain(body)
            if name is None:
                alternatives = _parse(body, key, anchored)
                units += sum(step.units for steps in alternatives for step in steps) + len(alternatives)
                if units > MAX_UNITS:
                    raise _refusal(key, "with it the patterns are too large")
                others.append((number, anchored, alternatives))
            else:
                index = self._wholes if anchored else self._tails
                places = tuple(i for i, c in enumerate(name) if c is None)
                text = "".join(c for c in name if c is not None)
                index.setdefault(len(name), {}).setdefault(places, {}).setdefault(text, number)
        self._automaton = _Automaton(others)
        self._known: dict[str, str | None] = {}

    def first(self, name: str) -> str | None:
        """The first key that names the module `name`, as PEFT decides it."""
        if name not in self._known:
            starts = [0, *(i + 1 for i, c in enumerate(name) if c == ".")]
            found = [number for start in starts for number in _look_up(self._tails, name[start:])]
            found += _look_up(self._wholes, name)
            found += self._automaton.matching(name, starts)
            self._known[name] = self._keys[min(found)] if found else None
        return self._known[name]


def matches(pattern: str, name: str) -> bool:
    """Whether `pattern` matches `name` wholly, or wholly what follows one of its dots."""
    return Patterns([pattern]).first(name) is not None


def _look_up(index: dict[int, dict[tuple[int, ...], dict[str, int]]], text: str) -> Iterable[int]:
    for places, numbers in index.get(len(text), {}).items():
        rest, at = "", 0
        for place in places:
            rest, at = rest + text[at:place], place + 1
        number = numbers.get(rest + text[at:])
        if number is not None:
            yield number


class _Automaton:
    """All keys that are more than names, simulated together: bit i of an integer says that state i is active.

    A state stands before each unit, which takes one character, and one behind the last unit of each alternative
    (Shift-And: Baeza-Yates and Gonnet 1992).
    """

    def __init__(self, keys: Iterable[tuple[int, bool, list[list[Step]]]]) -> None:
        self._anywhere = self._at_start = 0  # first states
        self._ends: list[tuple[int, int]] = []  # number of the key, its last states
        skip = loop = size = 0
        units: dict[Step, int] = {}  # the states before units of one kind
        for number, anchored, alternatives in keys:
            ends = 0
            for steps in alternatives:
                if anchored:
                    self._at_start |= 1 << size
                else:
                    self._anywhere |= 1 << size
                for step in steps:
                    kind = step._replace(least=1, most=1)
                    for n in range(step.units):
                        skip |= (n >= step.least) << size
                        units[kind] = units.get(kind, 0) | 1 << size
                        size += 1
                    if step.most is None:
                        loop |= 1 << (size - 1)
                ends |= 1 << size
                size += 1
            self._ends.append((number, ends))
        self._loop = loop
        # Which units take a character: it depends on what kind of character it is, and on whether it is mentioned.
        self._by_kind = {
            kind: sum(where for step, where in units.items() if any(c in kind for c in step.classes) != step.negated)
            for kind in ("wd", "w", "")
        }
        self._mentioned: dict[str, int] = {}
        for step, where in units.items():
            for c in step.chars:
                if (where & self._by_kind[_kind(c)] != 0) == step.negated:
                    self._mentioned[c] = self._mentioned.get(c, 0) | where
        # For runs of units that may be skipped: whether 1, 2, 4, … of them in a row end at a state (Kogge-Stone).
        self._fills, reach, shift = [], skip << 1, 1
        while reach:
            self._fills.append((shift, reach))
            reach, shift = reach & reach << shift, 2 * shift

    def matching(self, name: str, starts: Iterable[int]) -> list[int]:
        """The numbers of the keys that match `name` from one of `starts` to its end."""
        if not self._ends:
            return []
        begin, active = set(starts), 0
        for position, c in enumerate(name):
            if position in begin:
                active |= self._anywhere if position else self._anywhere | self._at_start
            active = self._skipped(active)
            takers = self._by_kind[_kind(c)] ^ self._mentioned.get(c, 0)
            active = (active & takers) << 1 | active & (takers & self._loop) << 1
        active = self._skipped(active | self._anywhere if len(name) in begin else active)
        return [number for number, ends in self._ends if active & ends]

    def _skipped(self, active: int) -> int:
        for shift, reach in self._fills:
            active |= reach & active << shift
        return active


def _kind(c: str) -> str:
    """The classes that the character belongs to."""
    return "wd" if c.isdecimal() else "w" if c.isalnum() or c == "_" else ""


def literal(name: str) -> str:
    """A pattern that means the module `name` and no other.

    >>> literal("model.layers.0.q_proj")
    '^model\\\\.layers\\\\.0\\\\.q_proj'
    """
    return "^" + re.escape(name)


def spell(names: Iterable[str]) -> dict[str, str]:
    """For each module name a pattern that names it and no other of `names`: the plain name where that will do.

    >>> spell(["layers.1.q", "encoder.layers.1.q"])
    {'layers.1.q': '^layers\\\\.1\\\\.q', 'encoder.layers.1.q': 'encoder.layers.1.q'}
    """
    names = list(names)
    tails: dict[int, list[tuple[str, str]]] = {}  # every dotted tail of every name, by length
    for name in names:
        parts = name.split(".")
        for i in range(len(parts)):
            tail = ".".join(parts[i:])
            tails.setdefault(len(tail), []).append((tail, name))

    def only(name: str) -> bool:
        return not any(
            owner != name and tail[-1:] == name[-1:] and _is_tail(name, tail) for tail, owner in tails[len(name)]
        )

    return {name: name if PLAIN.fullmatch(name) and only(name) else literal(name) for name in names}


def brief(values: Mapping[str, T | None]) -> dict[str, T]:
    """Patterns that give each module name its value, and none to those whose value is None; at most one matches each.

    The last part of the names is the pattern where all that end in it have one value.

    >>> brief({"layers.0.q": 4, "layers.1.q": 4, "layers.0.v": 8, "layers.1.v": None})
    {'q': 4, 'layers.0.v': 8}
    """
    alike: dict[str, list[T | None]] = {}
    for name, value in values.items():
        alike.setdefault(name.rpartition(".")[2], []).append(value)
    keys, found = spell(values), {}
    for name, value in values.items():
        end = name.rpartition(".")[2]
        if value is not None:
            short = PLAIN.fullmatch(end) and all(other == value for other in alike[end])
            found[end if short else keys[name]] = value
    return found


def _is_tail(pattern: str, name: str) -> bool:
    start = len(name) - len(pattern)
    if start < 0 or (start > 0 and name[start - 1] != "."):
        return False
    tail = name[start:]
    return tail == pattern or all(p in (c, ".") for p, c in zip(pattern, tail, strict=True))


def _plain(body: str) -> list[str | None] | None:
    """The characters of a pattern that is nothing but characters, None for any; None if it is more than that."""
    found: list[str | None] = []
    characters = iter(body)
    for c in characters:
        if c in SPECIAL:
            return None
        if c == "\\":
            c = next(characters, "")
            if not c or c.isalnum():
                return None
            found.append(c)
        else:
            found.append(None if c == "." else c)
    return found


def _parse(body: str, pattern: str, anchored: bool) -> list[list[Step]]:
    """The alternatives of a pattern as flat sequences of steps."""
    alternatives, end = _alternatives(body, 0, pattern, anchored)
    if end != len(body):
        raise _refusal(pattern, "a ')' has no '('")
    return alternatives


def _alternatives(body: str, i: int, pattern: str, anchored: bool, depth: int = 0) -> tuple[list[list[Step]], int]:
    """Parse `a|b|…` from position i up to the end or an unopened ')'; groups are multiplied out."""
    if depth > MAX_DEPTH:
        raise _refusal(pattern, "its groups are nested too deeply")
    done: list[list[Step]] = []
    current: list[list[Step]] = [[]]
    while i < len(body) and body[i] != ")":
        if body[i] == "|":
            if depth == 0 and anchored:
                raise _refusal(pattern, "its '^' binds only the first alternative")
            done, current, i = done + current, [[]], i + 1
            continue
        if body[i] == "(":
            i += 3 if body.startswith("(?:", i) else 1
            inner, i = _alternatives(body, i, pattern, anchored, depth + 1)
            if i >= len(body):
                raise _refusal(pattern, "a '(' has no ')'")
            i += 1
            if body[i : i + 1] in ("*", "+", "{"):
                raise _refusal(pattern, "it repeats a group")
            if body[i : i + 1] == "?":
                inner, i = [*inner, []], i + 1
        else:
            step, i = _step(body, i, pattern)
            inner = [[step]]
        if len(current) * len(inner) > MAX_ALTERNATIVES:
            raise _refusal(pattern, "it has too many alternatives")
        current = [a + b for a in current for b in inner]
    return done + current, i


def _step(body: str, i: int, pattern: str) -> tuple[Step, int]:
    """One character class and its quantifier at position i."""
    c = body[i]
    if c == ".":
        step, i = ANY, i + 1
    elif c == "[":
        step, i = _set(body, i + 1, pattern)
    elif c == "\\":
        step, i = _escape(body, i, pattern)
    elif c in "*+?{^$":
        raise _refusal(pattern, f"{c!r} stands where a character is expected")
    else:
        step, i = Step(frozenset(c)), i + 1
    quantifier = re.compile(r"[*+?]|\{(\d{1,3})(,(\d{0,3}))?\}").match(body, i)  # our own expression, on a short text
    least: int = 1
    most: int | None = 1
    if quantifier:
        i = quantifier.end()
        match quantifier.group()[0]:
            case "*":
                least, most = 0, None
            case "+":
                least, most = 1, None
            case "?":
                least, most = 0, 1
            case _:
                least = int(quantifier[1])
                most = least if quantifier[2] is None else int(quantifier[3]) if quantifier[3] else None
                if most is not None and most < least:
                    raise _refusal(pattern, f"{quantifier.group()!r} is no count")
        if body[i : i + 1] in ("?", "+"):  # lazy and possessive: the same language, or nearly: not worth a doubt
            raise _refusal(pattern, "it has a lazy or possessive quantifier")
    return step._replace(least=least, most=most), i


def _escape(body: str, i: int, pattern: str) -> tuple[Step, int]:
    c = body[i + 1 : i + 2]
    if c in ("d", "w"):
        return Step(frozenset(), c), i + 2
    if c and not c.isalnum():
        return Step(frozenset(c)), i + 2
    raise _refusal(pattern, f"'\\{c}' is not a plain character")


def _set(body: str, i: int, pattern: str) -> tuple[Step, int]:
    negated = body[i : i + 1] == "^"
    i += negated
    chars, classes = set[str](), set[str]()
    first = True
    while first or body[i : i + 1] != "]":
        first = False
        if i >= len(body):
            raise _refusal(pattern, "a '[' has no ']'")
        if body[i] == "\\":
            escaped, i = _escape(body, i, pattern)
            chars |= escaped.chars
            classes |= set(escaped.classes)
        elif body[i + 1 : i + 2] == "-" and body[i + 2 : i + 3] not in ("", "]", "\\"):
            low, high = ord(body[i]), ord(body[i + 2])
            if not 0 <= high - low < 256:
                raise _refusal(pattern, "it has an empty or too wide range")
            chars |= {chr(c) for c in range(low, high + 1)}
            i += 3
        else:
            chars.add(body[i])
            i += 1
    return Step(frozenset(chars), "".join(sorted(classes)), negated), i + 1


def _refusal(pattern: str, why: str) -> ConfigError:
    short = pattern if len(pattern) <= 60 else pattern[:57] + "..."
    return ConfigError(
        f"the pattern {short!r} is not one that is safe to run: {why}", fix="write the module names out, one entry each"
    )
