"""A page for people in one file: no scripts, no requests, readable on a phone, in the dark and on paper.

Names come from strangers' files, so everything that is not made here goes through `text`.
"""

from __future__ import annotations

import contextlib
import html
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal

from .._version import __version__
from ..errors import printable
from ..staging import staged_file
from .output import number

MARK = '<meta name="generator" content="adapterhub-lite '  # by which a page of ours is known
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
LONGEST = 400  # characters of a name
WIDE = 9  # columns that fit a phone
DARK = 72  # per cent of the strong colour from which the other colour is read on it
COLOURS, DASHES = 6, 3
WIDTH, HEIGHT, LEFT, BOTTOM = 240, 120, 30, 14  # of a plot


@contextlib.contextmanager
def staged_page(file: Path | None, *, force: bool) -> Iterator[Path | None]:
    """Where to write the page that is to be at `file`; None if there is to be none."""
    if file is None:
        yield None
        return
    with staged_file(file, force=force, replaceable=is_page) as temp:
        yield temp


def is_page(file: Path) -> bool:
    """Whether the file is one of ours, which may be replaced."""
    with file.open(encoding="utf-8", errors="replace") as opened:
        return MARK in opened.read(1000)


def text(value: object) -> str:
    """As it may stand between tags and in quotes: control characters are shown."""
    shown = printable(str(value))
    return html.escape(shown if len(shown) <= LONGEST else f"{shown[:LONGEST]} …")


def document(title: str, *parts: str) -> str:
    """The whole page."""
    css = files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            '<meta charset="utf-8">',
            f'{MARK}{__version__}">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<link rel="icon" href="data:,">',
            f"<title>{text(title)}</title>",
            f"<style>\n{css}</style>",
            "<body>",
            f"<h1>{text(title)}</h1>",
            *parts,
            f"<footer>Made by adapterhub-lite {__version__}.</footer>",
            "</body>",
            "</html>",
            "",
        ]
    )


def facts(rows: Sequence[tuple[str, object]]) -> str:
    """Names and values."""
    return f"<dl>{''.join(f'<dt>{text(name)}</dt><dd>{text(value)}</dd>' for name, value in rows)}</dl>"


def card(title: str, rows: Sequence[tuple[str, object]], note: str = "") -> str:
    said = f"<p>{text(note)}</p>" if note else ""
    return f'<div class="card"><h3>{text(title)}</h3>{facts(rows)}{said}</div>'


def grid(parts: Sequence[str], size: Literal["", "small", "tiny"] = "") -> str:
    """As many beside each other as there is room for."""
    return f'<div class="grid {size}">{"".join(parts)}</div>'


