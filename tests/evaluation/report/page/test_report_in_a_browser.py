"""The report as a person sees it, in a real browser."""

from __future__ import annotations

from pathlib import Path

import pytest

from bico_ds.evaluation.report.page.write import write_report
from tests.browser import visit
from tests.evaluation.report.page.run_folders import run_folder, scores_of

pytestmark = pytest.mark.browser

MARKUP = "<script>document.title='x'</script><img src=x onerror=alert(1)>{}"


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    texts = {"prose": [13.0, 20.0, 31.0]}
    bico = run_folder(runs / "tiny_bico", scores_of(0.9), prediction=MARKUP, texts=texts)
    ntp = run_folder(runs / "a_run_with_a_long_name", scores_of(0.0), recipe="tiny_ntp", texts=texts)
    return write_report([bico, ntp])


@pytest.mark.parametrize("width", [390, 1400])
def test_question_and_answer_are_on_the_first_screen_and_nothing_scrolls_sideways(page, width):
    height = {390: 844, 1400: 900}[width]
    with visit(page, width=width, height=height) as seen:
        for selector in ("h1", ".question", ".answer"):
            box = seen.page.locator(selector).bounding_box()
            assert box["y"] >= 0 and box["y"] + box["height"] <= height, selector
            assert box["x"] >= 0 and box["x"] + box["width"] <= width, selector
        assert seen.page.evaluate("document.scrollingElement.scrollWidth") <= width
        figures = seen.page.locator("figure svg")
        boxes = [figures.nth(number).bounding_box() for number in range(figures.count())]
        assert len(boxes) >= 9 and all(box["width"] > 250 and box["height"] > 150 for box in boxes)
        assert (
            seen.page.title() == "tiny_bico and a_run_with_a_long_name: report"
        )  # no script of a model's ran
        links = seen.page.locator("nav a")
        for number in range(links.count()):
            links.nth(number).click()
            top = seen.page.evaluate("document.querySelector(location.hash).getBoundingClientRect().top")
            assert -1 <= top < height
        assert (seen.errors, seen.requests, links.count()) == ([], [], 9)


def test_a_name_longer_than_the_screen_or_a_sheet_is_broken(tmp_path):
    run = run_folder(tmp_path / "run", scores_of(0.9), texts={"y" * 90: [13.0, 20.0, 31.0]})
    with visit(write_report([run.rename(tmp_path / ("x" * 200))]), width=390) as seen:
        assert seen.page.evaluate("document.scrollingElement.scrollWidth") <= 390
        seen.page.emulate_media(media="print")
        seen.page.set_viewport_size({"width": 688, "height": 900})  # of A4 between our margins
        assert seen.page.evaluate("document.scrollingElement.scrollWidth") <= 688


def test_a_figure_and_its_unit_stay_on_one_line(tmp_path):
    lines = "cells => cells.map(cell => { const all = document.createRange(); all.selectNodeContents(cell); "
    lines += "return new Set([...all.getClientRects()].map(line => line.top)).size })"
    page = write_report([run_folder(tmp_path / name, scores_of(0.9), logged=3) for name in "abcd"])
    with visit(page, width=390) as seen:
        numbers = seen.page.locator("#speed table:not(.cards) td:not(.words)")
        assert set(numbers.evaluate_all(lines)) == {1}


def test_dark_is_dark_and_paper_is_light_and_shows_all(page):
    ground = "getComputedStyle(document.body).backgroundColor"
    with visit(page, scheme="dark") as seen:
        assert seen.page.evaluate(ground) == "rgb(20, 23, 27)"
        data = seen.page.locator("details table")
        assert not data.first.is_visible()
        seen.page.locator("summary").first.focus()
        assert seen.page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        seen.page.emulate_media(media="print")
        assert seen.page.evaluate(ground) == "rgb(255, 255, 255)"
        assert data.count() >= 8 and all(data.nth(number).is_visible() for number in range(data.count()))
        seen.page.set_viewport_size({"width": 688, "height": 900})  # of A4 between our margins
        over = "t => t.getBoundingClientRect().right - t.closest('figure').getBoundingClientRect().right"
        tables = seen.page.locator("figure table")
        assert all(tables.nth(number).evaluate(over) <= 0 for number in range(tables.count()))
        assert not seen.page.locator("nav").is_visible()
        assert seen.page.pdf(format="A4").startswith(b"%PDF")
        assert (seen.errors, seen.requests) == ([], [])
