"""The plugins that are there and what each gives: found by name, imported on demand, isolated.

A plugin that cannot be imported, has a misspelt hook or returns the wrong things is
skipped; `Registry.plugins` tells its error. Errors are kept as text: an exception would
keep its frames alive.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
import sys
import threading
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import pluggy

from . import hookspecs
from .errors import FileError, PluginError, UnknownName, nearest, printable

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    import click

    from .format import Format
    from .protocol import Method
    from .site import Site

GROUP = "adapterhub_lite"
DISABLE = "ADAPTERHUB_LITE_DISABLE"


@dataclass(frozen=True)
class _Kind:
    """One hook: a word for what it gives, the prefix of plugins that give only that, where the name is."""

    hook: str
    word: str
    prefix: str
    attribute: str = "name"
    classes: bool = True


_METHOD = _Kind("methods", "method", "")
_FORMAT = _Kind("formats", "format", "format.", classes=False)
_SITE_KIND = _Kind("site_kinds", "site kind", "site.", attribute="kind")
_COMMAND = _Kind("commands", "command", "command.", classes=False)
_KINDS = (_METHOD, _FORMAT, _SITE_KIND, _COMMAND)
# Merge rules have a prefix, so that nothing else is looked for in their plugins, but no hook yet.
_PREFIXES = ("format.", "site.", "command.", "rule.")


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


class _Refused(Exception):  # noqa: N818 - caught in this file, its text is the whole message
    """A plugin returned, or is, the wrong thing."""


class _Found:
    """A plugin that was found: where it is, and what came of importing and asking it."""

    def __init__(self, name: str, source: EntryPoint | Path) -> None:
        self.name, self.source = name, source
        self.prefix = next((p for p in _PREFIXES if name.startswith(p) and name != p), "")
        self.disabled = False
        self.module: ModuleType | None = None
        self.asked: set[str] = set()  # hooks
        self.errors: dict[str, str] = {}  # by hook; "" is the import
        self.gives: dict[str, list[str]] = {}  # names by hook

    def may_give(self, kind: _Kind) -> bool:
        return self.prefix == kind.prefix or (not self.prefix and kind is not _COMMAND)

    @functools.cached_property
    def distribution(self) -> tuple[str, str]:
        """Name and version; empty for a file. Parses the metadata, so only asked for when it is shown."""
        if isinstance(self.source, Path) or self.source.dist is None:
            return "", ""
        try:
            metadata: Any = self.source.dist.metadata
            return str(metadata["Name"]), str(metadata["Version"])
        except Exception:  # no METADATA file; which exception that is depends on the Python version
            return "", ""

    @property
    def origin(self) -> str:
        if isinstance(self.source, Path):
            return str(self.source)
        return " ".join(self.distribution).strip() or self.source.value

    def load(self) -> object:
        return _import_file(self.source) if isinstance(self.source, Path) else self.source.load()

    def __str__(self) -> str:
        return f"plugin {self.name!r} ({self.origin})"


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
        self._found: dict[str, list[_Found]] = {}
        self._given: dict[str, dict[str, list[tuple[_Found, Any]]]] = {kind.hook: {} for kind in _KINDS}
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
            files = list(_plugin_files(folder))
            self._dirs.append(folder)
            for name, path in files:
                self._found.setdefault(name, []).append(_Found(name, path))
            self._disable()

    def method(self, name: str) -> type[Method]:
        """The method `name`. Only the plugin of that name is imported, if it gives the method."""
        found: type[Method] = self._get(_METHOD, name)
        return found

    def methods(self) -> dict[str, type[Method]]:
        """All methods, sorted by name. Broken plugins are left out; a clash raises."""
        return self._all(_METHOD)

    def format(self, name: str) -> Format:
        """The format `name`. Only the plugin `format.NAME` is imported, if it gives the format."""
        found: Format = self._get(_FORMAT, name)
        return found

    def formats(self) -> dict[str, Format]:
        """All formats, sorted by name. Broken plugins are left out; a clash raises."""
        return self._all(_FORMAT)

    def site_kinds(self) -> dict[str, type[Site]]:
        """All site kinds, sorted by name. Broken plugins are left out; a clash raises."""
        return self._all(_SITE_KIND)

    def commands(self) -> dict[str, Callable[[], click.Command]]:
        """A loader for each command that an entry point `command.NAME` announces, sorted by NAME.

        Nothing is imported before a loader is called; it raises if the plugin is broken, or
        if two announce the command, so that one such plugin does not take `--help` down.
        """
        with self._lock:
            self._discover()
            announced = {p.name for p in self._enabled() if p.prefix == _COMMAND.prefix}
            names = sorted(name.removeprefix(_COMMAND.prefix) for name in announced)
            return {name: functools.partial(self._get, _COMMAND, name) for name in names}

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
        for entry in _entry_points():
            self._found.setdefault(entry.name, []).append(_Found(entry.name, entry))
        self._discovered = True
        self._disable()

    def _disable(self) -> None:
        everyone = [p for group in self._found.values() for p in group]
        others = self._disabled - self._found.keys()
        # Only for these is it worth it to parse the metadata of the distributions.
        distributions = {_normal(p.distribution[0]) for p in everyone} if others else set()
        self._useless = {word for word in others if _normal(word) not in distributions}
        hit = {_normal(word) for word in others}
        for plugin in everyone:
            by_distribution = bool(hit) and _normal(plugin.distribution[0]) in hit
            plugin.disabled = plugin.name in self._disabled or by_distribution

    def _enabled(self) -> Iterator[_Found]:
        return (p for group in self._found.values() for p in group if not p.disabled)

    def _named(self, name: str) -> list[_Found]:
        return [p for p in self._found.get(name, ()) if not p.disabled]

    def _get(self, kind: _Kind, name: str) -> Any:
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
                if kind is not _COMMAND:  # those come from the plugin of their name, or not at all
                    self._ask_all(kind)
            givers = self._given[kind.hook].get(name, [])
            if len(givers) > 1:
                raise _clash(kind, name, givers)
            if not givers:
                raise self._missing(kind, name)
            return givers[0][1]

    def _all(self, kind: _Kind) -> dict[str, Any]:
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

    def _ask_all(self, kind: _Kind) -> None:
        for plugin in [p for p in self._enabled() if p.may_give(kind)]:
            self._ask(plugin, kind)

    def _ask(self, plugin: _Found, kind: _Kind) -> None:
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
            plugin.errors[stage] = _one_line(error)
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

    def _load(self, plugin: _Found) -> ModuleType:
        module = plugin.load()
        if not isinstance(module, ModuleType):
            raise _Refused(f"the entry point names a {type(module).__name__}, not a module")
        if not self._pluggy.is_registered(module):
            try:
                self._pluggy.register(module, plugin.name)
                self._check_hooks(module)
            except BaseException:
                if self._pluggy.has_plugin(plugin.name):
                    self._pluggy.unregister(name=plugin.name)
                raise
        wanted = [kind.hook for kind in _KINDS if plugin.may_give(kind)]
        if not any(self._implementations(module, hook) for hook in wanted):
            raise _Refused(f"it has no function decorated with @hookimpl and named {' or '.join(wanted)}")
        return module

    def _check_hooks(self, module: ModuleType) -> None:
        """What pluggy's check_pending does, for one plugin only."""
        known = [kind.hook for kind in _KINDS]
        for hook in self._pluggy.get_hookcallers(module) or ():
            for implementation in hook.get_hookimpls():
                if implementation.plugin is not module:
                    continue
                if not hook.has_spec() and not implementation.optionalhook:
                    raise _Refused(f"there is no hook {hook.name!r}; {nearest(hook.name, known)}")
                if implementation.wrapper or implementation.hookwrapper:
                    raise _Refused(f"{hook.name}() is a hook wrapper; a plugin speaks only for itself")

    def _implementations(self, module: ModuleType | None, hook: str) -> list[pluggy.HookImpl]:
        caller: pluggy.HookCaller = getattr(self._pluggy.hook, hook)
        return [i for i in caller.get_hookimpls() if i.plugin is module]

    def _call(self, plugin: _Found, kind: _Kind) -> dict[str, object]:
        """What the hook gives, by name."""
        given: dict[str, object] = {}
        for implementation in self._implementations(plugin.module, kind.hook):
            # Called one by one, not through pluggy's loop, where the first error would end all.
            things = implementation.function()
            if not isinstance(things, Iterable):
                raise _Refused(f"{kind.hook}() returned {_what(things)}, not an iterable")
            for thing in things:
                name = _name_of(thing, kind)
                if name in given:
                    raise _Refused(f"{kind.hook}() gave two named {name!r}")
                given[name] = thing
        if kind is _COMMAND:  # the entry point's name is the announcement; there is no other
            announced = plugin.name.removeprefix(kind.prefix)
            if announced not in given:
                raise _Refused(f"it gives no command {announced!r}; {nearest(announced, given)}")
            return {announced: given[announced]}
        return given

    def _missing(self, kind: _Kind, name: str) -> PluginError | UnknownName:
        """The error for a name that nothing gives: unknown, if every plugin that may give it was heard."""
        unheard = {p: error for p in self._enabled() if p.may_give(kind) and (error := self._error(p, kind))}
        for plugin, error in unheard.items():
            if plugin.name in (name, kind.prefix + name):
                what = f"the plugin of {kind.word} {name!r} is broken: {error}"
                return PluginError(what, where=plugin, fix=f"repair it, or set {DISABLE}={plugin.name}")
        fix = nearest(name, self._given[kind.hook])
        if kind is _METHOD:
            fix += " (others: pip install the plugin that gives it)"
        if unheard:
            errors = "; ".join(f"{plugin}: {error}" for plugin, error in unheard.items())
            what = f"no working plugin gives a {kind.word} {name!r}, and these are broken: {errors}"
            return PluginError(what, fix=fix)
        if any(p.disabled for own in (name, kind.prefix + name) for p in self._found.get(own, ())):
            fix = f"its plugin is disabled: take it out of {DISABLE}"
        return UnknownName(f"there is no {kind.word} {name!r}", fix=fix)

    def _error(self, plugin: _Found, kind: _Kind) -> str:
        """Why the plugin could not be heard about this kind; "" if it was."""
        namesakes = self._named(plugin.name)
        if len(namesakes) > 1:
            return _namesakes(namesakes).what
        return plugin.errors.get("") or plugin.errors.get(kind.hook, "")

    def _report(self, plugin: _Found) -> Plugin:
        if plugin.disabled:
            return Plugin(plugin.name, plugin.origin, "disabled")
        errors = list(plugin.errors.values())
        namesakes = self._named(plugin.name)
        if len(namesakes) > 1:
            errors.append(_namesakes(namesakes).what)
        gives = []
        for kind in _KINDS:
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


