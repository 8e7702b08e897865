"""Suppression on the CPU and on the GPU: both keep what the definition keeps, box by box."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.suppression_on_cpu import suppressed_on_cpu

from trt_yolov6.data.letterbox import fit
from trt_yolov6.detectors import detections as detection
from trt_yolov6.detectors.candidates import Suppressed
from trt_yolov6.detectors.detections import postprocess
from trt_yolov6.detectors.suppression import suppress
from trt_yolov6.engines.cuda import device as cuda_device
from trt_yolov6.engines.cuda.kernels import machine_code
from trt_yolov6.engines.cuda.suppression import (
    MAX_KEPT,
    SOURCE,
    Reading,
    Suppression,
    reading_of,
)
from trt_yolov6.errors import MissingDependencyError
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
        with np.errstate(invalid="ignore"):  # of what does not meet
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
"""Few integers, so that boxes coincide, touch and meet thresholds exactly; and extremes."""

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
    boxes = crowd(rng, 4000, 120)
    boxes[7::50] *= np.float32(1e35)  # as of a network that overflows
    boxes[9::50, 2] = boxes[9::50, 0]  # without area
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


def assert_odd_outputs(data: st.DataObject, iou: float, limit: int, run: Any) -> None:
    """Compare what is kept of two images' outputs, with odd numbers, with the definition."""
    anchors, classes = 12, 2
    boxes = data.draw(st.lists(st.tuples(*[ODD_COORDINATES] * 4), min_size=24, max_size=24))
    scores = data.draw(st.lists(ODD_SCORES, min_size=48, max_size=48))
    outputs = {
        "boxes": np.array(boxes, np.float32).reshape(2, anchors, 4),
        "scores": np.array(scores, np.float32).reshape(2, anchors, classes),
    }
    nms = NmsSettings(data.draw(st.sampled_from([0.0, 0.03, 0.25, 0.5])), iou, limit)
    found = run(split_reading(anchors, classes), outputs, nms)
    assert found is not None
    for image in range(2):
        wanted = plain_image(outputs["boxes"][image], outputs["scores"][image], nms)
        assert rows_of(found, image) == wanted


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    iou=IOUS,
    limit=st.integers(1, 30),
    seed=st.integers(0, 99),
    ranked=st.booleans(),
)
def test_kernels_keep_whatever_the_outputs_what_the_definition_keeps(
    data: st.DataObject, iou: float, limit: int, seed: int, ranked: bool
) -> None:
    run = functools.partial(suppressed_on_cpu, seed=seed, ranked=ranked)
    assert_odd_outputs(data, iou, limit, run)


def test_kernels_keep_of_random_sets_what_the_cpu_keeps() -> None:
    anchors, classes = 40, 3
    rng = np.random.default_rng(1)
    placed = [fit(SIZE, SIZE)] * 8
    for turn in range(60):
        boxes = np.stack([crowd(rng, anchors, int(rng.integers(1, 20))) for _ in placed])
        scores = rng.uniform(0, 1, (8, anchors, classes)) ** 2
        if turn % 2:
            boxes, scores = np.round(boxes / 16), np.round(scores * 8) / 8
        outputs = {"boxes": boxes, "scores": scores.astype(np.float32)}
        nms = NmsSettings(0.1, float(rng.choice([0.3, 0.5, 0.65])), int(rng.integers(1, 60)))
        found = suppressed_on_cpu(
            split_reading(anchors, classes), outputs, nms, seed=turn, ranked=bool(turn & 2)
        )
        assert found is not None
        for one, other in zip(
            postprocess(found, "split", nms, placed, clip=False),
            postprocess(outputs, "split", nms, placed, clip=False),
            strict=True,
        ):
            np.testing.assert_array_equal(one.xyxy, other.xyxy)
            np.testing.assert_array_equal(one.confidence, other.confidence)
            np.testing.assert_array_equal(one.class_id, other.class_id)
            assert one.class_id.dtype == other.class_id.dtype == np.int64


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
    scores = scores.astype(np.float16 if half else np.float32)
    outputs: dict[str, NDArray[Any]] = {"boxes": boxes, "scores": scores}
    for limit, ranked in ((40, False), (MAX_KEPT, False), (MAX_KEPT, True)):
        nms = NmsSettings(0.03, 0.65, limit)
        found = suppressed_on_cpu(
            split_reading(anchors, classes, half), outputs, nms, ranked=ranked
        )
        assert found is not None
        for image in range(2):
            wanted = plain_image(boxes[image], outputs["scores"][image].astype(np.float32), nms)
            assert rows_of(found, image) == wanted


