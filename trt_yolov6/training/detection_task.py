"""The task of `train`: a detector with its data, losses, optimizer and teacher."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trt_yolov6.checkpoints.loading import load_checkpoint
from trt_yolov6.data.class_matching import order_by_name
from trt_yolov6.data.coco import CocoDataset, check_objects, load_coco
from trt_yolov6.data.sources import check_source
from trt_yolov6.errors import UserError
from trt_yolov6.models.blocks import BN_MOMENTUM
from trt_yolov6.models.fusion import fuse
from trt_yolov6.models.network import Raw, YOLOv6
from trt_yolov6.models.variants import Architecture
from trt_yolov6.training.dataset import (
    DATA_REPORT_FILE,
    TrainingSet,
    data_notes,
    load_training_set,
)
from trt_yolov6.training.distributed import Processes, placed, with_common_statistics
from trt_yolov6.training.ema import WINDOW, WeightAverage, average_for
from trt_yolov6.training.graphed import graphed
from trt_yolov6.training.initialization import check_image_size, starting_model
from trt_yolov6.training.loop import StepLosses, Task
from trt_yolov6.training.losses import DistillationSettings, Losses, detection_loss
from trt_yolov6.training.optimizer import largest_norm, make_optimizer, set_rates
from trt_yolov6.training.recipe import TrainSettings
from trt_yolov6.training.schedule import LOSS_BATCH, Plan, make_plan
from trt_yolov6.training.state import Learner
from trt_yolov6.training.targets import Targets

PARTS = ("total", "class", "box", "dfl", "objectness", "distill_class", "distill_box")
"""The losses that are logged."""


@dataclass(frozen=True)
class DetectionTask:
    """A detector's training, and the settings of its evaluation."""

    task: Task
    settings: TrainSettings
    average: WeightAverage
    """Average of the weights, which is evaluated and written."""
    validation: CocoDataset | None
    half: bool
    """Evaluate in half precision."""
    notes: tuple[str, ...]
    """Notes on the data and on where the network comes from, as sentences."""


def detection_task(
    settings: TrainSettings,
    folder: Path,
    processes: Processes,
    *,
    progress: bool = True,
    scales: str | Path | None = None,
) -> DetectionTask:
    """Load the data and make the network, its optimizer and its average.

    The report on the data goes into `folder`; `scales` is a checkpoint of RepOptimizer's search.

    Raises:
        UserError: bad settings, data or checkpoint, or a device that cannot do what is asked.
    """
    _check_device(settings, processes)
    for name in ("train_split", "val_split"):
        if (split := getattr(settings, name)) is not None:
            check_source(settings.data, split, name)
    validation = (
        None if settings.val_split is None else load_coco(settings.data, settings.val_split)
    )
    if validation is not None:
        check_objects(validation, "give annotations, or `val_split` none")
    data = _training_data(settings, folder, processes, validation, progress)
    start = starting_model(settings, data.class_names, scales=scales)
    device = processes.device
    model = placed(start.model.train(), device)
    plan = make_plan(
        len(data),
        batch=settings.batch,
        epochs=settings.epochs,
        warmup_epochs=settings.optimizer.warmup_epochs,
        accumulate=settings.optimizer.accumulate,
    )
    _set_normalizations(model, plan)
    on_gpu = device.type == "cuda"
    autocast = _autocast_type(settings, device)
    optimizer = make_optimizer(
        model, settings.optimizer, settings.batch, fused=on_gpu, multipliers=start.multipliers
    )
    average = WeightAverage(model, *average_for(plan.total_updates, settings.ema_decay))
    scaler = torch.amp.GradScaler(device.type, enabled=autocast == torch.float16)
    teacher = teacher_of(settings, model.arch, data.class_names)
    if teacher is not None:
        teacher = placed(teacher, device)
    is_graphed = uses_cuda_graphs(settings, device, autocast)
    network = _wrapped(model, settings, processes, autocast if is_graphed else None)

    task = Task(
        name="search" if model.arch.block == "scaled" else "train",
        subject=settings.variant,
        identity=settings.to_json(),
        seed=settings.seed,
        plan=plan,
        plain_epochs=settings.last_plain_epochs,
        data=data,
        augmentation=settings.augmentation,
        processes=processes,
        network=network,
        learner=Learner(model, average, optimizer, scaler, torch.zeros(len(PARTS), device=device)),
        losses=_losses(settings, network, model, teacher, autocast, processes),
        set_rates=lambda step: set_rates(optimizer, settings.optimizer, plan, step),
        line=functools.partial(_line, optimizer, plan.steps_per_epoch * plan.batch),
        # The learning rate is meant for the sum of the gradients of 32 images each.
        loss_factor=plan.batch / LOSS_BATCH,
        clip_norm=largest_norm(settings.optimizer, settings.batch),
        keeps_gradients=is_graphed,
    )
    seen = validation if processes.is_first else None
    notes = (*start.notes, *data_notes(data, folder / DATA_REPORT_FILE, seen))
    return DetectionTask(
        task, settings, average, validation, autocast is not None and on_gpu, notes
    )


