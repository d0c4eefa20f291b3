"""The safetensors files we read and write, against the real library and against hostile ones."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save, save_file

from adapterhub_lite import checkpoint
from adapterhub_lite import writer as writing
from adapterhub_lite.checkpoint import (
    ITEMSIZE,
    Checkpoint,
    TensorInfo,
    check_finite,
    dtype_name,
    is_finite,
    sha256,
    torch_dtype,
)
from adapterhub_lite.errors import FileError, OutputExists
from adapterhub_lite.writer import TensorWriter

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

SHAPES = [(), (3,), (0,), (2, 0, 5), (5, 7), (3, 1, 2, 2)]


def tensor_of(dtype: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Random finite values; what is random is the bits, so that a swapped byte shows."""
    generator = torch.Generator().manual_seed(seed)
    target = torch_dtype(dtype)
    if dtype == "BOOL":
        return torch.randint(0, 2, shape, generator=generator).bool()
    if dtype == "F8_E8M0":  # NaN is 255, and nothing else is special
        return torch.randint(1, 255, shape, generator=generator, dtype=torch.uint8).view(target)
    if target.is_floating_point or target.is_complex:
        values = torch.randn((*shape, 2) if target.is_complex else shape, generator=generator)
        return torch.view_as_complex(values) if target.is_complex else values.to(target)
    size = (math.prod(shape) * ITEMSIZE[dtype],)
    return torch.randint(0, 256, size, generator=generator, dtype=torch.uint8).view(target).reshape(shape)


def all_kinds() -> dict[str, Tensor]:
    return {
        f'{seed % 5}.{dtype}"\\é/x': tensor_of(dtype, shape, seed)
        for seed, (dtype, shape) in enumerate((d, s) for d in ITEMSIZE for s in SHAPES)
    }


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def layout_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (dtype_name(t.dtype), tuple(t.shape)) for name, t in tensors.items()}


def write_all(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], room: int = 0) -> None:
    with TensorWriter(path, layout_of(tensors), metadata_room=room) as writer:
        for name in reversed(list(tensors)):
            writer.write(name, tensors[name])
        writer.finish(metadata)


def assert_same(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        other = theirs[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), name
        assert bits(tensor) == bits(other), name


def library_reads(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


# Reading ------------------------------------------------------------------------------------


def test_reads_bit_equal_what_the_library_writes(tmp_path: Path) -> None:
    tensors = all_kinds()
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt", "ü": "\x00\n"})
    found = Checkpoint.open(tmp_path / "x.safetensors")
    assert found.metadata == {"format": "pt", "ü": "\x00\n"}
    assert_same({name: info.read() for name, info in found.tensors.items()}, tensors)
    for name, info in found.tensors.items():
        assert info.read_bytes() == bits(tensors[name])
        assert (info.nbytes, info.numel) == (len(bits(tensors[name])), tensors[name].numel())


def test_what_is_read_is_our_own_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)}, path)
    info = Checkpoint.open(path).tensors["a"]
    first = info.read()
    first.zero_()
    assert info.read().tolist() == [[0, 1, 2], [3, 4, 5]]
    kept = info.read()
    os.truncate(path, 20)  # a mapped file would now kill the process
    assert kept.sum() == 15
    with pytest.raises(FileError, match="truncated while reading tensor 'a'"):
        info.read()
    path.unlink()
    with pytest.raises(FileError, match="no such file"):
        info.read()


def test_tensors_come_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    header = {
        "late": {"dtype": "U8", "shape": [2], "data_offsets": [3, 5]},
        "__metadata__": {},
        "early": {"shape": [3], "data_offsets": [0, 3], "dtype": "U8"},
    }
    path = write_raw(tmp_path, json.dumps(header, indent=3) + "\n \t\r", b"abcde")
    found = Checkpoint.open(path)
    assert {name: info.read_bytes() for name, info in found.tensors.items()} == {
        "early": b"abc",
        "late": b"de",
    }
    assert list(found.tensors) == ["early", "late"]
    header = {"full": entry("U8", [2], [0, 2]), "empty": entry("F64", [0], [0, 0])}
    path = write_raw(tmp_path, json.dumps(header), b"ab")
    assert list(Checkpoint.open(path).tensors) == ["empty", "full"]
    assert either_refused_or_as_the_library(path)


