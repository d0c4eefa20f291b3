"""The code is as docs/architecture.md draws it; the drawing is read from there."""

from __future__ import annotations

import ast
import functools
import graphlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from adapterhub_lite.registry import registry

ROOT = Path(__file__).parents[1]
CORE, BUNDLED, EXAMPLE = "adapterhub_lite", "adapterhub_lite_plugins", "adapterhub_lite_example"
MODULES = {
    ".".join(file.relative_to(base).with_suffix("").parts).removesuffix(".__init__"): file
    for base, pattern in (
        (ROOT, f"{CORE}/**/*.py"),
        (ROOT / "plugins", f"{BUNDLED}/**/*.py"),
        (ROOT / "plugins/adapterhub-lite-example", f"{EXAMPLE}.py"),
    )
    for file in base.glob(pattern)
}
OURS = [name for name in MODULES if name.split(".")[0] == CORE]
PLUGINS = [name for name in MODULES if name.split(".")[0] != CORE]


class Import(NamedTuple):
    target: str  # a module
    names: tuple[str, ...]  # what is taken from it; () for the whole
    at_top: bool  # when the importing module is imported, not when a function is called


@functools.cache
def imports(module: str) -> tuple[Import, ...]:
    """All imports of a module but those for type checkers."""
    return tuple(_imports(ast.parse(MODULES[module].read_text()), module, at_top=True))


def _imports(node: ast.AST, module: str, *, at_top: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, (), at_top) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield from _from(child, module, at_top)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield from _imports(ast.Module([other], []), module, at_top=at_top)
        else:
            function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from _imports(child, module, at_top=at_top and not function)


def _from(node: ast.ImportFrom, module: str, at_top: bool) -> Iterator[Import]:
    base = node.module or ""
    if node.level:
        package = module.split(".") if MODULES[module].name == "__init__.py" else module.split(".")[:-1]
        base = ".".join([*package[: len(package) - node.level + 1], base]).rstrip(".")
    names = [alias.name for alias in node.names]
    modules = [name for name in names if f"{base}.{name}" in MODULES]
    yield from (Import(f"{base}.{name}", (), at_top) for name in modules)
    if rest := tuple(name for name in names if name not in modules):
        yield Import(base, rest, at_top)


# The drawing --------------------------------------------------------------------------------------------


