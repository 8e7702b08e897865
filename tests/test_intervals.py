"""Intervals of latencies: against SciPy's distribution, and as often right as they say."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trt_yolov6.common.statistics import (
    Interval,
    prediction_interval,
    ratio_interval,
    ratio_of,
    student_t,
)

TIMES = st.lists(st.floats(1e-5, 1e3), min_size=3, max_size=12)


@pytest.mark.parametrize("freedom", [*range(1, 31), 100, 1001])
@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.999])
def test_students_t_is_scipys(freedom: int, confidence: float) -> None:
    stats = pytest.importorskip("scipy.stats")
    expected = stats.t.ppf((1 + confidence) / 2, freedom)
    assert student_t(confidence, freedom) == pytest.approx(expected, rel=1e-9)


def test_the_interval_is_the_textbooks() -> None:
    # Logarithms 0, 1, 2: median 1, deviation 1, t of 2 degrees of freedom 4.3027.
    found = prediction_interval([1.0, math.e, math.e**2])
    half = 4.302652729911275 * math.sqrt(4 / 3)
    assert found.value == pytest.approx(math.e)
    assert math.log(found.low) == pytest.approx(1 - half)
    assert math.log(found.high) == pytest.approx(1 + half)


@pytest.mark.parametrize("drift", [0.0, 0.02])
def test_two_runs_disagree_by_less_than_their_intervals_even_where_runs_differ_as_rounds_do(
    drift: float,
) -> None:
    # Each run has an offset of its own, as large as what its rounds differ by.
    generator = np.random.default_rng(3)
    overlapping = 0
    for _ in range(1000):
        runs = []
        for _ in range(2):
            offset = drift * generator.standard_normal()
            rounds = 0.01 * np.exp(offset + 0.02 * generator.standard_normal(8))
            runs.append(prediction_interval(rounds.tolist()))
        overlapping += runs[0].overlaps(runs[1])
    assert overlapping >= 950


def test_a_further_round_falls_into_the_interval_as_often_as_it_says() -> None:
    generator = np.random.default_rng(4)
    inside = 0
    for _ in range(3000):
        rounds = np.exp(0.05 * generator.standard_normal(9))
        found = prediction_interval(rounds[:8].tolist())
        inside += found.low <= rounds[8] <= found.high
    # The centre is a median, which wanders more than the mean that the textbook has.
    assert 0.93 <= inside / 3000 <= 0.97


def test_a_drift_that_hits_both_alike_does_not_widen_their_ratio() -> None:
    generator = np.random.default_rng(5)
    drift = np.exp(np.cumsum(0.2 * generator.standard_normal(8)))
    slow, fast = 3.0 * drift, 2.0 * drift
    ratio = ratio_interval(slow.tolist(), fast.tolist())
    assert ratio.value == pytest.approx(1.5)
    assert ratio.high - ratio.low < 1e-9
    alone = prediction_interval(slow.tolist())
    assert alone.high / alone.low > 1.5


@given(TIMES, st.floats(0.01, 100))
def test_intervals_do_not_depend_on_the_unit(rounds: list[float], unit: float) -> None:
    one = prediction_interval(rounds)
    other = prediction_interval([value * unit for value in rounds])
    assert other.value == pytest.approx(one.value * unit)
    assert other.low == pytest.approx(one.low * unit)
    assert other.high == pytest.approx(one.high * unit)


@given(TIMES)
def test_the_value_lies_in_its_interval_and_the_floor_widens_it(rounds: list[float]) -> None:
    found = prediction_interval(rounds, floor=0.02)
    assert found.low <= found.value / 1.02 * (1 + 1e-12)
    assert found.high >= found.value * 1.02 * (1 - 1e-12)
    assert min(rounds) * (1 - 1e-9) <= found.value <= max(rounds) * (1 + 1e-9)


def test_errors_of_two_runs_add_in_quadrature() -> None:
    now = Interval(2.0, 2.0 / math.exp(0.03), 2.0 * math.exp(0.03))
    before = Interval(4.0, 4.0 / math.exp(0.04), 4.0 * math.exp(0.04))
    ratio = ratio_of(now, before)
    assert ratio.value == 0.5
    assert math.log(ratio.high / ratio.value) == pytest.approx(0.05)
    assert math.log(ratio.value / ratio.low) == pytest.approx(0.05)


def test_without_a_lower_bound_nothing_is_known_of_the_ratio() -> None:
    ratio = ratio_of(Interval(2.0, 0.0, 3.0), Interval(1.0, 0.9, 1.1))
    assert (ratio.low, ratio.high) == (0.0, math.inf)


def test_intervals_overlap_that_share_a_value_be_it_an_end() -> None:
    middle = Interval(2.5, 2.0, 3.0)
    for low, high, expected in ((1, 2, True), (3, 4, True), (2.2, 2.4, True), (1, 4, True)):
        assert middle.overlaps(Interval(low, low, high)) is expected
    for low, high in ((1, 1.999), (3.001, 4)):
        assert not middle.overlaps(Interval(low, low, high))
        assert not Interval(low, low, high).overlaps(middle)


def test_the_error_is_the_larger_half_of_the_interval() -> None:
    assert Interval(2.0, 1.0, 3.0).log_error == pytest.approx(math.log(2))
    assert Interval(2.0, 1.5, 6.0).log_error == pytest.approx(math.log(3))
    assert Interval(2.0, 1e-9, 2.0).log_error == pytest.approx(math.log(2e9))
    assert Interval(2.0, 0.0, 2.0).log_error == math.inf


def test_the_interval_of_a_ratio_is_the_textbooks() -> None:
    # Logarithms of the ratios 0, 1, 2: mean 1, deviation 1, t of 2 degrees of freedom 4.3027.
    found = ratio_interval([3.0, 3 * math.e, 5 * math.e**2], [3.0, 3.0, 5.0])
    half = 4.302652729911275 / math.sqrt(3)
    assert found.value == pytest.approx(math.e)
    assert math.log(found.low) == pytest.approx(1 - half)
    assert math.log(found.high) == pytest.approx(1 + half)


def test_rounds_without_their_counterpart_have_no_ratio() -> None:
    for rounds, base in (([1.0, 2.0, 3.0], [1.0, 2.0]), ([1.0, 2.0], [1.0, 2.0, 3.0])):
        with pytest.raises(ValueError, match=r"shorter|longer"):
            ratio_interval(rounds, base)
