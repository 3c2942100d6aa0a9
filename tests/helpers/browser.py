"""Headless Chromium, driven over its DevTools protocol."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class Page:
    """A tab.

    Attributes:
        problems: what its console said of errors, and exceptions that nobody caught.
    """

    def __init__(self, socket: ClientConnection) -> None:
        self._socket, self._calls = socket, 0
        self.problems: list[str] = []
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Any:
        self._calls += 1
        self._socket.send(json.dumps({"id": self._calls, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(timeout=30))
            if message.get("id") == self._calls:
                assert "error" not in message, message
                return message["result"]
            self._note(message)

    def _note(self, event: dict[str, Any]) -> None:
        what, said = event.get("method"), event.get("params", {})
        failed = what == "Runtime.exceptionThrown"
        failed |= what == "Runtime.consoleAPICalled" and said["type"] == "error"
        failed |= what == "Log.entryAdded" and said["entry"]["level"] == "error"
        if failed:
            self.problems.append(json.dumps(said))

    def show(self, url: str, width: int, height: int, scheme: str = "light") -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setScrollbarsHidden", hidden=True)
        preferred = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=preferred)
        self.call("Page.navigate", url=url)

    def value(self, expression: str) -> Any:
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait_for(self, expression: str) -> None:
        for _ in range(100):
            if self.value(expression):
                return
            time.sleep(0.1)
        raise AssertionError(f"it never came: {expression}; problems: {self.problems}")

    def picture(self, path: Path) -> None:
        content = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(content["data"]))


@contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """``profile``: an empty folder for the browser's own files."""
    assert CHROMIUM is not None
    quiet = ["background-networking", "component-update", "sync", "gpu", "quic"]
    flags = ["headless", "no-sandbox", "no-first-run", *(f"disable-{each}" for each in quiet)]
    flags += ["remote-debugging-port=0", f"user-data-dir={profile}"]
    command = [CHROMIUM, *(f"--{flag}" for flag in flags), "about:blank"]
    log = open(os.devnull, "w")  # noqa: SIM115 - for as long as the browser runs
    process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        said = profile / "DevToolsActivePort"
        for _ in range(300):
            if said.exists() and len(said.read_text().splitlines()) == 2:
                break
            time.sleep(0.1)
        port = said.read_text().splitlines()[0]
        yield Page(_tab(int(port)))
    finally:
        process.kill()
        process.wait()
        log.close()


def _tab(port: int) -> ClientConnection:
    import httpx

    tabs = httpx.get(f"http://127.0.0.1:{port}/json/list").json()
    (tab,) = [tab for tab in tabs if tab["type"] == "page"]
    return connect(tab["webSocketDebuggerUrl"], max_size=1 << 26)
