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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import FileError, os_error

if TYPE_CHECKING:
    import io
    from collections.abc import Callable, Iterator, Mapping

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
ORDER = {dtype: place for place, dtype in enumerate(_DTYPES)}

MAX_HEADER = 100_000_000  # bytes; the library's limit too
MAX_TENSORS = 1_000_000
MAX_DIMENSIONS = 32
MAX_NAME = 512  # characters
_MAX_ENTRY = 4096  # characters of one tensor's {…}: 32 dimensions of 19 digits take 640
BLOCK = 1 << 22  # bytes hashed or moved at once

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

    def __reduce__(self) -> tuple[Any, ...]:
        """As another process can read it: of a file that is here by its header only, the whole."""
        return TensorInfo, (self.name, self.dtype, self.shape, whole(self.path), self.start, self.stop)

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
            self.read_into(values.numpy().data)
            # Any other byte is undefined behaviour in whatever reads the tensor.
            if self.dtype == "BOOL" and int(values.max()) > 1:
                raise damaged(f"tensor {shown(self.name)} has booleans other than 0 and 1", self.path)
        return tensor

    def read_bytes(self) -> bytes:
        data = bytearray(self.nbytes)
        self.read_into(memoryview(data))
        return bytes(data)

    def read_into(self, view: memoryview) -> None:
        """The bytes as they are stored, into room for just so many."""
        with _opened(whole(self.path)) as file:
            file.seek(self.start)
            while len(view):
                got = file.readinto(view)
                if not got:
                    raise damaged(f"truncated while reading tensor {shown(self.name)}", self.path)
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
            size = _LATER[path].size if path in _LATER else os.fstat(file.fileno()).st_size
            head = file.read(64)
            if head[8:9] != b"{":
                raise _not_safetensors(head, size, path)
            length = int.from_bytes(head[:8], "little")
            if length > MAX_HEADER:
                raise damaged(f"the header says it has {length} bytes, the limit is {MAX_HEADER}", path)
            if 8 + length > size:
                raise damaged(f"truncated: the header has {length} bytes, the file has {size}", path)
            file.seek(8)
            header = bytearray()
            while len(header) < length:
                more = file.read(length - len(header))
                if not more:
                    raise damaged("truncated while reading the header", path)
                header += more
        try:
            reader = _HeaderReader(header.decode("utf-8"), path, 8 + length, size)
            reader.read()
        except UnicodeDecodeError:
            raise damaged("the header is not UTF-8", path) from None
        except ValueError as error:
            raise damaged(str(error), path) from None
        return cls(path, _checked_places(reader.tensors, 8 + length, size, path), reader.metadata or {})


class _Later(NamedTuple):
    size: int
    fetch: Callable[[], Path]


_LATER: dict[Path, _Later] = {}  # files of which only the header is here yet


def later(path: Path, size: int, fetch: Callable[[], Path]) -> None:
    """Let the file at `path`, which has a header and nothing behind it, stand for one of `size` bytes.

    `fetch` is called when a tensor is read, and gives the path of the whole file.
    """
    _LATER[path] = _Later(size, fetch)


def whole(path: Path) -> Path:
    """Where the bytes of the file at `path` are: there, unless it stands for another, which is then fetched."""
    return _LATER[path].fetch() if path in _LATER else path


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
                raise ValueError(f"tensor {shown(name)} stands twice in the header")
            if len(self.tensors) == MAX_TENSORS:
                raise ValueError(f"the header has more than {MAX_TENSORS} tensors")
            try:
                self.tensors[name] = self._tensor(name)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"tensor {shown(name)}: {json_problem(error)}") from None
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
            raise ValueError(f"the header has a broken string: {json_problem(error)}") from None
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
                raise ValueError(f"the metadata key {shown(key)} stands twice")
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
        nbytes = nbytes_of(dtype, shape)
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
        raise ValueError(f"the tensor name {shown(name)} has more than {MAX_NAME} characters")
    if _CONTROL.search(name):
        raise ValueError(f"the tensor name {shown(name)} has control characters")
    if name == "__metadata__":
        raise ValueError("no tensor may be called __metadata__")
    name.encode("utf-8")


def nbytes_of(dtype: object, shape: object) -> int:
    """How many bytes such a tensor takes; ValueError if there is none."""
    if not isinstance(dtype, str) or dtype not in ITEMSIZE:
        raise ValueError(f"unknown or unsupported dtype {shown(str(dtype))}")
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
            raise damaged(f"tensor {shown(info.name)} {how}", path)
        at = info.stop
    if at != stop:
        raise damaged(f"{stop - at} bytes at the end belong to no tensor", path)
    return {info.name: info for info in in_order}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice in its entry")
    return found


_JSON = json.JSONDecoder(object_pairs_hook=_unique)


def json_problem(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "its entry is nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON ({error.msg})"
    if isinstance(error, UnicodeEncodeError):
        return "half a surrogate pair"
    return str(error)


def shown(name: str) -> str:
    return repr(name if len(name) <= 120 else name[:117] + "…")


def damaged(what: str, path: Path) -> FileError:
    return FileError(what, where=path, fix=_DAMAGED)


def unpickle(name: str, to: str = "adapter_model.safetensors") -> str:
    """What to do about a pickle: nothing here reads one."""
    return (
        "if you trust where it comes from, convert it in a process of its own: python -c "
        f"\"import torch, safetensors.torch as s; s.save_file({{k: t.clone() for k, t in torch.load('{name}', "
        f"weights_only=True).items()}}, '{to}')\""
    )


def _not_safetensors(head: bytes, size: int, path: Path) -> FileError:
    # Only after looking for the brace: a header of 640 bytes also begins like a pickle, \x80\x02.
    if head[:4] == b"PK\x03\x04" or (head[:1] == b"\x80" and head[1:2] in b"\x01\x02\x03\x04\x05"):
        return FileError(
            "this is a pickle, not safetensors: reading it could run code",
            where=path,
            fix=unpickle(path.name),
        )
    if head.startswith(b"version https://git-lfs"):
        return FileError("this is a git-lfs pointer, not the file itself", where=path, fix="run 'git lfs pull'")
    if size < 8:
        return damaged(f"truncated: the file has {size} bytes", path)
    return damaged("this is not a safetensors file: no JSON object after the first 8 bytes", path)


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
        with open(handle, "rb", buffering=0) as file:  # a handle, not a path
            yield file
    except OSError as error:
        raise os_error(error, path) from error


def sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file, in hexadecimal. Other threads run meanwhile."""
    digest = hashlib.sha256()
    block = memoryview(bytearray(BLOCK))
    with _opened(whole(Path(path))) as file:
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
        f"tensor {shown(info.name)} has {len(bad)} of {info.numel} values NaN or infinite{first}",
        where=whole(info.path),
        fix=fix or "train or download the adapter again",
    )
