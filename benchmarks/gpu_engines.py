"""The sample checkpoint through one backend on this machine: outputs, AP, speed, failure modes.

    python -m benchmarks.gpu_engines --backend tensorrt-rtx --json benchmarks/results/NAME.json

For each graph below: builds the engine; compares its outputs for 32 validation images with those of
the FP32 graph in ONNX Runtime on the CPU; measures the COCO AP on the 72 validation images, and
the latency at batch 1 and 32. Then it tries what must fail: plans cut short, other batch sizes.

`--onnx DIR` keeps the exported graphs, or takes them from there on a machine that cannot export.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from trt_yolov6 import __version__
from trt_yolov6.benchmarking import benchmark
from trt_yolov6.building import SUFFIXES, build_engine, graph_from_onnx
from trt_yolov6.data.coco import CocoDataset, load_coco, read_coco_image
from trt_yolov6.data.letterbox import letterbox
from trt_yolov6.data.loader import to_input
from trt_yolov6.engines import Engine, LoadOptions, backend, load_engine
from trt_yolov6.engines.manifest import BatchProfile, NmsSettings
from trt_yolov6.environment import package_versions, read_gpus, software_versions
from trt_yolov6.errors import UserError
from trt_yolov6.evaluation import evaluate
from trt_yolov6.files import write_bytes, write_json

ROOT = Path(__file__).parents[1]
CHECKPOINT = ROOT / "samples" / "yolov6n_bccd.pt"
REFERENCE = "fp32"
BATCHES = (1, 32)
PROFILE = BatchProfile(1, 32, 32)
GRAPHS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp16": {"fp16": True},
    "fp16_uint8": {"fp16": True, "uint8_input": True},
    "fp16_b1": {"fp16": True, "batch": BatchProfile(1, 1, 1)},
    "fp16_b32": {"fp16": True, "batch": BatchProfile(32, 32, 32)},
    "fp16_end2end": {"fp16": True, "nms": NmsSettings()},
}
"""Export settings by name; the batch axis is free (1 to 32) unless they say otherwise."""

CONFIDENT = 0.03
"""Boxes are compared where the reference's score reaches this: others are never shown."""


def main() -> None:
    """Run everything and write the results."""
    parser = argparse.ArgumentParser(description="The sample's engines on this machine's backend.")
    parser.add_argument("--backend", default="tensorrt-rtx")
    parser.add_argument("--onnx", type=Path, help="folder of the exported graphs")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=3.0, help="of measuring a batch size")
    parser.add_argument("--graphs", default=",".join(GRAPHS), help="names, separated by commas")
    options = parser.parse_args()
    dataset = load_coco(ROOT / "samples")
    with tempfile.TemporaryDirectory() as folder:
        onnx_folder = options.onnx or Path(folder)
        names = [REFERENCE, *(name for name in options.graphs.split(",") if name != REFERENCE)]
        export_missing(onnx_folder, names)
        pictures = sample_pictures(dataset, max(BATCHES))
        reference = reference_outputs(onnx_folder / f"{REFERENCE}.onnx", pictures)
        gpus = read_gpus()
        state = backend(options.backend).availability()
        results: dict[str, Any] = {
            "command": "python -m benchmarks.gpu_engines " + " ".join(sys.argv[1:]),
            "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "package": __version__,
            "backend": options.backend,
            "backend_version": state.version,
            "device": state.detail,
            "gpu": dataclasses.asdict(gpus[0]) if gpus else None,
            "machine": platform.platform(),
            "versions": software_versions()
            | {key: value for key, value in package_versions().items() if value},
            "images": len(dataset.images),
            "engines": {},
        }
        for name in names:
            print(f"== {name}", flush=True)
            results["engines"][name] = one_engine(
                Path(folder), onnx_folder / f"{name}.onnx", options, dataset, pictures, reference
            )
            write_json(options.json, results)
        results["refusals"] = refusals(Path(folder), options.backend, pictures)
        write_json(options.json, results)


def export_missing(folder: Path, names: list[str]) -> None:
    """Export the graphs that the folder does not hold yet."""
    missing = [name for name in names if not (folder / f"{name}.onnx").exists()]
    if not missing:
        return
    from trt_yolov6.checkpoint import load_checkpoint
    from trt_yolov6.export import ExportSettings, export_onnx, write_onnx

    checkpoint = load_checkpoint(CHECKPOINT)
    for name in missing:
        settings = ExportSettings(**{"batch": PROFILE, **GRAPHS[name]})
        model = export_onnx(checkpoint.model, settings, checkpoint.class_names, verify=False)
        write_onnx(folder / f"{name}.onnx", model)


def sample_pictures(dataset: CocoDataset, count: int) -> list[NDArray[np.uint8]]:
    """Return the first validation images, letterboxed: uint8 (640, 640, 3), RGB."""
    images = dataset.images[:count]
    return [letterbox(read_coco_image(image), (640, 640))[0] for image in images]


