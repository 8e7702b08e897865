"""The values of the page's sections, in the order in which its template shows them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from trt_yolov6.common.statistics import Interval
from trt_yolov6.common.text import four_digits, joined, of_highest
from trt_yolov6.comparison.results import latency_of
from trt_yolov6.quantization.metrics import MEANING, direction
from trt_yolov6.reports import tables
from trt_yolov6.reports.figures import Chart, Point, point_of, trade_off
from trt_yolov6.reports.material import Comparison, Material, Ranking
from trt_yolov6.runtime.draw import class_colour

SHOWN_LAYERS = 12
"""Layers a table has before the rest folds away."""

SECTIONS = (
    ("trade-off", "Accuracy and speed"),
    ("table", "All engines"),
    ("quantization", "Cost of quantization"),
    ("sensitivity", "Sensitivity of layers"),
    ("layers", "Time of layers"),
    ("examples", "Examples"),
    ("method", "Environment and method"),
)
"""Name and title of each section."""


class Table(NamedTuple):
    """A table whose first column names the rows."""

    head: Sequence[str]
    rows: Sequence[Sequence[tables.Cell]]


def page_values(material: Material) -> dict[str, Any]:
    """Return the values of the page's template, by name."""
    rows = tables.rows_of(material)
    return {
        "sections": SECTIONS,
        "shown_layers": SHOWN_LAYERS,
        "headline": _headline(rows),
        "trade_offs": _trade_offs(rows),
        "overview": Table(*tables.overview(rows)),
        "largest_batch": max(tables.batches_of(rows), default=1),
        "disturbed": any(row.disturbed(batch) for row in rows for batch in row.timings),
        "quantization": _quantization_cost(rows),
        "rankings": [_ranking(one) for one in material.rankings],
        "layers": _layers(material),
        "examples": _examples(material),
        "method": [_method(one) for one in material.comparisons],
    }


def _headline(rows: Sequence[tables.Row]) -> dict[str, Any] | None:
    """Return the answer: what is most accurate, what is fastest, and what lies between."""
    batches = tables.batches_of(rows)
    timed = [row for row in rows if row.ap is not None and batches and row.latency(batches[0])]
    if not timed:
        return None
    batch = batches[0]
    best = max(timed, key=lambda row: row.ap or 0)
    fastest = min(timed, key=lambda row: _ms(row, batch))
    front = pareto(timed, batch)
    return {
        "batch": batch,
        "best": best,
        "best_ms": _ms_text(best, batch),
        "fastest": None if fastest is best else fastest,
        "fastest_ms": _ms_text(fastest, batch),
        "front": [row.name for row in front] if len(timed) > 2 and len(front) < len(timed) else (),
    }


def pareto(rows: Sequence[tables.Row], batch: int) -> list[tables.Row]:
    """Return the engines that no other beats in both AP and latency, the fastest first."""
    front: list[tables.Row] = []
    for row in sorted(rows, key=lambda row: (_ms(row, batch), -(row.ap or 0))):
        if not front or (row.ap or 0) > (front[-1].ap or 0):
            front.append(row)
    return front


def _trade_offs(rows: Sequence[tables.Row]) -> dict[str, Any]:
    """Return the paper's Figure 1: AP over latency, and AP over throughput."""
    alone = len({row.label for row in rows}) == 1
    batches = tables.batches_of(rows)
    axes = (
        (batches[:1], tables.Row.latency, "latency, ms", "AP over latency", "left"),
        (batches[-1:], tables.Row.throughput, "images a second", "AP over throughput", "right"),
    )
    charts = []
    for some, value_of, label, title, better in axes:
        for batch in some:
            points = [
                point
                for row in rows
                if (value := value_of(row, batch)) is not None
                and (point := point_of(row, value, batch, alone=alone)) is not None
            ]
            if points:
                charts.append(trade_off(points, label, f"{title}, batch {batch}", better=better))
    kinds = [kind for kind in tables.PRECISIONS if any(row.base == kind for row in rows)]
    others = sorted({row.base for row in rows} - set(tables.PRECISIONS))
    simulated = [kind for kind in kinds if any(r.is_simulated and r.base == kind for r in rows)]
    return {
        "charts": charts,
        "kinds": [(tables.class_of(kind), kind) for kind in (*kinds, *others)],
        "simulated": " and ".join(kind.upper() for kind in simulated),
    }


