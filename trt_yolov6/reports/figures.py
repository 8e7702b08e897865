"""The report's charts as SVG and bars: colours by class, so that one drawing serves both themes.

A precision has a colour and a shape of its own; the colours are those of Okabe and Ito, which
people with any kind of colour vision can distinguish.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from markupsafe import Markup

from trt_yolov6.common.statistics import Interval
from trt_yolov6.reports.tables import Row

PRECISIONS = ("fp32", "fp16", "int8", "fp8")
"""Precisions with a colour and a shape; anything else is drawn as `other`."""

_WIDTH, _HEIGHT = 380.0, 290.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 42.0, 14.0, 14.0, 40.0


@dataclass(frozen=True)
class Point:
    """A mark of a chart."""

    label: str
    kind: str
    """A precision, see `PRECISIONS`."""
    series: str
    """Points of one series are joined."""
    x: Interval
    y: float
    tip: str
    """Text shown on hovering, touching or focusing it."""


def trade_off(
    points: Sequence[Point],
    x_label: str,
    title: str,
    *,
    better: str = "left",
    y_label: str = "AP, %",
) -> Markup:
    """Draw accuracy over speed, as the paper's Figure 1.

    Points of one series are joined by a line, in the order of their speed. A bar across a point is
    its interval.

    Args:
        points: one at least.
        x_label: what the horizontal axis shows, with its unit.
        title: says what the chart is, for those who cannot see it.
        better: `left` or `right`: where the faster ones are.
        y_label: what the vertical axis shows.
    """
    lows = [max(point.x.low, point.x.value / 1.6) for point in points]
    highs = [min(point.x.high, point.x.value * 1.6) for point in points]
    x_axis = _Axis.around(min(lows), max(highs), _LEFT, _WIDTH - _RIGHT)
    values = [point.y for point in points]
    y_axis = _Axis.around(min(values), max(values), _HEIGHT - _BOTTOM, _TOP, least=1.0)
    parts = [
        f'<svg class="chart" viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="group" '
        f'aria-label="{escape(title)}">',
        *_grid(x_axis, y_axis),
        f'<text class="axis" x="{(_LEFT + _WIDTH - _RIGHT) / 2:g}" y="{_HEIGHT - 6:g}" '
        f'text-anchor="middle">{escape(x_label)}</text>',
        f'<text class="axis" x="{_LEFT - 34:g}" y="{_TOP - 3:g}">{escape(y_label)}</text>',
        _hint(better),
    ]
    lines = []
    for series in dict.fromkeys(point.series for point in points):
        own = sorted((p for p in points if p.series == series), key=lambda point: point.x.value)
        line = [(x_axis(p.x.value), y_axis(p.y)) for p in own]
        lines += list(itertools.pairwise(line))
        if len(line) > 1:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in line)
            parts.append(f'<polyline class="line {_class(own[0].kind)}" points="{path}"/>')
    places = _label_places(
        [(x_axis(p.x.value), y_axis(p.y), p.label) for p in points],
        [(x_axis(low), x_axis(high)) for low, high in zip(lows, highs, strict=True)],
        lines,
    )
    for point, place, low, high in zip(points, places, lows, highs, strict=True):
        x, y = x_axis(point.x.value), y_axis(point.y)
        kind = _class(point.kind)
        if high > low:
            parts.append(
                f'<path class="error {kind}" d="M{x_axis(low):.1f} {y:.1f}H{x_axis(high):.1f}"/>'
            )
        parts.append(
            f'<g class="point {kind}" tabindex="0" role="img" '
            f'aria-label="{escape(point.tip)}" data-tip="{escape(point.tip)}">'
            f'<circle class="touch" cx="{x:.1f}" cy="{y:.1f}" r="14"/>{shape(point.kind, x, y)}</g>'
        )
        if place is not None and point.label:
            anchor, label_x, label_y = place
            parts.append(
                f'<text class="label" x="{label_x:.1f}" y="{label_y:.1f}" '
                f'text-anchor="{anchor}">{escape(_short(point.label))}</text>'
            )
    parts.append("</svg>")
    return Markup("".join(parts))  # every text in it is escaped


def legend(kinds: Sequence[str]) -> Markup:
    """Return the legend of colours and shapes."""
    items = "".join(
        f'<span class="key"><svg viewBox="0 0 14 14" class="mark {_class(kind)}" '
        f'aria-hidden="true">{shape(kind, 7, 7)}</svg>{escape(kind)}</span>'
        for kind in kinds
    )
    return Markup(f'<p class="legend">{items}</p>')


def bar(share: float, kind: str = "", marker: float | None = None) -> Markup:
    """Return a horizontal bar.

    Args:
        share: its length, 0..1 of the room there is.
        kind: a precision, for the colour.
        marker: where a line stands on it, 0..1, such as the roofline.
    """
    share = min(1.0, max(0.0, share)) if math.isfinite(share) else 1.0
    line = ""
    if marker is not None:
        line = f'<i class="roof" style="left:{100 * min(1.0, max(0.0, marker)):.2f}%"></i>'
    return Markup(
        f'<span class="bar" aria-hidden="true"><i class="fill {_class(kind)}" '
        f'style="width:{100 * share:.2f}%"></i>{line}</span>'
    )


def point_of(row: Row, x: Interval, batch: int, *, alone: bool = False) -> Point | None:
    """Return the mark of an engine; None where its AP is not defined.

    Args:
        row: the engine.
        x: its place on the horizontal axis.
        batch: the batch size that is shown.
        alone: its model is the only one, so that the precision distinguishes the marks.
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


