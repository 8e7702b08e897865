"""The paper's ablations on BCCD, in five folds: many small trainings, packed onto the GPUs.

    python -m benchmarks.ablations --gpus 0,1,2,3 --pack 8 --state runs/ablations --out OUT
    python -m benchmarks.ablations --collect OUT --json benchmarks/results/ablations.json

The first command trains what is missing, in order of importance, until all is done or the deadline
is reached; given again, it goes on from where it was (a training writes its state every 25 s). The
second scores what was found, all folds together, and compares variants; of variants that OUT does
not hold, what stands in the file stays. `python -m benchmarks.paper_tables` makes tables of it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import statistics
import sys
import threading
import time
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.ablation_scores import collect, summary
from benchmarks.ablation_variants import FOUND_FILE, RESULT_FILE, VARIANTS, Variant
from benchmarks.folds import FOLDS, write_folds
from benchmarks.packing import Claims, Job, Schedule, heed_signals, run_jobs, shared_gpu
from trt_yolov6.common.files import atomic_path, one_writer, read_json, write_json
from trt_yolov6.common.machine import cpu_model, software_versions, timestamp

GPU_MEMORY = 74.0
"""GB of a GPU that the jobs may take together."""

# Seconds of an epoch of 291 images: what an H100 computes at 640 pixels, and what a core needs to
# give the orders, at any size; by the times of N, S, M and L side by side, T's guessed.
_COMPUTED = {"n": 0.28, "t": 0.35, "s": 0.4, "m": 0.65, "l": 0.9, "l_relu": 0.9}
_ORDERED = {"n": 0.45, "t": 0.5, "s": 0.55, "m": 0.6, "l": 0.7, "l_relu": 0.7}
_CORES = 1.6
"""Cores that a training keeps busy."""
_MEMORY = {"n": 4.5, "t": 6.5, "s": 7.0, "m": 18.0, "l": 24.0, "l_relu": 26.0}
"""GB at 640 pixels and batch 32, with what PyTorch keeps for later; measured, except T and L-ReLU,
where M and L took 4.6 and 5.9 GB at 320 pixels."""
_OVERHEAD = 20.0
_FOUND_BYTES = 14 * 2**20
"""Size of a file of detections, at most."""

EPILOG = """how long it takes on an H100 under MPS, seven side by side with 16 cores; a variant is
five trainings:
                                            a training   a variant of GPU time
  N, 60 epochs at 320 pixels                 35 to 60 s     30 s
  S, 60 epochs at 320 pixels                 45 to 65 s     40 s
  M, 40 epochs at 320 pixels                60 to 115 s     60 s
  L, 40 epochs at 320 pixels                70 to 170 s     80 s
  L with a teacher                         100 to 130 s     80 s
  N, 300 epochs at 640 pixels, four               335 s    420 s
  S, 300 epochs, two, with one of N               350 s    620 s
  N or S, 125 epochs at 640 pixels                          175 or 260 s
  PTQ of S                                        10 s      5 s
  PTQ of S, six layers in float              20 to 55 s     10 to 25 s
  QAT of S                                   50 to 70 s     25 s
A worker's first training takes 10 to 40 s longer; with other work on the GPU, everything twice the
time. All tables of N, S and T took 1 600 s of a GPU before `train` used CUDA graphs; all of M, L
and L-ReLU 470 s of four, 35 side by side. `--list` prints every variant. On a CPU only `--limit 10
--epochs 1 --full-epochs 1 --large-epochs 1 --size 64 --full-size 64 --qat-epochs 1 --batch 4` comes
to an end.

