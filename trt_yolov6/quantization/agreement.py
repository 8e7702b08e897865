"""Agreement of a quantized detector with the float one, on images without labels.

What the float network is sure of is taken for the truth, and the quantized one's AP against it is
the agreement. Unlike an error of tensors it sees what the engine's user sees: boxes that move,
scores that change order, objects that vanish or appear.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from trt_yolov6.detectors.detections import Detections
from trt_yolov6.quantization.resampling import matched

CONFIDENT = 0.3
"""A float detection counts as true from this score on."""


def agreement(
    reference: Sequence[Detections], found: Sequence[Detections], confident: float = CONFIDENT
) -> float:
    """Return the COCO AP of `found` against the confident detections of `reference`.

    Args:
        reference: of the float network, one an image.
        found: of the quantized network on the same images, down to low scores.
        confident: least score of a reference detection that counts, see `least_score`.

    Returns:
        0..1. Where the reference detects nothing at all, 1 if `found` is not sure of anything
        either, else 0.
    """
    confident = least_score(reference, confident)
    value = matched(reference, found, confident).ap()
    if math.isnan(value):
        return float(not any((one.confidence >= confident).any() for one in found))
    return value


def least_score(reference: Sequence[Detections], confident: float) -> float:
    """Return the least score of a reference detection that counts: `confident`, in 0..1.

    If none reaches it, as on images unlike those of the training, it is half of the best score.
    """
    best = max((float(one.confidence.max(initial=0)) for one in reference), default=0.0)
    return best / 2 if 0 < best < confident else confident
