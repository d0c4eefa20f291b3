"""`adapter methods`: what plugins are there, and what they can do."""

from __future__ import annotations

from typing import Any

import click

from ..errors import PluginError
from ..protocol import Method
from ..registry import Plugin, registry
from .output import print_json, table


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def methods(as_json: bool) -> None:
    """List the methods that plugins give, and the plugins that are broken.

    Whoever installs a package with an entry point in the group `adapterhub_lite` adds to this list. Set
    ADAPTERHUB_LITE_DISABLE=name,… to leave plugins out, --plugins-dir to try files that are not installed.
    """
    found, clash = _methods()
    plugins = registry().plugins()
    origin = {given.removeprefix("method "): p for p in plugins for given in p.gives if given.startswith("method ")}
    if as_json:
        print_json(
            {
                "methods": {name: _described(cls, origin.get(name)) for name, cls in found.items()},
                "plugins": [vars(plugin) for plugin in plugins],
            }
        )
        return
    rows = [
        (name, ", ".join(sorted(cls.site_kinds)), cls.peft_type or "-", _origin(origin.get(name)), cls.paper)
        for name, cls in found.items()
    ]
    if rows:
        click.echo(table(rows, ("method", "layers", "PEFT type", "from", "paper")))
    else:
        click.echo("no method was found; install a plugin, or see ADAPTERHUB_LITE_DISABLE")
    for plugin in plugins:
        if plugin.state == "broken":
            click.echo(f"broken: {plugin.name} ({plugin.origin}): {plugin.error}", err=True)
        elif plugin.state == "disabled":
            click.echo(f"disabled: {plugin.name}" + (f" ({plugin.error})" if plugin.error else ""), err=True)
    if clash:
        raise PluginError(clash)


def _methods() -> tuple[dict[str, type[Method]], str]:
    """All methods that can be used; if two plugins claim one name, which."""
    try:
        return registry().methods(), ""
    except PluginError as e:
        names = [given.removeprefix("method ") for p in registry().plugins() for given in p.gives]
        usable: dict[str, type[Method]] = {}
        for name in sorted(set(names)):
            try:
                usable[name] = registry().method(name)
            except PluginError:
                continue
        return usable, str(e)


def _described(cls: type[Method], plugin: Plugin | None) -> dict[str, Any]:
    return {
        "paper": cls.paper,
        "site_kinds": sorted(cls.site_kinds),
        "reads_weight": cls.reads_weight,
        "carries_low_rank": cls.carries_low_rank,
        "peft_type": cls.peft_type,
        "from": _origin(plugin),
    }


def _origin(plugin: Plugin | None) -> str:
    return plugin.origin if plugin else "?"
