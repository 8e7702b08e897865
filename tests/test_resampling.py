"""AP over a draw of images is what pycocotools says of it, and intervals hold what they should."""

from __future__ import annotations

import numpy as np
import pytest
from support.coco_scores import pycocotools_ap

from trt_yolov6.detectors.detections import Detections
from trt_yolov6.quantization.resampling import interval, matched


def boxes(rng: np.random.Generator, count: int, classes: int = 3) -> Detections:
    corners = rng.uniform(0, 60, (count, 2))
    sides = rng.uniform(5, 40, (count, 2))
    return Detections(
        np.hstack([corners, corners + sides]).astype(np.float32),
        rng.uniform(0.01, 1, count).astype(np.float32),
        rng.integers(0, classes, count),
    )


def moved(rng: np.random.Generator, one: Detections, by: float) -> Detections:
    """The same detections, a little elsewhere, with other scores and one more."""
    extra = boxes(rng, 1)
    return Detections(
        np.vstack([one.xyxy + rng.normal(0, by, one.xyxy.shape).astype(np.float32), extra.xyxy]),
        np.concatenate([rng.uniform(0.01, 1, len(one)), extra.confidence]).astype(np.float32),
        np.concatenate([one.class_id, extra.class_id]),
    )


@pytest.mark.parametrize("seed", range(4))
def test_over_all_images_it_is_pycocotools_ap(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = [boxes(rng, int(rng.integers(0, 6))) for _ in range(12)]
    found = [moved(rng, one, 2.0) for one in truth]
    expected = pycocotools_ap(truth, found, 0.3)
    assert 0.05 < expected < 0.95
    assert matched(truth, found, 0.3).ap() == pytest.approx(expected, abs=1e-9)


def test_an_image_that_is_left_out_counts_as_if_it_were_not_there() -> None:
    rng = np.random.default_rng(5)
    truth = [boxes(rng, 4) for _ in range(8)]
    found = [moved(rng, one, 2.0) for one in truth]
    draws = np.array([1, 0, 1, 1, 0, 1, 1, 1])
    kept = [index for index in range(8) if draws[index]]
    expected = pycocotools_ap([truth[i] for i in kept], [found[i] for i in kept])
    assert matched(truth, found).ap(draws) == pytest.approx(expected, abs=1e-9)


def test_images_drawn_twice_alike_change_nothing() -> None:
    rng = np.random.default_rng(6)
    truth = [boxes(rng, 4) for _ in range(8)]
    one = matched(truth, [moved(rng, item, 2.0) for item in truth])
    assert one.ap(np.full(8, 2)) == pytest.approx(one.ap())


def test_without_an_object_there_is_no_ap() -> None:
    nothing = boxes(np.random.default_rng(0), 0)
    assert np.isnan(matched([nothing], [nothing]).ap())


def test_an_interval_of_a_mean_is_that_of_the_normal_distribution() -> None:
    values = np.random.default_rng(0).normal(3, 2, 400)
    found = interval(lambda draws: float(draws @ values / draws.sum()), 400, resamples=2000)
    assert found.value == pytest.approx(values.mean())
    assert found.half_width == pytest.approx(1.96 * values.std() / 20, rel=0.1)
    assert found.low < found.value < found.high


def test_paired_differences_vary_less_than_either_figure() -> None:
    rng = np.random.default_rng(7)
    truth = [boxes(rng, 5) for _ in range(30)]
    first = [moved(rng, one, 1.5) for one in truth]
    second = [Detections(one.xyxy + np.float32(0.2), one.confidence, one.class_id) for one in first]
    scored = matched(truth, first), matched(truth, second)
    alone = interval(scored[0].ap, 30, resamples=100)
    paired = interval(lambda draws: scored[0].ap(draws) - scored[1].ap(draws), 30, resamples=100)
    assert paired.half_width < alone.half_width / 2
