"""Broken and hostile adapters: one line that names the file, what is wrong and what to do; nothing written, no hang."""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from safetensors.torch import load_file, save_file

from adapterhub_lite.errors import ConfigError
from adapterhub_lite.pattern import Patterns, literal, matches, spell

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from conftest import Done, Handmade
    from torch import Tensor

    Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]
    Command = Callable[..., Done]

PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LAYERS = {"net.layers.0.q": 2, "net.conv": 2}


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise TimeoutError where something hangs."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def refused(adapter: Command, handmade: Handmade, tmp_path: Path) -> Callable[..., str]:
    """That a folder is refused by every way to read it, and nothing written; returns the line."""

    def check(bad: Path, *words: str) -> str:
        good = handmade(tmp_path / "good", LAYERS)
        out = tmp_path / "new" / "out"
        with within(20):
            lines = {
                adapter("merge", *terms, "-o", out, *more).refused(*words)
                for terms in ([bad, good], [good, bad], [bad])
                for more in ([], ["--rank", 1])
            }
            assert not (tmp_path / "new").exists()
            for line in lines:
                assert str(bad) in line or "…" in line, line
                assert "; " in line, f"no remedy: {line}"
            adapter("info", bad).out  # noqa: B018  # it may do: not all is read
            adapter("merge", bad, "--dry-run")
        return lines.pop()

    return check


# The config ---------------------------------------------------------------------------------------

DEEP = 100_000
BROKEN_CONFIGS: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "not valid JSON"),
    "cut off": ('{"peft_type": "LORA", "r": 2', "not valid JSON"),
    "a list": ("[]", "not a JSON object"),
    "a string": ('"LORA"', "not a JSON object"),
    "not UTF-8": (b'{"peft_type": "\xff"}', "not valid JSON"),
    "byte order mark": ('\ufeff{"peft_type": "LORA"}', "not valid JSON"),
    "a name twice": ('{"peft_type": "LORA", "r": 2, "r": 3}', "stands twice"),
    "a name twice, deeper": ('{"peft_type": "LORA", "rank_pattern": {"q": 2, "q": 3}}', "stands twice"),
    "nested lists": ("[" * DEEP + "]" * DEEP, "nested too deeply"),
    "nested objects": ('{"r":' * DEEP + "1" + "}" * DEEP, "nested too deeply"),
    "NaN": ('{"peft_type": "LORA", "lora_alpha": NaN}', "NaN is not a finite number"),
    "infinite": ('{"peft_type": "LORA", "lora_alpha": 1e999}', "1e999 is not a finite number"),
    "a number of 5000 digits": ('{"peft_type": "LORA", "r": ' + "1" * 5000 + "}", "not valid JSON"),
    "huge": (" " * (17 << 20), "larger than 16 MB"),
}


@pytest.mark.parametrize("case", BROKEN_CONFIGS)
def test_config_that_is_no_config(handmade: Handmade, refused: Callable[..., str], tmp_path: Path, case: str) -> None:
    text, word = BROKEN_CONFIGS[case]
    bad = handmade(tmp_path / "bad", LAYERS)
    (bad / CONFIG).write_bytes(text.encode() if isinstance(text, str) else text)
    refused(bad, CONFIG, word)


WRONG_ENTRIES: list[tuple[str, Any]] = [
    ("r", "2"),
    ("r", 2.0),
    ("r", True),
    ("r", None),
    ("r", 0),
    ("r", -2),
    ("lora_alpha", "8"),
    ("lora_alpha", [8]),
    ("lora_alpha", 10**400),
    ("use_rslora", "yes"),
    ("use_rslora", 1),
    ("lora_bias", "yes"),
    ("lora_dropout", 1.5),
    ("rank_pattern", {"q": "2"}),
    ("rank_pattern", {"q": 2.5}),
    ("rank_pattern", "q"),
    ("alpha_pattern", {"q": None}),
    ("alpha_pattern", {"q": 10**400}),
    ("alpha_pattern", [["q", 2]]),
    ("target_modules", 5),
    ("target_modules", [["q"]]),
    ("target_modules", {"q": 1}),
    ("modules_to_save", "head"),
    ("modules_to_save", [1]),
    ("modules_to_save", ["net.head"]),  # of which there is no tensor
    ("modules_to_save", ["x"] * 5000),
    ("bias", "some"),
    ("bias", {}),
    ("trainable_token_indices", "abc"),
    ("trainable_token_indices", [-1]),
    ("trainable_token_indices", [1.5]),
    ("trainable_token_indices", {"emb": "abc"}),
    ("trainable_token_indices", [3]),
    ("fan_in_fan_out", "no"),
    ("base_model_name_or_path", 5),
    ("revision", ["main"]),
    ("task_type", {}),
    ("peft_type", None),
    ("peft_type", ["LORA"]),
    ("peft_type", "LORRA"),
    ("peft_type", "../../lora"),
    ("peft_type", "X" * 100_000),
    ("use_dora", "yes"),
    ("some_entry", "[" * 1000),
]


