"""The card of what is pushed: valid metadata, what somebody wrote stays, and done again it is the same."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData
from safetensors.torch import load_file, save_file

import adapterhub_lite as ah
from adapterhub_lite.errors import FileError
from adapterhub_lite.hub import card, content, frontmatter, telling
from adapterhub_lite.hub.leaks import leaks
from adapterhub_lite.source import stored
from adapterhub_lite.testing import zoo

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conftest import Done, Handmade

    Command = Callable[..., Done]

BASE = "my-org/base-7b"


def written(folder: Path, old: str | None = None, **options: Any) -> str:
    told = telling.told(content.read(folder), "me/sql")
    return card.card(old, told, "me/sql", where="README.md", **options)


def entries(text: str) -> dict[str, Any]:
    """As the Hub's own library reads them."""
    found = ModelCard(text).data
    assert isinstance(found, ModelCardData)
    return found.to_dict()


@pytest.fixture
def own(handmade: Handmade, tmp_path: Path) -> Path:
    layers = {"net.layers.0.q": 2, "net.layers.1.q": 2}
    return handmade(tmp_path / "sql", layers, base_model_name_or_path=BASE, task_type="CAUSAL_LM")


def test_a_new_card(own: Path) -> None:
    text = written(own, license="apache-2.0", datasets=["acme/pairs"])
    assert entries(text) == {
        "base_model": BASE,
        "base_model_relation": "adapter",
        "library_name": "peft",
        "tags": ["adapterhub-lite", "lora", "peft"],
        "license": "apache-2.0",
        "datasets": ["acme/pairs"],
    }
    assert "\n# me/sql\n\n<!-- adapterhub-lite: begin -->\n## How to use it\n" in text
    for words in ('adapters.load("me/sql", name="sql")', "adapter pull me/sql", "PeftModel.from_pretrained(base, "):
        assert words in text
    assert f'base = AutoModelForCausalLM.from_pretrained("{BASE}")' in text
    assert "| method | `lora` ([paper](https://arxiv.org/abs/2106.09685)) |" in text
    assert "| parameters | 80 (F32) |" in text  # 2 layers of 13 × 7 at rank 2
    assert leaks({"README.md": text}) == []


def test_done_again_it_is_the_same(own: Path) -> None:
    once = written(own)
    assert written(own, once) == once
    assert card.by_hand(once, "me/sql", "x") == ""
    assert card.by_hand(once, "me/other", "x") == "# me/sql"


HAND = """---
# who may use it
license: mit   # as the base
tags:
- sql
- lora
base_model: somebody/else
language: [en, "no"]
model-index:
- name: x
  results: []
---
# My adapter

Trained by hand.

```text
---
```
"""


def test_what_somebody_wrote_stays(own: Path) -> None:
    text = written(own, HAND)
    assert entries(text) | {"model-index": 0} == {
        "license": "mit",
        "tags": ["sql", "lora", "adapterhub-lite", "peft"],
        "base_model": BASE,
        "language": ["en", "no"],
        "model-index": 0,
        "base_model_relation": "adapter",
        "library_name": "peft",
    }
    assert text.startswith(
        "---\n# who may use it\nlicense: mit   # as the base\ntags:\n- sql\n- lora\n- adapterhub-lite\n"
    )
    assert 'language: [en, "no"]\n' in text
    body = HAND.partition("---\n# My")[2]
    assert f"---\n# My{body}\n<!-- adapterhub-lite: begin -->" in text
    assert card.by_hand(text, "me/sql", "x").startswith("# My adapter\n\nTrained by hand.")
    again = text.replace("<!-- adapterhub-lite: end -->\n", "<!-- adapterhub-lite: end -->\n\nBelow it.\n")
    edited = again.replace("| parameters | 80", "| parameters | 81")
    assert written(own, edited) == again
    assert written(own, edited, license="apache-2.0").count("license: apache-2.0\n") == 1


def test_lines_end_as_they_did(own: Path) -> None:
    text = written(own, HAND.replace("\n", "\r\n"))
    assert text.replace("\r\n", "\n") == written(own, HAND)
    assert "\n" not in text.replace("\r\n", "")
    assert written(own, text) == text


