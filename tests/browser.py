"""A real Chromium without a screen, driven by ChromeDriver over W3C WebDriver. Tests skip where it is not installed."""

import base64
import json
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
START_S = 30.0


class Browser:
    """A session. Its pages are files; nothing is asked of a network."""

    def __init__(self, address: str, session: str) -> None:
        self.address, self.session = address, session

    def call(self, method: str, path: str, **values: Any) -> Any:
        return request(f"{self.address}/session/{self.session}/{path}", method, values)

    def cdp(self, command: str, **values: Any) -> Any:
        return self.call("POST", "goog/cdp/execute", cmd=command, params=values)

    def open(self, page: Path, *, width: int, height: int = 900, scheme: str = "light") -> None:
        """Shows a file in a window of `width` pixels, for a reader who prefers a light or a dark page."""
        self.cdp(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        self.cdp("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("POST", "url", url=page.as_uri())

    def run(self, script: str) -> Any:
        """The value that a script returns on the page."""
        return self.call("POST", "execute/sync", script=script, args=[])

    def log(self) -> list[str]:
        """What the page has complained about since the last call."""
        return [entry["message"] for entry in self.call("POST", "se/log", type="browser")]

    def screenshot(self, file: Path) -> None:
        """Writes a picture of the whole page."""
        data = self.cdp("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        file.write_bytes(base64.b64decode(data))

    def print(self, file: Path) -> None:
        """Writes the page as PDF, as it would be printed on A4."""
        data = self.cdp("Page.printToPDF", paperWidth=8.27, paperHeight=11.69, printBackground=False)["data"]
        file.write_bytes(base64.b64decode(data))


def request(address: str, method: str, values: dict[str, Any] | None = None) -> Any:
    data = json.dumps(values).encode() if method == "POST" else None
    made = urllib.request.Request(address, data, {"Content-Type": "application/json"}, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(made, timeout=60) as answer:
        return json.load(answer)["value"]


@contextmanager
def chromium() -> Iterator[Browser]:
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("chromium and chromedriver are not installed (apt-get install chromium chromium-driver)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen([driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            yield from _session(f"http://127.0.0.1:{port}", program, profile)
        finally:
            process.terminate()
            process.wait(30)


def _session(address: str, program: str, profile: str) -> Iterator[Browser]:
    deadline = time.monotonic() + START_S
    while True:
        try:
            request(f"{address}/status", "GET")
            break
        except OSError:
            assert time.monotonic() < deadline, "chromedriver does not answer"
            time.sleep(0.1)
    options = {"binary": program, "args": [*FLAGS, f"--user-data-dir={profile}"]}
    wanted = {"alwaysMatch": {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}}
    session = request(f"{address}/session", "POST", {"capabilities": wanted})["sessionId"]
    try:
        yield Browser(address, session)
    finally:
        request(f"{address}/session/{session}", "DELETE")
