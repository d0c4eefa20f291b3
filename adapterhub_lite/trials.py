"""What a search has tried, as a file of JSON lines: the settings, then a line a trial."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from .errors import FileError, OutputExists, os_error


class Trial(NamedTuple):
    """Weights, and what they are worth."""

    weights: tuple[float, ...]
    score: float


class TrialLog:
    """Within `with`: notes trials as they come, and knows those of an earlier run with the same settings."""

    def __init__(self, path: Path, settings: Mapping[str, Any], resume: bool) -> None:
        self.path, self.resume = path, resume
        self.settings: dict[str, Any] = json.loads(json.dumps({"search": settings}))
        self._known: list[Trial] = []
        self._file: IO[str] | None = None

    def __enter__(self) -> TrialLog:
        try:
            if not self.resume and self.path.exists():
                raise OutputExists("there is a log already", where=self.path, fix="name another, or say --resume")
            end = self._read() if self.resume and self.path.exists() else 0
            self._file = open(self.path, "r+" if end else "w", encoding="utf-8", newline="\n")
            self._file.seek(end)
            self._file.truncate()  # a line that a killed run had begun
            if not end:
                self._write(self.settings)
        except OSError as e:
            raise os_error(e, self.path) from None
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def known(self, number: int, weights: Sequence[float]) -> Trial | None:
        """The trial of that number, if an earlier run noted it; it must be of these weights."""
        if number >= len(self._known):
            return None
        found = self._known[number]
        if found.weights != tuple(weights):
            raise FileError(
                f"trial {number + 1} is of weights that this search does not come to",
                where=self.path,
                fix="begin anew with another log: other versions of cma and numpy search otherwise",
            )
        return found

    def note(self, number: int, trial: Trial) -> None:
        """Append a trial; it is with the operating system when this returns."""
        self._write({"trial": number + 1, "weights": trial.weights, "score": trial.score})

    def _write(self, line: Mapping[str, Any]) -> None:
        assert self._file is not None
        try:
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as e:
            raise os_error(e, self.path) from None

    def _read(self) -> int:
        """Take in what is there; how many bytes of it are whole lines."""
        whole, _, _ = self.path.read_bytes().rpartition(b"\n")
        if not whole:
            return 0
        try:
            first, *rest = (json.loads(line) for line in whole.split(b"\n"))
            self._known = [Trial(tuple(map(float, line["weights"])), float(line["score"])) for line in rest]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise self._foreign() from None
        if not all(math.isfinite(trial.score) for trial in self._known):
            raise self._foreign()
        if first != self.settings:
            raise FileError(
                "is the log of another search: of other adapters, options or scores",
                where=self.path,
                fix="name another log, or search with the same arguments",
            )
        return len(whole) + 1

    def _foreign(self) -> FileError:
        return FileError("is not a log of a search", where=self.path, fix="name another file")
