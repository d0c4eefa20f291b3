"""The page of `adapter diff --html`: what is in it, and how real Chromium shows it."""

from __future__ import annotations

import re
import struct
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from browser import CHROMIUM, Browser

import adapterhub_lite as ah
from adapterhub_lite.cli.diff_page import page
from adapterhub_lite.cli.layers import Places

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from conftest import Done, Handmade

    Command = Callable[..., Done]

PHONE, DESKTOP = 390, 1280
LAYERS = {"net.layers.0.q": 2, "net.layers.0.k": 2, "net.conv": 3}
HOSTILE = [
    "layers.0.<script>alert(1)</script>",
    'layers.1."><img src=https://example.org/x onerror=alert(1)>',
    "layers.2.' onmouseover='alert(1)",
    "layers.3.&lt;b&gt;",
    "layers.4.</style></title><h1>",
    "layers.5." + "long" * 80,
]
CALLED = ["<script>alert(1)</script>", "\u202egnp\u0007\ud800", "\"'><b>"]  # a file's tensors cannot be: it is refused


def several(names: list[str]) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """In place of `net.layers.0.q`, modules with these names, each with other numbers."""
    return lambda tensors: {
        key.replace("net.layers.0.q", name): (t + n) for key, t in tensors.items() for n, name in enumerate(names)
    }


MODEL = [
    f"model.layers.{n}.{kind}"
    for n in range(12)
    for kind in ("mlp.down_proj", "mlp.gate_proj", "self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj")
]
EXPERTS = [f"model.layers.{n}.mlp.experts.{e}.w{w}" for n in range(2) for e in range(8) for w in (1, 2)]


@pytest.fixture(scope="module")
def pages(handmade: Handmade, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages by name, and the modules that each must show."""
    folder, made = tmp_path_factory.mktemp("pages"), {}
    for name, modules, count in (
        ("two", MODEL, 2),
        ("four", MODEL[:20], 4),
        ("wide", EXPERTS, 2),
        ("hostile", HOSTILE, 3),
    ):
        adapters = []
        for seed in range(count):
            # What one adapter lacks is a dash on the page.
            own = modules if seed == 0 or name == "hostile" else modules[:-1]
            made_in = folder / f"{name}{seed}" / "an adapter with a rather long name <b>&amp;"
            adapters.append(
                ah.load(handmade(made_in, {"net.layers.0.q": 3}, seed=seed, tensors=several(own), target_modules=own))
            )
        made[name] = folder / f"{name}.html"
        found = ah.diff(*adapters, signs=name == "two", names=CALLED if name == "hostile" else None)
        made[name].write_text(page(found), encoding="utf-8")
    return made


# What is in it ------------------------------------------------------------------------------------------


def test_it_is_one_file_without_scripts(pages: dict[str, Path]) -> None:
    for file in pages.values():
        text = file.read_text(encoding="utf-8")
        assert text.startswith("<!DOCTYPE html>")
        assert "default-src 'none'" in text
        assert not re.search(r"@import|url\(", text)
        tags = Tags()
        tags.feed(text)
        assert not tags.found.keys() & {"script", "iframe", "img", "object", "base", "form", "a"}
        assert tags.found["link"] == [{"rel": "icon", "href": "data:,"}]
        names = {name for own in tags.found.values() for attributes in own for name in attributes}
        assert not [name for name in names if name.startswith("on") or name in ("src", "action", "srcset")]


class Tags(HTMLParser):
    """Every tag and its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[dict[str, str | None]]] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.setdefault(tag, []).append(dict(attrs))


def test_the_numbers_of_a_module_are_on_it(pages: dict[str, Path], tmp_path: Path) -> None:
    folders = [next((pages["two"].parent / f"two{seed}").iterdir()) for seed in (0, 1)]
    found = ah.diff(*map(ah.load, folders), signs=True)
    text = pages["two"].read_text(encoding="utf-8")
    for name, module in found.modules.items():
        row = re.search(rf"<tr><th>{re.escape(name)}</th>(.*?)</tr>", text)
        assert row is not None
        cells = re.findall(r"<td>(.*?)</td>", row[1])
        pair = module.pairs[0, 1]
        assert cells[0] == f"{module.shape[0]}×{module.shape[1]}"
        assert cells[3] == ("-" if pair.cosine is None else f"{pair.cosine:.3f}".replace("-0.000", "0.000"))
        assert cells[-1] == ("-" if pair.conflicts is None else f"{100 * pair.conflicts:.1f} %")


def test_places_of_modules() -> None:
    places = Places.of(["h.0.attn.c", "h.10.attn.c", "h.2.mlp.0.up", "wte", "h.1", "²", "x.²"])
    assert places.rows == ["0", "2", "10"]
    assert places.at["h.2.mlp.0.up"] == ("2", "mlp.0.up")
    assert places.columns == ["attn.c", "mlp.0.up"]
    assert set(places.at) == {"h.0.attn.c", "h.10.attn.c", "h.2.mlp.0.up"}
    both = Places.of(["encoder.layers.0.q", "decoder.layers.0.q"])
    assert both.columns == ["decoder.layers.*.q", "encoder.layers.*.q"]
    assert Places.of([]) == Places([], [], {})


def test_layers_without_numbers_and_zeros_make_a_page_too(handmade: Handmade, tmp_path: Path) -> None:
    a, b = (handmade(tmp_path / name, {"net.conv": 2}, scale=0.0) for name in "ab")
    text = page(ah.diff(ah.load(a), ah.load(b)))
    assert "net.conv" in text
    assert "Layer by layer" not in text
    assert "nan" not in text.lower().replace("nanbyte", "")


