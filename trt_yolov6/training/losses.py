"""Training losses: classification, boxes, their distributions, objectness, distillation.

Paper, Sections 2.3 (losses) and 2.4.2 (self-distillation), and the choices of its Tables 6 to 11.
Everything is computed in float32, under autocast too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from msgspec import Meta
from torch import Tensor
from torch.nn import functional as F

from trt_yolov6.common.ranges import Checked, Count, NotNegative, Positive
from trt_yolov6.detectors.box_similarity import similarity
from trt_yolov6.errors import UserError
from trt_yolov6.models.decode import anchor_points, decode, joined
from trt_yolov6.models.variants import Architecture
from trt_yolov6.training.assigners import Assignment, atss, simota, task_aligned
from trt_yolov6.training.schedule import cosine
from trt_yolov6.training.targets import Targets

ClassLoss = Literal["varifocal", "focal", "quality_focal", "poly"]
BoxLoss = Literal["siou", "giou", "ciou"]
Assigner = Literal["tal", "atss", "simota"]

LEAST_AN_IMAGE = 0.25
"""Least that losses are divided by, for every image of the batch: less than one object found
halfway. Without it, batches of few objects or none would blow up."""


@dataclass(frozen=True)
class LossSettings(Checked):
    """Which losses, weighed how; every value is a plain name or number, so JSON holds it.

    Raises:
        UserError: an unknown name, or a negative weight or number of epochs.
    """

    classification: ClassLoss = "varifocal"
    box: BoxLoss = "giou"
    use_dfl: bool = False
    """Distribution focal loss; needs an architecture with `reg_max`."""
    objectness: bool = False
    """Objectness loss (paper, Table 11); needs the `offset` head, which cannot do without."""
    assigner: Assigner = "tal"
    warmup_assigner: Assigner = "atss"
    warmup_epochs: Annotated[int, Meta(ge=0)] = 4
    """`warmup_assigner` labels the epochs before this one, `assigner` the rest."""
    class_weight: NotNegative = 1.0
    box_weight: NotNegative = 2.5
    dfl_weight: NotNegative = 0.5
    objectness_weight: NotNegative = 1.0
    poly_epsilon: Annotated[float, Meta(gt=-1, le=sys.float_info.max)] = 1.0
    """Weight of the term that poly loss adds to focal loss."""


@dataclass(frozen=True)
class DistillationSettings(Checked):
    """Self-distillation (paper, 2.4.2): how the student is held to the teacher.

    The classes are independent sigmoids, so theirs is the Kullback-Leibler divergence of each
    class's own yes or no: it counts with one class too, and as much as `distilled_share` says. Box
    distributions are compared where there is an object.

    Raises:
        UserError: `epochs` or a temperature is not above zero, or a weight is negative.
    """

    epochs: Count | None = None
    """Epochs over which the weight decays; None: all of the training."""
    class_weight: NotNegative = 1.0
    """Beside `LossSettings.class_weight`, by which it is multiplied."""
    box_weight: NotNegative = 1.0
    """Beside `LossSettings.dfl_weight`, by which it is multiplied."""
    class_temperature: Positive = 1.0
    """Divides the class logits."""
    box_temperature: Positive = 20.0
    """Divides the logits of the distance bins (20: the authors' released value)."""


@dataclass(frozen=True)
class Losses:
    """The loss of a batch and its parts."""

    total: Tensor
    """float32 (), differentiable."""
    parts: Mapping[str, Tensor]
    """By name, float32 (), detached and already weighed, so that they add up to `total`: `class`
    and `box`; where they are on, `dfl`, `objectness`, `distill_class`, `distill_box`."""


def default_losses(arch: Architecture) -> LossSettings:
    """Return the paper's choice for an architecture (Section 2.3).

    VariFocal loss; SIoU for N and T, GIoU for all others; DFL where the head predicts
    distributions; objectness where the head has it.
    """
    # By name, so that an N with another activation, for example, still counts as N.
    is_small = arch.name.startswith(("yolov6n", "yolov6t"))
    return LossSettings(
        box="siou" if is_small else "giou",
        use_dfl=arch.reg_max > 0,
        objectness=arch.head == "offset",
    )


def distillation_weight(epoch: float, epochs: int) -> float:
    """Return the weight α of distillation, a cosine from 1 at epoch 0 to 0.01 at `epochs`.

    Paper, 2.4.2: α = 1 - 0.99 (1 - cos(π epoch / epochs)) / 2. It stays at 0.01 after the end.
    """
    return cosine(epoch / epochs, 0.01)


def detection_loss(
    levels: Sequence[tuple[Tensor, ...]],
    arch: Architecture,
    targets: Targets,
    settings: LossSettings,
    *,
    epoch: float = 0,
    teacher_levels: Sequence[tuple[Tensor, ...]] | None = None,
    distillation: DistillationSettings | None = None,
    reduce_mean: Callable[[Tensor], Tensor] | None = None,
) -> Losses:
    """Return the loss of a batch.

    Every part is a sum over the batch divided by the sum of the soft targets (objectness: by the
    number of foreground anchors), but at least by `LEAST_AN_IMAGE` per image.

    Args:
        levels: as `YOLOv6.raw` returns them, of any float dtype: a stride, class logits (batch,
            classes, h, w), regression (batch, 4 * (reg_max + 1), h, w) and, with the `offset`
            head, objectness logits (batch, 1, h, w).
        arch: the network they come from.
        targets: the batch's objects, on the same device.
        settings: which losses, see `check_losses`.
        epoch: from 0; decides the assigner and the decay of distillation.
        teacher_levels: the teacher's output for the same images, of the same shapes.
        distillation: how to hold the student to the teacher, if there is one, with the number of
            epochs. Classes always, boxes where the head predicts distributions.
        reduce_mean: gives the elementwise mean over all processes of a float32 (3,) tensor;
            called once. Losses are sums divided by what it returns; so, as DistributedDataParallel
            averages gradients, they are those of one process with all the images. None: one
            process.
    """
    with torch.autocast(levels[0][0].device.type, enabled=False):
        levels = [tuple(_wide(part) for part in level) for level in levels]
        logits = joined([level[0] for level in levels]).transpose(1, 2)
        regression = joined([level[1] for level in levels])
        boxes, scores = decode(levels, arch)
        boxes = boxes.transpose(1, 2)
        sizes = [(level[0].shape[2], level[0].shape[3]) for level in levels]
        points, strides = anchor_points(sizes, 0.5, regression, arch.strides)
        labels = assigned(
            scores.detach().transpose(1, 2),
            boxes.detach(),
            (points * strides).T,
            strides[0],
            [height * width for height, width in sizes],
            targets,
            arch,
            settings.warmup_assigner if epoch < settings.warmup_epochs else settings.assigner,
        )
        weight = labels.scores.sum(-1)
        normalizer, found = _normalizers(weight, labels.foreground, reduce_mean)

        sums: dict[str, Tensor] = {}
        by_class = settings.class_weight / normalizer
        by_dfl = settings.dfl_weight / normalizer
        sums["class"] = by_class * _class_loss(logits, labels, settings).sum()
        off = 1 - similarity(boxes, labels.boxes, settings.box)
        sums["box"] = settings.box_weight / normalizer * (off * weight).sum()
        if settings.use_dfl:
            distances = _distances(labels.boxes.transpose(1, 2), points, strides)
            each = distribution_focal_loss(regression, distances, arch.reg_max).mean(1)
            sums["dfl"] = by_dfl * (each * weight).sum()
        if settings.objectness:
            objectness = joined([level[2] for level in levels]).squeeze(1)
            each = _cross_entropy(objectness, labels.foreground.to(objectness.dtype))
            sums["objectness"] = settings.objectness_weight / found * each.sum()
        if teacher_levels is not None and distillation is not None:
            assert distillation.epochs is not None
            decay = distillation_weight(epoch, distillation.epochs)
            guide = joined([_wide(level[0].detach()) for level in teacher_levels]).transpose(1, 2)
            each = class_divergence(logits, guide, distillation.class_temperature)
            each = each * distilled_share(logits, guide)
            sums["distill_class"] = decay * distillation.class_weight * by_class * each.sum()
            if arch.reg_max:
                guide = joined([_wide(level[1].detach()) for level in teacher_levels])
                temperature = distillation.box_temperature
                each = box_divergence(regression, guide, arch.reg_max, temperature).mean(1)
                each = (each * weight).sum()
                sums["distill_box"] = decay * distillation.box_weight * by_dfl * each
        total = torch.stack(list(sums.values())).sum()
    return Losses(total, {name: value.detach() for name, value in sums.items()})


def check_losses(settings: LossSettings, arch: Architecture) -> None:
    """Check that a network has the outputs that the losses need.

    Raises:
        UserError: DFL without distance distributions, objectness without an objectness output, or
            an objectness output without its loss.
    """
    if settings.use_dfl and not (arch.reg_max and arch.head == "distance"):
        raise UserError(
            "distribution focal loss needs a head that predicts distributions of distances; "
            f"{arch.name} predicts boxes directly (reg_max is {arch.reg_max}); give "
            "`losses.use_dfl` false, or train from random weights with `dfl`."
        )
    if settings.objectness and arch.head != "offset":
        raise UserError(
            "an objectness loss needs a head with an objectness output; "
            f"{arch.name} has the {arch.head!r} head, only the 'offset' head has one; give "
            "`losses.objectness` false, or train from random weights with `objectness`."
        )
    if arch.head == "offset" and not settings.objectness:
        raise UserError(
            "the 'offset' head multiplies its objectness into every score, so it cannot be "
            "trained without the objectness loss; give `losses.objectness` true."
        )


def varifocal_loss(logits: Tensor, targets: Tensor, positive: Tensor) -> Tensor:
    """Return VariFocal loss (Zhang et al., 2021), elementwise.

    With p the sigmoid of the logit and q the target, the quality of a positive in 0..1: q BCE(p, q)
    where positive, else -0.75 p² log(1 - p).
    """
    negative = 0.75 * torch.sigmoid(logits).pow(2.0) * F.softplus(logits)
    return torch.where(positive, targets * _cross_entropy(logits, targets), negative)


def poly_loss(logits: Tensor, positive: Tensor, *, epsilon: float) -> Tensor:
    """Return poly-1 focal loss (Leng et al., 2022), elementwise.

    Focal loss (Lin et al., 2017), -α (1 - p)² log p, plus α ε (1 - p)³: the first term of its
    expansion with additional weight ε. p is the probability of the true outcome; α is 0.25 for
    positives, 0.75 for negatives.
    """
    wrong = torch.where(positive, -logits, logits)
    missing = torch.sigmoid(wrong)
    weight = torch.where(positive, 0.25, 0.75)
    return weight * missing.pow(2.0) * (F.softplus(wrong) + epsilon * missing)


def quality_focal_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return quality focal loss (Li et al., 2020), elementwise: |q - p|² BCE(p, q).

    The targets q are in 0..1: the quality of positives, 0 for negatives.
    """
    difference = (targets - torch.sigmoid(logits)).abs()
    return difference.pow(2.0) * _cross_entropy(logits, targets)


def distribution_focal_loss(regression: Tensor, distances: Tensor, reg_max: int) -> Tensor:
    """Return distribution focal loss (Li et al., 2020; the paper's M and L).

    The cross-entropy of the predicted distribution with the one that puts all its mass on the two
    bins around the distance, such that its mean is the distance.

    Args:
        regression: float (batch, 4 * (reg_max + 1), anchors), logits of the bins, those of one
            side together.
        distances: float (batch, 4, anchors), left, top, right, bottom in strides; clipped to
            0..reg_max.
        reg_max: largest bin.

    Returns:
        float (batch, 4, anchors).
    """
    logarithms = _bins(regression, reg_max).log_softmax(2)
    bins = torch.arange(reg_max + 1, dtype=distances.dtype, device=distances.device)
    apart = (distances.clamp(0, reg_max).unsqueeze(2) - bins.view(1, 1, -1, 1)).abs()
    return -((1 - apart).clamp(min=0) * logarithms).sum(2)


def class_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return the divergence of the teacher's from the student's classes, elementwise.

    T² KL(p_t || p_s) of two Bernoulli distributions, p the sigmoid of logit / T. The factor keeps
    the size of gradients as T changes (Hinton et al., 2015).
    """
    own, guide = student / temperature, teacher / temperature
    truth = torch.sigmoid(guide)
    return temperature**2 * (_cross_entropy(own, truth) - _cross_entropy(guide, truth))


def distilled_share(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the weight of each class's divergence, as VariFocal loss weights labels.

    max(p_t, 0.75 p_s²): where there is an object its quality according to the teacher, elsewhere
    the student's error. With equal weights, gradients of the many background anchors were 6 to 25
    times as large as those of the labels, and trainings of L ended far below their teacher or
    diverged.
    """
    return torch.maximum(torch.sigmoid(teacher), 0.75 * torch.sigmoid(student).square())


def box_divergence(student: Tensor, teacher: Tensor, reg_max: int, temperature: float) -> Tensor:
    """Return the divergence of the teacher's from the student's distributions of distances.

    T² KL(p_t || p_s), p the softmax of logits / T over the bins of a side: (batch, 4, anchors), of
    logits (batch, 4 * (reg_max + 1), anchors).
    """
    own = (_bins(student, reg_max) / temperature).log_softmax(2)
    guide = (_bins(teacher, reg_max) / temperature).log_softmax(2)
    return temperature**2 * (guide.exp() * (guide - own)).sum(2)


def assigned(
    scores: Tensor,
    boxes: Tensor,
    points: Tensor,
    strides: Tensor,
    sizes_per_level: Sequence[int],
    targets: Targets,
    arch: Architecture,
    assigner: Assigner,
) -> Assignment:
    """Return the labels of all anchors by a named assigner, see `assigners`."""
    if assigner == "tal":
        return task_aligned(scores, boxes, points, targets)
    if assigner == "atss":
        return atss(points, strides, sizes_per_level, targets, boxes, num_classes=arch.num_classes)
    if arch.head == "offset":
        scores = scores.sqrt()
    return simota(scores, boxes, points, strides, targets)


def _class_loss(logits: Tensor, labels: Assignment, settings: LossSettings) -> Tensor:
    classes = torch.arange(logits.shape[2], device=logits.device)
    positive = labels.classes.unsqueeze(-1) == classes
    if settings.classification == "varifocal":
        return varifocal_loss(logits, labels.scores, positive)
    if settings.classification == "quality_focal":
        return quality_focal_loss(logits, labels.scores)
    epsilon = settings.poly_epsilon if settings.classification == "poly" else 0.0
    return poly_loss(logits, positive, epsilon=epsilon)


def _normalizers(
    weight: Tensor, foreground: Tensor, reduce_mean: Callable[[Tensor], Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Return the normalizers of the losses and of the objectness loss."""
    images = torch.full_like(weight[0, 0], len(weight))
    counts = torch.stack((weight.sum(), foreground.sum().to(weight.dtype), images))
    if reduce_mean is not None:
        counts = reduce_mean(counts)
    # A floor a batch would be another one for each way to share a batch among processes.
    floor = LEAST_AN_IMAGE * counts[2]
    return torch.maximum(counts[0], floor), torch.maximum(counts[1], floor)


def _distances(boxes: Tensor, points: Tensor, strides: Tensor) -> Tensor:
    """Convert boxes (batch, 4, anchors) in pixels to left, top, right, bottom in strides."""
    corners = boxes / strides
    return torch.cat((points - corners[:, :2], corners[:, 2:] - points), dim=1)


def _wide(value: Tensor) -> Tensor:
    """Bring to float32; float64 stays, for the sake of finite differences."""
    return value if value.dtype == torch.float64 else value.float()


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.softplus(logits) - logits * targets


def _bins(regression: Tensor, reg_max: int) -> Tensor:
    """(batch, 4 * (reg_max + 1), anchors) as (batch, 4, reg_max + 1, anchors)."""
    batch, _, anchors = regression.shape
    return regression.view(batch, 4, reg_max + 1, anchors)
