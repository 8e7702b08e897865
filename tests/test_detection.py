"""Post-processing: the suppression equals a plain one, and all output layouts mean the same."""

from __future__ import annotations

import pickle
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from trt_yolov6.data.letterbox import Letterbox, fit
from trt_yolov6.detectors import detections as detection
from trt_yolov6.detectors.candidates import MAX_CANDIDATES, Candidates, Suppressed
from trt_yolov6.detectors.detections import Detections, postprocess
from trt_yolov6.detectors.suppression import suppress
from trt_yolov6.errors import UserError
from trt_yolov6.spec import NmsSettings

SIZE = (640, 640)
WHOLE = fit(SIZE, SIZE)


def plain_nms(
    boxes: NDArray[np.floating], classes: NDArray[np.integer], iou: float, limit: int
) -> list[int]:
    """Greedy suppression as one writes it on a blackboard; boxes come best first."""
    kept: list[int] = []
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    for index, box in enumerate(boxes):
        for other in kept:
            if classes[other] != classes[index]:
                continue
            width = min(box[2], boxes[other, 2]) - max(box[0], boxes[other, 0])
            height = min(box[3], boxes[other, 3]) - max(box[1], boxes[other, 1])
            shared = max(0.0, width) * max(0.0, height)
            if shared / (areas[index] + areas[other] - shared) > iou:
                break
        else:
            kept.append(index)
            if len(kept) == limit:
                break
    return kept


def crowd(
    count: int, classes: int, clusters: int, seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.float32], NDArray[np.int64]]:
    """Boxes in clusters, some partly off the image, best score first, with ties."""
    random = np.random.default_rng(seed)
    which = random.integers(0, clusters, count)
    centres = random.uniform(-10, 650, (clusters, 2))[which] + random.normal(0, 6, (count, 2))
    half = random.uniform(10, 60, (clusters, 2))[which] * random.uniform(0.8, 1.2, (count, 2))
    boxes = np.concatenate([centres - half, centres + half], axis=1)
    scores = np.sort(random.integers(1, 1000, count).astype(np.float32) / 1000)[::-1].copy()
    return boxes, scores, random.integers(0, classes, count)


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(0, 200),
    classes=st.integers(1, 5),
    clusters=st.integers(1, 20),
    iou=st.floats(0.1, 0.95),
    limit=st.integers(1, 60),
    seed=st.integers(0, 10**6),
)
def test_suppression_equals_the_plain_one(
    count: int, classes: int, clusters: int, iou: float, limit: int, seed: int
) -> None:
    boxes, _, labels = crowd(count, classes, clusters, seed)
    kept = suppress(boxes, labels, iou, limit)
    assert kept.dtype == np.intp
    assert kept.tolist() == plain_nms(boxes, labels, iou, limit)


def test_boxes_of_exactly_the_threshold_both_stay() -> None:
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 4]], float)  # IoU 0.5, 0.4, 0.8
    labels = np.zeros(3, int)
    assert suppress(boxes, labels, 0.5, 10).tolist() == [0, 1]


def test_equal_boxes_of_different_classes_both_stay_even_off_the_image() -> None:
    # Shifting classes apart by the largest coordinate would bring these two together.
    boxes = np.array([[0, 0, 10, 10], [-11, -11, -1, -1], [0, 0, 10, 10]], float)
    labels = np.array([0, 1, 1])
    assert suppress(boxes, labels, 0.5, 10).tolist() == [0, 1, 2]


@pytest.mark.parametrize("exploded", [[0, 0, 3e38, 10], [-3e38, -3e38, 3e38, 3e38]])
def test_one_exploded_box_leaves_the_others_alone(exploded: list[float]) -> None:
    boxes = np.array([exploded, [0, 0, 10, 10], [100, 100, 110, 110], [0, 1, 10, 10]], np.float32)
    for labels in ([0, 0, 0, 0], [2, 1, 1, 1]):
        assert suppress(boxes, np.array(labels), 0.65, 10).tolist() == [0, 1, 2]


