"""A network whose passes are CUDA graphs: `training_speed` tries it.

A step of N launches thousands of small kernels, one by one, from Python: at 32 images a GPU the
core that gives the orders is what a step waits for. A graph gives the orders of the network's
forward pass in one call, and those of its backward pass in another. What is computed is the same.
Augmentation, losses and optimizer stay as they are: their shapes change from step to step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from torch import nn

from trt_yolov6.models.network import YOLOv6
from trt_yolov6.training import detection_task


@contextlib.contextmanager
def graphed(images: int, image_size: int) -> Iterator[None]:
    """Give trainings that begin in the context a graphed network; in bf16, on a GPU.

    Args:
        images: of a step, of this process.
        image_size: their side in pixels.
    """
    plain = detection_task._Levels
    zero_grad = torch.optim.SGD.zero_grad

    def levels(model: YOLOv6) -> nn.Module:
        return captured(plain(model), (images, 3, image_size, image_size))

    def zeroed(optimizer: torch.optim.SGD, set_to_none: bool = True) -> None:
        # A gradient that is not there is taken over as it lies, in the graph's own memory, where
        # the next backward pass would overwrite what is to be added up.
        zero_grad(optimizer, set_to_none=False)

    with (
        mock.patch.object(detection_task, "_Levels", levels),
        mock.patch.object(torch.optim.SGD, "zero_grad", zeroed),
    ):
        yield


def captured(network: nn.Module, shape: tuple[int, int, int, int]) -> nn.Module:
    """Capture a network's passes in training, for images of a shape; changes it in place."""
    device = next(network.parameters()).device
    images = torch.rand(shape, device=device).contiguous(memory_format=torch.channels_last)
    kept = {name: buffer.clone() for name, buffer in network.named_buffers()}
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        torch.cuda.make_graphed_callables(network, (images,), allow_unused_input=True)
    # Trying it out has moved the running statistics.
    with torch.no_grad():
        for name, buffer in network.named_buffers():
            buffer.copy_(kept[name])
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    return network
