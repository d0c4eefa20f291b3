"""`adapter reproduce`: a merge done again, and compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..errors import printable
from .output import print_json, progress

SHOWN = 20  # differences, unless --json


class WithAdapters(click.Command):
    """Lets `--adapters` take all references that follow it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        gathered, inside = list[str](), False
        for word in args:
            if word.startswith("-"):
                inside = word == "--adapters"
                gathered += [] if inside else [word]
            else:
                gathered += ["--adapters", word] if inside else [word]
        return super().parse_args(ctx, gathered)


@click.command(cls=WithAdapters)
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--adapters", metavar="REF...", multiple=True, help="Look for the inputs among these.")
@click.option(
    "--in", "within", metavar="DIR", type=click.Path(path_type=Path),
    help="Look in this folder, two levels deep. Default: the one OUT is in.",
)  # fmt: skip
@click.option("--base", metavar="BASE", type=click.Path(path_type=Path), help="The model that was folded into.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
@click.pass_context
def reproduce(
    ctx: click.Context,
    out: Path,
    adapters: tuple[str, ...],
    within: Path | None,
    base: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Do the merge again that made OUT, an adapter or a model, and compare bit by bit.

    OUT carries its recipe. Its inputs are found by their SHA-256, wherever they are now and whatever they are called.
    Exit code 1 if anything differs.

    \b
    adapter reproduce both
    adapter reproduce both --adapters ~/old/sql ~/old/french
    adapter reproduce model --in adapters --base base-7b
    """
    from ..reproduction import reproduce as again

    with progress("merging again", quiet) as step:
        found = again(out, adapters=adapters, within=within, base=base, progress=step)
    for warning in found.warnings:
        click.echo(f"warning: {warning}", err=True)
    if as_json:
        rows: list[dict[str, Any]] = [{"file": d.file, "tensor": d.tensor, "what": d.what} for d in found.differences]
        print_json({"out": str(out), "same": not rows, "differences": rows, "warnings": list(found.warnings)})
    elif not quiet:
        for d in found.differences[:SHOWN]:
            click.echo(": ".join(map(printable, (d.file, *([d.tensor] if d.tensor else []), d.what))))
        if len(found.differences) > SHOWN:
            click.echo(f"… and {len(found.differences) - SHOWN} more (--json shows all)")
        if not found.differences:
            click.echo(f"reproduced {out}: every bit is the same")
    if found.differences:
        many = "1 difference" if len(found.differences) == 1 else f"{len(found.differences)} differences"
        click.echo(f"adapter: {printable(str(out))}: {many} from what its recipe makes", err=True)
        ctx.exit(1)
