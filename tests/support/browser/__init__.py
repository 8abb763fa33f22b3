"""Chromium without a window, driven by playwright-core in Node.js; and a static server for it."""

import contextlib
import functools
import hashlib
import http.server
import json
import os
import pathlib
import shutil
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support import REPOSITORY

FOLDER = pathlib.Path(__file__).parent
FLAGS = (
    "--headless",
    "--no-sandbox",  # the tests of CI run as root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
# A camera that shows a green picture with a moving pie, which needs no permission.
CAMERA = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
SECONDS = 60.0  # that a page gets for anything


class Browser:
    """One Chromium and its page; each command fails after SECONDS."""

    def __init__(self, process: subprocess.Popen[str]):
        self._process = process

    def _do(self, name: str, **values: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": name, **values}) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline() or '{"error": "the driver died"}')
        assert "error" not in answer, answer["error"]
        return answer["value"]

    def open(self, url: str, **how: Any) -> None:
        """Opens a page in a profile of its own.

        Args:
          url: its address.
          how: "width" and "height" in pixels, "dark", "permissions" (a list of their names) and
            "before", a script that runs first.
        """
        self._do("open", url=url, **how)

    def evaluate(self, code: str) -> Any:
        """Returns the value of an expression of JavaScript, whose promise is awaited."""
        return self._do("evaluate", code=code)

    def wait(self, code: str) -> None:
        """Waits until an expression of JavaScript is true."""
        self._do("wait", code=code, timeout=1e3 * SECONDS)

    def choose(self, *files: pathlib.Path) -> None:
        """Gives files to the page's field for files."""
        self._do("choose", files=[str(file) for file in files])

    def drop(self, *files: pathlib.Path) -> None:
        """Drops files on the page."""
        self._do("drop", files=[str(file) for file in files])

    def press(self, key: str) -> None:
        """Presses a key, such as "Tab"."""
        self._do("press", key=key)

    def click(self, selector: str) -> None:
        """Clicks on an element."""
        self._do("click", selector=selector)

    def reload(self) -> None:
        """Loads the page again."""
        self._do("reload")

    def tree(self, selector: str = "body") -> str:
        """Returns an element as a screen reader sees it: roles and names, in YAML."""
        return str(self._do("tree", selector=selector))

    def screenshot(self, file: pathlib.Path) -> None:
        """Writes a PNG of the whole page."""
        self._do("screenshot", file=str(file))

    def log(self) -> dict[str, list[str]]:
        """Returns the "requests" of the page, and its "complaints": errors and warnings."""
        return dict(self._do("log"))


@contextlib.contextmanager
def started(*flags: str) -> Iterator[Browser]:
    """Yields a Chromium; skips the test, saying why, where there is none."""
    chromium = shutil.which(os.environ.get("CHROMIUM") or "chromium")
    if chromium is None:
        pytest.skip("no chromium: run apt-get install chromium, or set CHROMIUM to its path")
    if shutil.which("node") is None:
        pytest.skip("no node, which drives Chromium: install Node.js")
    command = ["node", str(FOLDER / "drive.mjs"), str(_playwright()), chromium, *FLAGS, *flags]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
    try:
        yield Browser(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(SECONDS)


def _playwright() -> pathlib.Path:
    """Returns the folder of the locked playwright-core, which npm downloads once into build/."""
    digest = hashlib.sha256((FOLDER / "package-lock.json").read_bytes()).hexdigest()[:16]
    folder = REPOSITORY / "build" / f"browser-{digest}"
    found = folder / "node_modules" / "playwright-core"
    if not (folder / "complete").exists():
        if shutil.which("npm") is None:
            pytest.skip("no npm, which downloads playwright-core: install Node.js")
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copyfile(FOLDER / name, folder / name)
        command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"npm cannot download playwright-core: {done.stderr.strip()[-300:]}")
        (folder / "complete").touch()
    return found


class _Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        del format, args  # nobody reads it


@contextlib.contextmanager
def served(folder: pathlib.Path) -> Iterator[str]:
    """Yields the address at which Python's static server shows a folder, as http.server does."""
    handler = functools.partial(_Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://localhost:{server.server_address[1]}/"
        finally:
            server.shutdown()
            thread.join()