@pytest.mark.parametrize("ranked", [False, True])
@pytest.mark.parametrize("clusters", [4, 40])
def test_kernels_keep_of_crowded_boxes_what_the_definition_keeps(
    clusters: int, ranked: bool
) -> None:
    anchors, classes = 600, 3
    rng = np.random.default_rng(3)
    outputs = {
        "boxes": crowd(rng, anchors, clusters)[None],
        "scores": rng.uniform(0, 1, (1, anchors, classes)).astype(np.float32),
    }
    outputs["boxes"][0, ::7] = outputs["boxes"][0, 1::7]
    nms = NmsSettings(0.2, 0.65, MAX_KEPT)
    found = suppressed_on_cpu(split_reading(anchors, classes), outputs, nms, ranked=ranked)
    assert found is not None
    wanted = plain_image(outputs["boxes"][0], outputs["scores"][0], nms)
    assert rows_of(found, 0) == wanted
    assert len(wanted) < anchors * classes / 4


@pytest.mark.parametrize("clip", [False, True])
def test_kernels_map_boxes_to_the_images_as_the_cpu_does(clip: bool) -> None:
    anchors, classes, limit = 300, 2, 200
    rng = np.random.default_rng(5)
    sizes = [(64, 64), (37, 61), (480, 640), (1, 900), (64, 33), (1080, 7)]
    placed = [fit(size, SIZE) for size in sizes]
    boxes = np.stack([crowd(rng, anchors, 150, size=64) for _ in placed])
    boxes[:, ::9, 1::2] -= 64  # above the image
    boxes[:, 4::50] *= np.float32(1e36)
    scores = rng.uniform(0, 1, (len(placed), anchors, classes)).astype(np.float32)
    outputs = {"boxes": boxes, "scores": scores}
    nms = NmsSettings(0.3, 0.65, limit)
    reading = split_reading(anchors, classes)
    found = suppressed_on_cpu(reading, outputs, nms, placed=placed, clip=clip)
    assert found is not None
    assert found.clip is clip
    higher = dataclasses.replace(nms, confidence=0.6)
    for asked in (nms, higher):
        for one, other in zip(
            postprocess(found, "split", asked, placed, clip=clip, class_names=("a", "b")),
            postprocess(outputs, "split", asked, placed, clip=clip, class_names=("a", "b")),
            strict=True,
        ):
            assert one.class_names == ("a", "b")
            assert 5 < len(one) <= limit
            np.testing.assert_array_equal(one.xyxy, other.xyxy)
            np.testing.assert_array_equal(one.confidence, other.confidence)
            np.testing.assert_array_equal(one.class_id, other.class_id)


def test_kernels_report_more_candidates_than_there_is_room_for() -> None:
    scores = np.stack([np.full((12, 2), 0.5), np.full((12, 2), 0.01)]).astype(np.float32)
    outputs = {"boxes": np.zeros((2, 12, 4), np.float32), "scores": scores}
    reading = split_reading(12, 2)
    assert suppressed_on_cpu(reading, outputs, NmsSettings(), capacity=23) is None
    assert suppressed_on_cpu(reading, outputs, NmsSettings(), capacity=24) is not None


# --- other families' outputs --------------------------------------------------------------------


