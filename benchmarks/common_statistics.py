"""SyncBatchNorm in place of training's own common statistics, for `training_speed` to compare.

SyncBatchNorm leaves out processes without images, and for that waits, in every layer of every step,
until the GPU has counted. In training each process has equally many, so that nothing need be
counted, nor waited for. What is computed is the same (Ioffe and Szegedy 2015, over the images of
all processes).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

from trt_yolov6.training import distributed


@contextlib.contextmanager
def synchronized() -> Iterator[None]:
    """Give trainings that begin in the context SyncBatchNorm."""
    own = distributed.taking_over

    def taking_over(bn: nn.BatchNorm2d, _: type[nn.BatchNorm2d]) -> nn.BatchNorm2d:
        converted = own(bn, nn.SyncBatchNorm)  # type: ignore[arg-type]
        # It counts its steps, whether anyone asks or not.
        converted.num_batches_tracked = torch.zeros((), dtype=torch.int64, device="cuda")
        return converted

    with mock.patch.object(distributed, "taking_over", taking_over):
        yield


def largest_difference() -> float:
    """Return how far normalized values and gradients are from SyncBatchNorm's; in all processes."""
    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(dist.get_rank())
    x, grad = (torch.randn(8, 24, 40, 40, device=device, generator=generator) for _ in range(2))
    found = []
    for kind in (nn.SyncBatchNorm, distributed.CommonBatchNorm):
        bn = kind(24).to(device)
        with torch.no_grad():
            bn.weight.copy_(torch.linspace(0.5, 2, 24))
        given = (3 * x + dist.get_rank()).contiguous(memory_format=torch.channels_last)
        given.requires_grad_()
        values = bn(given)
        values.backward(grad)
        tensors = (values, given.grad, bn.weight.grad, bn.bias.grad, bn.running_mean)
        found.append([*tensors, bn.running_var])
    differences = [
        float((one - other).abs().max() / one.abs().max())
        for one, other in zip(*found, strict=True)
    ]
    return max(differences)
