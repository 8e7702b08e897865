"""The training itself: steps, evaluations, checkpoints. What each of them is stands elsewhere.

schedule -> order, rates        dataset -> batches        losses -> what is minimized
optimizer, ema -> weights       torch_engine -> AP        run_state -> resuming
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from trt_yolov6.checkpoints.loading import load_checkpoint
from trt_yolov6.checkpoints.native import Training, write_checkpoint
from trt_yolov6.common.files import read_json, write_json
from trt_yolov6.common.progress import is_logged
from trt_yolov6.data.coco import CocoDataset, load_coco
from trt_yolov6.errors import UserError
from trt_yolov6.models.blocks import BN_MOMENTUM
from trt_yolov6.models.network import YOLOv6
from trt_yolov6.runtime.evaluate import Evaluation, evaluate
from trt_yolov6.spec import PredictOptions
from trt_yolov6.training.dataset import TrainingSet, load_training_set
from trt_yolov6.training.distributed import Processes, joined, with_common_statistics
from trt_yolov6.training.ema import WINDOW, WeightAverage, average_for
from trt_yolov6.training.initialization import starting_model
from trt_yolov6.training.log import RunLog, read_log
from trt_yolov6.training.losses import Losses, detection_loss
from trt_yolov6.training.optimizer import make_optimizer, set_rates
from trt_yolov6.training.recipe import TrainSettings, search_settings, settings_from_json
from trt_yolov6.training.schedule import (
    LOSS_BATCH,
    Plan,
    derived_seed,
    epoch_order,
    evaluation_epochs,
    is_last_phase,
    make_plan,
)
from trt_yolov6.training.state import Learner, Progress, read_state, restore, save_state, sweep
from trt_yolov6.training.targets import Targets
from trt_yolov6.training.torch_engine import TorchEngine

SETTINGS_FILE = "settings.json"
BEST_FILE = "best.pt"
LAST_FILE = "last.pt"
DATA_REPORT_FILE = "bad_data.json"
SEARCH_FOLDER = "search"
"""Folder of RepOptimizer's hyper-search, inside the run's."""

PARTS = ("total", "class", "box", "dfl", "objectness", "distill_class", "distill_box")
"""The losses that are logged."""


@dataclass(frozen=True)
class TrainResult:
    """Result of a training."""

    folder: Path
    last: Path
    """The checkpoint of the last epoch."""
    best: Path | None
    """The checkpoint of the highest AP; None where nothing was evaluated."""
    last_ap: float | None
    best_ap: float | None
    best_epoch: int
    """Epoch of the best AP, from 1; 0 where nothing was evaluated."""
    epochs: int
    epoch_seconds: float
    """Median time of an epoch's steps, without evaluation."""
    wall_seconds: float
    """Time of this process's part in all."""
    notes: tuple[str, ...]
    """Human-readable notes on initialization and data."""
    log: tuple[dict[str, Any], ...] = field(repr=False, default=())
    """The lines of the log, one an epoch."""

    def to_json(self) -> dict[str, Any]:
        """Return a dictionary ready for `json.dumps`; paths as text, an AP that is not is null."""
        return {
            "last": str(self.last),
            "best": None if self.best is None else str(self.best),
            "AP": self.last_ap,
            "best_AP": self.best_ap,
            "best_epoch": self.best_epoch,
            "epochs": self.epochs,
            "epoch_s": self.epoch_seconds,
            "wall_s": self.wall_seconds,
            "notes": list(self.notes),
            "log": list(self.log),
        }


@dataclass(frozen=True)
class _Run:
    """The constant parts of a training run."""

    settings: TrainSettings
    folder: Path
    processes: Processes
    plan: Plan
    data: TrainingSet
    validation: CocoDataset | None
    network: nn.Module
    """Maps images to raw levels; in several processes, its gradients are averaged."""
    model: YOLOv6
    """The same network, bare."""
    teacher: YOLOv6 | None
    learner: Learner
    autocast: torch.dtype | None
    progress: bool
    log_line: Callable[[str], None] | None = None
    """Off a terminal: takes a header and a line an epoch."""


