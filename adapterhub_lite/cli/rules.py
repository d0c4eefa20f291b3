"""`adapter rules`: what merge rules there are, and their options."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from typing import TYPE_CHECKING, Any, Literal

import click

from .. import options
from ..errors import UnknownName
from ..registry import registry
from .output import print_json, table

if TYPE_CHECKING:
    from ..rule import Rule


@click.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def rules(name: str | None, as_json: bool) -> None:
    """List the merge rules that plugins give, or show one: its formula, paper and options.

    \b
    adapter rules
    adapter rules ties
    """
    if name is None:
        found = registry().rules()
        if as_json:
            print_json({own: describe(cls) for own, cls in found.items()})
            return
        rows = [
            (own, "full rank" if cls.full_rank else "low rank", ", ".join(options.plain(cls())) or "-", cls.paper)
            for own, cls in found.items()
        ]
        click.echo(table(rows, ("rule", "result", "options", "paper")))
        return
    try:
        cls = registry().rule(name)
    except UnknownName as e:
        raise click.UsageError(str(e)) from None
    if as_json:
        print_json(describe(cls))
        return
    click.echo(inspect.cleandoc(cls.__doc__ or ""))
    rows = [(key, own["type"], str(own["default"]), own["help"]) for key, own in describe(cls)["options"].items()]
    if rows:
        click.echo("\n" + table(rows, ("option", "values", "default", "")))


def describe(cls: type[Rule]) -> dict[str, Any]:
    """All that a rule says of itself, JSON-able."""
    rule, hints = cls(), typing.get_type_hints(cls)
    return {
        "paper": cls.paper,
        "version": cls.version,
        "full_rank": cls.full_rank,
        "takes": cls.takes,
        "weights": rule.weighs,
        "options": {
            field.name: {
                "type": _values(hints[field.name], options.bounds(field)),
                "default": options.plain(rule)[field.name],
                "help": field.metadata.get("help", ""),
            }
            for field in dataclasses.fields(cls)
        },
    }


def _values(hint: Any, bounds: options.Bounds) -> str:
    if typing.get_origin(hint) is Literal:
        return ", ".join(map(str, typing.get_args(hint)))
    kind = getattr(hint, "__name__", str(hint))
    return f"{kind} {bounds}".strip()
