"""Settings of a training: one frozen value, written as JSON into every checkpoint."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from msgspec import Meta

from trt_yolov6.checkpoints.loading import Checkpoint
from trt_yolov6.common.files import path_of
from trt_yolov6.common.ranges import Checked, Count, Share, ShareBelow1, fitting, of_class
from trt_yolov6.common.records import as_record
from trt_yolov6.errors import UserError, did_you_mean
from trt_yolov6.models.variants import (
    STRIDES,
    ActivationName,
    Architecture,
    BlockKind,
    architecture,
    can_be_built,
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
class ArchitectureOptions(Checked):
    """Overrides of the variant's row; None keeps it (paper, Tables 2 to 4 and 11).

    Raises:
        UserError: an unknown name, or a value of another type.
    """

    block: BlockKind | None = None
    activation: ActivationName | None = None
    csp_ratio: Share | None = None
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
class TrainSettings(Checked):
    """Every setting that affects the final weights, the machine aside.

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
    epochs: Count = 300
    batch: Count = 32
    """Images a step, of all processes together."""
    image_size: int = 640
    """Side of the network's input in pixels."""
    seed: int = 0
    precision: Precision = "auto"
    plain_epochs: Annotated[int, Meta(ge=0)] | None = None
    """Last epochs, without Mosaic and Mixup (paper, 2.4.3); None: 15, at most a quarter of all."""
    eval_interval: Annotated[int, Meta(ge=0)] = 10
    """Epochs from one evaluation to the next, 4 times as often in the last ones; 0: only once, at
    the end."""
    eval_border: Annotated[int, Meta(ge=0)] = 0
    """Gray pixels on every side of the images that are evaluated (paper, 2.4.3)."""
    ema_decay: ShareBelow1 | None = None
    """Decay of the moving average of the weights; None: the authors', scaled (see `ema`)."""
    teacher: str | None = None
    """Checkpoint of the teacher of self-distillation (paper, 2.4.2)."""
    distillation: DistillationSettings | None = None
    """Distillation settings, only with `teacher`; None: those by default."""
    rep_optimizer: RepOptimizerSettings | None = None
    """Train a single-branch network as if it had branches (paper, 2.5.1); None: as it is."""
    common_statistics: bool = True
    """In several processes, normalize by the statistics of all processes' images. Off, each takes
    its own images', and the first one's running statistics are kept: faster, another result."""
    compile: bool = False
    """Compile the network with torch.compile."""
    cuda_graphs: bool = True
    """On a GPU in bf16, give the network's kernels in two calls a step, see `graphed`; takes more
    memory. Not with `compile` or `deterministic`."""
    deterministic: bool = False
    """On a GPU, take only algorithms that give the same bits every time; slower."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self)

    @property
    def last_plain_epochs(self) -> int:
        """Number of last epochs without Mosaic and Mixup, whether or not it was chosen."""
        return min(15, self.epochs // 4) if self.plain_epochs is None else self.plain_epochs

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
        others: any other field of `TrainSettings`, such as `epochs`; `image_size` is otherwise what
            `weights` were trained at, or the authors'.

    Raises:
        UserError: there is no such variant, or a value is out of range.
    """
    options = of_class(options, ArchitectureOptions, "options")
    source = weights or scales
    arch = source.arch if source else adapted(architecture(variant), options)
    losses = default_losses(arch)
    trained = weights.training.image_size if weights and weights.training else None
    if weights:
        # The other assigner is for predictions that say nothing yet.
        losses = dataclasses.replace(losses, warmup_epochs=0)
    values: dict[str, Any] = {
        "optimizer": default_optimizer(variant, fine_tuning=weights is not None),
        "losses": losses,
        "augmentation": augmentation_for(variant),
        "image_size": trained or arch.image_size,
        **others,
    }
    if scales:
        values["rep_optimizer"] = RepOptimizerSettings(scales=str(scales.path))
    if values.get("teacher") is not None:
        values["teacher"] = str(path_of(values["teacher"], "teacher"))
        if values.get("distillation") is None:
            values["distillation"] = DistillationSettings()
    return TrainSettings(
        data=data,
        variant=variant,
        architecture=options,
        weights=str(weights.path) if weights else None,
        **values,
    )