@pytest.mark.parametrize("length", [128, 640, 0x0380, 0x0580])
def test_a_header_length_that_looks_like_a_pickle_is_none(tmp_path: Path, length: int) -> None:
    path = write_raw(tmp_path, "{}".ljust(length), b"")
    assert path.read_bytes()[0] == 0x80
    assert Checkpoint.open(path).tensors == {}


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")  # noqa: PTH112
def test_no_file_stays_open(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    (tmp_path / "bad").mkdir()
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    kept = [Checkpoint.open(tmp_path / "x.safetensors") for _ in range(20)]
    for path in (tmp_path, write_raw(tmp_path / "bad", "nonsense", b"")):
        with pytest.raises(FileError):
            Checkpoint.open(path)
    kept_tensors = [one.tensors["a"].read() for one in kept]
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    assert len(kept_tensors) == 20


def test_headers_need_no_torch() -> None:
    code = "import adapterhub_lite.writer, sys; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": ":".join(sys.path)})


def test_sha256(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "BLOCK", 1000)
    data = os.urandom(2500)
    (tmp_path / "x").write_bytes(data)
    assert sha256(tmp_path / "x") == hashlib.sha256(data).hexdigest()
    with pytest.raises(FileError, match="no such file"):
        sha256(tmp_path / "y")


# Hostile files ------------------------------------------------------------------------------


def write_raw(folder: Path, header: str | bytes, data: bytes, length: int | None = None) -> Path:
    text = header.encode() if isinstance(header, str) else header
    path = folder / "x.safetensors"
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4), **more: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def one(**fields: Any) -> str:
    return json.dumps({"w": entry(**fields)})


