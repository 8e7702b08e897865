"""What training minimizes: classification, boxes, their distributions, objectness, distillation.

Paper, Sections 2.3 (losses) and 2.4.2 (self-distillation), and the choices of its Tables 6 to 11.
Everything is computed in float32, under autocast too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from trt_yolov6.models.variants import Architecture
from trt_yolov6.training.targets import Targets

ClassLoss = Literal["varifocal", "focal", "quality_focal", "poly"]
BoxLoss = Literal["siou", "giou", "ciou"]
Assigner = Literal["tal", "atss", "simota"]


@dataclass(frozen=True)
class LossSettings:
    """Which losses, weighed how; every value is a plain name or number, so JSON holds it.

    Raises:
        UserError: an unknown name, or a negative number.
    """

    classification: ClassLoss = "varifocal"
    box: BoxLoss = "giou"
    use_dfl: bool = False
    """Distribution focal loss; needs an architecture with `reg_max`."""
    objectness: bool = False
    """Objectness loss (paper, Table 11); needs the `offset` head, which cannot do without."""
    assigner: Assigner = "tal"
    warmup_assigner: Assigner = "atss"
    warmup_epochs: int = 4
    """`warmup_assigner` labels the epochs before this one, `assigner` the rest."""
    class_weight: float = 1.0
    box_weight: float = 2.5
    dfl_weight: float = 0.5
    objectness_weight: float = 1.0
    poly_epsilon: float = 1.0
    """Weight of the term that poly loss adds to focal loss."""


@dataclass(frozen=True)
class DistillationSettings:
    """Self-distillation (paper, 2.4.2): how the student is held to the teacher.

    Raises:
        UserError: `epochs` or a temperature is not above zero, or a weight is negative.
    """

    epochs: int
    """Length of the training, over which the weight decays."""
    class_weight: float = 1.0
    box_weight: float = 1.0
    class_temperature: float = 1.0
    box_temperature: float = 20.0


@dataclass(frozen=True)
class Losses:
    """The loss of a batch: `total`, float32 (), differentiable, and its parts.

    parts: name → float32 (), detached and already weighed, so that they add up to `total`: `class`
           and `box`; where they are on, `dfl`, `objectness`, `distill_class`, `distill_box`
    foreground: int64 (), anchors of this process's batch that were assigned an object
    """

    total: Tensor
    parts: Mapping[str, Tensor]
    foreground: Tensor


def default_losses(arch: Architecture) -> LossSettings:
    """Return the paper's choice for an architecture (Section 2.3).

    VariFocal loss; SIoU for N and T, GIoU for all others; DFL where the head predicts
    distributions; objectness where the head has it.
    """
    raise NotImplementedError


def distillation_weight(epoch: float, epochs: int) -> float:
    """Return the weight α of distillation, a cosine from 1 at epoch 0 to 0.01 at `epochs`.

    Paper, 2.4.2: α = 1 - 0.99 (1 - cos(π epoch / epochs)) / 2.
    """
    raise NotImplementedError


def detection_loss(
    levels: Sequence[tuple[Tensor, ...]],
    arch: Architecture,
    targets: Targets,
    settings: LossSettings,
    *,
    image_size: int | tuple[int, int],
    epoch: float = 0,
    teacher_levels: Sequence[tuple[Tensor, ...]] | None = None,
    distillation: DistillationSettings | None = None,
    reduce_mean: Callable[[Tensor], Tensor] | None = None,
) -> Losses:
    """Return the loss of a batch.

    Args:
        levels: as `YOLOv6.raw` returns them, of any float dtype: a stride, class logits (batch,
            classes, h, w), regression (batch, 4 * (reg_max + 1), h, w) and, with the `offset`
            head, objectness logits (batch, 1, h, w).
        arch: the network they come from.
        targets: the batch's objects, on the same device.
        settings: which losses.
        image_size: height and width of the input in pixels (or both in one number); checked
            against `levels`.
        epoch: from 0; says which assigner is at work and how far distillation has decayed.
        teacher_levels: the teacher's output for the same images, of the same shapes; with
            `distillation`.
        distillation: how to hold the student to the teacher; with `teacher_levels`.
        reduce_mean: gives the mean over all processes of a float32 () tensor. Losses are sums
            divided by what this returns; so, as DistributedDataParallel averages gradients, they
            are those of one process with all the images. None: one process.

    Raises:
        UserError: the settings ask for what the head does not have.
        ValueError: `levels` do not fit `image_size`, or just one of `teacher_levels` and
            `distillation` is given.
    """
    raise NotImplementedError