def train(
    settings: TrainSettings,
    output_dir: str | Path,
    *,
    device: str | None = None,
    resume: bool | Literal["auto"] = False,
    progress: bool = True,
    state_seconds: float = 30.0,
    tell: Callable[[str], None] | None = None,
) -> TrainResult:
    """Train a network and write its checkpoints.

    Writes into the folder: `last.pt` and `best.pt` (the moving average of the weights, for
    `build`), `log.jsonl`, `settings.json`, `state.pt` (to resume from) and TensorBoard's files.
    Under torchrun, every process calls this with the same arguments, and the first one writes.
    With RepOptimizer and no scales yet, the search for them comes first, as a training of its own
    in the folder `search` inside.

    Args:
        settings: all that decides the result; see `recipe.recipe_for`.
        output_dir: the run's folder; must not hold another run.
        device: `cpu`, `cuda` or `cuda:N`; None takes a GPU where there is one.
        resume: go on from the folder's state; the settings must be the same. On a CPU the weights
            end bit for bit as if nothing had happened. `auto` resumes where the folder holds a
            training, and begins one where it does not: for schedulers that repeat a command.
        progress: show a progress bar on stderr; without a terminal, `tell` gets a line per epoch.
        state_seconds: least time between two writings of the state, after a step of the optimizer;
            whatever has been done since the last is done again after a kill.
        tell: called with sentences about the start and the data.

    Raises:
        UserError: bad settings, data or checkpoint, a folder in use, or training diverged.
    """
    start = time.perf_counter()
    folder = Path(output_dir)
    with joined(device) as processes, _arithmetic(settings, processes):
        notes: list[str] = []
        speak = tell if tell is not None and processes.is_first else None

        def note(sentence: str) -> None:
            notes.append(sentence)
            if speak is not None:
                speak(sentence)

        if resume == "auto":
            resume = processes.of_first((folder / SETTINGS_FILE).exists())
        state = _open_folder(folder, settings, resume, processes)
        scales = None
        if settings.rep_optimizer is not None:
            scales = settings.rep_optimizer.scales or _search(
                settings, folder, processes, note, state, resume, progress, state_seconds
            )
        run = _prepare(
            settings, folder, processes, progress and processes.is_first, note, scales=scales
        )
        if is_logged(progress):
            run = dataclasses.replace(run, log_line=speak)
        result = _trained(run, state, state_seconds)
        return dataclasses.replace(
            result, wall_seconds=time.perf_counter() - start, notes=tuple(notes)
        )


def _search(
    settings: TrainSettings,
    folder: Path,
    processes: Processes,
    note: Callable[[str], None],
    state: dict[str, Any] | None,
    resume: bool,
    progress: bool,
    state_seconds: float,
) -> Path:
    """Do RepOptimizer's hyper-search, or what is left of it; return its checkpoint.

    The last one: scales are what a whole training makes of them, whatever the AP on the way.
    """
    place = folder / SEARCH_FOLDER
    last, wanted = place / LAST_FILE, search_settings(settings)
    if state is not None:
        return last
    again = resume and (place / SETTINGS_FILE).exists()
    if again and last.exists():
        training = load_checkpoint(last).training
        if training is not None and training.epoch == wanted.epochs:
            return last
    state = _open_folder(place, wanted, again, processes)
    run = _prepare(wanted, place, processes, progress and processes.is_first, note)
    if is_logged(progress) and processes.is_first:
        run = dataclasses.replace(run, log_line=print)
    if processes.is_first:
        write_json(folder / SETTINGS_FILE, settings.to_json())
    result = _trained(run, state, state_seconds)
    ap = "" if result.last_ap is None else f", AP {result.last_ap:.4f}"
    note(f"the search for scales is over after {wanted.epochs} epochs{ap}.")
    return last


