"""What has no sum is refused with a reason and a remedy, and what other tools get wrong comes out right.

Adapters are written by PEFT; what is kept whole (heads, biases, token rows) is checked through PEFT's own forward.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peers import BERT, CONV, EMBEDDING, GPT2, LLAMA, Peer, load_peft, write_adapter
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conftest import Done, Handmade, PeftAgrees

    Command = Callable[..., Done]
    Written = Callable[..., Path]

# What PEFT keeps whole, on which peer, and a tensor of it.
KEPT: dict[str, tuple[Peer, dict[str, Any], str]] = {
    "head": (LLAMA, {"modules_to_save": ["lm_head"]}, "lm_head.weight"),
    "pooler": (BERT, {"modules_to_save": ["pooler"], "target_modules": ["query", "dense"]}, "pooler.dense.weight"),
    "conv head": (CONV, {"modules_to_save": ["head"]}, "head.bias"),
    "all biases": (BERT, {"bias": "all", "target_modules": ["query"]}, "layer.0.output.dense.bias"),
    "their biases": (GPT2, {"bias": "lora_only", "target_modules": ["c_attn"]}, "h.0.attn.c_attn.bias"),
    "tokens": (LLAMA, {"trainable_token_indices": [9, 3, 40]}, "embed_tokens.token_adapter.trainable_tokens_delta"),
    "tokens by name": (
        EMBEDDING,
        {"trainable_token_indices": {"positions": [2, 0]}, "target_modules": ["proj"]},
        "positions.token_adapter",
    ),
}


@pytest.fixture(params=KEPT)
def kept(request: pytest.FixtureRequest, written: Written) -> tuple[Peer, str, Path, Path, Path, Path]:
    """The peer and the tensor; an adapter, one with equal kept values, one with other ones, one with none."""
    peer, options, tensor = KEPT[request.param]
    plain = {"target_modules": options["target_modules"]} if "target_modules" in options else {}
    return (
        peer,
        tensor,
        written(peer, **options),
        written(peer, **options, rank=4, alpha=5),  # values depend on the seed only
        written(peer, **options, rank=4, alpha=5, seed=8),
        written(peer, **plain, rank=2, seed=5),
    )


def test_equal_kept_values_stay(
    adapter: Command, kept: tuple[Any, ...], peft_agrees: PeftAgrees, tmp_path: Path
) -> None:
    peer, tensor, a, equal, _, _ = kept
    done = adapter("merge", a, equal, "--weights", 0.7, -0.4, "-o", tmp_path / "out")
    assert done.code == 0, done
    assert tensor in done.out
    peft_agrees(tmp_path / "out", peer, [a, equal], [0.7, -0.4], kept=a)


def test_kept_values_that_differ_need_a_choice(
    adapter: Command, kept: tuple[Any, ...], peft_agrees: PeftAgrees, tmp_path: Path
) -> None:
    peer, _, a, _, other, _ = kept
    terms = ("merge", a, other, "--weights", 0.7, -0.4, "-o", tmp_path / "out")
    adapter(*terms).refused(str(a), str(other), "different values", "--keep")
    assert not (tmp_path / "out").exists()
    for choice in (a, other):
        assert adapter(*terms, "--keep", choice, "--force").code == 0
        peft_agrees(tmp_path / "out", peer, [a, other], [0.7, -0.4], kept=choice)


def test_kept_values_of_one_only_need_a_choice(
    adapter: Command, kept: tuple[Any, ...], peft_agrees: PeftAgrees, tmp_path: Path
) -> None:
    peer, _, a, _, _, plain = kept
    for terms in ([a, plain], [plain, a]):
        out = tmp_path / "out"
        command = ("merge", *terms, "--weights", 0.7, 0.4, "-o", out, "--force")
        adapter(*command).refused(f"only {a} has it", "--keep")
        conflict = json.loads((a / "adapter_config.json").read_text())["modules_to_save"] == ["pooler"]
        if conflict:  # `plain` adapts pooler.dense
            adapter(*command, "--keep", a).refused("'pooler.dense'", "modules_to_save", "--keep none")
        else:
            assert adapter(*command, "--keep", a).code == 0
            peft_agrees(out, peer, terms, [0.7, 0.4], kept=a)
        for choice in ("none", plain):
            assert adapter(*command, "--keep", choice).code == 0
            peft_agrees(out, peer, terms, [0.7, 0.4])


def test_kept_key_follows_the_adapters(
    adapter: Command, written: Written, peft_agrees: PeftAgrees, tmp_path: Path
) -> None:
    """PEFT calls a bias `key.base_layer.bias` where `key` has an adapter beside it, and `key.bias` where not."""
    a = written(BERT, bias="all", target_modules=["query"])
    b = written(BERT, target_modules=["key", "dense"], rank=3)
    out = tmp_path / "out"
    assert adapter("merge", a, b, "--weights", 1, 1, "--keep", a, "-o", out, "-q").code == 0
    keys = load_file(out / "adapter_model.safetensors")
    assert "base_model.model.encoder.layer.0.attention.self.key.base_layer.bias" in keys
    assert "base_model.model.encoder.layer.0.attention.self.value.bias" in keys
    peft_agrees(out, BERT, [a, b], [1, 1], kept=a)
    c = shutil.copytree(written(BERT, bias="all", target_modules=["key"], rank=2), tmp_path / "c")
    old, new = (load_file(folder / "adapter_model.safetensors") for folder in (a, c))
    plain = {key.replace(".base_layer.", "."): t for key, t in old.items()}
    new |= {key: plain[key.replace(".base_layer.", ".")] for key in new if ".lora_" not in key}
    save_file(new, c / "adapter_model.safetensors")  # the same biases, under other keys
    assert adapter("merge", a, c, "--weights", 1, 1, "--force", "-o", out, "-q").code == 0
    peft_agrees(out, BERT, [a, c], [1, 1], kept=a)


def test_kept_values_count_in_a_budget(
    adapter: Command, written: Written, peft_agrees: PeftAgrees, tmp_path: Path
) -> None:
    """Dropped layers included: their biases are then `key.bias`."""
    a = written(BERT, bias="all", target_modules=["query", "key", "dense"])
    whole = load_file(a / "adapter_model.safetensors")
    fixed = sum(t.nbytes for key, t in whole.items() if ".lora_" not in key)
    adapter("merge", a, "--budget", fixed, "-o", tmp_path / "out").refused("hold no rank", str(fixed))
    budget = fixed + 1500
    done = adapter("merge", a, "--budget", budget, "-o", tmp_path / "out", "--json")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert fixed < sum(t.nbytes for t in tensors.values()) <= budget
    assert 0 in {m["rank"] for m in done.json["modules"].values()}
    peft_agrees(tmp_path / "out", BERT, [tmp_path / "out"], [1], kept=a)


def test_dropped_module_becomes_no_target(adapter: Command, written: Written, tmp_path: Path) -> None:
    """`dense` is a target but not in `pooler`, which was trained whole; without its values it must not become one."""
    a = written(BERT, modules_to_save=["pooler"], target_modules=["dense"])
    assert adapter("merge", a, "--weights", 0.5, "--keep", "none", "-o", tmp_path / "out", "-q").code == 0
    names = [name for name, _ in load_peft(tmp_path / "out", BERT).named_parameters() if "lora" in name]
    assert names
    assert not any("pooler" in name for name in names)


@pytest.mark.parametrize(
    ("peer", "what"),
    # Not where GPT2's tied head would have a part in it: there PEFT does not load all that it saves.
    [(GPT2, "plain"), *((peer, what) for peer in (LLAMA, BERT) for what in ("plain", "embedding", "tokens"))],
    ids=lambda x: getattr(x, "name", x),
)
def test_saved_embeddings(
    adapter: Command, written: Written, peft_agrees: PeftAgrees, tmp_path: Path, peer: Peer, what: str
) -> None:
    """save_embedding_layers=True adds the base's own embeddings; they are kept, under the key that PEFT reads."""
    name = {"llama": "embed_tokens", "gpt2": "wte", "bert": "word_embeddings"}[peer.name]
    target = peer.targets[0]
    options = {
        "plain": {"target_modules": [target]},
        "embedding": {"target_modules": [target, name]},
        "tokens": {"target_modules": [target], "trainable_token_indices": {name: [4, 1]}},
    }[what]
    folders = []
    for rank in (6, 4):
        a, b = written(peer, rank=rank, **options), tmp_path / str(rank)
        load_peft(a, peer).save_pretrained(str(b), save_embedding_layers=True)
        folders.append(b)
    keys = load_file(folders[0] / "adapter_model.safetensors")
    assert any(f"{name}." in key and key.endswith(".weight") and "lora" not in key for key in keys)
    done = adapter("merge", *folders, "--weights", 0.7, 0.4, "-o", tmp_path / "out", "-q")
    assert done.code == 0, done
    peft_agrees(tmp_path / "out", peer, folders, [0.7, 0.4], kept=folders[0])


