"""The plugins that are there and what each gives: found by name, imported on demand, isolated.

A plugin that cannot be imported, has a misspelt hook or returns the wrong things is
skipped; `Registry.plugins` tells its error. Errors are kept as text: an exception would
keep its frames alive.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import pluggy

from . import hookspecs
from .discovery import (
    COMMAND,
    FORMAT,
    GROUP,
    KINDS,
    METHOD,
    ROUTER,
    RULE,
    SITE_KIND,
    Found,
    Kind,
    Refused,
    entry_points,
    normal,
    one_line,
    plugin_files,
)
from .errors import PluginError, UnknownName, nearest

if TYPE_CHECKING:
    import click

    from .format import Format
    from .protocol import Method
    from .routing import Router
    from .rule import Rule
    from .site import Site

DISABLE = "ADAPTERHUB_LITE_DISABLE"


@dataclass(frozen=True)
class Plugin:
    """What is known of one plugin so far."""

    name: str
    origin: str
    """Its distribution and version, or its file."""
    state: Literal["ok", "disabled", "broken", "not loaded"]
    error: str = ""
    """One line; empty but for a broken plugin and for a disabled name that no plugin has."""
    gives: tuple[str, ...] = ()
    """What it has been asked for and gave: "method vera", "site kind linear", …"""


class Registry:
    """Finds plugins once, and imports one when something that it may give is first asked for.

    Two plugins that claim one name make that name, and no other, unusable: asking for it raises
    and so does listing its kind, while other names can still be had one by one; `plugins` shows both
    as broken. Two plugins that are themselves named alike are not imported at all, for nothing tells
    which is meant. A plugin that gives a method of its own name is taken at its word as long as no
    other plugin needed to be imported: that another gives the same is noticed when it is.
    """

    def __init__(self, *, plugins_dirs: Sequence[Path] = (), disabled: Collection[str] | None = None) -> None:
        """`disabled` holds names of plugins, or of distributions, meaning all their plugins.

        A name means a distribution only if no plugin has it. By default: $ADAPTERHUB_LITE_DISABLE.
        """
        words = os.environ.get(DISABLE, "").split(",") if disabled is None else disabled
        self._disabled = {word.strip() for word in words} - {""}
        self._useless: set[str] = set()  # disabled names that no plugin has
        self._found: dict[str, list[Found]] = {}
        self._given: dict[str, dict[str, list[tuple[Found, Any]]]] = {kind.hook: {} for kind in KINDS}
        self._discovered = False
        self._dirs: list[Path] = []
        # Reentrant, because a plugin may look up another one while it is imported.
        self._lock = threading.RLock()
        self._pluggy = pluggy.PluginManager(GROUP)
        self._pluggy.add_hookspecs(hookspecs)
        for folder in plugins_dirs:
            self.add_plugins_dir(folder)

    def add_plugins_dir(self, folder: Path) -> None:
        """Offer the uninstalled plugins in `folder`: files NAME.py and packages NAME/__init__.py.

        They are imported under a private name, so none can shadow an installed module; a package
        imports its own files relatively. Names that start with "_" or "." are left out.
        """
        folder = folder.resolve()
        with self._lock:
            if folder in self._dirs:
                return
            files = list(plugin_files(folder))
            self._dirs.append(folder)
            for name, path in files:
                self._found.setdefault(name, []).append(Found(name, path))
            self._disable()

    def method(self, name: str) -> type[Method]:
        """The method `name`. Only the plugin of that name is imported, if it gives the method."""
        found: type[Method] = self._get(METHOD, name)
        return found

    def methods(self) -> dict[str, type[Method]]:
        """All methods, sorted by name. Broken plugins are left out; a clash raises."""
        return self._all(METHOD)

    def format(self, name: str) -> Format:
        """The format `name`. Only the plugin `format.NAME` is imported, if it gives the format."""
        found: Format = self._get(FORMAT, name)
        return found

    def formats(self) -> dict[str, Format]:
        """All formats, sorted by name. Broken plugins are left out; a clash raises."""
        return self._all(FORMAT)

    def site_kind(self, name: str) -> type[Site]:
        """The site kind `name`."""
        found: type[Site] = self._get(SITE_KIND, name)
        return found

    def site_kinds(self) -> dict[str, type[Site]]:
        """All site kinds, sorted by name. Broken plugins are left out; a clash raises."""
        return self._all(SITE_KIND)

    def rule(self, name: str) -> type[Rule]:
        """The merge rule `name`. Only the plugin `rule.NAME` is imported, if it gives the rule."""
        found: type[Rule] = self._get(RULE, name)
        return found

    def rules(self) -> dict[str, type[Rule]]:
        """All merge rules, sorted by name. Broken plugins are left out; a clash raises."""
        return self._all(RULE)

    def router(self, name: str) -> type[Router]:
        """The router `name`. Only the plugin `router.NAME` is imported, if it gives the router."""
        found: type[Router] = self._get(ROUTER, name)
        return found

    def routers(self) -> dict[str, type[Router]]:
        """All routers, sorted by name. Broken plugins are left out; a clash raises."""
        return self._all(ROUTER)

    def commands(self) -> dict[str, Callable[[], click.Command]]:
        """A loader for each command that an entry point `command.NAME` announces, sorted by NAME.

        Nothing is imported before a loader is called; it raises if the plugin is broken, or
        if two announce the command, so that one such plugin does not take `--help` down.
        """
        with self._lock:
            self._discover()
            announced = {p.name for p in self._enabled() if p.prefix == COMMAND.prefix}
            names = sorted(name.removeprefix(COMMAND.prefix) for name in announced)
            return {name: functools.partial(self._get, COMMAND, name) for name in names}

    def plugins(self) -> list[Plugin]:
        """Every plugin, sorted by name, as far as it is known: nothing is imported for this.

        Call `methods()` first to know about methods; its error, if it raises one, is here again. A
        disabled name that no plugin has is in the list too, for it may be a misspelling.
        """
        with self._lock:
            self._discover()
            shown = [self._report(p) for group in self._found.values() for p in group]
            shown += [Plugin(w, f"${DISABLE}", "disabled", "no plugin has this name") for w in self._useless]
            return sorted(shown, key=lambda p: (p.name, p.origin))

    def _discover(self) -> None:
        if self._discovered:
            return
        for entry in entry_points():
            self._found.setdefault(entry.name, []).append(Found(entry.name, entry))
        self._discovered = True
        self._disable()

    def _disable(self) -> None:
        everyone = [p for group in self._found.values() for p in group]
        others = self._disabled - self._found.keys()
        # Only for these is it worth it to parse the metadata of the distributions.
        distributions = {normal(p.distribution[0]) for p in everyone} if others else set()
        self._useless = {word for word in others if normal(word) not in distributions}
        hit = {normal(word) for word in others}
        for plugin in everyone:
            by_distribution = bool(hit) and normal(plugin.distribution[0]) in hit
            plugin.disabled = plugin.name in self._disabled or by_distribution

    def _enabled(self) -> Iterator[Found]:
        return (p for group in self._found.values() for p in group if not p.disabled)

    def _named(self, name: str) -> list[Found]:
        return [p for p in self._found.get(name, ()) if not p.disabled]

    def _get(self, kind: Kind, name: str) -> Any:
        with self._lock:
            self._discover()
            for own in dict.fromkeys((kind.prefix + name, name)):
                candidates = [p for p in self._named(own) if p.may_give(kind)]
                if len(candidates) > 1:
                    raise _namesakes(candidates)
                for plugin in candidates:
                    self._ask(plugin, kind)
                if name in self._given[kind.hook]:
                    break
            else:
                if kind is not COMMAND:  # those come from the plugin of their name, or not at all
                    self._ask_all(kind)
            givers = self._given[kind.hook].get(name, [])
            if len(givers) > 1:
                raise _clash(kind, name, givers)
            if not givers:
                raise self._missing(kind, name)
            return givers[0][1]

    def _all(self, kind: Kind) -> dict[str, Any]:
        with self._lock:
            self._discover()
            self._ask_all(kind)
            for name in self._found:
                namesakes = [p for p in self._named(name) if p.prefix == kind.prefix]
                if len(namesakes) > 1:
                    raise _namesakes(namesakes)
            given = self._given[kind.hook]
            for name, givers in given.items():
                if len(givers) > 1:
                    raise _clash(kind, name, givers)
            return {name: given[name][0][1] for name in sorted(given)}

    def _ask_all(self, kind: Kind) -> None:
        for plugin in [p for p in self._enabled() if p.may_give(kind)]:
            self._ask(plugin, kind)

    def _ask(self, plugin: Found, kind: Kind) -> None:
        """Import the plugin and call one hook, unless that was done; an error is noted, not raised."""
        if kind.hook in plugin.asked or "" in plugin.errors or len(self._named(plugin.name)) > 1:
            return
        # Noted before the import, because it may lead back here.
        plugin.asked.add(kind.hook)
        stage = ""
        try:
            if plugin.module is None:
                plugin.module = self._load(plugin)
            stage = kind.hook
            given = self._call(plugin, kind)
        except (Exception, SystemExit) as error:
            plugin.errors[stage] = one_line(error)
            return
        except BaseException:  # an interrupt says nothing about the plugin: the next lookup tries again
            plugin.asked.discard(kind.hook)
            raise
        plugin.gives[kind.hook] = sorted(given)
        for name, thing in given.items():
            givers = self._given[kind.hook].setdefault(name, [])
            # Several entry points may lead to one module, and a plugin may pass on another's class.
            if not any(other.module is plugin.module or known is thing for other, known in givers):
                givers.append((plugin, thing))

    def _load(self, plugin: Found) -> ModuleType:
        module = plugin.load()
        if not isinstance(module, ModuleType):
            raise Refused(f"the entry point names a {type(module).__name__}, not a module")
        if not self._pluggy.is_registered(module):
            try:
                self._pluggy.register(module, plugin.name)
                self._check_hooks(module)
            except BaseException:
                if self._pluggy.has_plugin(plugin.name):
                    self._pluggy.unregister(name=plugin.name)
                raise
        wanted = [kind.hook for kind in KINDS if plugin.may_give(kind)]
        if not any(self._implementations(module, hook) for hook in wanted):
            raise Refused(f"it has no function decorated with @hookimpl and named {' or '.join(wanted)}")
        return module

    def _check_hooks(self, module: ModuleType) -> None:
        """What pluggy's check_pending does, for one plugin only."""
        known = [kind.hook for kind in KINDS]
        for hook in self._pluggy.get_hookcallers(module) or ():
            for implementation in hook.get_hookimpls():
                if implementation.plugin is not module:
                    continue
                if not hook.has_spec() and not implementation.optionalhook:
                    raise Refused(f"there is no hook {hook.name!r}; {nearest(hook.name, known)}")
                if implementation.wrapper or implementation.hookwrapper:
                    raise Refused(f"{hook.name}() is a hook wrapper; a plugin speaks only for itself")

    def _implementations(self, module: ModuleType | None, hook: str) -> list[pluggy.HookImpl]:
        caller: pluggy.HookCaller = getattr(self._pluggy.hook, hook)
        return [i for i in caller.get_hookimpls() if i.plugin is module]

    def _call(self, plugin: Found, kind: Kind) -> dict[str, object]:
        """What the hook gives, by name."""
        given: dict[str, object] = {}
        for implementation in self._implementations(plugin.module, kind.hook):
            # Called one by one, not through pluggy's loop, where the first error would end all.
            things = implementation.function()
            if not isinstance(things, Iterable):
                raise Refused(f"{kind.hook}() returned {_what(things)}, not an iterable")
            for thing in things:
                name = _name_of(thing, kind)
                if name in given:
                    raise Refused(f"{kind.hook}() gave two named {name!r}")
                given[name] = thing
        if kind is COMMAND:  # the entry point's name is the announcement; there is no other
            announced = plugin.name.removeprefix(kind.prefix)
            if announced not in given:
                raise Refused(f"it gives no command {announced!r}; {nearest(announced, given)}")
            return {announced: given[announced]}
        return given

    def _missing(self, kind: Kind, name: str) -> PluginError | UnknownName:
        """The error for a name that nothing gives: unknown, if every plugin that may give it was heard."""
        unheard = {p: error for p in self._enabled() if p.may_give(kind) and (error := self._error(p, kind))}
        for plugin, error in unheard.items():
            if plugin.name in (name, kind.prefix + name):
                what = f"the plugin of {kind.word} {name!r} is broken: {error}"
                return PluginError(what, where=plugin, fix=f"repair it, or set {DISABLE}={plugin.name}")
        fix = nearest(name, self._given[kind.hook])
        if kind is METHOD:
            fix += " (others: pip install the plugin that gives it)"
        if unheard:
            errors = "; ".join(f"{plugin}: {error}" for plugin, error in unheard.items())
            what = f"no working plugin gives a {kind.word} {name!r}, and these are broken: {errors}"
            return PluginError(what, fix=fix)
        if any(p.disabled for own in (name, kind.prefix + name) for p in self._found.get(own, ())):
            fix = f"its plugin is disabled: take it out of {DISABLE}"
        return UnknownName(f"there is no {kind.word} {name!r}", fix=fix)

    def _error(self, plugin: Found, kind: Kind) -> str:
        """Why the plugin could not be heard about this kind; "" if it was."""
        namesakes = self._named(plugin.name)
        if len(namesakes) > 1:
            return _namesakes(namesakes).what
        return plugin.errors.get("") or plugin.errors.get(kind.hook, "")

    def _report(self, plugin: Found) -> Plugin:
        if plugin.disabled:
            return Plugin(plugin.name, plugin.origin, "disabled")
        errors = list(plugin.errors.values())
        namesakes = self._named(plugin.name)
        if len(namesakes) > 1:
            errors.append(_namesakes(namesakes).what)
        gives = []
        for kind in KINDS:
            for name in plugin.gives.get(kind.hook, ()):
                gives.append(f"{kind.word} {name}")
                givers = self._given[kind.hook][name]
                if len(givers) > 1:
                    errors.append(_clash(kind, name, givers).what)
        state: Literal["broken", "ok", "not loaded"]
        state = "broken" if errors else "ok" if plugin.asked else "not loaded"
        return Plugin(plugin.name, plugin.origin, state, "; ".join(errors), tuple(gives))


