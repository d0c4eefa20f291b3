"""The hooks of a plugin, all of them.

A plugin is a module that has at least one function decorated with `hookimpl` and named
as below. An entry point of the group `adapterhub_lite` makes it known, and the entry
point's name is the plugin's name. A prefix says that the plugin gives nothing else, so
that it is left alone when something else is wanted: `format.NAME`, `site.NAME`,
`rule.NAME`, `router.NAME`, `command.NAME`. Without a prefix it may give methods, formats,
site kinds, rules and routers.

Hooks are called to find out what there is, at most once each in a process; nothing that
computes goes through them. A hook that raises loses what it would have given, and nobody
else's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from collections.abc import Iterable

    import click

    from .format import Format
    from .protocol import Method
    from .routing import Router
    from .rule import Rule
    from .site import Site

hookspec = pluggy.HookspecMarker("adapterhub_lite")
hookimpl = pluggy.HookimplMarker("adapterhub_lite")


@hookspec
def methods() -> Iterable[type[Method]]:  # type: ignore[empty-body]
    """Adapter methods: classes, each with its own `name`.

    Called when a method is asked for that has the plugin's name, when a method is asked for
    that no plugin of its name gives, and when all methods are listed. Only plugins without
    a prefix are asked.
    """


@hookspec
def formats() -> Iterable[Format]:  # type: ignore[empty-body]
    """Dialects of adapter folders: objects, each with its own `name`.

    Called when a folder is about to be read or written, or formats are listed. Plugins named
    `format.NAME` and plugins without a prefix are asked; for one format by its name, those
    of that name come first.
    """


@hookspec
def site_kinds() -> Iterable[type[Site]]:  # type: ignore[empty-body]
    """Kinds of layer: classes, each with its own `kind`.

    Called when adapters meet layers: on a live model, or for the matrix form of a stored
    weight. Plugins named `site.NAME` and plugins without a prefix are asked. These are
    the plugins that may import torch at the top of their file.
    """


@hookspec
def rules() -> Iterable[type[Rule]]:  # type: ignore[empty-body]
    """Merge rules: classes, each with its own `name`.

    Called when a rule is asked for by its name, or rules are listed. Plugins named `rule.NAME`
    and plugins without a prefix are asked; for one rule by its name, those of that name come
    first.
    """


@hookspec
def routers() -> Iterable[type[Router]]:  # type: ignore[empty-body]
    """Routers: classes, each with its own `name`.

    Called when a router is asked for by its name, or a composition that has one is loaded. Plugins named
    `router.NAME` and plugins without a prefix are asked; for one router by its name, those of that name come first.
    """


@hookspec
def commands() -> Iterable[click.Command]:  # type: ignore[empty-body]
    """Subcommands of `adapter`: click commands, each with its own `name`.

    Called when a command is run, or its help shown, that an entry point `command.NAME` announces; the
    command of that NAME must be among those returned. Plugins of other names are never asked.
    """
