"""Pushing to a Hub, with the real client: over LFS, Xet and without; faults, lost answers, others in between."""

from __future__ import annotations

import re
import shlex
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import disable_progress_bars
from safetensors.torch import load_file, save_file

import adapterhub_lite as ah
from adapterhub_lite.errors import AdapterError, ConfigError
from adapterhub_lite.hub import committing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from conftest import Done, Handmade
    from hub_server import HubServer

    Command = Callable[..., Done]

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
LAYERS = {"net.layers.0.q": 2, "net.layers.0.k": 2}
COMMIT = "/commit/"


@pytest.fixture(autouse=True)
def _no_bars() -> Iterator[None]:
    with disable_progress_bars():
        yield


@pytest.fixture
def own(handmade: Handmade, tmp_path: Path) -> Path:
    return handmade(tmp_path / "sql", LAYERS, base_model_name_or_path="my-org/base-7b")


def files(hub: HubServer, repo: str, revision: str = "main") -> dict[str, bytes]:
    commit = hub.storage.repos[repo].at(revision)
    return {path: entry.data for path, entry in commit.files.items() if path != ".gitattributes"}


def local(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def commits(hub: HubServer, repo: str = "me/sql") -> int:
    return len(hub.storage.repos[repo].history) - 1  # without the first, which has .gitattributes


# What is pushed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["xet", "without xet", "lfs"])
def test_what_is_pushed_is_there(
    hub: HubServer, own: Path, adapter: Command, storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if storage == "without xet":
        hub.xet = None
    elif storage == "lfs":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    done = adapter("push", own, "me/sql", "--license", "mit")
    assert done.code == 0, done
    commit = hub.storage.repos["me/sql"].head
    assert re.fullmatch(
        rf"pushed {own} to me/sql: 3 files, .*, commit {commit.sha[:7]}\n{hub.url}/me/sql/commit/{commit.sha}\n",
        done.out,
    )
    assert done.err == ""
    found = files(hub, "me/sql")
    assert b"license: mit\n" in found.pop("README.md")
    assert found == local(own)
    assert commits(hub) == 1
    assert commit.title == "Push adapter"
    assert "base_model:adapter:my-org/base-7b" in hub.storage.repos["me/sql"].tags()
    assert (hub.count("PUT", "/lfs/") == 0) == (storage == "xet")
    assert (commit.files["adapter_model.safetensors"].xet is None) == (storage != "xet")


def test_nothing_to_commit_is_no_error(hub: HubServer, own: Path, adapter: Command) -> None:
    adapter("push", own, "me/sql")
    before = hub.count("POST")
    done = adapter("push", own, "me/sql")
    assert (done.code, done.err) == (0, "")
    assert "nothing to commit" in done.out
    assert commits(hub) == 1
    assert hub.count("POST") == before
    assert adapter("push", own, "me/sql", "--json").json["sent"] == []


def test_only_what_changed_is_sent(hub: HubServer, own: Path, handmade: Handmade) -> None:
    first = ah.push(own, "me/sql", message="one")
    assert sorted(first.sent) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    handmade(own, LAYERS, seed=1, base_model_name_or_path="my-org/base-7b")
    second = ah.push(own, "me/sql", message="two")
    assert second.sent == ("adapter_model.safetensors",)
    assert second.commit == hub.storage.repos["me/sql"].head.sha
    assert [commit.title for commit in hub.storage.repos["me/sql"].history[:2]] == ["two", "one"]
    hub.add("me/sql", {"old.bin": b"x", "notes.md": b"y"})
    assert ah.push(own, "me/sql").others == ("notes.md", "old.bin")


def test_a_composition_and_a_folded_model(hub: HubServer, own: Path, adapter: Command, tmp_path: Path) -> None:
    adapters = ah.adapt(torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(5, 3)))
    adapters.add("a", ah.LoRA(rank=2), targets="0")
    adapters.add("b", ah.LoRA(rank=2), targets="1")
    adapters.activate(ah.chain("a", "b"))
    adapters.save_composition(tmp_path / "c")
    assert ah.push(tmp_path / "c", "me/c").kind == "composition"
    base = tmp_path / "base"
    base.mkdir()
    weights = {"net.layers.0.q.weight": torch.randn(13, 7), "net.layers.0.k.weight": torch.randn(5, 11)}
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    (base / "config.json").write_text("{}")
    assert adapter("merge", own, "--into", base, "-o", tmp_path / "m").code == 0
    assert ah.push(tmp_path / "m", "my-org/m").kind == "model"
    for repo, folder in (("me/c", "c"), ("my-org/m", "m")):
        found = files(hub, repo)
        done = adapter("pull", repo, "-o", tmp_path / "back" / folder)
        assert done.code == 0, done
        assert local(tmp_path / "back" / folder) == found
        found.pop("README.md")
        assert found == local(tmp_path / folder)
    done = adapter("verify", "my-org/m", "--json")
    assert done.code == 0, done
    assert done.json["unchecked"][0] == "README.md, which was written since"


def test_branches_and_pull_requests(hub: HubServer, own: Path, adapter: Command) -> None:
    assert ah.push(own, "me/sql", revision="v2").revision == "v2"
    assert commits(hub) == 0
    assert files(hub, "me/sql", "v2").keys() > local(own).keys()
    done = adapter("push", own, "me/sql", "--pr")
    assert done.code == 0, done
    assert f"pull request {hub.url}/me/sql/discussions/1" in done.out
    assert commits(hub) == 0
    assert files(hub, "me/sql", "refs/pr/1").keys() > local(own).keys()
    for revision, options in (("a" * 40, {}), ("v2", {"pr": True})):
        with pytest.raises(ConfigError):
            ah.push(own, "me/sql", revision=revision, **options)


def test_a_private_model(hub: HubServer, own: Path, adapter: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    assert adapter("push", own, "me/sql", "--private").code == 0
    assert hub.storage.repos["me/sql"].private
    assert adapter("push", own, "me/sql", "--private").code == 0
    hub.storage.create("me/public")
    done = adapter("push", own, "me/public", "--private")
    done.refused("me/public: exists, and everybody can see it", "--private")
    assert commits(hub, "me/public") == 0
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert adapter("push", own, "me/sql").code == 1
    assert commits(hub) == 1


@pytest.mark.parametrize("xet", [True, False])
def test_what_is_pushed_is_pulled(hub: HubServer, own: Path, adapter: Command, tmp_path: Path, xet: bool) -> None:
    hub.xet = hub.xet if xet else None
    assert adapter("push", own, "me/sql", "--private").code == 0
    done = adapter("pull", "me/sql", "-o", tmp_path / "back")
    assert done.code == 0, done
    back = local(tmp_path / "back")
    assert back.pop("README.md") == files(hub, "me/sql")["README.md"]
    assert back == local(own)
    done = adapter("push", tmp_path / "back", "me/sql")  # and nothing has changed on the way
    assert "nothing to commit" in done.out


def test_the_two_lines_of_the_readme(
    hub: HubServer, handmade: Handmade, adapter: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = r"adapter merge someone/a someone/b .*-o merged && \\\n +adapter push merged me/merged$"
    found = re.search(lines, README, re.MULTILINE)
    assert found is not None
    parts = {name: handmade(tmp_path / name, LAYERS, seed=n, base_model_name_or_path="my-org/base-7b")
             for n, name in enumerate("ab")}  # fmt: skip
    for name, folder in parts.items():
        hub.add(f"someone/{name}", folder)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for line in found[0].replace("\\\n", "").split("&&"):
        done = adapter(*shlex.split(line)[1:])
        assert done.code == 0, done
    there = tmp_path / "there"
    there.mkdir()
    for name, data in files(hub, "me/merged").items():
        (there / name).write_bytes(data)
    merged = ah.load(there)
    tensors = {name: load_file(folder / "adapter_model.safetensors") for name, folder in parts.items()}
    for site in LAYERS:
        expected = torch.zeros(merged.sites[site].shape, dtype=torch.float64)
        for name, weight in {"a": 0.7, "b": 0.3}.items():
            A, B = (tensors[name][f"base_model.model.{site}.lora_{x}.weight"].double() for x in "AB")
            expected += weight * 4 * B @ A  # alpha 8, rank 2
        torch.testing.assert_close(merged.delta(site).dense().double(), expected, rtol=1e-5, atol=1e-5)
    card = files(hub, "me/merged")["README.md"].decode()
    for name in "ab":
        sha = hub.storage.repos[f"someone/{name}"].head.sha
        assert f"[someone/{name}@{sha[:7]}](https://huggingface.co/someone/{name}/tree/{sha})" in card


# The card --------------------------------------------------------------------------------------------------


def test_what_somebody_wrote_into_the_card_stays(hub: HubServer, own: Path, handmade: Handmade) -> None:
    ah.push(own, "me/sql")
    card = files(hub, "me/sql")["README.md"].decode()
    hub.add("me/sql", {"README.md": card.replace("# me/sql\n", "# me/sql\n\nBy hand.\n").encode()})
    handmade(own, {"net.layers.0.q": 2}, base_model_name_or_path="my-org/base-7b")
    assert not ah.push(own, "me/sql").card_replaced
    now = files(hub, "me/sql")["README.md"].decode()
    assert "By hand." in now
    assert now.count("| parameters |") == 1
    assert now != card
    (own / "README.md").write_text("# Another text\n")  # of the folder, which comes first
    assert ah.push(own, "me/sql").card_replaced
    assert not ah.push(own, "me/sql").card_replaced
    now = files(hub, "me/sql")["README.md"].decode()
    assert "# Another text" in now
    assert "By hand." not in now
    assert (own / "README.md").read_text() == "# Another text\n"


# What is refused before anybody is asked -----------------------------------------------------------------------


def test_leaks_are_refused(hub: HubServer, own: Path, adapter: Command) -> None:
    (own / "notes.txt").write_text("one\nsee /home/mara/x\n")
    done = adapter("push", own, "me/sql")
    done.refused("would publish an absolute path, /home/mara/x, at notes.txt:2", "--allow-leaks")
    done = adapter("push", own, "me/sql", "--dry-run")
    assert "refused without --allow-leaks:\n  notes.txt:2: an absolute path, /home/mara/x\n" in done.out
    assert hub.seen == []
    assert adapter("push", own, "me/sql", "--allow-leaks").code == 0
    assert "notes.txt" in files(hub, "me/sql")


def test_ones_own_name_is_a_leak_but_as_the_owner(
    hub: HubServer, own: Path, adapter: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("USER", "mkeller")
    hub.storage.users["hf_mk"] = "mkeller"
    monkeypatch.setenv("HF_TOKEN", "hf_mk")
    (own / "notes.txt").write_text("by mkeller")
    adapter("push", own, "me/sql").refused("would publish a user name, mkeller, at notes.txt:1")
    assert adapter("push", own, "mkeller/sql").code == 0


def test_a_dry_run_asks_nobody(hub: HubServer, own: Path, adapter: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    done = adapter("push", own, "me/sql", "--dry-run", "--json")
    assert done.json["files"].keys() == {"README.md", *local(own)}
    assert done.json["card"].startswith("---\nbase_model: my-org/base-7b\n")
    assert done.json["commit"] is None
    out = adapter("push", own, "me/sql", "--dry-run").out
    assert "adapter_model.safetensors" in out
    assert "  base_model: my-org/base-7b\n" in out
    assert hub.seen == []


@pytest.mark.parametrize("name", ["sql", "me/sql@v1", "me/sql:sub", "/me/sql", "me/../x", "me/a b", "a/b/c", "me/-x"])
def test_what_is_no_name_is_refused(hub: HubServer, own: Path, adapter: Command, name: str) -> None:
    adapter("push", own, name).refused("is no name of a model on the Hub", "owner/name")
    assert hub.seen == []


def test_broken_folders_are_refused(hub: HubServer, own: Path, adapter: Command, tmp_path: Path) -> None:
    (own / "optimizer.pt").write_bytes(b"x")
    adapter("push", own, "me/sql").refused("optimizer.pt: is a pickle")
    (own / "optimizer.pt").unlink()
    (own / "adapter_config.json").write_text("{")
    adapter("push", own, "me/sql").refused("adapter_config.json", "not valid JSON")
    adapter("push", tmp_path / "none", "me/sql").refused("there is no such folder")
    assert hub.seen == []


# What goes wrong -----------------------------------------------------------------------------------------------


def test_without_a_token(hub: HubServer, own: Path, adapter: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    adapter("push", own, "me/sql").refused("me/sql: cannot be pushed to without a token", "hf auth login")
    assert hub.seen == []


FAULTS: list[tuple[str, str, dict[str, Any], tuple[str, ...]]] = [
    ("GET", "/revision/", {"status": 401, "message": "Invalid credentials in Authorization header"}, ("token",)),
    ("POST", "/repos/create", {"status": 401}, ("token",)),
    ("POST", "/repos/create", {"status": 403, "message": "no"}, ("may",)),
    ("POST", "/repos/create", {"status": 429}, ("too many", "try again")),
    ("POST", "/preupload/", {"status": 403, "message": "no"}, ("may",)),
    ("POST", "/preupload/", {"status": 404, "code": "RepoNotFound"}, ()),
    ("POST", "/validate-yaml", {"status": 400}, ("metadata", "README.md")),
    ("POST", "/preupload/", {"status": 500, "times": 9}, ("later",)),
    ("POST", "/objects/batch", {"status": 403, "message": "no"}, ("may",)),
    ("PUT", "/lfs/", {"status": 500, "times": 9}, ("later",)),
    ("GET", "/tree/", {"status": 500, "times": 9}, ("later",)),
    ("POST", COMMIT, {"status": 401}, ("token",)),
    ("POST", COMMIT, {"status": 403, "message": "no"}, ("may",)),
    ("POST", COMMIT, {"status": 404, "code": "RepoNotFound"}, ()),
    ("POST", COMMIT, {"status": 409, "message": "taken"}, ()),
    ("POST", COMMIT, {"status": 412}, ("by somebody else", "push again")),
    ("POST", COMMIT, {"status": 429}, ("too many", "try again")),
    ("POST", COMMIT, {"status": 500}, ("later",)),
    ("POST", COMMIT, {"hang": True}, ("later",)),
]


@pytest.mark.parametrize(("method", "path", "how", "words"), FAULTS)
def test_faults(
    hub: HubServer,
    own: Path,
    adapter: Command,
    method: str,
    path: str,
    how: dict[str, Any],
    words: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(committing, "PATIENCE", 1.0)
    hub.xet = None if "lfs" in path or "batch" in path else hub.xet
    hub.fault(method, path, **how)
    before = local(own)
    line = adapter("push", own, "me/sql").refused("me/sql: ", "; ")
    for word in words:
        assert word in line
    assert "me/sql" not in hub.storage.repos or commits(hub) == 0
    assert ("the model was made, and is empty" in line) == ("me/sql" in hub.storage.repos)
    assert local(own) == before
    hub.faults.all.clear()
    assert adapter("push", own, "me/sql").code == 0  # and nothing is in the way of the next try
    assert commits(hub) == 1


def test_a_model_of_somebody_else(hub: HubServer, own: Path, adapter: Command) -> None:
    hub.add("other/sql", {"README.md": b"x"})
    adapter("push", own, "other/sql").refused("other/sql: ", "may")
    adapter("push", own, "nobody/sql").refused("nobody/sql: ", "may")
    assert commits(hub, "other/sql") == 1


def test_a_lost_answer_is_no_second_commit(hub: HubServer, own: Path, adapter: Command) -> None:
    hub.fault("POST", COMMIT, drop=True)
    done = adapter("push", own, "me/sql", "--json")
    assert (done.code, done.err) == (0, "")
    assert commits(hub) == 1
    assert done.json["commit"] == hub.storage.repos["me/sql"].head.sha
    assert done.json["url"].endswith(done.json["commit"])


def test_a_lost_answer_and_somebody_elses_commit_on_top(hub: HubServer, own: Path) -> None:
    hub.fault("POST", COMMIT, drop=True)
    hub.fault("GET", "/commits/", before=lambda hub: hub.add("me/sql", {"adapter_config.json": b"theirs"}))
    done = ah.push(own, "me/sql")
    first, second = hub.storage.repos["me/sql"].history[:2]
    assert done.commit == second.sha
    assert first.files["adapter_config.json"].data == b"theirs"


def test_a_commit_that_cannot_be_read_back(hub: HubServer, own: Path, adapter: Command) -> None:
    hub.fault("GET", "/tree/", nth=2, times=None, status=500)
    line = adapter("push", own, "me/sql").refused("could not be read back", "push again later")
    assert f"me/sql: has the commit {hub.storage.repos['me/sql'].head.sha[:7]} of this push" in line
    hub.faults.all.clear()
    assert "nothing to commit" in adapter("push", own, "me/sql").out


def test_a_lost_answer_to_a_pull_request(hub: HubServer, own: Path, adapter: Command) -> None:
    hub.add("me/sql", {"notes.md": b"x"})
    hub.fault("POST", COMMIT, drop=True)
    adapter("push", own, "me/sql", "--pr").refused("me/sql: ", "look first whether its pull request is there")


@pytest.mark.parametrize("data", [b"", b"by hand \xff", b"by hand"])
def test_the_card_on_the_hub_is_verified(hub: HubServer, own: Path, adapter: Command, data: bytes) -> None:
    hub.add("me/sql", {"README.md": data})
    hub.fault("GET", "/resolve/", change=lambda body: b"X" + body[1:])
    done = adapter("push", own, "me/sql")
    if b"\xff" in data:
        done.refused("me/sql: has a README.md that is not UTF-8")
    else:
        assert done.code == 0, done
        assert data in files(hub, "me/sql")["README.md"]
    hub.add("me/sql", {"README.md": b"more by hand"})
    hub.fault("GET", "/resolve/", times=2, change=lambda body: b"X" + body[1:])
    adapter("push", own, "me/sql").refused("me/sql: sends another README.md than it announces")


def test_a_stale_parent_that_is_our_own_commit(hub: HubServer, own: Path) -> None:
    """Something between us and the Hub, which asked twice: the first answer was lost, and the second is 412."""
    hub.fault("POST", COMMIT, drop=True)
    hub.fault("POST", COMMIT, nth=2, times=None, status=412)
    done = ah.push(own, "me/sql")
    assert done.commit == hub.storage.repos["me/sql"].head.sha
    assert commits(hub) == 1


def test_somebody_else_in_between(hub: HubServer, own: Path, adapter: Command) -> None:
    adapter("push", own, "me/sql")
    (own / "extra.md").write_text("ours")
    hub.fault("POST", COMMIT, before=lambda hub: hub.add("me/sql", {"theirs.md": b"theirs"}))
    line = adapter("push", own, "me/sql").refused("me/sql: was changed by somebody else meanwhile", "push again")
    assert hub.storage.repos["me/sql"].history[1].sha[:7] in line
    assert files(hub, "me/sql")["theirs.md"] == b"theirs"
    assert "extra.md" not in files(hub, "me/sql")
    assert adapter("push", own, "me/sql").code == 0
    assert {"theirs.md", "extra.md"} <= files(hub, "me/sql").keys()


def test_bytes_that_arrive_as_others_are_noticed(hub: HubServer, own: Path, adapter: Command) -> None:
    entry = hub.entry("adapter_model.safetensors", b"others")
    hub.fault("GET", "/tree/", nth=2, before=lambda hub: hub.storage.repos["me/sql"].commits.update(
        {sha: commit if commit.parent is None else type(commit)(
            sha, commit.parent, {**commit.files, "adapter_model.safetensors": entry}, "x")
         for sha, commit in hub.storage.repos["me/sql"].commits.items()}))  # fmt: skip
    adapter("push", own, "me/sql").refused("me/sql: has another adapter_model.safetensors in the commit")


@pytest.mark.parametrize("rounds", [3])
def test_eight_at_once(hub: HubServer, handmade: Handmade, tmp_path: Path, rounds: int) -> None:
    """All look at the same end of the branch, then commit: one a round does, and what it committed is still there."""
    folders = [handmade(tmp_path / f"a{n}", LAYERS, seed=n) for n in range(8)]
    for n, folder in enumerate(folders):
        (folder / f"own-{n}.md").write_text(str(n))
    ah.push(folders[0], "me/sql")
    left, winners = set(range(8)), []
    for _ in range(rounds):
        barrier = threading.Barrier(len(left))
        for _ in left:
            hub.fault("POST", COMMIT, before=lambda hub, barrier=barrier: barrier.wait(20))

        def one(n: int) -> str:
            try:
                return ah.push(folders[n], "me/sql", message=f"by {n}").commit or ""
            except AdapterError as error:
                return error.what

        for n in left:
            (folders[n] / f"own-{n}.md").write_text(f"{n} in round {len(winners)}")
        with ThreadPoolExecutor(8) as pool:
            done = dict(zip(sorted(left), pool.map(one, sorted(left)), strict=True))
        winner = [n for n in left if "somebody else" not in done[n]]
        assert len(winner) == 1
        assert done[winner[0]] == hub.storage.repos["me/sql"].head.sha
        left -= {winner[0]}
        winners += winner
    assert commits(hub) == 1 + rounds
    assert [commit.title for commit in hub.storage.repos["me/sql"].history[:rounds]] == [
        f"by {n}" for n in winners[::-1]
    ]
    for n in winners:
        assert f"own-{n}.md" in files(hub, "me/sql")


def test_our_use_of_the_client_leaves_it_as_it_was(hub: HubServer, own: Path) -> None:
    session, level = huggingface_hub.get_session(), huggingface_hub.logging.get_verbosity()
    former = session.timeout
    ah.push(own, "me/sql")
    assert (session.timeout, huggingface_hub.logging.get_verbosity()) == (former, level)