def _trained(run: _Run, state: dict[str, Any] | None, state_seconds: float) -> TrainResult:
    """Train to the end, from a state or from the start; notes are the caller's to add."""
    folder, settings = run.folder, run.settings
    done = Progress() if state is None else restore(state, run.learner)
    # Only now: what cannot be trained leaves no run.
    if run.processes.is_first:
        write_json(folder / SETTINGS_FILE, settings.to_json())
    start = time.perf_counter()
    _train_steps(run, done, state_seconds)
    lines = read_log(folder) if run.processes.is_first else []
    times = [line["seconds"] for line in lines]
    return TrainResult(
        folder=folder,
        last=folder / LAST_FILE,
        best=folder / BEST_FILE if done.best_epoch else None,
        last_ap=lines[-1].get("AP") if lines else None,
        best_ap=done.best_ap,
        best_epoch=done.best_epoch,
        epochs=settings.epochs,
        epoch_seconds=statistics.median(times) if times else 0.0,
        wall_seconds=time.perf_counter() - start,
        notes=(),
        log=tuple(lines),
    )


def stored_settings(folder: str | Path) -> TrainSettings:
    """Return the settings of the run in a folder.

    Raises:
        UserError: there is no run, or one of another version.
    """
    path = Path(folder) / SETTINGS_FILE
    if not path.is_file():
        raise UserError(
            f"{folder} holds no training; name the folder of an interrupted one as --output."
        )
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no settings of a training; start the training again.")
    return settings_from_json(value, str(path))


# --- preparing


@contextlib.contextmanager
def _arithmetic(settings: TrainSettings, processes: Processes) -> Iterator[None]:
    """Choose PyTorch's algorithms for the run, and put back the choice of before."""
    before = (
        torch.backends.cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.backends.cudnn.benchmark = processes.device.type == "cuda" and not settings.deterministic
    if settings.deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before[0]
        torch.use_deterministic_algorithms(before[1], warn_only=before[2])


def _open_folder(
    folder: Path, settings: TrainSettings, resume: bool, processes: Processes
) -> dict[str, Any] | None:
    """Return the state of the run in the folder; None for a new run, or one without a state."""
    stored = folder / SETTINGS_FILE
    if resume:
        kept = stored_settings(folder)
        differing = _differences(kept.to_json(), json.loads(json.dumps(settings.to_json())))
        if differing:
            raise UserError(
                f"the run in {folder} was started with another {differing[0]}; resume it with the "
                "settings it has, or start again in another folder."
            )
        # A kill before the first state leaves nothing to go on from: it starts again.
        state = read_state(folder) if (folder / "state.pt").exists() else None
        processes.wait()
        if processes.is_first:
            sweep(folder)
        return state
    if stored.exists() or (folder / LAST_FILE).exists():
        raise UserError(
            f"{folder} holds a training already; give another --output, or --resume to go on."
        )
    return None


def _differences(one: dict[str, Any], other: dict[str, Any], prefix: str = "") -> list[str]:
    """Return the names of the fields in which two settings differ."""
    found = []
    for name in one.keys() | other.keys():
        a, b = one.get(name), other.get(name)
        a, b = (list(value) if isinstance(value, tuple) else value for value in (a, b))
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f"{prefix}{name}.")
        elif a != b:
            found.append(prefix + name)
    return sorted(found)


def _prepare(
    settings: TrainSettings,
    folder: Path,
    processes: Processes,
    progress: bool,
    note: Callable[[str], None],
    *,
    scales: str | Path | None = None,
) -> _Run:
    if settings.batch % processes.world:
        raise UserError(
            f"a batch of {settings.batch} cannot be shared equally by {processes.world} processes; "
            "give a --batch that can."
        )
    device = processes.device
    if settings.compile and device.type != "cuda":
        # PyTorch 2.13: the compiled backward pass of this network corrupts memory on a CPU.
        raise UserError("--compile is for a GPU; leave it out on a CPU.")
    validation = (
        None if settings.val_split is None else load_coco(settings.data, settings.val_split)
    )
    data = load_training_set(
        settings.data,
        settings.train_split,
        settings.image_size,
        device,
        on_bad_data=settings.on_bad_data,
        progress=progress,
        report_file=folder / DATA_REPORT_FILE if processes.is_first else None,
        class_names=load_checkpoint(settings.weights).class_names if settings.weights else None,
    )
    if validation is not None and set(validation.class_names) != set(data.class_names):
        raise UserError(
            f"the splits {settings.train_split} and {settings.val_split} of {settings.data} have "
            "different classes; make their categories agree."
        )
    if data.report.problems:
        note(
            f"{len(data.report.problems)} problems of the data were left out of training; see "
            f"{folder / DATA_REPORT_FILE}."
        )
    start = starting_model(settings, data.class_names, scales=scales)
    for sentence in start.notes:
        note(sentence)
    model = start.model.train()
    model = _placed(model, device)
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
    teacher = _teacher(settings, model, data.class_names, device)
    if settings.common_statistics:
        with_common_statistics(model, processes)
    network: nn.Module = _Levels(model)
    if settings.compile:
        network = torch.compile(network)  # type: ignore[assignment]
    if processes.world > 1:
        network = DistributedDataParallel(
            network,
            device_ids=[device.index] if on_gpu else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )
    sums = torch.zeros(len(PARTS), device=device)
    return _Run(
        settings=settings,
        folder=folder,
        processes=processes,
        plan=plan,
        data=data,
        validation=validation,
        network=network,
        model=model,
        teacher=teacher,
        learner=Learner(model, average, optimizer, scaler, sums),
        autocast=autocast,
        progress=progress,
    )


