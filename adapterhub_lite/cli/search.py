"""`adapter search`: adapters on the Hub for a base model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ..errors import printable
from .output import print_json, progress, size, table

if TYPE_CHECKING:
    from ..hub.search import Hit

LONGEST = 60  # characters of why one was not understood


@click.command()
@click.option("--base", metavar="OWNER/MODEL", required=True, help="The base model, by its name on the Hub.")
@click.option("--method", metavar="NAME", help="Only adapters of this method: 'adapter methods' lists them.")
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True, help="At most so many.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print names only.")
def search(base: str, method: str | None, limit: int, as_json: bool, quiet: bool) -> None:
    """List the adapters on the Hub that name OWNER/MODEL as their base, the most fetched first.

    Method, ranks and size are those of the headers, which are all that is fetched. Adapters that cannot be read are
    listed with the reason.

    \b
    adapter search --base my-org/base-7b
    adapter search --base my-org/base-7b --method lora --limit 5 --json
    """
    from ..hub.search import search as searched

    with progress("reading headers", quiet) as step:
        found = searched(base, method=method, limit=limit, progress=step)
    if as_json:
        told = {"base": base, "adapters": [hit.plain() for hit in found.hits], "looked_at": found.looked_at}
        print_json({**told, "requests": found.transfer.requests, "transferred": found.transfer.nbytes})
        return
    if quiet:
        click.echo("".join(f"{hit.repo}\n" for hit in found.hits), nl=False)
        return
    if not found.hits:
        click.echo(f"no {method or 'adapter'} for {base} on the Hub, of {found.looked_at} that name it as their base")
        return
    head = ("adapter", "downloads", "method", "rank", "size", "modified")
    click.echo(table([_row(hit) for hit in found.hits], head, right=(1, 3, 4)))
    took = f"{size(found.transfer.nbytes)} in {found.transfer.requests} requests"
    click.echo(f"read: the headers of {found.looked_at} models, {took}")


def _row(hit: Hit) -> tuple[str, ...]:
    ranks = f"{hit.ranks[0]}" if len(hit.ranks) == 1 else f"{hit.ranks[0]}-{hit.ranks[-1]}" if hit.ranks else "-"
    method = hit.method or f"? ({printable(str(hit.problem))[:LONGEST]})"
    nbytes = "-" if hit.nbytes is None else size(hit.nbytes)
    return hit.repo, "-" if hit.downloads is None else f"{hit.downloads:,}", method, ranks, nbytes, hit.modified or "-"