def layout_outputs(layout: OutputLayout, dtype: Any, seed: int) -> dict[str, NDArray[Any]]:
    """Raw outputs of a layout for two images of 64x64 pixels with 3 classes."""
    rng = np.random.default_rng(seed)
    batch, classes, anchors = 2, 3, 84  # 8x8, 4x4 and 2x2 cells

    def likely(*shape: int) -> NDArray[Any]:
        return rng.uniform(0, 1, shape) ** 3

    def rows(*columns: NDArray[Any]) -> NDArray[Any]:
        return np.concatenate(columns, axis=2).astype(dtype)

    centres, sides = (
        rng.uniform(0, 64, (batch, anchors, 2)),
        rng.uniform(4, 24, (batch, anchors, 2)),
    )
    corners = np.concatenate([centres - sides / 2, centres + sides / 2], axis=2)
    object_, scores = likely(batch, anchors, 1) ** 0.3, likely(batch, anchors, classes)
    if layout == "split":
        return {"boxes": corners.astype(dtype), "scores": scores.astype(dtype)}
    if layout == "split_by_class":
        return {"a": scores.transpose(0, 2, 1).astype(dtype), "b": corners.astype(dtype)}
    if layout == "rows":
        return {"out": rows(centres, sides, object_, scores)}
    if layout == "corner_rows":
        return {"out": rows(corners, scores)}
    if layout == "columns":
        return {"out": np.ascontiguousarray(rows(centres, sides, scores).transpose(0, 2, 1))}
    if layout == "grid_rows":
        offsets = rng.uniform(0, 1, (batch, anchors, 2))
        return {"out": rows(offsets, rng.normal(0, 1, (batch, anchors, 2)), object_, scores)}
    levels = [rng.normal(0, 2, (batch, 3, side, side, 5 + classes)) for side in (8, 4, 2)]
    # Not in order of size, as the layout allows.
    return {f"level {place}": levels[place].astype(dtype) for place in (1, 0, 2)}


EXACT: tuple[OutputLayout, ...] = ("split", "split_by_class", "rows", "corner_rows", "columns")
EXPONENTIAL: tuple[OutputLayout, ...] = ("grid_rows", "grids_yolov5", "grids_yolov7")


def specs_of(outputs: dict[str, NDArray[Any]]) -> list[TensorSpec]:
    return [TensorSpec(name, (None, *a.shape[1:]), a.dtype) for name, a in outputs.items()]


def assert_layout(layout: OutputLayout, outputs: dict[str, NDArray[Any]], run: Any) -> None:
    """Compare what the kernels keep of a layout's outputs with what `postprocess` makes of them."""
    reading = reading_of(layout, specs_of(outputs), SIZE)
    assert reading is not None
    nms, placed = NmsSettings(0.2, 0.5, 60), [fit(SIZE, SIZE)] * 2
    suppressed = run(reading, outputs, nms)
    found = postprocess(suppressed, layout, nms, placed, clip=False)
    wanted = postprocess(outputs, layout, nms, placed, clip=False)
    for one, other in zip(found, wanted, strict=True):
        assert len(one) == len(other) > 5
        np.testing.assert_array_equal(one.class_id, other.class_id)
        if layout in EXACT:
            np.testing.assert_array_equal(one.xyxy, other.xyxy)
            np.testing.assert_array_equal(one.confidence, other.confidence)
        else:
            np.testing.assert_allclose(one.xyxy, other.xyxy, rtol=1e-6, atol=1e-4)
            np.testing.assert_allclose(one.confidence, other.confidence, rtol=1e-6)


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        *((layout, np.float32) for layout in (*EXACT, *EXPONENTIAL) if layout != "rows"),
        *((layout, np.float16) for layout in ("split", "rows", "grids_yolov5")),
    ],
)
def test_kernels_read_every_layout_as_the_cpu_does(layout: OutputLayout, dtype: Any) -> None:
    assert_layout(layout, layout_outputs(layout, dtype, seed=1), suppressed_on_cpu)


def test_layouts_that_the_kernels_do_not_read_are_left_to_the_cpu() -> None:
    float32 = np.dtype(np.float32)
    rows = TensorSpec("rows", (None, 7), float32)
    assert reading_of("end2end", [rows], SIZE) is None
    by_name = {"boxes": (None, 20, 4), "scores": (None, 20, 3)}
    fixed = [TensorSpec(name, shape, float32) for name, shape in by_name.items()]
    assert reading_of("split", fixed, SIZE) is not None
    assert reading_of("split", fixed[:1], SIZE) is None
    varying = [TensorSpec("boxes", (None, None, 4), float32), fixed[1]]
    assert reading_of("split", varying, SIZE) is None
    whole = [TensorSpec("boxes", (None, 20, 4), np.dtype(np.int32)), fixed[1]]
    assert reading_of("split", whole, SIZE) is None
    assert reading_of("grid_rows", [TensorSpec("rows", (None, 86, 8), float32)], SIZE) is None


# --- on a GPU -----------------------------------------------------------------------------------