def reference_outputs(path: Path, pictures: list[NDArray[np.uint8]]) -> dict[str, NDArray[Any]]:
    """Return the FP32 graph's outputs on the CPU, one picture at a time."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    rows = []
    for picture in pictures:
        planar = np.ascontiguousarray(picture.transpose(2, 0, 1)[None].astype(np.float32) / 255)
        rows.append(session.run(names, {session.get_inputs()[0].name: planar}))
    columns = zip(*rows, strict=True)
    return {name: np.concatenate(parts) for name, parts in zip(names, columns, strict=True)}


def one_engine(
    folder: Path,
    graph_path: Path,
    options: argparse.Namespace,
    dataset: CocoDataset,
    pictures: list[NDArray[np.uint8]],
    reference: dict[str, NDArray[Any]],
) -> dict[str, Any]:
    """Build one graph and measure the engine; where it cannot be built, say why."""
    path = folder / "engines" / f"{graph_path.stem}{SUFFIXES[options.backend]}"
    try:
        graph = graph_from_onnx(graph_path, batch=GRAPHS[graph_path.stem].get("batch", PROFILE))
        built = build_engine(graph, backend=options.backend, output=path)
    except UserError as error:
        print(error, flush=True)
        return {"refused": str(error)}
    found: dict[str, Any] = {
        "build_s": built.seconds,
        "plan_bytes": path.stat().st_size,
        "precision": built.manifest.precision,
        "batch": [graph.batch.min, graph.batch.opt, graph.batch.max],
    }
    start = time.perf_counter()
    with load_engine(path) as engine:
        found["load_s"] = time.perf_counter() - start
        found["device"] = engine.device
        found["first_run_s"] = {}
        found["difference"] = {}
        found["infer_s"] = {}
        for batch in BATCHES:
            if engine.batch.min <= batch <= engine.batch.max:
                found["first_run_s"][batch], found["difference"][batch] = compare(
                    engine, pictures[:batch], reference
                )
                found["infer_s"][batch] = infer_seconds(engine, pictures[:batch])
        print(found, flush=True)
        found["eval"] = evaluate(engine, dataset, progress=False).to_json()
        print("AP", found["eval"]["AP"], "AP50", found["eval"]["AP50"], flush=True)
        found["bench"] = {}
        for batch in found["difference"]:
            result = benchmark(
                engine, batch=batch, duration=options.seconds, warm_up=1.0, progress=False
            ).to_json()
            found["bench"][batch] = result
            print(batch, result["latency_ms"], round(result["throughput_fps"]), "FPS", flush=True)
    return found


def infer_seconds(engine: Engine, pictures: list[NDArray[np.uint8]]) -> float:
    """Return the median seconds of a run with its copies from and to the host."""
    images = to_input(pictures, engine.input)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        engine.infer(images)
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def compare(
    engine: Engine, pictures: list[NDArray[np.uint8]], reference: dict[str, NDArray[Any]]
) -> tuple[float, dict[str, Any]]:
    """Return the seconds of the first run, and how far the outputs are from the reference."""
    images = to_input(pictures, engine.input)
    start = time.perf_counter()
    outputs = engine.infer(images)
    seconds = time.perf_counter() - start
    if engine.output_layout != "split":
        return seconds, {"detections": len(outputs["detections"])}
    scores, boxes = (reference[name][: len(pictures)] for name in ("scores", "boxes"))
    shown = scores.max(axis=1) >= CONFIDENT
    off = np.abs(outputs["boxes"] - boxes).max(axis=1)
    again = engine.infer(images)
    return seconds, {
        "scores_max": float(np.abs(outputs["scores"] - scores).max()),
        "boxes_max_px": float(off[shown].max()),
        "boxes_median_px": float(np.median(off[shown])),
        "boxes_compared": int(shown.sum()),
        "same_when_repeated": all(
            bool(np.array_equal(outputs[name], again[name])) for name in outputs
        ),
    }


def refusals(folder: Path, name: str, pictures: list[NDArray[np.uint8]]) -> dict[str, str]:
    """Return what is said to each mistake; an empty text means that it was not refused."""
    plan = folder / "engines" / f"{REFERENCE}{SUFFIXES[name]}"
    manifest = plan.with_suffix(".json")
    content = plan.read_bytes()
    short = folder / f"short{plan.suffix}"
    found = {}
    for kept in (0, 100, len(content) // 2, len(content) - 1):
        write_bytes(short, content[:kept])
        found[f"{kept} of {len(content)} bytes, no manifest"] = said(
            lambda: backend(name).load(short, None, LoadOptions())
        )
    shutil.copy(manifest, short.with_suffix(".json"))
    text = short.with_suffix(".json").read_text().replace(plan.name, short.name)
    short.with_suffix(".json").write_text(text)
    found["cut short, with its manifest"] = said(lambda: load_engine(short))
    with load_engine(plan) as engine:
        batch = to_input([pictures[0]] * 33, engine.input)
        found["batch 33 of 1 to 32"] = said(lambda: engine.infer(batch))
        found["resident batch 33 of 1 to 32"] = said(lambda: engine.resident_run(batch))
        run = engine.resident_run(batch[:1])
    found["closed"] = said(run)
    return found


def said(call: Callable[[], Any]) -> str:
    """Return the sentence a call is refused with."""
    try:
        call()
    except UserError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    main()
