"""Fit an image into the network's input, gray around it as in the paper, and map boxes back."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from trt_yolov6.data.preprocessing import Fit, Interpolation
from trt_yolov6.errors import UserError
from trt_yolov6.spec import is_whole

GRAY = 114
"""Value of the pixels around the image, in all three channels."""

_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Letterbox:
    """Place of an image inside the network's input. All sizes are (height, width) in pixels."""

    source: tuple[int, int]
    """Size of the original image."""
    size: tuple[int, int]
    """Size of the network's input."""
    resized: tuple[int, int]
    """Size of the image inside the input."""
    scale: float
    """Factor both sides were resized by, before rounding to whole pixels; the smaller where the
    image is stretched."""
    top: int
    """Gray rows above the image."""
    left: int
    """Gray columns left of the image."""

    def to_source(self, boxes: NDArray[np.floating], *, clip: bool = True) -> NDArray[np.float32]:
        """Map boxes (n, 4) from the network's input to the original image, see `to_sources`."""
        return _mapped(boxes, _mapping(self), clip=clip)


def to_sources(
    boxes: NDArray[np.floating], letterboxes: Sequence[Letterbox], *, clip: bool
) -> NDArray[np.float32]:
    """Map the boxes of several images from the network's input to the original images.

    Each axis uses its own exact ratio, because rounding to whole pixels makes the two differ.

    Args:
        boxes: (images, n, 4), x1, y1, x2, y2 in input pixels.
        letterboxes: one an image.
        clip: cut them off at the borders of their image, not just where float32 ends.

    Returns:
        float32 (images, n, 4), x1, y1, x2, y2 in pixels of the original images.
    """
    several = list(letterboxes)
    if several and several.count(several[0]) == len(several):
        # Repeated for each box: NumPy's broadcast loops over four numbers take twice as long.
        table = _mapping(several[0])[:, None].repeat(boxes.shape[1], axis=1)
    else:
        table = np.array([_mapping(one) for one in several]).reshape(-1, 3, 1, 4).swapaxes(0, 1)
    return _mapped(boxes, table, clip=clip)


def _mapped(
    boxes: NDArray[np.floating], table: NDArray[np.float64], *, clip: bool
) -> NDArray[np.float32]:
    # In place and without `np.clip`: for a few boxes the overhead of calls dominates.
    start, ratio, most = table
    mapped = boxes - start
    mapped *= ratio
    np.maximum(mapped, 0 if clip else -_LARGEST, out=mapped)
    np.minimum(mapped, most if clip else _LARGEST, out=mapped)
    result: NDArray[np.float32] = mapped.astype(np.float32)
    return result


@functools.lru_cache(maxsize=1024)
def _mapping(one: Letterbox) -> NDArray[np.float64]:
    """Return offset, factor and largest value of x1, y1, x2, y2: float64 (3, 4)."""
    height, width = one.source
    ratios = width / one.resized[1], height / one.resized[0]
    table = np.array([(one.left, one.top) * 2, ratios * 2, (width, height) * 2], np.float64)
    table.flags.writeable = False
    return table


@functools.lru_cache(maxsize=1024)
def fit(
    source: tuple[int, int], size: tuple[int, int], border: int = 0, mode: Fit = "letterbox"
) -> Letterbox:
    """Return where an image of size `source` goes in an input of `size`, both (height, width).

    The image is enlarged as well as shrunk. In a letterbox its aspect ratio is kept and it is
    centred; an odd row or column of gray goes below or right. In a corner, sides are rounded down,
    as YOLOX does.

    Args:
        source: height and width of the image.
        size: height and width of the network's input.
        border: least gray pixels on every side: the image is resized to fit `size` less twice
            this. Section 2.4.3 of the paper (arXiv:2209.02976) uses it so that
            objects at the edge keep the context the network was trained with, as in 634 + 2 x 3.
        mode: see `preprocessing.Fit`.

    Raises:
        UserError: a border is asked for in another mode than `letterbox`.
    """
    if mode != "letterbox":
        if border:
            raise UserError(
                f"a gray border is for letterboxed images, and this engine's input is of fit "
                f"{mode}; leave `resize` and `border` out.",
            )
        scale = min(size[0] / source[0], size[1] / source[1])
        shrunk = max(1, int(source[0] * scale)), max(1, int(source[1] * scale))
        return Letterbox(source, size, size if mode == "stretch" else shrunk, scale, 0, 0)
    inner = size[0] - 2 * border, size[1] - 2 * border
    scale = min(inner[0] / source[0], inner[1] / source[1])
    # A side of a very long image would round to nothing.
    height, width = (max(1, round(side * scale)) for side in source)
    return Letterbox(
        source=source,
        size=size,
        resized=(height, width),
        scale=scale,
        top=round((size[0] - height) / 2 - 0.1),
        left=round((size[1] - width) / 2 - 0.1),
    )


