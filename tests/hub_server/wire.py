"""A request and its answer, apart from how they travel."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Request:
    method: str
    path: str  # still quoted
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]  # names in small letters
    body: bytes
    user: str | None

    @property
    def json(self) -> Any:
        return json.loads(self.body or b"{}")

    def asked(self, name: str) -> list[str]:
        """All values of a query parameter, also where they are separated by commas or called `name[]`."""
        values = [*self.query.get(name, ()), *self.query.get(f"{name}[]", ())]
        return [part for value in values for part in value.split(",") if part]


@dataclass(frozen=True)
class Answer:
    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, value: Any, status: int = 200, **headers: str) -> Answer:
        return cls(status, json.dumps(value).encode(), {"Content-Type": "application/json", **headers})


class Refused(Exception):
    """An error as the Hub tells it."""

    def __init__(
        self, status: int, code: str = "", message: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers or {}

    @property
    def answer(self) -> Answer:
        told = {"X-Error-Code": self.code, "X-Error-Message": self.message}
        named = {name: value for name, value in told.items() if value}
        body = json.dumps({"error": self.message or "Error"}).encode()
        return Answer(self.status, body, {"Content-Type": "application/json", **named, **self.headers})
