"""Labelled boxes of a data set in the form of detections, to match detections with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trt_yolov6.data.coco import CocoDataset, CocoImage
from trt_yolov6.detectors.detections import Detections


def objects_of(
    dataset: CocoDataset, images: Sequence[CocoImage], *, crowds: bool = False
) -> list[Detections]:
    """Return the labelled boxes of images of a data set, scored 1; with crowds if asked for."""
    found = dataset.objects(crowds=crowds)
    return [
        Detections(boxes.astype(np.float32), np.ones(len(boxes), np.float32), classes)
        for boxes, classes in (found[image.id] for image in images)
    ]
