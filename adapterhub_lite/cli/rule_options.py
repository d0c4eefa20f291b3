"""A rule's options as options of a command: `--rule ties` brings `--density`, with its type, bounds and help."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Union

import click

from .. import options
from ..errors import UnknownName
from ..registry import registry

if TYPE_CHECKING:
    from ..rule import Rule

RULE = "adapterhub_lite.rule"


class WithRule(click.Command):
    """A command with an option `--rule`, which has the options of the rule that is named, and of no other."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        name = named(args)
        if name is not None:
            try:
                ctx.meta[RULE] = registry().rule(name)
            except UnknownName as e:
                raise click.UsageError(str(e), ctx) from None
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as e:
            others = [own for own, cls in registry().rules().items() if e.option_name in _spelled(cls, self.params)]
            if not others:
                raise
            what = f"rule {name!r} has no option {e.option_name}" if name else f"{e.option_name} without --rule"
            raise click.UsageError(f"{what}; rules that have it: {', '.join(others)}", ctx) from None

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        params = super().get_params(ctx)
        cls = ctx.meta.get(RULE)
        if cls is None:
            return params
        return [*params[:-1], *click_options(cls, self.params), params[-1]]  # the last is --help


def named(args: Sequence[str]) -> str | None:
    """The rule that `--rule` names.

    >>> named(["a", "--rule", "ties"]), named(["--rule=dare_ties", "--", "a"]), named(["--", "--rule", "x"])
    ('ties', 'dare_ties', None)
    """
    for i, word in enumerate(args):
        if word == "--":
            return None
        if word == "--rule":
            return args[i + 1] if i + 1 < len(args) else None
        if word.startswith("--rule="):
            return word.partition("=")[2]
    return None


def rule_of(name: str | None, given: Mapping[str, Any]) -> Rule | None:
    """The rule with the options that were given. Raises `ConfigError`."""
    if name is None:
        return None
    cls = registry().rule(name)
    return options.build(cls, {key: v for key, v in given.items() if v is not None}, owner=f"rule {name!r}")


def click_options(cls: type[Rule], others: Sequence[click.Parameter]) -> list[click.Option]:
    """An option for each of the rule's fields that the command line can spell; --rule-NAME where NAME is taken."""
    hints = typing.get_type_hints(cls)
    made = []
    for field in dataclasses.fields(cls):
        kind = _type(hints[field.name], options.bounds(field))
        if kind is None:
            continue
        words = [str(field.metadata.get("help", "")), f"Default {_shown(field.default)}."]
        spelled = _flag(field.name, others)
        declared = f"{spelled}/--no-{spelled[2:]}" if kind is click.BOOL else spelled
        made.append(
            click.Option([declared, field.name], type=kind, default=None, help=" ".join(words), show_default=False)
        )
    return made


def _spelled(cls: type[Rule], others: Sequence[click.Parameter]) -> set[str]:
    return {name for own in click_options(cls, others) for name in own.opts}


def _flag(name: str, others: Sequence[click.Parameter]) -> str:
    flag = f"--{name.replace('_', '-')}"
    return f"--rule-{flag[2:]}" if any(flag in other.opts for other in others) else flag


def _shown(value: object) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _type(hint: Any, bounds: options.Bounds) -> click.ParamType[Any] | None:
    """How click reads a value of that type; None if it is a table or a list."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        (hint, *more) = [arg for arg in args if arg is not type(None)]
        return None if more else _type(hint, bounds)
    if origin is Literal:
        return click.Choice([str(arg) for arg in args]) if all(isinstance(arg, str) for arg in args) else None
    if hint is int:
        least = None if bounds.least is None else int(bounds.least)
        most = None if bounds.most is None else int(bounds.most)
        return click.IntRange(least, most, min_open=bounds.least_open, max_open=bounds.most_open)
    if hint is float and bounds == options.Bounds():
        return click.FLOAT
    if hint is float:
        return click.FloatRange(bounds.least, bounds.most, min_open=bounds.least_open, max_open=bounds.most_open)
    found: dict[Any, click.ParamType[Any]] = {bool: click.BOOL, str: click.STRING}
    return found.get(hint)
