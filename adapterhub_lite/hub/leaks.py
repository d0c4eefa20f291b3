"""What should not be published: absolute paths, names of people, tokens, e-mail addresses, by file and line.

Text and JSON files are read as a whole, of safetensors files the header's metadata; other files are not looked into.
Patterns prefer silence to a false alarm, but for tokens, where nothing else has their form.
"""

from __future__ import annotations

import codecs
import contextlib
import getpass
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint
from ..errors import FileError, os_error, printable

VOCABULARIES = frozenset(["tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json"])
"""Files of words, in which a person's name is a word."""
LINE = "\n"
LONGEST = 60  # characters of what was found that are shown
DEEPEST = 32  # JSON in the header's metadata
MOST = 200  # findings in one file that are listed
FIRST = 1 << 13  # bytes of a file that tell whether it is a text
MAX_BYTES = 200_000_000  # of a text; a tokenizer has 20 MB

# What a name of an account tells nobody about.
_ANYBODY = re.compile(
    "admin|administrator|app|azureuser|codespace|debian|default|docker|ec2-user|guest|home|jovyan|me|model|node|nobody|"
    "python|root|runner|test|ubuntu|user|users|vscode|work",
    re.IGNORECASE,
)
# The first folder of a path that is somebody's own; others count where more folders follow, or a name says path.
_ROOTS = (
    "home Users root mnt media data[0-9]* datasets? tmp var opt srv scratch work workspaces? projects? content kaggle "
    "lustre gpfs nfs fsx efs ebs beegfs storage nvme[0-9]* ssd[0-9]* hdd[0-9]* disk[0-9]* vol[0-9]* [vV]olumes? "
    "private shared? export net nas cluster runs experiments checkpoints dbfs raid run/media run/user"
).replace(" ", "|")
# Paths that every machine has, and addresses of interfaces.
_EVERYWHERE = r"(?!(?:usr|bin|sbin|lib|lib64|dev|etc|proc|sys|boot|run|api|v[0-9]+|docs|wiki|en|path/to)/)"
_ANYBODYS = r"(?!\.(?:cache|config|local|ssh|bashrc|zshrc|profile)\b)"  # in a home folder
_NAME = r"[A-Za-z_.][\w.+-]*"
_MORE = r"/[\w.+@%=-]+"
_BEFORE = r"(?:^|(?<=[\s\"'`(\[{>=,;|:]))"  # a path: not what goes on, </div> or //host
_PATHS = (
    r"file:/{1,3}[\w~%][^\s\"'`)>]*",
    rf"{_BEFORE}/(?:{_ROOTS})(?:{_MORE})+",
    rf"{_BEFORE}(?<!\]\()/{_EVERYWHERE}{_NAME}(?:{_MORE}){{2,}}",
    rf"(?:path|dir|folder|file)[\"'`]?\s{{0,4}}[:= ]\s{{0,4}}[\"'`]?(?P<path>/{_EVERYWHERE}{_NAME}(?:{_MORE})*)",
    r"(?<![A-Za-z0-9?])[A-Za-z]:[\\/]{1,2}[\w.%-]{2,}(?:[\\/]{1,2}[\w.%-]+)*",
    r"(?:^|(?<=[\s\"'`]))\\\\[A-Za-z0-9][\w.-]+\\[\w.$-]+(?:\\[\w.$-]+)*",
    rf"{_BEFORE}~/{_ANYBODYS}{_NAME}(?:{_MORE})*",
    rf"{_BEFORE}~[a-z_][\w-]*(?:{_MORE}){{2,}}",
)
_TOKENS = (
    r"hf_[A-Za-z0-9]{30,}",
    r"api_org_[A-Za-z0-9]{30,}",
    r"sk-(?=[\w-]*[0-9])(?:[a-z]+[0-9]*-)*\w{20,}[\w-]*",
    r"gh[pousr]_[A-Za-z0-9]{36,}",
    r"github_pat_[A-Za-z0-9_]{40,}",
    r"glpat-[\w-]{20,}",
    r"(?:AKIA|ASIA)[A-Z0-9]{16}\b(?<!EXAMPLE)",
    r"xox[abprs]-[A-Za-z0-9-]{20,}",
    r"AIza[\w-]{35}",
    r"npm_[A-Za-z0-9]{36}",
    r"pypi-[\w-]{50,}",
    r"r8_[A-Za-z0-9]{37}",
    r"gsk_[A-Za-z0-9]{40,}",
    r"eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}",
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
)
_SECRET = r"api[_-]?key|secret(?:[_-]?access)?[_-]?key|secret|passw(?:or)?d|access[_-]?token|auth[_-]?token"
_SECRETS = (
    r"\b[bB]earer\s{1,4}(?P<secret>[\w.~+/-]{20,}=*)",
    rf"(?i:{_SECRET})[\"']?\s{{0,4}}[:=]\s{{0,4}}[\"']?(?P<secret>[\w/+.-]{{16,}}={{0,2}})",
)
_IN_ADDRESS = r"(?<![a-z0-9+.-])[a-z][a-z0-9+.-]*://[^\s/:@\"']*:(?P<password>[^\s/@\"'{}$<>]{3,})@"
_MAIL = r"(?<![\w/.%+$-])[A-Za-z0-9][\w.%+-]*@(?P<host>(?:[A-Za-z0-9-]+\.)+(?P<end>[A-Za-z]{2,}))\b"
_PATTERNS = (
    *(("a token", re.compile(rf"(?<![A-Za-z0-9_-])(?:{token})")) for token in _TOKENS),
    *(("a token", re.compile(secret)) for secret in (*_SECRETS, _IN_ADDRESS)),
    ("an e-mail address", re.compile(_MAIL)),
    *(("an absolute path", re.compile(path, re.MULTILINE)) for path in _PATHS),
)
_NOBODYS = re.compile(
    r"(?:.*\.)?example\.(?:com|org|net|edu)|.*\.(?:example|invalid|test|localhost)|.*\bnoreply\b.*", re.IGNORECASE
)
_NO_DOMAIN = re.compile(
    "bin|gguf|gif|jpe?g|json|md|onnx|png|pt|py|safetensors|sh|svg|toml|txt|webp|ya?ml", re.IGNORECASE
)
_EXAMPLES = frozenset(["pass", "password", "secret", "token", "***"])
_ESCAPE = re.compile(r'\\(?:u([0-9a-fA-F]{4})|(["\\/bfnrt]))')


