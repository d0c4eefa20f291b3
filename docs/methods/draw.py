"""How the pictures of the methods are drawn; `pictures.py` beside this file says what is in them.

The vocabulary: an input flows from left to right through a tuple of parts.

- `Matrix` multiplies it; its height at either side stands for the width of what goes in and comes out.
- `Vector` and `Scalar` meet it at a circle with a symbol: "⊙", "+", "×", or "‖" for what is put beside it.
- `Function` is applied to it, and has nothing to train: a nonlinearity, or a part of the base, which is then grey.
- `Sum` sends it through several flows, one below the other, and adds up what comes out; an empty flow is a mere line.
- `KEPT` marks the next edge: what flows there is kept for the backward pass.

A name may have an index of one character: "B_K". Sizes are letters: k is the width of a layer's input, d of its output,
r the rank, m the width of a bottleneck. Nothing is placed by hand. A new symbol is a line in `SIGNS`; a new part is a
class with a `size` and a `draw`, as those here, and a place in `Part`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape

TRAINED, FROZEN, RANDOM, COMPUTED, PLAIN = KINDS = (
    "trained",
    "of the base, frozen",
    "random, frozen",
    "computed, without gradient",
    "a function",
)
FILL = {TRAINED: "#ffb454", FROZEN: "#d0d7de", RANDOM: "url(#random)", COMPUTED: "#ffffff", PLAIN: "#ffffff"}
STROKE = {TRAINED: "#9a4b00", FROZEN: "#57606a", RANDOM: "#57606a", COMPUTED: "#57606a", PLAIN: "#1f2328"}
INK, PALE, PAPER = "#1f2328", "#57606a", "#ffffff"

WIDE, NARROW = 64, 30  # heights of a matrix where k or d numbers, or fewer, go in or come out
BOX = 62  # the width of a matrix
EDGE = 46  # an edge's shortest length
CIRCLE = 11  # the radius of a circle
LINE = 17  # from one line of text to the next
# Lines within a circle; "⊙" is a dot.
SIGNS = {"+": "M-6 0H6M0 -6V6", "×": "M-4.5 -4.5L4.5 4.5M4.5 -4.5L-4.5 4.5", "‖": "M-2.5 -5V5M2.5 -5V5"}
ROW = 14  # between the flows of a sum
MARGIN = 20
DEFS = (
    '<defs><pattern id="random" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<rect width="6" height="6" fill="#ffffff"/><path d="M0 0V6" stroke="#aeb6bf" stroke-width="4"/></pattern>'
    '<marker id="end" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto" '
    f'markerUnits="userSpaceOnUse"><path d="M0 0L8 4L0 8z" fill="{INK}"/></marker></defs>'
)


class _Kept:
    """The next edge is kept for the backward pass."""


KEPT = _Kept()


@dataclass(frozen=True)
class Matrix:
    """A matrix of (out, into), with a line of text below its shape."""

    name: str
    out: str
    into: str
    kind: str = TRAINED
    note: str = ""

    @property
    def size(self) -> tuple[float, float, float]:
        """Width, and height above and below the line that the data flows on."""
        return BOX, WIDE / 2, WIDE / 2 + LINE * (2 if self.note else 1)

    def draw(self, canvas: Canvas, x: float, y: float, width: str) -> str:
        left, right = ((WIDE if w in "kd" else NARROW) / 2 for w in (self.into, self.out))
        low = max(left, right)
        canvas.shape(f"M{x:g} {y - left:g}L{x + BOX:g} {y - right:g}V{y + right:g}L{x:g} {y + left:g}z", self.kind)
        canvas.name(self.name, x + BOX / 2, y)
        canvas.text(f"{self.out} × {self.into}", x + BOX / 2, y + low + LINE - 3)
        if self.note:
            canvas.text(self.note, x + BOX / 2, y + low + 2 * LINE - 3)
        return self.out


@dataclass(frozen=True)
class Vector:
    """A vector that meets the data entry by entry, with its size below it."""

    symbol: str
    name: str
    length: str
    kind: str = TRAINED
    note: str = ""

    HEIGHT = 26

    @property
    def size(self) -> tuple[float, float, float]:
        return self._box, CIRCLE, CIRCLE + 15 + self.HEIGHT + LINE * (2 if self.note else 1)

    @property
    def _box(self) -> float:
        return max(40, 11 * len(self.name.replace("_", "")) + 16)

    def draw(self, canvas: Canvas, x: float, y: float, width: str) -> str:
        middle, top, half = x + self._box / 2, y + CIRCLE + 15, self._box / 2
        canvas.edge(x, y, middle - CIRCLE, y)
        canvas.line(middle + CIRCLE, y, x + self._box, y)
        canvas.edge(middle, top, middle, y + CIRCLE)
        canvas.circle(self.symbol, middle, y)
        canvas.shape(f"M{middle - half:g} {top:g}h{2 * half:g}v{self.HEIGHT}h{-2 * half:g}z", self.kind)
        canvas.name(self.name, middle, top + self.HEIGHT / 2)
        canvas.text(self.length, middle, top + self.HEIGHT + LINE - 3)
        if self.note:
            canvas.text(self.note, middle, top + self.HEIGHT + 2 * LINE - 3)
        return width


@dataclass(frozen=True)
class Scalar:
    """A number that the data is multiplied by."""

    name: str

    @property
    def size(self) -> tuple[float, float, float]:
        return 2 * CIRCLE, CIRCLE, CIRCLE + LINE + 2

    def draw(self, canvas: Canvas, x: float, y: float, width: str) -> str:
        canvas.circle("×", x + CIRCLE, y)
        canvas.name(self.name, x + CIRCLE, y + CIRCLE + LINE - 4, 14)
        return width


@dataclass(frozen=True)
class Function:
    """What has nothing to train, and gives as many numbers as it takes."""

    name: str
    kind: str = PLAIN

    HEIGHT = 32

    @property
    def size(self) -> tuple[float, float, float]:
        return max(32, 10 * len(self.name) + 16), self.HEIGHT / 2, self.HEIGHT / 2

    def draw(self, canvas: Canvas, x: float, y: float, width: str) -> str:
        long, high = self.size[0], self.HEIGHT
        path = f"M{x + 8:g} {y - high / 2:g}h{long - 16:g}a8 8 0 0 1 8 8v{high - 16}a8 8 0 0 1 -8 8h{16 - long:g}"
        canvas.shape(f"{path}a8 8 0 0 1 -8 -8v{16 - high}a8 8 0 0 1 8 -8z", self.kind)
        canvas.name(self.name, x + long / 2, y)
        return width


@dataclass(frozen=True, init=False)
class Sum:
    """The sum of what several flows make of one input; the first stays on the line."""

    flows: tuple[Flow, ...]

    def __init__(self, *flows: Flow) -> None:
        object.__setattr__(self, "flows", flows)

    @property
    def size(self) -> tuple[float, float, float]:
        sizes = [extent(flow) for flow in self.flows]
        down = sum(up + low + ROW for _, up, low in sizes[1:]) + sizes[0][2]
        return max(width for width, _, _ in sizes) + 2 * CIRCLE, sizes[0][1], down

    def draw(self, canvas: Canvas, x: float, y: float, width: str) -> str:
        long, end, out = self.size[0] - 2 * CIRCLE, x + self.size[0] - CIRCLE, width
        at, low = y, 0.0
        for number, flow in enumerate(self.flows):
            own, up, below = extent(flow)
            if number:
                at += low + ROW + up
                canvas.line(x, y, x, at)
                canvas.edge(end, at, end, y + CIRCLE)
            slack = (long - own) / 2
            stop, out = draw_flow(canvas, flow, x, at, width, slack)
            if number:
                canvas.line(stop, at, end, at)
            else:
                canvas.edge(stop, at, end - CIRCLE, at)
            low = below
        if len(self.flows) > 1:
            canvas.dot(x, y, 2.5)
        canvas.circle("+", end, y)
        return out


Part = Matrix | Vector | Scalar | Function | Sum | _Kept
Flow = tuple[Part, ...]


def extent(flow: Flow) -> tuple[float, float, float]:
    """Width, and height above and below the line, of a flow with an edge before and behind every part."""
    sizes = [part.size for part in flow if not isinstance(part, _Kept)]
    width = EDGE + sum(size[0] + EDGE for size in sizes)
    return width, max((size[1] for size in sizes), default=0), max((size[2] for size in sizes), default=0)


def draw_flow(
    canvas: Canvas, flow: Flow, x: float, y: float, width: str, slack: float = 0, label: bool = False
) -> tuple[float, str]:
    """Draw it from x on, with `slack` before and behind it; where it ends, and the width of what comes out.

    An edge is labelled with the width of what flows there where that has changed, and the first if `label`. The last
    edge is left to who joins it to something.
    """
    start, kept = x, False
    x += slack
    for part in flow:
        if isinstance(part, _Kept):
            kept = True
            continue
        stop = x + EDGE
        (canvas.line if isinstance(part, (Sum, Vector)) else canvas.edge)(start, y, stop, y)
        canvas.mark((start + stop) / 2, y, width if label else "", kept)
        before, width = width, part.draw(canvas, stop, y, width)
        start = x = stop + part.size[0]
        kept, label = False, isinstance(part, (Matrix, Sum)) or width != before
    end = start + EDGE + slack
    canvas.mark((start + end) / 2, y, width if label else "", kept)
    canvas.line(start, y, end, y)
    return end, width


def parts(flow: Flow) -> Iterator[Matrix | Vector | Scalar | Function]:
    """All that does something by itself, what is within sums too."""
    for part in flow:
        if isinstance(part, Sum):
            for inner in part.flows:
                yield from parts(inner)
        elif not isinstance(part, _Kept):
            yield part


def kept(flow: Flow, width: str = "k") -> tuple[list[str], str]:
    """The widths of all that is kept for the backward pass, and that of what comes out."""
    widths: list[str] = []
    for part in flow:
        if isinstance(part, _Kept):
            widths.append(width)
        elif isinstance(part, Matrix):
            width = part.out
        elif isinstance(part, Sum):
            inside = [kept(inner, width) for inner in part.flows]
            widths += [w for ws, _ in inside for w in ws]
            width = inside[0][1]
    return widths, width


@dataclass
class Canvas:
    """What has been drawn: edges first, then what lies on them."""

    lines: list[str] = field(default_factory=list)
    things: list[str] = field(default_factory=list)
    used: set[str] = field(default_factory=set)

    def line(self, x: float, y: float, x2: float, y2: float, end: str = "") -> None:
        self.lines.append(f'<path d="M{x:g} {y:g}L{x2:g} {y2:g}" fill="none" stroke="{INK}" stroke-width="1.5"{end}/>')

    def edge(self, x: float, y: float, x2: float, y2: float) -> None:
        self.line(x, y, x2, y2, ' marker-end="url(#end)"')

    def shape(self, path: str, kind: str) -> None:
        self.used.add(kind)
        dashes = ' stroke-dasharray="4 3"' if kind == COMPUTED else ""
        self.things.append(f'<path d="{path}" fill="{FILL[kind]}" stroke="{STROKE[kind]}" stroke-width="1.5"{dashes}/>')

    def dot(self, x: float, y: float, radius: float) -> None:
        self.things.append(f'<circle cx="{x:g}" cy="{y:g}" r="{radius:g}" fill="{INK}"/>')

    def circle(self, symbol: str, x: float, y: float, radius: float = CIRCLE) -> None:
        self.used.add(symbol)
        self.things.append(
            f'<circle cx="{x:g}" cy="{y:g}" r="{radius:g}" fill="{PAPER}" stroke="{INK}" stroke-width="1.5"/>'
        )
        if symbol == "⊙":
            self.dot(x, y, 3)
            return
        self.things.append(
            f'<path d="{SIGNS[symbol]}" transform="translate({x:g} {y:g})" stroke="{INK}" stroke-width="1.5"/>'
        )

    def mark(self, x: float, y: float, width: str, kept: bool) -> None:
        """What flows on an edge: its width, and a dot if it is kept."""
        if width:
            self.text(width, x, y - 10)
        if kept:
            self.used.add("kept")
            self.dot(x, y, 5)

    def text(self, text: str, x: float, y: float, anchor: str = "middle", size: int = 13, color: str = PALE) -> None:
        style = f'font-size="{size}" fill="{color}" text-anchor="{anchor}"'
        self.things.append(f'<text x="{x:g}" y="{y:g}" {style}>{_indexed(text)}</text>')

    def name(self, name: str, x: float, y: float, size: int = 17) -> None:
        """Centred at (x, y)."""
        self.text(name, x, y + round(size / 3), "middle", size, INK)


def _indexed(text: str) -> str:
    """With the character behind a `_` as an index."""
    first, *rest = escape(text).replace(" ", "\u00a0").split("_")
    for part in rest:
        behind = part[1:].lstrip("\u00a0")  # at the head of a tspan some viewers drop a space
        space = ' dx="5"' if behind != part[1:] else ""
        first += f'<tspan font-size="70%" dy="4">{part[0]}</tspan><tspan dy="-4"{space}>{behind}</tspan>'
    return first.replace('<tspan dy="-4"></tspan>', "")


@dataclass(frozen=True)
class Picture:
    """A formula, and below it one flow for each caption: from x to h."""

    title: str
    formula: str
    flows: dict[str, Flow]  # by caption
    note: tuple[str, ...] = ()  # lines

    def svg(self) -> str:
        canvas, y = Canvas(), MARGIN + 16.0
        right = MARGIN + 10.6 * len(self.formula)
        canvas.text(self.formula, MARGIN, y, "start", 17, INK)
        for caption, flow in self.flows.items():
            _, up, low = extent(flow)
            y += 22
            if caption:
                y += 10
                canvas.text(caption, MARGIN, y, "start")
                y += 8
            y += up + 6
            canvas.name("x", MARGIN + 8, y)
            stop, _ = draw_flow(canvas, flow, MARGIN + 20, y, "k", label=True)
            canvas.edge(stop - 8, y, stop, y)
            canvas.name("h", stop + 12, y)
            right, y = max(right, stop + 20), y + low
        for number, line in enumerate(self.note):
            y += LINE if number else 22
            canvas.text(line, MARGIN, y, "start")
        right = max(right, *(MARGIN + 7.5 * len(text) for text in (*self.note, *self.flows)))
        y, right = self._legend(canvas, y + 30, max(right, 460))
        return self._document(canvas, right + MARGIN, y + MARGIN)

    def _legend(self, canvas: Canvas, y: float, right: float) -> tuple[float, float]:
        """What of the vocabulary is in the picture; where it ends."""
        entries = [kind for kind in KINDS if kind in canvas.used]
        entries += [name for name in ("kept", "⊙") if name in canvas.used]
        words = {"kept": "kept for the backward pass", "⊙": "entry by entry"}
        x = MARGIN
        for entry in entries:
            text = words.get(entry, entry)
            width = 26 + 7.2 * len(text) + 18
            if x > MARGIN and x + width - 18 > right:
                x, y = MARGIN, y + 22
            if entry == "kept":
                canvas.dot(x + 9, y - 5, 5)
            elif entry == "⊙":
                canvas.circle(entry, x + 9, y - 5, 8)
            else:
                canvas.shape(f"M{x:g} {y - 12:g}h18v14h-18z", entry)
            canvas.text(text, x + 26, y, "start")
            x += round(width)
        return y, right

    def _document(self, canvas: Canvas, width: float, height: float) -> str:
        w, h = round(width), round(height)
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" width="{w}" height="{h}" viewBox="0 0 {w} {h}" role="img" '
                f'aria-labelledby="title" font-family="Helvetica, Arial, \'DejaVu Sans\', sans-serif">',
                f'<title id="title">{escape(self.title)}</title>',
                DEFS,
                f'<rect x="0.5" y="0.5" width="{w - 1}" height="{h - 1}" rx="8" fill="{PAPER}" stroke="#d0d7de"/>',
                *canvas.lines,
                *canvas.things,
                "</svg>\n",
            ]
        )
