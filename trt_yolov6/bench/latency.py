"""Timing of engines: latency and throughput with their uncertainty.

Two views of speed:

- `benchmark` and `benchmark_many` measure as the paper does (YOLOv6, arXiv:2209.02976): the engine
  alone, warmed up, on input that is resident where the engine reads it, without pre- or
  post-processing.
- `benchmark_end_to_end` and `benchmark_end_to_end_many` go from encoded images in memory to
  detections, one stage after the other, and report each stage.

Throughput is the batch size over the median latency of one batch.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trt_yolov6.common.files import sha256_file
from trt_yolov6.common.machine import (
    CpuClock,
    Gpu,
    cpu_model,
    cpu_wait_seconds,
    read_cpu_clock,
    read_gpus,
    software_versions,
    timestamp,
)
from trt_yolov6.engines.base import Engine, check_batch
from trt_yolov6.errors import UserError
from trt_yolov6.spec import NmsSettings, empty_input

CONFIDENCE = 0.95
"""Confidence level of the median's interval."""

NARROW = 0.01
"""Measuring ends early once the interval lies within this fraction of the median, both ways."""

MIN_RUNS = 6
"""Runs from which the median has an interval."""

DISTURBED = 0.01
"""A run is disturbed where the process's threads waited for longer than this share of it."""

BLOCK_SECONDS = 0.001
"""Runs between two looks at the waiting time take this long at least: a look costs 0.1 ms, which is
not in the runs."""

MIN_RUNS_NARROW = 30
"""Runs, and `MIN_SECONDS_NARROW` of measuring, before an interval may end it: looking at it often
and stopping at the first narrow one would otherwise favour intervals narrow by chance."""

MIN_SECONDS_NARROW = 1.0

SEED = 0
"""Seed of the random input."""

MAX_IMAGES = 256
"""Pictures held in memory for an end-to-end measurement."""

_SLICE_SECONDS = 0.25
_STEADY = 0.02
_STEADY_RUNS = 5

Run = Callable[[], float]
"""Runs an engine once and returns the seconds that took."""

StoppedBy = Literal["narrow", "time"]

STAGES = ("decode", "prepare", "infer", "postprocess")
"""Stages of an end-to-end run: JPEG or PNG to pixels; letterbox and batching; the engine, with the
copies to and from it; decoding and NMS to detections."""


@dataclass(frozen=True)
class Latency:
    """Statistics of the time one batch takes. All times in seconds."""

    runs: int
    median: float
    mean: float
    p90: float
    p99: float
    """Percentiles, linearly interpolated; with fewer than 100 runs p99 is nearly the maximum."""
    min: float
    interval: tuple[float, float] | None
    """Confidence interval of the median at `CONFIDENCE`; None where there are too few runs."""

    @property
    def narrow(self) -> bool:
        """True when the interval lies within `NARROW` of the median on both sides."""
        if self.interval is None:
            return False
        low, high = self.interval
        return low >= self.median * (1 - NARROW) and high <= self.median * (1 + NARROW)


@dataclass(frozen=True)
class WarmUp:
    """Warm-up before measuring."""

    runs: int
    seconds: float
    steady: bool | None
    """The last five runs were as fast as the five before, within 2 %; None: there were not ten."""


