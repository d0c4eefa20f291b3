"""A plugin in a package of its own: generated or by hand, installed in a clean environment, or just a folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from clean_venv import LEFTOVERS, clean_venv, shell

from adapterhub_lite import ConfigError, OutputExists
from adapterhub_lite.cli.scaffold import scaffold

EXAMPLE = Path(__file__).parents[1] / "plugins/adapterhub-lite-example"


class Here:
    """A folder, and commands run there in a clean environment."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.env = folder, clean_venv(folder / "venv")

    def __call__(self, command: str, *, code: int = 0) -> str:
        got, out = shell(command, self.folder, self.env)
        assert got == code, f"{command}\n{out}"
        return out

    def methods(self, options: str = "") -> dict[str, str]:
        """Where each method comes from."""
        found = json.loads(self(f"adapter {options} methods --json"))["methods"]
        return {name: about["from"] for name, about in found.items()}


@pytest.fixture
def run(tmp_path: Path) -> Here:
    return Here(tmp_path)


def test_the_example_package(run: Here) -> None:
    package = shutil.copytree(EXAMPLE, run.folder / "example", ignore=LEFTOVERS)
    assert "lora_xs" not in run.methods()
    run("pip install ./example")
    run("adapter plugin check lora_xs")
    assert run.methods()["lora_xs"] == "adapterhub-lite-example 0.1.0"
    (package / "adapterhub_lite_example.py").unlink()  # the tests take the installed one
    run("cd example && pytest -q -p no:cacheprovider")


def test_a_generated_package(run: Here) -> None:
    said = run("adapter plugin new spicy-ham")
    assert said.splitlines()[-1] == "next: pip install -e adapterhub-lite-spicy-ham && adapter plugin check spicy_ham"
    run(said.splitlines()[-1].removeprefix("next: "))
    assert run.methods()["spicy_ham"] == "adapterhub-lite-spicy-ham 0.1.0"
    run("cd adapterhub-lite-spicy-ham && pytest -q")
    again = run("adapter plugin new spicy_ham -o elsewhere", code=1)
    assert again == "adapter: the name 'spicy_ham' is taken, by adapterhub-lite-spicy-ham 0.1.0; choose another\n"
    assert not (run.folder / "elsewhere").exists()


def test_a_folder_of_plugins_that_are_not_installed(run: Here) -> None:
    (run.folder / "mine").mkdir()
    shutil.copy(EXAMPLE / "adapterhub_lite_example.py", run.folder / "mine/lora_xs.py")
    [module, *_] = scaffold("spam", run.folder)
    options = f"--plugins-dir mine --plugins-dir {module.parent}"
    assert run.methods(options).keys() - run.methods() == {"lora_xs", "spam"}
    run(f"adapter {options} plugin check lora_xs")


def test_the_files_of_a_generated_package(tmp_path: Path) -> None:
    files = scaffold("spicy-ham", tmp_path)
    out = tmp_path / "adapterhub-lite-spicy-ham"
    assert files[0] == out / "adapterhub_lite_spicy_ham.py"
    assert {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()} == {
        "adapterhub_lite_spicy_ham.py", "tests/test_spicy_ham.py", "pyproject.toml", "README.md",
    }  # fmt: skip
    assert not any("$" in line for file in files for line in file.read_text().splitlines() if not line.startswith("$ "))
    # Nothing is left of the staging, and nothing is replaced.
    assert list(tmp_path.iterdir()) == [out]
    with pytest.raises(OutputExists, match="there is such a folder already"):
        scaffold("spicy_ham", tmp_path)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("", "is no name for a method"),
        ("LoRA-XS", "say 'lora_xs'"),
        ("../spam", "say 'spam'"),
        ("1st", "is no name for a method"),
        ("format.spam", "say 'format_spam'"),
        ("spam-", "say 'spam'"),
        ("é", "is no name for a method"),
        ("lora", "the name 'lora' is taken, by adapterhub-lite"),
        ("plugins", "there is a module 'adapterhub_lite_plugins' already"),
        ("low-rank", "would be the class LowRank"),
        ("none", "would be the class None"),
    ],
)
def test_a_name_that_cannot_be_one_is_refused(name: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refusal:
        scaffold(name, tmp_path)
    assert why in str(refusal.value)
    assert list(tmp_path.iterdir()) == []
