"""The blocks the network is made of, in training form and in fused form."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trt_yolov6.models.variants import ActivationName, Architecture

BN_EPS = 1e-3
BN_MOMENTUM = 0.03

LEAK = 0.1
"""Slope of LeakyReLU below 0, as in YOLOv3; the paper names none."""

ACTIVATIONS: dict[ActivationName, type[nn.ReLU | nn.SiLU | nn.Hardswish | nn.LeakyReLU]] = {
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "leaky_relu": nn.LeakyReLU,
}
"""The layer of each name."""


def activation(name: ActivationName) -> nn.Module:
    """Return a new activation layer."""
    if name == "leaky_relu":
        return nn.LeakyReLU(LEAK, inplace=True)
    return ACTIVATIONS[name](inplace=True)


def batch_norm(channels: int) -> nn.BatchNorm2d:
    """Return a batch normalization with the paper's constants."""
    return nn.BatchNorm2d(channels, eps=BN_EPS, momentum=BN_MOMENTUM)


class ConvBN(nn.Module):
    """Convolution, batch normalization, activation (or none): same-padded."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        act: ActivationName | None = None,
        bias: bool = False,
        groups: int = 1,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            kernel_size // 2,
            groups=groups,
            bias=bias,
        )
        self.bn = batch_norm(out_channels)
        self.act = nn.Identity() if act is None else activation(act)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, in, h, w) to (batch, out, h/stride, w/stride)."""
        return self.act(self.bn(self.conv(x)))


