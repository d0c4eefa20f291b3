"""What must not be published is found, with its place, in whatever file it stands; what our code writes is clean."""

from __future__ import annotations

import json
import random
import string
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

import adapterhub_lite as ah
from adapterhub_lite.errors import FileError
from adapterhub_lite.hub.leaks import leaks, refuse
from adapterhub_lite.registry import registry
from adapterhub_lite.testing import zoo

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conftest import Done

    Command = Callable[..., Done]

RNG = random.Random(8)


def letters(n: int, alphabet: str = string.ascii_letters + string.digits) -> str:
    return "".join(RNG.choice(alphabet) for _ in range(n))


PATHS = [
    "/home/mara/models/base-7b",
    "/Users/mara.k/Documents/out",
    "/root/.cache/huggingface/hub/models--x--y",
    "/mnt/data/llama",
    "/scratch/project_465/ckpt-100",
    "/data/train.jsonl",
    "/tmp/tmpab12cd34/adapter",
    "/workspace/out/step_10",
    "/lustre/orion/abc123/proj-shared/weights",
    "/gpfs/u/home/x",
    "/opt/ml/model",
    "/content/drive/MyDrive/lora",
    "/acme/internal/weights/v2",
    "/var/lib/jobs/17",
    "C:\\Users\\Mara\\models\\base",
    "D:/data/models/base",
    "c:\\work\\x",
    "\\\\fileserver\\share\\models",
    "file:///home/mara/x.txt",
    "file:///C:/Users/Mara/x",
    "~/models/base-7b",
    "~mara/models/base",
]
TOKENS = [
    f"hf_{letters(34, string.ascii_letters)}",
    f"sk-{letters(47)}7",
    f"sk-proj-{letters(60)}7",
    f"sk-ant-api03-{letters(40)}7-{letters(20)}",
    f"ghp_{letters(36)}",
    f"github_pat_{letters(22)}_{letters(59)}",
    f"glpat-{letters(20)}",
    f"AKIA{letters(16, string.ascii_uppercase + string.digits)}",
    f"aws_secret_access_key = {letters(38)}/7",
    f"Authorization: Bearer {letters(40)}7",
    f"xoxb-{letters(12, string.digits)}-{letters(24)}",
    f"AIza{letters(35)}",
    f"npm_{letters(36)}",
    f"eyJ{letters(20)}.eyJ{letters(40)}.{letters(30)}",
    f"-----BEGIN RSA PRIVATE KEY-----\n{letters(60)}",
    f"WANDB_API_KEY={letters(38, '0123456789abcdef')}a7",
    "https://mara:hunter2hunter2@git.acme.io/repo.git",
    f'"api_key": "{letters(32)}7"',
]
MAILS = ["mara.keller@acme.io", "m_k+hub@uni-example.de", "mara@cs.acme-university.edu"]
NAMES = ["trained by mkeller on the weekend", "run-mkeller-3", "srv2/mkeller/x", "mkeller"]
BARE = ['"output_dir": "/ckpt"', "--model_path /models/x", "data_dir=/corpus"]
SEEDED = [*PATHS, *TOKENS, *MAILS, *NAMES, *BARE]


def test_there_are_fifty() -> None:
    assert len(SEEDED) == len(set(SEEDED)) == 50


@pytest.mark.parametrize("place", ["README.md", "notes.txt", "adapter_config.json", "header", "nested"])
def test_all_seeded_leaks_are_caught(tmp_path: Path, place: str) -> None:
    missed = []
    for number, seed in enumerate(SEEDED):
        file = tmp_path / f"{number}.safetensors" if place in ("header", "nested") else tmp_path / f"{number}-{place}"
        if place == "header":
            save_file({"a": torch.ones(1)}, file, {"format": "pt", "comment": f"see {seed} there"})
        elif place == "nested":
            told = json.dumps({"recipe": {"terms": [{"note": seed}]}})
            save_file({"a": torch.ones(1)}, file, {"adapterhub_lite": told})
        elif place.endswith(".json"):
            file.write_text(json.dumps({"r": 8, "note": seed, "alpha": 16}, indent=2))
        else:
            file.write_text(f"# Title\n\nSee {seed} there.\n")
        found = leaks({file.name: file}, people={"mkeller", "/home/mkeller", "root"})
        expected = {
            "header": f"{file.name}: header, comment",
            "nested": f"{file.name}: header, adapterhub_lite.recipe.terms[0].note",
        }.get(place, f"{file.name}:3")
        if [leak.where for leak in found if leak.where == expected] == []:
            missed.append((seed, found))
        for leak in found:  # a token is not told again by whoever reports it
            assert leak.kind != "a token" or len(leak.shown) <= 10
    assert not missed


