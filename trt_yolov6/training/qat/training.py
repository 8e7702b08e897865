"""Quantization-aware training of the Q/DQ graph that PTQ makes of a checkpoint.

    checkpoint ─ preparation ─▶ Start ─ loop ─▶ Trained ─ export ─▶ Q/DQ graph

Paper, Section 2.5.3: all layers quantized, or all except the sensitive ones, with channel-wise
distillation from the float network. Training starts from the graph that calibration prepared, with
its equalization, its pairs and its scales.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trt_yolov6.data.class_matching import match_classes
from trt_yolov6.data.coco import CocoDataset
from trt_yolov6.errors import UserError
from trt_yolov6.graph.model import Graph
from trt_yolov6.runtime.evaluate import Evaluation, evaluate
from trt_yolov6.spec import PredictOptions
from trt_yolov6.training.dataset import TrainingSet, load_training_set
from trt_yolov6.training.distributed import Processes, chosen_device
from trt_yolov6.training.loop import StepLosses, Task, train_epochs
from trt_yolov6.training.losses import default_losses, detection_loss
from trt_yolov6.training.qat.distillation import channel_divergence
from trt_yolov6.training.qat.onnx_module import GraphNetwork, Trained
from trt_yolov6.training.qat.preparation import Start
from trt_yolov6.training.qat.settings import QatSettings
from trt_yolov6.training.schedule import cosine, make_plan
from trt_yolov6.training.state import Learner, Progress, read_state, restore
from trt_yolov6.training.targets import Targets
from trt_yolov6.training.torch_engine import TorchEngine

_log = logging.getLogger(__name__)

WARMUP = 0.05
"""Part of the steps over which the learning rate rises."""

PARTS = ("total", "detection", "distill")
"""The losses that are logged."""


@dataclass(frozen=True)
class QatResult:
    """A trained network, and the time and memory of its training."""

    network: GraphNetwork
    trained: Trained
    epochs: int
    seconds: float
    """Seconds of training alone, without calibration and loading."""
    epoch_seconds: tuple[float, ...]
    peak_bytes: int | None
    """Most memory that was allocated on the GPU; None on a CPU."""
    log: tuple[dict[str, float], ...] = field(repr=False, default=())
    """Mean losses, by epoch."""


def train_quantized(
    start: Start,
    settings: QatSettings,
    *,
    device: str | torch.device | None = None,
    state_file: str | Path | None = None,
    state_seconds: float = 30.0,
    progress: bool = True,
    data: TrainingSet | None = None,
) -> QatResult:
    """Train a calibrated network with its rounding in place.

    Args:
        start: from `prepare_graph`.
        settings: all that decides the result.
        device: `cpu`, `cuda` or `cuda:N`; None takes a GPU where there is one.
        state_file: file to store the state in after each epoch, and to resume from if it exists.
        state_seconds: least time between two writings of the state within an epoch.
        progress: show a bar on stderr; off a terminal, log a header and a line an epoch.
        data: the training split, if it is loaded already.

    Raises:
        UserError: the data cannot be read, has other classes, or training diverged.
    """
    where = chosen_device(None if device is None else str(device))
    if data is None:
        data = load_data(settings, start.graph, where, progress=progress)
    student = start.student(where, learn_scales=settings.learn_scales).train()
    task = _task(start, settings, data, student, where)
    state = None if state_file is None else Path(state_file)
    done = _restored(state, task)
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)

    with _convolutions(where, exact=False):
        train_epochs(
            task,
            done,
            state_file=state,
            state_seconds=state_seconds,
            finish_epoch=lambda *_: True,
            progress=progress,
        )
    seconds = tuple(line["seconds"] for line in done.log)
    return QatResult(
        network=student,
        trained=student.eval().trained(),
        epochs=settings.epochs,
        seconds=sum(seconds),
        epoch_seconds=seconds,
        peak_bytes=torch.cuda.max_memory_allocated(where) if where.type == "cuda" else None,
        log=tuple(done.log),
    )


def load_data(
    settings: QatSettings,
    graph: Graph,
    device: torch.device,
    *,
    progress: bool = True,
    report_file: Path | None = None,
) -> TrainingSet:
    """Decode the training split, its classes in the network's order.

    Names that only one side has are taken in order, as in evaluation, if all others are in order;
    a warning says so.

    Raises:
        UserError: see `load_training_set`, or there are other classes than the network's.
    """
    data = load_training_set(
        settings.data,
        settings.train_split,
        max(graph.image_size),
        device,
        on_bad_data=settings.on_bad_data,
        progress=progress,
        report_file=report_file,
        class_names=graph.class_names,
    )
    count, known = len(data.class_names), len(graph.class_names)
    if count != known:
        raise UserError(
            f"{settings.data} has {count} classes, the checkpoint {known}; give the data set it "
            "was trained on."
        )
    match = match_classes(
        "the checkpoint", graph.class_names, settings.data, data.class_names, [True] * count
    )
    if match.matches != tuple(range(count)):
        raise UserError(
            f"{settings.data} has the checkpoint's classes in another order and some by other "
            f"names; name them {', '.join(graph.class_names)}, as the checkpoint does."
        )
    for note in match.notes:
        _log.warning("%s", note)
    return data


def evaluate_network(network: GraphNetwork, graph: Graph, dataset: CocoDataset) -> Evaluation:
    """Return the AP of a graph's network on the device where it is, in float32 without TF32."""
    device = next(network.parameters()).device
    with (
        _convolutions(device, exact=True),
        TorchEngine(network, graph.class_names, graph.image_size, half=False, name="qat") as engine,
    ):
        return evaluate(engine, dataset, PredictOptions(batch=16), progress=False)