@dataclass(frozen=True)
class BenchmarkResult:
    """Latency and throughput of an engine, with the environment."""

    engine: Path
    engine_sha256: str
    model: str
    precision: str
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
    latency: Latency
    stages: dict[str, Latency]
    """Latency of each of `STAGES` for a batch; empty unless end to end."""
    all_runs: int
    """Runs that were made."""
    quiet_runs: int
    """Runs that no other process disturbed (see `DISTURBED`); all where that is unknown."""
    disturbed: bool
    """Too few runs were left in peace, so that `latency` is of all; else it is of those alone."""
    waited: float | None
    """Share of all runs' time that threads waited for a processor; None: unknown."""
    stopped_by: StoppedBy
    """`narrow`: the interval of the median was narrow enough; `time`: the time given was up."""
    warm_up: WarmUp
    cpu: str
    cpu_clock: CpuClock
    """Read under load, while warming up."""
    gpu: Gpu | None
    """The GPU the engine ran on, its clocks read under load; None on a CPU, or if unknown."""
    versions: dict[str, str]
    date: str
    """When the measurement ended, ISO 8601 with the offset from UTC."""

    @property
    def throughput_fps(self) -> float:
        """Images a second: those of a run, or of a round, over the median latency."""
        return self.batch * self.streams / self.latency.median

    def to_json(self) -> dict[str, Any]:
        """Return the result as a flat, JSON-ready dict; times in milliseconds, clocks in MHz."""
        low, high = self.latency.interval or (None, None)
        value: dict[str, Any] = {
            "batch": self.batch,
            "latency_ms": {
                "median": _ms(self.latency.median),
                "mean": _ms(self.latency.mean),
                "p90": _ms(self.latency.p90),
                "p99": _ms(self.latency.p99),
                "min": _ms(self.latency.min),
                "median_ci95": None if low is None or high is None else [_ms(low), _ms(high)],
            },
            "throughput_fps": self.throughput_fps,
            "throughput_fps_of_mean": self.batch * self.streams / self.latency.mean,
            "streams": self.streams,
            "runs": self.latency.runs,
            "quiet_runs": self.quiet_runs,
            "disturbed": self.disturbed,
            "waited": self.waited,
            "stopped_by": self.stopped_by,
            "warm_up": dataclasses.asdict(self.warm_up),
            "end_to_end": self.end_to_end,
            "engine": str(self.engine),
            "engine_sha256": self.engine_sha256,
            "model": self.model,
            "image_size": list(self.image_size),
            "precision": self.precision,
            "note": self.note,
            "backend": self.backend,
            "backend_version": self.backend_version,
            "device": self.device,
            "threads": self.threads,
            "cpu": self.cpu,
            "cpu_clock": dataclasses.asdict(self.cpu_clock),
            "gpu": dataclasses.asdict(self.gpu) if self.gpu else None,
            "versions": self.versions,
            "date": self.date,
        }
        if self.end_to_end:
            value["stages_ms"] = {name: _ms(stage.median) for name, stage in self.stages.items()}
        return value


