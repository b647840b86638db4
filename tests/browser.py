"""A headless Chromium that tests drive over the DevTools protocol, as a person would: by keys."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import websocket

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
# Name of a key: its code, and the number Windows gave it, which Chromium asks for.
_CODES = {
    "Enter": ("Enter", 13), "Escape": ("Escape", 27), "Tab": ("Tab", 9), " ": ("Space", 32),
    "ArrowLeft": ("ArrowLeft", 37), "ArrowUp": ("ArrowUp", 38), "ArrowRight": ("ArrowRight", 39),
    "ArrowDown": ("ArrowDown", 40), "/": ("Slash", 191), "?": ("Slash", 191),
}  # fmt: skip
_SHIFT, _MOUSE = 8, {"button": "left", "clickCount": 1}


class Browser:
    """One page of a running Chromium; commands that fail raise RuntimeError."""

    def __init__(self, address: str) -> None:
        self._socket = websocket.create_connection(address, timeout=60, suppress_origin=True)
        self._count = 0
        self.requests: list[str] = []  # addresses that the page asked for
        self.errors: list[str] = []  # exceptions of its scripts, and what its policy refused
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> Any:
        """Send a command and return its result."""
        self._count += 1
        self._socket.send(json.dumps({"id": self._count, "method": method, "params": parameters}))
        while True:
            message = self._receive()
            if message.get("id") == self._count:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]

    def _receive(self) -> Any:
        message = json.loads(self._socket.recv())
        found = message.get("params", {})
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(found["request"]["url"][:200])
        elif message.get("method") == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(found["exceptionDetails"])[:2000])
        elif message.get("method") == "Log.entryAdded" and found["entry"]["level"] == "error":
            self.errors.append(found["entry"]["text"])
        return message

    def open(self, path: Path | str) -> float:
        """Open a file and return the seconds until it was loaded."""
        started = time.perf_counter()
        self.send("Page.navigate", url=Path(path).resolve().as_uri())
        while self._receive().get("method") != "Page.loadEventFired":
            pass
        return time.perf_counter() - started

    def run(self, script: str) -> Any:
        """Return the value of an expression, awaited if it is a promise."""
        done = self.send(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in done:
            raise RuntimeError(f"{script}: {done['exceptionDetails']}")
        return done["result"].get("value")

    def press(self, key: str, shift: bool = False) -> None:
        """Press and release a key, given by its name or its character."""
        code, number = _CODES.get(key, (f"Key{key.upper()}", ord(key[0].upper())))
        if key.isdigit():
            code = f"Digit{key}"
        event = {"key": key, "code": code, "windowsVirtualKeyCode": number}
        event["modifiers"] = _SHIFT if shift else 0
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        self.send("Input.dispatchKeyEvent", type="keyDown", text=text, **event)
        self.send("Input.dispatchKeyEvent", type="keyUp", **event)

    def type(self, text: str) -> None:
        """Put text into what has the focus, as a keyboard does."""
        for character in text:
            self.press(character)

    def click(self, selector: str) -> None:
        """Click into the middle of an element."""
        x, y = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center'}); const r = e.getBoundingClientRect();"
            "return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, **_MOUSE)

    def text(self, selector: str) -> str:
        """Return the visible text of an element."""
        return str(self.run(f"document.querySelector({json.dumps(selector)}).innerText"))

    def resize(self, width: int, height: int, mobile: bool = False, dark: bool = False) -> None:
        """Set the size of the window in pixels, and the colours that the reader prefers."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=mobile,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self, path: Path | str) -> None:
        """Write what the window shows as PNG."""
        shot = self.send("Page.captureScreenshot", format="png")["data"]
        Path(path).write_bytes(base64.b64decode(shot))

    def save_to(self, folder: Path) -> None:
        """Take downloads into a folder without asking."""
        self.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))

    def controls(self) -> list[tuple[str, str]]:
        """Return (role, accessible name) of everything that can have the focus."""
        nodes = self.send("Accessibility.getFullAXTree")["nodes"]
        return [
            (node["role"]["value"], node.get("name", {}).get("value", ""))
            for node in nodes
            if not node["ignored"]
            and any(
                p["name"] == "focusable" and p["value"]["value"] for p in node.get("properties", ())
            )
        ]


@contextmanager
def chromium(*options: str) -> Iterator[Browser]:
    """Start a Chromium with an empty profile, and end it."""
    assert CHROMIUM, "no Chromium: skip before"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        command += ["--disable-dev-shm-usage", "--remote-debugging-port=0", *options]
        process = subprocess.Popen(
            [*command, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            yield Browser(_page_address(Path(profile) / "DevToolsActivePort"))
        finally:
            process.terminate()
            process.wait(20)


def _page_address(file: Path) -> str:
    """Return where the first page is listened to; Chromium writes its port into a file."""
    import urllib.request

    for _ in range(300):
        try:
            port = file.read_text().splitlines()[0]
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=5) as answer:
                pages = [entry for entry in json.load(answer) if entry["type"] == "page"]
            return str(pages[0]["webSocketDebuggerUrl"])
        except (OSError, IndexError):
            time.sleep(0.1)
    raise RuntimeError("Chromium did not start within 30 s")
