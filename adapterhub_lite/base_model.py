"""A base model's folder: safetensors files, one or many with an index, and what lies beside them.

Headers only: nothing here reads a tensor, and nothing makes a model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from .checkpoint import Checkpoint, TensorInfo, damaged, shown, unpickle
from .errors import FileError, nearest
from .hub.reference import in_cache

CONFIG = "config.json"
INDEX = ".safetensors.index.json"
MAX_JSON = 100_000_000  # bytes of an index or a config
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
WEIGHTS = (".safetensors", *PICKLES, ".h5", ".msgpack", ".gguf", ".onnx", ".npz")
"""Ends of files that hold weights, in whatever format."""


@dataclass(frozen=True)
class BaseModel:
    """The files of a model: its weights by tensor and by file, and the rest.

    `tensors` says for each tensor what its file's header does; `shards` are the files by name.
    """

    folder: Path
    shards: Mapping[str, Checkpoint]
    index: str | None
    """The name of the index, where there are several files."""
    tensors: Mapping[str, TensorInfo]
    others: tuple[PurePosixPath, ...]
    """Files beside the weights, which a copy of the model has too: config, tokenizer, generation config, templates."""
    left: tuple[PurePosixPath, ...]
    """Files that hold the same weights in another format, or a pickle: no copy of ours has them."""

    @property
    def named(self) -> dict[str, str]:
        """What to record of it: the folder's name, or the repository's on the Hub, and where there."""
        there = in_cache(self.folder.absolute())
        if there is None:
            return {"name": self.folder.resolve().name}
        return {"name": there.repo.rpartition("/")[2], "hub": str(there)}

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> BaseModel:
        """Read the headers and the index in `folder`; `FileError` if anything is wrong with them."""
        folder = Path(folder)
        if not folder.is_dir():
            near = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
            what = "is a file, not a model's folder" if folder.exists() else "there is no such model"
            fix = "give a folder with config.json and model.safetensors"
            raise FileError(what, where=folder, fix=f"{fix}; {nearest(folder.name, near)}" if near else fix)
        files = _files(folder)
        if PurePosixPath("adapter_config.json") in files:
            raise FileError(
                "is an adapter, or has one beside the model, which transformers would load on top of it",
                where=folder,
                fix="give the base model's own folder",
            )
        index, names = _weights(folder, files)
        shards = {name: Checkpoint.open(folder / name) for name in sorted(names)}
        tensors: dict[str, TensorInfo] = {}
        for name, shard in shards.items():
            told = names[name]
            for key, info in shard.tensors.items():
                if tensors.setdefault(key, info) is not info:
                    raise damaged(f"tensor {shown(key)} is in {tensors[key].path.name!r} too", folder / name)
                if told is not None and key not in told:
                    raise damaged(f"tensor {shown(key)} is not in the index {index!r}", folder / name)
            if lacking := sorted((told or set()) - shard.tensors.keys()):
                raise damaged(f"tensor {shown(lacking[0])} is in the index {index!r} and not here", folder / name)
        ours = {PurePosixPath(name) for name in (*shards, *([index] if index else []))}
        rest = [path for path in files if path not in ours]
        left = tuple(path for path in rest if _holds_weights(path))
        return cls(folder, shards, index, tensors, tuple(path for path in rest if path not in left), left)

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """`config.json`; empty if there is none."""
        path = self.folder / CONFIG
        return _json(path) if path.is_file() else {}

    @property
    def nbytes(self) -> int:
        """Bytes of all that a copy of the model has."""
        names = [*self.shards, *map(str, self.others), *([self.index] if self.index else [])]
        return sum((self.folder / name).stat().st_size for name in names)


def _files(folder: Path) -> list[PurePosixPath]:
    """All files in the folder and below, by their relative paths; nothing hidden (.git, .cache)."""
    found = []
    for path, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inner = Path(path).relative_to(folder)
        found += [PurePosixPath(*inner.parts, name) for name in sorted(files) if not name.startswith(".")]
    return found


def _holds_weights(path: PurePosixPath) -> bool:
    return path.suffix.lower() in WEIGHTS or path.name.endswith(".index.json")


def _weights(folder: Path, files: list[PurePosixPath]) -> tuple[str | None, dict[str, set[str] | None]]:
    """The index if there is one, and the names of the weights' files, with the tensors that it says each has."""
    top = [path.name for path in files if len(path.parts) == 1]
    indices = [name for name in top if name.endswith(INDEX)]
    single = [name for name in top if name.endswith(".safetensors")]
    for usual in ("model", "diffusion_pytorch_model"):  # transformers and diffusers prefer one file to an index
        if f"{usual}.safetensors" in single:
            return None, {f"{usual}.safetensors": None}
        if f"{usual}{INDEX}" in indices:
            return f"{usual}{INDEX}", _indexed(folder, f"{usual}{INDEX}", top)
    if len(indices) == 1:
        return indices[0], _indexed(folder, indices[0], top)
    if len(single) == 1 and not indices:
        return None, {single[0]: None}
    if single or indices:
        raise FileError(
            f"which of these are the weights is not clear: {', '.join([*indices, *single][:4])}",
            where=folder,
            fix="name the one model.safetensors, or leave one model in the folder",
        )
    pickles = [name for name in top if PurePosixPath(name).suffix in PICKLES]
    if pickles:
        raise FileError(
            "the weights are a pickle, which can run code when it is read",
            where=folder / pickles[0],
            fix=unpickle(pickles[0], "model.safetensors"),
        )
    raise FileError("has no weights", where=folder, fix="give a folder with model.safetensors, or files and an index")


def _indexed(folder: Path, index: str, top: list[str]) -> dict[str, set[str] | None]:
    entries = _json(folder / index).get("weight_map")
    if not isinstance(entries, dict) or not entries:
        raise damaged("the index has no weight_map", folder / index)
    found: dict[str, set[str] | None] = {}
    for key, name in entries.items():
        if not isinstance(name, str) or PurePosixPath(name).name != name or "\\" in name:
            raise damaged(
                f"the index puts {shown(key)} into {shown(str(name))}, which is not beside it", folder / index
            )
        if name not in top:
            raise FileError(f"the file {name!r} is missing", where=folder, fix="download the model again")
        own = found.setdefault(name, set())
        assert own is not None
        own.add(key)
    return found


def _json(path: Path) -> Mapping[str, Any]:
    try:
        if path.stat().st_size > MAX_JSON:
            raise damaged(f"has more than {MAX_JSON} bytes", path)
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise damaged("is not valid JSON", path) from None
    if not isinstance(value, dict):
        raise damaged("is not a JSON object", path)
    return value
