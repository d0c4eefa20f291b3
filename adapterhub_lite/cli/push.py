"""`adapter push`: a folder to a model on the Hub."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import printable
from .output import print_json, size, table, transfer

if TYPE_CHECKING:
    from ..hub.push import Pushed

SHOWN = 10  # names in one line


@click.command()
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@click.argument("repo", metavar="OWNER/NAME")
@click.option("--private", is_flag=True, help="Make a private model; refused if there is a public one.")
@click.option("--revision", metavar="BRANCH", help="The branch to commit to, made if there is none. Default: main.")
@click.option("--message", "-m", metavar="TEXT", help="The message of the commit.")
@click.option("--pr", is_flag=True, help="Open a pull request instead of committing to the branch.")
@click.option("--license", metavar="NAME", help="Licence for the card, as the Hub spells it: apache-2.0, mit, ...")
@click.option("--dataset", "datasets", metavar="OWNER/NAME", multiple=True, help="Data for the card; may be repeated.")
@click.option("--allow-leaks", is_flag=True, help="Publish paths, names, tokens and addresses that were found.")
@click.option("--dry-run", is_flag=True, help="Show files, sizes, card and what was found; ask nobody, send nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
def push(
    out: Path,
    repo: str,
    private: bool,
    revision: str | None,
    message: str | None,
    pr: bool,
    license: str | None,
    datasets: tuple[str, ...],
    allow_leaks: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Publish OUT, an adapter, a composition or a folded model, as OWNER/NAME on the Hub.

    OUT is read strictly first, and searched for what should not be published. All files are one commit, on top of what
    was there: if somebody else commits meanwhile, nothing is. The card, README.md, keeps what somebody wrote into it;
    OUT is not changed. Token, endpoint and proxies are those of huggingface_hub ('hf auth login').

    \b
    adapter push both me/both --private
    adapter push both me/both --dry-run
    adapter push model me/model --revision v2 --license apache-2.0
    """
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    from ..hub.push import push as pushed

    # The client's bars: those of Xet are drawn into files and pipes, too.
    silent = (quiet or not sys.stderr.isatty()) and not are_progress_bars_disabled()
    if silent:
        disable_progress_bars()
    try:
        with transfer("checking", quiet) as step:
            done = pushed(
                out,
                repo,
                revision=revision,
                message=message,
                private=private,
                pr=pr,
                dry_run=dry_run,
                allow_leaks=allow_leaks,
                license=license,
                datasets=datasets,
                progress=step,
            )
    finally:
        if silent:
            enable_progress_bars()
    if as_json:
        print_json({"out": str(out), "dry_run": dry_run, **done.plain()})
    elif not quiet:
        click.echo("\n".join(_planned(out, done, allow_leaks) if dry_run else _said(out, done)))


def _said(out: Path, done: Pushed) -> list[str]:
    where = done.repo if done.revision == "main" else f"{done.repo}@{done.revision}"
    if not done.sent:
        return [f"{where} has every file of {printable(str(out))} already: nothing to commit", *_beside(done)]
    commit = (done.commit or "")[:7]
    many = "1 file" if len(done.sent) == 1 else f"{len(done.sent)} files"
    what = f"pull request {done.pull_request}" if done.pull_request else f"commit {commit}"
    return [
        f"pushed {printable(str(out))} to {where}: {many}, {size(sum(done.files[n] for n in done.sent))}, {what}",
        *_beside(done),
        *([] if done.pull_request else [str(done.url)]),
    ]


def _beside(done: Pushed) -> list[str]:
    lines = [f"not published: {_names(done.left)}"] if done.left else []
    lines += (
        ["the text of the card that was there is replaced by that of OUT's README.md"] if done.card_replaced else []
    )
    return [*lines, *([f"also there, from before: {_names(done.others)}"] if done.others else [])]


def _planned(out: Path, done: Pushed, allow_leaks: bool) -> list[str]:
    rows = [(printable(name), size(nbytes)) for name, nbytes in sorted(done.files.items())]
    lines = [
        f"would push {printable(str(out))}, {done.kind}, to {done.repo}@{done.revision}: {size(done.nbytes)}",
        table(rows, ("file", "size"), right=(1,)),
        *_beside(done),
    ]
    if done.leaks:
        lines.append("found, and published too:" if allow_leaks else "refused without --allow-leaks:")
        lines += [f"  {printable(str(leak))}" for leak in done.leaks]
    return [*lines, "", "README.md:", *("  " + printable(line) for line in done.card.splitlines())]


def _names(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(printable, names[:SHOWN])) + more
