"""SGD as the authors use it: Nesterov momentum, weight decay on the kernels alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trt_yolov6.common.ranges import Checked, Count, NotNegative, Positive, Share, ShareBelow1
from trt_yolov6.training.rep_optimizer import reparameterize
from trt_yolov6.training.schedule import (
    NOMINAL_BATCH,
    Plan,
    accumulated_steps,
    learning_rate,
    momentum,
)


@dataclass(frozen=True)
class OptimizerSettings(Checked):
    """Values of the optimizer and of its warm-up.

    A learning rate is meant for the mean loss of 32 images; the gradients of larger batches are
    added up, which is the linear scaling rule. The defaults are those that the authors' released
    configurations give for training from scratch.
    """

    learning_rate: Positive = 0.01
    final_share: Share = 0.01
    """Learning rate at the end of the cosine over that at its start."""
    momentum: ShareBelow1 = 0.937
    weight_decay: NotNegative = 5e-4
    """Weight decay for 64 images a step of the optimizer; scaled with their number."""
    warmup_epochs: NotNegative = 3.0
    """At least 1000 steps, and at most a tenth of the training; 0: none."""
    warmup_momentum: ShareBelow1 = 0.8
    warmup_bias_rate: NotNegative = 0.1
    """Learning rate of the biases before the first step, from where it falls."""
    accumulate: Count | None = None
    """Steps whose gradients are added up; None: as many as make 64 images."""
    clip_norm: Positive | None = None
    """Largest norm of the gradient, for 64 images a step of the optimizer; scaled with their
    number. None: whatever it is."""


FINE_TUNING = OptimizerSettings(
    learning_rate=0.0032,
    final_share=0.12,
    momentum=0.843,
    weight_decay=3.6e-4,
    warmup_epochs=2.0,
    warmup_momentum=0.5,
    warmup_bias_rate=0.05,
)
"""The authors' values for training on from a finished checkpoint."""


def default_optimizer(variant: str, *, fine_tuning: bool) -> OptimizerSettings:
    """Return the authors' values: twice the learning rate for N, others for fine-tuning.

    L's gradient is clipped, which theirs is not: where the warm-up is shorter than their 1000
    steps, its norm rises from 0.5 to 150 before the full learning rate is reached, and one training
    in eight did not recover. Those of N and S stay below 6.
    """
    if fine_tuning:
        return FINE_TUNING
    return OptimizerSettings(
        learning_rate=0.02 if variant.startswith("yolov6n") else 0.01,
        clip_norm=10.0 if variant == "yolov6l" else None,
    )


def images_an_update(settings: OptimizerSettings, batch: int) -> int:
    """Return how many images a step of the optimizer sees after the warm-up."""
    return batch * accumulated_steps(batch, settings.accumulate)


def largest_norm(settings: OptimizerSettings, batch: int) -> float | None:
    """Return the norm that gradients are clipped to; None if they are not.

    Gradients of more images are summed, so the norm grows with their number.
    """
    if settings.clip_norm is None:
        return None
    return settings.clip_norm * images_an_update(settings, batch) / NOMINAL_BATCH


def parameter_groups(model: nn.Module) -> list[list[nn.Parameter]]:
    """Sort the parameters into weights of normalizations, shortcuts and branches, kernels, biases.

    Only kernels (of convolutions, transposed ones too) decay.
    """
    scales: list[nn.Parameter] = []
    kernels: list[nn.Parameter] = []
    biases: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            biases.append(parameter)
        elif parameter.ndim > 1:
            kernels.append(parameter)
        else:
            scales.append(parameter)
    return [scales, kernels, biases]


def make_optimizer(
    model: nn.Module,
    settings: OptimizerSettings,
    batch: int,
    *,
    fused: bool,
    multipliers: Mapping[str, Tensor] | None = None,
) -> torch.optim.SGD:
    """Return the optimizer of a network, with the three groups of `parameter_groups`.

    Args:
        batch: images a step, of all processes together.
        fused: one kernel for all parameters, on a GPU.
        multipliers: of gradients, by parameter name: RepOptimizer's.
    """
    decay = settings.weight_decay * images_an_update(settings, batch) / NOMINAL_BATCH
    groups = zip(parameter_groups(model), (0.0, decay, 0.0), strict=True)
    optimizer = torch.optim.SGD(
        [{"params": group, "weight_decay": share} for group, share in groups],
        lr=settings.learning_rate,
        momentum=settings.momentum,
        nesterov=settings.momentum > 0,
        fused=fused,
    )
    if multipliers:
        parameters = dict(model.named_parameters())
        reparameterize(optimizer, {parameters[name]: m for name, m in multipliers.items()})
    return optimizer


def set_rates(
    optimizer: torch.optim.SGD, settings: OptimizerSettings, plan: Plan, step: int
) -> None:
    """Give the optimizer learning rates and momentum of a step."""
    peak, final = settings.learning_rate, settings.final_share
    rate = learning_rate(plan, step, start=0.0, peak=peak, final=final)
    bias_rate = learning_rate(plan, step, start=settings.warmup_bias_rate, peak=peak, final=final)
    current = momentum(plan, step, start=settings.warmup_momentum, final=settings.momentum)
    for index, group in enumerate(optimizer.param_groups):
        group["lr"] = bias_rate if index == 2 else rate
        group["momentum"] = current
