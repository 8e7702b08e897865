"""Norms of the gradient in a training's first steps: where it breaks away, and what clipping does.

    python -m benchmarks.gradient_norms --model l --steps 45
    python -m benchmarks.gradient_norms --model l --steps 45 --set optimizer.clip_norm=10

Trains on fold 1 of BCCD as `benchmarks.ablations` does, but at 64 pixels by default: two cores
take two to ten seconds for a step of L. Prints a line for each step of the optimizer.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.folds import train_split, write_folds
from trt_yolov6.training import loop
from trt_yolov6.training.recipe import recipe_for, with_field
from trt_yolov6.training.trainer import train

FOLD = 1
"""The fold in which L diverged on a GPU; its seed is the fold's number."""


class _Enough(Exception):
    """All steps that were asked for are done."""


def norm_of_gradients(model: torch.nn.Module) -> float:
    """Return the Euclidean norm of all gradients together, as `clip_grad_norm_` takes it."""
    gradients = [one.grad for one in model.parameters() if one.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the first steps and print their norms."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/bccd"))
    parser.add_argument("--model", default="l")
    parser.add_argument("--imgsz", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=40, help="of the whole training (40)")
    parser.add_argument("--steps", type=int, default=45, help="of the optimizer, to do (45)")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--limit", type=int, help="number of images to take, for a try")
    options = parser.parse_args(arguments)
    real_backward, real_update = loop._backward, loop._update
    losses: list[float] = []
    done = 0

    def backward(*what: Any, **how: Any) -> Tensor:
        parts = real_backward(*what, **how)
        losses.append(float(parts[0]))
        return parts

    def update(task: loop.Task) -> None:
        nonlocal done
        done += 1
        norm = norm_of_gradients(task.learner.model)
        rate = task.learner.optimizer.param_groups[1]["lr"]
        mean = sum(losses) / len(losses)
        losses.clear()
        print(
            f"step {done}: norm {norm:.2f}, loss {mean:.3f}, learning rate {rate:.4f}", flush=True
        )
        if done >= options.steps:
            raise _Enough
        real_update(task)

    with tempfile.TemporaryDirectory() as scratch:
        data = write_folds(options.data.resolve(), Path(scratch) / "data", limit=options.limit)
        settings = recipe_for(
            f"yolov6{options.model}",
            str(data),
            epochs=options.epochs,
            image_size=options.imgsz,
            batch=options.batch,
            seed=FOLD,
            train_split=train_split(FOLD),
            val_split=None,
        )
        for change in options.set:
            settings = with_field(settings, change)
        with (
            mock.patch.object(loop, "_backward", backward),
            mock.patch.object(loop, "_update", update),
        ):
            try:
                train(settings, Path(scratch) / "run", device=options.device, progress=False)
            except _Enough:
                return


if __name__ == "__main__":
    main()
