"""Which tensors of a base model an adapter changes: found by name, torch not needed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ..agreement import equal
from ..base_model import BaseModel
from ..checkpoint import TensorInfo
from ..errors import NotMergeable, UnknownName, nearest
from ..format import SiteContents, is_floating
from ..source import Single, Source

ANY_BASE = "pass --any-base (any_base=True) if it is the right one"


class Part(NamedTuple):
    """A term's share of one layer's change."""

    term: int  # its place in the sum
    site: str  # the layer, as that adapter calls it
    weight: float


@dataclass(frozen=True)
class Layer:
    """A layer of the base that adapters change."""

    name: str  # as the base calls it
    weight: TensorInfo
    bias: TensorInfo | None
    parts: tuple[Part, ...]
    biased: bool
    """Whether the bias may change too."""
    by_inputs: bool | None
    """Whether this base's linear layers have a row for each input, not for each output; None where it does not tell."""

    @property
    def touched(self) -> list[TensorInfo]:
        return [self.weight, *([self.bias] if self.biased and self.bias is not None else [])]


def layers(base: BaseModel, terms: Iterable[tuple[Mapping[str, float], Source]]) -> dict[str, Layer]:
    """The base's layers that these terms change, each with its weights at the sites that it adapts.

    Raises `UnknownName` for a site that is none of the base's layers, and `NotMergeable` where a sum would be wrong.
    """
    known = _layers_of(base)
    by_inputs = _by_inputs(known.values())
    found: dict[str, Layer] = {}
    for i, (weights, source) in enumerate(terms):
        if not any(weights.values()):
            continue
        label = next(iter(source.contents))
        gives_delta(source)
        rename = renaming(source, base)
        for site, weight in weights.items():
            if weight == 0:
                continue
            name = rename(site)
            tensors = known[name]
            former = found.get(name)
            parts = (*(former.parts if former else ()), Part(i, site, weight))
            biased = _changes_bias(source, site) or (former is not None and former.biased)
            layer = Layer(name, tensors["weight"], tensors.get("bias"), parts, biased, by_inputs)
            _refuse_stored(layer, base, label)
            _refuse_other(layer, source, site, label)
            found[name] = layer
    _refuse_tied(base, found)
    return dict(sorted(found.items()))


def gives_delta(source: Source) -> bool:
    """Whether its tensors alone give ΔW; else its method merges, with the weight at hand.

    Raises `NotMergeable` for a method that does neither.
    """
    if not isinstance(source, Single):
        return True
    method = source.own.method
    if method.defines("delta") and not method.reads_weight:
        return True
    if method.wraps_call or not method.defines("merge"):
        raise NotMergeable(
            f"{source.name}: a {method.name!r} adapter is no change of weights",
            fix="use it on a live model, with adapters.load()",
        )
    return False


def _changes_bias(source: Source, site: str) -> bool:
    if not gives_delta(source):
        return True
    if isinstance(source, Single):  # whose file need not tell the layer's shape, as the base does
        return source.own.method.at(site).outline(source.own.sites[site].shapes).bias
    return source.extent(site).bias


def _layers_of(base: BaseModel) -> dict[str, dict[str, TensorInfo]]:
    """Weight and bias of each module that has a weight."""
    found: dict[str, dict[str, TensorInfo]] = {}
    for key, info in base.tensors.items():
        module, _, parameter = key.rpartition(".")
        if module and parameter in ("weight", "bias"):
            found.setdefault(module, {})[parameter] = info
    return {name: tensors for name, tensors in found.items() if "weight" in tensors}


def _by_inputs(known: Iterable[Mapping[str, TensorInfo]]) -> bool | None:
    """How this base stores linear layers, by those with a bias and more inputs than outputs, or fewer."""
    told = set()
    for tensors in known:
        weight, bias = tensors["weight"].shape, tensors["bias"].shape if "bias" in tensors else ()
        if len(weight) == 2 and weight[0] != weight[1] and bias in ((weight[0],), (weight[1],)):
            told.add(bias == (weight[1],))
    return told.pop() if len(told) == 1 else None


class Renaming(NamedTuple):
    """Names begin differently where the model that was trained has the base inside of it, or the other way round."""

    strip: str
    add: str

    def __call__(self, name: str) -> str:
        return self.add + name.removeprefix(self.strip)


