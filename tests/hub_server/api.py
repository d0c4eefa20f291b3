"""The endpoints below /api: repositories, what they have, and commits."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

import yaml

from .files import uploaded
from .storage import Commit, Entry, Repo, git_sha1, is_large
from .wire import Answer, Refused, Request

if TYPE_CHECKING:
    from .server import HubServer


def whoami(hub: HubServer, request: Request) -> Answer:
    if request.user is None:
        raise Refused(401, "", "Invalid credentials in Authorization header")
    orgs = [{"name": name} for name, members in hub.storage.organisations.items() if request.user in members]
    return Answer.of({"type": "user", "name": request.user, "orgs": orgs, "auth": {"type": "access_token"}})


def create(hub: HubServer, request: Request) -> Answer:
    if request.user is None:
        raise Refused(401, "", "Invalid username or password.")
    asked = request.json
    owner = asked.get("organization") or request.user
    if not hub.storage.may_write(request.user, owner):
        raise Refused(403, "", f"You don't have the rights to create a model under the namespace {owner!r}")
    name = f"{owner}/{asked['name']}"
    private = asked.get("visibility") == "private" or asked.get("private") is True
    try:
        hub.storage.create(name, private=private)
    except Refused as refused:
        told = {"error": refused.message, "url": f"{hub.url}/{name}"}
        return Answer.of(told, refused.status, **{"X-Error-Message": refused.message})
    return Answer.of({"url": f"{hub.url}/{name}", "name": name, "id": name})


def delete(hub: HubServer, request: Request) -> Answer:
    asked = request.json
    name = f"{asked.get('organization') or request.user}/{asked['name']}"
    hub.storage.writable(name, request.user)
    del hub.storage.repos[name]
    return Answer.of({})


def settings(hub: HubServer, request: Request, repo: str) -> Answer:
    found, asked = hub.storage.writable(repo, request.user), request.json
    found.private = asked.get("visibility", "private" if found.private else "public") == "private"
    found.gated = asked.get("gated", found.gated)
    return Answer.of({})


def validate_yaml(hub: HubServer, request: Request) -> Answer:
    text = request.json["content"]
    problems = []
    if text.startswith("---\n"):
        try:
            if not isinstance(yaml.safe_load(text[4:].split("\n---")[0]), dict):
                problems = [{"message": "the metadata is not a mapping"}]
        except yaml.YAMLError as error:
            problems = [{"message": str(error)}]
    return Answer.of({"errors": problems, "warnings": []}, 400 if problems else 200)


def models(hub: HubServer, request: Request) -> Answer:
    found = []
    for name in sorted(hub.storage.repos):
        try:
            repo = hub.storage.readable(name, request.user)
        except Refused:
            continue
        author, text = request.asked("author"), "".join(request.query.get("search", []))
        if author and repo.owner not in author:
            continue
        if text.lower() in name.lower() and set(request.asked("filter")) <= set(repo.tags()):
            found.append(repo)
    by = "".join(request.query.get("sort", []))
    if by in ("downloads", "likes"):
        found.sort(key=lambda repo: -getattr(repo, by))
    limit = int("".join(request.query.get("limit", ["1000"])))
    whole = bool(request.query.get("full") or request.asked("expand"))
    return Answer.of([info(repo, repo.head, whole=whole) for repo in found[:limit]])


def model(hub: HubServer, request: Request, repo: str, revision: str = "main") -> Answer:
    found = hub.storage.readable(repo, request.user)
    return Answer.of(info(found, found.at(revision), whole=True, blobs="blobs" in request.query))


def info(repo: Repo, commit: Commit, *, whole: bool, blobs: bool = False) -> dict[str, Any]:
    """What the Hub tells of a model."""
    card = repo.card(commit)
    told: dict[str, Any] = {
        "_id": git_sha1(repo.name.encode())[:24],
        "id": repo.name,
        "modelId": repo.name,
        "private": repo.private,
        "downloads": repo.downloads,
        "likes": repo.likes,
        "tags": repo.tags(commit),
        "createdAt": repo.log(commit)[-1].date,
    }
    if "library_name" in card:
        told["library_name"] = card["library_name"]
    if not whole:
        return told
    siblings = []
    for path, entry in commit.files.items():
        more: dict[str, Any] = {"size": len(entry.data), "blobId": entry.oid} if blobs else {}
        if blobs and entry.sha256 is not None:
            more["lfs"] = {"sha256": entry.sha256, "size": len(entry.data), "pointerSize": 134}
        siblings.append({"rfilename": path, **more})
    more = {"sha": commit.sha, "lastModified": commit.date, "gated": repo.gated, "disabled": False}
    return {**told, **more, "author": repo.owner, "cardData": card, "siblings": siblings}


def tree(hub: HubServer, request: Request, repo: str, revision: str, folder: str = "") -> Answer:
    commit = hub.storage.readable(repo, request.user).at(revision)
    inside = f"{folder}/" if folder else ""
    below = {path: entry for path, entry in commit.files.items() if path.startswith(inside)}
    if folder and not below:
        raise Refused(404, "EntryNotFound", f"{folder} does not exist on {revision}")
    deep = request.query.get("recursive", ["false"])[0].lower() in ("true", "1")
    found: dict[str, dict[str, Any]] = {}
    for path, entry in below.items():
        parts = path.removeprefix(inside).split("/")
        for n in range(1, len(parts)) if deep else range(1, min(len(parts), 2)):
            name = inside + "/".join(parts[:n])
            found[name] = {"type": "directory", "path": name, "size": 0, "oid": git_sha1(name.encode())}
        if deep or len(parts) == 1:
            found[path] = entry.told(path)
    return Answer.of(list(found.values()))


def paths_info(hub: HubServer, request: Request, repo: str, revision: str) -> Answer:
    commit = hub.storage.readable(repo, request.user).at(revision)
    if request.headers.get("content-type", "").startswith("application/json"):
        asked = request.json["paths"]
    else:
        from urllib.parse import parse_qs

        asked = parse_qs(request.body.decode()).get("paths", [])
    wanted = [asked] if isinstance(asked, str) else asked
    return Answer.of([commit.files[path].told(path) for path in wanted if path in commit.files])


def refs(hub: HubServer, request: Request, repo: str) -> Answer:
    found = hub.storage.readable(repo, request.user).refs

    def named(kind: str) -> list[dict[str, str]]:
        start = f"refs/{kind}/"
        return [
            {"name": ref.removeprefix(start), "ref": ref, "targetCommit": sha}
            for ref, sha in found.items()
            if ref.startswith(start)
        ]

    return Answer.of({"branches": named("heads"), "tags": named("tags"), "converts": [], "pullRequests": named("pr")})


def commits(hub: HubServer, request: Request, repo: str, revision: str) -> Answer:
    found = hub.storage.readable(repo, request.user)
    return Answer.of(
        [
            {"id": c.sha, "title": c.title, "message": c.description, "date": c.date, "authors": [{"user": c.author}]}
            for c in found.log(found.at(revision))
        ]
    )


def branch(hub: HubServer, request: Request, repo: str, name: str) -> Answer:
    found = hub.storage.writable(repo, request.user)
    if request.method == "DELETE":
        if found.refs.pop(f"refs/heads/{name}", None) is None:
            raise Refused(404, "RevisionNotFound", f"no branch {name}")
        return Answer.of({})
    return _new_ref(found, f"refs/heads/{name}", request.json.get("startingPoint") or "main")


def tag(hub: HubServer, request: Request, repo: str, name: str) -> Answer:
    found = hub.storage.writable(repo, request.user)
    if request.method == "DELETE":
        if found.refs.pop(f"refs/tags/{name}", None) is None:
            raise Refused(404, "RevisionNotFound", f"no tag {name}")
        return Answer.of({})
    return _new_ref(found, f"refs/tags/{request.json['tag']}", name)


def _new_ref(repo: Repo, ref: str, revision: str) -> Answer:
    with repo.lock:
        if ref in repo.refs:
            raise Refused(409, "", "Reference already exists")
        repo.refs[ref] = repo.at(revision).sha
    return Answer.of({})


def preupload(hub: HubServer, request: Request, repo: str, revision: str) -> Answer:
    # Whoever may read may open a pull request.
    found = (hub.storage.readable if "create_pr" in request.query else hub.storage.writable)(repo, request.user)
    now = found.at(revision).files
    told = []
    for own in request.json["files"]:
        large = is_large(own["path"], own["size"])
        mode = {"path": own["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        entry = now.get(own["path"])
        told.append({**mode, **({"oid": entry.etag} if entry is not None else {})})
    return Answer.of({"files": told, "commitOid": found.at(revision).sha})


def commit(hub: HubServer, request: Request, repo: str, revision: str) -> Answer:
    asked_pr = "create_pr" in request.query
    found = (hub.storage.readable if asked_pr else hub.storage.writable)(repo, request.user)
    if request.user is None:
        raise Refused(401, "", "Invalid username or password.")
    header: dict[str, Any] = {}
    changes: dict[str, Entry | None] = {}
    for line in request.body.splitlines():
        item = json.loads(line)
        key, value = item["key"], item["value"]
        if key == "header":
            header = value
        elif key == "file":
            changes[value["path"]] = Entry(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            changes[value["path"]] = uploaded(hub, value["oid"])
        elif key == "deletedFile":
            if value["path"] not in found.at(revision).files:
                raise Refused(404, "EntryNotFound", "A file with this name doesn't exist")
            changes[value["path"]] = None
        elif key == "deletedFolder":
            inside = value["path"].rstrip("/") + "/"
            changes |= {path: None for path in found.at(revision).files if path.startswith(inside)}
        else:
            raise Refused(400, "", f"unknown operation {key!r}")
    if not header.get("summary"):
        raise Refused(400, "", "a commit needs a summary")
    if not asked_pr and f"refs/heads/{revision}" not in found.refs and revision not in found.refs:
        raise Refused(404, "RevisionNotFound", f"no branch {revision}")
    ref = revision if revision in found.refs else f"refs/heads/{revision}"
    onto = None
    if asked_pr:
        onto = found.at(header.get("parentCommit") or revision).sha
        ref = f"refs/pr/{1 + sum(name.startswith('refs/pr/') for name in found.refs)}"
    made = found.add(
        changes,
        header["summary"],
        description=header.get("description", ""),
        author=request.user,
        parent=None if asked_pr else header.get("parentCommit"),
        ref=ref,
        onto=onto,
    )
    url = f"{hub.url}/{repo}"
    told = {"success": True, "commitOid": made.sha, "commitUrl": f"{url}/commit/{made.sha}", "hookOutput": ""}
    if asked_pr:
        told["pullRequestUrl"] = f"{url}/discussions/{ref.rpartition('/')[2]}"
    return Answer.of(told)
