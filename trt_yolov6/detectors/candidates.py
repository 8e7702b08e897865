"""Scores above a threshold with their boxes, chosen before they leave the device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Candidates:
    """The scores of a batch that exceed a threshold, in the order of the outputs' elements.

    images:  int64 (n,), place of the image in the batch, ascending
    classes: int64 (n,), index into the class names
    anchors: int64 (n,), index of the anchor
    scores:  float32 (n,), in 0..1
    boxes:   float32 (n, 4), x1, y1, x2, y2 in input pixels
    """

    images: NDArray[np.int64]
    classes: NDArray[np.int64]
    anchors: NDArray[np.int64]
    scores: NDArray[np.float32]
    boxes: NDArray[np.float32]
