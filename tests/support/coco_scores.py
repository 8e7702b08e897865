"""AP by pycocotools of detections against others, taken for the truth."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from trt_yolov6.detectors.detections import Detections


def pycocotools_ap(
    truth: Sequence[Detections], found: Sequence[Detections], least: float = 0.0
) -> float:
    """AP (0.50:0.95) over objects of every size; those of the truth count from a score on."""
    with contextlib.redirect_stdout(io.StringIO()):
        scorer = COCOeval(_coco(truth, least), _coco(found, 0.0), "bbox")
        scorer.evaluate()
        scorer.accumulate()
    precision = scorer.eval["precision"][:, :, :, 0, -1]
    return float(np.mean(precision[precision > -1]))


def _coco(detections: Sequence[Detections], least: float) -> Any:
    entries: list[dict[str, Any]] = []
    for image, one in enumerate(detections):
        corners = one.xyxy.astype(np.float64)
        for box, score, label in zip(corners, one.confidence, one.class_id, strict=True):
            width, height = (box[2:] - box[:2]).tolist()
            entries.append(
                {
                    "id": len(entries) + 1,
                    "image_id": image,
                    "category_id": int(label),
                    "bbox": [*box[:2].tolist(), width, height],
                    "area": width * height,
                    "iscrowd": 0,
                    "score": float(score),
                }
            )
    coco = COCO()
    coco.dataset = {
        "images": [{"id": image} for image in range(len(detections))],
        "categories": [{"id": label} for label in range(10)],
        "annotations": [entry for entry in entries if entry["score"] >= least],
    }
    coco.createIndex()
    return coco
