"""Every bundled method has its page and its picture, and both say what the code says."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import fields
from math import prod
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from test_benchmarks import benchmark
from torch import Tensor, nn

import adapterhub_lite as ah
from adapterhub_lite import Method
from adapterhub_lite.registry import registry

PAGES = Path(__file__).parents[1] / "docs/methods"
OVERVIEW = PAGES.with_suffix(".md").read_text(encoding="utf-8")
BUNDLED = {
    name: cls for name, cls in registry().methods().items() if cls.__module__.startswith("adapterhub_lite_plugins")
}

sys.path.insert(0, str(PAGES))
import draw  # noqa: E402
from pictures import PICTURES  # noqa: E402

sys.path.remove(str(PAGES))

SIZES = {"d": 40, "k": 96, "r": 8, "m": 5}
# The flow of a picture, by its caption, and the method with the options under which a layer computes it.
RANK: dict[str, Any] = {"rank": SIZES["r"]}
LAYERS: dict[tuple[str, str], tuple[str, dict[str, Any]]] = {
    ("lora", ""): ("lora", RANK),
    ("pissa", ""): ("lora", RANK | {"init_weights": "pissa"}),
    ("lora_plus", ""): ("lora_plus", RANK),
    ("lora_fa", ""): ("lora_fa", RANK),
    ("vera", ""): ("vera", RANK),
    ("delta_lora", ""): ("delta_lora", RANK),
    ("dora", ""): ("dora", RANK),
    ("bitfit", ""): ("bitfit", {}),
    ("bottleneck", "behind a block"): ("bottleneck", {"bottleneck_size": 5}),
    ("bottleneck", "beside it"): ("bottleneck", {"bottleneck_size": 5, "placement": "parallel"}),
    ("ia3", "keys and values"): ("ia3", {}),
    ("ia3", "the second layer of a feed-forward block"): ("ia3", {"feedforward": ("0",)}),
}

# Flows that are of no linear layer: nothing is measured there.
ELSEWHERE: set[tuple[str, str]] = {
    ("bottleneck", "around a norm, whose input is x"),
    ("ln_tuning", ""),
    ("prompt_tuning", ""),
    ("prefix_tuning", ""),
}


def page(name: str) -> str:
    return (PAGES / f"{name}.md").read_text(encoding="utf-8")


def rows(text: str) -> Iterator[list[str]]:
    """The cells of all tables' rows."""
    for line in re.findall(r"^\| (.*) \|$", text, re.MULTILINE):
        yield [cell.strip() for cell in line.split(" | ")]


def overview(mark: str) -> dict[str, list[str]]:
    """The first table behind `mark` in docs/methods.md, by the methods' names."""
    table = re.search(r"(^\|.*\n)+", OVERVIEW.split(mark, 1)[1], re.MULTILINE)
    assert table is not None
    found = {re.sub(r"^\[?`?(\w+).*", r"\1", row[0]): row[1:] for row in rows(table[0])}
    return {name: row for name, row in found.items() if name in BUNDLED}


# Pages ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUNDLED)
def test_a_page_names_the_paper_the_picture_and_every_option(name: str) -> None:
    cls, text = BUNDLED[name], page(name)
    assert f"]({cls.paper})" in text
    assert f"]({name}.svg)" in text
    missing = [field.name for field in fields(cls) if f"`{field.name}`" not in text]
    assert not missing, f"docs/methods/{name}.md lacks the options {missing}"


@pytest.mark.parametrize("name", BUNDLED)
def test_the_options_of_a_page_have_the_defaults_of_the_code(name: str) -> None:
    made, text = BUNDLED[name](), page(name)
    listed = {row[0].strip("`"): row[1] for row in rows(text) if len(row) == 3 and row[0].startswith("`")}
    own = {field for field in inspect.get_annotations(BUNDLED[name]) if field in made.__dataclass_fields__}
    assert own <= set(listed)
    for option, default in listed.items():
        value = getattr(made, option)
        assert default == (f'"{value}"' if isinstance(value, str) else str(value)), option


