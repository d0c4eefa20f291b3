"""What a merge rule does with one adapter, with equal ones, in another order, scaled, with factors and matrices."""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from .. import algebra
from ..delta import Delta, Dense, LowRank
from ..rule import Facts, Part, Place, Rule
from . import declared
from .check import check, require, within

SITES = {"layers.0.first": (13, 9), "layers.0.second": (6, 17), "layers.1.first": (1, 5)}
RANKS = (3, 2, 4)
ALONE = "layers.0.second"  # the last adapter leaves it alone
BOUND = 1e-8  # of the largest entry

Sites = Mapping[str, Sequence[Part]]


def inputs(rule: Rule, count: int | None = None) -> dict[str, list[Part]]:
    """Adapters at every site, with the rule's default weights, as many as it takes; of several ranks if it may be."""
    count = count or rule.takes or 3
    made: dict[str, list[Part]] = {}
    for at, (site, shape) in enumerate(SITES.items()):
        made[site] = []
        for i in range(count):
            rng = torch.Generator().manual_seed(100 * at + i)
            rank = 0 if site == ALONE and 0 < i == count - 1 else RANKS[i % len(RANKS)]
            rank = RANKS[0] if rule.same_rank else rank
            B = torch.randn(shape[0], rank, generator=rng, dtype=torch.float64)
            A = torch.randn(rank, shape[1], generator=rng, dtype=torch.float64)
            made[site].append(Part(LowRank(B, A, 0.5 + i), rule.default_weight(count), i, f"{site} {i}"))
    return made


def gathered(rule: Rule, sites: Sites) -> Facts:
    """The facts of the rule's passes."""
    facts: Facts = {}
    for _ in range(rule.passes):
        facts = rule.conclude({n: rule.observe(own, place(n), facts) for n, own in sites.items()}, facts)
    return facts


def place(site: str) -> Place:
    return Place(site, SITES[site])


def merged(rule: Rule, sites: Sites) -> dict[str, Delta]:
    """The rule's result at every site."""
    facts = gathered(rule, sites)
    return {site: rule.merge(own, place(site), facts) for site, own in sites.items()}


def matrices(rule: Rule, sites: Sites) -> dict[str, Tensor]:
    """The same, written out: (out, in) each, float64."""
    return {site: delta.dense().double() for site, delta in merged(rule, sites).items()}


