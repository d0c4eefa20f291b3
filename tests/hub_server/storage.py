"""What the Hub keeps: repositories, their commits and branches, and the large files' bytes."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from fnmatch import fnmatch
from typing import Any

import yaml

from .wire import Refused

LARGE = ("*.safetensors", "*.bin", "*.pt", "*.gguf", "*.msgpack", "*.zip")  # kept in LFS or Xet
ATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LARGE).encode()


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass(frozen=True)
class Entry:
    """One file in a commit."""

    data: bytes
    sha256: str | None = None  # of a large file
    xet: str | None = None

    @property
    def oid(self) -> str:
        """The git blob's: of a large file, that of its pointer."""
        if self.sha256 is None:
            return git_sha1(self.data)
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        return git_sha1(text.encode())

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid

    def told(self, path: str) -> dict[str, Any]:
        """As the listing of a tree tells it."""
        own: dict[str, Any] = {"type": "file", "path": path, "size": len(self.data), "oid": self.oid}
        if self.sha256 is not None:
            own["lfs"] = {"oid": self.sha256, "size": len(self.data), "pointerSize": 134}
        return {**own, **({"xetHash": self.xet} if self.xet else {})}


@dataclass(frozen=True)
class Commit:
    sha: str
    parent: str | None
    files: Mapping[str, Entry]
    title: str
    description: str = ""
    author: str = "me"
    date: str = field(default_factory=lambda: datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z"))


@dataclass
class Repo:
    """A model's repository. Tests may set its flags, and may look at and change what it has."""

    name: str  # owner/name
    private: bool = False
    gated: str | bool = False  # False, "auto" or "manual"
    granted: set[str] = field(default_factory=set)  # who may fetch from a gated one
    downloads: int = 0
    likes: int = 0
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)  # refs/heads/main, refs/tags/v1, refs/pr/1 → sha
    lock: threading.RLock = field(default_factory=threading.RLock)

    def __post_init__(self) -> None:
        self.add({".gitattributes": Entry(ATTRIBUTES)}, "initial commit")

    @property
    def owner(self) -> str:
        return self.name.split("/")[0]

    @property
    def head(self) -> Commit:
        return self.commits[self.refs["refs/heads/main"]]

    @property
    def history(self) -> list[Commit]:
        """Of main, the newest first."""
        return self.log(self.head)

    def log(self, commit: Commit) -> list[Commit]:
        found = [commit]
        while found[-1].parent is not None:
            found.append(self.commits[found[-1].parent])
        return found

    def at(self, revision: str) -> Commit:
        """The commit of a sha (or the start of one), a branch, a tag or a pull request."""
        for ref in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if ref in self.refs:
                return self.commits[self.refs[ref]]
        if revision in self.commits:
            return self.commits[revision]
        raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def add(
        self,
        files: Mapping[str, Entry | None],
        title: str,
        *,
        description: str = "",
        author: str = "me",
        parent: str | None = None,
        ref: str = "refs/heads/main",
        onto: str | None = None,
    ) -> Commit:
        """Commit changes; None deletes a file. 412 if `parent` is not the head of `ref`. `onto`: a new ref's parent."""
        with self.lock:
            head = self.refs.get(ref, onto)
            if parent is not None and (head is None or not head.startswith(parent)):
                raise Refused(412, "", "A commit has happened since. Please refresh and try again.")
            now = {**(self.commits[head].files if head else {}), **files}
            kept = {path: entry for path, entry in sorted(now.items()) if entry is not None}
            listing = "".join(f"{path} {entry.etag}\n" for path, entry in kept.items())
            sha = hashlib.sha1(f"{self.name} {head} {len(self.commits)} {title}\n{listing}".encode()).hexdigest()
            self.commits[sha] = Commit(sha, head, kept, title, description, author)
            self.refs[ref] = sha
            return self.commits[sha]

    def card(self, commit: Commit | None = None) -> dict[str, Any]:
        """The metadata at the top of README.md."""
        readme = (commit or self.head).files.get("README.md", Entry(b"")).data.decode("utf-8", "replace")
        if not readme.startswith("---\n") or "\n---" not in readme[4:]:
            return {}
        try:
            found = yaml.safe_load(readme[4:].split("\n---")[0])
        except yaml.YAMLError:
            return {}
        return found if isinstance(found, dict) else {}

    def tags(self, commit: Commit | None = None) -> list[str]:
        """As the Hub makes them from the card."""
        card = self.card(commit)
        bases = card.get("base_model") or []
        relation = card.get("base_model_relation")
        own = [card.get("library_name"), *(card.get("tags") or [])]
        for base in [bases] if isinstance(bases, str) else bases:
            own += [f"base_model:{base}", *([f"base_model:{relation}:{base}"] if relation else [])]
        own += [f"dataset:{name}" for name in card.get("datasets") or []]
        own += [f"license:{card['license']}"] if "license" in card else []
        return [str(tag) for tag in dict.fromkeys(own) if tag]


def is_large(path: str, size: int) -> bool:
    return any(fnmatch(path, pattern) for pattern in LARGE) or size > 10_000_000


class Storage:
    """All repositories, who may do what, and the large files that were uploaded."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}  # by sha256
        self.users: dict[str, str] = {"hf_me": "me", "hf_other": "other"}  # by token
        self.organisations: dict[str, set[str]] = {"my-org": {"me"}}
        self.lock = threading.RLock()

    def create(self, name: str, **flags: Any) -> Repo:
        with self.lock:
            if name in self.repos:
                raise Refused(409, "", "You already created this model repo")
            self.repos[name] = Repo(name, **flags)
            return self.repos[name]

    def may_write(self, user: str | None, owner: str) -> bool:
        return user is not None and (user == owner or user in self.organisations.get(owner, ()))

    def readable(self, name: str, user: str | None) -> Repo:
        """The repository, if this user may see it; else, as on the Hub, it is not there."""
        repo = self.repos.get(name)
        if repo is None or (repo.private and not self.may_write(user, repo.owner)):
            raise Refused(401 if user is None else 404, "RepoNotFound", "Repository not found")
        return repo

    def fetchable(self, name: str, user: str | None) -> Repo:
        """The repository, if this user may have its files."""
        repo = self.readable(name, user)
        if repo.gated and not (self.may_write(user, repo.owner) or user in repo.granted):
            what = f"Access to model {name} is restricted. You must have access to it and be authenticated."
            raise Refused(401 if user is None else 403, "GatedRepo", what)
        return repo

    def writable(self, name: str, user: str | None) -> Repo:
        repo = self.readable(name, user)
        if user is None:
            raise Refused(401, "", "Invalid username or password.")
        if not self.may_write(user, repo.owner):
            raise Refused(403, "", f"you don't have the rights to write to {name}")
        return repo
