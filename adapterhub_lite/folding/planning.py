"""What a fold will do, from headers alone."""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .. import per_site
from .._version import __version__
from ..adapter import Adapter
from ..agreement import asked, common, conflicts, equal
from ..base_model import BaseModel
from ..checkpoint import TensorInfo
from ..checkpoint import whole as whole_file
from ..combine import labelled
from ..errors import ConfigError, NotMergeable, nearest
from ..per_site import Weight
from ..registry import registry
from ..source import DEFAULT, Source
from .copying import reading
from .manifest import Folded, Retained
from .places import Layer, layers, renaming, tied, tied_error
from .shards import Shard, Whole


@dataclass(frozen=True)
class Plan:
    """The base's files, the terms of the sum, and what they change."""

    model: BaseModel
    terms: tuple[tuple[Weight, Source], ...]
    layers: Mapping[str, Layer]
    wholes: tuple[Whole, ...]
    asked: Mapping[str, Any]
    """What is no part of the sum, as `agreement.asked` has it."""

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        """Each file of the base, with its share of the work."""
        found = []
        for checkpoint in self.model.shards.values():
            here = Shard(checkpoint)
            own = tuple(layer for layer in self.layers.values() if any(map(here.has, layer.touched)))
            found.append(Shard(checkpoint, own, tuple(whole for whole in self.wholes if here.has(whole.old))))
        return tuple(found)

    @property
    def sources(self) -> tuple[Source, ...]:
        return tuple(source for _, source in self.terms)

    @property
    def touched(self) -> int:
        """Bytes that are computed; all others are copied."""
        return sum(info.nbytes for shard in self.shards for info in shard.touched)

    def recipe(self, seed: int | None) -> dict[str, Any]:
        """How to make it again."""
        base = {name: header_digest(shard.path) for name, shard in self.model.shards.items()}
        how: dict[str, Any] = {"rounding": "nearest"} if seed is None else {"rounding": "stochastic", "seed": seed}
        terms = [{"weight": per_site.plain(w), **source.recipe()} for w, source in self.terms]
        told = self.model.named
        return {
            "rule": "fold",
            "base": told.pop("name"),
            **told,
            "headers": base,
            **how,
            **self.asked,
            "of": {"rule": "sum", "terms": terms},
        }

    def result(self, digests: Mapping[str, str], kept: Mapping[str, Sequence[float]], seed: int | None) -> Folded:
        """What came of it; `kept` as `Kept` has it, by layer."""
        modules = {name: _retained([kept[name]]) for name in sorted(kept)}
        return Folded(
            self.recipe(seed),
            dict(sorted(digests.items())),
            _retained([kept[name] for name in sorted(kept)]),
            modules,
            tuple(sorted(whole.old.name for whole in self.wholes)),
            tuple(map(str, self.model.left)),
        )

    def work(self, seed: int | None) -> dict[str, Any]:
        """What tells this fold from any other, for a journal: the recipe, and whether the base's files are the same."""
        stats = {name: shard.path.stat() for name, shard in self.model.shards.items()}
        files = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
        kept = [[w.old.name, str(whole_file(w.new.path).absolute()), w.new.start, w.rows] for w in self.wholes]
        recipe = self.recipe(seed)
        # Of an adapter in memory a recipe has no digest: no other run does the same work.
        held = secrets.token_hex(8) if '"adapter": null' in json.dumps(recipe) else None
        return {"version": __version__, "recipe": recipe, "files": files, "kept": kept, "held": held}


def planned(
    model: BaseModel,
    adapter: Adapter,
    *,
    weights: Sequence[Weight] | None = None,
    any_base: bool = False,
    keep: str | None = None,
) -> Plan:
    """What folding `adapter` into `model` will do. Raises as `fold` does, for all that headers tell."""
    terms = _weighed(adapter, weights)
    found = layers(model, [(_by_site(weight, source), source) for weight, source in terms])
    active = _active(terms)
    wholes: tuple[Whole, ...] = ()
    told: Mapping[str, Any] = {}
    if active:
        agreed = common(labelled(active), any_base=any_base, keep=keep)
        told = asked(agreed, any_base=any_base, keep=keep)
        wholes = _apart(found, _wholes(model, agreed.kept, agreed.kept_options, active))
    if not found and not wholes:
        raise NotMergeable("nothing is left to fold: all weights are zero", fix="give a weight that is not zero")
    return Plan(model, terms, found, wholes, told)


