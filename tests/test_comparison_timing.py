"""Rounds on a made-up clock, where it is known which runs other processes disturbed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from trt_yolov6.bench.sampling import DISTURBED
from trt_yolov6.common.machine import cpu_wait_seconds
from trt_yolov6.common.records import as_record
from trt_yolov6.comparison.rounds import (
    Round,
    counted_rounds,
    paired_medians,
    sample_round,
    summarize_rounds,
)


class SharedMachine:
    """A clock, an engine that takes 10 ms undisturbed, and other load on its processor."""

    def __init__(self, lost: Callable[[int], float]) -> None:
        self.now = 0.0
        self.waited = 0.0
        self.runs = 0
        self._lost = lost

    def run(self) -> float:
        lost = self._lost(self.runs)
        self.runs += 1
        self.now += 0.010 + lost
        self.waited += lost
        return 0.010 + lost

    def measure(self, seconds: float = 0.2) -> Round:
        return sample_round(self.run, seconds, wait=lambda: self.waited, clock=lambda: self.now)


def in_peace(seconds: float, runs: int = 5) -> Round:
    return Round((seconds,) * runs, (0.0,) * runs, "2026-01-01T00:00:00+00:00")


def under_load(seconds: float, waited: float, runs: int = 5) -> Round:
    return Round((seconds,) * runs, (waited,) * runs, "2026-01-01T00:00:00+00:00")


def test_runs_that_were_kept_waiting_are_told_from_those_that_were_not() -> None:
    machine = SharedMachine(lambda run: 0.015 if run % 3 == 0 else 0.0)
    found = machine.measure()
    assert len(found.seconds) == machine.runs
    assert set(np.round(found.quiet, 6)) == {0.010}
    assert len(found.quiet) == machine.runs - len(range(0, machine.runs, 3))


def test_a_round_waits_for_a_quiet_moment_but_not_for_ever() -> None:
    patient = SharedMachine(lambda run: 0.02 if run < 9 else 0.0)
    assert patient.measure(0.2).quiet
    hopeless = SharedMachine(lambda run: 0.02)
    assert not hopeless.measure(0.2).quiet
    assert 0.4 <= hopeless.now <= 0.46


def test_where_waiting_is_unknown_every_run_counts() -> None:
    machine = SharedMachine(lambda run: 0.0)
    found = sample_round(machine.run, 0.05, wait=lambda: None, clock=lambda: machine.now)
    assert found.waited == ()
    assert found.quiet == found.seconds
    assert not summarize_rounds([found, found, found]).disturbed


def test_the_latency_is_that_of_quiet_rounds() -> None:
    rounds = [in_peace(0.0100), in_peace(0.0102), in_peace(0.0101), under_load(0.05, 0.8)]
    found = summarize_rounds(rounds)
    assert not found.disturbed
    assert found.latency.value == pytest.approx(0.0101)
    assert found.latency.high < 0.012
    assert (found.runs, found.quiet_runs) == (20, 15)


def test_where_nothing_was_left_in_peace_the_interval_reaches_down_to_what_it_may_be() -> None:
    rounds = [under_load(0.030, 0.6), under_load(0.034, 0.6), under_load(0.031, 0.6)]
    found = summarize_rounds(rounds)
    assert found.disturbed
    assert found.latency.low <= 0.030 * 0.4 + 1e-12
    assert found.latency.high > 0.034
    # A quiet run of the same engine agrees with it.
    quiet = summarize_rounds([in_peace(0.0130), in_peace(0.0131), in_peace(0.0130)])
    assert quiet.latency.overlaps(found.latency)


def test_a_few_quiet_rounds_among_many_do_not_speak_for_all() -> None:
    rounds = [in_peace(0.010)] * 3 + [under_load(0.03, 0.7)] * 5
    times, disturbed = counted_rounds(rounds)
    assert disturbed
    assert all(times)


def test_pairs_are_of_the_same_rounds() -> None:
    own = [in_peace(0.010), under_load(0.05, 0.9), in_peace(0.012), in_peace(0.011)]
    base = [in_peace(0.020), in_peace(0.021), in_peace(0.024), in_peace(0.022)]
    assert paired_medians(own, base) == ([0.010, 0.012, 0.011], [0.020, 0.024, 0.022])


def test_the_quiet_runs_of_one_engine_are_not_held_against_the_disturbed_ones_of_another() -> None:
    # Both take 10 ms undisturbed and 30 ms under load. Each half of the rounds was quiet for one.
    quiet, loaded = in_peace(0.010), under_load(0.030, 0.6)
    for own, base in (
        ([quiet] * 4 + [loaded] * 4, [loaded] * 4 + [quiet] * 4),
        ([quiet] * 4 + [loaded] * 4, [quiet] * 3 + [loaded] * 5),
        ([quiet] * 8, [loaded] * 8),
    ):
        mine, theirs = paired_medians(own, base)
        assert mine == [float(np.median(one.seconds)) for one in own]
        assert theirs == [float(np.median(one.seconds)) for one in base]


def test_a_round_comes_back_from_json() -> None:
    one = Round((0.0123456, 0.02), (0.0, 0.25), "2026-01-01T00:00:00+00:00")
    assert as_record(one.to_json(), Round, "a round") == one


def test_linux_says_how_long_this_process_waits_for_a_processor() -> None:
    before = cpu_wait_seconds()
    if before is None:
        pytest.skip("this system does not count it")
    # Far more busy threads than processors: they have to wait for each other, GIL or not.
    stop = time.monotonic() + 0.4
    block = np.ones((600, 600), np.float32)

    def work() -> None:
        while time.monotonic() < stop:
            block @ block

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    during = cpu_wait_seconds()
    for thread in threads:
        thread.join()
    assert during is not None
    assert during - before > DISTURBED * 0.3
