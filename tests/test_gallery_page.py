"""Test the page of a gallery in Chromium, opened from disk."""

from __future__ import annotations

import csv
import shlex
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.gallery_pages import (
    HOSTILE,
    OUT,
    QUOTED,
    SEED,
    count,
    make_gallery,
    make_result,
    open_context,
    open_tile,
    option,
    titles,
    wait_for_count,
    wait_until,
)
from tests.tables import read_requests

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("neither chromium nor google-chrome is installed", allow_module_level=True)
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_gallery(tmp_path_factory.mktemp("out with space"), 40)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def show(browser: Any, gallery: Path) -> Iterator[Callable[..., Any]]:
    """Return a function that opens the gallery with a link and returns the page."""
    with open_context(browser) as opened:
        yield partial(opened.goto, gallery)


def test_filters_narrow_the_results_and_are_shown_as_chips(show: Callable[..., Any]) -> None:
    page = show()
    assert count(page) == "40 results"
    assert page.locator(".tile[aria-posinset='1'] .tile-text").inner_text() == "a blue boat 0\nrow-0 · image 0"
    option(page, "Status", "flagged").check()
    wait_for_count(page, "2 of 40 results")
    option(page, "Status", "failed").check()
    wait_for_count(page, "3 of 40 results")
    option(page, "NSFW", "not checked").check()
    wait_for_count(page, "1 of 40 results")
    assert page.locator(".chip").all_inner_texts() == ["Status: flagged, failed", "NSFW: not checked"]
    page.get_by_text("Clear all").click()
    wait_for_count(page, "40 results")
    option(page, "style", "ink").check()
    wait_for_count(page, "20 of 40 results")
    page.locator(".chip").click()
    wait_for_count(page, "40 results")


@pytest.mark.parametrize(
    ("text", "results"),
    [("fox", 16), ('"red fox 5"', 4), ('fox -"fox 5"', 12), ("NOTE out", 1), ("quoted", 4), ("ink", 20)],
)
def test_free_text_searches_prompts_ids_errors_and_carried_columns(
    show: Callable[..., Any], text: str, results: int
) -> None:
    page = show()
    page.keyboard.press("/")
    page.keyboard.type(text)
    wait_for_count(page, f"{results} of 40 results")


def test_a_filter_without_results_can_be_cleared(show: Callable[..., Any]) -> None:
    page = show("q=nothing")
    assert page.is_visible("#no-match")
    page.click("#no-match [data-reset]")
    wait_for_count(page, "40 results")
    assert not page.is_visible("#no-match")
    assert page.locator(".tile:not([hidden])").count() > 8


def test_results_are_sorted_and_grouped(show: Callable[..., Any]) -> None:
    page = show()
    page.select_option("#sort", "seconds")
    wait_until(page, "document.querySelector('.tile-meta').textContent.startsWith('seconds')")
    expected = sorted(range(40), key=lambda number: make_result(number)["seconds"])
    names = [f"seconds {make_result(number)['seconds']:g}" for number in expected]
    assert [title.split(" · ")[0] for title in titles(page)][:12] == names[:12]
    page.click("#direction")
    wait_until(page, f"document.querySelector('.tile-meta').textContent.startsWith('{names[-1]}')")
    page.select_option("#sort", "")
    page.select_option("#group", "prompt")
    page.wait_for_selector(".group-header:not([hidden])")
    assert count(page) == "40 results in 10 groups"
    tile = page.locator(".tile[aria-posinset='2'] .tile-prompt")
    assert tile.inner_text().startswith(f"seed {SEED + 1} · guidance 6")


def test_a_link_restores_the_view_and_the_open_image(show: Callable[..., Any]) -> None:
    view = "q=fox&is.status=ok&min.num_inference_steps=25&sort=-source_row&group=style"
    page = show(f"{view}&row=row-7&image=2")
    page.wait_for_selector(".panel")
    assert page.locator(".panel-place span").all_inner_texts() == ["ok", "7 of 12"]
    assert count(page).startswith("12 of 40 results")
    assert page.input_value("#search") == "fox"
    assert page.input_value("#sort") == "source_row"
    assert page.input_value("#group") == "style"
    page.keyboard.press("ArrowRight")
    wait_until(page, "location.hash.includes('image=3')")
    page.keyboard.press("Escape")
    page.wait_for_selector(".panel", state="detached")
    assert page.evaluate("location.hash") == f"#{view}"


