"""A check is worth having if it notices a mistake: every check has one seeded, and is silent on the others'."""

from __future__ import annotations

import pytest
from seeded_bugs import BUGS, Gating, Projected, Scaling, Sound, Stepping

from adapterhub_lite import Method
from adapterhub_lite.testing import checks_for
from adapterhub_lite.testing.check import run

DELTA = {
    "delta_needs_no_module",
    "outline_agrees_with_delta",
    "factors_are_the_delta",
    "carries_low_rank",
    "arithmetic_is_linear",
    "save_and_load",
    "files_are_reproducible",
    "adds_delta_in_training",
}
SHARED = {"shared_depends_on_shapes", "shared_is_kept_once"}
BEFORE = {"before_is_pure", "before_finds_the_input"}
STEPS = {"step_rules_change_own_tensors", "training_resumes", "penalty_is_differentiable"}
PACK = {"pack_and_unpack_are_inverse"}
REFUSES = {"refusals_say_why"}
ROWS = {"merge_goes_by_rows"}
CONTROLS = {
    Sound: SHARED | BEFORE | STEPS | REFUSES | ROWS,
    Scaling: SHARED | BEFORE | STEPS | PACK | DELTA | REFUSES | ROWS,
    Gating: SHARED | STEPS | PACK | DELTA | REFUSES | ROWS,
    Projected: BEFORE | STEPS | {"carries_low_rank", "factors_are_the_delta"} | REFUSES | ROWS,
    Stepping: SHARED | BEFORE | PACK | REFUSES | ROWS,
}


@pytest.mark.parametrize("cls", CONTROLS, ids=lambda cls: cls.__name__)
def test_a_sound_method_passes(cls: type[Method]) -> None:
    outcomes = run(checks_for(cls()), cls())
    assert {o.name: o.detail for o in outcomes if o.state == "FAIL"} == {}
    skipped = {o.name: o.detail for o in outcomes if o.state == "skip"}
    assert skipped.keys() == CONTROLS[cls]
    assert all(why.startswith(("defines n", "declares ")) for why in skipped.values())


@pytest.mark.parametrize("cls", BUGS, ids=lambda cls: cls.__name__)
def test_a_bug_trips_its_checks_and_no_other(cls: type[Method]) -> None:
    outcomes = run(checks_for(cls()), cls())
    failed = {o.name: f"{o.detail} ({o.fix})" for o in outcomes if o.state == "FAIL"}
    assert failed.keys() == set(BUGS[cls]), failed
    assert all(o.detail and o.fix and "\n" not in o.detail + o.fix for o in outcomes if o.state == "FAIL")


def test_every_check_has_a_bug_of_its_own() -> None:
    assert {checks[0] for checks in BUGS.values()} == {check.name for check in checks_for(Sound())}
