"""Training with CUDA graphs: where it is done, and that it changes nothing."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from support.first_steps import settings_of
from support.training_data import write_shapes, write_tiny
from torch import Tensor, nn

from trt_yolov6.training.detection_task import detection_task, uses_cuda_graphs
from trt_yolov6.training.distributed import Processes, placed
from trt_yolov6.training.graphed import graphed
from trt_yolov6.training.loop import train_epochs
from trt_yolov6.training.recipe import TrainSettings, recipe_for, with_field
from trt_yolov6.training.state import Progress
from trt_yolov6.training.trainer import train

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize(
    ("change", "device", "autocast", "wanted"),
    [
        ("seed=0", "cuda", torch.bfloat16, True),
        ("seed=0", "cpu", torch.bfloat16, False),
        ("seed=0", "cuda", torch.float16, False),
        ("seed=0", "cuda", None, False),
        ("cuda_graphs=false", "cuda", torch.bfloat16, False),
        ("compile=true", "cuda", torch.bfloat16, False),
        ("deterministic=true", "cuda", torch.bfloat16, False),
    ],
)
def test_graphs_are_for_bf16_on_a_gpu(
    change: str, device: str, autocast: torch.dtype | None, wanted: bool
) -> None:
    settings = with_field(recipe_for("yolov6n", "data"), change)
    assert uses_cuda_graphs(settings, torch.device(device), autocast) is wanted


@pytest.fixture
def settings(tmp_path: Path) -> TrainSettings:
    """Settings for a few steps of the tiny network."""
    return settings_of(write_shapes(tmp_path / "data", images=16), write_tiny(tmp_path / "tiny.pt"))


def test_zeroing_gradients_where_they_lie_changes_no_weight(
    settings: TrainSettings, tmp_path: Path
) -> None:
    """CUDA graphs need the same memory every step, also where gradients are accumulated."""
    settings = with_field(settings, "optimizer.accumulate=2")
    found = []
    for keeps in (False, True):
        task = detection_task(
            settings, tmp_path, Processes(0, 1, torch.device("cpu")), progress=False
        ).task
        train_epochs(
            dataclasses.replace(task, keeps_gradients=keeps),
            Progress(),
            state_file=None,
            state_seconds=1e9,
            finish_epoch=lambda *_: False,
            progress=False,
        )
        gradients = [parameter.grad for parameter in task.learner.model.parameters()]
        assert all((gradient is not None) is keeps for gradient in gradients)
        found.append(task.learner.model.state_dict())
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


def _network() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    layers[1].num_batches_tracked = None  # as in training
    return placed(nn.Sequential(*layers), "cuda")


def _gradients(network: nn.Module, batches: list[Tensor]) -> list[Tensor]:
    """Return the sums of the gradients of batches, and what is tracked in between."""
    for batch in batches:
        images = batch.contiguous(memory_format=torch.channels_last)
        network(images).square().mean().backward()
    found = [parameter.grad for parameter in network.parameters()]
    return [tensor.clone() for tensor in [*found, *network.buffers()] if tensor is not None]


@needs_gpu
def test_a_graphed_network_computes_and_adds_up_what_the_plain_one_does() -> None:
    plain = _network()
    captured = graphed(copy.deepcopy(plain), (4, 3, 32, 32), None)
    batches = [torch.rand(4, 3, 32, 32, device="cuda") for _ in range(3)]
    for one, other in zip(_gradients(plain, batches), _gradients(captured, batches), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-5)


@needs_gpu
def test_a_training_of_graphs_has_the_losses_of_one_without(
    settings: TrainSettings, tmp_path: Path
) -> None:
    """With evaluations in between and at the end."""
    logs = []
    for change in ("cuda_graphs=true", "cuda_graphs=false"):
        own = settings
        for assignment in ("precision=bf16", "val_split=val", "eval_interval=1", change):
            own = with_field(own, assignment)
        logs.append(train(own, tmp_path / change, device="cuda", progress=False).log)
    for one, other in zip(*logs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)
