"""Makes checkpoint files in the format of the authors' code, for the tests of the loader.

A second writing of the network, in modules that carry the authors' class and attribute names. Its
outputs are what a loaded file is compared with, and PyTorch's own functions fuse it.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from trt_yolov6.models import Architecture


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


class RealVGGBlock(nn.Module):
    def __init__(self, cin: int, cout: int, s: int = 1) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(cin, cout, 3, s, 1, bias=False)
        self.bn = nn.BatchNorm2d(cout)
        self.se = nn.Identity()

    def forward(self, x: Tensor) -> Any:
        return self.relu(self.bn(self.conv(x)))


class RepVGGBlock(nn.Module):
    def __init__(self, cin: int, cout: int, s: int = 1) -> None:
        super().__init__()
        self.nonlinearity = nn.ReLU(inplace=True)
        self.se = nn.Identity()
        self.rbr_identity = nn.BatchNorm2d(cin) if cin == cout and s == 1 else None
        self.rbr_dense: Any = self._branch(cin, cout, 3, s)
        self.rbr_1x1: Any = self._branch(cin, cout, 1, s)
        self.rbr_reparam: Any

    @staticmethod
    def _branch(cin: int, cout: int, k: int, s: int) -> nn.Sequential:
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
        merged = fuse_conv_bn_eval(self.rbr_dense.conv, self.rbr_dense.bn)
        point = fuse_conv_bn_eval(self.rbr_1x1.conv, self.rbr_1x1.bn)
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


class BottleRep(nn.Module):
    def __init__(self, block: Any, channels: int) -> None:
        super().__init__()
        self.conv1 = block(channels, channels)
        self.conv2 = block(channels, channels)
        self.shortcut = True
        self.alpha = nn.Parameter(torch.rand(1) + 0.5)

    def forward(self, x: Tensor) -> Any:
        return self.alpha * x + self.conv2(self.conv1(x))


class RepBlock(nn.Module):
    def __init__(self, cin: int, cout: int, n: int, block: Any, bottle: bool = False) -> None:
        super().__init__()

        def make(first: bool) -> nn.Module:
            if bottle:
                return BottleRep(block, cout)
            made: nn.Module = block(cin if first else cout, cout)
            return made

        self.conv1 = make(True)
        self.block = nn.Sequential(*(make(False) for _ in range(n - 1))) if n > 1 else None

    def forward(self, x: Tensor) -> Any:
        x = self.conv1(x)
        return x if self.block is None else self.block(x)


class BepC3(nn.Module):
    def __init__(self, cin: int, cout: int, n: int, block: Any, e: float) -> None:
        super().__init__()
        hidden = int(cout * e)
        self.cv1 = Conv_C3(cin, hidden, 1)
        self.cv2 = Conv_C3(cin, hidden, 1)
        self.cv3 = Conv_C3(2 * hidden, cout, 1)
        for conv in (self.cv1, self.cv2, self.cv3):
            conv.act = nn.SiLU(inplace=True) if block is ConvWrapper else nn.ReLU(inplace=True)
        self.m = RepBlock(hidden, hidden, n, block, bottle=True)

    def forward(self, x: Tensor) -> Any:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


class SimSPPF(nn.Module):
    conv_class: type[Conv] = SimConv

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.cv1 = self.conv_class(channels, channels // 2, 1)
        self.cv2 = self.conv_class(channels * 2, channels, 1)
        self.m = nn.MaxPool2d(kernel_size=5, stride=1, padding=2)

    def forward(self, x: Tensor) -> Any:
        a = self.cv1(x)
        b = self.m(a)
        c = self.m(b)
        return self.cv2(torch.cat((a, b, c, self.m(c)), 1))


class SPPF(SimSPPF):
    conv_class = Conv


class Transpose(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.upsample_transpose = nn.ConvTranspose2d(channels, channels, 2, 2, bias=True)

    def forward(self, x: Tensor) -> Any:
        return self.upsample_transpose(x)


def _stack(arch: Architecture, cin: int, cout: int, n: int) -> nn.Module:
    block = _BLOCKS[arch.block, arch.csp_ratio is None]
    if arch.csp_ratio is None:
        return RepBlock(cin, cout, n, block)
    return BepC3(cin, cout, n, block, arch.csp_ratio)


_BLOCKS: dict[tuple[str, bool], Any] = {
    ("repvgg", True): RepVGGBlock,
    ("repvgg", False): RepVGGBlock,
    ("conv", True): RealVGGBlock,
    ("conv", False): ConvWrapper,
}


class EfficientRep(nn.Module):
    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        block = _BLOCKS[arch.block, arch.csp_ratio is None]
        c, n = arch.stage_channels, arch.stage_repeats
        self.stem = block(3, c[0], 2)
        self.ERBlock_2 = nn.Sequential(block(c[0], c[1], 2), _stack(arch, c[1], c[1], n[0]))
        self.ERBlock_3 = nn.Sequential(block(c[1], c[2], 2), _stack(arch, c[2], c[2], n[1]))
        self.ERBlock_4 = nn.Sequential(block(c[2], c[3], 2), _stack(arch, c[3], c[3], n[2]))
        pooling = SPPF(c[4]) if arch.activation == "silu" else SimSPPF(c[4])
        self.ERBlock_5 = nn.Sequential(
            block(c[3], c[4], 2), _stack(arch, c[4], c[4], n[3]), pooling
        )

    def forward(self, x: Tensor) -> Any:
        p3 = self.ERBlock_3(self.ERBlock_2(self.stem(x)))
        p4 = self.ERBlock_4(p3)
        return p3, p4, self.ERBlock_5(p4)


class CSPBepBackbone(EfficientRep):
    pass


class RepPANNeck(nn.Module):
    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        conv = Conv if arch.activation == "silu" else SimConv
        c = arch.stage_channels + arch.neck_channels
        n = arch.neck_repeats
        self.Rep_p4 = _stack(arch, c[3] + c[5], c[5], n[0])
        self.Rep_p3 = _stack(arch, c[2] + c[6], c[6], n[1])
        self.Rep_n3 = _stack(arch, c[6] + c[7], c[8], n[2])
        self.Rep_n4 = _stack(arch, c[5] + c[9], c[10], n[3])
        self.reduce_layer0 = conv(c[4], c[5], 1)
        self.upsample0 = Transpose(c[5])
        self.reduce_layer1 = conv(c[5], c[6], 1)
        self.upsample1 = Transpose(c[6])
        self.downsample2 = conv(c[6], c[7], 3, 2)
        self.downsample1 = conv(c[8], c[9], 3, 2)

    def forward(self, features: Any) -> Any:
        p3, p4, p5 = features
        a = self.reduce_layer0(p5)
        b = self.Rep_p4(torch.cat((self.upsample0(a), p4), 1))
        b = self.reduce_layer1(b)
        n3 = self.Rep_p3(torch.cat((self.upsample1(b), p3), 1))
        n4 = self.Rep_n3(torch.cat((self.downsample2(n3), b), 1))
        n5 = self.Rep_n4(torch.cat((self.downsample1(n4), a), 1))
        return n3, n4, n5


class CSPRepPANNeck(RepPANNeck):
    pass


class Detect(nn.Module):
    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        channels = arch.neck_channels[1::2]

        def each(make: Any) -> nn.ModuleList:
            return nn.ModuleList(make(c) for c in channels)

        self.nc = arch.num_classes
        self.grid = [torch.zeros(1)] * 3
        self.stems = each(lambda c: Conv(c, c, 1))
        self.cls_convs = each(lambda c: Conv(c, c, 3))
        self.reg_convs = each(lambda c: Conv(c, c, 3))
        self.cls_preds = each(lambda c: nn.Conv2d(c, arch.num_classes, 1))
        self.reg_preds = each(lambda c: nn.Conv2d(c, 4 * (arch.reg_max + 1), 1))
        self.has_objectness = arch.head == "offset"
        if self.has_objectness:
            self.obj_preds = each(lambda c: nn.Conv2d(c, 1, 1))
        else:
            # In the authors' files these constants are there, and say 16, even without DFL.
            self.reg_max = arch.reg_max or 16
            bins = torch.linspace(0, self.reg_max, self.reg_max + 1)
            self.proj = nn.Parameter(bins, requires_grad=False)
            self.proj_conv = nn.Conv2d(self.reg_max + 1, 1, 1, bias=False)
            self.proj_conv.weight = nn.Parameter(bins.clone().view(1, -1, 1, 1))

    def forward(self, features: Any) -> list[tuple[Tensor, ...]]:
        outputs = []
        for i, feature in enumerate(features):
            x = self.stems[i](feature)
            r = self.reg_convs[i](x)
            level = [self.cls_preds[i](self.cls_convs[i](x)), self.reg_preds[i](r)]
            if self.has_objectness:
                level.append(self.obj_preds[i](r))
            outputs.append(tuple(level))
        return outputs


class Model(nn.Module):
    """The whole network; `forward` returns the head's raw outputs."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        csp = arch.csp_ratio is not None
        self.backbone = CSPBepBackbone(arch) if csp else EfficientRep(arch)
        self.neck = CSPRepPANNeck(arch) if csp else RepPANNeck(arch)
        self.detect = Detect(arch)
        self.stride = torch.tensor([8, 16, 32])

    def forward(self, images: Tensor) -> Any:
        return self.detect(self.neck(self.backbone(images)))


