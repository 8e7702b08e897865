"""Overlap of boxes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def iou(boxes: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the intersection over union of boxes (..., 4), broadcast; 0 where either is empty.

    Args:
        boxes: x1, y1, x2, y2.
        others: the same; `iou(a[:, None], b[None])` compares each of `a` with each of `b`.
    """
    low = np.maximum(boxes[..., :2], others[..., :2])
    high = np.minimum(boxes[..., 2:], others[..., 2:])
    shared = np.prod(np.maximum(high - low, 0), axis=-1)
    first, second = (
        np.prod(np.maximum(each[..., 2:] - each[..., :2], 0), axis=-1) for each in (boxes, others)
    )
    union = first + second - shared
    return np.asarray(np.divide(shared, union, out=np.zeros_like(shared), where=union > 0))