class _Levels(nn.Module):
    """The network with `raw` as its forward, which is what wrappers wrap."""

    def __init__(self, model: YOLOv6) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> list[tuple[Tensor, ...]]:
        return self.model.raw(images)


def _set_normalizations(model: nn.Module, plan: Plan) -> None:
    """Take out the step counters, a hundred tiny kernels a step, and keep up in short trainings.

    Running statistics trail the weights by 1 / momentum steps: 33 with the authors' constant. In a
    training of 150 steps, that alone would take all of the accuracy; so they trail by no larger a
    share of it than the average of the weights does.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.num_batches_tracked = None
            least = 1 / max(WINDOW * plan.total_steps, 2.0)
            module.momentum = max(module.momentum or BN_MOMENTUM, least)


def _placed(model: YOLOv6, device: torch.device) -> YOLOv6:
    if device.type != "cuda":
        return model
    placed: YOLOv6 = model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return placed


def _autocast_type(settings: TrainSettings, device: torch.device) -> torch.dtype | None:
    """Return the type that convolutions compute in; None for float32."""
    precision = settings.precision
    if precision == "auto":
        if device.type != "cuda":
            return None
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if native else "fp16"
    if precision == "fp16" and device.type != "cuda":
        raise UserError("--precision fp16 needs a GPU; give bf16 or fp32 on a CPU.")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[precision]


def _teacher(
    settings: TrainSettings, student: YOLOv6, class_names: tuple[str, ...], device: torch.device
) -> YOLOv6 | None:
    if settings.teacher is None:
        return None
    checkpoint = load_checkpoint(settings.teacher)
    arch = checkpoint.arch
    if checkpoint.class_names != class_names:
        raise UserError(
            f"the teacher {checkpoint.path} knows other classes than the data set; train one on it."
        )
    if (arch.reg_max, arch.head) != (student.arch.reg_max, student.arch.head):
        raise UserError(
            f"the teacher {checkpoint.path} predicts boxes in another way than the student; give "
            "one with the same head and the same DFL bins."
        )
    return _placed(checkpoint.model, device).eval().requires_grad_(False)


# --- training


def _train_steps(run: _Run, done: Progress, state_seconds: float) -> None:
    """Do the steps from `done.step` to the last, and what belongs between the epochs."""
    settings, plan = run.settings, run.plan
    last_epochs = min(settings.plain_epochs, settings.epochs)
    evaluated = set(evaluation_epochs(settings.epochs, settings.eval_interval, last_epochs))
    first_epoch = done.step // plan.steps_per_epoch
    with contextlib.ExitStack() as stack:
        log = None
        if run.processes.is_first:
            log = stack.enter_context(RunLog(run.folder, from_epoch=first_epoch))
        what = "search" if run.model.arch.block == "scaled" else "train"
        bar = stack.enter_context(
            tqdm(
                total=plan.total_steps,
                initial=done.step,
                desc=what,
                unit="step",
                disable=None if run.progress else True,
            )
        )
        saver = _Saver(run, state_seconds)
        if run.log_line is not None:
            run.log_line(_header(run, done, what))
        for epoch in range(first_epoch, settings.epochs):
            _train_epoch(run, done, epoch, bar, saver)
            line = _epoch_line(run, done, epoch)
            if run.processes.is_first:
                assert log is not None
                _finish_epoch(run, done, epoch, line, evaluate_it=epoch in evaluated)
                log.write(line)
                saver.save(done, now=epoch in evaluated or epoch + 1 == settings.epochs)
                bar.set_postfix_str(_postfix(line, done))
                if run.log_line is not None:
                    run.log_line(f"{_postfix(line, done)}, of {settings.epochs} epochs")
            run.processes.wait()


class _Saver:
    """Writes the state, not too often."""

    def __init__(self, run: _Run, seconds: float) -> None:
        self._run = run
        self._seconds = seconds
        self._settings = run.settings.to_json()
        self._last = time.monotonic()

    def save(self, done: Progress, *, now: bool = False) -> None:
        """Write it if it is time, or `now`; only in the first process."""
        if not self._run.processes.is_first:
            return
        if now or time.monotonic() - self._last >= self._seconds:
            save_state(self._run.folder, self._run.learner, done, self._settings)
            self._last = time.monotonic()


def _train_epoch(run: _Run, done: Progress, epoch: int, bar: Any, saver: _Saver) -> None:
    """Do the epoch's steps that are not done yet; nothing in it waits for the device."""
    settings, plan, learner = run.settings, run.plan, run.learner
    order = epoch_order(plan, epoch, settings.seed)
    strong = not is_last_phase(epoch, settings.epochs, settings.plain_epochs)
    generator = torch.Generator()
    begun = epoch * plan.steps_per_epoch
    clock = time.perf_counter()
    spent = done.epoch_seconds
    if done.step == begun:
        learner.sums.zero_()
        spent = 0.0
    for step in range(done.step, begun + plan.steps_per_epoch):
        set_rates(learner.optimizer, settings.optimizer, plan, step)
        generator.manual_seed(derived_seed(settings.seed, "batch", step))
        place = (step - begun) * plan.batch
        images, targets = run.data.batch(
            order[place : place + plan.batch],
            settings.augmentation,
            generator,
            strong=strong,
            share=run.processes.share,
        )
        update = plan.updates[step]
        losses = _backward(run, images, targets, step / plan.steps_per_epoch, update=update)
        learner.sums.add_(_parts(losses))
        if update:
            _update(run)
        bar.update()
        done.step = step + 1
        if update and step + 1 < begun + plan.steps_per_epoch:
            done.epoch_seconds = spent + time.perf_counter() - clock
            saver.save(done)
    if learner.sums.is_cuda:
        torch.cuda.synchronize(learner.sums.device)
    done.epoch_seconds = spent + time.perf_counter() - clock


