"""What adapters must agree on before their sum means anything: the base, its layers, and whole values they carry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import PureWindowsPath
from typing import Any

from . import sketch as sketches
from .checkpoint import TensorInfo, sha256, whole
from .errors import NotMergeable
from .format import Contents, SiteContents

ANY_BASE = "pass --any-base (any_base=True) if they are the same model"
CHUNK = 8 << 20  # bytes compared at once


def common_sites(parts: Sequence[tuple[str, Mapping[str, SiteContents]]]) -> dict[str, SiteContents]:
    """All sites of all parts, sorted; a site that two parts know must be the same layer to both."""
    sites: dict[str, tuple[str, SiteContents]] = {}
    for label, own in parts:
        for name, part in own.items():
            other, known = sites.setdefault(name, (label, part))
            if (known.kind, known.weight_shape) != (part.kind, part.weight_shape):
                raise NotMergeable(
                    f"at {name!r} {other} adapts a {known.kind} of shape {list(known.weight_shape)} and "
                    f"{label} a {part.kind} of shape {list(part.weight_shape)}",
                    fix="take adapters of one base model",
                )
    return {name: sites[name][1] for name in sorted(sites)}


def common(parts: Mapping[str, Contents], *, any_base: bool = False, keep: str | None = None) -> Contents:
    """What the sum of `parts` inherits: base model, task, kept values and target suffixes; the sites are left empty.

    `keep` names the part whose kept values (heads, biases, token rows) are taken where they differ; "none" drops
    them all. Raises `NotMergeable` where the parts contradict each other.
    """
    first = next(iter(parts.values()))
    base, revision = _base(parts, any_base)
    sketch = _sketch(parts, any_base)
    tasks = {own.task for own in parts.values()}
    suffixes = [own.targets for own in parts.values()]
    kept, options = _kept(parts, keep)
    _apart(parts, kept, options)
    # A module that is trained whole is no target, whatever it is called: without it, its parts would be.
    if any(own.kept_options.get("modules_to_save") != options.get("modules_to_save") for own in parts.values()):
        suffixes.append(None)
    return replace(
        first,
        sites={},
        shared={},
        base=base,
        revision=revision,
        base_class=None,
        task=tasks.pop() if len(tasks) == 1 else None,
        kept=kept,
        kept_options=options,
        targets=None if None in suffixes else tuple(sorted({t for own in suffixes for t in own or ()})),
        transposed=any(own.transposed for own in parts.values()),
        facts={"base": sketch} if sketch else {},
    )


def conflicts(parts: Mapping[str, Contents], *, any_base: bool, keep: str | None) -> list[NotMergeable]:
    """All that `common` would refuse, where it tells the first."""

    def apart() -> None:
        try:
            kept = _kept(parts, keep)
        except NotMergeable:
            return  # which is told already
        _apart(parts, *kept)

    found = []
    for look in (lambda: _base(parts, any_base), lambda: _sketch(parts, any_base), lambda: _kept(parts, keep), apart):
        try:
            look()
        except NotMergeable as e:
            found.append(e)
    return found


def asked(agreed: Contents, *, any_base: bool, keep: str | None) -> dict[str, Any]:
    """The choices that were made, for a recipe: what is kept is known by the file that it is from."""
    found: dict[str, Any] = {"any_base": True} if any_base else {}
    if keep is not None:
        found["keep"] = sha256(next(iter(agreed.kept.values())).path) if agreed.kept else "none"
    return found


def _base(parts: Mapping[str, Contents], any_base: bool) -> tuple[str | None, str | None]:
    classes = {own.base_class: label for label, own in parts.items() if own.base_class}
    if len(classes) > 1 and not any_base:
        (one, a), (two, b), *_ = classes.items()
        raise NotMergeable(f"{a} adapts a {one} and {b} a {two}", fix=ANY_BASE)
    named = {label: own for label, own in parts.items() if own.base}
    if not named:
        return None, None
    label, first = next(iter(named.items()))
    for other, own in named.items():
        # A copy on somebody's disk has another path, / or \ in it, and as a rule the same last name.
        if (
            not any_base
            and PureWindowsPath(str(own.base)).name.lower() != PureWindowsPath(str(first.base)).name.lower()
        ):
            raise NotMergeable(
                f"{label} adapts the base model {first.base!r} and {other} adapts {own.base!r}",
                fix=ANY_BASE,
            )
    revisions = {own.revision for own in named.values()}
    return first.base, revisions.pop() if len(revisions) == 1 else None


def _sketch(parts: Mapping[str, Contents], any_base: bool) -> sketches.Sketch:
    """All that the parts tell of the base's weights; that of the first where two tell of one site."""
    found: sketches.Sketch = {}
    for label, own in parts.items():
        told = sketches.told(own.facts)
        if not any_base and (site := sketches.differing(found, told)) is not None:
            raise NotMergeable(
                f"{label} was trained on other weights at {site!r} than the adapters before it: on another base model",
                fix=ANY_BASE,
            )
        found = {**told, **found}
    return {site: found[site] for site in sketches.sampled(list(found))}


