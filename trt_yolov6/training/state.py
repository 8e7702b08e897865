"""State of a training, written whole while it runs, which a resumed one continues from.

Orders, augmentation and learning rates are functions of the step (see `schedule`), so the state is
tensors, the number of the next step and what has been seen so far.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trt_yolov6.checkpoints.native import write_torch
from trt_yolov6.errors import UserError, first_line
from trt_yolov6.training.ema import WeightAverage

STATE_FILE = "state.pt"
FORMAT = "trt-yolov6 training state"
VERSION = 1


@dataclass
class Progress:
    """Progress of a training; changed in place."""

    images: int = 0
    """Images of the training split, by whose number steps make epochs; 0 where it is not known."""
    inputs: dict[str, str] = field(default_factory=dict)
    """SHA-256 of what else decides the result, by what messages call it."""
    step: int = 0
    """The next step, from 0."""
    best_ap: float | None = None
    best_epoch: int = 0
    """Epoch of the best AP, from 1; 0 before the first evaluation."""
    epoch_seconds: float = 0.0
    """Time that the steps of the present epoch have taken so far."""
    log: list[dict[str, Any]] = field(default_factory=list)
    """Lines of the log, of the epochs that are over."""


@dataclass(frozen=True)
class Learner:
    """Everything that learns: the tensors of a state."""

    model: nn.Module
    average: WeightAverage | None
    """Moving average of the weights; None without one."""
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    sums: Tensor
    """float32 (parts,), on the device: sums of the losses of the present epoch's steps."""


def save_state(
    path: Path, learner: Learner, progress: Progress, settings: Mapping[str, Any] | Sequence[Any]
) -> None:
    """Write the state between two steps, right after one of the optimizer.

    `settings` is all that decides the result, ready for `json.dumps`.

    Raises:
        UserError: it cannot be written.
    """
    average = learner.average
    content = {
        "format": FORMAT,
        "version": VERSION,
        "settings": json.dumps(settings, sort_keys=True),
        "progress": json.dumps(progress.__dict__),
        "model": dict(learner.model.state_dict()),
        "average": None if average is None else dict(average.model.state_dict()),
        "average_updates": 0 if average is None else average.updates,
        "optimizer": learner.optimizer.state_dict(),
        "scaler": learner.scaler.state_dict(),
        "sums": learner.sums,
        "cpu_generator": torch.get_rng_state(),
        "cuda_generator": (
            torch.cuda.get_rng_state(learner.sums.device) if learner.sums.is_cuda else None
        ),
    }
    write_torch(path, content)


def read_state(path: Path) -> dict[str, Any]:
    """Read a state, its tensors in host memory.

    Raises:
        UserError: it is damaged or of another version.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content["format"] != FORMAT or content["version"] != VERSION:
            raise ValueError("another format")
        content["progress"] = Progress(**json.loads(content["progress"]))
        content["settings"] = json.loads(content["settings"])
    except Exception as error:  # torch.load raises anything for a damaged file
        raise UserError(
            f"{path} is damaged or of another version; delete it to start again."
        ) from error
    return content


def restore(state: dict[str, Any], learner: Learner) -> Progress:
    """Put a state's tensors in place and return how far it had come.

    Raises:
        UserError: the state is of another network.
    """
    try:
        _fill(learner.model, state["model"])
        if learner.average is not None:
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
            f"the state does not fit the network ({first_line(error, 120)}); start the "
            "training again."
        ) from error
    return state["progress"]


def _fill(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    unlike = model.state_dict().keys() ^ tensors.keys()
    if unlike:
        raise KeyError(min(unlike))
    # Strict, PyTorch would ask for the counters of normalizations, which training takes out.
    model.load_state_dict(tensors, strict=False)


def sweep(folder: Path) -> None:
    """Delete what a kill left half-written next to the files of a run."""
    for name in ("state", "last", "best", "log", "settings"):
        for leftover in folder.glob(f".{name}.*"):
            leftover.unlink(missing_ok=True)
