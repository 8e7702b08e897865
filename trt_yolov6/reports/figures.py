"""The report's charts: where their marks, labels and ticks go; `figures.svg.jinja` draws them.

A precision has a colour and a shape of its own; the colours are those of Okabe and Ito, which
people with any kind of colour vision can distinguish. They are the style sheet's, by class, so that
one drawing serves both themes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from trt_yolov6.common.statistics import Interval
from trt_yolov6.reports.tables import Row, class_of

_WIDTH, _HEIGHT = 380, 290
_LEFT, _RIGHT, _TOP, _BOTTOM = 42, _WIDTH - 14, 14, _HEIGHT - 40
"""Edges of the plot; all places are in pixels from the top left corner."""


@dataclass(frozen=True)
class Point:
    """A mark of a chart."""

    label: str
    kind: str
    """A precision, see `tables.PRECISIONS`."""
    series: str
    """Points of one series are joined."""
    x: Interval
    y: float
    tip: str
    """Text shown on hovering, touching or focusing it."""


@dataclass(frozen=True)
class Mark:
    """A drawn point."""

    kind: str
    """Class in the style sheet, see `class_of`."""
    x: float
    y: float
    bar: tuple[float, float] | None
    """Ends of its interval; None where it has no width."""
    tip: str
    label: tuple[str, str, float, float] | None
    """Text, `text-anchor`, x and y; None where there is no room."""


@dataclass(frozen=True)
class Chart:
    """Everything that is drawn of a chart."""

    title: str
    x_label: str
    y_label: str
    better: str
    """`left` or `right`: where the faster ones are."""
    x_ticks: tuple[tuple[float, str], ...]
    """Place and text of each."""
    y_ticks: tuple[tuple[float, str], ...]
    lines: tuple[tuple[str, str], ...]
    """Class and `points` of each."""
    marks: tuple[Mark, ...]
    keys: tuple[tuple[str, str], ...] = ()
    """Class of a mark and what it stands for, where the page's legend does not say it."""

    width, height = _WIDTH, _HEIGHT
    left, right, top, bottom = _LEFT, _RIGHT, _TOP, _BOTTOM


def trade_off(
    points: Sequence[Point],
    x_label: str,
    title: str,
    *,
    better: str = "left",
    y_label: str = "AP, %",
    keys: Sequence[tuple[str, str]] = (),
) -> Chart:
    """Chart accuracy over speed, as the paper's Figure 1.

    Points of one series are joined by a line, in the order of their speed. A bar across a point is
    its interval.

    Args:
        points: one at least.
        x_label: what the horizontal axis shows, with its unit.
        title: says what the chart is, for those who cannot see it.
        better: `left` or `right`: where the faster ones are.
        y_label: what the vertical axis shows.
        keys: kinds of points and what they stand for, where those are not precisions.
    """
    lows = [max(point.x.low, point.x.value / 1.6) for point in points]
    highs = [min(point.x.high, point.x.value * 1.6) for point in points]
    x_axis = _Axis.around(min(lows), max(highs), _LEFT, _RIGHT)
    values = [point.y for point in points]
    y_axis = _Axis.around(min(values), max(values), _BOTTOM, _TOP, least=1.0)
    lines, segments = [], []
    for series in dict.fromkeys(point.series for point in points):
        own = sorted((p for p in points if p.series == series), key=lambda point: point.x.value)
        line = [(x_axis(p.x.value), y_axis(p.y)) for p in own]
        segments += list(itertools.pairwise(line))
        if len(line) > 1:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in line)
            lines.append((class_of(own[0].kind), path))
    bars = [(x_axis(low), x_axis(high)) for low, high in zip(lows, highs, strict=True)]
    places = _label_places(
        [(x_axis(p.x.value), y_axis(p.y), p.label) for p in points], bars, segments
    )
    marks = [
        Mark(
            class_of(point.kind),
            x_axis(point.x.value),
            y_axis(point.y),
            ends if ends[1] > ends[0] else None,
            point.tip,
            (_short(point.label), *place) if place is not None and point.label else None,
        )
        for point, place, ends in zip(points, places, bars, strict=True)
    ]
    return Chart(
        title,
        x_label,
        y_label,
        better,
        tuple((x_axis(value), _tick(value)) for value in x_axis.ticks()),
        tuple((y_axis(value), _tick(value)) for value in y_axis.ticks()),
        tuple(lines),
        tuple(marks),
        tuple((class_of(kind), text) for kind, text in keys),
    )


