"""Discovery: what is imported when, what a broken plugin costs, and who owns a name."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import click
import pytest

from adapterhub_lite import hookspecs, registry
from adapterhub_lite.errors import AdapterError, FileError, PluginError, UnknownName
from adapterhub_lite.registry import DISABLE, Plugin, Registry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HOOK = "from adapterhub_lite.hookspecs import hookimpl\n"


def gives_methods(*names: str) -> str:
    classes = "".join(f"class C{i}:\n    name = {name!r}\n" for i, name in enumerate(names))
    given = ", ".join(f"C{i}" for i in range(len(names)))
    return f"{HOOK}{classes}@hookimpl\ndef methods():\n    return [{given}]\n"


def gives_formats(*names: str) -> str:
    return (
        f"{HOOK}class F:\n    def __init__(self, name): self.name = name\n"
        f"@hookimpl\ndef formats():\n    return [F(n) for n in {names!r}]\n"
    )


def gives_sites(*kinds: str) -> str:
    return f"{HOOK}@hookimpl\ndef site_kinds():\n    return [type(k, (), {{'kind': k}}) for k in {kinds!r}]\n"


def gives_rules(*names: str) -> str:
    return f"{HOOK}@hookimpl\ndef rules():\n    return [type(n, (), {{'name': n}}) for n in {names!r}]\n"


def gives_commands(*names: str) -> str:
    return f"{HOOK}import click\n@hookimpl\ndef commands():\n    return [click.Command(n) for n in {names!r}]\n"


class SitePackages:
    """A stand-in for site-packages: real dist-info folders, and modules that log their import."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.log, self._monkeypatch = root, root / "imports.log", monkeypatch
        self.prefix = f"fake{abs(hash(root))}_"  # one test's modules must not meet another's in sys.modules
        self.path(root / "site")

    def path(self, folder: Path) -> Path:
        folder.mkdir(exist_ok=True)
        self._monkeypatch.syspath_prepend(str(folder))
        return folder

    def later(self, folder: Path) -> Path:
        """Another such folder, at the end of the path."""
        folder.mkdir()
        self._monkeypatch.setattr(sys, "path", [*sys.path, str(folder)])
        return folder

    def logged(self, name: str, source: str) -> str:
        source = textwrap.dedent(source)
        return f"with open({str(self.log)!r}, 'a') as log: log.write({name + chr(10)!r})\n{source}"

    def module(self, name: str, source: str) -> str:
        """Write a module; its real name."""
        (self.root / "site" / f"{self.prefix}{name}.py").write_text(self.logged(name, source))
        return self.prefix + name

    def install(
        self, dist: str, entry_points: dict[str, str], *, version: str = "1.0", site: Path | None = None
    ) -> None:
        """A distribution whose entry points lead to modules."""
        info = (site or self.root / "site") / f"{dist.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: {version}\n")
        lines = [f"{name} = {module}" for name, module in entry_points.items()]
        (info / "entry_points.txt").write_text("\n".join(["[adapterhub_lite]", *lines, ""]))

    def plugin(self, name: str, source: str, *, dist: str | None = None) -> None:
        """A distribution with one plugin."""
        dist = dist or f"dist-{name.replace('.', '-')}"
        self.install(dist, {name: self.module(f"{dist}_{name}".replace(".", "_").replace("-", "_"), source)})

    @property
    def imported(self) -> list[str]:
        return self.log.read_text().split() if self.log.exists() else []


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SitePackages]:
    monkeypatch.delenv(DISABLE, raising=False)
    before = set(sys.modules)
    site = SitePackages(tmp_path, monkeypatch)
    # Plugins of this environment are hidden by empty distributions of their name, earlier on the path.
    for dist in {entry.dist.name for entry in metadata.entry_points(group=registry.GROUP) if entry.dist}:
        site.install(dist, {}, version="0")
    yield site
    for name in set(sys.modules) - before:
        if name.startswith(("fake", "_adapterhub_lite_plugin_")):
            del sys.modules[name]


def reported(found: Registry, name: str) -> Plugin:
    (plugin,) = [p for p in found.plugins() if p.name == name]
    return plugin