several GPUs: one call with `--gpus 0,1,2,3`, or several calls at a time on one host with the same
`--state`, which share the work. What a call does not finish, the next one goes on with; where the
state is lost, with `--known OUT` of the earlier calls, whose folds then count."""


def main() -> None:
    """Train what is missing, or score what is there."""
    options = parser().parse_args()
    if options.list:
        by_variant: dict[str, list[Job]] = {}
        for job in jobs_of(options):
            by_variant.setdefault(job.order["variant"], []).append(job)
        for name, own in by_variant.items():
            print(f"{name:28s} {len(own)} x {own[0].seconds:5.0f} s")
    elif options.collect:
        earlier = read_json(options.json) if options.json.is_file() else None
        result = collect(options.collect, options.data, limit=options.limit, earlier=earlier)
        write_json(options.json, result)
        print(summary(result))
    else:
        run(options)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
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
    parser.add_argument(
        "--known",
        nargs="+",
        type=Path,
        default=[],
        metavar="OUT",
        help="results of earlier calls, whose trainings are not done again",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        type=_choice,
        metavar="VARIANT[/FOLD]",
        help="these variants, with what they need; `n-full/3`: one fold of it",
    )
    parser.add_argument("--folds", type=int, nargs="+", default=list(range(FOLDS)))
    parser.add_argument("--epochs", type=int, default=60, help="of the short schedule (60)")
    parser.add_argument("--size", type=int, default=320, help="of its images (320)")
    parser.add_argument("--large-epochs", type=int, default=40, help="of M's and L's (40)")
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


def _choice(text: str) -> tuple[str, int | None]:
    """Read a variant of `--only`, with its fold or None for those of `--folds`."""
    name, slash, fold = text.partition("/")
    if name not in VARIANTS:
        raise argparse.ArgumentTypeError(f"there is no variant {name}; `--list` prints them all.")
    if slash and fold not in map(str, range(FOLDS)):
        raise argparse.ArgumentTypeError(f"{text} is of no fold; give 0 to {FOLDS - 1}.")
    return name, int(fold) if slash else None


# --- training -----------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> None:
    """Do jobs until the deadline."""
    heed_signals()
    started = time.monotonic()
    state: Path = options.state.resolve()
    with one_writer(state):
        write_folds(options.data.resolve(), state / "data", limit=options.limit)
    jobs = jobs_of(options)
    names = [job.name for job in jobs]
    earlier = take_over(options.known, state, jobs)
    results = results_in(state, names)
    own_names = [name for name in names if name not in earlier]
    schedule = Schedule(
        [_timed(job, results_in(state, own_names)) for job in jobs],
        set(results),
        GPU_MEMORY,
        started + options.deadline,
        options.last,
        Claims(state, RESULT_FILE),
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
        "jobs_done": 0,
    }
    call = state / "calls" / f"{heading['started'].replace(':', '')}-{options.gpus}.json"
    writing = threading.Lock()

    def write() -> None:
        with writing:
            heading["seconds"] = time.monotonic() - started
            heading["failed"] = dict(schedule.failed)
            write_json(call, heading)
            known = results_in(state, own_names)
            schedule.jobs = [_timed(job, known) for job in jobs]
            if options.out:
                write_out(options.out, state)

    def finished(job: Job, result: dict[str, Any]) -> None:
        seconds = time.monotonic() - started
        if "error" in result:
            print(f"{seconds:6.1f} {job.name}: {result['error'][-1500:]}", flush=True)
            return
        heading["jobs_done"] += 1
        heading["device"] = result.get("device", heading["device"])
        aps = " ".join(f"{name} {ap:.3f}" for name, ap in result["AP"].items())
        print(
            f"{seconds:6.1f} {job.name}: AP {aps}, {result['seconds']:.1f} s, "
            f"{result.get('epoch_s', 0):.2f} s an epoch, "
            f"{result.get('peak_bytes', 0) / 1e9:.1f} GB",
            flush=True,
        )
        if not writing.locked():
            threading.Thread(target=write).start()  # the worker need not wait for it

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
            places += [(gpu, {"OMP_NUM_THREADS": "1", **shared})] * options.pack
        # First one worker on every GPU: jobs are spread evenly.
        places = [place for first in range(options.pack) for place in places[first :: options.pack]]
        command = [sys.executable, "-m", "benchmarks.ablation_jobs"]
        with contextlib.suppress(KeyboardInterrupt):  # what is there is written
            run_jobs(schedule, command, places, state / "logs" / options.gpus, finished)
        write()
    print(
        f"{heading['jobs_done']} jobs done in {heading['seconds']:.0f} s, "
        f"{len(results_in(state, names))} of {len(jobs)} in all; failed: {sorted(schedule.failed)}",
        flush=True,
    )


def results_in(state: Path, names: Iterable[str]) -> dict[str, Any]:
    """Return the results that there are of jobs, by name, whichever driver did them."""
    files = ((name, state / name / RESULT_FILE) for name in names)
    return {name: read_json(path) for name, path in files if path.is_file()}


def take_over(folders: Iterable[Path], state: Path, jobs: Sequence[Job]) -> set[str]:
    """Write the results of earlier calls into the state, so that their trainings are over.

    Returns the jobs' names; their times say nothing of this call's.

    Not of a network that another job needs: what a call leaves has detections, but no weights.

    Args:
        folders: what `--out` named.
        state: where the jobs' folders are.
        jobs: which to look for, with the epochs and images that they are to have.
    """
    needed = {name for job in jobs for name in job.needs}
    wanted = {
        job.name: job.order
        for job in jobs
        if job.name not in needed and VARIANTS[job.order["variant"]].quantized is None
    }
    earlier = set()
    for folder in folders:
        results = {
            f"{one['variant']}/{one['fold']}": one
            for one in read_json(folder / "ablations.json")["jobs"]
        }
        for path in sorted(folder.glob("found-*.zip")):
            with zipfile.ZipFile(path) as archive:
                for member in archive.namelist():
                    name = member.rpartition("/")[0]
                    order, result = wanted.get(name), results.get(name)
                    own = state / name
                    if order is None or result is None:
                        continue
                    if any(result[key] != order[key] for key in ("epochs", "image_size", "batch")):
                        continue
                    earlier.add(name)
                    if (own / RESULT_FILE).exists():
                        continue
                    own.mkdir(parents=True, exist_ok=True)
                    with atomic_path(own / FOUND_FILE) as temporary:
                        temporary.write_bytes(archive.read(member))
                    write_json(own / RESULT_FILE, result)
    return earlier


def jobs_of(options: argparse.Namespace) -> list[Job]:
    """Return the jobs of the options, variant by variant, in the order given."""
    wanted: dict[str, list[int]] = {}
    for name, fold in options.only or [(name, None) for name in VARIANTS]:
        for needed in (*_all_needs(name), name):
            own = wanted.setdefault(needed, [])
            own += [one for one in (options.folds if fold is None else [fold]) if one not in own]
    device = "cpu" if options.gpus == "cpu" else "cuda"
    epochs_of = {
        "short": options.epochs,
        "large": options.large_epochs,
        "full": options.full_epochs,
    }
    jobs = []
    for name, folds in wanted.items():
        variant = VARIANTS[name]
        size = options.full_size if variant.schedule == "full" else options.size
        epochs = max(1, round(epochs_of[variant.schedule] * variant.stretch))
        for fold in folds:
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
                    _seconds(variant, size, epochs, options),
                )
            )
    return jobs


def _all_needs(name: str) -> list[str]:
    """Return the variants that one needs, each after those that it needs itself."""
    own = VARIANTS[name].needs
    return [other for needed in own for other in (*_all_needs(needed), needed)]


def _seconds(variant: Variant, size: int, epochs: int, options: argparse.Namespace) -> float:
    """Return the guessed seconds of a job among others."""
    workers = options.pack * len(options.gpus.split(","))
    crowd = max(1.0, _CORES * workers / len(os.sched_getaffinity(0)))
    computed = options.pack * _COMPUTED[variant.model] * (size / 640) ** 2
    epoch: float = max(crowd * _ORDERED[variant.model], computed)
    epoch *= 1.3 if variant.teacher else 1.0
    if variant.quantized is None:
        return _OVERHEAD + epoch * epochs
    ranked = 4 * _OVERHEAD if variant.quantized.ranked_by == "ap" else 0
    trained: float = 3 * epoch * options.qat_epochs if variant.quantized.trained else 0.0
    return _OVERHEAD + ranked + trained


def _timed(job: Job, results: Mapping[str, Any]) -> Job:
    """Return the job with the time that others of its kind took, where some are done."""
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


def write_out(out: Path, state: Path) -> None:
    """Write all results so far, of all drivers, into few files: figures, and detections."""
    with one_writer(out):
        names = [f"{name}/{fold}" for name in VARIANTS for fold in range(FOLDS)]
        results = results_in(state, names)
        calls = [read_json(path) for path in sorted((state / "calls").glob("*.json"))]
        parts: list[list[Path]] = [[]]
        size = 0
        for name in results:
            file = state / name / FOUND_FILE
            if size + file.stat().st_size > _FOUND_BYTES:
                parts.append([])
                size = 0
            size += file.stat().st_size
            parts[-1].append(file)
        for number, files in enumerate(parts):
            with (
                atomic_path(out / f"found-{number}.zip") as temporary,
                zipfile.ZipFile(temporary, "w") as archive,  # compressed already
            ):
                for file in files:
                    archive.write(file, file.relative_to(state))
        # Last: what it names is there.
        write_json(
            out / "ablations.json",
            {
                "calls": calls,
                "missing": [name for name in names if name not in results],
                "jobs": list(results.values()),
            },
        )


if __name__ == "__main__":
    main()