def test_copies_that_peft_does_not_read_are_left_out(adapter: Command, written: Written, tmp_path: Path) -> None:
    a = written(LLAMA, modules_to_save=["lm_head"])
    load_peft(a, LLAMA).save_pretrained(str(tmp_path / "a"), save_embedding_layers=True)
    assert any("original_module" in key for key in load_file(tmp_path / "a" / "adapter_model.safetensors"))
    assert adapter("merge", tmp_path / "a", "-o", tmp_path / "out", "-q").code == 0
    load_peft(tmp_path / "out", LLAMA)  # which is strict


def test_token_rows_in_another_order(adapter: Command, handmade: Handmade, tmp_path: Path) -> None:
    """The same bytes for tokens 3, 5 and for tokens 5, 3 are not the same rows."""
    key = "base_model.model.net.emb.token_adapter.trainable_tokens_delta"

    def rows(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**tensors, key: torch.arange(18.0).reshape(2, 9)}

    layers = {"net.layers.0.q": 2}
    a, b, c = (
        handmade(tmp_path / name, layers, tensors=rows, trainable_token_indices=tokens)
        for name, tokens in (("a", [3, 5]), ("b", [5, 3]), ("c", [3, 5]))
    )
    adapter("merge", a, b, "-o", tmp_path / "out").refused("different options", "--keep")
    assert adapter("merge", a, c, "-o", tmp_path / "out", "-q").code == 0