@pytest.mark.parametrize("name", BUNDLED)
def test_the_facts_of_a_page_are_those_of_the_overview(name: str) -> None:
    facts = {row[0]: row[1] for row in rows(page(name)) if len(row) == 2}
    assert facts["trains per layer"] == overview("# Methods")[name][0]
    one, everywhere, _ = overview("<!-- activations -->")[name]
    kept = facts["kept for the backward pass"]
    if name in benchmark("activations").left_out():
        assert everywhere == "–"
    else:
        assert f"{one} elements a token of one layer" in kept
        assert f"{everywhere} bytes a token of a model" in kept
    assert set(re.findall(r"`(\w+)`", facts["layers"])) == BUNDLED[name].site_kinds


def test_every_method_is_in_the_overview() -> None:
    assert set(overview("# Methods")) == set(BUNDLED)
    assert [name for name in BUNDLED if f"(methods/{name}.md)" not in OVERVIEW] == []


def test_there_is_nothing_in_the_folder_that_belongs_to_no_method() -> None:
    assert {file.stem for file in PAGES.glob("*.md")} == set(BUNDLED)
    assert {file.stem for file in PAGES.glob("*.svg")} == set(PICTURES)


# Pictures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_what_the_script_draws(name: str) -> None:
    file = (PAGES / f"{name}.svg").read_bytes()
    assert file == PICTURES[name].svg().encode(), "run python docs/methods/pictures.py"
    root = ElementTree.fromstring(file)
    title = root.find("{http://www.w3.org/2000/svg}title")
    assert title is not None
    assert title.text == PICTURES[name].title


def test_all_that_is_written_lies_within_the_picture() -> None:
    for name, picture in PICTURES.items():
        root = ElementTree.fromstring(picture.svg())
        width, height = float(root.attrib["width"]), float(root.attrib["height"])
        for text in root.iter("{http://www.w3.org/2000/svg}text"):
            # No letter of these fonts is much wider than 0.62 of its size, on average over a word.
            length = 0.62 * float(text.attrib["font-size"]) * len("".join(text.itertext()))
            left = float(text.attrib["x"]) - (length / 2 if text.attrib["text-anchor"] == "middle" else 0)
            assert 0 <= left <= left + length <= width, f"{name}: {''.join(text.itertext())}"
            assert 0 < float(text.attrib["y"]) < height


class Alone(nn.Module):
    """A layer whose input is somebody's output, and kept only if it is needed."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x * 1.0)
        return y


def adapted(method: Method) -> nn.Module:
    layer = nn.Sequential(nn.Linear(SIZES["k"], SIZES["d"]))
    ah.adapt(layer).add("a", method, "0")
    return layer


@pytest.mark.parametrize(("name", "caption"), LAYERS)
def test_the_dots_of_a_picture_are_what_a_layer_keeps(name: str, caption: str) -> None:
    method, options = LAYERS[name, caption]
    layer, kept = Alone(adapted(ah.method(method, **options))), benchmark("activations").kept
    few, many = (kept(layer, torch.randn(n, SIZES["k"], requires_grad=True)) for n in (64, 192))
    dots, out = draw.kept(PICTURES[name].flows[caption])
    assert out == "d"
    assert (many - few) / 4 / 128 == sum(SIZES[width] for width in dots)


@pytest.mark.parametrize(("name", "caption"), LAYERS)
def test_what_is_coloured_in_a_picture_is_what_is_trained(name: str, caption: str) -> None:
    method, options = LAYERS[name, caption]
    there = [tuple(p.shape) for p in adapted(ah.method(method, **options)).parameters() if p.requires_grad]
    drawn = [part for part in draw.parts(PICTURES[name].flows[caption]) if getattr(part, "kind", "") == draw.TRAINED]
    counts = [prod(SIZES[s] for s in ((p.out, p.into) if isinstance(p, draw.Matrix) else p.length)) for p in drawn]
    assert sorted(counts) == sorted(prod(shape) for shape in there)
    assert sum(counts) in [number(formula) for formula in overview("# Methods")[method][0].split(", or ")]


def number(formula: str) -> int:
    """What "r (d + k) + d" is."""
    return int(eval(re.sub(r"(\w) (?=[\w(])", r"\1 * ", formula), {}, SIZES))


def test_every_flow_is_measured() -> None:
    assert set(LAYERS) | ELSEWHERE == {
        (name, caption) for name, picture in PICTURES.items() for caption in picture.flows
    }
