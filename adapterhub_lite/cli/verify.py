"""`adapter verify`: whether an output is what was written, and what its recipe gives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from ..errors import printable
from .output import print_json, size, transfer


class WithAdapters(click.Command):
    """Lets `--adapters` take all words that follow it, up to the next option."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, gather_adapters(args))


def gather_adapters(args: Sequence[str]) -> list[str]:
    """The arguments with `--adapters` before each of the words after it.

    >>> gather_adapters(["out", "--adapters", "a", "b", "--base", "base"])
    ['out', '--adapters', 'a', '--adapters', 'b', '--base', 'base']
    """
    rest, gathered = list(args), list[str]()
    while rest:
        word = rest.pop(0)
        if word == "--":
            return [*gathered, word, *rest]
        gathered.append(word)
        if word == "--adapters":
            gathered += [rest.pop(0)] if rest else []
            while rest and not rest[0].startswith("-"):
                gathered += [word, rest.pop(0)]
    return gathered


@click.command(cls=WithAdapters)
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--base", metavar="BASE", help="The model that was folded into.")
@click.option("--adapters", metavar="REF...", multiple=True, help="The adapters of the recipe, in any order.")
@click.option("--all", "everything", is_flag=True, help="Compute all again, not samples.")
@click.option("--seed", type=int, default=0, help="Which samples. Default 0.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
def verify(
    out: Path, base: str | None, adapters: tuple[str, ...], everything: bool, seed: int, as_json: bool, quiet: bool
) -> None:
    """Check OUT, a model that adapters were folded into, or a merged adapter.

    Of a model every file must have the digest that was noted when it was written. With --base and --adapters these
    must be what the recipe names, and samples of every tensor are computed again and compared bit by bit. Exit code 1
    and one line name the first file or tensor that differs.

    \b
    adapter verify model
    adapter verify model --base base-7b --adapters sql french
    """
    from ..folding.verify import BLOCKS
    from ..folding.verify import verify as verified

    with transfer("checking", quiet) as step:
        found = verified(out, base, adapters or None, blocks=None if everything else BLOCKS, seed=seed, progress=step)
    if as_json:
        print_json({"out": str(out), **found.plain()})
    elif not quiet:
        said = f"{found.files} files, {found.tensors} tensors, {size(found.nbytes)}"
        lines = [
            f"{printable(str(out))} is {'what was written' if found.kind == 'model' else 'a whole adapter'}: {said}"
        ]
        lines += [f"checked: {line}" for line in found.checked]
        lines += [f"not checked: {printable(line)}" for line in found.unchecked]
        click.echo("\n".join(lines))
