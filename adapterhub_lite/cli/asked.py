"""What `adapter merge` is asked for: by its words, or by a recipe."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import click

from .. import adapter, options, recipe
from ..adapter import Adapter
from ..errors import ConfigError, nearest, printable
from ..hub.pull import resolve
from ..hub.reference import on_hub
from ..registry import registry
from ..source import OnHub, Source, stored
from ..tuning import weighted_sum
from .cuts import refuse_two
from .grouped import DTYPES
from .rule_options import rule_of

if TYPE_CHECKING:
    from ..per_site import Weight
    from ..rule import Rule

T = TypeVar("T")
MOVING = "{0}: another commit may be there tomorrow; to merge the same again write {1}"
DEFAULT_WEIGHTS = "weights: {} each (say --weights to choose)"
OF_THE_RUN = frozenset(
    {"recipe_file", "out", "dry_run", "report", "force", "as_json", "verbose", "quiet", "link", "resume", "executor"}
)  # options that change nothing in the result


class Asked(NamedTuple):
    """A merge, before it is written."""

    merged: Adapter
    refs: Sequence[str]  # the adapters' folders
    names: Sequence[str]  # what to call them
    weights: Sequence[Weight]
    rule: Rule | None
    dtype: str | None
    keep: str | None
    any_base: bool
    said: str | None  # which weights, where nobody chose any
    by_module: Sequence[Weight] | None = None  # of the terms of `merged`, where they are for the layers of a base
    inputs: Sequence[Source] = ()


def of_words(
    refs: Sequence[str],
    weights: Sequence[float] | None,
    rule: str | None,
    given: Mapping[str, Any],
    cuts: Mapping[str, Any],
    dtype: str | None,
    keep: str | None,
    any_base: bool,
    *,
    at: Sequence[str],
    into: Mapping[str, Any],
) -> Asked:
    """As the command line says it."""
    refuse_two(cuts)
    if weights is not None and len(weights) != len(refs):
        raise click.UsageError(f"{len(weights)} weights for {len(refs)} adapters: give one for each")
    chosen = usage(lambda: rule_of(rule, given))
    if keep is not None and keep not in (*refs, "none"):
        raise click.UsageError(f"--keep {keep!r} is none of the adapters; {nearest(keep, refs)}")
    weighed, said = _weights(weights, chosen, len(refs))
    own = by_module(at, numbers(weighed))
    folds = _folds(own, chosen, into["into"], cuts)
    inputs = [stored(ref) for ref in refs]
    loaded = [Adapter(((1.0, source),)) for source in inputs]
    made = usage(lambda: whole(loaded, folds or own, chosen)) if chosen else whole(loaded, folds or own, chosen)
    merged = made.cut(**cuts, dtype=dtype)
    return Asked(merged, refs, refs, own, chosen, dtype, keep, any_base, said, own if folds else None, inputs)


def by_module(words: Sequence[str], weights: Sequence[float]) -> Sequence[Weight]:
    """The weights with those that `--at` gives for some modules.

    >>> by_module(["*.mlp.*=0.5,1"], [0.7, 0.3])
    [{'*.mlp.*': 0.5, '*': 0.7}, {'*.mlp.*': 1.0, '*': 0.3}]
    """
    tables: list[dict[str, float]] = [{} for _ in weights]
    for word in words:
        glob, is_, rest = word.rpartition("=")
        try:
            own = [float(number) for number in re.split(r"[,\s]+", rest.strip(", "))]
        except ValueError:
            own = []
        if not is_ or not glob or len(own) != len(weights):
            raise click.UsageError(f"--at {word!r}: write GLOB=W,W with {len(weights)} weights, one an adapter")
        for patterns, number in zip(tables, own, strict=True):
            patterns.setdefault(glob, number)
    for patterns, weight in zip(tables, weights, strict=True):
        patterns.setdefault("*", weight)
    return tables if words else weights


def _folds(weights: Sequence[Weight], rule: Rule | None, into: Any, cuts: Mapping[str, Any]) -> Sequence[Weight] | None:
    """Weights of 1 where a fold weighs each layer by itself: with every method's own merge, ΔW or not."""
    by_layer = any(isinstance(weight, Mapping) for weight in weights)
    own = by_layer and into is not None and rule is None and all(cut is None for cut in cuts.values())
    return [1.0] * len(weights) if own else None


