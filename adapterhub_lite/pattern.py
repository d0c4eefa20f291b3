"""Which modules a pattern names, as PEFT reads `rank_pattern` and `alpha_pattern`.

PEFT's keys are regular expressions that must match a module's whole name, or all of it
behind some dot; the first key that matches wins. A regular expression that comes with
somebody's adapter can be made to run for ever, so none is ever given to `re`: the flat
ones that people write (names, `.`, `\\d`, `[a-z]`, `*`, `+`, `?`, `{2,3}`, `(q|k|v)`) are
matched here in time linear in the name, and others are refused.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from .errors import ConfigError

WORD = frozenset(string.ascii_letters + string.digits + "_")
DIGIT = frozenset(string.digits)
PLAIN = re.compile(r"[A-Za-z0-9_.]+")
LIMIT = 4096  # characters of a pattern, alternatives, or steps after expansion


class Step(NamedTuple):
    chars: frozenset[str] | None  # None: any character
    negated: bool
    least: int
    most: int | None  # None: unbounded

    def takes(self, c: str) -> bool:
        return self.chars is None or (c in self.chars) != self.negated


def first_match(patterns: Iterable[str], name: str) -> str | None:
    """The first of `patterns` that names the module `name`, as PEFT decides it.

    >>> first_match(["k_proj", r"layers\\.\\d+\\.self_attn\\.(q|v)_proj"], "model.layers.11.self_attn.v_proj")
    'layers\\\\.\\\\d+\\\\.self_attn\\\\.(q|v)_proj'
    """
    return next((p for p in patterns if matches(p, name)), None)


def matches(pattern: str, name: str) -> bool:
    """Whether `pattern` matches `name` wholly, or wholly what follows one of its dots."""
    if PLAIN.fullmatch(pattern):  # nearly always: a module name, whose dots match any character
        return _is_tail(pattern, name)
    anchored, alternatives = _parse(pattern)
    starts = [0] if anchored else [0, *(i + 1 for i, c in enumerate(name) if c == ".")]
    return any(_matches_flat(steps, name, starts) for steps in alternatives)


def literal(name: str) -> str:
    """A pattern that means the module `name` and no other.

    >>> literal("model.layers.0.q_proj")
    '^model\\\\.layers\\\\.0\\\\.q_proj'
    """
    return "^" + re.escape(name)


def spell(names: Iterable[str]) -> dict[str, str]:
    """For each module name a pattern that names it and no other of `names`: the plain name where that will do.

    >>> spell(["layers.1.q", "encoder.layers.1.q"])
    {'layers.1.q': '^layers\\.1\\.q', 'encoder.layers.1.q': 'encoder.layers.1.q'}
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


def _is_tail(pattern: str, name: str) -> bool:
    start = len(name) - len(pattern)
    if start < 0 or (start > 0 and name[start - 1] != "."):
        return False
    tail = name[start:]
    return tail == pattern or all(p in (c, ".") for p, c in zip(pattern, tail, strict=True))


def _matches_flat(steps: tuple[Step, ...], name: str, starts: list[int]) -> bool:
    # States are (step, times it has matched, capped): the textbook simulation of an automaton.
    def closure(states: set[tuple[int, int]]) -> set[tuple[int, int]]:
        todo, seen = list(states), set(states)
        while todo:
            i, n = todo.pop()
            if i < len(steps) and n >= steps[i].least and (i + 1, 0) not in seen:
                seen.add((i + 1, 0))
                todo.append((i + 1, 0))
        return seen

    begin, states = set(starts), set[tuple[int, int]]()
    for position, c in enumerate(name):
        if position in begin:
            states = states | {(0, 0)}
        states = {
            (i, n + 1 if step.most is not None else min(n + 1, step.least))
            for i, n in closure(states)
            if i < len(steps) and ((step := steps[i]).most is None or n < step.most) and step.takes(c)
        }
    return (len(steps), 0) in closure(states)