@pytest.mark.parametrize(("entry", "value"), WRONG_ENTRIES, ids=lambda x: str(x)[:20])
def test_entry_of_a_wrong_type(
    handmade: Handmade, refused: Callable[..., str], tmp_path: Path, entry: str, value: Any
) -> None:
    line = refused(handmade(tmp_path / "bad", LAYERS, **{entry: value}), entry)
    assert CONFIG in line or "no such tensor" in line


@pytest.mark.parametrize("r", [1, 3, 50_000_000, 10**400])
def test_rank_that_the_tensors_do_not_have(
    handmade: Handmade, refused: Callable[..., str], tmp_path: Path, r: int
) -> None:
    """A rank bomb costs nothing: the rank is that of the tensors, or the adapter is refused."""
    refused(handmade(tmp_path / "bad", LAYERS, r=r), "the rank is 2 in the tensors", "correct r")
    refused(handmade(tmp_path / "bad", LAYERS, rank_pattern={"conv": r}), "'net.conv' the rank is 2 in the tensors")


ENTRIES = """
    peft_type r lora_alpha use_rslora use_dora lora_bias lora_dropout rank_pattern alpha_pattern target_modules
    exclude_modules modules_to_save bias init_lora_weights layers_to_transform trainable_token_indices task_type
    base_model_name_or_path revision fan_in_fan_out auto_mapping loftq_config eva_config use_qalora extra
"""


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    entry=st.sampled_from(ENTRIES.split()),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.just("net.conv"),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=6,
    ),
)
def test_any_value_of_any_entry(
    adapter: Command, handmade: Handmade, tmp_path_factory: pytest.TempPathFactory, entry: str, value: Any
) -> None:
    home = tmp_path_factory.mktemp("any")
    bad = handmade(home / "bad", LAYERS, **{entry: value})
    for done in (adapter("merge", bad, "--weights", 0.5, "-o", home / "out", "-q"), adapter("info", bad, "-v")):
        if done.code:
            done.refused()
        else:
            assert all(line.isprintable() for line in done.out.splitlines()), done
    assert (home / "out").exists() == (adapter("info", home / "out").code == 0)


# Patterns -----------------------------------------------------------------------------------------

EVIL = [
    "(a+)+$",
    "(.*)*x",
    "(.*.*.*.*.*)*x",
    "(a|a)*",
    "([a-z]+)*[0-9]",
    r"(\w+\.?)*$",
    "(?P<n>q)(?P=n)",
    "(?=q)",
    r"(q)\1",
    ".*?q",
    "a{1,9999}",
    "(" * 500 + "a" + ")" * 500,
    "(a|b)" * 200,
    "(a?){60}a{60}",
    ".{0,999}" * 500,
    "[" + "a" * 10,
    "a)",
    "[z-a]",
    "x" * 5000,
]


