"""Quantization-aware training's figures: AP, time and memory on BCCD, with PTQ and float.

    python -m benchmarks.qat_bccd --data ../shared/data/bccd --json benchmarks/results/NAME.json
    python -m benchmarks.qat_bccd --evaluate-only runs/qat_bccd --json benchmarks/results/NAME.json

The first command trains the sample checkpoint in every way of `CASES`, on a GPU where there is one,
`--jobs` of them side by side (several GPUs are shared out), and judges the fake-quantized network
on the 72 validation images. Each way also leaves its exported Q/DQ graph in `--output`; the second
command judges these in ONNX Runtime, exactly, on a CPU, and adds their AP to the results.

Two ways make visible what INT8 of the sample hides, since PTQ loses nothing there: channels whose
ranges differ up to 32-fold or 256-fold (the same function, rescaled, and not equalized), and 4
bits.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.train_bccd import Places, add_recipe, heading
from trt_yolov6.checkpoints.loading import load_checkpoint
from trt_yolov6.common.files import read_json, write_bytes, write_json
from trt_yolov6.data.coco import load_coco
from trt_yolov6.engines import load_engine
from trt_yolov6.graph.export import ExportSettings, graph_from_checkpoint
from trt_yolov6.graph.model import Graph
from trt_yolov6.quantization.qdq.placement import Placement
from trt_yolov6.quantization.settings import QuantizationSettings
from trt_yolov6.runtime.evaluate import Evaluation, evaluate
from trt_yolov6.spec import PredictOptions
from trt_yolov6.training.dataset import load_training_set
from trt_yolov6.training.qat.export import trained_graph
from trt_yolov6.training.qat.onnx_module import Quantization, Trained
from trt_yolov6.training.qat.preparation import Start, prepare_graph
from trt_yolov6.training.qat.settings import QatSettings
from trt_yolov6.training.qat.training import evaluate_network, train_quantized

WEIGHTS = Path("samples/yolov6n_bccd.pt")
CALIB = Path("calib")
PARTIAL = 6
"""Most sensitive layers that partial QAT leaves in float."""

How = Literal["float", "ptq", "float trained", "qat", "qat+cwd"]


@dataclass(frozen=True)
class Case:
    """One way to a quantized network."""

    network: Literal["sample", "rescaled 32", "rescaled 256"]
    how: How
    bits: int = 8
    float_layers: int = 0
    tuned: bool = False
    """Calibrator and equalization as `build --int8` chooses them; else min-max (4 bits: least
    squared error), not equalized. Biases are not corrected."""

    @property
    def name(self) -> str:
        """Name for files."""
        parts = [self.network, f"{self.bits}bit" if self.how[0] != "f" else "", self.how]
        parts += [f"{self.float_layers}float" if self.float_layers else ""]
        parts += ["tuned" if self.tuned else ""]
        return "-".join(part.replace(" ", "_") for part in parts if part)

    @property
    def trains(self) -> bool:
        """True where anything is trained."""
        return self.how in ("float trained", "qat", "qat+cwd")


CASES: tuple[Case, ...] = (
    Case("sample", "float"),
    Case("sample", "float trained"),
    Case("sample", "ptq"),
    Case("sample", "ptq", tuned=True),
    Case("sample", "ptq", float_layers=PARTIAL),
    Case("sample", "qat"),
    Case("sample", "qat+cwd"),
    Case("sample", "qat", float_layers=PARTIAL),
    Case("sample", "qat+cwd", float_layers=PARTIAL),
    *(Case("rescaled 32", how) for how in ("ptq", "qat", "qat+cwd")),
    *(Case("rescaled 256", how) for how in ("ptq", "qat", "qat+cwd")),
    *(Case("sample", how, bits=4) for how in ("ptq", "qat", "qat+cwd")),
)


def main() -> None:
    """Run all cases, or one of them, or judge what they exported."""
    options = _parser().parse_args()
    if options.evaluate_only:
        _evaluate_exported(options)
    elif options.case == "memory":
        write_json(options.output / "memory.json", _float_memory(options))
    elif options.case:
        case = next(item for item in CASES if item.name == options.case)
        _run_case(case, options)
    else:
        _run_all(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_recipe(parser)
    parser.set_defaults(epochs=10, batch=16)
    parser.add_argument("--only", nargs="+", help="cases to run (all)", metavar="CASE")
    parser.add_argument("--calib-images", type=int, help="of calib/ (all)")
    parser.add_argument("--output", type=Path, default=Path("runs/qat_bccd"))
    parser.add_argument("--evaluate-only", type=Path, metavar="DIR", help="judge its graphs")
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    return parser


# --- all cases ----------------------------------------------------------------------------------


def _run_all(options: argparse.Namespace) -> None:
    on_gpu = torch.cuda.is_available() and options.device != "cpu"
    result: dict[str, Any] = {
        **heading("qat_bccd", options),
        "devices": max(torch.cuda.device_count() if on_gpu else 0, 1),
        "settings": options.set,
        "float_training": None,
        "rows": [],
    }
    started = time.perf_counter()
    places = Places(options.jobs, options.device)

    def run(name: str, seeds: Sequence[int]) -> list[dict[str, Any]]:
        with places.taken() as environment:
            return _in_process(options, name, seeds, environment)

    def finished(row: dict[str, Any]) -> None:
        result["seconds"] = time.perf_counter() - started
        print(_line(row), flush=True)
        if options.json:
            write_json(options.json, result)

    cases = [case for case in CASES if not options.only or case.name in options.only]
    if on_gpu:
        result["float_training"] = run("memory", options.seeds[:1])[0]
        finished({"case": "memory", **result["float_training"]})
        # The first training has the GPU to itself: its time is the one that counts.
        (alone,) = run("sample-8bit-qat+cwd", options.seeds[:1])
        result["alone"] = {name: alone.get(name) for name in ("train_s", "peak_bytes", "error")}
        finished({**alone, "case": "alone"})
    with ThreadPoolExecutor(options.jobs) as pool:
        waiting = []
        # What chooses the layers of partial training goes first; then the longest.
        for case in sorted(cases, key=lambda case: (not case.trains, -case.bits)):
            if case.float_layers and not _float_layers_file(case, options).is_file():
                chosen = dataclasses.replace(case, how="ptq").name
                result["rows"] += run(chosen, options.seeds[:1])
                finished(result["rows"][-1])
                if case.name == chosen:
                    continue
            elif any(row["case"] == case.name for row in result["rows"]):
                continue
            seeds = options.seeds if case.trains else options.seeds[:1]
            waiting.append(pool.submit(run, case.name, seeds))
        for future in as_completed(waiting):
            for row in future.result():
                result["rows"].append(row)
                finished(row)
    print(summary(result))


def _in_process(
    options: argparse.Namespace, name: str, seeds: Sequence[int], place: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Run a case in a process of its own and return what it came to, for each seed."""
    command = [sys.executable, "-m", "benchmarks.qat_bccd", "--case", name]
    command += ["--seeds", *map(str, seeds)]
    for option in ("data", "epochs", "batch", "imgsz", "output", "device", "calib_images"):
        value = getattr(options, option)
        if value is not None:
            command += [f"--{option.replace('_', '-')}", str(value)]
    for assignment in options.set:
        command += ["--set", assignment]
    environment = {**os.environ, **place}
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    environment.setdefault("OMP_NUM_THREADS", str(threads))
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        return [{"case": name, "seed": seeds[0], "error": done.stderr.strip()[-2000:]}]
    return [read_json(_result_file(options.output, name, seed)) for seed in seeds]


