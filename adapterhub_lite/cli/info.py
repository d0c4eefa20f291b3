"""`adapter info`: an adapter folder at a glance, from its headers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from .. import options
from ..description import describe, formula
from ..errors import printable
from ..source import OnHub, stored
from .output import print_json, size, table
from .transferred import line, told

if TYPE_CHECKING:
    from ..protocol import Method

LONGEST = 1000  # characters of one line


@click.command()
@click.argument("ref", metavar="REF")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("-v", "--verbose", is_flag=True, help="Show every module.")
def info(ref: str, as_json: bool, verbose: bool) -> None:
    """Show what the adapter REF is; its tensors are not read, and of one on the Hub they are not fetched."""
    adapter = stored(ref)
    report = {**describe(adapter), **told([adapter])}
    if as_json:
        print_json(report)
        return
    modules = report["modules"]
    ranks = sorted({m["rank"] for m in modules.values() if m["rank"] is not None})
    scales = sorted({m["scaling"] for m in modules.values() if m["scaling"] is not None})
    lines = [
        ("method", report["method"]),
        ("base model", report["base_model"] or "not named"),
        ("rank", _span(ranks)),
        ("scaling", _span(scales)),
        *([("options", said)] if (said := _options(adapter.own.method)) else []),
        ("modules", f"{len(modules)}: {', '.join(report['suffixes'])}"),
        ("parameters", f"{report['parameters']:,} ({', '.join(report['dtypes'])})"),
        ("size", size(report["bytes"])),
    ]
    if report["kept"]:
        lines.append(("kept values", ", ".join(report["kept"])))
    if report["error"] is not None:
        of = "of the stored tensors, " if report["error_of"] == "tensors" else ""
        lines.append(("error", f"{report['error']:.3g} (relative, {of}when it was made)"))
    if report["recipe"] is not None:
        lines.append(("made by", formula(report["recipe"])))
        lines += [("weights by", said)] if (said := _search(report["recipe"].get("search"))) else []
    if isinstance(adapter, OnHub):
        lines += [("commit", adapter.found.reference.commit), ("transferred", line([adapter.found]))]
    width = max(len(name) for name, _ in lines)
    click.echo("\n".join(f"{name.ljust(width)}  {_shown(value)}" for name, value in lines))
    if verbose:
        rows = [
            (printable(name), m["kind"], _shape(m["shape"]), _told(m["rank"]), _told(m["scaling"]))
            for name, m in modules.items()
        ]
        click.echo(table(rows, ("module", "layer", "out×in", "rank", "scaling"), right=(3, 4)))


def _options(method: Method) -> str:
    """What is not at its default; the rank has a line of its own."""
    changed = {name: value for name, value in options.changed(method).items() if name != "rank"}
    return ", ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in changed.items())


def _shape(shape: list[int]) -> str:
    return "×".join("?" if n == -1 else str(n) for n in shape)


def _span(values: list[Any]) -> str:
    if not values:
        return "-"
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"


def _told(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def _shown(value: Any) -> str:
    """Part of a stranger's file, on one line and not too long."""
    text = printable(str(value)[:LONGEST])
    return text if len(str(value)) <= LONGEST else f"{text} …"


def _search(found: Any) -> str:
    """How the weights were found, if they were searched for."""
    match found:
        case {"trials": int(trials), "score": float(score), "seed": int(seed), **more}:
            of = f" of {command}" if isinstance(command := more.get("command"), str) else ""
            return f"a search of {trials} trials with seed {seed}: score {score:g}{of}"
    return ""
