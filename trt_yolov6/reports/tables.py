"""The rows of a report, the same for the page, Markdown and CSV."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trt_yolov6.common.statistics import Interval
from trt_yolov6.common.text import four_digits
from trt_yolov6.comparison.results import latency_of
from trt_yolov6.reports.material import Material

NOTHING = "\N{EN DASH}"
"""Placeholder for a missing value."""


PRECISIONS = ("fp32", "fp16", "int8", "fp8")
"""Precisions with a colour and a shape; anything else is drawn as `other`."""


@dataclass(frozen=True)
class Row:
    """One engine, with its latency at each batch size that it was measured at."""

    name: str
    """Unique in the report."""
    label: str
    """Name of the model."""
    weights: tuple[object, ...]
    """Equal for engines of one comparison with the same weights and size."""
    precision: str
    engine: Mapping[str, Any]
    timings: Mapping[int, Mapping[str, Any]]
    """Timings by batch size."""

    @property
    def base(self) -> str:
        """`fp32`, `fp16`, `int8` or `fp8`: what decides the colour."""
        return self.precision.split("+")[0].split(":")[0]

    @property
    def ap(self) -> float | None:
        """COCO AP in 0..1."""
        value = self.engine["AP"]
        return None if value is None else float(value)

    @property
    def ap_text(self) -> str:
        """AP in per cent, for people."""
        return NOTHING if self.ap is None else f"{100 * self.ap:.1f}"

    @property
    def is_simulated(self) -> bool:
        """True for 8-bit and half precision in ONNX Runtime on a CPU, which computes them in float.

        The accuracy is right, but the latency says nothing about a GPU.
        """
        on_cpu = self.engine["backend"] == "onnxruntime" and not str(
            self.engine["device"]
        ).startswith("GPU")
        return on_cpu and self.base in ("int8", "fp8", "fp16")

    def latency(self, batch: int) -> Interval | None:
        """Return the latency at a batch size in milliseconds; None where it was not measured."""
        timing = self.timings.get(batch)
        return None if timing is None else latency_of(timing)

    def throughput(self, batch: int) -> Interval | None:
        """Return images a second at a batch size."""
        latency = self.latency(batch)
        if latency is None:
            return None
        high = 1e3 * batch / latency.low if latency.low > 0 else float("inf")
        return Interval(1e3 * batch / latency.value, 1e3 * batch / latency.high, high)

    def disturbed(self, batch: int) -> bool:
        """Return whether other processes disturbed too many runs."""
        return bool(self.timings.get(batch, {}).get("disturbed"))


def rows_of(material: Material) -> list[Row]:
    """Return a row for each engine, in the files' order."""
    rows = []
    for comparison in material.comparisons:
        value = comparison.value
        for engine in value["engines"]:
            label = str(engine.get("label") or engine["model"])
            origin = engine.get("origin_sha256") or label
            own = {
                timing["batch"]: timing
                for timing in value["timings"]
                if timing["engine"] == engine["engine"]
            }
            rows.append(
                Row(
                    engine["engine"] + comparison.suffix,
                    label + comparison.suffix,
                    (origin, *engine["image_size"], comparison.name),
                    engine["precision"],
                    engine,
                    own,
                )
            )
    return rows


def batches_of(rows: Sequence[Row]) -> list[int]:
    """Return the batch sizes that anything was measured at, ascending."""
    return sorted({batch for row in rows for batch in row.timings})


def class_of(kind: str) -> str:
    """Return a precision's class in the style sheet; texts of files never become a class."""
    return kind if kind in PRECISIONS else "other"


@dataclass(frozen=True)
class Bar:
    """A horizontal bar."""

    share: float
    """Length of the bar, 0..1 of the room; more, or none at all, fills it."""
    precision: str = ""
    """Precision, for the colour."""
    marker: float | None = None
    """Position of a line on it, 0..1, such as the roofline."""

    @property
    def kind(self) -> str:
        """Class in the style sheet."""
        return class_of(self.precision)


@dataclass(frozen=True)
class Sorted:
    """A cell that its table can be sorted by; other cells come last."""

    text: str
    value: float | str

    def __str__(self) -> str:
        return self.text


Cell = str | Sorted | Bar
"""Content of one cell."""


