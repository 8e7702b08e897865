"""Suppression on the CPU and on the GPU: both keep what the definition keeps, box by box."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.suppression_on_cpu import suppressed_on_cpu

from trt_yolov6.data.letterbox import fit
from trt_yolov6.detectors import detections as detection
from trt_yolov6.detectors.candidates import Suppressed
from trt_yolov6.detectors.detections import Detections, postprocess
from trt_yolov6.detectors.layouts import LAYOUTS, Anchors
from trt_yolov6.detectors.suppression import suppress
from trt_yolov6.engines.cuda.suppression import MAX_KEPT, Reading, reading_of
from trt_yolov6.spec import NmsSettings, OutputLayout, TensorSpec

SIZE = (64, 64)

# --- references ---------------------------------------------------------------------------------


def plain(boxes: Any, classes: Any, iou: float, limit: int) -> list[int]:
    """Greedy suppression, box by box, in double precision; boxes come best first."""
    corners = np.asarray(boxes, np.float32).reshape(-1, 4).astype(np.float64)
    labels = np.asarray(classes)
    left, top, right, bottom = corners.T
    areas = (right - left) * (bottom - top)
    gone = np.zeros(len(corners), bool)
    kept: list[int] = []
    for index in range(len(corners)):
        if gone[index] or len(kept) == limit:
            continue
        kept.append(index)
        rest = slice(index + 1, None)
        width = np.minimum(right[index], right[rest]) - np.maximum(left[index], left[rest])
        height = np.minimum(bottom[index], bottom[rest]) - np.maximum(top[index], top[rest])
        meet = (width > 0) & (height > 0) & (labels[rest] == labels[index])
        shared = np.where(meet, width * height, 0)
        united = np.where(meet, areas[index] + areas[rest] - shared, 1)
        gone[rest] |= shared / united > iou
    return kept


def plain_image(
    boxes: NDArray[Any], scores: NDArray[Any], nms: NmsSettings, cap: int = 30000
) -> list[tuple[Any, ...]]:
    """Kept (box, score, class) of an image's boxes (anchors, 4) and scores (anchors, classes)."""
    least = np.float32(nms.confidence)
    pairs = [
        (score, anchor, label)
        for anchor, row in enumerate(scores.tolist())
        for label, score in enumerate(row)
        if score > least
    ]
    pairs = sorted(pairs, key=lambda pair: -pair[0])[:cap]
    pairs = [pair for pair in pairs if np.isfinite(boxes[pair[1]]).all()]
    corners = [boxes[anchor] for _, anchor, _ in pairs]
    labels = [label for _, _, label in pairs]
    if not pairs:
        return []
    kept = plain(corners, labels, nms.iou, nms.max_detections)
    return [(*corners[index].tolist(), pairs[index][0], labels[index]) for index in kept]


def rows_of(suppressed: Suppressed, image: int) -> list[tuple[Any, ...]]:
    count = int(suppressed.counts[image])
    return [
        (*box, score, label)
        for box, score, label in zip(
            suppressed.boxes[image, :count].tolist(),
            suppressed.scores[image, :count].tolist(),
            suppressed.classes[image, :count].tolist(),
            strict=True,
        )
    ]


# --- boxes --------------------------------------------------------------------------------------

COORDINATES = st.one_of(
    st.integers(-4, 12).map(float),
    st.floats(-50, 700, width=32),
    st.sampled_from([0.0, -0.0, 1e-30, 1e-38, 1e-45, 1e20, 3.4e38, -3.4e38, 16777216.0]),
)
"""Few whole numbers, so that boxes coincide, touch and meet thresholds exactly; and extremes."""

BOXES = st.lists(st.tuples(COORDINATES, COORDINATES, COORDINATES, COORDINATES), max_size=40)

IOUS = st.one_of(st.floats(1e-9, 1), st.sampled_from([0.25, 0.5, 0.65, 0.75, 1.0]))


def crowd(
    rng: np.random.Generator, count: int, clusters: int, size: float = 640
) -> NDArray[np.float32]:
    """Boxes in clusters, as a network gives them: (count, 4) float32."""
    which = rng.integers(0, clusters, count)
    spread = rng.choice([0.02, 0.1, 0.3])
    half = rng.uniform(0.01 * size, 0.1 * size, (clusters, 2))[which]
    centres = rng.uniform(0, size, (clusters, 2))[which] + half * rng.normal(0, spread, (count, 2))
    half = half * rng.lognormal(0, spread, (count, 2))
    return np.concatenate([centres - half, centres + half], axis=1).astype(np.float32)


# --- on the CPU ---------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(boxes=BOXES, classes=st.integers(1, 3), iou=IOUS, limit=st.integers(1, 45))
@example(boxes=[(0, 0, 3e38, 3e38)] * 2, classes=1, iou=0.5, limit=9)
@example(boxes=[(0, 0, 1e-30, 1e-30)] * 2, classes=1, iou=0.5, limit=9)
@example(boxes=[(0, 0, 20, 13), (0, 0, 20, 20)], classes=1, iou=0.65, limit=9)
def test_whatever_the_boxes_the_definition_holds(
    boxes: list[tuple[float, ...]], classes: int, iou: float, limit: int
) -> None:
    array = np.array(boxes, np.float32).reshape(-1, 4)
    labels = np.arange(len(array)) % classes
    assert suppress(array, labels, iou, limit).tolist() == plain(array, labels, iou, limit)


