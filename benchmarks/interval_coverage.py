"""Do two runs of `compare` on one engine disagree by less than their stated intervals?

    python -m benchmarks.interval_coverage --json benchmarks/results/interval-coverage.json

Runs `trt-yolov6 compare` again and again, each time in a process of its own, on the sample at a
small size, and takes two runs in a row as a pair. A pair agrees where its medians differ by no
more than the sum of the half widths that face each other: the lower one's upper half and the
higher one's lower half; in other words, where the intervals overlap. The stricter rule, under which
the two halves add in quadrature, is counted as well, and so is every pair of runs, however far
apart in time. Runs that `compare` calls disturbed, whose intervals are wide, are counted apart.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from trt_yolov6.common.files import write_json
from trt_yolov6.common.machine import cpu_model, software_versions, timestamp
from trt_yolov6.common.statistics import Interval
from trt_yolov6.comparison.results import latency_of, read_results

ROOT = Path(__file__).parents[1]

PLAN = """
models:
  - path: {root}/samples/yolov6n_bccd.pt
    image_size: {size}
precisions: [{precisions}]
batches: [1]
data: {root}/samples
calibration: {root}/calib
layers: false
examples: 0
rounds: {rounds}
duration: {duration}
"""


def main() -> None:
    """Run all, print the counts, write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--size", type=int, default=160, help="side of the images")
    parser.add_argument("--precisions", default="fp32,fp16", help="engines to interleave")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--duration", type=float, default=2.4, help="seconds an engine and run")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds between runs")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        plan = Path(folder) / "plan.yaml"
        plan.write_text(
            PLAN.format(
                root=ROOT,
                size=options.size,
                precisions=options.precisions,
                rounds=options.rounds,
                duration=options.duration,
            )
        )
        for number in range(2 * options.pairs):
            runs += one_run(plan, Path(folder) / "run", number)
            last = runs[-1]
            print(
                f"run {number + 1} of {2 * options.pairs}: {last['median_ms']:.3f} ms, "
                f"{last['low_ms']:.3f} .. {last['high_ms']:.3f}, load {last['load']:.1f}"
                + (", disturbed" if last["disturbed"] else ""),
                flush=True,
            )
            time.sleep(options.pause)
    summaries = [summary_of(engine, runs) for engine in dict.fromkeys(names_of(runs))]
    summaries += ratio_summary(runs)
    value = {
        "command": " ".join(["python -m benchmarks.interval_coverage", *sys.argv[1:]]),
        "device": cpu_model(),
        "processors": os.cpu_count(),
        "versions": software_versions(),
        "summary": summaries,
        "runs": runs,
    }
    for row in summaries:
        print(row)
    if options.json:
        write_json(options.json, value)


def one_run(plan: Path, output: Path, number: int) -> list[dict[str, Any]]:
    """Run `compare` once and return what it says of each engine."""
    load = os.getloadavg()[0]
    subprocess.run(
        [sys.executable, "-m", "trt_yolov6", "compare", plan, "--output", output, "--again"],
        check=True,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    results = read_results(output)
    ratios = {one["engine"]: one for one in results["ratios"]}
    rows = []
    for timing in results["timings"]:
        latency = latency_of(timing)
        ratio = ratios.get(timing["engine"])
        rows.append(
            {
                "run": number,
                "engine": timing["engine"],
                "date": timestamp(),
                "load": load,
                "median_ms": latency.value,
                "low_ms": latency.low,
                "high_ms": latency.high,
                "disturbed": timing["disturbed"],
                "waited": timing["waited"],
                "ratio": ratio and [ratio["ratio"], *ratio["interval"]],
            }
        )
    return rows


def names_of(runs: Iterable[dict[str, Any]]) -> list[str]:
    """Return the engine of each row."""
    return [str(row["engine"]) for row in runs]


def summary_of(engine: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Count how many pairs of an engine's runs agree."""
    rows = [row for row in runs if row["engine"] == engine]
    intervals = [Interval(row["median_ms"], row["low_ms"], row["high_ms"]) for row in rows]
    quiet = [not row["disturbed"] for row in rows]
    in_a_row = [(index, index + 1) for index in range(0, len(rows) - 1, 2)]
    every = list(itertools.combinations(range(len(rows)), 2))

    def count(pairs: Sequence[tuple[int, int]], rule: Any) -> list[int]:
        agreed = sum(rule(intervals[first], intervals[second]) for first, second in pairs)
        return [int(agreed), len(pairs)]

    def both_quiet(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        return [(first, second) for first, second in pairs if quiet[first] and quiet[second]]

    known = [row for row, calm in zip(rows, quiet, strict=True) if calm]
    widths = sorted((row["high_ms"] - row["low_ms"]) / 2 / row["median_ms"] for row in known)
    return {
        "engine": engine,
        "pairs_in_a_row": count(in_a_row, agree),
        "pairs_in_a_row_undisturbed": count(both_quiet(in_a_row), agree),
        "pairs_in_a_row_in_quadrature": count(in_a_row, agree_in_quadrature),
        "all_pairs": count(every, agree),
        "all_pairs_undisturbed": count(both_quiet(every), agree),
        "all_pairs_undisturbed_in_quadrature": count(both_quiet(every), agree_in_quadrature),
        "undisturbed_runs": [len(known), len(rows)],
        "half_width_of_undisturbed": widths[len(widths) // 2] if widths else None,
        "medians_of_undisturbed_ms": [
            min((row["median_ms"] for row in known), default=None),
            max((row["median_ms"] for row in known), default=None),
        ],
    }


def ratio_summary(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Count how many pairs of runs in a row agree on the ratio of two engines."""
    rows = []
    for engine in dict.fromkeys(names_of(runs)):
        found = [row["ratio"] for row in runs if row["engine"] == engine]
        if not all(found):
            continue
        intervals = [Interval(*ratio) for ratio in found]
        pairs = list(zip(intervals[::2], intervals[1::2], strict=False))
        widths = sorted((one.high - one.low) / 2 / one.value for one in intervals)
        rows.append(
            {
                "ratio_of": engine,
                "pairs_in_a_row": [sum(agree(*pair) for pair in pairs), len(pairs)],
                "half_width": widths[len(widths) // 2],
            }
        )
    return rows


def agree(one: Interval, other: Interval) -> bool:
    """Return whether two medians differ by no more than the half widths that face each other."""
    return one.overlaps(other)


def agree_in_quadrature(one: Interval, other: Interval) -> bool:
    """Return whether two medians differ by no more than those half widths in quadrature."""
    low, high = sorted((one, other), key=lambda item: item.value)
    return high.value - low.value <= math.hypot(high.value - high.low, low.high - low.value)


if __name__ == "__main__":
    main()
