"""The results of a comparison: one JSON file, flat lists of records that refer to engines by name.

Schema 1. Times are in milliseconds, AP in 0..1 (null where the data set has no such object), sizes
in pixels, hashes SHA-256 in hexadecimal, dates ISO 8601; an interval is [low, high].

    schema, kind      1, "comparison"
    date              when its last measurement ended
    package           the version of this package
    environment       cpu, cpu_clock, gpus (clocks after the last round), system, packages
    data              root, split, annotations_sha256, images_sha256, images, class_names
    settings          the plan, but for its models
    engines           one record an engine (two batch sizes of one plan are one engine):
                      engine (its name), label, model, precision, backend, backend_version, device,
                      threads, note, image_size, source, source_sha256, parameters, flops, bytes,
                      calibration, float_layers, build_s, and of its accuracy AP, AP50, AP75, APs,
                      APm, APl, images, detections, per_class; agreement: of a quantized engine
                      with its model's float one (else null): with (that engine), value (AP of its
                      detections against the float ones above 0.3) and its bootstrap interval over
                      images, ap_change (to float: value, interval), images, and calibrated_on, how
                      many of these calibrated it
    timings           one record an engine and batch size: engine, batch, engine_file,
                      engine_sha256, latency_ms (median, its interval, mean, p90, p99, min, rounds),
                      throughput_fps and its interval, runs, quiet_runs, disturbed, waited, date.
                      The median is that of undisturbed runs unless `disturbed`; the interval says
                      where a further round is to be expected
    ratios            one record an engine but the first, and batch size: engine, to, batch, ratio
                      of their latencies and its interval, from rounds in pairs
    ceilings          of each device: device, bytes_per_second, flops (by precision), how; or empty
    layers            one record an engine: engine, batch, computed_in, and layers: name,
                      operator, precision, ms, roofline_ms (or null), bound
    examples          one record an image: file, picture (next to this file), width, height,
                      annotated, and detections by engine; each a list of box, score, class
    left_out          sentences about what could not be measured
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trt_yolov6.common.files import read_json
from trt_yolov6.common.statistics import Interval
from trt_yolov6.errors import UserError

SCHEMA = 1

KIND = "comparison"

FILE = "results.json"

_Number = int | float

_OBJECTS: dict[str, dict[str, Any]] = {
    "environment": {
        "cpu": dict | None,
        "cpu_clock": dict | None,
        "gpus": list,
        "packages": dict,
    },
    "data": {
        "root": str,
        "split": str,
        "annotations_sha256": str,
        "images_sha256": str,
        "images": int,
        "class_names": list,
    },
    "settings": {
        "rounds": int,
        "duration": _Number,
        "confidence": _Number,
        "iou": _Number,
        "max_detections": int,
        "border": int,
    },
}
"""Types of what readers of the results rely on, by object."""

_RECORDS: dict[str, dict[str, Any]] = {
    "engines": {
        **dict.fromkeys(("engine", "model", "precision", "backend", "device", "note"), str),
        "backend_version": str | None,
        "threads": int | None,
        "image_size": list,
        "images": int,
        "AP": _Number | None,
        "AP50": _Number | None,
    },
    "timings": {
        "engine": str,
        "batch": int,
        "engine_sha256": str,
        "latency_ms": dict,
        "runs": int,
        "quiet_runs": int,
        "disturbed": bool,
        "waited": _Number | None,
    },
    "ratios": {"engine": str, "batch": int, "ratio": _Number, "interval": list},
    "ceilings": {"device": str, "bytes_per_second": _Number, "flops": dict, "how": str},
    "layers": {"engine": str, "batch": int, "layers": list},
    "examples": {
        "file": str,
        "picture": str,
        "width": int,
        "height": int,
        "annotated": list,
        "detections": dict,
    },
}
"""The same by list of records."""

_LAYER: dict[str, Any] = {
    **dict.fromkeys(("name", "operator", "precision", "bound"), str),
    "ms": _Number,
    "roofline_ms": _Number | None,
}

_FIGURE: dict[str, Any] = {"value": _Number, "interval": list}

_AGREEMENT: dict[str, Any] = {
    **_FIGURE,
    "with": str,
    "ap_change": dict,
    "images": int,
    "calibrated_on": int,
}

_CLOCK: dict[str, Any] = {"mhz": _Number | None, "max_mhz": _Number | None}


def read_results(path: str | Path) -> dict[str, Any]:
    """Read the results of a comparison: the file, or the folder it lies in.

    Raises:
        UserError: there is none, or it is damaged or of another schema.
    """
    path = Path(path)
    if path.is_dir():
        path = path / FILE
    value = read_json(path)
    if not isinstance(value, dict) or value.get("kind") != KIND:
        raise UserError(
            f"{path} holds no results of a comparison; give a file that `trt-yolov6 compare` wrote."
        )
    if value.get("schema") != SCHEMA:
        raise UserError(
            f"{path} has schema {value.get('schema')!r}, this version reads {SCHEMA}; run "
            "`trt-yolov6 compare` again."
        )
    try:
        _check(value)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {error}); run `trt-yolov6 compare` again."
        ) from error
    return value


def latency_of(timing: Mapping[str, Any]) -> Interval:
    """Return a timing's latency and its interval, in milliseconds."""
    latency = timing["latency_ms"]
    low, high = latency["interval"]
    return Interval(float(latency["median"]), float(low), float(high))


