"""Assign objects to anchors: task alignment learning, ATSS and SimOTA.

Paper, Section 2.2 (and Tables 6 and 7). Each function takes a whole batch without loops over
anchors or objects, passes no gradient, and breaks ties by the lower index, so that equal input
gives equal labels on every device. An object may get no anchor, since all three choose among
anchors in or near it; an anchor gets at most one object.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from trt_yolov6.detectors.box_similarity import iou, pairwise
from trt_yolov6.training.targets import Targets

TAL_TOPK, TAL_BETA = 13, 6.0
"""Most anchors that an object takes by task alignment, and the IoU's exponent in its metric."""
ATSS_TOPK, ATSS_ANCHOR_SIZE = 9, 5.0
"""ATSS's candidates a level, and the side of the square box that it gives an anchor, in strides
(the authors' released value)."""
SIMOTA_CANDIDATES, SIMOTA_RADIUS, SIMOTA_IOU_WEIGHT = 10, 2.5, 3.0
"""IoUs that SimOTA sums, its central region in strides, and the overlap's weight in the cost."""

_PAIRS_AT_ONCE = 2**26
"""Pairs of object and anchor that are compared at a time: bounds memory (a float32 for each is
256 MiB, and about ten such are alive) where a batch has many objects."""


@dataclass(frozen=True)
class Assignment:
    """Training targets of every anchor of a batch."""

    foreground: Tensor
    """bool (batch, anchors), True where the anchor has an object."""
    matched: Tensor
    """int64 (batch, anchors), index into the image's row of the targets; 0 for background."""
    boxes: Tensor
    """float32 (batch, anchors, 4), the object's box, xyxy in pixels; zeros for background."""
    classes: Tensor
    """int64 (batch, anchors), the object's class; the number of classes for background."""
    scores: Tensor
    """float32 (batch, anchors, classes) in 0..1, the soft target of classification: zero except at
    the object's class, where it is the normalized alignment metric (task alignment) or the IoU of
    the predicted box with the object (ATSS, SimOTA). Its sum over classes weights the anchor's box
    losses; its total normalizes every loss."""


@torch.no_grad()
def task_aligned(scores: Tensor, boxes: Tensor, points: Tensor, targets: Targets) -> Assignment:
    """Assign by task alignment learning (TOOD, Feng et al., 2021; the paper's default).

    The alignment metric of an anchor and an object is score * IoU^6, of the predicted score of the
    object's class and the predicted box. An object takes the `TAL_TOPK` anchors of the highest
    metric above zero among those whose point lies inside it; an anchor that several take goes to
    the one it overlaps most. An object's metrics are then scaled so that their highest equals
    the highest IoU among its anchors. (TOOD adds a small constant to the divisor; it is left out
    here because with IoU^6 it would silence objects that the first predictions barely touch.)

    Args:
        scores: float (batch, anchors, classes), predicted, in 0..1.
        boxes: float (batch, anchors, 4), predicted, xyxy in pixels.
        points: float (anchors, 2), x and y of the anchors in pixels.
    """
    scores, boxes, points = scores.float(), boxes.float(), points.float()

    def match(rows: slice, part: Targets) -> tuple[Tensor, Tensor, Tensor]:
        class_index = part.classes.unsqueeze(-1).expand(-1, -1, scores.shape[1])
        class_scores = scores[rows].transpose(1, 2).gather(1, class_index)
        overlaps = pairwise(part.boxes, boxes[rows])
        metric = class_scores * overlaps.pow(TAL_BETA)
        metric *= _inside(points, part.boxes) & part.present.unsqueeze(-1)
        chosen = _largest(metric, TAL_TOPK) & (metric > 0)

        foreground, matched = _one_object_each(chosen, overlaps)
        objects = torch.arange(chosen.shape[1], device=chosen.device).unsqueeze(-1)
        chosen &= matched.unsqueeze(1) == objects
        best_metric = torch.where(chosen, metric, 0.0).amax(-1).gather(1, matched)
        best_overlap = torch.where(chosen, overlaps, 0.0).amax(-1).gather(1, matched)
        own_metric = metric.gather(1, matched.unsqueeze(1)).squeeze(1)
        share = own_metric / torch.where(foreground, best_metric, 1.0)
        return foreground, matched, torch.where(foreground, share * best_overlap, 0.0)

    return _labels(match, targets, len(points), scores.shape[2])


