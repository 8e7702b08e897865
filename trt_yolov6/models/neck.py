"""Rep-PAN (paper, Section 2.1): features travel down from coarse to fine and up again."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trt_yolov6.models.blocks import BiFusion, ConvBN, stack
from trt_yolov6.models.variants import Architecture


class RepPAN(nn.Module):
    """The neck, with 0.3's BiFusion where the architecture says so (then it is called Rep-BiPAN).

    A name's digit is the stage whose resolution its input has: 3 to 5, or to 6 in P6. From coarse
    to fine there are `lateral5`, `up5` (or `fuse5`), `topdown4`, `lateral4` and so on; then, from
    fine to coarse, `down3`, `bottomup4`, `down4` and so on.
    """

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        act = arch.neck_activation
        # By stage: the stem is stage 1.
        stage = dict(enumerate(arch.stage_channels, start=1))
        channels, repeats = iter(arch.neck_channels), iter(arch.neck_repeats)
        self.top = len(arch.stage_channels)
        self.bifusion = arch.neck == "bifusion"
        lateral = {}
        before = stage[self.top]
        for level in range(self.top, 3, -1):
            lateral[level] = width = next(channels)
            self.add_module(f"lateral{level}", ConvBN(before, width, 1, act=act))
            if self.bifusion:
                fuse = BiFusion(stage[level - 1], stage[level - 2], width, act)
                self.add_module(f"fuse{level}", fuse)
                before = width
            else:
                self.add_module(f"up{level}", nn.ConvTranspose2d(width, width, 2, stride=2))
                before = stage[level - 1] + width
            body = stack(arch, before, width, next(repeats))
            self.add_module(f"topdown{level - 1}", body)
            before = width
        for level in range(3, self.top):
            down, width = next(channels), next(channels)
            self.add_module(f"down{level}", ConvBN(before, down, 3, stride=2, act=act))
            body = stack(arch, down + lateral[level + 1], width, next(repeats))
            self.add_module(f"bottomup{level + 1}", body)
            before = width

    def forward(self, features: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Map the backbone's features at strides 4, 8 and so on to the head's from stride 8 on."""
        stage = dict(enumerate(features, start=2))
        lateral = {}
        x = stage[self.top]
        for level in range(self.top, 3, -1):
            lateral[level] = self._run(f"lateral{level}", x)
            if self.bifusion:
                finer = (stage[level - 1], stage[level - 2])
                x = self._run(f"fuse{level}", lateral[level], *finer)
            else:
                x = torch.cat((self._run(f"up{level}", lateral[level]), stage[level - 1]), dim=1)
            x = self._run(f"topdown{level - 1}", x)
        levels = [x]
        for level in range(3, self.top):
            down = self._run(f"down{level}", levels[-1])
            x = torch.cat((down, lateral[level + 1]), dim=1)
            levels.append(self._run(f"bottomup{level + 1}", x))
        return tuple(levels)

    def _run(self, name: str, *inputs: Tensor) -> Tensor:
        return self.get_submodule(name)(*inputs)
