"""VeRA: two trained vectors between random matrices that all layers share.

    h = W₀ x + Λ_b B Λ_d A x                                   Kopiczko et al. 2024, eq. 2

A (r, in) and B (out, r) are random, frozen and the same for all layers: the layers take the leading rows and columns
that they need. Λ_d = diag(d) and Λ_b = diag(b) are trained, d from 0.1 and b from 0 (§4.1). The shared matrices depend
on a key alone, so a file may leave them out; they are drawn as PEFT draws them, where the paper's authors work.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapterhub_lite import ConfigError, LowRank, Method, Outline, Params, hookimpl

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from typing_extensions import Self

    from adapterhub_lite import Site

PEFT_NAMES = {
    "rank": "r",
    "d_initial": "d_initial",
    "projection_prng_key": "projection_prng_key",
    "save_projection": "save_projection",
    "dropout": "vera_dropout",
}
KEYS = range(-(1 << 63), 1 << 64)  # what torch seeds a generator with
MAX_INITIAL = 3e38  # of float32
_PRODUCT: Any = None


@dataclass(frozen=True, kw_only=True)
class VeRA(Method):
    """Vector-based random matrix adaptation (https://arxiv.org/abs/2310.11454).

    Options: `rank` r of the shared matrices; `d_initial`, where d begins; `projection_prng_key`, from which they are
    drawn, and `save_projection`, whether files have them too; `dropout` on the adapter's input.
    """

    name = "vera"
    paper = "https://arxiv.org/abs/2310.11454"
    site_kinds = frozenset({"linear", "quantised_linear", "transposed_linear"})
    peft_type = "VERA"

    rank: int = 256
    d_initial: float = 0.1
    projection_prng_key: int = 0
    save_projection: bool = True
    dropout: float = 0.0

    def check(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"rank={self.rank} is not positive", where=self.name, fix="give a rank >= 1")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout={self.dropout} is not in [0, 1)", where=self.name)
        if self.projection_prng_key not in KEYS:
            what = f"projection_prng_key={self.projection_prng_key} is no seed of a generator"
            raise ConfigError(what, where=self.name, fix="give one of 64 bits")
        if abs(self.d_initial) > MAX_INITIAL:
            what = f"d_initial={self.d_initial:g} is larger than any float32"
            raise ConfigError(what, where=self.name, fix="choose a smaller one")

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _product()  # as in `init`: an unpickled model may be compiled before anything else makes it

    @property
    def adds_delta(self) -> bool:
        return not self.dropout

    # The rules ------------------------------------------------------------------------------------

    def shared(self, sites: Sequence[Site]) -> Mapping[str, Tensor]:
        """A (r, largest in) and B (largest out, r), drawn in this order from one generator."""
        import torch

        rng, r = torch.Generator().manual_seed(self.projection_prng_key), self.rank

        def uniform(*shape: int) -> Tensor:  # Kaiming, gain √2: ±√(6 / fan_in)
            bound = math.sqrt(3) * (math.sqrt(2) / math.sqrt(shape[1]))
            return torch.empty(shape).uniform_(-bound, bound, generator=rng)

        return {
            "A": uniform(r, max(site.shape[1] for site in sites)),
            "B": uniform(max(site.shape[0] for site in sites), r),
        }

    def init(self, site: Site, rng: torch.Generator) -> Mapping[str, nn.Parameter | Tensor]:
        import torch
        from torch import nn

        _product()  # for torch.compile, which cannot make a class
        out, r = site.shape[0], self.rank
        return {"b": nn.Parameter(torch.zeros(out)), "d": nn.Parameter(torch.full((r,), self.d_initial))}

    def delta(self, p: Params, site: Site) -> LowRank:
        A, B = _cut(p, site)  # (r, in), (out, r)
        return LowRank(p["b"][:, None] * B, p["d"][:, None] * A)

    def outline(self, shapes: Mapping[str, tuple[int, ...]]) -> Outline:
        return Outline(shapes["d"][0])

    def forward(self, p: Params, x: Tensor, y: Tensor, site: Site) -> Tensor:
        if self.dropout and site.module is not None and site.module.training:
            from torch.nn.functional import dropout

            x = dropout(x, self.dropout)
        A, B = _cut(p, site)
        change: Tensor = _product().apply(x, A, p["d"], B, p["b"])  # (…, out)
        return y + change.to(y.dtype)

    # On disk --------------------------------------------------------------------------------------

    def peft_keys(self) -> Mapping[str, Mapping[str, str]]:
        return {"": {"b": "vera_lambda_b", "d": "vera_lambda_d"}}

    def peft_shared(self) -> Mapping[str, str]:
        return {"A": "vera_A", "B": "vera_B"} if self.save_projection else {}

    @classmethod
    def from_peft(cls, config: dict[str, Any]) -> Self | None:
        config.pop("init_weights", None)  # how the vectors began
        try:
            return cls(**{ours: config.pop(peft) for ours, peft in PEFT_NAMES.items() if peft in config})
        except ConfigError as e:
            ours, is_, rest = e.what.partition("=")
            if is_ and ours in PEFT_NAMES:
                raise ConfigError(f"{PEFT_NAMES[ours]}={rest}", fix=f"correct {PEFT_NAMES[ours]}") from None
            raise

    def to_peft(self) -> dict[str, Any]:
        return {**{peft: getattr(self, ours) for ours, peft in PEFT_NAMES.items()}, "bias": "none"}

    def place(self, family: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, tuple[int, ...], tuple[int, int]]:
        if shapes["d"] != (self.rank,):
            raise ConfigError(f"vera_lambda_d is {list(shapes['d'])}, and the rank {self.rank}", fix="correct r")
        if len(shapes["b"]) != 1:
            raise ConfigError(f"vera_lambda_b {list(shapes['b'])} is not a vector")
        (out,) = shapes["b"]
        A, B = shapes.get("A"), shapes.get("B")  # those of a file that has them; layers take a part of each
        # One row would broadcast, and what came out would not say so.
        if A is not None and (len(A) != 2 or A[0] != self.rank):
            raise ConfigError(f"vera_A is {list(A)}, and not of {self.rank} rows")
        if B is not None and (len(B) != 2 or B[1] != self.rank or B[0] < out):
            raise ConfigError(f"vera_B is {list(B)}, and not of {out} rows or more of {self.rank}")
        return "linear", (out, -1), (out, -1)


def _cut(p: Params, site: Site) -> tuple[Tensor, Tensor]:
    """What one layer takes of the shared matrices: A (r, in) and B (out, r)."""
    out, into = site.shape
    A, B, device = p["A"], p["B"], p["b"].device
    if A.shape[1] < into:
        raise ConfigError(
            f"the shared matrix A is for layers of {A.shape[1]} inputs at most, and this one has {into}",
            where=site.name,
            fix="load the adapter on the model that it was made for",
        )
    return A[:, :into].to(device), B[:out].to(device)  # a model may be spread over several devices


def _product() -> Any:
    """The function below, made once: with torch at the top, `adapter methods` would be slow to list this file."""
    global _PRODUCT
    if _PRODUCT is None:  # no functools.cache, which torch.compile looks through
        _PRODUCT = _make_product()
    return _PRODUCT


def _make_product() -> type[torch.autograd.Function]:
    """A function for b ⊙ B (d ⊙ A x) that keeps A x alone for the backward pass, r numbers a token.

    Left to itself, autograd would keep x for A, and B (d ⊙ A x), of the output's size, for b.
    """
    import torch
    from torch.nn.functional import linear

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, A: Tensor, d: Tensor, B: Tensor, b: Tensor) -> Tensor:
            h = linear(x, A)  # (…, r)
            ctx.save_for_backward(h, A, d, B, b)
            return b * linear(d * h, B)  # (…, out)

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
            h, A, d, B, b = ctx.saved_tensors
            h = h.to(d.dtype)  # under autocast it is not
            g_z = (b * g) @ B  # (…, r), of z = d ⊙ h
            g_d = (g_z * h).sum_to_size(d.shape) if ctx.needs_input_grad[2] else None  # (r,)
            g_b = (g * linear(d * h, B)).sum_to_size(b.shape) if ctx.needs_input_grad[4] else None  # (out,)
            g_x = (d * g_z) @ A if ctx.needs_input_grad[0] else None  # (…, in)
            return g_x, None, g_d, None, g_b

    return Product


@hookimpl
def methods() -> list[type[Method]]:
    return [VeRA]
