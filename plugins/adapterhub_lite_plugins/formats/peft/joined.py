"""Files with one tensor for all sites, side by side, that name no module: those of PEFT's prompts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub_lite import ConfigError, FileError, Method
from adapterhub_lite.checkpoint import Checkpoint
from adapterhub_lite.columns import Joining, joined, split
from adapterhub_lite.format import Contents, SiteContents, Writer
from adapterhub_lite.writer import TensorWriter

from .layout import CONFIG, WEIGHTS
from .tensors import check_floating
from .writing import FolderWriter, public

if TYPE_CHECKING:
    from torch import Tensor

NAMED = "sites"  # in our entry of the header: the modules' names, from left to right


def split_tensors(
    checkpoint: Checkpoint, method: Method, count: int, facts: Mapping[str, Any]
) -> tuple[dict[str, SiteContents], bool]:
    """The `count` sites, and whether our entry in the header names them; otherwise they are numbered."""
    path, names = checkpoint.path, method.peft_keys()[""]
    if unknown := [key for key in checkpoint.tensors if key not in names.values()]:
        what = f"{unknown[0]!r} is no tensor of method {method.name!r}"
        raise FileError(what, where=path, fix="restore the file; with modules_to_save, load it with PEFT")
    parts: dict[str, list[Any]] = {}
    for name, key in names.items():
        if key not in checkpoint.tensors:
            raise FileError(f"{key!r} is missing", where=path, fix="restore the file")
        check_floating(key, checkpoint.tensors[key], path)
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


@contextmanager
def writing_joined(folder: Path, contents: Contents, *, room: int) -> Iterator[Writer]:
    """Writes an adapter into an empty folder, each tensor once all sites have given their part."""
    method, sites, own = contents.method, list(contents.sites), contents.method.to_peft()
    config: dict[str, Any] = {
        **own,
        "peft_type": method.peft_type,
        "task_type": contents.task or own.get("task_type"),
        "base_model_name_or_path": contents.base and public(contents.base),
        "revision": contents.revision,
        "inference_mode": True,
        str(method.peft_joined): len(sites),
    }
    names = method.peft_keys()[""]
    whole = {key: joined([part.tensors[name] for part in contents.sites.values()]) for name, key in names.items()}
    described = {key: (t.dtype, t.shape) for key, t in whole.items()}
    facts = {} if contents.numbered else {NAMED: sites}
    with TensorWriter(folder / WEIGHTS, described, metadata_room=room + len(json.dumps(facts))) as tensors:
        last = FolderWriter(tensors, {}, {}, {}, folder / CONFIG, config, facts)
        yield _Writer(last, names, Joining(tensors.write, dict.fromkeys(whole, sites)))


class _Writer:
    def __init__(self, last: FolderWriter, keys: Mapping[str, str], joining: Joining) -> None:
        self._last, self._keys, self._joining = last, keys, joining

    def write(self, site: str, name: str, tensor: Tensor) -> None:
        self._joining.add(self._keys[name], site, tensor)

    def share(self, name: str, tensor: Tensor) -> None:
        self._last.share(name, tensor)

    def keep(self, key: str, tensor: Tensor) -> None:
        self._last.keep(key, tensor)

    def finish(self, facts: Mapping[str, Any]) -> None:
        self._last.finish(facts)
