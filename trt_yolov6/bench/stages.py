"""Time from JPEG files to boxes: each stage alone, what overlaps, and the whole.

Stages of one place run one after the other; places run side by side, so that the whole can be as
fast as the slowest place.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trt_yolov6.bench.end_to_end import encoded_images
from trt_yolov6.bench.latency import check_durations
from trt_yolov6.bench.sampling import random_input, rate, seconds_of, timed
from trt_yolov6.common.text import aligned, four_digits
from trt_yolov6.data.images import read_image
from trt_yolov6.data.jpeg import open_image
from trt_yolov6.data.loader import default_workers, fill_row
from trt_yolov6.detectors.detections import postprocess
from trt_yolov6.engines.base import Engine, check_batch
from trt_yolov6.runtime.gpu_loading import Opened, load_images
from trt_yolov6.runtime.predict import process, resolve
from trt_yolov6.spec import EnginePrecision, NmsSettings, PredictOptions


@dataclass(frozen=True)
class Stage:
    """One stage of the way, alone."""

    name: str
    place: str
    """Processor or threads that work on it; stages of different places overlap."""
    seconds: float
    """Median of a batch."""


@dataclass(frozen=True)
class Together:
    """All stages of a pipeline at work, side by side."""

    fps: float
    """Images a second."""
    cores: float
    """CPU cores that were busy meanwhile."""
    boxes: float
    """Boxes an image that were found."""


@dataclass(frozen=True)
class StageReport:
    """The stages of one engine, and all of them together."""

    engine: Path
    precision: EnginePrecision
    backend: str
    device: str
    batch: int
    confidence: float
    stages: tuple[Stage, ...]
    together: Together

    @property
    def places(self) -> dict[str, float]:
        """Images a second that each place allows, by its name."""
        names = dict.fromkeys(stage.place for stage in self.stages)
        return {
            name: self.batch / sum(stage.seconds for stage in self.stages if stage.place == name)
            for name in names
        }

    @property
    def limit(self) -> tuple[str, float]:
        """The slowest place, and the images a second that it allows."""
        return min(self.places.items(), key=lambda item: item[1])

    def to_json(self) -> dict[str, Any]:
        """Return a dictionary, ready for `json.dumps`; times in milliseconds a batch."""
        place, fps = self.limit
        return {
            "engine": self.engine.name,
            "precision": self.precision,
            "backend": self.backend,
            "device": self.device,
            "batch": self.batch,
            "confidence": self.confidence,
            "stages": [
                {
                    "name": stage.name,
                    "place": stage.place,
                    "ms": stage.seconds * 1e3,
                    "fps": self.batch / stage.seconds,
                }
                for stage in self.stages
            ],
            "fps": self.together.fps,
            "slowest_place": place,
            "slowest_place_fps": fps,
            "to_slowest_place": self.together.fps / fps,
            "cores": self.together.cores,
            "boxes_per_image": self.together.boxes,
        }


def benchmark_stages(
    engine: Engine,
    images: Sequence[Path | bytes],
    options: PredictOptions | None = None,
    *,
    batch: int,
    duration: float = 10.0,
) -> StageReport:
    """Measure each stage from encoded images in memory to detections, and all of them together.

    On an engine that takes images (`Engine.takes_images`) the letterbox and the suppression are
    timed on the GPU, and decoding too where nvImageCodec is installed.

    Args:
        engine: any loaded engine.
        images: encoded images, or the files to read them from beforehand; the first `MAX_IMAGES`.
        options: thresholds and border; default thresholds: those of the COCO evaluation, which keep
            many boxes.
        batch: images a run.
        duration: seconds in all, a third of it for the whole.

    Raises:
        UserError: an image cannot be read, there is none, or the engine takes no such batch.
    """
    check_durations(duration, 0)
    check_batch(engine, batch)
    encoded = encoded_images(images)
    chosen = [encoded[index % len(encoded)] for index in range(batch)]
    options = replace(options or PredictOptions(), batch=batch)
    nms, border = resolve(engine, options)
    measure = _stages_on_gpu if engine.takes_images() else _stages_here
    with contextlib.ExitStack() as stack:
        stages = tuple(measure(engine, chosen, nms, border, duration / 8, stack))
    return StageReport(
        engine.path,
        engine.precision,
        engine.backend,
        engine.device,
        batch,
        nms.confidence,
        stages,
        benchmark_together(engine, encoded, options, duration / 3),
    )


def benchmark_together(
    engine: Engine,
    items: Sequence[Any],
    options: PredictOptions,
    seconds: float,
    *,
    read: Callable[[Any], NDArray[np.uint8]] = read_image,
    open_item: Callable[[Any], Opened] | None = open_image,
    in_memory: bool = False,
) -> Together:
    """Measure `runtime.predict.process` over images that come again and again.

    Args:
        engine: any loaded engine.
        items: what `read` and `open_item` take; by default files, or their content.
        options: thresholds, and images a batch.
        seconds: how long, after six batches.
        read, open_item, in_memory: as in `process`.

    Raises:
        UserError: as `process`.
    """
    steps = process(
        engine,
        itertools.cycle(items),
        read,
        lambda _, found: [len(one) for one in found],
        options,
        open_item=open_item,
        in_memory=in_memory,
    )
    with contextlib.closing(steps):
        for _ in range(6):  # the first is checked, the second recorded as a graph
            next(steps)
        images = boxes = 0

        def step() -> int:
            nonlocal images, boxes
            counts = next(steps).result
            images += len(counts)
            boxes += sum(counts)
            return len(counts)

        used = time.process_time()
        fps = rate(step, seconds)
        cores = (time.process_time() - used) * fps / images
    return Together(fps, cores, boxes / images)


def format_stages(report: StageReport) -> str:
    """Return a report as text for a terminal."""
    rows = [("stage", "place", "ms a batch", "images/s alone")]
    for stage in report.stages:
        times = four_digits(stage.seconds * 1e3), four_digits(report.batch / stage.seconds)
        rows.append((stage.name, stage.place, *times))
    (place, fps), together = report.limit, report.together
    return "\n".join(
        [
            f"{report.engine.name} ({report.precision}, {report.backend}) on {report.device}, "
            f"batch {report.batch}, confidence {report.confidence:g}: "
            f"{four_digits(together.boxes)} boxes an image",
            *aligned(rows, left=2),
            f"all together: {four_digits(together.fps)} images/s, {together.fps / fps:.0%} of what "
            f"the slowest place, {place}, allows ({four_digits(fps)}), with "
            f"{four_digits(together.cores)} cores busy",
            "places work side by side; the stages of one place follow one another",
        ]
    )


def _stages_here(
    engine: Engine,
    chosen: Sequence[bytes],
    nms: NmsSettings,
    border: int,
    seconds: float,
    stack: contextlib.ExitStack,
) -> Iterator[Stage]:
    workers = default_workers()
    threads = stack.enter_context(ThreadPoolExecutor(workers))
    place = f"CPU, {workers} threads"
    pictures = [read_image(content) for content in chosen]
    array = engine.empty_input(len(chosen))

    def fill(index: int) -> Any:
        return fill_row(array[index], pictures[index], engine.input, border, engine.preprocessing)

    def decode() -> None:
        list(threads.map(read_image, chosen))

    def letterbox() -> list[Any]:
        return list(threads.map(fill, range(len(chosen))))

    yield Stage("decode", place, _median(decode, seconds))
    yield Stage("letterbox", place, _median(letterbox, seconds))
    placed = letterbox()
    own = engine.resident_run(random_input(engine, len(chosen)))
    own()
    yield Stage("engine", engine.device, float(np.median(timed(own, seconds))))
    outputs = engine.start(array, nms).wait()
    suppress = functools.partial(
        postprocess, outputs, engine.output_layout, nms, placed, executor=threads
    )
    yield Stage("suppression", "post-processing threads", _median(suppress, seconds))


def _stages_on_gpu(
    engine: Engine,
    chosen: Sequence[bytes],
    nms: NmsSettings,
    border: int,
    seconds: float,
    stack: contextlib.ExitStack,
) -> Iterator[Stage]:
    batch = len(chosen)
    batches = load_images(engine, itertools.cycle(chosen), open_image, batch=batch, border=border)
    stack.enter_context(contextlib.closing(batches))
    has_decoder = engine.jpeg_decoder() is not None

    def load() -> Any:
        loaded = next(batches)
        if loaded.ready is not None:
            loaded.ready.wait()
        loaded.give_back()
        return loaded

    for _ in range(4):
        loaded = load()
    where = "GPU's decoder" if has_decoder else f"CPU, {default_workers()} threads"
    yield Stage("read and decode", where, float(np.mean(_times(load, seconds))))
    loaded = load()
    placed = loaded.batch.letterboxes
    for name, time_of_it in engine.image_stage_seconds(loaded.images, placed, nms).items():
        yield Stage(name, engine.device, time_of_it)
    outputs = engine.start_images(loaded.images, placed, nms, clip=True).wait()
    finish = functools.partial(postprocess, outputs, engine.output_layout, nms, placed)
    yield Stage("boxes to the images", "post-processing thread", _median(finish, seconds))


def _median(work: Callable[[], object], seconds: float) -> float:
    return float(np.median(_times(work, seconds)))


def _times(work: Callable[[], object], seconds: float) -> list[float]:
    """Return the seconds of each run, after one that is not counted."""
    work()
    return timed(functools.partial(seconds_of, work), seconds)
