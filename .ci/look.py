"""Open every page of the built book in headless Chromium and fail on what a reader would trip over.

Usage: python .ci/look.py _build/html [--shots DIR] [--axe axe.min.js] [--timeout SECONDS]

A page fails when it logs an error, asks for anything that is not a local file, leaves a formula undrawn,
shows a broken image, links to a file that is not there, or is wider than a narrow screen. With ``--shots``,
the first page of every folder is drawn light, dark and narrow. With ``--axe``, the script of axe-core
(`npm pack axe-core`), a page also fails where its article breaks a rule of WCAG 2.2 A or AA, in light or in
dark. Chromium is driven through its DevTools pipe (JSON messages, each ended by a zero byte), so that only the
standard library is needed.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import itertools
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import unquote, urlsplit

FLAGS = """
    --headless --no-sandbox --disable-gpu --disable-quic --disable-dev-shm-usage --no-first-run --mute-audio
    --disable-background-networking --disable-component-update --disable-sync --disable-extensions
    --hide-scrollbars --force-color-profile=srgb --remote-debugging-pipe
"""
LOCAL = {"file", "data", "blob", "about"}
WIDE, NARROW = (1280, 900), (390, 844)
NO_PAGE = {"genindex.html", "search.html", "py-modindex.html"}

# Runs in the page once it has loaded; resolves to what the page shows.
INSPECT = """
(async () => {
  const texts = (root) => {
    const found = [], skip = 'pre, code, script, style, mjx-container, .MathJax, textarea';
    const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
    for (let node; (node = walker.nextNode()); ) if (!node.parentElement.closest(skip)) found.push(node.data);
    return found;
  };
  const maths = [...document.querySelectorAll('.math')];
  if (maths.length) {
    const ready = () => window.MathJax && MathJax.startup && MathJax.startup.promise;
    const stop = Date.now() + 30000;
    while (!ready() && Date.now() < stop) await new Promise(resolve => setTimeout(resolve, 20));
    if (ready()) await MathJax.startup.promise;
  }
  const broken = [];
  for (const image of document.images) {
    image.loading = 'eager';
    try { await image.decode(); } catch { broken.push(image.currentSrc || image.src); }
  }
  const article = document.querySelector('article') || document.body;
  return {
    title: document.title,
    words: article.innerText.split(/\\s+/).length,
    maths: maths.length,
    undrawn: maths.filter(m => !m.querySelector('mjx-container')).map(m => m.textContent.slice(0, 60)),
    wrong: [...document.querySelectorAll('[data-mjx-error]')].map(m => m.getAttribute('data-mjx-error')),
    raw: texts(article).filter(t => /\\\\\\(|\\\\\\[|\\\\begin\\{/.test(t)).map(t => t.trim().slice(0, 60)),
    broken,
    links: [...document.querySelectorAll('a[href]')].map(a => a.href),
  };
})()
"""
WIDTH = """
({page: document.scrollingElement.scrollWidth, screen: document.documentElement.clientWidth,
  wide: [...document.querySelectorAll('article *')]
    .filter(e => e.getBoundingClientRect().right > innerWidth + 1)
    .filter(e => !e.closest('.cell_output, pre, table, mjx-container, .pst-scrollable-table-container'))
    .slice(0, 2).map(e => e.tagName.toLowerCase() + '.' + e.className)})
"""

# Runs after axe-core's own script; resolves to the rules that an article breaks, each with its first example.
AXE = """
(async () => {
  document.documentElement.dataset.theme = '%s';
  const tags = ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa'];
  const found = await axe.run('article', {runOnly: tags, resultTypes: ['violations'], iframes: false});
  return {broken: found.violations.map(v => `${v.id} (${v.nodes.length}): ${v.nodes[0].html.slice(0, 120)}`)};
})()
"""


class BrowserError(Exception):
    """Chromium did not start, died, or did not answer in time."""


class Browser:
    """A headless Chromium that talks JSON over two pipes; use it as a context manager."""

    def __init__(self, timeout: float):
        self.timeout = timeout
        self._ids = itertools.count(1)
        self._messages: queue.Queue[dict | None] = queue.Queue()
        self._events: list[dict] = []

    def __enter__(self) -> Browser:
        self._profile = tempfile.TemporaryDirectory(prefix="look-", ignore_cleanup_errors=True)
        self._log = open(Path(self._profile.name, "chromium.log"), "w+", errors="replace")
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        # Chromium reads commands from descriptor 3 and answers on 4; the shell puts the pipes there. The host
        # rule answers every name with "not found", so that nothing leaves the machine even where a page asks.
        command = [find_chromium(), *FLAGS.split(), f"--user-data-dir={self._profile.name}/profile"]
        command += ["--host-resolver-rules=MAP * ~NOTFOUND", "about:blank"]
        self._process = subprocess.Popen(
            ["/bin/bash", "-c", f'exec "$@" 3<&{to_browser} 4>&{from_browser}', "look", *command],
            pass_fds=(to_browser, from_browser),
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        os.close(to_browser)
        os.close(from_browser)
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._write)
        self._log.close()
        self._profile.cleanup()

    def _listen(self) -> None:
        with os.fdopen(self._read, "rb") as pipe:
            buffer = b""
            while chunk := pipe.read1(1 << 16):
                *whole, buffer = (buffer + chunk).split(b"\0")
                for message in whole:
                    self._messages.put(json.loads(message))
        self._messages.put(None)

    def _next(self, deadline: float) -> dict:
        try:
            message = self._messages.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise BrowserError(f"no answer within {self.timeout:.0f} s") from None
        if message is None:
            self._log.seek(0)
            raise BrowserError("Chromium ended: " + self._log.read()[-600:].strip())
        return message

    def call(self, method: str, session: str | None = None, **params: object) -> dict:
        """Send one command and return its result; events that come meanwhile are kept for `events`.

        Raises:
            BrowserError: Where Chromium refuses, dies or is silent for too long.
        """
        ident = next(self._ids)
        command = {"id": ident, "method": method, "params": params}
        if session:
            command["sessionId"] = session
        os.write(self._write, json.dumps(command).encode() + b"\0")
        deadline = time.monotonic() + self.timeout
        while (message := self._next(deadline)).get("id") != ident:
            self._events.append(message)
        if "error" in message:
            raise BrowserError(f"{method}: {message['error']['message']}")
        return message["result"]

    def wait_for(self, method: str, session: str) -> None:
        """Wait for an event of a page, keeping it and those before it for `events`."""
        deadline = time.monotonic() + self.timeout
        seen = 0
        while True:
            for event in itertools.islice(self._events, seen, None):
                if event.get("method") == method and event.get("sessionId") == session:
                    return
            seen = len(self._events)
            self._events.append(self._next(deadline))

    def events(self, session: str) -> list[dict]:
        """Hand over what one page reported, and forget all else."""
        events, self._events = self._events, []
        return [event for event in events if event.get("sessionId") == session]

    def evaluate(self, session: str, expression: str) -> dict:
        """Run JavaScript in a page, wait for its promise, return its value."""
        answer = self.call("Runtime.evaluate", session, expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise BrowserError(describe_exception(answer["exceptionDetails"]))
        return answer["result"]["value"]

    def open(self, path: Path, *, size: tuple[int, int] = WIDE, dark: bool = False) -> str:
        """Open a file in a tab of its own and return the tab's session."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable", session)
        self.resize(session, size)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", session, features=scheme)
        self.call("Page.navigate", session, url=path.as_uri())
        self.wait_for("Page.loadEventFired", session)
        return session

    def resize(self, session: str, size: tuple[int, int]) -> None:
        """Give a page a screen of ``size`` (width, height) in pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            session,
            width=size[0],
            height=size[1],
            deviceScaleFactor=1,
            mobile=False,
        )

    def close(self, session: str) -> None:
        """Close a page's tab."""
        target = self.call("Target.getTargetInfo", session)["targetInfo"]["targetId"]
        self.call("Target.closeTarget", targetId=target)

    def shoot(self, session: str, file: Path) -> None:
        """Write what the screen shows, from the top of the page, as PNG."""
        answer = self.call("Page.captureScreenshot", session, format="png")
        file.write_bytes(base64.b64decode(answer["data"]))


def find_chromium() -> str:
    """Return the path of Chromium: ``$CHROMIUM``, or the first one on the path."""
    for name in (os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome", "chrome"):
        if name and (path := shutil.which(name)):
            return path
    raise SystemExit("look.py: no Chromium found; install it (apt-get install chromium) or set CHROMIUM.")


def describe_exception(details: dict) -> str:
    """Return the first line of a JavaScript exception."""
    return details.get("exception", {}).get("description", details.get("text", "")).split("\n")[0]


def complaints(events: list[dict]) -> Iterator[str]:
    """Yield what a page's events say went wrong: exceptions, logged errors, failed and foreign requests."""
    urls: dict[str, str] = {}
    for event in events:
        method, params = event["method"], event["params"]
        if method == "Runtime.exceptionThrown":
            yield "exception: " + describe_exception(params["exceptionDetails"])
        elif method == "Runtime.consoleAPICalled" and params["type"] in {"error", "assert"}:
            words = (str(arg.get("value", arg.get("description", ""))) for arg in params["args"])
            yield "console: " + " ".join(words)[:200]
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            if params["entry"]["source"] == "network":
                continue  # Network.loadingFailed says the same
            yield "log: " + params["entry"]["text"] + " " + params["entry"].get("url", "")
        elif method == "Network.requestWillBeSent":
            url = urls[params["requestId"]] = params["request"]["url"]
            if urlsplit(url).scheme not in LOCAL:
                yield f"request leaves the machine: {url[:200]}"
        elif method == "Network.loadingFailed" and not params.get("canceled"):
            yield f"not loaded: {urls.get(params['requestId'], '?')[:200]} ({params['errorText']})"


def faults(shown: dict) -> Iterator[str]:
    """Yield what is wrong with what a page shows (the answer of `INSPECT`)."""
    if shown["words"] < 5:
        yield "the page is empty"
    for kind, label in (
        ("undrawn", "formula not drawn"),
        ("wrong", "formula with an error"),
        ("raw", "raw TeX in the text"),
        ("broken", "image did not load"),
    ):
        if shown[kind]:
            yield f"{label} ({len(shown[kind])}): {shown[kind][0]}"
    targets = {unquote(urlsplit(link).path) for link in shown["links"] if link.startswith("file:")}
    for target in sorted(targets):
        if not Path(target).exists():
            yield f"link to a missing file: {target}"


def inspect(browser: Browser, page: Path, axe: str = "") -> tuple[list[str], dict]:
    """Open a page and return its faults, and what it shows; ``axe`` is the script of axe-core, or nothing."""
    session = browser.open(page)
    shown = browser.evaluate(session, INSPECT)
    found = [*complaints(browser.events(session)), *faults(shown)]
    if axe:
        browser.evaluate(session, f"{axe}\n({{}})")
    for theme in ("light", "dark") if axe else ():
        found += [f"{theme}: {broken}" for broken in browser.evaluate(session, AXE % theme)["broken"]]
    browser.resize(session, NARROW)
    width = browser.evaluate(session, WIDTH)
    if width["page"] > width["screen"] + 1:
        culprits = ", ".join(width["wide"]) or "outside the text"
        found.append(f"{width['page']} px wide on a screen of {NARROW[0]} px: {culprits}")
    browser.close(session)
    return found, shown


def list_pages(root: Path) -> list[Path]:
    """Return the pages of the book, the front page first.

    Raises:
        SystemExit: Where there is no book at ``root``.
    """
    index = root / "index.html"
    if not index.is_file():
        raise SystemExit(f"look.py: no book at {root}: index.html is missing. Build it with: make report")
    pages = {
        page
        for page in root.rglob("*.html")
        if page.relative_to(root).parts[0] not in {"_static", "_sources"} and page.name not in NO_PAGE
    }
    front = index
    if forward := re.search(r'http-equiv="refresh"[^>]*url=([^"]+)"', index.read_text(), re.IGNORECASE):
        front = root / forward.group(1)
        pages = pages - {index} | {front}  # where the target is missing, opening it says so
    return sorted(pages, key=lambda page: (page != front, page))


def look(pages: list[Path], root: Path, timeout: float, axe: str) -> tuple[int, int]:
    """Inspect every page, a browser a core; print the faults, return the numbers of faulty pages and of formulas."""
    parts = [pages[i :: os.cpu_count()] for i in range(os.cpu_count() or 1)]
    with ThreadPoolExecutor(len(parts)) as pool:
        found = list(pool.map(look_at, parts, *map(itertools.repeat, (root, timeout, axe))))
    return sum(faulty for faulty, _ in found), sum(formulas for _, formulas in found)


def look_at(pages: list[Path], root: Path, timeout: float, axe: str) -> tuple[int, int]:
    """Do the same with one browser."""
    faulty = formulas = 0
    waiting = [(page, 2) for page in reversed(pages)]
    while waiting:
        with Browser(timeout) as browser:
            while waiting:
                page, tries = waiting.pop()
                try:
                    found, shown = inspect(browser, page, axe)
                except (BrowserError, OSError) as error:
                    if tries > 1:  # once more in a fresh Chromium: the machine may be busy
                        waiting.append((page, tries - 1))
                        break
                    found, shown = [str(error)], {"maths": 0}
                formulas += shown["maths"]
                faulty += bool(found)
                for fault in found:
                    print(f"{page.relative_to(root)}: {fault}", flush=True)
    return faulty, formulas


def shoot(pages: list[Path], root: Path, folder: Path, timeout: float) -> int:
    """Draw the first page of every folder light, dark and narrow; return the number of pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    first = {page.parent: page for page in reversed(pages)}.values()
    views = {"light": (WIDE, False), "dark": (WIDE, True), "narrow": (NARROW, False)}
    with Browser(timeout) as browser:
        for page, (view, (size, dark)) in itertools.product(first, views.items()):
            session = browser.open(page, size=size, dark=dark)
            browser.evaluate(session, INSPECT)
            name = "-".join(page.relative_to(root).with_suffix("").parts)
            browser.shoot(session, folder / f"{name}-{view}.png")
            browser.close(session)
    return len(first) * len(views)


def main() -> int:
    """Look at the book and return the exit status: 0 where every page is sound, 1 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("root", type=Path, help="the built book, for instance _build/html")
    parser.add_argument("--shots", type=Path, help="a folder for pictures of some pages")
    parser.add_argument("--axe", type=Path, help="the file axe.min.js of axe-core: check accessibility, too")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds one step may take")
    args = parser.parse_args()
    root = args.root.resolve()
    pages = list_pages(root)
    faulty, formulas = look(pages, root, args.timeout, args.axe.read_text() if args.axe else "")
    if args.shots:
        print(f"{shoot(pages, root, args.shots, args.timeout)} pictures in {args.shots}")
    print(f"looked at {len(pages)} pages with {formulas} formulas: {faulty} faulty")
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