def test_boxes_without_area_overlap_nothing() -> None:
    boxes = [[5, 5, 5, 9], [50, 50, 50, 50], [0, 0, 10, 10], [8, 8, 2, 2], [0, 0, 10, 10]]
    kept = suppress(np.array(boxes, float), np.zeros(5, int), 0.5, 10)
    assert kept.tolist() == [0, 1, 2, 3]


def test_boxes_smaller_than_a_pixel_overlap_as_others_do() -> None:
    boxes = np.array([[5, 5, 5.5, 5.5], [5, 5, 5.5, 5.45], [6, 6, 6.5, 6.5]], float)
    assert suppress(boxes, np.zeros(3, int), 0.5, 10).tolist() == [0, 2]


@pytest.mark.parametrize("iou", [0.05, 0.1, 0.2, 0.3, 0.5, 0.65, 0.9])
@pytest.mark.parametrize("way", ["right", "left", "down", "up"])
def test_a_box_that_is_many_times_as_long_overlaps_by_its_share(iou: float, way: str) -> None:
    for share, kept in ((1.01 * iou, [0]), (0.99 * iou, [0, 1])):
        long = 10 / share
        ends = {
            "right": [0, 0, long, 10],
            "left": [10 - long, 0, 10, 10],
            "down": [0, 0, 10, long],
            "up": [0, 10 - long, 10, 10],
        }
        pair = np.array([[0, 0, 10, 10], ends[way]], float)
        assert suppress(pair, np.zeros(2, int), iou, 10).tolist() == kept
        assert suppress(pair[::-1], np.zeros(2, int), iou, 10).tolist() == kept
        # Also where there are thousands between them.
        others = np.arange(3000)[:, None] * 40.0 + [1000, 1000, 1010, 1010]
        many = np.concatenate([pair[:1], others, pair[1:]])
        found = suppress(many, np.zeros(len(many), int), iou, 5000)
        assert len(found) == 3000 + len(kept)


@pytest.mark.parametrize(("classes", "limit"), [(80, 300), (1, 300), (80, MAX_CANDIDATES)])
def test_thousands_of_candidates_take_milliseconds(classes: int, limit: int) -> None:
    boxes, _, labels = crowd(MAX_CANDIDATES, classes, 60)
    start = time.thread_time()  # of the processor, whatever else the machine does
    suppress(boxes, labels, 0.65, limit)
    assert time.thread_time() - start < 0.5  # at most 0.1 s on idle cores


