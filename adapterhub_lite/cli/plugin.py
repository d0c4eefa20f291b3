"""`adapter plugin`: write a plugin package, and check what one gives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from .. import options
from ..errors import AdapterError, ConfigError, PluginError, UnknownName, printable
from ..registry import registry
from .output import print_json
from .scaffold import new

if TYPE_CHECKING:
    from ..protocol import Method
    from ..registry import Plugin
    from ..routing import Router
    from ..rule import Rule


@click.group()
def plugin() -> None:
    """Write a plugin package, and check it."""


plugin.add_command(new)


@plugin.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def check(name: str, as_json: bool) -> int:
    """Check that the method, merge rule or router NAME keeps the promises of every one.

    It is tried with its default options: a method on layers of every kind that it claims, a rule on small adapters, a
    router on small inputs and a small model. Where several have the name, rule.NAME is the rule and router.NAME the
    router. For other options, and for failures that are expected, write a test with
    adapterhub_lite.testing.parametrize_checks. Exit code: 0 if all checks pass, 1 if one fails, 2 if there is no such
    method, rule or router or it cannot be loaded.
    """
    try:
        kind, method, origin = _load(name)
    except AdapterError as error:
        click.echo(f"adapter: {error}", err=True)
        return 2
    from ..testing import checks_for
    from ..testing.check import line, run

    checks = checks_for(method)
    width = max(len(own.name) for own in checks)
    if not as_json:
        click.echo(f"plugin {origin.name} from {printable(origin.origin)}, which gives {', '.join(origin.gives)}")
    outcomes = []
    for own in checks:
        outcomes += run([own], method)
        if not as_json:
            click.echo(line(outcomes[-1], width))
    failed = [o.name for o in outcomes if o.state == "FAIL"]
    skipped = [o.name for o in outcomes if o.state == "skip"]
    if as_json:
        print_json(
            {
                kind: method.name,
                "options": options.plain(method),
                "plugin": vars(origin),
                "passed": not failed,
                "checks": [vars(o) for o in outcomes],
            }
        )
    else:
        passed = len(outcomes) - len(failed) - len(skipped)
        click.echo(f"{passed} ok, {len(failed)} failed, {len(skipped)} skipped")
    return 1 if failed else 0


def _load(name: str) -> tuple[str, Method | Rule | Router, Plugin]:
    """It with its default options, what kind it is, and the plugin that gives it. Raises `AdapterError`."""
    kind, cls = _found(name)
    name = cls.name
    origin = next(p for p in registry().plugins() if f"{kind} {name}" in p.gives)
    try:
        method = cls()
        options.plain(method)
    except ConfigError:
        raise
    except Exception as error:
        raise PluginError(
            f"{kind} {name!r} cannot be made with its default options: {type(error).__name__}: {error}",
            where=origin.origin,
            fix="give every option a default, or check it in a test with parametrize_checks",
        ) from error
    return kind, method, origin


def _found(name: str) -> tuple[str, type[Method] | type[Rule] | type[Router]]:
    kinds: dict[str, Any] = {"method": registry().method, "rule": registry().rule, "router": registry().router}
    kind, _, own = name.partition(".")
    if own and kind in kinds:
        return kind, kinds[kind](own)
    fixes = []
    for kind, get in kinds.items():
        try:
            return kind, get(name)
        except UnknownName as unknown:
            fixes.append(f"{kind}s: {unknown.fix}")
    raise UnknownName(f"there is no method, rule or router {name!r}", fix="; ".join(fixes))
