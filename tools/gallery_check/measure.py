"""Measure the page in Chromium: time to open, time of changes, long tasks while scrolling, and memory."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, ViewportSize

MIB = 1024**2
LOADING_SECONDS = 120
PAUSE_MS = 300
"""Pause after each change, so that the images that it loads do not delay the next one."""
DESKTOP: ViewportSize = {"width": 1440, "height": 900}

WATCH = """
window.times = {};
(function look() {
  const { times } = window;
  if (!times.tiles && document.querySelector(".tile")) times.tiles = performance.now();
  if (!times.images && document.querySelectorAll(".tile.has-image").length > 8) times.images = performance.now();
  if (!times.loaded && document.documentElement?.dataset.loaded) times.loaded = performance.now();
  if (!times.loaded || !times.images) requestAnimationFrame(look);
})();
"""

CHANGE = """
async (change) => {
  const gallery = window.BatchInferGallery;
  const state = gallery.links.decode(change);
  const started = performance.now();
  await gallery.setState(state);
  const done = performance.now();
  await new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve)));
  return { ms: done - started, painted: performance.now() - started, rows: gallery.lastRefresh.rows };
}
"""

SCROLL = """
async ([step, from, to, frames]) => {
  const grid = document.getElementById("grid");
  const end = (grid.scrollHeight - grid.clientHeight) * to;
  grid.scrollTop = (grid.scrollHeight - grid.clientHeight) * from;
  await new Promise((resolve) => setTimeout(resolve, 500));
  const times = [];
  let last = performance.now();
  for (let frame = 0; frame < frames && grid.scrollTop < end - 1; frame++) {
    grid.scrollTop += step ?? end / frames;
    await new Promise(requestAnimationFrame);
    times.push(performance.now() - last);
    last = performance.now();
  }
  await new Promise((resolve) => setTimeout(resolve, 500));
  times.sort((a, b) => a - b);
  const p99 = times[Math.floor(times.length * 0.99)];
  return { frames: times.length, median: times[times.length >> 1], p99 };
}
"""

CHANGES = {
    "search, a word": "q=lake",
    "search, two words and a phrase": 'q=fog "wide angle" number',
    "search, one result": "q=prompts-00000042",
    "filter: status": "is.status=failed&is.status=flagged",
    "filter: nsfw": "is.nsfw_content_detected=true",
    "filter: carried column": "is.style=watercolour",
    "filter: range": "min.guidance_scale=5&max.guidance_scale=8",
    "filter: score": "min.safety_scores.nsfw=0.9",
    "five filters": "q=dawn&is.status=ok&is.style=watercolour&is.campaign=campaign 03&min.seconds=1.5",
    "sort: number": "sort=-seconds",
    "sort: text": "sort=prompt",
    "sort: time": "sort=-finished_at",
    "sort: category": "sort=style",
    "group: prompt": "group=prompt",
    "group: category, sorted": "group=style&sort=-seconds",
    "charts": "view=charts",
    "no filters": "",
}
SCROLLS = {
    "scroll slowly from the top": [40, 0, 1, 500],
    "scroll slowly in the middle": [120, 0.5, 1, 500],
    "scroll through everything in 300 frames": [None, 0, 1, 300],
}
"""Step in px, or None for equal steps; the part of the height at which to begin and end; and the number of frames."""


@dataclass
class Problems:
    """Console errors, page errors and requests that leave the machine."""

    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def watch(self, page: Page) -> None:
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: None if is_local(request.url) else self.requests.append(request.url))


def is_local(url: str) -> bool:
    return url.startswith(("file:", "data:", "blob:"))


@contextmanager
def open_page(browser: Browser, url: str, problems: Problems, **options: Any) -> Iterator[Page]:
    """Open a page in a fresh browser profile, and wait until all data are loaded."""
    with browser.new_context(**options) as context:
        page = context.new_page()
        problems.watch(page)
        page.goto(url)
        page.wait_for_selector("html[data-loaded]", state="attached", timeout=LOADING_SECONDS * 1000)
        yield page


class TaskTimes:
    """The longest task of the page in wall-clock time and in CPU time, which other programs lengthen less."""

    def __init__(self, browser: Browser, page: Page) -> None:
        self._browser, self._page = browser, page

    def __enter__(self) -> TaskTimes:
        self._browser.start_tracing(page=self._page, categories=["toplevel", "__metadata"])
        return self

    def __exit__(self, *_: object) -> None:
        events = json.loads(self._browser.stop_tracing())["traceEvents"]
        names = [event for event in events if event["name"] == "thread_name"]
        main = {(event["pid"], event["tid"]) for event in names if event["args"]["name"] == "CrRendererMain"}
        of_main = [event for event in events if (event["pid"], event.get("tid")) in main]
        tasks = [event for event in of_main if event["ph"] == "X" and event["name"].endswith("RunTask")]
        self.wall = max((event["dur"] for event in tasks), default=0) / 1000
        self.cpu = max((event.get("tdur", 0) for event in tasks), default=0) / 1000

    def __str__(self) -> str:
        return f"longest task {self.cpu:.0f} ms of CPU time, {self.wall:.0f} ms by the clock"


def measure_opening(browser: Browser, url: str, problems: Problems) -> Iterator[tuple[str, str]]:
    with browser.new_context(viewport=DESKTOP) as context:
        page = context.new_page()
        problems.watch(page)
        page.add_init_script(WATCH)
        with TaskTimes(browser, page) as tasks:
            page.goto(url)
            deadline = time.monotonic() + LOADING_SECONDS
            while not page.evaluate("window.times.images && window.times.loaded"):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{url} has not shown all results after {LOADING_SECONDS} s")
                page.wait_for_timeout(100)
        times = page.evaluate("window.times")
    yield "first tiles", f"{times['tiles']:.0f} ms"
    yield "first images", f"{times['images']:.0f} ms"
    yield "all data loaded", f"{times['loaded']:.0f} ms"
    yield "while loading", str(tasks)


def measure_changes(browser: Browser, page: Page, repeats: int = 3) -> Iterator[tuple[str, str]]:
    """Time each change of the view, from all results: the first time, and the median of further times.

    The longest task includes the way back to all results and the loading of images.
    """
    for name, change in CHANGES.items():
        results = []
        with TaskTimes(browser, page) as tasks:
            for _ in range(1 + repeats):
                page.evaluate(CHANGE, "")
                page.wait_for_timeout(PAUSE_MS)
                results.append(page.evaluate(CHANGE, change))
                page.wait_for_timeout(PAUSE_MS)
        first, *others = [result["painted"] for result in results]
        median = sorted(others)[len(others) // 2]
        yield name, f"{first:.0f} ms, then {median:.0f} ms; {tasks}; {results[0]['rows']:,} results"


def measure_scrolling(browser: Browser, page: Page) -> Iterator[tuple[str, str]]:
    for view in ("", "group=prompt"):
        page.evaluate(CHANGE, view)
        for name, arguments in SCROLLS.items():
            with TaskTimes(browser, page) as tasks:
                result = page.evaluate(SCROLL, arguments)
            frames = (
                f"{result['frames']} frames, median {result['median']:.0f} ms, 99th percentile {result['p99']:.0f} ms"
            )
            yield f"{name}, grouped" if view else name, f"{tasks}; {frames}"
    page.evaluate(CHANGE, "")


def measure_memory(browser: Browser, page: Page, *, is_last: bool = False) -> Iterator[tuple[str, str]]:
    """Read the JavaScript heap, and the memory of the browser's processes from /proc.

    Chromium keeps garbage and caches, and drops them when memory becomes scarce. With `is_last`, also measure
    that, which changes how Chromium behaves afterwards.
    """
    session = page.context.new_cdp_session(page)
    heap = session.send("Runtime.getHeapUsage")["usedSize"]
    processes = browser.new_browser_cdp_session().send("SystemInfo.getProcessInfo")["processInfo"]
    renderers = [process["id"] for process in processes if process["type"] == "renderer"]
    own = max(renderers, key=read_memory)
    size, total = read_memory(own), sum(read_memory(process["id"]) for process in processes)
    yield "JavaScript heap", f"{heap / MIB:.0f} MiB"
    yield "process of the page", f"{size / MIB:.0f} MiB"
    yield "all processes of the browser", f"{total / MIB:.0f} MiB"
    if is_last:
        session.send("HeapProfiler.collectGarbage")
        session.send("Memory.simulatePressureNotification", {"level": "critical"})
        page.wait_for_timeout(2000)
        yield "process of the page, memory being scarce", f"{read_memory(own) / MIB:.0f} MiB"


def read_memory(process: int) -> int:
    """Return the proportional set size of a process in bytes, which counts shared memory once."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