@lru_cache(maxsize=4096)
def _parse(pattern: str) -> tuple[bool, tuple[tuple[Step, ...], ...]]:
    """Whether the pattern is anchored at the name's start, and its alternatives as flat steps."""
    if len(pattern) > LIMIT:
        raise _refusal(pattern, "it is too long")
    body = pattern.removeprefix("^")
    if body.endswith("$") and not body.endswith("\\$"):
        body = body[:-1]
    alternatives, end = _alternatives(body, 0, pattern)
    if end != len(body):
        raise _refusal(pattern, "a ')' has no '('")
    return pattern.startswith("^"), tuple(tuple(a) for a in alternatives)


def _alternatives(body: str, i: int, pattern: str, depth: int = 0) -> tuple[list[list[Step]], int]:
    """Parse `a|b|…` from position i up to the end or an unopened ')'; groups are multiplied out."""
    done: list[list[Step]] = []
    current: list[list[Step]] = [[]]
    while i < len(body) and body[i] != ")":
        if body[i] == "|":
            if depth == 0 and pattern.startswith("^"):
                raise _refusal(pattern, "its '^' binds only the first alternative")
            done, current, i = done + current, [[]], i + 1
            continue
        if body[i] == "(":
            i += 3 if body.startswith("(?:", i) else 1
            inner, i = _alternatives(body, i, pattern, depth + 1)
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
        if len(current) * len(inner) > 64:
            raise _refusal(pattern, "it has too many alternatives")
        current = [a + b for a in current for b in inner]
    return done + current, i


def _step(body: str, i: int, pattern: str) -> tuple[Step, int]:
    """One character class and its quantifier at position i."""
    c, negated = body[i], False
    chars: frozenset[str] | None
    if c == ".":
        chars, i = None, i + 1
    elif c == "[":
        chars, negated, i = _set(body, i + 1, pattern)
    elif c == "\\":
        chars, i = _escape(body, i, pattern)
    elif c in "*+?{^$":
        raise _refusal(pattern, f"{c!r} stands where a character is expected")
    else:
        chars, i = frozenset(c), i + 1
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
        if body[i : i + 1] in ("?", "+"):  # lazy and possessive: the same language, or nearly: not worth a doubt
            raise _refusal(pattern, "it has a lazy or possessive quantifier")
    return Step(chars, negated, least, most), i


def _escape(body: str, i: int, pattern: str) -> tuple[frozenset[str], int]:
    c = body[i + 1 : i + 2]
    if c in ("d", "w"):
        return (DIGIT if c == "d" else WORD), i + 2
    if c and not c.isalnum():
        return frozenset(c), i + 2
    raise _refusal(pattern, f"'\\{c}' is not a plain character")


def _set(body: str, i: int, pattern: str) -> tuple[frozenset[str], bool, int]:
    negated = body[i : i + 1] == "^"
    i += negated
    chars: set[str] = set()
    first = True
    while first or body[i : i + 1] != "]":
        first = False
        if i >= len(body):
            raise _refusal(pattern, "a '[' has no ']'")
        if body[i] == "\\":
            more, i = _escape(body, i, pattern)
            chars |= more
        elif body[i + 1 : i + 2] == "-" and body[i + 2 : i + 3] not in ("", "]", "\\"):
            low, high = ord(body[i]), ord(body[i + 2])
            if high - low > 255:
                raise _refusal(pattern, "it has too wide a range")
            chars |= {chr(c) for c in range(low, high + 1)}
            i += 3
        else:
            chars.add(body[i])
            i += 1
    return frozenset(chars), negated, i + 1


def _refusal(pattern: str, why: str) -> ConfigError:
    short = pattern if len(pattern) <= 60 else pattern[:57] + "..."
    return ConfigError(
        f"the pattern {short!r} is not one that is safe to run: {why}", fix="write the module names out, one entry each"
    )