# In Chromium --------------------------------------------------------------------------------------------

in_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="Chromium is not installed (on Debian: apt-get install chromium)"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("chromium") / "profile") as opened:
        yield opened


@in_chromium
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
@pytest.mark.parametrize("name", ["two", "four", "wide", "hostile"])
def test_nothing_sticks_out_and_nobody_complains(
    browser: Browser, pages: dict[str, Path], name: str, width: int, dark: bool
) -> None:
    found = browser.open(pages[name], width=width, dark=dark, ask="getComputedStyle(document.body).backgroundColor")
    assert "Adapters compared" in found.shown
    assert found.complaints == []
    assert found.requests == []
    assert found.width <= width
    paper = [int(x) for x in re.findall(r"\d+", found.answer)[:3]]
    assert (max(paper) < 60) if dark else (min(paper) > 240)
    assert found.screenshot[:8] == b"\x89PNG\r\n\x1a\n"
    across, down = struct.unpack(">II", found.screenshot[16:24])
    assert across == width
    assert down > 1000
    assert len(found.screenshot) > 20_000  # of one colour, it would be a tenth of that


@in_chromium
@pytest.mark.parametrize(("name", "modules"), [("two", MODEL), ("four", MODEL[:20]), ("wide", EXPERTS)])
def test_all_modules_are_there(browser: Browser, pages: dict[str, Path], name: str, modules: list[str]) -> None:
    ask = "[...document.querySelectorAll('.list tbody th')].map(cell => cell.textContent)"
    found = browser.open(pages[name], width=DESKTOP, ask=ask, shot=False)
    assert found.answer == modules
    cells = browser.open(pages[name], width=PHONE, ask=COLOURED, shot=False).answer
    assert {title.partition(": ")[0] for title in cells} >= set(modules)
    assert len(set(cells.values())) > 3  # colours


COLOURED = """Object.fromEntries([...document.querySelectorAll('.map td[title]')].map(
    cell => [cell.title, getComputedStyle(cell).backgroundColor]))"""


@in_chromium
def test_hostile_names_are_text(browser: Browser, pages: dict[str, Path]) -> None:
    ask = """({names: [...document.querySelectorAll('.list tbody th')].map(cell => cell.textContent),
              cards: [...document.querySelectorAll('.card h3')].map(title => title.textContent),
              foreign: document.querySelectorAll('script, img, [onerror], [onmouseover], b b').length,
              headings: document.querySelectorAll('h1').length, title: document.title})"""
    answer = browser.open(pages["hostile"], width=PHONE, ask=ask, shot=False).answer
    assert (answer["foreign"], answer["headings"], answer["title"]) == (0, 1, "Adapters compared")
    for name in HOSTILE[:5]:
        assert name in answer["names"]
    for name in (CALLED[0], "\\u202egnp\\x07\\ud800", CALLED[2]):
        assert name in answer["cards"]


@in_chromium
def test_text_is_told_from_its_cell(browser: Browser, pages: dict[str, Path]) -> None:
    """The contrast of every number of a heat map is at least 3 : 1, in the light and in the dark."""
    for dark in (False, True):
        worst = browser.open(pages["two"], width=DESKTOP, dark=dark, ask=CONTRAST, shot=False).answer
        assert worst["cells"] > 100
        assert worst["contrast"] >= 3.0


CONTRAST = """(() => {
    const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
    const light = colour => {
        canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
        const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3)
            .map(x => x / 255).map(x => x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4);
        return .2126 * r + .7152 * g + .0722 * b;
    };
    let contrast = 21, cells = 0;
    for (const cell of document.querySelectorAll('.map td.c')) {
        const style = getComputedStyle(cell);
        const [a, b] = [light(style.color), light(style.backgroundColor)].sort((x, y) => y - x);
        contrast = Math.min(contrast, (a + .05) / (b + .05)); cells++;
    }
    return {contrast, cells};
})()"""


@in_chromium
def test_the_browser_sees_what_is_wrong(browser: Browser, tmp_path: Path) -> None:
    file = tmp_path / "wrong.html"
    file.write_text(
        "<!DOCTYPE html><meta name=viewport content='width=device-width'><p style='width:900px'>wide</p>"
        "<img src='beside.png'><script>console.error('one'); undefined.two</script>"
    )
    found = browser.open(file, width=PHONE)
    assert found.width >= 900
    assert any("one" in complaint for complaint in found.complaints)
    assert any("two" in complaint for complaint in found.complaints)
    assert [Path(url).name for url in found.requests] == ["beside.png"]


@in_chromium
def test_it_prints(browser: Browser, pages: dict[str, Path]) -> None:
    for name, fewest in (("two", 2), ("four", 2)):
        pdf = browser.open(pages[name], width=DESKTOP, dark=True, print_it=True, shot=False).pdf
        assert pdf.startswith(b"%PDF-")
        assert len(re.findall(rb"/Type\s*/Page\b", pdf)) >= fewest


@in_chromium
def test_the_command_writes_the_same_page(
    browser: Browser, adapter: Command, handmade: Handmade, tmp_path: Path
) -> None:
    a, b = (handmade(tmp_path / name, LAYERS, seed=seed) for seed, name in enumerate("ab"))
    file = tmp_path / "page.html"
    assert adapter("diff", a, b, "--html", file, "-q").code == 0
    assert file.read_text(encoding="utf-8") == page(ah.diff(ah.load(a), ah.load(b)))
    assert "net.conv" in browser.open(file, width=PHONE, shot=False).shown