def overview(rows: Sequence[Row]) -> tuple[list[str], list[list[str | Sorted]]]:
    """Return head and cells of a table like the paper's Table 1; (b32) is batch 32."""
    batches = batches_of(rows)
    head = ["Model", "Precision", "Size", "AP", "AP50"]
    for batch in batches:
        head += [f"ms (b{batch})", f"FPS (b{batch})"]
    head += ["Params, M", "FLOPs, G", "File, MiB", "Backend"]
    table: list[list[str | Sorted]] = []
    for row in rows:
        engine = row.engine
        height, width = engine["image_size"]
        size = f"{height}" if height == width else f"{height}x{width}"
        cells = [
            Sorted(row.label, row.label),
            Sorted(row.precision, row.precision),
            Sorted(size, height * width),
            ap_cell(engine["AP"]),
            ap_cell(engine["AP50"]),
        ]
        for batch in batches:
            cells += _speed_cells(row, batch)
        cells += [
            _scaled(engine.get("parameters"), 1e6, 2),
            _scaled(engine.get("flops"), 1e9, 1),
            _scaled(engine.get("bytes"), 2**20, 1),
            Sorted(engine["backend"], engine["backend"]),
        ]
        table.append(cells)
    return head, table


def _speed_cells(row: Row, batch: int) -> list[str | Sorted]:
    latency, rate = row.latency(batch), row.throughput(batch)
    if latency is None or rate is None:
        return [NOTHING, NOTHING]
    mark = " *" if row.disturbed(batch) else ""
    return [
        Sorted(with_error(latency) + mark, latency.value),
        Sorted(grouped(rate.value) + mark, rate.value),
    ]


def quantization(rows: Sequence[Row]) -> list[tuple[str, list[tuple[str, Row, float | None]]]]:
    """Return, by model, its engines with their difference to the float one in AP points.

    Engines of a model have the same weights, or its name, and are called by their precision, or
    by their names where those differ. The float one is the first of fp32 and fp16; a model without
    it, or with nothing quantized, is left out.
    """
    models: list[list[Row]] = []
    for row in rows:
        for own in models:
            if row.weights == own[0].weights or row.label == own[0].label:
                own.append(row)
                break
        else:
            models.append([row])
    found = []
    for own in models:
        floats = [row for base in ("fp32", "fp16") for row in own if row.base == base]
        if floats and len(floats) < len(own):
            alone = len({row.label for row in own}) == 1
            changes = [
                (row.precision if alone else row.name, row, _points(row.ap, floats[0].ap))
                for row in own
            ]
            found.append((own[0].label if alone else str(own[0].engine["model"]), changes))
    return found


def _points(ap: float | None, base: float | None) -> float | None:
    return None if ap is None or base is None else 100 * (ap - base)


def quantized_share(engine: Mapping[str, Any]) -> float | None:
    """Return the share of multiply-adds in 8 bits, 0..1; None where it is not known."""
    calibration = engine.get("calibration") or {}
    for name in ("int8", "fp8"):
        share = calibration.get(f"{name}_share_of_multiply_adds")
        if isinstance(share, (int, float)):
            return float(share)
    return None


def ap_cell(value: float | None) -> str | Sorted:
    """Return an AP in percent, as the paper prints it."""
    return NOTHING if value is None else Sorted(f"{100 * value:.1f}", value)


def with_error(interval: Interval) -> str:
    """Return a value and its interval's larger half, such as `53.7 ± 0.4`, or its upper end."""
    if interval.low <= 0:
        return f"{four_digits(interval.value)} (below {four_digits(interval.high)})"
    error = max(interval.high - interval.value, interval.value - interval.low)
    if error <= 0:
        return four_digits(interval.value)
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{interval.value:.{digits}f} ± {error:.{digits}f}"


def grouped(value: float) -> str:
    """Return a positive number with three digits at least, thousands apart."""
    if value >= 100:
        return f"{value:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")
    return f"{value:.3g}"


def _scaled(value: Any, unit: float, digits: int) -> str | Sorted:
    if not isinstance(value, (int, float)):
        return NOTHING
    return Sorted(f"{value / unit:.{digits}f}", value)


CSV_HEAD = (
    *("engine", "model", "precision", "backend", "backend_version", "device", "image_height"),
    *("image_width", "batch", "AP", "AP50", "AP75", "APs", "APm", "APl", "images"),
    *("latency_ms", "latency_low_ms", "latency_high_ms", "p90_ms", "p99_ms", "throughput_fps"),
    *("disturbed", "runs", "quiet_runs", "parameters", "flops", "bytes", "engine_sha256"),
)


def csv_rows(rows: Sequence[Row]) -> Iterator[list[Any]]:
    """Yield a row an engine and batch size, under `CSV_HEAD`; numbers as they were measured."""
    for row in rows:
        height, width = row.engine["image_size"]
        for _, timing in sorted(row.timings.items()):
            latency, interval = timing["latency_ms"], latency_of(timing)
            values = {
                **row.engine,
                **timing,
                "engine": row.name,
                "model": row.label,
                "precision": row.precision,
                "image_height": height,
                "image_width": width,
                "latency_ms": interval.value,
                "latency_low_ms": interval.low,
                "latency_high_ms": interval.high,
                "p90_ms": latency.get("p90"),
                "p99_ms": latency.get("p99"),
            }
            yield [values.get(name) for name in CSV_HEAD]
