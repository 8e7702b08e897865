"""Which anchor learns which object: task alignment learning, ATSS and SimOTA.

Paper, Section 2.2 (and Tables 6 and 7). Each function takes a whole batch, loops over nothing but
the three levels, passes no gradient and breaks ties by the lower index, so that equal input gives
equal labels on every device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trt_yolov6.training.targets import Targets


@dataclass(frozen=True)
class Assignment:
    """What every anchor of a batch shall predict.

    foreground: bool (batch, anchors), True where the anchor is to find an object
    matched:    int64 (batch, anchors), index into the image's row of the targets; 0 for background
    boxes:      float32 (batch, anchors, 4), the object's box, xyxy in pixels; zeros for background
    classes:    int64 (batch, anchors), the object's class; the number of classes for background
    scores:     float32 (batch, anchors, classes) in 0..1, the soft target of classification: zero
                but at the object's class, where it is the normalized alignment metric (task
                alignment) or the IoU of the predicted box with the object (ATSS, SimOTA). Its sum
                over classes weighs the anchor's box losses, its total normalizes every loss.
    """

    foreground: Tensor
    matched: Tensor
    boxes: Tensor
    classes: Tensor
    scores: Tensor


@torch.no_grad()
def task_aligned(
    scores: Tensor,
    boxes: Tensor,
    points: Tensor,
    targets: Targets,
    *,
    topk: int = 13,
    alpha: float = 1.0,
    beta: float = 6.0,
) -> Assignment:
    """Assign by task alignment learning (TOOD; the paper's default)."""
    raise NotImplementedError


@torch.no_grad()
def atss(
    points: Tensor,
    strides: Tensor,
    sizes_per_level: Sequence[int],
    targets: Targets,
    boxes: Tensor | None = None,
    *,
    num_classes: int,
    topk: int = 9,
) -> Assignment:
    """Assign by adaptive training sample selection (the paper's warm-up)."""
    raise NotImplementedError


@torch.no_grad()
def simota(
    scores: Tensor,
    boxes: Tensor,
    points: Tensor,
    strides: Tensor,
    targets: Targets,
    *,
    radius: float = 2.5,
    iou_weight: float = 3.0,
    candidates: int = 10,
) -> Assignment:
    """Assign by SimOTA (YOLOX; the paper's Table 6)."""
    raise NotImplementedError
