"""What `pip install` gives: both packages, their types, every entry point, and nothing of the tests."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp("wheel")
    source = out / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "adapterhub_lite", "plugins"):
        (source / name).symlink_to(ROOT / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", out, source]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_both_packages_are_in_the_wheel_with_their_types(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    for package in ("adapterhub_lite", "plugins/adapterhub_lite_plugins"):
        for file in (ROOT / package).rglob("*.py"):
            assert str(file.relative_to(ROOT)).removeprefix("plugins/") in names
    assert {"adapterhub_lite/py.typed", "adapterhub_lite_plugins/py.typed", "adapterhub_lite/cli/page.css"} <= names
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"adapterhub_lite", "adapterhub_lite_plugins"}
    assert any(name.endswith("/LICENSE") for name in names)


def test_every_bundled_plugin_has_an_entry_point() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    modules = set(project["entry-points"]["adapterhub_lite"].values())
    files = [*ROOT.glob("plugins/adapterhub_lite_plugins/*/*.py"), *ROOT.glob("adapterhub_lite/site/*.py")]
    for file in files:
        if file.name != "__init__.py":
            module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removeprefix("plugins.")
            assert module in modules, f"{module} has no entry point in pyproject.toml"


def test_the_changelog_has_an_unreleased_section() -> None:
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text()
