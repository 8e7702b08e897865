"""The paper's ablations on BCCD, in five folds: many small trainings, packed onto the GPUs.

    python -m benchmarks.ablations --gpus 0,1,2,3 --pack 8 --state runs/ablations --out OUT
    python -m benchmarks.ablations --collect OUT --json benchmarks/results/ablations.json

The first command trains what is missing, in order of importance, until all is done or the deadline
is reached; given again, it goes on from where it was. The second scores what was found, all folds
together, and compares variants; `python -m benchmarks.paper_tables` makes the tables of it.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ablation_variants import TABLES, VARIANTS, Cell, Table, Variant
from benchmarks.folds import (
    FOLDS,
    Truth,
    ap_by_fold,
    ap_of,
    difference,
    match_all,
    read_truth,
    write_folds,
)
from benchmarks.packing import Job, Schedule, heed_signals, run_jobs, shared_gpu
from trt_yolov6.common.files import atomic_path, read_json, write_json
from trt_yolov6.common.machine import cpu_model, software_versions, timestamp
from trt_yolov6.quantization.resampling import Interval, MatchedDetections

GPU_MEMORY = 72.0
"""GB of a GPU that the jobs may take together."""

# Seconds of a GPU that is kept busy, an epoch of 292 images at 640 pixels; and GB at batch 32.
_COST = {"n": 0.45, "t": 0.55, "s": 0.6, "m": 1.7, "l": 3.0, "l_relu": 3.4}
_MEMORY = {"n": 9.0, "t": 12.0, "s": 15.0, "m": 28.0, "l": 45.0, "l_relu": 50.0}
_LEAST_COST = 0.06
_OVERHEAD = 12.0
_WRITE_SECONDS = 45.0

_FOUND_BYTES = 9 * 2**20
"""Size of a file of detections, at most."""

EPILOG = """how long it takes: see `docs/measurements/paper.md` for the run that is committed.
`--list` prints every variant with its share. A training's time on a GPU that is kept busy by eight
of them, for each of the five folds: N 0.1 s, S 0.15 s, M 0.5 s, L 0.8 s an epoch at 320 pixels and
four times as much at 640. On a CPU only `--limit 10 --epochs 1 --size 64` comes to an end."""


def main() -> None:
    """Train what is missing, or score what is there."""
    options = _parser().parse_args()
    if options.list:
        for job in jobs_of(options):
            if job.order["fold"] == 0:
                print(f"{job.name.split('/')[0]:28s} {FOLDS} x {job.seconds:5.0f} s")
    elif options.collect:
        result = collect(options.collect, options.data, options.limit)
        write_json(options.json, result)
        print(summary(result))
    else:
        run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data/bccd"))
    parser.add_argument("--gpus", default="0", help="numbers of the GPUs, or `cpu`")
    parser.add_argument("--pack", type=int, default=8, help="trainings side by side on a GPU (8)")
    parser.add_argument("--no-mps", action="store_true", help="without NVIDIA's MPS")
    parser.add_argument("--deadline", type=float, default=1e9, help="seconds until it stops")
    parser.add_argument("--last", action="store_true", help="begin nothing that would not end")
    parser.add_argument("--state", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--out", type=Path, help="results go there as well, in few files")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--folds", type=int, nargs="+", default=list(range(FOLDS)))
    parser.add_argument("--epochs", type=int, default=60, help="of the short schedule (60)")
    parser.add_argument("--size", type=int, default=320, help="of its images (320)")
    parser.add_argument("--full-epochs", type=int, default=125, help="of the full one (125)")
    parser.add_argument("--full-size", type=int, default=640, help="of its images (640)")
    parser.add_argument("--qat-epochs", type=int, default=10, help="of QAT (10)")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--limit", type=int, help="number of images to take, for a try")
    parser.add_argument("--list", action="store_true", help="print the variants and their times")
    parser.add_argument("--collect", nargs="+", type=Path, metavar="OUT", help="score results")
    parser.add_argument(
        "--json", type=Path, default=Path("benchmarks/results/ablations.json"), help="of --collect"
    )
    return parser


# --- training -----------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> None:
    """Do jobs until the deadline."""
    heed_signals()
    started = time.monotonic()
    state: Path = options.state.resolve()
    write_folds(options.data.resolve(), state / "data", limit=options.limit)
    jobs = jobs_of(options)
    results = {job.name: read_json(path) for job in jobs if (path := _result(state, job)).is_file()}
    earlier = len(results)
    schedule = Schedule(
        [_timed(job, results) for job in jobs],
        set(results),
        GPU_MEMORY,
        started + options.deadline,
        options.last,
    )
    gpus = options.gpus.split(",")
    heading: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.ablations", *sys.argv[1:]]),
        "started": timestamp(),
        "gpus": gpus,
        "device": cpu_model(),
        "versions": software_versions(),
        "pack": options.pack,
        "mps": False,
    }
    written = time.monotonic()

    def write() -> None:
        heading["seconds"] = time.monotonic() - started
        heading["device"] = next(
            (one["device"] for one in results.values() if "device" in one), cpu_model()
        )
        if options.out:
            write_out(options.out, state, heading, jobs, results, schedule.failed)

    def finished(job: Job, result: dict[str, Any]) -> None:
        nonlocal written
        seconds = time.monotonic() - started
        if "error" in result:
            print(f"{seconds:6.1f} {job.name}: {result['error'][-1500:]}", flush=True)
            return
        results[job.name] = result
        aps = " ".join(f"{name} {ap:.3f}" for name, ap in result["AP"].items())
        print(
            f"{seconds:6.1f} {job.name}: AP {aps}, {result['seconds']:.1f} s, "
            f"{result.get('epoch_s', 0):.2f} s an epoch, "
            f"{result.get('peak_bytes', 0) / 1e9:.1f} GB",
            flush=True,
        )
        if time.monotonic() - written > _WRITE_SECONDS:
            write()
            written = time.monotonic()

    with contextlib.ExitStack() as stack:
        places = []
        for gpu in gpus:
            shared = (
                {}
                if gpu == "cpu"
                else stack.enter_context(shared_gpu(gpu, wanted=not options.no_mps))
            )
            print(f"GPU {gpu}: {'with' if len(shared) > 1 else 'without'} MPS", flush=True)
            heading["mps"] = heading["mps"] or len(shared) > 1
            places += [(gpu, {"OMP_NUM_THREADS": "2", **shared})] * options.pack
        # First one worker on every GPU: jobs are spread evenly.
        places = [place for first in range(options.pack) for place in places[first :: options.pack]]
        command = [sys.executable, "-m", "benchmarks.ablation_jobs"]
        with contextlib.suppress(KeyboardInterrupt):  # what is there is written
            run_jobs(schedule, command, places, state / "logs", finished)
        write()
    print(
        f"{len(results) - earlier} jobs done in {heading['seconds']:.0f} s, {len(results)} of "
        f"{len(jobs)} in all; failed: {sorted(schedule.failed)}",
        flush=True,
    )


def jobs_of(options: argparse.Namespace) -> list[Job]:
    """Return the jobs of the options, the most important first: whole variants one by one."""
    wanted = dict.fromkeys(options.only or VARIANTS)
    for name in list(wanted):
        for needed in _all_needs(name):
            wanted.setdefault(needed)
    device = "cpu" if options.gpus == "cpu" else "cuda"
    jobs = []
    for name in (name for name in VARIANTS if name in wanted):
        variant = VARIANTS[name]
        full = variant.schedule == "full"
        epochs = options.full_epochs if full else options.epochs
        size = options.full_size if full else options.size
        epochs = max(1, round(epochs * variant.stretch))
        cost = _cost(variant, size, epochs, options.qat_epochs)
        for fold in options.folds:
            order = {
                "variant": name,
                "fold": fold,
                "data": str(options.state.resolve() / "data"),
                "state": str(options.state.resolve()),
                "epochs": epochs,
                "image_size": size,
                "batch": options.batch,
                "qat_epochs": options.qat_epochs,
                "device": device,
            }
            jobs.append(
                Job(
                    f"{name}/{fold}",
                    order,
                    tuple(f"{needed}/{fold}" for needed in variant.needs),
                    1.5 + _MEMORY[variant.model] * (size / 640) ** 2,
                    _OVERHEAD + cost * options.pack,
                )
            )
    return jobs


def _all_needs(name: str) -> list[str]:
    own = VARIANTS[name].needs
    return [*own, *(other for needed in own for other in _all_needs(needed))]


def _cost(variant: Variant, size: int, epochs: int, qat_epochs: int) -> float:
    """Return the guessed seconds of a busy GPU."""
    epoch = max(_COST[variant.model] * (size / 640) ** 2, _LEAST_COST)
    if variant.quantized is not None:
        return 2.0 + (3 * epoch * qat_epochs if variant.quantized.trained else 0.0)
    return epoch * epochs * (1.3 if variant.teacher else 1.0)


def _timed(job: Job, results: Mapping[str, Any]) -> Job:
    """Return the job with the time that others of its kind took, where some are done."""
    import dataclasses

    own = VARIANTS[job.order["variant"]]
    alike = [
        one["seconds"] / one["epochs"]
        for one in results.values()
        if VARIANTS[one["variant"]].model == own.model
        and one["image_size"] == job.order["image_size"]
        and VARIANTS[one["variant"]].quantized == own.quantized
    ]
    if not alike:
        return job
    epochs = job.order["epochs" if own.quantized is None else "qat_epochs"]
    return dataclasses.replace(job, seconds=1.1 * statistics.median(alike) * epochs)


def _result(state: Path, job: Job) -> Path:
    return state / job.name / "result.json"


def write_out(
    out: Path,
    state: Path,
    heading: Mapping[str, Any],
    jobs: Sequence[Job],
    results: Mapping[str, Any],
    failed: Mapping[str, str],
) -> None:
    """Write all results so far into few files: figures, and detections."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(
        out / "ablations.json",
        {
            **heading,
            "failed": dict(failed),
            "missing": [job.name for job in jobs if job.name not in results],
            "jobs": list(results.values()),
        },
    )
    parts: list[dict[str, Any]] = [{}]
    size = 0
    for name in results:
        file = state / name / "found.npz"
        if size + file.stat().st_size > _FOUND_BYTES:
            parts.append({})
            size = 0
        size += file.stat().st_size
        with np.load(file) as found:
            parts[-1] |= {f"{name}/{given}": found[given] for given in found.files}
    for number, part in enumerate(parts):
        path = out / f"found-{number}.npz"
        with atomic_path(path) as temporary, temporary.open("wb") as stream:
            np.savez_compressed(stream, **part)


