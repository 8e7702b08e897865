"""Labelled boxes of a data set in the form of detections, to match detections with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trt_yolov6.data.coco import CocoDataset, CocoImage
from trt_yolov6.detectors.detections import Detections


def objects_of(
    dataset: CocoDataset, images: Sequence[CocoImage], *, crowds: bool = False
) -> list[Detections]:
    """Return the labelled boxes of each image, scored 1, by class of the data set.

    Args:
        dataset: the labels.
        images: some of its images.
        crowds: take crowds for objects as well.
    """
    place_of = {number: place for place, number in enumerate(dataset.category_ids)}
    by_image: dict[int, list[tuple[tuple[float, ...], int]]] = {image.id: [] for image in images}
    for item in dataset.annotations:
        if item["image_id"] in by_image and (crowds or not item["iscrowd"]):
            x, y, width, height = item["bbox"]
            box = (x, y, x + width, y + height)
            by_image[item["image_id"]].append((box, place_of[item["category_id"]]))
    return [
        Detections(
            np.array([box for box, _ in items], np.float32).reshape(-1, 4),
            np.ones(len(items), np.float32),
            np.array([label for _, label in items], np.int64),
        )
        for items in by_image.values()
    ]
