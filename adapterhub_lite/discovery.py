"""Where plugins are, and importing one: entry points of installed packages, and files in a folder."""

from __future__ import annotations

import functools
import importlib
import os
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pluggy

from .errors import FileError, printable

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "adapterhub_lite"


@dataclass(frozen=True)
class Kind:
    """One hook: a word for what it gives, the prefix of plugins that give only that, where the name is."""

    hook: str
    word: str
    prefix: str
    attribute: str = "name"
    classes: bool = True


METHOD = Kind("methods", "method", "")
FORMAT = Kind("formats", "format", "format.", classes=False)
SITE_KIND = Kind("site_kinds", "site kind", "site.", attribute="kind")
COMMAND = Kind("commands", "command", "command.", classes=False)
RULE = Kind("rules", "rule", "rule.")
ROUTER = Kind("routers", "router", "router.")
KINDS = (METHOD, FORMAT, SITE_KIND, RULE, ROUTER, COMMAND)
_PREFIXES = tuple(kind.prefix for kind in KINDS if kind.prefix)


class Refused(Exception):
    """A plugin returned, or is, the wrong thing."""


class Found:
    """A plugin that was found: where it is, and what came of importing and asking it."""

    def __init__(self, name: str, source: EntryPoint | Path) -> None:
        self.name, self.source = name, source
        self.prefix = next((p for p in _PREFIXES if name.startswith(p) and name != p), "")
        self.disabled = False
        self.module: ModuleType | None = None
        self.asked: set[str] = set()  # hooks
        self.errors: dict[str, str] = {}  # by hook; "" is the import
        self.gives: dict[str, list[str]] = {}  # names by hook

    def may_give(self, kind: Kind) -> bool:
        return self.prefix == kind.prefix or (not self.prefix and kind is not COMMAND)

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


def entry_points() -> Iterable[EntryPoint]:
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
            name = normal(distribution.metadata["Name"])
            entries = [entry for entry in distribution.entry_points if entry.group == GROUP]
        except Exception:
            continue
        if name not in seen:  # the first on sys.path is the one that imports
            seen.add(name)
            yield from entries


def plugin_files(folder: Path) -> Iterator[tuple[str, Path]]:
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
        raise Refused("it is no Python file")
    module = module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        for half_made in [m for m in list(sys.modules) if m == name or m.startswith(f"{name}.")]:
            sys.modules.pop(half_made, None)
        raise
    return module


def normal(distribution: str) -> str:
    """A distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


# Frames in these files are never the plugin's.
_PACKAGES = [Path(module.__file__ or "").parent for module in (importlib, pluggy)]
_MACHINERY = (
    "<frozen ",
    __file__,
    str(Path(__file__).with_name("registry.py")),
    *(f"{package}{os.sep}" for package in _PACKAGES),
)
_BACKPORT = f"{os.sep}importlib_metadata{os.sep}"  # where it was imported, its finders are in the place of importlib's


def one_line(error: BaseException) -> str:
    """Type, message and place of an exception out of a plugin."""
    if isinstance(error, Refused):
        return printable(str(error))
    place, message = "", ""
    traceback = error.__traceback__
    while traceback is not None:
        file = traceback.tb_frame.f_code.co_filename
        if not file.startswith(_MACHINERY) and _BACKPORT not in file:
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
