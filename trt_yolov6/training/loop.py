"""The one loop of `train` and `qat`: steps, states and a line an epoch. A `Task` is what it trains.

schedule -> order, rates        dataset -> batches        state -> resuming
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trt_yolov6.common.progress import is_logged, progress_bar
from trt_yolov6.common.text import counted
from trt_yolov6.errors import UserError
from trt_yolov6.training.augmentation import AugmentationSettings
from trt_yolov6.training.dataset import TrainingSet
from trt_yolov6.training.distributed import Processes
from trt_yolov6.training.ema import floating_state
from trt_yolov6.training.schedule import Plan, derived_seed, epoch_order, is_last_phase
from trt_yolov6.training.state import Learner, Progress, save_state
from trt_yolov6.training.targets import Targets

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepLosses:
    """Losses of a batch."""

    total: Tensor
    """float32 (), minimized; with gradients."""
    parts: Tensor
    """float32 (parts,), logged: the total first. Without gradients, on the device."""


@dataclass(frozen=True)
class Task:
    """A network, its data and its losses: the constant parts of a training."""

    name: str
    """Title of the progress bar and the log: `train`, `search` or `qat`."""
    subject: str
    """The network's name."""
    identity: Mapping[str, Any] | Sequence[Any]
    """Settings that decide the result, ready for `json.dumps`; written into the state."""
    seed: int
    plan: Plan
    plain_epochs: int
    """Last epochs, without Mosaic and Mixup."""
    data: TrainingSet
    augmentation: AugmentationSettings
    processes: Processes
    network: nn.Module
    """Module that `losses` calls with the images; DistributedDataParallel in several processes."""
    learner: Learner
    losses: Callable[[Tensor, Targets, float], StepLosses]
    """Returns the losses of images, their targets and the fractional epoch, from 0."""
    set_rates: Callable[[int], None]
    """Sets the optimizer's learning rates for a step, from 0."""
    line: Callable[[int, Sequence[float], float], dict[str, Any]]
    """Returns the log's line for an epoch (from 1), the mean of each loss, and seconds."""
    loss_factor: float = 1.0
    """Factor on the loss before the backward pass."""
    clip_norm: float | None = None
    """Largest norm of the gradient; None: no clipping."""
    keeps_gradients: bool = False
    """Zero gradients in place, as `graphed` requires."""


def train_epochs(
    task: Task,
    done: Progress,
    *,
    state_file: Path | None,
    state_seconds: float,
    finish_epoch: Callable[[int, dict[str, Any]], bool],
    progress: bool,
) -> None:
    """Do the steps from `done.step` to the last.

    Args:
        task: the training.
        done: its progress; changed in place.
        state_file: where the state is written; None: nowhere.
        state_seconds: least time between two writings of the state, after a step of the optimizer.
        finish_epoch: called in the first process with the epoch, from 0, and its line, to which it
            may add; returns True if the state is to be written now, however recent the last one.
        progress: show a bar on a terminal's stderr; off one, log a header and a line an epoch.

    Raises:
        UserError: loss or weights are not finite, or a file cannot be written.
    """
    plan = task.plan
    first_epoch = done.step // plan.steps_per_epoch
    saved_at = time.monotonic()

    def save(*, now: bool = False) -> None:
        """Write the state, in the first process, if it is time, or `now`."""
        nonlocal saved_at
        if state_file is None or not task.processes.is_first:
            return
        if now or time.monotonic() - saved_at >= state_seconds:
            save_state(state_file, task.learner, done, task.identity)
            saved_at = time.monotonic()

    logged = is_logged(progress)  # with a line an epoch, instead of one a minute
    shown = progress and not logged
    with progress_bar(
        plan.total_steps, shown=shown, initial=done.step, desc=task.name, unit="step"
    ) as bar:
        if logged:
            _log.info(_header(task, first_epoch))
        for epoch in range(first_epoch, plan.epochs):
            _train_epoch(task, done, epoch, bar, save)
            line = _line(task, done, epoch)
            if task.processes.is_first:
                due = finish_epoch(epoch, line)
                done.log.append(line)
                save(now=due)
                bar.set_postfix_str(_postfix(line, done))
                if logged:
                    _log.info("%s, of %s", _postfix(line, done), counted(plan.epochs, "epoch"))
            task.processes.wait()