def _check_device(settings: TrainSettings, processes: Processes) -> None:
    if settings.batch % processes.world:
        raise UserError(
            f"a batch of {settings.batch} cannot be shared equally by {processes.world} processes; "
            "give a `batch` that can."
        )
    if settings.compile and processes.device.type != "cuda":
        # PyTorch 2.13: the compiled backward pass of this network corrupts memory on a CPU.
        raise UserError("`compile` is for a GPU; leave it out on a CPU.")


def _training_data(
    settings: TrainSettings,
    folder: Path,
    processes: Processes,
    validation: CocoDataset | None,
    progress: bool,
) -> TrainingSet:
    data = load_training_set(
        settings.data,
        settings.train_split,
        settings.image_size,
        processes.device,
        on_bad_data=settings.on_bad_data,
        progress=progress,
        report_file=folder / DATA_REPORT_FILE if processes.is_first else None,
        class_names=load_checkpoint(settings.weights).class_names if settings.weights else None,
    )
    # `in_order` has given the training split the network's names and class order.
    if (
        validation is not None
        and set(validation.class_names) != set(data.class_names)
        and order_by_name(data.class_names, validation.class_names, validation.used()) is None
    ):
        raise UserError(
            f"the splits {settings.train_split} and {settings.val_split} of {settings.data} have "
            "different classes; make their categories agree."
        )
    return data


def uses_cuda_graphs(
    settings: TrainSettings, device: torch.device, autocast: torch.dtype | None
) -> bool:
    """Return whether the network's passes run as CUDA graphs, which only some settings allow."""
    plain = settings.compile or settings.deterministic
    return (
        device.type == "cuda" and autocast == torch.bfloat16 and settings.cuda_graphs and not plain
    )


def _wrapped(
    model: YOLOv6, settings: TrainSettings, processes: Processes, graphed_in: torch.dtype | None
) -> nn.Module:
    """Return the network from images to raw levels, compiled, graphed and parallel as asked for.

    `graphed_in` is the type that convolutions of CUDA graphs compute in; None: no graphs.
    """
    if settings.common_statistics:
        with_common_statistics(model, processes)
    network: nn.Module = Raw(model)
    if settings.compile:
        network = torch.compile(network)  # type: ignore[assignment]
    if graphed_in is not None:
        side, images = settings.image_size, settings.batch // processes.world
        network = graphed(network, (images, 3, side, side), graphed_in)
    if processes.world == 1:
        return network
    device = processes.device
    return DistributedDataParallel(
        network,
        device_ids=[device.index] if device.type == "cuda" else None,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
    )


