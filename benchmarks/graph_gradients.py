"""Gradients of a network of CUDA graphs against those of the plain one, for `training_speed`."""

from __future__ import annotations

import copy

import torch

from trt_yolov6.models.network import Raw
from trt_yolov6.training.distributed import placed
from trt_yolov6.training.graphed import graphed


def gradient_difference(variant: str, images: int, image_size: int) -> float:
    """Return how far a graphed network's gradients are from a plain one's, over their size.

    In bf16, of two batches whose gradients are added up, each with the losses' gradients made up.
    """
    from benchmarks.gpu_graphs import random_model

    network = placed(Raw(random_model(variant)), "cuda").train()
    shape = (images, 3, image_size, image_size)
    graphed_one = graphed(copy.deepcopy(network), shape, torch.bfloat16)
    generator = torch.Generator("cuda").manual_seed(0)
    batches = [torch.rand(shape, device="cuda", generator=generator) for _ in range(2)]
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