# --- scoring ------------------------------------------------------------------------------------


def collect(folders: Sequence[Path], data: Path, limit: int | None = None) -> dict[str, Any]:
    """Score the results of one or several calls: AP of all folds together, and differences.

    Args:
        folders: what `--out` named, in order of time.
        data: BCCD.
        limit: as for `write_folds`.
    """
    import tempfile

    calls = [read_json(folder / "ablations.json") for folder in folders]
    jobs = {(job["variant"], job["fold"]): job for call in calls for job in call["jobs"]}
    found: dict[tuple[str, str], dict[int, Any]] = defaultdict(dict)
    for folder in folders:
        for file in sorted(folder.glob("found-*.npz")):
            with np.load(file) as arrays:
                for name in arrays.files:
                    variant, fold, given = name.split("/")
                    found[variant, given][int(fold)] = arrays[name]
    with tempfile.TemporaryDirectory() as scratch:
        truth = read_truth(write_folds(data.resolve(), Path(scratch), limit=limit))
    whole = {
        key: match_all(truth, np.concatenate([parts[fold] for fold in sorted(parts)]))
        for key, parts in found.items()
        if sorted(parts) == list(range(FOLDS))
        and all((key[0], fold) in jobs for fold in range(FOLDS))
    }
    variants: dict[str, Any] = {}
    for (name, given), one in whole.items():
        own = [jobs[name, fold] for fold in range(FOLDS)]
        entry = variants.setdefault(
            name,
            {
                "folds": FOLDS,
                "seeds": [job["seed"] for job in own],
                "epochs": own[0]["epochs"],
                "image_size": own[0]["image_size"],
                "batch": own[0]["batch"],
                "epoch_s": _median(job.get("epoch_s") for job in own),
                "seconds": _median(job["seconds"] for job in own),
                "float_layers": [job["float_layers"] for job in own if "float_layers" in job],
                "AP": {},
            },
        )
        entry["AP"][given] = _ap_entry(truth, one)
    return {
        "images": len(truth.images),
        "folds": FOLDS,
        "calls": [
            {key: value for key, value in call.items() if key not in ("jobs", "missing")}
            for call in calls
        ],
        "variants": {name: variants[name] for name in VARIANTS if name in variants},
        "repeats": _repeats(whole),
        "tables": {number: _compared(table, whole) for number, table in TABLES.items()},
        "pairs": _pairs(whole),
    }