def benchmark(
    engine: Engine,
    *,
    batch: int = 1,
    streams: int = 1,
    duration: float = 10.0,
    warm_up: float = 1.0,
    progress: bool = True,
) -> BenchmarkResult:
    """Measure one engine alone; see `benchmark_many`."""
    return benchmark_many(
        [engine],
        batch=batch,
        streams=streams,
        duration=duration,
        warm_up=warm_up,
        progress=progress,
    )[0]


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
        batch: images a run.
        streams: batches that run side by side on a GPU, each on its own stream; the latency is then
            that of a round, a run on every stream.
        duration: seconds of measuring an engine; a run that was begun is finished. It ends earlier
            once every engine's 95 % confidence interval of the median lies within 1 % of it.
        warm_up: least seconds of unmeasured running an engine; it goes on, up to three times as
            long, until the engine gets no faster.
        progress: show a progress bar, if standard error is a terminal.

    Returns:
        One result an engine, in the same order.

    Raises:
        UserError: an engine does not take this batch size, it does not fit in memory, or a duration
            is out of range.
    """
    _check_durations(duration, warm_up)
    for engine in engines:
        check_batch(engine, batch)
    runs = [
        Watched(engine.resident_run(random_input(engine, batch), streams)) for engine in engines
    ]
    warmed, clocks = _warm_up_each(runs, warm_up)
    for run in runs:
        run.start()
    with _progress_bar(duration * len(runs), progress) as advance:
        _, stopped_by = sample(
            runs,
            duration=duration,
            advance=advance,
            uncounted=lambda index: runs[index].forget_last(),
        )
    return [
        _result(engine, batch, run, (), stopped_by, warm, clock, streams)
        for engine, run, warm, clock in zip(engines, runs, warmed, clocks, strict=True)
    ]


def benchmark_end_to_end(
    engine: Engine,
    images: Sequence[Path | bytes],
    *,
    batch: int = 1,
    duration: float = 10.0,
    warm_up: float = 1.0,
    nms: NmsSettings | None = None,
    progress: bool = True,
) -> BenchmarkResult:
    """Measure one engine from encoded images to detections; see `benchmark_end_to_end_many`."""
    return benchmark_end_to_end_many(
        [engine],
        images,
        batch=batch,
        duration=duration,
        warm_up=warm_up,
        nms=nms,
        progress=progress,
    )[0]


def benchmark_end_to_end_many(
    engines: Sequence[Engine],
    images: Sequence[Path | bytes],
    *,
    batch: int = 1,
    duration: float = 10.0,
    warm_up: float = 1.0,
    nms: NmsSettings | None = None,
    progress: bool = True,
) -> list[BenchmarkResult]:
    """Measure from encoded images in memory to detections, one stage after the other.

    Each run takes the next `batch` images, in turn: decode, letterbox and batch, infer, decode the
    boxes and suppress duplicates. Nothing overlaps, so this is the latency of a single request; a
    pipeline such as `eval` has a higher throughput. Reading from disk is not in it. Several engines
    take turns as in `benchmark_many`, each going through all the images by itself.

    Args:
        engines: loaded engines, at least one.
        images: encoded pictures, or the files to read them from beforehand; at least one, and the
            first `MAX_IMAGES` are used.
        batch: images a run.
        duration: as in `benchmark_many`.
        warm_up: as in `benchmark_many`.
        nms: thresholds; the defaults are those of the COCO evaluation, which keep many boxes.
        progress: show a progress bar, if standard error is a terminal.

    Returns:
        One result an engine, in the same order.

    Raises:
        UserError: an image cannot be read, there is none, or as in `benchmark_many`.
    """
    from trt_yolov6.data.images import read_image

    _check_durations(duration, warm_up)
    for engine in engines:
        check_batch(engine, batch)
        empty_input(engine.input, batch)  # whether it fits, before pictures are decoded for it
    if not images:
        raise UserError("there is no image to time; name a folder of pictures with --source.")
    encoded = [_read_bytes(image) for image in images[:MAX_IMAGES]]
    for image in images[:MAX_IMAGES]:
        read_image(image)  # so that a damaged picture is reported by its name, before timing
    requests = [_Request(engine, encoded, batch, nms or NmsSettings()) for engine in engines]
    runs = [Watched(request.run) for request in requests]
    warmed, clocks = _warm_up_each(runs, warm_up)
    for request, run in zip(requests, runs, strict=True):
        run.start()
        request.stage_seconds.clear()

    def forget(index: int) -> None:
        requests[index].stage_seconds.pop()
        runs[index].forget_last()

    with _progress_bar(duration * len(runs), progress) as advance:
        _, stopped_by = sample(
            runs,
            duration=duration,
            advance=advance,
            uncounted=forget,
        )
    results = []
    for request, run, warm, clock in zip(requests, runs, warmed, clocks, strict=True):
        stages = request.stage_seconds
        results.append(_result(request.engine, batch, run, stages, stopped_by, warm, clock))
    return results


class Watched:
    """A run, with how long the process's threads waited for a processor in it."""

    def __init__(self, run: Run, wait: Callable[[], float | None] | None = None) -> None:
        """Watch a run; `wait` returns the seconds waited so far, or None where unknown."""
        self._run = run
        self._wait = wait or cpu_wait_seconds
        self.start()

    def start(self) -> None:
        """Forget the runs so far."""
        self.seconds: list[float] = []
        self._shares: list[float] = []
        self._block = 0.0
        self._before: float | None = None

    def __call__(self) -> float:
        if not self._block:
            self._before = self._wait()
        taken = self._run()
        self.seconds.append(taken)
        self._block += taken
        if self._block >= BLOCK_SECONDS:
            self._end_block()
        return taken

    def forget_last(self) -> None:
        """Take back the last run."""
        self._end_block()
        self.seconds.pop()
        self._shares = self._shares[: len(self.seconds)]

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of each run that was spent waiting; empty where unknown."""
        self._end_block()
        return tuple(self._shares) if len(self._shares) == len(self.seconds) else ()

    def _end_block(self) -> None:
        count = len(self.seconds) - len(self._shares)
        after = self._wait() if self._block else None
        if self._before is not None and after is not None:
            # Threads that ended took their share of the sum with them.
            self._shares += [max(0.0, after - self._before) / self._block] * count
        self._block = 0.0


@dataclass
class _Request:
    """One engine and the images it goes through, a batch a run."""

    engine: Engine
    encoded: Sequence[bytes]
    batch: int
    nms: NmsSettings
    position: int = 0
    stage_seconds: list[tuple[float, ...]] = dataclasses.field(default_factory=list)
    """Seconds of each of `STAGES`, for each run."""

    def run(self) -> float:
        from trt_yolov6.data.images import read_image
        from trt_yolov6.data.loader import fill_row
        from trt_yolov6.detectors.detections import postprocess

        engine, count = self.engine, len(self.encoded)
        chosen = [self.encoded[(self.position + offset) % count] for offset in range(self.batch)]
        self.position = (self.position + self.batch) % count
        times = [time.perf_counter()]
        pictures = [read_image(content) for content in chosen]
        times.append(time.perf_counter())
        inputs = engine.empty_input(len(pictures))
        placed = [
            fill_row(row, picture, engine.input, preprocessing=engine.preprocessing)
            for row, picture in zip(inputs, pictures, strict=True)
        ]
        times.append(time.perf_counter())
        outputs = engine.start(inputs, self.nms.confidence).wait()
        times.append(time.perf_counter())
        postprocess(outputs, engine.output_layout, self.nms, placed)
        times.append(time.perf_counter())
        self.stage_seconds.append(tuple(end - start for start, end in itertools.pairwise(times)))
        return times[-1] - times[0]


def format_report(results: Sequence[BenchmarkResult]) -> str:
    """Return the results as text for a terminal: a line an engine, then where it was measured."""
    first = results[0]
    view = (
        "end to end: encoded images in memory to detections, stages one after the other"
        if first.end_to_end
        else "engine alone: resident input, no pre- or post-processing"
    )
    rows = [("engine", "precision", "median ms", "95 % interval", "mean", "p90", "p99", "FPS")]
    for result in results:
        latency = result.latency
        rows.append(
            (
                result.engine.name,
                result.precision,
                _number(latency.median * 1e3) + (" *" if result.disturbed else ""),
                "too few runs"
                if latency.interval is None
                else " .. ".join(_number(bound * 1e3) for bound in latency.interval),
                _number(latency.mean * 1e3),
                _number(latency.p90 * 1e3),
                _number(latency.p99 * 1e3),
                _number(result.throughput_fps),
            )
        )
    if first.streams > 1:
        view += f"; {first.streams} streams side by side, latencies are of a round"
    lines = [f"batch {first.batch}, {view}", *_table(rows)]
    for result in results:
        if result.stages:
            stages = ", ".join(
                f"{name} {_number(stage.median * 1e3)}" for name, stage in result.stages.items()
            )
            lines.append(f"  of these, medians in ms: {stages}")
    if any(result.disturbed for result in results):
        lines.append(
            "* other processes disturbed nearly all runs: this is not the engine's speed; measure "
            "again on a quiet machine"
        )
    lines += [f"{result.engine.name}: {_how_measured(result)}" for result in results]
    lines += [f"{result.engine.name}: {result.note}" for result in results if result.note]
    lines += dict.fromkeys(_where_measured(result) for result in results)
    lines.append(", ".join(f"{name} {version}" for name, version in first.versions.items()))
    return "\n".join(lines)


def layer_report(engine: Engine, batch: int, top: int = 20) -> str:
    """Return the layers of an engine that take longest, as text: share, microseconds, name.

    Raises:
        UserError: the engine cannot time its layers: it is none of TensorRT's, or it launches runs
            as CUDA graphs.
    """
    times = engine.layer_times(random_input(engine, batch))
    whole = sum(times.values())
    ranked = sorted(times.items(), key=lambda item: item[1], reverse=True)
    lines = [f"{engine.path.name}: {len(times)} layers, {_number(whole * 1e3)} ms one by one"]
    lines += [
        f"  {seconds / whole:6.1%}  {_number(seconds * 1e6):>8} us  {name}"
        for name, seconds in ranked[:top]
    ]
    if len(ranked) > top:
        rest = sum(seconds for _, seconds in ranked[top:])
        lines.append(f"  {rest / whole:6.1%}  {_number(rest * 1e6):>8} us  the other layers")
    return "\n".join(lines)


def summarize(seconds: Sequence[float]) -> Latency:
    """Return the statistics of a sample of run times.

    Args:
        seconds: one time a run, at least one.
    """
    values = np.sort(np.asarray(seconds, dtype=np.float64))
    ranks = median_interval_ranks(len(values))
    p90, p99 = np.percentile(values, (90, 99))
    return Latency(
        runs=len(values),
        median=float(np.median(values)),
        mean=float(values.mean()),
        p90=float(p90),
        p99=float(p99),
        min=float(values[0]),
        interval=None if ranks is None else (float(values[ranks[0]]), float(values[ranks[1]])),
    )


def median_interval_ranks(runs: int, confidence: float = CONFIDENCE) -> tuple[int, int] | None:
    """Return which order statistics bound the median, whatever the distribution.

    The number of runs below the true median is binomial with probability one half, so the interval
    from the k-th smallest to the k-th largest value covers it with probability
    1 - 2 P(B(runs, 1/2) < k). The largest k that keeps this at or above `confidence` is taken
    (Conover, Practical Nonparametric Statistics, Section 3.2). Runs are assumed independent.

    Args:
        runs: size of the sample.
        confidence: in 0..1.

    Returns:
        Zero-based ranks of both ends in the sorted sample, or None where even its extremes do not
        reach `confidence`, which for 95 % is below 6 runs.
    """
    # Beyond twelve standard deviations from the mean the binomial's tail is below 1e-30.
    start = max(0, math.floor(runs / 2 - 6 * math.sqrt(runs)))
    below = 0.0
    k = start
    while k <= runs // 2:
        below += math.exp(
            math.lgamma(runs + 1)
            - math.lgamma(k + 1)
            - math.lgamma(runs - k + 1)
            - runs * math.log(2)
        )
        if 2 * below > 1 - confidence:
            break
        k += 1
    return None if k == 0 else (k - 1, runs - k)


def warm_up_run(
    run: Run,
    seconds: float,
    *,
    until: Callable[[], bool] = lambda: True,
    clock: Callable[[], float] = time.perf_counter,
) -> WarmUp:
    """Run until the engine is warm: for some time, and until it gets no faster or slower.

    Args:
        run: the engine.
        seconds: least time; three times as long is the most, but two runs are made in any case.
        until: must also be true before this ends (within the most time).
        clock: the time in seconds.
    """
    start = clock()
    times: list[float] = []
    while True:
        times.append(run())
        elapsed = clock() - start
        recent, before = times[-_STEADY_RUNS:], times[-2 * _STEADY_RUNS : -_STEADY_RUNS]
        steady = None
        if len(before) == _STEADY_RUNS:
            steady = abs(float(np.median(recent)) / float(np.median(before)) - 1) <= _STEADY
        if elapsed >= seconds and (
            (steady and until()) or (elapsed >= 3 * seconds and len(times) >= 2)
        ):
            return WarmUp(len(times), elapsed, steady)


def sample(
    runs: Sequence[Run],
    *,
    duration: float,
    advance: Callable[[float], None] = lambda seconds: None,
    uncounted: Callable[[int], object] = lambda index: None,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[list[list[float]], StoppedBy]:
    """Run each engine again and again, in turns, until all medians are known well or time is up.

    Args:
        runs: the engines.
        duration: seconds for each of them.
        advance: called with the seconds passed since its last call.
        uncounted: called with an engine's index after a run of it whose time is not kept.
        clock: the time in seconds.

    Returns:
        Each engine's run times in seconds, at least one, and what ended it.
    """
    times: list[list[float]] = [[] for _ in runs]
    start = last = clock()
    for turn in itertools.count():
        for offset in range(len(runs)):
            index = (turn + offset) % len(runs)
            if len(runs) > 1 and _shorter_than_a_slice(times[index]):
                runs[index]()  # not counted: it refills the caches that the others took
                uncounted(index)
            slice_start = clock()
            while True:
                times[index].append(runs[index]())
                if clock() - slice_start >= _SLICE_SECONDS:
                    break
        now = clock()
        advance(now - last)
        last = now
        elapsed = (now - start) / len(runs)
        fewest = min(map(len, times))
        if elapsed >= duration:
            return times, "time"
        if (
            fewest >= MIN_RUNS_NARROW
            and elapsed >= MIN_SECONDS_NARROW
            and all(summarize(seconds).narrow for seconds in times)
        ):
            return times, "narrow"
    raise AssertionError("unreachable: itertools.count never ends")


def random_input(engine: Engine, batch: int) -> NDArray[Any]:
    """Return a batch of random images of the shape and dtype the engine takes, the same each time.

    float32 in 0..1, or uint8 in 0..255.

    Raises:
        UserError: it does not fit in memory.
    """

    generator = np.random.default_rng(SEED)
    images = empty_input(engine.input, batch)
    if engine.input.dtype == np.uint8:
        return generator.integers(0, 256, images.shape, dtype=np.uint8)
    return generator.random(dtype=np.float32, out=images)


def _result(
    engine: Engine,
    batch: int,
    run: Watched,
    stages: Sequence[tuple[float, ...]],
    stopped_by: StoppedBy,
    warm_up: WarmUp,
    clocks: tuple[CpuClock, tuple[Gpu, ...]],
    streams: int = 1,
) -> BenchmarkResult:
    manifest = engine.manifest
    cpu_clock, gpus = clocks
    seconds, shares = run.seconds, run.shares
    runs = range(len(seconds))
    quiet = [index for index in runs if not shares or shares[index] <= DISTURBED]
    disturbed = len(quiet) < max(min(MIN_RUNS, len(seconds)), (len(seconds) + 1) // 2)
    counted = list(runs) if disturbed else quiet
    by_stage = zip(*(stages[index] for index in counted), strict=True) if stages else ()
    return BenchmarkResult(
        engine=engine.path,
        engine_sha256=manifest.plan_sha256 if manifest else sha256_file(engine.path),
        model=manifest.model if manifest else engine.path.stem,
        precision=engine.precision,
        backend=engine.backend,
        backend_version=engine.backend_version,
        device=engine.device,
        threads=engine.threads,
        note=engine.note,
        image_size=engine.image_size,
        batch=batch,
        streams=streams,
        end_to_end=bool(stages),
        latency=summarize([seconds[index] for index in counted]),
        stages=dict(zip(STAGES, map(summarize, by_stage), strict=False)),
        all_runs=len(seconds),
        quiet_runs=len(quiet),
        disturbed=disturbed,
        waited=float(np.dot(shares, seconds) / sum(seconds)) if shares else None,
        stopped_by=stopped_by,
        warm_up=warm_up,
        cpu=cpu_model(),
        cpu_clock=cpu_clock,
        gpu=_gpu_of(engine.device, gpus),
        versions=software_versions(),
        date=timestamp(),
    )


def _gpu_of(device: str, gpus: Sequence[Gpu]) -> Gpu | None:
    """Return the GPU that an engine's device name means."""
    for gpu in gpus:
        if gpu.name in device:
            return gpu
    return gpus[0] if gpus and device.startswith("GPU 0") else None