def test_back_closes_an_open_image(show: Callable[..., Any]) -> None:
    page = show("sort=seed")
    open_tile(page, 3)
    page.go_back()
    page.wait_for_selector(".panel", state="detached")
    assert page.evaluate("location.hash") == "#sort=seed"
    page.go_forward()
    page.wait_for_selector(".panel")


@pytest.mark.parametrize(("position", "row_id"), [(8, QUOTED), (9, "-dash"), (1, "row-0")])
def test_the_details_have_all_values_and_commands(
    show: Callable[..., Any], tmp_path: Path, position: int, row_id: str
) -> None:
    page = show()
    open_tile(page, position)
    names, texts = (page.locator(query).all_inner_texts() for query in (".value dt", ".value-text"))
    values = dict(zip(names, texts, strict=True))
    result = make_result(position - 1)
    assert (values["ID"], values["Seed"], values["note"]) == (row_id, str(SEED + position - 1), result["note"])
    assert values["Guidance scale"] == f"{result['guidance_scale']:g}"
    retry, recipe, other = (shlex.split(text) for text in page.locator(".command code").all_inner_texts())
    index = ["--image-index", str(result["image_index"])] if result["image_index"] else []
    is_dash = row_id.startswith("-")
    option_words = [f"--id={row_id}"] if is_dash else ["--id", row_id]
    assert retry == ["batch-infer", "retry", *option_words, OUT]
    assert recipe == ["batch-infer", "export-recipe", *index, *(["--"] if is_dash else []), OUT, row_id]
    assert other == ["batch-infer", "run", "--column", "id=", "--out", "other", "image.csv"]
    with page.expect_download() as download:
        page.get_by_text("Save image.csv").click()
    download.value.save_as(tmp_path / "image.csv")
    (row,) = read_csv(tmp_path / "image.csv")
    assert (row["id"], row["seed"], row["note"]) == (row_id, str(result["seed"]), result["note"])


def test_a_flagged_image_is_blurred_until_it_is_asked_for(show: Callable[..., Any]) -> None:
    page = show()
    tile = page.locator(".tile[aria-posinset='6']")
    blur = "getComputedStyle(document.querySelector('.tile[aria-posinset=\"6\"] canvas')).filter"
    assert tile.locator(".tile-badge").inner_text() == "flagged"
    assert "blur" in page.evaluate(blur)
    open_tile(page, 6)
    assert page.locator(".pswp__item[aria-hidden=false] .pswp__img").count() == 0
    page.get_by_role("button", name="Show image").click()
    page.wait_for_selector(".pswp__item[aria-hidden=false] .pswp__img[src='../images/5.png']")
    page.keyboard.press("Escape")
    assert page.evaluate(blur) == "none"
    assert "blur" in page.evaluate(blur.replace('"6"', '"10"'))


def test_the_keyboard_does_everything(show: Callable[..., Any]) -> None:
    page = show()
    for key in ("ArrowDown", "ArrowRight", "ArrowRight", "ArrowLeft", "3", "m"):
        page.keyboard.press(key)
    focused = page.locator(".tile:focus-within")
    assert focused.get_attribute("aria-posinset") == "2"
    assert focused.locator(".tile-stars").inner_text() == "★ 3"
    assert focused.locator(".tile-mark").get_attribute("aria-pressed") == "true"
    page.keyboard.press("Enter")
    page.locator(".panel-wait").wait_for(state="detached")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("5")
    assert page.locator(".star.is-on").count() == 5
    page.keyboard.press("Escape")
    assert page.locator(".tile:focus-within").get_attribute("aria-posinset") == "3"
    page.keyboard.press("End")
    assert page.locator(".tile:focus-within").get_attribute("aria-posinset") == "40"
    page.keyboard.press("?")
    assert page.is_visible("#dialog-help")


def test_tab_and_page_keys_reach_the_tiles_after_scrolling(show: Callable[..., Any]) -> None:
    page = show()
    page.set_viewport_size({"width": 700, "height": 420})
    tile = page.locator(".tile[aria-posinset='1']")
    tile.locator(".tile-open").focus()
    page.keyboard.press("PageDown")
    first = int(page.locator(".tile:focus-within").get_attribute("aria-posinset"))
    assert first > 1
    for _ in range(20):
        page.keyboard.press("PageDown")
    assert int(page.locator(".tile:focus-within").get_attribute("aria-posinset")) > first
    page.keyboard.press("Home")
    page.evaluate("document.getElementById('grid').scrollTop = 1e6")
    wait_until(page, "document.querySelector(\".tile:not([hidden])[aria-posinset='40']\")")
    assert tile.evaluate("node => node.contains(document.activeElement)")
    page.locator("#direction").evaluate("node => { node.disabled = false; node.focus(); }")
    reachable = "document.querySelector('.tile:not([hidden]):has([tabindex=\"0\"])')"
    wait_until(page, f"{reachable}?.ariaPosInSet > 10")
    for _ in range(4):
        page.keyboard.press("Tab")
    assert page.evaluate(f"{reachable}.contains(document.activeElement)")


