"""PEFT's folder: `adapter_config.json` and `adapter_model.safetensors`, read strictly, written reproducibly.

Where PEFT guesses, warns or ignores, reading refuses: what is not understood could change what
the adapter computes.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from adapterhub_lite import AdapterError, ConfigError, FileError, Method, NotMergeable, UnknownName, hookimpl
from adapterhub_lite.checkpoint import Checkpoint, TensorInfo, unpickle
from adapterhub_lite.columns import Joining, joined, split
from adapterhub_lite.errors import nearest, os_error
from adapterhub_lite.format import Contents, Format, SiteContents, Writer
from adapterhub_lite.options import build
from adapterhub_lite.registry import registry
from adapterhub_lite.writer import TensorWriter

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
ROOT = "base_model."  # what an adapter has only once hangs on PEFT's own module
PREFIX = ROOT + "model."
OURS = "adapterhub_lite"  # our entry in the safetensors header, which PEFT ignores
SHAPES = "shapes"  # in it, of layers whose shape the tensors do not tell
MAX_DIMENSION = 1 << 31
MAX_CONFIG = 16 << 20  # bytes
MAX_KEPT = 1000  # names in modules_to_save
MAX_JOINED = 10_000  # sites in one tensor
NAMED = "sites"  # in our entry, of adapters whose file names none

# Entries that do not change what the saved tensors compute: which modules were chosen, and bookkeeping.
INERT = frozenset(
    [
        "auto_mapping",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "megatron_core",
        "peft_version",
        "runtime_config",
    ]
)
# Embeddings that PEFT saves beside the adapter although nobody trained them (save_embedding_layers), by the names that
# models have for them.
EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "word_embeddings", "shared", "embed_in", "embed_out")
# Entries with names of modules that must be among the target modules.
SUBSETS = frozenset(["feedforward_modules"])
# Where PEFT keeps a trained module and the base's. With save_embedding_layers it writes copies from there too, which it
# does not read back.
WRAPPED = (".modules_to_save", ".original_module")


class PeftFormat:
    """The layout of Hugging Face PEFT (https://github.com/huggingface/peft)."""

    name = "peft"
    carrier = "lora"

    def recognises(self, folder: Path) -> bool:
        return (folder / CONFIG).is_file() or (folder / WEIGHTS).is_file() or (folder / PICKLE).is_file()

    def files(self, folder: Path) -> list[Path]:
        return [folder / CONFIG, folder / WEIGHTS]

    def read(self, folder: Path, methods: Callable[[str | None], Any]) -> Contents:
        config = _read_config(folder / CONFIG)
        if not (folder / WEIGHTS).is_file() and (folder / PICKLE).is_file():
            raise FileError(
                "a pickle can run code when it is read, so it is not",
                where=folder / PICKLE,
                fix=unpickle(PICKLE),
            )
        checkpoint = Checkpoint.open(folder / WEIGHTS)
        facts = _facts(checkpoint)
        entries = _Entries(config, folder / CONFIG)
        base, revision = entries.text("base_model_name_or_path"), entries.text("revision")
        task = entries.text("task_type")
        transposed = entries.flag("fan_in_fan_out")
        targets = entries.targets()
        kept_options = entries.kept()
        method = _named(facts, entries.method(methods), methods, folder / WEIGHTS)
        count = 0 if method.peft_joined is None else entries.count(method.peft_joined)
        entries.refuse_leftovers()
        if count:
            sites, named = _split_tensors(checkpoint, method, count, facts)
            return Contents(
                method=method,
                sites=sites,
                numbered=not named,
                base=base,
                revision=revision,
                base_class=_base_class(config),
                task=task,
                facts=facts,
            )
        shared = _shared(checkpoint, method)
        sites, kept = _sort_tensors(checkpoint, method, shared, kept_options, folder)
        sites = {name: _with_shape(name, part, facts) for name, part in sites.items()}
        if targets is not None:
            wanted = set(targets)
            for site in sites:
                if not any(tail in wanted for tail in _tails(site)):
                    raise FileError(
                        f"has an adapter at {site!r}, which target_modules does not name",
                        where=folder / WEIGHTS,
                        fix=f"correct target_modules in {CONFIG}",
                    )
        selective = any(config.get(key) for key in ("exclude_modules", "layers_to_transform"))
        return Contents(
            method=method,
            sites=sites,
            base=base,
            revision=revision,
            base_class=_base_class(config),
            task=task,
            shared=shared,
            kept=kept,
            kept_options=kept_options,
            targets=None if selective else targets,
            transposed=transposed,
            facts=facts,
        )

    @contextmanager
    def writer(self, folder: Path, contents: Contents, *, room: int) -> Iterator[Writer]:
        method = contents.method
        if method.peft_type is None:
            raise ConfigError(f"PEFT has no method like {method.name!r}, so its layout cannot hold it")
        if method.peft_joined is not None:
            with _joined_writer(folder, contents, room) as writer:
                yield writer
            return
        config = {
            **method.to_peft(),
            "peft_type": method.peft_type,
            "task_type": contents.task,
            "base_model_name_or_path": contents.base and _public(contents.base),
            "revision": contents.revision,
            "inference_mode": True,
            "fan_in_fan_out": contents.transposed,
            "target_modules": sorted(contents.targets or contents.sites),
            "modules_to_save": None,
            **contents.kept_options,
        }
        for entry in SUBSETS & config.keys():  # as target_modules spells them
            config[entry] = [t for t in config["target_modules"] if any(_within(own, t) for own in config[entry])]
        keys = {
            (site, name): f"{PREFIX}{site}.{method.at(site).peft_keys()[_family(method.at(site), part)][name]}"
            for site, part in contents.sites.items()
            for name in part.tensors
        }
        layout = {keys[site, name]: t for site, part in contents.sites.items() for name, t in part.tensors.items()}
        shared = {name: ROOT + method.peft_shared()[name] for name in contents.shared}
        layout.update({shared[name]: t for name, t in contents.shared.items()})
        kept = {key: _beside(key, contents.sites) for key in contents.kept}
        layout.update({kept[key]: t for key, t in contents.kept.items()})
        described = {key: (t.dtype, t.shape) for key, t in layout.items()}
        shapes = {site: shape for site, part in contents.sites.items() if (shape := _untold(method, site, part))}
        facts: dict[str, Any] = {SHAPES: shapes} if shapes else {}
        with TensorWriter(folder / WEIGHTS, described, metadata_room=room + len(json.dumps(facts))) as tensors:
            yield _PeftWriter(tensors, keys, shared, kept, folder / CONFIG, config, facts)


@contextmanager
def _joined_writer(folder: Path, contents: Contents, room: int) -> Iterator[Writer]:
    """For methods whose file has one tensor for all sites and names none; our entry in the header does."""
    method, sites = contents.method, list(contents.sites)
    own = method.to_peft()
    config: dict[str, Any] = {
        **own,
        "peft_type": method.peft_type,
        "task_type": contents.task or own.get("task_type"),
        "base_model_name_or_path": contents.base and _public(contents.base),
        "revision": contents.revision,
        "inference_mode": True,
        str(method.peft_joined): len(sites),
    }
    names = method.peft_keys()[""]
    whole = {key: joined([part.tensors[name] for part in contents.sites.values()]) for name, key in names.items()}
    facts = {} if contents.numbered else {NAMED: sites}
    described = {key: (t.dtype, t.shape) for key, t in whole.items()}
    with TensorWriter(folder / WEIGHTS, described, metadata_room=room + len(json.dumps(facts))) as tensors:
        joining = Joining(tensors.write, dict.fromkeys(whole, sites))
        yield _JoinedWriter(tensors, joining, names, folder / CONFIG, config, facts)


class _JoinedWriter:
    def __init__(
        self,
        tensors: TensorWriter,
        joining: Joining,
        keys: Mapping[str, str],
        path: Path,
        config: Mapping[str, Any],
        facts: Mapping[str, Any],
    ) -> None:
        self._joining, self._keys = joining, keys
        self._rest = _PeftWriter(tensors, {}, {}, {}, path, config, facts)

    def write(self, site: str, name: str, tensor: Tensor) -> None:
        self._joining.add(self._keys[name], site, tensor)

    def share(self, name: str, tensor: Tensor) -> None:
        self._rest.share(name, tensor)

    def keep(self, key: str, tensor: Tensor) -> None:
        self._rest.keep(key, tensor)

    def finish(self, facts: Mapping[str, Any]) -> None:
        self._rest.finish(facts)


def _split_tensors(
    checkpoint: Checkpoint, method: Method, count: int, facts: Mapping[str, Any]
) -> tuple[dict[str, SiteContents], bool]:
    """The sites of a file with one tensor for all of them, and whether our entry in the header names them."""
    path, names = checkpoint.path, method.peft_keys()[""]
    for key in checkpoint.tensors:
        if key not in names.values():
            raise _unexpected(key, key.removeprefix(PREFIX), method, path)
    parts: dict[str, list[Any]] = {}
    for name, key in names.items():
        if key not in checkpoint.tensors:
            raise FileError(f"{key!r} is missing", where=path, fix="restore the file")
        _check_floating(key, checkpoint.tensors[key], path)
        parts[name] = list(split(checkpoint.tensors[key], count))
    told = facts.get(NAMED)
    named = isinstance(told, list) and len(told) == count and all(isinstance(site, str) and site for site in told)
    sites = {}
    for i, site in enumerate(told if named and told else map(str, range(count))):
        tensors = {name: columns[i] for name, columns in parts.items()}
        try:
            place = method.at(site).place("", {name: t.shape for name, t in tensors.items()})
        except ConfigError as e:
            raise FileError(e.what, where=path, fix=e.fix or "restore the file") from None
        sites[site] = SiteContents(*place, tensors)
    if len(sites) < count:
        raise FileError("the header names a module twice", where=path, fix="restore the file")
    return sites, named


class _PeftWriter:
    def __init__(
        self,
        tensors: TensorWriter,
        keys: Mapping[tuple[str, str], str],
        shared: Mapping[str, str],
        kept: Mapping[str, str],
        path: Path,
        config: Mapping[str, Any],
        facts: Mapping[str, Any],
    ) -> None:
        self._tensors, self._path, self._config, self._facts = tensors, path, config, facts
        self._keys, self._shared, self._kept = keys, shared, kept

    def write(self, site: str, name: str, tensor: Tensor) -> None:
        self._tensors.write(self._keys[site, name], tensor)

    def share(self, name: str, tensor: Tensor) -> None:
        self._tensors.write(self._shared[name], tensor)

    def keep(self, key: str, tensor: Tensor) -> None:
        self._tensors.write(self._kept[key], tensor)

    def finish(self, facts: Mapping[str, Any]) -> None:
        text = json.dumps({**facts, **self._facts}, sort_keys=True, separators=(",", ":"), allow_nan=False)
        self._tensors.finish({"format": "pt", OURS: text})
        # Sorted, but for what is inside the entries: of pattern keys the first that matches wins.
        text = json.dumps(dict(sorted(self._config.items())), indent=2, allow_nan=False)
        self._path.write_text(text + "\n", "utf-8")


class _Entries:
    """The entries of `adapter_config.json`, taken out one by one; what is left was not understood."""

    def __init__(self, config: dict[str, Any], path: Path) -> None:
        self.path = path
        self.left = {key: value for key, value in config.items() if key not in INERT}

    def text(self, key: str) -> str | None:
        value = self.left.pop(key, None)
        if value is not None and not isinstance(value, str):
            raise self._wrong(key, value, "a string")
        return value or None

    def flag(self, key: str) -> bool:
        value = self.left.pop(key, False)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def count(self, key: str) -> int:
        value = self.left.pop(key, None)
        if value is not None and (type(value) is not int or not 0 < value <= MAX_JOINED):
            raise self._wrong(key, value, f"a number from 1 to {MAX_JOINED}")
        return value or 1

    def names(self, key: str) -> list[str]:
        value = self.left.pop(key, None) or []
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise self._wrong(key, value, "a list of names")
        return value

    def targets(self) -> tuple[str, ...] | None:
        """The suffixes that name the adapted modules; None if a regular expression does, which nobody runs."""
        if isinstance(self.left.get("target_modules"), str):
            self.left.pop("target_modules")
            return None
        return tuple(self.names("target_modules")) or None

    def kept(self) -> dict[str, Any]:
        kept: dict[str, Any] = {}
        if modules := self.names("modules_to_save"):
            if len(modules) > MAX_KEPT:
                raise self._wrong("modules_to_save", modules, f"at most {MAX_KEPT} names")
            kept["modules_to_save"] = modules
        bias = self.left.pop("bias", "none")
        if bias not in ("none", "all", "lora_only"):
            raise self._wrong("bias", bias, "none, all or lora_only")
        if bias != "none":
            kept["bias"] = bias
        if tokens := self.left.pop("trainable_token_indices", None):
            for indices in tokens.values() if isinstance(tokens, dict) else [tokens]:
                if not isinstance(indices, list) or not all(type(i) is int and i >= 0 for i in indices):
                    raise self._wrong("trainable_token_indices", tokens, "a list of token numbers")
            kept["trainable_token_indices"] = tokens
        return kept

    def method(self, methods: Callable[[str | None], Any]) -> Method:
        kind = self.left.pop("peft_type", None)
        if not isinstance(kind, str):
            raise self._wrong("peft_type", kind, "the name of a method")
        try:
            likely = [methods(kind.lower())]  # most are called as PEFT calls them: one plugin is loaded
        except Exception:
            likely = []
        for candidates in (lambda: likely, lambda: methods(None).values()):
            for cls in candidates():
                if cls.peft_type == kind:
                    try:
                        found: Method | None = cls.from_peft(self.left)
                    except NotMergeable as e:
                        raise NotMergeable(e.what, where=self.path, fix=e.fix) from None
                    except ConfigError as e:
                        raise FileError(e.what, where=self.path, fix=e.fix) from None
                    if found is not None:
                        return found
        known = sorted({cls.peft_type for cls in methods(None).values() if cls.peft_type})
        if kind in known:
            set_options = ", ".join(k for k, v in sorted(self.left.items()) if k.startswith("use_") and v)
            raise FileError(
                f"no installed method reads peft_type {kind!r} with {set_options}",
                where=self.path,
                fix="install a plugin that does (adapter methods shows what is there)",
            )
        raise FileError(f"no installed method reads peft_type {kind!r}", where=self.path, fix=nearest(kind, known))

    def refuse_leftovers(self) -> None:
        for key, value in sorted(self.left.items()):
            if value not in (None, False, [], {}, "", 0):
                raise FileError(
                    f"{key}={value!r} is set, and what it changes is not known here",
                    where=self.path,
                    fix="remove the entry if the adapter does not depend on it",
                )

    def _wrong(self, key: str, value: Any, meant: str) -> FileError:
        return FileError(f"{key} is {value!r} and not {meant}", where=self.path, fix=f"correct {key}")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # a fifo would never end
            raise FileError("is not a file", where=path, fix="restore the file")
        if found.st_size > MAX_CONFIG:
            raise FileError(f"is larger than {MAX_CONFIG >> 20} MB", where=path, fix="a config has a few kB")
        config = _strict_json(path.read_text("utf-8"))
    except FileNotFoundError:
        raise FileError("is missing", where=path, fix="an adapter folder has it beside the weights") from None
    except OSError as e:
        raise os_error(e, path) from None
    except RecursionError:
        raise FileError("is nested too deeply", where=path, fix="restore the file") from None
    except ValueError as e:
        raise FileError(f"is not valid JSON ({e})", where=path, fix="restore the file") from None
    if not isinstance(config, dict):
        raise FileError("is not a JSON object", where=path, fix="restore the file")
    return config


def _strict_json(text: str) -> Any:
    """As `json.loads`, but no name stands twice and every number is finite."""

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            raise ValueError("a name stands twice")
        return entries

    def finite(number: str) -> float:
        if not math.isfinite(value := float(number)):
            raise ValueError(f"{number} is not a finite number")
        return value

    return json.loads(text, object_pairs_hook=no_duplicates, parse_constant=finite, parse_float=finite)


def _public(name: str) -> str:
    """Of a path its last part: the rest tells a reader nothing, and strangers where it lay."""
    absolute = PurePosixPath(name).is_absolute() or PureWindowsPath(name).is_absolute()
    return PureWindowsPath(name).name if absolute else name


def _base_class(config: Mapping[str, Any]) -> str | None:
    """A name to compare; nothing is ever imported by it."""
    auto = config.get("auto_mapping")
    name = auto.get("base_model_class") if isinstance(auto, dict) else None
    return name if isinstance(name, str) else None


def _facts(checkpoint: Checkpoint) -> Mapping[str, Any]:
    text = checkpoint.metadata.get(OURS)
    if text is None:
        return {}
    try:
        facts = _strict_json(text)
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict):
        raise FileError(
            f"the {OURS} entry of the header is not a valid JSON object",
            where=checkpoint.path,
            fix="the file is damaged; download or save it again",
        )
    return facts


