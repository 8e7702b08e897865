"""Several processes that train one network: who they are, and what they share.

Under `torchrun` every process finds its place in the environment; without it there is one process.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from trt_yolov6.common.text import counted
from trt_yolov6.errors import UserError

Network = TypeVar("Network", bound=nn.Module)

LONGEST_WAIT = timedelta(hours=6)
"""Time that processes wait for each other at most, as for the first one, which evaluates alone.
NCCL's own limit of 10 minutes may end before a large validation split does."""


@dataclass(frozen=True)
class Processes:
    """Rank of this process among those that train together."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """True in the one process that writes files and talks."""
        return self.rank == 0

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean of a tensor over all processes; no gradient passes."""
        if self.world == 1:
            return value
        total = value.detach().clone()
        dist.all_reduce(total)
        return total / self.world

    def of_first(self, value: bool) -> bool:
        """Return the first process's value, for facts that may change between processes."""
        if self.world == 1:
            return value
        flag = torch.tensor(int(value), device=self.device)
        dist.broadcast(flag, 0)
        return bool(flag.item())

    def wait(self) -> None:
        """Wait until all processes have come here."""
        if self.world > 1:
            dist.barrier()


@contextlib.contextmanager
def joined(device: str | None = None) -> Iterator[Processes]:
    """Join the other processes of `torchrun`, if there are any, until the block ends.

    Each of these takes the GPU of its local rank; `device` is otherwise as for `chosen_device`.

    Raises:
        UserError: there is no such device.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = chosen_device(device, local if world > 1 else None)
    if world == 1:
        yield Processes(0, 1, chosen)
        return
    on_gpu = chosen.type == "cuda"
    # A group that is there already belongs to the caller.
    mine = not dist.is_initialized()
    if mine:
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            timeout=LONGEST_WAIT,
            device_id=chosen if on_gpu else None,
        )
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), chosen)
    finally:
        if mine:
            dist.destroy_process_group()


def chosen_device(name: str | None, local_rank: int | None = None) -> torch.device:
    """Return a device by its name, and make a GPU the current one.

    Args:
        name: `cpu`, `cuda` or `cuda:N`; None takes a GPU where there is one.
        local_rank: number of the GPU to take, whatever the name says.

    Raises:
        UserError: it is not here, or no such thing.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"`device` {name} is not known; give cpu, cuda or cuda:N.") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"`device` {name} is not supported; give cpu, cuda or cuda:N.")
    if device.type == "cpu":
        return device
    index = local_rank if local_rank is not None else device.index or 0
    if index >= torch.cuda.device_count():
        raise UserError(
            f"PyTorch sees {counted(torch.cuda.device_count(), 'GPU')} here, no GPU {index}; give "
            "another `device`, start fewer processes, or install PyTorch with CUDA.",
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def placed(network: Network, device: torch.device | str) -> Network:
    """Return a network on a device; on a GPU with its weights in channels-last order."""
    where = torch.device(device)
    if where.type != "cuda":
        return network.to(where)
    return network.to(device=where, memory_format=torch.channels_last)  # type: ignore[call-overload]


def with_common_statistics(model: nn.Module, processes: Processes) -> None:
    """Make batch normalizations use the statistics of all processes' images, in place.

    Parameters and buffers stay the same objects. On GPUs it is what PyTorch's SyncBatchNorm
    computes, without its waits: SyncBatchNorm leaves out processes without images, and for that
    waits, in every layer of every step, until the GPU has counted.
    """
    if processes.world == 1:
        return
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, taking_over(child, CommonBatchNorm))


def taking_over(bn: nn.BatchNorm2d, kind: type[nn.BatchNorm2d]) -> nn.BatchNorm2d:
    """Return a normalization of another kind with the parameters and buffers of a given one."""
    other = kind(bn.num_features, bn.eps, bn.momentum)
    other.weight, other.bias = bn.weight, bn.bias
    other.running_mean, other.running_var = bn.running_mean, bn.running_var
    other.num_batches_tracked = bn.num_batches_tracked
    other.train(bn.training)
    return other


class CommonBatchNorm(nn.BatchNorm2d):
    """Batch normalization over the images of all processes, each with equally many."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized x (images, channels, rows, columns), in x's dtype."""
        if not self.training:
            return super().forward(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        share = 0.1 if self.momentum is None else self.momentum
        if x.is_cuda:
            return _Normalized.apply(  # type: ignore[no-untyped-call]
                x, self.weight, self.bias, self.running_mean, self.running_var, self.eps, share
            )
        dtype, x = x.dtype, x.float()  # bf16 under autocast
        count = x.numel() // x.shape[1] * dist.get_world_size()
        mean = _sum(x.sum((0, 2, 3))) / count
        centred = x - mean[:, None, None]
        variance = _sum(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, share)
            self.running_var.lerp_(variance * (count / max(count - 1, 1)), share)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(dtype)


def _sum(value: Tensor) -> Tensor:
    """Return the sum over all processes; gradients pass."""
    return all_reduce(value)  # type: ignore[no-untyped-call]


class _Normalized(torch.autograd.Function):
    """`CommonBatchNorm` on GPUs."""

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
        return torch.batch_norm_elemt(x, weight, bias, mean, inverse, eps)

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