def split_outputs(
    images: int, anchors: int, classes: int, seed: int = 0
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    random = np.random.default_rng(seed)
    boxes = [crowd(anchors, 1, 10, seed + index)[0] for index in range(images)]
    scores = random.uniform(0, 1, (images, anchors, classes)) ** 4
    return np.stack(boxes).astype(np.float32), scores.astype(np.float32)


def as_rows(
    boxes: NDArray[np.float32], scores: NDArray[np.float32], objectness: float
) -> NDArray[np.float32]:
    low, high = boxes[..., :2], boxes[..., 2:]
    certain = np.full_like(boxes[..., :1], objectness)
    return np.concatenate([(low + high) / 2, high - low, certain, scores / objectness], axis=2)


def expected(
    boxes: NDArray[np.float32], scores: NDArray[np.float32], nms: NmsSettings
) -> list[tuple[Any, ...]]:
    """Candidates one by one: each pair of class and anchor above the threshold."""
    pairs = [
        (float(score), label, anchor)
        for anchor, row in enumerate(scores)
        for label, score in enumerate(row)
        if score > nms.confidence
    ]
    pairs.sort(key=lambda pair: -pair[0])
    corners = np.array([boxes[anchor] for _, _, anchor in pairs], float).reshape(-1, 4)
    labels = np.array([label for _, label, _ in pairs], int)
    kept = plain_nms(corners, labels, nms.iou, nms.max_detections)
    clipped = np.clip(corners, 0, 640)
    return [
        (*clipped[index], pairs[index][0], labels[index])
        for index in kept
        if clipped[index, 2] > clipped[index, 0] and clipped[index, 3] > clipped[index, 1]
    ]


def as_tuples(found: Detections) -> list[tuple[Any, ...]]:
    return [
        (*box, score, label)
        for box, score, label in zip(
            found.xyxy.tolist(), found.confidence.tolist(), found.class_id.tolist(), strict=True
        )
    ]


@pytest.mark.parametrize("layout", ["split", "rows"])
@pytest.mark.parametrize("limit", [300, 20])
def test_every_pair_of_anchor_and_class_is_a_candidate(layout: Any, limit: int) -> None:
    boxes, scores = split_outputs(2, 150, 3)
    nms = NmsSettings(confidence=0.2, iou=0.5, max_detections=limit)
    outputs = {"boxes": boxes, "scores": scores}
    if layout == "rows":
        outputs = {"any name": as_rows(boxes, scores, 0.5)}
    found = postprocess(outputs, layout, nms, [WHOLE, WHOLE])
    for index in range(2):
        wanted = expected(boxes[index], scores[index], nms)
        assert len(wanted) == len(found[index]) > 15
        np.testing.assert_allclose(as_tuples(found[index]), wanted, atol=1e-3)


def test_end2end_rows_are_filtered_sorted_and_capped_by_image() -> None:
    rows = np.array(
        [
            [1, 10, 10, 20, 20, 0.5, 2],
            [0, 10, 10, 20, 20, 0.4, 1],
            [1, 30, 10, 40, 20, 0.9, 0],
            [1, 10, 10, 20, 20, 0.6, 1],
            [1, 10, 10, 20, 20, 0.1, 1],
            [2, 10, 10, 20, 20, 0.9, 1],  # the padding of a static batch
        ],
        np.float32,
    )
    nms = NmsSettings(confidence=0.2, max_detections=2)
    first, second = postprocess({"detections": rows}, "end2end", nms, [WHOLE, WHOLE])
    assert as_tuples(first) == [(10, 10, 20, 20, pytest.approx(0.4), 1)]
    np.testing.assert_allclose(second.confidence, [0.9, 0.6])
    assert second.class_id.tolist() == [0, 1]


@pytest.mark.parametrize("layout", ["split", "rows", "end2end"])
def test_nothing_found_has_the_right_shapes(layout: Any) -> None:
    empty: dict[str, dict[str, NDArray[Any]]] = {
        "split": {"boxes": np.zeros((4, 10, 4)), "scores": np.zeros((4, 10, 3))},
        "rows": {"rows": np.zeros((4, 10, 8))},
        "end2end": {"detections": np.zeros((0, 7))},
    }
    # Four rows, of which one is an image and three are padding.
    (found,) = postprocess(empty[layout], layout, NmsSettings(), [WHOLE])
    assert (found.xyxy.shape, found.confidence.shape, found.class_id.shape) == ((0, 4), (0,), (0,))
    dtypes = [found.xyxy.dtype, found.confidence.dtype, found.class_id.dtype]
    assert dtypes == [np.float32, np.float32, np.int64]


def test_boxes_are_mapped_clipped_and_those_outside_dropped() -> None:
    placed: Letterbox = fit((240, 320), SIZE)  # doubled, 80 gray rows above and below
    boxes = np.array([[100, 200, 300, 400], [-50, 0, 700, 640], [0, 0, 640, 70]], np.float32)
    scores = np.array([[0.9], [0.8], [0.7]], np.float32)
    (found,) = postprocess(
        {"boxes": boxes[None], "scores": scores[None]}, "split", NmsSettings(), [placed]
    )
    np.testing.assert_allclose(found.xyxy, [[50, 60, 150, 160], [0, 0, 320, 240]])
    assert found.confidence.tolist() == pytest.approx([0.9, 0.8])


def test_boxes_that_are_not_clipped_stay_finite(recwarn: pytest.WarningsRecorder) -> None:
    placed = fit((1280, 1280), SIZE)  # mapping doubles
    boxes = np.array([[-3e38, 0, 3e38, 9], [1, 2, 30, 40]], np.float32)
    scores = np.array([[0.9], [0.8]], np.float32)
    rows = np.array([[0, *box, 0.5, 0] for box in boxes], np.float32)
    bad = np.array([[0, np.nan, 0, 1, 1, 0.9, 0], [0, 0, 0, np.inf, 1, 0.9, 0]], np.float32)
    outputs = {
        "boxes": np.concatenate([bad[:, 1:5], boxes])[None],
        "scores": np.concatenate([bad[:, 5:6], scores])[None],
    }
    (split,) = postprocess(outputs, "split", NmsSettings(), [placed], clip=False)
    outputs = {"detections": np.concatenate([bad, rows])}
    (end2end,) = postprocess(outputs, "end2end", NmsSettings(), [placed], clip=False)
    for found in (split, end2end):
        assert np.isfinite(found.xyxy).all()
        np.testing.assert_allclose(found.xyxy[1], [2, 4, 60, 80])
    assert not recwarn.list


def test_half_precision_and_overflowed_outputs_are_taken() -> None:
    boxes = np.array([[1, 2, 30, 40], [np.inf, 0, np.inf, 9], [np.nan, 0, 3, 9]], np.float16)
    scores = np.array([[0.5, np.nan], [0.75, 0], [0.75, 0]], np.float16)
    (found,) = postprocess(
        {"boxes": boxes[None], "scores": scores[None]}, "split", NmsSettings(), [WHOLE]
    )
    assert as_tuples(found) == [(1, 2, 30, 40, 0.5, 0)]


def test_more_candidates_than_the_cap_keep_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detection, "MAX_CANDIDATES", 3000)  # keeps the test short
    anchors = 8400
    rng = np.random.default_rng(0)
    scores = rng.permutation(10 * anchors).reshape(anchors, 10).astype(np.float32) / 1e5 + 0.01
    # Distinct small boxes on a grid: nothing is suppressed.
    rows, columns = np.divmod(np.arange(anchors), 100)
    corners = [columns * 6, rows * 6, columns * 6 + 5, rows * 6 + 5]
    boxes = np.stack(corners, axis=1).astype(np.float32)
    nms = NmsSettings(confidence=0.001, max_detections=4000)
    (found,) = postprocess({"boxes": boxes[None], "scores": scores[None]}, "split", nms, [WHOLE])
    best = np.sort(scores.reshape(-1))[::-1][:3000]
    np.testing.assert_array_equal(found.confidence, best)