def test_a_rebuilt_control_keeps_the_focus(show: Callable[..., Any]) -> None:
    page = show("is.status=ok&is.style=ink")
    page.locator(".chip").first.focus()
    page.keyboard.press("Enter")
    wait_for_count(page, "20 of 40 results")
    assert page.locator(".chip:focus").inner_text() == "style: ink"
    page.keyboard.press("Enter")
    wait_until(page, "document.activeElement.id === 'search'")
    open_tile(page, 1)
    for label in ("Rate 4 of 5", "Mark (key m)"):
        page.get_by_label(label, exact=True).focus()
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.getAttribute('aria-label')") == label
        assert page.get_by_label(label, exact=True).get_attribute("aria-pressed") == "true"


def test_a_key_that_is_held_down_rates_once(show: Callable[..., Any]) -> None:
    page = show()
    page.keyboard.press("ArrowDown")
    for key in ("4", "m"):
        for _ in range(2):
            page.keyboard.down(key)
        page.keyboard.up(key)
    tile = page.locator(".tile:focus-within")
    assert (
        tile.locator(".tile-open").get_attribute("aria-label") == "a blue boat 0, row-0 · image 0, rated 4 of 5, marked"
    )


def test_tiles_of_one_group_have_different_names(show: Callable[..., Any]) -> None:
    page = show("group=prompt&q=fox")
    names = page.eval_on_selector_all(".tile-open", "nodes => nodes.map((node) => node.ariaLabel)")
    assert len(set(names)) == len(names) > 8
    assert f"seed {SEED + 4} · guidance 5 · note note 4, {QUOTED} · image 0, a red fox 1" in names
    assert any("failed, Out of memory., a red fox 1" in name for name in names)


@pytest.mark.parametrize(("works", "message"), [(True, "Command copied"), (False, "Copying failed.")])
def test_copying_works_without_the_clipboard(show: Callable[..., Any], works: bool, message: str) -> None:
    page = show()
    page.evaluate(
        f"""() => {{
            Object.defineProperty(navigator, "clipboard", {{ value: undefined }});
            document.execCommand = () => {{
                window.copied = document.activeElement.value;
                return {str(works).lower()};
            }};
        }}"""
    )
    page.click("[data-dialog=export]")
    page.click("#copy-retry")
    wait_until(page, f"document.querySelector('dialog[open] #toast').textContent.startsWith('{message}')")
    assert page.evaluate("window.copied") == page.inner_text("#retry-command")
    assert page.evaluate("document.activeElement.id") == "copy-retry"


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


def test_ratings_survive_a_reload_and_are_exported(show: Callable[..., Any], tmp_path: Path) -> None:
    page = show()
    open_tile(page, 13)
    page.get_by_label("Rate 4 of 5").click()
    page.keyboard.press("Escape")
    open_tile(page, 8)
    page.keyboard.press("m")
    page.keyboard.press("Escape")
    wait_until(page, "!location.hash.includes('row')")
    page.reload()
    page.wait_for_selector("html[data-loaded]", state="attached")
    assert page.locator(".tile[aria-posinset='13'] .tile-stars").inner_text() == "★ 4"
    page.click("[data-dialog=export]")
    with page.expect_download() as download:
        page.click("[data-export=rated]")
    download.value.save_as(tmp_path / "ratings.csv")
    rows = read_csv(tmp_path / "ratings.csv")
    common = {"status": "ok", "image_index": "0", "rating": "", "mark": "0", "negative_prompt": "", "height": "64"}
    common |= {"width": "64", "guidance_rescale": ""}
    first = {"image_index": "3", "mark": "1", "seed": str(SEED + 7), "num_inference_steps": "21", "guidance_scale": "8"}
    last = {"rating": "4", "seed": str(SEED + 12), "num_inference_steps": "23", "guidance_scale": "5"}
    assert rows == [
        common | first | {"id": QUOTED, "prompt": "a red fox 1", "style": "ink", "note": "note 7", "input_rating": "b"},
        common | last | {"id": "row-3", "prompt": HOSTILE, "style": "ink", "note": "note 12", "input_rating": "b"},
    ]
    requests = read_requests(tmp_path / "ratings.csv", columns={"id": ""})
    assert [(item.id, item.seed, item.prompt, item.params.guidance_scale) for item in requests] == [
        ("ratings-00000000", SEED + 7, "a red fox 1", 8.0),
        ("ratings-00000001", SEED + 12, HOSTILE, 5.0),
    ]
    run = "batch-infer run --column id= --out other ratings.csv"
    assert page.inner_text("#run-command") == run
    assert shlex.split(page.inner_text("#retry-command")) == ["batch-infer", "retry", "--ids", "ratings.csv", OUT]


