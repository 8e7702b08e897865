"""The paper's Tables 6 to 11 on BCCD: assignment, warm-up, losses, DFL and objectness, one a time.

    python -m benchmarks.ablations --jobs 8 --json benchmarks/results/ablations.json

Each row is a training with one choice of the recipe changed. What several tables have in common,
such as the recipe itself, is trained once. Trainings run `--jobs` side by side and take turns on
the available GPUs; results are written after each, and the same command resumes what was
interrupted. `python -m benchmarks.paper_tables` puts the results into docs/measurements/paper.md.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from benchmarks.train_bccd import Places, add_recipe, heading, train_once
from trt_yolov6.common.files import write_json

TABLES: dict[str, tuple[str, dict[str, tuple[str, ...]]]] = {
    "6": (
        "Assignment",
        {
            "TAL": (),
            "SimOTA": ("--assigner", "simota"),
            "ATSS": ("--assigner", "atss"),
        },
    ),
    "7": (
        "Assignment of the first epochs",
        {
            "ATSS": (),
            "as later (TAL)": ("--set", "losses.warmup_epochs=0"),
            "SimOTA": ("--warmup-assigner", "simota"),
        },
    ),
    "8": (
        "Class loss",
        {
            "VariFocal": (),
            "focal": ("--cls-loss", "focal"),
            "quality focal": ("--cls-loss", "quality_focal"),
            "poly": ("--cls-loss", "poly"),
        },
    ),
    "9": (
        "Box loss",
        {"SIoU": (), "GIoU": ("--box-loss", "giou"), "CIoU": ("--box-loss", "ciou")},
    ),
    "10": ("Distribution focal loss", {"without": (), "with": ("--dfl",)}),
    "11": ("Objectness loss", {"without": (), "with": ("--objectness",)}),
}
"""Table of the paper -> the varied part, and `train`'s options for each row (of N)."""


def main() -> None:
    """Train what the tables need, and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tables", nargs="+", choices=list(TABLES), default=list(TABLES))
    add_recipe(parser)
    parser.add_argument(
        "--output", type=Path, default=Path("runs/ablations"), help="the runs' folders go there"
    )
    parser.add_argument("--json", type=Path, help="write the results there")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {**heading("ablations", options), "model": "n", "runs": []}
    wanted = list(dict.fromkeys(row for t in options.tables for row in TABLES[t][1].values()))
    places = Places(options.jobs, options.device)

    def run(changes: tuple[str, ...], seed: int) -> dict[str, Any]:
        folder = options.output / f"{folder_name(changes)}-{seed}"
        with places.taken() as environment:
            done = train_once(
                options, "n", seed, options.epochs, folder, extra=changes, environment=environment
            )
        return {"changes": list(changes), **done}

    with ThreadPoolExecutor(options.jobs) as pool:
        waiting = [pool.submit(run, changes, seed) for changes in wanted for seed in options.seeds]
        for future in as_completed(waiting):
            row = future.result()
            result["runs"].append(row)
            said = row.get("error") or f"AP {row['AP']:.4f}, {row['wall_s']:.0f} s"
            print(f"{folder_name(tuple(row['changes']))} seed {row['seed']}: {said}", flush=True)
            if options.json:
                write_json(options.json, result)
    for table in options.tables:
        print(f"Table {table}: {TABLES[table][0]}")
        for label, ap, seeds in rows_of(result, table):
            print(f"  {label:16s} {ap:.4f} ({seeds} seeds)")
    if any("error" in row for row in result["runs"]):
        sys.exit("not all trainings came to an end; see above.")


def folder_name(changes: tuple[str, ...]) -> str:
    """Return the name of a training's folder."""
    return re.sub(r"[^\w.]+", "-", " ".join(changes)).strip("-") or "recipe"


def rows_of(result: Mapping[str, Any], table: str) -> list[tuple[str, float, int]]:
    """Return the rows of a table: label, median AP at the end in 0..1, number of seeds."""
    rows = []
    for label, changes in TABLES[table][1].items():
        found = [
            run["AP"]
            for run in result["runs"]
            if tuple(run["changes"]) == changes and run["AP"] is not None
        ]
        if found:
            rows.append((label, statistics.median(found), len(found)))
    return rows


if __name__ == "__main__":
    main()
