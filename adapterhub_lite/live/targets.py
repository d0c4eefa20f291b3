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

ALL_LINEAR, ALL = "all-linear", "all"


def select(model: nn.Module, method: Method, targets: Sequence[str], exclude: Sequence[str]) -> dict[Site, list[str]]:
    """The sites that `targets` name and `exclude` does not, each with those of the targets that name it.

    Raises for a word that names nothing.
    """
    modules, kinds = dict(base_modules(model)), site_kinds()
    chosen: dict[str, list[str]] = {}
    for target in targets:
        if target in (ALL_LINEAR, ALL):
            hits = _adaptable(model, modules, method, kinds, LinearSite if target == ALL_LINEAR else Site)
        else:
            hits = [name for name in modules if _names(target, name)]
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
        raise _refusal(model, name, method, "is a container, which would take adapters for one of its own layers")
    kind = kind_of(module, kinds_for(method, kinds)) or kind_of(module)
    if kind is None:
        raise _refusal(model, name, method, f"no site kind knows what a {type(module).__name__} computes")
    if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention):
        raise _refusal(model, name, method, "MultiheadAttention reads the weight of this layer and never calls it")
    if kind.kind not in method.site_kinds:
        claims = ", ".join(sorted(method.site_kinds))
        raise _refusal(
            model, name, method, f"method {method.name!r} adapts no layer of kind {kind.kind!r}, only {claims}"
        )
    kind.check(name, module)
    if hasattr(module, SLOT) and not isinstance(getattr(module, SLOT), Slot):
        raise _refusal(model, name, method, f"the layer has an attribute {SLOT!r} of its own")
    site = kind.of(name, module)
    why = method.at(name).refuses(site) if method.defines("refuses") else None
    if why is not None:
        raise _refusal(model, name, method, f"method {method.name!r} can do nothing here: {why}")
    return site


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


def _adaptable(
    model: nn.Module, modules: Mapping[str, nn.Module], method: Method, kinds: Kinds, among: type[Site]
) -> list[str]:
    """All that are called, of a kind of `among` that `method` adapts, and not refused by it; but the output head."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    kinds, names, refused = [kind for kind in kinds if not kind.general], [], {}
    for name, module in modules.items():
        kind = kind_of(module, kinds)
        if kind is None or not issubclass(kind, among) or kind.kind not in method.site_kinds:
            continue
        called = not isinstance(modules.get(name.rpartition(".")[0]), nn.MultiheadAttention)
        if not called or module is head:
            continue
        why = method.at(name).refuses(kind.of(name, module)) if method.defines("refuses") else None
        if why is None:
            names.append(name)
        else:
            refused[name] = why
    if refused and not names:
        name, why = next(iter(refused.items()))
        raise _refusal(model, name, method, f"method {method.name!r} can do nothing here: {why}")
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
        kinds = kinds_for(method)
        modules = {n: m for n, m in modules.items() if kind_of(m, kinds)}
    return {".".join(name.split(".")[-1 - word.count(".") :]) for name in modules if name}


def _refusal(model: nn.Module, name: str, method: Method, why: str) -> ConfigError:
    kinds = kinds_for(method)
    inside = [n for n, module in base_modules(model) if n.startswith(f"{name}.") and kind_of(module, kinds)]
    return ConfigError(why, where=name, fix=f"target layers in it, say {inside[0]!r}" if inside else "exclude it")
