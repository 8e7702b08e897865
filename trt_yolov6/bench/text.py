"""The output of `bench`: results as a table, and the slowest layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from trt_yolov6.bench.latency import BenchmarkResult
from trt_yolov6.bench.sampling import random_input
from trt_yolov6.common.machine import Gpu
from trt_yolov6.common.text import counted, fitted, four_digits, joined, of_highest
from trt_yolov6.engines.base import Engine

_TOP_LAYERS = 20


def format_report(results: Sequence[BenchmarkResult], width: int | None = None) -> str:
    """Return the results as text: a line an engine, then how and where it was measured.

    The table has at most `width` columns, if that is not None.
    """
    first = results[0]
    view = (
        "end to end: encoded images in memory to detections, stages one after the other"
        if first.end_to_end
        else "engine alone: resident input, no pre- or post-processing"
    )
    names = [str(result.engine) for result in results]
    for shorter in (
        [result.engine.name for result in results],
        [result.engine.stem for result in results],
    ):
        if len(set(shorter)) == len(names):
            names = shorter
    named = list(zip(names, results, strict=True))
    rows = [("engine", "precision", "median ms", "95 % interval", "mean", "p90", "p99", "FPS")]
    for name, result in named:
        latency = result.latency
        rows.append(
            (
                name,
                result.precision,
                four_digits(latency.median * 1e3) + (" *" if result.disturbed else ""),
                "too few runs"
                if latency.interval is None
                else " .. ".join(four_digits(bound * 1e3) for bound in latency.interval),
                four_digits(latency.mean * 1e3),
                four_digits(latency.p90 * 1e3),
                four_digits(latency.p99 * 1e3),
                four_digits(result.throughput_fps),
            )
        )
    if first.streams > 1:
        view += f"; {first.streams} streams side by side, latencies are of a round"
    lines = [f"batch {first.batch}, {view}", *fitted(rows, 2, width)]
    for name, result in named:
        if result.stages:
            stages = ", ".join(
                f"{stage} {four_digits(time.median * 1e3)}" for stage, time in result.stages.items()
            )
            lines.append(f"{name}: medians of the stages in ms: {stages}")
    if any(result.disturbed for result in results):
        lines.append(
            "* other processes disturbed too many runs: this is not the engine's speed; measure "
            "again on a quiet machine"
        )
    lines += [f"{name}: {_how_measured(result)}" for name, result in named]
    lines += [f"{name}: {result.note}" for name, result in named if result.note]
    lines += dict.fromkeys(_where_measured(result) for result in results)
    lines.append(", ".join(f"{name} {version}" for name, version in first.versions.items()))
    return "\n".join(lines)


def layer_report(engine: Engine, batch: int) -> str:
    """Return the layers of an engine that take longest, as text: share, microseconds, name.

    Raises:
        UserError: the engine cannot time its layers: it is not a TensorRT engine, or it launches
            runs as CUDA graphs.
    """
    times = engine.layer_times(random_input(engine, batch))
    whole = sum(times.values())
    ranked = sorted(times.items(), key=lambda item: item[1], reverse=True)
    how = "one by one" if engine.backend == "onnxruntime" else "one by one, without a CUDA graph"
    lines = [f"{engine.path.name}: {len(times)} layers, {four_digits(whole * 1e3)} ms {how}"]
    lines += [
        f"  {seconds / whole:6.1%}  {four_digits(seconds * 1e6):>8} us  {name}"
        for name, seconds in ranked[:_TOP_LAYERS]
    ]
    if len(ranked) > _TOP_LAYERS:
        rest = sum(seconds for _, seconds in ranked[_TOP_LAYERS:])
        lines.append(f"  {rest / whole:6.1%}  {four_digits(rest * 1e6):>8} us  the other layers")
    return "\n".join(lines)


def _how_measured(result: BenchmarkResult) -> str:
    latency = result.latency
    if latency.interval is None:
        certainty = "too few for an interval of the median: measure for longer"
    else:
        low, high = (100 * (bound / latency.median - 1) for bound in latency.interval)
        certainty = f"median known to {low:+.1f} % .. {high:+.1f} %"
        if result.stopped_by == "time":
            certainty += " when the time was up"
    if not result.disturbed and result.all_runs > result.quiet_runs:
        left_out = result.all_runs - result.quiet_runs
        certainty += f"; {left_out} more, disturbed by other processes, left out"
    drift = ", not yet steady" if result.warm_up.steady is False else ""
    return (
        f"{counted(latency.runs, 'run')}, {certainty}; after {result.warm_up.runs} to warm up "
        f"({result.warm_up.seconds:.1f} s{drift})"
    )


def _where_measured(result: BenchmarkResult) -> str:
    clock = result.cpu_clock
    return joined(
        f"on {result.device}",
        f"{result.backend} {result.backend_version}",
        result.threads and counted(result.threads, "thread"),
        *(_gpu_parts(result.gpu) if result.gpu else ()),
        f"CPU clock {of_highest(clock.mhz, clock.max_mhz)} MHz",
        clock.governor and f"governor {clock.governor}",
    )


def _gpu_parts(gpu: Gpu) -> Iterator[object]:
    yield f"SM clock {of_highest(gpu.sm_mhz, gpu.sm_max_mhz)} MHz"
    yield f"memory clock {of_highest(gpu.memory_mhz, gpu.memory_max_mhz)} MHz"
    yield gpu.power_limit_w is not None and f"power limit {gpu.power_limit_w:.0f} W"
    if gpu.persistence is not None:
        yield f"persistence mode {'on' if gpu.persistence else 'off'}"
    yield from (f"slowed by {reason}" for reason in gpu.slowed_by)
    yield f"driver {gpu.driver or 'unknown'}"
