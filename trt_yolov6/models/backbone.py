"""EfficientRep (paper, Section 2.1), and Lite's: a stem and stages, each halving the resolution."""

from __future__ import annotations

from torch import Tensor, nn

from trt_yolov6.models.blocks import CSPSPPF, SPPF, basic_block, stack
from trt_yolov6.models.lite import LiteStage
from trt_yolov6.models.variants import Architecture


class Stage(nn.Module):
    """A block of stride 2, then a RepBlock, a CSPStackRep or an MBLA block."""

    def __init__(
        self, arch: Architecture, in_channels: int, out_channels: int, repeats: int
    ) -> None:
        super().__init__()
        self.downsample = basic_block(arch, in_channels, out_channels, stride=2)
        self.body = stack(arch, out_channels, out_channels, repeats)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, in, h, w) to (batch, out, h/2, w/2)."""
        return self.body(self.downsample(x))


class Backbone(nn.Module):
    """EfficientRep; CSPBepBackbone of M and L is the same with CSPStackRep blocks."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        channels = arch.stage_channels
        self.stem = basic_block(arch, arch.input_channels, channels[0], stride=2)
        stage = LiteStage if arch.block == "lite" else Stage
        self.stages = nn.ModuleList(
            stage(arch, channels[index], channels[index + 1], repeats)
            for index, repeats in enumerate(arch.stage_repeats)
        )
        pooling = {"sppf": SPPF, "cspsppf": CSPSPPF, "none": nn.Identity}[arch.pooling]
        self.sppf = pooling(channels[-1], arch.activation)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Map images (batch, 3, h, w) to features at strides 4, 8, 16, 32 and, in P6, 64."""
        features = []
        x = self.stem(images)
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return *features[:-1], self.sppf(features[-1])
