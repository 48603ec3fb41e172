"""A headless Chromium, driven over a pipe in its DevTools protocol (chromedevtools.github.io/devtools-protocol)."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
_SECONDS = 60  # that an answer may take
# Chromium reads commands from handle 3 and writes to handle 4
_START = """import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
for place, end in enumerate(ends, 3): os.dup2(end, place)
os.execv(sys.argv[3], sys.argv[3:])"""
_CODES = {"Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Tab": 9}


class Browser:
    """One page at a time; `errors` and `requests` are what its console said and the addresses that it loaded."""

    def __init__(self, profile: Path, *, width: int = 1000, height: int = 700) -> None:
        assert PROGRAM
        theirs, self._to = os.pipe()
        self._from, other = os.pipe()
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe"]
        options += [f"--user-data-dir={profile}", f"--window-size={width},{height}"]  # no sandbox: root has none
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, str(theirs), str(other), PROGRAM, *options],
            pass_fds=(theirs, other),
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs)
        os.close(other)
        self._number, self._unread, self._session = 0, b"", ""
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._loaded = False
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def close(self) -> None:
        self._session = ""
        self.send("Browser.close")
        self._process.wait()
        os.close(self._to)
        os.close(self._from)

    def open(self, page: Path) -> None:
        """Load a file, with nothing left of the page before it."""
        self.errors.clear()
        self.requests.clear()
        self._loaded = False
        self.send("Page.navigate", url=page.resolve().as_uri())
        while not self._loaded:
            self._hear()

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression, after the page has been drawn."""
        drawn = "new Promise((done) => requestAnimationFrame(() => setTimeout(done)))"
        code = f"{drawn}.then(() => ({expression}))"
        answer = self.send("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, *keys: str) -> None:
        for key in keys:
            texts = {"text": "\r"} if key == "Enter" else {"text": key} if len(key) == 1 else {}
            for kind in ("keyDown", "keyUp"):
                more = texts if kind == "keyDown" else {}
                self.send(
                    "Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=_CODES.get(key, 0), **more
                )

    def click(self, selector: str) -> None:
        """Click the middle of the first element that the CSS selector finds."""
        box = self.run(f"document.querySelector({json.dumps(selector)}).getBoundingClientRect().toJSON()")
        place = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._hear()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def _hear(self) -> dict[str, Any]:
        """The next message; events are noted."""
        until = time.monotonic() + _SECONDS
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self._from], [], [], max(until - time.monotonic(), 0))
            assert ready, "no answer from Chromium"
            more = os.read(self._from, 2**16)
            assert more, "Chromium has ended"
            self._unread += more
        text, _, self._unread = self._unread.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        method, told = message.get("method"), message.get("params", {})
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.errors.append(told["exceptionDetails"]["exception"].get("description", "an exception"))
        elif method == "Log.entryAdded" or (method == "Runtime.consoleAPICalled" and told["type"] == "error"):
            self.errors.append(json.dumps(told))
        return message
