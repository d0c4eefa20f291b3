"""What a server takes: an adapter as one LoRA of one rank and one α, refused where it is none.

vLLM reads `r` and `lora_alpha` of a config and no patterns, wants r at most `--max-lora-rank`, which is one of a list,
and refuses DoRA, biases and `modules_to_save`.
"""

from __future__ import annotations

from typing import Any

from .combine import WeightedSum
from .delta import Delta, Dense, LowRank
from .errors import NotMergeable
from .source import Extent, Piece

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM makes room for: values of --max-lora-rank
KINDS = frozenset({"linear", "transposed_linear", "quantised", "embedding"})


class Padded(WeightedSum):
    """The same adapter with one rank at every site: the factors are padded with zeros."""

    def __init__(self, of: WeightedSum, rank: int) -> None:
        super().__init__([(1.0, of)])
        self.of, self.rank = of, rank

    def extent(self, site: str) -> Extent:
        return self.of.extent(site)._replace(rank=self.rank)

    def piece(self, site: str) -> Piece:
        piece = self.of.piece(site)
        return piece._replace(delta=_of_rank(piece.delta, self.rank))

    def recipe(self) -> dict[str, Any]:
        padded = {"weight": 1.0, "rule": "pad", "rank": self.rank, "of": self.of.recipe()}
        return {"rule": "sum", "terms": [padded]}


def for_vllm(of: WeightedSum, max_rank: int | None = None) -> tuple[Padded, int]:
    """The adapter as vLLM serves it, and the smallest `--max-lora-rank` for it; `NotMergeable` if it does not.

    `max_rank` is the server's, if that is given already.
    """
    for name, own in of.contents.items():
        if own.kept:
            raise NotMergeable(
                f"{name}: has whole values of the base beside the adapter, {next(iter(own.kept))!r} among them, and "
                "vLLM takes no modules_to_save, biases or token rows",
                fix="fold it into the base and serve that: adapter merge … --into BASE",
            )
        if own.method.reads_weight or not own.method.defines("delta"):
            raise NotMergeable(
                f"{name}: a {own.method.name!r} adapter is no LoRA, and vLLM serves no other",
                fix="fold it into the base and serve that: adapter merge … --into BASE",
            )
    extents = {site: of.extent(site) for site in of.sites}
    for site, extent in extents.items():
        if of.sites[site].kind not in KINDS:
            what = f"vLLM serves no LoRA at a layer of kind {of.sites[site].kind!r}"
            raise NotMergeable(what, where=site, fix="fold it into the base: adapter merge … --into BASE")
        if extent.bias:
            raise NotMergeable("changes a bias, and vLLM takes none", where=site, fix="train without lora_bias")
    rank = max((extent.rank for extent in extents.values()), default=0)
    allowed = max(RANKS) if max_rank is None else max_rank
    if rank > allowed:
        raise NotMergeable(
            f"rank {rank} is above --max-lora-rank {allowed}", fix=f"truncate it first: adapter resize --rank {allowed}"
        )
    return Padded(of, max(rank, 1)), next(own for own in RANKS if own >= rank)


def _of_rank(delta: Delta, rank: int) -> Delta:
    """The same as two factors of that rank, which is not below that of the matrix."""
    from torch.nn.functional import pad

    from . import algebra

    factors = algebra.low_rank(delta)
    if factors.rank > min(factors.shape):
        factors = algebra.low_rank(Dense(LowRank(factors.B.double(), factors.A.double(), factors.scale).dense()))
    room = rank - factors.rank
    return LowRank(pad(factors.B.detach(), (0, room)), pad(factors.A.detach(), (0, 0, 0, room)), factors.scale)
