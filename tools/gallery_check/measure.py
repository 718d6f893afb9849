"""Measure the page in Chromium: time to open, time of changes, long tasks while scrolling, and memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, ViewportSize

MIB = 1024**2
DESKTOP: ViewportSize = {"width": 1440, "height": 900}

WATCH = """
window.times = {};
window.longTasks = [];
new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) window.longTasks.push({ start: entry.startTime, ms: entry.duration });
}).observe({ type: "longtask", buffered: true });
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
  window.longTasks.length = 0;
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
  const longest = Math.max(0, ...window.longTasks.map(({ ms }) => ms));
  const p99 = times[Math.floor(times.length * 0.99)];
  return { frames: times.length, median: times[times.length >> 1], p99, longest };
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
        page.add_init_script(WATCH)
        page.goto(url)
        page.wait_for_selector("html[data-loaded]", state="attached", timeout=120_000)
        yield page


def measure_opening(page: Page) -> Iterator[tuple[str, str]]:
    while not page.evaluate("window.times.images"):  # the page's Content-Security-Policy refuses wait_for_function
        page.wait_for_timeout(20)
    times, longest = page.evaluate("[window.times, Math.max(0, ...window.longTasks.map(({ ms }) => ms))]")
    yield "first tiles", f"{times['tiles']:.0f} ms"
    yield "first images", f"{times['images']:.0f} ms"
    yield "all data loaded", f"{times['loaded']:.0f} ms"
    yield "longest task while loading", f"{longest:.0f} ms"


def measure_changes(page: Page, repeats: int = 3) -> Iterator[tuple[str, str]]:
    """Time each change of the view: the first time, and the median of further times."""
    for name, change in CHANGES.items():
        page.evaluate(CHANGE, "")
        page.evaluate("window.longTasks.length = 0")
        results = []
        for _ in range(1 + repeats):
            results.append(page.evaluate(CHANGE, change))
            page.evaluate(CHANGE, "")
        longest = page.evaluate("Math.max(0, ...window.longTasks.map(({ ms }) => ms))")
        first, *others = [result["painted"] for result in results]
        median = sorted(others)[len(others) // 2]
        text = f"{first:.0f} ms, then {median:.0f} ms, with painting; longest task {longest:.0f} ms"
        yield name, f"{text}; {results[0]['rows']:,} results"


def measure_scrolling(page: Page) -> Iterator[tuple[str, str]]:
    for view in ("", "group=prompt"):
        page.evaluate(CHANGE, view)
        for name, arguments in SCROLLS.items():
            result = page.evaluate(SCROLL, arguments)
            times = f"median frame {result['median']:.0f} ms, 99th percentile {result['p99']:.0f} ms"
            title = f"{name}, grouped" if view else name
            yield title, f"longest task {result['longest']:.0f} ms; {times}; {result['frames']} frames"
    page.evaluate(CHANGE, "")


def measure_memory(browser: Browser, page: Page) -> Iterator[tuple[str, str]]:
    """Read the JavaScript heap, and the memory of the browser's processes from /proc."""
    session = page.context.new_cdp_session(page)
    heap = session.send("Runtime.getHeapUsage")["usedSize"]
    yield "JavaScript heap", f"{heap / MIB:.0f} MiB"
    processes = browser.new_browser_cdp_session().send("SystemInfo.getProcessInfo")["processInfo"]
    sizes = [(process["type"], read_memory(process["id"])) for process in processes]
    page_size = max(size for kind, size in sizes if kind == "renderer")
    yield "process of the page", f"{page_size / MIB:.0f} MiB"
    yield "all processes of the browser", f"{sum(size for _, size in sizes) / MIB:.0f} MiB"


def read_memory(process: int) -> int:
    """Return the proportional set size of a process in bytes, which counts shared memory once."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