@pytest.mark.parametrize("table", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("pattern", EVIL, ids=lambda p: p[:20])
def test_pattern_that_is_not_safe(
    handmade: Handmade, refused: Callable[..., str], tmp_path: Path, pattern: str, table: str
) -> None:
    bad = handmade(tmp_path / "bad", LAYERS, **{table: {pattern: 2}})
    with within(5):
        refused(bad, CONFIG, "not one that is safe to run", "write the module names out")


def test_target_modules_is_not_run(adapter: Command, handmade: Handmade, tmp_path: Path) -> None:
    """The tensors say what is adapted; a regular expression of a stranger is no way to find out."""
    for evil in ("(a+)+$", "(.*.*.*.*)*x", "(", "x" * 100_000):
        a = handmade(tmp_path / "a", LAYERS, target_modules=evil)
        with within(5):
            assert adapter("merge", a, "--weights", 0.5, "-o", tmp_path / "out", "--force", "-q").code == 0
        config = json.loads((tmp_path / "out" / CONFIG).read_text())
        assert config["target_modules"] == sorted(LAYERS)


PIECES = ["a", "b", "q", "_", "0", "1", r"\.", ".", "[ab]", "[^a.]", r"\d", r"\w", "[a-q]", r"[\d_]", r"[^\w]"]
PIECES += ["(a|b)", "(?:ab|q)", "(a|b0)?", "()", "-", "é", "[]x]", r"\-"]
COUNTS = ["", "", "", "", "*", "+", "?", "{2}", "{0,2}", "{1,}", "{0}"]
pattern = st.builds(
    lambda start, parts, other, end: start + "".join(p + c for p, c in parts) + other + end,
    st.sampled_from(["", "", "", "^"]),
    st.lists(st.tuples(st.sampled_from(PIECES), st.sampled_from(COUNTS)), max_size=5),
    st.sampled_from(["", "", "", "|q0", "|a."]),
    st.sampled_from(["", "", "$"]),
)


@settings(max_examples=400, deadline=None)
@given(
    st.lists(pattern, min_size=1, max_size=4), st.lists(st.text("abq_01..éé-٣x]", min_size=1), min_size=1, max_size=5)
)
def test_patterns_mean_what_they_do_to_peft(keys: list[str], names: list[str]) -> None:
    try:
        patterns = Patterns(keys)
    except ConfigError:
        assume(False)
    for name in names:
        theirs = next((key for key in keys if re.match(rf"(.*\.)?({key})$", name)), None)
        assert patterns.first(name) == theirs
        assert matches(keys[0], name) == bool(re.match(rf"(.*\.)?({keys[0]})$", name))


modules = st.text("abX._-(+é", min_size=1, max_size=6).filter(lambda name: "" not in name.split("."))


@given(st.sets(modules, min_size=1, max_size=8))
def test_spelt_names_mean_themselves(names: set[str]) -> None:
    spelt = spell(sorted(names))
    for key, pattern_ in spelt.items():
        assert [name for name in names if re.match(rf"(.*\.)?({pattern_})$", name)] == [key]
        assert [name for name in names if matches(pattern_, name)] == [key]


def test_time_to_match_is_linear() -> None:
    """Thousands of names, as in a mixture of experts; and the worst that the limits allow."""
    names = [f"model.layers.{i}.mlp.experts.{j}.{p}_proj" for i in range(24) for j in range(64) for p in ("up", "down")]
    for keys in (names, [literal(name) for name in names]):
        patterns = Patterns(keys)
        with within(5):
            assert [patterns.first(name) for name in names] == keys
    worst = Patterns([".{0,999}" * 30 + f"{i}" for i in range(1)])
    with within(10):
        for i in range(20):
            worst.first("a.b" * 160 + str(i))


def test_long_lists_take_no_time(adapter: Command, handmade: Handmade, tmp_path: Path) -> None:
    layers = {"net.layers.0.q": 2}
    many = [f"net.layers.{i}.q" for i in range(200_000)]
    for config in ({"target_modules": many}, {"rank_pattern": dict.fromkeys(many, 2)}, {"exclude_modules": many}):
        a = handmade(tmp_path / "a", layers, **config)
        with within(15):
            assert adapter("merge", a, "--weights", 0.5, "-o", tmp_path / "out", "--force", "-q").code == 0


# The tensors --------------------------------------------------------------------------------------

A, B = f"{PREFIX}net.layers.0.q.lora_A.weight", f"{PREFIX}net.layers.0.q.lora_B.weight"


def plus(**more: Tensor) -> Change:
    return lambda tensors: {**tensors, **{PREFIX + k.replace("__", "."): t for k, t in more.items()}}


def poisoned(key: str, value: float) -> Change:
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors[key].view(-1)[3] = value
        return tensors

    return change


def renamed(old: str, new: str) -> Change:
    return lambda tensors: {key.replace(old, new): t for key, t in tensors.items()}


WRONG_TENSORS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "NaN": (poisoned(A, float("nan")), (A, "1 of 14", "NaN")),
    "infinite": (poisoned(B, float("-inf")), (B, "infinite")),
    "no B": (lambda t: {k: x for k, x in t.items() if k != B}, (B, "missing")),
    "no A": (lambda t: {k: x for k, x in t.items() if k != A}, (A, "missing")),
    "no prefix": (renamed(PREFIX, ""), ("does not begin with", "rename")),
    "half a prefix": (renamed(PREFIX, "base_model."), ("does not begin with", "rename")),
    "the adapter's name": (renamed(".weight", ".default.weight"), ("'default'", "rename", "conv.lora_A.weight")),
    "another method's": (renamed("lora_A", "hada_A"), ("hada_A", "no tensor of method 'lora'")),
    "nothing": (lambda t: {}, ("holds no tensor",)),
    "a magnitude": (plus(net__layers__0__q__lora_magnitude_vector=torch.ones(13)), ("lora_magnitude_vector",)),
    "a bias nobody mentions": (plus(net__layers__0__q__lora_B__bias=torch.ones(13)), ("lora_B.bias",)),
    "a base bias nobody mentions": (plus(net__layers__0__q__base_layer__bias=torch.ones(13)), ("base_layer.bias",)),
    "a head nobody mentions": (plus(net__head__weight=torch.ones(3, 3)), ("net.head.weight",)),
    "tokens nobody mentions": (plus(net__emb__token_adapter__trainable_tokens_delta=torch.ones(2, 9)), ("token",)),
    "both kinds": (
        plus(
            net__layers__0__q__lora_embedding_A=torch.ones(2, 7), net__layers__0__q__lora_embedding_B=torch.ones(13, 2)
        ),
        ("one adapter too many", "'net.layers.0.q'"),
    ),
    "another rank in B": (lambda t: {**t, B: torch.ones(13, 3)}, ("lora_B [13, 3]", "do not fit")),
    "vectors": (lambda t: {**t, A: torch.ones(2), B: torch.ones(2)}, ("'net.layers.0.q'", "no layer")),
    "scalars": (lambda t: {**t, A: torch.tensor(1.0), B: torch.tensor(1.0)}, ("'net.layers.0.q'", "no layer")),
    "six dimensions": (
        lambda t: {**t, A: torch.ones(2, 7, 1, 1, 1, 1), B: torch.ones(13, 2, 1, 1, 1, 1)},
        ("no layer",),
    ),
    "integers": (lambda t: {**t, A: torch.ones(2, 7, dtype=torch.int32)}, (A, "I32", "floating point")),
    "booleans": (lambda t: {**t, A: torch.ones(2, 7, dtype=torch.bool)}, (A, "BOOL")),
    "complex": (lambda t: {**t, A: torch.ones(2, 7, dtype=torch.complex64)}, (A, "C64")),
    "a grouped convolution": (
        lambda t: {**t, f"{PREFIX}net.conv.lora_B.weight": torch.ones(6, 1, 1, 1)},
        ("'net.conv'", "grouped"),
    ),
    "no module": (renamed("net.layers.0.q", ""), ("names no module",)),
    "an empty part of a name": (renamed("net.layers", "net..layers"), ("names no module",)),
    "a path upwards": (renamed("net.conv", "../../etc/passwd"), ("names no module",)),
    "a name outside of the targets": (renamed("net.conv", "net.other"), ("'net.other'", "target_modules")),
}


