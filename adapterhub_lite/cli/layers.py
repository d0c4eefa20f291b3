"""Modules by layer and kind: their heat maps and spectra, and their order in a list."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from .page import Cell, Scale, grid, heatmap, keys, spectra

Number: TypeAlias = "float | None"
Curve: TypeAlias = "tuple[float, ...] | None"

PLOTS = 24  # spectra


@dataclass(frozen=True)
class Places:
    """Where modules are in a model: by layer and kind, read from the numbers in their names.

    >>> places = Places.of(["model.layers.0.attn.q", "model.layers.1.attn.q", "model.layers.1.mlp.up", "head"])
    >>> places.rows, places.columns, places.at["model.layers.1.mlp.up"]
    (['0', '1'], ['attn.q', 'mlp.up'], ('1', 'mlp.up'))
    >>> "head" in places.at
    False
    """

    rows: list[str]
    columns: list[str]
    at: Mapping[str, tuple[str, str]]

    @classmethod
    def of(cls, names: Sequence[str]) -> Places:
        found: dict[str, tuple[int, tuple[str, ...]]] = {}
        for name in names:
            words = name.split(".")
            n = next((i for i, word in enumerate(words) if word.isdecimal() and word.isascii()), None)
            if n is not None and n + 1 < len(words):
                found[name] = (int(words[n][:9]), (*words[:n], "*", *words[n + 1 :]))
        kinds = sorted({kind for _, kind in found.values()})
        # What all have in front of them tells nothing.
        shared = 0
        while kinds and all(len(k) > shared + 1 and k[: shared + 1] == kinds[0][: shared + 1] for k in kinds):
            shared += 1
        rows = [str(n) for n in sorted({n for n, _ in found.values()})]
        at = {name: (str(n), ".".join(kind[shared:])) for name, (n, kind) in found.items()}
        return cls(rows, [".".join(kind[shared:]) for kind in kinds], at)

    def map(
        self,
        title: str,
        note: str,
        value: Callable[[str], Number],
        shown: Callable[[Number], str],
        scale: Scale,
        strength: Callable[[float], float] = lambda value: value,
    ) -> str:
        """A heat map of one number of each module; `strength` is what its colour goes by."""
        cells = {}
        for name, place in self.at.items():
            own = value(name)
            cells[place] = Cell(None if own is None else strength(own), shown(own), f"{name}: {shown(own)}")
        return heatmap(title, note, self.rows, self.columns, cells, scale)

    def spectra(self, names: Sequence[str], modules: Mapping[str, Sequence[Curve]]) -> list[str]:
        """A plot for each kind of module; `modules` have a spectrum for each of the `names`, or None."""
        groups: dict[str, list[Sequence[Curve]]] = {}
        for name, curves in modules.items():
            groups.setdefault(self.at[name][1] if name in self.at else name, []).append(curves)
        plots = []
        for kind, every in groups.items():
            curves_of = [[own for curves in every if (own := curves[i])] for i in range(len(names))]
            plots.append(spectra(f"{kind} ({len(every)})" if len(every) > 1 else kind, curves_of))
        plots = [plot for plot in plots if plot]
        parts = [
            '<p class="soft">Singular values of ΔW. Line: the median over the layers of a kind; band: their range.</p>',
            keys(names),
            grid(plots[:PLOTS], "small"),
        ]
        if len(plots) > PLOTS:
            parts.append(f'<p class="soft">The first {PLOTS} of {len(plots)} kinds.</p>')
        return parts


def by_number(item: tuple[str, object]) -> list[tuple[int, str]]:
    """A name's place in a list: layer 10 comes after layer 9."""
    return [(int(word[:9]), "") if word.isdecimal() else (-1, word) for word in item[0].split(".")]


def short(x: Number) -> str:
    """To two places, as .07: cells are narrow."""
    shown = "-" if x is None else f"{x:.2f}".replace("0.", ".", 1) if abs(x) < 1 else f"{x:.2f}"
    return "0" if shown in (".00", "-.00") else shown