def apart(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest difference of two entries, in units of the largest entry; infinite if one is not a number."""
    size = max(float(own.abs().max()) for own in expected.values())
    differences = [float((found[site] - own).abs().max()) for site, own in expected.items()]
    largest = max(differences) if all(d == d for d in differences) else float("inf")
    return largest / size if size > 0 else largest


def _keeps_equal(rule: Rule) -> str | None:
    return None if rule.keeps_equal else "declares keeps_equal = False under these options"


def _draws(rule: Rule) -> str | None:
    return None if any(field.name == "seed" for field in fields(rule)) else "defines no option seed"


def _changes(rule: Rule) -> str | None:
    return "declares that it keeps adapters as they are" if rule.keeps_one else None


def _reads_matrices(rule: Rule) -> str | None:
    return "declares reads_factors = True" if rule.reads_factors else None


@check()
def result_is_as_declared(rule: Rule) -> str:
    """The result has the site's shape, is finite, and has no more rank than `rank` says; written out if `full_rank`."""
    sites = inputs(rule)
    for site, delta in merged(rule, sites).items():
        shape, ranks = SITES[site], [algebra.low_rank(part.delta).rank for part in sites[site]]
        require(
            tuple(delta.shape) == shape,
            f"ΔW has shape {list(delta.shape)} where the site's is {list(shape)}",
            fix="give (out, in)",
        )
        require(bool(delta.dense().isfinite().all()), f"ΔW at {site} is not finite", fix="look for a division by 0")
        most = min(rule.rank(ranks, shape), *shape)
        if isinstance(delta, LowRank):
            rank = min(delta.rank, *shape)
        else:
            rank = int(torch.linalg.matrix_rank(delta.dense()))
        require(
            rank <= most, f"ΔW has rank {rank} at {site}, and rank() says at most {most}", fix="say the rank in rank()"
        )
        require(
            rule.full_rank or isinstance(delta, LowRank) or most == min(shape),
            f"ΔW at {site} is a {type(delta).__name__} without full_rank",
            fix="declare full_rank = True, or give a LowRank",
        )
    return f"{len(SITES)} sites"


@check()
def one_adapter_is_itself(rule: Rule) -> str:
    """One adapter with weight 1 is itself, or `keeps_one` says that it is not under these options."""
    if rule.takes is None or rule.takes == 1:
        sites = {site: [part._replace(weight=1.0) for part in own] for site, own in inputs(rule, 1).items()}
    else:
        sites = {
            site: [part._replace(weight=float(i == 0)) for i, part in enumerate(own)]
            for site, own in inputs(rule).items()
        }
    expected = {site: own[0].delta.dense() for site, own in sites.items()}
    difference = apart(matrices(rule, sites), expected)
    if rule.keeps_one:
        within(difference, BOUND, "one adapter became another", fix="repair merge, or let keeps_one say when it is not")
        return f"|diff| {difference:.1e}"
    require(difference > BOUND, "one adapter is itself, and keeps_one denies it", fix="let keeps_one say True")
    return "another one, as declared"


@check(_keeps_equal)
def equal_adapters_are_one(rule: Rule) -> str:
    """Equal adapters, by default weights, are that adapter."""
    count = rule.takes or 3
    sites = {
        site: [
            own[0]._replace(number=i, key=f"{own[0].key}.{i}", weight=rule.default_weight(count)) for i in range(count)
        ]
        for site, own in inputs(rule).items()
    }
    difference = apart(matrices(rule, sites), {site: own[0].delta.dense() for site, own in sites.items()})
    within(difference, BOUND, "equal adapters became another", fix="divide by what was added up")
    return f"{count} adapters, |diff| {difference:.1e}"


@check()
def order_changes_nothing(rule: Rule) -> str:
    """The order of the parts changes nothing."""
    sites = inputs(rule)
    turned = {site: list(reversed(own)) for site, own in sites.items()}
    difference = apart(matrices(rule, turned), matrices(rule, sites))
    within(
        difference, BOUND, "another order gives another result", fix="tell adapters apart by part.number and part.key"
    )
    return f"|diff| {difference:.1e}"


@check()
def scales_with_its_inputs(rule: Rule) -> str:
    """Changes half as large give a result half as large."""
    sites = inputs(rule)
    half = {site: [part._replace(delta=part.delta.scaled(0.5)) for part in own] for site, own in sites.items()}
    expected = {site: 0.5 * own for site, own in matrices(rule, sites).items()}
    difference = apart(matrices(rule, half), expected)
    within(difference, BOUND, "half the changes do not give half the result", fix="compare with no absolute number")
    return f"|diff| {difference:.1e}"


@check()
def weights_are_as_declared(rule: Rule) -> str:
    """Twice the weights give twice the result if they are factors, and else the same."""
    sites = inputs(rule)
    factor = 2.0 if rule.weighs == "sum" else 1.0
    twice = {site: [part._replace(weight=2 * part.weight) for part in own] for site, own in sites.items()}
    expected = {site: factor * own for site, own in matrices(rule, sites).items()}
    difference = apart(matrices(rule, twice), expected)
    what = f"weighs is {rule.weighs!r}, and twice the weights do not give {factor:g} times the result"
    within(difference, BOUND, what, fix="let weighs say what weights are")
    return f"{rule.weighs}, |diff| {difference:.1e}"


@check()
def deterministic(rule: Rule) -> str:
    """The same bits again: whatever the global random state, in another order of sites, in threads; none is touched."""
    sites = inputs(rule)
    torch.manual_seed(1)
    first = matrices(rule, sites)
    state = torch.manual_seed(2).get_state()
    again = matrices(rule, dict(reversed(sites.items())))
    require(
        torch.equal(state, torch.default_generator.get_state()),
        "it draws from the global random state",
        fix="draw with self.uniform",
    )
    facts = gathered(rule, sites)
    with ThreadPoolExecutor(len(sites)) as pool:
        jobs = {site: pool.submit(rule.merge, own, place(site), facts) for site, own in sites.items()}
        threads = {site: job.result().dense().double() for site, job in jobs.items()}
    for other, how in ((again, "in another order of sites"), (threads, "in threads")):
        same = all(torch.equal(first[site], other[site]) for site in sites)
        require(same, f"the result is another {how}", fix="keep no state between sites, and draw with self.uniform")
    return "bit-equal"


@check(_draws, _changes)
def draws_by_seed_and_content(rule: Rule) -> str:
    """Random numbers depend on the seed, the site and the adapter's numbers, not on which adapter it is."""
    drawing = 0
    for own in _choices(rule):
        sites, other = inputs(own), _with_seed(own, getattr(own, "seed", 0) + 1)
        found = matrices(own, sites)
        if apart(matrices(other, sites), found) <= BOUND:
            continue
        drawing += 1
        renumbered = {site: [p._replace(number=(p.number + 1) % len(o)) for p in o] for site, o in sites.items()}
        what = "numbers drawn depend on which adapter it is"
        within(apart(matrices(own, renumbered), found), BOUND, what, fix="draw with self.uniform")
        rekeyed = {site: [p._replace(key=f"{p.key}!") for p in o] for site, o in sites.items()}
        difference = apart(matrices(own, rekeyed), found)
        require(difference > BOUND, "all adapters get the same numbers", fix="draw with self.uniform")
    require(drawing > 0, "another seed draws the same numbers", fix="draw with self.uniform, or leave out the seed")
    return "keyed"


def _with_seed(rule: Rule, seed: int) -> Rule:
    values: dict[str, Any] = {"seed": seed}
    return replace(rule, **values)


def _choices(rule: Rule) -> list[Rule]:
    """The rule with every value of its choices: it may be one of them that draws."""
    hints = typing.get_type_hints(type(rule))
    choices = {name: typing.get_args(hint) for name, hint in hints.items() if typing.get_origin(hint) is typing.Literal}
    own = {field.name for field in fields(rule)} & choices.keys()
    return [replace(rule, **dict(zip(own, values, strict=True))) for values in product(*(choices[n] for n in own))]


@check(_reads_matrices)
def factors_equal_matrices(rule: Rule) -> str:
    """The result depends on ΔW and not on how it is factored, unless `reads_factors` says so."""
    sites = inputs(rule)
    written = {site: [p._replace(delta=Dense(p.delta.dense())) for p in own] for site, own in sites.items()}
    difference = apart(matrices(rule, written), matrices(rule, sites))
    within(
        difference,
        BOUND,
        "the matrix gives another result than its factors",
        fix="use ΔW only, or declare reads_factors",
    )
    return f"|diff| {difference:.1e}"


@check()
def inputs_are_left_alone(rule: Rule) -> str:
    """No tensor that it was given is changed."""
    sites = inputs(rule)
    before = {site: [algebra.digest(part.delta) for part in own] for site, own in sites.items()}
    merged(rule, sites)
    after = {site: [algebra.digest(part.delta) for part in own] for site, own in sites.items()}
    require(before == after, "an adapter was changed while it was merged", fix="copy before writing in place")
    return "unchanged"


CHECKS = (
    declared.documented,
    declared.options_survive_json,
    declared.wrong_options_are_refused,
    result_is_as_declared,
    one_adapter_is_itself,
    equal_adapters_are_one,
    order_changes_nothing,
    scales_with_its_inputs,
    weights_are_as_declared,
    deterministic,
    draws_by_seed_and_content,
    factors_equal_matrices,
    inputs_are_left_alone,
)
