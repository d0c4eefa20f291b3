"""`adapter merge`: adapters into one adapter."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import options
from ..agreement import conflicts
from ..checkpoint import ITEMSIZE
from ..errors import NotMergeable, printable
from ..estimate import estimate
from .asked import Asked, numbers, of_recipe, of_words, refuse_beside_recipe
from .cuts import cut_options
from .grouped import merged_options
from .into import into_options, merge_into, refuse_alone, taken
from .output import print_json, progress, size, table
from .rule_options import WithRule
from .transferred import spoken, told

if TYPE_CHECKING:
    from ..format import SiteContents
    from ..per_site import Weight
    from ..plan import Plan
    from ..rule import Rule
    from ..save import RelativeError

ONE_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+|inf|nan)(e[-+]?\d+)?,?", re.I)
NUMBERS = re.compile(rf"{ONE_NUMBER.pattern[:-2]}(,{ONE_NUMBER.pattern[:-2]})*,?", re.I)
WORST = 10  # modules shown unless --verbose


class WithWeights(WithRule):
    """Lets `--weights` take the numbers that follow it: `0.7 0.3`, `0.7,0.3`, `1 -0.5`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, gather_numbers(args, "--weights", "-w"))


def gather_numbers(args: Sequence[str], *names: str) -> list[str]:
    """The arguments with the numbers after an option, which has these names, joined to it.

    >>> gather_numbers(["a", "b", "-w", "1", "-0.5", "-o", "out"], "--weights", "-w")
    ['a', 'b', '--weights=1,-0.5', '-o', 'out']
    """
    rest, gathered = list(args), list[str]()
    while rest:
        word = rest.pop(0)
        if word == "--":
            return [*gathered, word, *rest]
        option, is_, first = word.partition("=")
        if option in names and (not is_ or ONE_NUMBER.fullmatch(first)):
            numbers = [first] if is_ else []
            while rest and NUMBERS.fullmatch(rest[0]):
                numbers.append(rest.pop(0))
            word = f"{names[0]}={','.join(n.rstrip(',') for n in numbers)}" if numbers else word
        gathered.append(word)
    return gathered


def parse_weights(ctx: click.Context, param: click.Parameter, value: str | None) -> list[float] | None:
    if value is None:
        return None
    try:
        return [float(word) for word in re.split(r"[,\s]+", value.strip(", "))]
    except ValueError:
        raise click.BadParameter(f"{value!r} is not numbers; write 0.7 0.3 or 0.7,0.3") from None


@click.command(cls=WithWeights)
@click.argument("refs", metavar="REF...", nargs=-1)
@click.option(
    "-w",
    "--weights",
    metavar="W...",
    callback=parse_weights,
    help="One number each: 0.7 0.3 or 0.7,0.3. Default 1/N, or what the rule wants.",
)
@click.option(
    "--at", metavar="GLOB=W...", multiple=True, help="Other weights at the modules that GLOB names: first counts."
)
@click.option(
    "-o", "--out", metavar="OUT", required=False, type=click.Path(path_type=Path), help="The folder to write."
)
@click.option("--rule", metavar="NAME", help="How to merge, with options of its own: `adapter rules` lists them.")
@cut_options("Truncate to this rank at every site, optimally.")
@merged_options
@into_options
@click.option(
    "--recipe",
    "recipe_file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Take adapters, weights, rule and all else from this TOML file.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be written, from the headers, and stop.")
