"""Folders of AdapterHub's library `adapters`: bottlenecks and LoRAs, read and not written.

Its adapters hang on places of its own patched models, ours on modules. Where a place is no module, or what it computes
is not what the module's adapter would, the folder is refused: see `_site`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from adapterhub_lite import ConfigError, FileError, Method, NotMergeable, hookimpl
from adapterhub_lite.checkpoint import Checkpoint, TensorInfo, unpickle
from adapterhub_lite.errors import os_error
from adapterhub_lite.format import Contents, Format, SiteContents, Writer

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter.safetensors", "pytorch_adapter.bin"
HEAD = "head_config.json"
MAX_CONFIG = 1 << 20  # bytes
# Model types by how their layers are built; others are refused.
POST_NORM = frozenset(["bert", "roberta", "xlm-roberta", "electra"])
PRE_NORM = {
    "gpt2": {"output_adapters": "mlp", "attention_adapters": "attn"},
    "llama": {"output_adapters": "mlp", "attention_adapters": "self_attn"},
    "mistral": {"output_adapters": "mlp", "attention_adapters": "self_attn"},
}
T5 = frozenset(["t5", "mt5"])
FUSED = ("c_attn", "in_proj", "qkv_proj", "query_key_value", "Wqkv")  # LoRA on a part of their rows
# What does not change what the saved tensors compute: where adapters are the keys tell.
INERT = frozenset(
    [
        *("architecture", "attn_matrices", "cross_adapter", "dtype", "init_weights_seed", "intermediate_lora"),
        *("inv_adapter_reduction_factor", "leave_out", "mh_adapter", "output_adapter", "output_lora", "selfattn_lora"),
    ]
)
PHM = re.compile(r"(learn_|factorized_|shared_)?(W_)?phm(?!_layer).*|hypercomplex_nonlinearity")  # how, if phm_layer
INITS: dict[str, dict[str, Any]] = {
    "bert": {"init_weights": "normal", "std": 0.02},
    "mam_adapter": {"init_weights": "lora"},
    "houlsby": {"init_weights": "truncated_normal", "std": 0.01},
}
OLD_NAMES = {"gelu": "gelu_new", "gelu_orig": "gelu"}  # of files without a version
LORA_KEY = re.compile(r"(?P<place>.+)\.loras\.(?P<name>[^.]+)\.lora_(?P<tensor>[AB])")
BOTTLENECK_KEY = re.compile(r"(?P<place>.+)\.adapters\.(?P<name>[^.]+)\.(?P<tensor>(adapter_[\w.]+)|scaling)")


class AdapterHubFormat:
    """The layout of `adapters` (https://github.com/adapter-hub/adapters)."""

    name = "adapterhub"
    carrier = "lora"

    def recognises(self, folder: Path) -> bool:
        return (folder / CONFIG).is_file() and ((folder / WEIGHTS).is_file() or (folder / PICKLE).is_file())

    def files(self, folder: Path) -> list[Path]:
        return [folder / CONFIG, folder / WEIGHTS]

    def read(self, folder: Path, methods: Callable[[str | None], Any]) -> Contents:
        if (folder / HEAD).is_file():
            raise FileError(
                "has a prediction head beside the adapter, which cannot be taken along",
                where=folder / HEAD,
                fix="take it away from a copy of the folder, to have the adapter alone",
            )
        if not (folder / WEIGHTS).is_file():
            raise FileError(
                "a pickle can run code when it is read, so it is not",
                where=folder / PICKLE,
                fix=unpickle(PICKLE, WEIGHTS),
            )
        config = _Config(folder / CONFIG)
        tensors = Checkpoint.open(folder / WEIGHTS).tensors
        try:
            read = _lora if config.entries.get("architecture") == "lora" else _bottleneck
            method, parts = read(config, tensors, methods)
            config.refuse_leftovers()
            sites = {name: SiteContents(*method.place("", _shapes(part)), part) for name, part in sorted(parts.items())}
        except ConfigError as e:
            raise FileError(e.what, where=folder / CONFIG, fix=e.fix or "restore the folder") from None
        return Contents(method=method, sites=sites, base=config.base, readers=("adapters",))

    def replaced(
        self, kept: Mapping[str, Any], options: Mapping[str, Any]
    ) -> list[tuple[str, Any, tuple[int, ...] | None]]:
        return []  # heads are refused

    def writer(self, folder: Path, contents: Contents, *, room: int) -> AbstractContextManager[Writer]:
        raise ConfigError("folders of AdapterHub are read and not written", where=folder)


class _Config:
    """`adapter_config.json`; entries are taken out one by one, and what is left was not understood."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if path.stat().st_size > MAX_CONFIG:
                raise FileError("is larger than 1 MB", where=path, fix="a config has a few kB")
            whole = json.loads(path.read_text("utf-8"))
        except OSError as e:
            raise os_error(e, path) from None
        except (ValueError, RecursionError):
            raise FileError("is not valid JSON", where=path, fix="restore the file") from None
        entries = whole.get("config") if isinstance(whole, dict) else None
        if not isinstance(entries, dict):
            raise self.wrong("config", entries, "a table with the options")
        self.model = str(whole.get("model_type"))
        base = whole.get("model_name")
        self.base = base if isinstance(base, str) and base and not Path(base).is_absolute() else None
        self.version = whole.get("version")
        self.entries = {key: value for key, value in entries.items() if key not in INERT}
        if "architecture" in entries:
            self.entries["architecture"] = entries["architecture"]

    def pop(self, key: str, default: Any) -> Any:
        return self.entries.pop(key, default)

    @property
    def unscaled(self) -> bool:
        """Whether it was saved before 1.1.0, when LoRAs were trained with α = r whatever the config said."""
        if not isinstance(self.version, str) or not self.version.startswith("adapters."):
            return False
        found = re.fullmatch(r"adapters\.(\d{1,4})\.(\d{1,4})\.(\d{1,4})(\D.*)?", self.version)
        if found is None:
            raise self.wrong("version", self.version, "a version like adapters.1.1.0")
        release, rest = tuple(int(n) for n in found.groups()[:3]), found[4] or ""
        return release < (1, 1, 0) or (release == (1, 1, 0) and bool(rest) and not rest.startswith(".post"))

    def refuse(self, key: str, value: Any) -> FileError:
        return FileError(f"{key}={value!r} is not known here", where=self.path, fix="load it with adapters itself")

    def wrong(self, key: str, value: Any, meant: str) -> FileError:
        return FileError(f"{key} is {value!r} and not {meant}", where=self.path, fix="restore the file")

    def refuse_leftovers(self) -> None:
        for key, value in sorted(self.entries.items()):
            if value not in (None, False, 0, "", [], {}):
                raise self.refuse(key, value)


Tensors = Mapping[str, TensorInfo]
Parts = dict[str, dict[str, TensorInfo]]


def _lora(config: _Config, tensors: Tensors, methods: Callable[[str | None], Any]) -> tuple[Method, Parts]:
    config.pop("architecture", None)
    config.pop("init_weights", None)
    mode, r, alpha = config.pop("composition_mode", "add"), config.pop("r", 8), config.pop("alpha", 8)
    if mode != "add":
        raise config.refuse("composition_mode", mode)
    parts = _grouped(config, tensors, LORA_KEY)
    for place in parts:
        if place.endswith(FUSED):
            raise NotMergeable(
                f"{place!r} computes query, key and value at once, and the LoRA is one of some of them",
                where=config.path,
                fix="load it with adapters itself",
            )
    alpha = r if config.unscaled else alpha
    method: Method = methods("lora")(rank=r, alpha=alpha, dropout=config.pop("dropout", 0.0))
    return method, parts


def _bottleneck(config: _Config, tensors: Tensors, methods: Callable[[str | None], Any]) -> tuple[Method, Parts]:
    architecture = config.pop("architecture", None)
    if architecture is not None:
        raise config.refuse("architecture", architecture)
    options: dict[str, Any] = {
        "placement": "parallel" if config.pop("is_parallel", False) else "sequential",
        "non_linearity": _activation(config),
        **{key: config.pop(key, default) for key, default in (("scaling", 1.0), ("dropout", 0.0))},
        **{key: config.pop(key, False) for key in ("ln_before", "ln_after")},
    }
    init = config.pop("init_weights", "bert")
    if init not in INITS:
        raise config.refuse("init_weights", init)
    config.entries = {key: value for key, value in config.entries.items() if not PHM.fullmatch(key)}
    if not options["ln_after"] or options["placement"] == "parallel":
        config.pop("adapter_residual_before_ln", False)  # it stands before a norm that is not there
    residual = config.pop("residual_before_ln", True)
    if residual is not True and options["placement"] == "sequential":
        raise config.refuse("residual_before_ln", residual)
    before, after = config.pop("original_ln_before", False), config.pop("original_ln_after", True)
    if after is not True:
        raise config.refuse("original_ln_after", after)
    options["around_norm"] = config.model in POST_NORM and before and options["placement"] == "sequential"
    factor = config.pop("reduction_factor", 16)

    parts: Parts = {}
    for place, found in _grouped(config, tensors, BOTTLENECK_KEY).items():
        parts[_site(config, place, bool(before), options["placement"] == "parallel")] = {
            _own(key, options["ln_before"]): info
            for key, info in found.items()
            if not (options["ln_before"] and key.startswith("adapter_down.0."))  # adapter_norm_before once more
        }
    if isinstance(factor, dict):  # layers may differ
        sizes = {part["down"].shape[0] for part in parts.values() if "down" in part}
        if len(sizes) != 1:
            raise config.refuse("reduction_factor", factor)
        options["bottleneck_size"] = sizes.pop()
    else:
        options["reduction_factor"] = factor
    method: Method = methods("bottleneck")(**options, **INITS[init])
    wanted = method.peft_keys()[""].keys()
    for site, part in parts.items():
        if part.keys() != wanted:
            odd = ", ".join(sorted(part.keys() ^ wanted))
            raise FileError(f"{odd} at {site!r} is missing or one too many", where=config.path, fix="restore the file")
    return method, parts


def _activation(config: _Config) -> str:
    found = config.pop("non_linearity", "relu")
    known = {"silu": "swish", **{name: name for name in ("relu", "gelu", "gelu_new", "swish", "tanh", "leakyrelu")}}
    name = found.lower() if isinstance(found, str) else ""
    if config.version is None:
        name = OLD_NAMES.get(name, name)
    if name not in known:
        raise config.refuse("non_linearity", found)
    return known[name]


def _own(key: str, norm: bool) -> str:
    """Our name of a tensor."""
    name, _, end = key.rpartition(".")
    names = {f"adapter_down.{int(norm)}": "down", "adapter_up": "up"}
    names |= {f"adapter_norm_{where}": f"norm_{where}" for where in ("before", "after")}
    if key == "scaling":
        return "scale"
    return names.get(name, key) + ("_bias" if end == "bias" else "")


def _site(config: _Config, place: str, before: bool, parallel: bool) -> str:
    """The module whose adapter computes what one at that place does; `before`: it reads the sum with the residual."""
    layer, _, end = place.rpartition(".")
    if config.model in POST_NORM and end == "output" and not parallel:
        return f"{place}.LayerNorm" if before else f"{place}.dense"
    if end in PRE_NORM.get(config.model, {}) and not parallel:
        inside = PRE_NORM[config.model][end]
        if not before:
            return f"{layer}.{inside}"
        if end == "output_adapters":  # the sum with the residual is the layer's output
            return layer
    if config.model in T5 and layer.endswith(".layer"):
        if before or parallel:
            return place
        crossed = ".decoder." in f".{place}" and end == "1"
        return f"{place}.{'SelfAttention' if end == '0' else 'EncDecAttention' if crossed else 'DenseReluDense'}"
    how = "parallel" if parallel else "sequential"
    raise NotMergeable(
        f"the {how} adapter at {place!r} of a {config.model!r} is at no module that could have it",
        where=config.path,
        fix="load it with adapters itself",
    )


def _grouped(config: _Config, tensors: Tensors, pattern: re.Pattern[str]) -> Parts:
    """The tensors of each place; all must belong to one adapter."""
    parts: Parts = {}
    names = set()
    for key, info in tensors.items():
        found = pattern.fullmatch(key)
        if found is None or "" in key.split("."):
            raise FileError(f"{key!r} is no tensor that is known here", where=info.path, fix="restore the file")
        if not info.dtype.startswith(("F", "BF")):
            raise FileError(f"{key!r} holds {info.dtype}, no floating point numbers", where=info.path)
        names.add(found["name"])
        parts.setdefault(found["place"], {})[found["tensor"]] = info
    if len(names) != 1:
        what = f"holds tensors of {', '.join(sorted(names))}" if names else "holds no tensor"
        raise FileError(f"{what}, and not those of one adapter", where=config.path, fix="restore the file")
    return parts


def _shapes(part: Mapping[str, TensorInfo]) -> dict[str, tuple[int, ...]]:
    return {name: info.shape for name, info in part.items()}


@hookimpl
def formats() -> list[Format]:
    return [AdapterHubFormat()]
