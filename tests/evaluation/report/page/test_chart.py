"""Charts: every value at its place, ticks that can be read, runs that differ, and colours that can be told from the page."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pytest

from bico_ds.evaluation.report.page import chart as charts
from bico_ds.evaluation.report.page.chart import Chart, Curve, draw, log_ticks, ticks
from bico_ds.evaluation.report.page.curves import MOST_POINTS, thinned
from bico_ds.evaluation.report.page.numbers import compact, gigabytes, percent, seconds
from bico_ds.evaluation.report.page.settings import leaves
from bico_ds.evaluation.report.page.source import Series
from bico_ds.evaluation.report.page.style import COLOURS_OF_RUNS, DARK, LIGHT, style_sheet


def chart_of(curves: list[Curve], **options) -> Chart:
    return Chart(identifier="c", title="t", summary="s", x_name="step", curves=curves, **options)


def places(svg: str) -> list[list[tuple[float, float]]]:
    """The points of each line of the picture."""
    lines = re.findall(r'<polyline points="([^"]+)"', svg)
    return [[(float(x), float(y)) for x, y in (p.split(",") for p in line.split())] for line in lines]


def axis(svg: str, *, vertical: bool) -> tuple[list[float], list[float]]:
    """The values that the axis names, and the places of their lines."""
    pattern = (
        r'y1="([\d.]+)" y2="\1" class="grid"/><text x="[\d.]+" y="[\d.]+" text-anchor="end">([^<]+)<'
        if vertical
        else r'<line x1="([\d.]+)" x2="\1" [^>]+/><text x="[\d.]+" y="[\d.]+" text-anchor="middle">([^<]+)<'
    )
    found = re.findall(pattern, svg)
    return [float(name) for _, name in found], [float(place) for place, _ in found]


@pytest.mark.parametrize("is_log_x", [False, True])
def test_values_stand_where_the_ticks_of_the_axes_say(is_log_x):
    rng = np.random.default_rng()
    points = [
        (float(x), float(y))
        for x, y in zip(np.sort(rng.uniform(2, 90, 9)), rng.uniform(0.3, 7, 9), strict=True)
    ]
    svg = draw(chart_of([Curve(0, "a", points)], is_log_x=is_log_x))
    (line,) = places(svg)
    for number in (0, 1):
        values, ticks_at = axis(svg, vertical=bool(number))
        assert len(values) >= 3
        change = math.log if is_log_x and number == 0 else float
        slope, offset = np.polyfit([change(value) for value in values], ticks_at, 1)
        expected = [slope * change(point[number]) + offset for point in points]
        np.testing.assert_allclose([place[number] for place in line], expected, atol=0.2)


def test_ticks_are_few_and_round_over_any_width():
    rng = np.random.default_rng()
    for _ in range(300):
        low = rng.normal() * 10 ** rng.uniform(-6, 6)
        high = low + 10 ** rng.uniform(-3, 6) * max(abs(low), 1e-6)
        found = ticks(low, high)
        assert 2 <= len(found) <= 7
        assert low - 1e-6 * (high - low) <= found[0] and found[-1] <= high + 1e-6 * (high - low)
        step = found[1] - found[0]
        assert round(step / 10 ** math.floor(math.log10(step * 1.0001)), 3) in (1, 2, 5)
        least, most = sorted(10 ** rng.uniform(-1, 5, 2))
        assert 1 <= len(log_ticks(least, most * 1.3)) <= 12


def test_one_point_equal_values_and_none_beyond_the_axis_make_a_picture():
    for points in ([(0.0, 0.0)], [(5.0, 2.0)], [(1.0, -3.0), (2.0, -3.0)], [(1.0, 1e-9), (10.0, 1e29)]):
        svg = draw(chart_of([Curve(0, "a", points, interval=(points[0][1], points[-1][1]))]))
        assert "nan" not in svg and "inf" not in svg
    (line,) = places(draw(chart_of([Curve(0, "a", [(1, -0.5), (2, 1.5)])], y_range=(0.0, 1.0))))
    assert all(0 <= y <= charts._HEIGHT for _, y in line)


def test_intervals_of_any_number_of_runs_are_in_the_picture_and_apart():
    for count in (1, 2, 7, 40):
        curves = [Curve(n, f"r{n}", [(0.0, 0.2), (9.0, 0.5)], (0.1, 0.9)) for n in range(count)]
        found = re.findall(r'd="M([\d.]+) [^"]+" class="whisker"', draw(chart_of(curves, y_range=(0.0, 1.0))))
        assert len({float(x) for x in found}) == count
        assert max(float(x) for x in found) + 4 <= charts._WIDTH  # half of the bar at its end


def test_the_first_56_runs_differ_by_colour_or_marker():
    looks = {(charts.look(n), charts._marker(n, 0, 0)) for n in range(56)}
    assert len(looks) == 56


def contrast(one: str, other: str) -> float:
    """By WCAG 2.2."""

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_the_measure_of_contrast_is_that_of_the_guideline():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_texts_and_lines_can_be_told_from_the_page(colours):
    named = [name for name in colours if name not in ("page", "panel", "rule")]
    assert len(named) == 5 + COLOURS_OF_RUNS
    low = {
        (name, ground): contrast(colours[name], colours[ground])
        for name, ground in itertools.product(named, ("page", "panel"))
    }
    assert min(low.values()) >= 4.5, {pair: value for pair, value in low.items() if value < 4.5}


def test_the_sheet_takes_every_colour_from_the_variables():
    sheet = style_sheet()
    used = set(re.findall(r"var\(--([\w-]+)\)", sheet))
    assert used == set(LIGHT) == set(DARK)
    rules = re.sub(r":root\{[^}]*\}", "", sheet)
    assert re.findall(r"#[0-9a-f]{3,6}\b", rules) == ["#fff"]  # paper


def test_thinned_curves_keep_the_mean_and_take_a_step_that_came_twice_by_its_last_value():
    from array import array

    rng = np.random.default_rng()
    values = rng.normal(size=1000)
    steps = [*range(1, 1001), 500]
    points, merged = thinned(Series(array("q", steps), array("d", [*values, 70.0])))
    values[499] = 70.0
    assert merged == 5 and len(points) == MOST_POINTS
    np.testing.assert_allclose([y for _, y in points], values.reshape(-1, 5).mean(axis=1))
    assert [x for x, _ in points] == list(range(5, 1001, 5))


def test_settings_are_named_as_overrides_name_them():
    tree = {
        "a": {"b": 1, "c": None},
        "o": [{"kind": "ntp", "p": 0.5}, {"kind": "x"}, {"kind": "x"}],
        "l": [1, "y"],
        "e": {},
    }
    assert dict(leaves(tree)) == {
        "a.b": "1", "a.c": "null", "o.ntp.kind": "ntp", "o.ntp.p": "0.5", "o.1.kind": "x", "o.2.kind": "x",
        "l": "[1, y]", "e": "{}",
    }  # fmt: skip


def test_numbers_never_say_all_or_none_of_what_is_nearly_that():
    assert [percent(x) for x in (0, 0.004, 0.0004, 0.5, 0.997, 0.9999, 1)] == [
        "0 %", "0.4 %", "under 0.1 %", "50 %", "99.7 %", "over 99.9 %", "100 %"
    ]  # fmt: skip
    assert [compact(x) for x in (0, 0.012345, 1.5, 999.5, 8282, 12345, 3.2e6, 1.3e11)] == [
        "0", "0.0123", "1.5", "1,000", "8,282", "12.3 k", "3.2 M", "130 G"
    ]  # fmt: skip
    assert [seconds(x) for x in (0.0686, 1.24, 600, 9000)] == ["68.6 ms", "1.24 s", "10.0 min", "2.5 h"]
    assert [gigabytes(x) for x in (0, 88_760_320, 25.3e9)] == ["0 GB", "88.8 MB", "25.3 GB"]