_process: Registry | None = None
_process_lock = threading.Lock()


def registry() -> Registry:
    """The registry of this process, made on first use."""
    global _process
    with _process_lock:
        if _process is None:
            _process = Registry()
        return _process


def use_plugins_dir(folder: str | Path) -> None:
    """Offer the uninstalled plugins in `folder` in this process (see `Registry.add_plugins_dir`)."""
    registry().add_plugins_dir(Path(folder))


def reset() -> None:
    """Forget the process's registry: the next lookup discovers anew. For tests."""
    global _process
    with _process_lock:
        _process = None


def _name_of(thing: object, kind: Kind) -> str:
    if kind.classes and not isinstance(thing, type):
        raise Refused(f"{kind.hook}() gave {_what(thing)}, not a class")
    if kind is COMMAND:
        import click

        if not isinstance(thing, click.Command):
            raise Refused(f"{kind.hook}() gave {_what(thing)}, not a click command")
    name = getattr(thing, kind.attribute, None)
    if not isinstance(name, str) or not name or name != name.strip() or not name.isprintable():
        raise Refused(f"{kind.hook}() gave {_what(thing)}, whose {kind.attribute!r} is no usable name")
    return name


def _what(thing: object) -> str:
    if thing is None:
        return "None"
    return f"the class {thing.__name__}" if isinstance(thing, type) else f"a {type(thing).__name__}"


def _namesakes(plugins: Sequence[Found]) -> PluginError:
    name, origins = plugins[0].name, " and ".join(sorted(p.origin for p in plugins))
    fix = f"uninstall one, or name its distribution in {DISABLE}"
    return PluginError(f"{len(plugins)} plugins are named {name!r}: {origins}", fix=fix)


def _clash(kind: Kind, name: str, givers: Sequence[tuple[Found, object]]) -> PluginError:
    plugins = sorted((plugin for plugin, _ in givers), key=lambda p: p.name)
    what = f"{kind.word} {name!r} is given by {' and '.join(map(str, plugins))}"
    return PluginError(what, fix=f"set {DISABLE} to one of {', '.join(p.name for p in plugins)}")
