"""Displacement by quantization of the float network's confident boxes and scores.

Agreement counts matches, so that a small change shows in some images only. Movements of the anchors
that the float network gives a score are sums over thousands of values: they rank layers by what
each does to the detections, from a few images. A layer's own signal-to-noise ratio does not: two of
YOLOX-Nano's hundred layers make 70 % of the movement, and neither is among its noisiest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from trt_yolov6.detectors.layouts import LAYOUTS, Anchors
from trt_yolov6.detectors.overlap import iou
from trt_yolov6.graph.model import Graph
from trt_yolov6.graph.reference import reference_session, runner
from trt_yolov6.quantization.qdq.integer_arithmetic import with_integer_convolutions

SEEN = 0.2
"""Score of the float network from which on an anchor is watched."""

_FEWEST_ANCHORS = 3
"""Anchors watched in an image without such scores: its best."""


class Displacement:
    """Watches the float network's anchors in a few images."""

    def __init__(self, graph: Graph, images: Sequence[NDArray[Any]]) -> None:
        """Run the float network.

        Args:
            graph: float, of a layout that gives every anchor; see `can_watch`.
            images: each what the graph's input takes.
        """
        self._layout = LAYOUTS[graph.output_layout]
        self._size = graph.image_size
        self._images = images
        self._watched = [_watched(one) for one in self._anchors(graph.model)]

    @staticmethod
    def can_watch(graph: Graph) -> bool:
        """Return whether a graph gives every anchor; with NMS inside, it does not."""
        return not LAYOUTS[graph.output_layout].nms_inside

    def of(self, model: onnx.ModelProto) -> float:
        """Return the mean over watched anchors of 1 - IoU with the float box, plus the largest
        change of a class's score; from 0 (nothing moves) to 2."""
        moved = []
        for (places, boxes, scores), found in zip(self._watched, self._anchors(model), strict=True):
            change = np.abs(found.scores[places].astype(np.float64) - scores).max(axis=1)
            moved.append(1 - iou(boxes, found.corners(places)) + change)
        return float(np.concatenate(moved).mean())

    def _anchors(self, model: onnx.ModelProto) -> Iterator[Anchors]:
        run = runner(reference_session(with_integer_convolutions(model)))
        for images in self._images:
            read = self._layout.read(run(images), self._size)
            for index in range(len(images)):
                found = read(index)
                assert isinstance(found, Anchors)
                yield found


def _watched(
    one: Anchors,
) -> tuple[NDArray[np.intp], NDArray[np.float64], NDArray[np.float64]]:
    best = one.scores.max(axis=1)
    places = np.flatnonzero(best >= SEEN)
    if not places.size:
        places = np.sort(np.argsort(-best, kind="stable")[:_FEWEST_ANCHORS])
    return places, one.corners(places), one.scores[places].astype(np.float64)