def shape(kind: str, x: float, y: float) -> str:
    """Return the mark of a precision around a place."""
    if kind == "fp16":
        return f'<rect class="dot" x="{x - 4.6:.1f}" y="{y - 4.6:.1f}" width="9.2" height="9.2"/>'
    if kind == "int8":
        return f'<path class="dot" d="M{x:.1f} {y - 6:.1f}l5.8 10.4h-11.6z"/>'  # a triangle
    if kind == "fp8":
        return f'<path class="dot" d="M{x:.1f} {y - 6.4:.1f}l6.4 6.4-6.4 6.4-6.4-6.4z"/>'
    return f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="5.2"/>'


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

    def ticks(self, wanted: int = 5) -> list[float]:
        raw = (self.high - self.low) / wanted
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= 0.8 * raw)
        first = math.ceil(self.low / step)
        return [index * step for index in range(first, math.floor(self.high / step) + 1)]


def _grid(x_axis: _Axis, y_axis: _Axis) -> list[str]:
    bottom = _HEIGHT - _BOTTOM
    parts = []
    for value in y_axis.ticks():
        y = y_axis(value)
        parts.append(f'<path class="grid" d="M{_LEFT:g} {y:.1f}H{_WIDTH - _RIGHT:g}"/>')
        parts.append(
            f'<text class="tick" x="{_LEFT - 6:g}" y="{y + 3.6:.1f}" text-anchor="end">'
            f"{_tick(value)}</text>"
        )
    for value in x_axis.ticks():
        x = x_axis(value)
        parts.append(f'<path class="grid" d="M{x:.1f} {_TOP:g}V{bottom:g}"/>')
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{bottom + 14:g}" text-anchor="middle">'
            f"{_tick(value)}</text>"
        )
    return parts


def _hint(better: str) -> str:
    """Say which corner is the good one."""
    if better == "left":
        return f'<text class="hint" x="{_LEFT + 6:g}" y="{_TOP + 11:g}">↖ better</text>'
    place = f'x="{_WIDTH - _RIGHT - 6:g}" y="{_TOP + 11:g}" text-anchor="end"'
    return f'<text class="hint" {place}>better ↗</text>'


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
                    and box[3] <= _HEIGHT - _BOTTOM
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


def _class(kind: str) -> str:
    """Return a precision's class in the style sheet; texts of files never become a class."""
    return kind if kind in PRECISIONS else "other"
