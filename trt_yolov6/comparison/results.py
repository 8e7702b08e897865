"""The results of a comparison: one JSON file, flat lists of records that refer to engines by name.

Schema 1. Times are in milliseconds, AP in 0..1 (null where the data set has no such object), sizes
in pixels, hashes SHA-256 in hexadecimal, dates ISO 8601; an interval is [low, high].

    schema, kind      1, "comparison"
    date              when its last measurement ended
    package           the version of this package
    environment       cpu, cpu_clock, gpus (clocks after the last round), system, packages
    data              root, split, annotations_sha256, images_sha256, images, class_names
    settings          the plan, without its models
    engines           one record an engine (two batch sizes of one plan are one engine):
                      engine (its name), label, model, precision, backend, backend_version, device,
                      threads, note, image_size, source, source_sha256, origin_sha256 (of the
                      checkpoint or graph that it is of), parameters, flops, bytes, calibration,
                      float_layers, build_s, and of its accuracy AP, AP50, AP75, APs, APm, APl,
                      images, detections, per_class; agreement: of a quantized engine with its
                      model's float one (else null): with (that engine), value (AP of its
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

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypedDict, cast

import msgspec

from trt_yolov6.common.files import read_json
from trt_yolov6.common.records import as_record
from trt_yolov6.common.statistics import Interval
from trt_yolov6.errors import UserError

SCHEMA = 1

KIND = "comparison"

FILE = "results.json"

THRESHOLDS = ("confidence", "iou", "max_detections", "border")
"""Settings that an AP depends on."""

_Number = Annotated[float, msgspec.Meta(ge=-sys.float_info.max, le=sys.float_info.max)]
_Count = Annotated[int, msgspec.Meta(ge=1, le=10**6)]
_Interval = tuple[_Number, _Number]
_Box = tuple[_Number, _Number, _Number, _Number, _Number, _Number]


# The fields that readers of the results rely on; there are more.


class _Clock(TypedDict):
    mhz: _Number | None
    max_mhz: _Number | None


class _Gpu(TypedDict, total=False):
    slowed_by: list[str]


class _Environment(TypedDict):
    cpu: dict[str, Any] | None
    cpu_clock: _Clock | None
    gpus: list[_Gpu]
    packages: dict[str, Any]


class _Data(TypedDict):
    root: str
    split: str
    annotations_sha256: str
    images_sha256: str
    images: int
    class_names: list[str]


class _Settings(TypedDict):
    rounds: _Count
    duration: _Number
    confidence: _Number
    iou: _Number
    max_detections: int
    border: int


class _Figure(TypedDict):
    value: _Number
    interval: _Interval


class _Agreement(_Figure):
    ap_change: _Figure
    images: int
    calibrated_on: int


class _Tried(TypedDict):
    decides: str
    float_layers: list[str]
    slowdown: _Number
    agreement: _Number


class _Calibration(TypedDict, total=False):
    tried: list[_Tried]


class _EngineDetails(TypedDict, total=False):
    origin_sha256: str
    agreement: _Agreement | None
    calibration: _Calibration | None
    float_layers: list[str]
    detections: int
    bytes: _Number
    flops: _Number | None
    parameters: _Number | None
    AP75: _Number | None
    APs: _Number | None
    APm: _Number | None
    APl: _Number | None


class _Engine(_EngineDetails):
    engine: str
    model: str
    precision: str
    backend: str
    backend_version: str | None
    device: str
    threads: int | None
    note: str
    image_size: tuple[int, int]
    images: int
    AP: Annotated[float, msgspec.Meta(ge=0, le=1)] | None
    AP50: _Number | None


class _LatencyDetails(TypedDict, total=False):
    rounds: list[_Number]


class _Latency(_LatencyDetails):
    median: Annotated[float, msgspec.Meta(ge=1e-9, le=1e12)]
    interval: _Interval


class _TimingDetails(TypedDict, total=False):
    engine_file: str


class _Timing(_TimingDetails):
    engine: str
    batch: _Count
    engine_sha256: str
    latency_ms: _Latency
    throughput_fps: _Number
    runs: int
    quiet_runs: int
    disturbed: bool
    waited: _Number | None


class _To(TypedDict, total=False):
    to: str


class _Ratio(_To):
    engine: str
    batch: int
    ratio: _Number
    interval: _Interval


class _Ceilings(TypedDict):
    device: str
    bytes_per_second: _Number
    flops: dict[str, _Number]
    how: str


class _Layer(TypedDict):
    name: str
    operator: str
    precision: str
    bound: str
    ms: _Number
    roofline_ms: _Number | None


class _Layers(TypedDict):
    engine: str
    batch: int
    layers: list[_Layer]


class _Example(TypedDict):
    file: str
    picture: str
    width: int
    height: int
    annotated: list[_Box]
    detections: dict[str, list[_Box]]


class Results(TypedDict):
    """Results of a comparison, as `results.json` has them: the fields that readers rely on."""

    date: str
    environment: _Environment
    data: _Data
    settings: _Settings
    engines: list[_Engine]
    timings: list[_Timing]
    ratios: list[_Ratio]
    ceilings: list[_Ceilings]
    layers: list[_Layers]
    examples: list[_Example]
    left_out: list[str]


def read_results(path: str | Path) -> Results:
    """Read the results of a comparison: the file, or the folder it lies in.

    Raises:
        UserError: there is none, or it is damaged or of another schema.
    """
    path = Path(path)
    if os.path.isdir(path):
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
    remedy = "run `trt-yolov6 compare` again."
    as_record(value, Results, f"{path} is damaged", remedy)
    names = {engine["engine"] for engine in value["engines"]}
    for timing in value["timings"]:
        latency = latency_of(timing)
        if timing["engine"] not in names or not 0 <= latency.low <= latency.value <= latency.high:
            raise UserError(
                f"{path} is damaged: no engine, or no interval, of {timing['engine']!r}; {remedy}"
            )
    return cast(Results, value)  # with the fields that are not declared here


def other_basis(
    data: Mapping[str, Any], settings: Mapping[str, Any], other: Mapping[str, Any]
) -> str | None:
    """Return the first of what an AP depends on that is different in other results, or None.

    It is `annotations_sha256` or `images_sha256` of the data, or one of `THRESHOLDS`.
    """
    for key in ("annotations_sha256", "images_sha256"):
        if data.get(key) != other["data"].get(key):
            return key
    return next(
        (key for key in THRESHOLDS if settings.get(key) != other["settings"].get(key)), None
    )


def latency_of(timing: Mapping[str, Any]) -> Interval:
    """Return a timing's latency and its interval, in milliseconds."""
    latency = timing["latency_ms"]
    low, high = latency["interval"]
    return Interval(float(latency["median"]), float(low), float(high))
