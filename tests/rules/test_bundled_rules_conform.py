"""The conformance suite on the bundled rules, with options that are not their defaults too."""

from __future__ import annotations

from typing import Any

import pytest

from adapterhub_lite import Rule
from adapterhub_lite.registry import registry
from adapterhub_lite.testing import Check, parametrize_checks


def r(name: str, **options: Any) -> Rule:
    return registry().rule(name)(**options)


RULES = (
    r("sum"),
    r("cat"),
    r("mean"),
    r("slerp"),
    r("karcher"),
    r("karcher", iterations=0),
    r("model_stock"),
    r("tsv"),
    r("tsv", top=1),
    r("iso_c"),
    r("iso_c", over="all", scale=0.5),
    r("iso_cts"),
    r("iso_cts", common=0.4),
    r("knots"),
    r("knots", density=0.5, scope="site", scale=2.0),
    r("knots", density=1.0),
    r("core_space"),
    r("core_space", inside="dare_ties", density=0.5),
    r("core_space", density=1.0),
    r("ctm"),
    r("ctm", dimensions=2, beta=0.5, density=0.5),
    r("ctm", inside="dare_ties", density=0.5),
    r("ctm", density=1.0),
    r("svc"),
    r("svc", alpha=1.0, scale=0.4),
    r("svc", scale=0.3),
    r("pico"),
    r("robust_merge"),
    r("robust_merge", density=1.0, floor=0.0, factor=1.0),
    r("ties"),
    r("ties", scope="site", density=0.5, scale=2.0),
    r("ties", density=1.0),
    r("ties", variant="mergekit"),
    r("ties", variant="peft", density=1.0),
    r("dare_linear"),
    r("dare_linear", variant="mergekit", seed=3),
    r("dare_linear", density=1.0),
    r("dare_ties"),
    r("dare_ties", variant="peft", density=0.6),
    r("dare_ties", variant="mergekit"),
    r("dare_ties", density=1.0),
    r("della"),
    r("della", density=1.0),
    r("magnitude_prune"),
    r("magnitude_prune", density=1.0),
    r("breadcrumbs"),
    r("breadcrumbs", within="row", density=0.5),
    r("breadcrumbs", density=1.0),
    r("sce"),
    r("sce", select=0.3),
)


@parametrize_checks(*RULES)
def test_conforms(method: Rule, check: Check) -> None:
    check(method)


def test_every_bundled_rule_is_tried() -> None:
    assert {rule.name for rule in RULES} == registry().rules().keys()


def test_an_instance_is_asked_for() -> None:
    with pytest.raises(Exception, match="give an instance"):
        parametrize_checks(registry().rule("ties"))  # type: ignore[arg-type]
