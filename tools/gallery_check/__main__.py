"""Measure the page of a large synthetic gallery: `python -m tools.gallery_check FOLDER --rows 100000`.

FOLDER receives the gallery, whose thumbnails are hard links to a few hundred pictures, and screenshots. An existing
gallery is written again. The page is opened from disk in headless Chromium on two cores. Making 100,000 results takes
about two minutes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from playwright.sync_api import sync_playwright

from tools.gallery_check.make import make_gallery
from tools.gallery_check.measure import (
    DESKTOP,
    Problems,
    measure_changes,
    measure_memory,
    measure_opening,
    measure_scrolling,
    open_page,
)
from tools.gallery_check.screens import take_screenshots

CORES = 2


def show(lines: Iterable[tuple[str, str]]) -> None:
    for name, text in lines:
        print(f"{name:42} {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--no-screenshots", action="store_true")
    parser.add_argument("--keep", action="store_true", help="measure the gallery that FOLDER has")
    arguments = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("Neither chromium nor google-chrome is installed.")
    folder = arguments.folder.absolute()
    page_path = folder / "gallery" / "index.html" if arguments.keep else make_gallery(folder, arguments.rows)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    problems = Problems()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        show(measure_opening(browser, page_path.as_uri(), problems))
        with open_page(browser, page_path.as_uri(), problems, viewport=DESKTOP) as page:
            show(measure_memory(browser, page))
            show(measure_changes(browser, page))
            show(measure_scrolling(browser, page))
            show(measure_memory(browser, page, is_last=True))
        if not arguments.no_screenshots:
            show(take_screenshots(browser, page_path.as_uri(), folder / "screenshots", problems))
        browser.close()
    print(f"console errors: {problems.errors or 'none'}")
    print(f"requests that are not file://: {problems.requests or 'none'}")


if __name__ == "__main__":
    main()