# --- what the loop trains -----------------------------------------------------------------------


def _task(
    start: Start,
    settings: QatSettings,
    data: TrainingSet,
    student: GraphNetwork,
    device: torch.device,
) -> Task:
    """Return the training of a network by Adam, its weights and its scales at a rate for each."""
    groups = [student.weight_parameters(), student.scale_parameters()]
    optimizer = torch.optim.Adam(
        [{"params": group} for group in groups if group], betas=(0.9, 0.99)
    )
    plan = make_plan(
        len(data), batch=settings.batch, epochs=settings.epochs, warmup_epochs=0, accumulate=1
    )
    total = plan.total_steps

    def set_rates(step: int) -> None:
        share = min((step + 1) / max(WARMUP * total, 1.0), 1.0)
        share *= cosine(step / total, settings.final_share)
        rates = (settings.learning_rate, settings.scale_learning_rate)
        for group, rate in zip(optimizer.param_groups, rates, strict=False):
            group["lr"] = rate * share

    scaler = torch.amp.GradScaler(device.type, enabled=False)
    return Task(
        name="qat",
        subject=start.arch.name,
        identity=_identity(start, settings, data),
        seed=settings.seed,
        plan=plan,
        plain_epochs=settings.epochs,
        data=data,
        augmentation=settings.augmentation,
        processes=Processes(0, 1, device),
        network=student,
        learner=Learner(student, None, optimizer, scaler, torch.zeros(len(PARTS), device=device)),
        losses=_losses(start, settings, student, device),
        set_rates=set_rates,
        line=_line,
    )


def _losses(
    start: Start, settings: QatSettings, student: GraphNetwork, device: torch.device
) -> Callable[[Tensor, Targets, float], StepLosses]:
    teacher = start.teacher(device) if settings.distillation else None
    detection = dataclasses.replace(default_losses(start.arch), warmup_epochs=0)

    def losses(images: Tensor, targets: Targets, epoch: float) -> StepLosses:
        guides: Sequence[Tensor] = ()
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            levels, features = student(images)
            if teacher is not None:
                with torch.no_grad():
                    _, guides = teacher(images)
        found = detection_loss(levels, start.arch, targets, detection, epoch=epoch).total
        total, distilled = found, torch.zeros_like(found)
        if teacher is not None:
            each = [
                channel_divergence(
                    own, guide, settings.temperature, relative=settings.distill_relative
                )
                for own, guide in zip(features, guides, strict=True)
            ]
            distilled = settings.distill_weight * torch.stack(each).sum()
            total = found + distilled
        return StepLosses(total, torch.stack([total, found, distilled]).detach())

    return losses


def _line(epoch: int, means: Sequence[float], seconds: float) -> dict[str, Any]:
    named = {f"loss_{name}": value for name, value in zip(PARTS[1:], means[1:], strict=True)}
    return {"epoch": epoch, "loss": means[0], **named, "seconds": seconds}


def _identity(start: Start, settings: QatSettings, data: TrainingSet) -> list[Any]:
    """Return all that decides the result: only a training of the same may go on from a state."""
    table = start.quantized.table
    return [
        settings.to_json(),
        dataclasses.asdict(table.key),
        table.variant,
        start.quantization.placement.float_layers,
        sorted(start.quantization.weight_bits.items()),
        (data.labels_sha256, data.image_size),
    ]


def _restored(path: Path | None, task: Task) -> Progress:
    """Go on from a state if it is there, of the same settings; return how far it had come."""
    if path is None or not path.is_file():
        return Progress()
    state = read_state(path)
    if state["settings"] != json.loads(json.dumps(task.identity)):
        raise UserError(
            f"{path} is of a training of another network, on other data or with other settings; "
            "give those it began with, or another `state_file`.",
        )
    return restore(state, task.learner)


@contextlib.contextmanager
def _convolutions(device: torch.device, *, exact: bool) -> Iterator[None]:
    """Choose cuDNN's arithmetic for convolutions: TF32 to train, float32 to evaluate."""
    chosen = torch.backends.cudnn
    before = chosen.benchmark, chosen.allow_tf32
    if device.type == "cuda":
        chosen.benchmark, chosen.allow_tf32 = True, not exact
    try:
        yield
    finally:
        if device.type == "cuda":
            chosen.benchmark, chosen.allow_tf32 = before
