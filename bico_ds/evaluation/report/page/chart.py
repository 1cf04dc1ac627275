"""Line charts as SVG in the page's own colours: runs differ by colour, by marker, and beyond seven by dashes, too."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from bico_ds.evaluation.report.page.html import Html, element, joined, listed
from bico_ds.evaluation.report.page.numbers import tick
from bico_ds.evaluation.report.page.style import COLOURS_OF_RUNS

Point = tuple[float, float]

_WIDTH, _HEIGHT = 460.0, 280.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 62.0, 18.0, 14.0, 50.0
_TICKS = 5
_MOST_ASIDE = 12.0  # of an interval beside its point, which may be the last one before the edge
_MOST_MARKERS = 8  # of a line with many points
_DASHES = (None, "8 5", "2 5", "12 4 2 4")
# One more than colours: the first 56 runs differ by colour or marker.
_MARKERS = (
    "M{0} {1}m-{2} 0a{2} {2} 0 1 0 {3} 0a{2} {2} 0 1 0 -{3} 0z",  # a circle
    "M{0} {1}m-{2} -{2}h{3}v{3}h-{3}z",  # a square
    "M{0} {1}m0 -{2}l{2} {3}h-{3}z",  # a triangle
    "M{0} {1}m0 -{4}l{4} {4}l-{4} {4}l-{4} -{4}z",  # a diamond
    "M{0} {1}m0 {2}l{2} -{3}h-{3}z",  # a triangle on its tip
    "M{0} {1}m-{4} -1.7h{5}v-{5}h3.4v{5}h{5}v3.4h-{5}v{5}h-3.4v-{5}h-{5}z",  # a plus
    "M{0} {1}m0 -{4}l1.7 {5}l{5} 1.7l-{5} 1.7l-1.7 {5}l-1.7 -{5}l-{5} -1.7l{5} -1.7z",  # a star
    "M{0} {1}m-{4} -2.2h{6}v4.4h-{6}z",  # a bar
)


class Curve(NamedTuple):
    """The line of the run with this number, counted from 0. `interval`: of the value at its last point, or None.

    `names`: what stands beside each point; empty for nothing.
    """

    number: int
    label: str
    points: Sequence[Point]
    interval: tuple[float, float] | None = None
    names: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart.

    `identifier`: of its SVG, once in a page. `summary`: what it shows, for who cannot see it. `y_range`: the ends of the
    axis; None: those of the values, and zero where it is to be `from_zero`. `reference`: where dotted lines stand, on the x
    axis. `best`: points that a broad grey line joins.
    """

    identifier: str
    title: str
    summary: str
    x_name: str
    curves: Sequence[Curve]
    y_format: Callable[[float], str] = tick
    y_range: tuple[float, float] | None = None
    from_zero: bool = False
    is_log_x: bool = False
    reference: Sequence[float] = ()
    best: Sequence[Point] = field(default_factory=tuple)


def draw(chart: Chart) -> Html:
    """The SVG of a chart, with its title and summary as its text alternative."""
    scale = _Scale.of(chart)
    width = len(chart.curves)
    apart = min(3.0, 2 * _MOST_ASIDE / max(1, width - 1))
    parts = [
        element("title", chart.title, id=f"{chart.identifier}-title"),
        element("desc", chart.summary, id=f"{chart.identifier}-desc"),
        *_axes(chart, scale),
        *(_vertical(scale.x(x)) for x in chart.reference),
        _line(chart.best, scale, class_="best") if len(chart.best) > 1 else None,
        # The first runs show below the later ones: they are drawn wider.
        *(_curve(curve, scale, 2.2 + 2.2 * (width - 1 - i) / max(2, width - 1), apart * (i - (width - 1) / 2))
          for i, curve in enumerate(chart.curves)),
    ]  # fmt: skip
    return element(
        "svg",
        *parts,
        viewBox=f"0 0 {_WIDTH:g} {_HEIGHT:g}",
        role="img",
        aria_labelledby=f"{chart.identifier}-title {chart.identifier}-desc",
    )


def legend(labels: Sequence[str]) -> Html:
    """Which line is which run's; the labels in the order of the runs' numbers."""
    items = [
        joined((_swatch(number), element("span", label))) for number, label in enumerate(labels) if label
    ]
    return listed(items, class_="legend")


def look(number: int) -> str:
    """The class that gives the run with this number its colour."""
    return f"run-{number % COLOURS_OF_RUNS}"


class _Scale(NamedTuple):
    """From values to places in the picture."""

    left: float
    right: float
    bottom: float
    top: float
    is_log_x: bool

    @classmethod
    def of(cls, chart: Chart) -> _Scale:
        points = [point for curve in chart.curves for point in curve.points]
        xs = [x for x, _ in points] + list(chart.reference)
        low, high = chart.y_range or _wide([y for _, y in points] + [0.0] * chart.from_zero)
        if chart.is_log_x:
            return cls(min(xs) / 1.15, max(xs) * 1.15, low, high, True)
        return cls(0.0, max(xs) or 1.0, low, high, False)

    def x(self, value: float) -> float:
        left, right = self.left, self.right
        if self.is_log_x:
            left, right, value = math.log(left), math.log(right), math.log(value)
        return _LEFT + (value - left) / (right - left) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        inside = min(max(value, self.bottom), self.top)
        share = (inside - self.bottom) / (self.top - self.bottom)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)


