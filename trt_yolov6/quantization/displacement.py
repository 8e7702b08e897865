"""Displacement by quantization of the float network's confident boxes and scores.

Agreement counts matches, so a small change shows only in some images. The mean movement of
confident anchors is over thousands of values: from a few images, it distinguishes two quantized
graphs, and shows each layer's effect on the detections. A layer's own signal-to-noise ratio does
not: two of YOLOX-Nano's hundred layers cause 70 % of the movement, and neither is among its
noisiest.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from trt_yolov6.detectors.layouts import LAYOUTS, Anchors, Outputs
from trt_yolov6.detectors.overlap import iou
from trt_yolov6.graph.model import Graph

SEEN = 0.2
"""Score of the float network from which on an anchor is watched."""

_FEWEST_ANCHORS = 3
"""Anchors watched in an image without such scores: its best."""

_Watched = tuple["NDArray[np.intp]", "NDArray[np.float64]", "NDArray[np.float64]"]
"""Places, boxes and scores of an image's confident anchors."""


class Displacement:
    """Watches the float network's anchors, one batch of images after the other."""

    def __init__(self, graph: Graph) -> None:
        """Take a graph of a layout that gives every anchor; see `can_watch`."""
        self._layout = LAYOUTS[graph.output_layout]
        self._size = graph.image_size
        self._batches: list[list[_Watched]] = []

    @staticmethod
    def can_watch(graph: Graph) -> bool:
        """Return whether a graph gives every anchor; with NMS inside, it does not."""
        return not LAYOUTS[graph.output_layout].nms_inside

    def watch(self, outputs: Outputs, images: int) -> None:
        """Take the float network's outputs for the next batch of images."""
        self._batches.append([_watched(one) for one in self._anchors(outputs, images)])

    def moved(self, batch: int, outputs: Outputs) -> NDArray[np.float64]:
        """Return how far each watched anchor has moved, from 0 to 2.

        That is 1 - IoU with the float box plus the largest change of a class's score.

        Args:
            batch: index among those watched.
            outputs: a quantized network's for the same images.
        """
        watched, moved = self._batches[batch], []
        for (anchors, boxes, scores), found in zip(
            watched, self._anchors(outputs, len(watched)), strict=True
        ):
            change = np.abs(found.scores[anchors].astype(np.float64) - scores).max(axis=1)
            moved.append(1 - iou(boxes, found.corners(anchors)) + change)
        return np.concatenate(moved)

    def _anchors(self, outputs: Outputs, images: int) -> Iterator[Anchors]:
        read = self._layout.read(outputs, self._size)
        for image in range(images):
            found = read(image)
            assert isinstance(found, Anchors)
            yield found


def _watched(one: Anchors) -> _Watched:
    best = one.scores.max(axis=1)
    anchors = np.flatnonzero(best >= SEEN)
    if not anchors.size:
        anchors = np.sort(np.argsort(-best, kind="stable")[:_FEWEST_ANCHORS])
    return anchors, one.corners(anchors), one.scores[anchors].astype(np.float64)