def drawing() -> tuple[dict[str, int], set[str]]:
    """Each name of the drawing with its height, and those that are marked with a star."""
    found = re.search(r"^```layers\n(.*?)^```$", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None
    lines = [line.split("│")[0].split() for line in found[1].splitlines() if "│" in line]
    names = [name.rstrip("*") for line in lines for name in line]
    assert len(set(names)) == len(names), "a name is drawn twice"
    height = {name.rstrip("*"): -i for i, line in enumerate(lines) for name in line}
    return height, {name.rstrip("*") for line in lines for name in line if name.endswith("*")}


HEIGHT, STARRED = drawing()


def drawn(module: str) -> str:
    """The name in the drawing that stands for a module of the core."""
    own = module.removeprefix(CORE).removeprefix(".")
    while own not in HEIGHT and "." in own:
        own = own.rpartition(".")[0]
    return own or CORE


def inner(module: str) -> Iterator[Import]:
    return (i for i in imports(module) if i.target.split(".")[0] == CORE)


def test_every_module_is_drawn_and_everything_drawn_is_there() -> None:
    assert {drawn(module) for module in OURS} == HEIGHT.keys()


@pytest.mark.parametrize("module", OURS)
def test_imports_go_down(module: str) -> None:
    for target in (i.target for i in inner(module)):
        here, there = drawn(module), drawn(target)
        assert here == there or HEIGHT[there] < HEIGHT[here], f"{module} imports {target}, which is not below it"


def test_there_are_no_cycles() -> None:
    # Imports inside of a package are not drawn. An import of the public names leads to no module by itself.
    graph = {m: {i.target for i in inner(m) if i.target not in (m, CORE) and i.at_top} for m in OURS}
    list(graphlib.TopologicalSorter(graph).static_order())


@functools.cache
def loads_torch(module: str) -> bool:
    """Whether torch is imported when the module itself is, by it or by what it imports; its package is not counted."""
    top = {i.target for i in imports(module) if i.at_top} - {module}
    return any(loads_torch(t) if t in MODULES else t.split(".")[0] == "torch" for t in top)


def test_a_star_means_torch() -> None:
    assert {drawn(module) for module in OURS if loads_torch(module)} == STARRED


@pytest.mark.parametrize("module", PLUGINS)
def test_plugins_with_methods_and_formats_do_not_import_torch_at_the_top(module: str) -> None:
    assert not loads_torch(module)


# Plugins and the core -----------------------------------------------------------------------------------


@pytest.mark.parametrize("module", PLUGINS)
def test_plugins_import_the_core_and_torch_only(module: str) -> None:
    for target, names, _ in imports(module):
        if target.startswith(f"{BUNDLED}.methods."):  # a method that is another with a rule changed
            bases = [name for name in names if f"({name}):" in MODULES[module].read_text()]
            assert names == tuple(bases) != (), f"{module} imports {names} of {target} for more than a subclass"
            continue
        if target.startswith(".".join(module.split(".")[:3]) + "."):  # a plugin that is a folder
            continue
        assert target.split(".")[0] in {CORE, "torch", *sys.stdlib_module_names}, f"{module} imports {target}"
        private = [name for name in (*target.split("."), *names) if name.startswith("_") and name != "__future__"]
        assert not private, f"{module} imports {private} of {target}"


@pytest.mark.parametrize("module", OURS)
def test_the_core_knows_no_plugin(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text())
    assert not any(i.target.split(".")[0] in (BUNDLED, EXAMPLE) for i in imports(module))
    assert not any(text.startswith((BUNDLED, EXAMPLE)) for text in strings(tree))


def compared(tree: ast.AST) -> Iterator[str]:
    """Strings that something is compared with: ==, in, match, startswith and the like."""
    for node in ast.walk(tree):
        parts: list[ast.AST] = []
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            parts = [node.value]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith((".startswith", ".endswith")):
            parts = [*node.args]
        yield from (text for part in parts for text in strings(part))


def strings(tree: ast.AST) -> list[str]:
    return [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def test_the_core_compares_nothing_with_the_name_of_a_method() -> None:
    methods = registry().methods()
    names = {*methods, *(cls.__name__.lower() for cls in methods.values())}
    names |= {"dora", "ia3", "vera", "loha", "lokr", "adalora", "lora_xs"}  # people will come to know these too
    for module in OURS:
        tree = ast.parse(MODULES[module].read_text())
        assert not {text for text in compared(tree) if text.lower().strip("._") in names}, module


def test_no_file_is_a_drawer_for_everything() -> None:
    drawers = {"utils", "util", "helpers", "helper", "common", "manager", "misc"}
    everything = [*ROOT.glob(f"{CORE}/**/*"), *ROOT.glob("plugins/**/*"), *ROOT.glob("tests/**/*")]
    assert not [file for file in everything if file.stem in drawers]


# The test of the tests -----------------------------------------------------------------------------------


def test_what_is_compared_is_seen() -> None:
    source = 'a == "x"\nb in ("y", "z")\nc.startswith("w")\nmatch d:\n    case "v": pass\ne = "u"'
    assert sorted(compared(ast.parse(source))) == ["v", "w", "x", "y", "z"]


def test_imports_are_seen_where_they_are() -> None:
    tree = ast.parse("from . import errors\nfrom .site import Site\ndef f():\n    from . import algebra, __version__")
    found = sorted(_imports(tree, CORE, at_top=True))
    assert found == [
        (CORE, ("__version__",), False),
        (f"{CORE}.algebra", (), False),
        (f"{CORE}.errors", (), True),
        (f"{CORE}.site", ("Site",), True),
    ]
