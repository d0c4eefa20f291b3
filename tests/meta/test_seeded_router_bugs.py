"""Every check of routers notices the mistakes that were made for it, and is silent on the others'."""

from __future__ import annotations

import pytest
from seeded_router_bugs import BUGS, Constant, Gated, Loudest, Mixture

from adapterhub_lite import Router
from adapterhub_lite.testing import checks_for
from adapterhub_lite.testing.check import run

SKIPPED = {
    Mixture: {"alone_weighs_one_way", "fixed_holds_for_every_input"},
    Gated: {"fixed_holds_for_every_input"},
    Constant: {"alone_weighs_one_way"},
    Loudest: {"alone_weighs_one_way", "fixed_holds_for_every_input", "gradients_reach_its_tensors_alone"},
}


@pytest.mark.parametrize("cls", SKIPPED, ids=lambda cls: cls.__name__)
def test_a_sound_router_passes(cls: type[Router]) -> None:
    outcomes = run(checks_for(cls()), cls())
    assert {o.name: o.detail for o in outcomes if o.state == "FAIL"} == {}
    assert {o.name for o in outcomes if o.state == "skip"} == SKIPPED[cls]


@pytest.mark.parametrize("cls", BUGS, ids=lambda cls: cls.__name__)
def test_a_bug_trips_its_checks_and_no_other(cls: type[Router]) -> None:
    outcomes = run(checks_for(cls()), cls())
    failed = {o.name: f"{o.detail} ({o.fix})" for o in outcomes if o.state == "FAIL"}
    assert failed.keys() == set(BUGS[cls]), failed
    assert all(o.detail and o.fix and "\n" not in o.detail + o.fix for o in outcomes if o.state == "FAIL")


def test_every_check_has_a_bug_of_its_own() -> None:
    assert {checks[0] for checks in BUGS.values()} == {check.name for check in checks_for(Mixture())}