def _kept(parts: Mapping[str, Contents], keep: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    if keep == "none":
        return {}, {}
    if keep is not None:
        if keep not in parts:
            raise NotMergeable(f"{keep!r} is not one of the adapters merged", fix=f"choose from {', '.join(parts)}")
        return dict(parts[keep].kept), dict(parts[keep].kept_options)
    label, first = next(iter(parts.items()))
    for other, own in parts.items():
        for key in sorted(first.kept.keys() | own.kept.keys()):
            a, b = first.kept.get(key), own.kept.get(key)
            if a is None or b is None:
                why = f"only {label if b is None else other} has it"
            elif not equal(a, b):
                why = f"{label} and {other} have different values"
            else:
                continue
            raise NotMergeable(
                f"{key!r} replaces a base value (a head, bias or token row), and {why}: such values have no sum",
                fix=f"pass --keep {label} (or another of the adapters) to take all of them from it, or --keep none",
            )
        if first.kept and _plain(first.kept_options) != _plain(own.kept_options):
            raise NotMergeable(
                f"{label} and {other} keep base values under different options: "
                f"{dict(first.kept_options)} and {dict(own.kept_options)}",
                fix="pass --keep ADAPTER to take all of them from one",
            )
    return dict(first.kept), dict(first.kept_options) if first.kept else {}


def _apart(parts: Mapping[str, Contents], kept: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Raise `NotMergeable` if a module would have both an adapter and values that replace it."""
    rows = {key.removesuffix(".token_adapter.trainable_tokens_delta") for key in kept if ".token_adapter." in key}
    for label, own in parts.items():
        for site in own.sites:
            whole = next((m for m in options.get("modules_to_save", ()) if f".{m}." in f".{site}."), None)
            if whole is not None or any(row.endswith(f".{site}") for row in rows):
                raise NotMergeable(
                    f"{label} adapts {site!r}, which another adapter replaces "
                    + (f"(modules_to_save: {whole})" if whole is not None else "in part (trainable_token_indices)"),
                    fix="leave one of the two out, or pass --keep none to drop the values that replace the base's",
                )


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Names in any order; the order of token indices is that of the rows."""
    return {key: sorted(value) if key == "modules_to_save" else value for key, value in options.items()}


def equal(a: TensorInfo, b: TensorInfo) -> bool:
    """Bit by bit, in bounded memory: a head can have a gigabyte."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    with open(whole(a.path), "rb") as one, open(whole(b.path), "rb") as two:
        one.seek(a.start)
        two.seek(b.start)
        return all(one.read(n) == two.read(n) for at in range(a.start, a.stop, CHUNK) if (n := min(CHUNK, a.stop - at)))
