"""Decoding of the head's raw outputs to boxes and scores, for both kinds of head.

Anchors are ordered level by level (finest first) and row by row within a level.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trt_yolov6.models.variants import STRIDES, Architecture


def decode(levels: Sequence[tuple[Tensor, ...]], arch: Architecture) -> tuple[Tensor, Tensor]:
    """Turn head outputs, as `YOLOv6.raw` returns them, into boxes and scores.

    Returns:
        boxes (batch, 4, anchors): x1, y1, x2, y2 in input pixels, not clipped;
        scores (batch, classes, anchors): in 0..1.
    """
    sizes = [(level[0].shape[2], level[0].shape[3]) for level in levels]
    logits = joined([level[0] for level in levels])
    regression = joined([level[1] for level in levels])
    if arch.head == "offset":
        points, strides = anchor_points(sizes, 0.0, regression, arch.strides)
        boxes = offsets_to_boxes(regression, points, strides)
        objectness = joined([level[2] for level in levels])
        return boxes, torch.sigmoid(logits) * torch.sigmoid(objectness)
    points, strides = anchor_points(sizes, 0.5, regression, arch.strides)
    distances = expected_distances(regression, arch.reg_max) if arch.reg_max else regression
    return distances_to_boxes(distances, points, strides), torch.sigmoid(logits)


def anchor_points(
    sizes: Sequence[tuple[int, int]],
    cell_offset: float,
    like: Tensor,
    level_strides: Sequence[int] = STRIDES,
) -> tuple[Tensor, Tensor]:
    """Return where the anchors stand.

    Args:
        sizes: height and width of each level in cells.
        cell_offset: position of the anchor inside its cell: 0.5 is the centre.
        like: gives dtype and device.
        level_strides: pixels a cell of each level.

    Returns:
        points (2, anchors): x and y in units of the level's stride; strides (1, anchors): pixels.
    """
    points = []
    strides = []
    for (height, width), stride in zip(sizes, level_strides, strict=True):
        y = torch.arange(height, dtype=like.dtype, device=like.device) + cell_offset
        x = torch.arange(width, dtype=like.dtype, device=like.device) + cell_offset
        grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
        points.append(torch.stack((grid_x, grid_y)).flatten(1))
        strides.append(torch.full_like(points[-1][:1], stride))
    return torch.cat(points, dim=1), torch.cat(strides, dim=1)


def expected_distances(regression: Tensor, reg_max: int) -> Tensor:
    """Turn distributions over distance bins (generalized focal loss) into their expectations.

    (batch, 4 * (reg_max + 1), anchors), the bins of one side together, becomes (batch, 4, anchors)
    with values in 0..reg_max strides.
    """
    batch, _, anchors = regression.shape
    bins = torch.arange(reg_max + 1, dtype=regression.dtype, device=regression.device)
    probabilities = regression.view(batch, 4, reg_max + 1, anchors).softmax(dim=2)
    return (probabilities * bins.view(1, 1, -1, 1)).sum(dim=2)


def distances_to_boxes(distances: Tensor, points: Tensor, strides: Tensor) -> Tensor:
    """Boxes from distances left, top, right, bottom (batch, 4, anchors) in units of the stride."""
    corners = (points - distances[:, :2], points + distances[:, 2:])
    return torch.cat(corners, dim=1) * strides


def offsets_to_boxes(offsets: Tensor, points: Tensor, strides: Tensor) -> Tensor:
    """Boxes from v0.1's centre offsets and logarithmic sizes (batch, 4, anchors), in strides."""
    centre = offsets[:, :2] + points
    half = torch.exp(offsets[:, 2:]) / 2
    return torch.cat((centre - half, centre + half), dim=1) * strides


def joined(levels: Sequence[Tensor]) -> Tensor:
    """Flatten and concatenate (batch, c, h, w) maps to (batch, c, anchors)."""
    return torch.cat([level.flatten(2) for level in levels], dim=2)
