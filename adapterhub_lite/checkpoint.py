"""One safetensors file: its header checked strictly, its tensors read one by one, new files streamed.

A stranger's header is believed in nothing: what `Checkpoint.open` returns is a
partition of the file's bytes into tensors whose sizes are right. The limits are
narrower than the safetensors library's where a file of ours never comes near.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import stat
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import FileError, OutputExists
from .staging import os_error

if TYPE_CHECKING:
    import io
    from collections.abc import Iterator, Mapping
    from types import TracebackType

    import torch

# dtype: (bytes per value, name in torch), in the order in which the safetensors library stores them.
_DTYPES = {
    "U64": (8, "uint64"),
    "I64": (8, "int64"),
    "F64": (8, "float64"),
    "C64": (8, "complex64"),
    "F32": (4, "float32"),
    "U32": (4, "uint32"),
    "I32": (4, "int32"),
    "BF16": (2, "bfloat16"),
    "F16": (2, "float16"),
    "U16": (2, "uint16"),
    "I16": (2, "int16"),
    "F8_E5M2FNUZ": (1, "float8_e5m2fnuz"),
    "F8_E4M3FNUZ": (1, "float8_e4m3fnuz"),
    "F8_E8M0": (1, "float8_e8m0fnu"),
    "F8_E4M3": (1, "float8_e4m3fn"),
    "F8_E5M2": (1, "float8_e5m2"),
    "I8": (1, "int8"),
    "U8": (1, "uint8"),
    "BOOL": (1, "bool"),
}
ITEMSIZE: Mapping[str, int] = {dtype: size for dtype, (size, _) in _DTYPES.items()}
_ORDER = {dtype: place for place, dtype in enumerate(_DTYPES)}

MAX_HEADER = 100_000_000  # bytes; the library's limit too
MAX_TENSORS = 1_000_000
MAX_DIMENSIONS = 32
MAX_NAME = 512  # characters
_MAX_ENTRY = 4096  # characters of one tensor's {…}: 32 dimensions of 19 digits take 640
_BLOCK = 1 << 22  # bytes hashed or moved at once

_DAMAGED = "the file is damaged; download or save it again"
_SPACE = re.compile(r"[ \t\n\r]*")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")


def torch_dtype(dtype: str) -> torch.dtype:
    """The torch dtype of a safetensors one."""
    import torch

    found = getattr(torch, _DTYPES[dtype][1])
    assert isinstance(found, torch.dtype)
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors dtype of a torch one; FileError if the format has none."""
    name = str(dtype).removeprefix("torch.")
    for ours, (_, theirs) in _DTYPES.items():
        if theirs == name:
            return ours
    raise FileError(f"safetensors files have no dtype {name}", fix="convert the tensor first")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor in a file, not yet read."""

    name: str
    dtype: str  # as safetensors names it: "F32", "BF16", …
    shape: tuple[int, ...]
    path: Path
    start: int  # the bytes [start, stop) of the file
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def read(self) -> torch.Tensor:
        """The tensor, on the CPU and in memory of its own: the file may change or go afterwards."""
        import torch

        tensor = torch.empty(self.shape, dtype=torch_dtype(self.dtype))
        if self.nbytes:
            values = tensor.reshape(-1).view(torch.uint8)
            self._read_into(values.numpy().data)
            # Any other byte is undefined behaviour in whatever reads the tensor.
            if self.dtype == "BOOL" and int(values.max()) > 1:
                raise _refusal(f"tensor {_shown(self.name)} has booleans other than 0 and 1", self.path)
        return tensor

    def read_bytes(self) -> bytes:
        data = bytearray(self.nbytes)
        self._read_into(memoryview(data))
        return bytes(data)

    def _read_into(self, view: memoryview) -> None:
        with _opened(self.path) as file:
            file.seek(self.start)
            while len(view):
                got = file.readinto(view)
                if not got:
                    raise _refusal(f"truncated while reading tensor {_shown(self.name)}", self.path)
                view = view[got:]


@dataclass(frozen=True)
class Checkpoint:
    """One safetensors file: what its header says, checked. Keeps no open file.

    `tensors` are in the order of their bytes in the file.
    """

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Read and check the header of the file at `path`; FileError if anything is wrong with it."""
        path = Path(path)
        with _opened(path) as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(64)
            if head[8:9] != b"{":
                raise _not_safetensors(head, size, path)
            length = int.from_bytes(head[:8], "little")
            if length > MAX_HEADER:
                raise _refusal(f"the header says it has {length} bytes, the limit is {MAX_HEADER}", path)
            if 8 + length > size:
                raise _refusal(f"truncated: the header has {length} bytes, the file has {size}", path)
            file.seek(8)
            header = bytearray()
            while len(header) < length:
                more = file.read(length - len(header))
                if not more:
                    raise _refusal("truncated while reading the header", path)
                header += more
        try:
            reader = _HeaderReader(header.decode("utf-8"), path, 8 + length, size)
            reader.read()
        except UnicodeDecodeError:
            raise _refusal("the header is not UTF-8", path) from None
        except ValueError as error:
            raise _refusal(str(error), path) from None
        return cls(path, _checked_places(reader.tensors, 8 + length, size, path), reader.metadata or {})