def _wide(values: Sequence[float]) -> tuple[float, float]:
    """The ends of an axis with room for these values, at ticks."""
    low, high = min(values), max(values)
    if low > 0 and low < 0.6 * high:
        low = 0.0
    if low == high:
        low, high = (low - abs(low) / 2, high + abs(high) / 2) if low else (0.0, 1.0)
    for _ in range(3):  # a wider axis may have other ticks
        step = _step(high - low)
        low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    return low, high


def _step(width: float) -> float:
    """Between ticks: 1, 2 or 5 times a power of ten, so that about `_TICKS` of them fill the width."""
    rough = width / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    return next(times * power for times in (1, 2, 5, 10) if times * power >= rough * 0.999)


def ticks(low: float, high: float) -> list[float]:
    """The ticks of an axis from `low` to `high`, both finite, `high` the larger one."""
    step = _step(high - low)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Ticks of a logarithmic axis: of each power of ten 1, 2 and 5, or fewer where these are many.

    Where they are less than three, those of a linear axis.
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for times in ((1, 2, 5), (1, 3), (1,)):
        found = [t * 10.0**power for power in powers for t in times if low <= t * 10.0**power <= high]
        if len(found) <= _TICKS + 1:
            break
    return found[:: max(1, len(found) // _TICKS)] if len(found) > 2 else ticks(low, high)


def _axes(chart: Chart, scale: _Scale) -> Iterator[Html]:
    floor = _HEIGHT - _BOTTOM
    for value in ticks(scale.bottom, scale.top):
        y = f"{scale.y(value):.1f}"
        yield element("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y, class_="grid")
        yield element(
            "text", chart.y_format(value), x=_LEFT - 8, y=f"{float(y) + 4.5:.1f}", text_anchor="end"
        )
    yield element("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=floor, y2=floor, class_="axis")
    for value in (log_ticks if scale.is_log_x else ticks)(scale.left, scale.right):
        x = f"{scale.x(value):.1f}"
        yield element("line", x1=x, x2=x, y1=floor, y2=floor + 5, class_="axis")
        yield element("text", tick(value), x=x, y=floor + 21, text_anchor="middle")
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    yield element("text", chart.x_name, x=middle, y=_HEIGHT - 8, text_anchor="middle")


def _vertical(x: float) -> Html:
    return element("line", x1=f"{x:.1f}", x2=f"{x:.1f}", y1=_TOP, y2=_HEIGHT - _BOTTOM, class_="reference")


def _curve(curve: Curve, scale: _Scale, width: float, place: float) -> Html:
    """`place`: how far to the right its interval stands, which keeps those of the runs apart."""
    points = list(curve.points)
    dashes = _DASHES[curve.number // COLOURS_OF_RUNS % len(_DASHES)]
    parts: list[Html] = []
    if len(points) > 1:
        parts.append(
            _line(points, scale, class_="curve", stroke_width=f"{width:.1f}", stroke_dasharray=dashes)
        )
    if curve.interval is not None:
        x = scale.x(points[-1][0]) + (0.0 if scale.is_log_x else place)
        low, high = (f"{scale.y(end):.1f}" for end in curve.interval)
        parts.append(
            element(
                "path", d=f"M{x:.1f} {low}V{high}M{x - 4:.1f} {low}h8M{x - 4:.1f} {high}h8", class_="whisker"
            )
        )
    parts += [_marker(curve.number, scale.x(x), scale.y(y)) for x, y in _spread(points, curve.number)]
    for (x, y), name in zip(points, curve.names, strict=False):
        parts.append(element("text", name, x=f"{scale.x(x) + 8:.1f}", y=f"{scale.y(y) - 7:.1f}"))
    return element("g", *parts, class_=look(curve.number))


def _spread(points: Sequence[Point], number: int) -> Sequence[Point]:
    """The points that get a marker: all, or a few of many, at other places for other runs; the last one always."""
    if len(points) <= 2 * _MOST_MARKERS:
        return points
    every = len(points) // _MOST_MARKERS
    return [*points[(number * every // 3) % every : -every // 2 : every], points[-1]]


def _line(points: Sequence[Point], scale: _Scale, **attributes: str | None) -> Html:
    places = " ".join(f"{scale.x(x):.1f},{scale.y(y):.1f}" for x, y in points)
    return element("polyline", points=places, fill="none", **attributes)


def _marker(number: int, x: float, y: float) -> Html:
    radius = 4.4
    shape = _MARKERS[number % len(_MARKERS)]
    sizes = (radius, 2 * radius, 1.3 * radius, 1.3 * radius - 1.7, 2.6 * radius)
    return element(
        "path", d=shape.format(f"{x:.1f}", f"{y:.1f}", *(f"{size:.2f}" for size in sizes)), class_="dot"
    )


def _swatch(number: int) -> Html:
    dashes = _DASHES[number // COLOURS_OF_RUNS % len(_DASHES)]
    line = element("path", d="M2 9H44", class_="curve", stroke_width="2.4", stroke_dasharray=dashes)
    return element(
        "svg", line, _marker(number, 23, 9), viewBox="0 0 46 18", class_=look(number), aria_hidden="true"
    )