def test_an_exported_prompt_is_no_formula(show: Callable[..., Any], tmp_path: Path) -> None:
    page = show("is.status=failed")
    for name, index, text in (("prompt", 1, "=SUM(1)"), ("note", 6, "=SUM(2)"), ("style", 1, "-0.5")):
        page.evaluate(f"BatchInferGallery.table.get('{name}').values[{index}] = '{text}'")
    page.evaluate("BatchInferGallery.table.loaded--")
    page.click("[data-dialog=export]")
    assert page.is_disabled("[data-export=shown]")
    page.evaluate("BatchInferGallery.table.loaded++ && BatchInferGallery.refresh()")
    with page.expect_download() as download:
        page.click("[data-export=shown]")
    download.value.save_as(tmp_path / "results.csv")
    content = (tmp_path / "results.csv").read_bytes()
    assert content.startswith(b"\xef\xbb\xbfid,image_index")
    assert content.endswith(b",'=SUM(1),,-0.5,'=SUM(2),b\r\n")
    page.keyboard.press("Escape")
    open_tile(page, 1)
    page.get_by_text("Remove the apostrophe before a prompt too").wait_for()


def test_a_flagged_image_that_is_black_is_not_shown(browser: Any, tmp_path: Path) -> None:
    path = make_gallery(tmp_path / "out", 8, on_flagged="blank", model_options=["--model", "my model"])
    with open_context(browser) as opened:
        page = opened.goto(path)
        assert page.locator(".tile[aria-posinset='6'] .tile-note").inner_text() == "The image was flagged."
        open_tile(page, 6)
        words = "The safety checker flagged this image. A black image is stored in its place."
        assert words in page.locator(".notice-box p").all_inner_texts()
        assert page.locator(".notice-box button, .notice-blur").count() == 0
        assert page.get_by_text("export-recipe").count() == 1
        page.keyboard.press("Escape")
        page.click("[data-dialog=export]")
        expected = "batch-infer run --model 'my model' --column id= --out other results.csv"
        assert page.inner_text("#run-command") == expected


def test_a_flagged_image_that_was_not_stored_is_explained(browser: Any, tmp_path: Path) -> None:
    path = make_gallery(tmp_path / "out", 8, on_flagged="drop")
    with open_context(browser) as opened:
        page = opened.goto(path)
        open_tile(page, 6)
        page.get_by_text("The image was not stored.").wait_for()
        assert page.locator(".notice-box strong").all_inner_texts() == ["Flagged"]
        assert page.locator(".notice-box button").count() == 0
        assert page.get_by_text("export-recipe").count() == 1


def test_many_safety_scores_are_folded(browser: Any, tmp_path: Path) -> None:
    path = make_gallery(tmp_path / "out", 8, scores=6)
    with open_context(browser) as opened:
        page = opened.goto(path)
        score = page.locator(".section-name", has_text="Score: concept 5")
        assert not score.is_visible()
        page.get_by_text("Safety scores (6)").click()
        assert score.is_visible()
        assert page.locator("#sort optgroup option").count() == 6
        page = opened.goto(path, "min.safety_scores.violence=0.1")
        assert page.locator("details.is-active", has=page.locator("h2")).count() == 1


def test_the_throughput_is_that_of_the_chosen_results(show: Callable[..., Any]) -> None:
    """Of results within a few seconds, it would show peaks that the run did not have."""
    page = show("view=charts")
    page.get_by_text("Throughput").wait_for()
    assert "Last run" in page.inner_text(".facts")
    page = show("view=charts&is.style=ink&q=fox 1")
    page.get_by_text("Statuses").wait_for()
    assert page.get_by_text("Throughput").count() == 0


