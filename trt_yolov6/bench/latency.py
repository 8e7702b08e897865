"""Latency and throughput of engines alone, with their uncertainty.

`benchmark_many` measures as the paper does (YOLOv6, arXiv:2209.02976): the engine
alone, warmed up, on input that is resident where the engine reads it, without pre- or
post-processing; `bench.end_to_end` goes from encoded images to detections. Throughput is the batch
size over the median latency of one batch.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trt_yolov6.bench import sampling
from trt_yolov6.common import machine
from trt_yolov6.common.files import sha256_file
from trt_yolov6.common.progress import progress_bar
from trt_yolov6.common.ranges import NotNegative, Positive, fitting
from trt_yolov6.engines.base import Engine, check_batch
from trt_yolov6.spec import EnginePrecision

STAGES = ("decode", "prepare", "infer", "postprocess")
"""Stages of an end-to-end run: JPEG or PNG to pixels; letterbox and batching; the engine, with the
copies to and from it; decoding and NMS to detections."""


@dataclass(frozen=True)
class BenchmarkResult:
    """Latency and throughput of an engine, with the environment."""

    engine: Path
    engine_sha256: str
    model: str
    precision: EnginePrecision
    backend: str
    backend_version: str
    note: str
    """Arithmetic of the engine where it differs from its precision; else empty."""
    device: str
    threads: int | None
    """CPU threads of an ONNX Runtime session, where they were chosen."""
    image_size: tuple[int, int]
    """Height and width in pixels."""
    batch: int
    streams: int
    """Batches that ran side by side; `latency` is then that of a round, one batch on each."""
    end_to_end: bool
    latency: sampling.Latency
    stages: dict[str, sampling.Latency]
    """Latency of each of `STAGES` for a batch; empty unless end to end."""
    all_runs: int
    """Runs that were made."""
    quiet_runs: int
    """Runs that no other process disturbed (see `DISTURBED`); all where that is unknown."""
    disturbed: bool
    """Too few runs were undisturbed: `latency` covers all runs, else the undisturbed ones."""
    waited: float | None
    """Share of all runs' time that threads waited for a processor; None: unknown."""
    stopped_by: sampling.StoppedBy
    """`narrow`: the interval of the median was narrow enough; `time`: the time given was up."""
    warm_up: sampling.WarmUp
    cpu: str
    cpu_clock: machine.CpuClock
    """Read under load, while warming up."""
    gpu: machine.Gpu | None
    """The GPU the engine ran on, its clocks read under load; None on a CPU, or if unknown."""
    versions: dict[str, str]
    date: str
    """End of the measurement, ISO 8601 with the offset from UTC."""

    @property
    def throughput_fps(self) -> float:
        """Images a second: those of a run, or of a round, over the median latency."""
        return self.batch * self.streams / self.latency.median

    def to_json(self) -> dict[str, Any]:
        """Return the result as a flat, JSON-ready dict; times in milliseconds, clocks in MHz."""
        value = dataclasses.asdict(self)
        latency, stages = value.pop("latency"), value.pop("stages")
        interval, runs = latency.pop("interval"), latency.pop("runs")
        value |= {
            "engine": str(self.engine),
            "image_size": list(self.image_size),
            "latency_ms": {
                **{name: _ms(seconds) for name, seconds in latency.items()},
                "median_ci95": interval and [_ms(bound) for bound in interval],
            },
            "throughput_fps": self.throughput_fps,
            "throughput_fps_of_mean": self.batch * self.streams / self.latency.mean,
            "runs": runs,
        }
        if self.end_to_end:
            value["stages_ms"] = {name: _ms(stage["median"]) for name, stage in stages.items()}
        return value


def benchmark_many(
    engines: Sequence[Engine],
    *,
    batch: int = 1,
    streams: int = 1,
    duration: float = 10.0,
    warm_up: float = 1.0,
    progress: bool = True,
) -> list[BenchmarkResult]:
    """Measure the latency of one batch on each engine: the engine alone, on resident input.

    The input is random (uniform, seed 0), the same for all engines of one input shape. Several
    engines take turns of a quarter of a second in rotating order, so that a drift of the clocks
    hits all of them alike.

    Args:
        engines: loaded engines, at least one.
        batch, streams, duration, warm_up, progress: see `api.BenchmarkOptions`.

    Returns:
        One result an engine, in the same order.

    Raises:
        UserError: an engine does not take this batch size, it does not fit in memory, or a duration
            is out of range.
    """
    check_durations(duration, warm_up)
    for engine in engines:
        check_batch(engine, batch)
    runs = [
        sampling.Watched(engine.resident_run(sampling.random_input(engine, batch), streams))
        for engine in engines
    ]
    return measured(engines, runs, batch, duration, warm_up, progress=progress, streams=streams)


