"""Adapters from the Hub: pulled, verified, merged; by headers alone; without network; locked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import adapterhub_lite as ah
from adapterhub_lite.errors import FileError, HubError
from adapterhub_lite.hub.pull import snapshot

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Done, Handmade
    from hub_server import HubServer

    Command = Callable[..., Done]

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LAYERS = {"net.layers.0.q": 2, "net.layers.0.k": 3}


@pytest.fixture
def sql(hub: HubServer, handmade: Handmade, tmp_path: Path) -> Path:
    """An adapter, of which `me/sql` has the files."""
    folder = handmade(tmp_path / "sql", LAYERS, seed=1)
    (folder / "README.md").write_text("Hi")
    (folder / "training_args.bin").write_bytes(b"a pickle")
    hub.add("me/sql", folder)
    return folder


@pytest.fixture
def french(hub: HubServer, handmade: Handmade, tmp_path: Path) -> Path:
    """Another, of which `other/adapters` has the files in a folder."""
    folder = handmade(tmp_path / "fr", LAYERS, seed=2)
    hub.add("other/adapters", {f"lora/fr/{path.name}": path.read_bytes() for path in folder.iterdir()})
    return folder


def head(hub: HubServer, repo: str = "me/sql") -> str:
    return hub.storage.repos[repo].head.sha


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def blob(name: str = WEIGHTS) -> Path:
    """A file in the cache, behind the link."""
    (found,) = Path(constants.HF_HUB_CACHE).glob(f"models--me--sql/snapshots/*/{name}")
    return found.resolve()


# Whole ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["lfs", "redirect", "xet"])
def test_pull_to_a_folder(
    hub: HubServer, sql: Path, adapter: Command, tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.cdn = way == "redirect"
    if way == "xet":
        from huggingface_hub import HfApi

        HfApi().create_repo("me/xet")
        HfApi().upload_folder(repo_id="me/xet", folder_path=sql, ignore_patterns=["*.bin"])
        assert hub.storage.repos["me/xet"].head.files[WEIGHTS].xet
    repo = "me/xet" if way == "xet" else "me/sql"
    done = adapter("pull", repo, "-o", tmp_path / "out")
    assert done.code == 0, done
    assert f"{repo} is {repo}@{head(hub, repo)}: lora, 2 modules" in done.out
    assert "3 files verified" in done.out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([WEIGHTS, CONFIG, "README.md"])
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (sql / path.name).read_bytes()
        assert not path.is_symlink()
    assert not hub.count("*", "training_args")
    done = adapter("pull", repo, "-o", tmp_path / "out")
    done.refused("the output exists", "--force")
    assert adapter("pull", repo, "-o", tmp_path / "out", "--force", "-q") == (0, "", "")


def test_pull_into_the_cache(hub: HubServer, sql: Path, adapter: Command) -> None:
    done = adapter("pull", "me/sql", "--json")
    assert done.json["commit"] == head(hub)
    assert done.json["files"][CONFIG]["size"] == (sql / CONFIG).stat().st_size
    assert (Path(done.json["path"]) / WEIGHTS).read_bytes() == (sql / WEIGHTS).read_bytes()
    assert Path(done.json["path"]).is_relative_to(constants.HF_HUB_CACHE)


def test_revisions_and_folders(hub: HubServer, french: Path, adapter: Command, tmp_path: Path) -> None:
    first = head(hub, "other/adapters")
    repo = hub.storage.repos["other/adapters"]
    repo.refs["refs/tags/v1"] = first
    changed = json.loads((french / CONFIG).read_text()) | {"lora_alpha": 5}
    hub.add("other/adapters", {f"lora/fr/{CONFIG}": json.dumps(changed).encode()})
    for revision, alpha in (("", 5), ("@v1", 8), (f"@{first}", 8), ("@main", 5)):
        done = adapter("pull", f"other/adapters{revision}:lora/fr", "--json")
        assert json.loads((Path(done.json["path"]) / CONFIG).read_text())["lora_alpha"] == alpha
    adapter("pull", "other/adapters").refused("has no .safetensors", "other/adapters:lora/fr")
    adapter("pull", "other/adapters:lora/f").refused("has no folder 'lora/f'", "did you mean 'lora/fr'?")
    adapter("pull", "other/adapters@v2:lora/fr").refused("has no such revision")
    adapter("pull", "other").refused("is no adapter on the Hub", "owner/name")


def test_merge_of_two_and_once_more(
    hub: HubServer, sql: Path, french: Path, adapter: Command, handmade: Handmade, tmp_path: Path
) -> None:
    refs = ("me/sql", "other/adapters@main:lora/fr")
    done = adapter("merge", *refs, "--weights", "0.7", "0.3", "-o", tmp_path / "hub")
    assert done.code == 0, done
    assert adapter("merge", sql, french, "--weights", "0.7", "0.3", "-o", tmp_path / "local").code == 0
    one, two = (load_file(tmp_path / name / WEIGHTS) for name in ("hub", "local"))
    assert all((one[key] == two[key]).all() for key in two)
    terms = adapter("info", tmp_path / "hub", "--json").json["recipe"]["terms"]
    pinned = [f"me/sql@{head(hub)}", f"other/adapters@{head(hub, 'other/adapters')}:lora/fr"]
    assert [term["hub"] for term in terms] == pinned
    assert [term["adapter"] for term in terms] == list(refs)
    hub.add("me/sql", {CONFIG: b"{}"})  # the branch moves on
    (tmp_path / "apart").mkdir()
    (tmp_path / "hub").rename(tmp_path / "apart" / "hub")
    done = adapter("reproduce", tmp_path / "apart" / "hub")
    assert done.code == 0, done
    assert "every bit is the same" in done.out
    done = adapter("verify", tmp_path / "apart" / "hub", "--adapters", *pinned)
    assert "have the digests of the recipe" in done.out, done
    del hub.storage.repos["me/sql"]
    Path(constants.HF_HUB_CACHE).rename(tmp_path / "gone")
    done = adapter("reproduce", tmp_path / "apart" / "hub")
    assert done.code == 1
    assert "was made of what is not found beside it: 'me/sql'" in done.err


@pytest.mark.parametrize("command", ["diff", "resize", "convert", "load"])
def test_other_commands(
    hub: HubServer, sql: Path, french: Path, adapter: Command, tmp_path: Path, command: str
) -> None:
    hub.cdn = True
    out = tmp_path / "out"
    if command == "diff":
        done = adapter("diff", "me/sql", "other/adapters:lora/fr", "--json")
        assert done.json["pairs"] == [
            {**pair, "a": "me/sql", "b": "other/adapters:lora/fr"}
            for pair in adapter("diff", sql, french, "--json").json["pairs"]
        ]
    elif command == "load":
        own, here = ah.load("me/sql"), ah.load(sql)
        site = "net.layers.0.q"
        assert all((a == b).all() for a, b in zip(own.delta(site)[:2], here.delta(site)[:2], strict=True))
    else:
        words = {"resize": ["--rank", "1"], "convert": []}[command]
        assert adapter(command, "me/sql", *words, "-o", out).code == 0
        assert adapter(command, sql, *words, "-o", tmp_path / "local").code == 0
        assert (out / CONFIG).read_bytes() == (tmp_path / "local" / CONFIG).read_bytes()
        one, two = (load_file(folder / WEIGHTS) for folder in (out, tmp_path / "local"))
        assert all((one[key] == two[key]).all() for key in two)


def test_a_composition(hub: HubServer, adapter: Command, tmp_path: Path) -> None:
    import torch
    from torch import nn

    def built() -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
        return model, ah.adapt(model)

    model, adapters = built()
    for name in ("one", "two"):
        adapters.add(name, ah.LoRA(rank=2), targets="all-linear")
    for key, p in model.named_parameters():
        if ".adapters." in key:
            nn.init.normal_(p)
    adapters.activate(0.5 * ah.use("one") + ah.use("two"))
    adapters.save_composition(tmp_path / "both")
    hub.add("me/both", tmp_path / "both")
    x = torch.randn(4, 5)
    other, again = built()
    assert not torch.equal(other(x), model(x))
    again.load_composition("me/both")
    assert torch.equal(other(x), model(x))
    done = adapter("compile", "me/both", "-o", tmp_path / "lora")
    assert done.code == 0, done
    done = adapter("pull", "me/both", "-o", tmp_path / "out")
    assert "a composition of one, two" in done.out, done
    there = sorted(path.relative_to(tmp_path / "both") for path in (tmp_path / "both").rglob("*"))
    assert sorted(path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*")) == there


def test_a_base_and_a_fine_tune(
    hub: HubServer, sql: Path, adapter: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    base = tmp_path / "base"
    base.mkdir()
    shapes = {"net.layers.0.q": (13, 7), "net.layers.0.k": (5, 11), "net.layers.1.q": (13, 7)}
    save_file({f"{n}.weight": torch.randn(s) for n, s in shapes.items()}, base / "model.safetensors", {"format": "pt"})
    (base / "config.json").write_text("{}")
    (base / "pytorch_model.bin").write_bytes(b"no")
    hub.add("my-org/base", base)
    monkeypatch.setattr("adapterhub_lite.hub.headers.FIRST", 64)
    before = len(hub.seen)
    done = adapter("merge", "me/sql", "--into", "my-org/base", "--dry-run", "--json")
    assert done.code == 0, done
    sent = sum(seen.sent for seen in hub.seen[before:] if "model.safetensors" in seen.path)
    assert done.json["hub"]["references"] == [f"me/sql@{head(hub)}", f"my-org/base@{head(hub, 'my-org/base')}"]
    assert "transferred" in adapter("merge", "me/sql", "--into", "my-org/base", "--dry-run").out
    assert sent < (base / "model.safetensors").stat().st_size + (sql / WEIGHTS).stat().st_size
    assert not list(Path(constants.HF_HUB_CACHE).glob("**/model.safetensors"))
    done = adapter("merge", "me/sql", "--into", "my-org/base", "-o", tmp_path / "model")
    assert done.code == 0, done
    recipe = json.loads((tmp_path / "model" / "adapterhub_lite.json").read_text())["recipe"]
    assert (recipe["base"], recipe["hub"]) == ("base", f"my-org/base@{head(hub, 'my-org/base')}")
    done = adapter("verify", tmp_path / "model", "--base", "my-org/base", "--adapters", "me/sql")
    assert done.code == 0, done
    hub.add("my-org/tuned", tmp_path / "model")
    done = adapter("verify", "my-org/tuned")
    assert "have the digests of the manifest" in done.out, done
    done = adapter("reproduce", "my-org/tuned", "--base", "my-org/base")
    assert "every bit is the same" in done.out, done
    assert "a model, 3 tensors" in adapter("pull", "my-org/tuned").out
    done = adapter("extract", "my-org/base", "my-org/tuned", "--rank", "3", "-o", tmp_path / "back")
    assert done.code == 0, done
    assert json.loads((tmp_path / "back" / CONFIG).read_text())["base_model_name_or_path"] == "my-org/base"


# Headers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cdn", [False, True])
def test_info_reads_headers_only(
    hub: HubServer, sql: Path, adapter: Command, cdn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapterhub_lite.hub.headers.FIRST", 64)
    hub.cdn = cdn
    done = adapter("info", "me/sql", "--json")
    local = adapter("info", sql, "--json").json
    told = done.json["hub"]
    assert {key: value for key, value in done.json.items() if key != "hub"} == local
    path = sql / WEIGHTS
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    files = sum(seen.sent for seen in hub.matching("*", "resolve|cdn"))
    assert files == header + (sql / CONFIG).stat().st_size
    assert told["transferred"] == sum(seen.sent for seen in hub.matching("GET", "resolve|cdn|api/models"))
    assert told["references"] == [f"me/sql@{head(hub)}"]
    assert not hub.count("HEAD")
    assert not list(Path(constants.HF_HUB_CACHE).rglob(WEIGHTS))
    assert f"transferred  {told['transferred']}"[:13] in adapter("info", "me/sql").out


def test_planning_reads_headers_only(hub: HubServer, sql: Path, french: Path, adapter: Command) -> None:
    done = adapter("merge", "me/sql", "other/adapters:lora/fr", "--dry-run", "--json")
    assert done.json["hub"]["requests"] == 8
    assert "transferred" in adapter("merge", "me/sql", "--dry-run").out
    assert not list(Path(constants.HF_HUB_CACHE).rglob(WEIGHTS))
    config = json.loads((french / CONFIG).read_text())
    for name, base in (("me/sql", "one"), ("other/adapters", "two")):
        folder = "lora/fr/" if "other" in name else ""
        hub.add(name, {f"{folder}{CONFIG}": json.dumps({**config, "base_model_name_or_path": base}).encode()})
    adapter("diff", "me/sql", "other/adapters:lora/fr").refused("base")
    assert not list(Path(constants.HF_HUB_CACHE).rglob(WEIGHTS))


def test_a_server_that_knows_no_ranges(hub: HubServer, sql: Path, adapter: Command) -> None:
    import hub_server.files as files

    whole = files._ranged
    try:
        files._ranged = lambda data, request, headers: files.Answer(200, data, headers)
        assert adapter("info", "me/sql").code == 0
        assert adapter("pull", "me/sql").code == 0
    finally:
        files._ranged = whole


def test_headers_that_change_with_the_file(hub: HubServer, sql: Path) -> None:
    own = ah.load("me/sql")
    hub.fault("*", f"resolve/.*/{WEIGHTS}|cdn", times=None, change=lambda body: body[::-1])
    with pytest.raises(HubError, match="and the Hub announced sha256") as refused:
        own.delta("net.layers.0.q")
    assert refused.value.reason == "corrupt"
    assert not list(Path(constants.HF_HUB_CACHE).glob("**/snapshots/*/adapter_model*"))


def test_another_process_has_the_whole(hub: HubServer, sql: Path) -> None:
    import pickle

    own = ah.load("me/sql")
    info = own.sites["net.layers.0.q"].tensors["A"]
    assert not list(Path(constants.HF_HUB_CACHE).rglob(WEIGHTS))
    sent = pickle.loads(pickle.dumps(info))
    assert sent.path != info.path
    assert sent.path.read_bytes() == (sql / WEIGHTS).read_bytes()
    assert (sent.read() == info.read()).all()


# Offline --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pinned", [False, True])
def test_offline_there_are_no_requests(
    hub: HubServer, sql: Path, adapter: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pinned: bool
) -> None:
    ref = f"me/sql@{head(hub)}" if pinned else "me/sql"
    adapter("info", ref)
    assert adapter("pull", ref).code == 0
    before = len(hub.seen)
    if pinned:  # then online there are none either
        assert adapter("pull", ref).code == 0
        assert adapter("merge", ref, "-o", tmp_path / "o").code == 0
        assert adapter("info", ref, "--json").json["hub"]["requests"] == 0
    offline(monkeypatch)
    assert adapter("pull", ref, "-o", tmp_path / "out").code == 0
    assert adapter("resize", ref, "--rank", "1", "-o", tmp_path / "small").code == 0
    assert adapter("info", ref).code == 0
    assert len(hub.seen) == before
    done = adapter("pull", "me/nothing", "-o", tmp_path / "no")
    done.refused("me/nothing: is no folder, is not in the Hub's cache, and offline mode is on", "HF_HUB_OFFLINE")
    assert len(hub.seen) == before


def test_offline_with_headers_only(
    hub: HubServer, sql: Path, adapter: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert adapter("info", "me/sql").code == 0
    offline(monkeypatch)
    adapter("info", "me/sql").refused("offline mode is on")


def test_a_cache_that_the_client_alone_has_filled(
    hub: HubServer, sql: Path, adapter: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import snapshot_download

    snapshot_download("me/sql", allow_patterns=[WEIGHTS, CONFIG])
    with monkeypatch.context() as patched:
        offline(patched)
        assert "2 files verified" in adapter("pull", "me/sql").out
    assert "3 files verified" in adapter("pull", "me/sql").out  # what it lacked is known when there is a network
    adapter("pull", "me/sql:sub").refused("has no folder 'sub'")


# Corrupt --------------------------------------------------------------------------------------------------


def test_a_file_that_was_changed_in_the_cache_is_fetched_again(
    hub: HubServer, sql: Path, adapter: Command, tmp_path: Path
) -> None:
    ref = f"me/sql@{head(hub)}"
    assert adapter("pull", ref).code == 0
    data = bytearray(blob().read_bytes())
    data[-1] ^= 0xFF
    blob().write_bytes(data)
    before = hub.count("GET", WEIGHTS)
    assert adapter("merge", ref, "-o", tmp_path / "out").code == 0
    assert hub.count("GET", WEIGHTS) == before + 1
    assert blob().read_bytes() == (sql / WEIGHTS).read_bytes()
    one, two = load_file(tmp_path / "out" / WEIGHTS), load_file(sql / WEIGHTS)
    assert all((one[key] == two[key]).all() for key in two)


def test_a_copy_is_verified_as_it_is_made(
    hub: HubServer, sql: Path, adapter: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adapterhub_lite.cli import pull

    copied = pull.copied

    def later(pulled: Any, folder: Path) -> None:
        data = bytearray(blob().read_bytes())
        data[-1] ^= 1
        blob().write_bytes(data)
        copied(pulled, folder)

    monkeypatch.setattr(pull, "copied", later)
    adapter("pull", "me/sql", "-o", tmp_path / "out").refused(f"'{WEIGHTS}' has the sha256")
    assert not (tmp_path / "out").exists()


# Hostile --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "../x.json",
        "/etc/x.json",
        "a/../../x.json",
        "a\\..\\x.json",
        "a//x.json",
        "./x.json",
        "a\nb.json",
    ],
)
def test_names_that_would_lead_out_are_refused(
    hub: HubServer, sql: Path, adapter: Command, tmp_path: Path, name: str
) -> None:
    hub.add("me/sql", {name: b"{}"})
    before = sorted(path for path in tmp_path.rglob("*") if "store" not in str(path))
    for words in (["pull", "me/sql", "-o", tmp_path / "out"], ["info", "me/sql"]):
        adapter(*words).refused("which could lead anywhere", "do not trust")
    assert sorted(path for path in tmp_path.rglob("*") if "store" not in str(path)) == before
    assert not hub.count("GET", "resolve")


def test_links_are_not_written_through(hub: HubServer, sql: Path, adapter: Command, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "keep").write_text("mine")
    (tmp_path / "out").symlink_to(victim)
    adapter("pull", "me/sql", "-o", tmp_path / "out", "--force").refused("this is a link")
    storage = Path(constants.HF_HUB_CACHE) / "models--me--sql"
    (storage / "adapterhub_lite").mkdir(parents=True)
    (storage / "refs").mkdir()
    for link in (
        storage / "adapterhub_lite" / f"{head(hub)}.json",
        storage / "refs" / "main",
        tmp_path / "adapterhub.lock",
    ):
        link.symlink_to(victim / "keep")
    assert adapter("pull", "me/sql").code == 0
    adapter("pull", "me/sql", "--lock", "--lock-file", tmp_path / "adapterhub.lock").refused("link")
    assert (victim / "keep").read_text() == "mine"
    assert [path.name for path in victim.iterdir()] == ["keep"]


@pytest.mark.parametrize(
    "change",
    [
        lambda body: b"{",
        lambda body: b"\xff",
        lambda body: b"[1]",
        lambda body: body.replace(b'"oid"', b'"x"'),
        lambda body: body.replace(b'"size": ', b'"size": -'),
        lambda body: body.replace(b'"oid": "', b'"oid": "../'),
    ],
)
def test_answers_that_are_none(hub: HubServer, sql: Path, adapter: Command, change: Callable[[bytes], bytes]) -> None:
    hub.fault("GET", "/tree/", times=None, change=change)
    adapter("info", "me/sql").refused("me/sql: ", "the answer is not one of a Hub", "HF_ENDPOINT")


def test_a_pickle_is_not_fetched(hub: HubServer, adapter: Command) -> None:
    hub.add("me/old", {"adapter_model.bin": b"x", CONFIG: b"{}"})
    adapter("pull", "me/old").refused("'adapter_model.bin', a pickle", "safetensors")
    assert not hub.count("*", "resolve")


def test_what_is_broken_is_refused_by_name(hub: HubServer, sql: Path, adapter: Command, tmp_path: Path) -> None:
    hub.add("me/sql", {CONFIG: b'{"peft_type": "LORA", "r": "4"}'})
    for words in (["info", "me/sql"], ["pull", "me/sql", "-o", tmp_path / "out"]):
        line = adapter(*words).refused(f"me/sql@{head(hub)}/{CONFIG}")
        assert "headers-" not in line
    assert not (tmp_path / "out").exists()


# Locks ----------------------------------------------------------------------------------------------------


def test_a_lock_holds(
    hub: HubServer, sql: Path, french: Path, adapter: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = head(hub)
    assert adapter("pull", "me/sql", "--lock").code == 0
    assert adapter("pull", "other/adapters:lora/fr", "--lock").code == 0
    hub.add("me/sql", {"README.md": b"changed"})
    done = adapter("pull", "me/sql", "--locked", "--json")
    assert done.json["commit"] == first
    assert [one["ref"] for one in adapter("pull", "--locked", "--json").json["adapters"]] == [
        "me/sql",
        "other/adapters:lora/fr",
    ]
    adapter("pull", "me/other", "--locked").refused("does not have 'me/other'", "--lock")
    text = Path("adapterhub.lock").read_text()
    told = json.loads(text)
    told["adapters"]["me/sql"]["files"]["README.md"] = "0" * 64
    Path("adapterhub.lock").write_text(json.dumps(told))
    adapter("pull", "me/sql", "--locked").refused("'README.md' is not the file that adapterhub.lock has locked")
    for broken in ("{}", "[]", '{"version": 1, "adapters": {"me/sql": {"repo": "../x"}}}', text.replace("me/sql", "x")):
        Path("adapterhub.lock").write_text(broken)
        adapter("pull", "--locked").refused("adapterhub.lock")
    assert adapter("pull", "me/sql", "--locked", "--lock").code == 2
    assert adapter("pull").code == 2


def test_a_recipe_says_what_may_move(hub: HubServer, sql: Path, french: Path, adapter: Command, tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    pinned = f"other/adapters@{head(hub, 'other/adapters')}:lora/fr"
    recipe.write_text(f'[[adapters]]\npath = "me/sql"\n[[adapters]]\npath = "{pinned}"\n[[adapters]]\npath = "sql"\n')
    done = adapter("merge", "--recipe", recipe, "-o", tmp_path / "out")
    assert done.code == 0, done
    warnings = [line for line in done.err.splitlines() if line.startswith("warning")]
    assert warnings == [
        f"warning: me/sql: another commit may be there tomorrow; to merge the same again write me/sql@{head(hub)}"
    ]


def test_a_folder_comes_first(hub: HubServer, sql: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "me").mkdir()
    sql.rename(tmp_path / "me" / "sql")
    monkeypatch.chdir(tmp_path)
    before = len(hub.seen)
    assert len(ah.load("me/sql").sites) == 2
    assert snapshot("me/sql") == Path("me/sql")
    assert len(hub.seen) == before
    with pytest.raises(FileError, match="if it is private; did you mean 'sql'"):
        ah.load("me/sqll")
