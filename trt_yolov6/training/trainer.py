"""`train`: a run's folder, RepOptimizer's search, evaluations and checkpoints around the loop.

initialization, dataset, losses, optimizer ─▶ detection_task ─▶ loop ─▶ checkpoints, log, state
"""

from __future__ import annotations

import contextlib
import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from trt_yolov6.checkpoints.loading import load_checkpoint
from trt_yolov6.checkpoints.native import Training, write_checkpoint
from trt_yolov6.common.files import read_json, sha256_file, sole_writer, write_json
from trt_yolov6.common.text import counted
from trt_yolov6.errors import UserError
from trt_yolov6.models.variants import architecture
from trt_yolov6.runtime.evaluate import evaluate
from trt_yolov6.spec import PredictOptions
from trt_yolov6.training.data_validation import read_split
from trt_yolov6.training.detection_task import (
    DetectionTask,
    arithmetic,
    detection_task,
    teacher_of,
)
from trt_yolov6.training.distributed import Processes, joined
from trt_yolov6.training.log import scalars, write_log
from trt_yolov6.training.loop import train_epochs
from trt_yolov6.training.recipe import (
    TrainSettings,
    adapted,
    differences,
    search_settings,
    settings_from_json,
)
from trt_yolov6.training.schedule import evaluation_epochs
from trt_yolov6.training.state import STATE_FILE, Progress, read_state, restore, sweep
from trt_yolov6.training.torch_engine import TorchEngine

_log = logging.getLogger(__name__)

SETTINGS_FILE = "settings.json"
BEST_FILE = "best.pt"
LAST_FILE = "last.pt"
SEARCH_FOLDER = "search"
"""Folder of RepOptimizer's hyper-search, inside the run's."""


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
class _Call:
    """Arguments of a call of `train` that do not decide the result."""

    processes: Processes
    resume: bool
    progress: bool
    """Show progress: in the first process, if wanted."""
    state_seconds: float


def train(
    settings: TrainSettings,
    output: str | Path,
    *,
    device: str | None = None,
    resume: bool | Literal["auto"] = False,
    progress: bool = True,
    state_seconds: float = 30.0,
) -> TrainResult:
    """Train a network and write its checkpoints.

    Writes into the folder: `last.pt` and `best.pt` (the moving average of the weights, for
    `build`), `log.jsonl`, `settings.json`, `state.pt` (to resume from) and TensorBoard's files.
    Under torchrun, every process calls this with the same arguments, and the first one writes.
    With RepOptimizer and no scales yet, the search for them comes first, as a training of its own
    in the folder `search` inside.

    Args:
        settings: all that decides the result; see `recipe.recipe_for`.
        output: the run's folder; must not hold another run.
        device: `cpu`, `cuda` or `cuda:N`; None takes a GPU where there is one.
        resume: go on from the folder's state; the settings must be the same. On a CPU the weights
            end bit for bit as if nothing had happened. `auto` resumes where the folder holds a
            training, and begins one where it does not: for schedulers that repeat a command.
        progress: show a progress bar on stderr; without a terminal, log a line per epoch.
        state_seconds: least time between two writings of the state, after a step of the optimizer;
            whatever has been done since the last is done again after a kill.

    Raises:
        UserError: bad settings, data or checkpoint, a folder in use, or training diverged.
    """
    start = time.perf_counter()
    folder = Path(output)
    with (
        joined(device) as processes,
        sole_writer(folder) if processes.is_first else contextlib.nullcontext(),
        arithmetic(settings, processes.device),
    ):
        if resume == "auto":
            resume = processes.of_first((folder / SETTINGS_FILE).exists())
        call = _Call(processes, resume, progress and processes.is_first, state_seconds)
        state = _open_folder(folder, settings, processes, resume=resume)
        notes: tuple[str, ...] = ()
        scales = None
        if settings.rep_optimizer is not None:
            scales = settings.rep_optimizer.scales
            if scales is None:
                scales, notes = _search(settings, folder, state, call)
        result = _trained(settings, folder, state, call, scales=scales)
        seconds = time.perf_counter() - start
        return replace(result, wall_seconds=seconds, notes=(*notes, *result.notes))


def _search(
    settings: TrainSettings, folder: Path, state: dict[str, Any] | None, call: _Call
) -> tuple[str, tuple[str, ...]]:
    """Do RepOptimizer's hyper-search, or what is left of it; return its checkpoint, and notes.

    The last one: scales are what a whole training makes of them, whatever the AP on the way.
    """
    place = folder / SEARCH_FOLDER
    last, wanted = place / LAST_FILE, search_settings(settings)
    if state is not None:
        return str(last), ()
    again = call.resume and (place / SETTINGS_FILE).exists()
    if again and last.exists():
        training = load_checkpoint(last).training
        if training is not None and training.epoch == wanted.epochs:
            return str(last), ()
    if settings.teacher is not None:  # refused before the search, not after it
        names = read_split(settings.data, settings.train_split).class_names
        teacher_of(settings, adapted(architecture(settings.variant), settings.architecture), names)
    state = _open_folder(place, wanted, call.processes, resume=again)
    # What cannot be trained leaves no run, so the whole one's settings follow the search's.
    result = _trained(wanted, place, state, call, settings_of={folder: settings})
    ap = "" if result.last_ap is None else f", AP {result.last_ap:.4f}"
    over = f"the search for scales is over after {counted(wanted.epochs, 'epoch')}{ap}."
    _noted((over,), call)
    return str(last), (*result.notes, over)


def _noted(notes: Sequence[str], call: _Call) -> None:
    """Log notes, in the first process."""
    for note in notes if call.processes.is_first else ():
        _log.info(note)


