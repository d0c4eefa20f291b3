"""What `owner/name[@revision][:subfolder]` means."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_REVISION = r"\w(?:[\w./+-]{0,198}\w)?"
_FOLDER = r"[^\s/\\:@.][^/\\:@\x00-\x1f\x7f]{0,199}"
_REFERENCE = re.compile(
    rf"(?P<repo>{_PART}/{_PART})(?:@(?P<revision>{_REVISION}))?(?::(?P<folder>{_FOLDER}(?:/{_FOLDER}){{0,15}})/?)?"
)
_COMMIT = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True)
class Reference:
    """A folder in a repository on the Hub, at a revision.

    >>> parse("someone/sql@v1:peft/best")
    Reference(repo='someone/sql', revision='v1', folder='peft/best')
    """

    repo: str
    revision: str | None = None
    """A branch, a tag or a commit; None is the branch `main`."""
    folder: str = ""

    def __str__(self) -> str:
        revision = "" if self.revision is None else f"@{self.revision}"
        return f"{self.repo}{revision}{':' if self.folder else ''}{self.folder}"

    @property
    def pinned(self) -> bool:
        """Whether it names a commit, and so means the same for ever."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None

    @property
    def commit(self) -> str:
        """Of one that is pinned."""
        assert self.revision is not None
        return self.revision

    def at(self, commit: str) -> Reference:
        """The same, pinned."""
        return replace(self, revision=commit)


def parse(text: str) -> Reference | None:
    """The reference that the text is, or None."""
    found = _REFERENCE.fullmatch(text)
    if found is None or ".." in (found["revision"] or "") or "//" in (found["revision"] or ""):
        return None
    return Reference(found["repo"], found["revision"], found["folder"] or "")


def in_cache(folder: Path) -> Reference | None:
    """What a folder of the client's cache is on the Hub; None for any other folder.

    >>> print(in_cache(Path("/cache/models--my-org--base-7b/snapshots/0123abcd/fp16")))
    my-org/base-7b@0123abcd:fp16
    """
    parts = folder.parts
    for at in range(len(parts) - 2, 0, -1):
        if parts[at] == "snapshots" and parts[at - 1].startswith("models--"):
            repo = parts[at - 1].removeprefix("models--").replace("--", "/")
            return Reference(repo, parts[at + 1], "/".join(parts[at + 2 :]))
    return None


def on_hub(ref: str | os.PathLike[str]) -> Reference | None:
    """The reference that `ref` is; None if it is a path, or something local has that name: that comes first."""
    if os.path.lexists(ref):
        return None
    return parse(Path(ref).as_posix() if isinstance(ref, Path) else str(ref))
