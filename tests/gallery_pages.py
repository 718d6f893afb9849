"""Make small galleries, and open their pages in Chromium."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image

from batch_infer.galleries import GalleryInfo, Snapshot, TileOptions, write_gallery
from batch_infer.manifest import SCHEMA
from batch_infer.store import open_store

OUT = "it's my out"
QUOTED = """it's "quoted"  $(id)"""
HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'> \u2028 & <b>bold</b>"
SEED = 2**62 + 1
TIMEOUT = 30
START = datetime(2026, 1, 1, tzinfo=timezone.utc)
DESKTOP = {"width": 1280, "height": 900}


def make_result(number: int, scores: int = 1) -> dict[str, Any]:
    """Return one of 40 results: 10 prompts of 4 images, of which some are flagged or failed."""
    categories = ("violence", *(f"concept {k}" for k in range(1, scores)))
    prompt_number, index = divmod(number, 4)
    status = {5: "flagged", 6: "failed", 9: "flagged"}.get(number, "ok")
    row_id = {1: QUOTED, 2: "-dash"}.get(prompt_number, f"row-{prompt_number}")
    return {
        **{"id": row_id, "image_index": index, "status": status, "seed": SEED + number, "source_row": prompt_number},
        "prompt": HOSTILE
        if prompt_number == 3
        else f"{('a blue boat', 'a red fox')[prompt_number % 2]} {prompt_number}",
        "error": {"flagged": "The image was flagged.", "failed": "Out of memory."}.get(status),
        "generated_image": None if status == "failed" else f"images/{number}.png",
        "nsfw_content_detected": None if status == "failed" else status == "flagged",
        **{"num_inference_steps": 20 + prompt_number, "guidance_scale": 5.0 + index, "width": 64, "height": 64},
        **{"seconds": 1 + (number * 7 % 40) / 10, "finished_at": START + timedelta(seconds=number)},
        "safety_scores": [{"category": category, "score": (number + 2) / 43} for category in categories],
        **{"style": ("oil", "ink")[prompt_number % 2], "note": f"note {number}", "rating": "ab"[prompt_number % 2]},
    }


class Images:
    """Images in files beside the gallery."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def has(self, path: str) -> bool:
        return True

    def read(self, path: str) -> bytes | None:
        target = self._folder / path
        target.parent.mkdir(exist_ok=True)
        Image.new("RGB", (64, 64), (10 * (int(target.stem) % 20), 90, 120)).save(target)
        return target.read_bytes()

    def link(self, path: str) -> str | None:
        return f"../{path}"


class NoImages(Images):
    """Images that were removed."""

    def has(self, path: str) -> bool:
        return False


def make_gallery(folder: Path, rows: int, images: type[Images] = Images, scores: int = 1, **run: Any) -> Path:
    """Make a gallery whose images have this many safety scores. `run` adds entries to the description of the run."""
    schema = pa.schema([*SCHEMA, ("style", pa.string()), ("note", pa.string()), ("rating", pa.string())])
    with Snapshot(schema) as snapshot, open_store(folder / "gallery").locked() as store:
        results = [make_result(number, scores) for number in range(rows)]
        if run.get("on_flagged") == "drop":
            results = [{**row, "generated_image": None} if row["status"] == "flagged" else row for row in results]
        snapshot.add(pa.Table.from_pylist(results, schema))
        summary = {"stage_shares": {"denoise": 0.9, "decode": 0.1}}
        description = {
            **{"model": "tiny", "model_options": [], "on_flagged": "keep", "scheduler": None},
            **{"started_at": str(START), "summary": summary, **run},
        }
        info = GalleryInfo("<tests>", OUT, "tests", 0, 0.0, description)
        write_gallery(store, snapshot, images(folder), info, TileOptions(64, 1))
    return folder / "gallery" / "index.html"


class Opened:
    """A page, and what went wrong in it."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.problems: list[str] = []
        page.on("console", lambda message: self._add(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self._add(str(error)))
        page.on("request", lambda request: None if self._is_local(request.url) else self._add(request.url))

    def _add(self, problem: str) -> None:
        self.problems.append(problem)

    def _is_local(self, url: str) -> bool:
        return url.startswith(("file:", "data:", "blob:"))

    def goto(self, path: Path, link: str = "") -> Any:
        self.page.goto(f"{path.as_uri()}#{link}")
        self.wait_for_data()
        return self.page

    def wait_for_data(self) -> None:
        self.page.wait_for_selector("html[data-loaded]", state="attached")


@contextmanager
def launch_browser() -> Iterator[Any]:
    """Yield Chromium, or skip the test if a program or package is missing."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("neither chromium nor google-chrome is installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def open_context(browser: Any, **options: Any) -> Iterator[Opened]:
    """Yield a page in a fresh browser profile, and check that nothing went wrong in it."""
    with browser.new_context(**{"viewport": DESKTOP, **options}) as context:
        opened = Opened(context.new_page())
        opened.page.set_default_timeout(TIMEOUT * 1000)
        yield opened
        assert not opened.problems


def count(page: Any) -> str:
    return str(page.inner_text("#count"))


def wait_until(page: Any, expression: str) -> None:
    """Wait until a JavaScript expression is true. The page's Content-Security-Policy refuses `wait_for_function`."""
    deadline = time.monotonic() + TIMEOUT
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, f"{expression} is still false"
        page.wait_for_timeout(20)


def wait_for_count(page: Any, text: str) -> None:
    wait_until(page, f"document.getElementById('count').textContent === {json.dumps(text)}")


def titles(page: Any) -> list[str]:
    """Return the second lines of the tiles in their order on the page."""
    in_order = "nodes.sort((a, b) => a.ariaPosInSet - b.ariaPosInSet)"
    script = f"nodes => {in_order}.map((node) => node.querySelector('.tile-meta').textContent)"
    return list(page.eval_on_selector_all(".tile:not([hidden])", script))


def option(page: Any, section: str, name: str) -> Any:
    return page.locator("details.section", has=page.get_by_text(section, exact=True)).get_by_label(name, exact=False)


def open_tile(page: Any, position: int) -> None:
    page.locator(f".tile[aria-posinset='{position}'] .tile-open").click()
    page.locator(".panel-wait").wait_for(state="detached")