@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_tensors_that_are_no_lora(handmade: Handmade, refused: Callable[..., str], tmp_path: Path, case: str) -> None:
    change, words = WRONG_TENSORS[case]
    refused(handmade(tmp_path / "bad", LAYERS, tensors=change), WEIGHTS, *words)


def test_names_are_names_only(adapter: Command, handmade: Handmade, tmp_path: Path) -> None:
    """A module may be called like a path, like a pattern, or so that a terminal would lie; nothing comes of it."""
    for name in ("/etc/passwd", "a (b)+*[c", "a\u202eb", "C:\\x", "~/x", "%s%n", "é"):
        a, b = (
            handmade(tmp_path / x, {"net.conv": r}, tensors=renamed("net.conv", name), target_modules=None, r=r)
            for x, r in (("a", 2), ("b", 3))
        )
        done = adapter("merge", a, b, "--weights", 1, 1, "--budget", 250, "-o", tmp_path / "out", "--force", "-v")
        assert done.code == 0, done
        assert all(line.isprintable() for line in done.out.splitlines())
        assert adapter("info", tmp_path / "out", "-v").code == 0
        assert set(load_file(tmp_path / "out" / WEIGHTS)) == set(load_file(a / WEIGHTS))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "out"]


def test_layers_without_size(adapter: Command, handmade: Handmade, tmp_path: Path) -> None:
    """Nothing to add at a layer of width 0: left out beside others, and refused alone."""

    def empty(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: t[:, :0] if "layers.0.q.lora_A" in key else t for key, t in tensors.items()}

    def kernel(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: t[..., :0] if "conv.lora_A" in key else t for key, t in tensors.items()}

    for change, left in ((empty, "net.conv"), (kernel, "net.layers.0.q")):
        a = handmade(tmp_path / "a", LAYERS, tensors=change)
        done = adapter("merge", a, "--weights", 0.5, "-o", tmp_path / "out", "--force", "--json")
        assert done.code == 0, done
        assert all(left in key for key in load_file(tmp_path / "out" / WEIGHTS))
    a = handmade(tmp_path / "a", {"net.layers.0.q": 2}, tensors=empty)
    adapter("merge", a, "--weights", 0.5, "-o", tmp_path / "none").refused("nothing is left")


