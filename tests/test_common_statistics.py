"""Batch statistics that all processes share: with one process, those of PyTorch's normalization."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn

from trt_yolov6.training.distributed import Processes, placed, with_common_statistics

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.02}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_gpu)])
def alone(request: pytest.FixtureRequest) -> Iterator[Processes]:
    """A group of one process, told that there are two, so that it shares its statistics."""
    device = torch.device(request.param)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, f"tcp://127.0.0.1:{port}", world_size=1, rank=0)
    yield Processes(0, 2, device)
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_shared_statistics_of_one_process_are_its_own(alone: Processes, dtype: torch.dtype) -> None:
    own, shared = (placed(nn.Sequential(nn.BatchNorm2d(6)), alone.device) for _ in range(2))
    with_common_statistics(shared, alone)
    assert type(shared[0]) is not nn.BatchNorm2d
    torch.manual_seed(0)
    images = (3 * torch.randn(4, 6, 8, 8) + 1).to(alone.device, dtype)
    grad = torch.randn(4, 6, 8, 8).to(alone.device)
    found = []
    for network, kind in ((own, torch.float32), (shared, dtype)):
        given = images.to(kind, copy=True).requires_grad_()
        values = network(given)
        assert values.dtype == kind
        values.backward(grad.to(kind))
        assert given.grad is not None
        bn = network[0]
        found.append([values, given.grad, bn.weight.grad, bn.bias.grad, bn.running_mean])
        found[-1].append(bn.running_var)
    limit = TOLERANCE[dtype]
    for one, other in zip(*found, strict=True):
        largest = one.abs().max().clamp(min=1)
        torch.testing.assert_close(other.float() / largest, one / largest, rtol=limit, atol=limit)
