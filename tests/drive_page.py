"""Open a page in headless Chromium and say what went wrong: needs only Debian's chromium and chromium-driver.

As a script it prints the findings and may save a screenshot:
    python tests/drive_page.py page.html --width 420 --dark --screenshot page.png
"""

import argparse
import base64
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium")
CHROMEDRIVER = shutil.which("chromedriver")

_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
# Pictures are lazy, so each is asked for before its size is read.
_PICTURES = """
const done = arguments[arguments.length - 1];
const frame = () => new Promise(go => requestAnimationFrame(go));
(async () => {
  await frame(); // the page fills what is near the window when it is drawn
  await frame();
  const pictures = [...document.images];
  await Promise.all(pictures.map(picture => {
    picture.loading = 'eager';
    return picture.decode().catch(() => null);
  }));
  done({
    images: pictures.length,
    blank: pictures.filter(picture => picture.naturalWidth === 0).length,
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  });
})();
"""
# A proxy from the environment must not get requests to the local driver.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Session:
    """A WebDriver session over plain HTTP."""

    def __init__(self, address: str, capabilities: dict[str, Any]) -> None:
        self.address = f"{address}/session"
        self.address += "/" + self("POST", "", {"capabilities": {"alwaysMatch": capabilities}})["sessionId"]

    def __call__(self, method: str, command: str, body: dict[str, Any] | None = None) -> Any:
        data = json.dumps(body or {}).encode() if method == "POST" else None
        request = urllib.request.Request(
            self.address + command, data, {"Content-Type": "application/json"}, method=method
        )
        try:
            with _OPENER.open(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(json.load(error)["value"]["message"]) from None

    def open(self, address: str) -> None:
        """Leave the page, load another one, and wait until it is loaded.

        The driver does not wait for it: its own waiting can hang after a download.
        """
        loaded = "return location.href === arguments[0] && document.readyState === 'complete'"
        for url in ("about:blank", address):
            self("POST", "/url", {"url": url})
            self.until(loaded, url)

    def until(self, script: str, *arguments: Any, seconds: float = 60) -> Any:
        """The result of a script as soon as it is true; it runs again and again."""
        end = time.monotonic() + seconds
        while True:
            try:
                if found := self("POST", "/execute/sync", {"script": script, "args": list(arguments)}):
                    return found
                problem = "it is not true"
            except RuntimeError as error:  # the page may change while the script runs
                problem = str(error)
            if time.monotonic() > end:
                raise TimeoutError(f"{script}: {problem} after {seconds:.0f} s")
            time.sleep(0.02)

    def protocol(self, command: str, **parameters: Any) -> Any:
        """Send a command of the Chrome DevTools protocol."""
        return self("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def log(self, kind: str) -> list[dict[str, Any]]:
        """The entries since the last call, of kind "browser" (console) or "performance" (DevTools events)."""
        entries: list[dict[str, Any]] = self("POST", "/se/log", {"type": kind})
        return entries


@contextmanager
def browser() -> Iterator[Session]:
    """A fresh Chromium, closed at the end together with its driver and profile."""
    if CHROMIUM is None or CHROMEDRIVER is None:
        raise FileNotFoundError("chromium or chromedriver is not installed (apt-get install chromium chromium-driver)")
    # Chromium may still write into its profile while it closes.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        line, nothing = [CHROMEDRIVER, "--port=0"], subprocess.DEVNULL
        driver = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=nothing, text=True, start_new_session=True)
        try:
            assert driver.stdout is not None
            started = next((line for line in driver.stdout if "started successfully on port" in line), None)
            if started is None:
                raise RuntimeError("chromedriver ended before it named its port")
            port = started.split()[-1].rstrip(".")
            options = {"binary": CHROMIUM, "args": [*_FLAGS, f"--user-data-dir={profile}"]}
            logs = {"browser": "ALL", "performance": "ALL"}
            asked = {"goog:chromeOptions": options, "goog:loggingPrefs": logs, "pageLoadStrategy": "none"}
            session = Session(f"http://127.0.0.1:{port}", asked)
            try:
                yield session
            finally:
                session("DELETE", "")
        finally:
            with suppress(ProcessLookupError):
                os.killpg(driver.pid, signal.SIGKILL)  # Chromium too, which outlives a driver that was stopped
            driver.communicate()


def drive(
    page: Path, *, width: int = 1400, height: int = 2000, dark: bool = False, screenshot: Path | None = None
) -> dict[str, Any]:
    """Open a page and load all its pictures.

    Returns:
        images: how many pictures the page has; blank: how many of them have no content; overflow: pixels by which the
        page is wider than the window; console_errors: messages; outside_requests: addresses other than the page's own
        and data: URIs, whether answered, failed or blocked.
    """
    address = page.resolve().as_uri()
    with browser() as session:
        session.protocol(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        session.protocol("Emulation.setEmulatedMedia", features=[scheme])
        session.open("about:blank")
        session.log("performance")  # forget what the new-tab page asked for
        session.open(address)
        found: dict[str, Any] = session("POST", "/execute/async", {"script": _PICTURES, "args": []})
        if screenshot is not None:
            screenshot.write_bytes(base64.b64decode(session("GET", "/screenshot")))
        events = [json.loads(entry["message"])["message"] for entry in session.log("performance")]
        requested = [
            event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"
        ]
        found["outside_requests"] = [url for url in requested if url != address and not url.startswith("data:")]
        # A request that the page's own policy blocks is never sent, but is an error on the console.
        found["console_errors"] = [entry["message"] for entry in session.log("browser") if entry["level"] == "SEVERE"]
        return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("--width", type=int, default=1400)
    parser.add_argument("--height", type=int, default=2000)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--screenshot", type=Path)
    print(json.dumps(drive(**vars(parser.parse_args())), indent=2))