def _named(facts: Mapping[str, Any], plain: Method, methods: Callable[[str | None], Any], path: Path) -> Method:
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


def _untold(method: Method, site: str, part: SiteContents) -> list[int]:
    """The layer's shape as a reader of the file will take it, if the saved tensors leave it open; else []."""
    kind, shape, _ = method.at(site).place(_family(method.at(site), part), part.shapes)
    if -1 not in shape:
        return []
    return list(part.weight_shape if kind == part.kind else part.shape)  # GPT-2's linear layers are transposed


def _with_shape(name: str, part: SiteContents, facts: Mapping[str, Any]) -> SiteContents:
    """The site with the layer's shape from our entry in the header, where the tensors do not tell it."""
    told = facts.get(SHAPES)
    shape = told.get(name) if -1 in part.weight_shape and isinstance(told, dict) else None
    if not isinstance(shape, list) or len(shape) != len(part.weight_shape):
        return part
    for known, n in zip(part.weight_shape, shape, strict=True):
        if type(n) is not int or not 0 < n < MAX_DIMENSION or known not in (-1, n):
            return part
    return replace(part, weight_shape=tuple(shape), shape=registry().site_kind(part.kind)(name, tuple(shape)).shape)


def _shared(checkpoint: Checkpoint, method: Method) -> dict[str, TensorInfo]:
    found = {name: checkpoint.tensors.get(ROOT + key) for name, key in method.peft_shared().items()}
    for name, tensor in found.items():
        if tensor is None:
            lacking = ROOT + method.peft_shared()[name]
            raise FileError(f"{lacking!r} is missing", where=checkpoint.path, fix="restore the file")
        _check_floating(ROOT + method.peft_shared()[name], tensor, checkpoint.path)
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _check_floating(key: str, tensor: TensorInfo, path: Path) -> None:
    if not tensor.dtype.startswith(("F", "BF")):
        what = f"{key!r} holds {tensor.dtype}, not floating point numbers"
        raise FileError(what, where=path, fix="dequantise or restore the file")