def _backward(run: _Run, images: Tensor, targets: Targets, epoch: float, *, update: bool) -> Losses:
    """Add the gradients of a batch to those that are there."""
    settings, device = run.settings, run.processes.device
    if device.type == "cuda":
        images = images.contiguous(memory_format=torch.channels_last)
    mixed = torch.autocast(device.type, run.autocast, enabled=run.autocast is not None)
    # Gradients are exchanged once, before the optimizer's step.
    alone = contextlib.nullcontext()
    quiet = (
        run.network.no_sync()
        if isinstance(run.network, DistributedDataParallel) and not update
        else alone
    )
    with quiet:
        with mixed:
            levels = run.network(images)
            taught = None
            if run.teacher is not None:
                with torch.no_grad():
                    taught = run.teacher.raw(images)
        losses = detection_loss(
            levels,
            run.model.arch,
            targets,
            settings.losses,
            image_size=settings.image_size,
            epoch=epoch,
            teacher_levels=taught,
            distillation=settings.distillation,
            reduce_mean=run.processes.mean if run.processes.world > 1 else None,
        )
        # The learning rate is meant for the sum of the gradients of 32 images each.
        scaled = losses.total * (run.plan.batch / LOSS_BATCH)
        run.learner.scaler.scale(scaled).backward()  # type: ignore[no-untyped-call]
    return losses


