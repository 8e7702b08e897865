"""Calibrators against closed forms, the literature's optima and plain loops over all candidates."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from trt_yolov6.errors import UserError
from trt_yolov6.quantization.calibrators import (
    EMPTY_AMAX,
    METHODS,
    Method,
    amax_of,
    entropy_amax,
    group_amax,
    percentile_amax,
    quantization_error,
)
from trt_yolov6.quantization.statistics import BINS, Accumulator, TensorStatistics, pooled


def statistics_of(*batches: NDArray[np.floating]) -> TensorStatistics:
    accumulator = Accumulator("x")
    for batch in batches:
        assert accumulator.add(batch)
    return accumulator.result()


def samples(kind: str, count: int = 1_000_000) -> NDArray[np.float32]:
    """Return `count` values in pieces so small that all of them are counted."""
    generator = np.random.default_rng(5)
    half, few = count // 2, count // 600
    makers: dict[str, Callable[[], NDArray[np.float64]]] = {
        "normal": lambda: generator.standard_normal(count),
        "relu": lambda: np.maximum(generator.standard_normal(count), 0),
        "laplace": lambda: generator.laplace(size=count),
        "uniform": lambda: generator.uniform(-1, 1, count),
        "gamma": lambda: generator.gamma(0.5, size=count),
        "t": lambda: generator.standard_t(2, count),
        "few wide": lambda: np.append(
            generator.uniform(0, 1, count - few), generator.uniform(0, 10, few)
        ),
        "half the same": lambda: np.append(np.full(half, 0.5), generator.uniform(4, 7.9, half)),
    }
    return makers[kind]().astype(np.float32)


def in_pieces(values: NDArray[np.float32]) -> TensorStatistics:
    return statistics_of(*np.array_split(values, -(-values.size // 30_000)))


def fake_quantized(values: NDArray[np.floating], amax: float) -> NDArray[np.float64]:
    scale = amax / 127
    result: NDArray[np.float64] = np.clip(np.rint(values / scale), -127, 127) * scale
    return result


@pytest.mark.parametrize("kind", ["normal", "laplace", "relu"])
def test_minmax_is_the_largest_magnitude(kind: str) -> None:
    values = samples(kind, 10_000)
    assert amax_of(statistics_of(values), "minmax") == np.abs(values).max()


def equal_peaks(images: int, channels: int, seed: int) -> list[NDArray[np.float32]]:
    """Return images whose channels speak up to a peak of their own, heavy-tailed over images."""
    generator = np.random.default_rng(seed)
    peaks = generator.lognormal(0, 0.5, (images, channels, 1))
    values = peaks * generator.uniform(0, 1, (images, channels, 60))
    return list(values.astype(np.float32)[:, None])


def test_a_margin_repeats_the_step_by_which_one_image_went_beyond_the_others() -> None:
    # Without the last image the range is 0 to 2, which it exceeds by half; so may the next image.
    images = [np.array([[[0.0, top]]], np.float32) for top in (2, 1, 2, 3)]
    reaches = statistics_of(*images).reaches
    assert reaches is not None
    np.testing.assert_allclose(reaches, [4.5, 0])
    # The lower end does the same, and the order of the images does not count.
    below = statistics_of(*(-image for image in reversed(images))).reaches
    assert below is not None
    np.testing.assert_allclose(below, [0, 4.5])


def test_copies_of_an_image_count_as_one_for_the_margin() -> None:
    accumulator = Accumulator("x", copies=2)
    for top, mirrored in ((2, 1), (1, 1), (1, 2), (3, 2.5)):
        for each in (top, mirrored):
            accumulator.add(np.array([[[0.0, each]]], np.float32))
    reaches = accumulator.result().reaches
    assert reaches is not None
    np.testing.assert_allclose(reaches, [4.5, 0])


def test_there_is_no_margin_where_images_reach_equally_far_or_one_is_all_there_is() -> None:
    image = samples("normal", 4000).reshape(1, 4, 1000)
    for many in (1, 2, 7):
        statistics = statistics_of(*[image] * many)
        assert amax_of(statistics, "margin") == statistics.amax


def test_a_margin_loses_less_than_min_max_in_images_that_were_not_seen() -> None:
    seen, others = equal_peaks(20, 64, 0), equal_peaks(200, 64, 1)
    # Every channel is brought to the same range, as equalization does.
    largest = np.max(seen, axis=(0, 1, 3))[None, :, None]
    statistics = statistics_of(*(image / largest for image in seen))
    unseen = np.concatenate(others) / largest

    def lost(method: Method) -> float:
        found = fake_quantized(unseen, amax_of(statistics, method))
        return float(np.mean((found - unseen) ** 2))

    assert lost("margin") < 0.2 * lost("minmax")
    assert lost("margin") < 0.2 * lost("mse")
    best = min(float(np.mean((fake_quantized(unseen, one) - unseen) ** 2)) for one in range(1, 9))
    assert lost("margin") < 2 * best


@pytest.mark.parametrize("kind", ["normal", "laplace", "uniform"])
@pytest.mark.parametrize("percentile", [50.0, 99.0, 99.9, 99.99])
def test_percentile_agrees_with_numpys_on_the_values(kind: str, percentile: float) -> None:
    values = samples(kind)
    found = percentile_amax(in_pieces(values), percentile)
    expected = np.percentile(np.abs(values), percentile)
    assert found == pytest.approx(expected, abs=in_pieces(values).bin_width)


def test_percentile_of_a_normal_distribution_is_its_quantile() -> None:
    # P(|x| <= 2.5758) = 0.99, from any table of the normal distribution.
    assert percentile_amax(in_pieces(samples("normal")), 99) == pytest.approx(2.5758, rel=0.01)


def test_percentile_100_clips_nothing() -> None:
    values = samples("laplace", 10_000)
    assert percentile_amax(statistics_of(values), 100) == np.abs(values).max()


def test_percentile_does_not_clip_a_tensor_that_is_hardly_anywhere_different_from_zero() -> None:
    values = np.zeros(30_000, np.float32)
    values[7] = 3.5
    assert amax_of(statistics_of(values), "percentile") == 3.5


@pytest.mark.parametrize(
    ("kind", "optimum"),
    # Banner et al., "Post training 4-bit quantization of convolutional networks" (ACIQ,
    # arXiv:1810.05723), table of optimal clipping values at 8 bits, in sigma and in b.
    [("normal", 3.92), ("laplace", 9.89)],
)
def test_mse_finds_the_clipping_value_that_theory_gives(kind: str, optimum: float) -> None:
    assert amax_of(in_pieces(samples(kind)), "mse") == pytest.approx(optimum, rel=0.05)


def test_mse_does_not_clip_a_uniform_distribution() -> None:
    assert amax_of(in_pieces(samples("uniform")), "mse") == pytest.approx(1, rel=0.01)


@pytest.mark.parametrize("kind", ["normal", "laplace", "relu"])
def test_mse_is_within_a_percent_of_the_best_of_all_candidates(kind: str) -> None:
    values = samples(kind, 60_000)
    found = amax_of(in_pieces(values), "mse")

    def error(amax: float) -> float:
        return float(np.mean((fake_quantized(values, amax) - values) ** 2))

    best = min(error(amax) for amax in np.linspace(0.05, 1, 200) * np.abs(values).max())
    assert error(found) <= 1.01 * best


@pytest.mark.parametrize("kind", ["normal", "laplace", "relu", "uniform"])
def test_mse_finds_the_best_of_1024_magnitudes(kind: str) -> None:
    """Where the error has one minimum, the finer search around the best of 64 equals a full one."""
    statistics = in_pieces(samples(kind, 60_000))
    every = statistics.amax * np.arange(1, 1025) / 1024
    best = every[np.argmin(quantization_error(statistics, every))]
    assert amax_of(statistics, "mse") == pytest.approx(best, rel=1e-9)


def test_mse_cuts_off_a_lone_outlier_however_far_away_it_is() -> None:
    found = in_pieces(np.append(samples("normal"), np.float32(400)))
    # One of a hundred million.
    often = np.where(np.arange(BINS) * found.bin_width < 399, 100, 1)
    statistics = dataclasses.replace(found, histogram=found.histogram * often)
    every = statistics.amax * np.arange(1, 1025) / 1024
    best = every[np.argmin(quantization_error(statistics, every))]
    assert best < statistics.amax / 64
    assert amax_of(statistics, "mse") == pytest.approx(best, rel=1e-9)


def test_the_quantization_error_is_a_mean_of_however_few_values() -> None:
    one, many = (statistics_of(np.full(count, 0.3, np.float32)) for count in (1, 1000))
    for amax in (0.1, 0.3):
        assert quantization_error(one, amax) == pytest.approx(float(quantization_error(many, amax)))
    assert quantization_error(one, 0.1) == pytest.approx(0.2**2, rel=0.01)


@pytest.mark.parametrize("kind", ["normal", "laplace", "uniform"])
@pytest.mark.parametrize("fraction", [0.1, 0.5, 1.0])
def test_quantization_error_is_what_quantizing_the_values_costs(kind: str, fraction: float) -> None:
    values = samples(kind, 300_000)
    statistics = in_pieces(values)
    amax = fraction * statistics.amax
    measured = np.mean((fake_quantized(values, amax) - values) ** 2)
    assert float(quantization_error(statistics, amax)) == pytest.approx(measured, rel=0.02)


def test_quantization_error_of_a_uniform_distribution_is_a_twelfth_of_the_squared_step() -> None:
    statistics = in_pieces(samples("uniform"))
    assert float(quantization_error(statistics, 1.0)) == pytest.approx(
        (1 / 127) ** 2 / 12, rel=0.01
    )


def slow_entropy(statistics: TensorStatistics) -> tuple[list[float], float]:
    """Return the divergences and the answer by the definition, candidate by candidate."""
    entropy = pytest.importorskip("scipy.stats").entropy
    bins = statistics.histogram.reshape(-1, 2).sum(axis=1).astype(float)
    bins[0] = min(bins[0], bins[1])
    width = 2 * statistics.bin_width
    bins = bins[: math.floor(statistics.amax / width) + 1]
    best, answer, divergences = math.inf, statistics.amax, []
    for i in range(128, len(bins) + 1):
        kept, outliers = bins[:i], bins[i:].sum()
        p = kept.copy()
        p[-1] += outliers
        level = np.arange(i) * 128 // i
        mass, filled = np.bincount(level, kept, 128), np.bincount(level, kept > 0, 128)
        q = np.where(kept > 0, (mass / np.maximum(filled, 1))[level], 0)
        divergence = math.inf
        if outliers <= kept.sum():
            divergence = entropy(p, q)
        divergences.append(divergence)
        if divergence <= best:
            best, answer = divergence, min(statistics.amax, i * width)
    return divergences, answer


@pytest.mark.parametrize(
    "kind", ["normal", "laplace", "relu", "gamma", "t", "few wide", "half the same"]
)
def test_entropy_is_the_definition_carried_out_for_every_candidate(kind: str) -> None:
    statistics = in_pieces(samples(kind, 60_000))
    divergences, answer = slow_entropy(statistics)
    assert min(divergences) < math.inf
    assert entropy_amax(statistics) == pytest.approx(answer)
    # Shares count, not numbers.
    rarer = dataclasses.replace(statistics, histogram=8 * statistics.histogram)
    assert entropy_amax(rarer) == pytest.approx(answer)


def test_entropy_cuts_off_a_lone_outlier() -> None:
    values = np.append(samples("normal", 29_000), np.float32(40))
    assert 2 < amax_of(statistics_of(values), "entropy") < 8


def test_entropy_keeps_an_image_whose_darkest_pixel_is_not_black() -> None:
    # Cut at the darkest pixel, both distributions would be one bin and agree perfectly.
    pixels = np.random.default_rng(2).integers(90, 256, 30_000).astype(np.float32) / 255
    assert amax_of(statistics_of(pixels), "entropy") > 0.9


@pytest.mark.parametrize("method", METHODS)
def test_every_calibrator_scales_with_the_tensor(method: Method) -> None:
    # Powers of two move the bins along with the values, so the answer must move exactly.
    values = samples("laplace", 20_000)
    small, large = (amax_of(statistics_of(values * factor), method) for factor in (1, 1024))
    assert large == pytest.approx(1024 * small)


@pytest.mark.parametrize("method", METHODS)
@given(
    values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=50),
    zeros=st.integers(0, 200),
)
@settings(max_examples=60, deadline=None)
def test_every_range_of_one_image_is_finite_above_zero_and_within_the_tensors(
    method: Method, values: list[float], zeros: int
) -> None:
    statistics = statistics_of(np.array(values + [0.0] * zeros, np.float32))
    found = amax_of(statistics, method)
    assert math.isfinite(found)
    assert 0 < found <= (statistics.amax or EMPTY_AMAX)


@pytest.mark.parametrize("method", METHODS)
def test_a_tensor_of_zeros_gets_a_range_one_can_divide_by(method: Method) -> None:
    found = amax_of(statistics_of(np.zeros((1, 4, 5), np.float32)), method)
    assert found == EMPTY_AMAX
    assert np.float16(found / 127) > 0


def test_an_unknown_calibrator_is_refused_in_a_sentence() -> None:
    with pytest.raises(
        UserError, match="there is no calibrator 'median' for INT8; choose one of margin, minmax"
    ):
        amax_of(statistics_of(np.ones(3, np.float32)), "median")  # type: ignore[arg-type]


def direct_histogram(values: NDArray[np.floating], width: float) -> NDArray[np.int64]:
    counts, _ = np.histogram(np.abs(values), BINS, (0, BINS * width))
    return counts


@given(
    st.lists(
        st.lists(st.floats(-1e9, 1e9, width=32), min_size=1, max_size=20), min_size=1, max_size=8
    )
)
@settings(max_examples=200, deadline=None)
def test_a_histogram_that_grew_is_the_one_its_final_range_would_have_given(
    batches: list[list[float]],
) -> None:
    arrays = [np.array(batch, np.float32) for batch in batches]
    statistics = statistics_of(*arrays)
    everything = np.concatenate(arrays)
    assert math.log2(statistics.bin_width).is_integer()
    assert statistics.amax == np.abs(everything).max() < BINS * statistics.bin_width
    expected = direct_histogram(everything.astype(np.float64), statistics.bin_width)
    np.testing.assert_array_equal(statistics.histogram, expected)
    backwards = statistics_of(*arrays[::-1])
    np.testing.assert_array_equal(backwards.histogram, statistics.histogram)


@pytest.mark.parametrize("value", [1e-44, 1e-30, 1.0, 3e38])
def test_histograms_hold_the_smallest_and_the_largest_floats(value: float) -> None:
    statistics = statistics_of(np.array([value, -value / 2], np.float32))
    assert statistics.histogram.sum() == 2
    assert amax_of(statistics, "mse") > 0


def test_large_tensors_are_sampled_yet_their_extremes_are_exact() -> None:
    values = np.random.default_rng(3).standard_normal((1, 8, 200, 200)).astype(np.float32)
    values[0, 3, 77, 123] = -17
    statistics = statistics_of(values)
    assert statistics.amax == 17
    assert statistics.amin == -17
    assert statistics.count == values.size > 5 * statistics.histogram.sum()
    assert statistics.channels is not None
    np.testing.assert_array_equal(statistics.channels.amax, np.abs(values).max(axis=(0, 2, 3)))
    np.testing.assert_allclose(
        statistics.channels.mean, values.astype(np.float64).mean(axis=(0, 2, 3)), atol=1e-6
    )
    share = statistics.histogram[: round(1 / statistics.bin_width)].sum()
    # P(|x| < 1) = 0.6827; 0.01 is four standard deviations of a sample of 30 000.
    assert share / statistics.histogram.sum() == pytest.approx(0.6827, abs=0.011)


def test_sampling_favours_no_column_and_no_channel() -> None:
    # The value tells its column; each must be sampled about as often as any other.
    columns = np.broadcast_to(np.arange(320, dtype=np.float32), (1, 16, 320, 320))
    statistics = statistics_of(columns)
    per_column = statistics.histogram.reshape(512, -1).sum(axis=1)[:320]
    assert per_column.min() > 0.9 * per_column.max()


def test_pooled_statistics_weigh_each_tensor_by_its_size_not_by_its_sample() -> None:
    small = statistics_of(np.full((1, 1, 100, 100), 0.3, np.float32))
    large = statistics_of(np.full((1, 1, 300, 300), 5.0, np.float32))
    both = pooled([small, large])
    assert both.amax == 5
    assert both.amin == np.float32(0.3)
    assert both.histogram.sum() == pytest.approx(100_000, rel=0.001)
    assert both.histogram[: round(1 / both.bin_width)].sum() == 10_000


def test_pooled_statistics_of_the_parts_are_those_of_the_whole() -> None:
    values = samples("laplace", 25_000)
    parts = [statistics_of(part) for part in np.split(values, [2000, 9000])]
    np.testing.assert_array_equal(pooled(parts).histogram, statistics_of(values).histogram)


@pytest.mark.parametrize("method", METHODS)
def test_a_group_has_one_range_that_of_all_its_values_together(method: Method) -> None:
    values = samples("laplace", 25_000)
    left, right = values[:2000], values[2000:] * np.float32(0.01)
    statistics = {
        "left": statistics_of(left),
        "alone": statistics_of(right),
        "right": statistics_of(right),
        "dead": statistics_of(np.zeros(50, np.float32)),
    }
    found = group_amax(statistics, [("left", "right", "joined")], method)
    assert list(found) == ["left", "alone", "right", "dead", "joined"]
    together = statistics_of(np.concatenate([left, right]))
    assert found["left"] == found["right"] == found["joined"]
    assert found["left"] == pytest.approx(amax_of(together, method))
    assert found["alone"] == amax_of(statistics["right"], method) < found["left"]
    assert found["dead"] == EMPTY_AMAX


def test_a_dead_tensor_does_not_widen_its_groups_range() -> None:
    small, dead = np.full(50, 0.01, np.float32), np.zeros(50, np.float32)
    statistics = {"small": statistics_of(small), "dead": statistics_of(dead)}
    found = group_amax(statistics, [("dead", "small")], "minmax")
    assert found == dict.fromkeys(("small", "dead"), np.float32(0.01))
