"""Streams tensors into one safetensors file, in any order, from any thread."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .checkpoint import (
    BLOCK,
    MAX_HEADER,
    MAX_TENSORS,
    ORDER,
    TensorInfo,
    check_finite,
    check_name,
    damaged,
    dtype_name,
    json_problem,
    nbytes_of,
    shown,
)
from .errors import FileError, OutputExists, os_error

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    import torch


class TensorWriter:
    """Streams tensors into a new safetensors file, in any order and from any thread; the header comes last.

    A context manager: unless `finish` was called, the file is removed at the end
    of the block. The bytes depend on the layout, the values, the metadata and
    `metadata_room` only; with no room to spare they are those that the safetensors
    library writes.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        layout: Mapping[str, tuple[str, tuple[int, ...]]],
        *,
        metadata_room: int = 0,
    ) -> None:
        """`metadata_room`: the bytes to keep free for the metadata as JSON.

        If it turns out longer, the data are moved, which costs another pass over the file.
        """
        self.path = Path(path)
        if len(layout) > MAX_TENSORS:
            raise FileError(f"more than {MAX_TENSORS} tensors", where=self.path, fix="write several files")
        sizes = {name: self._checked_size(name, dtype, shape) for name, (dtype, shape) in layout.items()}
        planned: list[TensorInfo] = []  # from byte 0: the header's length follows from them
        self._nbytes = 0
        for name in sorted(layout, key=lambda name: (ORDER[layout[name][0]], name)):
            dtype, shape = layout[name]
            start, self._nbytes = self._nbytes, self._nbytes + sizes[name]
            planned.append(TensorInfo(name, dtype, tuple(shape), self.path, start, self._nbytes))
        self._entries = [
            f'{_json(info.name)}:{{"dtype":"{info.dtype}","shape":{_json(info.shape)},'
            f'"data_offsets":[{info.start},{info.stop}]}}'
            for info in planned
        ]
        self._data = at = 8 + len(self._header({}, room=metadata_room))
        self._tensors = {info.name: replace(info, start=at + info.start, stop=at + info.stop) for info in planned}
        self._waiting = set(self._tensors)  # nobody writes them yet
        self._written = 0
        self._writing = 0  # calls of write() that use the file now
        self._changed = threading.Condition()
        self._handle = -1
        self._finished = False

    def __enter__(self) -> TensorWriter:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        try:
            self._handle = os.open(self.path, flags, 0o666)
        except FileExistsError:
            raise OutputExists(
                "the file exists",
                where=self.path,
                fix="files are never overwritten in place; choose another name",
            ) from None
        except OSError as error:
            raise os_error(error, self.path) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        if not self._finished:
            with contextlib.suppress(OSError):
                self.path.unlink()

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor to its place. Its dtype and shape are those of the layout, its values finite."""
        info = self._tensors.get(name)
        if info is None:
            raise self._misuse(f"no tensor {shown(name)} was laid out")
        dtype = dtype_name(tensor.dtype)
        if (dtype, tuple(tensor.shape)) != (info.dtype, info.shape):
            is_, was = f"{dtype} {list(tensor.shape)}", f"{info.dtype} {list(info.shape)}"
            raise self._misuse(f"tensor {shown(name)} is {is_} but was laid out as {was}")
        data = _tensor_bytes(tensor, info)
        with self._changed:
            if self._handle < 0:
                raise self._misuse("the file is not open")
            if name not in self._waiting:
                raise self._misuse(f"tensor {shown(name)} is written twice")
            self._waiting.remove(name)
            self._writing += 1
        written = 0
        try:
            self._write_at(data, info.start)
            written = 1
        finally:
            with self._changed:
                self._written += written
                self._writing -= 1
                self._changed.notify_all()

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write the header and put the file on the disk. All tensors must have been written."""
        if self._handle < 0:
            raise self._misuse("the file is not open")
        if self._written != len(self._tensors):
            missing = sorted(self._waiting)[:3]
            names = ", ".join(map(shown, missing)) or "one that failed"
            count = len(self._tensors) - self._written
            raise self._misuse(f"{count} of {len(self._tensors)} tensors were not written: {names}")
        header = self._header(metadata)
        if len(header) > MAX_HEADER:
            raise FileError(
                f"the header has {len(header)} bytes, the limit is {MAX_HEADER}",
                where=self.path,
                fix="use shorter metadata or several files",
            )
        try:
            room = self._data - 8
            if len(header) > room:
                self._move_data(len(header) - room)
            header = header.ljust(room)
            self._write_at(memoryview(len(header).to_bytes(8, "little") + header), 0)
            os.fsync(self._handle)
        except OSError as error:
            raise os_error(error, self.path) from error
        self._finished = True
        self._close()

    def _checked_size(self, name: str, dtype: str, shape: tuple[int, ...]) -> int:
        try:
            check_name(name)
            return nbytes_of(dtype, shape)
        except ValueError as error:
            what = f"tensor {shown(name)} cannot be written: {json_problem(error)}"
            raise FileError(what, where=self.path, fix="change the tensor or its name") from None

    def _header(self, metadata: Mapping[str, str], *, room: int = 0) -> bytes:
        """The JSON, padded to 8 bytes; with `room` in place of the metadata, if any."""
        for key, value in metadata.items():
            if not (isinstance(key, str) and isinstance(value, str)):
                raise self._misuse(f"the metadata {shown(str(key))} is not text")
        entries = self._entries
        if metadata or room:
            text = _json(dict(sorted(metadata.items()))) if metadata else " " * room
            entries = [f'"__metadata__":{text}', *entries]
        try:
            header = f"{{{','.join(entries)}}}".encode()
        except UnicodeEncodeError:
            raise self._misuse("the metadata have half a surrogate pair") from None
        return header + b" " * (-len(header) % 8)

    def _move_data(self, by: int) -> None:
        """Move the data towards the end, the last block first."""
        stop = self._data + self._nbytes
        while stop > self._data:
            start = max(self._data, stop - BLOCK)
            block = bytearray()
            while len(block) < stop - start:
                more = os.pread(self._handle, stop - start - len(block), start + len(block))
                if not more:
                    raise damaged("truncated while moving the data", self.path)
                block += more
            self._write_at(memoryview(block), start + by)
            stop = start

    def _write_at(self, data: memoryview, at: int) -> None:
        try:
            while len(data):
                done = os.pwrite(self._handle, data, at)
                data, at = data[done:], at + done
        except OSError as error:
            raise os_error(error, self.path) from error

    def _close(self) -> None:
        """Close the file once no thread writes: its number may belong to another file a moment later."""
        with self._changed:
            handle, self._handle = self._handle, -1
            self._changed.wait_for(lambda: not self._writing)
        if handle >= 0:
            os.close(handle)

    def _misuse(self, what: str) -> FileError:
        return FileError(what, where=self.path, fix="this is an error in the program that writes")


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _tensor_bytes(tensor: torch.Tensor, info: TensorInfo) -> memoryview:
    """The bytes of a tensor as the file has them; FileError if some value is not finite."""
    import torch

    if tensor.layout != torch.strided or tensor.is_meta:
        raise FileError(
            f"tensor {shown(info.name)} is sparse or has no values",
            where=info.path,
            fix="make it dense first",
        )
    check_finite(tensor, info, fix="use a wider dtype, or look for what diverged")
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().data
