"""Detections drawn on images: boxes with names and scores, readable on any background."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from trt_yolov6.detectors.detections import Detections

FONT = cv2.FONT_HERSHEY_SIMPLEX

_FONT_HEIGHT = cv2.getTextSize("A", FONT, 1.0, 1)[0][1]
"""Height of a capital letter at scale 1, in pixels."""

Colour = tuple[int, int, int]


def draw_detections(
    image: NDArray[np.uint8], detections: Detections, class_names: Sequence[str]
) -> NDArray[np.uint8]:
    """Draw boxes with names and scores on a copy of an image, the best on top.

    Line width and letters grow with the image; labels stay inside it. A thin black or white line
    around each box keeps it visible on a background of its own colour.

    Args:
        image: uint8 (height, width, 3) RGB.
        detections: boxes in pixels of the image.
        class_names: by class index; an index beyond them is drawn as a number.

    Returns:
        A new array like `image`.
    """
    canvas: NDArray[np.uint8] = image.copy()
    side = min(image.shape[:2])
    thickness = max(1, round(side / 250))
    letter = max(8.0, side / 45)
    order = range(len(detections) - 1, -1, -1)
    height, width = image.shape[:2]
    last_pixel = np.array([width - 1, height - 1] * 2)
    corners = np.minimum(np.rint(detections.xyxy), last_pixel).astype(int).tolist()
    for index in order:
        x1, y1, x2, y2 = corners[index]
        colour = class_colour(int(detections.class_id[index]))
        cv2.rectangle(canvas, (x1, y1), (x2, y2), _contrast(colour), thickness + 2)
        cv2.rectangle(canvas, (x1, y1), (x2, y2), colour, thickness)
    # All labels after all boxes: no line crosses a name.
    for index in order:
        label = int(detections.class_id[index])
        name = class_names[label] if label < len(class_names) else str(label)
        x1, y1, _, y2 = corners[index]
        _draw_label(
            canvas,
            f"{name} {detections.confidence[index]:.2f}",
            (x1, y1, y2),
            class_colour(label),
            letter,
        )
    return canvas


def class_colour(index: int) -> Colour:
    """Return the RGB colour of a class, the same in every image.

    Hues step by the golden ratio, so that neighbouring classes differ most; saturation and
    brightness alternate to distinguish later ones.
    """
    hue = (0.02 + index * 0.618034) % 1
    saturation = (0.85, 0.55, 1.0)[index // 7 % 3]
    value = (1.0, 0.8, 0.65)[index // 21 % 3]
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def _contrast(colour: Colour) -> Colour:
    """Return black or white, whichever stands out more on a colour."""
    luminance = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    return (0, 0, 0) if luminance > 110 else (255, 255, 255)


def _draw_label(
    canvas: NDArray[np.uint8],
    text: str,
    box: tuple[int, int, int],
    colour: Colour,
    letter: float,
) -> None:
    """Write `text` in a filled box above the box (x1, y1, y2), or inside it for want of room."""
    # OpenCV 4 has letters for ASCII only; OpenCV 5 crashes over half a surrogate pair.
    encoding = "ascii" if cv2.__version__.startswith("4.") else "utf-8"
    text = text.encode(encoding, "replace").decode()
    height, width = canvas.shape[:2]
    scale = letter / _FONT_HEIGHT
    stroke = max(1, round(letter / 10))
    padding = max(2, round(letter / 4))
    (text_width, text_height), descent = cv2.getTextSize(text, FONT, scale, stroke)
    if text_width + 2 * padding > width:
        scale *= max(1, width - 2 * padding) / text_width
        stroke = 1
        (text_width, text_height), descent = cv2.getTextSize(text, FONT, scale, stroke)
    full_width = text_width + 2 * padding
    full_height = text_height + descent + 2 * padding
    x1, y1, y2 = box
    left = max(0, min(x1, width - full_width))
    above = y1 - full_height
    top = above if above >= 0 else max(0, min(y1, y2, height - full_height))
    cv2.rectangle(canvas, (left, top), (left + full_width, top + full_height), colour, cv2.FILLED)
    cv2.putText(
        canvas,
        text,
        (left + padding, top + padding + text_height),
        FONT,
        scale,
        _contrast(colour),
        stroke,
        cv2.LINE_AA,
    )
