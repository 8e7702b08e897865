"""Settings of a training: one frozen value, written as JSON into every checkpoint."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from trt_yolov6.checkpoints.loading import Checkpoint
from trt_yolov6.errors import UserError, did_you_mean
from trt_yolov6.models.variants import (
    STRIDES,
    VARIANTS,
    ActivationName,
    Architecture,
    BlockKind,
    architecture,
)
from trt_yolov6.training.augmentation import AugmentationSettings, augmentation_for
from trt_yolov6.training.data_validation import OnBadData
from trt_yolov6.training.losses import DistillationSettings, LossSettings, default_losses
from trt_yolov6.training.optimizer import OptimizerSettings, default_optimizer
from trt_yolov6.training.rep_optimizer import RepOptimizerSettings

Precision = Literal["auto", "bf16", "fp16", "fp32"]
"""Arithmetic of the network while training; `auto`: bf16 where the GPU has it, else fp16, and fp32
on a CPU. Losses are computed in float32 always."""

REG_MAX = 16
"""Largest distance bin where DFL is asked for and the variant has none (paper, Section 2.3.2)."""


@dataclass(frozen=True)
class ArchitectureOptions:
    """Overrides of the variant's row; None keeps it (paper, Tables 2 to 4 and 11)."""

    block: BlockKind | None = None
    activation: ActivationName | None = None
    csp_ratio: float | None = None
    """Channel coefficient of CSPStackRep blocks; 0 for plain RepBlocks."""
    dfl: bool | None = None
    """True if the head predicts distributions over distances."""
    objectness: bool | None = None
    """True if the head also predicts objectness (and offsets, as in v0.1)."""
    stage_repeats: tuple[int, ...] | None = None
    """Length of the backbone's stages, counted as in `Architecture`."""
    neck_repeats: tuple[int, ...] | None = None
    """Length of the neck's stacks, likewise."""
    neck_channels: tuple[int, ...] | None = None
    """Channels along the neck, as in `Architecture`."""


@dataclass(frozen=True)
class TrainSettings:
    """All that decides the weights which a training ends with, but for the machine.

    `recipe_for` fills in the paper's values for a variant.
    """

    data: str
    """The data set's folder or `data.yaml`."""
    variant: str
    """A row of `models.VARIANTS`; with `weights`, what that is recognized as."""
    optimizer: OptimizerSettings
    losses: LossSettings
    augmentation: AugmentationSettings
    architecture: ArchitectureOptions = field(default_factory=ArchitectureOptions)
    weights: str | None = None
    """Checkpoint to start from; None: random weights."""
    train_split: str = "train"
    val_split: str | None = "val"
    """None: never evaluated, and so no `best.pt`."""
    on_bad_data: OnBadData = "refuse"
    epochs: int = 300
    batch: int = 32
    """Images a step, of all processes together."""
    image_size: int = 640
    """Side of the network's input in pixels."""
    seed: int = 0
    precision: Precision = "auto"
    plain_epochs: int = 15
    """Last epochs, without Mosaic and Mixup (paper, 2.4.3)."""
    eval_interval: int = 10
    """Epochs from one evaluation to the next, 4 times as often in the last ones; 0: only once, at
    the end."""
    eval_border: int = 0
    """Gray pixels on every side of the images that are evaluated (paper, 2.4.3)."""
    ema_decay: float | None = None
    """Decay of the moving average of the weights; None: the authors', scaled (see `ema`)."""
    teacher: str | None = None
    """Checkpoint of the teacher of self-distillation (paper, 2.4.2)."""
    distillation: DistillationSettings | None = None
    """Distillation settings; only with `teacher`."""
    rep_optimizer: RepOptimizerSettings | None = None
    """Train a single-branch network as if it had branches (paper, 2.5.1); None: as it is."""
    common_statistics: bool = True
    """In several processes, normalize by the statistics of all processes' images. Off, each takes
    its own images', and the first one's running statistics are kept: faster, another result."""
    compile: bool = False
    """Compile the network with torch.compile."""
    deterministic: bool = False
    """On a GPU, take only algorithms that give the same bits every time; slower."""

    def __post_init__(self) -> None:
        _check(self)

    def to_json(self) -> dict[str, Any]:
        """Return plain values, ready for `json.dumps`."""
        return dataclasses.asdict(self)


