"""COCO AP of one set of detections over any selection of its images, and its bootstrap intervals.

pycocotools matches and scores in one go. To resample images, matching is done once here and kept by
class; a resample then weights each image by how often it was drawn (Efron 1979). The difference of
two networks on the same draws varies less than either figure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trt_yolov6.common.statistics import Interval
from trt_yolov6.detectors.detections import Detections
from trt_yolov6.detectors.overlap import iou

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
"""COCO's, as pycocotools spells them."""

_RECALLS = np.linspace(0.0, 1.0, 101)

_MOST_DETECTIONS = 100
"""Detections of one class in one image that count, the best first."""

RESAMPLES = 400
"""Bootstrap resamples: the ends of a 95 % interval then vary by a tenth of its width."""


@dataclass(frozen=True)
class _Class:
    """Detections of one class over all images, the best first."""

    images: NDArray[np.intp]
    """(detections,) the image of each."""
    hits: NDArray[np.bool_]
    """(thresholds, detections) whether each meets an object."""
    objects: NDArray[np.int64]
    """(images,) objects of the class."""


@dataclass(frozen=True)
class MatchedDetections:
    """Detections matched with objects, ready to be scored over any draw of the images."""

    classes: tuple[_Class, ...]
    images: int

    def ap(self, draws: NDArray[np.int64] | None = None) -> float:
        """Return COCO AP (IoU 0.50:0.95, all sizes), the mean over classes with an object.

        Args:
            draws: (images,) how often each image counts; None: once.

        Returns:
            0..1; NaN where no image that counts has an object.
        """
        draws = np.ones(self.images, np.int64) if draws is None else draws
        values = [value for one in self.classes if (value := _precision(one, draws)) is not None]
        return float(np.mean(values)) if values else float("nan")


def matched(
    truth: Sequence[Detections], found: Sequence[Detections], least_score: float = 0.0
) -> MatchedDetections:
    """Match detections with objects as COCO does.

    Args:
        truth: the objects of each image.
        found: detections of the same images.
        least_score: least score of an object, for objects that are another network's detections.
    """
    objects = [one[one.confidence >= least_score] for one in truth]
    labels = sorted({int(label) for one in objects for label in one.class_id})
    return MatchedDetections(
        tuple(_match_class(objects, found, label) for label in labels), len(objects)
    )


def interval(
    statistic: Callable[[NDArray[np.int64]], float],
    images: int,
    *,
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
) -> Interval:
    """Return a statistic of a set of images with its percentile bootstrap interval.

    A resample has fewer different images, on which an AP is biased. So only the distances of the
    quantiles from the bootstrap's median are used, around the figure itself.

    Args:
        statistic: of (images,) counts, how often each image was drawn.
        images: how many there are.
        resamples: how often to draw; the same images for every statistic.
        confidence: of the interval, 0..1.
    """
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, images, (resamples, images))
    values = np.array([statistic(np.bincount(row, minlength=images)) for row in drawn])
    values = values[np.isfinite(values)]
    whole = statistic(np.ones(images, np.int64))
    if not values.size:
        return Interval(whole, whole, whole)
    tail = (1 - confidence) / 2
    low, middle, high = np.quantile(values, (tail, 0.5, 1 - tail))
    return Interval(whole, float(whole + low - middle), float(whole + high - middle))


def _match_class(truth: Sequence[Detections], found: Sequence[Detections], label: int) -> _Class:
    images, scores, hits, objects = [], [], [], []
    for image, (true, seen) in enumerate(zip(truth, found, strict=True)):
        boxes = true.xyxy[true.class_id == label].astype(np.float64)
        boxes = boxes[_areas(boxes) >= 0]
        own = seen.class_id == label
        order = np.argsort(-seen.confidence[own], kind="stable")[:_MOST_DETECTIONS]
        # COCO ignores detections of negative area, but counts them among the 100.
        order = order[_areas(seen.xyxy[own][order]) >= 0]
        given = seen.xyxy[own][order].astype(np.float64)
        to_object, _ = match(iou(given[:, None], boxes[None]), IOU_THRESHOLDS, len(given))
        images.append(np.full(len(given), image))
        scores.append(seen.confidence[own][order])
        hits.append(to_object >= 0)
        objects.append(len(boxes))
    order = np.argsort(-np.concatenate(scores), kind="stable")
    return _Class(
        np.concatenate(images)[order].astype(np.intp),
        np.concatenate(hits, axis=1)[:, order],
        np.array(objects, np.int64),
    )


def match(
    overlaps: Any, thresholds: NDArray[np.float64], count: int
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Match detections to objects as COCO does, each from the best down to the best one left.

    Args:
        overlaps: IoU (detections, objects), the best detection first; empty without either.
        thresholds: (thresholds,) least IoU of a match.
        count: detections.

    Returns:
        (thresholds, detections) the object of each detection, and (thresholds, objects) the
        reverse; -1 for none.
    """
    overlaps = np.asarray(overlaps, np.float64)
    objects = overlaps.shape[1] if overlaps.ndim == 2 else 0
    to_object = np.full((len(thresholds), count), -1, np.intp)
    to_detection = np.full((len(thresholds), objects), -1, np.intp)
    if not count or not objects:
        return to_object, to_detection
    least = np.minimum(thresholds, 1 - 1e-10).tolist()
    # Few objects come into question for a detection: lists of them are faster than arrays. Of
    # several with the same overlap the last one is taken.
    places = np.argwhere(overlaps >= min(least))
    near: dict[int, list[tuple[float, int]]] = {}
    for (index, item), overlap in zip(
        places.tolist(), overlaps[tuple(places.T)].tolist(), strict=True
    ):
        near.setdefault(index, []).append((overlap, item))
    for those in near.values():
        those.sort(reverse=True)
    matches: list[tuple[int, int, int]] = []
    for number, threshold in enumerate(least):
        taken: set[int] = set()
        for index, those in near.items():
            for overlap, item in those:
                if overlap < threshold:
                    break
                if item not in taken:
                    taken.add(item)
                    matches.append((number, index, item))
                    break
    if matches:
        rows, indices, items = np.array(matches).T
        to_object[rows, indices], to_detection[rows, items] = items, indices
    return to_object, to_detection


def _areas(boxes: NDArray[np.floating]) -> NDArray[np.floating]:
    sides = boxes[:, 2:] - boxes[:, :2]
    return np.asarray(sides[:, 0] * sides[:, 1])


def _precision(one: _Class, draws: NDArray[np.int64]) -> float | None:
    """Return a class's AP, mean over IoU thresholds; None where no drawn image has an object."""
    objects = int(draws @ one.objects)
    if not objects:
        return None
    counts = draws[one.images]
    drawn = counts > 0
    counts = counts[drawn]
    # Copies of an image stand next to each other and count as pycocotools would count them one
    # by one, except for the order of equals.
    true = np.cumsum(one.hits[:, drawn] * counts, axis=1)
    seen = np.cumsum(counts)
    # Precision at each place or any further on, and none where a recall is not reached.
    envelope = np.zeros((len(true), len(seen) + 1))
    envelope[:, :-1] = np.maximum.accumulate((true / seen)[:, ::-1], axis=1)[:, ::-1]
    needed = np.searchsorted(np.arange(objects + 1) / objects, _RECALLS)
    # One search serves all thresholds: each one's counts are above those of the one before.
    row = np.arange(len(true))[:, None]
    above = row * (objects + 1)
    at = np.searchsorted((true + above).ravel(), needed + above) - row * len(seen)
    return float(np.take_along_axis(envelope, at, axis=1).mean())
