"""RepOptimizer and the network with branches compared: AP in float and in plain INT8, on BCCD.

    python -m benchmarks.rep_optimizer --jobs 4 --json benchmarks/results/rep-optimizer.json
    python -m benchmarks.rep_optimizer --quantize-only runs/rep_optimizer --json FILE

Trains, for every seed, the multi-branch network, the hyper-search network, the single-branch one
with RepOptimizer by the scales found, and the single-branch one with ordinary SGD. Then quantizes
the best checkpoint of each: min-max calibration of every convolution, biases as they are, without
equalization and with it. INT8 is judged by ONNX Runtime on the CPU in exact arithmetic, which is
what TensorRT's 32-bit accumulation gives.

Trainings run `--jobs` side by side and take turns on the GPUs that there are. Results are written
after every step. The same command again goes on with what was interrupted; `--quantize-only` does
the last part from the checkpoints in the runs' folder, without a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import onnx

from benchmarks.train_bccd import Places, add_recipe, heading, train_once
from trt_yolov6.checkpoints.loading import Checkpoint, load_checkpoint
from trt_yolov6.common.files import read_json, write_json
from trt_yolov6.common.machine import cpu_model
from trt_yolov6.data.coco import CocoDataset, load_coco
from trt_yolov6.engines import load_engine
from trt_yolov6.graph.export import ExportSettings, graph_from_checkpoint
from trt_yolov6.graph.model import Graph
from trt_yolov6.models import fuse
from trt_yolov6.quantization.pipeline import quantize
from trt_yolov6.quantization.settings import QuantizationSettings
from trt_yolov6.runtime.evaluate import evaluate
from trt_yolov6.spec import PredictOptions

KINDS: dict[str, tuple[str, ...]] = {
    "multi-branch": ("--block", "repvgg"),
    "single-branch": ("--block", "conv"),
    "hyper-search": ("--block", "scaled"),
    "rep-optimizer": (),
}
"""The networks with their `train` options; the last one also gets the scales' checkpoint."""

RESULTS_FILE = "results.json"

_INT8: dict[str, QuantizationSettings] = {
    "INT8 min-max": QuantizationSettings(
        calibrator="minmax", equalize=False, bias_correction=False
    ),
    "INT8 min-max, equalized": QuantizationSettings(calibrator="minmax", bias_correction=False),
}


def main() -> None:
    """Train, quantize, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="n", metavar="n|s|...")
    add_recipe(parser)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--calib", type=Path, default=Path("calib"), help="calibration images")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/rep_optimizer"), help="the runs' folders go there"
    )
    parser.add_argument("--no-quantize", action="store_true", help="leave the second part out")
    parser.add_argument(
        "--quantize-only", type=Path, metavar="RUNDIR", help="the second part, from its checkpoints"
    )
    parser.add_argument("--json", type=Path, help="write the results there as well")
    options = parser.parse_args()
    folder: Path = options.quantize_only or options.output
    files = [options.json] if options.json else []
    if not (
        options.quantize_only and files
    ):  # a folder that was only brought here is left as it is
        files.append(folder / RESULTS_FILE)
    results = Results(files)
    if options.quantize_only:
        results.take_up(folder / RESULTS_FILE)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        results.value.update(heading("rep_optimizer", options), model=options.model)
        _train_all(options, folder, results)
    if not options.no_quantize:
        _quantize_all(options, folder, results)
    print(format_table(results.value))
    if any("error" in run for run in results.value["runs"]):
        sys.exit("not all trainings came to an end; see above.")


class Results:
    """Results so far, written after every step; threads may add to them."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.value: dict[str, Any] = {"runs": [], "quantized": []}
        self._files = files
        self._lock = threading.Lock()

    def take_up(self, file: Path) -> None:
        """Go on with the trainings of an earlier result."""
        earlier = read_json(file)
        self.value = {**earlier, "quantized": []}

    def add(self, part: str, row: Mapping[str, Any]) -> None:
        """Add a row, write, and say so."""
        with self._lock:
            self.value[part].append(dict(row))
            for file in self._files:
                write_json(file, self.value)
        print(_said(row), flush=True)


# --- training -----------------------------------------------------------------------------------


def _train_all(options: argparse.Namespace, folder: Path, results: Results) -> None:
    places = Places(options.jobs, options.device)

    def chain(kinds: Sequence[str], seed: int) -> None:
        for kind in kinds:
            extra = KINDS[kind]
            model: str | None = options.model
            if kind == "rep-optimizer":
                scales = folder / f"hyper-search-{seed}" / "last.pt"
                extra, model = ("--rep-optimizer", str(scales)), None
            with places.taken() as environment:
                run = train_once(
                    options,
                    model,
                    seed,
                    options.epochs,
                    folder / f"{kind}-{seed}",
                    extra=extra,
                    environment=environment,
                )
            results.add("runs", {"kind": kind, **run})

    # RepOptimizer waits for its scales, so these two come one after the other, and first.
    chained = [kind for kind in ("hyper-search", "rep-optimizer") if kind in options.kinds]
    alone = [kind for kind in options.kinds if kind not in chained]
    with ThreadPoolExecutor(options.jobs) as pool:
        waiting = [pool.submit(chain, chained, seed) for seed in options.seeds if chained]
        waiting += [pool.submit(chain, [kind], seed) for seed in options.seeds for kind in alone]
        for future in as_completed(waiting):
            future.result()