def _quantization_cost(rows: Sequence[tables.Row]) -> dict[str, Any]:
    """Return the AP that each precision costs, and its share of the work."""
    head = [
        *("Precision", "AP, %", "", "to float", "agreement, %"),
        *("APs", "APm", "APl", "in 8 bits", "in float"),
    ]
    models = []
    for label, own in tables.quantization(rows):
        top = max((row.ap for _, row, _ in own if row.ap is not None), default=0.0) or 1.0
        body: list[list[tables.Cell]] = []
        for name, row, change in own:
            share = tables.quantized_share(row.engine)
            kept = str(len(row.engine.get("float_layers") or ()))
            body.append(
                [
                    *(name, row.ap_text, tables.Bar((row.ap or 0) / top, row.base)),
                    *(_change(row, change), _agreement(row.engine.get("agreement"))),
                    *(_percent(row.engine.get(key)) for key in ("APs", "APm", "APl")),
                    *((tables.NOTHING,) * 2 if share is None else (f"{100 * share:.0f} %", kept)),
                ]
            )
        charts = [chart for _, row, _ in own for chart in _float_layers_tried(row)]
        models.append({"label": label, "table": Table(head, body), "charts": charts})
    agreed = [row.engine["agreement"] for row in rows if row.engine.get("agreement")]
    return {
        "models": models,
        "images": max((row.engine["images"] for row in rows), default=0),
        "agreed": bool(agreed),
        "shared": max((one["calibrated_on"] for one in agreed), default=0),
    }


def _change(row: tables.Row, change: float | None) -> str:
    """Return a change of AP in points, with its interval where that is known."""
    if change is None:
        return tables.NOTHING
    found = row.engine.get("agreement")
    if not found:
        return f"{change:+.2f}"
    low, high = (100 * end for end in found["ap_change"]["interval"])
    return f"{change:+.2f} [{low:+.2f}, {high:+.2f}]"


def _agreement(found: Mapping[str, Any] | None) -> str:
    if not found:
        return tables.NOTHING
    low, high = (100 * end for end in found["interval"])
    return f"{100 * found['value']:.1f} [{low:.1f}, {high:.1f}]"


def _float_layers_tried(row: tables.Row) -> list[Chart]:
    """Return a chart of the float layers that were tried: agreement over added time."""
    calibration = row.engine.get("calibration") or {}
    tried = [one for one in calibration.get("tried") or () if one["decides"] == "float layers"]
    if not tried:
        return []
    chosen = sorted(row.engine.get("float_layers") or ())
    ordered = sorted(tried, key=lambda one: (one["slowdown"], -one["agreement"]))
    best = -math.inf
    points = []
    for number, one in enumerate(ordered):
        on_front = one["agreement"] > best
        best = max(best, one["agreement"])
        count = len(one["float_layers"])
        is_built = sorted(one["float_layers"]) == chosen
        x = 100 * one["slowdown"]
        label = f"{count} in float" + (", built" if is_built else "")
        points.append(
            Point(
                label if on_front or is_built else "",
                "fp16" if is_built else "int8" if on_front else "other",
                "front" if on_front else f"set {number}",
                Interval(x, x, x),
                100 * one["agreement"],
                f"{label}: agreement {100 * one['agreement']:.1f} %, {x:.1f} % slower",
            )
        )
    title = f"{row.name}: agreement over added run time, {len(tried)} sets of float layers"
    x_label, y_label = "added run time by layer times, %", "agreement with float, %"
    keys = [("fp16", "built"), ("int8", "best within its time"), ("other", "another set")]
    drawn = {point.kind for point in points}
    # The built one is drawn last, over any other that it meets.
    points.sort(key=lambda point: [kind for kind, _ in keys[::-1]].index(point.kind))
    return [
        trade_off(
            points, x_label, title, y_label=y_label, keys=[one for one in keys if one[0] in drawn]
        )
    ]


def _ranking(ranking: Ranking) -> dict[str, Any]:
    """Return a bar for each layer of a ranking, the most sensitive first."""
    body: list[list[tables.Cell]] = [
        [name, tables.NOTHING if value is None else f"{value:.4g}", tables.Bar(length, "int8")]
        for (name, value), length in zip(ranking.layers, _lengths(ranking), strict=True)
    ]
    return {
        "file": ranking.file,
        "meaning": MEANING[ranking.metric],
        "direction": direction(ranking.metric),
        "logarithmic": ranking.metric == "mse",
        "table": Table(["Layer", ranking.metric.upper(), ""], body),
    }


