"""Agreement: closed forms for detections that are lost, moved, doubled or of another class."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.cocoeval import COCOeval
from support.coco_scores import pycocotools_ap

from trt_yolov6.detectors.detections import Detections
from trt_yolov6.quantization.agreement import agreement
from trt_yolov6.quantization.resampling import match


def detections(*rows: tuple[float, float, float, float, float, int]) -> Detections:
    """Rows of x1, y1, x2, y2, score, class, the best score first."""
    table = np.array(rows, np.float64).reshape(-1, 6)
    return Detections(
        table[:, :4].astype(np.float32), table[:, 4].astype(np.float32), table[:, 5].astype(int)
    )


LEFT = (0.0, 0.0, 100.0, 100.0)
RIGHT = (200.0, 0.0, 300.0, 100.0)
NOTHING = detections()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_same_detections_agree_perfectly(seed: int) -> None:
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(3):
        corners = rng.uniform(0, 200, (5, 2))
        sides = rng.uniform(10, 100, (5, 2))
        scores = np.sort(rng.uniform(0.05, 1, 5))[::-1]
        scores[0] = 0.9
        images.append(
            Detections(
                np.concatenate([corners, corners + sides], axis=1).astype(np.float32),
                scores.astype(np.float32),
                rng.integers(0, 3, 5),
            )
        )
    assert agreement(images, images) == pytest.approx(1)


def test_half_of_the_objects_lost_leaves_half_of_the_recall() -> None:
    reference = [detections((*LEFT, 0.9, 0), (*RIGHT, 0.8, 0))]
    found = [detections((*LEFT, 0.9, 0))]
    # Precision is 1 at the recalls 0, 0.01 .. 0.5 and 0 beyond: 51 of COCO's 101 places.
    assert agreement(reference, found) == pytest.approx(51 / 101)


def test_a_box_counts_at_the_overlaps_it_reaches() -> None:
    reference = [detections((*LEFT, 0.9, 0))]
    found = [detections((0.0, 0.0, 100.0, 72.0, 0.9, 0))]
    # IoU 0.72 meets the thresholds 0.50, 0.55 .. 0.70: five of ten.
    assert agreement(reference, found) == pytest.approx(0.5)


def test_a_new_object_costs_as_much_as_its_score_ranks_it() -> None:
    reference = [detections((*LEFT, 0.6, 0))]
    before = [detections((*RIGHT, 0.7, 0), (*LEFT, 0.6, 0))]
    after = [detections((*LEFT, 0.6, 0), (*RIGHT, 0.5, 0))]
    assert agreement(reference, before) == pytest.approx(0.5)
    assert agreement(reference, after) == pytest.approx(1)


def test_an_object_of_another_class_or_image_is_not_the_object() -> None:
    reference = [detections((*LEFT, 0.9, 0)), NOTHING]
    assert agreement(reference, [detections((*LEFT, 0.9, 1)), NOTHING]) == 0
    assert agreement(reference, [NOTHING, detections((*LEFT, 0.9, 0))]) == 0


def test_what_the_float_network_doubts_need_not_be_found() -> None:
    reference = [detections((*LEFT, 0.9, 0), (*RIGHT, 0.2, 0))]
    found = [detections((*LEFT, 0.9, 0))]
    assert agreement(reference, found) == pytest.approx(1)
    assert agreement(reference, found, confident=0.1) == pytest.approx(51 / 101)


def test_small_objects_count_as_large_ones() -> None:
    small = (10.0, 10.0, 14.0, 14.0)
    reference = [detections((*LEFT, 0.9, 0), (*small, 0.8, 0))]
    assert agreement(reference, [detections((*LEFT, 0.9, 0))]) == pytest.approx(51 / 101)


def test_a_network_that_doubts_everything_is_held_to_its_best_guesses() -> None:
    reference = [detections((*LEFT, 0.2, 0), (*RIGHT, 0.15, 0)), detections((*LEFT, 0.05, 0))]
    found = [detections((*LEFT, 0.2, 0)), NOTHING]
    assert agreement(reference, reference) == pytest.approx(1)
    assert agreement(reference, found) == pytest.approx(51 / 101)


def test_where_nothing_is_detected_only_silence_agrees() -> None:
    assert agreement([NOTHING], [NOTHING]) == 1
    assert agreement([NOTHING], [detections((*LEFT, 0.9, 0))]) == 0


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 6), st.integers(0, 12))
def test_detections_are_matched_as_pycocotools_matches_them(
    seed: int, objects: int, count: int
) -> None:
    rng = np.random.default_rng(seed)
    # Few different values, so that many overlaps are equal; 1 is one of them.
    overlaps = rng.integers(0, 21, (count, objects)) / 20
    thresholds = np.linspace(0.5, 0.95, 10)
    scorer = COCOeval(iouType="bbox")
    scorer.params.iouThrs = thresholds
    scorer._gts[1, 1] = [
        {"id": 1 + index, "ignore": 0, "iscrowd": 0, "area": 9.0} for index in range(objects)
    ]
    scorer._dts[1, 1] = [{"id": 1 + index, "score": 0.5, "area": 9.0} for index in range(count)]
    scorer.ious[1, 1] = overlaps if objects and count else []
    theirs = scorer.evaluateImg(1, 1, [0, 1e10], 100)
    to_object, to_detection = match(scorer.ious[1, 1], thresholds, count)
    if theirs is None or not objects or not count:
        assert (to_object < 0).all()
        assert (to_detection < 0).all()
        return
    np.testing.assert_array_equal(to_object + 1, theirs["dtMatches"])
    np.testing.assert_array_equal(to_detection + 1, theirs["gtMatches"])


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_agreement_is_what_pycocotools_gives(seed: int) -> None:
    rng = np.random.default_rng(seed)

    def some(count: int) -> Detections:
        corners = rng.integers(0, 30, (count, 2))
        boxes = np.concatenate([corners, corners + rng.integers(10, 30, (count, 2))], axis=1)
        scores = np.sort(rng.integers(1, 20, count) / 20)[::-1]
        return Detections(
            boxes.astype(np.float32), scores.astype(np.float32), rng.integers(0, 2, count)
        )

    reference, found = [some(5) for _ in range(4)], [some(110) for _ in range(4)]
    found[0].xyxy[:3, 2] = found[0].xyxy[:3, 0] - 5  # no boxes: their areas are negative
    expected = pycocotools_ap(reference, found, 0.3)
    assert agreement(reference, found) == pytest.approx(expected, abs=1e-12)
