"""Test links to views and images of a gallery, in Chromium: unsuitable links, and what they do to an open image."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.gallery_pages import (
    NoImages,
    count,
    launch_browser,
    make_gallery,
    open_context,
    open_tile,
    option,
    wait_for_count,
    wait_until,
)

MANY = 1100
"""Number of results of a gallery whose rows are in two files."""
SECOND_FILE = "**/rows-00001.js"
PLACE = "document.querySelector('.panel-place')?.lastChild.textContent"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launch_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_gallery(tmp_path_factory.mktemp("out"), 40)


@pytest.fixture(scope="module")
def large_gallery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_gallery(tmp_path_factory.mktemp("large"), MANY, NoImages)


@pytest.fixture
def show(browser: Any, gallery: Path) -> Iterator[Callable[..., Any]]:
    """Return a function that opens the gallery with a link and returns the page."""
    with open_context(browser) as opened:
        yield partial(opened.goto, gallery)


def release(page: Any, waiting: list[Any]) -> None:
    """Answer the first request that a route holds."""
    while not waiting:
        page.wait_for_timeout(20)
    waiting[0].continue_()


def test_a_link_may_name_columns_of_the_wrong_kind(show: Callable[..., Any]) -> None:
    page = show("is.seconds=5&is.id=row-0&is.safety_scores=1&min.style=1&sort=safety_scores&group=seconds&is.style=ink")
    assert count(page) == "20 of 40 results"
    assert page.locator(".chip").all_inner_texts() == ["style: ink"]


def test_a_link_may_have_a_time_that_no_calendar_has(show: Callable[..., Any]) -> None:
    page = show("max.finished_at=1e300")
    page.locator("details.section").filter(has_text="Finished").locator("summary").click()
    wait_until(page, "document.querySelector('.range.is-time input') !== null")
    assert count(page) == "40 of 40 results"
    assert [field.input_value() for field in page.locator(".range.is-time input").all()] == ["", ""]


def test_an_image_outside_the_filters_opens_without_them(show: Callable[..., Any]) -> None:
    page = show("min.guidance_scale=8")
    open_tile(page, 1)
    page.locator(".sibling").first.click()
    wait_for_count(page, "40 results")
    wait_until(page, f"{PLACE} === '1 of 40'")
    page.click(".pswp__button--close")
    page.wait_for_selector(".panel", state="detached")
    wait_until(page, "location.hash === ''")


def test_another_address_opens_another_image(show: Callable[..., Any]) -> None:
    page = show("row=row-0")
    page.evaluate("location.hash = 'row=row-4'")
    wait_until(page, f"{PLACE} === '17 of 40'")
    page.evaluate("location.hash = 'q=boat&row=row-4&image=1'")
    wait_until(page, f"{PLACE} === '10 of 20'")
    page.go_back()
    wait_until(page, f"{PLACE} === '17 of 40'")


def test_closing_an_image_restores_an_address_that_was_typed(show: Callable[..., Any]) -> None:
    page = show()
    page.evaluate("location.hash = 'q=fox'")
    wait_for_count(page, "16 of 40 results")
    open_tile(page, 3)
    page.click(".pswp__button--close")
    page.wait_for_selector(".panel", state="detached")
    wait_until(page, "location.hash === '#q=fox'")
    assert page.locator(".tile:focus-within").get_attribute("aria-posinset") == "3"


def test_an_image_of_a_later_file_opens_in_the_view_of_the_link(browser: Any, large_gallery: Path) -> None:
    link = f"is.status=ok&sort=-source_row&row=row-{MANY // 4 - 1}"
    with open_context(browser) as opened:
        page = opened.goto(large_gallery, link)
        wait_until(page, f"{PLACE} === '1 of 1,097'")
        assert page.evaluate("location.hash") == f"#{link}"


def test_an_image_of_a_link_does_not_open_over_another_view(browser: Any, large_gallery: Path) -> None:
    waiting: list[Any] = []
    with open_context(browser) as opened:
        page = opened.page
        page.route(SECOND_FILE, lambda route: waiting.append(route))
        page.goto(f"{large_gallery.as_uri()}#is.status=ok&row=row-274", wait_until="domcontentloaded")
        wait_for_count(page, "997 of 1,100 results")
        page.locator(".chip").click()
        wait_for_count(page, "1,100 results")
        release(page, waiting)
        opened.wait_for_data()
        assert page.evaluate("location.hash") == ""
        assert page.locator(".panel").count() == 0


def test_an_image_opened_while_loading_stays_open_among_all_results(browser: Any, large_gallery: Path) -> None:
    waiting: list[Any] = []
    with open_context(browser) as opened:
        page = opened.page
        page.route(SECOND_FILE, lambda route: waiting.append(route))
        page.goto(f"{large_gallery.as_uri()}#sort=-source_row&row=missing", wait_until="domcontentloaded")
        wait_for_count(page, "1,100 results")
        open_tile(page, 1)
        assert page.evaluate(PLACE) == "1 of 1,000"
        release(page, waiting)
        opened.wait_for_data()
        wait_until(page, f"{PLACE} === '101 of 1,100'")
        page.keyboard.press("ArrowLeft")
        wait_until(page, "location.hash === '#sort=-source_row&row=row-250&image=3'")
        page.keyboard.press("Escape")
        page.wait_for_selector(".panel", state="detached")
        assert page.locator(".tile:focus-within").get_attribute("aria-posinset") == "100"


def test_a_range_keeps_numbers_that_its_fields_do_not_show(show: Callable[..., Any]) -> None:
    page = show("min.seconds=1.200000000001&min.finished_at=1767225601.5")
    finished = page.locator("details.section").filter(has_text="Finished")
    finished.locator("summary").click()
    finished.get_by_label("to").fill("2026-01-02T00:00")
    seconds = page.locator("details.section").filter(has_text="Seconds")
    seconds.locator("summary").click()
    assert seconds.get_by_label("from").input_value() == "1.200000000001"
    seconds.get_by_label("to").fill("3")
    seconds.get_by_label("to").blur()
    wait_until(page, "location.hash.includes('max.seconds')")
    link = page.evaluate("location.hash")
    assert "min.seconds=1.200000000001&max.seconds=3" in link
    assert "min.finished_at=1767225601.5&max.finished_at" in link


def test_a_range_over_the_whole_histogram_has_all_results(show: Callable[..., Any]) -> None:
    page = show("max.safety_scores.violence=0.5")
    section = page.locator("details.section").filter(has_text="violence")
    section.locator("summary").click()
    section.locator(".range-plot").scroll_into_view_if_needed()
    box = section.locator(".range-plot").bounding_box()
    page.mouse.move(box["x"] + 1, box["y"] + 9)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - 1, box["y"] + 9)
    page.mouse.up()
    wait_for_count(page, "40 of 40 results")


def test_a_search_may_have_any_number_of_words(show: Callable[..., Any]) -> None:
    page = show("q=" + "+".join(f"nothing{number}" for number in range(256)))
    assert count(page) == "0 of 40 results"


def test_a_column_of_the_table_may_be_named_rating(show: Callable[..., Any]) -> None:
    page = show("sort=-rating")
    open_tile(page, 7)
    page.keyboard.press("5")
    page.keyboard.press("Escape")
    wait_until(page, "document.querySelector(\".tile[aria-posinset='1'] .tile-stars\").textContent === '★ 5'")
    assert page.locator(".tile:focus-within").get_attribute("aria-posinset") == "1"
    option(page, "input_rating", "b").check()
    wait_for_count(page, "20 of 40 results")
