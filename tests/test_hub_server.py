"""The tests' own Hub, with the client as everybody has it."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import huggingface_hub as hf
import pytest
from hub_server.storage import git_sha1
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, errors

if TYPE_CHECKING:
    from hub_server import HubServer

WEIGHTS = bytes(range(256)) * 300
CONFIG = b'{"peft_type": "LORA"}'
CARD = b"""---
base_model: my-org/base
base_model_relation: adapter
library_name: peft
tags: [lora]
license: mit
---
Hi
"""


def push(parent: str | None = None, *, file: Path | bytes = WEIGHTS, **options: str) -> hf.CommitInfo:
    HfApi().create_repo("me/sql", exist_ok=True)
    added = {"adapter_model.safetensors": file, "adapter_config.json": CONFIG, "README.md": CARD, "a/b/c.json": b"{}"}
    operations = [CommitOperationAdd(name, data) for name, data in added.items()]
    return HfApi().create_commit("me/sql", operations, commit_message="add", parent_commit=parent, **options)


def downloaded(revision: str | None = None) -> dict[str, bytes]:
    folder = Path(hf.snapshot_download("me/sql", revision=revision))
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("way", ["xet", "xet from a path", "lfs", "lfs through a redirect"])
def test_push_and_pull(hub: HubServer, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file: Path | bytes = WEIGHTS
    if way.startswith("lfs"):
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        hub.xet, hub.cdn = None, "redirect" in way
    elif "path" in way:
        file = tmp_path / "w.safetensors"
        file.write_bytes(WEIGHTS)
    made = push(file=file)
    assert hub.storage.repos["me/sql"].head.sha == made.oid
    assert len(hub.storage.repos["me/sql"].history) == 2
    assert hub.count("PUT", "/lfs/") == (1 if way.startswith("lfs") else 0)
    got = downloaded()
    assert {name: got[name] for name in ("adapter_model.safetensors", "adapter_config.json", "a/b/c.json")} == {
        "adapter_model.safetensors": WEIGHTS,
        "adapter_config.json": CONFIG,
        "a/b/c.json": b"{}",
    }
    assert hub.count("GET", "xet-read-token") == (0 if way.startswith("lfs") else 1)
    files = {f.path: f for f in HfApi().list_repo_tree("me/sql", recursive=True) if isinstance(f, hf.hf_api.RepoFile)}
    assert files["adapter_config.json"].blob_id == git_sha1(CONFIG)
    large = files["adapter_model.safetensors"]
    assert large.lfs is not None
    assert (large.lfs.sha256, large.size) == (hashlib.sha256(WEIGHTS).hexdigest(), len(WEIGHTS))
    assert (large.xet_hash is None) == way.startswith("lfs")
    before = len(hub.seen)
    downloaded(made.oid)
    assert len(hub.seen) == before  # warm


def test_only_one_of_several_commits_onto_one_parent(hub: HubServer) -> None:
    head = push().oid
    done: list[str] = []

    def commit(n: int) -> None:
        operation = CommitOperationAdd(f"{n}.json", b"%d" % n)
        try:
            HfApi().create_commit("me/sql", [operation], commit_message="race", parent_commit=head)
            done.append("made")
        except errors.HfHubHTTPError as error:
            done.append(str(error.response.status_code))

    threads = [threading.Thread(target=commit, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == ["412"] * 3 + ["made"]
    with pytest.raises(errors.HfHubHTTPError, match="412"):
        push(head, file=WEIGHTS[::-1])


def test_branches_tags_and_pull_requests(hub: HubServer) -> None:
    first = push().oid
    api = HfApi()
    api.create_tag("me/sql", tag="v1")
    api.create_branch("me/sql", branch="next")
    api.create_commit("me/sql", [CommitOperationDelete("a/", is_folder=True)], commit_message="less", revision="next")
    assert "a/b/c.json" in downloaded("v1")
    assert "a/b/c.json" not in downloaded("next")
    opened = api.create_commit(
        "me/sql", [CommitOperationAdd("new.json", b"1")], commit_message="please", create_pr=True
    )
    assert opened.pr_revision == "refs/pr/1"
    assert downloaded("refs/pr/1")["new.json"] == b"1"
    refs = api.list_repo_refs("me/sql")
    assert {ref.name: ref.target_commit for ref in refs.tags} == {"v1": first}
    assert {ref.name for ref in refs.branches} == {"main", "next"}
    assert [c.title for c in api.list_repo_commits("me/sql", revision="next")] == ["less", "add", "initial commit"]
    with pytest.raises(errors.RevisionNotFoundError):
        api.model_info("me/sql", revision="v2")


def test_what_the_listing_and_the_info_tell(hub: HubServer) -> None:
    push()
    hub.storage.repos["me/sql"].downloads = 7
    hub.add("other/sql", {"README.md": CARD}, downloads=9)
    hub.add("other/no", {"config.json": b"{}"})
    found = list(HfApi().list_models(filter="base_model:adapter:my-org/base", sort="downloads", full=True))
    assert [(m.id, m.downloads) for m in found] == [("other/sql", 9), ("me/sql", 7)]
    assert {s.rfilename for s in found[1].siblings or ()} >= {"adapter_config.json", "a/b/c.json"}
    assert [m.id for m in HfApi().list_models(author="me", search="sQL")] == ["me/sql"]
    info = HfApi().model_info("me/sql", files_metadata=True)
    sizes = {s.rfilename: s.size for s in info.siblings or ()}
    assert sizes["adapter_model.safetensors"] == len(WEIGHTS)
    assert "license:mit" in (info.tags or ())
    assert [f.path for f in HfApi().get_paths_info("me/sql", ["README.md", "none"])] == ["README.md"]
    assert HfApi().whoami()["name"] == "me"
    with pytest.raises(ValueError, match="metadata"):
        HfApi().create_commit("me/sql", [CommitOperationAdd("README.md", b"---\na: [\n---\n")], commit_message="bad")


def test_who_may_do_what(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    push()
    repo = hub.storage.repos["me/sql"]
    repo.private = True
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(errors.RepositoryNotFoundError):
        HfApi().model_info("me/sql")
    repo.private, repo.gated = False, "manual"
    with pytest.raises(errors.GatedRepoError):
        hf.hf_hub_download("me/sql", "adapter_config.json")
    repo.granted.add("other")
    hf.hf_hub_download("me/sql", "adapter_config.json")
    with pytest.raises(errors.HfHubHTTPError, match="403"):
        HfApi().create_commit("me/sql", [CommitOperationAdd("x", b"1")], commit_message="no")
    monkeypatch.delenv("HF_TOKEN")
    assert HfApi().model_info("me/sql").sha == repo.head.sha
    with pytest.raises(errors.HfHubHTTPError, match="401"):
        HfApi().create_repo("me/more")


def test_ranges(hub: HubServer) -> None:
    push()
    hub.cdn = True
    for asked, expected in (("5-9", WEIGHTS[5:10]), ("76790-", WEIGHTS[76790:]), ("-4", WEIGHTS[-4:])):
        url = hf.hf_hub_url("me/sql", "adapter_model.safetensors")
        answer = hf.get_session().get(url, headers={"Range": f"bytes={asked}"})
        assert (answer.status_code, answer.content) == (206, expected)


def test_faults(hub: HubServer) -> None:
    repo = hub.add("me/sql", {"a.json": b"1234", "w.safetensors": WEIGHTS})
    url = f"{hub.url}/me/sql/resolve/main/a.json"
    get = hf.get_session().get
    hub.fault("GET", "a.json", nth=2, status=429, headers={"Retry-After": "7"})
    assert [get(url).status_code for _ in range(3)] == [200, 429, 200]
    hub.fault("GET", "a.json", change=lambda body: body[::-1])
    assert get(url).content == b"4321"
    hub.fault("GET", "a.json", truncate=2)
    with pytest.raises(hf.utils.httpx.RemoteProtocolError):
        get(url)
    hub.fault("GET", "a.json", hang=True)
    with pytest.raises(hf.utils.httpx.ReadTimeout):
        get(url, timeout=0.1)
    hub.fault("POST", "/commit/", drop=True)
    with pytest.raises(hf.utils.httpx.RemoteProtocolError):
        HfApi().create_commit("me/sql", [CommitOperationAdd("b.json", b"1")], commit_message="add")
    assert [c.title for c in repo.history] == ["add", "add files", "initial commit"]
    hub.fault("POST", "/commit/", before=lambda hub: hub.add("me/sql", {"c.json": b"2"}, "theirs"))
    with pytest.raises(errors.HfHubHTTPError, match="412"):
        HfApi().create_commit(
            "me/sql", [CommitOperationAdd("d.json", b"1")], commit_message="mine", parent_commit=repo.head.sha
        )
    assert repo.head.title == "theirs"