def _entry_points() -> Iterable[EntryPoint]:
    from importlib import metadata  # 25 ms that an importer of this file need not spend

    try:
        return metadata.entry_points(group=GROUP)
    except Exception:
        # Some distribution, ours or not, has an unreadable entry_points.txt: do without that one.
        return list(_readable_entry_points(metadata.distributions()))


def _readable_entry_points(distributions: Iterable[Any]) -> Iterator[EntryPoint]:
    seen: set[str] = set()
    for distribution in distributions:
        try:
            name = _normal(distribution.metadata["Name"])
            entries = [entry for entry in distribution.entry_points if entry.group == GROUP]
        except Exception:
            continue
        if name not in seen:  # the first on sys.path is the one that imports
            seen.add(name)
            yield from entries


def _plugin_files(folder: Path) -> Iterator[tuple[str, Path]]:
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        what = f"plugins cannot be read from here: {error.strerror}"
        raise FileError(what, where=folder, fix="give a folder of plugin files") from error
    for path in paths:
        if path.name.startswith(("_", ".")):
            continue
        if path.suffix == ".py" and path.is_file():
            yield path.name.removesuffix(".py"), path
        elif (path / "__init__.py").is_file():
            yield path.name, path


def _import_file(path: Path) -> ModuleType:
    """The plugin at `path`, under a name that is the same in every process and nobody else's."""
    from importlib.util import module_from_spec, spec_from_file_location

    readable = re.sub(r"\W", "_", path.name.removesuffix(".py"))
    name = f"_adapterhub_lite_plugin_{readable}_{zlib.crc32(os.fsencode(path)):08x}"
    spec = spec_from_file_location(name, path / "__init__.py" if path.is_dir() else path)
    if spec is None or spec.loader is None:
        raise _Refused("it is no Python file")
    module = module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        for half_made in [m for m in list(sys.modules) if m == name or m.startswith(f"{name}.")]:
            sys.modules.pop(half_made, None)
        raise
    return module


