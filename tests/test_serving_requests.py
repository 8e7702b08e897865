"""Batches that a server forms: filled up to few sizes, with the answers of unfilled ones."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.host_images import HostImagesEngine
from support.kernels_on_cpu import letterbox_on_cpu
from support.tiny_detector import load_tiny

from trt_yolov6.detectors.detections import Detections
from trt_yolov6.detectors.layouts import LAYOUTS
from trt_yolov6.engines import Engine
from trt_yolov6.errors import UserError
from trt_yolov6.serving.requests import (
    InputMemory,
    detect_encoded,
    make_ready,
    run_tensors,
    shared_outputs,
    stacked,
)
from trt_yolov6.spec import BatchProfile, OutputLayout, PredictOptions


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    with load_tiny(tmp_path) as loaded:
        yield loaded


@pytest.fixture
def sizes(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batch sizes that the engine runs."""
    seen: list[int] = []
    infer = engine.infer

    def counted(images: Any) -> Any:
        seen.append(len(images))
        return infer(images)

    monkeypatch.setattr(engine, "infer", counted)
    return seen


def a_request(engine: Engine, images: int, seed: int) -> Any:
    shape = (images, *(length or 0 for length in engine.input.shape[1:]))
    return np.random.default_rng(seed).random(shape).astype(engine.input.dtype)


@given(st.lists(st.integers(1, 200), min_size=3, max_size=3).map(sorted))
def test_steps_cover_a_profile_without_doubling_the_work(numbers: list[int]) -> None:
    profile = BatchProfile(*numbers)
    steps = profile.steps()
    assert list(steps) == sorted(set(steps))
    assert steps[0] == profile.min
    assert steps[-1] == profile.max
    assert profile.opt in steps
    for images in range(profile.min, profile.max + 1):
        assert next(step for step in steps if step >= images) < 2 * images


def test_inputs_of_another_shape_or_dtype_are_refused(engine: Engine, sizes: list[int]) -> None:
    good = a_request(engine, 1, 0)
    memory = InputMemory(engine)
    for bad in (good[0], good[..., :-1], good.astype(np.float64)):
        with pytest.raises(UserError, match=r"the input is .*, not float32 \['batch', "):
            run_tensors(engine, [good, bad], memory)
    assert not sizes


def test_the_pictures_of_a_request_answer_in_arrays_of_one_length() -> None:
    def found(*labels: int) -> Detections:
        count = len(labels)
        boxes = np.arange(4 * count, dtype=np.float32).reshape(count, 4)
        return Detections(boxes, np.full(count, 0.5, np.float32), np.array(labels, np.int64))

    answer = stacked([found(7), found(), found(1, 2)])
    assert answer["count"].tolist() == [[1], [0], [2]]
    assert answer["classes"].tolist() == [[7, -1], [-1, -1], [1, 2]]
    assert answer["scores"].tolist() == [[0.5, 0], [0, 0], [0.5, 0.5]]
    assert answer["boxes"].tolist() == [
        [[0, 1, 2, 3], [0] * 4],
        [[0] * 4, [0] * 4],
        [[0, 1, 2, 3], [4, 5, 6, 7]],
    ]
    assert {name: array.dtype.name for name, array in answer.items()} == {
        "boxes": "float32",
        "scores": "float32",
        "classes": "int64",
        "count": "int32",
    }
    assert stacked([found()])["boxes"].shape == (1, 0, 4)


def test_batches_are_as_large_as_they_are_where_a_new_size_costs_nothing(
    engine: Engine, sizes: list[int]
) -> None:
    memory = InputMemory(engine)
    make_ready(engine, memory, None)
    run_tensors(engine, [a_request(engine, 1, seed) for seed in range(3)], memory)
    assert sizes == [3]


def test_batches_are_filled_up_to_sizes_that_were_made_ready(
    engine: Engine, sizes: list[int]
) -> None:
    requests = [a_request(engine, count, count) for count in (2, 1)]
    wanted = [engine.infer(request) for request in requests]
    sizes.clear()
    engine.batch_steps = (1, 2, 4)
    memory = InputMemory(engine)
    make_ready(engine, memory, None)
    assert sizes == [1, 2, 4]
    found = run_tensors(engine, requests, memory)
    assert sizes == [1, 2, 4, 4]
    for one, other in zip(found, wanted, strict=True):
        for name, value in other.items():
            np.testing.assert_allclose(one[name], value, atol=1e-6)


def test_boxes_that_images_share_are_those_of_each_request(tmp_path: Path) -> None:
    # The detector finds one box in each image of its batch.
    with load_tiny(tmp_path, "end2end", batch=4) as engine:
        for counts in ([3], [2, 1], [1, 3]):
            requests = [a_request(engine, count, count) for count in counts]
            found = run_tensors(engine, requests, InputMemory(engine))
            rows = [next(iter(one.values())) for one in found]
            assert [one[:, 0].tolist() for one in rows] == [list(range(n)) for n in counts]


@pytest.mark.parametrize("layout", [name for name, layout in LAYOUTS.items() if layout.shared])
def test_a_part_of_shared_outputs_is_read_as_its_images_are(layout: OutputLayout) -> None:
    counts = np.array([2, 0, 3, 1], np.int32)
    rows = np.random.default_rng(0).random((counts.sum(), 7), np.float32)
    rows[:, 0] = np.repeat(np.arange(4), counts)
    outputs: dict[str, Any] = {"rows": rows}
    if layout == "end2end_ppyoloe":
        outputs = {"rows": rows[:, 1:], "counts": counts}
    whole = LAYOUTS[layout].read(outputs, (64, 64))
    for start in range(4):
        for end in range(start, 5):
            part = LAYOUTS[layout].read(shared_outputs(outputs, start, end), (64, 64))
            for index in range(end - start):
                mine, theirs = vars(part(index)), vars(whole(start + index))
                for name, array in theirs.items():
                    np.testing.assert_array_equal(mine[name], array)


def test_pictures_go_to_a_gpu_as_they_are_and_come_back_the_same(
    engine: Engine, tmp_path: Path
) -> None:
    kernel = resources.files("trt_yolov6.engines.cuda") / "letterbox.cu"
    with resources.as_file(kernel) as source:
        library = letterbox_on_cpu(source, tmp_path, byte_input=False)
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[8:16, 24:32, 1] = 255
    pictures = [cv2.imencode(".png", pixels)[1].tobytes(), b"no picture"]
    pictures.append(cv2.imencode(".png", np.rot90(pixels))[1].tobytes())
    options = PredictOptions(confidence=0.3)
    with ThreadPoolExecutor(2) as pool, HostImagesEngine(engine, library) as on_gpu:
        on_gpu.batch_steps = (1, 2, 4)
        memory = InputMemory(on_gpu)
        make_ready(on_gpu, memory, options)
        assert len(on_gpu.taken) == 3
        plain = detect_encoded(engine, pictures, options, InputMemory(engine), pool)
        found = detect_encoded(on_gpu, pictures, options, memory, pool)
    assert on_gpu.taken[3:] == [2]
    assert str(found[1]) == str(plain[1])
    for one, other in ((found[0], plain[0]), (found[2], plain[2])):
        assert not isinstance(one, Exception)
        assert not isinstance(other, Exception)
        assert len(one) == 1
        np.testing.assert_allclose(one.xyxy, other.xyxy, atol=1e-4)
        np.testing.assert_array_equal(one.class_id, other.class_id)