def test_what_was_trained_here_is_no_merge(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(7, 5))
    adapters = ah.adapt(model)
    adapters.add("a", ah.LoRA(rank=2), targets=["0"])
    adapters.save("a", tmp_path / "a")
    text = written(tmp_path / "a")
    assert entries(text)["tags"] == ["adapterhub-lite", "lora", "peft"]
    assert "How it was made" not in text
    (2.0 * ah.load(tmp_path / "a")).save(tmp_path / "b")
    assert "merge" in entries(written(tmp_path / "b"))["tags"]


@pytest.mark.parametrize(
    ("old", "words"),
    [
        ("---\na: [1\n---\n", "not valid YAML at line 3"),
        ("---\n- a\n---\n", "no mapping"),
        ("---\na: &x [1]\nb: *x\n---\n", "aliases"),
        (f"text {card.BEGIN}", "marks"),
        (f"{card.END} {card.BEGIN}", "marks"),
        (f"{card.BEGIN}{card.END}{card.BEGIN}{card.END}", "marks"),
    ],
)
def test_a_card_that_is_none_is_refused(own: Path, old: str, words: str) -> None:
    with pytest.raises(FileError, match=words) as refused:
        written(own, old)
    assert refused.value.where == "README.md"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a: 1\n",
        "tags: x\n",
        "{a: 1, tags: [x], license: mit}\n",
        "tags:\n# a remark\n- x\nb: |\n  tags: no\n  c\n",
        '"tags": [x]\nb: 2\n',
        "tags: [x,\n  y]\n# the end\n",
        "b: {tags: [z]}\n...\n",
    ],
)
def test_one_entry_is_replaced_and_no_other(text: str) -> None:
    new = frontmatter.replaced(text, {"tags": ["lora", "no"], "license": "mit"}, "x")
    old = yaml.safe_load(text) or {}
    assert yaml.safe_load(new) == {**old, "tags": ["lora", "no"], "license": "mit"}
    assert frontmatter.replaced(new, {"tags": ["lora", "no"], "license": "mit"}, "x") == new


def test_a_base_that_is_no_model_of_the_hub(handmade: Handmade, tmp_path: Path) -> None:
    text = written(handmade(tmp_path / "a", {"net.layers.0.q": 2}, base_model_name_or_path="base-7b"))
    assert "base_model" not in entries(text)
    assert "base_model_relation" not in entries(text)
    assert "base = ...  # the base model" in text
    kept = entries(written(tmp_path / "a", f"---\nbase_model: {BASE}\n---\n"))
    assert (kept["base_model"], kept["base_model_relation"]) == (BASE, "adapter")


def test_a_merge_has_its_lineage(adapter: Command, handmade: Handmade, tmp_path: Path) -> None:
    for seed, name in enumerate(("sql", "french")):
        handmade(tmp_path / name, {"net.layers.0.q": 2}, seed=seed, base_model_name_or_path=BASE)
    done = adapter("merge", tmp_path / "sql", tmp_path / "french", "--weights", 0.7, 0.3, "-o", tmp_path / "m")
    assert done.code == 0, done
    text = written(tmp_path / "m")
    assert "`0.7 * sql + 0.3 * french`" in text
    facts = stored(tmp_path / "m").own.facts
    assert f"| error | {facts['error']['overall']:.3g} (relative" in text
    for term in facts["recipe"]["terms"]:
        for file, digest in term["sha256"].items():
            assert f"| `{term['adapter']}` | `{file}` | `{digest}` |" in text
    assert entries(text)["tags"] == ["adapterhub-lite", "lora", "peft", "merge"]
    assert str(tmp_path) not in text


def test_what_peft_cannot_load_is_not_said_to_be(tmp_path: Path) -> None:
    adapters = ah.adapt(zoo.EXAMPLES["block"].model())
    adapters.add("x", ah.method("bottleneck", bottleneck_size=3), targets="first")
    adapters.save("x", tmp_path / "x")
    text = written(tmp_path / "x")
    assert "PeftModel" not in text
    assert entries(text)["library_name"] == "adapterhub-lite"


