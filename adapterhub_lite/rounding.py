"""From float64 to what is stored: rounded once, to the nearest, or at random without a bias."""

from __future__ import annotations

import torch
from torch import Tensor


def nearest(x: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 to `dtype`, correctly rounded, ties to even.

    torch reaches types of 16 bits by way of float32, and so rounds twice: wrongly where the first rounding makes a tie.
    One of a hundred thousand bfloat16s is, and six of a hundred thousand float16s.

    >>> x = torch.tensor([1 + 2**-8 + 2**-40], dtype=torch.float64)  # a little above the middle of 1 and 1.0078125
    >>> x.bfloat16().item(), nearest(x, torch.bfloat16).item()
    (1.0, 1.0078125)
    """
    return x.to(dtype) if dtype.itemsize >= 4 else _to_odd(x).to(dtype)


def _to_odd(x: Tensor) -> Tensor:
    """float64s that float32 holds exactly and that round as x does (but to bfloat16's subnormals, below 1e-38).

    Of the 29 bits that float32 lacks, the lowest bit that is kept is to say whether any was set.
    """
    bits, lacking = x.view(torch.int64), (1 << 29) - 1
    odd = (bits & lacking).add_(lacking).bitwise_or_(bits).bitwise_and_(~lacking)
    return odd.view(torch.float64)


def stochastic(x: Tensor, dtype: torch.dtype, rng: torch.Generator) -> Tensor:
    """float64 to one of its two neighbours in `dtype`, at random: the nearer it is, the likelier; the mean is x.

    >>> x = torch.full((10_000,), 1.002, dtype=torch.float64)  # the neighbours are 1 and 1.0078125
    >>> rounded = stochastic(x, torch.bfloat16, torch.Generator().manual_seed(0))
    >>> rounded.unique().tolist(), round(rounded.double().mean().item(), 3)
    ([1.0, 1.0078125], 1.002)
    """
    one = nearest(x, dtype)
    near = one.double()
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    bits = one.view(whole)
    # Sign and magnitude: the next one away from zero is one more, towards it one less.
    step = torch.where(x.abs() > near.abs(), 1, -1).to(whole)
    other = torch.where(near == 0, _smallest(x, dtype, whole), bits + step).view(dtype)
    far = other.double()
    share = ((x - near) / (far - near)).nan_to_num(0.0)  # of the way to the other one, at most a half
    chosen = torch.rand(x.shape, generator=rng, dtype=torch.float64) < share
    return torch.where(chosen & far.isfinite(), other, one)


def _smallest(x: Tensor, dtype: torch.dtype, whole: torch.dtype) -> Tensor:
    """The bits of the smallest number of the type that has the sign of x."""
    sign = torch.copysign(torch.zeros_like(x), x).to(dtype).view(whole)
    return sign | 1