CLEAN = {
    "README.md": """---
base_model: my-org/base-7b
license: apache-2.0
datasets: [acme/sql-pairs]
tags: [lora, text-generation]
---
# SQL adapter

Rank 16/alpha 32, trained and/or evaluated on 2/3 of the data (n=1/10);
see https://huggingface.co/my-org/base-7b/tree/main,
<https://arxiv.org/abs/2106.09685> and [the docs](/docs/transformers/main/en/index). `owner/name@v1.2`, mkeller/base or
someone/model@main.

```python
from peft import PeftModel  # pip install peft
model = PeftModel.from_pretrained(base, "me/sql", revision="refs/pr/1", token="hf_xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx")
requests.post("http://localhost:8000/v1/chat/completions", headers={"Authorization": f"Bearer {HF_TOKEN}"})
@torch.no_grad()
def f(a, b): return a // b
```

```sh
#!/usr/bin/env bash
export HF_TOKEN=$YOUR_TOKEN; sk-learn-compatible-estimators-are-many
curl /v1/models; cat /etc/os-release > /dev/null; python train.py --output_dir out/sql --lr 1e-4 --path path/to/data
adapter pull me/sql -o ./sql ; ls ../data /path/to/model ~/.cache/huggingface
python x.py --model_path /path/to/model
```

![picture](assets/logo@2x.png) </div></p> $\\alpha\\beta$ \\\\ \\hline
C: 12/24/48, a:b, e.g. w/o. Contact: you@example.com.
Password: ask. The secret: patience-and-perseverance. api_key: YOUR_API_KEY_GOES_HERE. It's 50/50/50.
~5/10, ~/, ~mean/median and ~1.5.
""",
    "adapter_config.json": json.dumps(
        {
            "base_model_name_or_path": "my-org/base-7b",
            "target_modules": ["q_proj", "model.layers.0.mlp/x", r"(?:.*\.)?q_proj$", r"^model\.layers\.\d+\.(q|v)$"],
            "auto_mapping": {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama"},
            "rank_pattern": {".*\\.0\\.q": 4},
        },
        indent=2,
    ),
    "tokenizer_config.json": json.dumps(
        {
            "chat_template": "{% if x %}{{ '/think' }}{{ '\\n<|im_start|>' }}{% endif %}</tool_call>/no_think",
            "eos_token": "<|endoftext|>",
            "pattern": "(?i:'s|'t|'re)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+| ?[^\\s\\p{L}]+[\\r\\n/]*|\\s*[\\r\\n]+",
            "added_tokens_decoder": {"128000": {"content": "<|begin_of_text|>"}, "1": {"content": "@@"}},
        }
    ),
    "tokenizer.json": json.dumps(
        {
            "model": {
                "vocab": dict.fromkeys(["/home", "C:\\", "/usr/local", "://", "@gmail", "~/", "mkeller", "Ġ/**"], 1)
            }
        }
    ),
    "config.json": json.dumps({"_name_or_path": "my-org/base-7b", "architectures": ["LlamaForCausalLM"]}),
    "trainer_state.json": json.dumps({"log_history": [{"loss": 0.1}], "best_model_checkpoint": "out/ckpt-10"}),
}


def test_what_people_write_is_clean() -> None:
    for name, text in CLEAN.items():
        assert leaks({name: text}, people={"mkeller", "root", "/root", "user"}) == [], name


def test_what_our_own_code_writes_is_clean(tmp_path: Path, adapter: Command, handmade: Callable[..., Path]) -> None:
    """Configs and headers of every method, and of merges with their recipes."""
    written: dict[str, Path] = {}

    def note(folder: Path) -> None:
        written.update({f"{folder.name}/{path.name}": path for path in folder.iterdir()})

    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_hidden_layers": 1}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=11, **sizes))
    for name, cls in registry().methods().items():
        kinds = [kind for kind in sorted(cls.site_kinds) if kind in zoo.EXAMPLES and not zoo.EXAMPLES[kind].needs]
        if kinds:
            example = zoo.EXAMPLES[kinds[0]]
            model = example.model()
            targets = list(example.sites(model, cls()))
        else:
            model, kind = llama, registry().site_kind(min(cls.site_kinds))
            targets = [path for path, module in model.named_modules() if kind.accepts(module)]
        adapters = ah.adapt(model)
        adapters.add(name, cls(), targets=targets)
        adapters.save(name, tmp_path / name)
        adapters.remove(name)
        note(tmp_path / name)
    assert len(written) == 2 * len(registry().methods())
    parts = [handmade(tmp_path / "in" / name, {"net.layers.0.q": 2}, seed=seed) for seed, name in enumerate("ab")]
    for out, options in {"sum": [], "ties": ["--rule", "ties", "--density", "0.5", "--rank", "2"]}.items():
        done = adapter("merge", *parts, "--weights", "0.7", "0.3", *options, "-o", tmp_path / out)
        assert done.code == 0, done
        note(tmp_path / out)
    assert leaks(written) == []


def test_a_refusal_tells_where(tmp_path: Path) -> None:
    found = leaks(
        {"b.md": "x\nbob@acme.io and /home/bob/x\n", "a.json": '{\n"p": "\\/home\\/al\\u0069ce\\/y"}'}, people=()
    )
    assert [str(leak) for leak in found] == [
        "a.json:2: an absolute path, /home/alice/y",
        "b.md:2: an absolute path, /home/bob/x",
        "b.md:2: an e-mail address, bob@acme.io",
    ]
    with pytest.raises(
        FileError, match=r"out: would publish an absolute path, /home/alice/y, at a.json:2 \(and 2 more"
    ):
        refuse(found, "out")
    refuse([], "out")


def test_other_encodings_and_other_files(tmp_path: Path) -> None:
    (tmp_path / "utf16.txt").write_text("see /home/bob/x", "utf-16")
    (tmp_path / "latin.txt").write_bytes("Grüße, /home/bob/x".encode("latin-1"))
    (tmp_path / "tokenizer.model").write_bytes(b"\x00\x01/home/bob/x\x00")  # trained by others, full of their paths
    found = leaks({path.name: path for path in tmp_path.iterdir()}, people=())
    assert [leak.where for leak in found] == ["latin.txt:1", "utf16.txt:1"]


def test_hostile_texts_take_no_time() -> None:
    for part in ("a", "a.", "/a", "~a/", "\\\\a", "x@", "sk-", " /a/b", "path "):
        leaks({"a.md": part * 20_000}, people=["mara"])
