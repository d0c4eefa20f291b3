"""A gate at one site: a small net that weighs an adapter by what the layer is given, or by what it gives."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import AdapterError
from ..seed import generator

if TYPE_CHECKING:
    from ..compose import Gate
    from ..site import Site

STD = 0.02  # of W at the start, as in the papers that have gates


class GatePart(nn.Module):
    """The tensors of a gate at one site: W (outputs, width) and b (outputs,)."""

    def __init__(self, gate: Gate, site: Site, seed: int) -> None:
        super().__init__()
        self.gate, self.site = gate, site
        rng = generator(seed, f"{site.name}:{gate.name}")
        like, width = site.like, site.width(gate.reads)
        W, dtype = STD * torch.randn(gate.outputs, width, generator=rng), torch.promote_types(like.dtype, torch.float32)
        self.W = nn.Parameter(W.to(like.device, dtype))
        self.b = nn.Parameter(torch.zeros(gate.outputs, device=like.device, dtype=dtype))

    def weights(self, x: Tensor, v: Tensor) -> Tensor:
        """For an input x (batch, …, width) and an output v: (batch, …, outputs), or (batch, 1…, outputs) by sample."""
        h = x if self.gate.reads == "input" else v
        if not h.is_floating_point() or h.shape[-1] != self.W.shape[1]:
            raise AdapterError(
                f"the gate {self.gate.name!r} gets a tensor {list(h.shape)} of {h.dtype}, and was made for the width "
                f"{self.W.shape[1]}",
                where=self.site.name,
                fix='make one that reads the other end, reads="output" or "input"',
            )
        z = F.linear(h.to(self.W.dtype), self.W, self.b)
        g = z.sigmoid() if len(self.b) == 1 else z.softmax(-1)
        if self.gate.per == "token" or g.ndim < 3:
            return g
        return g.mean(dim=tuple(range(1, g.ndim - 1)), keepdim=True)

    def of_samples(self, x: Tensor) -> Tensor:
        """One weight for each sample (batch,), of a gate by sample with one output."""
        return self.weights(x, x).flatten()
