"""LoRA: a low-rank matrix added to a frozen weight.

    h = W₀ x + s · B A x,   s = α / r                          Hu et al. 2021, §4.1
                            s = α / √r  (rsLoRA)               Kalajdzievski 2023, Theorem 3.2

A is random and B zero at the start, so training begins at the base model. PiSSA (Meng et al. 2024)
and OLoRA (Büyükakyüz 2024) begin at the weight's own leading directions B₀ A₀ and move the base
by −s B₀ A₀; here the base stays as it is and the delta carries the difference, s (B A − B₀ A₀).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from adapterhub_lite import ConfigError, LowRank, Method, NotMergeable, Outline, Params, hookimpl
from adapterhub_lite.pattern import Patterns, spell

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from typing_extensions import Self

    from adapterhub_lite import Site

# Our names for PEFT's `init_lora_weights`. Those of PEFT that change the base weights are not among them.
Init = Literal["kaiming", "gaussian", "orthogonal", "pissa", "olora", "random"]
PEFT_INITS: Mapping[Init, bool | str] = {
    "kaiming": True,
    "gaussian": "gaussian",
    "orthogonal": "orthogonal",
    "random": False,
}
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
LEAVES_BASE = ("gaussian", "orthogonal", "eva", "mica")
MAX_ALPHA = 3e38  # of float32
PEFT_NAMES = {"rank": "r", "alpha": "lora_alpha", "rslora": "use_rslora", "dropout": "lora_dropout"}


@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """Low-rank adaptation (https://arxiv.org/abs/2106.09685).

    Options: `rank` r and `alpha` α (scaling s = α/r, or α/√r with `rslora`); `dropout` on the adapter's
    input; `init_weights`, of A and B; `rank_pattern` and `alpha_pattern`, other values for the modules that a
    pattern names (as in PEFT the first match wins); `lora_bias`, a trained bias behind B.
    """

    name = "lora"
    paper = "https://arxiv.org/abs/2106.09685"
    site_kinds = frozenset(
        {"linear", "quantised_linear", "transposed_linear", "conv1d", "conv2d", "conv3d", "embedding"}
    )
    carries_low_rank = True
    peft_type = "LORA"

    rank: int = 8
    alpha: float = 8
    rslora: bool = False
    dropout: float = 0.0
    init_weights: Init = "kaiming"
    lora_bias: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def check(self) -> None:
        for what, rank in (("rank", self.rank), *self.rank_pattern.items()):
            if rank < 1:
                raise ConfigError(f"rank {rank} ({what}) is not positive", where=self.name, fix="give a rank >= 1")
        for what, alpha in (("alpha", self.alpha), *self.alpha_pattern.items()):
            if abs(alpha) > MAX_ALPHA:
                what = f"alpha {alpha:g} ({what}) is larger than any float32"
                raise ConfigError(what, where=self.name, fix="choose a smaller one")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout={self.dropout} is not in [0, 1)", where=self.name)
        _ = self._by_rank, self._by_alpha  # patterns that cannot be matched safely are refused at once
        if self.init_weights == "pissa" and min([self.alpha, *self.alpha_pattern.values()]) <= 0:
            what = "pissa takes the root of S/s, so alpha must be positive"
            raise ConfigError(what, where=self.name, fix="give an alpha > 0")
        if self.init_weights == "orthogonal" and self.rank % 2:
            raise ConfigError(f"orthogonal init needs an even rank, not {self.rank}", where=self.name)

    def at(self, site: str) -> Self:
        if not self.rank_pattern and not self.alpha_pattern:
            return self
        by_rank, by_alpha = self._by_rank.first(site), self._by_alpha.first(site)
        rank = self.rank if by_rank is None else self.rank_pattern[by_rank]
        alpha = self.alpha if by_alpha is None else self.alpha_pattern[by_alpha]
        return replace(self, rank=rank, alpha=alpha, rank_pattern={}, alpha_pattern={})

    @cached_property
    def _by_rank(self) -> Patterns:
        return Patterns(self.rank_pattern)

    @cached_property
    def _by_alpha(self) -> Patterns:
        return Patterns(self.alpha_pattern)

    @property
    def scaling(self) -> float:
        return self.alpha / math.sqrt(self.rank) if self.rslora else self.alpha / self.rank

    @property
    def identity_at_init(self) -> bool:
        return self.init_weights != "random"

    @property
    def adds_delta(self) -> bool:
        return not self.dropout

    # The rules ------------------------------------------------------------------------------------

    def init(self, site: Site, rng: torch.Generator) -> Mapping[str, nn.Parameter | Tensor]:
        import torch
        from torch import nn

        (out, into), r = site.shape, self.rank

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=rng)

        def uniform(*shape: int) -> Tensor:  # kaiming_uniform(a=√5), as nn.Linear: U(±1/√fan_in)
            return (2 * torch.rand(*shape, generator=rng) - 1) / math.sqrt(shape[1])

        frozen: dict[str, Tensor] = {}
        if self.init_weights in ("pissa", "olora"):
            if r > min(out, into):
                raise ConfigError(f"rank {r} exceeds the weight's, {min(out, into)}", where=site.name)
            A, B = self._principal(site.weight.float())  # (r, in), (out, r)
            frozen = {"A0": A.clone(), "B0": B.clone()}
        elif self.init_weights == "orthogonal":  # rows of one orthogonal matrix, so that B A = 0
            Q, _ = torch.linalg.qr(normal(r, r))  # (r, r)
            A = (normal(into, r // 2) @ Q[0::2]).mT / 10  # (r, in)
            B = (normal(r // 2, out).mT @ Q[1::2]) / 10  # (out, r)
        elif site.kind == "embedding":  # reversed: the lookup of a zero A is zero
            A = normal(r, into) if self.init_weights == "random" else torch.zeros(r, into)  # (r, vocabulary)
            B = normal(out, r)  # (dim, r)
        else:
            A = normal(r, into) / r if self.init_weights == "gaussian" else uniform(r, into)  # (r, in)
            B = uniform(out, r) if self.init_weights == "random" else torch.zeros(out, r)  # (out, r)

        shapes = self.tensor_shapes(site.kind, site.shape, site.kernel)
        trained = {"A": A, "B": B}
        if "bias" in shapes:
            trained["bias"] = torch.zeros(out)
        return {
            **{name: nn.Parameter(t.reshape(shapes[name]).contiguous()) for name, t in trained.items()},
            **{name: t.reshape(shapes[name[0]]).contiguous() for name, t in frozen.items()},
        }

    def _principal(self, W: Tensor) -> tuple[Tensor, Tensor]:
        """The start of PiSSA or OLoRA: A (r, in) and B (out, r) from the weight W (out, in)."""
        import torch

        r = self.rank
        if self.init_weights == "olora":  # OLoRA, Algorithm 1: W = Q R
            Q, R = torch.linalg.qr(W)
            return R[:r].clone(), Q[:, :r].clone()
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)  # PiSSA, eqs. 2–3; s B A is the principal part
        root = (S[:r] / self.scaling).sqrt()  # (r,)
        return root[:, None] * Vh[:r], U[:, :r] * root

    def delta(self, p: Params, site: Site) -> LowRank:
        A, B = p["A"], p["B"]  # (r, in), (out, r)
        if A.ndim > 2:  # a convolution's
            A, B = A.flatten(1), B.flatten(1)
        if "A0" in p:  # s (B A − B₀ A₀)
            import torch

            A = torch.cat([A, p["A0"].flatten(1)])  # (2r, in)
            B = torch.cat([B, -p["B0"].flatten(1)], dim=1)  # (out, 2r)
        return LowRank(B, A, self.scaling)

    def outline(self, shapes: Mapping[str, tuple[int, ...]]) -> Outline:
        return Outline(shapes["A"][0], self.scaling, "bias" in shapes, ("B", "A"))

    def delta_bias(self, p: Params, site: Site) -> Tensor | None:
        return self.scaling * p["bias"] if "bias" in p else None  # (out,): it stands behind B, so s scales it too

    def forward(self, p: Params, x: Tensor, y: Tensor, site: Site) -> Tensor:
        if self.dropout and site.kind != "embedding" and site.module is not None and site.module.training:
            from torch.nn.functional import dropout

            x = dropout(x, self.dropout)
        if "bias" in p:
            return super().forward(p, x, y, site)
        return site.add(self.delta(p, site), x, y)  # what that does too, without asking: this is the hot path

    # Results of arithmetic --------------------------------------------------------------------------

    @classmethod
    def carry(cls, ranks: Mapping[str, int], *, scale: float, bias: bool) -> Self:
        """The scaling is `scale` at every site, also for a reader who ignores the patterns."""

        def alpha(rank: int) -> float:
            return int(scale * rank) if float(scale * rank).is_integer() else scale * rank

        top = max(ranks.values())  # the largest, since readers reserve room for `r`
        others = {name: rank for name, rank in ranks.items() if rank != top}
        keys = spell(ranks) if others else {}
        return cls(
            rank=top,
            alpha=alpha(top),
            lora_bias=bias,
            rank_pattern={keys[name]: rank for name, rank in others.items()},
            alpha_pattern={keys[name]: alpha(rank) for name, rank in others.items()},
        )

    def tensor_shapes(
        self, kind: str, shape: tuple[int, int], kernel: tuple[int, ...]
    ) -> Mapping[str, tuple[int, ...]]:
        (out, into), r = shape, self.rank
        shapes: dict[str, tuple[int, ...]] = {  # PEFT's: A keeps the kernel of a convolution
            "A": (r, into // math.prod(kernel), *kernel),
            "B": (out, r, *(1 for _ in kernel)),
        }
        if self.lora_bias and kind == "embedding":
            raise NotMergeable(
                "lora_bias holds for all layers of an adapter, and PEFT has none for embeddings",
                fix="leave out the adapter with lora_bias or the one of the embedding",
            )
        return {**shapes, "bias": (out,)} if self.lora_bias else shapes

    def factors(self, delta: LowRank, bias: Tensor | None) -> Mapping[str, Tensor]:
        factors = {"A": delta.A, "B": delta.B}  # (r, in), (out, r)
        if self.lora_bias:
            factors["bias"] = delta.B.new_zeros(len(delta.B)) if bias is None else bias / self.scaling  # (out,)
        return factors

    # On disk --------------------------------------------------------------------------------------

    @property
    def _from_weight(self) -> bool:
        return self.init_weights in ("pissa", "olora")

    def pack(self, p: Params) -> Mapping[str, Tensor]:
        """PiSSA and OLoRA as the LoRA of rank 2r that they are: s (B A − B₀ A₀) = s [B −B₀] [A; A₀]."""
        if not self._from_weight:
            return p
        import torch

        A, B = torch.cat([p["A"], p["A0"]]), torch.cat([p["B"], -p["B0"]], dim=1)  # (2r, in, …), (out, 2r, …)
        return {**{name: t for name, t in p.items() if name not in ("A0", "B0")}, "A": A, "B": B}

    def unpack(self, saved: Params, site: Site) -> Mapping[str, Tensor]:
        if not self._from_weight:
            return saved
        r = self.rank
        A, B = saved["A"], saved["B"]  # (2r, in, …), (out, 2r, …)
        return {**saved, "A": A[:r], "B": B[:, :r], "A0": A[r:], "B0": -B[:, r:]}

    def peft_keys(self) -> Mapping[str, Mapping[str, str]]:
        bias = {"bias": "lora_B.bias"} if self.lora_bias else {}
        return {
            "": {"A": "lora_A.weight", "B": "lora_B.weight", **bias},
            "embedding": {"A": "lora_embedding_A", "B": "lora_embedding_B"},
        }

    @classmethod
    def from_peft(cls, config: dict[str, Any]) -> Self | None:
        if config.get("use_dora"):
            return None
        init = config.pop("init_lora_weights", True)
        if isinstance(init, str) and init.lower().startswith(CHANGES_BASE):
            raise NotMergeable(
                f"init_lora_weights={init!r}: the adapter is relative to a base that its initialisation changed",
                fix="convert it to a plain LoRA where it was trained, with PEFT's "
                "save_pretrained(..., path_initial_model_for_weight_conversion=...)",
            )
        if not isinstance(init, bool) and init is not None and str(init).lower() not in LEAVES_BASE:
            raise NotMergeable(
                f"init_lora_weights={init!r} is not known, and may have changed the base",
                fix="write true if it did not",
            )
        inits: dict[bool | str, Init] = {peft: ours for ours, peft in PEFT_INITS.items()}
        if not config.get("use_qalora"):  # else they are left, and refused
            config.pop("use_qalora", None)
            config.pop("qalora_group_size", None)
        config.pop("use_dora", None)
        config.pop("eva_config", None)  # how A was drawn; the base is unchanged
        try:
            return cls(
                rank=config.pop("r", 8),
                alpha=config.pop("lora_alpha", 8),
                rslora=config.pop("use_rslora", False),
                dropout=config.pop("lora_dropout", 0.0),
                lora_bias=config.pop("lora_bias", False),
                rank_pattern=config.pop("rank_pattern", None) or {},
                alpha_pattern=config.pop("alpha_pattern", None) or {},
                # Data-driven inits leave no trace in what the trained adapter computes.
                init_weights=inits.get(init, "kaiming") if isinstance(init, (bool, str)) else "kaiming",
            )
        except ConfigError as e:
            ours, is_, value = e.what.partition("=")
            if is_ and ours in PEFT_NAMES:
                raise ConfigError(f"{PEFT_NAMES[ours]}={value}", fix=f"correct {PEFT_NAMES[ours]}") from None
            raise

    def to_peft(self) -> dict[str, Any]:
        k = 2 if self._from_weight else 1  # the rank is that of the tensors, and the scaling stays
        scale = (math.sqrt(k) if self.rslora else k) if k > 1 else 1
        return {
            "r": k * self.rank,
            "lora_alpha": scale * self.alpha,
            "use_rslora": self.rslora,
            "lora_dropout": self.dropout,
            "lora_bias": self.lora_bias,
            "rank_pattern": {key: k * rank for key, rank in self.rank_pattern.items()},
            "alpha_pattern": {key: scale * alpha for key, alpha in self.alpha_pattern.items()},
            "init_lora_weights": PEFT_INITS.get(self.init_weights, True),
            "use_dora": False,
            "bias": "none",  # the base's biases are not trained
        }

    def place(self, family: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, tuple[int, ...], tuple[int, int]]:
        A, B = shapes["A"], shapes["B"]
        if len(A) != len(B) or not 2 <= len(A) <= 5:
            raise ConfigError(f"lora_A {list(A)} and lora_B {list(B)} are of no layer that LoRA adapts")
        if B[1] != A[0] and len(A) > 2:
            raise NotMergeable(
                f"lora_A {list(A)} and lora_B {list(B)} belong to a grouped convolution, and what they add is none",
                fix="leave that layer out: PEFT cannot merge it either",
            )
        if B[1] != A[0] or any(n != 1 for n in B[2:]):
            raise ConfigError(f"lora_A {list(A)} and lora_B {list(B)} do not fit each other")
        rank = self.to_peft()["r"]
        if A[0] != rank:
            raise ConfigError(f"the rank is {A[0]} in the tensors and {rank} in the config", fix="correct r")
        if shapes.get("bias", B[:1]) != B[:1]:
            raise ConfigError(f"the bias {list(shapes['bias'])} does not fit lora_B {list(B)}")
        if family == "embedding":
            if len(A) != 2:
                raise ConfigError(f"lora_embedding_A {list(A)} is not a matrix")
            return "embedding", (A[1], B[0]), (B[0], A[1])
        return ("linear" if len(A) == 2 else f"conv{len(A) - 2}d"), (B[0], *A[1:]), (B[0], math.prod(A[1:]))


@hookimpl
def methods() -> list[type[Method]]:
    return [LoRA]