def test_adapter_beside_trained_tokens_of_one_layer(adapter: Command, written: Written, tmp_path: Path) -> None:
    """PEFT has no such adapter, and cannot load one."""
    a = written(LLAMA, target_modules=["q_proj"], trainable_token_indices=[9, 3, 40])
    b = written(LLAMA, target_modules=["q_proj", "embed_tokens"])
    terms = ("merge", a, b, "--weights", 1, 1, "-o", tmp_path / "out")
    adapter(*terms, "--keep", a).refused("model.embed_tokens", "trainable_token_indices", "--keep none")
    assert adapter(*terms, "--keep", b).code == 0
    load_peft(tmp_path / "out", LLAMA)


def test_lora_bias_beside_an_embedding(adapter: Command, handmade: Handmade, tmp_path: Path) -> None:
    """PEFT has one lora_bias for all layers and none for embeddings."""

    def with_bias(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**tensors, "base_model.model.net.layers.0.q.lora_B.bias": torch.ones(13)}

    a = handmade(tmp_path / "a", {"net.layers.0.q": 2}, tensors=with_bias, lora_bias=True)
    b = handmade(tmp_path / "b", {"net.emb": 2})
    adapter("merge", a, b, "-o", tmp_path / "out").refused("lora_bias", "embedding", "leave out")


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
def test_initialisations_that_move_the_base(adapter: Command, written: Written, tmp_path: Path, init: str) -> None:
    a = write_adapter(tmp_path / "a", BERT, rank=4, alpha=4, seed=1, init_lora_weights=init)
    for order in ((a, written(BERT)), (written(BERT), a)):
        line = adapter("merge", *order, "-o", tmp_path / "out").refused(str(a / "adapter_config.json"), init)
        assert "path_initial_model_for_weight_conversion" in line
    adapter("info", a).refused(init)