FOUR = b"\0" * 4
GOOD = '"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
HOSTILE: dict[str, tuple[str | bytes, bytes, str]] = {  # header, data, a word of the message
    "no JSON": ("nonsense", b"", "not a safetensors"),
    "empty header": ("", FOUR, "not a safetensors"),
    "array": ("[]", b"", "not a safetensors"),
    "space first": (" {" + GOOD + "}", FOUR, "not a safetensors"),
    "byte order mark": (b"\xef\xbb\xbf{}", b"", "not a safetensors"),
    "not UTF-8": (b'{"\xff":{}}', b"", "not UTF-8"),
    "unterminated": ("{" + GOOD, FOUR, "not a JSON object"),
    "trailing comma": ("{" + GOOD + ",}", FOUR, "than a string"),
    "no comma": ("{" + GOOD + GOOD.replace("w", "v") + "}", FOUR, "not a JSON object"),
    "two objects": ("{" + GOOD + "}{}", FOUR, "after its end"),
    "NUL after the end": ("{" + GOOD + "}\0", FOUR, "after its end"),
    "single quotes": ("{'w':1}", b"", "than a string"),
    "key is a number": ('{1:{"dtype":"F32"}}', b"", "than a string"),
    "unterminated key": ('{"w', b"", "broken string"),
    "bad escape": ('{"\\q":{}}', b"", "broken string"),
    "raw newline in a name": ('{"a\nb":{}}', b"", "broken string"),
    "half a surrogate pair": ('{"\\ud800":{"dtype":"F32"}}', b"", "broken string"),
    "nested arrays": ('{"w":' + "[" * 100_000, b"", "not an object"),
    "nested objects": ('{"w":' * 100_000, b"", "does not end"),
    "nested in an entry": ('{"w":{"shape":' + "[" * 4000 + "}}", b"", "nested too deeply"),
    "nested in the metadata": ('{"__metadata__":' + "[" * 100_000, b"", "not a JSON object"),
    "tensor twice": ("{" + GOOD + "," + GOOD + "}", FOUR, "twice"),
    "tensor twice, escaped": ("{" + GOOD + "," + GOOD.replace('"w"', '"\\u0077"') + "}", FOUR, "twice"),
    "dtype twice": ('{"w":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', FOUR, "twice"),
    "metadata twice": ('{"__metadata__":{},"__metadata__":{}}', b"", "twice"),
    "metadata key twice": ('{"__metadata__":{"a":"b","a":"b"}}', b"", "twice"),
    "metadata null": ('{"__metadata__":null}', b"", "not a JSON object"),
    "metadata number": ('{"__metadata__":{"a":1}}', b"", "than a string"),
    "metadata nested": ('{"__metadata__":{"a":{}}}', b"", "than a string"),
    "metadata half a surrogate": ('{"__metadata__":{"a":"\\udfff"}}', b"", "broken string"),
    "entry null": ('{"w":null}', b"", "not an object"),
    "entry empty": ('{"w":{}}', b"", "dtype, shape and data_offsets"),
    "no dtype": ('{"w":{"shape":[1],"data_offsets":[0,4]}}', FOUR, "dtype, shape and data_offsets"),
    "no shape": ('{"w":{"dtype":"F32","data_offsets":[0,4]}}', FOUR, "dtype, shape and data_offsets"),
    "no offsets": ('{"w":{"dtype":"F32","shape":[1]}}', FOUR, "dtype, shape and data_offsets"),
    "extra field": (one(more=1), FOUR, "nothing else"),
    "endless entry": ('{"w":{"dtype":"F32",' + " " * 10_000 + "}}", FOUR, "does not end"),
    "dtype number": (one(dtype=32), FOUR, "unknown or unsupported dtype"),
    "dtype list": (one(dtype=["F32"]), FOUR, "unknown or unsupported dtype"),
    "dtype unknown": (one(dtype="F33"), FOUR, "'F33'"),
    "dtype lower case": (one(dtype="f32"), FOUR, "'f32'"),
    "dtype of four bits": (one(dtype="F4", shape=[8]), FOUR, "'F4'"),
    "dtype of six bits": (one(dtype="F6_E2M3", shape=[4], offsets=[0, 3]), b"abc", "F6_E2M3"),
    "dtype hostile": (one(dtype="\x1b[2J" + "F" * 3000), FOUR, "unknown or unsupported dtype"),
    "shape number": (one(shape=1), FOUR, "whole numbers"),
    "shape null": (one(shape=None), FOUR, "whole numbers"),
    "shape float": (one(shape=[1.0]), FOUR, "whole numbers"),
    "shape boolean": (one(shape=[True]), FOUR, "whole numbers"),
    "shape string": (one(shape=["1"]), FOUR, "whole numbers"),
    "shape nested": (one(shape=[[1]]), FOUR, "whole numbers"),
    "shape NaN": (one(shape=[math.nan]), FOUR, "whole numbers"),
    "shape negative": (one(shape=[-1]), FOUR, "negative"),
    "shape minus zero": ('{"w":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}', b"", "negative"),
    "shape leading zero": ('{"w":{"dtype":"F32","shape":[01],"data_offsets":[0,4]}}', FOUR, "not JSON"),
    "shape overflows": (one(shape=[2**32, 2**32]), FOUR, "too large"),
    "shape overflows to zero": (one(shape=[2**62, 4], offsets=[0, 0]), b"", "too large"),
    "shape overflows beside a zero": (one(shape=[0, 2**63], offsets=[0, 0]), b"", "too large"),
    "shape of 4,000 digits": (one(shape=[10**4000]), FOUR, "too large"),
    "33 dimensions": (one(shape=[1] * 33), FOUR, "33 dimensions"),
    "10,000 dimensions": (one(shape=[1] * 10_000), FOUR, "does not end"),
    "offsets number": (one(offsets=4), FOUR, "two whole numbers"),
    "offsets three": (one(offsets=[0, 2, 4]), FOUR, "two whole numbers"),
    "offsets float": (one(offsets=[0, 4.0]), FOUR, "two whole numbers"),
    "offsets boolean": (one(dtype="U8", offsets=[False, True]), b"a", "two whole numbers"),
    "offsets negative": (one(offsets=[-4, 0]), FOUR, "negative"),
    "offsets reversed": (one(offsets=[4, 0]), FOUR, "not within"),
    "offsets past the end": (one(offsets=[4, 8]), FOUR, "not within"),
    "offsets huge": (one(offsets=[0, 2**64]), FOUR, "not within"),
    "offsets of 2,000 digits": (one(offsets=[0, 10**2000]), FOUR, "not within"),
    "fewer bytes than the shape": (one(shape=[2]), FOUR, "takes 8 bytes, not 4"),
    "more bytes than the shape": (one(dtype="F16"), FOUR, "takes 2 bytes, not 4"),
    "overlap": (json.dumps({"a": entry(), "b": entry(offsets=(2, 6))}), b"abcdef", "overlaps"),
    "same bytes twice": (json.dumps({"a": entry(), "b": entry()}), FOUR, "overlaps"),
    "hole at the start": (one(offsets=[4, 8]), FOUR * 2, "hole"),
    "hole between": (json.dumps({"a": entry(), "b": entry(offsets=(8, 12))}), FOUR * 3, "hole"),
    "trailing bytes": (one(), FOUR + b"!", "belong to no tensor"),
    "only trailing bytes": ("{}", b"!", "belong to no tensor"),
    "empty name": (json.dumps({"": entry()}), FOUR, "empty name"),
    "NUL in a name": (json.dumps({"a\0b": entry()}), FOUR, "control characters"),
    "escape sequence in a name": (json.dumps({"\x1b[2J": entry()}), FOUR, "control characters"),
    "C1 control in a name": (json.dumps({"a\x9bb": entry()}), FOUR, "control characters"),
    "long name": (json.dumps({"n" * 513: entry()}), FOUR, "more than 512"),
    "right-to-left name, bad entry": (json.dumps({"\u202egnp": 3}), FOUR, "not an object"),
}


