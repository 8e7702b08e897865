"""Latency in rounds: in each, every engine is loaded again and timed for a while.

Other processes slow down some runs. Linux reports how long this process's threads waited for a
processor (`machine.cpu_wait_seconds`), so disturbed runs are excluded. If too few others remain,
all count, and the interval reaches down to what the engine may take without the wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trt_yolov6.bench.sampling import DISTURBED, Latency, Run, Watched, random_input, summarize
from trt_yolov6.common.machine import cpu_wait_seconds, timestamp
from trt_yolov6.common.statistics import Interval, prediction_interval
from trt_yolov6.engines.base import Engine, check_batch

FEWEST_ROUNDS = 3
"""Rounds with undisturbed runs, and half of all, before only these count."""

CPU_DRIFT, GPU_DRIFT = 0.05, 0.01
"""Least relative half width of a latency's interval, for what a run of a minute may not see: on a
virtual machine whose host others use, too, the sample took 49.3 ms in some minutes and 53.9 ms in
others, with nothing else running and the clock the same. That of GPUs is a guess so far."""

_PATIENCE = 2.0
"""Factor by which a round without an undisturbed run is extended at most."""

_UNCOUNTED = 2
"""Runs after loading that are not counted: the first allocates, the second fills caches."""

Load = Callable[[], Engine]


@dataclass(frozen=True)
class Round:
    """One turn of one engine. All times in seconds."""

    seconds: tuple[float, ...]
    """Seconds of each run, at least one."""
    waited: tuple[float, ...]
    """Share of each run that threads waited for a processor; empty: unknown."""
    date: str
    """End of the round, ISO 8601 with the offset from UTC."""

    @property
    def quiet(self) -> tuple[float, ...]:
        """The times of undisturbed runs; of all runs where waiting is unknown."""
        if not self.waited:
            return self.seconds
        return tuple(
            seconds
            for seconds, waited in zip(self.seconds, self.waited, strict=True)
            if waited <= DISTURBED
        )

    def to_json(self) -> dict[str, Any]:
        """Return it JSON-ready, times to 0.1 microseconds."""
        return {
            "seconds": [round(value, 7) for value in self.seconds],
            "waited": [round(value, 4) for value in self.waited],
            "date": self.date,
        }


@dataclass(frozen=True)
class RoundsSummary:
    """Latency of one engine over its rounds. All times in seconds."""

    latency: Interval
    """Median over the rounds, and the prediction interval of one more round."""
    rounds: tuple[float, ...]
    """The median of each round that counts."""
    counted: Latency
    """Statistics of the runs that count."""
    runs: int
    """Runs in all."""
    quiet_runs: int
    """Runs that were not disturbed."""
    disturbed: bool
    """Too few runs were undisturbed: the statistics cover all."""
    waited: float | None
    """Share of the runs' time that threads waited for a processor; None: unknown."""


def measure_round(load: Load, batch: int, seconds: float) -> Round:
    """Load an engine, run it for some seconds on resident random input, and close it.

    It takes up to twice as long where all runs were disturbed.

    Raises:
        UserError: the engine cannot be loaded, or does not take this batch.
    """
    with load() as engine:
        check_batch(engine, batch)
        run = engine.resident_run(random_input(engine, batch))
        for _ in range(_UNCOUNTED):
            if run() > seconds:
                break  # as slow as a whole round: one is enough
        return sample_round(run, seconds)


def sample_round(
    run: Run,
    seconds: float,
    *,
    wait: Callable[[], float | None] = cpu_wait_seconds,
    clock: Callable[[], float] = time.perf_counter,
) -> Round:
    """Time the runs of an engine for some seconds, and how much each was disturbed.

    `wait` returns the seconds that the process has waited for a processor so far, or None.
    """
    watched = Watched(run, wait)
    start = clock()
    while True:
        watched()
        elapsed = clock() - start
        if elapsed >= seconds:
            shares = watched.shares
            has_quiet_run = not shares or min(shares) <= DISTURBED
            if has_quiet_run or elapsed >= _PATIENCE * seconds:
                return Round(tuple(watched.seconds), shares, timestamp())


def counted_rounds(rounds: Sequence[Round]) -> tuple[list[tuple[float, ...]], bool]:
    """Return the times that count, by round, and whether they include disturbed runs.

    Otherwise a round without an undisturbed run has no times.
    """
    quiet = [one.quiet for one in rounds]
    if sum(map(bool, quiet)) >= _enough(len(rounds)):
        return quiet, False
    return [one.seconds for one in rounds], True


def summarize_rounds(rounds: Sequence[Round], drift: float = CPU_DRIFT) -> RoundsSummary:
    """Summarize the rounds of one engine.

    Args:
        rounds: two at least.
        drift: least relative half width of the interval.
    """
    counted, disturbed = counted_rounds(rounds)
    medians = tuple(float(np.median(times)) for times in counted if times)
    latency = prediction_interval(medians, drift)
    every = np.concatenate([one.seconds for one in rounds])
    known = all(one.waited for one in rounds)
    shares = np.concatenate([one.waited for one in rounds]) if known else None
    if disturbed and shares is not None:
        # No run lost more than the sum of its threads' waiting.
        least = float(np.min(every * np.maximum(0.0, 1 - shares)))
        latency = Interval(latency.value, min(latency.low, least), latency.high)
    return RoundsSummary(
        latency=latency,
        rounds=medians,
        counted=summarize([seconds for times in counted for seconds in times]),
        runs=len(every),
        quiet_runs=sum(len(one.quiet) for one in rounds),
        disturbed=disturbed,
        waited=None if shares is None else float((shares * every).sum() / every.sum()),
    )


def paired_medians(
    rounds: Sequence[Round], base: Sequence[Round]
) -> tuple[list[float], list[float]]:
    """Return the medians of two engines in the rounds in which both have undisturbed runs.

    If these are too few, all runs of both count, so undisturbed runs are never compared with
    disturbed ones.
    """
    quiet = [(one.quiet, other.quiet) for one, other in zip(rounds, base, strict=True)]
    pairs = [(mine, theirs) for mine, theirs in quiet if mine and theirs]
    if len(pairs) < _enough(len(rounds)):
        pairs = [(one.seconds, other.seconds) for one, other in zip(rounds, base, strict=True)]
    return (
        [float(np.median(mine)) for mine, _ in pairs],
        [float(np.median(theirs)) for _, theirs in pairs],
    )


def _enough(rounds: int) -> int:
    """Return the number of rounds with undisturbed runs required to exclude disturbed ones."""
    return max(FEWEST_ROUNDS, (rounds + 1) // 2)
