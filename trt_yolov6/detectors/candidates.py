"""Candidates of a batch, or the boxes kept, where a device chooses them before the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trt_yolov6.spec import NmsSettings

MAX_CANDIDATES = 30000
"""Boxes an image brings to the suppression at most, best first, as the authors' evaluation does."""


@dataclass(frozen=True)
class Candidates:
    """The scores of a batch that exceed a threshold, in the order of the outputs' elements."""

    images: NDArray[np.int64]
    """(n,), index of the image in the batch, ascending."""
    classes: NDArray[np.int64]
    """(n,), index into the class names."""
    scores: NDArray[np.float32]
    """(n,), in 0..1."""
    boxes: NDArray[np.float32]
    """(n, 4), x1, y1, x2, y2 in input pixels."""


@dataclass(frozen=True)
class Suppressed:
    """The boxes that suppression has kept of each image of a batch, the best first."""

    counts: Sequence[int]
    """Number of boxes that each image of the batch has kept."""
    boxes: NDArray[np.float32]
    """(batch, n, 4), x1, y1, x2, y2 in input pixels, or see `clip`; those after an image's count
    are undefined, as are their scores and classes."""
    scores: NDArray[np.float32]
    """(batch, n), in 0..1."""
    classes: NDArray[np.int64]
    """(batch, n), indices into the class names."""
    nms: NmsSettings
    """The thresholds."""
    clip: bool | None = None
    """Boxes are in pixels of the original images already, cut off at their borders or not; None:
    they are in input pixels."""