def _result_file(folder: Path, name: str, seed: int) -> Path:
    return folder / (f"{name}.json" if name == "memory" else f"{name}-{seed}.json")


def _float_layers_file(case: Case, options: argparse.Namespace) -> Path:
    """Where the names of the most sensitive layers are kept: finding them takes a while."""
    folder: Path = options.output
    return folder / f"float_layers-{case.float_layers}.json"


def _line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{row['case']}: failed: {row['error']}"
    parts = [f"{row['case']:36s}"]
    parts += [f"seed {row['seed']}" if "seed" in row else ""]
    for name in ("AP", "AP_exported"):
        if row.get(name) is not None:
            parts.append(f"{name} {row[name]:.4f}")
    if row.get("train_s"):
        parts.append(f"{row['train_s']:.1f} s")
    if row.get("peak_bytes"):
        parts.append(f"{row['peak_bytes'] / 1e9:.2f} GB")
    return "  ".join(part for part in parts if part)


def summary(result: dict[str, Any]) -> str:
    """Return the median AP of each case, a line each."""
    lines = []
    for case in CASES:
        found = [row["AP"] for row in result["rows"] if row["case"] == case.name and "AP" in row]
        if found:
            lines.append(f"{case.name:36s} AP {statistics.median(found):.4f} of {len(found)}")
    return "\n".join(lines)


# --- one case -----------------------------------------------------------------------------------


def _run_case(case: Case, options: argparse.Namespace) -> None:
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    started = time.perf_counter()
    start = _start(case, options)
    common: dict[str, Any] = {
        "case": case.name,
        **dataclasses.asdict(case),
        "layers": len(start.quantization.placement.layers),
        "float_layers": sorted(start.quantization.placement.float_layers),
        "prepare_s": time.perf_counter() - started,
    }
    data = None
    if case.trains:
        data = load_training_set(
            options.data, _train_split(options), options.imgsz, device, progress=False
        )
    for seed in options.seeds:
        row = {**common, "seed": seed}
        trained: Trained | None = None
        if case.how == "float":
            network = start.teacher(device)
        elif case.how == "ptq":
            network = start.student(device).eval()
            trained = network.trained()
        else:
            result = train_quantized(
                start,
                _settings(case, options, seed),
                device=device,
                progress=False,
                data=data,
            )
            network, trained = result.network, result.trained
            row |= {
                "train_s": result.seconds,
                "epoch_s": statistics.median(result.epoch_seconds),
                "peak_bytes": result.peak_bytes,
                "log": list(result.log),
            }
        row |= _figures(evaluate_network(network, start.graph, load_coco("samples", "val")))
        if trained is not None and case.bits == 8 and case.how != "float trained":
            file = f"{case.name}-{seed}.onnx"
            model = trained_graph(start, trained).model
            write_bytes(options.output / file, model.SerializeToString())
            row["file"] = file
        write_json(_result_file(options.output, case.name, seed), row)


