"""An ONNX graph decoded the way the authors' export does it, to measure ours against.

Their graph (release 0.2.1, fixed batch) makes anchor points and strides in the graph, moves anchors
before channels, turns distances into centre and size by splitting and joining, multiplies by the
strides, and joins boxes, a column of ones and scores into rows (batch, anchors, 5 + classes). This
module reimplements that from its description.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from trt_yolov6.models import STRIDES, YOLOv6, fuse


class AuthorsDecoding(nn.Module):
    """A fused network without DFL, with rows (cx, cy, w, h, 1, scores) as output."""

    def __init__(self, model: YOLOv6) -> None:
        super().__init__()
        self.model = fuse(model)

    def forward(self, images: Tensor) -> Tensor:
        """Map (batch, 3, h, w) to (batch, anchors, 5 + classes)."""
        points, strides, scores, distances = [], [], [], []
        for stride, (logits, regression) in zip(STRIDES, self.model.raw(images), strict=True):
            batch, classes, height, width = logits.shape
            y, x = torch.meshgrid(
                torch.arange(height, dtype=torch.float32) + 0.5,
                torch.arange(width, dtype=torch.float32) + 0.5,
                indexing="ij",
            )
            points.append(torch.stack([x, y], dim=-1).reshape(-1, 2))
            strides.append(torch.full((height * width, 1), stride, dtype=torch.float32))
            scores.append(torch.sigmoid(logits).reshape(batch, classes, height * width))
            distances.append(regression.reshape(batch, 4, height * width))
        anchor_points = torch.cat(points)
        joined_scores = torch.cat(scores, dim=-1).permute(0, 2, 1)
        joined = torch.cat(distances, dim=-1).permute(0, 2, 1)
        left_top, right_bottom = torch.split(joined, 2, -1)
        first, second = anchor_points - left_top, anchor_points + right_bottom
        boxes = torch.cat([(first + second) / 2, second - first], -1) * torch.cat(strides)
        ones = torch.ones((boxes.shape[0], boxes.shape[1], 1), dtype=boxes.dtype)
        return torch.cat([boxes, ones, joined_scores], dim=-1)


def authors_graph(
    model: YOLOv6, image_size: tuple[int, int] = (640, 640), batch: int = 1
) -> onnx.ModelProto:
    """Export `model` (distance head, no DFL) at one batch size as the authors' tool does.

    That tool is torch.onnx's tracing exporter with constant folding, at opset 13.
    """
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        path = Path(folder) / "authors.onnx"
        warnings.simplefilter("ignore")
        torch.onnx.export(
            AuthorsDecoding(model).eval(),
            (torch.zeros(batch, 3, *image_size),),
            path,
            input_names=["images"],
            output_names=["outputs"],
            opset_version=13,
            dynamo=False,
        )
        return onnx.load(path)