def test_thousands_of_random_sets_are_suppressed_by_the_definition() -> None:
    rng = np.random.default_rng(0)
    for _ in range(2000):
        count, classes = int(rng.integers(1, 60)), int(rng.integers(1, 4))
        boxes = crowd(rng, count, int(rng.integers(1, 8)))
        if rng.random() < 0.5:
            boxes = np.round(boxes / 16)  # many coincide, many have no area
        labels = rng.integers(0, classes, count)
        iou, limit = float(rng.choice([0.3, 0.5, 0.65, 0.9])), int(rng.integers(1, 50))
        assert suppress(boxes, labels, iou, limit).tolist() == plain(boxes, labels, iou, limit)


@pytest.mark.parametrize("classes", [1, 7])
def test_many_blocks_are_suppressed_by_the_definition(classes: int) -> None:
    rng = np.random.default_rng(classes)
    boxes = crowd(rng, 1500, 120)
    labels = rng.integers(0, classes, len(boxes))
    for limit in (50, 300, 5000):
        assert suppress(boxes, labels, 0.65, limit).tolist() == plain(boxes, labels, 0.65, limit)


def test_of_equal_scores_beyond_the_cap_the_first_are_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(detection, "MAX_CANDIDATES", 50)
    anchors = 300
    rng = np.random.default_rng(0)
    scores = (rng.integers(1, 4, (anchors, 1)) / 4).astype(np.float32)
    places = np.arange(anchors, dtype=np.float32) * 2
    boxes = np.stack([places, places, places + 1, places + 1], axis=1)
    placed = fit((700, 700), (700, 700))
    (found,) = postprocess(
        {"boxes": boxes[None], "scores": scores[None]}, "split", NmsSettings(), [placed]
    )
    wanted = plain_image(boxes, scores, NmsSettings(), cap=50)
    assert found.xyxy.tolist() == [list(row[:4]) for row in wanted]
    assert found.confidence.tolist() == [row[4] for row in wanted]


# --- the kernels' logic, on the CPU -------------------------------------------------------------


def split_reading(anchors: int, classes: int, half: bool = False) -> Reading:
    scores = np.dtype(np.float16 if half else np.float32)
    outputs = (
        TensorSpec("boxes", (None, anchors, 4), np.dtype(np.float32)),
        TensorSpec("scores", (None, anchors, classes), scores),
    )
    reading = reading_of("split", outputs, SIZE)
    assert reading is not None
    return reading


ODD_SCORES = st.one_of(
    st.integers(0, 8).map(lambda number: number / 8),
    st.floats(0, 1, width=32),
    st.sampled_from([math.nan, math.inf, -math.inf, -1.0, 1.5, 1e-45]),
)
ODD_COORDINATES = st.one_of(COORDINATES, st.sampled_from([math.nan, math.inf, -math.inf]))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), iou=IOUS, limit=st.integers(1, 30), seed=st.integers(0, 99))
def test_kernels_keep_whatever_the_outputs_what_the_definition_keeps(
    data: st.DataObject, iou: float, limit: int, seed: int
) -> None:
    anchors, classes = 12, 2
    boxes = data.draw(st.lists(st.tuples(*[ODD_COORDINATES] * 4), min_size=24, max_size=24))
    scores = data.draw(st.lists(ODD_SCORES, min_size=48, max_size=48))
    outputs = {
        "boxes": np.array(boxes, np.float32).reshape(2, anchors, 4),
        "scores": np.array(scores, np.float32).reshape(2, anchors, classes),
    }
    confidence = data.draw(st.sampled_from([0.0, 0.03, 0.25, 0.5]))
    nms = NmsSettings(confidence, iou, limit)
    found = suppressed_on_cpu(split_reading(anchors, classes), outputs, nms, seed=seed)
    assert found is not None
    for image in range(2):
        wanted = plain_image(outputs["boxes"][image], outputs["scores"][image], nms)
        assert rows_of(found, image) == wanted


@pytest.mark.parametrize("ties", [False, True, None])
@pytest.mark.parametrize("half", [False, True])
def test_kernels_go_through_more_candidates_than_a_chunk_in_order(
    half: bool, ties: bool | None
) -> None:
    anchors, classes = 600, 3
    rng = np.random.default_rng(0)
    boxes = np.stack([crowd(rng, anchors, clusters) for clusters in (400, 60)])
    scores = rng.uniform(0, 1, (2, anchors, classes)) ** 4
    if ties:
        scores = np.ceil(scores * 3) / 2  # 0.5, 1 and 1.5, each of more than a chunk
    if ties is None:
        scores[:] = 0.75
    outputs = {"boxes": boxes, "scores": scores.astype(np.float16 if half else np.float32)}
    for limit in (40, 1024):
        nms = NmsSettings(0.03, 0.65, limit)
        found = suppressed_on_cpu(split_reading(anchors, classes, half), outputs, nms)
        assert found is not None
        for image in range(2):
            wanted = plain_image(boxes[image], outputs["scores"][image].astype(np.float32), nms)
            assert rows_of(found, image) == wanted


def test_kernels_report_more_candidates_than_there_is_room_for() -> None:
    outputs = {
        "boxes": np.zeros((2, 12, 4), np.float32),
        "scores": np.stack([np.full((12, 2), 0.5), np.full((12, 2), 0.01)]).astype(np.float32),
    }
    reading = split_reading(12, 2)
    assert suppressed_on_cpu(reading, outputs, NmsSettings(), capacity=23) is None
    assert suppressed_on_cpu(reading, outputs, NmsSettings(), capacity=24) is not None
