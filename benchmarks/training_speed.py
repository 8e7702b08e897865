"""Training's own speed against the number of GPUs, at one total batch, and what bounds it.

    python -m benchmarks.training_speed --gpus 4 --json benchmarks/results/training-speed.json

N and S on BCCD at 640 pixels and 256 images a step, on 1, 2 and 4 GPUs, with the batch statistics
of all GPUs' images together (the default), with PyTorch's SyncBatchNorm in their place
(`common_statistics`), and on all of them with each GPU's own as well; and, on one, with the
recipe's 32 images a step. Without the default's CUDA graphs, kernel by kernel, it is measured as
well, as is `compile`. Several GPUs take sums in another
order than one, and training makes much of little: how much, one GPU shows with the images of each
batch in another order, and with the normalizations and the exchange of several. Guessed: three
minutes on four H100; fewer GPUs are measured side by side on those that are free, and all of them
last. The images are taken several times, so that an epoch has steps enough. Profiles are of epochs
of their own, after all else.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from trt_yolov6.common.files import read_json, write_json
from trt_yolov6.common.machine import cpu_model, software_versions

EPOCHS = 2
"""The last is the one that is reported: in the first cuDNN looks for its algorithms."""
RECIPE_BATCH = 32
"""Images a step of the recipe, on one GPU."""
COMMON, SYNC, OWN = "common", "SyncBatchNorm, kernel by kernel", "own"
BY_KERNEL = "common, kernel by kernel"
REORDERED, COMPILED = "common, images in another order", "common, compiled"
AS_MANY = "common, as on several"
PROFILE = "profile"


@dataclasses.dataclass(frozen=True)
class Part:
    """A measurement by one set of processes."""

    gpus: int
    batch: int
    kinds: tuple[str, ...]
    """Kinds of batch statistics."""


def parts_of(options: argparse.Namespace) -> list[list[Part]]:
    """Return the parts of each turn, side by side on the GPUs that there are.

    All GPUs come last: what could go wrong between them must not cost what they are compared with.
    """
    counts = [count for count in (1, 2, 4, 8) if count <= options.gpus]
    on_gpu = options.device != "cpu"
    turns: list[list[Part]] = [[]]
    free = options.gpus
    parts = [Part(1, RECIPE_BATCH, (COMMON, BY_KERNEL))] if on_gpu else []
    alone = (BY_KERNEL, REORDERED, AS_MANY, PROFILE, COMPILED) if on_gpu else (REORDERED, AS_MANY)
    for count in counts[:-1]:
        others = alone if count == 1 else (SYNC,) if on_gpu else ()
        parts.append(Part(count, options.batch, (COMMON, *others)))
    for part in parts:
        if part.gpus > free:
            turns.append([])
            free = options.gpus
        turns[-1].append(part)
        free -= part.gpus
    together = (OWN, SYNC, BY_KERNEL, PROFILE) if on_gpu else (OWN,)
    kinds = (COMMON, *(together if counts[-1] > 1 else alone))
    turns.append([Part(counts[-1], options.batch, kinds)])
    return [turn for turn in turns if turn]


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
    parser.add_argument("--steps", type=int, default=6, help="steps of an epoch (6)")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds, of all together")
    parser.add_argument("--device", default="cuda", help="cpu, for a try")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--kinds", nargs="+", help=argparse.SUPPRESS)
    return parser


def _run_all(options: argparse.Namespace) -> None:
    start = time.monotonic()
    result: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.training_speed", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "device": cpu_model() if options.device == "cpu" else _gpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": software_versions(),
        "image_size": options.imgsz,
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data = write_repeated(options.data, folder / "data", options.batch * options.steps)
        turns = parts_of(options)
        for number, turn in enumerate(turns):
            first = 0
            running = []
            for part in turn:
                running.append((part, *_started(options, part, data, folder, first)))
                first += part.gpus
            # The last turn is the longest: it has half of the time for itself.
            left = options.timeout - (time.monotonic() - start)
            ends = time.monotonic() + (left if number == len(turns) - 1 else left / 2)
            for part, process, file in running:
                try:
                    _, said = process.communicate(timeout=max(ends - time.monotonic(), 1))
                except subprocess.TimeoutExpired:
                    process.terminate()  # torchrun ends its processes
                    try:
                        _, said = process.communicate(timeout=10)
                    except subprocess.TimeoutExpired:
                        process.kill()
                        _, said = process.communicate()
                rows = [read_json(one) for one in sorted(file.parent.glob(f"{file.name}-*.json"))]
                result["rows"] += rows
                for row in rows:
                    print(_line(row), flush=True)
                if process.returncode:
                    print(f"{part}: {said[-3000:]}", flush=True)
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
    options: argparse.Namespace, part: Part, data: Path, folder: Path, first: int
) -> tuple[subprocess.Popen[str], Path]:
    file = folder / f"on-{part.gpus}-{part.batch}"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(part.gpus), "-m", "benchmarks.training_speed"]
    command += ["--worker", str(file), "--data", str(data), "--device", options.device]
    command += ["--batch", str(part.batch), "--imgsz", str(options.imgsz)]
    steps = options.steps * options.batch // part.batch  # of the same images
    command += ["--steps", str(steps), "--gpus", str(options.gpus)]
    command += ["--models", *options.models, "--kinds", *part.kinds]
    visible = ",".join(str(first + number) for number in range(part.gpus))
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": visible, "OMP_NUM_THREADS": "2"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    return process, file


def _gpu_name() -> str:
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    names = subprocess.run(command, capture_output=True, text=True).stdout.strip().splitlines()
    return f"{len(names)} x {names[0]}" if names else "?"


def _line(row: dict[str, Any]) -> str:
    what = f"{row['model']} on {row['gpus']}, {row['batch']} images, {row['statistics']}"
    if row["statistics"] == PROFILE:
        return f"{what}: {', '.join(f'{name} {ms:.1f}' for name, ms in row['profile_ms'].items())}"
    differs = f", differs by {row['difference']:.1e}" if "difference" in row else ""
    return (
        f"{what}: {row['step_ms']:.1f} ms a step, {row['images_per_second']:.0f} images/s, "
        f"losses {', '.join(f'{loss:.4f}' for loss in row['losses'])}{differs}"
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
    with _loaded_once():
        for kind in options.kinds:
            for model in options.models:
                try:
                    row = _measured(options, model, kind, world)
                except Exception as error:  # of one kind: the others are still to be measured
                    print(f"{model}, {kind}: {error!r}", file=sys.stderr, flush=True)
                    continue
                if first:
                    number = options.kinds.index(kind)
                    write_json(Path(f"{options.worker}-{number}-{model}.json"), row)
    dist.destroy_process_group()


@contextlib.contextmanager
def _loaded_once() -> Iterator[None]:
    """Let the trainings of a process share their images."""
    from trt_yolov6.training import detection_task
    from trt_yolov6.training.dataset import load_training_set

    @functools.cache
    def once(*what: Any) -> Any:
        return load_training_set(*what, progress=False)

    def loaded(folder: str, split: str, image_size: int, device: Any, **_: Any) -> Any:
        return once(folder, split, image_size, device)

    with mock.patch.object(detection_task, "load_training_set", loaded):
        yield


@contextlib.contextmanager
def _reordered() -> Iterator[None]:
    """Reorder the images of each training batch, which changes only rounding."""
    import torch

    from trt_yolov6.training.dataset import TrainingSet
    from trt_yolov6.training.targets import Targets

    real = TrainingSet.batch

    def batch(data: TrainingSet, *what: Any, **how: Any) -> tuple[torch.Tensor, Targets]:
        images, targets = real(data, *what, **how)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        order = order.to(images.device)
        parts = (targets.boxes, targets.classes, targets.present)
        return images[order], Targets(*(part[order] for part in parts))

    with mock.patch.object(TrainingSet, "batch", batch):
        yield


@contextlib.contextmanager
def _as_many() -> Iterator[None]:
    """Let trainings of one process normalize, and exchange gradients, as one of several does."""
    from trt_yolov6.training import detection_task

    real = detection_task._wrapped

    def wrapped(model: Any, settings: Any, processes: Any, graphed_in: Any) -> Any:
        # The batch is shared by two, as far as that can tell.
        settings = dataclasses.replace(settings, batch=2 * settings.batch)
        return real(model, settings, dataclasses.replace(processes, world=2), graphed_in)

    with mock.patch.object(detection_task, "_wrapped", wrapped):
        yield


def _measured(options: argparse.Namespace, model: str, kind: str, world: int) -> dict[str, Any]:
    from torch.profiler import ProfilerActivity, profile

    from benchmarks.common_statistics import largest_difference, synchronized
    from benchmarks.graph_gradients import gradient_difference
    from trt_yolov6.training.recipe import recipe_for, with_field
    from trt_yolov6.training.trainer import train

    rank = int(os.environ["RANK"])
    steps = options.steps

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
        # SyncBatchNorm waits for the GPU, so that it cannot be captured.
        graphs = kind not in (BY_KERNEL, SYNC, COMPILED)
        settings = dataclasses.replace(settings, cuda_graphs=graphs, compile=kind == COMPILED)
        # Labelled as in all epochs but the first four.
        settings = with_field(settings, "losses.warmup_epochs=0")
        with contextlib.ExitStack() as stack:
            if kind == SYNC:
                stack.enter_context(synchronized())
            if kind == REORDERED:
                stack.enter_context(_reordered())
            if kind == AS_MANY:
                stack.enter_context(_as_many())
            result = train(
                settings, folder, device=options.device, progress=False, state_seconds=1e9
            )
        return list(result.log)

    row: dict[str, Any] = {
        "model": model,
        "gpus": world,
        "batch": options.batch,
        "statistics": kind,
    }
    if kind == SYNC:
        row["difference"] = largest_difference()
    if kind == COMMON and world == 1 and options.device != "cpu":
        row["difference"] = gradient_difference(f"yolov6{model}", 8, 320)
    with tempfile.TemporaryDirectory() as scratch:
        if kind == PROFILE:
            with profile(activities=[ProfilerActivity.CUDA]) as profiled:
                trained(1, Path(scratch) / "run")
            return row | ({"profile_ms": _shares(profiled, steps)} if rank == 0 else {})
        log = trained(EPOCHS, Path(scratch) / "run")
        if rank == 0:
            row |= {
                "steps": steps,
                "step_ms": 1e3 * log[-1]["seconds"] / steps,
                "images_per_second": log[-1]["images_per_second"],
                "losses": [line["loss"] for line in log],
                "epochs_s": [line["seconds"] for line in log],
            }
    return row


_KINDS = (
    ("communication", ("nccl",)),
    ("augmentation", ("grid_sampler",)),
    ("assignment", ("topk", "TopK", "radix", "Sort", "scan")),
    ("normalization", ("batch_norm", "bn_")),
    ("convolution", ("conv", "gemm", "cutlass", "wgrad", "dgrad", "fprop", "xmma", "nvjet")),
    ("optimizer, average", ("multi_tensor",)),
    ("copies", ("Memcpy", "Memset", "nchwToNhwc", "nhwcToNchw")),
    ("elementwise, sums", ("elementwise", "reduce", "Reduce")),
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