def assert_refused(path: Path, word: str) -> None:
    with pytest.raises(FileError) as caught:
        Checkpoint.open(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert word in text
    assert text.isprintable()
    assert len(text) < 600 + len(str(path))
    assert caught.value.fix


@pytest.mark.parametrize("name", HOSTILE)
def test_refuses_a_hostile_header(tmp_path: Path, name: str) -> None:
    header, data, word = HOSTILE[name]
    assert_refused(write_raw(tmp_path, header, data), word)


RAW = {
    "empty": (b"", "truncated"),
    "seven bytes": (b"\0" * 7, "truncated"),
    "length only": ((2).to_bytes(8, "little"), "not a safetensors"),
    "header past the end": ((100).to_bytes(8, "little") + b"{}", "truncated"),
    "header of 2**64 - 1": (b"\xff" * 8 + b"{}", "the limit is 100000000"),
    "header over 100 MB": ((100_000_001).to_bytes(8, "little") + b"{}", "the limit is 100000000"),
    "header length negative": ((-8).to_bytes(8, "little", signed=True) + b"{}", "the limit is"),
    "zip": (b"PK\x03\x04" + b"\0" * 100, "pickle"),
    "old torch.save": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "pickle"),
    "bare pickle": (b"\x80\x04}\x94.", "pickle"),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "git lfs pull"),
    "a web page": (b"<!DOCTYPE html><html><body>404</body></html>", "not a safetensors"),
}


@pytest.mark.parametrize("name", RAW)
def test_refuses_what_is_no_safetensors_file(tmp_path: Path, name: str) -> None:
    data, word = RAW[name]
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    assert_refused(path, word)


