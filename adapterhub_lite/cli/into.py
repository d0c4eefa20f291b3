"""`adapter merge … --into BASE`: adapters folded into a base model's files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import ConfigError, NotMergeable, printable
from ..estimate import estimate_fold
from ..hub.reference import on_hub
from .grouped import together
from .output import print_json, size, table, transfer
from .transferred import spoken, told

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from ..adapter import Adapter
    from ..folding import Folded, Plan
    from ..folding.manifest import Retained
    from ..per_site import Weight
    from ..source import Source

LOST = 0.1  # of the change's length along itself: said aloud above
WORST = 10  # modules shown unless --verbose

into_options = together(
    click.option(
        "--into", metavar="BASE", type=click.Path(path_type=Path), help="Fold into this model: OUT is a model."
    ),
    click.option(
        "--rounding",
        type=click.Choice(["nearest", "stochastic"]),
        help="With --into: to the nearest number, or at random and right on average. Default nearest.",
    ),
    click.option("--rounding-seed", type=int, metavar="N", help="Of --rounding stochastic. Default 0."),
    click.option("--link", is_flag=True, help="With --into: link files that do not change."),
    click.option("--resume", is_flag=True, help="With --into: go on with what an interrupted run left."),
    click.option("--executor", metavar="URL", help="With --into: fold on a cluster, dask://HOST:PORT."),
)


NAMES = ("into", "rounding", "rounding_seed", "link", "resume", "executor")


def taken(given: dict[str, Any]) -> dict[str, Any]:
    """The options of `--into`, taken out of all that were given."""
    return {name: given.pop(name) for name in NAMES}


def refuse_alone(given: Mapping[str, Any]) -> None:
    """Options of `--into` without it are wrong usage."""
    unset = [name for name in NAMES[1:] if given[name] is None or given[name] is False]
    named = [f"--{name.replace('_', '-')}" for name in NAMES[1:] if name not in unset]  # a seed may be 0
    if named:
        raise click.UsageError(f"{named[0]} is for --into BASE")


def merge_into(
    adapter: Adapter,
    refs: Sequence[str],
    weights: Sequence[Weight],
    given: Mapping[str, Any],
    *,
    own: Sequence[Weight] | None,
    out: Path | None,
    keep: str | None,
    any_base: bool,
    inputs: Sequence[Source],
    dry_run: bool,
    force: bool,
    as_json: bool,
    verbose: bool,
    quiet: bool,
) -> None:
    """Do it, or say what would be done."""
    base: Path = given["into"]
    if dry_run:
        from ..base_model import BaseModel
        from ..folding import contradictions, planned
        from ..hub.headers import find
        from ..hub.pull import BASE

        if len(against := contradictions(adapter, weights=own, any_base=any_base, keep=keep)) > 1:
            raise NotMergeable(f"{len(against)} conflicts: {' · '.join(map(str, against))}")
        reference = on_hub(base)
        found = None if reference is None else find(reference, BASE, deep=True)
        model = BaseModel.open(base if found is None else found.folder)
        plan = planned(model, adapter, weights=own, any_base=any_base, keep=keep)
        if as_json:
            facts = {**_facts(plan), **told(inputs, found)}
            print_json({"dry_run": True, "base": str(base), "adapters": _terms(refs, weights), **facts})
        elif not quiet:
            click.echo(_summary(plan, "would write", out))
            click.echo(_forecast(plan, verbose))
            spoken(inputs, found)
            if out is not None and os.path.lexists(out) and not force:
                click.echo(f"but {out} exists: choose another -o or pass --force", err=True)
        return
    assert out is not None
    from ..folding import fold

    with transfer("folding", quiet) as step, _executor(given["executor"]) as executor:
        result = fold(
            base,
            adapter,
            out,
            weights=own,
            rounding=given["rounding"] or "nearest",
            seed=given["rounding_seed"] or 0,
            link=given["link"],
            resume=given["resume"],
            force=force,
            any_base=any_base,
            keep=keep,
            executor=executor,
            progress=step,
        )
    if as_json:
        print_json({"out": str(out), "base": str(base), "adapters": _terms(refs, weights), **result.plain()})
    elif not quiet:
        click.echo(f"wrote {out}: {len(result.modules)} layers changed, {len(result.files)} files")
        click.echo(_retention(result, verbose))
        if result.left:
            click.echo(f"left behind (the old weights in other formats, or pickles): {_some(result.left)}")
    kept = result.retained.projection
    if kept is not None and kept < 1 - LOST and given["rounding"] != "stochastic":
        click.echo(
            f"warning: rounding loses {1 - kept:.0%} of the change; --rounding stochastic keeps it on average, "
            "a base in float32 all of it",
            err=True,
        )


@contextmanager
def _executor(url: str | None) -> Iterator[Executor | None]:
    """The executor that a URL names; None for threads of this process."""
    if url is None:
        yield None
        return
    kind, is_, address = url.partition("://")
    if kind != "dask" or not is_ or not address:
        raise click.UsageError(f"--executor {printable(url)!r} is no dask://HOST:PORT")
    try:
        from distributed import Client
    except ImportError:
        raise ConfigError(
            "dask is not installed", where="--executor", fix="pip install 'adapterhub-lite[cluster]'"
        ) from None
    try:
        client: Any = Client(f"tcp://{address}", timeout="10s")
    except (OSError, TimeoutError, ValueError) as e:
        raise ConfigError(
            f"no cluster answers ({type(e).__name__})", where=url, fix="check the scheduler's address"
        ) from None
    with client:
        yield client.get_executor()


def _terms(refs: Sequence[str], weights: Sequence[Weight]) -> list[dict[str, Any]]:
    return [{"ref": ref, "weight": w} for ref, w in zip(refs, weights, strict=True)]


def _facts(plan: Plan) -> dict[str, Any]:
    return {
        "bytes": plan.model.nbytes,
        "bytes_computed": plan.touched,
        "layers": {name: list(layer.weight.shape) for name, layer in plan.layers.items()},
        "replaced": sorted(whole.old.name for whole in plan.wholes),
        "left": list(map(str, plan.model.left)),
        "estimate": estimate_fold(plan).plain(),
    }


def _forecast(plan: Plan, verbose: bool) -> str:
    """What a dry run tells besides: the effort, and the layers with the ranks of what is added."""
    lines = ["what the rounding keeps of the change: measured when it is written", _effort(plan)]
    layers = list(plan.layers.values())
    rows = [
        (
            printable(layer.name),
            "×".join(map(str, layer.weight.shape)),
            str(sum(plan.terms[part.term][1].extent(part.site).rank for part in layer.parts)),
            size(sum(info.nbytes for info in layer.touched)),
        )
        for layer in (layers if verbose else layers[:WORST])
    ]
    lines.append(table(rows, ("module", "shape", "rank", "size"), right=(1, 2, 3)))
    if len(rows) < len(layers):
        lines.append(f"… and {len(layers) - len(rows)} modules (-v shows all)")
    return "\n".join(lines)


def _effort(plan: Plan) -> str:
    guess = estimate_fold(plan)
    return f"estimate, within a factor of a few: {guess.seconds:.0f} s, {size(guess.nbytes)} of memory"


def _summary(plan: Plan, did: str, out: Path | None) -> str:
    files = sum(1 for shard in plan.shards if shard.touched)
    said = [f"{len(plan.layers)} layers changed", f"in {files} of {len(plan.shards)} files", size(plan.model.nbytes)]
    lines = [f"{did} {out or 'a model'}: {', '.join(said)}, of them {size(plan.touched)} computed"]
    if plan.wholes:
        lines.append(f"replaced by trained values: {_some([whole.old.name for whole in plan.wholes])}")
    if plan.model.left:
        lines.append(
            f"left behind (the old weights in other formats, or pickles): {_some(list(map(str, plan.model.left)))}"
        )
    return "\n".join(lines)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(printable, names[:5])) + more


def _retention(result: Folded, verbose: bool) -> str:
    """How much of the change survived the rounding: overall, and where least."""
    lines = [f"of the change {_percent(result.retained)}"]
    names = sorted(result.modules, key=lambda name: (result.modules[name].projection or 0.0, name))
    shown = sorted(names) if verbose else names[:WORST]
    if not verbose and all((result.modules[name].projection or 1.0) > 1 - LOST for name in names):
        return lines[0]
    rows = [
        (printable(name), _number(result.modules[name].projection), f"{result.modules[name].unchanged:.1%}")
        for name in shown
    ]
    lines.append(table(rows, ("module", "kept", "unchanged"), right=(1, 2)))
    if len(shown) < len(names):
        lines.append(f"… and {len(names) - len(shown)} modules of which more is kept (-v shows all)")
    return "\n".join(lines)


def _percent(retained: Retained) -> str:
    kept = f"{_number(retained.projection)} is kept in the rounded weights"
    return f"{kept}, of which {retained.unchanged:.1%} are unchanged"


def _number(projection: float | None) -> str:
    return "-" if projection is None else f"{projection:.2%}"
