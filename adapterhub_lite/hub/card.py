"""The README.md of what is pushed: our metadata, our section between two marks, and what somebody wrote beside them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import FileError, printable
from . import frontmatter

NAME = "README.md"
BEGIN, END = "<!-- adapterhub-lite: begin -->", "<!-- adapterhub-lite: end -->"
LIBRARY = "adapterhub-lite"
OURS = frozenset(["base_model", "base_model_relation", "library_name", "tags", "license", "datasets"])
LONGEST = 300  # characters of a value
MOST = 40  # rows of a table
_ON_THE_HUB = re.compile(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}")
# What transformers calls its classes by, for PEFT's names of tasks.
_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


@dataclass(frozen=True)
class Told:
    """What a card says, whatever was pushed."""

    relation: str
    """To the base model: `adapter` or `merge`."""
    library: str
    base: str | None
    """Name of the base model, as it is written in the files."""
    tags: Sequence[str]
    facts: Mapping[str, str]
    """Rows of a table; values are Markdown."""
    usage: Sequence[tuple[str, str, str]]
    """Headings, languages and code."""
    formula: str | None = None
    """How it was made."""
    inputs: Sequence[tuple[str, Mapping[str, str]]] = ()
    """Of what: names as Markdown, and digests by file."""
    parts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Facts of each adapter in it."""
    also: Sequence[str] = ()
    """Other models on the Hub that it was made of."""


def metadata(told: Told, old: Mapping[str, Any], *, license: str | None, datasets: Sequence[str]) -> dict[str, Any]:
    """Our entries of the metadata; tags that are there stay."""
    entries: dict[str, Any] = {}
    if told.base is not None and _ON_THE_HUB.fullmatch(told.base):
        more = [ref for ref in told.also if ref != told.base]
        entries["base_model"] = [told.base, *more] if more else told.base
    if "base_model" in entries or "base_model" in old:
        entries["base_model_relation"] = told.relation
    entries["library_name"] = told.library
    tags = old.get("tags")
    there = [tag for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else []
    entries["tags"] = [*there, *(tag for tag in told.tags if tag not in there)]
    if license is not None:
        entries["license"] = license
    if datasets:
        entries["datasets"] = list(datasets)
    return entries


def card(
    old: str | None, told: Told, title: str, *, license: str | None = None, datasets: Sequence[str] = (), where: object
) -> str:
    """The card: `old` with our section and our entries replaced, or a new one. Done again, it is the same.

    `FileError`, at `where`, for metadata that is no YAML and for marks that do not match.
    """
    text = (old or "").replace("\r\n", "\n")
    yaml_text, body = frontmatter.split(text)
    entries = metadata(told, frontmatter.read(yaml_text, where), license=license, datasets=datasets)
    head = f"---\n{frontmatter.replaced(yaml_text, entries, where)}---\n"
    if not body.strip():
        body = f"\n# {inline(title)}\n\n"
    made = head + _with_section(body, section(told), where)
    return made.replace("\n", "\r\n") if "\r\n" in (old or "") else made


def by_hand(text: str, title: str, where: object) -> str:
    """What somebody wrote into the card, beside what we write: text, and entries of the metadata that are not ours."""
    yaml_text, body = frontmatter.split(text.replace("\r\n", "\n"))
    before, _, rest = body.partition(BEGIN)
    own = before.strip().removeprefix(f"# {inline(title)}") + rest.partition(END)[2]
    others = sorted(frontmatter.read(yaml_text, where).keys() - OURS)
    return "\n".join([own.strip(), *others]).strip()


def _with_section(body: str, section: str, where: object) -> str:
    begins, ends = body.count(BEGIN), body.count(END)
    if begins == ends == 0:
        return f"{body.rstrip()}\n\n{section}\n".lstrip("\n") if body.strip() else f"{section}\n"
    if begins != 1 or ends != 1 or body.index(END) < body.index(BEGIN):
        fix = f"leave one pair of them around the part that is ours, or none: {BEGIN} and {END}"
        raise FileError("the marks of our section do not match", where=where, fix=fix)
    before, _, rest = body.partition(BEGIN)
    return before + section + rest.partition(END)[2]


def section(told: Told) -> str:
    """Our part of the card, with its marks."""
    return "\n".join([BEGIN, *_lines(told), END])


def _lines(told: Told) -> Iterator[str]:
    yield "## How to use it"
    for heading, language, lines in told.usage:
        yield from ("", heading, "", f"```{language}", *lines.splitlines(), "```")
    yield from ("", "## What it is", "", *table(told.facts))
    for name, facts in told.parts.items():
        yield from ("", f"### {code(name)}", "", *table(facts))
    if told.formula is not None:
        yield from ("", "## How it was made", "", code(told.formula))
    if told.inputs:
        yield from ("", "| made of | file | SHA-256 |", "|---|---|---|")
        rows = [
            f"| {name} | {code(file)} | {code(digest)} |"
            for name, digests in told.inputs
            for file, digest in digests.items()
        ]
        yield from rows[:MOST]
        if len(rows) > MOST:
            yield f"| and {len(rows) - MOST} more files | | |"
    yield from ("", f"Made with {LIBRARY}; this part of the page is written by `adapter push`.")


def table(facts: Mapping[str, str]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items())]


def inline(text: str) -> str:
    """A stranger's text on one line, that no mark of ours and no HTML can be in."""
    plain = printable(text if len(text) <= LONGEST else f"{text[:LONGEST]} …")
    return plain.replace("<", "‹").replace(">", "›").replace("`", "'").replace("|", "¦")


def code(text: str) -> str:
    """The same as code."""
    return f"`{inline(text)}`"


def on_the_hub(name: str | None) -> bool:
    """Whether it may be the name of a model on the Hub."""
    return name is not None and _ON_THE_HUB.fullmatch(name) is not None


def class_of(task: str | None) -> str:
    """The class of transformers for PEFT's name of a task."""
    return _CLASSES.get(task or "", "AutoModel")
