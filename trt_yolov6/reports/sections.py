"""The parts of the page. Every text that comes from a file goes through `escape`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from trt_yolov6.common.statistics import Interval
from trt_yolov6.comparison.results import latency_of
from trt_yolov6.comparison.summary import number
from trt_yolov6.quantization.sensitivity import MEANING, direction
from trt_yolov6.reports.figures import PRECISIONS, Point, bar, legend, point_of, trade_off
from trt_yolov6.reports.material import Comparison, Material, Ranking
from trt_yolov6.reports.tables import (
    NOTHING,
    Cell,
    Row,
    batches_of,
    overview,
    quantization,
    quantized_share,
    with_error,
)
from trt_yolov6.runtime.draw import class_colour

SHOWN_LAYERS = 12
"""Layers a table has before the rest folds away."""


def headline(rows: Sequence[Row]) -> str:
    """Return the answer first: what is most accurate, what is fastest, and what lies between."""
    batches = batches_of(rows)
    scored = [row for row in rows if row.ap is not None]
    if not scored or not batches:
        return ""
    batch = batches[0]
    timed = [row for row in scored if row.latency(batch)]
    if not timed:
        return ""
    best = max(timed, key=lambda row: row.ap or 0)
    fastest = min(timed, key=lambda row: _ms(row, batch))
    lines = [
        f"Most accurate: <strong>{escape(best.name)}</strong>, AP {_ap(best)} % at "
        f"{number(_ms(best, batch))} ms (batch {batch})."
    ]
    if fastest is not best:
        lines.append(
            f"Fastest: <strong>{escape(fastest.name)}</strong>, {number(_ms(fastest, batch))} ms "
            f"with AP {_ap(fastest)} %."
        )
    front = pareto(timed, batch)
    if len(timed) > 2 and len(front) < len(timed):
        names = ", ".join(escape(row.name) for row in front)
        lines.append(f"By these figures, none is both faster and more accurate than: {names}.")
    return f"<p>{' '.join(lines)}</p>"


def pareto(rows: Sequence[Row], batch: int) -> list[Row]:
    """Return the engines that no other beats in both AP and latency, the fastest first."""
    front: list[Row] = []
    for row in sorted(rows, key=lambda row: (_ms(row, batch), -(row.ap or 0))):
        if not front or (row.ap or 0) > (front[-1].ap or 0):
            front.append(row)
    return front


def trade_offs(rows: Sequence[Row]) -> str:
    """Return the paper's Figure 1: AP over latency, and AP over throughput."""
    batches = batches_of(rows)
    figures = []
    alone = len({row.label for row in rows}) == 1
    for batch, what in _axes(batches):
        points = []
        for row in rows:
            value = row.latency(batch) if what == "latency" else row.throughput(batch)
            if (
                value is not None
                and (point := point_of(row, value, batch, alone=alone)) is not None
            ):
                points.append(point)
        if not points:
            continue
        if what == "latency":
            label, title, better = "latency, ms", f"AP over latency, batch {batch}", "left"
        else:
            label, title, better = "images a second", f"AP over throughput, batch {batch}", "right"
        chart = trade_off(points, label, title, better=better)
        figures.append(f"<figure><figcaption>{escape(title)}</figcaption>{chart}</figure>")
    if not figures:
        return "<p>No engine has both an AP and a latency.</p>"
    kinds = [kind for kind in PRECISIONS if any(row.base == kind for row in rows)]
    others = sorted({row.base for row in rows} - set(PRECISIONS))
    return (
        legend([*kinds, *others])
        + _simulated(rows)
        + f'<div class="charts">{"".join(figures)}</div>'
        + '<p class="soft">A bar across a mark is the interval of its latency (see Method), cut '
        "off where it is wider than the chart has room for. Hover, tap or focus a mark for its "
        "figures.</p>"
    )


def _simulated(rows: Sequence[Row]) -> str:
    """Say where a latency is not that of the precision it stands for."""
    kinds = [kind for kind in PRECISIONS if any(r.is_simulated and r.base == kind for r in rows)]
    if not kinds:
        return ""
    named = " and ".join(kind.upper() for kind in kinds)
    return (
        f"<p><strong>A CPU computes {named} in float.</strong> Its AP is right; its latency says "
        "nothing of a GPU, where lower precision is faster.</p>"
    )


def table(rows: Sequence[Row]) -> str:
    """Return the table like Table 1, which the page's script makes sortable."""
    head, cells = overview(rows)
    text = html_table(head, cells, "sorts")
    largest = max((batch for row in rows for batch in row.timings), default=1)
    text += f'<p class="soft">(b{largest}): at batch {largest}. Press a head to sort.</p>'
    if any(row.disturbed(batch) for row in rows for batch in row.timings):
        text += (
            '<p class="soft">* Other processes disturbed nearly all runs, so that the engine is '
            "faster than this by an unknown amount.</p>"
        )
    return text