class ConvAct(nn.Module):
    """The fused form of a block: one convolution with bias, then the activation."""

    def __init__(self, conv: nn.Conv2d, act: nn.Module) -> None:
        super().__init__()
        self.conv = conv
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, in, h, w) to (batch, out, h/stride, w/stride)."""
        return self.act(self.conv(x))


class RepConv(nn.Module):
    """RepVGG's block: 3x3, 1x1 and, where shapes allow, identity branches; summed, activated."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int = 1, act: ActivationName = "relu"
    ) -> None:
        super().__init__()
        # A file may have branches whose normalization is folded in already.
        self.dense: ConvBN | ConvAct = ConvBN(in_channels, out_channels, 3, stride)
        self.pointwise: ConvBN | ConvAct = ConvBN(in_channels, out_channels, 1, stride)
        has_identity = in_channels == out_channels and stride == 1
        self.identity = batch_norm(in_channels) if has_identity else None
        self.act = activation(act)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, in, h, w) to (batch, out, h/stride, w/stride)."""
        total = self.dense(x) + self.pointwise(x)
        if self.identity is not None:
            total = total + self.identity(x)
        return self.act(total)


class QARepConv(nn.Module):
    """QARepVGG's block, V2 (arXiv 2212.01593, Section 4): made so that its sum quantizes well.

    Only the 3x3 branch is normalized before the sum, and the sum once more. Where shapes allow,
    the input itself and its average over 3x3 are added, zeros outside counted.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int = 1, act: ActivationName = "relu"
    ) -> None:
        super().__init__()
        self.dense: ConvBN | ConvAct = ConvBN(in_channels, out_channels, 3, stride)
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
        has_identity = in_channels == out_channels and stride == 1
        self.average = nn.AvgPool2d(3, stride=1, padding=1) if has_identity else None
        self.bn = batch_norm(out_channels)
        self.act = activation(act)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, in, h, w) to (batch, out, h/stride, w/stride)."""
        total = self.dense(x) + self.pointwise(x)
        if self.average is not None:
            total = total + x + self.average(x)
        return self.act(self.bn(total))


class ScaledRepConv(nn.Module):
    """The block of RepOptimizer's hyper-search (paper, 2.5.1; arXiv 2205.15242, Section 3).

    The branches of `RepConv`, each followed by a learned scale a channel in place of a batch
    normalization; one normalization after their sum. That much is linear, so the branches are
    added up as kernels and one convolution is run: the same function, the same gradients.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int = 1, act: ActivationName = "relu"
    ) -> None:
        super().__init__()
        self.stride = stride
        self.dense = nn.Parameter(torch.empty(out_channels, in_channels, 3, 3))
        self.pointwise = nn.Parameter(torch.empty(out_channels, in_channels, 1, 1))
        for kernel in (self.dense, self.pointwise):
            nn.init.kaiming_uniform_(kernel, a=math.sqrt(5))  # as nn.Conv2d starts
        # The authors of YOLOv6 start all scales at 1.
        self.dense_scale = nn.Parameter(torch.ones(out_channels))
        self.pointwise_scale = nn.Parameter(torch.ones(out_channels))
        has_identity = in_channels == out_channels and stride == 1
        self.identity_scale = nn.Parameter(torch.ones(out_channels)) if has_identity else None
        self.bn = batch_norm(out_channels)
        self.act = activation(act)

    def kernel(self) -> Tensor:
        """Return the sum of the scaled branches as one 3x3 kernel: (out, in, 3, 3)."""
        centre = self.pointwise_scale[:, None, None, None] * self.pointwise
        if self.identity_scale is not None:
            centre = centre + torch.diag(self.identity_scale)[:, :, None, None]
        return self.dense_scale[:, None, None, None] * self.dense + F.pad(centre, (1, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, in, h, w) to (batch, out, h/stride, w/stride)."""
        total = F.conv2d(x, self.kernel(), stride=self.stride, padding=1)
        return self.act(self.bn(total))


def basic_block(
    arch: Architecture, in_channels: int, out_channels: int, stride: int = 1
) -> nn.Module:
    """Return the 3x3 block this architecture is built of."""
    with_branches = {"repvgg": RepConv, "qarepvgg": QARepConv, "scaled": ScaledRepConv}
    if arch.block in with_branches:
        return with_branches[arch.block](in_channels, out_channels, stride, arch.activation)
    bias = has_conv_bias(arch)
    return ConvBN(in_channels, out_channels, 3, stride, arch.activation, bias=bias)


def has_conv_bias(arch: Architecture) -> bool:
    """Return True where 3x3 blocks of one convolution carry a bias.

    Until v0.2.1 the authors' plain convolutions in L do, although batch normalization follows;
    later ones do not, nor does the branch-free S that RepOptimizer trains.
    """
    return arch.stack == "csp" and arch.neck == "pan"


class BottleRep(nn.Module):
    """Two blocks, or three in MBLA, with a shortcut whose weight `alpha` is learned.

    `alpha` is None after `fusion.fold_shortcuts`: the shortcut is then a plain sum.
    """

    def __init__(self, arch: Architecture, channels: int) -> None:
        super().__init__()
        self.first = basic_block(arch, channels, channels)
        self.second = basic_block(arch, channels, channels)
        self.third = basic_block(arch, channels, channels) if arch.mbla else nn.Identity()
        self.alpha: nn.Parameter | None = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, channels, h, w) to the same shape."""
        shortcut = x if self.alpha is None else self.alpha * x
        return self.third(self.second(self.first(x))) + shortcut


class CSPStack(nn.Module):
    """CSPStackRep (paper, Figure 3c): a stack of `BottleRep` and a 1x1 path, then merged."""

    def __init__(
        self, arch: Architecture, in_channels: int, out_channels: int, repeats: int
    ) -> None:
        super().__init__()
        hidden = arch.hidden_channels(out_channels)
        self.main = ConvBN(in_channels, hidden, 1, act=arch.activation)
        self.side = ConvBN(in_channels, hidden, 1, act=arch.activation)
        self.bottlenecks = nn.Sequential(*(BottleRep(arch, hidden) for _ in range(repeats)))
        self.merge = ConvBN(2 * hidden, out_channels, 1, act=arch.activation)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, in, h, w) to (batch, out, h, w)."""
        branches = (self.bottlenecks(self.main(x)), self.side(x))
        return self.merge(torch.cat(branches, dim=1))


class MBLA(nn.Module):
    """Multi-branch layer aggregation: rows of bottlenecks of which every output is kept.

    A 1x1 convolution makes the first part, which is kept as it is, and what each row starts from;
    another merges all.
    """

    def __init__(
        self, arch: Architecture, in_channels: int, out_channels: int, repeats: int
    ) -> None:
        super().__init__()
        self.hidden = arch.hidden_channels(out_channels)
        rows = mbla_rows(repeats)
        kept = 1 + sum(1 + length for length in rows)
        self.split = ConvBN(in_channels, (1 + len(rows)) * self.hidden, 1, act=arch.activation)
        self.rows = nn.ModuleList(
            nn.Sequential(*(BottleRep(arch, self.hidden) for _ in range(length))) for length in rows
        )
        self.merge = ConvBN(kept * self.hidden, out_channels, 1, act=arch.activation)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, in, h, w) to (batch, out, h, w)."""
        first, *starts = self.split(x).split(self.hidden, dim=1)
        kept = [first]
        for start, row in zip(starts, self.rows, strict=True):
            kept.append(start)
            assert isinstance(row, nn.Sequential)
            for bottleneck in row:
                kept.append(bottleneck(kept[-1]))
        return self.merge(torch.cat(kept, dim=1))


