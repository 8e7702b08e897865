"""The results of a comparison: one JSON file, flat lists of records that refer to engines by name.

Schema 1. Times are in milliseconds, AP in 0..1 (null where the data set has no such object), sizes
in pixels, hashes SHA-256 in hexadecimal, dates ISO 8601; an interval is [low, high].

    schema, kind      1, "comparison"
    date              when its last measurement ended
    environment       cpu, gpus, system, packages: what machine this is
    data              root, split, annotations_sha256, images_sha256, images, class_names
    settings          the plan, but for its models
    engines           one record an engine (two batch sizes of one plan are one engine):
                      engine (its name), model, precision, backend, backend_version, device,
                      threads, note, image_size, source, source_sha256, parameters, flops, bytes,
                      calibration, float_layers, build_s, and of its accuracy AP, AP50, AP75, APs,
                      APm, APl, images, detections, per_class
    timings           one record an engine and batch size: engine, batch, engine_file,
                      engine_sha256, latency_ms (median, its interval, mean, p90, p99, min, rounds),
                      throughput_fps and its interval, runs, quiet_runs, disturbed, waited, cpu,
                      cpu_clock, gpu, date. The median is that of undisturbed runs unless
                      `disturbed`; the interval says where a further round is to be expected
    ratios            one record an engine but the first, and batch size: engine, to, batch, ratio
                      of their latencies and its interval, from rounds in pairs
    ceilings          of each device: device, bytes_per_second, flops (by precision), how; or empty
    layers            one record an engine: engine, batch, waited, computed_in, and layers: name,
                      operator, precision, ms, roofline_ms (or null), bound
    examples          one record an image: file, picture (beside this file), width, height,
                      annotated, and detections by engine; each a list of box, score, class
    left_out          sentences about what could not be measured
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trt_yolov6.comparison.intervals import Interval
from trt_yolov6.errors import UserError
from trt_yolov6.files import read_json

SCHEMA = 1

KIND = "comparison"

FILE = "results.json"

_LISTS = ("engines", "timings", "ratios", "ceilings", "layers", "examples", "left_out")


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
    except (KeyError, TypeError, ValueError) as error:
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
    for name in _LISTS:
        if not isinstance(value[name], list):
            raise TypeError(f"{name} is no list")
    if not isinstance(value["data"], dict) or not isinstance(value["environment"], dict):
        raise TypeError("data or environment is no object")
    names = set()
    for engine in value["engines"]:
        for key in ("engine", "model", "precision", "backend", "device"):
            if not isinstance(engine[key], str):
                raise TypeError(f"{key} of an engine is no text")
        ap = engine["AP"]
        if ap is not None and not 0 <= float(ap) <= 1:
            raise ValueError(f"AP {ap}")
        names.add(engine["engine"])
    for timing in value["timings"]:
        if timing["engine"] not in names:
            raise ValueError(f"timing of {timing['engine']!r}, which is no engine")
        latency = latency_of(timing)
        if not 0 <= latency.low <= latency.value <= latency.high or latency.value <= 0:
            raise ValueError(f"interval of {timing['engine']!r}")
        if not isinstance(timing["batch"], int):
            raise TypeError("batch is no whole number")
