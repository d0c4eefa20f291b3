"""The metadata at the head of a card, YAML between two lines of `---`: single entries are replaced, others stay."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..errors import FileError

MAX = 200_000  # characters
_FENCED = re.compile(r"\A\ufeff?---[ \t]*\n(?P<yaml>(?:.*\n)*?)---[ \t]*(?:\n|\Z)")
_KEY = re.compile(r"(?P<quote>[\"']?)(?P<key>[A-Za-z0-9_-]+)(?P=quote)[ \t]*:(?:\s|$)")
_FIX = "correct the metadata, the lines between --- and ---"


def split(text: str) -> tuple[str, str]:
    """The metadata's YAML and the text below; no metadata is no lines."""
    found = _FENCED.match(text)
    return (found["yaml"], text[found.end() :]) if found else ("", text.removeprefix("\ufeff"))


def read(yaml_text: str, where: object) -> dict[str, Any]:
    """The entries. `FileError` for what is no mapping, has aliases, or is too long."""
    import yaml

    try:
        if len(yaml_text) > MAX or any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(yaml_text)):
            raise FileError("the metadata is longer than any card's, or has aliases", where=where, fix=_FIX)
        found = yaml.safe_load(yaml_text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 2}" if mark is not None else ""
        raise FileError(f"the metadata is not valid YAML{line}", where=where, fix=_FIX) from None
    if not isinstance(found, dict) and found is not None:
        raise FileError("the metadata is no mapping of names to values", where=where, fix=_FIX)
    return found or {}


def written(entries: Mapping[str, Any]) -> str:
    """The entries as YAML, in their order."""
    import yaml

    text: str = yaml.safe_dump(dict(entries), sort_keys=False, allow_unicode=True, width=120)
    return text if entries else ""


def replaced(yaml_text: str, entries: Mapping[str, Any], where: object) -> str:
    """The YAML with these entries instead of those of the same names; other lines and comments stay as they are."""
    old = read(yaml_text, where)
    wanted = {**old, **entries}
    if wanted == old:
        return yaml_text
    blocks: list[tuple[str | None, str]] = []  # of each entry, its key and its lines; above the first one None
    for line in yaml_text.splitlines(keepends=True):
        found = _KEY.match(line)
        if found:
            blocks.append((found["key"], line))
        elif line.startswith("#") or not line.strip() or not blocks:  # belongs to what follows, or to none
            blocks.append((None, line))
        else:
            key, lines = blocks[-1]
            blocks[-1] = (key, lines + line)
    text, left = "", dict(entries)
    for key, lines in blocks:
        if key is None or key not in entries or old.get(key) == entries[key]:
            text += lines
        elif key in left:
            text += written({key: entries[key]})
        left.pop(key or "", None)
    text += written(left)
    try:
        same = read(text, where) == wanted
    except FileError:
        same = False
    return text if same else written(wanted)  # a flow mapping, say: comments are lost then
