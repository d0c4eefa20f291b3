"""A command that scores an adapter: it gets the folder, and prints a number last."""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import IO

from .errors import ConfigError, ScoreError, os_error, printable

PLACE = "{adapter}"
LONGEST = 200  # characters of a line that is shown
TAIL = 1 << 16  # bytes of an output that are looked at


class Command:
    """A command with `{adapter}` in the place of the adapter's folder.

    It is split into words as a shell would, and started without one: `$HOME`, `*`, `|` and `>` mean nothing. What
    needs a shell names it: `sh -c 'python eval.py "$1" | tail -n 1' sh {adapter}`.

    >>> Command("python 'my eval.py' --lora={adapter}").words("/tmp/a b")
    ['python', 'my eval.py', '--lora=/tmp/a b']
    """

    def __init__(self, text: str, timeout: float | None = None) -> None:
        """`timeout`: seconds that it may take. Raises `ConfigError`."""
        self.text, self.timeout = text, timeout
        try:
            self._words = shlex.split(text)
        except ValueError as e:
            raise ConfigError(f"the command {text!r} cannot be split ({e})", fix="close its quotes") from None
        if not any(PLACE in word for word in self._words):
            raise ConfigError(
                f"the command {text!r} does not say where the adapter's folder goes",
                fix=f"write {PLACE} there: 'python eval.py {PLACE}'",
            )

    def words(self, folder: str | os.PathLike[str]) -> list[str]:
        """What is started for the adapter in `folder`."""
        return [word.replace(PLACE, os.fspath(folder)) for word in self._words]

    def __call__(self, folder: Path) -> float:
        """The score of the adapter in `folder`. Raises `ScoreError`."""
        # Files, not pipes: a process that it left behind may hold a pipe open.
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            code = self._run(self.words(folder), out, err)
            lines, said = _lines(out), _lines(err)
        if code is None:
            self._refuse(f"was not done after {self.timeout:g} s", said, fix="allow more with --timeout, or see why")
        if code:
            how = f"was ended by signal {-code}" if code < 0 else f"exited with {code}"
            self._refuse(how, said or lines, fix=f"run it by hand with an adapter's folder for {PLACE}")
        if not lines:
            self._refuse("printed nothing", said, fix="let it print the score on its last line")
        try:
            score = float(lines[-1])
        except ValueError:
            score = math.nan
        if not math.isfinite(score):
            what = f"printed {_cut(lines[-1])!r} last, which is no finite number"
            self._refuse(what, [], fix="let it print the score alone on its last line")
        return score

    def _run(self, words: list[str], out: IO[bytes], err: IO[bytes]) -> int | None:
        """Its exit code; None if it took too long."""
        try:
            # In a group of its own, so that what it starts is ended with it.
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=os.name == "posix"
            )
        except OSError as e:
            raise os_error(e, words[0]) from None
        try:
            return process.wait(self.timeout)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL) if os.name == "posix" else process.kill()
                process.wait()

    def _refuse(self, what: str, said: list[str], fix: str) -> None:
        last = f" ({_cut(said[-1])})" if said else ""
        raise ScoreError(f"the command {self.text!r} {what}{last}", fix=fix)


def _lines(file: IO[bytes]) -> list[str]:
    """The last lines of an output, without blank ones."""
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - TAIL))
    text = file.read().decode("utf-8", "replace")
    return [line.strip() for line in text.splitlines() if line.strip()]


def _cut(line: str) -> str:
    line = printable(line)
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}…"