@pytest.mark.parametrize(
    "shapes",
    [
        {"rows": (1, 10, 8)},
        {"boxes": (1, 10, 4)},
        {"boxes": (1, 10, 5), "scores": (1, 10, 3)},
        {"boxes": (1, 10, 4), "scores": (1, 9, 3)},
        {"boxes": (10, 4), "scores": (1, 10, 3)},
        {"boxes": (1, 10, 4), "scores": (1, 10, 3, 1)},
    ],
)
def test_outputs_of_another_layout_are_refused(shapes: dict[str, tuple[int, ...]]) -> None:
    outputs = {name: np.zeros(shape) for name, shape in shapes.items()}
    with pytest.raises(UserError, match=r"do not have (boxes|scores)"):
        postprocess(outputs, "split", NmsSettings(), [WHOLE])


@given(seed=st.integers(0, 10**6), images=st.integers(1, 4), confidence=st.floats(0.1, 0.9))
def test_candidates_that_an_engine_chose_are_read_as_its_outputs_are(
    seed: int, images: int, confidence: float
) -> None:
    boxes, scores = split_outputs(images, 30, 3, seed)
    nms = NmsSettings(confidence=confidence, iou=0.5, max_detections=20)
    # Chosen at a lower confidence, of a batch whose last image is padding.
    batch, anchors, classes = np.nonzero(scores > 0.05)
    chosen = Candidates(batch, classes, scores[batch, anchors, classes], boxes[batch, anchors])
    places = [WHOLE] * max(1, images - 1)
    found = postprocess(chosen, "split", nms, places)
    expected = postprocess({"boxes": boxes, "scores": scores}, "split", nms, places)
    assert len(found) == len(expected) == len(places)
    for one, other in zip(found, expected, strict=True):
        assert as_tuples(one) == as_tuples(other)


