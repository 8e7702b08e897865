"""A network whose passes are CUDA graphs: `training_speed` tries it.

A step of N launches thousands of small kernels, one by one, from Python: at 32 images a GPU the
core that gives the orders is what a step waits for. A graph gives the orders of the network's
forward pass in one call, and those of its backward pass in another. What is computed is the same.
Augmentation, losses and optimizer stay as they are: their shapes change from step to step.
"""

from __future__ import annotations

import contextlib
import copy
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


def gradient_difference(variant: str, images: int, image_size: int) -> float:
    """Return how far a graphed network's gradients are from a plain one's, over their size.

    In bf16, of two batches whose gradients are added up, each with the losses' gradients made up.
    """
    from benchmarks.gpu_graphs import random_model

    device = torch.device("cuda")
    network = detection_task._Levels(random_model(variant)).to(device).train()
    shape = (images, 3, image_size, image_size)
    graphed_one = captured(copy.deepcopy(network), shape)
    generator = torch.Generator(device).manual_seed(0)
    batches = [torch.rand(shape, device=device, generator=generator) for _ in range(2)]
    found = []
    for one in (network, graphed_one):
        for batch in batches:
            with torch.autocast("cuda", torch.bfloat16):
                levels = one(batch.contiguous(memory_format=torch.channels_last))
            total = torch.stack(
                [part.float().square().mean() for level in levels for part in level]
            )
            total.sum().backward()  # type: ignore[no-untyped-call]
        found.append(
            torch.cat(
                [
                    (torch.zeros_like(own) if own.grad is None else own.grad).flatten()
                    for own in one.parameters()
                ]
            )
        )
    return float((found[0] - found[1]).norm() / found[0].norm())
