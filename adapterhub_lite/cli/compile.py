"""`adapter compile`: a composition into one adapter that every server takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .. import per_site
from .cuts import cut_options, refuse_two
from .grouped import dtype_option
from .merge import errors, report, summary
from .output import print_json, progress


@click.command()
@click.argument("ref", metavar="COMPOSITION", type=click.Path(path_type=Path))
@click.option("-o", "--out", metavar="OUT", required=True, type=click.Path(path_type=Path), help="The folder to write.")
@cut_options("Truncate to this rank at every site, optimally.")
@dtype_option("the widest input's")
@click.option("--force", is_flag=True, help="Replace the adapter at OUT.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("-v", "--verbose", is_flag=True, help="Show every module.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
def compile(
    ref: Path,
    out: Path,
    rank: int | None,
    max_error: float | None,
    budget: int | None,
    dtype: str | None,
    force: bool,
    as_json: bool,
    verbose: bool,
    quiet: bool,
) -> None:
    """Write the composition in folder COMPOSITION as one plain LoRA.

    COMPOSITION is a folder by adapters.save_composition(). Sums, means and chains of weight changes are one weight
    change, and the result is exact, or with --rank, --max-error or --budget the nearest that is smaller. So are routers
    whose weights differ from layer to layer and not by the input, such as cat. One adapter alone, with weight 1, stays
    what it is. Other gates, and methods that are no weight change by themselves, are refused by name.

    \b
    adapter compile both -o served --rank 16
    """
    ask: dict[str, Any] = {"rank": rank, "max_error": max_error, "budget": budget}
    refuse_two(ask)
    from ..live.folder import lower

    lowered, weights = lower(ref)
    cut = lowered.cut(**ask, dtype=dtype)
    with progress("compiling", quiet) as step:
        planned, error = cut.write(out, dtype=dtype, force=force, progress=step)
    if as_json:
        named = [{"ref": name, "weight": per_site.plain(weight)} for name, weight in weights.items()]
        print_json({"out": str(out), "adapters": named, **report(planned, error)})
    elif not quiet:
        click.echo(summary(planned, "wrote", out))
        click.echo(errors(planned, error, verbose))
