"""A training's first steps, in one process or as one of several, and what they came to."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trt_yolov6.checkpoints.loading import load_checkpoint
from trt_yolov6.training.detection_task import arithmetic, detection_task
from trt_yolov6.training.distributed import Processes, joined
from trt_yolov6.training.loop import train_epochs
from trt_yolov6.training.recipe import TrainSettings, recipe_for, with_field
from trt_yolov6.training.state import Progress

CHANGES = (
    "batch=8",
    "losses.warmup_epochs=1",  # both assigners
    "augmentation.mixup=0.5",  # as for M and L
    "precision=fp32",
    "val_split=none",
)


def settings_of(data: Path, weights: Path, changes: Sequence[str] = CHANGES) -> TrainSettings:
    """Return the settings of three epochs of two steps each of the tiny network."""
    settings = recipe_for(
        "yolov6-custom", str(data), weights=load_checkpoint(weights), epochs=3, image_size=96
    )
    for change in changes:
        settings = with_field(settings, change)
    return settings


def first_steps(settings: TrainSettings, device: str) -> dict[str, Any]:
    """Train to the end; return what each step of the optimizer got and what came of it.

    Returns:
        `gradients`: a list of vectors, float32 on the CPU, of all parameters together;
        `weights`, `average`, `statistics`: vectors of the weights, of their moving average and of
        the running means and variances at the end; `losses`: a list, by epoch, over all processes;
        `longest_wait`: see `_longest_wait`.
    """
    gradients: list[Tensor] = []
    torch.backends.cudnn.allow_tf32 = False
    with (
        tempfile.TemporaryDirectory() as folder,
        joined(device) as processes,
        arithmetic(settings, processes.device),
    ):
        detector = detection_task(settings, Path(folder), processes, progress=False)
        task, model = detector.task, detector.task.learner.model

        def keep(*_: object) -> None:
            gradients.append(_vector(p.grad for p in model.parameters() if p.grad is not None))

        task.learner.optimizer.register_step_pre_hook(keep)
        done = Progress()
        train_epochs(
            task,
            done,
            state_file=None,
            state_seconds=1e9,
            finish_epoch=lambda *_: False,
            progress=False,
        )
        return {
            "gradients": gradients,
            "weights": _vector(model.parameters()),
            "average": _vector(detector.average.model.parameters()),
            "statistics": _vector(b for b in model.buffers() if b.is_floating_point()),
            "losses": [line["loss"] for line in done.log],
            "longest_wait": _longest_wait(processes),
        }


def _longest_wait(processes: Processes) -> float:
    """Return for how many seconds a process waits for the others; 0 for one that is alone."""
    if processes.world == 1:
        return 0.0
    group: Any = dist.group.WORLD
    return float(group._get_backend(processes.device).options._timeout.total_seconds())


def _vector(tensors: Any) -> Tensor:
    return torch.cat([one.detach().flatten().float().cpu() for one in tensors])


def main() -> None:
    """Be one of several processes: DATA WEIGHTS DEVICE OUTPUT."""
    data, weights, device, output = sys.argv[1:]
    torch.set_num_threads(1)
    found = first_steps(settings_of(Path(data), Path(weights)), device)
    if found["losses"]:  # the log is the first process's
        torch.save(found, output)
