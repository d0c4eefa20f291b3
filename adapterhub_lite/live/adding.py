"""A new adapter's tensors at its target layers, before it is attached."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ..errors import ConfigError
from ..protocol import Method
from ..seed import generator
from .swapping import reserved
from .targets import select
from .tree import Common, Part, common_of, trained


def fresh(
    model: nn.Module,
    method: Method,
    targets: str | Sequence[str] | Mapping[str, Mapping[str, Any]],
    exclude: str | Sequence[str],
    seed: int,
    reserve: int | None,
) -> tuple[Method, list[Part], Common | None]:
    """The method with what the targets say of it, its parts, and what they share."""
    if not isinstance(method, Method):
        raise ConfigError(f"{method!r} is not a method with its options", fix="give one, say ah.LoRA(rank=8)")
    found = select(model, method, words(targets), words(exclude))
    if isinstance(targets, Mapping):
        method = method.having({site.name: _options(targets, named) for site, named in found.items()})
    sites = list(found)
    common = common_of(method.shared(sites), sites)
    parts = []
    for site in sites:
        here = method.at(site.name)
        tensors = here.init(site, generator(seed, site.name))
        parts.append(Part(here, site, tensors, trained(tensors), common))
    return (method, parts, common) if reserve is None else (*reserved(parts, reserve), None)


def words(given: str | Iterable[str]) -> Sequence[str]:
    """One or several."""
    return (given,) if isinstance(given, str) else tuple(given)


def _options(targets: Mapping[str, Mapping[str, Any]], named: Sequence[str]) -> dict[str, Any]:
    """The options that these targets give a layer."""
    for target in named:
        if not isinstance(targets[target], Mapping):
            what = f"the options of target {target!r} are {targets[target]!r}"
            raise ConfigError(what, fix=f'give a mapping, say {{"{target}": {{"rank": 4}}}}')
    return {name: value for target in named for name, value in targets[target].items()}
