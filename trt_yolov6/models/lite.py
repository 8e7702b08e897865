"""YOLOv6Lite (release 0.4): a backbone and a neck of depthwise convolutions, for small devices."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trt_yolov6.models.blocks import ConvBN
from trt_yolov6.models.variants import ActivationName, Architecture


class DepthwisePair(nn.Module):
    """A depthwise convolution, then a 1x1 convolution; the authors give both a bias."""

    def __init__(
        self, channels: int, out_channels: int, act: ActivationName, stride: int = 1
    ) -> None:
        super().__init__()
        self.depthwise = ConvBN(channels, channels, 5, stride, act, bias=True, groups=channels)
        self.pointwise = ConvBN(channels, out_channels, 1, act=act, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, channels, h, w) to (batch, out, h/stride, w/stride), rounded up."""
        return self.pointwise(self.depthwise(x))


class SqueezeExcite(nn.Module):
    """A gate of 0..1 for each channel, made from the means of all (arXiv 1709.01507)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce = nn.Conv2d(channels, channels // 4, 1)
        self.act = nn.ReLU(inplace=True)
        self.expand = nn.Conv2d(channels // 4, channels, 1)
        self.gate = nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, channels, h, w) to the same shape."""
        gates: Tensor = self.gate(self.expand(self.act(self.reduce(self.pool(x)))))
        return x * gates


class LiteBlock(nn.Module):
    """A block of stride 1: half of the channels pass, then both halves are shuffled together."""

    def __init__(self, channels: int, act: ActivationName) -> None:
        super().__init__()
        width = channels // 2
        self.expand = ConvBN(width, width, 1, act=act)
        self.depthwise = ConvBN(width, width, 3, groups=width)
        self.excite = SqueezeExcite(width)
        self.project = ConvBN(width, width, 1, act=act)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, channels, h, w) to the same shape."""
        passing, worked_on = torch.chunk(x, 2, dim=1)
        made = self.project(self.excite(self.depthwise(self.expand(worked_on))))
        return shuffled(torch.cat((passing, made), dim=1))


def shuffled(x: Tensor) -> Tensor:
    """Take the channels of both halves in turns."""
    return torch.unflatten(x, 1, (2, x.shape[1] // 2)).transpose(1, 2).flatten(1, 2)


class LiteDownBlock(nn.Module):
    """The block of stride 2 that a stage begins with: two paths, concatenated and mixed."""

    def __init__(self, in_channels: int, out_channels: int, act: ActivationName) -> None:
        super().__init__()
        half, hidden = out_channels // 2, out_channels // 4
        self.first_depthwise = ConvBN(in_channels, in_channels, 3, 2, groups=in_channels)
        self.first_project = ConvBN(in_channels, half, 1, act=act)
        self.expand = ConvBN(in_channels, hidden, 1, act=act)
        self.depthwise = ConvBN(hidden, hidden, 3, 2, groups=hidden)
        self.excite = SqueezeExcite(hidden)
        self.project = ConvBN(hidden, half, 1, act=act)
        self.mix_depthwise = ConvBN(out_channels, out_channels, 3, act=act, groups=out_channels)
        self.mix = ConvBN(out_channels, out_channels, 1, act=act)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, in, h, w) to (batch, out, h/2, w/2)."""
        first = self.first_project(self.first_depthwise(x))
        second = self.project(self.excite(self.depthwise(self.expand(x))))
        return self.mix(self.mix_depthwise(torch.cat((first, second), dim=1)))


class LiteStage(nn.Sequential):
    """A block of stride 2, then blocks of stride 1."""

    def __init__(
        self, arch: Architecture, in_channels: int, out_channels: int, repeats: int
    ) -> None:
        act = arch.activation
        rest = (LiteBlock(out_channels, act) for _ in range(repeats - 1))
        super().__init__(LiteDownBlock(in_channels, out_channels, act), *rest)


class LiteCSP(nn.Module):
    """Two paths of half the channels, one of them through a depthwise pair; then merged."""

    def __init__(self, in_channels: int, out_channels: int, act: ActivationName) -> None:
        super().__init__()
        half = out_channels // 2
        self.main = ConvBN(in_channels, half, 1, act=act)
        self.side = ConvBN(in_channels, half, 1, act=act)
        self.expand = ConvBN(half, half, 1, act=act)
        self.pair = DepthwisePair(half, half, act)
        self.merge = ConvBN(out_channels, out_channels, 1, act=act)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, in, h, w) to (batch, out, h, w)."""
        paths = (self.pair(self.expand(self.main(x))), self.side(x))
        return self.merge(torch.cat(paths, dim=1))


class LiteNeck(nn.Module):
    """A PAN of one width with a fourth level. A name's digit is the level of its input."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        (channels,) = arch.neck_channels
        act = arch.neck_activation
        _, _, stage3, stage4, stage5 = arch.stage_channels
        self.lateral5 = ConvBN(stage5, channels, 1, act=act)
        self.lateral4 = ConvBN(stage4, channels, 1, act=act)
        self.lateral3 = ConvBN(stage3, channels, 1, act=act)
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.topdown4 = LiteCSP(2 * channels, channels, act)
        self.topdown3 = LiteCSP(2 * channels, channels, act)
        self.down3 = DepthwisePair(channels, channels, act, stride=2)
        self.bottomup4 = LiteCSP(2 * channels, channels, act)
        self.down4 = DepthwisePair(channels, channels, act, stride=2)
        self.bottomup5 = LiteCSP(2 * channels, channels, act)
        self.lateral_down5 = DepthwisePair(channels, channels, act, stride=2)
        self.down5 = DepthwisePair(channels, channels, act, stride=2)

    def forward(self, features: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Map the backbone's features to the head's at strides 8, 16, 32 and 64."""
        lateral3 = self.lateral3(features[-3])
        lateral4 = self.lateral4(features[-2])
        lateral5 = self.lateral5(features[-1])
        topdown4 = self.topdown4(torch.cat((self.up(lateral5), lateral4), dim=1))
        level3 = self.topdown3(torch.cat((self.up(topdown4), lateral3), dim=1))
        level4 = self.bottomup4(torch.cat((self.down3(level3), topdown4), dim=1))
        level5 = self.bottomup5(torch.cat((self.down4(level4), lateral5), dim=1))
        level6 = self.lateral_down5(lateral5) + self.down5(level5)
        return level3, level4, level5, level6