class _HeaderReader:
    """Reads a header's JSON entry by entry and raises ValueError at the first thing that is wrong.

    `json.loads` on the whole would first build all of it, and a hostile 100 MB
    header makes gigabytes of objects, or nests until the stack ends.
    """

    def __init__(self, text: str, path: Path, data: int, size: int) -> None:
        self.text, self.at = text, 0
        self.path, self.data, self.size = path, data, size
        self.tensors: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] | None = None

    def read(self) -> None:
        if self.text.count('"data_offsets"') > MAX_TENSORS + 1:  # one tensor may have that name
            raise ValueError(f"the header has more than {MAX_TENSORS} tensors")
        for name in self._members():
            if name == "__metadata__":
                if self.metadata is not None:
                    raise ValueError("__metadata__ stands twice in the header")
                self.metadata = self._metadata()
                continue
            check_name(name)
            if name in self.tensors:
                raise ValueError(f"tensor {_shown(name)} stands twice in the header")
            if len(self.tensors) == MAX_TENSORS:
                raise ValueError(f"the header has more than {MAX_TENSORS} tensors")
            try:
                self.tensors[name] = self._tensor(name)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"tensor {_shown(name)}: {_json_problem(error)}") from None
        if self._next() != "":
            raise ValueError(f"the header goes on after its end, at character {self.at}")

    def _next(self) -> str:
        """The next character that is not space, without going past it; "" at the end."""
        found = _SPACE.match(self.text, self.at)
        assert found is not None
        self.at = found.end()
        return self.text[self.at : self.at + 1]

    def _take(self, character: str) -> None:
        if self._next() != character:
            raise ValueError(f"the header is not a JSON object: no {character} at character {self.at}")
        self.at += 1

    def _string(self) -> str:
        if self._next() != '"':
            raise ValueError(f"the header has something else than a string at character {self.at}")
        try:
            value, self.at = _JSON.raw_decode(self.text, self.at)
            value.encode("utf-8")  # JSON can write half a surrogate pair, which is no text
        except ValueError as error:
            raise ValueError(f"the header has a broken string: {_json_problem(error)}") from None
        assert isinstance(value, str)
        return value

    def _members(self) -> Iterator[str]:
        """The keys of the object here; whoever iterates reads each key's value."""
        self._take("{")
        if self._next() != "}":
            while True:
                key = self._string()
                self._take(":")
                yield key
                if self._next() != ",":
                    break
                self.at += 1
        self._take("}")

    def _metadata(self) -> dict[str, str]:
        metadata: dict[str, str] = {}
        for key in self._members():
            if key in metadata:
                raise ValueError(f"the metadata key {_shown(key)} stands twice")
            metadata[key] = self._string()
        return metadata

    def _tensor(self, name: str) -> TensorInfo:
        if self._next() != "{":
            raise ValueError("its entry is not an object")
        stop = self.text.find("}", self.at, self.at + _MAX_ENTRY) + 1
        if not stop:
            raise ValueError(f"its entry does not end within {_MAX_ENTRY} characters")
        body = self.text[self.at : stop]
        if "-" in body:  # not even -0
            raise ValueError("its entry has a negative number")
        entry = _JSON.decode(body)
        self.at = stop
        if entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError("its entry is not dtype, shape and data_offsets, and nothing else")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        nbytes = _nbytes(dtype, shape)
        if type(offsets) is not list or [type(n) for n in offsets] != [int, int]:
            raise ValueError("data_offsets is not two whole numbers")
        begin, end = offsets
        if not begin <= end <= self.size - self.data:
            raise ValueError(f"data_offsets are not within the {self.size - self.data} bytes of data")
        if end - begin != nbytes:
            raise ValueError(f"{dtype} {shape} takes {nbytes} bytes, not {end - begin}")
        return TensorInfo(name, dtype, tuple(shape), self.path, self.data + begin, self.data + end)


