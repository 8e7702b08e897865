"""Intersection over union (IoU) of boxes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def iou(boxes: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the intersection over union of boxes (..., 4), broadcast; 0 where either is empty.

    Args:
        boxes: x1, y1, x2, y2.
        others: the same; `iou(a[:, None], b[None])` compares each of `a` with each of `b`.
    """
    left, top, right, bottom = np.moveaxis(boxes, -1, 0)
    other_left, other_top, other_right, other_bottom = np.moveaxis(others, -1, 0)
    width = np.minimum(right, other_right) - np.maximum(left, other_left)
    height = np.minimum(bottom, other_bottom) - np.maximum(top, other_top)
    shared = np.maximum(width, 0) * np.maximum(height, 0)
    first = np.maximum(right - left, 0) * np.maximum(bottom - top, 0)
    second = np.maximum(other_right - other_left, 0) * np.maximum(other_bottom - other_top, 0)
    union = first + second - shared
    return np.asarray(np.divide(shared, union, out=np.zeros_like(shared), where=union > 0))