@dataclass(frozen=True, order=True)
class Leak:
    """One thing that should not be published."""

    where: str
    """The file and the line; of a header, the metadata key."""
    kind: str
    shown: str
    """What it is; of a token only how it begins."""

    def __str__(self) -> str:
        return f"{self.where}: {self.kind}, {self.shown}"


def leaks(files: Mapping[str, Path | str], *, people: Collection[str] | None = None) -> list[Leak]:
    """What is found in these files, by their names: on the disk where a path is given, or the text itself.

    `people` are the names to look for; by default, those of whoever runs this.
    """
    names = _names(whoever() if people is None else people)
    found: list[Leak] = []
    for name, content in files.items():
        own = [] if Path(name).name in VOCABULARIES else names
        if isinstance(content, Path) and name.endswith(".safetensors"):
            for key, value in Checkpoint.open(content).metadata.items():
                found += _in_header(f"{name}: header, {key}", value, own)
        elif (text := content if isinstance(content, str) else _text(content)) is not None:
            found += _in_text(name, _unescaped(text) if name.endswith((".json", ".jsonl")) else text, own)
    return sorted(set(found))


def whoever() -> frozenset[str]:
    """The account that runs this, as it is called here, and its home folder."""
    names = {os.environ.get(key, "") for key in ("USER", "LOGNAME", "USERNAME")}
    with contextlib.suppress(OSError, KeyError, RuntimeError, ImportError):  # an account without a name, in a container
        names |= {getpass.getuser(), Path.home().name, str(Path.home())}
    return frozenset(names)


def refuse(found: Collection[Leak], where: object) -> None:
    """`FileError` that names the first, if there is one."""
    if found:
        first, *more = found
        others = f" (and {len(more)} more: adapter push --dry-run lists them)" if more else ""
        raise FileError(
            f"would publish {first.kind}, {first.shown}, at {first.where}{others}",
            where=where,
            fix="remove it, or pass --allow-leaks (allow_leaks=True) if everybody may see it",
        )


Pattern = tuple[str, "re.Pattern[str]"]


