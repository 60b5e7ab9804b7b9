"""A headless Chromium, driven over its debugging pipe: no driver and no package beside it."""

import base64
import fcntl
import itertools
import json
import os
import shutil
import subprocess
import time
from collections import deque

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
SECONDS = 60  # that an answer may take; the machine may be busy
KEYS = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Home": 36, "Tab": 9}


def find_chromium():
    """Its path, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page. `problems` are errors and warnings of its console, `requests` what it asked for."""

    def __init__(self, chromium, profile):
        commands, self._out = os.pipe()
        self._in, answers = os.pipe()
        # Out of the way of 3 and 4, where Chromium reads commands and writes answers.
        far = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (commands, answers)]

        def place():
            for end, number in zip(far, (3, 4), strict=True):
                os.dup2(end, number)

        self._process = subprocess.Popen(
            [
                *(chromium, "--headless", "--remote-debugging-pipe", "--no-sandbox"),
                *("--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
                *(f"--user-data-dir={profile}", "about:blank"),
            ],
            preexec_fn=place,
            pass_fds=(3, 4),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (commands, answers, *far):
            os.close(end)
        self._buffer, self._numbers = b"", itertools.count(1)
        self._seen, self.problems, self.requests = deque(maxlen=1000), [], []
        self._session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Accessibility"):
            self.call(f"{domain}.enable")

    def close(self):
        self._process.kill()
        self._process.wait()
        os.close(self._out)
        os.close(self._in)

    def call(self, method, **params):
        """The result of a command of the DevTools protocol."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            told = self._read()
            if told.get("id") == number:
                assert "error" not in told, told
                return told["result"]
            self._note(told)

    def _read(self):
        while b"\0" not in self._buffer:
            piece = os.read(self._in, 2**20)
            assert piece, "the browser has ended"
            self._buffer += piece
        told, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(told)

    def _note(self, told):
        params = told.get("params", {})
        if told["method"] == "Runtime.exceptionThrown":
            self.problems.append(params["exceptionDetails"])
        elif told["method"] == "Runtime.consoleAPICalled":
            self.problems.append(params["args"])
        elif told["method"] == "Log.entryAdded":
            self.problems.append(params["entry"])
        elif told["method"] == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"][:60])

    # --- what a user does and sees ---

    def open(self, path, width=1280, dark=False):
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 500,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.visit(path.resolve().as_uri())
        self.wait("panels.every((p) => p.photo)")

    def visit(self, address):
        self.problems.clear()
        self.requests.clear()
        self.call("Page.navigate", url=address)
        self.wait("document.readyState === 'complete'")

    def wait(self, condition):
        deadline = time.monotonic() + SECONDS
        while not self.eval(
            f"(() => {{ try {{ return {condition} }} catch {{ return false }} }})()"
        ):
            assert time.monotonic() < deadline, condition
            time.sleep(0.05)

    def eval(self, expression):
        """The value of a JavaScript expression on the page."""
        told = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def text(self, name):
        """What stands in the element of an id."""
        return self.eval(f"document.getElementById({name!r}).innerText")

    def press(self, key):
        code = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
        self.call("Input.dispatchKeyEvent", type="rawKeyDown", **code)
        self.call("Input.dispatchKeyEvent", type="keyUp", **code)

    def mouse(self, x, y, *, click=False):
        """Move to a point of the window, and click there."""
        for kind in ("mouseMoved", *(("mousePressed", "mouseReleased") if click else ())):
            button = {"button": "left", "clickCount": 1} if kind != "mouseMoved" else {}
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **button)

    def box(self, expression):
        """[left, top, width, height] in the window of the element that an expression gives."""
        return self.eval(
            f"(() => {{ const e = {expression}; e.scrollIntoView({{block: 'center'}});"
            "const b = e.getBoundingClientRect(); return [b.x, b.y, b.width, b.height] })()"
        )

    def names(self):
        """(role, name) of all that a screen reader finds."""
        nodes = self.call("Accessibility.getFullAXTree")["nodes"]
        return [
            (node["role"]["value"], node.get("name", {}).get("value", ""))
            for node in nodes
            if not node["ignored"]
        ]

    def screenshot(self, path):
        whole = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(whole["data"]))
