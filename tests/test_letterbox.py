"""The letterbox keeps shapes, centres pictures, surrounds them with gray, and can be undone."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trt_yolov6.data.letterbox import fit, letterbox, resolve_border, to_sources
from trt_yolov6.data.preprocessing import Fit
from trt_yolov6.errors import UserError

sides = st.integers(1, 3000)
inputs = st.tuples(st.integers(2, 20), st.integers(2, 20)).map(lambda s: (32 * s[0], 32 * s[1]))
borders = st.integers(0, 20)


@given(sides, sides, inputs, borders)
def test_the_picture_lies_centred_inside_the_border(
    height: int, width: int, size: tuple[int, int], border: int
) -> None:
    placed = fit((height, width), size, border)
    above, left = placed.top, placed.left
    below = size[0] - above - placed.resized[0]
    right = size[1] - left - placed.resized[1]
    assert min(above, below, left, right) >= border
    assert 0 <= below - above <= 1
    assert 0 <= right - left <= 1
    # One side of the picture fills what the border leaves.
    assert border in (above, left)


@given(sides, sides, inputs, borders)
def test_the_aspect_ratio_is_kept_to_rounding(
    height: int, width: int, size: tuple[int, int], border: int
) -> None:
    placed = fit((height, width), size, border)
    for now, before in zip(placed.resized, (height, width), strict=True):
        assert abs(now - before * placed.scale) <= 0.5 + 1e-9 or now == 1


@given(sides, sides, inputs, borders, st.data())
def test_boxes_go_there_and_back(
    height: int, width: int, size: tuple[int, int], border: int, data: st.DataObject
) -> None:
    unit = st.floats(0, 1)
    x1, x2 = sorted(data.draw(st.tuples(unit, unit)))
    y1, y2 = sorted(data.draw(st.tuples(unit, unit)))
    box = np.array([[x1 * width, y1 * height, x2 * width, y2 * height]])
    placed = fit((height, width), size, border)
    # The box in the input, from its share of the picture's area there.
    there = np.array(
        [
            [
                placed.left + x1 * placed.resized[1],
                placed.top + y1 * placed.resized[0],
                placed.left + x2 * placed.resized[1],
                placed.top + y2 * placed.resized[0],
            ]
        ]
    )
    back = placed.to_source(there)
    assert back.dtype == np.float32
    np.testing.assert_allclose(back, box, atol=1e-3 * max(height, width))
    far = placed.to_source(np.array([[-1e4, -1e4, 1e5, 1e5]]))
    np.testing.assert_array_equal(far, [[0, 0, width, height]])


@given(st.integers(1, 200), st.integers(1, 200), borders)
def test_around_the_picture_all_is_gray_and_inside_is_the_picture(
    height: int, width: int, border: int
) -> None:
    image = np.full((height, width, 3), 7, np.uint8)
    boxed, placed = letterbox(image, (96, 160), border)
    assert boxed.shape == (96, 160, 3)
    assert boxed.dtype == np.uint8
    expected = np.full((96, 160, 3), 114, np.uint8)  # as the networks were trained
    rows, columns = placed.resized
    expected[placed.top : placed.top + rows, placed.left : placed.left + columns] = 7
    np.testing.assert_array_equal(boxed, expected)


def test_known_sizes() -> None:
    wide = fit((480, 640), (640, 640))
    assert (wide.scale, wide.resized, wide.top, wide.left) == (1, (480, 640), 80, 0)
    bordered = fit((480, 640), (640, 640), 3)
    assert (bordered.resized, bordered.top, bordered.left) == ((476, 634), 82, 3)
    # 111.5 gray rows: the odd one goes below.
    assert fit((417, 640), (640, 640)).top == 111


def test_a_picture_of_the_inputs_size_is_not_touched() -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    np.testing.assert_array_equal(letterbox(image, (64, 64))[0], image)


@pytest.mark.parametrize(("side", "interpolation"), [(128, cv2.INTER_AREA), (40, cv2.INTER_LINEAR)])
def test_shrinking_averages_areas_and_enlarging_interpolates(side: int, interpolation: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (side, side, 3)).astype(np.uint8)
    expected = cv2.resize(image, (64, 64), interpolation=interpolation)
    np.testing.assert_array_equal(letterbox(image, (64, 64))[0], expected)
    if side == 128:
        averaged = image.reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
        assert np.abs(letterbox(image, (64, 64))[0] - averaged).max() <= 0.5


@pytest.mark.parametrize(
    ("resize", "border", "size", "expected"),
    [
        (None, None, (640, 640), 0),
        (634, 3, (640, 640), 3),
        (634, None, (640, 640), 3),
        (None, 3, (640, 640), 3),
        (640, None, (640, 640), 0),
        ((378, 634), None, (384, 640), 3),
        (634, None, (384, 640), 3),
    ],
)
def test_a_resize_target_and_a_border_imply_each_other(
    resize: int | tuple[int, int] | None,
    border: int | None,
    size: tuple[int, int],
    expected: int,
) -> None:
    assert resolve_border(resize, border, size) == expected


@pytest.mark.parametrize(
    ("resize", "border"),
    [(634, 4), (635, None), (700, None), (0, 320), (None, 320), (None, -1), ((634, 600), None)],
)
def test_targets_and_borders_that_do_not_add_up_are_refused(
    resize: int | tuple[int, int] | None, border: int | None
) -> None:
    with pytest.raises(UserError, match="border"):
        resolve_border(resize, border, (640, 640))


@pytest.mark.parametrize(
    ("resize", "border", "says"),
    [
        (None, 120, "a border of 120 pixels does not fit the engine's input of 240x320; give "),
        (None, 120, "between 0 and 119."),
        (320, 4, "240x320 with a border of 4 on every side"),
        ((300, 301), None, "300x301 with a border of equal pixels on every side"),
    ],
)
def test_what_does_not_add_up_is_said_in_numbers(
    resize: int | tuple[int, int] | None, border: int | None, says: str
) -> None:
    with pytest.raises(UserError) as caught:
        resolve_border(resize, border, (240, 320))
    assert says in str(caught.value)


@given(sides, sides, inputs)
def test_in_a_corner_the_picture_is_as_large_as_yolox_makes_it(
    height: int, width: int, size: tuple[int, int]
) -> None:
    placed = fit((height, width), size, mode="corner")
    ratio = min(size[0] / height, size[1] / width)
    assert placed.resized == (max(1, int(height * ratio)), max(1, int(width * ratio)))
    assert (placed.top, placed.left) == (0, 0)
    assert placed.resized[0] <= size[0]
    assert placed.resized[1] <= size[1]


@given(sides, sides, inputs)
def test_stretched_corners_come_back(height: int, width: int, size: tuple[int, int]) -> None:
    placed = fit((height, width), size, mode="stretch")
    assert (placed.resized, placed.top, placed.left) == (size, 0, 0)
    whole = placed.to_source(np.array([[0.0, 0, size[1], size[0]]]))
    np.testing.assert_allclose(whole, [[0, 0, width, height]], rtol=1e-6)


@pytest.mark.parametrize("mode", ["corner", "stretch"])
def test_a_border_is_for_letterboxes(mode: Fit) -> None:
    with pytest.raises(UserError, match=f"fit {mode}; leave `resize` and `border` out"):
        fit((40, 40), (64, 64), 3, mode)


def test_boxes_that_are_not_clipped_end_where_float32_does() -> None:
    placed = fit((1280, 2560), (640, 1280))
    boxes = np.array([[-10, 5, 1300, 700], [-3e38, -1e39, 3e38, 1e39]])
    most = float(np.finfo(np.float32).max)
    expected = [[-20, 10, 2600, 1400], [-most, -most, most, most]]
    assert placed.to_source(boxes, clip=False).tolist() == expected
    assert to_sources(boxes[None], [placed], clip=False)[0].tolist() == expected


@given(
    st.lists(st.tuples(sides, sides), min_size=1, max_size=5),
    inputs,
    st.integers(0, 2**32 - 1),
    st.booleans(),
)
def test_boxes_of_several_images_are_mapped_as_each_alone(
    sources: list[tuple[int, int]], size: tuple[int, int], seed: int, clip: bool
) -> None:
    random = np.random.default_rng(seed)
    placed = [fit(source, size) for source in sources]
    boxes = random.uniform(-100, 900, (len(placed), 7, 4)).astype(np.float32)
    found = to_sources(boxes, placed, clip=clip)
    for index, one in enumerate(placed):
        np.testing.assert_array_equal(found[index], one.to_source(boxes[index], clip=clip))