def _check(value: dict[str, Any]) -> None:
    """Raise KeyError, TypeError or ValueError for what readers of the results rely on."""
    str(value["date"])
    for name, types in _OBJECTS.items():
        _check_types(name, value[name], types)
    for clock in filter(None, [value["environment"]["cpu_clock"]]):
        _check_types("cpu_clock", clock, _CLOCK)
    for name in (*_RECORDS, "left_out"):
        if not isinstance(value[name], list):
            raise TypeError(f"{name} is not a list")
        for record in value[name] if name in _RECORDS else ():
            _check_types(name, record, _RECORDS[name])
    if value["settings"]["rounds"] < 1:
        raise ValueError(f"{value['settings']['rounds']} rounds")
    names = {engine["engine"] for engine in value["engines"]}
    for engine in value["engines"]:
        if engine["AP"] is not None and not 0 <= engine["AP"] <= 1:
            raise ValueError(f"AP {engine['AP']}")
        if (agreement := engine.get("agreement")) is not None:
            _check_types("agreement", agreement, _AGREEMENT)
            _check_types("ap_change", agreement["ap_change"], _FIGURE)
            for figure in (agreement, agreement["ap_change"]):
                _check_numbers("interval", figure["interval"], 2)
        _check_numbers("image_size", engine["image_size"], 2)
    for timing in value["timings"]:
        if timing["engine"] not in names:
            raise ValueError(f"timing of {timing['engine']!r}, which is not an engine")
        latency = latency_of(timing)
        if not 0 <= latency.low <= latency.value <= latency.high < math.inf or latency.value <= 0:
            raise ValueError(f"interval of {timing['engine']!r}")
    for ratio in value["ratios"]:
        _check_numbers("interval", ratio["interval"], 2)
    for ceiling in value["ceilings"]:
        _check_numbers("flops", list(ceiling["flops"].values()), len(ceiling["flops"]))
    for layer in (layer for one in value["layers"] for layer in one["layers"]):
        _check_types("layers", layer, _LAYER)
    for example in value["examples"]:
        for box in (box for boxes in _boxes(example) for box in boxes):
            _check_numbers("a box", box, 6)


def _check_types(where: str, record: Any, types: Mapping[str, Any]) -> None:
    if not isinstance(record, dict):
        raise TypeError(f"{where}: {type(record).__name__} instead of an object")
    for key, kind in types.items():
        item = record[key]
        if not isinstance(item, kind) or (isinstance(item, float) and not math.isfinite(item)):
            raise TypeError(f"{where}: {key} is {item!r:.40}")


def _check_numbers(where: str, values: Any, count: int) -> None:
    if not isinstance(values, list) or len(values) != count:
        raise TypeError(f"{where} is not a list of {count} numbers")
    if not all(isinstance(one, (int, float)) and math.isfinite(one) for one in values):
        raise TypeError(f"{where} is not a list of numbers")


def _boxes(example: Mapping[str, Any]) -> list[list[Any]]:
    """Return the lists of boxes of an example."""
    found = [example["annotated"], *example["detections"].values()]
    if not all(isinstance(boxes, list) for boxes in found):
        raise TypeError("examples: no list of boxes")
    return found
