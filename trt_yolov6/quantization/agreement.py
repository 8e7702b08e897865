"""How well a quantized detector agrees with the float one, on images that need no labels.

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

from trt_yolov6.detection import Detections

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
        confident: least score of a reference detection that counts. Where none reaches it, as on
            images of another kind than the network was trained on, those count that score at least
            half as high as the best.

    Returns:
        0..1. Where the reference detects nothing at all, 1 if `found` is not sure of anything
        either, else 0.
    """
    from pycocotools.cocoeval import COCOeval

    best = max((float(one.scores.max(initial=0)) for one in reference), default=0.0)
    if 0 < best < confident:
        confident = best / 2
    truth = [_entries(image, one, confident) for image, one in enumerate(reference)]
    if not any(truth):
        return float(not any(_entries(image, one, confident) for image, one in enumerate(found)))
    results = [_entries(image, one, 0.0) for image, one in enumerate(found)]
    with contextlib.redirect_stdout(io.StringIO()):
        scorer = COCOeval(
            _coco(truth, len(reference), classes), _coco(results, len(reference), classes), "bbox"
        )
        # Objects of every size count alike here, so the other size ranges need no matching.
        scorer.params.areaRng = scorer.params.areaRng[:1]
        scorer.params.areaRngLbl = scorer.params.areaRngLbl[:1]
        scorer.evaluate()
        scorer.accumulate()
    precision = scorer.eval["precision"][:, :, :, 0, -1]
    return float(np.mean(precision[precision > -1]))


def _entries(image: int, detections: Detections, least: float) -> list[dict[str, Any]]:
    corners = detections.boxes.astype(np.float64)
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
            corners, sides, detections.classes, detections.scores, strict=True
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
