"""What a check is, and what comes of running one."""

from __future__ import annotations

import math
import unittest
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from ..errors import AdapterError, UnknownName, nearest, printable
from ..protocol import Method
from ..routing import Router
from ..rule import Rule

Subject: TypeAlias = Method | Rule | Router
Reason = Callable[[Any], "str | None"]
"""Tells from what a method, a rule or a router declares why a check is not for it; None if it is."""


class CheckFailed(AssertionError):
    """A method, a rule or a router does not do what it says: `what` in one line, and how to `fix` it."""

    def __init__(self, what: str, *, fix: str) -> None:
        self.what, self.fix = printable(what), printable(fix)
        super().__init__(f"{self.what}\nfix: {self.fix}")


class CheckSkipped(unittest.SkipTest):
    """A check is not for this method; pytest and unittest report it as skipped."""


@dataclass(frozen=True)
class Check:
    """One thing that every method, rule or router must do, unless it declares that it does not take part.

    Calling it with one returns what was measured, raises `CheckFailed`, or raises `CheckSkipped`.
    """

    name: str
    doc: str
    """What is checked, in one line."""
    rule: Callable[[Any], str]
    needs: tuple[Reason, ...] = ()

    def skipped(self, method: Subject) -> str | None:
        """Why the check is not for `method`, if it is not."""
        return next((why for need in self.needs if (why := need(method)) is not None), None)

    def __call__(self, method: Subject) -> str:
        try:
            if (why := self.skipped(method)) is not None:
                raise CheckSkipped(why)
            return self.rule(method)
        except (CheckFailed, CheckSkipped):
            raise
        except AdapterError as error:
            raise CheckFailed(f"{type(error).__name__}: {error}", fix=error.fix or _REPAIR) from error
        except Exception as error:
            raise CheckFailed(one_line(error), fix=_REPAIR) from error


_REPAIR = "repair the rule that raised it"


def check(*needs: Reason) -> Callable[[Callable[[Any], str]], Check]:
    """Make a function a `Check`; its name and its docstring are the check's."""

    def make(rule: Callable[[Any], str]) -> Check:
        return Check(rule.__name__, (rule.__doc__ or "").partition("\n")[0], rule, needs)

    return make


@dataclass(frozen=True)
class Outcome:
    """What came of one check."""

    name: str
    state: Literal["ok", "FAIL", "skip", "xfail"]
    detail: str = ""
    """What was measured, what is wrong, or why it is skipped or expected to fail."""
    fix: str = ""


def run(checks: Sequence[Check], method: Subject, expected_failures: Mapping[str, str] | None = None) -> list[Outcome]:
    """The outcome of every check; nothing that a method raises gets out."""
    expected = expected_failures or {}
    known(expected, checks)
    return [_run(own, method, expected.get(own.name)) for own in checks]


def _run(own: Check, method: Subject, expected: str | None) -> Outcome:
    try:
        detail = own(method)
    except CheckSkipped as skipped:
        return Outcome(own.name, "skip", str(skipped))
    except CheckFailed as failed:
        if expected is None:
            return Outcome(own.name, "FAIL", failed.what, failed.fix)
        return Outcome(own.name, "xfail", f"{expected} ({failed.what})")
    if expected is None:
        return Outcome(own.name, "ok", detail)
    return Outcome(
        own.name, "FAIL", f"passed, and a failure was expected: {expected}", "take it out of expected_failures"
    )


def known(expected: Mapping[str, str], checks: Sequence[Check]) -> None:
    """Raise `UnknownName` for an expected failure of no check, or for no reason."""
    names = {own.name for own in checks}
    for name, reason in expected.items():
        if name not in names:
            raise UnknownName(f"there is no check {name!r} that could fail", fix=nearest(name, names))
        if not reason.strip():
            raise UnknownName(f"the check {name!r} is expected to fail for no reason", fix="say why")


def report(outcomes: Sequence[Outcome]) -> str:
    """A line per check, and the fix below one that failed.

    >>> print(report([Outcome("merge_is_pure", "FAIL", "the weight changed", "copy it")]))
    FAIL   merge_is_pure  the weight changed
           fix: copy it
    """
    width = max((len(o.name) for o in outcomes), default=0)
    return "\n".join(line(o, width) for o in outcomes)


def line(o: Outcome, width: int) -> str:
    """One outcome, its name in a column `width` wide."""
    text = f"{o.state:<5}  {o.name.ljust(width)}  {o.detail}".rstrip()
    return f"{text}\n{'':<5}  fix: {o.fix}" if o.state == "FAIL" else text


def require(condition: bool, what: str, *, fix: str) -> None:
    """Fail the running check with this text unless `condition`."""
    if not condition:
        raise CheckFailed(what, fix=fix)


def within(difference: float, bound: float, what: str, *, fix: str) -> None:
    """Fail the running check if `difference` exceeds `bound`, or is not a number."""
    require(
        math.isfinite(difference) and difference <= bound, f"{what}: |diff| {difference:.1e} > {bound:.0e}", fix=fix
    )


def one_line(error: BaseException) -> str:
    """An exception's type and text, without line breaks."""
    try:
        text = " ".join(str(error).split())
    except Exception:
        text = "its text cannot be shown"
    return printable(f"{type(error).__name__}: {text}" if text else type(error).__name__)