def mbla_rows(repeats: int) -> tuple[int, ...]:
    """Return the lengths of an MBLA block's rows: the full one, after one of about half of it."""
    if repeats == 1:
        return (1,)
    half = 1
    while 2 * half < repeats:
        half *= 2
    return half, repeats


def stack(arch: Architecture, in_channels: int, out_channels: int, repeats: int) -> nn.Module:
    """Return the body of a stage: a RepBlock (a plain chain), a CSPStackRep or an MBLA block."""
    if arch.stack == "csp":
        return CSPStack(arch, in_channels, out_channels, repeats)
    if arch.stack == "mbla":
        return MBLA(arch, in_channels, out_channels, repeats)
    return nn.Sequential(
        *(
            basic_block(arch, in_channels if index == 0 else out_channels, out_channels)
            for index in range(repeats)
        )
    )


class SPPF(nn.Module):
    """Spatial pyramid pooling: three chained 5x5 poolings between two 1x1 convolutions."""

    def __init__(self, channels: int, act: ActivationName) -> None:
        super().__init__()
        self.reduce = ConvBN(channels, channels // 2, 1, act=act)
        self.pool = nn.MaxPool2d(5, stride=1, padding=2)
        self.merge = ConvBN(2 * channels, channels, 1, act=act)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, channels, h, w) to the same shape."""
        return self.merge(_pyramid(self.pool, self.reduce(x)))


class CSPSPPF(nn.Module):
    """SPPF in one of two paths (YOLOv6 v3.0, Section 2.1), with 3x3 convolutions around it."""

    def __init__(self, channels: int, act: ActivationName) -> None:
        super().__init__()
        hidden = channels // 2
        self.reduce = ConvBN(channels, hidden, 1, act=act)
        self.side = ConvBN(channels, hidden, 1, act=act)
        self.before = ConvBN(hidden, hidden, 3, act=act)
        self.mix = ConvBN(hidden, hidden, 1, act=act)
        self.pool = nn.MaxPool2d(5, stride=1, padding=2)
        self.merge = ConvBN(4 * hidden, hidden, 1, act=act)
        self.after = ConvBN(hidden, hidden, 3, act=act)
        self.join = ConvBN(2 * hidden, channels, 1, act=act)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, channels, h, w) to the same shape."""
        pooled = _pyramid(self.pool, self.mix(self.before(self.reduce(x))))
        paths = (self.side(x), self.after(self.merge(pooled)))
        return self.join(torch.cat(paths, dim=1))


def _pyramid(pool: nn.Module, x: Tensor) -> Tensor:
    """Concatenate (batch, c, h, w) and what one to three poolings make of it."""
    levels = [x]
    for _ in range(3):
        levels.append(pool(levels[-1]))
    return torch.cat(levels, dim=1)


class BiFusion(nn.Module):
    """Fuse three levels at the resolution of the middle one (YOLOv6 v3.0, Section 2.1)."""

    def __init__(self, same: int, finer: int, channels: int, act: ActivationName) -> None:
        """Build.

        Args:
            same: channels of the backbone's feature of the resolution that is made.
            finer: channels of the backbone's feature of twice that resolution.
            channels: of the coarser feature, and of what is made.
            act: activation of all but the upsampling.
        """
        super().__init__()
        self.up = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        self.same = ConvBN(same, channels, 1, act=act)
        self.finer = ConvBN(finer, channels, 1, act=act)
        self.down = ConvBN(channels, channels, 3, stride=2, act=act)
        self.merge = ConvBN(3 * channels, channels, 1, act=act)

    def forward(self, coarser: Tensor, same: Tensor, finer: Tensor) -> Tensor:
        """Map features of (h/2, w/2), (h, w) and (2h, 2w) to (batch, channels, h, w)."""
        parts = (self.up(coarser), self.same(same), self.down(self.finer(finer)))
        return self.merge(torch.cat(parts, dim=1))
