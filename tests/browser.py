"""Headless Chromium for a test: Chrome DevTools Protocol over a pair of pipes, and nothing else."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any, Self


class Page:
    """One page of a browser of its own; leave it with `close` or a `with` block."""

    def __init__(self, profile: Path) -> None:
        chromium = shutil.which("chromium")
        assert chromium is not None
        from_us, self._to = os.pipe()
        from_it, to_us = os.pipe()
        self._from = os.fdopen(from_it, "rb")
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        flags += ["--no-first-run", "--disable-dev-shm-usage", f"--user-data-dir={profile}"]
        null = os.open(os.devnull, os.O_WRONLY)
        self._pid = os.posix_spawn(
            chromium,
            [chromium, *flags, "about:blank"],
            os.environ,
            file_actions=[
                # What it reads and writes; in this order neither is written over.
                (os.POSIX_SPAWN_DUP2, to_us, 100),
                (os.POSIX_SPAWN_DUP2, from_us, 3),
                (os.POSIX_SPAWN_DUP2, 100, 4),
                (os.POSIX_SPAWN_DUP2, null, 2),
            ],
        )
        for fd in (from_us, to_us, null):
            os.close(fd)
        self._n_sent, self._unread, self._session = 0, b"", None
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def open(self, url: str) -> None:
        self._call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression; AssertionError if it throws."""
        got = self._call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in got, got["exceptionDetails"]
        return got["result"].get("value")

    def wait(self, condition: str, seconds: float = 20) -> None:
        """Until a JavaScript expression is true."""
        self.run(
            f"new Promise((done, fail) => {{ const end = Date.now() + {1000 * seconds};"
            f"const look = () => ({condition}) ? done() : Date.now() > end ?"
            f"fail(new Error({json.dumps(condition)})) : setTimeout(look, 20); look(); }})"
        )

    def picture(self, path: Path) -> None:
        data = self._call("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(data))

    def close(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._to)
        self._from.close()

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._n_sent += 1
        message = {"id": self._n_sent, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._unread:
                part = self._from.read1(1 << 16)
                assert part, "the browser has ended"
                self._unread += part
            text, self._unread = self._unread.split(b"\0", 1)
            reply = json.loads(text)
            if reply.get("id") == self._n_sent:
                assert "error" not in reply, reply
                return reply["result"]