def _within(module: str, path: str) -> bool:
    """PEFT's rule for a list of names: the whole name, or all of it behind a dot."""
    return path == module or path.endswith("." + module)


def _tails(path: str) -> Iterator[str]:
    """The names that PEFT's lists of names may call the module by: its own, and all behind each dot."""
    yield path
    for i, c in enumerate(path):
        if c == ".":
            yield path[i + 1 :]


def _plain_key(key: str) -> str:
    """The key of a whole value, as if the module had no adapter beside it."""
    module, _, parameter = key.rpartition(".")
    if module.endswith(".token_adapter.base_layer"):  # of trained token rows, which are kept with it
        return key
    return f"{module.removesuffix('.base_layer')}.{parameter}"


def _beside(key: str, sites: Collection[str]) -> str:
    """The key that PEFT gives a whole value: where an adapter is beside it, the module is a `base_layer`."""
    module, _, parameter = key.rpartition(".")
    return f"{module}.base_layer.{parameter}" if module.removeprefix(PREFIX) in sites else key


def _family(method: Method, part: SiteContents) -> str:
    return part.kind if part.kind in method.peft_keys() else ""


def _sort_tensors(
    checkpoint: Checkpoint,
    method: Method,
    shared: Mapping[str, TensorInfo],
    kept_options: Mapping[str, Any],
    folder: Path,
) -> tuple[dict[str, SiteContents], dict[str, TensorInfo]]:
    """Every tensor of the file belongs to one site's adapter or is kept; any other is refused."""
    path = folder / WEIGHTS
    # The families that have each suffix, longest first, so that none hides a longer one.
    families: dict[str, set[str]] = {}
    for family, names in method.peft_keys().items():
        for suffix in names.values():
            families.setdefault(suffix, set()).add(family)
    suffixes = sorted(families, key=lambda s: -len(s))
    found: dict[str, tuple[set[str], dict[str, TensorInfo]]] = {}  # by site: the families it may be of, and by suffix
    kept: dict[str, TensorInfo] = {}
    others: dict[str, TensorInfo] = {}
    shared_keys = {ROOT + key for key in method.peft_shared().values()}
    for key, tensor in checkpoint.tensors.items():
        if key in shared_keys:
            continue
        if not key.startswith(PREFIX):
            raise FileError(
                f"{key!r} does not begin with {PREFIX!r}",
                where=path,
                fix="rename the tensors: PEFT would load none of them and not say so",
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
            _check_floating(key, tensor, path)
            tensors[match] = tensor
        else:
            others[key] = tensor
    embeddings = {site for site, (possible, _) in found.items() if possible == {"embedding"}}
    for key, tensor in others.items():
        inner = key.removeprefix(PREFIX)
        module, _, parameter = key.rpartition(".")
        wrapper = next((w for w in WRAPPED if module.endswith(w)), None)
        if wrapper and f"{module.removesuffix(wrapper)}.{parameter}" in others:
            continue
        if not _is_kept(inner, kept_options, embeddings):
            raise _unexpected(key, inner, method, path)
        if kept.setdefault(_plain_key(key), tensor) is not tensor:
            raise FileError(f"{key!r} stands twice, with base_layer and without", where=path, fix="restore the file")
    sites = {}
    for site, (possible, by_suffix) in sorted(found.items()):
        here, family = method.at(site), min(possible)
        tensors = {name: by_suffix[s] for name, s in method.peft_keys()[family].items() if s in by_suffix}
        missing = sorted(here.peft_keys()[family].keys() - tensors.keys())
        if missing:
            lacking = f"{PREFIX}{site}.{here.peft_keys()[family][missing[0]]}"
            raise FileError(f"{lacking!r} is missing", where=path, fix="restore the file")
        try:
            place = here.place(family, {name: t.shape for name, t in {**shared, **tensors}.items()})
        except NotMergeable as e:
            raise NotMergeable(f"at {site!r} {e.what}", where=path, fix=e.fix) from None
        except ConfigError as e:
            raise FileError(f"at {site!r} {e.what}", where=path, fix=e.fix or "restore the file") from None
        sites[site] = SiteContents(*place, dict(sorted(tensors.items())))
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


def _is_kept(key: str, options: Mapping[str, Any], embeddings: Collection[str]) -> bool:
    """Whether PEFT saves `key` as a whole value beside the adapter."""
    module, _, parameter = _plain_key(key).rpartition(".")
    if any(f".{m}." in f".{key}" for m in options.get("modules_to_save", ())):
        return True
    if parameter == "bias" and "bias" in options:
        return True
    if key.endswith(".token_adapter.trainable_tokens_delta"):
        return "trainable_token_indices" in options
    module = module.removesuffix(".token_adapter.base_layer")
    return parameter == "weight" and (module in embeddings or any(_within(e, module) for e in EMBEDDINGS))


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


@hookimpl
def formats() -> list[Format]:
    return [PeftFormat()]
