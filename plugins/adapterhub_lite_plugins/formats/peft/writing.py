"""Writing the folder: the same bytes for the same adapter, and no path of whoever wrote it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from adapterhub_lite import ConfigError
from adapterhub_lite.format import Contents, Writer
from adapterhub_lite.writer import TensorWriter

from .facts import OURS, SHAPES, untold
from .layout import CONFIG, PREFIX, ROOT, WEIGHTS, beside, family_of, within

if TYPE_CHECKING:
    from torch import Tensor

# Entries with names of modules that must be among the target modules.
SUBSETS = frozenset(["feedforward_modules"])


@contextmanager
def writing(folder: Path, contents: Contents, *, room: int) -> Iterator[Writer]:
    """Writes an adapter into an empty folder, its config once all tensors are there."""
    method = contents.method
    if method.peft_type is None:
        raise ConfigError(
            f"method {method.name!r} has no peft_type, so PEFT's layout has no place for its tensors",
            fix="save its delta, or declare a peft_type in the method and how its files are spelled",
        )
    config = {
        **method.to_peft(),
        "peft_type": method.peft_type,
        "task_type": contents.task,
        "base_model_name_or_path": contents.base and public(contents.base),
        "revision": contents.revision,
        "inference_mode": True,
        # PEFT warns of it where a method never meets a transposed layer.
        **({"fan_in_fan_out": contents.transposed} if "transposed_linear" in method.site_kinds else {}),
        "target_modules": sorted(contents.targets or contents.sites),
        "modules_to_save": None,
        **contents.kept_options,
    }
    for entry in SUBSETS & config.keys():  # as target_modules spells them
        config[entry] = [t for t in config["target_modules"] if any(within(own, t) for own in config[entry])]
    keys = {
        (site, name): f"{PREFIX}{site}.{method.at(site).peft_keys()[family_of(method.at(site), part)][name]}"
        for site, part in contents.sites.items()
        for name in part.tensors
    }
    layout = {keys[site, name]: t for site, part in contents.sites.items() for name, t in part.tensors.items()}
    shared = {name: ROOT + method.peft_shared()[name] for name in contents.shared}
    layout.update({shared[name]: t for name, t in contents.shared.items()})
    kept = {key: beside(key, contents.sites) for key in contents.kept}
    layout.update({kept[key]: t for key, t in contents.kept.items()})
    described = {key: (t.dtype, t.shape) for key, t in layout.items()}
    shapes = {site: shape for site, part in contents.sites.items() if (shape := untold(method, site, part))}
    facts: dict[str, Any] = {SHAPES: shapes} if shapes else {}
    with TensorWriter(folder / WEIGHTS, described, metadata_room=room + len(json.dumps(facts))) as tensors:
        yield FolderWriter(tensors, keys, shared, kept, folder / CONFIG, config, facts)


class FolderWriter:
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


def public(name: str) -> str:
    """Of a path its last part: the rest tells a reader nothing, and strangers where it lay."""
    absolute = PurePosixPath(name).is_absolute() or PureWindowsPath(name).is_absolute()
    return PureWindowsPath(name).name if absolute else name
