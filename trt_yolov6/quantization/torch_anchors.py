"""Anchors in PyTorch, so that gradients can pass: `detectors.layouts` on tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trt_yolov6.detectors.layouts import YOLOV5_ANCHORS, YOLOV7_ANCHORS, grid
from trt_yolov6.spec import OutputLayout

_LARGEST_LOG = 12.0
"""Logarithm at which a side is cut off, in strides: far beyond any image."""


@dataclass(frozen=True)
class AnchorTensors:
    """Predictions of a batch, one row an anchor."""

    corners: Tensor
    """float32 (batch, anchors, 4), x1, y1, x2, y2 in input pixels."""
    scores: Tensor
    """float32 (batch, anchors, classes) in 0..1."""


Reader = Callable[[Mapping[str, Tensor], tuple[int, int]], AnchorTensors]
"""Takes a batch's outputs, and the input's height and width in pixels."""


def _corners(centre: Tensor, sides: Tensor) -> Tensor:
    """Return (..., 4) corners of boxes from (..., 2) centres, widths and heights."""
    return torch.cat([centre - sides / 2, centre + sides / 2], dim=-1)


def _of_rank(outputs: Mapping[str, Tensor], rank: int) -> Tensor:
    return next(value for value in outputs.values() if value.ndim == rank)


def _split(outputs: Mapping[str, Tensor], _: tuple[int, int]) -> AnchorTensors:
    return AnchorTensors(outputs["boxes"].float(), outputs["scores"].float())


def _split_by_class(outputs: Mapping[str, Tensor], _: tuple[int, int]) -> AnchorTensors:
    boxes = next(value for value in outputs.values() if value.ndim == 3 and value.shape[2] == 4)
    scores = next(value for value in outputs.values() if value.ndim == 3 and value is not boxes)
    return AnchorTensors(boxes, scores.transpose(1, 2))


def _rows(outputs: Mapping[str, Tensor], _: tuple[int, int]) -> AnchorTensors:
    rows = _of_rank(outputs, 3)
    corners = _corners(rows[..., :2], rows[..., 2:4])
    return AnchorTensors(corners, rows[..., 5:] * rows[..., 4:5])


def _corner_rows(outputs: Mapping[str, Tensor], _: tuple[int, int]) -> AnchorTensors:
    rows = _of_rank(outputs, 3)
    return AnchorTensors(rows[..., :4], rows[..., 4:])


def _columns(outputs: Mapping[str, Tensor], _: tuple[int, int]) -> AnchorTensors:
    rows = _of_rank(outputs, 3).transpose(1, 2)
    return AnchorTensors(_corners(rows[..., :2], rows[..., 2:4]), rows[..., 4:])


def _grid_rows(outputs: Mapping[str, Tensor], size: tuple[int, int]) -> AnchorTensors:
    rows = _of_rank(outputs, 3)
    cells, strides = (torch.from_numpy(item).to(rows) for item in grid(size, rows.shape[1]))
    sides = rows[..., 2:4].clamp(max=_LARGEST_LOG).exp()
    corners = _corners(rows[..., :2] + cells, sides) * strides[:, None]
    return AnchorTensors(corners, rows[..., 5:] * rows[..., 4:5])


def _grids(anchors: tuple[tuple[tuple[int, int], ...], ...]) -> Reader:
    def read(outputs: Mapping[str, Tensor], size: tuple[int, int]) -> AnchorTensors:
        levels = sorted((v for v in outputs.values() if v.ndim == 5), key=lambda v: -v.shape[2])
        corners, scores = [], []
        for level, of_level in zip(levels, anchors, strict=True):
            batch, _, rows, columns, _ = level.shape
            row, column = torch.meshgrid(
                torch.arange(rows).to(level), torch.arange(columns).to(level), indexing="ij"
            )
            stride = level.new_tensor([size[1] / columns, size[0] / rows])
            values = torch.sigmoid(level)
            centre = (2 * values[..., :2] - 0.5 + torch.stack([column, row], dim=-1)) * stride
            sides = (2 * values[..., 2:4]) ** 2 * level.new_tensor(of_level)[None, :, None, None]
            corners.append(_corners(centre, sides).reshape(batch, -1, 4))
            sure = values[..., 5:] * values[..., 4:5]
            scores.append(sure.reshape(batch, -1, sure.shape[-1]))
        return AnchorTensors(torch.cat(corners, dim=1), torch.cat(scores, dim=1))

    return read


READERS: dict[OutputLayout, Reader] = {
    "split": _split,
    "split_by_class": _split_by_class,
    "rows": _rows,
    "corner_rows": _corner_rows,
    "grid_rows": _grid_rows,
    "columns": _columns,
    "grids_yolov5": _grids(YOLOV5_ANCHORS),
    "grids_yolov7": _grids(YOLOV7_ANCHORS),
}
"""Readers by layout; layouts with NMS inside have no anchors to read."""
