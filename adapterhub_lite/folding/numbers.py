"""A file's numbers in numpy: as they are stored, as float64, and back, rounded once. Torch is only for rare types.

numpy has no bfloat16, so one is held as the 16-bit integer that stands in the file: the upper half of a float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ..checkpoint import ITEMSIZE, TensorInfo, check_finite, dtype_name, torch_dtype
from ..checkpoint import is_finite as all_finite

if TYPE_CHECKING:
    from torch import Tensor

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"
Memory = Callable[[str, Sequence[int], "np.dtype[Any] | type"], Array]

TYPES: Mapping[str, type[np.generic]] = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
_INFINITE = {"F64": 0x7FF << 52, "F32": 0xFF << 23, "F16": 0x1F << 10, "BF16": 0xFF << 7}  # the bits of it
_WHOLE: Mapping[int, type[np.unsignedinteger[Any]]] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_HALF = 0x8000  # of the last bit of a bfloat16, in a float32
_TOO_LARGE = (2 - 2**-8) * 2.0**127  # from here on, a bfloat16 is infinite


class Scratch:
    """Memory that is used again: what the system gives, and takes back, costs more than to compute in it.

    Arrays by what they are for. One is valid until the next is asked for, for the same; of one thread only.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[str, np.dtype[Any]], Array] = {}

    def __call__(self, purpose: str, shape: Sequence[int], dtype: np.dtype[Any] | type) -> Array:
        """Of that shape; its values are any."""
        key, numel = (purpose, np.dtype(dtype)), math.prod(shape)
        held = self._held.get(key)
        if held is None or len(held) < numel:
            held = self._held[key] = np.empty(numel, dtype)
        return held[:numel].reshape(shape)


def fresh(_: str, shape: Sequence[int], dtype: np.dtype[Any] | type) -> Array:
    """The same, of memory that nothing else is in, nor will be."""
    return np.empty(shape, dtype)


def stored_type(dtype: str) -> type[np.generic]:
    """What a safetensors dtype is held in."""
    return TYPES.get(dtype) or _WHOLE[ITEMSIZE[dtype]]


def bytes_of(values: Array) -> memoryview:
    """Of an array without gaps, to be read or written over."""
    return values.reshape(-1).view(np.uint8).data


def bits_of(values: Array) -> Array:
    """The bits, as integers."""
    return values.view(_WHOLE[values.itemsize])


def stored(info: TensorInfo) -> Array:
    """A tensor of a file, as it is stored."""
    values = np.empty(info.shape, stored_type(info.dtype))
    if info.nbytes:
        info.read_into(bytes_of(values))
    return values


def read(info: TensorInfo) -> Array:
    """The same; `FileError` that names it if it has a NaN or an infinity."""
    values = stored(info)
    if not is_finite(values, info.dtype):
        check_finite(info.read(), info)
    return values


def is_finite(values: Array, dtype: str, memory: Memory = fresh) -> bool:
    """Whether no value of that dtype is NaN or infinite."""
    if dtype not in TYPES:
        return all_finite(_tensor(values, dtype))
    bits = bits_of(values)
    unsigned = bits.dtype.type((1 << 8 * bits.itemsize - 1) - 1)  # all but the sign
    magnitudes = np.bitwise_and(bits, unsigned, out=memory("magnitudes", bits.shape, bits.dtype))
    return not bits.size or bool(magnitudes.max() < _INFINITE[dtype])


def exact(values: Array, dtype: str, memory: Memory = fresh) -> Array:
    """The same numbers in a type that numpy computes with."""
    if dtype == "BF16":
        bits = memory("exact", values.shape, np.uint32)
        np.copyto(bits, values)
        return np.left_shift(bits, 16, out=bits).view(np.float32)
    return values if dtype in TYPES else _tensor(values, dtype).double().numpy()


def float64(values: Array, dtype: str, memory: Memory = fresh) -> Array:
    """The same numbers as float64s of their own."""
    found = memory("float64", values.shape, np.float64)
    np.copyto(found, exact(values, dtype, memory))
    return found


def nearest(out: Array, dtype: str, x: Array, plus: Array | None = None, memory: Memory = fresh) -> bool:
    """Fill `out` with x, or the sum of both in float64, as `dtype` is stored: correctly rounded, ties to even.

    Whether all are finite: if not, what is in `out` is of no use. It has no gaps, and may be x.

    >>> out = np.empty(1, np.uint16)
    >>> nearest(out, "BF16", np.array([1 + 2**-8 + 2**-40]))  # a little above the middle of 1 and 1.0078125
    True
    >>> exact(out, "BF16").item()
    1.0078125
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype == "BF16":
            return _bfloat16(out, x, plus, memory)
        total = summed(x, plus, memory)
        if dtype in TYPES:
            np.copyto(out, total, casting="same_kind")  # in one step, to float16 too
        else:
            from torch import from_numpy

            from .. import rounding

            out[...] = of_tensor(rounding.nearest(from_numpy(total), torch_dtype(dtype)))
    return is_finite(out, dtype, memory)


def summed(x: Array, plus: Array | None, memory: Memory = fresh) -> Array:
    """The sum in float64."""
    return _rounded_sum(memory("float64", x.shape, np.float64), x, plus)


def _rounded_sum(out: Array, x: Array, plus: Array | None) -> Array:
    """Fill `out` with x, or the sum of both in float64, in its own type, as numpy rounds."""
    if plus is None:
        np.copyto(out, x, casting="same_kind")
    else:
        np.add(x, plus, out=out, dtype=np.float64, casting="same_kind")
    return out


def _bfloat16(out: Array, x: Array, plus: Array | None, memory: Memory) -> bool:
    """By way of float32: one of 65,000 is halfway between two bfloat16s then, and float64 tells on which side."""
    by_way = _rounded_sum(memory("float32", x.shape, np.float32), x, plus)
    bits = memory("bits", x.shape, np.uint32)
    np.left_shift(bits_of(by_way), 16, out=bits)  # those that a bfloat16 lacks
    halfway = np.flatnonzero(bits == _HALF << 16)
    np.right_shift(np.add(bits_of(by_way), _HALF, out=bits), 16, out=bits)  # what is halfway goes away from zero
    np.copyto(out, bits, casting="unsafe")
    if len(halfway):
        told, flat = x.reshape(-1)[halfway].astype(np.float64), out.reshape(-1)
        if plus is not None:
            told += plus.reshape(-1)[halfway]
        middle, up = by_way.reshape(-1)[halfway], flat[halfway]
        beyond = (told - middle) * middle  # seen from zero
        flat[halfway] = up - ((beyond < 0) | ((beyond == 0) & (up & 1 == 1)))
    return not by_way.size or bool(by_way.min() > -_TOO_LARGE and by_way.max() < _TOO_LARGE)  # NaN is neither


def of_tensor(tensor: Tensor) -> Array:
    """A tensor's values as a file stores them."""
    import torch

    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return flat.view(stored_type(dtype_name(tensor.dtype))).reshape(tensor.shape)


def _tensor(values: Array, dtype: str) -> Tensor:
    import torch

    flat = torch.from_numpy(values.reshape(-1).view(np.uint8))
    return flat.view(torch_dtype(dtype)).reshape(values.shape)
