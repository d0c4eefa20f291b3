"""One adapter's own tensors in another dtype, and what that loses.

For methods whose ΔW the tensors alone do not give: it is measured where the layers are at hand. Where they are not, the
error of the tensors is all that is known. Of ΔW it may be far larger: what the rounding of a factor 1.01 loses, little
of the factor, may be half of what it changes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from . import algebra
from .checkpoint import torch_dtype
from .errors import NotMergeable
from .format import Shaped
from .protocol import Params
from .sharding import local
from .source import Single

Squares = tuple[float, float]  # ‖stored − exact‖² and ‖exact‖²


@torch.no_grad()
def cast(tensors: Mapping[str, Tensor], planned: Mapping[str, Shaped], where: str) -> tuple[dict[str, Tensor], Squares]:
    """The tensors in the planned dtypes, rounded once, and what that loses of them. `where` is for messages.

    Raises `NotMergeable` where a value is out of a dtype's range.
    """
    stored, lost_square, size = dict[str, Tensor](), 0.0, 0.0
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            stored[key] = tensor
            continue
        try:
            stored[key], lost = algebra.cast(tensor, torch_dtype(planned[key].dtype))
        except NotMergeable as e:
            raise NotMergeable(
                f"{where} {key!r} is not finite in {planned[key].dtype}",
                fix="choose a wider --dtype (bfloat16 and float32 reach 3e38)",
            ) from e
        lost_square += 0.0 if lost is None else _square(lost)
        size += _square(tensor)
    return stored, (lost_square, size)


@torch.no_grad()
def measured(single: Single, name: str, stored: Params, shared: Mapping[str, Tensor]) -> Squares | None:
    """What `stored` at a site, with what is `shared`, loses of ΔW, the bias's change one more column.

    None where the layer's weight is not here, or is no weight to merge into. Takes the memory of merging one layer.
    """
    site, method = single.site(name), single.own.method.at(name)
    if site.module is None:
        return None

    def merged(saved: Params, common: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        p = {key: t.double() if t.is_floating_point() else t for key, t in {**common, **saved}.items()}
        W_new, b_new = method.merge(Params(p), W, b, site)
        return W_new, zero if b_new is None else b_new

    try:
        weight = site.weight
        if local(weight) is not weight:  # of a sharded model, whose processes do not come here in step
            return None
        W, b = weight.double(), None if site.bias is None else site.bias.double()  # (out, in), (out,)
        zero = W.new_zeros(len(W))
        W_exact, b_exact = merged(Params(method.unpack(single.saved(name), site)), single.shared)
        W_stored, b_stored = merged(Params(method.unpack(stored, site)), {**single.shared, **shared})
    except NotMergeable:
        return None
    size = _square(W_exact - W) + _square(b_exact - (zero if b is None else b))
    return _square(W_stored - W_exact) + _square(b_stored - b_exact), size


def _square(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2
