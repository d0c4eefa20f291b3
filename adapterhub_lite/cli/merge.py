"""`adapter merge`: adapters into one adapter."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from .. import adapter, options
from ..adapter import load
from ..errors import ConfigError, nearest, printable
from .into import into_options, merge_into, refuse_alone, taken
from .output import Size, print_json, progress, size, table
from .rule_options import WithRule, rule_of

if TYPE_CHECKING:
    from ..adapter import Adapter
    from ..per_site import Weight
    from ..plan import Plan
    from ..rule import Rule
    from ..save import RelativeError

T = TypeVar("T")
ONE_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+|inf|nan)(e[-+]?\d+)?,?", re.I)
NUMBERS = re.compile(rf"{ONE_NUMBER.pattern[:-2]}(,{ONE_NUMBER.pattern[:-2]})*,?", re.I)
DTYPES = {
    "float32": "F32", "fp32": "F32", "float64": "F64", "fp64": "F64",
    "float16": "F16", "fp16": "F16", "bfloat16": "BF16", "bf16": "BF16",
}  # fmt: skip
DEFAULT_WEIGHTS = "weights: {} each (say --weights to choose)"
WORST = 10  # modules shown unless --verbose


class WithWeights(WithRule):
    """Lets `--weights` take the numbers that follow it: `0.7 0.3`, `0.7,0.3`, `1 -0.5`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, gather_weights(args))


def gather_weights(args: Sequence[str]) -> list[str]:
    """The arguments with the numbers after `--weights` joined to it.

    >>> gather_weights(["a", "b", "--weights", "1", "-0.5", "-o", "out"])
    ['a', 'b', '--weights=1,-0.5', '-o', 'out']
    """
    rest, gathered = list(args), list[str]()
    while rest:
        word = rest.pop(0)
        if word == "--":
            return [*gathered, word, *rest]
        option, is_, first = word.partition("=")
        if option in ("--weights", "-w") and (not is_ or ONE_NUMBER.fullmatch(first)):
            numbers = [first] if is_ else []
            while rest and NUMBERS.fullmatch(rest[0]):
                numbers.append(rest.pop(0))
            word = f"--weights={','.join(n.rstrip(',') for n in numbers)}" if numbers else word
        gathered.append(word)
    return gathered


def parse_weights(ctx: click.Context, param: click.Parameter, value: str | None) -> list[float] | None:
    if value is None:
        return None
    try:
        return [float(word) for word in re.split(r"[,\s]+", value.strip(", "))]
    except ValueError:
        raise click.BadParameter(f"{value!r} is not numbers; write 0.7 0.3 or 0.7,0.3") from None


