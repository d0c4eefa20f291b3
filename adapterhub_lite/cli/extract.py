"""`adapter extract`: a LoRA from a full fine-tune."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import printable
from .cuts import cut_options, refuse_two
from .grouped import dtype_option
from .merge import WORST, errors, report, summary
from .output import print_json, progress, table

if TYPE_CHECKING:
    from ..difference import Difference, Left
    from ..extraction import Extracted
    from ..plan import Plan

SEVERAL = "Names of layers, their ends, or globs, with commas between them or the option repeated."


def parse_names(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> list[str]:
    return [word for part in value for word in part.split(",") if word]


@click.command()
@click.argument("base", metavar="BASE")
@click.argument("tuned", metavar="TUNED")
@click.option("-o", "--out", metavar="OUT", type=click.Path(path_type=Path), help="The folder to write.")
@cut_options("This rank at every layer. Default: 16.", "The")
@click.option("--targets", multiple=True, callback=parse_names, help=f"Only these layers. {SEVERAL}")
@click.option("--exclude", multiple=True, callback=parse_names, help=f"Not these. {SEVERAL}")
@dtype_option("the base's")
@click.option("--dry-run", is_flag=True, help="Compare the models, say what would be written, and stop.")
@click.option("--force", is_flag=True, help="Replace the adapter at OUT.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("-v", "--verbose", is_flag=True, help="Show every module.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
def extract(
    base: str,
    tuned: str,
    out: Path | None,
    rank: int | None,
    max_error: float | None,
    budget: int | None,
    targets: list[str],
    exclude: list[str],
    dtype: str | None,
    dry_run: bool,
    force: bool,
    as_json: bool,
    verbose: bool,
    quiet: bool,
) -> None:
    """Write the LoRA that the model folder TUNED is of the model folder BASE.

    All linear layers and convolutions whose weights differ get one, the model's output and embeddings only when
    --targets names them. What changed and cannot be in it, or is not, is listed.

    \b
    adapter extract base-7b my-finetune --rank 32 -o my-lora
    adapter extract base-7b my-finetune --max-error 0.2 --targets q_proj,v_proj -o my-lora
    """
    if out is None and not dry_run:
        raise click.UsageError("no output: give -o OUT, or --dry-run to see the plan")
    ask: dict[str, Any] = {"rank": rank, "max_error": max_error, "budget": budget}
    refuse_two(ask)
    from .. import extraction

    spoken = rank is max_error is budget is None and not quiet
    start = time.monotonic()
    with progress("comparing", quiet) as step:
        found = extraction.difference(base, tuned, targets=targets, exclude=exclude, progress=step)
    if spoken:
        click.echo(f"rank: {extraction.RANK} (say --rank, --max-error or --budget to choose)", err=True)
    if dry_run:
        planned = extraction.planned(found, dtype=dtype, **ask)
        if as_json:
            print_json({"dry_run": True, **_report(found, planned)})
        elif not quiet:
            click.echo(summary(planned, "would write", out))
            click.echo(_left(found.left, verbose), nl=bool(found.left))
            if out is not None and os.path.lexists(out) and not force:
                click.echo(f"but {out} exists: choose another -o or pass --force", err=True)
        return
    assert out is not None
    with progress("extracting", quiet) as step:
        done = extraction.write(found, out, dtype=dtype, force=force, progress=step, **ask)
    seconds = time.monotonic() - start
    if as_json:
        print_json({"out": str(out), "seconds": round(seconds, 1), **_report(found, done.plan, done)})
    elif not quiet:
        click.echo(f"{summary(done.plan, 'wrote', out)}, in {seconds:.1f} s")
        click.echo(errors(done.plan, done.error, verbose))
        click.echo(f"certain: no adapter of these ranks has an error below {done.best:.3g}")
        click.echo(_left(found.left, verbose), nl=bool(found.left))


def _report(found: Difference, planned: Plan, done: Extracted | None = None) -> dict[str, Any]:
    plain = report(planned, None if done is None else done.error)
    if done is not None:
        plain["error_at_least"] = done.best
        for name, own in found.certificates.items():
            best = math.sqrt(own.best / own.size) if own.size else 0.0
            plain["modules"][name] |= {"error_at_least": float(f"{best:.6g}"), "passes": own.passes}
    left = {name: own.plain() for name, own in found.left.items()}
    return {"base": found.base.folder.name, "tuned": found.tuned.folder.name, "left": left, **plain}


def _left(left: Mapping[str, Left], verbose: bool) -> str:
    """What changed and is not in the adapter, the largest changes first."""
    if not left:
        return ""
    ordered = sorted(left.items(), key=lambda item: (-(math.inf if item[1].norm is None else item[1].norm), item[0]))
    shown = ordered if verbose else ordered[:WORST]
    rows = [(printable(name), _told(own.norm), _told(own.relative), own.why) for name, own in shown]
    lines = [f"changed and not in the adapter: {len(left)} tensors"]
    lines.append(table(rows, ("tensor", "‖change‖", "relative", "why"), right=(1, 2)))
    if len(shown) < len(ordered):
        lines.append(f"… and {len(ordered) - len(shown)} smaller ones (-v shows all)")
    return "\n".join(lines)


def _told(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