@torch.no_grad()
def atss(
    points: Tensor,
    strides: Tensor,
    sizes_per_level: Sequence[int],
    targets: Targets,
    boxes: Tensor | None = None,
    *,
    num_classes: int,
) -> Assignment:
    """Assign by adaptive training sample selection (Zhang et al., 2020; the paper's warm-up).

    An object's candidates are the `ATSS_TOPK` anchors nearest to its centre on each level. It takes
    those whose square anchor box, of `ATSS_ANCHOR_SIZE` strides, overlaps it by at least the mean
    plus the standard deviation over the candidates, and whose point lies inside it. An anchor that
    several take goes to the one that its anchor box overlaps most.

    Args:
        points: float (anchors, 2), x and y in pixels, level after level.
        strides: float (anchors,), pixels.
        sizes_per_level: number of anchors of each level.
        boxes: float (batch, anchors, 4), predicted, xyxy in pixels; their IoU with the object
            becomes the soft target. None: the target is 1.
    """
    points, reach = points.float(), ATSS_ANCHOR_SIZE / 2 * strides.float().unsqueeze(-1)
    anchor_boxes = torch.cat((points - reach, points + reach), dim=-1)

    def match(_: slice, part: Targets) -> tuple[Tensor, Tensor, Tensor]:
        centres = (part.boxes[..., :2] + part.boxes[..., 2:]) / 2
        nearness = -(centres.unsqueeze(-2) - points).square().sum(-1)
        levels = torch.split(nearness, list(sizes_per_level), dim=-1)
        candidate = torch.cat([_largest(level, ATSS_TOPK) for level in levels], dim=-1)
        overlaps = pairwise(part.boxes, anchor_boxes)
        threshold = _mean_plus_deviation(overlaps, candidate)
        chosen = candidate & (overlaps >= threshold) & _inside(points, part.boxes)
        foreground, matched = _one_object_each(chosen & part.present.unsqueeze(-1), overlaps)
        return foreground, matched, foreground.float()

    return _labels(match, targets, len(points), num_classes, boxes)


@torch.no_grad()
def simota(
    scores: Tensor, boxes: Tensor, points: Tensor, strides: Tensor, targets: Targets
) -> Assignment:
    """Assign by SimOTA (YOLOX, Ge et al., 2021; the paper's Table 6).

    An object may take anchors whose point lies inside it or within `SIMOTA_RADIUS` strides of its
    centre in both directions; those for which both hold come first. It takes as many as the sum of
    its `SIMOTA_CANDIDATES` highest IoUs says, rounded down and at least one, those of the lowest
    cost: binary cross-entropy of the classes plus `SIMOTA_IOU_WEIGHT` times -log IoU. An anchor
    that several take goes to the one of the lowest cost.

    Args:
        scores: float (batch, anchors, classes), predicted, in 0..1. (YOLOX passes the geometric
            mean of the class's and the objectness's.)
        boxes: float (batch, anchors, 4), predicted, xyxy in pixels.
        points: float (anchors, 2), x and y in pixels.
        strides: float (anchors,), pixels.
    """
    scores, boxes, points = scores.float(), boxes.float(), points.float()
    reach = SIMOTA_RADIUS * strides.float().unsqueeze(-1)
    # As in PyTorch's binary cross-entropy, no logarithm falls below -100.
    log_yes = scores.log().clamp(min=-100)
    log_no = torch.log1p(-scores).clamp(min=-100)

    def match(rows: slice, part: Targets) -> tuple[Tensor, Tensor, Tensor]:
        centres = (part.boxes[..., :2] + part.boxes[..., 2:]) / 2
        near = ((points - centres.unsqueeze(-2)).abs() < reach).all(-1)
        inside = _inside(points, part.boxes)
        allowed = (near | inside) & part.present.unsqueeze(-1)
        overlaps = torch.where(allowed, pairwise(part.boxes, boxes[rows]), 0.0)

        # The cross-entropy with a one-hot target is that with an all-zero one, corrected at the
        # object's class: no (objects, anchors, classes) array is needed.
        class_index = part.classes.unsqueeze(-1).expand(-1, -1, len(points))
        correction = (log_no[rows] - log_yes[rows]).transpose(1, 2).gather(1, class_index)
        cost = correction - log_no[rows].sum(-1).unsqueeze(1)
        cost = cost - SIMOTA_IOU_WEIGHT * torch.log(overlaps + 1e-8)
        cost = torch.where(near & inside, cost, cost + 1e5)
        cost = torch.where(allowed, cost, torch.inf)

        most = min(SIMOTA_CANDIDATES, len(points))
        count = overlaps.topk(most, dim=-1).values.sum(-1, keepdim=True).long().clamp(1, most)
        chosen = _largest(-cost, most, count) & allowed
        foreground, matched = _one_object_each(chosen, -cost)
        return foreground, matched, foreground.float()

    return _labels(match, targets, len(points), scores.shape[2], boxes)


