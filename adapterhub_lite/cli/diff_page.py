"""The page that `adapter diff --html` writes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from ..advice import ELSEWHERE
from .diff import most_different, overlap, shared
from .layers import Number, Places, by_number, short
from .output import number, share
from .page import Cell, Scale, card, document, grid, heatmap, listing, text

if TYPE_CHECKING:
    from ..compare import Diff, Likeness, Pair

PAIRS = 15  # pairs that have maps of their own
GAP = "‖A − B‖ / (‖A‖ + ‖B‖)"
COLUMNS = 6  # adapters whose norms have columns of their own

MEASURES = """
<p><b>‖ΔW‖</b> is the Frobenius norm of the weight change. <b>Cosine</b> is ⟨A, B⟩ / ‖A‖‖B‖ of two changes as long
vectors: 1 for the same direction, 0 for unrelated ones, −1 for opposite ones. <b>Distance</b> is ‖A − B‖ / ‖A‖.</p>
<p><b>Overlap out</b> compares the directions that the changes write to (column spaces), <b>overlap in</b> those that
they read from (row spaces): the mean cos² of the principal angles. <b>By chance</b> is its mean for random spaces of
the same ranks. <b>Conflicts</b> is the share of entries with opposite signs: 50 % for unrelated changes.</p>
<p>Colours of cosines and overlaps go by the root of the number, so that small ones can be told apart. A dash is a
number that is not defined, or a module that is not adapted.</p>
"""


def page(found: Diff) -> str:
    """The whole page."""
    places = Places.of(list(found.modules))
    two = len(found.names) == 2
    parts = [
        f'<p class="soft">{text(" · ".join(found.names))}</p>',
        grid([_adapter(found, i) for i in range(len(found.names))], "tiny"),
        f"<h2>{'The two' if two else 'Pairs'}</h2>",
        *([] if two else [grid(_matrices(found))]),
        grid([_pair(pair, two) for _, pair in _nearest(found)]),
        f'<p class="soft">{text(ELSEWHERE[0].upper() + ELSEWHERE[1:])}.</p>',
    ]
    if len(found.pairs) > PAIRS:
        parts.append(f'<p class="soft">The {PAIRS} pairs of the largest cosines, of {len(found.pairs)}.</p>')
    if places.at:
        parts += ["<h2>Layer by layer</h2>", grid(_norms(found, places)), *_maps(found, places)]
        if len(places.at) < len(found.modules):
            parts.append('<p class="soft">Modules without a layer number are in the table below.</p>')
    parts += ["<h2>Spectra</h2>", *places.spectra(found.names, {n: m.spectra for n, m in found.modules.items()})]
    parts += [f"<h2>All {len(found.modules)} modules</h2>", _table(found)]
    parts += ["<h2>What the numbers are</h2>", MEASURES]
    return document("Adapters compared", *parts)


def _adapter(found: Diff, i: int) -> str:
    own = [module for module in found.modules.values() if module.norms[i] is not None]
    ranks = sorted({len(module.spectra[i] or ()) for module in own})
    span = "-" if not ranks else str(ranks[0]) if ranks[0] == ranks[-1] else f"{ranks[0]} to {ranks[-1]}"
    rows: list[tuple[str, object]] = [("‖ΔW‖", number(found.norms[i])), ("rank", span), ("modules", len(own))]
    if found.bias_norms[i] is not None:
        rows.append(("biases", f"{number(found.bias_norms[i])} (in no other number)"))
    if found.kept[i]:
        rows.append(("not compared", ", ".join(found.kept[i][:3]) + (" …" if found.kept[i][3:] else "")))
    return card(found.names[i], rows)


def _nearest(found: Diff) -> list[tuple[tuple[int, int], Pair]]:
    """The pairs that the page shows one by one."""
    every = sorted(found.pairs.items(), key=lambda item: (-abs(item[1].cosine or 0.0), item[0]))
    return sorted(every[:PAIRS])


def _pair(pair: Pair, two: bool) -> str:
    rows: list[tuple[str, object]] = [
        ("cosine", share(pair.cosine)),
        ("distance", number(pair.distance)),
        ("overlap out", f"{share(pair.overlap_out)} (by chance {share(pair.chance_out)})"),
        ("overlap in", f"{share(pair.overlap_in)} (by chance {share(pair.chance_in)})"),
    ]
    if pair.conflicts is not None:
        rows.append(("conflicts", f"{100 * pair.conflicts:.1f} % of signs"))
    rows.append(("modules", shared(pair)))
    return card("How like they are" if two else f"{pair.a} and {pair.b}", rows, f"Advice: {pair.advice}.")


def _matrices(found: Diff) -> list[str]:
    names, count = [f"{i + 1} {name}" for i, name in enumerate(found.names)], len(found.names)

    def matrix(title: str, note: str, get: Callable[[Pair], float | None], scale: Scale) -> str:
        cells = {}
        for i, j in itertools.permutations(range(count), 2):
            pair = found.pairs[min(i, j), max(i, j)]
            value = get(pair)
            cells[names[i], names[j]] = Cell(value, share(value), f"{pair.a} and {pair.b}: {share(value)}")
        return heatmap(title, note, names, names, cells, scale)

    return [
        matrix("Cosine", "", lambda pair: pair.cosine, Scale(signed=True)),
        matrix("Overlap", "of outputs and inputs, their mean", overlap, Scale()),
        matrix(
            "Difference", "‖A − B‖ / (‖A‖ + ‖B‖): 0 equal, 1 opposite, 0.71 unrelated", lambda pair: pair.gap, Scale()
        ),
    ]


# Layer by layer -----------------------------------------------------------------------------------------


def _norms(found: Diff, places: Places) -> list[str]:
    top = max((norm for name in places.at for norm in found.modules[name].norms if norm is not None), default=0.0)
    return [
        places.map(f"‖ΔW‖ of {name}", "", partial(_norm, found, i), number, Scale(top, root=False))
        for i, name in enumerate(found.names)
    ]


def _norm(found: Diff, i: int, name: str) -> Number:
    return found.modules[name].norms[i]


def _maps(found: Diff, places: Places) -> list[str]:
    parts = []
    for n, (key, pair) in enumerate(_nearest(found)):
        maps = grid(_of_pair(found, places, key, pair))
        if len(found.pairs) == 1:
            return [maps]
        parts.append(
            f"<details{' open' if n == 0 else ''}><summary>{text(pair.a)} and {text(pair.b)}</summary>{maps}</details>"
        )
    return parts


def _of_pair(found: Diff, places: Places, key: tuple[int, int], pair: Pair) -> list[str]:
    def one(
        title: str,
        note: str,
        get: Callable[[Likeness], Number],
        scale: Scale,
        strength: Callable[[float], float] = lambda value: value,
    ) -> str:
        return places.map(title, note, lambda name: get(found.modules[name].pairs[key]), short, scale, strength)

    parts = [
        one("Cosine", "", lambda p: p.cosine, Scale(signed=True)),
        one("Overlap out", f"by chance {share(pair.chance_out)} over all", lambda p: p.overlap_out, Scale()),
        one("Overlap in", f"by chance {share(pair.chance_in)} over all", lambda p: p.overlap_in, Scale()),
    ]
    if pair.conflicts is not None:
        unlike = Scale(signed=True, ends=("all opposite", "none"))
        opposite = "share of opposite signs"
        parts.append(one("Conflicts", opposite, lambda p: p.conflicts, unlike, lambda share: 1 - 2 * share))
    return parts


# The table ----------------------------------------------------------------------------------------------


def _table(found: Diff) -> str:
    many, signs = len(found.names) > 2, any(pair.conflicts is not None for pair in found.pairs.values())
    norms = found.names if len(found.names) <= COLUMNS else ()
    rows = []
    for name, module in sorted(found.modules.items(), key=by_number):
        (i, j), pair = most_different(module)
        row: list[object] = [name, "×".join(map(str, module.shape)), *(number(n) for n in module.norms[: len(norms)])]
        row += [f"{i + 1}, {j + 1}"] if many else []
        row += [share(pair.cosine), number(pair.distance), share(pair.overlap_out), share(pair.overlap_in)]
        row += [f"{100 * pair.conflicts:.1f} %" if pair.conflicts is not None else "-"] if signs else []
        rows.append(row)
    head = ["module", "out×in", *(f"‖{i + 1}‖" for i in range(len(norms)))]
    head += ["most different"] if many else []
    head += ["cosine", "distance", "overlap out", "overlap in", *(["conflicts"] if signs else [])]
    return listing(head, rows)