# The files ----------------------------------------------------------------------------------------


def header(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


BROKEN_FILES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "7 bytes short": lambda data: data[:-7],
    "header cut off": lambda data: data[:50],
    "bytes after the end": lambda data: data + b"more",
    "header beyond the end": lambda data: struct.pack("<Q", 1 << 40) + data[8:],
    "header of 2^63": lambda data: struct.pack("<Q", 1 << 63) + data[8:],
    "pickle": lambda data: b"\x80\x02}q\x00.",
    "zip": lambda data: b"PK\x03\x04" + data,
    "git-lfs pointer": lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:x\nsize 1\n",
    "header is a list": lambda data: header("[]"),
    "header without tensors": lambda data: header("{}"),
    "header nested": lambda data: header('{"a":' * 50_000),
    "header not UTF-8": lambda data: header(b'{"\xff":1}'),
    "HTML": lambda data: b"<!DOCTYPE html><html>404</html>",
}


@pytest.mark.parametrize("case", BROKEN_FILES)
def test_file_that_is_no_safetensors(
    handmade: Handmade, refused: Callable[..., str], tmp_path: Path, case: str
) -> None:
    bad = handmade(tmp_path / "bad", LAYERS)
    (bad / WEIGHTS).write_bytes(BROKEN_FILES[case]((bad / WEIGHTS).read_bytes()))
    refused(bad, WEIGHTS)


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_what_is_no_file(handmade: Handmade, refused: Callable[..., str], tmp_path: Path, file: str) -> None:
    """A fifo would wait for ever, and /dev/full never ends."""
    bad = handmade(tmp_path / "bad", LAYERS)
    path = bad / file
    for make in (
        lambda: None,
        lambda: path.mkdir(),
        lambda: os.mkfifo(path),
        lambda: path.symlink_to("/dev/full"),
        lambda: path.symlink_to(path),
        lambda: path.symlink_to("nowhere"),
    ):
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink()
        make()
        refused(bad, file)
        if not os.path.lexists(path):
            path.touch()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from([CONFIG, WEIGHTS]), st.data())