def test_a_folded_model(adapter: Command, handmade: Handmade, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    save_file({"net.layers.0.q.weight": torch.randn(13, 7)}, base / "model.safetensors", {"format": "pt"})
    (base / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    (base / "README.md").write_text("---\nlicense: llama3\npipeline_tag: text-generation\n---\n# The base\n")
    handmade(tmp_path / "a", {"net.layers.0.q": 2})
    done = adapter("merge", tmp_path / "a", "--into", base, "-o", tmp_path / "model")
    assert done.code == 0, done
    found = content.read(tmp_path / "model")
    assert found.kind == "model"
    assert sorted(found.files) == ["adapterhub_lite.json", "config.json", "model.safetensors"]
    text = written(tmp_path / "model", (tmp_path / "model" / "README.md").read_text())
    assert "# The base" in text
    assert 'AutoModelForCausalLM.from_pretrained("me/sql")' in text
    said = entries(text)
    assert (said["library_name"], said["license"], said["tags"]) == (
        "transformers",
        "llama3",
        ["adapterhub-lite", "merge"],
    )
    assert "`base + 1.0 * a`" in text
    (tmp_path / "model" / "README.md").write_text(text)
    assert ah.verify(tmp_path / "model").unchecked[0] == "README.md, which was written since"
    broken = load_file(tmp_path / "model" / "model.safetensors")
    save_file({k: t + 1 for k, t in broken.items()}, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(FileError, match="SHA-256 differs"):
        content.read(tmp_path / "model")


def test_a_composition(tmp_path: Path) -> None:
    adapters = ah.adapt(torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(5, 3)))
    adapters.add("a", ah.LoRA(rank=2), targets="0")
    adapters.add("b", ah.LoRA(rank=2), targets="1")
    adapters.activate(ah.chain("a", 0.5 * ah.use("b")))
    adapters.save_composition(tmp_path / "c")
    found = content.read(tmp_path / "c")
    assert (found.kind, len(found.files)) == ("composition", 5)
    text = written(tmp_path / "c")
    assert 'adapters.load_composition("me/sql")' in text
    assert "### `a`" in text
    assert "### `b`" in text
    assert leaks({"README.md": text}) == []


def test_a_stranger_writes_no_html_and_no_mark_into_it(handmade: Handmade, tmp_path: Path) -> None:
    evil = f"x/<script>`|`\n# {card.END}"
    own = handmade(tmp_path / "a", {"net.layers.0.q": 2}, base_model_name_or_path=evil)
    file = own / "adapter_model.safetensors"
    told = {"recipe": {"rule": "sum", "terms": [{"weight": evil, "adapter": evil, "sha256": {evil: evil}}]}}
    save_file(load_file(file), file, {"adapterhub_lite": json.dumps(told)})
    text = written(own)
    assert text.count(card.END) == text.count(card.BEGIN) == 1
    assert "<script>" not in text
    assert written(own, text) == text


# What is uploaded ------------------------------------------------------------------------------------------


def test_nothing_hidden_and_nothing_from_outside(own: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("x")
    (own / "link.txt").symlink_to(tmp_path / "secret.txt")
    (own / "there").symlink_to(tmp_path)
    (own / "inside.json").symlink_to(own / "adapter_config.json")
    (own / "loop").symlink_to(own / "loop")
    for name in (".git", ".x.0123abcd.adapter-tmp", ".sql.adapter-part"):
        (own / name).mkdir()
        (own / name / "journal.json").write_text("{}")
    (own / ".env").write_text("x")
    (own / "README.md").write_text("hand")
    (own / "assets").mkdir()
    (own / "assets" / "a.png").write_bytes(b"\x89PNG")
    found = content.read(own)
    names = ["adapter_config.json", "adapter_model.safetensors", "assets/a.png", "inside.json"]
    assert sorted(found.files) == names
    assert sorted(found.left) == sorted(
        [".env", ".git", ".sql.adapter-part", ".x.0123abcd.adapter-tmp", "link.txt", "loop", "there"]
    )


def test_a_link_that_would_be_missed_is_refused(own: Path, tmp_path: Path) -> None:
    (own / "adapter_model.safetensors").rename(tmp_path / "w")
    (own / "adapter_model.safetensors").symlink_to(tmp_path / "w")
    with pytest.raises(FileError, match="a link that leads out"):
        content.read(own)


@pytest.mark.parametrize("name", ["training_args.bin", "optimizer.pt", "x.data", "y.data"])
def test_pickles_are_refused(own: Path, name: str) -> None:
    if name == "x.data":
        torch.save({"a": torch.ones(2)}, own / name)
    else:
        import pickle

        (own / name).write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(FileError, match="is a pickle") as refused:
        content.read(own)
    assert refused.value.where.endswith(name)


def test_what_is_none_of_ours_is_refused(own: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileError, match="not clear what it is"):
        content.read(tmp_path / "empty")
    with pytest.raises(FileError, match="no such folder"):
        content.read(tmp_path / "none")
    tensors = load_file(own / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, own / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(FileError, match="NaN"):
        content.read(own)