def refused(call: Callable[[], object], kind: type[AdapterError] = PluginError) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    text = str(caught.value)
    assert text.isprintable()
    return text


# Laziness


def test_a_method_is_found_by_importing_the_plugin_of_its_name_only(site: SitePackages) -> None:
    for name in ("lora", "vera", "dora"):
        site.plugin(name, gives_methods(name))
    found = Registry()
    assert site.imported == []
    method = found.method("vera")
    assert method.name == "vera"
    assert site.imported == ["dist_vera_vera"]
    assert found.method("vera") is method
    states = {p.name: p.state for p in found.plugins()}
    assert states == {"dora": "not loaded", "lora": "not loaded", "vera": "ok"}
    assert site.imported == ["dist_vera_vera"]  # reporting imports nothing


def test_a_method_of_another_name_than_its_plugin_is_found_by_importing_the_rest(site: SitePackages) -> None:
    site.plugin("pack", gives_methods("one", "two"))
    site.plugin("lora", gives_methods("lora"))
    site.plugin("one", gives_methods("other"))  # has the name, gives something else
    found = Registry()
    assert found.method("one").name == "one"
    assert sorted(site.imported) == ["dist_lora_lora", "dist_one_one", "dist_pack_pack"]
    assert list(found.methods()) == ["lora", "one", "other", "two"]
    assert len(site.imported) == 3


@pytest.mark.parametrize(
    ("ask", "wanted"),
    [
        (Registry.methods, {"any"}),
        (Registry.formats, {"any", "format_f"}),
        (Registry.site_kinds, {"any", "site_s"}),
        (Registry.commands, set()),
        (Registry.plugins, set()),
        (lambda found: found.format("f"), {"format_f"}),
        (lambda found: found.rule("r"), {"rule_r"}),
        (Registry.rules, {"any", "rule_r"}),
        (lambda found: found.router("q"), {"router_q"}),
        (Registry.routers, {"any", "router_q"}),
        (lambda found: found.commands()["c"](), {"command_c"}),
    ],
)
def test_a_prefix_keeps_a_plugin_from_being_imported_for_anything_else(
    site: SitePackages, ask: Callable[[Registry], object], wanted: set[str]
) -> None:
    modules = {
        "any": gives_methods("m"),
        "format.f": gives_formats("f"),
        "site.s": gives_sites("s"),
        "command.c": gives_commands("c"),
        "rule.r": gives_rules("r"),
        "router.q": gives_rules("q").replace("rules", "routers"),
    }
    site.install("all", {n: site.module(n.replace(".", "_"), source) for n, source in modules.items()})
    ask(Registry())
    assert set(site.imported) == wanted


def test_each_hook_is_called_once(site: SitePackages) -> None:
    source = gives_methods("m") + gives_formats("f") + gives_sites("s")
    count = f"    with open({str(site.log)!r}, 'a') as log: log.write('call ')\n    return"
    site.plugin("any", source.replace("    return", count))
    found = Registry()
    for _ in range(2):
        found.methods(), found.formats(), found.site_kinds(), found.method("m"), found.format("f")
    assert site.imported == ["dist_any_any", "call", "call", "call"]
    assert reported(found, "any").gives == ("method m", "format f", "site kind s")
    assert found.format("f") is found.formats()["f"]


def test_nothing_happens_at_import_and_torch_stays_out(site: SitePackages) -> None:
    code = """
        import sys
        import adapterhub_lite.registry as r, adapterhub_lite.hookspecs
        assert r._process is None
        assert "importlib.metadata" not in sys.modules and "click" not in sys.modules
        found = r.registry()
        found.commands(), found.plugins()
        assert "torch" not in sys.modules and "click" not in sys.modules
    """
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, env=env)


def test_finding_hundreds_of_entry_points_is_quick(site: SitePackages) -> None:
    for n in range(100):
        site.install(f"many-{n}", {f"p{n}.{i}": "gone" for i in range(5)})
    start = time.process_time()
    Registry().commands()
    assert time.process_time() - start < 0.5  # 10 ms where this was written; a quadratic search takes seconds


