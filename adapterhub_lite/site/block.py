"""A module as a whole: what it computes is nobody's business, what comes in and goes out is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, NotMergeable
from ..hookspecs import hookimpl
from . import SLOT, Site
from .embedding import EmbeddingSite
from .linear import LinearSite, TransposedLinearSite

if TYPE_CHECKING:
    from torch import Tensor, nn

LAYERS: tuple[type[Site], ...] = (LinearSite, TransposedLinearSite, EmbeddingSite)


class BlockSite(Site):
    """Any module that gives hidden states (…, width): as a tensor, or first in a tuple or a mapping.

    Its widths are those of the first and last layers inside, in the order in which they were registered; an embedding
    counts where there is nothing else.
    """

    kind = "block"
    general = True

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        from torch import nn

        return not isinstance(module, (nn.ModuleList, nn.ModuleDict))

    @classmethod
    def check(cls, name: str, module: nn.Module) -> None:
        values = _values(module)
        if not values:
            raise ConfigError(
                "has no floating point values to tell its dtype", where=name, fix="target a block around it"
            )
        if any(tensor.is_meta for tensor in values):
            raise ConfigError("the block has no values yet", where=name, fix="load the model first")

    @classmethod
    def of(cls, name: str, module: nn.Module) -> Site:
        layers = [layer for layer in module.modules() if _shape(layer) is not None]
        others = [layer for layer in layers if not EmbeddingSite.accepts(layer)]  # T5's attention has one for distances
        known = [shape for layer in others or layers if (shape := _shape(layer)) is not None]
        if not known:
            raise ConfigError("has no layer that tells how wide its output is", where=name, fix="target one that has")
        return cls(name, (known[-1][0], known[0][1]), module)

    @property
    def shape(self) -> tuple[int, int]:
        out, into = self.weight_shape
        return out, into

    @property
    def weight(self) -> Tensor:
        raise NotMergeable("a block has no weight to merge into", where=self.name, fix="leave the adapter unmerged")

    @property
    def bias(self) -> Tensor | None:
        raise NotMergeable("a block has no bias to merge into", where=self.name, fix="leave the adapter unmerged")

    @property
    def like(self) -> Tensor:
        return _values(self._live())[0]

    def width(self, end: str) -> int:
        return self.shape[1] if end == "input" else self.shape[0]

    @property
    def sample(self) -> Tensor:
        found = _values(self._live())
        first = next((p for p in found if p.ndim > 1), found[0]).detach()
        return first.reshape(len(first), -1)

    def hidden(self, out: Any) -> Tensor:
        first = out[0] if isinstance(out, tuple) else next(iter(out.values())) if isinstance(out, Mapping) else out
        return super().hidden(first)

    def with_hidden(self, out: Any, hidden: Tensor) -> Any:
        if isinstance(out, tuple):
            rest = (hidden, *out[1:])
            return type(out)(*rest) if hasattr(out, "_fields") else rest
        return type(out)({**out, next(iter(out)): hidden})  # transformers' ModelOutput is one


def _values(module: nn.Module) -> list[nn.Parameter]:
    """The floating point parameters inside, but for those of adapters."""
    return [p for name, p in module.named_parameters() if p.is_floating_point() and SLOT not in name.split(".")]


def _shape(layer: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a layer that has widths, else None."""
    from torch import nn

    if isinstance(layer, nn.LayerNorm):
        return layer.normalized_shape[-1], layer.normalized_shape[-1]
    for kind in LAYERS:
        if kind.accepts(layer):
            return kind.of("", layer).shape
    return None


@hookimpl
def site_kinds() -> list[type[Site]]:
    return [BlockSite]