# --- quantizing ---------------------------------------------------------------------------------


def _quantize_all(options: argparse.Namespace, folder: Path, results: Results) -> None:
    validation = load_coco(options.data, "val")
    results.value["cpu"] = cpu_model()
    results.value["calibration"] = str(options.calib)
    for run in sorted(results.value["runs"], key=lambda run: list(KINDS).index(run["kind"])):
        kind, seed = run["kind"], run["seed"]
        # The folder may have been moved since.
        path = folder / f"{kind}-{seed}" / "best.pt"
        if path.is_file():
            row = {"kind": kind, "seed": seed, "checkpoint": path.name}
            results.add("quantized", {**row, **figures(path, validation, options.calib)})


def figures(path: Path, validation: CocoDataset, calib: Path) -> dict[str, Any]:
    """Return the AP of a checkpoint in float and in INT8, and how uneven its channels are."""
    checkpoint = load_checkpoint(path)
    assert checkpoint.training is not None
    size = int(checkpoint.training.settings["image_size"])
    graph = graph_from_checkpoint(checkpoint, ExportSettings(image_size=(size, size)))
    row: dict[str, Any] = {
        "epoch": checkpoint.training.epoch,
        "channel_spread": channel_spread(checkpoint),
    }
    row["float"] = _ap(graph, validation)
    for name, settings in _INT8.items():
        quantized = quantize(graph, calib, settings)
        row[name] = {**_ap(quantized.graph, validation), "variant": quantized.table.variant}
    return row


def channel_spread(checkpoint: Checkpoint) -> float:
    """Return how far output channels of the fused 3x3 kernels differ in range.

    For each kernel, the largest range of a channel over the median one; of these, the mean.
    """
    kernels = [
        parameter
        for parameter in fuse(checkpoint.model).parameters()
        if parameter.ndim == 4 and parameter.shape[2] == 3
    ]
    ranges = [kernel.detach().abs().amax((1, 2, 3)) for kernel in kernels]
    return statistics.fmean(float(one.max() / one.median().clamp(min=1e-9)) for one in ranges)


def _ap(graph: Graph, validation: CocoDataset) -> dict[str, Any]:
    """Return AP and AP50 of a graph, with Q/DQ pairs computed exactly."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "graph.onnx"
        onnx.save(graph.model, path)
        with load_engine(path) as engine:
            found = evaluate(engine, validation, PredictOptions(batch=8), progress=False)
    return {"AP": found.ap, "AP50": found.ap50}


# --- showing ------------------------------------------------------------------------------------


def format_table(value: Mapping[str, Any]) -> str:
    """Return the medians over the seeds as text, a network a line."""
    lines = []
    for kind in KINDS:
        runs = [run for run in value["runs"] if run["kind"] == kind]
        cells = [f"{kind:14s} {len(runs)} seeds"]
        trained = [run["best_AP"] for run in runs if run["best_AP"] is not None]
        if trained:
            cells.append(f"best AP in training {statistics.median(trained):.4f}")
        cells += [
            f"{name} {median_ap(value, kind, name):.4f}"
            for name in ("float", *_INT8)
            if median_ap(value, kind, name) is not None
        ]
        if runs:
            lines.append("  ".join(cells))
    return "\n".join(lines)


def median_ap(value: Mapping[str, Any], kind: str, name: str) -> float | None:
    """Return the median AP over the seeds of a network in `float` or a form of INT8."""
    found = [row[name]["AP"] or 0.0 for row in value["quantized"] if row["kind"] == kind]
    return statistics.median(found) if found else None


def _said(row: Mapping[str, Any]) -> str:
    start = f"{row['kind']} seed {row['seed']}:"
    if "error" in row:
        return f"{start} failed: {row['error']}"
    if "float" in row:
        named = ", ".join(f"{name} {row[name]['AP'] or 0:.4f}" for name in ("float", *_INT8))
        return f"{start} {named}, channel spread {row['channel_spread']:.1f}"
    aps = ", ".join(f"{n} {row[n]:.4f}" for n in ("best_AP", "AP") if row[n] is not None)
    return f"{start} {aps}, {row['epoch_s']:.3f} s an epoch, {row['wall_s']:.0f} s"


if __name__ == "__main__":
    main()
