"""Take screenshots of the page, and check its accessibility in each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page

from tools.gallery_check.measure import DESKTOP, Problems, open_page

PHONE = {"width": 360, "height": 740}
AXE_OPTIONS = {"preload": False}
"""By default, axe requests the style sheets again, which the page's Content-Security-Policy refuses."""
SETTLING_MS = 700


def open_tile(page: Page) -> None:
    page.locator(".tile-open").nth(1).click()
    page.locator(".panel-wait").wait_for(state="detached")


@dataclass(frozen=True)
class Screen:
    """A screenshot: what follows the # of the address, and what to do before it is taken."""

    name: str
    link: str = ""
    scheme: str = "light"
    is_phone: bool = False
    act: Callable[[Page], object] = lambda _: None


SCREENS = (
    Screen("desktop"),
    Screen("dark", scheme="dark"),
    Screen("phone", is_phone=True),
    Screen("phone-filters", is_phone=True, act=lambda page: page.click("#filters-button")),
    Screen("phone-detail", is_phone=True, act=open_tile),
    Screen("flagged", "is.status=flagged&is.status=failed"),
    Screen("grouped", "group=prompt&q=lake"),
    Screen("grouped-dark", "group=prompt&q=lake", scheme="dark"),
    Screen("detail", act=open_tile),
    Screen("detail-dark", scheme="dark", act=open_tile),
    Screen("detail-flagged", "is.status=flagged", act=open_tile),
    Screen("detail-failed", "is.status=failed", act=open_tile),
    Screen("charts", "view=charts"),
    Screen("charts-dark", "view=charts", scheme="dark"),
    Screen("filters", "is.style=watercolour&is.status=ok&min.guidance_scale=5&q=fog"),
    Screen("no-match", "q=nothing has this text"),
    Screen("export", act=lambda page: page.click("[data-dialog=export]")),
    Screen("help", scheme="dark", act=lambda page: page.click("[data-dialog=help]")),
)


def take_screenshots(browser: Browser, url: str, folder: Path, problems: Problems) -> Iterator[tuple[str, str]]:
    """Take all screenshots, and yield what axe reports of each."""
    folder.mkdir(parents=True, exist_ok=True)
    for screen in SCREENS:
        options: dict[str, Any] = {"color_scheme": screen.scheme, "viewport": PHONE if screen.is_phone else DESKTOP}
        if screen.is_phone:
            options |= {"is_mobile": True, "has_touch": True, "device_scale_factor": 2}
        with open_page(browser, f"{url}#{screen.link}", problems, **options) as page:
            page.wait_for_timeout(SETTLING_MS)
            screen.act(page)
            page.wait_for_timeout(SETTLING_MS)
            page.screenshot(path=folder / f"{screen.name}.png")
            yield f"axe, {screen.name}", describe_violations(page)


def describe_violations(page: Page) -> str:
    """Return what axe finds, as `serious color-contrast (3)`."""
    violations = Axe().run(page, options=AXE_OPTIONS).response["violations"]
    texts = [f"{item['impact']} {item['id']} ({len(item['nodes'])})" for item in violations]
    return ", ".join(sorted(texts)) or "no violations"
