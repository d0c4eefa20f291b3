"""Which tensor of the file is whose: a site's, one that all sites have in common, or a whole value to keep."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from adapterhub_lite import ConfigError, FileError, Method, NotMergeable
from adapterhub_lite.checkpoint import Checkpoint, TensorInfo
from adapterhub_lite.format import SiteContents, is_floating

from .layout import CONFIG, PREFIX, ROOT, WEIGHTS, plain_key, within

# Embeddings that PEFT saves beside the adapter although nobody trained them (save_embedding_layers), by the names that
# models have for them.
EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "word_embeddings", "shared", "embed_in", "embed_out")
# Where PEFT keeps a trained module and the base's. With save_embedding_layers it writes copies from there too, which it
# does not read back.
WRAPPED = (".modules_to_save", ".original_module")

Own = tuple[set[str], dict[str, TensorInfo]]  # of one site: the families it may be of, and its tensors by suffix


def shared_tensors(checkpoint: Checkpoint, method: Method) -> dict[str, TensorInfo]:
    found = {name: checkpoint.tensors.get(ROOT + key) for name, key in method.peft_shared().items()}
    for name, tensor in found.items():
        if tensor is None:
            lacking = ROOT + method.peft_shared()[name]
            raise FileError(f"{lacking!r} is missing", where=checkpoint.path, fix="restore the file")
        check_floating(ROOT + method.peft_shared()[name], tensor, checkpoint.path)
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def check_floating(key: str, tensor: TensorInfo, path: Path) -> None:
    if not is_floating(tensor):
        what = f"{key!r} holds {tensor.dtype}, not floating point numbers"
        raise FileError(what, where=path, fix="dequantise or restore the file")


def sort_tensors(
    checkpoint: Checkpoint,
    method: Method,
    shared: Mapping[str, TensorInfo],
    kept_options: Mapping[str, Any],
    folder: Path,
) -> tuple[dict[str, SiteContents], dict[str, TensorInfo]]:
    """Every tensor of the file belongs to one site's adapter or is kept; any other is refused."""
    path = folder / WEIGHTS
    found, others = _by_site(checkpoint, method, path)
    embeddings = {site for site, (possible, _) in found.items() if possible == {"embedding"}}
    kept = _kept(others, method, kept_options, embeddings, path)
    sites = {site: _placed(site, *own, method, shared, path) for site, own in sorted(found.items())}
    if not sites:
        raise FileError(f"holds no tensor of method {method.name!r}", where=path, fix="restore the file")
    for option, mark in (("modules_to_save", ""), ("trainable_token_indices", "token_adapter")):
        if option in kept_options and not any(mark in key for key in kept):
            raise FileError(
                f"{option} is {kept_options[option]!r}, and no such tensor is in the file",
                where=path,
                fix=f"restore the file, or remove {option} from {CONFIG}",
            )
    return sites, kept


def _by_site(checkpoint: Checkpoint, method: Method, path: Path) -> tuple[dict[str, Own], dict[str, TensorInfo]]:
    """The method's tensors by site, and all others."""
    # The families that have each suffix, longest first, so that none hides a longer one.
    families: dict[str, set[str]] = {}
    for family, names in method.peft_keys().items():
        for suffix in names.values():
            families.setdefault(suffix, set()).add(family)
    suffixes = sorted(families, key=lambda s: -len(s))
    found: dict[str, Own] = {}
    others: dict[str, TensorInfo] = {}
    shared_keys = {ROOT + key for key in method.peft_shared().values()}
    for key, tensor in checkpoint.tensors.items():
        if key in shared_keys:
            continue
        if not key.startswith(PREFIX):
            raise FileError(
                f"{key!r} does not begin with {PREFIX!r}",
                where=path,
                fix="rename the tensors: readers of this layout pass over them and do not say so",
            )
        inner = key.removeprefix(PREFIX)
        match = next((s for s in suffixes if inner.endswith("." + s)), None)
        if match:
            site = inner[: -len(match) - 1]
            if "" in site.split("."):
                raise FileError(f"{key!r} names no module", where=path, fix="restore the file")
            possible, tensors = found.setdefault(site, (set(method.peft_keys()), {}))
            possible &= families[match]
            if not possible:
                raise FileError(f"{key!r} is one adapter too many at {site!r}", where=path, fix="restore the file")
            check_floating(key, tensor, path)
            tensors[match] = tensor
        else:
            others[key] = tensor
    return found, others