def test_any_damage(
    adapter: Command, handmade: Handmade, tmp_path_factory: pytest.TempPathFactory, file: str, data: st.DataObject
) -> None:
    """Some bytes are changed, taken out or put in: it is refused, or it still is an adapter."""
    home = tmp_path_factory.mktemp("damage")
    bad = handmade(home / "bad", LAYERS, rank_pattern={r"layers\.\d": 2}, base_model_name_or_path="a/b")
    content = bytearray((bad / file).read_bytes())
    end = len(content) if file == CONFIG else int.from_bytes(content[:8], "little") + 8
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, end - 1))
        content[at : at + data.draw(st.integers(0, 2))] = data.draw(
            st.binary(max_size=2) | st.sampled_from([b"9", b'"', b"}"])
        )
    (bad / file).write_bytes(content)
    with within(20):
        done = adapter("merge", bad, "--weights", 0.5, "-o", home / "out", "-q")
    if done.code:
        done.refused()
        assert not (home / "out").exists()
    else:
        assert adapter("info", home / "out", "-v").code == 0


# Our own entry in the header ------------------------------------------------------------------------


def nested(depth: int) -> str:
    term = '{"weight":1,"rule":"truncate","rank":1,"of":'
    return '{"recipe":' + '{"rule":"sum","terms":[' + (term + '{"rule":"sum","terms":[') * depth + "]}}" * depth + "]}}"


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{",
        "[" * DEEP,
        '{"error":{"overall":NaN}}',
        '{"error":{"overall":1e999}}',
        '{"recipe":{"a":1,"a":2}}',
        nested(2000),
    ],
    ids=range(7),
)
def test_facts_that_are_none(handmade: Handmade, refused: Callable[..., str], tmp_path: Path, text: str) -> None:
    bad = handmade(tmp_path / "bad", LAYERS)
    save_file(load_file(bad / WEIGHTS), bad / WEIGHTS, {"format": "pt", "adapterhub_lite": text})
    refused(bad, WEIGHTS, "adapterhub_lite")


@pytest.mark.parametrize(
    "text",
    [
        '{"error":{"overall":1' + "0" * 400 + "}}",
        '{"error":{"overall":"x"}}',
        '{"error":[],"recipe":[]}',
        '{"recipe":{"rule":"sum","terms":[1,null,{"weight":{}},{"adapter":7},{"rule":"truncate"}]}}',
        json.dumps({"recipe": {"rule": "sum", "terms": [{"weight": "\x1b[31m\n", "adapter": "a\nb\x1b]0;x\x07"}]}}),
        '{"recipe":{"rule":"sum","terms":[{"weight":1,"adapter":"\\ud800"}]}}',
        json.dumps({"recipe": {"rule": "sum", "terms": [{"weight": "9" * 100_000, "adapter": "a"}] * 9}}),
        nested(60),
        nested(200),
    ],
    ids=range(9),
)
def test_facts_that_are_odd(adapter: Command, handmade: Handmade, tmp_path: Path, text: str) -> None:
    """They change nothing that is computed, and `info` shows them without harm."""
    odd = handmade(tmp_path / "odd", LAYERS, base_model_name_or_path="\x1b[31mred\nbase\u202e\ud800")
    save_file(load_file(odd / WEIGHTS), odd / WEIGHTS, {"format": "pt", "adapterhub_lite": text})
    shown = adapter("info", odd, "-v")
    assert shown.code == 0, shown
    assert all(line.isprintable() and len(line) < 1200 for line in shown.out.splitlines())
    assert shown.out.encode()  # half a surrogate pair has no encoding
    assert "red\\nbase" in shown.out
    as_json = adapter("info", odd, "--json")
    if as_json.code:
        as_json.refused("nested")
    else:
        assert as_json.json["method"] == "lora"
    assert adapter("merge", odd, "-o", tmp_path / "out", "-q").code == 0


def test_messages_have_an_end(adapter: Command, handmade: Handmade, tmp_path: Path) -> None:
    """A name of megabytes is not printed whole; what to do still is."""
    bad = handmade(tmp_path / "bad", LAYERS, some_entry="x" * 3_000_000)
    start = time.monotonic()
    line = adapter("merge", bad, "-o", tmp_path / "out").refused("some_entry", "remove the entry")
    assert len(line) < 1100
    assert time.monotonic() - start < 10
