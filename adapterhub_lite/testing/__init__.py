"""The conformance suites: what every method must do, on small layers of every kind it claims; every rule; every router.

In a plugin's own tests:

    from adapterhub_lite.testing import parametrize_checks

    @parametrize_checks(MyMethod(), MyMethod(rank=3))
    def test_conforms(method, check):
        check(method)

with rules and routers just as well, and on the command line `adapter plugin check NAME`. Neither needs more than the
package itself; pytest is imported only by `parametrize_checks`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ..errors import ConfigError
from ..protocol import Method
from ..routing import Router
from ..rule import Rule
from . import (
    attached,
    composed,
    declared,
    gradients,
    initial,
    inputs,
    low_rank,
    merging,
    routed,
    shared,
    steps,
    stored,
    weights,
)
from .check import Check as Check
from .check import CheckFailed as CheckFailed
from .check import CheckSkipped as CheckSkipped
from .check import Outcome as Outcome
from .check import Subject as Subject
from .check import known, run
from .check import report as report

__all__ = [
    "Check",
    "CheckFailed",
    "CheckSkipped",
    "Outcome",
    "Subject",
    "check_method",
    "checks_for",
    "parametrize_checks",
    "report",
]

_TOPICS = (declared, initial, shared, weights, inputs, gradients, steps, low_rank, stored, attached, composed)
_CHECKS: tuple[Check, ...] = tuple(own for topic in _TOPICS for own in topic.CHECKS)

F = TypeVar("F", bound=Callable[..., Any])


def checks_for(method: Subject) -> list[Check]:
    """All checks for a method, a rule or a router, in order; `check.skipped(method)` tells why one is not for `method`.

    >>> import adapterhub_lite as ah
    >>> [check.name for check in checks_for(ah.method("lora"))][:2]
    ['documented', 'site_kinds_are_known']
    """
    if isinstance(method, Rule):
        return list(merging.CHECKS)
    if isinstance(method, Router):
        return list(routed.CHECKS)
    if not isinstance(method, Method):
        raise ConfigError(f"{method!r} is not a method with its options", fix="give an instance, say LoRA(rank=4)")
    return list(_CHECKS)


def check_method(method: Subject, expected_failures: Mapping[str, str] | None = None) -> list[Outcome]:
    """Run all checks, print a line for each, and raise `CheckFailed` if one failed.

    `expected_failures` maps the names of checks to the reason why they fail; one that passes is a failure.
    """
    found = run(checks_for(method), method, expected_failures)
    print(report(found))
    failed = [o for o in found if o.state == "FAIL"]
    if failed:
        names = ", ".join(o.name for o in failed)
        raise CheckFailed(f"{label(method)} fails {names}: {failed[0].detail}", fix=failed[0].fix)
    return found


def parametrize_checks(*methods: Subject, expected_failures: Mapping[str, str] | None = None) -> Callable[[F], F]:
    """Parametrize a pytest test by `method` and `check`: one test for each check of each method, rule or router.

    `expected_failures` maps the names of checks to the reason why they fail; one that passes is a failure.
    """
    import pytest

    expected = expected_failures or {}
    cases = []
    for method in methods:
        checks = checks_for(method)
        known(expected, checks)
        for own in checks:
            marks: list[pytest.MarkDecorator] = []
            if own.name in expected:
                marks.append(pytest.mark.xfail(reason=expected[own.name], raises=CheckFailed, strict=True))
            cases.append(pytest.param(method, own, id=f"{label(method)}-{own.name}", marks=marks))

    def decorate(test: F) -> F:
        decorated: F = pytest.mark.parametrize(("method", "check"), cases)(test)
        return decorated

    return decorate


def label(method: Subject) -> str:
    """The method, rule or router, with the options that are not at their default: `LoRA(rank=4)`.

    >>> import adapterhub_lite as ah
    >>> label(ah.method("lora", rank=4))
    'LoRA(rank=4)'
    """
    given = []
    for f in dataclasses.fields(method):
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        value = getattr(method, f.name)
        if value != default:
            given.append(f"{f.name}={value!r}")
    return f"{type(method).__name__}({', '.join(given)})"
