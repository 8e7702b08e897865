"""Everything that changes from step to step: learning rates, momentum, accumulation, order, seeds.

All of it is a function of the settings and of the step's number, so a resumed run needs no more
than that number to go on as if nothing had happened.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

NOMINAL_BATCH = 64
"""Smaller batches are accumulated to this many images before a step of the optimizer."""
LOSS_BATCH = 32
"""Images whose mean loss the learning rate is meant for; gradients of more are summed."""


@dataclass(frozen=True)
class Plan:
    """Number of steps of a training, and which of them end in an optimizer step."""

    images: int
    """Images of the training split."""
    batch: int
    """Images a step, of all processes together."""
    epochs: int
    steps_per_epoch: int
    warmup_steps: int
    updates: tuple[bool, ...]
    """True for each step of the training after which the optimizer steps. The last step of an
    epoch always does, so that no gradient is carried from one epoch to the next."""

    @property
    def total_steps(self) -> int:
        """Steps in all."""
        return self.epochs * self.steps_per_epoch

    @property
    def total_updates(self) -> int:
        """Steps of the optimizer in all."""
        return sum(self.updates)


def make_plan(
    images: int, *, batch: int, epochs: int, warmup_epochs: float, accumulate: int | None = None
) -> Plan:
    """Lay out a training.

    An epoch has `images / batch` steps, rounded: every batch is full, and what an epoch leaves out
    or shows twice is another image every time. The warm-up lasts `warmup_epochs`, or 1000 steps if
    that is longer (as the authors have it), but no more than a tenth of the training.

    Args:
        images, batch, epochs: see `Plan`.
        warmup_epochs: length of the warm-up; 0 for none.
        accumulate: steps whose gradients are added up before the optimizer steps; None for as many
            as make `NOMINAL_BATCH` images. It grows from 1 to that during the warm-up.
    """
    steps = max(1, round(images / batch))
    total = steps * epochs
    warmup = 0
    if warmup_epochs > 0:
        warmup = min(max(round(warmup_epochs * steps), 1000), round(total / 10))
    most = accumulated_steps(batch, accumulate)
    updates = []
    gathered = 0
    for step in range(total):
        gathered += 1
        needed = round(1 + (most - 1) * _progress(step, warmup))
        done = gathered >= needed or (step + 1) % steps == 0
        updates.append(done)
        gathered = 0 if done else gathered
    return Plan(images, batch, epochs, steps, warmup, tuple(updates))


def accumulated_steps(batch: int, accumulate: int | None) -> int:
    """Return the steps whose gradients are added up after the warm-up, see `make_plan`."""
    return accumulate or max(1, round(NOMINAL_BATCH / batch))


def cosine(progress: float, final: float) -> float:
    """Return the factor of a cosine schedule: 1 at progress 0, `final` at progress 1."""
    return final + (1 - final) * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2


def learning_rate(plan: Plan, step: int, *, start: float, peak: float, final: float) -> float:
    """Return the learning rate of a step, from 0: a cosine from `peak` to `final` times that.

    While warming up it is approached in a line from `start`, which is 0 except for biases.
    """
    target = peak * cosine(step / plan.total_steps, final)
    share = _progress(step, plan.warmup_steps)
    return start + (target - start) * share


def momentum(plan: Plan, step: int, *, start: float, final: float) -> float:
    """Return the momentum of a step, which rises in a line while warming up."""
    return start + (final - start) * _progress(step, plan.warmup_steps)


def _progress(step: int, warmup: int) -> float:
    return min(1.0, step / warmup) if warmup else 1.0


def epoch_order(plan: Plan, epoch: int, seed: int) -> torch.Tensor:
    """Return the images of an epoch in order: int64 (steps_per_epoch * batch,), the same anywhere.

    One permutation; where an epoch needs more images than there are, the next follows it.
    """
    generator = torch.Generator().manual_seed(derived_seed(seed, "order", epoch))
    needed = plan.steps_per_epoch * plan.batch
    rounds = math.ceil(needed / plan.images)
    orders = [torch.randperm(plan.images, generator=generator) for _ in range(rounds)]
    return torch.cat(orders)[:needed]


def derived_seed(seed: int, *parts: str | int) -> int:
    """Return a seed for one purpose, step and process: unrelated to those of any other."""
    text = ":".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def is_last_phase(epoch: int, epochs: int, last: int) -> bool:
    """Return True in the last epochs, which see no Mosaic and no Mixup (paper, Section 2.4.3)."""
    return epoch >= epochs - last


def evaluation_epochs(epochs: int, interval: int, last: int) -> Sequence[int]:
    """Return the epochs (from 0) after which the model is evaluated.

    Every `interval` epochs; in the `last` epochs, where the accuracy rises fastest, four times as
    often; and after the very last.
    """
    often = max(1, interval // 4)
    return [
        epoch
        for epoch in range(epochs)
        if epoch == epochs - 1
        or (interval > 0 and (epoch + 1) % (often if epoch >= epochs - last else interval) == 0)
    ]