def _kept(
    others: Mapping[str, TensorInfo],
    method: Method,
    options: Mapping[str, Any],
    embeddings: Collection[str],
    path: Path,
) -> dict[str, TensorInfo]:
    """The whole values that PEFT saves beside the adapter; a tensor that is none is refused."""
    kept: dict[str, TensorInfo] = {}
    for key, tensor in others.items():
        inner = key.removeprefix(PREFIX)
        module, _, parameter = key.rpartition(".")
        wrapper = next((w for w in WRAPPED if module.endswith(w)), None)
        if wrapper and f"{module.removesuffix(wrapper)}.{parameter}" in others:
            continue
        if not _is_kept(inner, options, embeddings):
            raise _unexpected(key, inner, method, path)
        if kept.setdefault(plain_key(key), tensor) is not tensor:
            raise FileError(f"{key!r} stands twice, with base_layer and without", where=path, fix="restore the file")
    return kept


def _placed(
    site: str,
    possible: set[str],
    by_suffix: Mapping[str, TensorInfo],
    method: Method,
    shared: Mapping[str, TensorInfo],
    path: Path,
) -> SiteContents:
    """One site's part: every tensor of its family is there, and their shapes fit a layer."""
    here, family = method.at(site), min(possible)
    tensors = {name: by_suffix[s] for name, s in method.peft_keys()[family].items() if s in by_suffix}
    missing = sorted(here.peft_keys()[family].keys() - here.peft_optional() - tensors.keys())
    if missing:
        lacking = f"{PREFIX}{site}.{here.peft_keys()[family][missing[0]]}"
        raise FileError(f"{lacking!r} is missing", where=path, fix="restore the file")
    try:
        place = here.place(family, {name: t.shape for name, t in {**shared, **tensors}.items()})
    except NotMergeable as e:
        raise NotMergeable(f"at {site!r} {e.what}", where=path, fix=e.fix) from None
    except ConfigError as e:
        raise FileError(f"at {site!r} {e.what}", where=path, fix=e.fix or "restore the file") from None
    return SiteContents(*place, dict(sorted(tensors.items())))


def _is_kept(key: str, options: Mapping[str, Any], embeddings: Collection[str]) -> bool:
    """Whether PEFT saves `key` as a whole value beside the adapter."""
    module, _, parameter = plain_key(key).rpartition(".")
    if any(f".{m}." in f".{key}" for m in options.get("modules_to_save", ())):
        return True
    if parameter == "bias" and "bias" in options:
        return True
    if key.endswith(".token_adapter.trainable_tokens_delta"):
        return "trainable_token_indices" in options
    module = module.removesuffix(".token_adapter.base_layer")
    return parameter == "weight" and (module in embeddings or any(within(e, module) for e in EMBEDDINGS))


def _unexpected(key: str, inner: str, method: Method, path: Path) -> FileError:
    parts = inner.split(".")
    for names in method.peft_keys().values():
        for suffix in names.values():
            head, *tail = suffix.split(".")
            if head in parts and parts[parts.index(head) + 2 :] == tail:
                name = parts[parts.index(head) + 1 : parts.index(head) + 2]
                if name and name != tail[:1]:
                    return FileError(
                        f"{key!r} has the adapter's name {name[0]!r} in it",
                        where=path,
                        fix=f"rename it to {PREFIX}{'.'.join([*parts[: parts.index(head)], suffix])!r}",
                    )
    return FileError(
        f"{key!r} is no tensor of method {method.name!r} and nothing the config mentions",
        where=path,
        fix="restore the file, or correct the config",
    )
