"""The efficient decoupled head (paper, Section 2.1): anchor-free, one branch a task and a level."""

from __future__ import annotations

import math

from torch import Tensor, nn

from trt_yolov6.models.blocks import ConvBN
from trt_yolov6.models.lite import DepthwisePair
from trt_yolov6.models.variants import Architecture

PRIOR_PROBABILITY = 1e-2
"""Score of every class before training, set through the bias of the classification layer."""


class HeadLevel(nn.Module):
    """The head of one level: a stem, then a classification and a regression branch.

    The stem is a 1x1, the branches are 3x3 convolutions; in Lite all three are depthwise pairs.
    """

    def __init__(self, arch: Architecture, channels: int) -> None:
        super().__init__()
        act = arch.head_activation

        def unit(kernel_size: int) -> nn.Module:
            if arch.neck == "lite":
                return DepthwisePair(channels, channels, act)
            return ConvBN(channels, channels, kernel_size, act=act)

        self.stem, self.cls_conv, self.reg_conv = unit(1), unit(3), unit(3)
        self.cls_pred = nn.Conv2d(channels, arch.num_classes, 1)
        self.reg_pred = nn.Conv2d(channels, 4 * (arch.reg_max + 1), 1)
        self.obj_pred = nn.Conv2d(channels, 1, 1) if arch.head == "offset" else None

        prior_logit = -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY)
        for pred, value in (
            (self.cls_pred, prior_logit),
            (self.obj_pred, prior_logit),
            (self.reg_pred, 1.0),
        ):
            if pred is not None and pred.bias is not None:
                nn.init.constant_(pred.bias, value)

    def forward(self, feature: Tensor) -> tuple[Tensor, ...]:
        """Map (batch, channels, h, w) to class logits, regression and, if present, objectness."""
        stem = self.stem(feature)
        cls_logits = self.cls_pred(self.cls_conv(stem))
        reg_feature = self.reg_conv(stem)
        reg = self.reg_pred(reg_feature)
        if self.obj_pred is None:
            return cls_logits, reg
        return cls_logits, reg, self.obj_pred(reg_feature)


class DecoupledHead(nn.Module):
    """One `HeadLevel` for each stride."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.levels = nn.ModuleList(HeadLevel(arch, c) for c in arch.head_channels)

    def forward(self, features: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
        """Apply each level to its feature."""
        return [level(feature) for level, feature in zip(self.levels, features, strict=True)]