def quantization_cost(rows: Sequence[Row]) -> str:
    """Return the AP that each precision costs, and its share of the work."""
    found = quantization(rows)
    if not found:
        return _how(
            "No model was compared both in floating point and quantized.",
            "trt-yolov6 compare MODEL --precisions fp32,int8,int8:6",
        )
    parts = []
    for label, own in found:
        known = [row.ap for row, _ in own if row.ap is not None]
        top = max(known, default=0.0) or 1.0
        head = [
            *("Precision", "AP, %", "", "to float", "agreement, %"),
            *("APs", "APm", "APl", "in 8 bits", "in float"),
        ]
        body = []
        for row, change in own:
            share = quantized_share(row.engine)
            layers = row.engine.get("float_layers") or []
            body.append(
                [
                    Cell(row.precision),
                    Cell(_ap(row)),
                    Cell(bar((row.ap or 0) / top, row.base)),
                    Cell(_change(row, change)),
                    Cell(_agreement(row.engine.get("agreement"))),
                    *(Cell(_percent(row.engine.get(key))) for key in ("APs", "APm", "APl")),
                    Cell(NOTHING if share is None else f"{100 * share:.0f} %"),
                    Cell(str(len(layers)) if share is not None else NOTHING),
                ]
            )
        parts.append(f"<h3>{escape(label)}</h3>" + html_table(head, body, raw=(2,), wide=2))
        parts += [_float_layers_tried(row) for row, _ in own]
    images = max(row.engine["images"] for row in rows)
    parts.append(
        f'<p class="soft">"To float" is in AP points. On {images} images AP moves by some points '
        'by chance, so that a small difference, of either sign, says little. "In 8 bits" is the '
        'share of the multiply-adds, "in float" the layers that were left so.</p>'
        if images < 1000
        else '<p class="soft">"To float" is in AP points; "in 8 bits" is the share of the '
        'multiply-adds, "in float" the layers that were left so.</p>'
    )
    agreed = [row.engine["agreement"] for row in rows if row.engine.get("agreement")]
    if agreed:
        parts.append(
            '<p class="soft">"Agreement" is the AP of its detections against the float engine\'s '
            "own above a score of 0.3. It and the change of AP have 95 % bootstrap intervals over "
            f"the images, in brackets: a smaller difference is not told from chance.{_same(agreed)}"
            "</p>"
        )
    return "".join(parts)


def _same(agreed: Sequence[Mapping[str, Any]]) -> str:
    """Say where images were judged on that had calibrated."""
    shared = max(one["calibrated_on"] for one in agreed)
    return f" {shared} of the images had calibrated it, which flatters it." if shared else ""


def _change(row: Row, change: float | None) -> str:
    """Return a change of AP in points, with its interval where that is known."""
    if change is None:
        return NOTHING
    found = row.engine.get("agreement")
    if not found:
        return f"{change:+.2f}"
    low, high = (100 * end for end in found["ap_change"]["interval"])
    return f"{change:+.2f} [{low:+.2f}, {high:+.2f}]"


def _agreement(found: Mapping[str, Any] | None) -> str:
    if not found:
        return NOTHING
    low, high = (100 * end for end in found["interval"])
    return f"{100 * found['value']:.1f} [{low:.1f}, {high:.1f}]"


def _float_layers_tried(row: Row) -> str:
    """Return the sets of float layers that were tried for an engine: agreement over added time."""
    calibration = row.engine.get("calibration") or {}
    tried = [one for one in calibration.get("tried") or () if one["decides"] == "float layers"]
    if not tried:
        return ""
    chosen = sorted(row.engine.get("float_layers") or ())
    ordered = sorted(tried, key=lambda one: (one["slowdown"], -one["agreement"]))
    best = -math.inf
    points = []
    for number_, one in enumerate(ordered):
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
                "front" if on_front else f"set {number_}",
                Interval(x, x, x),
                100 * one["agreement"],
                f"{label}: agreement {100 * one['agreement']:.1f} %, {x:.1f} % slower",
            )
        )
    title = f"{row.name}: agreement over added run time, {len(tried)} sets of float layers"
    chart = trade_off(
        points, "added run time by layer times, %", title, y_label="agreement with float, %"
    )
    return (
        f'<div class="charts"><figure><figcaption>{escape(title)}</figcaption>{chart}</figure>'
        "</div>"
    )