def check_name(name: str) -> None:
    """Raise ValueError if no tensor may have this name."""
    if not name:
        raise ValueError("a tensor has an empty name")
    if len(name) > MAX_NAME:
        raise ValueError(f"the tensor name {_shown(name)} has more than {MAX_NAME} characters")
    if _CONTROL.search(name):
        raise ValueError(f"the tensor name {_shown(name)} has control characters")
    if name == "__metadata__":
        raise ValueError("no tensor may be called __metadata__")
    name.encode("utf-8")


def _nbytes(dtype: object, shape: object) -> int:
    """How many bytes such a tensor takes; ValueError if there is none."""
    if not isinstance(dtype, str) or dtype not in ITEMSIZE:
        raise ValueError(f"unknown or unsupported dtype {_shown(str(dtype))}")
    if not isinstance(shape, (list, tuple)) or any(type(n) is not int or n < 0 for n in shape):
        raise ValueError("shape is not a list of whole numbers")
    if len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"it has {len(shape)} dimensions, the limit is {MAX_DIMENSIONS}")
    # With a 0 among them the others could be anything, and overflow in who multiplies them.
    if math.prod(max(n, 1) for n in shape) * ITEMSIZE[dtype] >= 2**63:
        raise ValueError("its shape is too large for any memory")
    return math.prod(shape) * ITEMSIZE[dtype]


def _checked_places(tensors: Mapping[str, TensorInfo], start: int, stop: int, path: Path) -> dict[str, TensorInfo]:
    """`tensors` in the order of their bytes, which must be all the bytes and each once."""
    at = start
    in_order = sorted(tensors.values(), key=lambda info: (info.start, info.stop))
    for info in in_order:
        if info.start != at:
            how = "overlaps the one before" if info.start < at else "leaves a hole before it"
            raise _refusal(f"tensor {_shown(info.name)} {how}", path)
        at = info.stop
    if at != stop:
        raise _refusal(f"{stop - at} bytes at the end belong to no tensor", path)
    return {info.name: info for info in in_order}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice in its entry")
    return found


_JSON = json.JSONDecoder(object_pairs_hook=_unique)