def _trained(
    settings: TrainSettings,
    folder: Path,
    state: dict[str, Any] | None,
    call: _Call,
    *,
    scales: str | Path | None = None,
    settings_of: Mapping[Path, TrainSettings] | None = None,
) -> TrainResult:
    """Train to the end, from a state or from the start.

    `settings_of` are settings to write into other folders, once it is certain that there is a run.
    """
    processes, start = call.processes, time.perf_counter()
    detector = detection_task(settings, folder, processes, progress=call.progress, scales=scales)
    _noted(detector.notes, call)
    images = len(detector.task.data)
    done = Progress(images) if state is None else restore(state, detector.task.learner)
    if done.images not in (0, images):  # 0: in states of early versions
        raise UserError(
            f"the run in {folder} was started with {counted(done.images, 'image')}, and "
            f"{settings.data} has {images} now; restore them, or start again in another folder."
        )
    inputs = _inputs(detector, scales)
    for what, sha256 in inputs.items():
        if done.inputs.get(what, sha256) != sha256:
            raise UserError(
                f"{what} has changed since the run in {folder} was started; restore it, or start "
                "again in another folder."
            )
    done.inputs = inputs
    # Only now: what cannot be trained leaves no run.
    if processes.is_first:
        for place, its in {**(settings_of or {}), folder: settings}.items():
            write_json(place / SETTINGS_FILE, its.to_json())
    _train(detector, folder, done, call)
    lines = done.log if processes.is_first else []
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
        notes=detector.notes,
        log=tuple(lines),
    )


def _inputs(detector: DetectionTask, scales: str | Path | None) -> dict[str, str]:
    """Return the hashes of what a resumed training reads again, by what messages call it.

    Not of the weights to start from: the state has what became of them.
    """
    settings, validation = detector.settings, detector.validation
    found = {f"{settings.data}, split {settings.train_split},": detector.task.data.labels_sha256}
    if validation is not None:
        found[f"{settings.data}, split {settings.val_split},"] = validation.labels_sha256
    for file in (settings.teacher, scales):
        if file is not None:
            found[str(file)] = sha256_file(file)
    return found


def _train(detector: DetectionTask, folder: Path, done: Progress, call: _Call) -> None:
    """Do the steps that are left; evaluate and write checkpoints where it is time."""
    settings, task = detector.settings, detector.task
    evaluated = set(
        evaluation_epochs(settings.epochs, settings.eval_interval, settings.last_plain_epochs)
    )
    first_epoch = done.step // task.plan.steps_per_epoch
    is_first = call.processes.is_first
    with scalars(folder, first_epoch) if is_first else contextlib.nullcontext() as add_scalars:

        def finish_epoch(epoch: int, line: dict[str, Any]) -> bool:
            assert add_scalars is not None
            if epoch in evaluated:
                _evaluate(detector, folder, done, line)
            write_log(folder, [*done.log, line])
            add_scalars(line)
            return epoch in evaluated

        train_epochs(
            task,
            done,
            state_file=folder / STATE_FILE,
            state_seconds=call.state_seconds,
            finish_epoch=finish_epoch,
            progress=call.progress,
        )


def stored_settings(folder: str | Path) -> TrainSettings:
    """Return the settings of the run in a folder.

    Raises:
        UserError: there is no run, or one of another version.
    """
    path = Path(folder) / SETTINGS_FILE
    if not path.is_file():
        raise UserError(
            f"{folder} holds no training; name the folder of an interrupted one as `output`.",
        )
    return settings_from_json(read_json(path), str(path))


def _open_folder(
    folder: Path, settings: TrainSettings, processes: Processes, *, resume: bool
) -> dict[str, Any] | None:
    """Return the state of the run in the folder; None for a new run, or one without a state."""
    if resume:
        kept = stored_settings(folder)
        differing = differences(kept, settings)
        if differing:
            raise UserError(
                f"the run in {folder} was started with another {differing[0]}; resume it with the "
                "settings it has, or start again in another folder."
            )
        # A kill before the first state leaves nothing to go on from: it starts again.
        file = folder / STATE_FILE
        state = read_state(file) if file.exists() else None
        processes.wait()
        if processes.is_first:
            sweep(folder)
        return state
    if any((folder / name).exists() for name in (SETTINGS_FILE, LAST_FILE)):
        raise UserError(
            f"{folder} holds a training already; give another `output`, or `resume` to go on.",
        )
    if (folder / BEST_FILE).exists():
        raise UserError(f"{folder} holds a {BEST_FILE} of another program; give another `output`.")
    return None


def _evaluate(detector: DetectionTask, folder: Path, done: Progress, line: dict[str, Any]) -> None:
    """Evaluate the averaged weights and write the checkpoints; adds to the epoch's line."""
    settings, model = detector.settings, detector.average.model
    class_names, epoch, ap = detector.task.data.class_names, line["epoch"], None
    if detector.validation is not None:
        size, half = settings.image_size, detector.half
        options = PredictOptions(batch=min(settings.batch, 32), border=settings.eval_border)
        with TorchEngine(model, class_names, size, half=half, name=LAST_FILE) as engine:
            result = evaluate(engine, detector.validation, options, progress=False)
        ap = result.ap
        line["AP"], line["AP50"] = ap, result.ap50
        line["evaluation_seconds"] = result.wall_seconds
    names = [LAST_FILE]
    if ap is not None and (done.best_ap is None or ap > done.best_ap):
        done.best_ap, done.best_epoch = ap, epoch
        names.append(BEST_FILE)
    training = Training(settings.to_json(), epoch, ap)
    for name in names:
        write_checkpoint(folder / name, model, class_names, training)