def parse_dtype(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is None:
        return None
    if value.lower() not in DTYPES:
        raise click.BadParameter(f"{value!r} is not a dtype adapters are stored in; {nearest(value, DTYPES)}")
    return DTYPES[value.lower()]


@click.command(cls=WithWeights)
@click.argument("refs", metavar="REF...", nargs=-1, required=True)
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
@click.option("--rank", type=click.IntRange(min=1), help="Truncate to this rank at every site, optimally.")
@click.option(
    "--max-error",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Truncate to the smallest adapter with at most this relative error, rounding included.",
)
@click.option("--budget", type=Size(), help="Truncate to the nearest adapter of at most this size, say 80MB.")
@click.option(
    "--dtype", callback=parse_dtype, help="float32, float16, bfloat16 or float64. Default: the widest input's."
)
@click.option("--keep", metavar="REF", help="Where they differ, take heads, biases and token rows from REF, or 'none'.")
@click.option("--any-base", is_flag=True, help="Merge although the adapters name different base models.")
@into_options
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
    """
    into = taken(given)  # what is left of `given` are the rule's options
    if out is None and not dry_run:
        raise click.UsageError("no output: give -o OUT, or --dry-run to see the plan")
    if sum(x is not None for x in (rank, max_error, budget)) > 1:
        raise click.UsageError("--rank, --max-error and --budget exclude each other")
    if weights is not None and len(weights) != len(refs):
        raise click.UsageError(f"{len(weights)} weights for {len(refs)} adapters: give one for each")
    chosen = _usage(lambda: rule_of(rule, given))
    spoken = weights is None and len(refs) > 1 and not quiet and (chosen is None or chosen.weighs != "equal")
    weights = weights or [chosen.default_weight(len(refs)) if chosen else 1 / len(refs)] * len(refs)
    said = DEFAULT_WEIGHTS.format("1" if weights[0] == 1 else f"1/{len(refs)}")
    if keep is not None and keep not in (*refs, "none"):
        raise click.UsageError(f"--keep {keep!r} is none of the adapters; {nearest(keep, refs)}")
    loaded = [load(ref) for ref in refs]
    own = by_module(at, weights)
    folds = into["into"] is not None and chosen is None and rank is max_error is budget is None  # by each one's merge
    merged = _whole(loaded, weights if folds else own, chosen).cut(
        rank=rank, max_error=max_error, budget=budget, dtype=dtype
    )
    if into["into"] is not None:
        if dtype is not None:
            raise click.UsageError("--dtype is for adapters: a model's weights keep theirs")
        if report is not None:
            raise click.UsageError("--report is about merged adapters; with --into, say -v to see every module")
        merge_into(
            merged, refs, weights, into, own=own if folds else None, out=out,
            keep=keep, any_base=any_base, dry_run=dry_run, force=force,
            as_json=as_json, verbose=verbose, quiet=quiet,
        )  # fmt: skip
        if spoken:
            click.echo(said, err=True)
        return
    refuse_alone(into)
    if report is not None:
        _check_report(report, refs, out, dry_run)
    if dry_run:
        planned = merged.plan(dtype=dtype, any_base=any_base, keep=keep)
        if spoken:
            click.echo(said, err=True)
        if as_json:
            print_json({"dry_run": True, **_report(planned, refs, weights, chosen)})
        elif not quiet:
            click.echo(summary(planned, "would write", out))
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
                found, shown = merge_page.compared(out, refs, weights, step)
            file.write_text(merge_page.page(found, shown, planned, error, len(refs)), encoding="utf-8")
    if spoken:
        click.echo(said, err=True)
    if as_json:
        print_json({"out": str(out), **_report(planned, refs, weights, chosen, error)})
    elif not quiet:
        click.echo(summary(planned, "wrote", out))
        click.echo(errors(planned, error, verbose))
        if report is not None:
            click.echo(f"wrote {printable(str(report))}")


def _check_report(report: Path, refs: Sequence[str], out: Path | None, dry_run: bool) -> None:
    """Refuse what the page could not be made of, or could not be put at, before any work."""
    from . import merge_page

    if dry_run or out is None:
        raise click.UsageError("--report is about what was written, and --dry-run writes nothing")
    if out.absolute() in (report.absolute(), *report.absolute().parents):
        raise click.UsageError(f"--report {printable(str(report))} is in OUT; choose another place")
    if any(os.path.realpath(out) == os.path.realpath(ref) for ref in refs):
        raise click.UsageError(f"{printable(str(out))} is merged and replaced, so nothing is left to report on")
    merge_page.check(refs)


def _page(report: Path | None, force: bool) -> AbstractContextManager[Path | None]:
    """Where to write the page, if there is to be one; no other run imports what makes it."""
    if report is None:
        return nullcontext()
    from .page import staged_page

    return staged_page(report, force=force)


def _usage(make: Callable[[], T]) -> T:
    """What `make` gives; options that it refuses are wrong usage."""
    try:
        return make()
    except ConfigError as e:
        raise click.UsageError(str(e)) from None


def _whole(adapters: Sequence[Adapter], weights: Sequence[Weight], rule: Rule | None) -> Adapter:
    """What is to be written, but for truncation."""
    numbers = [weight for weight in weights if not isinstance(weight, Mapping)]
    if rule is not None or len(numbers) < len(weights):
        return _usage(lambda: adapter.merge(adapters, rule, weights=weights))
    terms = [w * one for w, one in zip(numbers, adapters, strict=True)]
    return sum(terms[1:], terms[0])


def by_module(words: Sequence[str], weights: Sequence[float]) -> list[Weight]:
    """The weights with those that `--at` gives for some modules.

    >>> by_module(["*.mlp.*=0.5,1"], [0.7, 0.3])
    [{'*.mlp.*': 0.5, '*': 0.7}, {'*.mlp.*': 1.0, '*': 0.3}]
    """
    tables: list[dict[str, float]] = [{} for _ in weights]
    for word in words:
        glob, is_, numbers = word.rpartition("=")
        try:
            own = [float(number) for number in re.split(r"[,\s]+", numbers.strip(", "))]
        except ValueError:
            own = []
        if not is_ or not glob or len(own) != len(weights):
            raise click.UsageError(f"--at {word!r}: write GLOB=W,W with {len(weights)} weights, one an adapter")
        for patterns, number in zip(tables, own, strict=True):
            patterns.setdefault(glob, number)
    for patterns, weight in zip(tables, weights, strict=True):
        patterns.setdefault("*", weight)
    return list(tables) if words else list(weights)


def _report(
    planned: Plan,
    refs: Sequence[str],
    weights: Sequence[float],
    rule: Rule | None,
    error: RelativeError | None = None,
) -> dict[str, Any]:
    return {
        "adapters": [{"ref": ref, "weight": w} for ref, w in zip(refs, weights, strict=True)],
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
