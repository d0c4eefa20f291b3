"""What we say of an adapter ourselves, in the safetensors header, where PEFT does not look."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from adapterhub_lite import AdapterError, FileError, Method, UnknownName, strict_json
from adapterhub_lite.checkpoint import Checkpoint
from adapterhub_lite.format import SiteContents
from adapterhub_lite.options import build
from adapterhub_lite.registry import registry

from .layout import family_of

OURS = "adapterhub_lite"  # our entry in the header
SHAPES = "shapes"  # in it, of layers whose shape the tensors do not tell
MAX_DIMENSION = 1 << 31


def read_facts(checkpoint: Checkpoint) -> Mapping[str, Any]:
    text = checkpoint.metadata.get(OURS)
    if text is None:
        return {}
    try:
        facts = strict_json.parse(text)
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict):
        raise FileError(
            f"the {OURS} entry of the header is not a valid JSON object",
            where=checkpoint.path,
            fix="the file is damaged; download or save it again",
        )
    return facts


def named(facts: Mapping[str, Any], plain: Method, methods: Callable[[str | None], Any], path: Path) -> Method:
    """The method that our entry in the header names, if the config says the same of it; else what that alone means.

    So another reader computes the same, and a config that was edited holds.
    """
    named = facts.get("method")
    if named is None:
        return plain
    try:
        found: Method = build(methods(named["name"]), named["options"], owner=f"method {named['name']!r}")
    except UnknownName:  # the plugin is not installed
        return plain
    except (AdapterError, TypeError, KeyError, AttributeError):
        raise FileError(
            f"the {OURS} entry of the header names no method with its options",
            where=path,
            fix="the file is damaged; download or save it again",
        ) from None
    return found if found.peft_type == plain.peft_type and found.to_peft() == plain.to_peft() else plain


def untold(method: Method, site: str, part: SiteContents) -> list[int]:
    """The layer's shape as a reader of the file will take it, if the saved tensors leave it open; else []."""
    kind, shape, _ = method.at(site).place(family_of(method.at(site), part), part.shapes)
    if -1 not in shape:
        return []
    return list(part.weight_shape if kind == part.kind else part.shape)  # GPT-2's linear layers are transposed


def with_shape(name: str, part: SiteContents, facts: Mapping[str, Any]) -> SiteContents:
    """The site with the layer's shape from our entry in the header, where the tensors do not tell it."""
    told = facts.get(SHAPES)
    shape = told.get(name) if -1 in part.weight_shape and isinstance(told, dict) else None
    if not isinstance(shape, list) or len(shape) != len(part.weight_shape):
        return part
    for known, n in zip(part.weight_shape, shape, strict=True):
        if type(n) is not int or not 0 < n < MAX_DIMENSION or known not in (-1, n):
            return part
    if part.shape == part.weight_shape:  # a plain matrix, for which no site is made: that would import torch
        out, into = shape
        return replace(part, weight_shape=(out, into), shape=(out, into))
    return replace(part, weight_shape=tuple(shape), shape=registry().site_kind(part.kind)(name, tuple(shape)).shape)
