"""Sampling of run times: warm-up, turns between engines, when to stop, and statistics."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trt_yolov6.common.machine import cpu_wait_seconds
from trt_yolov6.engines.base import Engine
from trt_yolov6.spec import empty_input

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

SLICE_SECONDS = 0.25
WARM_UP_SECONDS = 0.3
_STEADY = 0.02
_STEADY_RUNS = 5

Run = Callable[[], float]
"""Runs an engine once and returns the seconds that took."""

StoppedBy = Literal["narrow", "time"]


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
        self.stages: list[tuple[float, ...]] = []
        """Seconds of each stage of each run, where the run itself notes them here."""
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
        del self.stages[len(self.seconds) :]
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


def median_interval_ranks(runs: int) -> tuple[int, int] | None:
    """Return which order statistics bound the median, whatever the distribution.

    The number of runs below the true median is binomial with probability one half, so the interval
    from the k-th smallest to the k-th largest value covers it with probability
    1 - 2 P(B(runs, 1/2) < k). The largest k that keeps this at or above `CONFIDENCE` is taken
    (Conover, Practical Nonparametric Statistics, Section 3.2). Runs are assumed independent.

    Returns:
        Zero-based ranks of both ends in the sorted sample, or None where even its extremes do not
        reach it, which is below 6 runs.
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
        if 2 * below > 1 - CONFIDENCE:
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
    turn = 0
    while True:
        for offset in range(len(runs)):
            index = (turn + offset) % len(runs)
            taken = times[index]
            if len(runs) > 1 and taken and taken[-1] < SLICE_SECONDS:
                runs[index]()  # not counted: it refills the caches that the others took
                uncounted(index)
            slice_start = clock()
            while True:
                times[index].append(runs[index]())
                if clock() - slice_start >= SLICE_SECONDS:
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
        turn += 1


def in_turns(runs: Sequence[Run], seconds: float) -> list[list[float]]:
    """Warm up, then return the times of runs that take turns, see `sample`; `seconds` for each."""
    for run in runs:
        warm_up_run(run, WARM_UP_SECONDS)
    return sample(runs, duration=seconds)[0]


def timed(run: Run, seconds: float) -> list[float]:
    """Return the times of runs made one after the other for some seconds, one at least."""
    found: list[float] = []
    start = time.perf_counter()
    while not found or time.perf_counter() - start < seconds:
        found.append(run())
    return found


def seconds_of(work: Callable[[], object]) -> float:
    """Do a piece of work once and return the seconds that took; with `partial`, a `Run` of it."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def rate(step: Callable[[], int], seconds: float, least: int = 1) -> float:
    """Return how many items a second are done, over some seconds.

    Args:
        step: does some and returns how many.
        seconds: how long; a step that was begun is finished.
        least: steps to be done in any case.
    """
    steps = done = 0
    start = time.perf_counter()
    while steps < least or time.perf_counter() - start < seconds:
        done += step()
        steps += 1
    return done / (time.perf_counter() - start)


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
