"""The report in a real browser: every chart drawn, search, strips, keyboard, phone, dark mode, and how fast it opens.

Needs Chromium: one on the PATH, the one that LOCKSTEP_CHROMIUM names, or that of `playwright install chromium`.
"""

import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from rl.report import write_report
from tests.rl.page import HOSTILE
from tests.rl.report.synthetic import WORDS, make_run

pytestmark = pytest.mark.slow

MISSING = (
    "no Chromium was found, so no report was opened: `apt-get install chromium` or `playwright install chromium` gets "
    "one, or LOCKSTEP_CHROMIUM names it"
)
NAMES = ("chromium", "chromium-browser", "google-chrome")
EVIL = f"{WORDS}\x1b[31m \u202egnp.exe {HOSTILE} " + "x" * 30_000
MAX_SECONDS = 2.0  # to interactive, for a run of 500 steps
PHONE = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True}

Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        found = os.environ.get("LOCKSTEP_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
        if not found and not Path(playwright.chromium.executable_path).exists() and os.environ.get("CI") != "true":
            pytest.skip(MISSING)
        browser = playwright.chromium.launch(executable_path=found)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory, finished_run: Path) -> dict[str, Path]:
    """Of an aligned run, of an asynchronous one that is not, of one whose completions attack the page, and the one that
    a real run wrote."""
    folder = tmp_path_factory.mktemp("runs")
    runs = {
        "aligned": make_run(folder / "aligned", 500),
        "stale": make_run(folder / "stale", 500, aligned=False),
        "hostile": make_run(folder / "hostile", 3, text=EVIL),
    }
    return {name: write_report(run) for name, run in runs.items()} | {"real": finished_run / "report.html"}


@pytest.fixture
def opened(browser: Browser, reports: dict[str, Path]) -> Iterator[Open]:
    """Opens a report; whatever the page then says on its console, asks of the network or raises fails the test."""
    problems: list[str] = []
    contexts = []

    def open_report(name: str, **options: Any) -> Page:
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: problems.append(dialog.message))
        page.on("request", lambda request: request.url.startswith("file:") or problems.append(request.url))
        page.goto(reports[name].as_uri())
        return page

    yield open_report
    for context in contexts:
        context.close()
    assert problems == []


@pytest.mark.parametrize("name", ["aligned", "stale", "real"])
def test_every_chart_is_drawn(opened: Open, name: str) -> None:
    page = opened(name)
    drawn = page.evaluate(
        """[...document.querySelectorAll("figure")].map(figure => {
            const shapes = [...figure.querySelectorAll("path.line, path.area, path.points, rect.bar")];
            const boxes = shapes.map(shape => shape.getBBox());
            const box = figure.querySelector("svg").getBoundingClientRect();
            return [figure.querySelector("b").textContent, Math.max(...boxes.map(box => box.width)), box.height];
        })"""
    )
    assert len(drawn) >= 12
    assert [title for title, widest, height in drawn if widest < 10 or height < 80] == []


def test_500_steps_are_small_and_open_at_once(opened: Open, reports: dict[str, Path]) -> None:
    seconds = {}
    for name in ("aligned", "stale"):
        assert reports[name].stat().st_size < 5_000_000
        for options in ({}, PHONE):
            page = opened(name, **options)
            taken = page.evaluate("performance.getEntriesByType('navigation')[0].domComplete") / 1000
            seconds[name] = min(seconds.get(name, taken), taken)
            assert page.locator("#groups article").count() == 10  # drawn by the script, which is done
    assert reports["real"].stat().st_size < 5_000_000
    sizes = {name: f"{path.stat().st_size / 1e6:.1f} MB" for name, path in reports.items()}
    print(f"seconds until all is drawn: {seconds}; {sizes}")
    assert max(seconds.values()) < MAX_SECONDS


@pytest.mark.parametrize("name", ["aligned", "stale", "hostile", "real"])
def test_nothing_is_wider_than_a_phone(opened: Open, name: str) -> None:
    page = opened(name, **PHONE)
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    page.wait_for_selector(".completion[open] .strips")
    assert page.evaluate("document.documentElement.scrollWidth") == 360


def test_dark_mode_has_light_text_on_a_dark_page(opened: Open) -> None:
    def brightness(page: Page, selector: str, css: str) -> float:
        colour = page.evaluate(f"getComputedStyle(document.querySelector('{selector}')).{css}")
        return float(sum(int(part) for part in colour.removeprefix("rgb(").rstrip(")").split(",")) / 3)

    places = [
        ("body", "backgroundColor"),
        ("body", "color"),
        (".card", "backgroundColor"),
        ("#search", "backgroundColor"),
    ]
    light, dark = (
        [brightness(page, *place) for place in places]
        for page in (opened("aligned", color_scheme=scheme) for scheme in ("light", "dark"))
    )
    assert light[1] < 60 and min(light[0], light[2], light[3]) > 200
    assert dark[1] > 200 and max(dark[0], dark[2], dark[3]) < 60


