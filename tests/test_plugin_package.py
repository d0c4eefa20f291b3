"""A plugin in a package of its own: generated or written by hand, installed in a clean environment, or just a folder."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from adapterhub_lite import ConfigError, OutputExists
from adapterhub_lite.cli.scaffold import scaffold
from clean_venv import clean_venv

EXAMPLE = Path(__file__).parents[1] / "plugins/adapterhub-lite-example"
LEFTOVERS = shutil.ignore_patterns("build", "*.egg-info", ".*", "__pycache__")


class Shell:
    """Runs commands in a clean environment."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.env = folder, clean_venv(folder / "venv")

    def __call__(self, command: str, *, code: int = 0) -> str:
        done = subprocess.run(
            command, shell=True, cwd=self.folder, env=self.env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert done.returncode == code, f"{command}\n{done.stdout}"
        return done.stdout

    def methods(self, options: str = "") -> dict[str, str]:
        """Where each method comes from."""
        found = json.loads(self(f"adapter {options} methods --json"))["methods"]
        return {name: about["from"] for name, about in found.items()}


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def test_the_example_package(shell: Shell) -> None:
    package = shutil.copytree(EXAMPLE, shell.folder / "example", ignore=LEFTOVERS)
    assert "lora_xs" not in shell.methods()
    shell("pip install ./example")
    shell("adapter plugin check lora_xs")
    assert shell.methods()["lora_xs"] == "adapterhub-lite-example 0.1.0"
    (package / "adapterhub_lite_example.py").unlink()  # the tests take the installed one
    shell("cd example && pytest -q -p no:cacheprovider")


def test_a_generated_package(shell: Shell) -> None:
    said = shell("adapter plugin new spicy-ham")
    assert said.splitlines()[-1] == "next: pip install -e adapterhub-lite-spicy-ham && adapter plugin check spicy_ham"
    shell(said.splitlines()[-1].removeprefix("next: "))
    assert shell.methods()["spicy_ham"] == "adapterhub-lite-spicy-ham 0.1.0"
    shell("cd adapterhub-lite-spicy-ham && pytest -q")
    again = shell("adapter plugin new spicy_ham -o elsewhere", code=1)
    assert again == "adapter: the name 'spicy_ham' is taken, by adapterhub-lite-spicy-ham 0.1.0; choose another\n"
    assert not (shell.folder / "elsewhere").exists()


def test_a_folder_of_plugins_that_are_not_installed(shell: Shell) -> None:
    (shell.folder / "mine").mkdir()
    shutil.copy(EXAMPLE / "adapterhub_lite_example.py", shell.folder / "mine/lora_xs.py")
    [module, *_] = scaffold("spam", shell.folder)
    options = f"--plugins-dir mine --plugins-dir {module.parent}"
    assert shell.methods(options).keys() - shell.methods() == {"lora_xs", "spam"}
    shell(f"adapter {options} plugin check lora_xs")


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
