"""Options with bounds, numbers by pattern, and rules by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from adapterhub_lite import ConfigError, UnknownName, options, per_site
from adapterhub_lite.options import option
from adapterhub_lite.registry import registry

if TYPE_CHECKING:
    from conftest import Done


@dataclass(frozen=True)
class Bounded:
    open: float = option(0.5, "Between.", above=0, below=1)
    closed: int = option(2, "From 0 to 4.", least=0, most=4)
    free: float = option(0.0, "Any.")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"open": 0}, "open=0 is not above 0 and below 1"),
        ({"open": 1.0}, "open=1.0 is not above 0 and below 1"),
        ({"closed": -1}, "closed=-1 is not at least 0 and at most 4"),
        ({"closed": 5}, "closed=5 is not at least 0"),
        ({"closed": True}, "closed=True is not an integer"),
        ({"open": float("nan")}, "not a finite number"),
    ],
)
def test_bounds_are_kept(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        options.validate(Bounded(**values), owner="x")


def test_within_bounds_all_is_well() -> None:
    for values in ({}, {"open": 1e-9}, {"open": 0.999}, {"closed": 0}, {"closed": 4}, {"free": -1e9}):
        options.validate(Bounded(**values), owner="x")


def test_the_first_pattern_that_matches_counts() -> None:
    table = {"*.q": 1.0, "layers.1.*": 2.0, "*": 3.0}
    names = ("layers.1.q", "layers.1.k", "layers.10.k")
    assert [per_site.weight_at(table, name, dict.fromkeys(names, 0.0)) for name in names] == [1.0, 2.0, 3.0]
    assert per_site.weight_at(0.25, "x", {}) == 0.25


@pytest.mark.parametrize(
    ("values", "depth", "expected"),
    [
        ([3.0], 0.7, 3.0),
        ([0.0, 1.0], 0.0, 0.0),
        ([0.0, 1.0], 1.0, 1.0),
        ([0.0, 1.0, 5.0], 0.5, 1.0),
        ([0.0, 1.0, 5.0], 0.75, 3.0),
        ([0.0, 1.0, 5.0], 1.0, 5.0),
    ],
)
def test_along_the_layers_it_is_linear_in_between(values: list[float], depth: float, expected: float) -> None:
    assert per_site.along(values, depth) == pytest.approx(expected)


def test_depths() -> None:
    assert per_site.depths(["a", "b.c"]) == {"a": 0.0, "b.c": 0.0}
    assert per_site.depths(["h.7.q"]) == {"h.7.q": 0.0}
    assert per_site.depths([f"h.{10**12}.q", "h.4.0.q", "h.6.3"]) == {
        f"h.{10**12}.q": 0.0,
        "h.4.0.q": 0.0,
        "h.6.3": 1.0,
    }


def test_an_unknown_rule_is_told_with_the_nearest() -> None:
    with pytest.raises(UnknownName, match="there is no rule 'tise'; did you mean 'ties'"):
        registry().rule("tise")


def test_a_rule_is_checked_by_its_name(adapter: Callable[..., Done]) -> None:
    done = adapter("plugin", "check", "slerp", "--json")
    assert done.code == 0
    assert done.json["rule"] == "slerp"
    assert done.json["passed"]
    assert adapter("plugin", "check", "rule.mean").code == 0
    nothing = adapter("plugin", "check", "tise")
    assert nothing.code == 2
    assert "there is no method, rule or router 'tise'" in nothing.err
    assert "did you mean 'ties'" in nothing.err
