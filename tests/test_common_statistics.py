"""Batch statistics of several processes' images on GPUs; on CPUs, `test_trainer` has them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from trt_yolov6.training.distributed import GpuBatchNorm

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A group of one process."""
    file = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("nccl", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_of_one_process_they_are_ordinary_ones(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    values = (3 * torch.randn(8, 24, 10, 10, device="cuda") + 1).to(memory_format=layout)
    gradient = torch.randn_like(values)
    found = [_passed(kind(24, 1e-3, 0.03), values, gradient) for kind in _KINDS]
    for own, ordinary in zip(*found, strict=True):
        torch.testing.assert_close(own, ordinary, rtol=1e-4, atol=1e-4)


_KINDS: tuple[type[nn.BatchNorm2d], ...] = (GpuBatchNorm, nn.BatchNorm2d)


def _passed(layer: nn.BatchNorm2d, values: Tensor, gradient: Tensor) -> list[Tensor]:
    """Return the output, all gradients and the running statistics."""
    layer = layer.cuda()
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(0.5, 2, len(layer.weight)))
        layer.bias.copy_(torch.linspace(-1, 1, len(layer.weight)))
    own = values.clone(memory_format=torch.preserve_format).requires_grad_()
    out = layer(own)
    out.backward(gradient)
    assert own.grad is not None
    assert layer.weight.grad is not None
    assert layer.bias.grad is not None
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return [
        out.detach(),
        own.grad,
        layer.weight.grad,
        layer.bias.grad,
        layer.running_mean,
        layer.running_var,
    ]