@click.option(
    "--report", metavar="FILE", type=click.Path(path_type=Path), help="Write a page on what was kept to FILE."
)
@click.option("--force", is_flag=True, help="Replace the adapter or model at OUT, and the page at FILE.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("-v", "--verbose", is_flag=True, help="Show every module.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
def merge(
    refs: tuple[str, ...],
    weights: list[float] | None,
    at: tuple[str, ...],
    out: Path | None,
    rule: str | None,
    rank: int | None,
    max_error: float | None,
    budget: int | None,
    dtype: str | None,
    keep: str | None,
    any_base: bool,
    recipe_file: Path | None,
    dry_run: bool,
    report: Path | None,
    force: bool,
    as_json: bool,
    verbose: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Merge adapters into one: ΔW = Σ wᵢ ΔWᵢ, exactly, or by another --rule.

    Ranks, alphas, target modules and dtypes may differ. The result is a LoRA of the summed ranks, or with
    --rank, --max-error or --budget the nearest one that is smaller; what was lost is printed and stored. Rules that
    give changes of full rank need one of these. With --rule NAME, --help shows the rule's options too.

    \b
    adapter merge sql french --weights 0.7 0.3 -o both
    adapter merge sql french --weights 1 -0.5 --rank 16 -o less-french
    adapter merge sql french --rule ties --density 0.3 --rank 32 -o voted

    With --into the sum is folded into the weights of a model, file by file, and OUT is a complete model:

    \b
    adapter merge sql french --weights 0.7 0.3 --into base-7b -o model

    With --recipe a TOML file says what to merge and how; only options of the run stand beside it, as -o and --force.
    """
    into = taken(given)  # what is left of `given` are the rule's options
    if out is None and not dry_run:
        raise click.UsageError("no output: give -o OUT, or --dry-run to see the plan")
    if recipe_file is not None:
        refuse_beside_recipe(click.get_current_context())
        asked = of_recipe(recipe_file, into)
    elif not refs:
        raise click.UsageError("no adapters: give at least one REF, or --recipe FILE")
    else:
        cuts = {"rank": rank, "max_error": max_error, "budget": budget}
        asked = of_words(refs, weights, rule, given, cuts, dtype, keep, any_base, at=at, into=into)
    merged, names, dtype, keep, any_base = asked.merged, asked.names, asked.dtype, asked.keep, asked.any_base
    said = None if quiet else asked.said
    if into["into"] is not None:
        if dtype is not None:
            raise click.UsageError("--dtype is for adapters: a model's weights keep theirs")
        if report is not None:
            raise click.UsageError("--report is about merged adapters; with --into, say -v to see every module")
        merge_into(
            merged, names, asked.weights, into, own=asked.by_module, out=out,
            keep=keep, any_base=any_base, inputs=asked.inputs, dry_run=dry_run, force=force,
            as_json=as_json, verbose=verbose, quiet=quiet,
        )  # fmt: skip
        if said:
            click.echo(said, err=True)
        return
    refuse_alone(into)
    if report is not None:
        _check_report(report, asked, out, dry_run)
    if dry_run:
        if len(against := conflicts(merged.source.contents, any_base=any_base, keep=keep)) > 1:
            raise NotMergeable(f"{len(against)} conflicts: {' · '.join(map(str, against))}")
        planned = merged.plan(dtype=dtype, any_base=any_base, keep=keep)
        if said:
            click.echo(said, err=True)
        if as_json:
            plain = {**_report(planned, names, asked.weights, asked.rule), **_foretold(planned)}
            print_json({"dry_run": True, **plain, **told(asked.inputs)})
        elif not quiet:
            click.echo(summary(planned, "would write", out))
            click.echo(_forecast(planned, verbose))
            spoken(asked.inputs)
            if out is not None and os.path.lexists(out) and not force:
                click.echo(f"but {out} exists: choose another -o or pass --force", err=True)
        return
    assert out is not None
    with _page(report, force) as file:
        with progress("merging", quiet) as step:
            planned, error = merged.write(out, dtype=dtype, force=force, any_base=any_base, keep=keep, progress=step)
        if file is not None:
            from . import merge_page

            with progress("reporting", quiet) as step:
                found, shown = merge_page.compared(out, asked.refs, numbers(asked.weights), step)
            file.write_text(merge_page.page(found, shown, planned, error, len(names)), encoding="utf-8")
    if said:
        click.echo(said, err=True)
    if as_json:
        print_json({"out": str(out), **_report(planned, names, asked.weights, asked.rule, error)})
    elif not quiet:
        click.echo(summary(planned, "wrote", out))
        click.echo(errors(planned, error, verbose))
        if report is not None:
            click.echo(f"wrote {printable(str(report))}")


def _check_report(report: Path, asked: Asked, out: Path | None, dry_run: bool) -> None:
    """Refuse what the page could not be made of, or could not be put at, before any work."""
    from . import merge_page

    if dry_run or out is None:
        raise click.UsageError("--report is about what was written, and --dry-run writes nothing")
    if out.absolute() in (report.absolute(), *report.absolute().parents):
        raise click.UsageError(f"--report {printable(str(report))} is in OUT; choose another place")
    if len(numbers(asked.weights)) < len(asked.weights):
        raise click.UsageError("--report needs one weight for each adapter, and the recipe gives them by module")
    if any(os.path.realpath(out) == os.path.realpath(ref) for ref in asked.refs):
        raise click.UsageError(f"{printable(str(out))} is merged and replaced, so nothing is left to report on")
    merge_page.check(asked.refs)


def _page(report: Path | None, force: bool) -> AbstractContextManager[Path | None]:
    """Where to write the page, if there is to be one; no other run imports what makes it."""
    if report is None:
        return nullcontext()
    from .page import staged_page

    return staged_page(report, force=force)


def _report(
    planned: Plan,
    names: Sequence[str],
    weights: Sequence[Weight],
    rule: Rule | None,
    error: RelativeError | None = None,
) -> dict[str, Any]:
    return {
        "adapters": [{"ref": ref, "weight": w} for ref, w in zip(names, weights, strict=True)],
        "rule": None if rule is None else {"name": rule.name, "options": options.plain(rule)},
        **report(planned, error),
    }


def report(planned: Plan, error: RelativeError | None = None) -> dict[str, Any]:
    """What was written, or would be, JSON-able."""
    shapes = {name: part.shape for name, part in planned.contents.sites.items()}
    modules: dict[str, dict[str, Any]] = {
        name: {"rank": planned.ranks.get(name), "shape": list(shape)} for name, shape in shapes.items()
    }
    found: dict[str, Any] = {
        "method": planned.contents.method.name,
        "base_model": planned.contents.base,
        "dtype": planned.dtype,
        "bytes": planned.nbytes,
        "kept": sorted(planned.contents.kept),
        "modules": modules,
    }
    if error is not None:
        plain = error.plain()
        found["error"], found["error_of"] = plain["overall"], error.of
        for name, own in plain["modules"].items():
            modules.setdefault(name, {"rank": 0})["error"] = own
    return found


def summary(planned: Plan, did: str, out: Path | None) -> str:
    """One line on what it is."""
    said = [planned.contents.method.name, *_span(planned), f"{len(planned.contents.sites)} modules", planned.dtype]
    lines = [f"{did} {out or 'an adapter'}: {', '.join(said)}, {size(planned.nbytes)}"]
    if planned.contents.kept:
        lines.append(f"kept as they are: {', '.join(map(printable, sorted(planned.contents.kept)))}")
    return "\n".join(lines)


def _foretold(planned: Plan) -> dict[str, Any]:
    error = 0.0 if planned.verbatim is not None else None
    return {"predicted_error": error, "estimate": estimate(planned).plain()}


def _forecast(planned: Plan, verbose: bool) -> str:
    """What a dry run tells besides: the error, if headers tell it, the effort, and the modules."""
    guess, exact = estimate(planned), planned.verbatim is not None
    lines = [
        "error: 0, the tensors are copied as they are" if exact else "error: measured when it is written",
        f"estimate, within a factor of a few: {guess.seconds:.0f} s, {size(guess.nbytes)} of memory",
    ]
    sites = planned.contents.sites
    rows = [
        (printable(name), "×".join(map(str, part.shape)), str(planned.ranks.get(name, "-")), size(part_bytes(part)))
        for name, part in (sites.items() if verbose else list(sites.items())[:WORST])
    ]
    lines.append(table(rows, ("module", "out×in", "rank", "size"), right=(1, 2, 3)))
    if len(rows) < len(sites):
        lines.append(f"… and {len(sites) - len(rows)} modules (-v shows all)")
    return "\n".join(lines)


def part_bytes(part: SiteContents) -> int:
    """Bytes of one module's tensors."""
    return sum(math.prod(t.shape) * ITEMSIZE[t.dtype] for t in part.tensors.values())


def _span(planned: Plan) -> list[str]:
    ranks = sorted(planned.ranks.values())
    if not ranks:  # one adapter, of a method that has none
        return []
    return [f"rank {ranks[0]}" if ranks[0] == ranks[-1] else f"ranks {ranks[0]} to {ranks[-1]}"]


def errors(planned: Plan, error: RelativeError, verbose: bool) -> str:
    """The error overall, and of the modules where it is largest."""
    if error.of == "delta":
        what = f"Frobenius norm of ΔW, with the rounding to {planned.dtype}"
    else:
        what = f"of the stored tensors, rounded to {planned.dtype}; what they do to the model may be off by more"
    lines = [f"relative error {error.overall:.3g} ({what})"]
    worst = sorted(error.modules.items(), key=lambda item: (-item[1], item[0]))
    if error.overall == 0:
        what = "factor has the input's bits" if planned.recast is None else "number is the input's"
        return f"exact: every stored {what}" if not verbose else lines[0]
    shown = sorted(worst) if verbose else worst[:WORST]
    without = 0 if planned.recast is None else "-"
    rows = [(printable(name), str(planned.ranks.get(name, without)), f"{own:.3g}") for name, own in shown]
    lines.append(table(rows, ("module", "rank", "error"), right=(1, 2)))
    if len(shown) < len(worst):
        lines.append(f"… and {len(worst) - len(shown)} modules with smaller errors (-v shows all)")
    return "\n".join(lines)