def _layers(material: Material) -> dict[str, Any]:
    """Return the times of each engine's layers, their precision and their roofline."""
    ceilings = [
        f"{one['device']}: {one['bytes_per_second'] / 1e9:.3g} GB/s, "
        + ", ".join(f"{_rate(rate)} in {name}" for name, rate in one["flops"].items())
        + f" ({one['how']})."
        for comparison in material.comparisons
        for one in comparison.value["ceilings"]
    ]
    return {
        "engines": [
            _layers_of(one, comparison)
            for comparison in material.comparisons
            for one in comparison.value["layers"]
        ],
        "ceilings": list(dict.fromkeys(ceilings)),
    }


def _layers_of(one: Mapping[str, Any], comparison: Comparison) -> dict[str, Any]:
    found = sorted(one["layers"], key=lambda layer: layer["ms"], reverse=True)
    longest = max((layer["ms"] for layer in found), default=0.0) or 1.0
    whole = sum(layer["ms"] for layer in found)
    percent = 100 / (whole or 1.0)
    named = [layer for layer in found if layer["operator"]]
    rest = [layer for layer in found if not layer["operator"]]
    floor = [layer["roofline_ms"] for layer in named if layer["roofline_ms"] is not None]
    if rest:
        other = {"name": f"{len(rest)} other kernels", "ms": sum(layer["ms"] for layer in rest)}
        named.append({**rest[0], **other, "precision": "", "roofline_ms": None, "bound": ""})
    body: list[list[tables.Cell]] = []
    for layer in named:
        ms, precision, roof = layer["ms"], layer["precision"], layer["roofline_ms"]
        bar = tables.Bar(ms / longest, precision, None if roof is None else roof / longest)
        # A profile in whole microseconds may say 0.
        share = f"{100 * roof / ms:.0f} %" if roof is not None and ms else tables.NOTHING
        times = f"{ms:.3g}", f"{percent * ms:.1f} %", bar, share
        body.append(
            [layer["name"], precision or tables.NOTHING, *times, layer["bound"] or tables.NOTHING]
        )
    title = one["engine"] + comparison.suffix
    text = f"{len(found)} kernels, {whole:.3g} ms one by one at batch {one['batch']}"
    if floor:
        text += f"; the rooflines of {len(floor)} layers come to {sum(floor):.3g} ms"
    if one.get("computed_in"):
        text += f"; all of it is computed in {one['computed_in']} here"
    head = ["Layer", "Precision", "ms", "share", "", "of roofline", "bound by"]
    return {"title": title, "text": text, "table": Table(head, body)}


def _examples(material: Material) -> dict[str, Any]:
    """Return the same images with what each engine finds in them, side by side."""
    found, missing = [], 0
    classes: set[tuple[int, str]] = set()
    for number, comparison in enumerate(material.comparisons):
        names = comparison.value["data"].get("class_names", [])
        for index, example in enumerate(comparison.value["examples"]):
            panels = [
                (title, [_box(box, names) for box in boxes])
                for title, boxes in (
                    ("annotated", example["annotated"]),
                    *example["detections"].items(),
                )
            ]
            classes |= {(box["label"], box["name"]) for _, boxes in panels for box in boxes}
            picture = comparison.picture(example)
            if picture is None:
                missing += 1
                continue
            size = {"width": int(example["width"]), "height": int(example["height"])}
            name = f"picture-{number}-{index}"
            one = {"file": example["file"], "name": name, "jpeg": picture, "panels": panels}
            found.append({**one, **size})
    shown = [(_colour(label), name) for label, name in sorted(classes)[:20]]
    return {"pictures": found, "missing": missing, "classes": shown}


def _box(box: Sequence[float], class_names: Sequence[str]) -> dict[str, Any]:
    x1, y1, x2, y2, score, index = (float(value) for value in box)
    label = int(index)
    name = str(class_names[label]) if label < len(class_names) else str(label)
    return {
        "label": label,
        "name": name,
        "text": f"{name} {score:.2f}",
        "colour": _colour(label),
        "x": f"{x1:.1f}",
        "y": f"{y1:.1f}",
        "width": f"{x2 - x1:.1f}",
        "height": f"{y2 - y1:.1f}",
    }


