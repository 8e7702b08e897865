"""The network that a training starts from: random weights, a checkpoint's, or RepOptimizer's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from trt_yolov6.checkpoints.loading import Checkpoint, load_checkpoint
from trt_yolov6.common.text import counted
from trt_yolov6.errors import UserError
from trt_yolov6.models.fusion import single_branch
from trt_yolov6.models.head import HeadLevel
from trt_yolov6.models.network import YOLOv6
from trt_yolov6.models.variants import Architecture, architecture
from trt_yolov6.training.losses import check_losses
from trt_yolov6.training.recipe import TrainSettings, adapted
from trt_yolov6.training.rep_optimizer import check_scales, copy_scales, gradient_multipliers
from trt_yolov6.training.schedule import derived_seed


@dataclass(frozen=True)
class Start:
    """A network to train, on the CPU, and notes on where it comes from."""

    model: YOLOv6
    notes: tuple[str, ...]
    """Sentences."""
    multipliers: Mapping[str, Tensor] = field(default_factory=dict)
    """RepOptimizer's multipliers of gradients, by the name of the parameter; none without it."""


def starting_model(
    settings: TrainSettings, class_names: tuple[str, ...], *, scales: str | Path | None = None
) -> Start:
    """Return the network that a training starts from.

    Its random weights depend on the seed alone. From a checkpoint all weights are taken, except
    those of the class predictions where the number of classes differs. `scales` is RepOptimizer's:
    the checkpoint of a hyper-search network, which then says what the network is; of its weights,
    only the scales are taken.

    Raises:
        UserError: the checkpoint cannot be read, is fused, or is not what the settings say; or the
            image size, the batch or the losses do not fit the network.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(settings.seed, "weights"))
        if scales is not None:
            start = _from_scales(settings, load_checkpoint(scales), class_names)
        elif settings.weights is not None:
            start = _from_checkpoint(settings, load_checkpoint(settings.weights), class_names)
        else:
            arch = architecture(settings.variant, len(class_names))
            start = Start(YOLOv6(adapted(arch, settings.architecture)), ())
            reset_predictions(start.model)
    arch = start.model.arch
    check_losses(settings.losses, arch)
    check_image_size(settings.image_size, arch, "this network")
    if settings.batch == 1 and settings.image_size == arch.size_multiple:
        raise UserError(
            f"one image of {settings.image_size} pixels leaves the deepest batch normalizations "
            "a single value, which they cannot normalize; give a larger `batch` or `image_size`."
        )
    return start


def check_image_size(size: int, arch: Architecture, who: str) -> None:
    """Raise UserError for images that a network, called `who` in the message, does not take."""
    if size % arch.size_multiple:
        raise UserError(
            f"an image size of {size} is not a multiple of {arch.size_multiple}, which {who} "
            "needs; give another `image_size`."
        )


def _from_checkpoint(
    settings: TrainSettings, checkpoint: Checkpoint, class_names: tuple[str, ...]
) -> Start:
    check_trainable(checkpoint)
    _check_agreement(settings, checkpoint)
    arch = checkpoint.arch
    if arch.num_classes == len(class_names):
        notes = [f"all weights are taken from {checkpoint.path}."]
        if checkpoint.class_names != class_names:
            notes.append(
                f"its classes were {_listed(checkpoint.class_names)} and are now "
                f"{_listed(class_names)}, in this order."
            )
        return Start(checkpoint.model.train().requires_grad_(True), tuple(notes))
    model = YOLOv6(dataclasses.replace(arch, num_classes=len(class_names)))
    reset_predictions(model)
    weights = checkpoint.model.state_dict()
    own = model.state_dict()
    taken = {name: value for name, value in weights.items() if value.shape == own[name].shape}
    model.load_state_dict(taken, strict=False)
    _copy_normalizations(checkpoint.model, model)
    return Start(
        model,
        (
            f"{checkpoint.path} has {counted(arch.num_classes, 'class')}, the data set "
            f"{len(class_names)}: "
            f"the class predictions of the head start at random, the other {len(taken)} of "
            f"{len(own)} tensors are taken over.",
        ),
    )


def _from_scales(
    settings: TrainSettings, checkpoint: Checkpoint, class_names: tuple[str, ...]
) -> Start:
    """Return the single-branch network that equals branches of random weights with the scales."""
    check_scales(checkpoint)
    if settings.rep_optimizer is not None and settings.rep_optimizer.scales is not None:
        _check_agreement(settings, checkpoint)
    search = YOLOv6(dataclasses.replace(checkpoint.arch, num_classes=len(class_names)))
    reset_predictions(search)
    copy_scales(checkpoint.model, search)
    multipliers = gradient_multipliers(search)
    return Start(
        single_branch(search),
        (f"RepOptimizer's scales of {len(multipliers)} blocks are those of {checkpoint.path}.",),
        multipliers,
    )


def _check_agreement(settings: TrainSettings, checkpoint: Checkpoint) -> None:
    """Refuse settings that ask for another network than the checkpoint's."""
    arch = checkpoint.arch
    if settings.variant != arch.name:
        raise UserError(
            f"{checkpoint.path} holds {arch.name}, not {settings.variant}; leave `model` out.",
        )
    if adapted(arch, settings.architecture) != arch:
        raise UserError(
            f"{checkpoint.path} fixes the architecture; leave options that change it out, or "
            "train from random weights."
        )


def check_trainable(checkpoint: Checkpoint) -> None:
    """Raise UserError for a checkpoint whose batch normalizations are folded away."""
    if checkpoint.form != "training":
        raise UserError(
            f"{checkpoint.path} is {checkpoint.form}: without its batch normalizations it cannot "
            "be fine-tuned; give the checkpoint that training wrote."
        )


def _copy_normalizations(source: nn.Module, target: nn.Module) -> None:
    """Copy the constants of the batch normalizations, which a checkpoint may have of its own."""
    for one, other in zip(source.modules(), target.modules(), strict=True):
        if isinstance(one, nn.BatchNorm2d) and isinstance(other, nn.BatchNorm2d):
            other.eps, other.momentum = one.eps, one.momentum


def reset_predictions(model: YOLOv6) -> None:
    """Set the weights of the last layers to zero, as the authors start: every anchor the same.

    Their biases are set where the head is built: scores of 0.01, distances of one cell.
    """
    for level in model.head.levels:
        assert isinstance(level, HeadLevel)
        for layer in (level.cls_pred, level.reg_pred, level.obj_pred):
            if layer is not None:
                nn.init.zeros_(layer.weight)


def _listed(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:5])
    return f"{shown}, ..." if len(names) > 5 else shown
