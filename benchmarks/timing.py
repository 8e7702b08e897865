"""Runs timed in turns, for the benchmarks that time more than an engine alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence


def interleaved(runs: Sequence[Callable[[], float]], seconds: float) -> list[list[float]]:
    """Time runs in turns of a tenth of a second, after a warm-up; `seconds` for each."""
    for run in runs:
        timed(run, 0.3)
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(max(2, round(seconds / 0.1))):
        for offset in range(len(runs)):
            index = (turn + offset) % len(runs)
            times[index] += timed(runs[index], 0.1)
    return times


def timed(run: Callable[[], float], seconds: float) -> list[float]:
    """Return the times of runs made one after the other for some seconds."""
    found: list[float] = []
    start = time.perf_counter()
    while not found or time.perf_counter() - start < seconds:
        found.append(run())
    return found