def renaming(source: Source, base: BaseModel) -> Renaming:
    """The one beginning that, exchanged for another, makes layers of the base of all sites."""
    sites, known, label = source.sites, _layers_of(base), next(iter(source.contents))
    plain = Renaming("", "")
    unknown = [name for name in sites if name not in known]
    if not unknown:
        return plain
    first = unknown[0]
    dots = [i + 1 for i, c in enumerate(first) if c == "."]
    tried = [Renaming(first[:i], "") for i in dots if first[i:] in known]
    tried += [Renaming("", name.removesuffix(first)) for name in known if name.endswith(f".{first}")]
    fitting = [
        rename for rename in tried if all(name.startswith(rename.strip) and rename(name) in known for name in sites)
    ]
    if len(fitting) == 1:
        return fitting[0]
    more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
    raise UnknownName(
        f"adapts {first!r}{more}, {_why_not_there(first, sites[first], base)}",
        where=label,
        fix=nearest(first, known),
    )


def _why_not_there(name: str, part: SiteContents, base: BaseModel) -> str:
    if name in base.tensors:
        return f"which is a parameter of shape {list(base.tensors[name].shape)} in the base, not a layer"
    if part.shape[0] == base.config.get("vocab_size") and base.config.get("tie_word_embeddings", True):
        return "the output head, which the base ties to its embedding: it has no weight of its own"
    if f"{name}.qweight" in base.tensors:
        return "which the base has in a quantised form: merge into the full-precision one"
    return "which the base does not have"


def _refuse_stored(layer: Layer, base: BaseModel, label: str) -> None:
    for info in (layer.weight, layer.bias):
        if info is not None and (not is_floating(info) or info.dtype.startswith("F8")):
            quantised = base.config.get("quantization_config")
            how = (
                f" ({quantised['quant_method']})" if isinstance(quantised, dict) and "quant_method" in quantised else ""
            )
            raise NotMergeable(
                f"{label} adapts {layer.name!r}, whose {info.name.rpartition('.')[2]} is stored as {info.dtype}{how}: "
                "it holds no sum",
                fix="merge into the full-precision base, and quantise the result",
            )


def _refuse_other(layer: Layer, source: Source, site: str, label: str) -> None:
    """What headers tell of a layer that is not the adapter's; which kind it is, is looked at later."""
    part = source.sites[site]
    if -1 not in part.weight_shape and math.prod(part.weight_shape) != layer.weight.numel:
        raise other_shape(layer, part, site, label)
    if layer.biased and layer.bias is None and gives_delta(source):
        raise no_bias(layer)


def other_shape(layer: Layer, part: SiteContents, site: str, label: str) -> NotMergeable:
    return NotMergeable(
        f"{label} adapts {site!r} as {part.kind} of shape {list(part.weight_shape)}, and the base has "
        f"{list(layer.weight.shape)} there",
        fix="give the base that it was trained on; a resized vocabulary is not merged",
    )


def no_bias(layer: Layer) -> NotMergeable:
    return NotMergeable(
        f"an adapter changes the bias of {layer.name!r}, which has none in the base",
        fix="leave the adapter unmerged",
    )


def tied(base: BaseModel) -> set[str]:
    """The tensors that are the embedding and the output head at once."""
    heads = [name for name in base.config.get("architectures") or () if isinstance(name, str)]
    if not any(mark in name for name in heads for mark in ("LM", "ConditionalGeneration", "PreTraining")):
        return set()
    told = [base.config, *(part for part in base.config.values() if isinstance(part, dict))]  # text_config and the like
    vocabularies = {part["vocab_size"] for part in told if isinstance(part.get("vocab_size"), int)}
    like = [t for t in base.tensors.values() if len(t.shape) == 2 and t.shape[0] in vocabularies]
    tie = next((part["tie_word_embeddings"] for part in told if "tie_word_embeddings" in part), None)
    if tie is None:  # old configs leave out what was the default
        tie = all(equal(like[0], other) for other in like[1:])
    return {t.name for t in like} if tie else set()


def tied_error(name: str, done: str) -> NotMergeable:
    return NotMergeable(
        f"{name!r} is the embedding and the output head at once (tie_word_embeddings), and {done} would change both",
        fix="untie them in the base first, or leave the adapter unmerged",
    )


def _refuse_tied(base: BaseModel, found: Mapping[str, Layer]) -> None:
    """An embedding that the output head shares would change the head as well."""
    shared = tied(base)
    for layer in found.values():
        if layer.weight.name in shared:
            raise tied_error(layer.name, "a merge")