def of_recipe(file: Path, into: dict[str, Any]) -> Asked:
    """As a recipe says it; what it says of the base goes into the options `into`."""
    found = recipe.read(file)
    refs = [found.path(own.path) for own in found.adapters]
    inputs, loaded = list[Source](), list[Adapter]()
    for i, (own, ref) in enumerate(zip(found.adapters, refs, strict=True)):
        source = stored(ref, own.path)
        own.check(source.files, found.owner(f"adapters[{i}]"))
        inputs.append(source)
        loaded.append(Adapter(((1.0, source),)))
    found.check_patterns({site: None for one in loaded for site in one.sites})
    unpinned: list[str] = []
    dtype = None if found.dtype is None else DTYPES[found.dtype]
    budget = recipe.nbytes(found.budget) if isinstance(found.budget, str) else found.budget
    with recipe.named(file):
        cls = None if found.rule is None else registry().rule(found.rule)
        rule = None if cls is None else options.build(cls, found.options, owner=f"rule {cls.name!r}")
        given = [own.weight for own in found.adapters if own.weight is not None]
        weights, said = _weights(given or None, rule, len(refs))
        cuts: dict[str, Any] = {"rank": found.rank, "max_error": found.max_error, "budget": budget}
        folds = _folds(weights, rule, found.into, cuts)
        merged = whole(loaded, folds or weights, rule, found.at).cut(**cuts, dtype=dtype)
    if found.into is not None:
        seed = found.rounding_seed
        base, unpinned = _pinned(found.path(found.into))
        into.update(into=Path(base), rounding=found.rounding, rounding_seed=seed)
    names = [own.path for own in found.adapters]
    by_layer = weights if folds else None
    warnings = [f"warning: {printable(text)}" for text in [*_moving(inputs), *unpinned]]
    said = "\n".join([*warnings, *([said] if said else [])]) or None
    return Asked(merged, refs, names, weights, rule, dtype, found.keep, found.any_base, said, by_layer, inputs)


def _pinned(ref: str) -> tuple[str, list[str]]:
    """A base on the Hub, pinned; and what to say if it was not."""
    reference = on_hub(ref)
    if reference is None or reference.pinned:
        return ref, []
    pinned = resolve(reference)
    return str(pinned), [MOVING.format(ref, pinned)]


def _moving(inputs: Sequence[Source]) -> list[str]:
    """What to say of adapters on the Hub that may be others tomorrow."""
    moving = [source for source in inputs if isinstance(source, OnHub) and not source.pinned]
    return [MOVING.format(source.name, source.found.reference) for source in moving]


def refuse_beside_recipe(ctx: click.Context) -> None:
    """A recipe is the whole merge: words that would change its result are wrong usage."""
    for param in ctx.command.get_params(ctx):
        said = ctx.get_parameter_source(param.name or "") is click.core.ParameterSource.COMMANDLINE
        if said and param.name not in OF_THE_RUN:
            what = "adapters" if isinstance(param, click.Argument) else param.opts[-1]
            raise click.UsageError(f"{what} beside --recipe, which says the whole merge: change the recipe")


def usage(make: Callable[[], T]) -> T:
    """What `make` gives; options that it refuses are wrong usage."""
    try:
        return make()
    except ConfigError as e:
        raise click.UsageError(str(e)) from None


def numbers(weights: Sequence[Weight]) -> list[float]:
    """Those that are the same at every module."""
    return [w for w in weights if isinstance(w, (int, float))]


def _weights(given: Sequence[Weight] | None, rule: Rule | None, count: int) -> tuple[Sequence[Weight], str | None]:
    """The weights, and what to say of them if nobody chose any."""
    if given is not None:
        return given, None
    own = 1 / count if rule is None else rule.default_weight(count)
    chose = count == 1 or (rule is not None and rule.weighs == "equal")
    said = None if chose else DEFAULT_WEIGHTS.format("1" if own == 1 else f"1/{count}")
    return [own] * count, said


def whole(
    adapters: Sequence[Adapter],
    weights: Sequence[Weight],
    rule: Rule | None,
    at: Mapping[str, Mapping[str, Any]] | None = None,
) -> Adapter:
    """What is to be written, but for truncation."""
    if rule is not None or len(numbers(weights)) < len(weights):
        return adapter.merge(adapters, rule, weights=weights, at=at)
    return weighted_sum(adapters, numbers(weights))