def test_threads_racing_for_the_first_lookup_import_once_and_agree(site: SitePackages) -> None:
    site.plugin("slow", "import time; time.sleep(0.1)\n" + gives_methods("slow"))
    registry.reset()
    barrier, got = threading.Barrier(8), []

    def look() -> None:
        barrier.wait()
        found = registry.registry()
        got.append((found, found.method("slow"), found.methods()["slow"]))

    threads = [threading.Thread(target=look) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    registry.reset()
    assert len(got) == 8
    assert len(set(map(repr, got))) == 1
    assert len({id(part) for parts in got for part in parts[:2]}) == 2
    assert site.imported == ["dist_slow_slow"]


def test_a_plugin_may_look_up_another_while_it_is_imported(site: SitePackages) -> None:
    site.plugin("base", gives_methods("base"))
    look = "from adapterhub_lite.registry import registry\nBase = registry().method('base')\n"
    many = "assert 'derived' not in registry().methods()\n"  # comes back to a plugin that is half imported
    site.plugin(
        "derived",
        look + many + f"{HOOK}class D(Base):\n    name = 'derived'\n@hookimpl\ndef methods(): return [D]\n",
    )
    registry.reset()
    found = registry.registry()
    derived = found.method("derived")
    assert found.method("base") in derived.__mro__
    assert sorted(found.methods()) == ["base", "derived"]
    registry.reset()


# Isolation

BROKEN = {
    "import": (
        "import a_module_that_is_not_there",
        "ModuleNotFoundError: No module named 'a_module_that_is_not_there'",
    ),
    "raise": ("raise ValueError('two\\nlines \\x1b[31m')", "ValueError: two lines \\x1b[31m"),
    "exit": ("raise SystemExit(3)", "SystemExit: 3"),
    "syntax": ("def f(:\n", "SyntaxError"),
    "unprintable": (
        "class E(Exception):\n    def __str__(self): raise RuntimeError\nraise E",
        "E: its text cannot be shown",
    ),
    "no hook": (
        "def methods(): return []",
        "no function decorated with @hookimpl and named methods or formats",
    ),
    "hook raises": (HOOK + "@hookimpl\ndef methods(): 1 / 0", "ZeroDivisionError: division by zero"),
    "hook raises late": (HOOK + "@hookimpl\ndef methods():\n    yield 1 / 0", "ZeroDivisionError"),
    "hook exits": (HOOK + "@hookimpl\ndef methods(): raise SystemExit", "SystemExit ("),
    "none": (HOOK + "@hookimpl\ndef methods(): pass", "methods() returned None, not an iterable"),
    "not a list": (HOOK + "@hookimpl\ndef methods(): return 5", "methods() returned a int, not an iterable"),
    "one class": (
        HOOK + "@hookimpl\ndef methods(): return int",
        "methods() returned the class int, not an iterable",
    ),
    "string": (HOOK + "@hookimpl\ndef methods(): return 'bad'", "methods() gave a str, not a class"),
    "instance": (
        HOOK + "class C:\n    name = 'bad'\n@hookimpl\ndef methods(): return [C()]",
        "methods() gave a C, not a class",
    ),
    "no name": (
        HOOK + "class C: pass\n@hookimpl\ndef methods(): return [C]",
        "methods() gave the class C, whose 'name' is no usable name",
    ),
    "odd name": (gives_methods("a\nb"), "whose 'name' is no usable name"),
    "name twice": (gives_methods("x", "x"), "methods() gave two named 'x'"),
    "misspelt": (HOOK + "@hookimpl\ndef method(): return []", "no hook 'method'; did you mean 'methods'"),
    "misspelt beside a right one": (
        gives_methods("bad") + "@hookimpl\ndef fromats(): return []",
        "there is no hook 'fromats'; did you mean 'formats'?",
    ),
    "argument": (
        HOOK + "@hookimpl\ndef methods(config): return []",
        "{'config'} are declared in the hookimpl",
    ),
    "wrapper": (
        HOOK + "@hookimpl(wrapper=True)\ndef methods():\n    return (yield)",
        "methods() is a hook wrapper",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("where", ["installed", "folder"])
def test_a_broken_plugin_is_reported_and_the_others_work(site: SitePackages, case: str, where: str) -> None:
    source, message = BROKEN[case]
    for good in ("aaa", "zzz"):  # found before it and after it
        site.plugin(good, gives_methods(good))
    folders = []
    if where == "installed":
        site.plugin("bad", source)
    else:
        folders.append(site.root / "plugins")
        folders[0].mkdir()
        (folders[0] / "bad.py").write_text(site.logged("bad", source))
    found = Registry(plugins_dirs=folders)
    text = refused(lambda: found.method("bad"))
    assert "plugin 'bad' (" in text
    assert message in text
    assert f"{DISABLE}=bad" in text
    assert list(found.methods()) == ["aaa", "zzz"]
    assert found.method("aaa").name == "aaa"
    assert {p.name: p.state for p in found.plugins()} == {"aaa": "ok", "bad": "broken", "zzz": "ok"}
    report = reported(found, "bad")
    assert message in report.error
    assert report.error.isprintable()
    assert report.gives == ()


def test_a_broken_hook_costs_what_it_gives_and_nothing_else(site: SitePackages) -> None:
    source = gives_methods("m") + "@hookimpl\ndef formats(): raise OSError('no disk')\n"
    site.plugin("half", source)
    for order in ((Registry.methods, Registry.formats), (Registry.formats, Registry.methods)):
        found = Registry()
        given = [ask(found) for ask in order]
        assert sorted(map(list, given)) == [[], ["m"]]
        report = reported(found, "half")
        assert (report.state, report.gives) == ("broken", ("method m",))
        assert report.error.startswith("OSError: no disk (")
    assert "no disk" in refused(lambda: found.format("peft"))


def test_the_error_tells_the_line_in_the_plugin(site: SitePackages) -> None:
    site.plugin("bad", "x = 1\n\nraise ValueError('here')\n")
    site.plugin("worse", "x = 1\ndef f(:\n")
    found = Registry()
    assert ".py:4)" in refused(lambda: found.method("bad"))  # the first line logs the import
    assert "dist_bad_bad.py" in reported(found, "bad").error
    assert ".py:3)" in refused(lambda: found.method("worse"))


def test_a_failed_import_is_not_tried_again(site: SitePackages) -> None:
    site.plugin("bad", "raise ValueError")
    found = Registry()
    found.methods(), found.formats(), found.site_kinds()
    assert site.imported == ["dist_bad_bad"]


@pytest.mark.parametrize("source", ["raise KeyboardInterrupt", gives_methods("m") + "    # hook"])
def test_an_interrupt_passes_and_leaves_the_plugin_untried(site: SitePackages, source: str) -> None:
    flag = site.root / "go on"
    interrupt = f"import pathlib\nif not pathlib.Path({str(flag)!r}).exists(): raise KeyboardInterrupt\n"
    if source.endswith("# hook"):
        source = source.replace("    return", textwrap.indent(interrupt, "    ") + "    return")
    else:
        source = interrupt + gives_methods("m")
    site.plugin("m", source)
    found = Registry()
    with pytest.raises(KeyboardInterrupt):
        found.method("m")
    assert reported(found, "m").state == "not loaded"
    flag.touch()
    assert found.method("m").name == "m"


def test_an_entry_point_must_lead_to_a_module(site: SitePackages) -> None:
    module = site.module("mod", gives_methods("m") + "class Plugin: pass\n")
    site.install("d", {"cls": f"{module}:Plugin", "gone": "fake_gone", "attr": f"{module}:gone", "odd": ":::"})
    found = Registry()
    assert found.methods() == {}
    errors = {p.name: p.error for p in found.plugins()}
    assert errors["cls"] == "the entry point names a type, not a module"
    assert errors["gone"] == "ModuleNotFoundError: No module named 'fake_gone'"
    assert "AttributeError" in errors["attr"]
    assert errors["odd"]


def test_a_prefix_without_its_hook_is_an_error(site: SitePackages) -> None:
    site.plugin("format.f", gives_methods("m"))
    site.plugin("site.s", gives_formats("f"))
    site.plugin("hello", gives_commands("hello"))  # a command wants the prefix
    found = Registry()
    assert (found.formats(), found.site_kinds(), found.methods(), found.commands()) == ({}, {}, {}, {})
    errors = [p.error.removeprefix("it has no function decorated with @hookimpl and named ") for p in found.plugins()]
    assert errors == ["formats", "methods or formats or site_kinds or rules or routers", "site_kinds"]


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        (
            "format.f",
            HOOK + "@hookimpl\ndef formats(): return [object()]",
            "gave a object, whose 'name' is no",
        ),
        ("site.s", HOOK + "@hookimpl\ndef site_kinds(): return [object()]", "gave a object, not a class"),
        (
            "site.s",
            gives_sites("s").replace("'kind'", "'name'"),
            "the class s, whose 'kind' is no usable name",
        ),
        ("site.s", HOOK + "@hookimpl\ndef site_kinds(model): return []", "Argument(s) {'model'}"),
    ],
)
def test_formats_and_site_kinds_are_checked(site: SitePackages, name: str, source: str, message: str) -> None:
    site.plugin(name, source)
    site.plugin("any", gives_formats("ff") + gives_sites("ss"))
    found = Registry()
    assert list(found.formats()) == ["ff"]
    assert list(found.site_kinds()) == ["ss"]
    assert message in reported(found, name).error


@pytest.mark.parametrize("text", [b"[adapterhub_lite]\nno equals sign\n", b"[adapterhub_lite]\nx = \xff\n"])
def test_an_unreadable_entry_points_file_costs_its_distribution_only(site: SitePackages, text: bytes) -> None:
    site.plugin("good", gives_methods("good"))
    site.plugin("dup", gives_methods("dup"))
    site.install("dist-dup", {"dup": "gone"}, version="2.0", site=site.later(site.root / "later"))
    site.install("bad", {})
    (site.root / "site/bad-1.0.dist-info/entry_points.txt").write_bytes(text)
    with pytest.raises((TypeError, ValueError)):  # or else the test shows nothing
        metadata.entry_points(group=registry.GROUP)
    found = Registry()
    assert list(found.methods()) == ["dup", "good"]
    assert reported(found, "dup").origin == "dist-dup 1.0"


# Names


def test_an_unknown_name_comes_with_the_nearest(site: SitePackages) -> None:
    site.plugin("lora", gives_methods("lora"))
    site.plugin("format.peft", gives_formats("peft"))
    found = Registry()
    text = refused(lambda: found.method("lroa"), UnknownName)
    assert "'lroa'" in text
    assert "did you mean 'lora'?" in text
    assert "pip install the plugin that gives it" in text
    text = refused(lambda: found.format("petf"), UnknownName)
    assert "did you mean 'peft'?" in text
    assert "pip" not in text
    assert refused(lambda: found.method("\x1b[2J\n"), UnknownName)


def test_a_name_that_a_broken_plugin_of_another_name_may_give_is_not_called_unknown(
    site: SitePackages,
) -> None:
    site.plugin("lora", gives_methods("lora"))
    site.plugin("pack", "raise ValueError('inside the pack')")
    found = Registry()
    text = refused(lambda: found.method("lora2"))
    assert "plugin 'pack' (dist-pack 1.0)" in text
    assert "inside the pack" in text
    assert "did you mean 'lora'?" in text
    assert found.method("lora").name == "lora"


def test_a_broken_plugin_does_not_hide_another_that_gives_its_name(site: SitePackages) -> None:
    site.plugin("vera", "raise ValueError")
    site.plugin("pack", gives_methods("vera"))
    assert Registry().method("vera").name == "vera"


def test_two_plugins_that_give_one_method_are_both_named(site: SitePackages) -> None:
    site.plugin("pack", gives_methods("lora", "mine"))
    site.plugin("bundle", gives_methods("lora", "theirs"))
    found = Registry()
    texts = [refused(lambda: found.method("lora")), refused(found.methods)]
    for text in texts:
        assert "method 'lora' is given by plugin 'bundle' (dist-bundle 1.0) and plugin 'pack' (dist-pack 1.0)" in text
        assert DISABLE in text
    assert [found.method(n).name for n in ("mine", "theirs")] == ["mine", "theirs"]
    assert found.formats() == {}  # of another kind: not concerned
    for name, gives in (("pack", "mine"), ("bundle", "theirs")):
        report = reported(found, name)
        assert report.state == "broken"
        assert "dist-bundle 1.0" in report.error
        assert "dist-pack 1.0" in report.error
        assert report.gives == ("method lora", f"method {gives}")
    assert list(Registry(disabled={"pack"}).methods()) == ["lora", "theirs"]


def test_a_clash_of_formats_or_of_kinds_raises_too(site: SitePackages) -> None:
    site.plugin("format.one", gives_formats("same"))
    site.plugin("format.two", gives_formats("same"))
    site.plugin("site.one", gives_sites("same"))
    site.plugin("any", gives_sites("same") + gives_methods("m"))
    found = Registry()
    for ask in (found.formats, lambda: found.format("same"), found.site_kinds):
        text = refused(ask)
        assert "'same' is given by plugin" in text
    assert list(found.methods()) == ["m"]
    found = Registry(disabled=["format.two", "any"])
    assert list(found.formats()) == list(found.site_kinds()) == ["same"]


def test_a_plugin_is_taken_at_its_name_until_another_that_gives_it_is_imported(site: SitePackages) -> None:
    site.plugin("vera", gives_methods("vera"))
    site.plugin("pack", gives_methods("vera", "other"))
    found = Registry()
    assert found.method("vera").__module__.endswith("dist_vera_vera")
    assert found.method("other").name == "other"
    refused(lambda: found.method("vera"))


def test_distributions_with_plugins_of_one_name(site: SitePackages) -> None:
    site.plugin("vera", gives_methods("vera"), dist="Dist.A")
    site.plugin("vera", gives_methods("vera"), dist="dist-b")
    site.plugin("lora", gives_methods("lora"))
    found = Registry()
    for ask in (lambda: found.method("vera"), found.methods):
        text = refused(ask)
        assert "2 plugins are named 'vera': Dist.A 1.0 and dist-b 1.0" in text
    assert found.method("lora").name == "lora"
    assert (found.formats(), found.site_kinds()) == ({}, {})
    reports = [p for p in found.plugins() if p.name == "vera"]
    assert [(p.origin, p.state) for p in reports] == [("Dist.A 1.0", "broken"), ("dist-b 1.0", "broken")]
    assert all("Dist.A 1.0 and dist-b 1.0" in p.error for p in reports)
    assert site.imported == ["dist_lora_lora"]
    found = Registry(disabled=["dist-a"])  # a distribution, spelt as an index would
    assert found.method("vera").__module__.endswith("dist_b_vera")
    assert [p.state for p in found.plugins() if p.name == "vera"] == ["disabled", "ok"]
    assert list(Registry(disabled=["vera"]).methods()) == ["lora"]


def test_one_distribution_found_twice_is_no_clash(site: SitePackages) -> None:
    site.plugin("vera", gives_methods("vera"), dist="same")
    later = site.later(site.root / "later")
    site.install("same", {"vera": "gone"}, version="2.0", site=later)
    found = Registry()
    assert found.method("vera").name == "vera"
    assert [p.origin for p in found.plugins()] == ["same 1.0"]


def test_several_entry_points_may_lead_to_one_module(site: SitePackages) -> None:
    module = site.module("all", gives_methods("a", "b") + gives_formats("f"))
    site.install("all", {"a": module, "b": module, "format.f": module})
    found = Registry()
    assert [found.method("b").name, found.method("a").name] == ["b", "a"]
    assert found.format("f") is found.formats()["f"]
    assert list(found.methods()) == ["a", "b"]
    assert {p.state for p in found.plugins()} == {"ok"}


def test_a_misspelt_hook_breaks_every_entry_point_to_its_module(site: SitePackages) -> None:
    module = site.module("all", gives_methods("a", "b") + "@hookimpl\ndef format(): return []\n")
    site.install("all", {"a": module, "b": module})
    found = Registry()
    assert found.methods() == {}
    assert [p.state for p in found.plugins()] == ["broken", "broken"]


def test_a_class_passed_on_by_another_plugin_is_no_clash(site: SitePackages) -> None:
    site.plugin("a", gives_methods("a"))
    site.plugin("b", f"{HOOK}from {site.prefix}dist_a_a import C0\n@hookimpl\ndef methods(): return [C0]\n")
    found = Registry()
    assert list(found.methods()) == ["a"]
    assert found.method("a").name == "a"


# Disabling


def test_disabled_plugins_are_shown_and_never_imported(site: SitePackages, monkeypatch: pytest.MonkeyPatch) -> None:
    site.plugin("lora", gives_methods("lora"))
    site.plugin("vera", "raise ValueError")
    site.install("two", {"a": "gone", "command.b": "gone"})
    monkeypatch.setenv(DISABLE, " vera, ,two,nobody,")
    found = Registry()
    assert list(found.methods()) == ["lora"]
    assert found.commands() == {}
    text = refused(lambda: found.method("vera"), UnknownName)
    assert DISABLE in text
    assert {p.name: p.state for p in found.plugins()} == {
        "a": "disabled",
        "command.b": "disabled",
        "lora": "ok",
        "nobody": "disabled",
        "vera": "disabled",
    }
    assert reported(found, "nobody").error == "no plugin has this name"
    assert reported(found, "vera").error == ""
    assert site.imported == ["dist_lora_lora"]
    assert reported(Registry(disabled=()), "vera").state == "not loaded"  # given, so the variable is not read


def test_a_disabled_name_is_a_distribution_only_if_it_is_no_plugin(site: SitePackages) -> None:
    site.install("x", {"x": site.module("x", gives_methods("x")), "y": site.module("y", gives_methods("y"))})
    assert list(Registry(disabled=["x"]).methods()) == ["y"]


# Uninstalled plugins


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, source in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return folder


def test_files_and_packages_of_a_folder_are_plugins(site: SitePackages) -> None:
    folder = write(
        site.root / "my plugins",
        {
            "vera.py": gives_methods("vera"),
            "site.foo.py": site.logged("site.foo", gives_sites("foo")),
            "pack/__init__.py": "from .inner import *\nfrom .inner import methods\n",
            "pack/inner.py": gives_methods("packed"),
            "_private.py": "raise ValueError",
            "._vera.py": "raise ValueError",
            "no-package/file.py": "raise ValueError",
            "__pycache__/x.py": "raise ValueError",
            "README.md": "",
        },
    )
    before = list(sys.path)
    found = Registry(plugins_dirs=[folder, folder])
    assert found.method("vera").name == "vera"
    assert list(found.methods()) == ["packed", "vera"]
    assert site.imported == []  # site.foo gives no method
    assert list(found.site_kinds()) == ["foo"]
    report = [(p.name, p.origin, p.state) for p in found.plugins()]
    assert report == [
        ("pack", str(folder / "pack"), "ok"),
        ("site.foo", str(folder / "site.foo.py"), "ok"),
        ("vera", str(folder / "vera.py"), "ok"),
    ]
    assert sys.path == before


def test_a_file_cannot_shadow_an_installed_module(site: SitePackages) -> None:
    source = gives_methods("json").replace("class C0:", "import dataclasses\n@dataclasses.dataclass\nclass C0:")
    source = f"from __future__ import annotations\n{source}"  # dataclasses look the module up in sys.modules
    folder = write(site.root / "p", {"json.py": source, "torch/__init__.py": gives_methods("torch")})
    import json

    found = Registry(plugins_dirs=[folder])
    assert list(found.methods()) == ["json", "torch"]
    assert sys.modules["json"] is json
    assert getattr(sys.modules.get("torch"), "methods", None) is None
    module = found.method("json").__module__
    assert module not in ("json", "torch")
    assert sys.modules[module].C0 is found.method("json")


def test_a_half_imported_file_leaves_nothing_behind(site: SitePackages) -> None:
    before = set(sys.modules)
    files = {"bad/__init__.py": "from . import inner\n1 / 0\n", "bad/inner.py": "", "worse.py": "def f(:\n"}
    found = Registry(plugins_dirs=[write(site.root / "p", files)])
    assert found.methods() == {}
    assert [p.state for p in found.plugins()] == ["broken", "broken"]
    assert not [m for m in set(sys.modules) - before if "plugin" in m]


def test_a_file_named_like_an_installed_plugin_is_a_clash(site: SitePackages) -> None:
    site.plugin("vera", gives_methods("vera"))
    folder = write(site.root / "p", {"vera.py": gives_methods("vera"), "vera/__init__.py": ""})
    text = refused(lambda: Registry(plugins_dirs=[folder]).method("vera"))
    assert all(origin in text for origin in ("3 plugins", "dist-vera 1.0", str(folder / "vera.py")))
    (folder / "vera/__init__.py").unlink()
    found = Registry(plugins_dirs=[folder], disabled=["dist-vera"])
    assert found.method("vera").__module__.startswith("_adapterhub_lite_plugin_vera_")


def test_two_folders_may_have_plugins_of_different_names(site: SitePackages) -> None:
    folders = [write(site.root / n, {f"{n}.py": gives_methods(n), "_x.py": ""}) for n in ("a", "b")]
    assert list(Registry(plugins_dirs=folders).methods()) == ["a", "b"]


@pytest.mark.parametrize("make", [Path.touch, lambda path: None])
def test_a_folder_that_is_none_is_refused(site: SitePackages, make: Callable[[Path], None]) -> None:
    path = site.root / "nothing"
    make(path)
    assert str(path) in refused(lambda: Registry(plugins_dirs=[path]), FileError)


def test_the_registry_of_the_process(site: SitePackages) -> None:
    registry.reset()
    found = registry.registry()
    assert registry.registry() is found
    site.plugin("late", gives_methods("late"))
    assert list(found.methods()) == ["late"]  # nothing was looked up before
    folder = write(site.root / "p", {"vera.py": gives_methods("vera"), "late.py": gives_methods("late")})
    registry.use_plugins_dir(str(folder))
    assert registry.registry() is found
    assert found.method("vera").name == "vera"
    refused(lambda: found.method("late"))  # though it was imported before there were two
    registry.reset()
    assert registry.registry() is not found
    assert list(registry.registry().methods()) == ["late"]
    registry.reset()


# Commands


def test_listing_commands_imports_nothing_and_a_loader_imports_one(site: SitePackages) -> None:
    site.plugin("command.hello", gives_commands("other", "hello"))
    site.plugin("command.bye", "raise ValueError('gone')")
    site.plugin("command.wrong", gives_commands("wrogn"))
    site.plugin("command.none", HOOK + "@hookimpl\ndef commands(): return ['none']")
    found = Registry()
    commands = found.commands()
    assert list(commands) == ["bye", "hello", "none", "wrong"]
    assert site.imported == []
    command = commands["hello"]()
    assert isinstance(command, click.Command)
    assert command.name == "hello"
    assert site.imported == ["dist_command_hello_command_hello"]
    assert "gone" in refused(commands["bye"])
    assert site.imported[1:] == ["dist_command_bye_command_bye"]  # no other is searched for it
    assert "it gives no command 'wrong'; did you mean 'wrogn'?" in refused(commands["wrong"])
    assert "gave a str, not a click command" in refused(commands["none"])
    assert reported(found, "command.hello").gives == ("command hello",)


def test_two_commands_of_one_name_do_not_take_the_list_down(site: SitePackages) -> None:
    site.plugin("command.x", gives_commands("x"), dist="one")
    site.plugin("command.x", gives_commands("x"), dist="two")
    commands = Registry().commands()
    assert list(commands) == ["x"]
    assert "'command.x': one 1.0 and two 1.0" in refused(commands["x"])
    assert Registry(disabled=["two"]).commands()["x"]().name == "x"


# Hook specifications


def test_every_hook_is_specified_with_a_docstring_that_says_when() -> None:
    specs = {n: f for n, f in vars(hookspecs).items() if getattr(f, "adapterhub_lite_spec", None) is not None}
    assert list(specs) == ["methods", "formats", "site_kinds", "rules", "routers", "commands"]
    for spec in specs.values():
        assert "\n    Called when " in (spec.__doc__ or "") or "\nCalled when " in (spec.__doc__ or "")
        assert "return" in spec.__annotations__