def as_suppressed(candidates: Candidates, images: int, nms: NmsSettings) -> Suppressed:
    """Return the boxes of an engine that suppresses by itself; nonsense fills the other rows."""
    found = postprocess(candidates, "split", nms, [WHOLE] * images, clip=False)
    rows = nms.max_detections + 2
    boxes = np.full((images + 1, rows, 4), np.nan, np.float32)
    scores = np.full((images + 1, rows), 7, np.float32)
    classes = np.full((images + 1, rows), -3, np.int64)
    for index, one in enumerate(found):
        boxes[index, : len(one)] = one.xyxy
        scores[index, : len(one)] = one.confidence
        classes[index, : len(one)] = one.class_id
    # The last row is padding of the batch.
    counts = [*map(len, found), rows]
    return Suppressed(counts, boxes, scores, classes, nms)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    counts=st.lists(st.integers(0, 60), min_size=1, max_size=3),
    confidence=st.sampled_from([0.03, 0.25, 0.5]),
    limit=st.integers(1, 20),
    clip=st.booleans(),
)
def test_boxes_that_an_engine_kept_are_read_as_its_candidates_are(
    seed: int, counts: list[int], confidence: float, limit: int, clip: bool
) -> None:
    """At the same thresholds, at a higher confidence, and of fewer boxes."""
    parts = [crowd(count, 3, 6, seed + index) for index, count in enumerate(counts)]
    candidates = Candidates(
        images=np.repeat(np.arange(len(counts)), counts),
        classes=np.concatenate([labels for _, _, labels in parts]),
        scores=np.concatenate([scores for _, scores, _ in parts]),
        boxes=np.concatenate([boxes for boxes, _, _ in parts]),
    )
    suppressed = as_suppressed(candidates, len(counts), NmsSettings(0.03, 0.5, 20))
    # Of a wide image, so that some boxes lie in the gray above it and below.
    placed = [fit((320, 640), SIZE)] * len(counts)
    asked = NmsSettings(confidence, 0.5, limit)
    names = ("a", "b", "c")
    expected, found = (
        postprocess(outputs, "split", asked, placed, clip=clip, class_names=names)
        for outputs in (candidates, suppressed)
    )
    for one, other in zip(found, expected, strict=True):
        assert one.class_names == other.class_names == names
        np.testing.assert_array_equal(one.xyxy, other.xyxy)
        np.testing.assert_array_equal(one.confidence, other.confidence)
        np.testing.assert_array_equal(one.class_id, other.class_id)


def test_a_score_of_exactly_the_threshold_is_not_above_it() -> None:
    above = np.nextafter(np.float32(0.5), np.float32(1))
    rows = np.array([[0, 1, 2, 30, 40, 0.5, 0], [0, 1, 2, 30, 41, above, 0]])
    (inside,) = postprocess(
        {"detections": rows.astype(np.float32)}, "end2end", NmsSettings(0.5), [WHOLE]
    )
    assert inside.xyxy[:, 3].tolist() == [41]
    candidates = Candidates(
        images=np.zeros(2, np.int64),
        classes=np.arange(2),  # else the better one would suppress the other
        scores=np.array([0.5, above], np.float32),
        boxes=np.array([[1, 2, 30, 40], [1, 2, 30, 41]], np.float32),
    )
    (chosen,) = postprocess(candidates, "split", NmsSettings(0.5), [WHOLE])
    assert chosen.xyxy[:, 3].tolist() == [41]