def test_refuses_a_real_torch_save(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "new.bin")
    torch.save({"a": torch.ones(2)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    assert_refused(tmp_path / "new.bin", "this is a pickle, not safetensors")
    assert_refused(tmp_path / "old.bin", "this is a pickle, not safetensors")


def test_refuses_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dangling").symlink_to("nowhere")
    assert_refused(tmp_path / "fifo", "not a file")  # and does not wait for a writer
    assert_refused(tmp_path, "not a file")
    assert_refused(tmp_path / "missing", "no such file")
    assert_refused(tmp_path / "dangling", "no such file")
    assert_refused(tmp_path / ("x" * 300), "name too long")
    with pytest.raises(FileError, match="no file has such a name"):
        Checkpoint.open("a\0b")


def test_refuses_too_many_tensors_before_building_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "MAX_TENSORS", 3)
    many = {f"t{i}": entry(shape=[0], offsets=[0, 0]) for i in range(6)}
    path = write_raw(tmp_path, json.dumps(many), b"")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint._HeaderReader, "_tensor", None)  # not callable: nothing may be built
        assert_refused(path, "more than 3 tensors")
    hidden = json.dumps(many).replace("data_offsets", "data\\u005foffsets")
    assert_refused(write_raw(tmp_path, hidden, b""), "more than 3 tensors")
    allowed = {**dict(list(many.items())[:2]), "data_offsets": many["t3"]}
    assert len(Checkpoint.open(write_raw(tmp_path, json.dumps(allowed), b"")).tensors) == 3


def test_booleans_are_0_and_1(tmp_path: Path) -> None:
    path = write_raw(tmp_path, json.dumps({"w": entry("BOOL", [3], [0, 3])}), b"\0\1\2")
    with pytest.raises(FileError, match="tensor 'w' has booleans other than 0 and 1"):
        Checkpoint.open(path).tensors["w"].read()


def either_refused_or_as_the_library(path: Path) -> bool:
    """Whether we accept the file; if we do, we must see in it what the library sees."""
    try:
        found = Checkpoint.open(path)
        mine = {name: info.read() for name, info in found.tensors.items()}
    except FileError:
        return False
    theirs, metadata = library_reads(path)  # raises if the library refuses it
    assert_same(mine, theirs)
    assert found.metadata == metadata
    return True


SMALL = save(
    {
        "a.weight": torch.arange(6.0).reshape(2, 3),
        "b": torch.arange(5).to(torch.bfloat16),
        "c": torch.tensor([True, False]),
        "é": torch.zeros(0, 3),
        "s": torch.tensor(7, dtype=torch.int64),
    },
    {"format": "pt", "k": '{"x": 1}'},
)
HEADER_SIZE = 8 + int.from_bytes(SMALL[:8], "little")
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["set", "insert", "delete"]),
        st.integers(0, HEADER_SIZE - 1) | st.integers(0, len(SMALL) - 1),
        st.integers(0, 255) | st.sampled_from(list(b'0123456789{}[]",:\\- FIBU')),
    ),
    min_size=1,
    max_size=3,
)


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=EDITS, cut=st.none() | st.integers(0, len(SMALL)), repair=st.booleans())
def test_fuzz_bytes(tmp_path: Path, edits: list[tuple[str, int, int]], cut: int | None, repair: bool) -> None:
    data = bytearray(SMALL)
    for how, place, byte in edits:
        place = min(place, len(data) - 1)
        if how == "set":
            data[place] = byte
        elif how == "insert":
            data.insert(place, byte)
        else:
            del data[place]
    if repair:  # or most changes of the length end at the first check
        data[:8] = (HEADER_SIZE - 8 + len(data) - len(SMALL)).to_bytes(8, "little")
    path = tmp_path / "x.safetensors"
    path.write_bytes(data[:cut])
    either_refused_or_as_the_library(path)


