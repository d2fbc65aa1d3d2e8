"""A headless Chromium, driven through its DevTools protocol over a pipe, without any package."""

import base64
import contextlib
import itertools
import json
import os
import select
import shutil
import subprocess
import tempfile
import time

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"]
SECONDS = 600  # to wait for an answer


class Browser:
    """A page in a headless Chromium. `errors` are the console's errors and uncaught exceptions of the page."""

    def __init__(self, to_browser, from_browser):
        self.to_browser, self.from_browser, self.buffer = to_browser, from_browser, b""
        self.numbers, self.session, self.errors, self.loaded = itertools.count(1), {}, [], False
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def message(self):
        """Return the next message of the browser, after recording errors and page loads in it."""
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.from_browser], [], [], SECONDS)
            chunk = os.read(self.from_browser, 1 << 20) if ready else b""
            assert chunk, "Chromium does not answer"
            self.buffer += chunk
        text, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(text)
        event, facts = message.get("method"), message.get("params", {})
        self.loaded |= event == "Page.loadEventFired"
        failed = event == "Runtime.exceptionThrown"
        failed |= event == "Runtime.consoleAPICalled" and facts["type"] in ("error", "assert")
        failed |= event == "Log.entryAdded" and facts["entry"]["level"] == "error"
        self.errors += [json.dumps(facts)] * failed
        return message

    def call(self, method, **parameters):
        """Call a method of the protocol and return its result."""
        number = next(self.numbers)
        request = {"id": number, "method": method, "params": parameters} | self.session
        os.write(self.to_browser, json.dumps(request).encode() + b"\0")
        while (message := self.message()).get("id") != number:
            pass
        assert "error" not in message, message["error"]
        return message["result"]

    def open(self, path, width=1400, height=1000):
        """Open an HTML file in a window of that size, and return once it is loaded."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.loaded = False
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not self.loaded:
            self.message()

    def evaluate(self, expression):
        """Return the value of a JavaScript expression; a promise is awaited."""
        done = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def wait_for(self, condition):
        """Return once a JavaScript expression is true."""
        deadline = time.monotonic() + SECONDS
        while not self.evaluate(f"Boolean({condition})"):
            assert time.monotonic() < deadline, f"{condition} has not come true: {self.errors}"
            time.sleep(0.05)

    def mouse(self, selector, *kinds, across=0.5):
        """Send mouse events, such as mousePressed, to the first element of a CSS selector, at `across` of its width."""
        element = f"document.querySelector('{selector}')"
        self.evaluate(f"{element}.scrollIntoView({{block: 'center'}})")
        box = self.evaluate(f"{element}.getBoundingClientRect().toJSON()")
        x, y = box["x"] + across * box["width"], box["y"] + box["height"] / 2
        for kind in kinds:
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def click(self, selector, across=0.5):
        self.mouse(selector, "mousePressed", "mouseReleased", across=across)

    def screenshot(self):
        """Return the whole page as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"])


@contextlib.contextmanager
def chromium():
    """Yield a `Browser`."""
    (read, to_browser), (from_browser, write) = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        script = f'exec "$@" 3<&{read} 4>&{write}'  # the descriptors that --remote-debugging-pipe uses
        command = ["bash", "-c", script, "-", CHROMIUM, *FLAGS, f"--user-data-dir={profile}"]
        process = subprocess.Popen(
            command, pass_fds=(read, write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(read)
        os.close(write)
        try:
            yield Browser(to_browser, from_browser)
        finally:
            os.close(to_browser)
            os.close(from_browser)
            process.terminate()
            process.wait()