def _method(comparison: Comparison) -> dict[str, Any]:
    """Return the section on environment and method."""
    value = comparison.value
    settings, data, machine = value["settings"], value["data"], value["environment"]
    timings = value["timings"]
    runs = sum(timing["runs"] for timing in timings)
    quiet = sum(timing["quiet_runs"] for timing in timings)
    devices = sorted(
        {
            f"{one['device']}, {one['backend']} {one['backend_version']}"
            + (f", {one['threads']} threads" if one["threads"] else "")
            for one in value["engines"]
        }
    )
    cpu = machine.get("cpu") or {}
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    terms = [
        ("Data", f"{data['images']} images, {data['root']}, {data['split']}"),
        ("Device", "; ".join(devices)),
        ("Processor", f"{cpu.get('model')}, {cpu.get('threads')} threads"),
        *(("GPU", _gpu_text(gpu)) for gpu in machine.get("gpus") or []),
        ("CPU clock", _clock_text(machine.get("cpu_clock") or {})),
        ("System", str(machine.get("system"))),
        ("Packages", packages),
        (
            "Thresholds",
            f"confidence {settings['confidence']}, IoU {settings['iou']}, at most "
            f"{settings['max_detections']} boxes, border {settings['border']}",
        ),
        (
            "Timing",
            f"{settings['rounds']} rounds of "
            f"{settings['duration'] / settings['rounds']:.3g} s, {runs} runs, {quiet} of them "
            "undisturbed",
        ),
        ("Measured", str(value["date"])),
        ("Data SHA-256", f"{data['annotations_sha256'][:16]}, {data['images_sha256'][:16]}"),
    ]
    body = [
        [
            *(
                f"{timing['engine']}, batch {timing['batch']}",
                tables.with_error(latency_of(timing)),
            ),
            *(str(timing["runs"]), str(timing["quiet_runs"])),
            tables.NOTHING if timing["waited"] is None else f"{100 * timing['waited']:.1f} %",
            str(timing["engine_sha256"])[:16],
        ]
        for timing in timings
    ]
    notes = sorted({f"{one['note']}." for one in value["engines"] if one["note"]})
    return {
        "title": comparison.name,
        "notes": [*notes, *value["left_out"]],
        "terms": terms,
        "runs": Table(["Engine", "ms", "runs", "undisturbed", "waited", "SHA-256"], body),
    }


def _colour(label: int) -> str:
    return "#{:02x}{:02x}{:02x}".format(*class_colour(label))


def _lengths(ranking: Ranking) -> list[float]:
    """Return how long each layer's bar is, 0..1: the larger its value, the longer."""
    values = [value for _, value in ranking.layers]
    if ranking.metric == "mse":
        values = [None if value is None else math.log10(max(value, 1e-300)) for value in values]
    finite = [value for value in values if value is not None]
    if not finite:
        return [0.0] * len(values)
    low, high = min(finite), max(finite)
    span = (high - low) or 1.0
    # The layer of the least value has a bar as well, though a short one.
    return [1.0 if value is None else 0.04 + 0.96 * (value - low) / span for value in values]


def _ms(row: tables.Row, batch: int) -> float:
    latency = row.latency(batch)
    return math.inf if latency is None else latency.value


def _ms_text(row: tables.Row, batch: int) -> str:
    return four_digits(_ms(row, batch)) + (" ms *" if row.disturbed(batch) else " ms")


def _percent(value: Any) -> str:
    return f"{100 * value:.1f}" if isinstance(value, (int, float)) else tables.NOTHING


def _rate(flops: float) -> str:
    """Return a rate of arithmetic with its unit."""
    return f"{flops / 1e12:.3g} TFLOP/s" if flops >= 1e12 else f"{flops / 1e9:.3g} GFLOP/s"


def _gpu_text(gpu: Mapping[str, Any]) -> str:
    return joined(
        gpu.get("name"),
        f"driver {gpu.get('driver')}",
        f"SM clock {gpu.get('sm_mhz')} of {gpu.get('sm_max_mhz')} MHz",
        f"memory clock {gpu.get('memory_mhz')} of {gpu.get('memory_max_mhz')} MHz",
        *(f"slowed by {reason}" for reason in gpu.get("slowed_by") or ()),
    )


def _clock_text(clock: Mapping[str, Any]) -> str:
    text = of_highest(clock.get("mhz"), clock.get("max_mhz"))
    return joined(f"{text} MHz", clock.get("governor") and f"governor {clock['governor']}")