def _warm_up_each(
    runs: Sequence[Run], seconds: float
) -> tuple[list[WarmUp], list[tuple[CpuClock, tuple[Gpu, ...]]]]:
    """Warm up one engine after the other, and read the clocks meanwhile."""
    warmed, clocks = [], []
    for run in runs:
        with _clocks_under_load() as reading:
            warmed.append(warm_up_run(run, seconds, until=reading.done))
        clocks.append(reading.result())
    return warmed, clocks


@contextmanager
def _clocks_under_load() -> Iterator[Future[tuple[CpuClock, tuple[Gpu, ...]]]]:
    """Read the clocks in another thread while the block, a warm-up, keeps the device busy."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        yield pool.submit(_read_clocks)


def _read_clocks() -> tuple[CpuClock, tuple[Gpu, ...]]:
    time.sleep(_SLICE_SECONDS)  # clocks rise only once there is work
    return read_cpu_clock(), read_gpus()


@contextmanager
def _progress_bar(seconds: float, shown: bool) -> Iterator[Callable[[float], None]]:
    from tqdm import tqdm

    bar_format = "measuring {bar} {n:.0f} of at most {total:.0f} s"
    with tqdm(
        total=seconds, bar_format=bar_format, leave=False, disable=None if shown else True
    ) as bar:

        def advance(passed: float) -> None:
            bar.update(min(passed, seconds - bar.n))

        yield advance


def _how_measured(result: BenchmarkResult) -> str:
    latency = result.latency
    if latency.interval is None:
        certainty = "too few for an interval of the median: give a longer --duration"
    else:
        low, high = (100 * (bound / latency.median - 1) for bound in latency.interval)
        certainty = f"median known to {low:+.1f} % .. {high:+.1f} %"
        if result.stopped_by == "time":
            certainty += " when the time was up"
    if not result.disturbed and result.all_runs > result.quiet_runs:
        left_out = result.all_runs - result.quiet_runs
        certainty += f"; {left_out} more were disturbed by other processes and left out"
    drift = ", not yet steady" if result.warm_up.steady is False else ""
    return (
        f"{latency.runs} runs, {certainty}; after {result.warm_up.runs} to warm up "
        f"({result.warm_up.seconds:.1f} s{drift})"
    )


def _where_measured(result: BenchmarkResult) -> str:
    parts = [f"on {result.device}", f"{result.backend} {result.backend_version}"]
    if result.threads:
        parts.append(f"{result.threads} thread{'s' if result.threads > 1 else ''}")
    gpu = result.gpu
    if gpu is not None:
        parts.append(f"SM clock {_of(gpu.sm_mhz, gpu.sm_max_mhz)} MHz")
        parts.append(f"memory clock {_of(gpu.memory_mhz, gpu.memory_max_mhz)} MHz")
        if gpu.power_limit_w is not None:
            parts.append(f"power limit {gpu.power_limit_w:.0f} W")
        if gpu.persistence is not None:
            parts.append(f"persistence mode {'on' if gpu.persistence else 'off'}")
        parts += [f"slowed by {reason}" for reason in gpu.slowed_by]
        parts.append(f"driver {gpu.driver or 'unknown'}")
    clock = result.cpu_clock
    parts.append(f"CPU clock {_of(clock.mhz, clock.max_mhz)} MHz")
    if clock.governor:
        parts.append(f"governor {clock.governor}")
    return ", ".join(parts)


def _of(now: float | None, highest: float | None) -> str:
    text = "unknown" if now is None else f"{now:.0f}"
    return text if highest is None else f"{text} of {highest:.0f}"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align columns: the first two to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if index < 2 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _number(value: float) -> str:
    """Return a positive number with four significant digits, without an exponent."""
    if value <= 0:
        return "0"
    return f"{value:.{max(0, 3 - math.floor(math.log10(value)))}f}"


def _ms(seconds: float) -> float:
    return seconds * 1e3


def _shorter_than_a_slice(times: Sequence[float]) -> bool:
    return bool(times) and times[-1] < _SLICE_SECONDS


def _check_durations(duration: float, warm_up: float) -> None:
    if not 0 < duration < math.inf:
        raise UserError(f"--duration {duration} is out of range; give seconds above 0.")
    if not 0 <= warm_up < math.inf:
        raise UserError(f"a warm-up of {warm_up} s is out of range; give 0 seconds or more.")


def _read_bytes(image: Path | bytes) -> bytes:
    if isinstance(image, bytes):
        return image
    try:
        return image.read_bytes()
    except OSError as error:
        raise UserError(f"{image} cannot be read ({error.strerror}); check the path.") from error
