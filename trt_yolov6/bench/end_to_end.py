"""Timing from encoded images in memory to detections, one stage after the other."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trt_yolov6.bench.latency import BenchmarkResult, check_durations, measured
from trt_yolov6.bench.sampling import Watched
from trt_yolov6.common.ranges import of_class
from trt_yolov6.data.images import read_encoded, read_image
from trt_yolov6.data.loader import fill_row
from trt_yolov6.detectors.detections import postprocess
from trt_yolov6.engines.base import Engine, check_batch
from trt_yolov6.errors import UserError
from trt_yolov6.runtime.predict import resolve
from trt_yolov6.spec import NmsSettings, PredictOptions, empty_input

MAX_IMAGES = 256
"""Images held in memory for an end-to-end measurement."""


def benchmark_end_to_end_many(
    engines: Sequence[Engine],
    images: Sequence[Path | bytes],
    options: PredictOptions | None = None,
    *,
    batch: int = 1,
    duration: float = 10.0,
    warm_up: float = 1.0,
    progress: bool = True,
) -> list[BenchmarkResult]:
    """Measure from encoded images in memory to detections, one stage after the other.

    Each run takes the next `batch` images, in turn: decode, letterbox and batch, infer, decode the
    boxes and suppress duplicates. Nothing overlaps, so this is the latency of a single request; a
    pipeline such as `eval` has a higher throughput. Reading from disk is not in it. Several engines
    take turns as in `benchmark_many`, each going through all the images by itself.

    Args:
        engines: loaded engines, at least one.
        images: encoded images, or the files to read them from beforehand; at least one, and the
            first `MAX_IMAGES` are used.
        options: thresholds and border; the defaults are those of evaluation, which keeps many
            boxes.
        batch, duration, warm_up, progress: as in `benchmark_many`.

    Returns:
        One result an engine, in the same order.

    Raises:
        UserError: an image cannot be read, there is none, or as in `benchmark_many`.
    """
    check_durations(duration, warm_up)
    for engine in engines:
        check_batch(engine, batch)
        empty_input(engine.input, batch)  # whether it fits, before images are decoded for it
    encoded = encoded_images(images)
    options = of_class(options, PredictOptions, "predict")
    runs = [_Request(one, encoded, batch, *resolve(one, options)).watched for one in engines]
    return measured(engines, runs, batch, duration, warm_up, progress=progress)


def encoded_images(images: Sequence[Path | bytes]) -> list[bytes]:
    """Return the content of the first `MAX_IMAGES` images.

    Raises:
        UserError: there is none, or one cannot be read, which is named.
    """
    if not images:
        raise UserError("there is no image to time; name a folder of images as `images`.")
    for image in images[:MAX_IMAGES]:
        read_image(image)
    return [read_encoded(image)[0] for image in images[:MAX_IMAGES]]


@dataclass
class _Request:
    """One engine and the images it goes through, a batch a run."""

    engine: Engine
    encoded: Sequence[bytes]
    batch: int
    nms: NmsSettings
    border: int
    position: int = 0

    def __post_init__(self) -> None:
        self.watched = Watched(self.run)

    def run(self) -> float:
        engine, count = self.engine, len(self.encoded)
        chosen = [self.encoded[(self.position + offset) % count] for offset in range(self.batch)]
        self.position = (self.position + self.batch) % count
        times = [time.perf_counter()]
        pictures = [read_image(content) for content in chosen]
        times.append(time.perf_counter())
        inputs = engine.empty_input(len(pictures))
        placed = [
            fill_row(row, picture, engine.input, self.border, engine.preprocessing)
            for row, picture in zip(inputs, pictures, strict=True)
        ]
        times.append(time.perf_counter())
        outputs = engine.start(inputs, self.nms).wait()
        times.append(time.perf_counter())
        postprocess(outputs, engine.output_layout, self.nms, placed)
        times.append(time.perf_counter())
        self.watched.stages.append(tuple(end - start for start, end in itertools.pairwise(times)))
        return times[-1] - times[0]