def test_search_and_filters_leave_what_fits(opened: Open) -> None:
    page = opened("aligned")
    count = page.locator("#count")
    all_shown = int(count.inner_text().split()[0])
    assert all_shown > 100
    page.fill("#search", "nothing has this")
    assert count.inner_text() == "0 completions in 0 groups" and page.locator("#groups article").count() == 0
    page.fill("#search", "PROBLEM 3?")
    assert 0 < int(count.inner_text().split()[0]) < all_shown
    assert all("Problem 3?" in text for text in page.locator("#groups article").all_inner_texts())
    assert page.locator("#groups mark").first.inner_text() == "Problem 3?"
    page.fill("#search", "")
    page.select_option("#outcome", "reward above 0")
    rewards = page.locator("#groups summary b").all_inner_texts()
    assert set(rewards) == {"reward 1"}
    page.select_option("#outcome", "tokens that differ")
    assert count.inner_text() == "0 completions in 0 groups"
    page.select_option("#outcome", "all")
    page.select_option("#step", "500")
    assert set(page.locator("#groups .tag").all_inner_texts()) == {"step 500"}


def test_more_groups_come_on_request(opened: Open) -> None:
    page = opened("aligned")
    total = int(page.locator("#count").inner_text().split()[-2])
    for shown in itertools.count(10, 10):
        assert page.locator("#groups article").count() == min(shown, total)
        if shown >= total:
            break
        page.click("#more")
    assert page.locator("#more").is_hidden()


def test_strips_show_the_numbers_of_a_token(opened: Open) -> None:
    page = opened("stale")
    completion = page.locator(".completion[open]").first
    assert completion.locator(".strip").all_inner_texts() == ["probability", "difference", "entropy", "advantage"]
    assert all(box["width"] > 300 for box in map(_box, completion.locator(".strip svg").all()))
    strips, numbers = completion.locator(".strips"), completion.locator(".numbers")
    strips.focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert numbers.inner_text().startswith("token 2 ") and strips.get_attribute("aria-valuenow") == "2"
    shown = page.evaluate("JSON.parse(document.getElementById('rollout-data').textContent)[0].completions[0]")
    for value in (shown["sampler"][2], shown["trainer"][2]):
        assert f"{value:.9g}" in numbers.inner_text()
    assert f"entropy {shown['entropies'][2]:.4g}" in numbers.inner_text()
    page.keyboard.press("End")
    last = completion.locator(".tokens span").last
    assert "at" in (last.get_attribute("class") or "").split()
    completion.locator(".tokens span").nth(5).hover()
    assert numbers.inner_text().startswith("token 5 ")
    box = _box(completion.locator(".strip svg").first)
    page.mouse.move(box["x"] + box["width"] * 0.999, box["y"] + 2)
    assert "at" in (last.get_attribute("class") or "").split()


def test_a_tap_shows_a_token_and_a_value_of_a_chart(opened: Open) -> None:
    page = opened("aligned", **PHONE)
    completion = page.locator(".completion[open]").first
    completion.locator(".tokens span").nth(3).tap()
    assert completion.locator(".numbers").inner_text().startswith("token 3 ")
    svg = page.locator("figure svg").first
    svg.scroll_into_view_if_needed()
    page.wait_for_timeout(100)  # the scroll itself hides the tip
    svg.tap()
    assert page.locator("#tip").is_visible() and "reward" in page.locator("#tip").inner_text()


def test_a_chart_is_read_with_the_keyboard(opened: Open) -> None:
    page = opened("aligned")
    svg, tip = page.locator("figure svg").first, page.locator("#tip")
    svg.focus()
    page.keyboard.press("End")
    assert tip.inner_text().startswith("step 500\n") or tip.inner_text().startswith("step 49")
    page.keyboard.press("Home")
    assert tip.inner_text().startswith("step 0\nevaluation 0.3")
    page.keyboard.press("Escape")
    assert tip.is_hidden()


def test_tokens_are_coloured_by_the_quantity_chosen(opened: Open) -> None:
    page = opened("stale")
    colours = []
    for quantity in ("probability", "difference", "entropy", "advantage"):
        page.select_option("#quantity", quantity)
        spans = "document.querySelectorAll('.completion[open] .tokens span')"
        colours.append(page.evaluate(f"[...{spans}].map(span => getComputedStyle(span).backgroundColor).join()"))
    assert len(set(colours)) == 4


def test_a_hostile_completion_is_text(opened: Open) -> None:
    page = opened("hostile")
    assert page.locator("img").count() == 0 and page.locator("script").count() == 2
    shown = page.locator(".completion[open] pre").first.inner_text()
    assert HOSTILE in shown and "␛[31m ⟨U+202E⟩gnp.exe" in shown and "more characters]" in shown
    page.fill("#search", HOSTILE.lower())
    assert page.locator("#groups mark").first.inner_text() == HOSTILE


def test_the_policy_of_the_page_stops_what_would_get_in(browser: Browser, reports: dict[str, Path]) -> None:
    """Were text ever to become markup, the browser would refuse it."""
    page = browser.new_page()
    page.goto(reports["aligned"].as_uri())
    refused = page.evaluate(
        "(() => { try { document.body.innerHTML = '<b>x</b>' } catch (error) { return error.name } })()"
    )
    assert refused == "TypeError"
    page.close()


def _box(locator: Any) -> dict[str, float]:
    box: dict[str, float] = locator.bounding_box()
    return box
