"""The training's figures: AP and time an epoch on BCCD, several sizes and seeds.

    python -m benchmarks.train_bccd --data ../shared/data/bccd --json benchmarks/results/NAME.json

The defaults are those of the comparison with the authors' code: N and S, 125 epochs, batch 32, 640
pixels, three seeds. First each size trains a few epochs alone, which gives the time an epoch; then
the trainings run, `--jobs` of them side by side. What is done is written after each. `--set` goes
to every training, such as `--set optimizer.warmup_epochs=5`.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import queue
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from trt_yolov6.common.files import write_json
from trt_yolov6.common.machine import cpu_model, software_versions

TIMING_EPOCHS = 12


def main() -> None:
    """Train and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", default=["n", "s"], metavar="n|s|...")
    add_recipe(parser)
    parser.add_argument("--no-timing", action="store_true", help="skip the trainings for the time")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/train_bccd"), help="the runs' folders go there"
    )
    parser.add_argument("--json", type=Path, help="write the results there")
    options = parser.parse_args()

    result = {**heading("train_bccd", options), "timing": [], "runs": []}

    def finished(kind: str, run: dict[str, Any]) -> None:
        result[kind].append(run)
        print(_row(run), flush=True)
        if options.json:
            write_json(options.json, result)

    started = time.strftime("%H%M%S")
    if not options.no_timing:
        for model in options.models:
            epochs = min(TIMING_EPOCHS, options.epochs)
            folder = options.output / f"{started}-{model}-timing"
            finished("timing", train_once(options, model, 0, epochs, folder))
    with ThreadPoolExecutor(options.jobs) as pool:
        waiting = [
            pool.submit(
                train_once,
                options,
                model,
                seed,
                options.epochs,
                options.output / f"{started}-{model}-{seed}",
            )
            for seed in options.seeds
            for model in options.models
        ]
        for future in waiting:
            finished("runs", future.result())
    for model in options.models:
        runs = [run for run in result["runs"] if run["model"] == model and run["best_AP"]]
        if runs:
            best = statistics.median(run["best_AP"] for run in runs)
            last = statistics.median(run["AP"] for run in runs)
            print(f"{model}: median of {len(runs)} seeds: best AP {best:.4f}, last AP {last:.4f}")


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Add the options that all trainings of a benchmark share."""
    parser.add_argument("--data", type=Path, default=Path("../shared/data/bccd"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=125)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--device", help="cpu or cuda (a GPU where there is one)")
    parser.add_argument("--jobs", type=int, default=1, help="trainings side by side (1)")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")


class Places:
    """One slot per concurrent training, with the GPU that it sees."""

    def __init__(self, jobs: int, device: str | None) -> None:
        self._free: queue.Queue[dict[str, str]] = queue.Queue()
        count = torch.cuda.device_count() if device in (None, "cuda") else 0
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        names = [name for name in visible.split(",") if name] or [str(i) for i in range(count)]
        for job in range(jobs):
            # With one GPU or none, the choice is the training's.
            own = {"CUDA_VISIBLE_DEVICES": names[job % count]} if count > 1 else {}
            self._free.put(own)

    @contextlib.contextmanager
    def taken(self) -> Iterator[dict[str, str]]:
        """Wait for a place; give the environment variables that go with it."""
        place = self._free.get()
        try:
            yield place
        finally:
            self._free.put(place)


def heading(script: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return a result's record of how it was made."""
    on_gpu = torch.cuda.is_available() and options.device != "cpu"
    return {
        "command": " ".join([f"python -m benchmarks.{script}", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if on_gpu else cpu_model(),
        "versions": {**software_versions(), "torch": torch.__version__},
        "epochs": options.epochs,
        "batch": options.batch,
        "image_size": options.imgsz,
        "jobs": options.jobs,
    }


def train_once(
    options: argparse.Namespace,
    model: str | None,
    seed: int,
    epochs: int,
    folder: Path,
    *,
    extra: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Run one training in a process of its own and return what it came to.

    Args:
        options: those of `add_recipe`.
        model: as `train --model` takes it; None leaves it to the rest.
        seed: of the training.
        epochs: passes over the data.
        folder: the run's; one that was interrupted in it is gone on with, and what one in it came
            to is taken.
        extra: more of the command line.
        environment: variables to set.
    """
    summary = folder.with_suffix(".json")
    command = [sys.executable, "-m", "trt_yolov6", "train"]
    if (folder / "settings.json").is_file():
        command += ["--resume"]
    else:
        command += ["--data", str(options.data), "--seed", str(seed), "--epochs", str(epochs)]
        command += ["--batch", str(options.batch), "--imgsz", str(options.imgsz), *extra]
        command += [] if model is None else ["--model", model]
        for assignment in options.set:
            command += ["--set", assignment]
    command += ["--output", str(folder), "--json", str(summary), "--quiet"]
    if options.device:
        command += ["--device", options.device]
    run = {"model": model, "seed": seed, "AP": None, "best_AP": None, "folder": str(folder)}
    if not summary.is_file():
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, **(environment or {})}
        )
        if done.returncode:
            return {**run, "error": done.stderr.strip()[-2000:]}
    said = json.loads(summary.read_text(encoding="utf-8"))
    if said["epochs"] != epochs:
        return {**run, "error": f"{folder} holds a training of {said['epochs']} epochs"}
    log = said.pop("log")
    names = ("epoch", "loss", "seconds", "AP", "AP50", "evaluation_seconds")
    said["log"] = [{name: line[name] for name in names if name in line} for line in log]
    return {**run, **said}


def _row(run: dict[str, Any]) -> str:
    if "error" in run:
        return f"{run['model']} seed {run['seed']}: failed: {run['error']}"
    aps = "  ".join(
        f"{name} {run[name]:.4f}" for name in ("best_AP", "AP") if run[name] is not None
    )
    return (
        f"{run['model']} seed {run['seed']}: {aps}  {run['epochs']} epochs, "
        f"{run['epoch_s']:.3f} s an epoch, {run['wall_s']:.0f} s in all"
    )


if __name__ == "__main__":
    main()
