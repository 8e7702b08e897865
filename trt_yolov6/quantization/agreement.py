"""Agreement of a quantized detector with the float one, on images without labels.

What the float network is sure of is taken for the truth, and the quantized one's AP against it is
the agreement. Unlike an error of tensors it sees what the engine's user sees: boxes that move,
scores that change order, objects that vanish or appear.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trt_yolov6.detectors.detections import Detections

CONFIDENT = 0.3
"""A float detection counts as true from this score on."""


def agreement(
    reference: Sequence[Detections],
    found: Sequence[Detections],
    classes: int,
    confident: float = CONFIDENT,
) -> float:
    """Return the COCO AP of `found` against the confident detections of `reference`.

    Args:
        reference: of the float network, one an image.
        found: of the quantized network on the same images, down to low scores.
        classes: how many classes there are.
        confident: least score of a reference detection that counts, see `least_score`.

    Returns:
        0..1. Where the reference detects nothing at all, 1 if `found` is not sure of anything
        either, else 0.
    """
    confident = least_score(reference, confident)
    truth = [_entries(image, one, confident) for image, one in enumerate(reference)]
    if not any(truth):
        return float(not any(_entries(image, one, confident) for image, one in enumerate(found)))
    results = [_entries(image, one, 0.0) for image, one in enumerate(found)]
    with contextlib.redirect_stdout(io.StringIO()):
        scorer = _scorer(
            _coco(truth, len(reference), classes), _coco(results, len(reference), classes)
        )
        # Objects of every size count alike here, so the other size ranges need no matching.
        scorer.params.areaRng = scorer.params.areaRng[:1]
        scorer.params.areaRngLbl = scorer.params.areaRngLbl[:1]
        # And only the figure of 100 detections an image is read.
        scorer.params.maxDets = scorer.params.maxDets[-1:]
        scorer.evaluate()
        scorer.accumulate()
    precision = scorer.eval["precision"][:, :, :, 0, -1]
    return float(np.mean(precision[precision > -1]))


def least_score(reference: Sequence[Detections], confident: float) -> float:
    """Return the score from which on a reference detection counts: `confident`, in 0..1.

    Where none reaches it, as on images of another kind than the network was trained on, those count
    that score at least half as high as the best.
    """
    best = max((float(one.confidence.max(initial=0)) for one in reference), default=0.0)
    return best / 2 if 0 < best < confident else confident


def _scorer(truth: Any, results: Any) -> Any:
    """Return pycocotools' scorer with a faster matching of detections, which finds the same.

    Its own goes over thresholds, detections and objects in Python; a quarter of the time of
    comparing two graphs goes into that.
    """
    from pycocotools.cocoeval import COCOeval

    class Scorer(COCOeval):  # type: ignore[misc]
        def evaluateImg(
            self,
            imgId: int,
            catId: int,
            aRng: Sequence[float],
            maxDet: int,
        ) -> dict[str, Any] | None:
            truth, found = self._gts[imgId, catId], self._dts[imgId, catId]
            if not truth and not found:
                return None
            if not all(aRng[0] <= item["area"] <= aRng[1] for item in (*truth, *found)):
                # Only sizes beyond any image's make a difference between objects.
                result: dict[str, Any] = super().evaluateImg(imgId, catId, aRng, maxDet)
                return result
            order = np.argsort([-item["score"] for item in found], kind="mergesort")[:maxDet]
            found = [found[index] for index in order]
            to_truth, to_found = match(self.ious[imgId, catId], self.params.iouThrs, len(found))
            ids = np.array([item["id"] for item in truth], np.float64)
            found_ids = np.array([item["id"] for item in found], np.float64)
            if not truth or not found:
                found_matches = np.zeros((len(self.params.iouThrs), len(found)))
                truth_matches = np.zeros((len(self.params.iouThrs), len(truth)))
            else:
                found_matches = np.where(to_truth >= 0, ids[to_truth], 0.0)
                truth_matches = np.where(to_found >= 0, found_ids[to_found], 0.0)
            return {
                "image_id": imgId,
                "category_id": catId,
                "aRng": aRng,
                "maxDet": maxDet,
                "dtIds": [item["id"] for item in found],
                "gtIds": [item["id"] for item in truth],
                "dtMatches": found_matches,
                "gtMatches": truth_matches,
                "dtScores": [item["score"] for item in found],
                "gtIgnore": np.zeros(len(truth), np.int64),
                "dtIgnore": np.zeros(found_matches.shape, np.bool_),
            }

    return Scorer(truth, results, "bbox")


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
    least = np.minimum(thresholds, 1 - 1e-10)
    rows = np.arange(len(thresholds))
    for index in np.flatnonzero(overlaps.max(axis=1) >= least.min()):
        left = np.where(to_detection < 0, overlaps[index], -1.0)
        # Of several with the same overlap the last one is taken.
        best = objects - 1 - left[:, ::-1].argmax(axis=1)
        hit = left[rows, best] >= least
        to_object[hit, index] = best[hit]
        to_detection[rows[hit], best[hit]] = index
    return to_object, to_detection


def _entries(image: int, detections: Detections, least: float) -> list[dict[str, Any]]:
    corners = detections.xyxy.astype(np.float64)
    sides = corners[:, 2:] - corners[:, :2]
    return [
        {
            "image_id": image,
            "category_id": int(label),
            "bbox": [*box[:2].tolist(), *side.tolist()],
            "area": float(side[0] * side[1]),
            "iscrowd": 0,
            "score": float(score),
        }
        for box, side, label, score in zip(
            corners, sides, detections.class_id, detections.confidence, strict=True
        )
        if score >= least
    ]


def _coco(entries: Sequence[list[dict[str, Any]]], images: int, classes: int) -> Any:
    from pycocotools.coco import COCO

    coco = COCO()
    coco.dataset = {
        "images": [{"id": image} for image in range(images)],
        "categories": [{"id": label} for label in range(classes)],
        "annotations": [
            {**entry, "id": number}
            for number, entry in enumerate((e for one in entries for e in one), start=1)
        ],
    }
    coco.createIndex()
    return coco
