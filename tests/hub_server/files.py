"""Files on their way up and down: resolve with ranges, LFS, and the tokens of Xet."""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING
from urllib.parse import quote

from .wire import Answer, Refused, Request

if TYPE_CHECKING:
    from .server import HubServer
    from .storage import Entry


def resolve(hub: HubServer, request: Request, repo: str, revision: str, path: str) -> Answer:
    found = hub.storage.fetchable(repo, request.user)
    commit = found.at(revision)
    entry = commit.files.get(path)
    if entry is None:
        raise Refused(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit.sha})
    own = {"X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes", "ETag": f'"{entry.etag}"'}
    if entry.sha256 is not None:
        own |= {"X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": str(len(entry.data))}
        if entry.xet is not None:
            route = f"{hub.url}/api/models/{repo}/xet-read-token/{commit.sha}"
            own |= {"X-Xet-Hash": entry.xet, "X-Xet-Refresh-Route": route}
        if hub.cdn:  # on another host, as the Hub does
            hub.storage.large.setdefault(entry.sha256, entry.data)
            return Answer(302, b"", {**own, "Location": f"{hub.other_url}/cdn/{quote(entry.sha256)}"})
    return _ranged(entry.data, request, own)


def cdn(hub: HubServer, request: Request, oid: str) -> Answer:
    if oid not in hub.storage.large:
        raise Refused(404)
    return _ranged(hub.storage.large[oid], request, {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})


def _ranged(data: bytes, request: Request, headers: dict[str, str]) -> Answer:
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", ""))
    if asked is None or asked[0] == "bytes=-":
        return Answer(200, data, headers)
    if asked[1]:
        start, stop = int(asked[1]), min(int(asked[2]) + 1 if asked[2] else len(data), len(data))
    else:
        start, stop = max(len(data) - int(asked[2]), 0), len(data)
    if start >= stop:
        raise Refused(416, "", "", {"Content-Range": f"bytes */{len(data)}"})
    return Answer(206, data[start:stop], {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})


def lfs_batch(hub: HubServer, request: Request, repo: str) -> Answer:
    hub.storage.writable(repo, request.user)
    objects = []
    for own in request.json["objects"]:
        told = {"oid": own["oid"], "size": own["size"]}
        if own["oid"] not in hub.storage.large:
            upload = {"href": f"{hub.url}/lfs/{own['oid']}"}
            verify = {"href": f"{hub.url}/lfs/verify/{own['oid']}"}
            told["actions"] = {"upload": upload, "verify": verify}
        objects.append(told)
    return Answer.of({"transfer": "basic", "objects": objects})


def lfs_put(hub: HubServer, request: Request, oid: str) -> Answer:
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise Refused(400, "", "the bytes are not those that were announced")
    hub.storage.large[oid] = request.body
    return Answer()


def lfs_verify(hub: HubServer, request: Request, oid: str) -> Answer:
    if len(hub.storage.large.get(oid, b"")) != request.json["size"]:
        raise Refused(404, "", "no such object")
    return Answer.of({})


def xet_token(hub: HubServer, request: Request, repo: str, kind: str, revision: str) -> Answer:
    if hub.xet is None:
        raise Refused(404, "", "Not found")
    (hub.storage.writable if kind == "write" else hub.storage.fetchable)(repo, request.user)
    url, token, until = hub.xet.url, "xet-token", hub.xet.expires
    headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(until)}
    return Answer.of({"casUrl": url, "accessToken": token, "exp": until}, **headers)


def uploaded(hub: HubServer, oid: str) -> Entry:
    """The large file of this SHA-256, wherever the client put it."""
    from .storage import Entry

    xet = hub.xet.files().get(oid) if hub.xet is not None else None
    if xet is None and oid in hub.storage.large:
        return Entry(hub.storage.large[oid], oid)
    if xet is None:
        raise Refused(400, "", f"LFS object {oid} was not uploaded")
    assert hub.xet is not None
    data = hub.xet.read(xet, oid)
    assert hashlib.sha256(data).hexdigest() == oid
    return Entry(data, oid, xet)
