"""kill -9 at any step of the commands that write: what is left is whole, a second run ends.

    python tests/kill.py --count 200 --seed 0

Each run is forked from a process that has imported everything and is killed as it opens, renames
or removes a file of its output: at each of the steps that a whole run takes, in random order, and
then again. Every file that is left must be one that can be read, an engine and its manifest must
be a pair, and the same command, with `--resume` where it trains, must end with exit code 0.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from support.imports import import_everything


@dataclass(frozen=True)
class Command:
    """A command that writes."""

    name: str
    arguments: Callable[[Path], list[str]]
    """Takes the folder that is written to."""
    again: Callable[[Path], list[str]]
    """The same for the second run, after a kill."""


def commands(inputs: Path) -> list[Command]:
    """Return the commands; `inputs` is what `prepare` filled."""

    def build(out: Path) -> list[str]:
        weights = ["--onnx", str(inputs / f"{'AB'[len(list(out.glob('*.onnx'))) % 2]}.onnx")]
        end = ["--backend", "onnxruntime", "--decoder", "yolov6", "--quiet"]
        return ["build", *weights, "--output", str(out / "e.onnx"), *end]

    def training(command: str, out: Path) -> list[str]:
        common = ["--data", str(inputs / "shapes"), "--split", "train", "--val-split", "val"]
        common += ["--output", str(out / "run"), "--epochs", "2", "--device", "cpu", "--quiet"]
        weights = ["--weights", str(inputs / "tiny.pt"), "--imgsz", "64"]
        if command == "qat":
            calib = ["--calib", str(inputs / "calib"), "--calibrator", "minmax", "--no-equalize"]
            return ["qat", *weights, *common, *calib, "--batch", "4"]
        return ["train", *weights, *common, "--batch", "4"]

    def resumed(command: str, out: Path) -> list[str]:
        if not (out / "run" / "settings.json").exists():
            return training(command, out)
        if command == "train":
            return ["train", "--resume", "--output", str(out / "run"), "--quiet"]
        return [*training(command, out), "--resume"]

    def compare(out: Path) -> list[str]:
        models = [str(inputs / "A.onnx"), str(inputs / "B.onnx")]
        how = ["--rounds", "3", "--duration", "0.3", "--batches", "1", "--examples", "1"]
        data = ["--data", str(inputs / "cells"), "--backends", "onnxruntime", "--threads", "1"]
        return ["compare", *models, "--output", str(out), *how, *data, "--quiet"]

    return [
        Command("build", build, build),
        Command("compare", compare, compare),
        Command("train", lambda out: training("train", out), lambda out: resumed("train", out)),
        Command("qat", lambda out: training("qat", out), lambda out: resumed("qat", out)),
    ]


def prepare(inputs: Path) -> None:
    """Write a training set, a tiny checkpoint, two tiny detectors and pictures."""
    import onnx
    from support.tiny_detector import load_tiny, write_cells
    from support.training_data import write_shapes, write_tiny

    write_shapes(inputs / "shapes")
    write_tiny(inputs / "tiny.pt")
    shutil.copytree(next((inputs / "shapes" / "images").iterdir()), inputs / "calib")
    write_cells(inputs / "cells", images=3)
    with load_tiny(inputs) as engine:
        model = onnx.load(engine.path)
    for name in "AB":
        model.producer_name = f"tiny {name}"
        onnx.save(model, inputs / f"{name}.onnx")


def faults_in(folder: Path) -> list[str]:
    """Return the faults of the files of a folder, hidden ones aside: those are temporary."""
    import onnx
    import torch

    from trt_yolov6.common.files import sha256_file
    from trt_yolov6.engines.manifest import read_manifest

    found = []
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or any(part.startswith(".") for part in path.parts):
            continue
        try:
            if path.suffix == ".json":
                json.loads(path.read_bytes())
            elif path.suffix == ".jsonl":
                for line in path.read_text().splitlines()[:-1]:
                    json.loads(line)
            elif path.suffix == ".pt":
                torch.load(path, map_location="cpu", weights_only=False)
            elif path.suffix == ".onnx":
                onnx.checker.check_model(onnx.load(path))
                manifest = read_manifest(path)
                if manifest is not None and manifest.plan_sha256 != sha256_file(path):
                    found.append(f"{path.name} is not its manifest's")
        except Exception as error:  # whatever a reader says of half a file
            found.append(f"{path.name}: {type(error).__name__}: {error}")
    return found


STEPS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")
"""Python's audit events that are steps; a file that replaces another is renamed, too."""