def _median(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _ap_entry(truth: Truth, one: MatchedDetections) -> dict[str, Any]:
    by_fold = ap_by_fold(truth, one)
    return {**_json(ap_of(one)), "by_fold": by_fold, "fold_mean": statistics.fmean(by_fold)}


def _json(found: Interval) -> dict[str, float]:
    return {"value": found.value, "low": found.low, "high": found.high}


def _compared(
    table: Table, whole: Mapping[tuple[str, str], MatchedDetections]
) -> list[dict[str, Any]]:
    """Return the differences from the base of a table, for all that is there."""
    rows = []
    for column, network in enumerate(table.columns):
        for label, cells in table.rows.items():
            own = cells[column]
            base = None if own is None else table.base_of(label, column)
            if own is None or base is None:
                continue
            other = table.rows[base][column]
            if other is None or not {_key(own), _key(other)} <= whole.keys():
                continue
            found = difference(whole[_key(own)], whole[_key(other)])
            rows.append({"network": network, "row": label, "base": base, **_json(found)})
    return rows


def _key(cell: Cell) -> tuple[str, str]:
    return cell.variant, cell.input


QUANTIZED_PAIRS = (
    ("s-rep", "s"),
    ("s-ptq", "s"),
    ("s-rep-ptq", "s-rep"),
    ("s-ptq-tuned", "s"),
    ("s-rep-ptq-tuned", "s-rep"),
    ("s-qat-distilled", "s"),
    ("s-rep-qat", "s-rep"),
    ("s-rep-qat-distilled", "s-rep"),
    ("s-rep-partial-distilled", "s-rep"),
    ("s-rep-qat-distilled", "s-rep-qat"),
    ("s-rep-partial-distilled", "s-rep-qat-distilled"),
    *((f"s-rep-six-{metric}", "s-rep-ptq") for metric in ("mse", "cosine", "snr", "ap")),
    *(
        (f"{name}-ptq{tail}", name)
        for name in ("s-objectness", "s-v1-rep")
        for tail in ("", "-per-tensor")
    ),
    ("s-ptq-per-tensor", "s"),
    ("s-rep-ptq-per-tensor", "s-rep"),
    ("s-v1-rep", "s-objectness"),
    ("m-distilled", "m"),
    ("s-full", "n-full"),
    ("n-full", "n"),
    ("s-full", "s"),
)
"""Variants that are compared outside Tables 2 to 14, each with what it is compared with."""


def _pairs(whole: Mapping[tuple[str, str], MatchedDetections]) -> list[dict[str, Any]]:
    there = {name: one for (name, given), one in whole.items() if given == "plain"}
    return [
        {"variant": own, "base": base, **_json(difference(there[own], there[base]))}
        for own, base in QUANTIZED_PAIRS
        if own in there and base in there
    ]


def _repeats(whole: Mapping[tuple[str, str], MatchedDetections]) -> list[dict[str, Any]]:
    """Return the differences of the same recipe with other seeds: what chance alone makes."""
    return [
        {"variant": f"{model}-again", "base": model, **_json(difference(own, base))}
        for model in ("n", "s")
        if (own := whole.get((f"{model}-again", "plain"))) is not None
        and (base := whole.get((model, "plain"))) is not None
    ]


def summary(result: Mapping[str, Any]) -> str:
    """Return the APs and differences as text."""
    lines = []
    for name, entry in result["variants"].items():
        for given, ap in entry["AP"].items():
            lines.append(
                f"{name:28s} {given:7s} AP {100 * ap['value']:.2f} "
                f"({100 * ap['low']:.2f} to {100 * ap['high']:.2f}), mean of folds "
                f"{100 * ap['fold_mean']:.2f}, {entry['epochs']} epochs at {entry['image_size']}"
            )
    for kind in ("repeats", "pairs"):
        for row in result[kind]:
            lines.append(f"{row['variant']} - {row['base']}: {_points(row)}")
    for number, rows in result["tables"].items():
        for row in rows:
            lines.append(
                f"Table {number}, {row['network']}: {row['row']} - {row['base']}: {_points(row)}"
            )
    return "\n".join(lines)


def _points(row: Mapping[str, float]) -> str:
    return f"{100 * row['value']:+.2f} ({100 * row['low']:+.2f} to {100 * row['high']:+.2f})"


if __name__ == "__main__":
    main()