ENTRIES = st.dictionaries(
    st.sampled_from(["a", "b", "é\\", "__metadata__x", "\u2028"]),
    st.builds(
        entry,
        dtype=st.sampled_from([*ITEMSIZE, "F4", "x"]),
        shape=st.lists(st.integers(0, 3), max_size=3),
        offsets=st.tuples(st.integers(0, 8), st.integers(0, 8)),
    ),
    max_size=3,
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(entries=ENTRIES, size=st.integers(0, 12), fit=st.booleans(), indent=st.sampled_from([None, 0, 2]))
@example(entries={"a": entry("U8", [2], [0, 2])}, size=2, fit=True, indent=2)
def test_fuzz_entries(
    tmp_path: Path, entries: dict[str, dict[str, Any]], size: int, fit: bool, indent: int | None
) -> None:
    if fit:  # make it right but for what the dtype is
        size = 0
        for value in entries.values():
            nbytes = math.prod(value["shape"]) * ITEMSIZE.get(value["dtype"], 1)
            value["data_offsets"] = [size, size + nbytes]
            size += nbytes
    path = write_raw(tmp_path, json.dumps(entries, indent=indent), b"\1" * size)
    accepted = either_refused_or_as_the_library(path)
    if fit and all(value["dtype"] in ITEMSIZE for value in entries.values()):
        assert accepted


# Finite values ------------------------------------------------------------------------------

FLOATS = [d for d in ITEMSIZE if d.startswith(("F", "B")) and d != "BOOL"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_one_bad_value_at_any_place_is_found(dtype: torch.dtype) -> None:
    for size in (1, 2, 7, 8, 9, 33, 67):
        for bad in (math.nan, math.inf, -math.inf):
            for place in range(size):
                tensor = torch.ones(size, dtype=dtype)
                tensor[place] = bad
                assert not is_finite(tensor), (size, bad, place)
    both = torch.tensor([math.inf, 1, -math.inf], dtype=dtype)
    assert not is_finite(both)


@pytest.mark.parametrize("dtype", FLOATS)
def test_large_finite_values_are_finite(dtype: str) -> None:
    largest = torch.finfo(torch_dtype(dtype)).max
    tensor = torch.full((3, 1000), largest, dtype=torch.float64).to(torch_dtype(dtype))
    assert is_finite(tensor)  # though their sum is not
    assert is_finite(tensor.T)


def test_every_8_bit_float_that_is_no_number_is_found() -> None:
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    for dtype in (d for d in FLOATS if ITEMSIZE[d] == 1):
        values = every.view(torch_dtype(dtype))
        for byte in range(256):
            value = values[byte : byte + 1]
            assert is_finite(value) == math.isfinite(value.double().item()), (dtype, byte)


def test_check_finite_names_file_tensor_and_place(tmp_path: Path) -> None:
    info = TensorInfo("lora_A", "F64", (2, 3), tmp_path / "x.safetensors", 0, 48)
    tensor = torch.full((2, 3), 1e300, dtype=torch.float64)  # finite, though not in float32
    check_finite(tensor, info)
    tensor[1, 0] = math.nan
    with pytest.raises(FileError, match=r"x.safetensors: tensor 'lora_A' has 1 of 6 .* at \[1, 0\]"):
        check_finite(tensor, info)
    with pytest.raises(FileError, match="has 1 of 1 values"):
        check_finite(torch.tensor(math.inf, requires_grad=True), TensorInfo("s", "F32", (), tmp_path, 0, 4))
    with pytest.raises(FileError, match=r"first at \[1\]"):
        check_finite(torch.tensor([1j, complex(0, math.inf)]), TensorInfo("c", "C64", (2,), tmp_path, 0, 16))
    for harmless in (torch.zeros(0, 4), torch.tensor([-1]), torch.tensor([True])):
        check_finite(harmless, info)


# Writing ------------------------------------------------------------------------------------


def test_every_dtype_is_mapped_both_ways() -> None:
    for dtype, size in ITEMSIZE.items():
        assert dtype_name(torch_dtype(dtype)) == dtype
        assert torch_dtype(dtype).itemsize == size
    with pytest.raises(FileError, match="complex128"):
        dtype_name(torch.complex128)


@pytest.mark.parametrize("metadata", [{}, {"format": "pt"}, {"ü": 'a"\\\x00\x1f\x7f\u2028'}])
def test_the_bytes_are_those_of_the_library(tmp_path: Path, metadata: dict[str, str]) -> None:
    tensors = all_kinds()
    save_file(tensors, tmp_path / "theirs", metadata or None)
    exact = len(json.dumps(metadata, ensure_ascii=False, separators=(",", ":")).encode()) if metadata else 0
    for room in {0, exact}:
        write_all(tmp_path / f"ours{room}", tensors, metadata, room)
        assert (tmp_path / f"ours{room}").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_no_tensors_at_all(tmp_path: Path) -> None:
    write_all(tmp_path / "x", {}, {})
    assert (tmp_path / "x").read_bytes() == save({})
    write_all(tmp_path / "y", {}, {"a": "b"}, room=40)
    assert library_reads(tmp_path / "y") == ({}, {"a": "b"})


@pytest.mark.parametrize("room", [0, 1, 30, 31, 1000])
@pytest.mark.parametrize("block", [1, 7, 64, 1 << 20])
def test_any_metadata_fits(tmp_path: Path, room: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "BLOCK", block)
    tensors = {"a": torch.arange(35.0).reshape(5, 7), "b": torch.arange(9).to(torch.bfloat16)}
    metadata = {"z": "x" * 13, "format": "pt"}
    write_all(tmp_path / "x", tensors, metadata, room)
    assert_same(library_reads(tmp_path / "x")[0], tensors)
    found = Checkpoint.open(tmp_path / "x")
    assert list(found.metadata.items()) == [("format", "pt"), ("z", "x" * 13)]
    assert_same({name: info.read() for name, info in found.tensors.items()}, tensors)
    assert all(info.start % 8 == 0 for info in found.tensors.values() if info.dtype == "F32")
    write_all(tmp_path / "again", tensors, dict(reversed(metadata.items())), room)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "x").read_bytes()
    assert ((tmp_path / "x").stat().st_size > 600) == (room == 1000)  # moved data leave no gap


def test_threads_write_in_parallel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:1001], at))  # many short writes
    tensors = {
        f"layer.{i}": torch.randn(37, 50 + i, generator=torch.Generator().manual_seed(i)).T.to(
            [torch.float32, torch.bfloat16, torch.float64][i % 3]
        )
        for i in range(48)
    }
    with TensorWriter(tmp_path / "x", layout_of(tensors)) as writer:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(writer.write, tensors, tensors.values()))
        writer.finish({})
    assert (tmp_path / "x").read_bytes() == save({name: t.contiguous() for name, t in tensors.items()})


