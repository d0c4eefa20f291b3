"""The server itself: routes, faults, and a record of all requests."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from . import api, files
from .faults import Fault, Faults
from .storage import Entry, Repo, Storage, is_large
from .wire import Answer, Refused, Request
from .xet import XetStore

_REPO, _REV = r"(?P<repo>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
ROUTES: list[tuple[str, str, Callable[..., Answer]]] = [
    ("GET", "/api/whoami-v2", api.whoami),
    ("POST", "/api/repos/create", api.create),
    ("DELETE", "/api/repos/delete", api.delete),
    ("POST", "/api/validate-yaml", api.validate_yaml),
    ("GET", "/api/models", api.models),
    ("GET", f"/api/models/{_REPO}", api.model),
    ("PUT", f"/api/models/{_REPO}/settings", api.settings),
    ("GET", f"/api/models/{_REPO}/revision/{_REV}", api.model),
    ("GET", f"/api/models/{_REPO}/tree/{_REV}(?:/(?P<folder>.+))?", api.tree),
    ("POST", f"/api/models/{_REPO}/paths-info/{_REV}", api.paths_info),
    ("GET", f"/api/models/{_REPO}/refs", api.refs),
    ("GET", f"/api/models/{_REPO}/commits/{_REV}", api.commits),
    ("POST", f"/api/models/{_REPO}/preupload/{_REV}", api.preupload),
    ("POST", f"/api/models/{_REPO}/commit/{_REV}", api.commit),
    ("GET", f"/api/models/{_REPO}/xet-(?P<kind>read|write)-token/{_REV}", files.xet_token),
    ("POST|DELETE", f"/api/models/{_REPO}/branch/(?P<name>[^/]+)", api.branch),
    ("POST|DELETE", f"/api/models/{_REPO}/tag/(?P<name>[^/]+)", api.tag),
    ("POST", f"/{_REPO}\\.git/info/lfs/objects/batch", files.lfs_batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", files.lfs_put),
    ("POST", "/lfs/verify/(?P<oid>[0-9a-f]{64})", files.lfs_verify),
    ("GET|HEAD", "/cdn/(?P<oid>[0-9a-f]{64})", files.cdn),
    ("GET|HEAD", f"/{_REPO}/resolve/{_REV}/(?P<path>.+)", files.resolve),
]


@dataclass(frozen=True)
class Seen:
    """A request that came."""

    method: str
    path: str
    status: int  # 0 where no answer was sent
    received: int  # bytes of the request's body
    sent: int  # bytes of the answer's body
    user: str | None
    headers: Mapping[str, str]


class HubServer:
    """`with HubServer(folder) as hub:` listens at `hub.url`. With a folder it has Xet, whose store is there."""

    def __init__(self, folder: Path | None = None) -> None:
        self.storage = Storage()
        self.xet = XetStore(folder) if folder is not None else None
        self.cdn = False  # large files come by a redirect to another host
        self.faults = Faults()
        self.seen: list[Seen] = []
        self._stopping = threading.Event()
        self._server = _Server(("127.0.0.1", 0), self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def other_url(self) -> str:
        """The same server by another name."""
        return f"http://localhost:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._server.shutdown()
        self._server.server_close()

    # For tests ---------------------------------------------------------------------------------------

    def add(self, name: str, files: Mapping[str, bytes] | Path, title: str = "add files", **flags: Any) -> Repo:
        """Put files, or those of a folder, into a repository, made if it is missing, without any client."""
        repo = self.storage.repos.get(name) or self.storage.create(name)
        for flag, value in flags.items():
            setattr(repo, flag, value)
        if isinstance(files, Path):
            found = {p.relative_to(files).as_posix(): p.read_bytes() for p in sorted(files.rglob("*")) if p.is_file()}
        else:
            found = dict(files)
        repo.add({path: self.entry(path, data) for path, data in found.items()}, title)
        return repo

    def entry(self, path: str, data: bytes) -> Entry:
        import hashlib

        if not is_large(path, len(data)):
            return Entry(data)
        oid = hashlib.sha256(data).hexdigest()
        self.storage.large[oid] = data
        return Entry(data, oid)

    def fault(self, method: str, path: str, **how: Any) -> Fault:
        """Let something go wrong; see `Fault`."""
        made = Fault(method, path, **how)
        self.faults.all.append(made)
        return made

    def count(self, method: str = "*", path: str = "") -> int:
        """How many requests came that match."""
        return len(self.matching(method, path))

    def matching(self, method: str = "*", path: str = "") -> list[Seen]:
        return [seen for seen in self.seen if method in ("*", seen.method) and re.search(path, seen.path)]

    # For the handler ---------------------------------------------------------------------------------

    def answer(self, request: Request) -> Answer:
        for methods, pattern, function in ROUTES:
            found = re.fullmatch(pattern, request.path)
            if found is not None and request.method in methods.split("|"):
                parts = {name: unquote(value) for name, value in found.groupdict().items() if value is not None}
                try:
                    return function(self, request, **parts)
                except Refused as refused:
                    return refused.answer
        return Refused(404, "", "Not found").answer

    def user(self, authorization: str) -> str | None:
        return self.storage.users.get(authorization.removeprefix("Bearer "))

    def wait_for_stop(self) -> None:
        self._stopping.wait(60)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, address: tuple[str, int], hub: HubServer) -> None:
        super().__init__(address, _Handler)
        self.hub = hub

    def handle_error(self, request: Any, client_address: Any) -> None:
        import sys

        if not isinstance(sys.exc_info()[1], ConnectionError):  # the client has gone
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer's body waits 40 ms for the client to acknowledge the headers
    server: _Server

    def _handle(self) -> None:
        hub, parts = self.server.hub, urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(
            self.command,
            parts.path,
            parse_qs(parts.query, keep_blank_values=True),
            headers,
            self._body(headers),
            hub.user(headers.get("authorization", "")),
        )
        fault = hub.faults.of(request)
        status = sent = 0
        try:
            answer = None
            if fault is not None:
                if fault.before is not None:
                    fault.before(hub)
                if fault.hang:
                    hub.wait_for_stop()
                    self.close_connection = True
                    return
                answer = fault.refusal()
            if answer is None:
                answer = hub.answer(request)
            if fault is not None and fault.drop:
                self.close_connection = True
                return
            body = answer.body
            if fault is not None and fault.change is not None and answer.status < 300:
                body = fault.change(body)
            shown = body if self.command != "HEAD" else b""
            if fault is not None and fault.truncate is not None:
                shown = shown[: fault.truncate]
                self.close_connection = True
            status, sent = answer.status, len(shown)
        finally:
            hub.seen.append(Seen(self.command, parts.path, status, len(request.body), sent, request.user, headers))
        with contextlib.suppress(ConnectionError):
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value.encode("ascii", "replace").decode())
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(shown)

    def _body(self, headers: Mapping[str, str]) -> bytes:
        if headers.get("transfer-encoding", "").lower() != "chunked":
            return self.rfile.read(int(headers.get("content-length") or 0))
        body = bytearray()
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return bytes(body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle  # noqa: N815 - http.server's names

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the record is `hub.seen`."""
