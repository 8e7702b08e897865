"""Preprocessing, against the families' rules written out in OpenCV and NumPy."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support import pictures

from trt_yolov6.data.loader import fill_row
from trt_yolov6.data.preprocessing import YOLOV6, Preprocessing, parse_changes
from trt_yolov6.detectors.families import FAMILIES
from trt_yolov6.errors import UserError
from trt_yolov6.spec import TensorSpec

SIZE = (96, 160)


def photograph(height: int = 120, width: int = 150) -> NDArray[np.uint8]:
    """Return a smooth picture, in which a resizing of another kind shows little."""
    noise = np.random.default_rng(0).integers(0, 256, (15, 15, 3), np.uint8)
    return np.asarray(cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC), np.uint8)


def prepared(family: str, image: NDArray[np.uint8], kind: Any = np.float32) -> NDArray[Any]:
    shape = (None, 3, *SIZE) if kind is not np.uint8 else (None, *SIZE, 3)
    spec = TensorSpec("images", shape, np.dtype(kind))
    row = np.empty(shape[1:], kind)
    fill_row(row, image, spec, 0, FAMILIES[family].preprocessing)
    return row


def test_yolox_gets_bgr_as_opencv_reads_it_in_the_corner() -> None:
    image = photograph()
    bgr = image[..., ::-1]
    ratio = min(SIZE[0] / 120, SIZE[1] / 150)  # 0.8
    padded = np.full((*SIZE, 3), 114, np.uint8)
    resized = cv2.resize(np.ascontiguousarray(bgr), (120, 96), interpolation=cv2.INTER_LINEAR)
    assert (int(120 * ratio), int(150 * ratio)) == resized.shape[:2]
    padded[:96, :120] = resized
    np.testing.assert_array_equal(
        prepared("yolox", image), padded.transpose(2, 0, 1).astype(np.float32)
    )
    np.testing.assert_array_equal(prepared("yolox", image, np.uint8), padded)


def test_ppyoloe_gets_a_stretched_image_normalized_as_for_imagenet() -> None:
    image = photograph()
    resized = cv2.resize(image, SIZE[::-1], interpolation=cv2.INTER_CUBIC) / np.float32(255)
    wanted = (resized - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(
        prepared("ppyoloe", image), wanted.transpose(2, 0, 1), rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(
        prepared("ppyoloe-plus", image), resized.transpose(2, 0, 1), rtol=1e-6
    )


def test_yolov8_gets_a_letterbox_resized_linearly() -> None:
    image = photograph(240, 300)
    resized = cv2.resize(image, (120, 96), interpolation=cv2.INTER_LINEAR)
    wanted = np.full((*SIZE, 3), 114, np.uint8)
    wanted[:, 20:140] = resized
    np.testing.assert_allclose(
        prepared("yolov8", image), wanted.transpose(2, 0, 1) / np.float32(255), rtol=1e-6
    )


ranges = st.tuples(*[st.floats(0, 255)] * 3)
divisors = st.tuples(*[st.floats(0.5, 255)] * 3)


@given(st.sampled_from(["rgb", "bgr"]), st.one_of(st.just((0.0,) * 3), ranges), divisors)
@settings(deadline=None, max_examples=50)
def test_any_range_is_the_one_of_its_formula(colour: Any, mean: Any, std: Any) -> None:
    image = np.random.default_rng(1).integers(0, 256, (*SIZE, 3), np.uint8)
    how = Preprocessing(colour=colour, mean=mean, std=std)
    spec = TensorSpec("images", (None, 3, *SIZE), np.dtype(np.float32))
    wanted = (image.astype(np.float64) - mean) / std
    if colour == "bgr":
        wanted = wanted[..., ::-1]
    made = pictures.prepared([image], spec, how)
    np.testing.assert_allclose(made[0], wanted.transpose(2, 0, 1), rtol=1e-5, atol=1e-3)


def test_changes_are_read_as_a_user_writes_them() -> None:
    changed = YOLOV6.with_changes(
        parse_changes(["fit=stretch", "std=58.395,57.12,57.375", "mean=127.5"])
    )
    assert changed == Preprocessing("stretch", mean=(127.5,) * 3, std=(58.395, 57.12, 57.375))
    std = np.array([58.395, 57.12, 57.375])
    assert YOLOV6.with_changes({"fit": "stretch", "mean": 127.5, "std": std}) == changed
    assert YOLOV6.with_changes({"mean": "127"}).mean == (127, 127, 127)
    assert str(changed) == "stretch, (RGB - 127.5) / 58.395,57.12,57.375"
    assert str(FAMILIES["yolox"].preprocessing) == "corner (linear), BGR"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("fit", "fit is not of the form FIELD=VALUE"),
        ("size=3", "has no field size; the fields are fit, interpolation"),
        ("fit=middle", "choose one of letterbox, corner, stretch"),
        ("colour=grey", "choose one of rgb, bgr"),
        ("std=0", "numbers above 0"),
        ("std=1,2", "one number or three"),
        ("mean=nan", "one number or three"),
        ("mean=a,b,c", "one number or three"),
    ],
)
def test_changes_that_mean_nothing_are_refused(change: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_changes([change])
