"""Count a network's parameters and floating-point operations."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from trt_yolov6.models.network import YOLOv6
from trt_yolov6.spec import two_sides


def count_parameters(model: nn.Module) -> int:
    """Return the number of learnable values."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_flops(model: YOLOv6, image_size: int | tuple[int, int]) -> int:
    """Return the floating-point operations of one image of `image_size` pixels (height, width).

    Counted as in the paper's Table 1: for each convolution, two operations a weight and an output
    position; biases, activations and poolings count nothing. With DFL the expectation over the bins
    counts, which the authors' code takes by a convolution. That table treats the two transposed
    convolutions alike, and so overstates each fourfold: their kernels do not overlap, and every
    output position sees one of the four taps. In all it is 0.7 to 0.9 % more than the arithmetic
    done.

    Nothing is computed here: the network runs on PyTorch's "meta" device.
    """
    height, width = two_sides(image_size)
    total = 0

    def count(module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        assert isinstance(module, nn.Conv2d | nn.ConvTranspose2d)
        total += 2 * module.weight.numel() * output.shape[2] * output.shape[3]

    shapes_only = copy.deepcopy(model).to("meta").eval()
    for module in shapes_only.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.register_forward_hook(count)
    with torch.no_grad():
        levels = shapes_only.raw(
            torch.empty(1, model.arch.input_channels, height, width, device="meta")
        )
    if model.arch.reg_max:
        total += sum(2 * regression[0].numel() for _, regression, *_ in levels)
    return total
