"""A LoRA from a full fine-tune: two models compared tensor by tensor, and the difference of their layers written.

Which tensors are equal, which are of layers, which of them are asked for; what changed and is not held is said.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from . import modules
from .base_model import BaseModel
from .checkpoint import ITEMSIZE, dtype_name
from .combine import Truncated, WeightedSum, each
from .difference import EXACT_SIDE, Difference, Layer, Left
from .errors import ConfigError, NotMergeable, nearest
from .format import is_floating
from .hub.pull import snapshot
from .pair import Pair
from .plan import Plan, plan
from .registry import registry
from .save import save

if TYPE_CHECKING:
    import torch

    from .save import RelativeError

RANK = 16  # where nothing is asked for
FLOATS = {"F64", "F32", "F16", "BF16"}


class Extracted(NamedTuple):
    """What `extract` wrote."""

    plan: Plan
    error: RelativeError
    """‖stored - ΔW‖ / ‖ΔW‖ over the layers that are held, and for each."""
    best: float
    """No adapter of these ranks has a smaller error."""
    left: Mapping[str, Left]
    """What changed and is not in the adapter."""


def extract(
    base: str | Path,
    tuned: str | Path,
    out: str | Path,
    *,
    rank: int | None = None,
    max_error: float | None = None,
    budget: int | None = None,
    dtype: torch.dtype | None = None,
    targets: Sequence[str] = (),
    exclude: Sequence[str] = (),
    force: bool = False,
) -> Extracted:
    """Write the LoRA that `tuned` is of `base`, two model folders, to the folder `out`.

    `rank`, `max_error` and `budget` are those of `Adapter.truncate`; without any, rank 16. `dtype`: of the tensors, by
    default the base's. `targets` and `exclude` are names of layers, their ends, or globs; by default all linear layers
    and convolutions but the model's output. Raises `NotMergeable` where the models do not fit together, `FileError`
    where a file is broken, `OutputExists` without `force`.
    """
    found = difference(base, tuned, targets=targets, exclude=exclude)
    spelled = None if dtype is None else dtype_name(dtype)
    return write(found, Path(out), rank=rank, max_error=max_error, budget=budget, dtype=spelled, force=force)


def difference(
    base: str | Path,
    tuned: str | Path,
    *,
    targets: Sequence[str] = (),
    exclude: Sequence[str] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
    exact_side: int = EXACT_SIDE,
) -> Difference:
    """Compare two models, folders or on the Hub, tensor by tensor. Those that are equal, bit by bit, are left out."""
    one, two = BaseModel.open(snapshot(base)), BaseModel.open(snapshot(tuned))
    keys = _common(one, two, exclude)
    pairs = {key: Pair(one.tensors[key], two.tensors[key]) for key in keys}
    changed = {}
    for done, (key, equal) in enumerate(each(pairs, lambda key: pairs[key].equal()), 1):
        progress(done, len(pairs))
        if not equal:
            changed[key] = pairs[key]
    chosen, why = _chosen(changed, one.config, targets, exclude)
    layers = {}
    for key, kind in chosen.items():
        name = modules.module_of(key)
        layers[name] = Layer(pairs[key], kind, registry().site_kind(kind)(name, pairs[key].base.shape).shape)
    sizes = dict(each(why, lambda key: pairs[key].size()))
    left = {key: _left(why[key], *sizes[key]) for key in why}
    for model, other, said in ((one, two, "only in the base"), (two, one, "only in the fine-tune")):
        left |= {key: Left(said, None, None) for key in model.tensors.keys() - other.tensors.keys()}
    left |= {key: Left("of another shape", None, None) for key in _reshaped(one, two)}
    if not layers and not left:
        raise NotMergeable("there is nothing to extract: no weight differs from the base's", where=tuned)
    if not layers:
        raise NotMergeable(
            f"there is nothing to extract: {len(left)} tensors differ, {', '.join(sorted(left)[:3])} among them, and "
            "none is the weight of a layer that is asked for",
            where=tuned,
            fix="name some with --targets, or exclude less",
        )
    return Difference(one, two, dict(sorted(layers.items())), dict(sorted(left.items())), exact_side=exact_side)


def write(
    found: Difference,
    out: Path,
    *,
    rank: int | None = None,
    max_error: float | None = None,
    budget: int | None = None,
    dtype: str | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Extracted:
    """As `extract`, with the dtype spelled as in safetensors."""
    found.watch = progress
    source = cut(found, rank=rank, max_error=max_error, budget=budget, dtype=dtype)
    planned, error = save(source, out, dtype=dtype, force=force, progress=progress)
    certificates = found.certificates.values()
    size = math.fsum(c.size for c in certificates)
    best = math.sqrt(math.fsum(c.best for c in certificates) / size) if size else 0.0
    return Extracted(planned, error, min(best, error.overall), found.left)


def cut(
    found: Difference, *, rank: int | None, max_error: float | None, budget: int | None, dtype: str | None
) -> WeightedSum:
    """What `write` writes; rank 16 if nothing is asked for."""
    if rank is max_error is budget is None:
        rank = RANK
    itemsize = ITEMSIZE[dtype or "F32"]  # of a budget; a plan corrects it
    return WeightedSum([(1.0, Truncated(found, rank=rank, max_error=max_error, budget=budget, itemsize=itemsize))])


def planned(found: Difference, *, dtype: str | None = None, **ask: Any) -> Plan:
    """What `write` would write; ranks by error or budget need the numbers."""
    return plan(cut(found, dtype=dtype, **ask), dtype=dtype)


# The parts ----------------------------------------------------------------------------------------------


def _common(one: BaseModel, two: BaseModel, exclude: Sequence[str]) -> list[str]:
    """The tensors that both have, of one shape, and of dtypes that have differences."""
    for model in (one, two):
        if "quantization_config" in model.config:
            fix = "extract from the model before quantisation, or dequantise it"
            raise NotMergeable("the model is quantised: its files do not hold the weights", where=model.folder, fix=fix)
    for model, other in ((one, two), (two, one)):
        lacking = [
            key
            for key in sorted(model.tensors.keys() - other.tensors.keys())
            if is_floating(model.tensors[key]) and not _named(exclude, key)  # old files have buffers, position_ids say
        ]
        if lacking:
            more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
            raise NotMergeable(
                f"has no tensor {lacking[0]!r}{more}, which {model.folder.name} has",
                where=other.folder,
                fix="give two models of one architecture; if it may be left out, name it with --exclude",
            )
    if reshaped := [key for key in _reshaped(one, two) if not _named(exclude, key)]:
        key = reshaped[0]
        raise NotMergeable(
            f"{key!r} has the shape {list(two.tensors[key].shape)}, and {list(one.tensors[key].shape)} in the base: "
            "no weights of that shape are a sum with the base's",
            where=two.folder,
            fix=f"leave it out with --exclude {modules.module_of(key) or key}"
            + ("; the vocabulary was resized" if len(one.tensors[key].shape) == 2 else ""),
        )
    found = []
    for key, info in one.tensors.items():
        tuned = two.tensors.get(key)
        if tuned is None or tuned.shape != info.shape:
            continue
        if info.dtype in FLOATS and tuned.dtype in FLOATS:
            found.append(key)
        elif info.dtype != tuned.dtype or not Pair(info, tuned).equal():
            raise NotMergeable(
                f"{key!r} differs and is {tuned.dtype}: such numbers have no difference that an adapter could hold",
                where=tuned.path,
                fix="dequantise the models, if they are quantised",
            )
    return found


def _reshaped(one: BaseModel, two: BaseModel) -> list[str]:
    both = sorted(one.tensors.keys() & two.tensors.keys())
    return [key for key in both if one.tensors[key].shape != two.tensors[key].shape]


def _named(words: Sequence[str], key: str) -> bool:
    return any(modules.names(word, key) or modules.names(word, modules.module_of(key)) for word in words)


def _chosen(
    changed: Mapping[str, Pair], config: Mapping[str, Any], targets: Sequence[str], exclude: Sequence[str]
) -> tuple[dict[str, str], dict[str, str]]:
    """The kinds of the layers that are extracted, by their weight; and why the other changed tensors are not."""
    chosen, why = dict[str, str](), dict[str, str]()
    for key, pair in changed.items():
        shape, name = pair.base.shape, modules.module_of(key)
        kind = modules.kind_of(key, shape, config)
        if kind is None:
            why[key] = "a bias" if key.endswith("bias") else "no weight of a linear layer"
        elif _named(exclude, key):
            why[key] = "excluded"
        elif targets:
            if any(modules.names(word, name) for word in targets):
                chosen[key] = kind
            else:
                why[key] = "no target"
        elif kind == "embedding":
            why[key] = "an embedding"
        elif modules.is_head(name, shape, config):
            why[key] = "the model's output"
        else:
            chosen[key] = kind
    for word in targets:
        if not any(modules.names(word, modules.module_of(key)) for key in chosen):
            names = sorted(
                {modules.module_of(key) for key in changed if modules.kind_of(key, changed[key].base.shape, config)}
            )
            raise ConfigError(f"--targets {word!r} names no layer that changed", fix=nearest(word, names))
    return chosen, why


def _left(why: str, change: float, base: float) -> Left:
    return Left(why, math.sqrt(change), math.sqrt(change / base) if base else math.inf)
