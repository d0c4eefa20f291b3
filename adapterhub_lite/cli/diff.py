"""`adapter diff`: how like adapters are, in the weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..adapter import load
from ..advice import ELSEWHERE
from ..errors import printable
from .layers import by_number
from .output import number, print_json, progress, share, table
from .page import staged_page

if TYPE_CHECKING:
    from ..compare import Diff, Likeness, Module, Pair

SHOWN = 10  # modules and pairs unless --verbose
FEW = 4  # adapters whose norms have columns of their own


@click.command()
@click.argument("refs", metavar="REF REF...", nargs=-1, required=True)
@click.option("--signs", is_flag=True, help="Also count the entries with opposite signs: exact, and slower.")
@click.option("--html", metavar="FILE", type=click.Path(path_type=Path), help="Write a page with everything to FILE.")
@click.option("--any-base", is_flag=True, help="Compare although the adapters name different base models.")
@click.option("--force", is_flag=True, help="Replace the page at FILE.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("-v", "--verbose", is_flag=True, help="Show every module and every pair.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
def diff(
    refs: tuple[str, ...],
    signs: bool,
    html: Path | None,
    any_base: bool,
    force: bool,
    as_json: bool,
    verbose: bool,
    quiet: bool,
) -> None:
    """Compare adapters: norms, cosine, distance, overlap of their subspaces, spectra.

    Ranks, alphas, target modules and dtypes may differ. All but the signs is computed from the factors, in float64.
    The overlap is the mean cos² of the principal angles between the spaces that ΔW writes to (out) and reads
    from (in); beside it stands what random spaces of these ranks would have.

    \b
    adapter diff sql french
    adapter diff sql french german --signs --html diff.html
    """
    if len(refs) < 2:
        raise click.UsageError("one adapter has nothing to be compared with: give two or more")
    adapters = [load(ref) for ref in refs]
    with staged_page(html, force=force) as file:  # first: a refused FILE costs no work
        from ..compare import diff as compare

        with progress("comparing", quiet) as step:
            found = compare(*adapters, names=refs, signs=signs, any_base=any_base, progress=step)
        if file is not None:
            from .diff_page import page

            file.write_text(page(found), encoding="utf-8")
    if as_json:
        print_json(found.plain())
    elif not quiet:
        click.echo(_text(found, verbose))
        if html is not None:
            click.echo(f"wrote {printable(str(html))}")


def _text(found: Diff, verbose: bool) -> str:
    names = [printable(name) for name in found.names]
    parts = [_adapters(found, names)]
    if len(names) == 2:
        parts.append(_one_pair(found.pairs[0, 1]))
    else:
        parts += [_matrix(found, names), _pairs(found, verbose)]
    if verbose or not all(pair.same for pair in found.pairs.values()):
        parts.append(_modules(found, verbose))
    return "\n\n".join(parts)


def _adapters(found: Diff, names: Sequence[str]) -> str:
    rows = []
    for i, name in enumerate(names):
        ranks = sorted({len(s) for m in found.modules.values() if (s := m.spectra[i]) is not None})
        span = "-" if not ranks else f"{ranks[0]}" if ranks[0] == ranks[-1] else f"{ranks[0]} to {ranks[-1]}"
        count = sum(module.norms[i] is not None for module in found.modules.values())
        rows.append((str(i + 1), name, number(found.norms[i]), span, str(count)))
    lines = [table(rows, ("", "adapter", "‖ΔW‖", "rank", "modules"), right=(2, 3, 4))]
    for i, norm in enumerate(found.bias_norms):
        if norm is not None:
            lines.append(f"{names[i]} changes biases too (norm {norm:.4g}): they count in none of the numbers below")
    for i, kept in enumerate(found.kept):
        if kept:
            what = ", ".join(printable(key) for key in kept[:3]) + (f" and {len(kept) - 3} more" if kept[3:] else "")
            lines.append(f"{names[i]} has whole values that are not compared: {what}")
    return "\n".join(lines)


def _one_pair(pair: Pair) -> str:
    rows = [
        ("cosine", share(pair.cosine)),
        ("distance", f"{number(pair.distance)} of ‖{printable(pair.a)}‖"),
        ("overlap out", f"{share(pair.overlap_out)} (by chance {share(pair.chance_out)})"),
        ("overlap in", f"{share(pair.overlap_in)} (by chance {share(pair.chance_in)})"),
        *([] if pair.conflicts is None else [("conflicts", f"{100 * pair.conflicts:.1f} % of signs")]),
        ("modules", shared(pair)),
        ("advice", printable(pair.advice)),
        *([] if pair.same else [("", f"({ELSEWHERE})")]),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)


def shared(pair: Pair) -> str:
    said = [f"{pair.both} in both"]
    for only, name in ((pair.only_a, pair.a), (pair.only_b, pair.b)):
        if only:
            said.append(f"{len(only)} in {printable(name)} only")
    if pair.identical:
        said.append(f"{pair.identical} with the same bits")
    if pair.equal > pair.identical:
        said.append(f"{pair.equal - pair.identical} equal in numbers")
    return ", ".join(said)


def _matrix(found: Diff, names: Sequence[str]) -> str:
    """Cosines above the diagonal, overlaps below: the mean of the two sides."""
    n, rows = len(names), []
    for i in range(n):
        cells = [
            "·" if i == j else share(found.pairs[i, j].cosine if i < j else overlap(found.pairs[j, i]))
            for j in range(n)
        ]
        rows.append((f"{i + 1} {names[i]}", *cells))
    head = ("cosine \\ overlap", *(str(i + 1) for i in range(n)))
    return table(rows, head, right=range(1, n + 1))


def _pairs(found: Diff, verbose: bool) -> str:
    every = sorted(found.pairs.items(), key=lambda item: (-abs(item[1].cosine or 0.0), item[0]))
    shown = found.pairs.items() if verbose or len(every) <= SHOWN else every[:SHOWN]
    lines = [f"{i + 1}, {j + 1}: {printable(pair.advice)} ({shared(pair)})" for (i, j), pair in shown]
    if len(lines) < len(every):
        lines.append(f"… and {len(every) - len(lines)} pairs with smaller cosines (-v shows all)")
    return "\n".join([*lines, ELSEWHERE])


def _modules(found: Diff, verbose: bool) -> str:
    many, signs = len(found.names) > 2, any(pair.conflicts is not None for pair in found.pairs.values())
    every = sorted(found.modules.items(), key=lambda item: (*_by_gap(item[1]), by_number(item)))
    shown = sorted(every, key=by_number) if verbose else every[:SHOWN]
    norms = [f"‖{i + 1}‖" for i in range(len(found.names))] if len(found.names) <= FEW else []
    rows = []
    for name, module in shown:
        (i, j), pair = most_different(module)
        between = [f"{i + 1}, {j + 1}"] if many else []
        rows.append(
            (printable(name), *(number(n) for n in module.norms[: len(norms)]), *between, *_numbers(pair, signs))
        )
    head = ("module", *norms, *(["between"] if many else []), *("cosine", "distance", "out", "in"))
    if signs:
        head = (*head, "conflicts")
    lines = [table(rows, head, right=range(1, len(head)))]
    if len(shown) < len(every):
        lines.append(f"… and {len(every) - len(shown)} modules that differ less (-v shows all)")
    return "\n".join(lines)


def _numbers(pair: Likeness, signs: bool) -> list[str]:
    shown = [share(pair.cosine), number(pair.distance), share(pair.overlap_out), share(pair.overlap_in)]
    if signs:
        shown.append("-" if pair.conflicts is None else f"{100 * pair.conflicts:.1f} %")
    return shown


def most_different(module: Module) -> tuple[tuple[int, int], Likeness]:
    """The two adapters that differ most, of those that both have the module, if there are two."""
    there = {
        key: pair for key, pair in module.pairs.items() if None not in (module.norms[key[0]], module.norms[key[1]])
    }
    return max((there or module.pairs).items(), key=lambda item: item[1].gap)


def _by_gap(module: Module) -> tuple[bool, float]:
    """Those that only one has come last: that much is said elsewhere."""
    return sum(norm is not None for norm in module.norms) < 2, -most_different(module)[1].gap


def overlap(pair: Likeness) -> float | None:
    """The mean of the two sides."""
    if pair.overlap_out is None or pair.overlap_in is None:
        return None
    return (pair.overlap_out + pair.overlap_in) / 2