def test_kernels_compile_for_every_gpu_that_tensorrt_runs_on() -> None:
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc")
    try:
        nvrtc.nvrtcVersion()
    except RuntimeError:
        pytest.skip("needs nvidia-cuda-nvrtc")
    # Each layout and each GPU: the one's lines of the source do not ask for the other.
    capabilities = itertools.cycle(((8, 7), (7, 5), (8, 0), (9, 0), (12, 0)))
    layouts = (*EXACT, *EXPONENTIAL)
    assert len(layouts) >= 5
    for layout, capability in zip(layouts, capabilities, strict=False):
        reading = reading_of(layout, specs_of(layout_outputs(layout, np.float16, 0)), SIZE)
        assert reading is not None
        assert machine_code(SOURCE, capability, (f"MAX_KEPT={MAX_KEPT}", *reading.defines))


def has_gpu() -> bool:
    try:
        cuda_device.current_device()
    except MissingDependencyError:
        return False
    return True


needs_gpu = pytest.mark.skipif(not has_gpu(), reason="needs an NVIDIA GPU and cuda-python")


def suppressed_on_gpu(
    reading: Reading, outputs: dict[str, NDArray[Any]], nms: NmsSettings
) -> Suppressed | None:
    cuda_device.free_memory()  # starts CUDA
    stream = cuda_device.Stream()
    arrays = {name: np.ascontiguousarray(array) for name, array in outputs.items()}
    memory = {name: cuda_device.DeviceMemory(array.nbytes) for name, array in arrays.items()}
    for name, array in arrays.items():
        stream.copy_in(memory[name], array.ctypes.data, array.nbytes)
    batch = len(next(iter(arrays.values())))
    suppression = Suppression(reading, batch)
    suppression.enqueue(stream, memory, batch, nms)
    stream.wait()
    plain_run = suppression.fetch(batch, nms)
    with stream.capture() as graph:
        suppression.enqueue(stream, memory, batch, nms)
    graph.launch(stream)
    stream.wait()
    recorded = suppression.fetch(batch, nms)
    with mock.patch("trt_yolov6.engines.cuda.suppression.RANKED_ROWS", 0):
        suppression.enqueue(stream, memory, batch, nms)
    stream.wait()
    by_one_block = suppression.fetch(batch, nms)
    suppression.free()
    if plain_run is None or recorded is None or by_one_block is None:
        assert plain_run is recorded is by_one_block
        return None
    found, *others = (
        [rows_of(one, image) for image in range(batch)]
        for one in (recorded, plain_run, by_one_block)
    )
    assert others == [found, found]
    return recorded


@needs_gpu
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("layout", [*EXACT, *EXPONENTIAL])
def test_a_gpu_reads_every_layout_as_the_cpu_does(layout: OutputLayout, dtype: Any) -> None:
    assert_layout(layout, layout_outputs(layout, dtype, seed=1), suppressed_on_gpu)


@needs_gpu
@settings(max_examples=200, deadline=None)
@given(data=st.data(), iou=IOUS, limit=st.integers(1, 30))
def test_a_gpu_keeps_whatever_the_outputs_what_the_definition_keeps(
    data: st.DataObject, iou: float, limit: int
) -> None:
    assert_odd_outputs(data, iou, limit, suppressed_on_gpu)


@needs_gpu
def test_a_gpu_takes_thirty_thousand_candidates_and_reports_more() -> None:
    anchors, classes = 15000, 2
    rng = np.random.default_rng(0)
    boxes = np.stack([crowd(rng, anchors, 30), crowd(rng, anchors, 3000)])
    scores = np.ceil(rng.uniform(0, 1, (2, anchors, classes)) * 500).astype(np.float32) / 500
    nms = NmsSettings(0.0, 0.65, MAX_KEPT)
    found = suppressed_on_gpu(
        split_reading(anchors, classes), {"boxes": boxes, "scores": scores}, nms
    )
    assert found is not None
    for image in range(2):
        assert rows_of(found, image) == plain_image(boxes[image], scores[image], nms)
    more = {
        "boxes": np.zeros((1, 30001, 4), np.float32),
        "scores": np.ones((1, 30001, 1), np.float32),
    }
    assert suppressed_on_gpu(split_reading(30001, 1), more, nms) is None
