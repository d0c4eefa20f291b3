"""`adapter verify`: whether a folded model is still what was written."""

from __future__ import annotations

from pathlib import Path

import click

from .output import print_json, size, transfer


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
def verify(out: Path, as_json: bool, quiet: bool) -> None:
    """Check the model in folder OUT, which `adapter merge --into` wrote, against its manifest.

    Every file must have the SHA-256 that adapterhub_lite.json says, none may be missing and none be there too.
    Hidden files are not looked at, and the manifest itself is believed.

    \b
    adapter verify model
    """
    from ..folding.verify import verify as check

    with transfer("verifying", quiet) as step:
        found = check(out, progress=step)
    if as_json:
        print_json({"out": str(out), **found.plain()})
    elif not quiet:
        click.echo(f"{out} is what was written: {found.files} files, {found.tensors} tensors, {size(found.nbytes)}")