def sensitivity(rankings: Sequence[Ranking]) -> str:
    """Return a bar for each layer of each ranking, the most sensitive first."""
    if not rankings:
        return _how(
            "No ranking of layers was given.",
            "trt-yolov6 sensitivity --json sensitivity.json",
            "trt-yolov6 report runs/compare sensitivity.json",
        )
    parts = []
    for ranking in rankings:
        lengths = _lengths(ranking)
        scale = " (bars logarithmic)" if ranking.metric == "mse" else ""
        head = ["Layer", ranking.metric.upper(), ""]
        body = [
            [
                Cell(name),
                Cell(NOTHING if value is None else f"{value:.4g}"),
                Cell(bar(length, "int8")),
            ]
            for (name, value), length in zip(ranking.layers, lengths, strict=True)
        ]
        parts.append(
            f"<h3>{escape(ranking.file)}</h3>"
            f'<p class="soft">{escape(MEANING[ranking.metric])}{scale}; '
            f"{direction(ranking.metric)}, first.</p>" + folded(head, body, raw=(2,), wide=2)
        )
    return "".join(parts)


def layers(material: Material) -> str:
    """Return the times of each engine's layers, their precision and their roofline."""
    parts = []
    for comparison in material.comparisons:
        for one in comparison.value["layers"]:
            parts.append(_layers_of(one, comparison, material.several))
    if not parts:
        return _how(
            "The results have no times of layers: they were left out (--no-layers), or the backend "
            "does not report them.",
            "trt-yolov6 compare MODEL",
        )
    ceilings = [
        f"{escape(str(one['device']))}: {one['bytes_per_second'] / 1e9:.3g} GB/s, "
        + ", ".join(f"{_rate(rate)} in {escape(str(name))}" for name, rate in one["flops"].items())
        + f" ({escape(str(one['how']))})."
        for comparison in material.comparisons
        for one in comparison.value["ceilings"]
    ]
    text = (
        "A layer's roofline is the larger of its operations at the measured rate of a large matrix "
        "product and of its bytes at the measured rate of a large copy; the line across a bar "
        "stands there. Above 100 %, a layer's kernel does better than that product. "
    )
    text += (
        "Measured ceilings: " + " ".join(dict.fromkeys(ceilings))
        if ceilings
        else (
            "No ceilings could be measured on this device (a GPU needs PyTorch with CUDA for that)."
        )
    )
    return "".join(parts) + f'<p class="soft">{text}</p>'


def examples(material: Material) -> str:
    """Return the same pictures with what each engine finds in them, side by side."""
    parts = []
    missing = 0
    for number_, comparison in enumerate(material.comparisons):
        names = comparison.value["data"].get("class_names", [])
        for index, example in enumerate(comparison.value["examples"]):
            picture = comparison.picture(example)
            if picture is None:
                missing += 1
                continue
            parts.append(_example(example, picture, f"picture-{number_}-{index}", names))
    if missing:
        parts.append(
            f"<p>{missing} picture{'s' * (missing != 1)} could not be found next to the results; "
            "keep the folder <code>examples/</code> with <code>results.json</code>.</p>"
        )
    if not parts:
        return _how("The results have no example images.", "trt-yolov6 compare MODEL --examples 3")
    used = sorted(
        {
            (int(found[5]), str(names[int(found[5])] if int(found[5]) < len(names) else found[5]))
            for comparison in material.comparisons
            for names in [comparison.value["data"].get("class_names", [])]
            for example in comparison.value["examples"]
            for boxes in [example["annotated"], *example["detections"].values()]
            for found in boxes
        }
    )
    keys = "".join(
        f'<span class="key"><svg viewBox="0 0 14 14" class="mark" aria-hidden="true">'
        f'<rect x="1" y="1" width="12" height="12" fill="{_colour(index)}"/></svg>{escape(name)}'
        "</span>"
        for index, name in used[:20]
    )
    return (
        f'<p class="legend">{keys}</p>' + "".join(parts) + '<p class="soft">Boxes with a score of '
        "0.4 or more; hover over a box for its class and score.</p>"
    )


