"""The results of a comparison put together from what its steps measured; see `results`."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import cv2

from trt_yolov6 import __version__
from trt_yolov6.common.files import write_bytes
from trt_yolov6.common.machine import cpu_model
from trt_yolov6.common.statistics import ratio_interval
from trt_yolov6.comparison.engines import BuiltCase, Work, origins
from trt_yolov6.comparison.machine import environment
from trt_yolov6.comparison.measure import Timings
from trt_yolov6.comparison.plan import settings_of
from trt_yolov6.comparison.results import KIND, SCHEMA, Results
from trt_yolov6.comparison.rounds import (
    CPU_DRIFT,
    GPU_DRIFT,
    Round,
    paired_medians,
    summarize_rounds,
)
from trt_yolov6.data.calibration import evenly
from trt_yolov6.data.coco import CocoDataset, CocoImage, read_coco_image

EXAMPLE_SIDE = 640
"""Longer side of the images kept for the report, at most, in pixels."""


def results_of(
    work: Work,
    dataset: CocoDataset,
    data: Mapping[str, Any],
    built: Sequence[BuiltCase],
    accuracies: Sequence[Mapping[str, Any]],
    agreements: Sequence[Mapping[str, Any] | None],
    timings: Timings,
    layers: Sequence[Mapping[str, Any]],
) -> Results:
    """Return the results, and write the example images that they name.

    The arguments are what the functions of those names in `measure` and `agreement` returned;
    accuracies, agreements and layers one an engine, layers also none.
    """
    engines = [
        _engine(*one) for one in zip(built, accuracies, agreements, origins(built), strict=True)
    ]
    rows = [
        _timing(one, batch, rounds, engine["device"])
        for batch in work.plan.batches
        for one, engine in zip(built, engines, strict=True)
        if (rounds := timings.rounds.get((one.name, batch))) is not None
    ]
    named = list(zip(built, layers, strict=False))
    ceilings = [found["ceilings"] for found in layers if found.get("ceilings")]
    dates = [found["date"] for found in accuracies] + [row["date"] for row in rows]
    found: Any = {
        "schema": SCHEMA,
        "kind": KIND,
        "package": __version__,
        "date": max(dates, key=datetime.datetime.fromisoformat),
        "environment": environment(timings.clocks),
        "data": dict(data),
        "settings": settings_of(work.plan),
        "engines": engines,
        "timings": rows,
        "ratios": _ratios(timings, built[0].name),
        "ceilings": list({one["device"]: one for one in ceilings}.values()),
        "layers": [
            {"engine": one.name, **{key: seen[key] for key in ("batch", "computed_in", "layers")}}
            for one, seen in named
            if "reason" not in seen
        ],
        "examples": _examples(work, dataset, built, accuracies),
        "left_out": [
            *(text for one in built for text in one.left_out),
            *(f"{one.name}: {seen['reason']}" for one, seen in named if "reason" in seen),
        ],
    }
    return cast(Results, found)


def _engine(
    built: BuiltCase, found: Mapping[str, Any], agreement: Mapping[str, Any] | None, origin: str
) -> dict[str, Any]:
    record, case = built.records[built.largest], built.case
    precision = str(case.choice) if case.choice else record.get("precision", found["precision"])
    return {
        "engine": built.name,
        "label": case.entry.label,
        "model": record.get("model", case.entry.label),
        "precision": precision,
        **{key: found[key] for key in ("backend", "backend_version", "device", "threads", "note")},
        "image_size": found["image_size"],
        "source": case.entry.path.name,
        "source_sha256": case.source.sha256,
        "origin_sha256": origin,
        "parameters": record.get("parameters"),
        "flops": record.get("flops"),
        "bytes": built.files[built.largest].stat().st_size,
        "calibration": record.get("calibration"),
        "float_layers": record.get("float_layers", []),
        "build_s": record.get("build_s"),
        **{key: found[key] for key in ("AP", "AP50", "AP75", "APs", "APm", "APl", "images")},
        "agreement": agreement,
        "detections": found["detections"],
        "per_class": found["per_class"],
    }


def _timing(built: BuiltCase, batch: int, rounds: Sequence[Round], device: str) -> dict[str, Any]:
    drift = CPU_DRIFT if device == cpu_model() else GPU_DRIFT
    summary = summarize_rounds(rounds, drift)
    low, high, counted = summary.latency.low, summary.latency.high, summary.counted
    return {
        "engine": built.name,
        "batch": batch,
        "engine_file": str(built.records[batch]["file"]),
        "engine_sha256": built.sha256[batch],
        "latency_ms": {
            "median": summary.latency.value * 1e3,
            "interval": [low * 1e3, high * 1e3],
            **{name: getattr(counted, name) * 1e3 for name in ("mean", "p90", "p99", "min")},
            "rounds": [value * 1e3 for value in summary.rounds],
        },
        "throughput_fps": batch / summary.latency.value,
        "throughput_interval": [batch / high, batch / low if low > 0 else None],
        **{key: getattr(summary, key) for key in ("runs", "quiet_runs", "disturbed", "waited")},
        "date": rounds[-1].date,
    }


def _ratios(timings: Timings, first: str) -> list[dict[str, Any]]:
    """Return how many times as long as the first engine each other one takes."""
    found = []
    for (name, batch), rounds in timings.rounds.items():
        base = timings.rounds.get((first, batch))
        if name == first or base is None:
            continue
        mine, theirs = paired_medians(rounds, base)
        if len(mine) >= 2:
            ratio = ratio_interval(mine, theirs)
            found.append(
                {
                    "engine": name,
                    "to": first,
                    "batch": batch,
                    "ratio": ratio.value,
                    "interval": [ratio.low, ratio.high],
                }
            )
    return found


def _examples(
    work: Work,
    dataset: CocoDataset,
    built: Sequence[BuiltCase],
    accuracies: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    records = []
    classes = dataset.class_indices
    for index, image in enumerate(evenly(dataset.images, work.plan.examples)):
        picture = Path("examples") / f"{index}.jpg"
        content = _small_jpeg(image)
        path = work.output / picture
        if not path.is_file() or path.read_bytes() != content:
            write_bytes(path, content)
        records.append(
            {
                "file": image.path.name,
                "picture": str(picture),
                "width": image.width,
                "height": image.height,
                "annotated": [
                    [x, y, x + width, y + height, 1.0, classes[entry["category_id"]]]
                    for entry in dataset.annotations
                    if entry["image_id"] == image.id
                    for x, y, width, height in [entry["bbox"]]
                ],
                "detections": {
                    one.name: found["examples"][index]
                    for one, found in zip(built, accuracies, strict=True)
                },
            }
        )
    return records


def _small_jpeg(image: CocoImage) -> bytes:
    pixels = read_coco_image(image)
    scale = min(1.0, EXAMPLE_SIDE / max(pixels.shape[:2]))
    size = [max(1, round(side * scale)) for side in pixels.shape[1::-1]]
    small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA) if scale < 1 else pixels
    bgr = cv2.cvtColor(small, cv2.COLOR_RGB2BGR)
    _, encoded = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, 82])
    return bytes(encoded.tobytes())
