"""Time commands of two states of the package, taking turns, by the processor time they use.

    python scripts/command_times.py c086795 HEAD           prints a table of medians and ratios
    python scripts/command_times.py c086795 HEAD --runs 9

Each state is checked out into a folder of its own. A command's own output goes into that folder.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENGINE = "engine.onnx"
BUILD = ("build", "--fp32", "--imgsz", "320", "--output", ENGINE)
COMMANDS = (
    ("--help",),
    ("doctor",),
    ("inspect", "samples/yolov6n_bccd.pt"),
    BUILD,
    ("inspect", ENGINE),
    ("infer", "--engine", ENGINE, "--source", "samples/images/val", "--output", "drawn"),
    ("eval", "--engine", ENGINE, "--data", "samples", "--split", "val"),
)


def main() -> None:
    """Print the median processor seconds of each command in both states, and their ratio."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("states", nargs=2, metavar="REV")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trees = [_checked_out(rev, Path(folder) / str(n)) for n, rev in enumerate(options.states)]
        for tree in trees:
            _seconds(tree, BUILD)
        print(f"| command | {options.states[0]}, s | {options.states[1]}, s | ratio |")
        print("| --- | --- | --- | --- |")
        for command in COMMANDS:
            times: list[list[float]] = [[], []]
            for run in range(options.runs):
                for state in (0, 1) if run % 2 == 0 else (1, 0):
                    times[state].append(_seconds(trees[state], command))
            before, after = map(statistics.median, times)
            ratio = statistics.median(b / a for a, b in zip(*times, strict=True))
            words = " ".join(word for word in command if "/" not in word)
            print(f"| `{words}` | {before:.2f} | {after:.2f} | {ratio:.2f} |", flush=True)


def _checked_out(rev: str, folder: Path) -> Path:
    folder.mkdir()
    archive = subprocess.run(
        ["git", "archive", rev, "trt_yolov6", "samples"], cwd=ROOT, check=True, capture_output=True
    )
    subprocess.run(["tar", "x", "-C", folder], input=archive.stdout, check=True)
    return folder


def _seconds(tree: Path, command: tuple[str, ...]) -> float:
    """Run a command, on one thread, and return the processor time that it used."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = subprocess.run(
        [sys.executable, "-m", "trt_yolov6", *command],
        cwd=tree,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if run.returncode:
        raise SystemExit(f"{' '.join(command)} in {tree} failed: {run.stderr[-500:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