def _set_normalizations(model: nn.Module, plan: Plan) -> None:
    """Remove step counters (a hundred tiny kernels a step); adapt momenta to short trainings.

    Running statistics trail the weights by 1 / momentum steps, 33 with the authors' constant. In a
    training of 150 steps, that alone would cost all accuracy, so they trail by at most the share of
    the training that the average of the weights covers.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.num_batches_tracked = None
            least = 1 / max(WINDOW * plan.total_steps, 2.0)
            module.momentum = max(module.momentum or BN_MOMENTUM, least)


def _autocast_type(settings: TrainSettings, device: torch.device) -> torch.dtype | None:
    """Return the type that convolutions compute in; None for float32."""
    precision = settings.precision
    if precision == "auto":
        if device.type != "cuda":
            return None
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if native else "fp16"
    if precision == "fp16" and device.type != "cuda":
        raise UserError("`precision` fp16 needs a GPU; give bf16 or fp32 on a CPU.")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[precision]


def teacher_of(
    settings: TrainSettings, student: Architecture, class_names: tuple[str, ...]
) -> YOLOv6 | None:
    """Return the teacher, fused, on the CPU; None without one.

    Raises:
        UserError: it cannot teach this network on this data.
    """
    if settings.teacher is None:
        return None
    checkpoint = load_checkpoint(settings.teacher)
    arch = checkpoint.arch
    if checkpoint.class_names != class_names:
        raise UserError(
            f"the teacher {checkpoint.path} knows other classes than the data set; train one on it."
        )
    ways = [(one.head, one.reg_max, one.strides) for one in (arch, student)]
    if ways[0] != ways[1]:
        raise UserError(
            f"the teacher {checkpoint.path} predicts boxes in another way than the student; give "
            "one with the same head, the same DFL bins and as many levels."
        )
    check_image_size(settings.image_size, arch, f"the teacher {checkpoint.path}")
    return fuse(checkpoint.model).requires_grad_(False)


def _losses(
    settings: TrainSettings,
    network: nn.Module,
    model: YOLOv6,
    teacher: YOLOv6 | None,
    autocast: torch.dtype | None,
    processes: Processes,
) -> Callable[[Tensor, Targets, float], StepLosses]:
    device = processes.device
    distillation = settings.distillation or DistillationSettings()
    distillation = replace(distillation, epochs=distillation.epochs or settings.epochs)

    def losses(images: Tensor, targets: Targets, epoch: float) -> StepLosses:
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            levels = network(images)
            taught = None
            if teacher is not None:
                with torch.no_grad():
                    taught = teacher.raw(images)
        found = detection_loss(
            levels,
            model.arch,
            targets,
            settings.losses,
            epoch=epoch,
            teacher_levels=taught,
            distillation=distillation,
            reduce_mean=processes.mean,
        )
        return StepLosses(found.total, _parts(found))

    return losses


def _parts(losses: Losses) -> Tensor:
    """Return the losses of a step in the order of `PARTS`: float32, on the device."""
    zero = torch.zeros_like(losses.total)
    return torch.stack(
        [losses.total.detach(), *(losses.parts.get(name, zero).float() for name in PARTS[1:])]
    )


def _line(
    optimizer: torch.optim.Optimizer,
    images: int,
    epoch: int,
    means: Sequence[float],
    seconds: float,
) -> dict[str, Any]:
    """Return the log's line of an epoch; losses that the network does not have are left out."""
    named = zip(PARTS[1:], means[1:], strict=True)
    return {
        "epoch": epoch,
        "loss": means[0],
        **{f"loss_{name}": value for name, value in named if value},
        "learning_rate": optimizer.param_groups[0]["lr"],
        "seconds": seconds,
        "images_per_second": images / max(seconds, 1e-9),
    }


@contextlib.contextmanager
def arithmetic(settings: TrainSettings, device: torch.device) -> Iterator[None]:
    """Choose PyTorch's algorithms for a training, and restore the earlier choice."""
    before = (
        torch.backends.cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.backends.cudnn.benchmark = device.type == "cuda" and not settings.deterministic
    if settings.deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before[0]
        torch.use_deterministic_algorithms(before[1], warn_only=before[2])
