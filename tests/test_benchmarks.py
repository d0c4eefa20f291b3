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