def search_settings(settings: TrainSettings) -> TrainSettings:
    """Return the settings of the hyper-search that a training with RepOptimizer begins with.

    The same recipe on the network of scaled branches, without a teacher, and as long as asked for.
    """
    assert settings.rep_optimizer is not None
    epochs = settings.rep_optimizer.search_epochs or settings.epochs
    plain = settings.plain_epochs
    if plain is not None and epochs != settings.epochs:
        plain = min(plain, epochs // 4)
    return dataclasses.replace(
        settings,
        architecture=dataclasses.replace(settings.architecture, block="scaled"),
        rep_optimizer=None,
        teacher=None,
        distillation=None,
        epochs=epochs,
        plain_epochs=plain,
    )


def adapted(arch: Architecture, options: ArchitectureOptions) -> Architecture:
    """Return an architecture with the options applied.

    Raises:
        UserError: they contradict each other, or the network would have parts that do not fit.
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
        changes["csp_ratio"] = options.csp_ratio or None
        if (arch.csp_ratio is None) != (changes["csp_ratio"] is None):
            # A bottleneck of a CSPStackRep block has two blocks.
            factor = 2.0 if changes["csp_ratio"] is None else 0.5
            for name in ("stage_repeats", "neck_repeats"):
                changes[name] = tuple(max(int(n * factor), 1) for n in getattr(arch, name))
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
    if not changes:
        return arch
    changed = dataclasses.replace(arch, **changes)
    if not can_be_built(changed):
        given = {name: value for name, value in vars(options).items() if value is not None}
        shown = ", ".join(f"`{name}` {value}" for name, value in given.items())
        raise UserError(f"{arch.name} cannot be built with {shown}; give other values.")
    return changed


def with_field(settings: TrainSettings, assignment: str) -> TrainSettings:
    """Return the settings with a field as `epochs=10` or `optimizer.momentum=0.9` assigns it.

    Raises:
        UserError: there is no such field, or the value does not fit it.
    """
    path, equals, text = assignment.partition("=")
    if not equals:
        raise UserError(f"`assignment` {assignment} is not of the form FIELD=VALUE.")
    return _with(settings, path.strip().split("."), text.strip(), assignment)


def _with(value: Any, names: list[str], text: str, assignment: str) -> Any:
    fields = {item.name for item in dataclasses.fields(value)}
    if names[0] not in fields:
        meant = did_you_mean(names[0], fields)
        raise UserError(
            f"`assignment` {assignment}: there is no {names[0]}{meant}; choose one of "
            f"{', '.join(sorted(fields))}."
        )
    current = getattr(value, names[0])
    if dataclasses.is_dataclass(current):
        if len(names) == 1:
            parts = ", ".join(f"{names[0]}.{item.name}" for item in dataclasses.fields(current))
            raise UserError(f"`assignment` {assignment}: name a part of it, one of {parts}.")
        return dataclasses.replace(value, **{names[0]: _with(current, names[1:], text, assignment)})
    if len(names) > 1:
        what = "none, so it has no parts" if current is None else "a single value"
        raise UserError(f"`assignment` {assignment}: {names[0]} is {what}.")
    kind = typing.get_type_hints(type(value), include_extras=True)[names[0]]
    kinds = typing.get_args(kind)
    is_none = text.lower() == "none" and type(None) in kinds
    several = any(typing.get_origin(one) is tuple for one in kinds)
    given = text.strip("[]()").replace(" ", "").split(",") if several else text
    subject = f"`assignment` {assignment}: {names[0]}"
    changed = None if is_none else fitting(given, kind, subject, strict=False)
    return dataclasses.replace(value, **{names[0]: changed})


def settings_from_json(value: Mapping[str, Any], source: str) -> TrainSettings:
    """Return the settings that `to_json` wrote; `source` says where, in messages.

    Raises:
        UserError: it is something else, or of another version.
    """
    remedy = "start the training again."
    subject = f"{source} holds no settings of a training that this version knows"
    restored = as_record(value, TrainSettings, subject, remedy)
    unknown = _flat(value).keys() - _flat(restored.to_json()).keys()
    if unknown:
        raise UserError(f"{subject}: {min(unknown)}; {remedy}")
    return restored


def differences(one: TrainSettings, other: TrainSettings) -> list[str]:
    """Return the names of the fields in which two settings differ, such as `optimizer.momentum`."""
    # As JSON has them: a list is what a tuple is.
    a, b = (_flat(json.loads(json.dumps(item.to_json()))) for item in (one, other))
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


def _flat(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of nested dictionaries by their dotted names."""
    found: dict[str, Any] = {}
    for name, part in value.items():
        is_nested = isinstance(part, dict)
        found |= {f"{name}.{k}": v for k, v in _flat(part).items()} if is_nested else {name: part}
    return found


def _check(settings: TrainSettings) -> None:
    stride = max(STRIDES)
    border = max(settings.eval_border, settings.augmentation.border)
    checks = [
        (
            settings.image_size >= stride and settings.image_size % stride == 0,
            f"an image size of {settings.image_size} is not a multiple of {stride}; give "
            "`image_size` such as 640",
        ),
        (
            settings.last_plain_epochs <= settings.epochs,
            f"{settings.plain_epochs} last epochs without Mosaic are not between 0 and the "
            f"{settings.epochs} in all; give other `plain_epochs`",
        ),
        (
            border < settings.image_size // 2,
            f"a border of {border} leaves no image; give `border` less",
        ),
        (
            settings.distillation is None or settings.teacher is not None,
            "self-distillation needs a teacher; give the checkpoint as `teacher`, or leave "
            "`distillation` out",
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
    ]
    for fine, complaint in checks:
        if not fine:
            raise UserError(complaint + ".")