def measured(
    engines: Sequence[Engine],
    runs: Sequence[sampling.Watched],
    batch: int,
    duration: float,
    warm_up: float,
    *,
    progress: bool,
    streams: int = 1,
) -> list[BenchmarkResult]:
    """Warm up, and measure runs in turns; the arguments are as for `benchmark_many`."""
    warmed, clocks = [], []
    for run in runs:
        with _clocks_under_load() as reading:
            warmed.append(sampling.warm_up_run(run, warm_up, until=reading.done))
        clocks.append(reading.result())
        run.start()
    whole = duration * len(runs)
    text = "measuring {bar} {n:.0f} of at most {total:.0f} s"
    with progress_bar(whole, bar_format=text, leave=False, shown=progress) as bar:
        _, stopped_by = sampling.sample(
            runs,
            duration=duration,
            advance=lambda passed: bar.update(min(passed, whole - bar.n)),
            uncounted=lambda index: runs[index].forget_last(),
        )
    return [
        _result(engine, batch, run, stopped_by, warm, clock, streams)
        for engine, run, warm, clock in zip(engines, runs, warmed, clocks, strict=True)
    ]


def _result(
    engine: Engine,
    batch: int,
    run: sampling.Watched,
    stopped_by: sampling.StoppedBy,
    warm_up: sampling.WarmUp,
    clocks: tuple[machine.CpuClock, tuple[machine.Gpu, ...]],
    streams: int,
) -> BenchmarkResult:
    manifest = engine.manifest
    cpu_clock, gpus = clocks
    seconds, shares, stages = run.seconds, run.shares, run.stages
    runs = range(len(seconds))
    quiet = [index for index in runs if not shares or shares[index] <= sampling.DISTURBED]
    disturbed = len(quiet) < max(min(sampling.MIN_RUNS, len(seconds)), (len(seconds) + 1) // 2)
    counted = list(runs) if disturbed else quiet
    by_stage = zip(*(stages[index] for index in counted), strict=True) if stages else ()
    return BenchmarkResult(
        engine=engine.path,
        engine_sha256=manifest.plan_sha256 if manifest else sha256_file(engine.path),
        model=manifest.model if manifest else engine.path.stem,
        **engine.described(),
        batch=batch,
        streams=streams,
        end_to_end=bool(stages),
        latency=sampling.summarize([seconds[index] for index in counted]),
        stages=dict(zip(STAGES, map(sampling.summarize, by_stage), strict=False)),
        all_runs=len(seconds),
        quiet_runs=len(quiet),
        disturbed=disturbed,
        waited=float(np.dot(shares, seconds) / sum(seconds)) if shares else None,
        stopped_by=stopped_by,
        warm_up=warm_up,
        cpu=machine.cpu_model(),
        cpu_clock=cpu_clock,
        gpu=_gpu_of(engine.device, gpus),
        versions=machine.software_versions(),
        date=machine.timestamp(),
    )


def _gpu_of(device: str, gpus: Sequence[machine.Gpu]) -> machine.Gpu | None:
    """Return the GPU that an engine's device name means."""
    for gpu in gpus:
        if gpu.name in device:
            return gpu
    return gpus[0] if gpus and device.startswith("GPU 0") else None


@contextmanager
def _clocks_under_load() -> Iterator[Future[tuple[machine.CpuClock, tuple[machine.Gpu, ...]]]]:
    """Read the clocks in another thread while the block, a warm-up, keeps the device busy."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        yield pool.submit(_read_clocks)


def _read_clocks() -> tuple[machine.CpuClock, tuple[machine.Gpu, ...]]:
    time.sleep(sampling.SLICE_SECONDS)  # clocks rise only once there is work
    return machine.read_cpu_clock(), machine.read_gpus()


def _ms(seconds: float) -> float:
    return seconds * 1e3


def check_durations(duration: float, warm_up: float) -> None:
    """Raise UserError unless `duration` is above 0 and `warm_up` is not below, both in seconds."""
    fitting(duration, Positive, "`duration`")
    fitting(warm_up, NotNegative, "`warm_up`")