def run(arguments: list[str], out: Path, log: Path, last: int | None = None) -> tuple[int, int]:
    """Run a command in a forked process; kill it at a step. Return its exit code and its steps.

    Args:
        arguments: of the command.
        out: the folder whose files the steps are about.
        log: what it says is written here.
        last: the number of the step that is not done any more, from 1; None: all are.
    """
    counted, counts = os.pipe()
    child = os.fork()
    if not child:
        code = 70
        steps = 0

        def step(event: str, values: tuple[object, ...]) -> None:
            nonlocal steps
            if event in STEPS and any(str(value).startswith(str(out)) for value in values):
                steps += 1
                if steps == last:
                    if event == "open":
                        name, _, flags = values
                        _empty(str(name), int(str(flags)))
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for number in (1, 2):
                os.dup2(file, number)
            from trt_yolov6.cli import main

            sys.addaudithook(step)
            code = main(arguments)
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            os.write(counts, str(steps).encode())
            os._exit(code)
    os.close(counts)
    status = os.waitpid(child, 0)[1]
    with os.fdopen(counted) as told:
        return os.waitstatus_to_exitcode(status), int(told.read() or last or 0)


def _empty(path: str, flags: int) -> None:
    """Do to a file what opening it does: it is empty before anything is written."""
    if flags & os.O_TRUNC:
        os.close(os.open(path, flags))


def kill_often(count: int, seed: int, names: list[str] | None) -> int:
    """Kill runs at random moments; return how many left something that is not whole."""
    import_everything()
    rng = random.Random(seed)
    faults = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        inputs, log = folder / "inputs", folder / "log"
        inputs.mkdir()
        child = os.fork()
        if not child:
            try:
                prepare(inputs)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            return 1
        chosen = [one for one in commands(inputs) if not names or one.name in names]
        whole: dict[str, int] = {}
        for command in chosen:
            out = folder / f"whole-{command.name}"
            out.mkdir()
            code, whole[command.name] = run(command.arguments(out), out, log)
            if code:
                print(f"{command.name}, not killed: {code}\n{log.read_text()[-2000:]}")
                return 1
            print(f"{command.name}: {whole[command.name]} steps if left alone", flush=True)
        tally = dict.fromkeys(whole, 0)
        left: dict[str, list[int]] = {name: [] for name in whole}
        for number in range(count):
            command = chosen[number % len(chosen)]
            out = folder / "out"
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            if command.name == "build":
                run(command.arguments(out), out, log)  # so that there is an old pair
            if not left[command.name]:
                steps = range(1, whole[command.name] + 1)
                left[command.name] = rng.sample(steps, len(steps))
            step = left[command.name].pop()
            code, _ = run(command.arguments(out), out, log, step)
            tally[command.name] += code == -signal.SIGKILL
            wrong = faults_in(out)
            code, _ = run(command.again(out), out, log)
            # Killed after its last step: there is nothing left to do.
            is_over = " is complete; " in log.read_text()
            if code and not is_over:
                wrong.append(f"the second run ended with {code}: {log.read_text()[-1000:]}")
            wrong += faults_in(out)
            if (number + 1) % 20 == 0:
                print(f"{number + 1} kills, {faults} faults", flush=True)
            if wrong:
                faults += 1
                print(f"{command.name} {number}, step {step}: {'; '.join(wrong)}", flush=True)
        print(
            ", ".join(f"{name} killed {times} times" for name, times in tally.items())
            + f"; {faults} times something was not whole"
        )
    return faults


def main() -> int:
    """Run as the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", nargs="+")
    options = parser.parse_args()
    return int(kill_often(options.count, options.seed, options.commands) > 0)


if __name__ == "__main__":
    sys.exit(main())
