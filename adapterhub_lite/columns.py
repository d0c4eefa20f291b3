"""One tensor in a file that is several side by side: read one by one, and written once all are there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from .checkpoint import ITEMSIZE, TensorInfo
from .errors import FileError
from .format import Planned, Shaped

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Columns:
    """Some of the columns of a tensor in a file, not yet read; described as a tensor of its own."""

    whole: TensorInfo
    first: int
    count: int

    @property
    def name(self) -> str:
        return self.whole.name

    @property
    def path(self) -> Path:
        return self.whole.path

    @property
    def dtype(self) -> str:
        return self.whole.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.whole.shape[:-1], self.count)

    @property
    def numel(self) -> int:
        return self.whole.numel // self.whole.shape[-1] * self.count

    @property
    def nbytes(self) -> int:
        return self.numel * ITEMSIZE[self.dtype]

    def read(self) -> Tensor:
        """Only these columns, row by row."""
        import torch

        width, size = self.whole.shape[-1], ITEMSIZE[self.dtype]
        rows = []
        for row in range(self.numel // self.count):
            start = self.whole.start + (row * width + self.first) * size
            rows.append(replace(self.whole, shape=(self.count,), start=start, stop=start + self.count * size).read())
        return torch.stack(rows).reshape(self.shape)


def split(whole: TensorInfo, parts: int) -> list[Columns]:
    """The tensor in `parts` of equal width. Raises `FileError` if it has none."""
    width = whole.shape[-1] if whole.shape else 0
    if not width or width % parts:
        what = f"{whole.name!r} has the shape {list(whole.shape)}, which is not that of {parts} side by side"
        raise FileError(what, where=whole.path, fix="restore the file, or correct the config")
    return [Columns(whole, i * width // parts, width // parts) for i in range(parts)]


def joined(parts: Sequence[Shaped]) -> Planned:
    """What these tensors are side by side. They are alike but for their width."""
    return Planned(parts[0].dtype, (*parts[0].shape[:-1], sum(part.shape[-1] for part in parts)))


class Joining:
    """Passes whole tensors on to `write`, each as soon as its last part has come; from any thread."""

    def __init__(self, write: Callable[[str, Tensor], None], order: Mapping[str, Sequence[str]]) -> None:
        """`order`: for each whole tensor the names of its parts, from left to right."""
        self._write, self._order = write, order
        self._found: dict[str, dict[str, Tensor]] = {whole: {} for whole in order}
        self._lock = threading.Lock()

    def add(self, whole: str, part: str, tensor: Tensor) -> None:
        """Take one part; the last one is followed by the writing."""
        import torch

        order = self._order[whole]
        with self._lock:
            found = self._found[whole]
            found[part] = tensor
            if len(found) < len(order):
                return
        self._write(whole, torch.cat([found[name] for name in order], dim=-1))
