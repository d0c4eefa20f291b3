"""The documentation is run: its examples as they stand, its signatures against the code, its links.

How a document is run, in a temporary folder with the adapters `sql` and `french` (rank 8, alpha 16),
copies of both under `out/`, their model in `base`, and `plugins/adapterhub-lite-example`. The Hub is one of the tests'
own, where `someone/sql` (also called `someone/a`) and `someone/french` (`someone/b`), tagged `v1`, are these two:

- ```python blocks run in order in one Python process, which starts at the first of them; a
  ```text block right below one is what it prints.
- in ```console and ```sh blocks, lines with `$ ` are run; what follows is their output, where
  any is shown. It must succeed; `# exit code 1` behind it, or an error for output, says otherwise.
- a block with `file=PATH` behind its language is not run but written to that file; a ```diff
  block changes the file.
- `...` in an output stands for anything.
"""

from __future__ import annotations

import inspect
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from clean_venv import LEFTOVERS, clean_venv, shell
from hub_server import HubServer
from peers import LLAMA, write_adapter

from adapterhub_lite import Method, Params, Part, Place, Router, Rule, Site, delta, hookspecs

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("plugins/*/*.md")])
FENCE = re.compile(r"^```(?P<language>\w*)(?P<info>[^\n]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
EXIT_CODE = re.compile(r"\s+# exit code (\d+)$")
# They fetch what they install; continuous integration runs them from a clean checkout.
NOT_RUN = ("make", "git clone")
# Answers each line, a JSON string of code, with what the code printed and how it failed.
INTERPRETER = """
def main():
    import contextlib, io, json, sys, traceback
    for line in sys.stdin:
        out, error = io.StringIO(), ""
        with contextlib.redirect_stdout(out):
            try:
                exec(compile(json.loads(line), "<example>", "exec"), vars(sys.modules["__main__"]))
            except BaseException:
                error = traceback.format_exc()
        print(json.dumps([out.getvalue(), error]), flush=True)
main()
"""


@dataclass(frozen=True)
class Block:
    language: str
    info: str
    text: str
    where: str
    follows: bool  # nothing but blank lines stands between it and the block before


def blocks(document: Path) -> Iterator[Block]:
    source, end = document.read_text(encoding="utf-8"), -1
    for found in FENCE.finditer(source):
        line = source.count("\n", 0, found.start()) + 1
        follows = end >= 0 and not source[end : found.start()].strip()
        end = found.end()
        yield Block(found["language"], found["info"].strip(), found["text"], f"{document.name}:{line}", follows)


def same(shown: str, got: str) -> bool:
    """Whether `got` is what the document shows, where `...` is anything."""
    shown, got = ("\n".join(line.rstrip() for line in text.strip().splitlines()) for text in (shown, got))
    return re.fullmatch(".*".join(re.escape(part) for part in shown.split("...")), got, re.DOTALL) is not None


def commands(block: Block) -> Iterator[tuple[str, int, str]]:
    """Each command of a console block, the code it exits with, and the output that is shown."""
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        command, _, shown = part.replace("\\\n", "").partition("\n")
        code = EXIT_CODE.search(command)
        yield EXIT_CODE.sub("", command), int(code[1]) if code else int(shown.startswith("adapter: ")), shown


def edited(text: str, block: Block) -> str:
    """The text of a file after a block that belongs to it."""
    if block.language != "diff":
        return block.text
    lines = block.text.splitlines(keepends=True)
    old, new = ("".join(line[1:] for line in lines if line[0] in mark) for mark in ("- ", "+ "))
    assert text.count(old) == 1, f"{block.where}: the diff does not apply"
    return text.replace(old, new)


class Runner:
    """Runs the blocks of one document."""

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        self.folder, self.env = folder, env
        self.python: subprocess.Popen[str] | None = None
        self.printed = ""

    def run(self, block: Block) -> None:
        if block.info.startswith("file="):
            file = self.folder / block.info.removeprefix("file=")
            before = file.read_text(encoding="utf-8") if file.exists() else ""
            file.write_text(edited(before, block), encoding="utf-8")
        elif block.language == "python":
            self.printed = self.execute(block)
            return
        elif block.language in ("console", "sh"):
            for command, code, shown in commands(block):
                if not command.startswith(NOT_RUN):
                    self.command(command, code, shown, block.where)
        elif block.language == "text" and block.follows and self.printed:
            assert same(block.text, self.printed), f"{block.where}: it printed\n{self.printed}"
        self.printed = ""

    def command(self, command: str, code: int, shown: str, where: str) -> None:
        got, out = shell(command, self.folder, self.env)
        assert got == code, f"{where}: {command} exited with {got}\n{out}"
        assert not shown.strip() or same(shown, out), f"{where}: {command} printed\n{out}"

    def execute(self, block: Block) -> str:
        if self.python is None:
            self.python = subprocess.Popen(
                ["python", "-c", INTERPRETER], cwd=self.folder, env=self.env, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
        assert self.python.stdin is not None
        assert self.python.stdout is not None
        self.python.stdin.write(json.dumps(block.text) + "\n")
        self.python.stdin.flush()
        printed, error = json.loads(self.python.stdout.readline())
        assert not error, f"{block.where}: {error}"
        return str(printed)

    def close(self) -> None:
        if self.python is not None:
            self.python.communicate()


@pytest.fixture(scope="module")
def props(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the documents take for granted."""
    folder = tmp_path_factory.mktemp("props")
    LLAMA.build().save_pretrained(folder / "base")  # type: ignore[operator]
    for seed, name in enumerate(("sql", "french")):
        config = write_adapter(folder / name, LLAMA, rank=8, alpha=16, seed=seed) / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "my-org/base-7b"}))
        shutil.copytree(folder / name, folder / "out" / name)
    example = "plugins/adapterhub-lite-example"
    shutil.copytree(ROOT / example, folder / example, ignore=LEFTOVERS)
    return folder


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_examples_run(document: Path, props: Path, tmp_path: Path) -> None:
    found = list(blocks(document))
    if not any(block.language in ("python", "console", "sh") for block in found):
        return
    here = tmp_path / "here"
    shutil.copytree(props, here)
    with HubServer() as hub:
        for name, own in (("a", "sql"), ("sql", "sql"), ("b", "french"), ("french", "french")):
            repo = hub.add(f"someone/{name}", here / own)
            repo.refs["refs/tags/v1"] = repo.head.sha
        env = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_me", "HF_HOME": str(tmp_path / "hf")}
        runner = Runner(here, clean_venv(tmp_path / "venv") | env)
        try:
            for block in found:
                runner.run(block)
        finally:
            runner.close()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_links_lead_somewhere(document: Path) -> None:
    text = FENCE.sub("", document.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = document.parent / path if path else document
        assert file.exists(), f"{document.name} links to {target}"
        assert not anchor or anchor in anchors(file), f"{document.name} links to {target}"


def anchors(document: Path) -> set[str]:
    """The headings' names, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", document.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_tutorial_writes_the_example_package() -> None:
    text, versions = "", []
    for block in blocks(ROOT / "docs/tutorial.md"):
        if block.info.endswith("lora_xs.py"):
            text = edited(text, block)
            versions.append(text)
    assert (ROOT / "plugins/adapterhub-lite-example/adapterhub_lite_example.py").read_text() in versions


# The reference of the protocol ------------------------------------------------------------------------


def signature(name: str, member: Any) -> str | None:
    """As the reference writes it: `init(site: Site, …) -> …`, or `name: type`; None for what is neither."""
    if isinstance(member, property):
        return f"{name}: {inspect.signature(member.fget).return_annotation}"  # type: ignore[arg-type]
    function: Callable[..., Any] | None = getattr(member, "__func__", member if inspect.isfunction(member) else None)
    if function is None:
        return None
    text = f"{name}{inspect.signature(function)}".replace("'", "")
    return re.sub(r"\((self|cls)(, )?", "(", text)


def public(cls: type) -> Iterator[str]:
    """The signatures of everything public that the class itself defines, and its annotated names."""
    for name, annotation in inspect.get_annotations(cls).items():
        written = str(getattr(annotation, "__forward_arg__", annotation))  # a NamedTuple's are wrapped
        if not name.startswith("_"):
            yield f"{name}: {re.sub(r'^ClassVar.(.*).$', lambda found: str(found[1]), written)}"
    for name, member in vars(cls).items():
        own = None if name.startswith("_") else signature(name, member)
        if own is not None:
            yield own


def documented() -> str:
    return " ".join((ROOT / "docs/protocol.md").read_text(encoding="utf-8").split())


CLASSES = [Method, Params, Site, delta.LowRank, delta.Sparse, delta.Dense, delta.Outline, Rule, Part, Place, Router]
HOOKS = [f for f in vars(hookspecs).values() if inspect.isfunction(f) and f.__module__ == hookspecs.__name__]


@pytest.mark.parametrize("hook", HOOKS, ids=lambda f: f.__name__)
def test_every_hook_is_documented_with_its_signature(hook: Callable[..., Any]) -> None:
    assert f"`{signature(hook.__name__, hook)}`" in documented()


@pytest.mark.parametrize("cls", CLASSES)
def test_every_public_name_is_documented_with_its_signature(cls: type) -> None:
    text = documented()
    missing = [f"`{name}`" for name in public(cls) if f"`{name}`" not in text]
    assert not missing, f"docs/protocol.md lacks of {cls.__name__}: {missing}"


def test_the_reference_documents_nothing_that_is_not_there() -> None:
    """A signature in the list of a class is one of that class: what was renamed or removed goes out."""
    known = {signature(f.__name__, f) for f in HOOKS}
    for cls in CLASSES:
        known |= set(public(cls))
    listed = re.findall(r"^- `([^`]+)`", (ROOT / "docs/protocol.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(listed) > 30
    assert [name for name in listed if name not in known] == []
