"""The exponential moving average of the weights, which is what gets evaluated and deployed."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from trt_yolov6.models.network import YOLOv6

DECAY = 0.9999
RAMP = 2000
"""Steps of the optimizer after which the decay has come to 63 % of `DECAY`."""
WINDOW = 0.07
"""Length of the average, 1 / (1 - decay), over the length of the training: what `DECAY` is to the
authors' 300 epochs of COCO at batch 256. Shorter trainings keep this share."""


class WeightAverage:
    """A copy of a network whose weights and batch statistics trail those of the one in training."""

    def __init__(self, model: YOLOv6, decay: float, ramp: float) -> None:
        """Start from the weights as they are.

        Args:
            model: the network in training; its tensors are read at every `update`.
            decay: share of the average that a step keeps, in 0..1, once ramped up.
            ramp: steps of the optimizer over which the decay rises.
        """
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.ramp = ramp
        self.updates = 0
        sources = floating_state(model)
        averages = floating_state(self.model)
        self._averages = list(averages.values())
        self._sources = [sources[name] for name in averages]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the network: after each step of the optimizer."""
        self.updates += 1
        decay = self.decay * (1 - math.exp(-self.updates / self.ramp))
        torch._foreach_lerp_(self._averages, self._sources, 1 - decay)


def average_for(total_updates: int, decay: float | None = None) -> tuple[float, float]:
    """Return decay and ramp for a training by its number of optimizer steps.

    Without `decay` it is the authors', scaled to the training's length.
    """
    if decay is None:
        decay = min(DECAY, 1 - 1 / max(WINDOW * total_updates, 2.0))
    return decay, min(float(RAMP), 1 / (1 - decay) / 5)


def floating_state(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and floating-point buffers by name."""
    buffers = {name: item for name, item in model.named_buffers() if item.is_floating_point()}
    return {**dict(model.named_parameters()), **buffers}
