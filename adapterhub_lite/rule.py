"""What the author of a merge rule writes: a `Rule`, its options, and what it makes of the deltas at one site.

The instance *is* the rule with its options, as a `Method` is. Its functions are pure: they
see all adapters at one site, and facts that were gathered over all sites before, if the
rule asks for any. Like `protocol`, this file does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from . import options
from .errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from .delta import Delta

Facts = Mapping[str, Any]


class Place(NamedTuple):
    """The site that is merged."""

    name: str
    shape: tuple[int, int]  # of ΔW, (out, in)


class Part(NamedTuple):
    """What one adapter brings to a site."""

    delta: Delta  # (out, in); a LowRank of rank 0 where the adapter leaves the layer alone
    weight: float
    number: int = 0
    """Which adapter it is of: the same at every site, to look up facts by."""
    key: str = ""
    """A hash of the delta's numbers, to key random numbers by: no order of adapters changes it."""

    @property
    def scaled(self) -> Delta:
        """W ΔW."""
        return self.delta.scaled(self.weight)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A merge rule. `merge` is all that one needs to have.

    Subclasses are frozen dataclasses themselves; their fields are the rule's options, made with `option`.
    """

    name: ClassVar[str]
    """How people call it: the plugin's entry point is `rule.NAME`."""
    paper: ClassVar[str]
    """URL of the paper that the rule is taken from."""
    version: ClassVar[int] = 1
    """Raised when the same inputs and options give something else than before; random numbers depend on it."""
    full_rank: ClassVar[bool] = False
    """Whether the result is written out: it can then only be saved truncated."""
    takes: ClassVar[int | None] = None
    """The number of adapters that it merges; None for any."""
    reads_factors: ClassVar[bool] = False
    """Whether the result depends on how ΔW is factored; others see only the matrix."""
    same_rank: ClassVar[bool] = False
    """Whether all adapters must be at every site, with one rank there. Other ones are refused."""

    def __post_init__(self) -> None:
        options.validate(self, owner=f"rule {self.name!r}")
        self.check()

    def check(self) -> None:
        """Raise `ConfigError` for options that contradict each other."""

    @property
    def weighs(self) -> Literal["sum", "average", "equal"]:
        """What weights are.

        "sum": factors of the changes. "average": shares, of which only the ratios matter; negative ones are refused.
        "equal": nothing, for the rule finds its own; they must be equal.
        """
        return "sum"

    def default_weight(self, count: int) -> float:
        """The weight of each of `count` adapters where none is given."""
        return 1 / count

    @property
    def keeps_one(self) -> bool:
        """Whether one adapter with weight 1 is itself under these options."""
        return True

    @property
    def keeps_equal(self) -> bool:
        """Whether equal adapters, by default weights, are that adapter under these options."""
        return self.keeps_one

    @property
    def passes(self) -> int:
        """How often `observe` is to see all sites before `merge` can begin."""
        return 0

    def observe(self, parts: Sequence[Part], place: Place, facts: Facts) -> Facts:
        """What is to be known of one site; `facts` are those of the pass before."""
        raise ConfigError(f"rule {self.name!r} does not define observe()", fix="see docs/protocol.md")

    def conclude(self, observed: Mapping[str, Facts], facts: Facts) -> Facts:
        """The facts from what was observed at each site, by the sites' names, and those of the pass before."""
        raise ConfigError(f"rule {self.name!r} does not define conclude()", fix="see docs/protocol.md")

    def rank(self, ranks: Sequence[int], shape: tuple[int, int]) -> int:
        """The rank that `merge` gives at most, for deltas of these ranks; plans are made with it, without torch."""
        return min(shape) if self.full_rank else min(sum(ranks), *shape)

    def merge(self, parts: Sequence[Part], place: Place, facts: Facts) -> Delta:
        """ΔW (out, in) of the merged adapter at one site. Pure; the order of the parts tells nothing."""
        raise ConfigError(f"rule {self.name!r} does not define merge()", fix="see docs/protocol.md")

    def uniform(self, part: Part, place: Place) -> Tensor:
        """A random number in [0, 1) for each entry of ΔW, float32 (out, in), for rules with an option `seed`.

        It depends on the seed, the site's name, the delta itself, and the rule's name and version; on no order,
        thread or device.
        """
        from .seed import uniform

        return uniform(place.shape, *self._key(part, place))

    def drawn(self, part: Part, place: Place, chance: float) -> Tensor:
        """Which entries of ΔW have a number of `uniform` below `chance`, bool (out, in): the same, in half the time."""
        from .seed import below

        return below(place.shape, chance, *self._key(part, place))

    def _key(self, part: Part, place: Place) -> tuple[object, ...]:
        return ("rule", self.name, self.version, getattr(self, "seed", 0), place.name, part.key)


def shares(rule: Rule, weights: Sequence[float]) -> list[float]:
    """The weights as factors of the changes: as they are, or divided by their sum.

    >>> from adapterhub_lite.registry import registry
    >>> shares(registry().rule("mean")(), [1.0, 3.0])
    [0.25, 0.75]
    """
    total = sum(weights)
    return list(weights) if rule.weighs == "sum" else [w / total for w in weights]