def _labels(
    match: Callable[[slice, Targets], tuple[Tensor, Tensor, Tensor]],
    targets: Targets,
    anchors: int,
    num_classes: int,
    boxes: Tensor | None = None,
) -> Assignment:
    """Label the anchors of as many images at a time as `_PAIRS_AT_ONCE` allows.

    `match` takes images and their objects, and returns foreground, matched and quality of each
    anchor. The quality is multiplied by the IoU of `boxes`, the predicted ones, with the object.
    """
    if not targets.present.shape[1]:  # not a single row of objects: one of padding
        targets = Targets(
            F.pad(targets.boxes, (0, 0, 0, 1)),
            F.pad(targets.classes, (0, 1)),
            F.pad(targets.present, (0, 1)),
        )
    objects, labels, present = targets.boxes.float(), targets.classes, targets.present
    batch, most = present.shape
    step = max(1, _PAIRS_AT_ONCE // (most * anchors))
    parts = []
    for start in range(0, max(batch, 1), step):
        rows = slice(start, start + step)
        parts.append(match(rows, Targets(objects[rows], labels[rows], present[rows])))
    foreground, matched, quality = (torch.cat(part) for part in zip(*parts, strict=True))
    taken = objects.gather(1, matched.unsqueeze(-1).expand(-1, -1, 4))
    if boxes is not None:
        quality = quality * iou(boxes.float(), taken)
    classes = torch.where(foreground, labels.gather(1, matched), num_classes)
    taken = torch.where(foreground.unsqueeze(-1), taken, 0.0)
    one_hot = classes.unsqueeze(-1) == torch.arange(num_classes, device=classes.device)
    return Assignment(foreground, matched, taken, classes, one_hot * quality.unsqueeze(-1))


def _inside(points: Tensor, boxes: Tensor) -> Tensor:
    """Return bool (batch, objects, anchors): whether the point lies strictly inside the box."""
    corners = boxes.unsqueeze(-2)
    return ((points > corners[..., :2]) & (points < corners[..., 2:])).all(-1)


def _largest(values: Tensor, most: int, count: Tensor | None = None) -> Tensor:
    """Mark the largest of values (..., n), of equal ones those of the lowest index.

    As many as `count`, int64 (..., 1), says, or else `most`.
    """
    # `topk` leaves open which of equal values it returns; only its values are used.
    top = values.topk(min(most, values.shape[-1]), dim=-1).values
    last = top[..., -1:] if count is None else top.gather(-1, count - 1)
    above = values > last
    equal = values == last
    room = (top.shape[-1] if count is None else count) - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= room))


def _mean_plus_deviation(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean plus the sample standard deviation of the marked, (..., 1)."""
    count = mask.sum(-1, keepdim=True)
    mean = torch.where(mask, values, 0.0).sum(-1, keepdim=True) / count
    squares = torch.where(mask, values - mean, 0.0).square().sum(-1, keepdim=True)
    return mean + (squares / (count - 1).clamp(min=1)).sqrt()


def _one_object_each(chosen: Tensor, preference: Tensor) -> tuple[Tensor, Tensor]:
    """Leave every anchor to the object of the highest preference of those that chose it.

    Takes (batch, objects, anchors), returns foreground and matched (batch, anchors).
    """
    matched = torch.where(chosen, preference, -torch.inf).argmax(1)
    foreground = chosen.any(1)
    return foreground, torch.where(foreground, matched, 0)