def _train_epoch(
    task: Task, done: Progress, epoch: int, bar: Any, save: Callable[[], None]
) -> None:
    """Do the epoch's remaining steps, without waiting for the device between them."""
    plan, learner = task.plan, task.learner
    order = epoch_order(plan, epoch, task.seed)
    strong = not is_last_phase(epoch, plan.epochs, task.plain_epochs)
    generator = torch.Generator()
    begun = epoch * plan.steps_per_epoch
    clock = time.perf_counter()
    spent = done.epoch_seconds
    if done.step == begun:
        learner.sums.zero_()
        spent = 0.0
    for step in range(done.step, begun + plan.steps_per_epoch):
        task.set_rates(step)
        generator.manual_seed(derived_seed(task.seed, "batch", step))
        first = (step - begun) * plan.batch
        images, targets = task.data.batch(
            order[first : first + plan.batch],
            task.augmentation,
            generator,
            strong=strong,
            share=(task.processes.rank, task.processes.world),
        )
        update = plan.updates[step]
        epoch_now = step / plan.steps_per_epoch
        learner.sums.add_(_backward(task, images, targets, epoch_now, update=update))
        if update:
            _update(task)
        bar.update()
        done.step = step + 1
        if update and step + 1 < begun + plan.steps_per_epoch:
            done.epoch_seconds = spent + time.perf_counter() - clock
            save()
    if learner.sums.is_cuda:
        torch.cuda.synchronize(learner.sums.device)
    done.epoch_seconds = spent + time.perf_counter() - clock


def _backward(
    task: Task, images: Tensor, targets: Targets, epoch: float, *, update: bool
) -> Tensor:
    """Accumulate the gradients of a batch; return the losses to log."""
    if task.processes.device.type == "cuda":
        images = images.contiguous(memory_format=torch.channels_last)
    # Gradients are exchanged once, before the optimizer's step.
    alone: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if isinstance(task.network, DistributedDataParallel) and not update:
        alone = task.network.no_sync()
    with alone:
        losses = task.losses(images, targets, epoch)
        scaled = task.learner.scaler.scale(losses.total * task.loss_factor)
        scaled.backward()  # type: ignore[no-untyped-call]
    return losses.parts


def _update(task: Task) -> None:
    """Step the optimizer with the gradients that are there, and the average after it."""
    learner = task.learner
    if task.clip_norm is not None:
        learner.scaler.unscale_(learner.optimizer)
        nn.utils.clip_grad_norm_(learner.model.parameters(), task.clip_norm)
    learner.scaler.step(learner.optimizer)
    learner.scaler.update()
    learner.optimizer.zero_grad(set_to_none=not task.keeps_gradients)
    if learner.average is not None:
        learner.average.update()


def _line(task: Task, done: Progress, epoch: int) -> dict[str, Any]:
    """Return the log's line of an epoch; raise UserError if loss or weights are not finite."""
    weights = floating_state(task.learner.model).values()
    # No loss has seen the last update yet.
    finite = torch.stack([item.isfinite().all() for item in weights]).all()
    sums = task.processes.mean(torch.cat([task.learner.sums, finite.to(task.learner.sums)[None]]))
    means = (sums[:-1] / task.plan.steps_per_epoch).tolist()
    if not math.isfinite(means[0]) or sums[-1] < 1:
        raise UserError(
            f"loss or weights are not finite numbers after epoch {epoch + 1}: training diverged; "
            "lower `learning_rate`, or start from other `weights`.",
        )
    return task.line(epoch + 1, means, done.epoch_seconds)


def _header(task: Task, begun: int) -> str:
    plan = task.plan
    after = f", {begun} of them done" if begun else ""
    return (
        f"{task.name}: {task.subject} on {counted(len(task.data), 'image')} at "
        f"{task.data.image_size} pixels, {counted(plan.epochs, 'epoch')}{after} of "
        f"{counted(plan.steps_per_epoch, 'step')}, batch {plan.batch}, on "
        f"{task.processes.device}; a line an epoch"
    )


def _postfix(line: Mapping[str, Any], done: Progress) -> str:
    text = f"epoch {line['epoch']}, loss {line['loss']:.3f}, {line['seconds']:.2f} s/epoch"
    return text if done.best_ap is None else f"{text}, best AP {done.best_ap:.4f}"
