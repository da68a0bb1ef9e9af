"""A headless browser over its DevTools pipe, with nothing installed: open a page, size it, evaluate, take pictures.

Messages are JSON ended by a zero byte, on descriptors 3 (to the browser) and 4 (from it). Widths are CSS pixels.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = """--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --disable-background-networking
--disable-component-update --disable-sync --disable-quic --hide-scrollbars --remote-debugging-pipe"""
PATIENCE = 120.0  # seconds for one answer
SLICE = 4000  # pixels of one picture of a long page


def find() -> str | None:
    """The first browser on the path; None if there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page of a running browser; `errors`: what its console and its exceptions said."""

    def __init__(self, to: int, back: int) -> None:
        self._to, self._back, self._rest, self._count, self.errors = to, back, b"", 0, []
        self._session: str | None = None
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """A command and its answer; what the page logs in between is kept."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        message |= {} if self._session is None else {"sessionId": self._session}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        for answer in self._answers():
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
        raise RuntimeError(f"{method}: the browser ended")

    def _answers(self) -> Iterator[dict[str, Any]]:
        until = time.monotonic() + PATIENCE
        while True:
            while b"\0" in self._rest:
                text, _, self._rest = self._rest.partition(b"\0")
                answer = json.loads(text)
                self._listen(answer)
                yield answer
            if not select.select([self._back], [], [], max(0.0, until - time.monotonic()))[0]:
                raise TimeoutError(f"no answer from the browser in {PATIENCE:.0f} s")
            read = os.read(self._back, 1 << 20)
            if not read:
                return
            self._rest += read

    def _listen(self, answer: dict[str, Any]) -> None:
        method, params = answer.get("method"), answer.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(params["exceptionDetails"])[:500])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.errors.append(json.dumps(params["args"])[:500])
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(json.dumps(params["entry"])[:500])

    def look(self, width: int, dark: bool = False, scale: float = 1.0) -> None:
        """The width of the window, and light or dark."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=scale, mobile=width < 500)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, url: str) -> None:
        """Load a page and wait for what its scripts draw."""
        self.ask("Page.navigate", url="about:blank")
        self.ask("Page.navigate", url=url)
        ready = "new Promise((done) => { const look = () => document.readyState === 'complete' ? "
        ready += "requestAnimationFrame(() => setTimeout(done, 300)) : setTimeout(look, 50); look(); })"
        self.value(ready)

    def value(self, expression: str) -> Any:
        """What a JavaScript expression is, or resolves to."""
        asked = {"expression": expression, "returnByValue": True, "awaitPromise": True}
        answer = self.ask("Runtime.evaluate", **asked)
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"])[:500])
        return answer["result"].get("value")

    def shots(self, stem: Path, most: int = 20, height: int | None = None) -> list[Path]:
        """The whole page, or its first `height` pixels, as PNG files of `SLICE` pixels each."""
        width, whole = self.value("[innerWidth, document.documentElement.scrollHeight]")
        whole, files = min(whole, height or whole), []
        for place in range(min(most, -(-whole // SLICE))):
            top = place * SLICE
            clip = {"x": 0, "y": top, "width": width, "height": min(SLICE, whole - top), "scale": 1}
            data = self.ask("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)["data"]
            files.append(stem.with_name(f"{stem.name}-{place + 1}.png" if whole > SLICE else f"{stem.name}.png"))
            files[-1].write_bytes(base64.b64decode(data))
        return files

    def pdf(self, file: Path) -> None:
        """The page as it prints."""
        file.write_bytes(base64.b64decode(self.ask("Page.printToPDF", preferCSSPageSize=True)["data"]))


@contextmanager
def started(program: str) -> Iterator[Browser]:
    """A browser with a profile of its own, ended with the block."""
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        shell = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
        command = ["sh", "-c", shell, "sh", program, *FLAGS.split(), f"--user-data-dir={profile}"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, pass_fds=(theirs_in, theirs_out), **quiet)
        os.close(theirs_in)
        os.close(theirs_out)
        try:
            yield Browser(ours_out, ours_in)
        finally:
            process.terminate()
            process.wait(20)
            os.close(ours_out)
            os.close(ours_in)