def point_of(row: Row, x: Interval, batch: int, *, alone: bool) -> Point | None:
    """Return the mark of an engine at a place on the horizontal axis; None without an AP.

    Its label is the precision if its model is `alone`.
    """
    if row.ap is None:
        return None
    latency, rate = row.latency(batch), row.throughput(batch)
    assert latency is not None
    assert rate is not None
    tip = (
        f"{row.name}: AP {100 * row.ap:.1f} %, {latency.value:.4g} ms "
        f"({latency.low:.4g} to {latency.high:.4g}) and {rate.value:.4g} FPS at batch {batch}"
    )
    if row.disturbed(batch):
        tip += ", disturbed by other processes"
    label = row.precision if alone else f"{row.label} {row.precision.removeprefix(row.base)}"
    return Point(label.rstrip(), row.base, row.precision, x, 100 * row.ap, tip)


@dataclass(frozen=True)
class _Axis:
    """A linear axis: values to places, and round values for its ticks."""

    low: float
    high: float
    start: float
    end: float

    @staticmethod
    def around(low: float, high: float, start: float, end: float, least: float = 0.0) -> _Axis:
        """Return an axis that leaves some room around the values."""
        span = max(high - low, least, abs(high) * 0.04, 1e-9)
        middle = (low + high) / 2
        begin = middle - 0.66 * span
        if low >= 0 and begin < 0:
            begin = 0.0
        return _Axis(begin, middle + 0.66 * span, start, end)

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        raw = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= 0.8 * raw)
        first = math.ceil(self.low / step)
        return [index * step for index in range(first, math.floor(self.high / step) + 1)]


def _label_places(
    marks: Sequence[tuple[float, float, str]],
    bars: Sequence[tuple[float, float]],
    lines: Sequence[tuple[tuple[float, float], tuple[float, float]]],
) -> list[tuple[str, float, float] | None]:
    """Return where each label goes without hiding another or a mark; None where there is no room.

    Lines are crossed only where there is no other way.
    """
    taken = [(x - 7, y - 7, x + 7, y + 7) for x, y, _ in marks]
    taken += [
        (left, y - 1, right, y + 1)
        for (left, right), (_, y, _) in zip(bars, marks, strict=True)
        if right - left > 18
    ]
    crossed = [
        (x - 2, y - 2, x + 2, y + 2)
        for (x1, y1), (x2, y2) in lines
        for step in range(41)
        for x, y in [(x1 + (x2 - x1) * step / 40, y1 + (y2 - y1) * step / 40)]
    ]
    places: list[tuple[str, float, float] | None] = []
    for x, y, text in marks:
        width = 6.1 * len(_short(text))
        candidates: list[tuple[str, float, float]] = [
            ("start", x + 10, y + 4),
            ("end", x - 10, y + 4),
            ("middle", x, y - 11),
            ("middle", x, y + 19),
            ("start", x + 7, y + 16),
            ("end", x - 7, y - 9),
            ("start", x + 7, y - 9),
            ("end", x - 7, y + 16),
        ]
        chosen = None
        for obstacles in ([*taken, *crossed], taken):
            for anchor, label_x, label_y in candidates:
                left = label_x - {"start": 0.0, "end": width, "middle": width / 2}[anchor]
                box = left, label_y - 9, left + width, label_y + 3
                inside = (
                    box[0] >= _LEFT + 2
                    and box[2] <= _WIDTH
                    and box[1] >= _TOP + 14
                    and box[3] <= _BOTTOM
                )
                if chosen is None and inside and not _hits(box, obstacles):
                    chosen = anchor, label_x, label_y
                    taken.append(box)
        places.append(chosen)
    return places


def _hits(box: tuple[float, ...], others: Sequence[tuple[float, ...]]) -> bool:
    return any(
        box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]
        for other in others
    )


def _short(text: str) -> str:
    return text if len(text) <= 22 else text[:21] + "…"


def _tick(value: float) -> str:
    if abs(value) >= 10000:
        return f"{value / 1000:g}k"
    return f"{round(value, 6):g}"