def test_what_an_engine_kept_is_filtered_as_its_candidates_are() -> None:
    above = np.nextafter(np.float32(0.5), np.float32(1))
    candidates = Candidates(
        images=np.zeros(3, np.int64),
        classes=np.arange(3),
        scores=np.array([0.75, above, 0.5], np.float32),
        boxes=np.array([[5, 5, 5, 9], [1, 2, 30, 40], [1, 2, 30, 41]], np.float32),
    )
    nms = NmsSettings(0.5, 0.5, 20)
    for outputs in (candidates, as_suppressed(candidates, 1, NmsSettings(0.03, 0.5, 20))):
        (whole,) = postprocess(outputs, "split", nms, [WHOLE], clip=False)
        assert whole.class_id.tolist() == [0, 1]
        (clipped,) = postprocess(outputs, "split", nms, [WHOLE])
        assert clipped.class_id.tolist() == [1]


class Recorded(ThreadPoolExecutor):
    """Remembers what it was asked to do."""

    calls = 0

    def submit(self, *args: Any, **named: Any) -> Any:
        self.calls += 1
        return super().submit(*args, **named)


def test_several_images_at_a_time_give_what_one_after_the_other_gives() -> None:
    boxes, scores = split_outputs(3, 20, 2)
    outputs, places = {"boxes": boxes, "scores": scores}, [WHOLE] * 3
    alone = postprocess(outputs, "split", NmsSettings(), places)
    with Recorded(2) as executor:
        found = postprocess(outputs, "split", NmsSettings(), places, executor=executor)
    assert executor.calls == 3
    assert [as_tuples(one) for one in found] == [as_tuples(one) for one in alone]


def test_of_no_images_there_are_no_detections() -> None:
    boxes, scores = split_outputs(1, 5, 2)
    assert postprocess({"boxes": boxes, "scores": scores}, "split", NmsSettings(), []) == []


# --- what comes of it ---------------------------------------------------------------------------


def some() -> Detections:
    boxes = np.array([[0, 0, 10, 10], [5, 5, 20, 30], [1, 2, 3, 4]], np.float32)
    scores = np.array([0.9, 0.5, 0.4], np.float32)
    return Detections(boxes, scores, np.array([2, 0, 7]), class_names=("red", "green", "blue"))


def test_detections_are_indexed_as_arrays_are() -> None:
    found = some()
    assert [one.class_name for one in found] == ["blue", "red", "class_7"]
    assert list(found[-1].xyxy) == [1, 2, 3, 4]
    assert found[np.int64(1)] == found[1]
    assert [one.confidence for one in found[:2]] == pytest.approx([0.9, 0.5])
    assert found[found.class_id == 0].xyxy.tolist() == [[5, 5, 20, 30]]
    assert found[[2, 0]].class_id.tolist() == found[(2, 0)].class_id.tolist() == [7, 2]
    assert len(found[[]]) == 0
    mask = [one.confidence < 0.6 for one in found]
    assert found[mask].class_id.tolist() == found[np.array(mask)].class_id.tolist() == [0, 7]
    assert len(found[[False] * 3]) == 0
    with pytest.raises(IndexError):
        found[[True, False]]
    with pytest.raises(IndexError):
        found[3]


def test_a_class_without_a_name_is_called_by_its_number() -> None:
    assert [some().class_name(number) for number in (-1, 0, 2, 3)] == [
        "class_-1",
        "red",
        "blue",
        "class_3",
    ]


def test_detections_become_those_of_supervision() -> None:
    pytest.importorskip("supervision")
    found = some().to_supervision()
    np.testing.assert_array_equal(found.xyxy, some().xyxy)
    assert list(found.data["class_name"]) == ["blue", "red", "class_7"]


def test_a_missing_supervision_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(UserError, match="pip install supervision"):
        some().to_supervision()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("count", [0, 3])
def test_detections_travel_to_other_processes(count: int, dtype: Any) -> None:
    boxes = np.arange(4 * count, dtype=dtype).reshape(count, 4)
    sent = Detections(
        boxes[::-1], boxes[:, 0], np.arange(count), ("cat", "dog"), path=Path("a.jpg")
    )
    found = pickle.loads(pickle.dumps(sent))
    for name in ("xyxy", "confidence", "class_id"):
        array = getattr(found, name)
        np.testing.assert_array_equal(array, getattr(sent, name), strict=True)
        assert array.flags.writeable
    assert (found.class_names, found.path) == (sent.class_names, sent.path)
