"""Re-parameterization: batch normalization and parallel branches folded into one convolution."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trt_yolov6.models.blocks import (
    BottleRep,
    ConvAct,
    ConvBN,
    CSPStack,
    QARepConv,
    RepConv,
    ScaledRepConv,
    has_conv_bias,
)
from trt_yolov6.models.network import YOLOv6


def fuse(model: YOLOv6) -> YOLOv6:
    """Return a deploy form of `model`: the same function with one convolution a block.

    The result is in eval mode and shares nothing with `model`, which stays as it is. Blocks that
    are fused already are kept.
    """
    return _copied(model, _fused).eval()


def is_fused(model: nn.Module) -> bool:
    """Return True when no batch normalization is left."""
    return not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def _copied(model: YOLOv6, change: Callable[[nn.Module], nn.Module | None]) -> YOLOv6:
    """Copy a network, with what `change` makes of a module in its place unless that is None."""
    memo: dict[int, Any] = {}  # what takes another's place need not be copied

    def look_below(module: nn.Module) -> None:
        for child in module.children():
            new = change(child)
            if new is None:
                look_below(child)
            else:
                memo[id(child)] = new

    look_below(model)
    return copy.deepcopy(model, memo)


def _fused(block: nn.Module) -> ConvAct | None:
    if isinstance(block, RepConv):
        return fuse_rep_conv(block)
    if isinstance(block, QARepConv):
        return fuse_qarep_conv(block)
    if isinstance(block, ScaledRepConv):
        block = merge_scaled(block)
    return (
        fuse_normalization(block.conv, block.bn, block.act) if isinstance(block, ConvBN) else None
    )


def fold_shortcuts(model: YOLOv6) -> None:
    """Fold the weights of shortcuts of a fused network into convolutions, in place.

    A block that ends in ReLU computes relu(w y + b) + a x. With z in the place of x / A, where A is
    the product of the weights so far, it is relu(w y / A' + b / A') + z, where A' = A a: ReLU does
    not care for a positive factor. So the convolution that ends a block is divided by A', those
    that read z are multiplied by A, and the last is the one that merges the stack's two paths.
    Other activations have no such rule, and the factor stays. It costs a kernel of its own, and
    TensorRT 8 does not build it in INT8.
    """
    for module in model.modules():
        if isinstance(module, CSPStack):
            _fold_shortcuts_of(module)


_WIDEST = 64.0
"""Largest product of shortcuts' weights, or of their reciprocals, that is folded: the values
between blocks grow as much, and float16 ends at 65504."""


def _fold_shortcuts_of(stack: CSPStack) -> None:
    merge = stack.merge
    bottlenecks = [block for block in stack.bottlenecks if isinstance(block, BottleRep)]
    factors = [1.0]
    for block in bottlenecks:
        last = block.second  # only MBLA has a third
        if (
            block.alpha is None
            or not isinstance(last, ConvAct)
            or not isinstance(last.act, nn.ReLU)
        ):
            return
        factors.append(factors[-1] * float(block.alpha.detach()))
    if not isinstance(merge, ConvAct) or not all(1 / _WIDEST <= f <= _WIDEST for f in factors):
        return
    with torch.no_grad():
        for block, (before, after) in zip(bottlenecks, itertools.pairwise(factors), strict=True):
            assert isinstance(block.first, ConvAct)
            assert isinstance(block.second, ConvAct)
            assert block.second.conv.bias is not None
            block.first.conv.weight.mul_(before)
            block.second.conv.weight.div_(after)
            block.second.conv.bias.div_(after)
            block.alpha = None
        merge.conv.weight[:, : merge.conv.in_channels // 2].mul_(factors[-1])


def single_branch(model: YOLOv6) -> YOLOv6:
    """Return the network that RepOptimizer trains, of a hyper-search network: the same function.

    The scaled branches of each block are added up to one kernel; batch normalizations stay. The
    result is in the mode of `model` (training or eval) and shares nothing with it.
    """
    arch = dataclasses.replace(model.arch, block="conv")
    bias = has_conv_bias(arch)
    merged = _copied(
        model,
        lambda block: merge_scaled(block, bias=bias) if isinstance(block, ScaledRepConv) else None,
    )
    merged.arch = arch
    return merged


def merge_scaled(block: ScaledRepConv, *, bias: bool = False) -> ConvBN:
    """Add up the scaled branches of a block to one convolution, with a bias of zeros if asked."""
    out_channels, in_channels = block.dense.shape[:2]
    merged = ConvBN(in_channels, out_channels, 3, block.stride, bias=bias)
    merged.conv.to(block.dense)
    with torch.no_grad():
        merged.conv.weight.copy_(block.kernel())
        if merged.conv.bias is not None:
            merged.conv.bias.zero_()
    merged.bn = copy.deepcopy(block.bn)
    merged.act = copy.deepcopy(block.act)
    return merged.train(block.training)


def fuse_normalization(conv: nn.Conv2d, bn: nn.BatchNorm2d, act: nn.Module) -> ConvAct:
    """Fold a batch normalization into the convolution before it."""
    kernel, bias = _folded(conv.weight, conv.bias, bn)
    return _conv_act(conv, kernel, bias, act)


def fuse_rep_conv(block: RepConv) -> ConvAct:
    """Fold the three branches of a block into one 3x3 convolution."""
    kernel, bias = _branch(block.dense)
    kernel_1x1, bias_1x1 = _branch(block.pointwise)
    kernel = kernel + F.pad(kernel_1x1, (1, 1, 1, 1))
    bias = bias + bias_1x1
    if block.identity is not None:
        kernel_identity, bias_identity = _folded(_unit(kernel), None, block.identity)
        kernel = kernel + F.pad(kernel_identity, (1, 1, 1, 1))
        bias = bias + bias_identity
    return _conv_act(block.dense.conv, kernel, bias, block.act)


def fuse_qarep_conv(block: QARepConv) -> ConvAct:
    """Fold the four branches of a block and the normalization of their sum into one convolution."""
    kernel, bias = _branch(block.dense)
    kernel = kernel + F.pad(block.pointwise.weight.detach().double(), (1, 1, 1, 1))
    if block.average is not None:
        unit = _unit(kernel)
        kernel = kernel + F.pad(unit, (1, 1, 1, 1)) + unit.expand_as(kernel) / 9
    kernel, bias = _folded(kernel, bias, block.bn)
    return _conv_act(block.dense.conv, kernel, bias, block.act)


def _branch(block: ConvBN | ConvAct) -> tuple[Tensor, Tensor]:
    """Return kernel and bias of a branch without activation, fused already or not, in float64."""
    if isinstance(block, ConvBN):
        return _folded(block.conv.weight, block.conv.bias, block.bn)
    assert block.conv.bias is not None
    return block.conv.weight.detach().double(), block.conv.bias.detach().double()


def _unit(like: Tensor) -> Tensor:
    """Return the 1x1 kernel that leaves all channels as they are: (channels, channels, 1, 1)."""
    return torch.eye(like.shape[0], dtype=like.dtype, device=like.device)[:, :, None, None]


def _folded(weight: Tensor, bias: Tensor | None, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return kernel and bias of "convolve, then normalize", in float64: branches add up exactly."""
    assert bn.running_mean is not None
    assert bn.running_var is not None
    deviation = (bn.running_var.double() + bn.eps).sqrt()
    scale = bn.weight.detach().double() / deviation
    shift = bn.bias.detach().double() - bn.running_mean.double() * scale
    if bias is not None:
        shift = shift + bias.detach().double() * scale
    return weight.detach().double() * scale[:, None, None, None], shift


def _conv_act(like: nn.Conv2d, kernel: Tensor, bias: Tensor, act: nn.Module) -> ConvAct:
    """Build the fused block with the stride, padding, dtype and device of `like`."""
    height = kernel.shape[2]
    conv = nn.Conv2d(
        like.in_channels,
        like.out_channels,
        height,
        like.stride[0],
        height // 2,
        groups=like.groups,
        device="meta",  # random weights would take longer than the rest
    )
    conv.weight = nn.Parameter(kernel.to(like.weight.dtype))
    conv.bias = nn.Parameter(bias.to(like.weight.dtype))
    return ConvAct(conv, copy.deepcopy(act)).eval()
