"""What is not folded is refused before OUT exists: one line that says what, where and what to do."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest
import torch
from fold_models import PREFIX, digests, draw, rounded, same_bits, tensors_of, write_adapter, write_lora, write_model
from safetensors.torch import save_file
from torch import Tensor

import adapterhub_lite as ah
from adapterhub_lite import sketch
from adapterhub_lite.folding import copying

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conftest import Done

    Command = Callable[..., Done]

LAYERS = {"net.0.q": (9, 6), "net.0.up": (14, 6)}


def tensors(**more: Tensor) -> dict[str, Tensor]:
    found = {f"{name}.weight": draw(*shape, seed=i) for i, (name, shape) in enumerate(LAYERS.items())}
    return {**found, "net.norm.weight": draw(6, seed=9), **{k.replace("__", "."): t for k, t in more.items()}}


class Refused:
    """Asserts that both the function and the command refuse, that OUT is untouched and that the words are said."""

    def __init__(self, adapter: Command, folder: Path) -> None:
        self.adapter, self.out = adapter, folder / "out"

    def __call__(
        self, base: Path, part: Path, *words: str, error: type[Exception] = ah.NotMergeable, **how: Any
    ) -> None:
        with pytest.raises(error) as caught:
            ah.fold(base, ah.load(part), self.out, **how)
        for word in words:
            assert word in str(caught.value), (word, str(caught.value))
        assert not os.path.lexists(self.out)
        more = [f"--{name.replace('_', '-')}" for name, value in how.items() if value is True]
        self.adapter("merge", part, "--into", base, "-o", self.out, *more).refused(*words)
        assert not os.path.lexists(self.out)
        left = [path.name for path in self.out.parent.iterdir() if "adapter-tmp" in path.name]
        assert left == []


@pytest.fixture
def refused(adapter: Command, tmp_path: Path) -> Refused:
    return Refused(adapter, tmp_path)


# Names and shapes -------------------------------------------------------------------------------------


def test_an_unknown_module(refused: Refused, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", tensors())
    part = write_lora(tmp_path / "a", {"net.0.q": (9, 6), "net.0.upp": (14, 6)})
    refused(base, part, "'net.0.upp'", "which the base does not have", "did you mean 'net.0.up'", error=ah.UnknownName)


@pytest.mark.parametrize("shape", [(9, 7), (10, 6), (7, 9)])
def test_another_shape(refused: Refused, tmp_path: Path, shape: tuple[int, int]) -> None:
    base = write_model(tmp_path / "base", tensors())
    part = write_lora(tmp_path / "a", {"net.0.q": shape})
    refused(base, part, "'net.0.q'", f"{list(shape)}", "[9, 6]", "give the base that it was trained on")


def test_a_linear_layer_where_the_base_has_another(refused: Refused, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", tensors(net__conv__weight=draw(9, 6, 3)))
    refused(base, write_lora(tmp_path / "a", {"net.conv": (9, 6)}), "'net.conv'", "[9, 6, 3]")
    refused(base, write_lora(tmp_path / "b", {"net.norm": (6, 6)}), "'net.norm'", "[6]")


def test_two_adapters_that_disagree_on_a_layer(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", {"x.weight": draw(6, 6)})
    emb = {f"{PREFIX}x.lora_embedding_A": draw(3, 6), f"{PREFIX}x.lora_embedding_B": draw(6, 3)}
    parts = [write_lora(tmp_path / "a", {"x": (6, 6)}), write_lora(tmp_path / "b", {}, more=emb, target_modules=["x"])]
    a, b = map(ah.load, parts)
    with pytest.raises(ah.NotMergeable, match="takes 'x' for a"):
        ah.fold(base, a + b, tmp_path / "out")


# Tied weights -----------------------------------------------------------------------------------------


def tied(folder: Path, *, with_head: bool, nested: bool = False, **config: Any) -> Path:
    own = {"vocab_size": 20}
    said = {"text_config": own} if nested else own
    emb = draw(20, 6, seed=4)
    more = {"lm_head__weight": emb.clone()} if with_head else {}
    said = {"architectures": ["ToyForCausalLM"], **said, **config}
    return write_model(folder, tensors(emb__weight=emb, **more), config=said)


EMBEDDING = {f"{PREFIX}emb.lora_embedding_A": draw(3, 20), f"{PREFIX}emb.lora_embedding_B": draw(6, 3)}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("with_head", [False, True])
def test_a_tied_embedding(refused: Refused, tmp_path: Path, with_head: bool, nested: bool) -> None:
    base = tied(tmp_path / "base", with_head=with_head, nested=nested, tie_word_embeddings=True)
    part = write_lora(tmp_path / "a", {}, more=EMBEDDING, target_modules=["emb"])
    refused(base, part, "'emb'", "the embedding and the output head at once", "untie them")


def test_a_tied_embedding_by_the_files_alone(refused: Refused, tmp_path: Path) -> None:
    """Old configs leave out what was the default."""
    part = write_lora(tmp_path / "a", {}, more=EMBEDDING, target_modules=["emb"])
    refused(tied(tmp_path / "base", with_head=False), part, "the output head at once")
    refused(tied(tmp_path / "copied", with_head=True), part, "the output head at once")
    more = {"emb__weight": draw(20, 6, seed=4), "lm_head__weight": draw(20, 6, seed=5)}
    untied = write_model(tmp_path / "untied", tensors(**more), config={"vocab_size": 20, "architectures": ["AForLM"]})
    ah.fold(untied, ah.load(part), tmp_path / "done")


def test_a_tied_head(refused: Refused, tmp_path: Path) -> None:
    part = write_lora(tmp_path / "a", {"lm_head": (20, 6)})
    there = tied(tmp_path / "there", with_head=True, tie_word_embeddings=True)
    refused(there, part, "'lm_head'", "the output head at once")
    gone = tied(tmp_path / "gone", with_head=False, tie_word_embeddings=True)
    refused(gone, part, "the output head, which the base ties to its embedding", error=ah.UnknownName)


def test_untied_ones_are_folded(tmp_path: Path) -> None:
    base = tied(tmp_path / "base", with_head=True, tie_word_embeddings=False)
    part = write_lora(tmp_path / "a", {"lm_head": (20, 6)}, more=EMBEDDING, target_modules=["lm_head", "emb"])
    assert list(ah.fold(base, ah.load(part), tmp_path / "out").modules) == ["emb", "lm_head"]


def test_the_embedding_of_an_encoder_is_nobodys_head(tmp_path: Path) -> None:
    base = tied(tmp_path / "base", with_head=False, tie_word_embeddings=True, architectures=["ToyModel"])
    part = write_lora(tmp_path / "a", {}, more=EMBEDDING, target_modules=["emb"])
    assert list(ah.fold(base, ah.load(part), tmp_path / "out").modules) == ["emb"]


# What holds no sum ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8(refused: Refused, tmp_path: Path, dtype: torch.dtype) -> None:
    config = {"quantization_config": {"quant_method": "fp8"}}
    base = write_model(tmp_path / "base", tensors(net__0__q__weight=draw(9, 6).to(dtype)), config=config)
    part = write_lora(tmp_path / "a", {"net.0.q": (9, 6)})
    refused(base, part, "'net.0.q'", "F8_", "(fp8)", "merge into the full-precision base, and quantise the result")
    other = write_lora(tmp_path / "b", {"net.0.up": (14, 6)})  # a layer that was left alone
    ah.fold(base, ah.load(other), tmp_path / "done")
    got, old = tensors_of(tmp_path / "done"), tensors_of(base)
    assert same_bits(got["net.0.q.weight"].view(torch.uint8), old["net.0.q.weight"].view(torch.uint8))


def test_nf4_and_int8(refused: Refused, tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "bitsandbytes"}}
    for dtype, shape in ((torch.uint8, (27, 1)), (torch.int8, (9, 6))):
        base = write_model(
            tmp_path / str(dtype), tensors(net__0__q__weight=torch.zeros(shape, dtype=dtype)), config=config
        )
        refused(base, write_lora(tmp_path / "a", {"net.0.q": (9, 6)}), "'net.0.q'", "(bitsandbytes)", "full-precision")


def test_gptq(refused: Refused, tmp_path: Path) -> None:
    own = tensors(net__0__q__qweight=torch.zeros(2, 9, dtype=torch.int32))
    del own["net.0.q.weight"]
    base = write_model(tmp_path / "base", own)
    part = write_lora(tmp_path / "a", {"net.0.q": (9, 6)})
    refused(base, part, "'net.0.q'", "quantised form: merge into the full-precision one", error=ah.UnknownName)


def test_fused_experts(refused: Refused, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", tensors(net__experts__gate_up_proj=draw(4, 6, 10)))
    part = write_lora(tmp_path / "a", {"net.experts.gate_up_proj": (10, 6)})
    refused(base, part, "a parameter of shape [4, 6, 10] in the base, not a layer", error=ah.UnknownName)


@pytest.mark.parametrize("method", ["bottleneck", "prompt_tuning", "prefix_tuning"])
def test_no_change_of_weights(refused: Refused, tmp_path: Path, method: str) -> None:
    from peers import LLAMA

    model = LLAMA.build()
    model.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    adapters = ah.adapt(model)
    options = {"bottleneck": {"reduction_factor": 4}}.get(method, {"num_virtual_tokens": 3})
    targets = {"bottleneck": ["mlp"], "prompt_tuning": ["model"], "prefix_tuning": ["self_attn"]}[method]
    adapters.add("a", ah.method(method, **options), targets)
    adapters.save("a", tmp_path / "a")
    refused(tmp_path / "base", tmp_path / "a", f"a {method!r} adapter is no change of weights", "live model")


def test_a_bias_that_the_base_has_not(refused: Refused, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", tensors())
    config = {"peft_type": "BITFIT"}
    part = write_adapter(tmp_path / "a", {f"{PREFIX}net.0.q.bitfit_bias": draw(9)}, config)
    refused(base, part, "changes the bias of 'net.0.q', which has none in the base")
    bias = {f"{PREFIX}net.0.q.lora_B.bias": draw(9)}
    part = write_lora(tmp_path / "b", {"net.0.q": (9, 6)}, more=bias, lora_bias=True)
    refused(base, part, "changes the bias of 'net.0.q', which has none in the base")


# Another base -----------------------------------------------------------------------------------------


def test_the_wrong_base(adapter: Command, refused: Refused, tmp_path: Path) -> None:
    own = {name: draw(*shape, seed=70 + i) for i, (name, shape) in enumerate(LAYERS.items())}
    part = write_lora(tmp_path / "a", LAYERS, facts={"base": sketch.of(own)})
    base = write_model(tmp_path / "base", tensors())
    refused(base, part, "was trained on other weights at", "--any-base", error=ah.FileError)
    assert adapter("merge", part, "--into", base, "-o", tmp_path / "asked", "--any-base").code == 0
    right = write_model(tmp_path / "right", {f"{name}.weight": W.bfloat16() for name, W in own.items()})
    assert adapter("merge", part, "--into", right, "-o", tmp_path / "done").code == 0


@pytest.mark.parametrize("by_inputs", [False, True])
def test_the_right_base_is_known_whichever_way_it_lies(tmp_path: Path, by_inputs: bool) -> None:
    W = draw(14, 6)
    part = write_lora(tmp_path / "a", {"x": (14, 6)}, facts={"base": sketch.of({"x": W})})
    stored = W.T.contiguous() if by_inputs else W
    ah.fold(write_model(tmp_path / "base", {"x.weight": stored}), ah.load(part), tmp_path / "out")
    with pytest.raises(ah.FileError, match="trained on other weights at 'x'"):
        ah.fold(write_model(tmp_path / "other", {"x.weight": stored.flip(0)}), ah.load(part), tmp_path / "no")


# Folders ----------------------------------------------------------------------------------------------


def part_of(tmp_path: Path) -> Path:
    return write_lora(tmp_path / "a", LAYERS)


def test_a_pickle(refused: Refused, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    torch.save(tensors(), base / "pytorch_model.bin")
    refused(base, part_of(tmp_path), "pytorch_model.bin", "a pickle", "weights_only", error=ah.FileError)


def test_no_folder_no_weights_an_adapter(refused: Refused, tmp_path: Path) -> None:
    part = part_of(tmp_path)
    write_model(tmp_path / "base", tensors())
    refused(tmp_path / "bace", part, "there is no such model", "did you mean", error=ah.FileError)
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", part, "has no weights", error=ah.FileError)
    refused(part, part, "is an adapter", error=ah.FileError)
    refused(tmp_path / "base" / "config.json", part, "is a file, not a model's folder", error=ah.FileError)


def test_two_models_in_one_folder(refused: Refused, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for name in ("one", "two"):
        save_file(tensors(), base / f"{name}.safetensors")
    refused(base, part_of(tmp_path), "which of these are the weights is not clear", error=ah.FileError)


def test_a_missing_shard(refused: Refused, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", tensors(), files=2)
    (base / "model-00002-of-00002.safetensors").unlink()
    words = ("'model-00002-of-00002.safetensors' is missing", "download the model again")
    refused(base, part_of(tmp_path), *words, error=ah.FileError)


@pytest.mark.parametrize("wrong", ["moved", "lacks", "more", "twice", "outside", "absolute", "empty", "list", "cut"])
def test_an_index_that_is_wrong(refused: Refused, tmp_path: Path, wrong: str) -> None:
    base = write_model(tmp_path / "base", tensors(), files=2)
    file = base / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    places: dict[str, Any] = index["weight_map"]
    one, other = sorted(set(places.values()))
    said = {"moved": "not in the index", "lacks": "not in the index", "more": "is in the index", "twice": "the index"}
    if wrong == "moved":
        places["net.0.q.weight"] = other
    elif wrong == "lacks":
        del places["net.0.q.weight"]
    elif wrong == "more":
        places["net.0.z.weight"] = one
    elif wrong == "twice":
        save_file(tensors(), base / other)
        places.update(dict.fromkeys(tensors(), other))
        save_file({"net.0.q.weight": draw(9, 6), "x": draw(1)}, base / one)
        places["x"] = one
    elif wrong in ("outside", "absolute"):
        (tmp_path / "secret").mkdir()
        save_file({"net.0.q.weight": draw(9, 6)}, tmp_path / "secret" / "x.safetensors")
        places["net.0.q.weight"] = (
            "../secret/x.safetensors" if wrong == "outside" else str(tmp_path / "secret" / "x.safetensors")
        )
    elif wrong == "empty":
        index["weight_map"] = {}
    elif wrong == "list":
        index["weight_map"] = [one]
    file.write_text("{" if wrong == "cut" else json.dumps(index))
    word = said.get(wrong) or {"outside": "not beside it", "absolute": "not beside it", "cut": "not valid JSON"}.get(
        wrong, "no weight_map"
    )
    refused(base, part_of(tmp_path), word, error=ah.FileError)


def test_a_broken_config(refused: Refused, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", tensors())
    for text, word in (("{", "not valid JSON"), ("[]", "not a JSON object")):
        (base / "config.json").write_text(text)
        refused(base, part_of(tmp_path), "config.json", word, error=ah.FileError)


def test_a_truncated_shard(refused: Refused, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", tensors())
    data = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(data[:-5])
    refused(base, part_of(tmp_path), "model.safetensors", error=ah.FileError)


# Numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["weight", "bias"])
def test_a_base_that_is_not_finite(refused: Refused, tmp_path: Path, value: float, which: str) -> None:
    own = tensors(net__0__q__bias=draw(9))
    own[f"net.0.q.{which}"].view(-1)[7] = value
    base = write_model(tmp_path / "base", own)
    bias = {f"{PREFIX}net.0.q.lora_B.bias": draw(9)}
    part = write_lora(tmp_path / "a", {"net.0.q": (9, 6)}, more=bias, lora_bias=True)
    words = ("model.safetensors", f"'net.0.q.{which}'", "NaN or infinite", "download the model again")
    refused(base, part, *words, error=ah.FileError)


def test_an_adapter_that_is_not_finite(refused: Refused, tmp_path: Path) -> None:
    bad = {f"{PREFIX}net.0.up.lora_A.weight": torch.full((3, 6), float("nan"))}
    part = write_lora(
        tmp_path / "a",
        {"net.0.q": (9, 6)},
        more={**bad, f"{PREFIX}net.0.up.lora_B.weight": draw(14, 3)},
        target_modules=["q", "up"],
    )
    base = write_model(tmp_path / "base", tensors())
    refused(base, part, "net.0.up.lora_A.weight", "NaN or infinite", error=ah.FileError)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_sum_that_overflows(refused: Refused, tmp_path: Path, dtype: torch.dtype) -> None:
    own = {key: t.to(dtype) for key, t in tensors().items()}
    factor = 1e4 if dtype == torch.float16 else 3e38
    B = torch.zeros(9, 3)
    B[4, 0] = factor
    A = torch.zeros(3, 6)
    A[0, 2] = 10
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 3, "target_modules": ["q"]}
    keys = {f"{PREFIX}net.0.q.lora_A.weight": A, f"{PREFIX}net.0.q.lora_B.weight": B}
    part = write_adapter(tmp_path / "a", keys, config)
    base = write_model(tmp_path / "base", own)
    refused(base, part, "the merged weight of 'net.0.q' does not fit", "too large")
    A[0, 2] = 1 if dtype == torch.bfloat16 else 6  # in reach again
    part = write_adapter(tmp_path / "b", {**keys, f"{PREFIX}net.0.q.lora_A.weight": A}, config)
    ah.fold(base, ah.load(part), tmp_path / "done")
    want = own["net.0.q.weight"].double() + B.double() @ A.double()
    assert same_bits(tensors_of(tmp_path / "done")["net.0.q.weight"], rounded(want.numpy(), dtype))


def test_a_bias_that_overflows(refused: Refused, tmp_path: Path) -> None:
    own = {key: t.half() for key, t in tensors(net__0__q__bias=draw(9)).items()}
    config = {"peft_type": "BITFIT"}
    part = write_adapter(tmp_path / "a", {f"{PREFIX}net.0.q.bitfit_bias": torch.full((9,), 1e5)}, config)
    refused(write_model(tmp_path / "base", own), part, "the merged bias of 'net.0.q' does not fit F16", "too large")


# Where to -----------------------------------------------------------------------------------------------


def test_out_in_the_base_or_the_base_itself(adapter: Command, tmp_path: Path) -> None:
    base, part = write_model(tmp_path / "base", tensors()), part_of(tmp_path)
    before = digests(tmp_path)
    (tmp_path / "link").symlink_to(base)
    for out in (base, base / "out", base / "x" / "y", tmp_path / "link", tmp_path / "link" / "out", base / "." / "o"):
        for more in ([], ["--force"]):
            done = adapter("merge", part, "--into", base, "-o", out, *more)
            done.refused("the base's own folder, or in it", "choose another -o")
    (tmp_path / "link").unlink()
    assert digests(tmp_path) == before


def test_a_base_inside_of_an_output(adapter: Command, tmp_path: Path) -> None:
    base, part, out = write_model(tmp_path / "base", tensors()), part_of(tmp_path), tmp_path / "out"
    assert adapter("merge", part, "--into", base, "-o", out).code == 0
    inner = write_model(out / "inner", tensors())
    before = digests(out)
    adapter("merge", part, "--into", inner, "-o", out, "--force").refused("has the base in it")
    assert digests(out) == before


def test_out_exists(adapter: Command, tmp_path: Path) -> None:
    base, part, out = write_model(tmp_path / "base", tensors()), part_of(tmp_path), tmp_path / "out"
    assert adapter("merge", part, "--into", base, "-o", out).code == 0
    before = digests(out)
    adapter("merge", part, "--into", base, "-o", out, "-w", "2").refused("the output exists", "pass --force")
    with pytest.raises(ah.OutputExists):
        ah.fold(base, ah.load(part), out)
    assert digests(out) == before
    assert adapter("merge", part, "--into", base, "-o", out, "-w", "2", "--force").code == 0
    assert digests(out) != before
    for other in ("mine", "a"):  # somebody's folder, and an adapter
        (tmp_path / other).mkdir(exist_ok=True)
        (tmp_path / other / "notes.txt").write_text("dear to me")
        before = digests(tmp_path / other)
        adapter("merge", part, "--into", base, "-o", tmp_path / other, "--force").refused("not deleted even with")
        assert digests(tmp_path / other) == before


@pytest.mark.parametrize("number", ["EXDEV", "EPERM", "EMLINK", "EACCES"])
def test_a_link_that_fails(adapter: Command, tmp_path: Path, number: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def fail(*args: object, **named: object) -> None:
        raise OSError(getattr(errno, number), os.strerror(getattr(errno, number)))

    monkeypatch.setattr(copying.os, "link", fail)
    base = write_model(tmp_path / "base", tensors(), files=3)
    part = write_lora(tmp_path / "a", {"net.0.q": (9, 6)})
    said = adapter("merge", part, "--into", base, "-o", tmp_path / "out", "--link").refused("; ")
    assert number == "EACCES" or "cannot be linked" in said
    assert not (tmp_path / "out").exists()
    with pytest.raises(ah.FileError):
        ah.fold(base, ah.load(part), tmp_path / "out", link=True)


# The command's options ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--rounding stochastic", "--rounding is for --into BASE"),
        ("--rounding-seed 0", "--rounding-seed is for --into BASE"),
        ("--link", "--link is for --into BASE"),
        ("--resume", "--resume is for --into BASE"),
        ("--executor dask://x:1", "--executor is for --into BASE"),
        ("--into base --dtype bf16", "--dtype is for adapters"),
        ("--into base --report r.html", "--report is about merged adapters"),
        ("--into base --at *.q", "--at '*.q'"),
        ("--into base --at *.q=1,2", "1 weights, one an adapter"),
        ("--into base --at *.q=", "--at '*.q='"),
        ("--into base --at *.q=x", "--at '*.q=x'"),
        ("--into base --at =1", "--at '=1'"),
        ("--into base --rounding x", "stochastic"),
        ("--into base --executor x", "is no dask://HOST:PORT"),
    ],
)
def test_wrong_usage(adapter: Command, tmp_path: Path, words: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "base", tensors())
    done = adapter("merge", part_of(tmp_path), "-o", "out", *words.split())
    assert done.code == 2, done
    assert said in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("at", "words"),
    [
        ("*.z=1", ("no adapted module is called '*.z'", "net.0.q")),
        ("*.q=nan", ("the weight nan", "is not a finite number")),
        ("*.q=inf", ("the weight inf", "is not a finite number")),
        ("*=0", ("all weights are zero",)),
    ],
)
def test_weights_by_module_that_are_wrong(adapter: Command, tmp_path: Path, at: str, words: tuple[str, ...]) -> None:
    base = write_model(tmp_path / "base", tensors())
    adapter("merge", part_of(tmp_path), "--into", base, "-o", tmp_path / "out", "--at", at).refused(*words)
    assert not (tmp_path / "out").exists()


def test_weights_by_module_for_too_many(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", tensors())
    with pytest.raises(ah.ConfigError, match="2 weights for 1 adapters"):
        ah.fold(base, ah.load(part_of(tmp_path)), tmp_path / "out", weights=[{"*": 1}, 2])


def test_a_dry_run_tells_all_conflicts(refused: Refused, adapter: Command, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", tensors())
    parts = [
        write_lora(
            tmp_path / key, {"net.0.q": (9, 6)}, more={f"{PREFIX}net.head.weight": draw(9, 6, seed=i)},
            modules_to_save=["head"], base_model_name_or_path=f"org/{key}",
        )
        for i, key in enumerate("ab")
    ]  # fmt: skip
    words = ["merge", *parts, "--into", base, "-o", refused.out, "--dry-run"]
    adapter(*words).refused("2 conflicts", "org/a", "org/b", "head.weight", "--any-base", "--keep")
    adapter(*words, "--any-base").refused("head.weight", "--keep")
    assert adapter(*words, "--weights", "1 0", "--keep", "none").code == 0


def test_no_output_named(adapter: Command, tmp_path: Path) -> None:
    done = adapter("merge", part_of(tmp_path), "--into", write_model(tmp_path / "base", tensors()))
    assert done.code == 2
    assert "give -o OUT" in done.err


def test_one_line_with_default_weights_too(refused: Refused, adapter: Command, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", tensors())
    parts = [write_lora(tmp_path / key, {"net.0.z": (9, 6)}, seed=i) for i, key in enumerate("ab")]
    adapter("merge", *parts, "--into", base, "-o", refused.out).refused("'net.0.z'")


@pytest.mark.parametrize(
    ("shape", "more", "words"),
    [
        ((9, 7), {}, ("'net.0.q'", "[9, 7]", "[9, 6]")),
        ((9, 6), {f"{PREFIX}net.0.q.lora_B.bias": draw(9)}, ("changes the bias of 'net.0.q'",)),
    ],
)
def test_a_dry_run_refuses_what_headers_tell(
    refused: Refused, adapter: Command, tmp_path: Path, shape: tuple[int, int], more: dict[str, Tensor], words: Any
) -> None:
    base = write_model(tmp_path / "base", tensors())
    part = write_lora(tmp_path / "a", {"net.0.q": shape}, more=more, lora_bias=bool(more))
    adapter("merge", part, "--into", base, "-o", refused.out, "--dry-run").refused(*words)
