"""Training's own speed against the number of GPUs, at one total batch, and what bounds it.

    python -m benchmarks.training_speed --gpus 4 --json benchmarks/results/training-speed.json

N and S on BCCD at 640 pixels and 256 images a step, on 1, 2 and 4 GPUs, with the batch statistics
of all GPUs' images together (the default), and on all of them with each GPU's own as well. A
minute and a half on four H100. Fewer GPUs are measured side by side on those that are free. The
images are taken several times, so that an epoch has steps enough. The profile is of an epoch of its
own.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from trt_yolov6.common.files import read_json, write_json
from trt_yolov6.common.machine import cpu_model, software_versions

EPOCHS = 3
"""The last is the one that is reported: in the first cuDNN looks for its algorithms."""


def main() -> None:
    """Measure, or be one of the processes that are measured."""
    options = _parser().parse_args()
    if options.worker is None:
        _run_all(options)
    else:
        _work(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/bccd"))
    parser.add_argument("--gpus", type=int, default=4)
    parser.add_argument("--models", nargs="+", default=["n", "s"])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--steps", type=int, default=8, help="steps of an epoch (8)")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds, of all together")
    parser.add_argument("--device", default="cuda", help="cpu, for a try")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    return parser


def _run_all(options: argparse.Namespace) -> None:
    start = time.monotonic()
    counts = [count for count in (1, 2, 4, 8) if count <= options.gpus]
    # The largest alone, then all others side by side.
    turns: list[list[int]] = [[counts[-1]], []]
    free = options.gpus
    for count in reversed(counts[:-1]):
        if count > free:
            turns.append([])
            free = options.gpus
        turns[-1].append(count)
        free -= count
    result: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.training_speed", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "device": cpu_model() if options.device == "cpu" else _gpu_name(),
        "cores": os.cpu_count(),
        "versions": software_versions(),
        "batch": options.batch,
        "image_size": options.imgsz,
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data = write_repeated(options.data, folder / "data", options.batch * options.steps)
        for turn in filter(None, turns):
            first = 0
            running = []
            for count in turn:
                running.append(_started(options, data, folder, count, first))
                first += count
            for count, process, file in running:
                left = options.timeout - (time.monotonic() - start)
                try:
                    _, said = process.communicate(timeout=max(left, 1))
                except subprocess.TimeoutExpired:
                    process.terminate()  # torchrun ends its processes
                    _, said = process.communicate()
                rows = [read_json(one) for one in sorted(file.parent.glob(f"{file.name}-*.json"))]
                result["rows"] += rows
                for row in rows:
                    print(_line(row), flush=True)
                if process.returncode:
                    print(f"{count} GPUs: {said[-3000:]}", flush=True)
            if options.json:
                write_json(options.json, result)
    result["seconds"] = time.monotonic() - start
    if options.json:
        write_json(options.json, result)


def write_repeated(source: Path, target: Path, count: int) -> Path:
    """Write a data set of `count` images: those of a split, under as many names as it takes."""
    content = read_json(source / "annotations" / "instances_train.json")
    (target / "images" / "train").mkdir(parents=True)
    (target / "annotations").mkdir()
    images, annotations = [], []
    own = content["images"]
    boxes: dict[int, list[Any]] = {image["id"]: [] for image in own}
    for entry in content["annotations"]:
        boxes[entry["image_id"]].append(entry)
    for number in range(count):
        image = own[number % len(own)]
        name = f"{number}-{image['file_name']}"
        path = (source / "images" / "train" / image["file_name"]).resolve()
        (target / "images" / "train" / name).symlink_to(path)
        images.append({**image, "id": number + 1, "file_name": name})
        annotations += [{**entry, "image_id": number + 1} for entry in boxes[image["id"]]]
    for number, entry in enumerate(annotations, start=1):
        entry["id"] = number
    content = {"images": images, "annotations": annotations, "categories": content["categories"]}
    write_json(target / "annotations" / "instances_train.json", content)
    return target


def _started(
    options: argparse.Namespace, data: Path, folder: Path, count: int, first: int
) -> tuple[int, subprocess.Popen[str], Path]:
    file = folder / f"on-{count}"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(count), "-m", "benchmarks.training_speed"]
    command += ["--worker", str(file), "--data", str(data), "--device", options.device]
    command += ["--batch", str(options.batch), "--imgsz", str(options.imgsz)]
    command += ["--steps", str(options.steps), "--gpus", str(options.gpus)]
    command += ["--models", *options.models]
    visible = ",".join(str(first + number) for number in range(count))
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": visible, "OMP_NUM_THREADS": "2"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    return count, process, file


def _gpu_name() -> str:
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    names = subprocess.run(command, capture_output=True, text=True).stdout.strip().splitlines()
    return f"{len(names)} x {names[0]}" if names else "?"


def _line(row: dict[str, Any]) -> str:
    shares = ", ".join(f"{name} {ms:.1f}" for name, ms in row.get("profile_ms", {}).items())
    return (
        f"{row['model']} on {row['gpus']}, {row['statistics']} statistics: {row['step_ms']:.1f} ms "
        f"a step, {row['images_per_second']:.0f} images/s, loss {row['loss']:.4f}; {shares}"
    )


# --- one of the processes -----------------------------------------------------------------------


def _work(options: argparse.Namespace) -> None:
    import torch
    import torch.distributed as dist

    torch.backends.cudnn.benchmark_limit = 3  # trying ten algorithms would take half of the time
    on_gpu = options.device != "cpu"
    world = int(os.environ["WORLD_SIZE"])
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    first = dist.get_rank() == 0
    for model in options.models:
        for kind in _kinds(options, world):
            try:
                row = _measured(options, model, kind, world)
            except RuntimeError as error:  # of one kind: the others are still to be measured
                print(f"{model}, {kind} statistics: {error}", file=sys.stderr, flush=True)
                continue
            if first:
                write_json(Path(f"{options.worker}-{model}-{kind}.json"), row)
    dist.destroy_process_group()


COMMON, OWN, NO_WAITS = "common", "own", "common-without-waits"


def _kinds(options: argparse.Namespace, world: int) -> tuple[str, ...]:
    """Return the kinds of batch statistics to measure: all of them on the most GPUs."""
    if world == 1:
        return (COMMON,)
    candidate = () if options.device == "cpu" else (NO_WAITS,)
    return (COMMON, *candidate, OWN) if world == options.gpus else (COMMON, *candidate)


def _measured(options: argparse.Namespace, model: str, kind: str, world: int) -> dict[str, Any]:
    from torch.profiler import ProfilerActivity, profile

    from benchmarks.common_statistics import without_waits
    from trt_yolov6.training.log import read_log
    from trt_yolov6.training.recipe import recipe_for
    from trt_yolov6.training.trainer import train

    rank = int(os.environ["RANK"])

    def trained(epochs: int, folder: Path) -> list[dict[str, Any]]:
        settings = recipe_for(
            f"yolov6{model}",
            str(options.data),
            epochs=epochs,
            batch=options.batch,
            image_size=options.imgsz,
            val_split=None,
            common_statistics=kind != OWN,
        )
        with without_waits() if kind == NO_WAITS else contextlib.nullcontext():
            train(settings, folder, device=options.device, progress=False, state_seconds=1e9)
        return read_log(folder) if rank == 0 else []

    steps = options.steps
    with tempfile.TemporaryDirectory() as scratch:
        log = trained(EPOCHS, Path(scratch) / "run")
        row: dict[str, Any] = {
            "model": model,
            "gpus": world,
            "statistics": kind,
        }
        if options.device != "cpu" and kind == COMMON and world in (1, options.gpus):
            with profile(activities=[ProfilerActivity.CUDA]) as profiled:
                trained(1, Path(scratch) / "profiled")
            if rank == 0:
                row["profile_ms"] = _shares(profiled, steps)
        if rank == 0:
            row |= {
                "steps": steps,
                "step_ms": 1e3 * log[-1]["seconds"] / steps,
                "images_per_second": log[-1]["images_per_second"],
                "loss": log[-1]["loss"],
                "epochs_s": [line["seconds"] for line in log],
            }
    return row


_KINDS = (
    ("communication", ("nccl",)),
    ("normalization", ("batch_norm", "bn_")),
    ("convolution", ("conv", "gemm", "cutlass", "wgrad", "dgrad", "fprop", "xmma", "nvjet")),
    ("optimizer, average", ("multi_tensor",)),
    ("copies", ("Memcpy", "Memset", "nchwToNhwc", "nhwcToNchw")),
)


def _shares(profiled: Any, steps: int) -> dict[str, float]:
    """Return the GPU's time in kernels by what they do, in ms a step, of a profile of `steps`."""
    sums: dict[str, float] = {}
    for event in profiled.events():
        if str(event.device_type) != "DeviceType.CUDA":
            continue
        kind = next(
            (kind for kind, parts in _KINDS if any(part in event.name for part in parts)), "other"
        )
        sums[kind] = sums.get(kind, 0.0) + event.time_range.elapsed_us() / 1e3 / steps
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


if __name__ == "__main__":
    main()