def listing(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table of text; the first column are names."""
    top = "".join(f"<th>{text(cell)}</th>" for cell in head)
    body = "".join(
        f"<tr><th>{text(first)}</th>{''.join(f'<td>{text(cell)}</td>' for cell in rest)}</tr>" for first, *rest in rows
    )
    return f'<div class="scroll"><table class="list"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


# Heat maps ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """How numbers become colours."""

    top: float = 1.0
    signed: bool = False
    root: bool = True
    """Whether by the root of a number, so that small ones are told apart."""
    ends: tuple[str, str] | None = None
    """What the ends of the bar are called; by default by their numbers."""

    def cell(self, value: float | None, shown: str, title: str) -> str:
        if value is None or not math.isfinite(value):
            return f'<td class="none" title="{text(title)}">{text(shown)}</td>'
        part = min(1.0, abs(value) / self.top) if self.top > 0 else 0.0
        strength = round(100 * (math.sqrt(part) if self.root else part))
        kind = "c" + (" n" if value < 0 else "") + (" d" if strength >= DARK else "")
        return f'<td class="{kind}" style="--v:{strength}%" title="{text(title)}">{text(shown)}</td>'

    def bar(self) -> str:
        top = number(self.top)
        low, high = self.ends or (f"−{top}" if self.signed else "0", top)
        return f'<div class="bar">{low}<i{" class=n" if self.signed else ""}></i>{high}</div>'


@dataclass(frozen=True)
class Cell:
    value: float | None
    shown: str
    title: str


def heatmap(
    caption: str,
    note: str,
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Mapping[tuple[str, str], Cell],
    scale: Scale,
) -> str:
    """`cells` by row and column; those that are not there stay empty."""
    many = " many" if len(columns) > WIDE else ""
    first = min(12.0, 1.0 + 0.45 * max((len(row) for row in rows), default=1))
    top = "".join(f'<th><div class="up">{text(column)}</div></th>' for column in columns)
    body = []
    for row in rows:
        found = (cells.get((row, column)) for column in columns)
        line = "".join("<td></td>" if c is None else scale.cell(c.value, c.shown, c.title) for c in found)
        body.append(f"<tr><th>{text(row)}</th>{line}</tr>")
    return (
        f"<figure><figcaption><b>{text(caption)}</b> {text(note)}</figcaption>"
        f'<div class="scroll"><table class="map{many}" style="--first:{first:.1f}rem">'
        f"<thead><tr><th></th>{top}</tr></thead><tbody>{''.join(body)}</tbody></table></div>{scale.bar()}</figure>"
    )


# Spectra ------------------------------------------------------------------------------------------------


def keys(names: Sequence[str]) -> str:
    """The lines of the plots, by name."""
    items = (f'<li><i class="k{_colour(i)} g{_dash(i)}"></i>{text(name)}</li>' for i, name in enumerate(names))
    return f'<ul class="keys">{"".join(items)}</ul>'


def spectra(caption: str, curves: Sequence[Sequence[Sequence[float]]]) -> str:
    """Singular values by number: for each adapter, in order, the median of several spectra and their range."""
    longest = max((len(s) for own in curves for s in own), default=0)
    top = max((s[0] for own in curves for s in own if s), default=0.0)
    if not longest or not math.isfinite(top) or top <= 0:
        return ""

    def points(values: Sequence[float]) -> list[str]:
        across = (WIDTH - LEFT) / max(1, longest - 1)
        return [f"{LEFT + k * across:.1f},{(HEIGHT - BOTTOM) * (1 - v / top):.1f}" for k, v in enumerate(values)]

    drawn = []
    for i, own in enumerate(curves):
        if not own:
            continue
        each = [sorted(s[k] if k < len(s) else 0.0 for s in own) for k in range(max(map(len, own)))]
        if len(own) > 1:
            around = points([values[-1] for values in each]) + points([values[0] for values in each])[::-1]
            drawn.append(f'<polygon class="band f{_colour(i)}" points="{" ".join(around)}"/>')
        middle = points([statistics.median(values) for values in each])
        if len(middle) == 1:
            x, y = middle[0].split(",")
            drawn.append(f'<circle class="f{_colour(i)}" cx="{x}" cy="{y}" r="2.5"/>')
        else:
            drawn.append(f'<polyline class="line p{_colour(i)} g{_dash(i)}" points="{" ".join(middle)}"/>')
    floor = HEIGHT - BOTTOM
    return (
        f"<figure><figcaption>{text(caption)}</figcaption>"
        f'<svg viewBox="0 -6 {WIDTH + 8} {HEIGHT + 6}" role="img" aria-label="{text(caption)}">'
        f'<path class="axis" d="M{LEFT} 0V{floor}H{WIDTH}" fill="none"/>'
        f'<text x="{LEFT - 4}" y="5" text-anchor="end">{number(top)}</text>'
        f'<text x="{LEFT - 4}" y="{floor}" text-anchor="end">0</text>'
        f'<text x="{LEFT}" y="{HEIGHT}">1</text>'
        f'<text x="{WIDTH}" y="{HEIGHT}" text-anchor="end">{longest if longest > 1 else ""}</text>'
        f"{''.join(drawn)}</svg></figure>"
    )


def _colour(i: int) -> int:
    return i % COLOURS


def _dash(i: int) -> int:
    return i // COLOURS % DASHES