def recipe_for(
    variant: str,
    data: str,
    *,
    options: ArchitectureOptions | None = None,
    weights: Checkpoint | None = None,
    scales: Checkpoint | None = None,
    epochs: int = 300,
    plain_epochs: int | None = None,
    image_size: int | None = None,
    **others: Any,
) -> TrainSettings:
    """Return the paper's recipe for a variant.

    Args:
        variant: a row of `models.VARIANTS`.
        data: folder of the data set.
        options: what to build differently.
        weights: checkpoint to start from, which then says what the network is; the optimizer's
            values are those for fine-tuning, and no other assigner is at work at first.
        scales: hyper-search network for RepOptimizer, which then says what the network is.
        epochs: passes over the training split.
        plain_epochs: last epochs without Mosaic and Mixup; None: 15, but at most a quarter of all.
        image_size: side of the input in pixels; None: what the authors train the network at.
        others: any other field of `TrainSettings`.

    Raises:
        UserError: there is no such variant, or a value is out of range.
    """
    options = options or ArchitectureOptions()
    source = weights or scales
    arch = source.arch if source else adapted(architecture(variant), options)
    losses = default_losses(arch)
    if weights:
        # The other assigner is for predictions that say nothing yet.
        losses = dataclasses.replace(losses, warmup_epochs=0)
    values: dict[str, Any] = {
        "optimizer": default_optimizer(variant, fine_tuning=weights is not None),
        "losses": losses,
        "augmentation": (
            augmentation_for(variant) if variant in VARIANTS else AugmentationSettings()
        ),
        "plain_epochs": min(15, epochs // 4) if plain_epochs is None else plain_epochs,
        **others,
    }
    if scales:
        values["rep_optimizer"] = RepOptimizerSettings(scales=str(scales.path))
    if values.get("teacher") is not None and values.get("distillation") is None:
        values["distillation"] = DistillationSettings(epochs=epochs)
    return TrainSettings(
        data=data,
        variant=variant,
        architecture=options,
        weights=str(weights.path) if weights else None,
        epochs=epochs,
        image_size=image_size or arch.image_size,
        **values,
    )


def search_settings(settings: TrainSettings) -> TrainSettings:
    """Return the settings of the hyper-search that a training with RepOptimizer begins with.

    The same recipe on the network of scaled branches, without a teacher, and as long as asked for.
    """
    assert settings.rep_optimizer is not None
    epochs = settings.rep_optimizer.search_epochs or settings.epochs
    plain = settings.plain_epochs
    return dataclasses.replace(
        settings,
        architecture=dataclasses.replace(settings.architecture, block="scaled"),
        rep_optimizer=None,
        teacher=None,
        distillation=None,
        epochs=epochs,
        plain_epochs=plain if epochs == settings.epochs else min(plain, epochs // 4),
    )


def adapted(arch: Architecture, options: ArchitectureOptions) -> Architecture:
    """Return an architecture with the options applied.

    Raises:
        UserError: they contradict each other.
    """
    changes: dict[str, Any] = {}
    of_blocks = (options.block, options.activation, options.csp_ratio)
    if arch.neck == "lite" and any(option is not None for option in of_blocks):
        raise UserError(
            f"{arch.name} has one kind of block; leave `block`, `activation`, `csp_ratio` and "
            "`rep_optimizer` out.",
        )
    if options.block is not None:
        changes["block"] = options.block
    if options.activation is not None:
        changes["activation"] = changes["neck_activation"] = options.activation
    if options.csp_ratio is not None:
        if arch.mbla and options.csp_ratio == 0:
            raise UserError(f"{arch.name} is made of MBLA blocks; give a CSP ratio above 0.")
        if not 0 <= options.csp_ratio <= 1:
            raise UserError(
                f"a CSP ratio of {options.csp_ratio} is out of range; give 0 (none) to 1."
            )
        changes["csp_ratio"] = options.csp_ratio or None
        if (arch.csp_ratio is None) != (changes["csp_ratio"] is None):
            # A bottleneck of a CSPStackRep block has two blocks.
            factor = 1 if changes["csp_ratio"] is None else 2

            def resized(lengths: tuple[int, ...]) -> tuple[int, ...]:
                if factor == 2:
                    return tuple(max(length // 2, 1) for length in lengths)
                return tuple(length * 2 for length in lengths)

            changes["stage_repeats"] = resized(arch.stage_repeats)
            changes["neck_repeats"] = resized(arch.neck_repeats)
    for name in ("stage_repeats", "neck_repeats", "neck_channels"):
        lengths = getattr(options, name)
        if lengths is None:
            continue
        if len(lengths) != len(getattr(arch, name)) or min(lengths) < 1:
            raise UserError(
                f"{name} {lengths} does not fit {arch.name}; give "
                f"{len(getattr(arch, name))} numbers above 0."
            )
        changes[name] = lengths
    if options.objectness:
        changes["head"] = "offset"
        if options.dfl:
            raise UserError("the head with objectness regresses boxes without DFL; leave one out.")
        changes["reg_max"] = 0
    elif options.dfl is not None:
        changes["reg_max"] = (arch.reg_max or REG_MAX) if options.dfl else 0
    return dataclasses.replace(arch, **changes)


def with_field(settings: TrainSettings, assignment: str) -> TrainSettings:
    """Return the settings with one field changed.

    Args:
        settings: what to start from.
        assignment: such as `epochs=10`, `optimizer.momentum=0.9` or `ema_decay=none`.

    Raises:
        UserError: there is no such field, or the value does not fit it.
    """
    path, equals, text = assignment.partition("=")
    if not equals:
        raise _assignment_error(f" {assignment} is not of the form FIELD=VALUE")
    changed: TrainSettings = _with(settings, path.strip().split("."), text.strip(), assignment)
    return changed


def _with(value: Any, names: list[str], text: str, assignment: str) -> Any:
    fields = {item.name for item in dataclasses.fields(value)}
    if names[0] not in fields:
        meant = did_you_mean(names[0], fields)
        raise _assignment_error(
            f" {assignment}: there is no {names[0]}{meant}; choose one of "
            f"{', '.join(sorted(fields))}"
        )
    kind = typing.get_type_hints(type(value))[names[0]]
    current = getattr(value, names[0])
    if dataclasses.is_dataclass(current):
        if len(names) == 1:
            parts = ", ".join(f"{names[0]}.{item.name}" for item in dataclasses.fields(current))
            raise _assignment_error(f" {assignment}: name a part of it, one of {parts}")
        return dataclasses.replace(value, **{names[0]: _with(current, names[1:], text, assignment)})
    if len(names) > 1:
        raise _assignment_error(f" {assignment}: {names[0]} has no parts here")
    return dataclasses.replace(value, **{names[0]: _parsed(kind, text, assignment)})


def _parsed(kind: Any, text: str, assignment: str) -> Any:
    """Return a text as a value of the type that a field's annotation names."""
    choices = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        if text in choices:
            return text
        raise _assignment_error(f" {assignment}: choose one of {', '.join(map(str, choices))}")
    if type(None) in choices:
        if text.lower() == "none":
            return None
        (kind,) = (item for item in choices if item is not type(None))
        return _parsed(kind, text, assignment)
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if kind in (int, float, str):
        try:
            return kind(text)
        except ValueError:
            pass
    wanted = getattr(kind, "__name__", "value")
    raise _assignment_error(f" {assignment}: the value is no {wanted}")


def _assignment_error(text: str) -> UserError:
    return UserError(f"`assignment`{text}.")


def settings_from_json(value: Mapping[str, Any], source: str) -> TrainSettings:
    """Return the settings that `to_json` wrote.

    Args:
        value: what was read.
        source: where from, for the message.

    Raises:
        UserError: it is something else, or of another version.
    """
    try:
        restored: TrainSettings = _restored(TrainSettings, value)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(
            f"{source} holds no settings of a training that this version knows ({error}); start "
            "the training again."
        ) from error
    return restored


def _restored(kind: Any, value: Any) -> Any:
    """Return a plain value as the type that an annotation names."""
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        (kind,) = (item for item in typing.get_args(kind) if item is not type(None))
        return _restored(kind, value)
    if origin is tuple:
        (item, *_) = typing.get_args(kind)
        return tuple(_restored(item, one) for one in value)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return kind(**{name: _restored(hints[name], one) for name, one in value.items()})  # type: ignore[operator]
    return value


def _check(settings: TrainSettings) -> None:
    optimizer = settings.optimizer
    rep = settings.rep_optimizer or RepOptimizerSettings()
    stride = max(STRIDES)
    checks = [
        (
            settings.epochs >= 1,
            f"`epochs` must be at least 1, got {settings.epochs}",
        ),
        (settings.batch >= 1, f"`batch` must be at least 1, got {settings.batch}"),
        (
            settings.image_size >= stride and settings.image_size % stride == 0,
            f"an image size of {settings.image_size} is not a multiple of {stride}; give "
            "`image_size` such as 640",
        ),
        (
            math.isfinite(optimizer.learning_rate) and optimizer.learning_rate > 0,
            f"a learning rate of {optimizer.learning_rate} is out of range; give `learning_rate` "
            "above 0",
        ),
        (
            0 <= optimizer.momentum < 1 and 0 <= optimizer.warmup_momentum < 1,
            f"a momentum of {optimizer.momentum} is out of range; give one of 0 to 1",
        ),
        (
            optimizer.weight_decay >= 0,
            f"a weight decay of {optimizer.weight_decay} is out of range; give 0 or more",
        ),
        (
            optimizer.accumulate is None or optimizer.accumulate >= 1,
            f"`accumulate` must be at least 1, got {optimizer.accumulate}",
        ),
        (
            0 <= settings.plain_epochs <= settings.epochs,
            f"{settings.plain_epochs} last epochs without Mosaic are not between 0 and the "
            f"{settings.epochs} in all; give other `plain_epochs`",
        ),
        (
            settings.eval_interval >= 0,
            f"`eval_interval` must be at least 0, got {settings.eval_interval}",
        ),
        (
            settings.ema_decay is None or 0 <= settings.ema_decay < 1,
            f"an EMA decay of {settings.ema_decay} is out of range; give one of 0 to 1",
        ),
        (
            0 <= settings.eval_border < settings.image_size // 2,
            f"a border of {settings.eval_border} leaves no image; give `eval_border` less",
        ),
        (
            (settings.teacher is None) == (settings.distillation is None),
            "self-distillation needs a teacher; give the checkpoint as `teacher`",
        ),
        (
            settings.rep_optimizer is None or settings.weights is None,
            "RepOptimizer starts from random weights and its scales; leave `weights` or "
            "`rep_optimizer` out",
        ),
        (
            settings.rep_optimizer is None or settings.architecture.block is None,
            "RepOptimizer says what the blocks are; leave `block` or `rep_optimizer` out",
        ),
        (
            rep.scales is None or rep.search_epochs is None,
            f"the scales are there already, in {rep.scales}; leave `search_epochs` out",
        ),
        (
            rep.search_epochs is None or rep.search_epochs >= 1,
            f"`search_epochs` must be at least 1, got {rep.search_epochs}",
        ),
    ]
    for fine, complaint in checks:
        if not fine:
            raise UserError(complaint + ".")