@pytest.mark.parametrize("init", ["orthogonal", "gaussian", False, "mica"])
def test_initialisations_that_do_not(
    adapter: Command, written: Written, peft_agrees: PeftAgrees, tmp_path: Path, init: str | bool
) -> None:
    a, b = written(BERT, init_lora_weights=init), written(BERT, rank=2, seed=4)
    assert adapter("merge", a, b, "--weights", 1, 1, "-o", tmp_path / "out", "-q").code == 0
    peft_agrees(tmp_path / "out", BERT, [a, b], [1, 1])


def test_dora_is_refused(adapter: Command, written: Written, tmp_path: Path) -> None:
    a = written(BERT, use_dora=True)
    adapter("merge", a, written(BERT), "-o", tmp_path / "out").refused(str(a), "'dora'", "base weights")
    with_flag_lost = shutil.copytree(a, tmp_path / "lost")
    config = json.loads((a / "adapter_config.json").read_text())
    (with_flag_lost / "adapter_config.json").write_text(json.dumps({**config, "use_dora": False}))
    adapter("merge", with_flag_lost, "-o", tmp_path / "out").refused("lora_magnitude_vector")


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("use_qalora", True),
        ("use_bdlora", {"target_modules_bd_a": ["q"]}),
        ("alora_invocation_tokens", [1, 2]),
        ("target_parameters", ["experts.w"]),
        ("layer_replication", [[0, 2], [1, 3]]),
        ("megatron_config", {"x": 1}),
        ("arrow_config", {"top_k": 2}),
        ("kasa_config", {"beta": 1}),
        ("velora_config", {"groups": 2}),
        ("monteclora_config", {"n": 2}),
        ("ensure_weight_tying", True),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", "what_comes_next"),
        ("init_lora_weights", ["pissa"]),
        ("use_what_comes_next", True),
        ("auto_map", {"AutoModel": "evil--repository.Model"}),
    ],
)
def test_options_that_change_what_is_computed(
    adapter: Command, handmade: Handmade, tmp_path: Path, entry: str, value: object
) -> None:
    a = handmade(tmp_path / "a", {"net.layers.0.q": 2}, **{entry: value})
    adapter("merge", a, "-o", tmp_path / "out").refused(str(a / "adapter_config.json"), entry)
    assert not (tmp_path / "out").exists()


def test_options_that_are_off(adapter: Command, handmade: Handmade, tmp_path: Path) -> None:
    """Entries of PEFT to come, at values that switch them off."""
    off = {"use_what_comes_next": False, "new_config": None, "new_list": [], "new_table": {}, "new_number": 0}
    more = {"qalora_group_size": 16, "use_qalora": False, "layers_to_transform": None, "exclude_modules": None}
    a = handmade(tmp_path / "a", {"net.layers.0.q": 2}, **off, **more)
    assert adapter("merge", a, "-o", tmp_path / "out", "-q").code == 0


# The parts must belong together -------------------------------------------------------------------


def test_other_bases_need_a_word(adapter: Command, handmade: Handmade, tmp_path: Path) -> None:
    layers = {"net.layers.0.q": 2}
    a = handmade(tmp_path / "a", layers, base_model_name_or_path="meta/Base-1")
    b = handmade(tmp_path / "b", layers, base_model_name_or_path="meta/Base-2")
    c = handmade(tmp_path / "c", layers, base_model_name_or_path="/home/somebody/base-1")
    d = handmade(tmp_path / "d", layers)
    out = tmp_path / "out"
    adapter("merge", a, b, "-o", out).refused("'meta/Base-1'", "'meta/Base-2'", "--any-base")
    adapter("merge", a, d, b, "-o", out).refused("'meta/Base-1'", "'meta/Base-2'")
    for terms in ([a, c, d], [a, b, "--any-base"]):
        assert adapter("merge", *terms, "-o", out, "--force", "-q").code == 0
        assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "meta/Base-1"


