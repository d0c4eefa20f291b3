"""`adapter convert`: a folder of another dialect, written in ours."""

from __future__ import annotations

from pathlib import Path

import click

from ..adapter import load
from .output import print_json, size


@click.command()
@click.argument("ref")
@click.option("-o", "--out", metavar="OUT", required=True, type=click.Path(path_type=Path), help="The folder to write.")
@click.option("--force", is_flag=True, help="Replace the adapter at OUT.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
def convert(ref: str, out: Path, force: bool, as_json: bool, quiet: bool) -> None:
    """Write the adapter in folder REF in PEFT's layout.

    REF may be a folder of any format that a plugin reads: of AdapterHub's library `adapters` too.

    \b
    adapter convert sst2-adapterhub -o sst2
    """
    planned, _ = load(ref).write(out, force=force)
    method, sites = planned.contents.method.name, planned.contents.sites
    if as_json:
        print_json({"out": str(out), "method": method, "modules": sorted(sites), "bytes": planned.nbytes})
    elif not quiet:
        click.echo(f"wrote {out}: {method}, {len(sites)} modules, {planned.dtype}, {size(planned.nbytes)}")
