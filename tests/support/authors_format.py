"""Makes checkpoint files in the format of the authors' code, for the tests of the loader.

A second writing of the networks, in modules that carry the authors' class and attribute names, made
from facts about their files: names, shapes, activations. Nothing in it comes from this package. Its
outputs are what a loaded file is compared with, and PyTorch's own functions fuse it.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


@dataclass(frozen=True)
class Facts:
    """The parts of one of the authors' networks."""

    release: str
    backbone: tuple[int, ...]
    """Channels of the stem and the stages."""
    neck: tuple[int, ...]
    """Channels c5 to c10 along the neck, or c6 to c11 with a sixth stage."""
    repeats: tuple[int, ...]
    neck_repeats: tuple[int, ...]
    block: str = "rep"
    """rep, qa, opt (RepOptimizer), hs (its search), conv_relu or conv_silu."""
    stack: str = "plain"
    """plain, csp or mbla."""
    ratio: float = 0.5
    csp_pooling: bool = False
    bifusion: bool = False
    bins: int = 0
    head: str = "plain"
    """plain, offset (v0.1), fuse_ab (anchor-aided) or distill (self-distillation of N and S)."""
    classes: int = 80

    @property
    def act(self) -> str:
        """Activation of blocks and pooling."""
        return "silu" if self.block == "conv_silu" else "relu"


_V3: dict[str, Any] = {"bifusion": True, "release": "0.4"}


def _facts(channels: tuple[str, str], repeats: str, neck_repeat: int, **others: Any) -> Facts:
    def numbers(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in text.split())

    stages = numbers(repeats)
    necks = (neck_repeat,) * (4 if len(stages) == 4 else 6)
    return Facts(
        backbone=numbers(channels[0]),
        neck=numbers(channels[1]),
        repeats=stages,
        neck_repeats=necks,
        **{"release": "0.2", **others},
    )


_NS = "2 4 6 2"
_N = ("16 32 64 128 256", "64 32 32 64 64 128")
_S = ("32 64 128 256 512", "128 64 64 128 128 256")
_M = ("48 96 192 384 768", "192 96 96 192 192 384")
_L = ("64 128 256 512 1024", "256 128 128 256 256 512")
_N6 = ("16 32 64 128 192 256", "128 64 32 64 128 256")
_S6 = ("32 64 128 256 384 512", "256 128 64 128 256 512")
_M6 = ("48 96 192 384 576 768", "384 192 96 192 384 768")
_L6 = ("64 128 256 512 768 1024", "512 256 128 256 512 1024")
_CSP_M: dict[str, Any] = {"stack": "csp", "ratio": 2 / 3, "bins": 16}
_CSP_L: dict[str, Any] = {"stack": "csp", "bins": 16}
_SMALL: dict[str, Any] = {**_V3, "csp_pooling": True}
_SILU: dict[str, Any] = {"block": "conv_silu"}
_MBLA: dict[str, Any] = {**_V3, **_SILU, "stack": "mbla", "bins": 16}
_BASE: dict[str, Any] = {**_V3, **_CSP_L, "block": "conv_relu"}

FACTS: dict[str, Facts] = {
    "yolov6n": _facts(_N, _NS, 4),
    "yolov6t": _facts(_S, "2 3 4 2", 3),
    "yolov6t_released": _facts(("24 48 96 192 384", "96 48 48 96 96 192"), _NS, 4),
    "yolov6s": _facts(_S, _NS, 4),
    "yolov6m": _facts(_M, "2 3 5 2", 3, **_CSP_M),
    "yolov6l": _facts(_L, "3 6 9 3", 6, **_CSP_L, **_SILU),
    "yolov6l_relu": _facts(_L, "3 6 9 3", 6, **_CSP_L),
    "yolov6n_v3": _facts(_N, _NS, 4, **_SMALL),
    "yolov6s_v3": _facts(_S, _NS, 4, **_SMALL),
    "yolov6m_v3": _facts(_M, "2 3 5 2", 3, **_V3, **_CSP_M),
    "yolov6l_v3": _facts(_L, "3 6 9 3", 6, **_V3, **_CSP_L, **_SILU),
    "yolov6n6": _facts(_N6, "2 4 6 2 2", 4, **_SMALL),
    "yolov6s6": _facts(_S6, "2 4 6 2 2", 4, **_SMALL),
    "yolov6m6": _facts(_M6, "2 3 5 2 2", 3, **_V3, **_CSP_M),
    "yolov6l6": _facts(_L6, "3 6 9 3 3", 6, **_V3, **_CSP_L, **_SILU),
    "yolov6n_qa": _facts(_N, _NS, 4, **_SMALL, block="qa"),
    "yolov6s_qa": _facts(_S, _NS, 4, **_SMALL, block="qa"),
    "yolov6m_qa": _facts(_M, "2 3 5 2", 3, **_V3, **_CSP_M, block="qa"),
    "yolov6n_base": _facts(_N, _NS, 4, **_SMALL, block="conv_relu", bins=16),
    "yolov6s_base": _facts(_S, _NS, 4, **_BASE, csp_pooling=True),
    "yolov6m_base": _facts(_M, "2 5 7 2", 5, **_BASE),
    "yolov6l_base": _facts(_L, "3 6 9 3", 6, **_BASE),
    "yolov6s_mbla": _facts(_S, "1 2 2 1", 2, **_MBLA),
    "yolov6m_mbla": _facts(_M, "1 2 2 1", 2, **_MBLA),
    "yolov6l_mbla": _facts(_L, "1 2 2 1", 2, **_MBLA),
    "yolov6x_mbla": _facts(_L, "2 4 4 2", 4, **_MBLA),
}
"""The networks as they are released, by the name that this package gives them."""

