"""`adapter tune`: the weights of a merge, by a command that scores it."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..adapter import Adapter, load
from ..scoring import Command
from ..tuning import BOUNDS, L1, TRIALS, shown
from ..tuning import tune as search
from .asked import usage, whole
from .cuts import cut_options, refuse_two
from .grouped import merged_options
from .merge import errors, gather_numbers, parse_weights, report, summary
from .output import print_json, progress
from .rule_options import WithRule, rule_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..tuning import Tuned


class WithStart(WithRule):
    """Lets `--start` take the numbers that follow it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, gather_numbers(args, "--start"))


@click.command(cls=WithStart)
@click.argument("refs", metavar="REF...", nargs=-1, required=True)
@click.option(
    "--score", "command", metavar="COMMAND", required=True,
    help="Prints a number on its last line; {adapter} is a trial's folder. No shell: `sh -c` is one.",
)  # fmt: skip
@click.option("-o", "--out", metavar="OUT", required=True, type=click.Path(path_type=Path), help="The folder to write.")
@click.option("--trials", type=click.IntRange(min=1), default=TRIALS, show_default=True, help="At most so many.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the search.")
@click.option("--maximize/--minimize", default=True, help="Whether a high score is good, or a low one. Default: high.")
@click.option(
    "--l1", type=click.FloatRange(min=0), metavar="X",
    help=f"X times the mean magnitude of the weights counts against them. Default {L1}; 0 where they are shares.",
)  # fmt: skip
@click.option(
    "--bounds", nargs=2, type=float, metavar="LO HI",
    help=f"The weights lie between. Default {BOUNDS[0]} {BOUNDS[1]}; 0 1 where they are shares.",
)  # fmt: skip
@click.option(
    "--start", metavar="W...", callback=parse_weights, help="Where to begin. Default 1/N, or what the rule wants."
)
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), metavar="S", help="Seconds for one score.")
@click.option("--log", metavar="FILE", type=click.Path(path_type=Path), help="Write each trial to FILE, a JSON a line.")
@click.option("--resume", is_flag=True, help="Go on with the trials in --log.")
@click.option("--rule", metavar="NAME", help="How to merge, with options of its own: `adapter rules` lists them.")
@cut_options("Truncate each trial, and the result, to this rank at every site.")
@merged_options
@click.option("--force", is_flag=True, help="Replace the adapter at OUT.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("-v", "--verbose", is_flag=True, help="Show every module.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
def tune(
    refs: tuple[str, ...],
    command: str,
    out: Path,
    trials: int,
    seed: int,
    maximize: bool,
    l1: float | None,
    bounds: tuple[float, float] | None,
    start: list[float] | None,
    timeout: float | None,
    log: Path | None,
    resume: bool,
    rule: str | None,
    rank: int | None,
    max_error: float | None,
    budget: int | None,
    dtype: str | None,
    keep: str | None,
    any_base: bool,
    force: bool,
    as_json: bool,
    verbose: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Search the weights by which the merged adapters score best, and write that merge.

    A score is a command's: it gets the folder of a merge and prints a number. Weights are tried one after the other,
    by CMA-ES, without gradients. The first is what `adapter merge` does by default, so that by that score, with the
    penalty of --l1, no result is worse; on other data it may be.

    \b
    adapter tune sql french --score "python eval.py {adapter}" -o both
    adapter tune sql french --score "python loss.py {adapter}" --minimize --trials 60 --log trials.jsonl -o both
    """
    cuts: dict[str, Any] = {"rank": rank, "max_error": max_error, "budget": budget}
    refuse_two(cuts)
    if resume and log is None:
        raise click.UsageError("--resume goes on with a log: give --log FILE")
    if start is not None and len(start) != len(refs):
        raise click.UsageError(f"{len(start)} weights to start with for {len(refs)} adapters: give one for each")
    scored = usage(lambda: Command(command, timeout))
    chosen = usage(lambda: rule_of(rule, given))
    if chosen is not None and chosen.weighs == "equal":
        raise click.UsageError(f"rule {rule!r} finds its own weights: there is nothing to search")
    are_shares = chosen is not None and chosen.weighs == "average"
    if start is None and chosen is not None:
        start = [chosen.default_weight(len(refs))] * len(refs)
    from ..save import refuse_out

    refuse_out(out, force=force)
    stored: dict[str, Any] = {"dtype": dtype, "keep": keep, "any_base": any_base}

    def merged(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
        return whole(adapters, weights, chosen).cut(**cuts, dtype=dtype)

    with tempfile.TemporaryDirectory(prefix="adapter-tune-") as temporary, progress("trials", quiet) as step:
        folder = Path(temporary) / "trial"

        def score(candidate: Adapter) -> float:
            candidate.write(folder, **stored)
            try:
                return scored(folder)
            finally:
                shutil.rmtree(folder, ignore_errors=True)

        found = search(
            [load(ref) for ref in refs], score, merge=merged, trials=trials, seed=seed, maximize=maximize,
            l1=(0.0 if are_shares else L1) if l1 is None else l1,
            bounds=((0.0, 1.0) if are_shares else BOUNDS) if bounds is None else bounds,
            start=start, log=log, resume=resume, command=command, progress=step,
        )  # fmt: skip
    if not (as_json or quiet):
        click.echo(_said(found))  # before it is written, which may fail
    planned, error = found.write(out, force=force, **stored)
    if as_json:
        tried = [{"weights": list(trial.weights), "score": trial.score} for trial in found.trials]
        named = [{"ref": ref, "weight": w} for ref, w in zip(refs, found.weights, strict=True)]
        searched = {"score": found.score, "trials": tried, "settled": found.settled}
        print_json({"out": str(out), "adapters": named, **searched, **report(planned, error)})
    elif not quiet:
        click.echo(summary(planned, "wrote", out))
        click.echo(errors(planned, error, verbose))


def _said(found: Tuned) -> str:
    first = found.trials[0]
    many = f"{len(found.trials)} trials{', and settled' if found.settled else ''}"
    if found.best == first:
        return f"the best of {many}: where it began, {shown(first.weights)}, with a score of {first.score:g}"
    of_first = f"; {first.score:g} at first, with {shown(first.weights)}"
    return f"the best of {many}: {shown(found.weights)}, with a score of {found.score:g}{of_first}"
