"""The page that `adapter merge --report` writes: what a merge kept of each adapter, and what it lost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..adapter import load
from .layers import Number, Places, by_number, short
from .output import number, share, size
from .page import Scale, card, document, grid, listing, text

if TYPE_CHECKING:
    from ..compare import Diff, Module
    from ..plan import Plan
    from ..save import RelativeError

INPUTS = 12  # adapters that are looked at one by one: those of the largest weights
COLUMNS = 6  # adapters with columns of their own

MEASURES = """
<p><b>Error</b> is ‖stored − exact‖ / ‖exact‖ in the Frobenius norm of ΔW, where exact is the merge as it was asked for,
before truncation and rounding. <b>‖ΔW‖</b> is the norm of what is stored.</p>
<p><b>Kept</b> is how long the result is along an adapter, as a share of that adapter: ⟨result, A⟩ / ‖A‖². For adapters
that have nothing in common it is the weight of A, if nothing was lost; what others have in common with A comes on top.
<b>Directions</b> are the overlaps of the result's spaces with those of A, mean cos² of the principal angles: 1 if the
smaller space lies in the larger one.</p>
<p>Colours of shares and errors go by the root of the number. A dash is a number that is not defined, or a module that
is not adapted. None of this tells how the merged model does: that, only its tasks can.</p>
"""


def check(refs: Sequence[str]) -> None:
    """Raise `NotMergeable` where an input has no ΔW to report on; before any work."""
    for source in (load(ref).source for ref in refs):
        for site in source.sites:
            source.extent(site)


def compared(
    out: Path, refs: Sequence[str], weights: Sequence[float], progress: Callable[[int, int], None]
) -> tuple[Diff, list[float]]:
    """The result and the inputs, as `adapter diff` sees them, and the weights of those inputs."""
    from ..compare import diff

    chosen = sorted(sorted(range(len(refs)), key=lambda i: -abs(weights[i]))[:INPUTS])
    adapters = [load(out), *(load(refs[i]) for i in chosen)]
    names = [str(out), *(refs[i] for i in chosen)]
    return diff(*adapters, names=names, any_base=True, progress=progress), [weights[i] for i in chosen]


def page(found: Diff, weights: Sequence[float], planned: Plan, error: RelativeError, of: int) -> str:
    """The whole page; `found` compares the result, which comes first, with its inputs, of which there were `of`."""
    places = Places.of(list(found.modules))
    cards = [_result(found, planned, error), *(_input(found, weights, i) for i in range(1, len(found.names)))]
    parts = [f'<p class="soft">{text(found.names[0])}</p>', grid(cards, "small")]
    if of > len(weights):
        parts.append(f'<p class="soft">The {len(weights)} adapters of the largest weights, of {of}.</p>')
    if places.at:
        parts += ["<h2>Layer by layer</h2>", grid(_maps(found, places, planned.ranks, error.modules))]
        if len(places.at) < len(found.modules):
            parts.append('<p class="soft">Modules without a layer number are in the table below.</p>')
    spectra = {name: module.spectra for name, module in found.modules.items()}
    parts += ["<h2>Spectra</h2>", *places.spectra(found.names, spectra)]
    parts += [f"<h2>All {len(found.modules)} modules</h2>", _table(found, planned.ranks, error.modules)]
    parts += ["<h2>What the numbers are</h2>", MEASURES]
    return document("What the merge kept", *parts)


def _result(found: Diff, planned: Plan, error: RelativeError) -> str:
    ranks = sorted(planned.ranks.values())
    rows: list[tuple[str, object]] = [
        ("error", "0: exact" if error.overall == 0 else number(error.overall)),
        ("‖ΔW‖", number(found.norms[0])),
        ("rank", "-" if not ranks else str(ranks[0]) if ranks[0] == ranks[-1] else f"{ranks[0]} to {ranks[-1]}"),
        ("modules", len(planned.contents.sites)),
        ("size", f"{size(planned.nbytes)}, {planned.dtype}"),
    ]
    if planned.contents.kept:
        rows.append(("as they are", ", ".join(sorted(planned.contents.kept)[:3])))
    return card("The result", rows)


def _input(found: Diff, weights: Sequence[float], i: int) -> str:
    pair, norm = found.pairs[0, i], found.norms[i]
    return card(
        found.names[i],
        [
            ("weight", f"{weights[i - 1]:.4g}"),
            ("kept", share(_along(pair.cosine, found.norms[0], norm))),
            ("directions out", share(pair.overlap_out)),
            ("directions in", share(pair.overlap_in)),
            ("‖ΔW‖", number(norm)),
        ],
    )


def _along(cosine: Number, result: Number, norm: Number) -> Number:
    """⟨R, A⟩ / ‖A‖²."""
    return None if cosine is None or result is None or not norm else cosine * result / norm


def _kept(module: Module, i: int) -> Number:
    """Of one input at one module; 0 if the result has nothing there."""
    if module.norms[i] and module.norms[0] in (None, 0.0):
        return 0.0
    return _along(module.pairs[0, i].cosine, module.norms[0], module.norms[i])


def _maps(found: Diff, places: Places, ranks: Mapping[str, int], errors: Mapping[str, float]) -> list[str]:
    norms = {name: found.modules[name].norms[0] for name in places.at}
    largest = Scale(max((norm or 0.0 for norm in norms.values()), default=1.0), root=False)
    finite = [x for x in errors.values() if math.isfinite(x)]
    rank = Scale(max(ranks.values(), default=1), root=False)
    parts = [
        places.map("Error", "relative, rounding included", errors.get, _error, Scale(max(finite, default=1.0))),
        places.map("Rank", "", lambda name: ranks.get(name, 0), number, rank),
        places.map("‖ΔW‖", "of the result", norms.get, number, largest),
    ]
    kept = {i: {name: _kept(found.modules[name], i) for name in places.at} for i in range(1, len(found.names))}
    top = max((abs(x) for own in kept.values() for x in own.values() if x is not None), default=1.0)
    for i, own in kept.items():
        parts.append(places.map(f"Kept of {found.names[i]}", "", own.get, short, Scale(top, signed=True)))
    for side, what in (("overlap_out", "output"), ("overlap_in", "input")):
        for i in kept:
            title = f"Directions of {found.names[i]}"
            parts.append(places.map(title, f"{what} side", partial(_overlap, found, i, side), short, Scale()))
    return parts


def _overlap(found: Diff, i: int, side: str, name: str) -> Number:
    value: Number = getattr(found.modules[name].pairs[0, i], side)
    return value


def _error(x: Number) -> str:
    """As short as `short`, and with a digit where that has none."""
    return short(x) if x is None or x == 0 or x >= 0.01 else f"{x:.0e}".replace("e-0", "e-")


def _table(found: Diff, ranks: Mapping[str, int], errors: Mapping[str, float]) -> str:
    shown = range(1, min(len(found.names), COLUMNS + 1))
    rows = []
    for name, module in sorted(found.modules.items(), key=by_number):
        own = errors.get(name)
        kept = (share(_kept(module, i)) for i in shown)
        error = "-" if own is None else number(own)
        rows.append([name, "×".join(map(str, module.shape)), ranks.get(name, 0), error, number(module.norms[0]), *kept])
    return listing(["module", "out×in", "rank", "error", "‖ΔW‖", *(f"kept of {i}" for i in shown)], rows)