def test_views_are_written_as_they_look(tmp_path: Path) -> None:
    base = torch.randn(6, 4, dtype=torch.complex64)
    tensors = {"T": base.real.T, "conj": base.conj(), "neg": base.conj().imag, "step": base.real[::2, 1:]}
    write_all(tmp_path / "x", {**tensors, "grad": torch.ones(2, requires_grad=True)}, {})
    read, _ = library_reads(tmp_path / "x")
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


LAYOUT: dict[str, tuple[str, tuple[int, ...]]] = {"a": ("F32", (2, 3)), "b": ("BF16", (4,))}
A, B = torch.ones(2, 3), torch.ones(4, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("name", "tensor", "word"),
    [
        ("c", A, "no tensor 'c' was laid out"),
        ("a", A.bfloat16(), r"is BF16 \[2, 3\] but was laid out as F32 \[2, 3\]"),
        ("a", A.T, r"is F32 \[3, 2\] but"),
        ("a", A.to(torch.complex128), "no dtype complex128"),
        ("b", B, "'b' is written twice"),
        ("a", A.to_sparse(), "sparse"),
        ("a", A.to("meta"), "has no values"),
        ("a", A * math.nan, "'a' has 6 of 6 values NaN"),
        ("a", A / 0, "'a' has 6 of 6 values NaN or infinite, the first at"),
    ],
)
def test_wrong_tensors_are_refused(tmp_path: Path, name: str, tensor: Tensor, word: str) -> None:
    path = tmp_path / "x"
    with TensorWriter(path, LAYOUT) as writer:
        writer.write("b", B)
        with pytest.raises(FileError, match=word):
            writer.write(name, tensor)
        writer.write("a", A)  # the refused one left no trace
        writer.finish({})
    assert_same(library_reads(path)[0], {"a": A, "b": B})


