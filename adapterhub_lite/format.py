"""What a folder format is: it reads a folder into `Contents`, headers only, and writes one from a stream.

Formats are plugins; `adapterhub_lite_plugins.formats.peft` is the one we write by default.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from .protocol import Method


class Shaped(Protocol):
    """A tensor's description: read from a header, or planned."""

    @property
    def dtype(self) -> str: ...  # as safetensors spells it: "F32", "BF16", …
    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Planned:
    """A tensor that is yet to be computed."""

    dtype: str
    shape: tuple[int, ...]


def is_floating(tensor: Shaped) -> bool:
    return tensor.dtype.startswith(("F", "BF"))


@dataclass(frozen=True)
class SiteContents:
    """One site's part of an adapter: what layer it is, and the method's tensors by name."""

    kind: str
    weight_shape: tuple[int, ...]  # as the layer stores it; -1 where the tensors do not tell
    shape: tuple[int, int]  # its matrix form (out, in)
    tensors: Mapping[str, Any]  # as they are saved: TensorInfo when read, Planned when to be written

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}


@dataclass(frozen=True)
class Contents:
    """Everything in an adapter folder but the numbers."""

    method: Method
    sites: Mapping[str, SiteContents]
    numbered: bool = False
    """Whether the file names no modules: the sites are called 0, 1, … in the order of the model's modules."""
    base: str | None = None
    """Name of the base model."""
    revision: str | None = None
    """Its revision."""
    base_class: str | None = None
    """Its class, where PEFT noted it."""
    task: str | None = None
    """PEFT's task type."""
    shared: Mapping[str, Any] = field(default_factory=dict)
    """The method's tensors that all sites have in common, as far as they are saved."""
    kept: Mapping[str, Any] = field(default_factory=dict)
    """Whole values that replace the base's (trained heads, biases, token rows), by the key that a format gives them."""
    kept_options: Mapping[str, Any] = field(default_factory=dict)
    """The config entries that those belong to."""
    targets: tuple[str, ...] | None = None
    """Suffixes that select exactly `sites` in the base model; None if only full names do."""
    transposed: bool = False
    """PEFT's `fan_in_fan_out`."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What we stored about the adapter ourselves: recipe, input hashes, error, a sketch of the base."""
    readers: tuple[str, ...] = ()
    """Other libraries that load the folder, as the Hub calls them; the usual one first."""


class Writer(Protocol):
    """Takes an adapter's tensors in any order, from any thread."""

    def write(self, site: str, name: str, tensor: Tensor) -> None: ...
    def share(self, name: str, tensor: Tensor) -> None: ...
    def keep(self, key: str, tensor: Tensor) -> None: ...
    def finish(self, facts: Mapping[str, Any]) -> None: ...


class Format(Protocol):
    """A dialect of adapter folders."""

    name: str
    carrier: str
    """The method whose adapters can hold any low-rank delta in this format."""

    def recognises(self, folder: Path) -> bool:
        """Whether the folder claims to be of this format (it may still be broken)."""

    def read(self, folder: Path, methods: Callable[[str | None], Any]) -> Contents:
        """The folder's contents, strictly validated, no tensor read.

        Of a folder on the Hub there are then only configs, other small JSON files, and the headers of tensors.

        `methods(name)` gives one method class, `methods(None)` all of them.
        """

    def files(self, folder: Path) -> list[Path]:
        """The files that make up the adapter."""

    def replaced(
        self, kept: Mapping[str, Any], options: Mapping[str, Any]
    ) -> Sequence[tuple[str, Any, tuple[int, ...] | None]]:
        """What `Contents.kept` stands for: names of the base's tensors, the values, and of which rows (None: all)."""

    def writer(self, folder: Path, contents: Contents, *, room: int) -> AbstractContextManager[Writer]:
        """Writes an adapter into an empty folder; `room` bytes are set aside for the facts."""