def _start(case: Case, options: argparse.Namespace) -> Start:
    checkpoint = load_checkpoint(WEIGHTS)
    settings = ExportSettings(image_size=(options.imgsz, options.imgsz))
    graph = graph_from_checkpoint(checkpoint, settings)
    if case.network != "sample":
        graph = _rescaled(graph, float(case.network.split()[1]))
    float_layers: int | tuple[str, ...] = case.float_layers or ()
    chosen = _float_layers_file(case, options)
    if case.float_layers and chosen.is_file():
        float_layers = tuple(read_json(chosen))
    quantization = QuantizationSettings(
        calibrator="auto" if case.tuned else "minmax",
        equalize=case.tuned,
        float_layers=float_layers,
        image_limit=options.calib_images,
    )
    start = prepare_graph(graph, checkpoint.arch, CALIB, quantization=quantization, bits=case.bits)
    if isinstance(float_layers, int):
        write_json(chosen, list(start.graph.float_layers))
    if case.how in ("float", "float trained"):
        nothing = Quantization(Placement((), (), (), {}, frozenset()), {}, {}, {})
        start = dataclasses.replace(start, quantization=nothing)
    return start


def _rescaled(graph: Graph, most: float) -> Graph:
    """Return the same function with channels multiplied by 1 to `most`, evenly in logarithms."""
    from benchmarks.rescaling import rescale_channels

    model = rescale_channels(graph.model, np.random.default_rng(0), 1, most)
    return dataclasses.replace(graph, model=model)


def _settings(case: Case, options: argparse.Namespace, seed: int) -> QatSettings:
    changes = _changes(options)
    return QatSettings(
        data=str(options.data),
        epochs=options.epochs,
        batch=options.batch,
        seed=seed,
        **{"distillation": case.how == "qat+cwd", **changes},
    )


def _changes(options: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of --set; their values are JSON."""
    pairs = (assignment.partition("=") for assignment in options.set)
    return {name: json.loads(value) for name, _, value in pairs}


def _train_split(options: argparse.Namespace) -> str:
    return str(_changes(options).get("train_split", "train"))


def _figures(found: Evaluation) -> dict[str, Any]:
    return {"AP": found.ap, "AP50": found.ap50, "evaluation_s": found.wall_seconds}


def _float_memory(options: argparse.Namespace) -> dict[str, Any]:
    """Train the checkpoint in float for an epoch, as `train` does, and return its most memory."""
    import tempfile

    from trt_yolov6.training.recipe import recipe_for
    from trt_yolov6.training.trainer import train

    found: dict[str, Any] = {}
    checkpoint = load_checkpoint(WEIGHTS)
    for precision in ("auto", "fp32"):
        settings = recipe_for(
            checkpoint.arch.name,
            str(options.data),
            weights=checkpoint,
            epochs=1,
            batch=options.batch,
            image_size=options.imgsz,
            val_split=None,
            precision=precision,
        )
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        with tempfile.TemporaryDirectory() as folder:
            train(settings, Path(folder) / "run", device="cuda", progress=False)
        name = "peak_bytes" if precision == "auto" else f"peak_bytes_{precision}"
        found[name] = torch.cuda.max_memory_allocated()
    return found


# --- exported graphs ----------------------------------------------------------------------------


def _evaluate_exported(options: argparse.Namespace) -> None:
    """Judge the graphs of an earlier run, and add their AP to its results."""
    result = read_json(options.json) if options.json else {"rows": []}
    if not options.json:
        files = sorted(options.evaluate_only.glob("*.json"))
        result["rows"] = [read_json(file) for file in files if file.name != "memory.json"]
    dataset = load_coco("samples", "val")
    for row in result["rows"]:
        path = options.evaluate_only / row.get("file", "")
        if not path.is_file() or (options.only and row["case"] not in options.only):
            continue
        with load_engine(path) as engine:
            found = evaluate(engine, dataset, PredictOptions(batch=4), progress=False)
        row["AP_exported"], row["AP50_exported"] = found.ap, found.ap50
        print(_line(row), flush=True)
        if options.json:
            write_json(options.json, result)


if __name__ == "__main__":
    main()