def method(material: Material) -> str:
    """Return the section on environment and method."""
    parts = []
    for comparison in material.comparisons:
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
        rows = [
            ("Data", f"{data['images']} images, {data['root']}, {data['split']}"),
            ("Device", "; ".join(devices)),
            ("Processor", f"{cpu.get('model')}, {cpu.get('threads')} threads"),
            *(("GPU", _gpu_text(gpu)) for gpu in machine.get("gpus") or []),
            ("CPU clock", _clock_text(machine.get("cpu_clock") or {})),
            ("System", str(machine.get("system"))),
            (
                "Packages",
                ", ".join(f"{name} {version}" for name, version in machine["packages"].items()),
            ),
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
        notes = sorted({f"{one['note']}." for one in value["engines"] if one["note"]})
        notes += value["left_out"]
        title = f"<h3>{escape(comparison.name)}</h3>" if material.several else ""
        terms = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in rows)
        parts.append(
            title
            + "".join(f'<p class="notice">{escape(note)}</p>' for note in notes)
            + f"<dl>{terms}</dl>"
        )
        hashes = [
            [
                Cell(f"{timing['engine']}, batch {timing['batch']}"),
                Cell(with_error(latency_of(timing))),
                Cell(str(timing["runs"])),
                Cell(str(timing["quiet_runs"])),
                Cell(NOTHING if timing["waited"] is None else f"{100 * timing['waited']:.1f} %"),
                Cell(str(timing["engine_sha256"])[:16]),
            ]
            for timing in timings
        ]
        head = ["Engine", "ms", "runs", "undisturbed", "waited", "SHA-256"]
        parts.append(
            "<details><summary>Engines and their runs</summary>"
            + html_table(head, hashes)
            + "</details>"
        )
    return "".join(parts) + _METHOD


_METHOD = """<p>Latency is of the engine alone, on input where it reads it, without pre- or
post-processing, as in the paper; throughput is the batch size over it. Each round loads every
engine again and runs it for a while, in changing order, so that a drift of the machine hits all
alike. Runs while which the process's threads waited for a processor are left out, unless hardly
any others are there. The figure is the median over the rounds; its interval says where a further
round is to be expected in 95 of 100 cases, and reaches at least 5 % to each side on a CPU, 1 % on a
GPU, so that it covers what differs from one run of the comparison to the next. AP is COCO's (IoU
0.50 to 0.95), by pycocotools.</p>"""


# --- parts of parts -----------------------------------------------------------------------------


def html_table(
    head: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    kind: str = "",
    *,
    raw: Sequence[int] = (),
    wide: int | None = None,
) -> str:
    """Return a table whose first column names the rows.

    Args:
        head: titles of the columns.
        rows: the cells.
        kind: a class of the table; `sorts` makes its head sort it.
        raw: columns whose texts are HTML of this package's own.
        wide: a column that takes what room there is.
    """

    def cell(index: int, one: Cell) -> str:
        text = one.text if index in raw else escape(one.text)
        value = "" if one.value is None else f' data-value="{escape(str(one.value))}"'
        if index == 0:
            return f'<th scope="row" class="name"{value} title="{escape(one.text)}">{text}</th>'
        width = ' class="wide"' if index == wide else ""
        return f"<td{value}{width}>{text}</td>"

    titles = "".join(f'<th scope="col">{escape(title)}</th>' for title in head)
    body = "".join(
        f"<tr>{''.join(cell(index, one) for index, one in enumerate(row))}</tr>" for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(head[0])} table">'
        f'<table class="{kind}"><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def folded(head: Sequence[str], rows: Sequence[Sequence[Cell]], **options: Any) -> str:
    """Return a table of the first rows, and one of the rest that unfolds."""
    text = html_table(head, rows[:SHOWN_LAYERS], **options)
    rest = rows[SHOWN_LAYERS:]
    if rest:
        text += (
            f"<details><summary>{len(rest)} more</summary>{html_table(head, rest, **options)}"
            "</details>"
        )
    return text


def _layers_of(one: Mapping[str, Any], comparison: Comparison, several: bool) -> str:
    found = sorted(one["layers"], key=lambda layer: layer["ms"], reverse=True)
    longest = max((layer["ms"] for layer in found), default=0.0) or 1.0
    whole = sum(layer["ms"] for layer in found)
    percent = 100 / (whole or 1.0)
    named = [layer for layer in found if layer["operator"]]
    rest = [layer for layer in found if not layer["operator"]]
    floor = [layer["roofline_ms"] for layer in named if layer["roofline_ms"] is not None]
    body = []
    for layer in named:
        roof = layer["roofline_ms"]
        # A profile in whole microseconds may say 0.
        share = f"{100 * roof / layer['ms']:.0f} %" if roof is not None and layer["ms"] else NOTHING
        body.append(
            [
                Cell(layer["name"]),
                Cell(layer["precision"] or NOTHING),
                Cell(f"{layer['ms']:.3g}"),
                Cell(f"{percent * layer['ms']:.1f} %"),
                Cell(
                    bar(
                        layer["ms"] / longest,
                        layer["precision"],
                        None if roof is None else roof / longest,
                    )
                ),
                Cell(share),
                Cell(layer["bound"] or NOTHING),
            ]
        )
    if rest:
        other = sum(layer["ms"] for layer in rest)
        body.append(
            [
                Cell(f"{len(rest)} other kernels"),
                Cell(NOTHING),
                Cell(f"{other:.3g}"),
                Cell(f"{percent * other:.1f} %"),
                Cell(bar(other / longest)),
                Cell(NOTHING),
                Cell(NOTHING),
            ]
        )
    title = one["engine"] + (f" ({comparison.name})" if several else "")
    text = f"{len(found)} kernels, {whole:.3g} ms one by one at batch {one['batch']}"
    if floor:
        text += f"; the rooflines of {len(floor)} layers come to {sum(floor):.3g} ms"
    if one.get("computed_in"):
        text += f"; all of it is computed in {one['computed_in']} here"
    head = ["Layer", "Precision", "ms", "share", "", "of roofline", "bound by"]
    return f'<h3>{escape(title)}</h3><p class="soft">{escape(text)}.</p>' + folded(
        head, body, raw=(4,), wide=4
    )