def test_an_image_of_several_has_its_number(show: Callable[..., Any], browser: Any, tmp_path: Path) -> None:
    assert show().locator(".tile[aria-posinset='1'] .tile-meta").inner_text() == "row-0 · image 0"
    with open_context(browser) as opened:
        page = opened.goto(make_gallery(tmp_path / "out", 1))
        assert page.locator(".tile .tile-meta").inner_text() == "row-0"


def test_damaged_ratings_are_ignored(show: Callable[..., Any]) -> None:
    page = show()
    page.evaluate("""() => {
        const key = `batch-infer-gallery:${BatchInferGallery.table.meta.gallery_id}`;
        localStorage.setItem(key, JSON.stringify({ "row-0\\u00000": 5, "row-0\\u00001": [3, 0] }));
    }""")
    page.reload()
    page.wait_for_selector("html[data-loaded]", state="attached")
    stars = [page.locator(f".tile[aria-posinset='{position}'] .tile-stars").text_content() for position in (1, 2)]
    assert stars == ["", "★ 3"]


def test_a_hostile_prompt_is_only_text(show: Callable[..., Any]) -> None:
    page = show("group=prompt&q=onerror")
    assert page.locator(".group-title").first.text_content() == HOSTILE
    open_tile(page, 1)
    assert page.locator(".panel-text p").first.text_content() == HOSTILE
    page.go_back()
    assert page.title() == "<tests> · gallery"
    assert page.evaluate("window.hacked === undefined && !document.querySelector('img[src=x], b')")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_accessible(browser: Any, gallery: Path, scheme: str) -> None:
    with open_context(browser, color_scheme=scheme) as opened:
        for link in ("", "view=charts", "group=prompt&is.status=flagged&is.status=ok", "q=nothing", "row=row-3"):
            page = opened.goto(gallery, link)
            page.wait_for_timeout(100)
            violations = axe.Axe().run(page, options={"preload": False}).response["violations"]
            assert not [(item["impact"], item["id"], item["nodes"][0]["html"]) for item in violations]
            page.goto("about:blank")


def test_the_page_fits_a_phone(browser: Any, gallery: Path) -> None:
    with open_context(browser, viewport={"width": 360, "height": 700}, is_mobile=True, has_touch=True) as opened:
        page = opened.goto(gallery)
        page.tap("#filters-button")
        option(page, "style", "ink").tap()
        page.tap("#filters-done")
        wait_for_count(page, "20 of 40 results")
        assert page.evaluate("innerWidth") == 360
        page.locator(".tile[aria-posinset='1'] .tile-open").tap()
        page.locator(".panel-wait").wait_for(state="detached")
        assert page.evaluate("document.querySelector('.panel').getBoundingClientRect().right") == 360


def test_the_filters_of_a_phone_keep_the_focus_until_they_are_closed(browser: Any, gallery: Path) -> None:
    with open_context(browser, viewport={"width": 360, "height": 700}) as opened:
        page = opened.goto(gallery)
        page.click("#filters-button")
        assert page.evaluate("document.activeElement.id") == "filters-close"
        page.keyboard.press("Shift+Tab")
        assert not page.evaluate("document.querySelector('.main, .topbar').contains(document.activeElement)")
        page.keyboard.press("Escape")
        assert page.evaluate("document.activeElement.id") == "filters-button"
        page.click("#filters-button")
        page.set_viewport_size({"width": 1200, "height": 700})
        page.wait_for_selector("#scrim", state="hidden")
        wait_until(page, "!document.querySelector('.main').inert")


def test_a_gallery_without_results_says_so(browser: Any, tmp_path: Path) -> None:
    with open_context(browser) as opened:
        page = opened.goto(make_gallery(tmp_path, 0))
        assert page.is_visible("#empty")
        assert count(page) == "0 results"


def test_a_missing_data_file_is_named(browser: Any, tmp_path: Path) -> None:
    path = make_gallery(tmp_path, 40)
    (path.parent / "data" / "rows-00000.js").unlink()
    with open_context(browser) as opened:
        opened.page.goto(path.as_uri())
        opened.page.wait_for_selector("#error:not([hidden])")
        assert opened.page.inner_text("#error").startswith("data/rows-00000.js cannot be read.")
        opened.problems.clear()