def _update(run: _Run) -> None:
    """Step the optimizer with the gradients that are there, and the average after it."""
    learner, limit = run.learner, run.settings.optimizer.clip_norm
    if limit is not None:
        learner.scaler.unscale_(learner.optimizer)
        nn.utils.clip_grad_norm_(run.model.parameters(), limit)
    learner.scaler.step(learner.optimizer)
    learner.scaler.update()
    learner.optimizer.zero_grad(set_to_none=True)
    learner.average.update()


def _parts(losses: Losses) -> Tensor:
    """Return the losses of a step in the order of `PARTS`: float32, on the device."""
    zero = torch.zeros_like(losses.total)
    return torch.stack(
        [losses.total.detach(), *(losses.parts.get(name, zero).float() for name in PARTS[1:])]
    )


# --- between the epochs


def _epoch_line(run: _Run, done: Progress, epoch: int) -> dict[str, Any]:
    """Return the log's line of an epoch, of the mean losses of all processes.

    Raises:
        UserError: the loss is not finite any more.
    """
    plan = run.plan
    means = (run.processes.mean(run.learner.sums) / plan.steps_per_epoch).tolist()
    total = means[0]
    if total != total or total in (float("inf"), float("-inf")):
        raise UserError(
            f"the loss is not a finite number in epoch {epoch + 1}: training diverged; lower --lr, "
            "or start from other --weights."
        )
    named = dict(zip(PARTS, means, strict=True))
    shown = {f"loss_{name}": value for name, value in named.items() if name != "total"}
    images = plan.steps_per_epoch * plan.batch
    return {
        "epoch": epoch + 1,
        "loss": total,
        **{name: value for name, value in shown.items() if value},
        "learning_rate": run.learner.optimizer.param_groups[0]["lr"],
        "seconds": done.epoch_seconds,
        "images_per_second": images / max(done.epoch_seconds, 1e-9),
    }


def _finish_epoch(
    run: _Run, done: Progress, epoch: int, line: dict[str, Any], *, evaluate_it: bool
) -> None:
    """Evaluate the averaged weights if it is time, and write the checkpoints; adds to the line."""
    final = epoch + 1 == run.settings.epochs
    if not evaluate_it and not final:
        return
    result = _evaluation(run)
    ap = None
    if result is not None:
        ap = result.ap if result.ap is not None else 0.0
        line["AP"], line["AP50"] = ap, result.ap50
        line["evaluation_seconds"] = result.wall_seconds
    _write(run, LAST_FILE, epoch + 1, ap)
    if ap is not None and (done.best_ap is None or ap > done.best_ap):
        done.best_ap, done.best_epoch = ap, epoch + 1
        _write(run, BEST_FILE, epoch + 1, ap)


def _evaluation(run: _Run) -> Evaluation | None:
    if run.validation is None:
        return None
    settings = run.settings
    with TorchEngine(
        run.learner.average.model,
        run.data.class_names,
        settings.image_size,
        half=run.autocast is not None and run.processes.device.type == "cuda",
        name=LAST_FILE,
    ) as engine:
        return evaluate(
            engine,
            run.validation,
            PredictOptions(batch=min(max(settings.batch, 1), 32), border=settings.eval_border),
            progress=False,
        )


def _write(run: _Run, name: str, epoch: int, ap: float | None) -> None:
    training = Training(run.settings.to_json(), epoch, ap)
    write_checkpoint(run.folder / name, run.learner.average.model, run.data.class_names, training)


def _header(run: _Run, done: Progress, what: str) -> str:
    settings = run.settings
    begun = done.step // run.plan.steps_per_epoch
    after = f", {begun} of them done" if begun else ""
    return (
        f"{what}: {settings.variant} on {len(run.data)} images at {settings.image_size} pixels, "
        f"{settings.epochs} epochs{after} of {run.plan.steps_per_epoch} steps, batch "
        f"{settings.batch}, on {run.processes.device}; a line an epoch"
    )


def _postfix(line: dict[str, Any], done: Progress) -> str:
    text = f"epoch {line['epoch']}, loss {line['loss']:.3f}, {line['seconds']:.2f} s/epoch"
    return text if done.best_ap is None else f"{text}, best AP {done.best_ap:.4f}"