def contradictions(
    adapter: Adapter, *, weights: Sequence[Weight] | None = None, any_base: bool = False, keep: str | None = None
) -> list[NotMergeable]:
    """All in which the adapters that have a weight contradict each other, where `planned` tells the first."""
    return conflicts(labelled(_active(_weighed(adapter, weights))), any_base=any_base, keep=keep)


def _active(terms: Sequence[tuple[Weight, Source]]) -> list[Source]:
    """Those that have a weight somewhere."""
    weighed = [(w, _by_site(w, source), source) for w, source in terms]
    return [source for w, own, source in weighed if any(own.values()) or (not own and w != 0)]


def _retained(parts: Sequence[Sequence[float]]) -> Retained:
    numbers, unchanged, along, intended = (math.fsum(part[i] for part in parts) for i in range(4))
    share = unchanged / numbers if numbers else 0.0
    return Retained(float(f"{share:.6g}"), float(f"{along / intended:.6g}") if intended else None)


def _weighed(adapter: Adapter, weights: Sequence[Weight] | None) -> tuple[tuple[Weight, Source], ...]:
    """The terms, with other weights if they are given."""
    if weights is None:
        return adapter.terms
    if len(weights) != len(adapter.terms):
        raise ConfigError(f"{len(weights)} weights for {len(adapter.terms)} adapters", fix="give one for each")
    terms = tuple((weight, source) for weight, (_, source) in zip(weights, adapter.terms, strict=True))
    sites = {site for _, source in terms for site in source.sites}
    for weight, source in terms:
        per_site.check(weight, f"the weights of {next(iter(source.contents))}")
        for pattern in weight if isinstance(weight, Mapping) else ():
            if not any(per_site.first({pattern: True}, site) for site in sites):
                raise ConfigError(f"no adapted module is called {pattern!r}", fix=nearest(pattern, sites))
    return terms


def _by_site(weight: Weight, source: Source) -> dict[str, float]:
    depths = per_site.depths([*source.sites])
    return {site: per_site.weight_at(weight, site, depths) for site in source.sites}


def _wholes(
    model: BaseModel, kept: Mapping[str, Any], options: Mapping[str, Any], sources: Sequence[Source]
) -> tuple[Whole, ...]:
    """The base's tensors that trained heads, biases and token rows replace."""
    found, shared = [], tied(model)
    for name, value, rows in registry().format(DEFAULT).replaced(kept, options):
        old = _counterpart(model, name, sources)
        label = f"{value.path.parent.name}: the trained value of {name!r}"
        if old is None:
            raise NotMergeable(
                f"{label} has no place in the base",
                fix="pass --keep none to leave such values out, or give the base with it",
            )
        fits = (
            old.shape[1:] == value.shape[1:] and max(rows, default=-1) < old.shape[0]
            if rows
            else old.shape == value.shape
        )
        if not fits:
            raise NotMergeable(
                f"{label} has the shape {list(value.shape)}, and the base's {list(old.shape)}",
                fix="resize the base's vocabulary first, or pass --keep none",
            )
        if old.name in shared and not rows and not equal(old, value):  # rows that are trained are trained in both
            raise tied_error(old.name, "the trained value")
        found.append(Whole(old, value, rows))
    return tuple(found)


def _apart(found: Mapping[str, Layer], wholes: Sequence[Whole]) -> tuple[Whole, ...]:
    """The values that replace a tensor, where no adapter changes it too.

    PEFT saves the weights of an adapted embedding or output head beside the adapter: they are the base's own.
    """
    adapted = {info.name: layer for layer in found.values() for info in layer.touched}
    for whole in wholes:
        if (layer := adapted.get(whole.old.name)) is not None and (whole.rows or not equal(whole.old, whole.new)):
            raise NotMergeable(
                f"{layer.name!r} is adapted, and an adapter brings another {whole.old.name!r} along",
                fix="pass --keep none to take the base's",
            )
    return tuple(whole for whole in wholes if whole.old.name not in adapted)


def _counterpart(model: BaseModel, name: str, sources: Sequence[Source]) -> TensorInfo | None:
    for source in sources:
        module, _, parameter = name.rpartition(".")
        there = f"{renaming(source, model)(module)}.{parameter}"
        if there in model.tensors:
            return model.tensors[there]
    return model.tensors.get(name)


def header_digest(path: Path) -> str:
    """The SHA-256 of a file's header: of names, shapes and places, not of the numbers."""
    with reading(path) as handle:
        length = int.from_bytes(os.pread(handle, 8, 0), "little")
        return hashlib.sha256(os.pread(handle, length, 8)).hexdigest()