def _json_problem(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "its entry is nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON ({error.msg})"
    if isinstance(error, UnicodeEncodeError):
        return "half a surrogate pair"
    return str(error)


def _shown(name: str) -> str:
    return repr(name if len(name) <= 120 else name[:117] + "…")


def _refusal(what: str, path: Path) -> FileError:
    return FileError(what, where=path, fix=_DAMAGED)


def _not_safetensors(head: bytes, size: int, path: Path) -> FileError:
    # Only after looking for the brace: a header of 640 bytes also begins like a pickle, \x80\x02.
    if head[:4] == b"PK\x03\x04" or (head[:1] == b"\x80" and head[1:2] in b"\x01\x02\x03\x04\x05"):
        return FileError(
            "this is a pickle, not safetensors: reading it could run code",
            where=path,
            fix="convert it with 'adapter convert --allow-pickle', if you trust where it comes from",
        )
    if head.startswith(b"version https://git-lfs"):
        return FileError("this is a git-lfs pointer, not the file itself", where=path, fix="run 'git lfs pull'")
    if size < 8:
        return _refusal(f"truncated: the file has {size} bytes", path)
    return _refusal("this is not a safetensors file: no JSON object after the first 8 bytes", path)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[io.FileIO]:
    """The regular file at `path`, unbuffered; errors of the system become FileErrors."""
    try:
        # A fifo would wait for a writer without O_NONBLOCK; it means nothing to a file.
        try:
            handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        except ValueError:  # a NUL
            raise FileError("no file has such a name", where=path, fix="check the path") from None
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise FileError("this is not a file", where=path, fix="name a .safetensors file")
        with open(handle, "rb", buffering=0) as file:  # noqa: PTH123  # a handle, not a path
            yield file
    except OSError as error:
        raise os_error(error, path) from error


def sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file, in hexadecimal. Other threads run meanwhile."""
    digest = hashlib.sha256()
    block = memoryview(bytearray(_BLOCK))
    with _opened(Path(path)) as file:
        while got := file.readinto(block):
            digest.update(block[:got])
    return digest.hexdigest()


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite. Takes one pass and no memory (8-bit floats: 1 MiB)."""
    import torch

    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.dtype.itemsize == 1:  # no reduction takes these
        flat, step = tensor.reshape(-1), 1 << 18
        return all(is_finite(flat[at : at + step].float()) for at in range(0, len(flat), step))
    return all(math.isfinite(bound) for bound in tensor.detach().aminmax())  # which passes on a NaN


def check_finite(tensor: torch.Tensor, info: TensorInfo, *, fix: str = "") -> None:
    """Raise FileError naming the file and the tensor if a value is NaN or infinite."""
    if is_finite(tensor):
        return
    import torch

    values = tensor.detach().float() if tensor.dtype.itemsize == 1 else tensor.detach()
    bad = (~torch.isfinite(values)).nonzero()
    first = f", the first at {bad[0].tolist()}" if info.shape else ""
    raise FileError(
        f"tensor {_shown(info.name)} has {len(bad)} of {info.numel} values NaN or infinite{first}",
        where=info.path,
        fix=fix or "train or download the adapter again",
    )


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
        for name in sorted(layout, key=lambda name: (_ORDER[layout[name][0]], name)):
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
            raise self._misuse(f"no tensor {_shown(name)} was laid out")
        dtype = dtype_name(tensor.dtype)
        if (dtype, tuple(tensor.shape)) != (info.dtype, info.shape):
            is_, was = f"{dtype} {list(tensor.shape)}", f"{info.dtype} {list(info.shape)}"
            raise self._misuse(f"tensor {_shown(name)} is {is_} but was laid out as {was}")
        data = _tensor_bytes(tensor, info)
        with self._changed:
            if self._handle < 0:
                raise self._misuse("the file is not open")
            if name not in self._waiting:
                raise self._misuse(f"tensor {_shown(name)} is written twice")
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
            names = ", ".join(map(_shown, missing)) or "one that failed"
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
            return _nbytes(dtype, shape)
        except ValueError as error:
            what = f"tensor {_shown(name)} cannot be written: {_json_problem(error)}"
            raise FileError(what, where=self.path, fix="change the tensor or its name") from None

    def _header(self, metadata: Mapping[str, str], *, room: int = 0) -> bytes:
        """The JSON, padded to 8 bytes; with `room` in place of the metadata, if any."""
        for key, value in metadata.items():
            if not (isinstance(key, str) and isinstance(value, str)):
                raise self._misuse(f"the metadata {_shown(str(key))} is not text")
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
            start = max(self._data, stop - _BLOCK)
            block = bytearray()
            while len(block) < stop - start:
                more = os.pread(self._handle, stop - start - len(block), start + len(block))
                if not more:
                    raise _refusal("truncated while moving the data", self.path)
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
            f"tensor {_shown(info.name)} is sparse or has no values",
            where=info.path,
            fix="make it dense first",
        )
    check_finite(tensor, info, fix="use a wider dtype, or look for what diverged")
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().data
