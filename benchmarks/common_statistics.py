"""Batch normalization over all GPUs' images without waiting for the GPU: tried by `training_speed`.

PyTorch's SyncBatchNorm leaves out processes without images, and for that waits, in every layer of
every step, until the GPU has counted. In training each process has equally many, so that nothing
need be counted, nor waited for. What is computed is the same (Ioffe and Szegedy 2015, over the
images of all processes).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trt_yolov6.training import distributed


@contextlib.contextmanager
def without_waits() -> Iterator[None]:
    """Give trainings that begin in the context `CommonBatchNorm` in place of SyncBatchNorm."""

    def common(bn: nn.BatchNorm2d, _: object) -> nn.Module:
        return distributed.taking_over(bn, CommonBatchNorm)

    with mock.patch.object(distributed, "_common", common):
        yield


class CommonBatchNorm(nn.BatchNorm2d):
    """Batch normalization over the images of all processes, each with equally many; on GPUs."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized x (images, channels, rows, columns), in x's dtype."""
        if not self.training:
            return super().forward(x)
        share = 0.1 if self.momentum is None else self.momentum
        found: Tensor = _Normalized.apply(  # type: ignore[no-untyped-call]
            x, self.weight, self.bias, self.running_mean, self.running_var, self.eps, share
        )
        return found


class _Normalized(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        eps: float,
        share: float,
    ) -> Tensor:
        x = _dense(x)
        channels, world = x.shape[1], dist.get_world_size()
        own = torch.cat(torch.batch_norm_stats(x, eps))
        every = own.new_empty(world, 2 * channels)
        dist.all_gather_into_tensor(every, own)
        counts = own.new_full((world,), x.numel() // channels)
        mean, inverse = torch.batch_norm_gather_stats_with_counts(
            x,
            every[:, :channels],
            every[:, channels:],
            running_mean,
            running_var,
            share,
            eps,
            counts,
        )
        ctx.save_for_backward(x, weight, mean, inverse)
        found: Tensor = torch.batch_norm_elemt(x, weight, bias, mean, inverse, eps)
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse = ctx.saved_tensors
        grad = _dense(grad)
        channels, world = x.shape[1], dist.get_world_size()
        of_grad, of_product, of_weight, of_bias = torch.batch_norm_backward_reduce(
            grad, x, mean, inverse, weight, True, True, True
        )
        sums = torch.cat([of_grad, of_product])
        dist.all_reduce(sums)
        counts = torch.full((world,), x.numel() // channels, dtype=torch.int32, device=x.device)
        of_x = torch.batch_norm_backward_elemt(
            grad, x, mean, inverse, weight, sums[:channels], sums[channels:], counts
        )
        # The gradients of weight and bias are averaged with all others, by DistributedDataParallel.
        return of_x, of_weight, of_bias, None, None, None, None


def _dense(x: Tensor) -> Tensor:
    if x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()


def largest_difference() -> float:
    """Return how far normalized values and gradients are from SyncBatchNorm's; in all processes."""
    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(dist.get_rank())
    x, grad = (torch.randn(8, 24, 40, 40, device=device, generator=generator) for _ in range(2))
    found = []
    for kind in (nn.SyncBatchNorm, CommonBatchNorm):
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