_HOMES: dict[str, tuple[type[nn.Module], ...]] = {
    "yolov6.layers.common": (
        *(Conv, SimConv, Conv_C3, ConvWrapper, RealVGGBlock, RepVGGBlock),
        *(BottleRep, RepBlock, BepC3, SimSPPF, SPPF, Transpose),
    ),
    "yolov6.models.efficientrep": (EfficientRep, CSPBepBackbone),
    "yolov6.models.reppan": (RepPANNeck, CSPRepPANNeck),
    "yolov6.models.effidehead": (Detect,),
    "yolov6.models.yolo": (Model,),
}


def authors_model(arch: Architecture, seed: int = 0) -> Model:
    """Return a network with random weights and statistics, all exact in half precision."""
    torch.manual_seed(seed)
    model = Model(arch).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps, module.momentum = 1e-3, 0.03
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    return model.half().float()


def fuse_as_authors(model: Model, only_convolutions: bool = False) -> Model:
    """Fuse in place what the authors' code fuses; their v0.1 left RepVGG blocks to another step."""
    kinds: tuple[type[nn.Module], ...] = (Conv, SimConv)
    if not only_convolutions:
        kinds = (*kinds, RepVGGBlock)
    for module in list(model.modules()):
        if type(module) in kinds:
            module.fuse()  # type: ignore[operator]
    return model.half().float()


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
    """Save as the authors' training does: in half precision, beside a few other entries."""
    content = {"model": model.half(), "ema": None, "updates": None, "optimizer": None, "epoch": -1}
    with installed():
        torch.save({**content, **entries}, path)
    model.float()
    return path