def test_other_layers_of_one_name(adapter: Command, handmade: Handmade, tmp_path: Path) -> None:
    def other_shape(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {k: torch.ones(2, 8) if "lora_A" in k else t for k, t in tensors.items()}

    def kernel(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {k: t[:, :, None, None] for k, t in tensors.items()}

    a = handmade(tmp_path / "a", {"net.layers.0.q": 2})
    for i, change in enumerate((other_shape, kernel)):
        b = handmade(tmp_path / f"b{i}", {"net.layers.0.q": 2}, tensors=change)
        adapter("merge", a, b, "--any-base", "-o", tmp_path / "out").refused("net.layers.0.q", str(a), str(b))


def test_bases_of_other_classes(adapter: Command, written: Written, tmp_path: Path) -> None:
    """PEFT notes the base's class where it has no task; the layers have other names, so the sum would look fine."""
    adapter("merge", written(GPT2), written(BERT), "-o", tmp_path / "out").refused("GPT2LMHeadModel", "BertModel")


def test_nothing_is_left(adapter: Command, handmade: Handmade, tmp_path: Path) -> None:
    a, b = (handmade(tmp_path / x, {"net.layers.0.q": 2}) for x in "ab")
    adapter("merge", a, b, "--weights", "0 0", "-o", tmp_path / "out").refused("all weights are zero")
    for weight in ("nan", "inf", "-inf", "1e999"):
        adapter("merge", a, b, "--weights", 1, weight, "-o", tmp_path / "out").refused("finite")
    for weight in ("1e300", "-1e99", "1.2345e200"):
        adapter("merge", a, b, "--weights", 1, weight, "-o", tmp_path / "out").refused("float32")
    adapter("merge", a, "--max-error", "nan", "-o", tmp_path / "out").refused("nan")
    assert not (tmp_path / "out").exists()


def test_weight_zero_leaves_an_adapter_out(
    adapter: Command, written: Written, handmade: Handmade, tmp_path: Path
) -> None:
    """Wholly: its base and its head do not matter."""
    a = handmade(tmp_path / "a", {"net.layers.0.q": 2})
    b = written(LLAMA, modules_to_save=["lm_head"])
    assert adapter("merge", a, b, "--weights", "1 0", "-o", tmp_path / "out").code == 0
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert tensors.keys() == load_file(a / "adapter_model.safetensors").keys()


def test_overflow_names_the_layer(adapter: Command, handmade: Handmade, tmp_path: Path) -> None:
    a = handmade(tmp_path / "a", {"net.layers.0.q": 2, "net.conv": 2})
    done = adapter("merge", a, "--weights", "1234567.1", "--dtype", "float16", "-o", tmp_path / "out")
    line = done.refused("--dtype")
    assert "'net.layers.0.q'" in line or "'net.conv'" in line
    assert not (tmp_path / "out").exists()


# The output ---------------------------------------------------------------------------------------


def test_output_that_exists(adapter: Command, handmade: Handmade, tmp_path: Path) -> None:
    a, b = (handmade(tmp_path / x, {"net.layers.0.q": 2}, seed=i) for i, x in enumerate("ab"))
    out = handmade(tmp_path / "out", {"net.conv": 2})
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    adapter("merge", a, b, "-o", out, "-q").refused(str(out), "exists", "--force")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert adapter("merge", a, b, "-o", out, "--force", "-q").code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "out"]
    assert adapter("merge", a, b, "-o", a, "--force", "-q").code == 0  # onto an input, read before it goes
    assert load_file(a / "adapter_model.safetensors").keys() == load_file(out / "adapter_model.safetensors").keys()


def test_force_deletes_adapters_only(adapter: Command, handmade: Handmade, tmp_path: Path) -> None:
    a = handmade(tmp_path / "a", {"net.layers.0.q": 2})
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("cat")
    training = handmade(tmp_path / "training", {"net.layers.0.q": 2})
    checkpoint = handmade(training / "checkpoint-500", {"net.layers.0.q": 2})
    (tmp_path / "file").write_text("text")
    (tmp_path / "link").symlink_to(a)
    for name in ("photos", "training", "file", "link"):
        adapter("merge", a, "--weights", 0.5, "-o", tmp_path / name, "--force").refused(str(tmp_path / name), "another")
    assert (tmp_path / "photos" / "cat.jpg").read_text() == "cat"
    assert (checkpoint / "adapter_config.json").is_file()
    # An output inside of an adapter is nobody's loss, and an input that contains the output neither.
    assert adapter("merge", training, checkpoint, "-o", training / "merged", "-q").code == 0


@pytest.mark.parametrize("out", ["", ".", "..", "file/out", "a/adapter_config.json"])
def test_output_that_cannot_be(
    adapter: Command, handmade: Handmade, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    monkeypatch.chdir(tmp_path)
    handmade(tmp_path / "a", {"net.layers.0.q": 2})
    (tmp_path / "file").write_text("text")
    assert adapter("merge", "a", "--weights", 0.5, "-o", out, "--force", "-q").refused()
    left = sorted(path.name for path in tmp_path.rglob("*"))
    assert left == ["a", "adapter_config.json", "adapter_model.safetensors", "file"]


def test_input_that_is_not_there(adapter: Command, handmade: Handmade, tmp_path: Path) -> None:
    handmade(tmp_path / "french", {"net.layers.0.q": 2})
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"
    adapter("merge", tmp_path / "frnech", "-o", out).refused("no such adapter folder", "'french'")
    adapter("merge", tmp_path / "empty", "-o", out).refused("not an adapter folder", "peft")
    adapter("merge", tmp_path / "french" / "adapter_config.json", "-o", out).refused("is a file")
    adapter("merge", tmp_path / "nowhere" / "at" / "all", "-o", out).refused("no such adapter folder")


def test_tensors_without_a_dtype_of_ours(adapter: Command, handmade: Handmade, tmp_path: Path) -> None:
    """8-bit floats are read and widened; the head keeps its own type."""

    def small(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        made = {key: t.to(torch.float8_e4m3fn) for key, t in tensors.items()}
        return {**made, "base_model.model.net.head.table": torch.arange(5)}

    a = handmade(tmp_path / "a", {"net.layers.0.q": 2}, tensors=small, modules_to_save=["head"])
    assert adapter("merge", a, "--weights", 0.5, "-o", tmp_path / "out", "--json").json["dtype"] == "F32"
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert torch.equal(tensors["base_model.model.net.head.table"], torch.arange(5))


def test_head_with_a_nan(adapter: Command, handmade: Handmade, tmp_path: Path) -> None:
    def head(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**tensors, "base_model.model.net.head.weight": torch.tensor([1.0, float("nan")])}

    a = handmade(tmp_path / "a", {"net.layers.0.q": 2}, tensors=head, modules_to_save=["head"])
    adapter("merge", a, "-o", tmp_path / "out").refused("base_model.model.net.head.weight", "NaN", str(a))
    assert not (tmp_path / "out").exists()
    assert adapter("merge", a, "--keep", "none", "-o", tmp_path / "out", "-q").code == 0


def test_pickle_is_not_read(adapter: Command, handmade: Handmade, tmp_path: Path) -> None:
    """Neither beside safetensors nor instead; what is said to convert it does."""
    a = handmade(tmp_path / "a", {"net.layers.0.q": 2})
    tensors = load_file(a / "adapter_model.safetensors")
    bomb = b"cos\nsystem\n(S'touch " + bytes(tmp_path / "boom") + b"'\ntR."
    (a / "adapter_model.bin").write_bytes(bomb)
    assert adapter("merge", a, "-o", tmp_path / "out", "-q").code == 0
    (a / "adapter_model.safetensors").unlink()
    line = adapter("merge", a, "-o", tmp_path / "out2").refused("pickle", str(a / "adapter_model.bin"))
    assert not (tmp_path / "boom").exists()

    torch.save(tensors, a / "adapter_model.bin")
    program = line.partition('python -c "')[2].rstrip().removesuffix('"')
    assert program
    subprocess.run([sys.executable, "-c", program], cwd=a, check=True)
    assert adapter("merge", a, "-o", tmp_path / "out2", "-q").code == 0

    save_file(tensors, a / "adapter_model.safetensors")
    (a / "adapter_model.safetensors").write_bytes(bomb)
    adapter("merge", a, "-o", tmp_path / "out3").refused(str(a / "adapter_model.safetensors"))
    assert not (tmp_path / "boom").exists()