def _names(people: Collection[str]) -> list[Pattern]:
    """Patterns of names; of none that say nothing about anybody."""
    wanted = sorted(name for name in people if len(name) >= 3 and not _ANYBODY.fullmatch(name))
    patterns = []
    for name in wanted:
        folder = "/" in name or "\\" in name
        if folder and _ANYBODY.fullmatch(Path(name).name or "root"):
            continue
        kind = "an absolute path" if folder else "a user name"
        own = re.escape(name)
        hub = "" if folder else rf"(?!(?<![/\\]{own})/\w)"  # the same name on the Hub: mara/model
        patterns.append((kind, re.compile(rf"(?<![A-Za-z0-9]){own}(?![A-Za-z0-9]){hub}")))
    return patterns


def _in_text(name: str, text: str, own: list[Pattern]) -> Iterator[Leak]:
    for start, kind, shown in _search(text, own):
        yield Leak(f"{name}:{text.count(LINE, 0, start) + 1}", kind, shown)


def _in_header(where: str, value: str, own: list[Pattern]) -> Iterator[Leak]:
    """A value of the metadata: JSON is taken apart, so that the place is known."""
    try:
        parsed = json.loads(value) if value[:1] in ("{", "[") else value
    except (ValueError, RecursionError):
        parsed = value
    for place, text in _strings(parsed, where, 0):
        for _, kind, shown in _search(text, own):
            yield Leak(place, kind, shown)


def _strings(value: Any, where: str, depth: int) -> Iterator[tuple[str, str]]:
    if depth > DEEPEST:
        yield where, json.dumps(value)
    elif isinstance(value, str):
        yield where, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield where, key
            yield from _strings(inner, f"{where}.{key[:LONGEST]}", depth + 1)
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            yield from _strings(inner, f"{where}[{place}]", depth + 1)


def _search(text: str, own: list[Pattern]) -> Iterator[tuple[int, str, str]]:
    """Where, what, and how to show it; a stretch of text once."""
    taken: list[tuple[int, int]] = []
    for kind, pattern in (*_PATTERNS, *own):
        for found in pattern.finditer(text):
            start, stop = found.span()
            if not _meant(kind, found) or any(a < stop and start < b for a, b in taken):
                continue
            taken.append((start, stop))
            yield start, kind, _shown(kind, found)
            if len(taken) == MOST:
                return


def _meant(kind: str, found: re.Match[str]) -> bool:
    """Whether it is none that a document would give as an example."""
    groups = found.groupdict()
    if kind == "an e-mail address":
        taken = found[0].startswith("git@") or _NO_DOMAIN.fullmatch(groups["end"]) is not None
        return not taken and not _NOBODYS.fullmatch(groups["host"])
    if (secret := groups.get("secret")) is not None:
        return len(set(secret)) >= 10 and any(c.isdigit() for c in secret) and any(c.isalpha() for c in secret)
    if (password := groups.get("password")) is not None:
        return password.casefold() not in _EXAMPLES
    return kind != "a token" or len(set(found[0])) >= 12  # not hf_xxxx…


def _shown(kind: str, found: re.Match[str]) -> str:
    groups = found.groupdict()
    if kind == "a token":
        text = groups.get("secret") or found[0]
        return "a password" if "password" in groups else f"{text[:6]}…"
    text = groups.get("path") or found[0]
    return printable(text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…")


def _text(path: Path) -> str | None:
    """What a file says, or None if it is no text."""
    wide = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    try:
        with open(path, "rb") as file:
            data = file.read(FIRST)
            if b"\0" in data and not data.startswith(wide):
                return None
            data += file.read(MAX_BYTES + 1 - len(data))
    except OSError as error:
        raise os_error(error, path) from None
    if len(data) > MAX_BYTES:
        return None
    encoding = "utf-16" if data.startswith(wide) else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        if b"\0" in data:
            return None
        text = data.decode("latin-1")
    return None if "\0" in text else text


def _unescaped(text: str) -> str:
    r"""JSON with C:\\Users and \/home as they are meant, on the lines where they stand."""

    def plain(found: re.Match[str]) -> str:
        if found[1] is not None:
            character = chr(int(found[1], 16))
            return character if character.isprintable() else " "
        return {"b": " ", "f": " ", "n": " ", "r": " ", "t": " "}.get(found[2], found[2])

    return _ESCAPE.sub(plain, text)
