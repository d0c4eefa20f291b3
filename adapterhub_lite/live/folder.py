"""A composition as one folder: its tree and gates, a sketch of the base, and its adapters in folders of their own.

composition.json      {"layout": 1, "composition": {…}, "base": {…}}
gates.safetensors     SITE.GATE.W and SITE.GATE.b, if there are gates
adapters/NAME/        each adapter, in the usual layout
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from .. import compose, sketch, source, strict_json
from ..adapter import Adapter, load
from ..checkpoint import Checkpoint, TensorInfo, dtype_name
from ..errors import ConfigError, FileError, NotMergeable, UnknownName
from ..format import is_floating
from ..hub.pull import ADAPTER, snapshot
from ..registry import registry
from ..sharding import whole
from ..staging import staged
from ..writer import TensorWriter
from .files import held, original
from .gating import GatePart, gate_part
from .tree import Part, slots, state_of

MANIFEST, TENSORS, ADAPTERS = "composition.json", "gates.safetensors", "adapters"
LAYOUT = 1
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}")  # of a folder, on any system


class Saved(NamedTuple):
    """A folder's manifest, and the gates' tensors, yet to be read."""

    tree: compose.Node
    base: sketch.Sketch
    gates: Mapping[str, TensorInfo]


def save(model: nn.Module, out: Path, *, force: bool) -> None:
    """Write what is on to the folder `out`, whole or not at all."""
    tree = state_of(model).composition
    names = compose.names(tree)
    if not names:
        raise ConfigError("no adapter is active, so there is no composition to save", fix="activate one")
    for name in names:
        if not NAME.fullmatch(name):
            raise ConfigError(
                f"an adapter that is called {name!r} cannot be a folder of a composition",
                fix="load or add it by a name of letters, digits, - and _",
            )
    if len({name.casefold() for name in names}) < len(names):
        raise ConfigError("two names differ in capitals alone, which some systems ignore", fix="rename one")
    gates = {gate.name for gate in compose.gates(tree)}
    here = [slot for _, slot in slots(model) if slot.parts.keys() & set(names)]
    tensors = {
        f"{slot.site.name}.{name}.{key}": whole(t.detach())
        for slot in here
        for name, gate in slot.gates.items()
        if name in gates
        for key, t in gate.named_parameters()
    }
    sites = {slot.site.name: slot.site for slot in here}
    base = sketch.of({name: original(sites[name]) for name in sketch.sampled(list(sites))})
    manifest = {"layout": LAYOUT, "composition": compose.plain(tree), "base": base}
    with staged(out, force=force, replaceable=replaceable) as folder:
        for name in sorted(names):
            Adapter(((1.0, held(model, name)),)).save(folder / ADAPTERS / name)
        if tensors:
            _write(folder / TENSORS, tensors)
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    layout = {key: (dtype_name(t.dtype), tuple(t.shape)) for key, t in tensors.items()}
    with TensorWriter(path, layout) as writer:
        for key, t in tensors.items():
            writer.write(key, t)
        writer.finish({})


def replaceable(folder: Path) -> bool:
    """Whether all that is in a folder is a composition's."""
    own = registry().format(source.DEFAULT)
    adapters = list((folder / ADAPTERS).iterdir()) if (folder / ADAPTERS).is_dir() else []
    return (
        (folder / MANIFEST).is_file()
        and {path.name for path in folder.iterdir()} <= {MANIFEST, TENSORS, ADAPTERS}
        and all(path.is_dir() and own.recognises(path) for path in adapters)
        and not any(inner.is_dir() for path in adapters for inner in path.iterdir())
    )


def read(folder: Path) -> Saved:
    """The manifest in `folder`, strictly; no tensor is read. `FileError` for all that is wrong."""
    path = folder / MANIFEST
    manifest = strict_json.read(path, missing="a folder by adapters.save_composition() has it")
    if manifest.keys() != {"layout", "composition", "base"}:
        raise FileError("has other entries than a composition", where=path, fix="save it again")
    if manifest["layout"] != LAYOUT or isinstance(manifest["layout"], bool):
        what = f"has the layout {manifest['layout']!r}, and {LAYOUT} is known"
        raise FileError(what, where=path, fix="update adapterhub-lite")
    try:
        tree = compose.from_plain(manifest["composition"], registry().router)
        names, gates = compose.names(tree), compose.gates(tree)
    except (ConfigError, UnknownName) as error:
        raise FileError(error.what, where=path, fix=error.fix or "save it again") from None
    base = sketch.told(manifest)
    if base != manifest["base"]:
        raise FileError("has a sketch of the base that is none", where=path, fix="save it again")
    if not names:
        raise FileError("has no adapter", where=path, fix="save it again")
    if wrong := next((name for name in names if not NAME.fullmatch(name)), None):
        raise FileError(f"has an adapter {wrong!r}, which cannot be a folder", where=path, fix="save it again")
    if len({gate.name for gate in gates}) < len(gates):
        raise FileError("has two gates of one name", where=path, fix="save it again")
    tensors = dict(Checkpoint.open(folder / TENSORS).tensors) if gates else {}
    return Saved(tree, base, tensors)


def lower(folder: Path) -> tuple[Adapter, dict[str, float]]:
    """The composition in `folder`, or on the Hub, as one adapter Σ wᵢ ΔWᵢ, computed when it is saved, and the weights.

    `NotMergeable` if it is none: for gates now, for methods when it is planned or saved.
    """
    folder = snapshot(folder, patterns=ADAPTER)
    weights = {name: weight for name, weight in compose.lowered(read(folder).tree).items() if weight != 0}
    if not weights:
        raise NotMergeable("the weights of all adapters come to zero", where=folder, fix="load the base alone")
    terms = [weight * load(folder / ADAPTERS / name) for name, weight in weights.items()]
    return sum(terms[1:], terms[0]), weights


def gate_parts(
    saved: Saved, parts: Iterable[Part], folder: Path, read: Callable[[TensorInfo], Tensor]
) -> list[tuple[str, GatePart]]:
    """The gates of a folder for the layers of these parts, by the names of the gates; all tensors are used."""
    gates = {gate.name: gate for gate in compose.gates(saved.tree)}
    sites = {part.site.name: part.site for part in parts}
    made: dict[tuple[str, str], GatePart] = {}
    missing = set[tuple[str, str, str]]()
    for key, info in saved.gates.items():
        place, _, own = key.rpartition(".")
        site, _, name = place.rpartition(".")
        if name not in gates or site not in sites:
            what = f"has a tensor {key!r}, which is of no gate at a layer of these adapters"
            raise FileError(what, where=folder / TENSORS, fix="save it again")
        if (site, name) not in made:
            made[site, name] = gate_part(gates[name], sites[site], 0)
            missing |= {(site, name, own) for own, _ in made[site, name].named_parameters()}
        parameter = dict(made[site, name].named_parameters()).get(own)
        if parameter is None or tuple(parameter.shape) != info.shape or not is_floating(info):
            is_ = f"{info.dtype} {list(info.shape)}"
            raise FileError(f"the tensor {key!r} is {is_}, and does not fit its gate", where=folder / TENSORS)
        parameter.data.copy_(read(info))
        missing.discard((site, name, own))
    if missing:
        raise FileError(f"lacks the tensor {'.'.join(min(missing))!r}", where=folder / TENSORS, fix="save it again")
    return [(name, part) for (_, name), part in made.items()]
