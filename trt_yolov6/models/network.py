"""The whole detector: backbone, neck, head and decoding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trt_yolov6.models.backbone import Backbone
from trt_yolov6.models.decode import decode
from trt_yolov6.models.head import DecoupledHead
from trt_yolov6.models.lite import LiteNeck
from trt_yolov6.models.neck import RepPAN
from trt_yolov6.models.variants import Architecture


class YOLOv6(nn.Module):
    """A network of the family, `arch` says which: in training form, with random weights."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.arch = arch
        self.backbone = Backbone(arch)
        self.neck = LiteNeck(arch) if arch.neck == "lite" else RepPAN(arch)
        self.head = DecoupledHead(arch)

    def raw(self, images: Tensor) -> list[tuple[Tensor, ...]]:
        """Run the network without decoding on images: (batch, 3, h, w), RGB in 0..1.

        Returns:
            For each of `arch.strides`: class logits (batch, classes, h', w'), regression
            (batch, 4 * (reg_max + 1), h', w') and, with v0.1's head, objectness logits
            (batch, 1, h', w').
        """
        return self.head(self.neck(self.backbone(images)))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Detect: boxes (batch, 4, anchors) xyxy in pixels, scores (batch, classes, anchors)."""
        return decode(self.raw(images), self.arch)


class Raw(nn.Module):
    """A network with `raw` as its forward, which is what tracers and wrappers call."""

    def __init__(self, model: YOLOv6) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> list[tuple[Tensor, ...]]:
        """Compute `YOLOv6.raw`."""
        return self.model.raw(images)


def shapes_only(arch: Architecture) -> YOLOv6:
    """Return a network in training form without data, on PyTorch's "meta" device."""
    with torch.device("meta"):
        return YOLOv6(arch)
