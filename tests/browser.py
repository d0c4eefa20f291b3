"""A real headless Chromium, driven through its DevTools pipe; nothing but the standard library.

Not Playwright or Selenium: both want a browser or a driver of their own, and this needs six calls.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"),
    *("--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update"),
    "--disable-sync",
]
# Gives the pipes the numbers that the browser expects. No preexec_fn: torch has threads by now.
START = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
for number, end in zip((3, 4), ends):
    os.dup2(end, number)
os.execv(sys.argv[3], sys.argv[3:])
"""
PATIENCE = 60.0  # seconds, of a browser that answers nothing


@dataclass
class Page:
    """What a page was like."""

    shown: str  # its text
    width: int  # of all there is, in CSS pixels: the window's, unless something sticks out
    complaints: list[str] = field(default_factory=list)  # errors and warnings of the console, exceptions
    requests: list[str] = field(default_factory=list)  # addresses asked for, but the page itself
    screenshot: bytes = b""  # PNG, from top to bottom
    pdf: bytes = b""
    answer: Any = None


class Browser:
    """Use as a context; `folder` gets the profile."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._number, self._buffer, self._events = 0, b"", list[dict[str, Any]]()

    def __enter__(self) -> Browser:
        assert CHROMIUM is not None
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={self.folder}", "about:blank"]
        with (self.folder.parent / "chromium.log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", START, str(theirs_in), str(theirs_out), *command],
                pass_fds=(theirs_in, theirs_out),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        os.close(theirs_in)
        os.close(theirs_out)
        self._in, self._out = ours_in, ours_out
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._call("Browser.close")
            self._process.wait(PATIENCE)
        except (OSError, AssertionError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        os.close(self._in)
        os.close(self._out)

    def open(
        self,
        file: Path,
        *,
        width: int,
        dark: bool = False,
        print_it: bool = False,
        ask: str = "null",
        shot: bool = True,
    ) -> Page:
        """Show a file in a new window of this width; `ask` is an expression to evaluate in it."""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._events.clear()
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable", session)
        metrics = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 600}
        self._call("Emulation.setDeviceMetricsOverride", session, **metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", session, features=[scheme])
        self._call("Page.navigate", session, url=file.as_uri())
        self._wait_for("Page.loadEventFired")
        page = Page(self._ask(session, "document.body.innerText"), self._ask(session, WIDEST))
        page.answer = self._ask(session, ask)
        if shot:
            height = min(16000, self._ask(session, "document.documentElement.scrollHeight"))
            clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
            taken = self._call("Page.captureScreenshot", session, captureBeyondViewport=True, clip=clip)
            page.screenshot = base64.b64decode(taken["data"])
        if print_it:
            printed = self._call("Page.printToPDF", session, preferCSSPageSize=True, paperWidth=8.27, paperHeight=11.69)
            page.pdf = base64.b64decode(printed["data"])
        for event in self._events:
            self._note(page, event, file)
        self._call("Target.closeTarget", targetId=target)
        return page

    def _note(self, page: Page, event: dict[str, Any], file: Path) -> None:
        method, params = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            page.complaints.append(json.dumps(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            page.complaints.append(json.dumps(params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            page.complaints.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            url = params["request"]["url"]
            if url != file.as_uri() and not url.startswith("data:"):
                page.requests.append(url)

    def _ask(self, session: str, expression: str) -> Any:
        found = self._call("Runtime.evaluate", session, expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def _call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._out, data) :]
        deadline = time.monotonic() + PATIENCE
        while True:
            answer = self._read(deadline)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result
            self._events.append(answer)

    def _wait_for(self, method: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not any(event.get("method") == method for event in self._events):
            self._events.append(self._read(deadline))

    def _read(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, "Chromium does not answer"
            data = os.read(self._in, 1 << 16)
            assert data, "Chromium has ended"
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found


WIDEST = "Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)"
