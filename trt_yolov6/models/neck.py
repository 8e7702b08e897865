"""Rep-PAN (paper, Section 2.1): features travel down from coarse to fine and up again."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trt_yolov6.models.blocks import ConvBN, stack
from trt_yolov6.models.variants import Architecture


class RepPAN(nn.Module):
    """The neck. A name's digit is the stage whose resolution its input has (3, 4, 5)."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        _, _, stage3, stage4, stage5 = arch.stage_channels
        lateral5, lateral4, down3, bottomup4, down4, bottomup5 = arch.neck_channels
        repeats = arch.neck_repeats
        act = arch.activation

        self.lateral5 = ConvBN(stage5, lateral5, 1, act=act)
        self.up5 = nn.ConvTranspose2d(lateral5, lateral5, 2, stride=2)
        self.topdown4 = stack(arch, stage4 + lateral5, lateral5, repeats[0])
        self.lateral4 = ConvBN(lateral5, lateral4, 1, act=act)
        self.up4 = nn.ConvTranspose2d(lateral4, lateral4, 2, stride=2)
        self.topdown3 = stack(arch, stage3 + lateral4, lateral4, repeats[1])
        self.down3 = ConvBN(lateral4, down3, 3, stride=2, act=act)
        self.bottomup4 = stack(arch, down3 + lateral4, bottomup4, repeats[2])
        self.down4 = ConvBN(bottomup4, down4, 3, stride=2, act=act)
        self.bottomup5 = stack(arch, down4 + lateral5, bottomup5, repeats[3])

    def forward(self, features: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Map the backbone's features at strides 8, 16, 32 to the head's at the same strides."""
        stage3, stage4, stage5 = features
        lateral5 = self.lateral5(stage5)
        topdown4 = self.topdown4(torch.cat((self.up5(lateral5), stage4), dim=1))
        lateral4 = self.lateral4(topdown4)
        level3 = self.topdown3(torch.cat((self.up4(lateral4), stage3), dim=1))
        level4 = self.bottomup4(torch.cat((self.down3(level3), lateral4), dim=1))
        level5 = self.bottomup5(torch.cat((self.down4(level4), lateral5), dim=1))
        return level3, level4, level5
