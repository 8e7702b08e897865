"""Similarity of boxes: IoU, GIoU, CIoU and SIoU, differentiable and safe for degenerate boxes.

All take xyxy boxes, in any one unit, and compute in float32 (float64 for float64 input) even under
autocast: areas of boxes in pixels leave float16's range. A ratio whose denominator is not area or
no length counts as zero and passes no gradient, so nothing here gives NaN for finite boxes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Similarity = Literal["iou", "giou", "ciou", "siou"]

_TINY = 1e-12
"""Denominators up to this, in squared pixels or pixels, are taken for zero."""


def iou(first: Tensor, second: Tensor) -> Tensor:
    """Return the intersection over union of boxes, in 0..1; 0 where neither has an area.

    Args:
        first: float (..., 4), x1, y1, x2, y2. A box with x2 < x1 or y2 < y1 has no area.
        second: the same, of a shape that broadcasts with `first`.

    Returns:
        float32 (...), or float64 for float64 boxes.
    """
    return _overlap(*_floats(first, second))[0]


def giou(first: Tensor, second: Tensor) -> Tensor:
    """Return the generalized IoU (Rezatofighi et al., 2019) in -1..1; arguments as for `iou`.

    IoU less the part of the smallest enclosing box that neither box covers.
    """
    first, second = _floats(first, second)
    overlap, union = _overlap(first, second)
    enclosing = _area(_enclosing_size(first, second))
    return overlap - _ratio(enclosing - union, enclosing)


def ciou(first: Tensor, second: Tensor) -> Tensor:
    """Return the complete IoU (Zheng et al., 2020), above -2 and up to 1; arguments as for `iou`.

    IoU less the squared distance of the centres, in diagonals of the enclosing box, and less a
    penalty for unlike aspect ratios, whose weight is held constant for gradients as in that paper.
    """
    first, second = _floats(first, second)
    overlap, _ = _overlap(first, second)
    offset = _centre(second) - _centre(first)
    diagonal = _enclosing_size(first, second).square().sum(-1)
    distance = _ratio(offset.square().sum(-1), diagonal)
    difference = _aspect_angle(_size(second)) - _aspect_angle(_size(first))
    aspect = (4 / math.pi**2) * difference.square()
    with torch.no_grad():
        weight = _ratio(aspect, 1 - overlap + aspect)
    return overlap - distance - weight * aspect


def siou(first: Tensor, second: Tensor) -> Tensor:
    """Return the SCYLLA IoU (Gevorgyan, 2022), above -2 and up to 1; arguments as for `iou`.

    IoU less half the sum of two costs. Distance: the centres' offset in each direction, in sides
    of the enclosing box, counts the more the closer their line is to a diagonal. Shape: the
    relative differences of widths and of heights.
    """
    first, second = _floats(first, second)
    overlap, _ = _overlap(first, second)
    offset = _centre(second) - _centre(first)
    # That paper's angle cost, 1 - 2 sin²(arcsin(sin α) - π/4), is sin 2α = 2 sin α cos α. So
    # written, its gradient is finite for centres on one line, where arcsin's is not.
    angle = _ratio(2 * offset[..., 0].abs() * offset[..., 1].abs(), offset.square().sum(-1))
    moved = _ratio(offset, _enclosing_size(first, second)).square()
    distance = (1 - torch.exp((angle - 2).unsqueeze(-1) * moved)).sum(-1)
    size, other = _size(first), _size(second)
    unlike = _ratio((size - other).abs(), torch.maximum(size, other))
    shape = (1 - torch.exp(-unlike)).pow(4).sum(-1)
    return overlap - (distance + shape) / 2


def similarity(first: Tensor, second: Tensor, kind: Similarity) -> Tensor:
    """Return `iou`, `giou`, `ciou` or `siou` of aligned boxes; the loss is 1 less this."""
    return _KINDS[kind](first, second)


def pairwise(first: Tensor, second: Tensor) -> Tensor:
    """Return the IoU of boxes (..., n, 4) with boxes (..., m, 4), each with each: (..., n, m)."""
    return iou(first.unsqueeze(-2), second.unsqueeze(-3))


_KINDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "iou": iou,
    "giou": giou,
    "ciou": ciou,
    "siou": siou,
}


def _floats(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Bring both to float32, or to float64 where one is so."""
    wide = torch.float64 in (first.dtype, second.dtype)
    dtype = torch.float64 if wide else torch.float32
    return first.to(dtype), second.to(dtype)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """Divide; zero, with no gradient, where the denominator is zero."""
    some = whole > _TINY
    return torch.where(some, part / torch.where(some, whole, 1.0), 0.0)


def _size(boxes: Tensor) -> Tensor:
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0)


def _centre(boxes: Tensor) -> Tensor:
    return (boxes[..., :2] + boxes[..., 2:]) / 2


def _area(size: Tensor) -> Tensor:
    return size[..., 0] * size[..., 1]


def _overlap(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return IoU and the area of the union."""
    top_left = torch.maximum(first[..., :2], second[..., :2])
    bottom_right = torch.minimum(first[..., 2:], second[..., 2:])
    intersection = _area((bottom_right - top_left).clamp(min=0))
    union = _area(_size(first)) + _area(_size(second)) - intersection
    return _ratio(intersection, union), union


def _enclosing_size(first: Tensor, second: Tensor) -> Tensor:
    top_left = torch.minimum(first[..., :2], second[..., :2])
    bottom_right = torch.maximum(first[..., 2:], second[..., 2:])
    return (bottom_right - top_left).clamp(min=0)


def _aspect_angle(size: Tensor) -> Tensor:
    """The arc tangent of width over height; π/4, as of a square, for a box without either."""
    some = (size > _TINY).any(-1)
    width = torch.where(some, size[..., 0], 1.0)
    height = torch.where(some, size[..., 1], 1.0)
    return torch.atan2(width, height)