LITE_CHANNELS = {
    "yolov6lite_s": (24, 32, 48, 96, 176),
    "yolov6lite_m": (24, 32, 64, 144, 288),
    "yolov6lite_l": (24, 48, 96, 192, 384),
}


# Convolutions, until 0.3 and in 0.4.

_ACTS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU, "hardswish": nn.Hardswish}


class Conv(nn.Module):
    """Convolution, batch normalization, SiLU."""

    act_class: type[nn.Module] = nn.SiLU

    def __init__(self, cin: int, cout: int, k: int, s: int = 1, bias: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, k, s, k // 2, bias=bias)
        self.bn = nn.BatchNorm2d(cout)
        self.act = self.act_class(inplace=True)

    def forward(self, x: Tensor) -> Any:
        return self.act(self.bn(self.conv(x)))

    def forward_fuse(self, x: Tensor) -> Any:
        return self.act(self.conv(x))

    def fuse(self) -> None:
        self.conv = fuse_conv_bn_eval(self.conv, self.bn)
        del self.bn
        self.forward = self.forward_fuse  # type: ignore[method-assign]


class SimConv(Conv):
    act_class = nn.ReLU


class Conv_C3(Conv):
    """The 1x1 convolutions of a BepC3; `act` is set from outside."""


class ConvWrapper(nn.Module):
    def __init__(self, cin: int, cout: int, s: int = 1) -> None:
        super().__init__()
        self.block = Conv(cin, cout, 3, s, bias=True)

    def forward(self, x: Tensor) -> Any:
        return self.block(x)


class SimConvWrapper(ConvWrapper):
    def __init__(self, cin: int, cout: int, s: int = 1) -> None:
        super().__init__(cin, cout, s)
        self.block = SimConv(cin, cout, 3, s, bias=True)


class ConvModule(nn.Module):
    def __init__(
        self, cin: int, cout: int, k: int, s: int, act: str | None, groups: int = 1
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, k, s, k // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(cout)
        if act is not None:
            self.act = _ACTS[act](inplace=True)
        self.activation_type = act

    def forward(self, x: Tensor) -> Any:
        return self._activated(self.bn(self.conv(x)))

    def forward_fuse(self, x: Tensor) -> Any:
        return self._activated(self.conv(x))

    def _activated(self, x: Tensor) -> Any:
        return x if self.activation_type is None else self.act(x)

    def fuse(self) -> None:
        self.conv = fuse_conv_bn_eval(self.conv, self.bn)
        del self.bn
        self.forward = self.forward_fuse  # type: ignore[method-assign]


class ConvBN(nn.Module):
    kind: str | None = None

    def __init__(self, cin: int, cout: int, k: int = 3, s: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.block = ConvModule(cin, cout, k, s, self.kind, groups)

    def forward(self, x: Tensor) -> Any:
        return self.block(x)


class ConvBNReLU(ConvBN):
    kind = "relu"


class ConvBNSiLU(ConvBN):
    kind = "silu"


class ConvBNHS(ConvBN):
    kind = "hardswish"


def _conv(facts: Facts, cin: int, cout: int, k: int, s: int = 1, act: str = "relu") -> nn.Module:
    """Return the convolution of neck, head and pooling."""
    if facts.release == "0.4":
        return {"relu": ConvBNReLU, "silu": ConvBNSiLU}[act](cin, cout, k, s)
    return {"relu": SimConv, "silu": Conv}[act](cin, cout, k, s)


# Blocks.


class RealVGGBlock(nn.Module):
    def __init__(self, cin: int, cout: int, s: int = 1) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(cin, cout, 3, s, 1, bias=False)
        self.bn = nn.BatchNorm2d(cout)
        self.se = nn.Identity()

    def forward(self, x: Tensor) -> Any:
        return self.relu(self.bn(self.conv(x)))


class ScaleLayer(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(channels) + 0.5)
        self.bias = None
        self.num_features = channels

    def forward(self, x: Tensor) -> Any:
        return x * self.weight.view(1, -1, 1, 1)


class LinearAddBlock(nn.Module):
    def __init__(self, cin: int, cout: int, s: int = 1) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.conv = nn.Conv2d(cin, cout, 3, s, 1, bias=False)
        self.scale_conv = ScaleLayer(cout)
        self.conv_1x1 = nn.Conv2d(cin, cout, 1, s, bias=False)
        self.scale_1x1 = ScaleLayer(cout)
        if cin == cout and s == 1:
            self.scale_identity = ScaleLayer(cout)
        self.bn = nn.BatchNorm2d(cout)
        self.se = nn.Identity()

    def forward(self, x: Tensor) -> Any:
        out = self.scale_conv(self.conv(x)) + self.scale_1x1(self.conv_1x1(x))
        if hasattr(self, "scale_identity"):
            out = out + self.scale_identity(x)
        return self.relu(self.bn(out))


class RepVGGBlock(nn.Module):
    def __init__(self, cin: int, cout: int, s: int = 1, modules: bool = False) -> None:
        super().__init__()
        self.nonlinearity = nn.ReLU(inplace=True)
        self.se = nn.Identity()
        self.rbr_identity: Any = nn.BatchNorm2d(cin) if cin == cout and s == 1 else None
        self.rbr_dense: Any = self._branch(cin, cout, 3, s, modules)
        self.rbr_1x1: Any = self._branch(cin, cout, 1, s, modules)
        self.rbr_reparam: Any

    @staticmethod
    def _branch(cin: int, cout: int, k: int, s: int, modules: bool) -> nn.Module:
        if modules:
            return ConvModule(cin, cout, k, s, None)
        branch = nn.Sequential()
        branch.add_module("conv", nn.Conv2d(cin, cout, k, s, k // 2, bias=False))
        branch.add_module("bn", nn.BatchNorm2d(cout))
        return branch

    def forward(self, x: Tensor) -> Any:
        if hasattr(self, "rbr_reparam"):
            return self.nonlinearity(self.rbr_reparam(x))
        out = self.rbr_dense(x) + self.rbr_1x1(x)
        if self.rbr_identity is not None:
            out = out + self.rbr_identity(x)
        return self.nonlinearity(out)

    def fuse(self) -> None:
        merged = _without_normalization(self.rbr_dense)
        point = _without_normalization(self.rbr_1x1)
        with torch.no_grad():
            merged.weight[:, :, 1:2, 1:2] += point.weight
            merged.bias += point.bias
            if self.rbr_identity is not None:
                channels = self.rbr_identity.num_features
                unit = nn.Conv2d(channels, channels, 3, padding=1, bias=False).eval()
                nn.init.dirac_(unit.weight)
                identity = fuse_conv_bn_eval(unit, self.rbr_identity)
                assert identity.bias is not None
                merged.weight += identity.weight
                merged.bias += identity.bias
        self.rbr_reparam = merged
        del self.rbr_dense, self.rbr_1x1, self.rbr_identity


class QARepVGGBlockV2(nn.Module):
    def __init__(self, cin: int, cout: int, s: int = 1) -> None:
        super().__init__()
        self.nonlinearity = nn.ReLU(inplace=True)
        self.se = nn.Identity()
        passes = cin == cout and s == 1
        self.rbr_identity: Any = nn.Identity() if passes else None
        self.rbr_avg: Any = nn.AvgPool2d(3, stride=1, padding=1) if passes else None
        self.rbr_dense: Any = ConvModule(cin, cout, 3, s, None)
        self.rbr_1x1: Any = nn.Conv2d(cin, cout, 1, s, bias=False)
        self.bn = nn.BatchNorm2d(cout)
        self.rbr_reparam: Any

    def forward(self, x: Tensor) -> Any:
        if hasattr(self, "rbr_reparam"):
            return self.nonlinearity(self.bn(self.rbr_reparam(x)))
        out = self.rbr_dense(x) + self.rbr_1x1(x)
        if self.rbr_identity is not None:
            out = out + x + self.rbr_avg(x)
        return self.nonlinearity(self.bn(out))

    def fuse(self) -> None:
        merged = _without_normalization(self.rbr_dense)
        with torch.no_grad():
            merged.weight[:, :, 1:2, 1:2] += self.rbr_1x1.weight
            if self.rbr_identity is not None:
                for channel in range(merged.out_channels):
                    merged.weight[channel, channel] += 1 / 9
                    merged.weight[channel, channel, 1, 1] += 1
        self.rbr_reparam = merged
        del self.rbr_dense, self.rbr_1x1, self.rbr_identity, self.rbr_avg


def _without_normalization(branch: Any) -> Any:
    if hasattr(branch, "bn"):
        return fuse_conv_bn_eval(branch.conv, branch.bn)
    return branch.conv


def _block(facts: Facts, cin: int, cout: int, s: int = 1) -> nn.Module:
    late = facts.release == "0.4"
    if facts.block == "rep":
        return RepVGGBlock(cin, cout, s, modules=late)
    if facts.block == "conv_relu" and late:
        return ConvBNReLU(cin, cout, 3, s)
    if facts.block == "conv_silu" and late:
        return ConvBNSiLU(cin, cout, 3, s)
    kinds: dict[str, Any] = {
        "qa": QARepVGGBlockV2,
        "opt": RealVGGBlock,
        "hs": LinearAddBlock,
        "conv_relu": SimConvWrapper,
        "conv_silu": ConvWrapper,
    }
    block: nn.Module = kinds[facts.block](cin, cout, s)
    return block


# Stacks.


class BottleRep(nn.Module):
    def __init__(self, facts: Facts, channels: int) -> None:
        super().__init__()
        self.conv1 = _block(facts, channels, channels)
        self.conv2 = _block(facts, channels, channels)
        self.shortcut = True
        self.alpha = nn.Parameter(torch.rand(1) + 0.5)

    def forward(self, x: Tensor) -> Any:
        return self.alpha * x + self.conv2(self.conv1(x))


class BottleRep3(nn.Module):
    def __init__(self, facts: Facts, channels: int) -> None:
        super().__init__()
        self.conv1 = _block(facts, channels, channels)
        self.conv2 = _block(facts, channels, channels)
        self.conv3 = _block(facts, channels, channels)
        self.shortcut = True
        self.alpha = nn.Parameter(torch.rand(1) * 0.5)

    def forward(self, x: Tensor) -> Any:
        return self.alpha * x + self.conv3(self.conv2(self.conv1(x)))


class RepBlock(nn.Module):
    def __init__(self, facts: Facts, cin: int, cout: int, n: int, bottle: bool = False) -> None:
        super().__init__()

        def make(first: bool) -> nn.Module:
            return BottleRep(facts, cout) if bottle else _block(facts, cin if first else cout, cout)

        self.conv1 = make(True)
        self.block = nn.Sequential(*(make(False) for _ in range(n - 1))) if n > 1 else None

    def forward(self, x: Tensor) -> Any:
        x = self.conv1(x)
        return x if self.block is None else self.block(x)


class BepC3(nn.Module):
    def __init__(self, facts: Facts, cin: int, cout: int, n: int) -> None:
        super().__init__()
        hidden = round(cout * facts.ratio)

        def one_by_one(a: int, b: int) -> nn.Module:
            if facts.release == "0.4":
                return _conv(facts, a, b, 1, act=facts.act)
            conv = Conv_C3(a, b, 1)
            conv.act = _ACTS[facts.act](inplace=True)
            return conv

        self.cv1 = one_by_one(cin, hidden)
        self.cv2 = one_by_one(cin, hidden)
        self.cv3 = one_by_one(2 * hidden, cout)
        self.m = RepBlock(facts, hidden, hidden, n, bottle=True)

    def forward(self, x: Tensor) -> Any:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


class MBLABlock(nn.Module):
    def __init__(self, facts: Facts, cin: int, cout: int, n: int) -> None:
        super().__init__()
        rows = {1: (1,), 2: (1, 2), 4: (2, 4)}[n]
        self.c = c = cout // 2
        self.cv1 = ConvModule(cin, c * (1 + len(rows)), 1, 1, facts.act)
        self.cv2 = ConvModule(c * (1 + len(rows) + sum(rows)), cout, 1, 1, facts.act)
        self.m = nn.ModuleList(
            nn.Sequential(*(BottleRep3(facts, c) for _ in range(row))) for row in rows
        )

    def forward(self, x: Tensor) -> Any:
        parts = self.cv1(x)
        kept = [parts[:, : self.c]]
        for index, row in enumerate(self.m, start=1):
            kept.append(parts[:, index * self.c : (index + 1) * self.c])
            for bottle in row:  # type: ignore[attr-defined]
                kept.append(bottle(kept[-1]))
        return self.cv2(torch.cat(kept, 1))


def _stack(facts: Facts, cin: int, cout: int, n: int) -> nn.Module:
    if facts.stack == "csp":
        return BepC3(facts, cin, cout, n)
    if facts.stack == "mbla":
        return MBLABlock(facts, cin, cout, n)
    return RepBlock(facts, cin, cout, n)


# Pooling, flat until 0.3 and in a child in 0.4.


class SPPFModule(nn.Module):
    child = "sppf"

    def __init__(self, facts: Facts, channels: int) -> None:
        super().__init__()
        self.build(facts, channels)

    def build(self, facts: Facts, channels: int) -> None:
        self.cv1 = _conv(facts, channels, channels // 2, 1, act=facts.act)
        self.cv2 = _conv(facts, channels * 2, channels, 1, act=facts.act)
        self.m = nn.MaxPool2d(kernel_size=5, stride=1, padding=2)

    def forward(self, x: Tensor) -> Any:
        a = self.cv1(x)
        b = self.m(a)
        c = self.m(b)
        return self.cv2(torch.cat((a, b, c, self.m(c)), 1))


class CSPSPPFModule(SPPFModule):
    child = "cspsppf"

    def build(self, facts: Facts, channels: int) -> None:
        half = channels // 2

        def conv(cin: int, cout: int, k: int) -> nn.Module:
            return _conv(facts, cin, cout, k, act=facts.act)

        self.cv1 = conv(channels, half, 1)
        self.cv2 = conv(channels, half, 1)
        self.cv3 = conv(half, half, 3)
        self.cv4 = conv(half, half, 1)
        self.m = nn.MaxPool2d(kernel_size=5, stride=1, padding=2)
        self.cv5 = conv(4 * half, half, 1)
        self.cv6 = conv(half, half, 3)
        self.cv7 = conv(2 * half, channels, 1)

    def forward(self, x: Tensor) -> Any:
        a = self.cv4(self.cv3(self.cv1(x)))
        b = self.m(a)
        c = self.m(b)
        deep = self.cv6(self.cv5(torch.cat((a, b, c, self.m(c)), 1)))
        return self.cv7(torch.cat((self.cv2(x), deep), 1))


class SimSPPF(SPPFModule):
    inner: type[SPPFModule] = SPPFModule

    def build(self, facts: Facts, channels: int) -> None:
        if facts.release == "0.4":
            self.add_module(self.inner.child, self.inner(facts, channels))
        else:
            self.inner.build(self, facts, channels)

    def forward(self, x: Tensor) -> Any:
        wrapped = getattr(self, self.inner.child, None)
        return self.inner.forward(self, x) if wrapped is None else wrapped(x)


class SPPF(SimSPPF):
    pass


class SimCSPSPPF(SimSPPF):
    inner = CSPSPPFModule


class CSPSPPF(SimCSPSPPF):
    pass


def _pooling(facts: Facts, channels: int) -> nn.Module:
    kinds = (SimCSPSPPF, CSPSPPF) if facts.csp_pooling else (SimSPPF, SPPF)
    return kinds[facts.act == "silu"](facts, channels)


# Backbone and neck.


class EfficientRep(nn.Module):
    def __init__(self, facts: Facts) -> None:
        super().__init__()
        c = facts.backbone
        self.stem = _block(facts, 3, c[0], 2)
        for index, n in enumerate(facts.repeats):
            cin, cout = c[index], c[index + 1]
            parts = [_block(facts, cin, cout, 2), _stack(facts, cout, cout, n)]
            if index == len(facts.repeats) - 1:
                parts.append(_pooling(facts, cout))
            self.add_module(f"ERBlock_{index + 2}", nn.Sequential(*parts))
        if facts.release in ("0.3", "0.4"):
            self.fuse_P2 = facts.bifusion
        self.last = len(facts.repeats) + 1

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        maps = []
        for level in range(2, self.last + 1):
            x = self.get_submodule(f"ERBlock_{level}")(x)
            maps.append(x)
        return maps


class EfficientRep6(EfficientRep):
    pass


class CSPBepBackbone(EfficientRep):
    pass


class CSPBepBackbone_P6(EfficientRep):
    pass


class Transpose(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.upsample_transpose = nn.ConvTranspose2d(channels, channels, 2, 2, bias=True)

    def forward(self, x: Tensor) -> Any:
        return self.upsample_transpose(x)


class BiFusion(nn.Module):
    def __init__(self, facts: Facts, same: int, finer: int, c: int) -> None:
        super().__init__()
        self.cv1 = _conv(facts, same, c, 1)
        self.cv2 = _conv(facts, finer, c, 1)
        self.cv3 = _conv(facts, 3 * c, c, 1)
        self.upsample = Transpose(c)
        self.downsample = _conv(facts, c, c, 3, 2)

    def forward(self, coarse: Tensor, same: Tensor, finer: Tensor) -> Any:
        down = self.downsample(self.cv2(finer))
        return self.cv3(torch.cat((self.upsample(coarse), self.cv1(same), down), 1))


class RepPANNeck(nn.Module):
    """Three levels: Rep-PAN, or with BiFusion."""

    def __init__(self, facts: Facts) -> None:
        super().__init__()
        c = facts.backbone + facts.neck
        n = facts.neck_repeats
        self.reduce_layer0 = _conv(facts, c[4], c[5], 1)
        self.reduce_layer1 = _conv(facts, c[5], c[6], 1)
        if facts.bifusion:
            self.Bifusion0 = BiFusion(facts, c[3], c[2], c[5])
            self.Bifusion1 = BiFusion(facts, c[2], c[1], c[6])
            self.Rep_p4 = _stack(facts, c[5], c[5], n[0])
            self.Rep_p3 = _stack(facts, c[6], c[6], n[1])
        else:
            self.upsample0 = Transpose(c[5])
            self.upsample1 = Transpose(c[6])
            self.Rep_p4 = _stack(facts, c[3] + c[5], c[5], n[0])
            self.Rep_p3 = _stack(facts, c[2] + c[6], c[6], n[1])
        self.downsample2 = _conv(facts, c[6], c[7], 3, 2)
        self.Rep_n3 = _stack(facts, c[6] + c[7], c[8], n[2])
        self.downsample1 = _conv(facts, c[8], c[9], 3, 2)
        self.Rep_n4 = _stack(facts, c[5] + c[9], c[10], n[3])

    def forward(self, maps: Any) -> Any:
        p2, p3, p4, p5 = maps
        a = self.reduce_layer0(p5)
        if hasattr(self, "Bifusion0"):
            b = self.reduce_layer1(self.Rep_p4(self.Bifusion0(a, p4, p3)))
            n3 = self.Rep_p3(self.Bifusion1(b, p3, p2))
        else:
            b = self.reduce_layer1(self.Rep_p4(torch.cat((self.upsample0(a), p4), 1)))
            n3 = self.Rep_p3(torch.cat((self.upsample1(b), p3), 1))
        n4 = self.Rep_n3(torch.cat((self.downsample2(n3), b), 1))
        n5 = self.Rep_n4(torch.cat((self.downsample1(n4), a), 1))
        return n3, n4, n5


class CSPRepPANNeck(RepPANNeck):
    pass


class RepBiFPANNeck(RepPANNeck):
    pass


class CSPRepBiFPANNeck(RepPANNeck):
    pass


class RepBiFPANNeck6(nn.Module):
    """Four levels."""

    def __init__(self, facts: Facts) -> None:
        super().__init__()
        c = facts.backbone + facts.neck
        n = facts.neck_repeats
        self.reduce_layer0 = _conv(facts, c[5], c[6], 1)
        self.Bifusion0 = BiFusion(facts, c[4], c[3], c[6])
        self.Rep_p5 = _stack(facts, c[6], c[6], n[0])
        self.reduce_layer1 = _conv(facts, c[6], c[7], 1)
        self.Bifusion1 = BiFusion(facts, c[3], c[2], c[7])
        self.Rep_p4 = _stack(facts, c[7], c[7], n[1])
        self.reduce_layer2 = _conv(facts, c[7], c[8], 1)
        self.Bifusion2 = BiFusion(facts, c[2], c[1], c[8])
        self.Rep_p3 = _stack(facts, c[8], c[8], n[2])
        self.downsample2 = _conv(facts, c[8], c[8], 3, 2)
        self.Rep_n4 = _stack(facts, 2 * c[8], c[9], n[3])
        self.downsample1 = _conv(facts, c[9], c[9], 3, 2)
        self.Rep_n5 = _stack(facts, c[7] + c[9], c[10], n[4])
        self.downsample0 = _conv(facts, c[10], c[10], 3, 2)
        self.Rep_n6 = _stack(facts, c[6] + c[10], c[11], n[5])

    def forward(self, maps: Any) -> Any:
        p2, p3, p4, p5, p6 = maps
        f0 = self.reduce_layer0(p6)
        f1 = self.reduce_layer1(self.Rep_p5(self.Bifusion0(f0, p5, p4)))
        f2 = self.reduce_layer2(self.Rep_p4(self.Bifusion1(f1, p4, p3)))
        n3 = self.Rep_p3(self.Bifusion2(f2, p3, p2))
        n4 = self.Rep_n4(torch.cat((self.downsample2(n3), f2), 1))
        n5 = self.Rep_n5(torch.cat((self.downsample1(n4), f1), 1))
        n6 = self.Rep_n6(torch.cat((self.downsample0(n5), f0), 1))
        return n3, n4, n5, n6


class CSPRepBiFPANNeck_P6(RepBiFPANNeck6):
    pass


# Heads: one class in four modules.


class Detect(nn.Module):
    """The head. Of anchor-aided and self-distilled training, what only trains is there, too."""

    def __init__(self, facts: Facts) -> None:
        super().__init__()
        c = facts.neck
        channels = c[1::2] if len(c) == 6 and len(facts.repeats) == 4 else c[2:]

        def each(make: Any) -> nn.ModuleList:
            return nn.ModuleList(make(width) for width in channels)

        def one_by_one(outputs: int) -> nn.ModuleList:
            return each(lambda width: nn.Conv2d(width, outputs, 1))

        nc, boxes = facts.classes, 4 * (facts.bins + 1)
        old = facts.release != "0.4"
        self.nc = nc
        self.grid = [torch.zeros(1)] * len(channels)
        self.stems = each(lambda w: _conv(facts, w, w, 1, act="silu"))
        self.cls_convs = each(lambda w: _conv(facts, w, w, 3, act="silu"))
        self.reg_convs = each(lambda w: _conv(facts, w, w, 3, act="silu"))
        self.use_dfl = facts.bins > 0 or facts.head == "distill"
        used = ["cls_preds", "reg_preds"]
        if facts.head == "fuse_ab" and old:
            used = ["cls_preds_af", "reg_preds_af"]
        if facts.head == "distill" and old:
            used[1] = "reg_preds_lrtb"
        self.used = tuple(used)
        self.add_module(used[0], one_by_one(nc))
        self.add_module(used[1], one_by_one(boxes))
        if facts.head == "fuse_ab":
            self.cls_preds_ab = one_by_one(3 * nc)
            self.reg_preds_ab = one_by_one(12)
            self.anchors_init = torch.ones(3, 6)
        if facts.head == "distill":
            self.add_module("reg_preds" if old else "reg_preds_dist", one_by_one(68))
        self.has_objectness = facts.head == "offset"
        if self.has_objectness:
            self.obj_preds = one_by_one(1)
        else:
            # In the authors' files these constants are there, and say 16, even without DFL.
            self.reg_max = facts.bins or 16
            bins = torch.linspace(0, self.reg_max, self.reg_max + 1)
            self.proj = nn.Parameter(bins, requires_grad=False)
            self.proj_conv = nn.Conv2d(self.reg_max + 1, 1, 1, bias=False)
            self.proj_conv.weight = nn.Parameter(bins.clone().view(1, -1, 1, 1))

    def forward(self, features: Any) -> list[tuple[Tensor, ...]]:
        outputs = []
        classes, boxes = (self.get_submodule(name) for name in self.used)
        for i, feature in enumerate(features):
            x = self.stems[i](feature)
            r = self.reg_convs[i](x)
            level = [classes[i](self.cls_convs[i](x)), boxes[i](r)]  # type: ignore[index]
            if self.has_objectness:
                level.append(self.obj_preds[i](r))
            outputs.append(tuple(level))
        return outputs


class Model(nn.Module):
    """The whole network; `forward` returns the head's raw outputs."""

    def __init__(self, facts: Facts) -> None:
        super().__init__()
        csp, six = facts.stack != "plain", len(facts.repeats) == 5
        backbones = (EfficientRep, CSPBepBackbone, EfficientRep6, CSPBepBackbone_P6)
        necks: tuple[Any, ...] = (RepPANNeck, CSPRepPANNeck)
        if facts.bifusion:
            necks = (RepBiFPANNeck, CSPRepBiFPANNeck)
        necks = (*necks, RepBiFPANNeck6, CSPRepBiFPANNeck_P6)
        self.backbone = backbones[csp + 2 * six](facts)
        self.neck = necks[csp + 2 * six](facts)
        head = {"fuse_ab": AidedDetect, "distill": DistilledDetect}.get(facts.head, Detect)
        self.detect = head(facts)
        self.stride = torch.tensor([8, 16, 32, 64][: 4 if six else 3])

    def forward(self, images: Tensor) -> Any:
        return self.detect(self.neck(self.backbone(images)))


# Lite.


class SEBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.conv1 = nn.Conv2d(channels, channels // 4, 1)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels // 4, channels, 1)
        self.hardsigmoid = nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Any:
        return x * self.hardsigmoid(self.conv2(self.relu(self.conv1(self.avg_pool(x)))))


class Lite_EffiBlockS1(nn.Module):
    def __init__(self, channels: int, mid: int) -> None:
        super().__init__()
        self.conv_pw_1 = ConvBNHS(channels // 2, mid, 1)
        self.conv_dw_1 = ConvBN(mid, mid, 3, groups=mid)
        self.se = SEBlock(mid)
        self.conv_1 = ConvBNHS(mid, channels // 2, 1)

    def forward(self, x: Tensor) -> Any:
        passing, x = x.chunk(2, 1)
        x = self.conv_1(self.se(self.conv_dw_1(self.conv_pw_1(x))))
        return F.channel_shuffle(torch.cat((passing, x), 1), 2)


class Lite_EffiBlockS2(nn.Module):
    def __init__(self, cin: int, mid: int, cout: int) -> None:
        super().__init__()
        self.conv_dw_1 = ConvBN(cin, cin, 3, 2, groups=cin)
        self.conv_1 = ConvBNHS(cin, cout // 2, 1)
        self.conv_pw_2 = ConvBNHS(cin, mid // 2, 1)
        self.conv_dw_2 = ConvBN(mid // 2, mid // 2, 3, 2, groups=mid // 2)
        self.se = SEBlock(mid // 2)
        self.conv_2 = ConvBNHS(mid // 2, cout // 2, 1)
        self.conv_dw_3 = ConvBNHS(cout, cout, 3, groups=cout)
        self.conv_pw_3 = ConvBNHS(cout, cout, 1)

    def forward(self, x: Tensor) -> Any:
        a = self.conv_1(self.conv_dw_1(x))
        b = self.conv_2(self.se(self.conv_dw_2(self.conv_pw_2(x))))
        return self.conv_pw_3(self.conv_dw_3(torch.cat((a, b), 1)))


class DPBlock(nn.Module):
    def __init__(self, cin: int, cout: int, k: int, s: int) -> None:
        super().__init__()
        self.conv_dw_1 = nn.Conv2d(cin, cout, k, s, k // 2, groups=cout)
        self.bn_1 = nn.BatchNorm2d(cout)
        self.act_1 = nn.Hardswish(inplace=True)
        self.conv_pw_1 = nn.Conv2d(cout, cout, 1)
        self.bn_2 = nn.BatchNorm2d(cout)
        self.act_2 = nn.Hardswish(inplace=True)

    def forward(self, x: Tensor) -> Any:
        return self.act_2(self.bn_2(self.conv_pw_1(self.act_1(self.bn_1(self.conv_dw_1(x))))))


class DarknetBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_1 = ConvBNHS(channels, channels, 1)
        self.conv_2 = DPBlock(channels, channels, 5, 1)

    def forward(self, x: Tensor) -> Any:
        return self.conv_2(self.conv_1(x))


class CSPBlock(nn.Module):
    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.conv_1 = ConvBNHS(cin, cout // 2, 1)
        self.conv_2 = ConvBNHS(cin, cout // 2, 1)
        self.conv_3 = ConvBNHS(cout, cout, 1)
        self.blocks = DarknetBlock(cout // 2)

    def forward(self, x: Tensor) -> Any:
        return self.conv_3(torch.cat((self.blocks(self.conv_1(x)), self.conv_2(x)), 1))


class Lite_EffiBackbone(nn.Module):
    def __init__(self, channels: tuple[int, ...], repeats: tuple[int, ...]) -> None:
        super().__init__()
        self.conv_0 = ConvBNHS(3, channels[0], 3, 2)
        for index, n in enumerate(repeats):
            cin, cout = channels[index], channels[index + 1]
            blocks: list[nn.Module] = [Lite_EffiBlockS2(cin, cout // 2, cout)]
            blocks += [Lite_EffiBlockS1(cout, cout // 2) for _ in range(n - 1)]
            self.add_module(f"lite_effiblock_{index + 1}", nn.Sequential(*blocks))

    def forward(self, x: Tensor) -> Any:
        maps = [self.conv_0(x)]
        for index in range(1, 5):
            maps.append(self.get_submodule(f"lite_effiblock_{index}")(maps[-1]))
        return maps[2:]


class Lite_EffiNeck(nn.Module):
    def __init__(self, channels: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.reduce_layer0 = ConvBNHS(channels[4], width, 1)
        self.reduce_layer1 = ConvBNHS(channels[3], width, 1)
        self.reduce_layer2 = ConvBNHS(channels[2], width, 1)
        self.upsample0 = nn.Upsample(scale_factor=2, mode="nearest")
        self.upsample1 = nn.Upsample(scale_factor=2, mode="nearest")
        self.Csp_p4 = CSPBlock(2 * width, width)
        self.Csp_p3 = CSPBlock(2 * width, width)
        self.Csp_n3 = CSPBlock(2 * width, width)
        self.Csp_n4 = CSPBlock(2 * width, width)
        self.downsample2 = DPBlock(width, width, 5, 2)
        self.downsample1 = DPBlock(width, width, 5, 2)
        self.p6_conv_1 = DPBlock(width, width, 5, 2)
        self.p6_conv_2 = DPBlock(width, width, 5, 2)

    def forward(self, maps: Any) -> Any:
        c3, c4, c5 = maps
        r5, r4, r3 = self.reduce_layer0(c5), self.reduce_layer1(c4), self.reduce_layer2(c3)
        a = self.Csp_p4(torch.cat((self.upsample0(r5), r4), 1))
        o3 = self.Csp_p3(torch.cat((self.upsample1(a), r3), 1))
        o4 = self.Csp_n3(torch.cat((self.downsample2(o3), a), 1))
        o5 = self.Csp_n4(torch.cat((self.downsample1(o4), r5), 1))
        return o3, o4, o5, self.p6_conv_1(r5) + self.p6_conv_2(o5)


class LiteDetect(nn.Module):
    def __init__(self, width: int, classes: int) -> None:
        super().__init__()

        def each(make: Any) -> nn.ModuleList:
            return nn.ModuleList(make() for _ in range(4))

        self.nc = classes
        self.stems = each(lambda: DPBlock(width, width, 5, 1))
        self.cls_convs = each(lambda: DPBlock(width, width, 5, 1))
        self.reg_convs = each(lambda: DPBlock(width, width, 5, 1))
        self.cls_preds = each(lambda: nn.Conv2d(width, classes, 1))
        self.reg_preds = each(lambda: nn.Conv2d(width, 4, 1))

    def forward(self, features: Any) -> list[tuple[Tensor, ...]]:
        outputs: list[tuple[Tensor, ...]] = []
        for i, feature in enumerate(features):
            x = self.stems[i](feature)
            classes = self.cls_preds[i](self.cls_convs[i](x))
            outputs.append((classes, self.reg_preds[i](self.reg_convs[i](x))))
        return outputs


class LiteModel(nn.Module):
    def __init__(
        self,
        channels: tuple[int, ...],
        repeats: tuple[int, ...] = (1, 3, 7, 3),
        width: int = 96,
        classes: int = 80,
    ) -> None:
        super().__init__()
        self.backbone = Lite_EffiBackbone(channels, repeats)
        self.neck = Lite_EffiNeck(channels, width)
        self.detect = LiteDetect(width, classes)
        self.stride = torch.tensor([8, 16, 32, 64])

    def forward(self, images: Tensor) -> Any:
        return self.detect(self.neck(self.backbone(images)))


# Files.


class AidedDetect(Detect):
    pass


class DistilledDetect(Detect):
    pass


for _kind in (AidedDetect, DistilledDetect, LiteDetect):
    _kind.__name__ = _kind.__qualname__ = "Detect"
LiteModel.__name__ = LiteModel.__qualname__ = "Model"

_HOMES: dict[str, tuple[type[nn.Module], ...]] = {
    "yolov6.layers.common": (
        *(Conv, SimConv, Conv_C3, ConvWrapper, SimConvWrapper, RealVGGBlock, RepVGGBlock),
        *(ConvModule, ConvBN, ConvBNReLU, ConvBNSiLU, ConvBNHS, ScaleLayer, LinearAddBlock),
        *(QARepVGGBlockV2, BottleRep, BottleRep3, RepBlock, BepC3, MBLABlock, BiFusion),
        *(SPPFModule, CSPSPPFModule, SimSPPF, SPPF, SimCSPSPPF, CSPSPPF, Transpose),
        *(SEBlock, Lite_EffiBlockS1, Lite_EffiBlockS2, DPBlock, DarknetBlock, CSPBlock),
    ),
    "yolov6.models.efficientrep": (
        *(EfficientRep, EfficientRep6, CSPBepBackbone, CSPBepBackbone_P6, Lite_EffiBackbone),
    ),
    "yolov6.models.reppan": (
        *(RepPANNeck, CSPRepPANNeck, RepBiFPANNeck, CSPRepBiFPANNeck),
        *(RepBiFPANNeck6, CSPRepBiFPANNeck_P6, Lite_EffiNeck),
    ),
    "yolov6.models.effidehead": (Detect,),
    "yolov6.models.heads.effidehead_fuseab": (AidedDetect,),
    "yolov6.models.heads.effidehead_distill_ns": (DistilledDetect,),
    "yolov6.models.heads.effidehead_lite": (LiteDetect,),
    "yolov6.models.yolo": (Model,),
    "yolov6.models.yolo_lite": (LiteModel,),
}


def authors_model(facts: Facts, seed: int = 0) -> Model:
    """Return a network with random weights and statistics, all exact in half precision."""
    torch.manual_seed(seed)
    model: Model = randomized(Model(facts))
    return model


def randomized(model: Any) -> Any:
    """Give a network statistics, and round all to half precision."""
    for module in model.eval().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps, module.momentum = 1e-3, 0.03
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    return model.half().float()


def fuse_as_authors(model: Any, only_convolutions: bool = False) -> Any:
    """Fuse in place what the authors' code fuses; their v0.1 left RepVGG blocks to another step.

    0.4 fuses every ConvModule, those in the branches of RepVGG blocks included, before the blocks.
    """
    kinds: tuple[type[nn.Module], ...] = (Conv, SimConv, ConvModule)
    for step in (kinds, () if only_convolutions else (RepVGGBlock, QARepVGGBlockV2)):
        for module in list(model.modules()):
            if type(module) in step:
                module.fuse()
    return model.half().float()


def parts_of(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the weights of a network, and the full class names of its modules, by name."""
    homes = {kind: f"{home}.{kind.__name__}" for home, kinds in _HOMES.items() for kind in kinds}
    names = {
        name: homes.get(type(m), f"torch.nn.{type(m).__name__}")
        for name, m in model.named_modules()
    }
    return dict(model.state_dict()), names


@contextlib.contextmanager
def installed(extra: dict[str, tuple[type, ...]] | None = None) -> Iterator[None]:
    """Let pickle find the classes under the authors' module names; undone on leaving."""
    homes: dict[str, tuple[type, ...]] = {**_HOMES, **(extra or {})}
    names = {name.rpartition(".")[0] for name in homes} | {name.partition(".")[0] for name in homes}
    before = {kind: kind.__module__ for kinds in homes.values() for kind in kinds}
    added = [name for name in (*names, *homes) if name and name not in sys.modules]
    try:
        for name in added:
            sys.modules[name] = types.ModuleType(name)
        for name, kinds in homes.items():
            for kind in kinds:
                kind.__module__ = name
                setattr(sys.modules[name], kind.__name__, kind)
        yield
    finally:
        for kind, module in before.items():
            kind.__module__ = module
        for name in added:
            del sys.modules[name]


def write_checkpoint(path: Path, model: nn.Module, **entries: Any) -> Path:
    """Save as the authors' training does: in half precision, next to a few other entries."""
    content = {"model": model.half(), "ema": None, "updates": None, "optimizer": None, "epoch": -1}
    with installed():
        torch.save({**content, **entries}, path)
    model.float()
    return path
