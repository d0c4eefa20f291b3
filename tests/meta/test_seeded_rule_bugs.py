"""Every check of rules notices the mistakes that were made for it, and is silent on the others'."""

from __future__ import annotations

import pytest
from seeded_rule_bugs import BUGS, Average, Dropping

from adapterhub_lite import Rule
from adapterhub_lite.testing import checks_for
from adapterhub_lite.testing.check import run

SKIPPED = {
    Average: {"draws_by_seed_and_content"},
    Dropping: {"equal_adapters_are_one"},
}


@pytest.mark.parametrize("cls", SKIPPED, ids=lambda cls: cls.__name__)
def test_a_sound_rule_passes(cls: type[Rule]) -> None:
    outcomes = run(checks_for(cls()), cls())
    assert {o.name: o.detail for o in outcomes if o.state == "FAIL"} == {}
    assert {o.name for o in outcomes if o.state == "skip"} == SKIPPED[cls]


@pytest.mark.parametrize("cls", BUGS, ids=lambda cls: cls.__name__)
def test_a_bug_trips_its_checks_and_no_other(cls: type[Rule]) -> None:
    outcomes = run(checks_for(cls()), cls())
    failed = {o.name: f"{o.detail} ({o.fix})" for o in outcomes if o.state == "FAIL"}
    assert failed.keys() == set(BUGS[cls]), failed
    assert all(o.detail and o.fix and "\n" not in o.detail + o.fix for o in outcomes if o.state == "FAIL")


def test_every_check_has_a_bug_of_its_own() -> None:
    assert {checks[0] for checks in BUGS.values()} == {check.name for check in checks_for(Average())}
