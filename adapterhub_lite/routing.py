"""What the author of a router writes: a `Router`, its options, and how it weighs the ways of a Route by an input.

The instance *is* the router with its options, as a `Method` is. Its functions are pure: they
are given the tensors at one layer. Like `protocol`, this file does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from . import options
from .errors import ConfigError

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from .delta import Delta


@dataclass(frozen=True, kw_only=True)
class Router:
    """Weighs the ways of a Route, token by token. `init` and `weights` are all that one needs to have, or `fixed`.

    Subclasses are frozen dataclasses themselves; their fields are the router's options, made with `option`.
    """

    name: ClassVar[str]
    """How people call it: the plugin's entry point is `router.NAME`."""
    paper: ClassVar[str]
    """URL of the paper that the router is taken from."""
    reads_delta: ClassVar[bool] = False
    """Whether `init` looks at the weight change of a way; other methods than those that have one are then refused."""

    def __post_init__(self) -> None:
        options.validate(self, owner=f"router {self.name!r}")
        self.check()

    def check(self) -> None:
        """Raise `ConfigError` for options that contradict each other."""

    @classmethod
    def defines(cls, rule: str) -> bool:
        """Whether the router has its own `rule`."""
        return getattr(cls, rule) is not getattr(Router, rule)

    def init(self, delta: Delta, width: int, rng: Generator) -> Mapping[str, Tensor]:
        """The tensors of one way at one layer; those that are an `nn.Parameter` are trained.

        `delta` (out, in) is what the way adds to the weight, of rank 0 where it adds nothing, or where the router does
        not look (`reads_delta`). `width` is the size of the layer's input.
        """
        raise ConfigError(f"router {self.name!r} does not define init()", fix="see docs/protocol.md")

    def weights(self, ways: Sequence[Mapping[str, Tensor]], h: Tensor) -> Tensor:
        """The weight of each way, (…, ways), for the layer's input h (…, width), from the ways' tensors."""
        if not self.defines("fixed"):
            raise ConfigError(f"router {self.name!r} does not define weights()", fix="see docs/protocol.md")
        return self.fixed(ways).to(h).expand(*h.shape[:-1], len(ways))

    def fixed(self, ways: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """The weight of each way, (ways,), of a router that has the same for every input.

        One that has this needs no `weights`. It goes with every kind of layer, and its Route is a weight change where
        the ways are: it is merged, and `adapter compile` makes one LoRA of it.
        """
        raise ConfigError(f"the weights of router {self.name!r} depend on the input", fix="ask for weights()")

    def alone(self, way: Mapping[str, Tensor], h: Tensor) -> Tensor:
        """The weight (…, 1) of a way that is on by itself, to train its tensors.

        A router that has this one is trained so and in no other way; else it is trained while the Route is on.
        """
        raise ConfigError(f"router {self.name!r} is not trained one way at a time", fix="activate the Route")


def top(scores: Tensor, k: int, temperature: float) -> Tensor:
    """A softmax of the k largest scores, over the last axis, and 0 for the rest; of all, where k is 0 or too large.

    >>> import torch
    >>> top(torch.tensor([[3.0, 1.0, 3.0]]), k=2, temperature=1.0)
    tensor([[0.5000, 0.0000, 0.5000]])
    """
    if 0 < k < scores.shape[-1]:
        kept = scores.topk(k, dim=-1)
        scores = scores.new_full(scores.shape, float("-inf")).scatter(-1, kept.indices, kept.values)
    return (scores / temperature).softmax(-1)
