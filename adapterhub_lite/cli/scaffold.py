"""`adapter plugin new`: a plugin package with a method that works, to be changed into another."""

from __future__ import annotations

import importlib.util
import re
from contextlib import suppress
from pathlib import Path
from string import Template

import click

import adapterhub_lite as ah

from ..errors import ConfigError, OutputExists, PluginError
from ..registry import registry
from ..staging import staged

NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
# A class of such a name would hide one that the package needs.
RESERVED = {*ah.__all__, "Mapping", "None", "True", "False"}

PYPROJECT = Template("""\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "$distribution"
version = "0.1.0"
description = "The adapter method $name, a plugin of adapterhub-lite"
readme = "README.md"
requires-python = ">=3.10"
dependencies = ["adapterhub-lite"]

[project.optional-dependencies]
test = ["pytest>=8"]

[project.entry-points.adapterhub_lite]
$name = "$module"

[tool.setuptools]
py-modules = ["$module"]

[tool.pytest.ini_options]
testpaths = ["tests"]
""")

MODULE = Template('''\
"""$cls: what it does, in one line.

    h = W x + s · B A x,   s = α / r        Hu et al. 2021, §4.1

This is LoRA, as a start: change the formula, the paper, and the rules that compute it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapterhub_lite import ConfigError, LowRank, Method, Outline, Params, Site, hookimpl

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class $cls(Method):
    """A low-rank matrix added to a frozen weight (https://arxiv.org/abs/2106.09685).

    Options: `rank` r and `alpha` α, which give the scaling s = α / r.
    """

    name = "$name"
    paper = "https://arxiv.org/abs/2106.09685"
    site_kinds = frozenset({"linear", "transposed_linear"})

    rank: int = 8
    alpha: float = 8

    def check(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"rank {self.rank} is not positive", where=self.name, fix="give a rank >= 1")

    def init(self, site: Site, rng: torch.Generator) -> Mapping[str, nn.Parameter | Tensor]:
        import torch  # not at the top: listing the methods stays fast
        from torch import nn

        out, into = site.shape
        A = torch.randn(self.rank, into, generator=rng) / into**0.5  # (r, in)
        B = torch.zeros(out, self.rank)  # (out, r); zero, so that training begins at the base model
        return {"A": nn.Parameter(A), "B": nn.Parameter(B)}

    def delta(self, p: Params, site: Site) -> LowRank:
        return LowRank(p["B"], p["A"], scale=self.alpha / self.rank)

    def outline(self, shapes: Mapping[str, tuple[int, ...]]) -> Outline:
        return Outline(rank=shapes["A"][0], scale=self.alpha / self.rank)


@hookimpl
def methods() -> list[type[Method]]:
    return [$cls]
''')

TEST = Template('''\
"""$name keeps the promises that every adapter method makes."""

from __future__ import annotations

from collections.abc import Callable

from adapterhub_lite import Method
from adapterhub_lite.testing import parametrize_checks
from $module import $cls


@parametrize_checks($cls(), $cls(rank=3))
def test_conforms(method: Method, check: Callable[[Method], object]) -> None:
    check(method)
''')

README = Template("""\
# $distribution

The adapter method `$name`, a plugin of adapterhub-lite.

```console
$$ pip install -e '.[test]'
$$ adapter methods
$$ adapter plugin check $name
$$ pytest
```
""")


def scaffold(name: str, folder: Path) -> list[Path]:
    """Write the package `adapterhub-lite-NAME` into `folder`, whole or not at all; the files, the module first.

    Raises `ConfigError` for a name that cannot be one or is taken, `OutputExists` if the package's folder is there.
    """
    plugin = name.replace("-", "_")
    cls = "".join(word.capitalize() for word in plugin.split("_"))
    distribution, module = f"adapterhub-lite-{plugin.replace('_', '-')}", f"adapterhub_lite_{plugin}"
    _check_name(name, plugin, cls)
    out = folder / distribution
    if out.exists():
        raise OutputExists("there is such a folder already", where=out, fix="choose another name, or -o elsewhere")
    _check_free(plugin, module)
    words = {"name": plugin, "cls": cls, "distribution": distribution, "module": module}
    files = {
        f"{module}.py": MODULE,
        f"tests/test_{plugin}.py": TEST,
        "pyproject.toml": PYPROJECT,
        "README.md": README,
    }
    with staged(out, replaceable=lambda _: False) as temp:
        (temp / "tests").mkdir()
        for path, template in files.items():
            (temp / path).write_text(template.substitute(words), encoding="utf-8")
    return [out / path for path in files]


def _check_name(name: str, plugin: str, cls: str) -> None:
    if not NAME.fullmatch(plugin):
        better = "_".join(re.findall(r"[a-z][a-z0-9]*|[0-9]+", name.lower()))
        near = f", say {better!r}" if NAME.fullmatch(better) else ""
        raise ConfigError(
            f"{name!r} is no name for a method", fix=f"use lower-case words and digits, joined by - or _{near}"
        )
    if cls in RESERVED:
        raise ConfigError(f"a method {plugin!r} would be the class {cls}, which means something else", fix="add a word")


def _check_free(plugin: str, module: str) -> None:
    with suppress(PluginError):  # two others that clash are no reason not to write a third
        registry().methods()
    for other in registry().plugins():
        if plugin == other.name or f"method {plugin}" in other.gives:
            raise ConfigError(f"the name {plugin!r} is taken, by {other.origin}", fix="choose another")
    if importlib.util.find_spec(module) is not None:
        raise ConfigError(f"there is a module {module!r} already", fix="choose another name")


@click.command()
@click.argument("name")
@click.option(
    "-o", "--out", "folder", default=".", type=click.Path(path_type=Path), help="Where to put it. Default: here."
)
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
def new(name: str, folder: Path, quiet: bool) -> None:
    """Write the package of a plugin with a method NAME.

    It has one module with a low-rank method that works, to be changed into yours, a test that runs the conformance
    checks, and an entry point. docs/tutorial.md goes on from there.
    """
    module, *others = scaffold(name, folder)
    if quiet:
        return
    package, plugin = module.parent, module.stem.removeprefix("adapterhub_lite_")
    click.echo(f"wrote {package}: {', '.join(str(file.relative_to(package)) for file in (module, *others))}")
    click.echo(f"next: pip install -e {package} && adapter plugin check {plugin}")