def letterbox(
    image: NDArray[np.uint8],
    size: tuple[int, int],
    border: int = 0,
    mode: Fit = "letterbox",
    interpolation: Interpolation = "area",
) -> tuple[NDArray[np.uint8], Letterbox]:
    """Place an image in the network's input.

    Args:
        image: uint8 (height, width, 3).
        size: height and width of the input.
        border, mode: see `fit`.
        interpolation: how it is resized.

    Returns:
        uint8 (*size, 3), and where the image lies in it.
    """
    placed = fit((image.shape[0], image.shape[1]), size, border, mode)
    if placed.resized == placed.source == size:
        return image, placed
    canvas = np.empty((*size, 3), np.uint8)
    fill(canvas, image, placed, interpolation)
    return canvas, placed


def fill(
    canvas: NDArray[np.uint8],
    image: NDArray[np.uint8],
    placed: Letterbox,
    interpolation: Interpolation = "area",
) -> None:
    """Write an image, resized, and the gray around it into an array of the input's size.

    Args:
        canvas: uint8 (height, width, 3), C-contiguous; such as a row of an engine's input.
        image: uint8 (height, width, 3).
        placed: where it goes, see `fit`.
        interpolation: how it is resized.
    """
    height, width = placed.resized
    bottom, right = placed.top + height, placed.left + width
    canvas[: placed.top] = GRAY
    canvas[bottom:] = GRAY
    canvas[placed.top : bottom, : placed.left] = GRAY
    canvas[placed.top : bottom, right:] = GRAY
    inside = canvas[placed.top : bottom, placed.left : right]
    if placed.resized == placed.source:
        inside[...] = image
        return
    method = {"linear": cv2.INTER_LINEAR, "cubic": cv2.INTER_CUBIC}.get(
        interpolation, cv2.INTER_AREA if placed.scale < 1 else cv2.INTER_LINEAR
    )
    if inside.flags.c_contiguous:  # OpenCV writes whole rows in place
        cv2.resize(image, (width, height), dst=inside, interpolation=method)
    else:
        inside[...] = cv2.resize(image, (width, height), interpolation=method)


def resolve_border(
    resize: int | tuple[int, int] | None, border: int | None, image_size: tuple[int, int]
) -> int:
    """Return the gray border that a resize target and a border ask for; either implies the other.

    Args:
        resize: side, or (height, width), that images are resized to fit; None: follows.
        border: gray pixels on every side; None: follows, 0 without a resize target.
        image_size: height and width of the network's input.

    Raises:
        UserError: resize target + 2 x border is not the input size, or nothing is left of it.
    """
    height, width = image_size
    if resize is None:
        border = border or 0
        if not 0 <= border < min(image_size) / 2:
            raise UserError(
                f"a border of {border} pixels does not fit the engine's input of "
                f"{height}x{width}; give `border` between 0 and {(min(image_size) - 1) // 2}.",
            )
        return border
    sides = resize if isinstance(resize, (tuple, list)) else (resize, resize)
    if len(sides) != 2 or not all(map(is_whole, sides)):
        raise UserError(f"`resize` is {resize!r}; give a side, or (height, width).")
    if not isinstance(resize, (tuple, list)):
        # The side of a square target; on other inputs, the longer side.
        shrink = max(image_size) - resize
        resize = height - shrink, width - shrink
    implied = (height - resize[0]) / 2 if border is None else border
    fits = all(
        side > 0 and side + 2 * implied == full
        for side, full in zip(resize, image_size, strict=True)
    )
    if not fits or implied < 0 or implied != int(implied):
        raise UserError(
            f"`resize` {resize[0]}x{resize[1]} with a border of "
            f"{border if border is not None else 'equal pixels'} on every side does not make the "
            f"engine's input of {height}x{width}; choose them so that resize + 2 x border is "
            "that size.",
        )
    return int(implied)
