"""Which layers an adapter goes to, and why some can have none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from ..errors import ConfigError, UnknownName, nearest
from ..protocol import Method
from ..registry import registry
from ..site import Site
from ..site.linear import LinearSite
from .tree import SLOT, Slot, base_modules

ALL_LINEAR = "all-linear"


def select(model: nn.Module, method: Method, targets: Sequence[str], exclude: Sequence[str]) -> dict[Site, list[str]]:
    """The sites that `targets` name and `exclude` does not, each with those of the targets that name it.

    Raises for a word that names nothing.
    """
    modules, kinds = dict(base_modules(model)), site_kinds()
    chosen: dict[str, list[str]] = {}
    for target in targets:
        everything = target == ALL_LINEAR
        hits = _linear(model, modules, method, kinds) if everything else [n for n in modules if _names(target, n)]
        if not hits:
            raise UnknownName(
                f"target {target!r} names no module",
                fix=f"{nearest(target, _words_for(target, modules, method))} "
                f"({method.name} adapts: {', '.join(sorted(method.site_kinds))})",
            )
        for name in hits:
            chosen.setdefault(name, []).append(target)
    for word in exclude:
        if not any(_names(word, name) for name in modules):
            raise UnknownName(f"exclude={word!r} names no module", fix=nearest(word, _words_for(word, modules)))
    left = [name for name in modules if name in chosen and not _excluded(name, exclude)]
    if not left:
        raise ConfigError("no layer is left to adapt", fix="give more targets, or exclude less")
    return {site_of(model, name, method, kinds): chosen[name] for name in left}


def site_of(model: nn.Module, name: str, method: Method, kinds: Kinds | None = None) -> Site:
    """The site of the module `name`. Raises `ConfigError`, which tells why, if there is none or none for `method`."""
    module = model.get_submodule(name)
    if not name:
        raise ConfigError("the model is a single layer, which has no name", fix="adapt nn.Sequential(model)")
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        raise _refusal(model, name, "is a container, which would take adapters for one of its own layers")
    kind = kind_of(module, kinds_for(method, kinds)) or kind_of(module)
    if kind is None:
        raise _refusal(model, name, f"no site kind knows what a {type(module).__name__} computes")
    if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention):
        raise _refusal(model, name, "MultiheadAttention reads the weight of this layer and never calls it")
    if kind.kind not in method.site_kinds:
        claims = ", ".join(sorted(method.site_kinds))
        raise _refusal(model, name, f"method {method.name!r} adapts no layer of kind {kind.kind!r}, only {claims}")
    kind.check(name, module)
    if hasattr(module, SLOT) and not isinstance(getattr(module, SLOT), Slot):
        raise _refusal(model, name, f"the layer has an attribute {SLOT!r} of its own")
    return kind.of(name, module)


Kinds = Sequence[type[Site]]


def site_kinds() -> Kinds:
    """All kinds of layer, general ones last; to be asked for once where many modules are looked at."""
    return sorted(registry().site_kinds().values(), key=lambda kind: kind.general)


def kinds_for(method: Method, kinds: Kinds | None = None) -> Kinds:
    """Those that `method` adapts."""
    return [kind for kind in (kinds or site_kinds()) if kind.kind in method.site_kinds]


def kind_of(module: nn.Module, kinds: Kinds | None = None) -> type[Site] | None:
    """The first of `kinds` that accepts the module; by default, of those that know what it computes."""
    if kinds is None:
        kinds = [kind for kind in site_kinds() if not kind.general]
    return next((kind for kind in kinds if kind.accepts(module)), None)


def _linear(model: nn.Module, modules: Mapping[str, nn.Module], method: Method, kinds: Kinds) -> list[str]:
    """All that are linear and called, of a kind that `method` adapts, but the output head."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    names = []
    for name, module in modules.items():
        kind = kind_of(module, kinds)
        if kind is None or not issubclass(kind, LinearSite) or kind.kind not in method.site_kinds:
            continue
        called = not isinstance(modules.get(name.rpartition(".")[0]), nn.MultiheadAttention)
        if called and module is not head:
            names.append(name)
    return names


def _names(word: str, name: str) -> bool:
    """Whether `word` is the name or its end behind a dot; a glob may be either too."""
    return bool(name) and (fnmatchcase(name, word) or fnmatchcase(name, "*." + word))


def _excluded(name: str, exclude: Sequence[str]) -> bool:
    parts = name.split(".")
    return any(_names(word, ".".join(parts[:n])) for word in exclude for n in range(1, len(parts) + 1))


def _words_for(word: str, modules: Mapping[str, nn.Module], method: Method | None = None) -> set[str]:
    """What a misspelt word may have meant: ends of names, with as many dots."""
    if method is not None:
        modules = {n: m for n, m in modules.items() if kind_of(m, kinds_for(method))}
    return {".".join(name.split(".")[-1 - word.count(".") :]) for name in modules if name}


def _refusal(model: nn.Module, name: str, why: str) -> ConfigError:
    inside = [n for n, module in base_modules(model) if n.startswith(f"{name}.") and kind_of(module)]
    return ConfigError(why, where=name, fix=f"target layers in it, say {inside[0]!r}" if inside else "exclude it")