def _example(
    example: Mapping[str, Any], picture: str, name: str, class_names: Sequence[str]
) -> str:
    width, height = int(example["width"]), int(example["height"])
    panels = [("annotated", example["annotated"]), *example["detections"].items()]
    figures = []
    for index, (title, boxes) in enumerate(panels):
        source = (
            f'<image id="{name}" width="{width}" height="{height}" '
            f'href="data:image/jpeg;base64,{picture}"/>'
            if index == 0
            else f'<use href="#{name}"/>'
        )
        drawn = "".join(_box(box, class_names) for box in boxes)
        figures.append(
            f"<figure><figcaption>{escape(title)}: {len(boxes)}</figcaption>"
            f'<svg viewBox="0 0 {width} {height}" role="img" '
            f'aria-label="{escape(str(example["file"]))}, {escape(title)}: {len(boxes)} objects">'
            f"{source}{drawn}</svg></figure>"
        )
    return f'<h3>{escape(str(example["file"]))}</h3><div class="examples">{"".join(figures)}</div>'


def _box(box: Sequence[float], class_names: Sequence[str]) -> str:
    x1, y1, x2, y2, score, index = (float(value) for value in box)
    label = int(index)
    name = class_names[label] if label < len(class_names) else str(label)
    text = escape(f"{name} {score:.2f}")
    place = f'x="{x1:.1f}" y="{y1:.1f}" width="{x2 - x1:.1f}" height="{y2 - y1:.1f}"'
    return (
        f'<g><title>{text}</title><rect class="halo" {place}/>'
        f'<rect class="box" {place} stroke="{_colour(label)}" pointer-events="all"/></g>'
    )


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


def _axes(batches: Sequence[int]) -> list[tuple[int, str]]:
    """Return the batch size and axis of each chart."""
    if not batches:
        return []
    return [(batches[0], "latency"), (batches[-1], "throughput")]


def _how(reason: str, *commands: str) -> str:
    lines = "".join(f"<br><code>{escape(command)}</code>" for command in commands)
    return f"<p>{escape(reason)} To get it:{lines}</p>"


def _ms(row: Row, batch: int) -> float:
    latency = row.latency(batch)
    return math.inf if latency is None else latency.value


def _ap(row: Row) -> str:
    return NOTHING if row.ap is None else f"{100 * row.ap:.1f}"


def _percent(value: Any) -> str:
    return f"{100 * value:.1f}" if isinstance(value, (int, float)) else NOTHING


def _rate(flops: float) -> str:
    """Return a rate of arithmetic with its unit."""
    return f"{flops / 1e12:.3g} TFLOP/s" if flops >= 1e12 else f"{flops / 1e9:.3g} GFLOP/s"


def _gpu_text(gpu: Mapping[str, Any]) -> str:
    parts = [str(gpu.get("name")), f"driver {gpu.get('driver')}"]
    for name, key in (("SM", "sm"), ("memory", "memory")):
        parts.append(f"{name} clock {gpu.get(f'{key}_mhz')} of {gpu.get(f'{key}_max_mhz')} MHz")
    parts += [f"slowed by {reason}" for reason in gpu.get("slowed_by") or []]
    return ", ".join(parts)


def _clock_text(clock: Mapping[str, Any]) -> str:
    now, highest = clock.get("mhz"), clock.get("max_mhz")
    text = "unknown" if now is None else f"{now:.0f} MHz"
    text += f" of {highest:.0f}" if highest is not None else ""
    return text + (f", governor {clock['governor']}" if clock.get("governor") else "")
