"""`adapter resize`: one adapter, smaller."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .cuts import cut_options
from .grouped import dtype_option
from .merge import merge


@click.command()
@click.argument("ref")
@click.option("-o", "--out", metavar="OUT", type=click.Path(path_type=Path), help="The folder to write.")
@cut_options("At most this rank at every site.", "The")
@dtype_option("as it is")
@click.option("--dry-run", is_flag=True, help="Say what would be written, from the headers, and stop.")
@click.option("--force", is_flag=True, help="Replace the adapter at OUT.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("-v", "--verbose", is_flag=True, help="Show every module.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
@click.pass_context
def resize(ctx: click.Context, /, ref: str, **options: Any) -> None:
    """Write the nearest adapter to REF that is smaller; what was lost is printed and stored.

    A site whose rank is not above --rank keeps its rank: nothing is padded with zeros. It does what `adapter merge`
    does with one adapter.

    \b
    adapter resize sql --rank 4 -o sql-small
    adapter resize sql --dtype bfloat16 -o sql-half
    """
    if all(options[name] is None for name in ("rank", "max_error", "budget", "dtype")):
        raise click.UsageError("to what size? give --rank, --max-error, --budget or --dtype")
    ctx.invoke(merge, refs=(ref,), weights=None, **options)