def _name_of(thing: object, kind: _Kind) -> str:
    if kind.classes and not isinstance(thing, type):
        raise _Refused(f"{kind.hook}() gave {_what(thing)}, not a class")
    if kind is _COMMAND:
        import click

        if not isinstance(thing, click.Command):
            raise _Refused(f"{kind.hook}() gave {_what(thing)}, not a click command")
    name = getattr(thing, kind.attribute, None)
    if not isinstance(name, str) or not name or name != name.strip() or not name.isprintable():
        raise _Refused(f"{kind.hook}() gave {_what(thing)}, whose {kind.attribute!r} is no usable name")
    return name


def _what(thing: object) -> str:
    if thing is None:
        return "None"
    return f"the class {thing.__name__}" if isinstance(thing, type) else f"a {type(thing).__name__}"


def _namesakes(plugins: Sequence[_Found]) -> PluginError:
    name, origins = plugins[0].name, " and ".join(sorted(p.origin for p in plugins))
    fix = f"uninstall one, or name its distribution in {DISABLE}"
    return PluginError(f"{len(plugins)} plugins are named {name!r}: {origins}", fix=fix)


def _clash(kind: _Kind, name: str, givers: Sequence[tuple[_Found, object]]) -> PluginError:
    plugins = sorted((plugin for plugin, _ in givers), key=lambda p: p.name)
    what = f"{kind.word} {name!r} is given by {' and '.join(map(str, plugins))}"
    return PluginError(what, fix=f"set {DISABLE} to one of {', '.join(p.name for p in plugins)}")


def _normal(distribution: str) -> str:
    """A distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


# Frames in these files are never the plugin's.
_PACKAGES = [Path(module.__file__ or "").parent for module in (importlib, pluggy)]
_MACHINERY = ("<frozen ", __file__, *(f"{package}{os.sep}" for package in _PACKAGES))


def _one_line(error: BaseException) -> str:
    """Type, message and place of an exception out of a plugin."""
    if isinstance(error, _Refused):
        return printable(str(error))
    place, message = "", ""
    traceback = error.__traceback__
    while traceback is not None:
        file = traceback.tb_frame.f_code.co_filename
        if not file.startswith(_MACHINERY):
            place = f" ({file}:{traceback.tb_lineno})"
        traceback = traceback.tb_next
    try:
        if isinstance(error, SyntaxError) and error.filename:
            message, place = str(error.msg), f" ({error.filename}:{error.lineno})"
        else:
            message = str(error)
    except Exception:
        message = "its text cannot be shown"
    text = " ".join(f"{type(error).__name__}: {message}".split()) if message else type(error).__name__
    return printable(text + place)
