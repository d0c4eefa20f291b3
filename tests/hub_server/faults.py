"""What goes wrong on demand: for the n-th request that matches."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .wire import Answer, Refused, Request

if TYPE_CHECKING:
    from .server import HubServer


@dataclass
class Fault:
    """One thing that goes wrong. `method` may be "*"; `path` is searched for, as a regular expression."""

    method: str
    path: str
    nth: int = 1
    """The first request that it befalls, counted among those that match."""
    times: int | None = 1
    """How many from there on; None is all."""

    before: Callable[[HubServer], object] | None = None
    """Done first: somebody else's commit, say."""
    status: int | None = None
    """Refuse, with this status and the next three; nothing is done."""
    code: str = ""
    message: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    hang: bool = False
    """Do not answer, until the client gives up."""
    drop: bool = False
    """Do what is asked, then close the connection without an answer."""
    change: Callable[[bytes], bytes] | None = None
    """Of the body of the answer; its length is told as it is then."""
    truncate: int | None = None
    """Send so many bytes of the body, having told the right length, and close."""
    seen: int = 0

    def befalls(self, request: Request) -> bool:
        if self.method not in ("*", request.method) or not re.search(self.path, request.path):
            return False
        self.seen += 1
        return self.nth <= self.seen and (self.times is None or self.seen < self.nth + self.times)

    def refusal(self) -> Answer | None:
        if self.status is None:
            return None
        return Refused(self.status, self.code, self.message, self.headers).answer


def flipped(at: int) -> Callable[[bytes], bytes]:
    """A change of one byte, the size being the same."""
    return lambda body: body[:at] + bytes([body[at] ^ 0xFF]) + body[at + 1 :] if len(body) > at else body


class Faults:
    def __init__(self) -> None:
        self.all: list[Fault] = []
        self.lock = threading.Lock()

    def of(self, request: Request) -> Fault | None:
        with self.lock:
            return next((fault for fault in self.all if fault.befalls(request)), None)
