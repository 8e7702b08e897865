"""Where a training stands, written whole while it runs: what a resumed one goes on from.

Orders, augmentation and learning rates are functions of the step (see `schedule`), so the state is
tensors, the number of the next step and what has been seen so far.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trt_yolov6.common.files import atomic_path
from trt_yolov6.errors import UserError
from trt_yolov6.training.ema import WeightAverage

STATE_FILE = "state.pt"
FORMAT = "trt-yolov6 training state"
VERSION = 1

_COUNTER = "num_batches_tracked"


@dataclass
class Progress:
    """Progress of a training; changed in place."""

    step: int = 0
    """The next step, from 0."""
    best_ap: float | None = None
    best_epoch: int = 0
    """Epoch of the best AP, from 1; 0 before the first evaluation."""
    epoch_seconds: float = 0.0
    """Time that the steps of the present epoch have taken so far."""


@dataclass(frozen=True)
class Learner:
    """All that learns: the tensors of a state."""

    model: nn.Module
    average: WeightAverage
    optimizer: torch.optim.SGD
    scaler: torch.amp.GradScaler
    sums: Tensor
    """float32 (parts,), on the device: sums of the losses of the present epoch's steps."""


def save_state(
    folder: Path, learner: Learner, progress: Progress, settings: dict[str, Any]
) -> None:
    """Write the state between two steps, right after one of the optimizer.

    Raises:
        UserError: it cannot be written.
    """
    content = {
        "format": FORMAT,
        "version": VERSION,
        "settings": json.dumps(settings, sort_keys=True),
        "progress": json.dumps(progress.__dict__),
        "model": _tensors(learner.model),
        "average": _tensors(learner.average.model),
        "average_updates": learner.average.updates,
        "optimizer": learner.optimizer.state_dict(),
        "scaler": learner.scaler.state_dict(),
        "sums": learner.sums,
        "cpu_generator": torch.get_rng_state(),
        "cuda_generator": (
            torch.cuda.get_rng_state(learner.sums.device) if learner.sums.is_cuda else None
        ),
    }
    with atomic_path(folder / STATE_FILE) as temporary, temporary.open("wb") as file:
        torch.save(content, file)


def read_state(folder: Path) -> dict[str, Any]:
    """Read the state in a run's folder, its tensors in host memory.

    Raises:
        UserError: there is none, or it is damaged or of another version.
    """
    path = folder / STATE_FILE
    if not path.is_file():
        raise UserError(
            f"{folder} holds no {STATE_FILE}, so there is nothing to resume; name the folder of an "
            "interrupted training as --output, or leave --resume out."
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content["format"] != FORMAT or content["version"] != VERSION:
            raise ValueError("another format")
        content["progress"] = Progress(**json.loads(content["progress"]))
        content["settings"] = json.loads(content["settings"])
    except Exception as error:  # torch.load raises anything for a damaged file
        raise UserError(
            f"{path} is damaged or of another version; start the training again, in another folder."
        ) from error
    state: dict[str, Any] = content
    return state


def restore(state: dict[str, Any], learner: Learner) -> Progress:
    """Put a state's tensors in place and return how far it had come.

    Raises:
        UserError: the state is of another network.
    """
    try:
        _fill(learner.model, state["model"])
        _fill(learner.average.model, state["average"])
        learner.average.updates = state["average_updates"]
        learner.optimizer.load_state_dict(state["optimizer"])
        if learner.scaler.is_enabled():
            learner.scaler.load_state_dict(state["scaler"])
        learner.sums.copy_(state["sums"])
        torch.set_rng_state(state["cpu_generator"])
        if learner.sums.is_cuda and state["cuda_generator"] is not None:
            torch.cuda.set_rng_state(state["cuda_generator"], learner.sums.device)
    except (KeyError, RuntimeError, ValueError, TypeError, OverflowError) as error:
        raise UserError(
            f"the state does not fit the network ({str(error).splitlines()[0][:120]}); start the "
            "training again."
        ) from error
    progress: Progress = state["progress"]
    return progress


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return a network's tensors by name, without the counters that only some forms of it have."""
    state = model.state_dict()
    return {name: tensor for name, tensor in state.items() if not name.endswith(_COUNTER)}


def _fill(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    missing, surplus = model.load_state_dict(tensors, strict=False)
    lost = [name for name in [*missing, *surplus] if not name.endswith(_COUNTER)]
    if lost:
        raise KeyError(lost[0])


def sweep(folder: Path) -> None:
    """Delete what a kill left half-written next to the files of a run."""
    for name in ("state", "last", "best", "log", "settings"):
        for leftover in folder.glob(f".{name}.*"):
            leftover.unlink(missing_ok=True)