@pytest.mark.parametrize(
    "layout",
    [
        {"": ("F32", (1,))},
        {"a\n": ("F32", (1,))},
        {"n" * 513: ("F32", (1,))},
        {"__metadata__": ("F32", (1,))},
        {"\ud800": ("F32", (1,))},
        {"a": ("float32", (1,))},
        {"a": ("F4", (2,))},
        {"a": ("F32", (-1,))},
        {"a": ("F32", (2**62,))},
        {"a": ("F32", (1,) * 33)},
    ],
)
def test_what_could_not_be_read_is_not_written(tmp_path: Path, layout: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    with pytest.raises(FileError) as caught:
        TensorWriter(tmp_path / "x", layout)
    assert str(caught.value).isprintable()
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_not_finished_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with TensorWriter(path, LAYOUT) as writer:
        writer.write("a", A)
        with pytest.raises(FileError):
            Checkpoint.open(path)  # until the header is there, nobody takes it for whole
        with pytest.raises(FileError, match="1 of 2 tensors were not written: 'b'"):
            writer.finish({})
    assert not path.exists()
    with suppress(KeyboardInterrupt), TensorWriter(path, LAYOUT) as writer:
        writer.write("a", A)
        writer.write("b", B)
        raise KeyboardInterrupt
    assert not path.exists()
    with pytest.raises(FileError, match="not open"):
        writer.write("a", A)
    with pytest.raises(FileError, match="not open"):
        writer.finish({})


@pytest.mark.parametrize("metadata", [{"a": 1}, {1: "a"}, {"a": "\ud800"}, {"a": None}])
def test_metadata_are_text(tmp_path: Path, metadata: Any) -> None:
    with TensorWriter(tmp_path / "x", {}) as writer, pytest.raises(FileError, match="metadata"):
        writer.finish(metadata)
    assert not (tmp_path / "x").exists()


def test_finished_is_finished(tmp_path: Path) -> None:
    with (
        suppress(RuntimeError),
        TensorWriter(tmp_path / "x", {"a": LAYOUT["a"]}) as writer,
    ):
        writer.write("a", A)
        writer.finish({})
        with pytest.raises(FileError, match="not open"):
            writer.write("a", A)
        raise RuntimeError
    assert_same(library_reads(tmp_path / "x")[0], {"a": A})


def test_an_existing_file_is_never_written_over(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"the input, perhaps")
    with pytest.raises(OutputExists, match="the file exists"), TensorWriter(path, {}) as writer:
        writer.finish({})
    assert path.read_bytes() == b"the input, perhaps"


def test_the_umask_decides_who_may_read(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_all(tmp_path / "x", {"a": A}, {})
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("call", ["open", "pwrite", "pread", "fsync"])
def test_a_full_disk(tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(FileError, match=r"x: no space left on device; free some space"):
        write_all(tmp_path / "x", {"a": A}, {"needs": "moving"})
    monkeypatch.undo()
    assert not (tmp_path / "x").exists()


def test_a_tensor_that_failed_is_not_taken_for_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with TensorWriter(tmp_path / "x", LAYOUT) as writer:
        writer.write("b", B)
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", broken)
            with pytest.raises(FileError, match="input/output error"):
                writer.write("a", A)
        with pytest.raises(FileError, match="1 of 2 tensors were not written: one that failed"):
            writer.finish({})
    assert not (tmp_path / "x").exists()


def test_the_file_is_not_closed_under_a_thread_that_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, inside, go_on = os.pwrite, threading.Event(), threading.Event()

    def slow(handle: int, data: Any, at: int) -> int:
        inside.set()
        assert go_on.wait(20)
        return real(handle, data, at)

    monkeypatch.setattr(os, "pwrite", slow)
    with ThreadPoolExecutor(2) as pool:
        writer = TensorWriter(tmp_path / "x", {"a": LAYOUT["a"]}).__enter__()
        handle = writer._handle
        write = pool.submit(writer.write, "a", A)
        assert inside.wait(20)
        leave = pool.submit(writer.__exit__, None, None, None)
        assert leave in wait([leave], 0.1).not_done
        os.fstat(handle)  # still ours
        go_on.set()
        write.exception(20)
        leave.result(20)
    assert not (tmp_path / "x").exists()
