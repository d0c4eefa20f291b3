"""DoRA: a low-rank matrix turns each row of the weight, and a trained magnitude says how long it is.

    h = (m / ‖V‖) ⊙ V x + b,   V = W₀ + s · B A                Liu et al. 2024, eqs. 5 and 6

The norm is that of each row of (out, in), so m has one entry for each output. The paper writes that of
columns of d × k; its code and its results are of the rows (NVlabs/DoRA), and PEFT follows them. An
embedding's matrix is (dim, vocabulary): there m has one entry for each dimension, as in PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapterhub_lite import ConfigError, Method, Params, hookimpl
from adapterhub_lite.delta import Dense
from adapterhub_lite_plugins.methods.lora import LoRA

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from typing_extensions import Self

    from adapterhub_lite import Site

CHUNK = 1 << 20  # numbers of the weight that are squared at once


@dataclass(frozen=True, kw_only=True)
class DoRA(LoRA):
    """Weight-decomposed low-rank adaptation (https://arxiv.org/abs/2402.09353).

    Options: those of LoRA, `rank`, `alpha`, `rslora`, `dropout`, `rank_pattern`, `alpha_pattern` and `init_weights`;
    `lora_bias` is refused, as in PEFT. With `dropout` all that is added to the base's output is computed from the
    dropped input, as in the paper's code: a second product with W.
    """

    name = "dora"
    paper = "https://arxiv.org/abs/2402.09353"
    reads_weight = True
    exact_gradients = False  # ‖V‖ counts as a constant in the backward pass, §4.3
    carries_low_rank = False

    # m / ‖V‖ multiplies all of W: what the tensors alone give is no weight change.
    delta, outline = Method.delta, Method.outline  # type: ignore[assignment]

    @property
    def adds_delta(self) -> bool:
        return False

    def check(self) -> None:
        super().check()
        if self.lora_bias:
            raise ConfigError("lora_bias=True has no meaning beside a magnitude", where=self.name, fix="leave it out")

    # The rules ------------------------------------------------------------------------------------

    def init(self, site: Site, rng: torch.Generator) -> Mapping[str, nn.Parameter | Tensor]:
        from torch import nn

        start = dict(super().init(site, rng))
        V2, _ = self._squares(Params(start), site)
        m = V2.clamp_min(0).sqrt().reshape(self.tensor_shapes(site.kind, site.shape, site.kernel)["m"])
        return {**start, "m": nn.Parameter(m)}

    def _squares(self, p: Params, site: Site) -> tuple[Tensor, Tensor]:
        """‖V‖² and ‖W‖² of each row, (out,) both, in float32 or wider and without gradients.

        ‖V‖² = ‖W‖² + ((2s W Aᵀ + s² B A Aᵀ) ∘ B) 1: of the size of W nothing is made but a chunk's squares.
        """
        import torch

        with torch.no_grad():
            W, (B, A, s) = site.weight, super().delta(p, site)  # (out, in), (out, r), (r, in)
            dtype = torch.promote_types(torch.promote_types(A.dtype, W.dtype), torch.float32)
            A, B = A.to(W.device, dtype), B.to(W.device, dtype)
            W2 = _row_squares(W, dtype)  # (out,)
            C = torch.addmm(site.project(A), A @ A.mT, B.mT, beta=2 * s, alpha=s * s)  # (r, out)
            return W2 + torch.linalg.vecdot(C.mT, B), W2

    def _scale(self, p: Params, site: Site) -> Tensor:
        """What multiplies V: m / ‖V‖ (out,)."""
        m = p["m"].flatten()  # (out,)
        return m / _lengths(*self._squares(p, site)).to(m.dtype)

    def forward(self, p: Params, x: Tensor, y: Tensor, site: Site) -> Tensor:
        import torch

        scale = p.once("scale", lambda: self._scale(p, site))  # (out,)
        low, l, bias = super().delta(p, site), site.along(scale), site.bias  # noqa: E741
        if self.dropout and site.kind != "embedding" and site.module is not None and site.module.training:
            # The layer's output stays, and what is added to it is computed from the dropped input.
            W = site.weight
            x = torch.nn.functional.dropout(x, self.dropout)
            Wx = site.apply(Dense(W), x.to(W.dtype)).to(y.dtype)  # (…, out)
            return (y - Wx + l * site.add(low, x, Wx)).to(y.dtype)
        Vx = site.add(low, x, y)  # (…, out), and the bias on it, which no magnitude scales
        if bias is None:
            return (l * Vx).to(y.dtype)
        return torch.lerp(site.along(bias).to(l.dtype), Vx.to(l.dtype), l).to(y.dtype)  # b + l (V x + b − b)

    def merge(self, p: Params, weight: Tensor, bias: Tensor | None, site: Site) -> tuple[Tensor, Tensor | None]:
        V = weight + super().delta(p, site).dense().to(weight.dtype)  # (out, in)
        lengths = _lengths(_row_squares(V, V.dtype), _row_squares(weight, V.dtype))  # (out,)
        return (p["m"].flatten().to(V.dtype) / lengths)[:, None] * V, bias

    def rows(self, p: Params, start: int, stop: int, site: Site) -> Params:
        own = {name: t[start:stop] for name, t in p.items() if name in ("B", "B0")}
        return Params({**p, **own, "m": p["m"].flatten()[start:stop]})

    def tensor_shapes(
        self, kind: str, shape: tuple[int, int], kernel: tuple[int, ...]
    ) -> Mapping[str, tuple[int, ...]]:
        return {**super().tensor_shapes(kind, shape, kernel), "m": _magnitude(shape[0], len(kernel))}

    # On disk --------------------------------------------------------------------------------------

    def peft_keys(self) -> Mapping[str, Mapping[str, str]]:
        return {family: {**names, "m": "lora_magnitude_vector"} for family, names in super().peft_keys().items()}

    @classmethod
    def from_peft(cls, config: dict[str, Any]) -> Self | None:
        if config.get("use_dora") is not True:
            return None
        del config["use_dora"]
        return super().from_peft(config)

    def to_peft(self) -> dict[str, Any]:
        return {**super().to_peft(), "use_dora": True}

    def place(self, family: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, tuple[int, ...], tuple[int, int]]:
        kind, weight, matrix = super().place(family, shapes)
        if shapes["m"] != _magnitude(matrix[0], len(shapes["A"]) - 2):
            raise ConfigError(
                f"lora_magnitude_vector {list(shapes['m'])} does not fit lora_B {list(shapes['B'])} of a {kind} layer"
            )
        return kind, weight, matrix


def _magnitude(out: int, dimensions: int) -> tuple[int, ...]:
    """PEFT's shape of m; for a convolution it broadcasts against the output."""
    return (1, out, *(1 for _ in range(dimensions))) if dimensions else (out,)


def _row_squares(W: Tensor, dtype: torch.dtype) -> Tensor:
    """‖W‖² of each row (out,)."""
    import torch

    if W.is_contiguous():
        lengths: Tensor = torch.linalg.vector_norm(W, dim=1, dtype=dtype)  # (out,)
        return lengths.square()
    # Of a transpose that takes 20 times as long; by chunks of columns, for a layer may be as large as all adapters.
    chunks = (chunk.to(dtype) for chunk in W.split(max(1, CHUNK // len(W)), dim=1))  # (out, CHUNK / out)
    return torch.stack([torch.linalg.vecdot(chunk, chunk) for chunk in chunks]).sum(0)


def _lengths(V2: Tensor, W2: Tensor) -> Tensor:
    """‖V‖ (out,) to divide by: where s B A cancels W, or W is zero, what rounding leaves is no direction."""
    import torch

    limits = torch.finfo(V2.dtype)
    return torch.maximum(V2, limits.eps * W2 + limits.tiny).sqrt()


@hookimpl
def methods() -> list[type[Method]]:
    return [DoRA]
