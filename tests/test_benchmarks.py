"""Figures in the docs that do not depend on the machine are those that the benchmarks print."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]


def benchmark(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_activations_in_the_docs_are_measured() -> None:
    activations = benchmark("activations")
    found = activations.everything()
    text = (ROOT / "docs/methods.md").read_text()
    shown = re.search(r"<!-- activations -->\n(.*?)\n<!-- /activations -->", text, re.DOTALL)
    assert shown is not None
    assert shown[1] == activations.table(found)
    lora = found["lora"]["bytes a token, model"]
    assert found["lora_fa"]["bytes a token, model"] <= 0.64 * lora
    assert found["vera"]["bytes a token, model"] < lora


def test_adapters_and_their_merges_do_better_than_the_base() -> None:
    """The small version of the table in benchmarks/README.md: real weights, real texts, none of them trained on."""
    quality = benchmark("quality")
    every = quality.sentences(files=100)
    parts = quality.split(every, (16, 4, 10), seed=1)
    files = [{(sentence.package, sentence.file) for sentence in part} for part in parts]
    assert not files[0] & files[2]
    assert not files[1] & files[2]
    assert len({sentence.text.lower() for part in parts for sentence in part}) == sum(map(len, parts)) == 8 * 30
    found = quality.one_seed(quality.Encoder(), every, seed=1, smoke=True)
    names = ["base", *(f"adapter for {task}" for task in quality.TASKS), *quality.IN_SMOKE, "sum, weights searched"]
    assert sorted(found) == sorted(names)
    for task in quality.TASKS:
        assert found[f"adapter for {task}"].plain[task] > found["base"].plain[task] + 0.02
    all_tasks = {name: sum(row.plain.values()) for name, row in found.items()}
    assert all_tasks["sum, weights 1"] > all_tasks["base"]
    assert all_tasks["sum, weights searched"] > all_tasks["base"]
    lines = quality.table([found]).splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == list(found)
    assert len({line.count("|") for line in lines}) == 1
