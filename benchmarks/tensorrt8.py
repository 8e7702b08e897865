"""INT8 and FP16 on TensorRT 8: speed of all variants side by side, accuracy of the sample.

    python -m benchmarks.tensorrt8 graphs DIR [--networks yolov6n ...]   needs PyTorch
    python -m benchmarks.tensorrt8 measure DIR --json FILE               needs TensorRT 8, a GPU

TensorRT 8 runs in Python 3.10, where a machine may have no PyTorch; so the graphs are made first.
Speed is that of networks with random weights, 80 classes, 640 x 640; INT8's ranges are those of
four of the sample's images. Accuracy is that of the detectors that lie in DIR as `NAME.ap.onnx`, on
the sample's validation images. Engines are built side by side, and measured when all are built,
those of one network and batch size interleaved; figures are medians.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trt_yolov6.bench.latency import benchmark_many
from trt_yolov6.common.files import write_json
from trt_yolov6.common.machine import read_gpus, software_versions, timestamp
from trt_yolov6.engines import LoadOptions, load_engine
from trt_yolov6.engines.base import BuildSettings, ImplicitCalibration
from trt_yolov6.engines.build import build_engine
from trt_yolov6.errors import UserError
from trt_yolov6.graph.model import Graph
from trt_yolov6.graph.onnx_import import graph_from_onnx
from trt_yolov6.spec import PredictOptions

ROOT = Path(__file__).parents[1]
NETWORKS = ("yolov6n", "yolov6t", "yolov6s", "yolov6m", "yolov6l", "yolov6l-relu")
BATCHES = (1, 32)
OWN_TACTICS = ("edge_mask_convolutions", "jit_convolutions")
"""TensorRT's own kernels: a machine without cuBLAS and cuDNN has no others."""


@dataclass(frozen=True)
class Job:
    """An engine to build."""

    graph: Path
    network: str
    precision: str
    how: str
    batch: int
    """Batch size to measure."""
    accuracy: bool = False
    calibration: ImplicitCalibration | None = None

    @property
    def name(self) -> str:
        parts = [self.network, self.precision, self.how, f"b{self.batch}"]
        return "-".join([*parts, "ap"] if self.accuracy else parts).replace("+", "")


# --- graphs -------------------------------------------------------------------------------------


def make_graphs(folder: Path, networks: Sequence[str], batches: Sequence[int]) -> None:
    """Write `NETWORK.PRECISION.bBATCH.onnx` for networks with random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_make, [(folder, name, tuple(batches)) for name in networks]))


def _make(job: tuple[Path, str, tuple[int, ...]]) -> None:
    import onnx

    from benchmarks.authors_graph import authors_graph
    from benchmarks.gpu_graphs import as_graph, random_model, with_batch
    from trt_yolov6.data.calibration import calibration_images
    from trt_yolov6.graph.export import ExportSettings, export_onnx
    from trt_yolov6.graph.float16 import tail_nodes, to_fp16
    from trt_yolov6.quantization.calibrators import group_amax
    from trt_yolov6.quantization.collect import collect
    from trt_yolov6.quantization.judge import batches_of
    from trt_yolov6.quantization.mixed_precision import most_sensitive
    from trt_yolov6.quantization.qdq.insert import insert_qdq
    from trt_yolov6.quantization.qdq.placement import place
    from trt_yolov6.quantization.sensitivity import layer_distortions, ranked

    folder, name, batches = job
    network = random_model(name.replace("-", "_"))
    model = export_onnx(network, ExportSettings(), verify=False)
    half = to_fp16(model, keep_float32=tail_nodes(model))
    graph = dataclasses.replace(as_graph(model, name, 640, 1), precision="fp32")
    paths = calibration_images(ROOT / "calib", 4)

    def quantized(layers: Sequence[str]) -> onnx.ModelProto:
        placement = place(model, layers)
        statistics = collect(model, batches_of(graph, paths), placement.tensors)
        amax = group_amax(statistics, placement.groups, "minmax")
        return insert_qdq(model, placement, amax, fp16=True)

    forms = {"fp16": half, "int8": quantized(())}
    if name in ("yolov6n", "yolov6s"):
        placement = place(model)
        statistics = collect(model, batches_of(graph, paths), placement.tensors)
        amax = group_amax(statistics, placement.groups, "minmax")
        ranks = ranked(layer_distortions(model, placement, amax, batches_of(graph, paths)), "snr")
        forms["int8+float6"] = quantized(most_sensitive(ranks, 6))
    for form, content in forms.items():
        for batch in batches:
            onnx.save(with_batch(content, batch), folder / f"{name}.{form}.b{batch}.onnx")
    if name == "yolov6s":
        for batch in batches:
            authors = authors_graph(network, (640, 640), batch)
            for index, node in enumerate(authors.graph.node):
                node.name = node.name or f"{node.op_type}_{index}"
            onnx.save(to_fp16(authors), folder / f"{name}.fp16-authors.b{batch}.onnx")


# --- measuring ----------------------------------------------------------------------------------


def jobs_in(folder: Path) -> list[Job]:
    """Return the builds of a folder's graphs: trained ones, then the largest batches."""
    jobs = []
    for path in sorted(folder.glob("*.b*.onnx")):
        network, form, batch = path.name.removesuffix(".onnx").rsplit(".", 2)
        precision, _, how = form.partition("-")
        how = how or ("ptq" if precision.startswith("int8") else "ours")
        jobs.append(Job(path, network, precision, how, int(batch.removeprefix("b"))))
    order = {name: index for index, name in enumerate(("yolov6n", "yolov6s", "yolov6m"))}
    jobs.sort(key=lambda job: (-job.batch, order.get(job.network, 9), job.network))
    trained: list[Job] = []
    for path in sorted(folder.glob("*.ap.onnx")):
        network, form = path.name.removesuffix(".ap.onnx").split(".", 1)
        precision, _, how = form.partition("-")
        cache = path.with_suffix(".cache")
        given = ImplicitCalibration(cache=cache, fp16=True) if cache.exists() else None
        trained.append(Job(path, network, precision, how or "ours", 8, True, given))
        if form == "fp32":
            for algorithm in ("entropy", "minmax"):
                own = ImplicitCalibration(
                    algorithm="minmax" if algorithm == "minmax" else "entropy", fp16=True
                )
                trained.append(Job(path, network, "int8", f"tensorrt-{algorithm}", 8, True, own))
    return trained + jobs


def build(job: Job, folder: Path, level: int, timing_cache: bool) -> dict[str, Any]:
    """Build an engine; for a process of its own. Returns its row, without times."""
    from trt_yolov6.spec import BatchProfile

    row: dict[str, Any] = {
        "network": job.network,
        "precision": job.precision,
        "how": job.how,
        "batch": job.batch,
        "graph": str(job.graph),
    }
    start = time.perf_counter()
    try:
        batch = BatchProfile(job.batch, job.batch, job.batch)
        graph = graph_from_onnx(job.graph, batch=batch)
        calibration = job.calibration
        if calibration is not None:
            graph = dataclasses.replace(graph, precision="int8")
            if calibration.cache is None:
                calibration = dataclasses.replace(calibration, images=lambda: _images(graph))
        settings = BuildSettings(
            # One cache a process, since each writes its own whole.
            timing_cache=folder / f"timing-{os.getpid()}.cache" if timing_cache else None,
            workspace_mib=4096,
            optimization_level=0 if job.accuracy else level,
            tactic_sources=OWN_TACTICS,
            calibration=calibration,
            progress=False,
        )
        built = build_engine(
            graph, backend="tensorrt", output=folder / f"{job.name}.trt", settings=settings
        )
    except UserError as error:
        print(f"{job.name}: {error}", flush=True)
        return row | {"error": str(error)}
    seconds = time.perf_counter() - start
    print(
        f"{job.name}: {seconds:.0f} s, {built.manifest.int8_layers} of {built.quantized_asked} "
        "in INT8",
        flush=True,
    )
    return row | {
        "engine": built.path.name,
        "build_s": round(seconds, 1),
        "int8_convolutions": built.manifest.int8_layers or 0,
        "convolutions": built.quantized_asked or None,
        "backend_version": built.manifest.backend_version,
        "optimization_level": 0 if job.accuracy else level,
    }


def _images(graph: Graph) -> Iterator[NDArray[Any]]:
    """Yield the calibration images as the graph takes them."""
    from trt_yolov6.data.calibration import calibration_batches
    from trt_yolov6.graph.inputs import input_spec

    return calibration_batches(
        ROOT / "calib", input_spec(graph.model), preprocessing=graph.preprocessing
    )


def measure(rows: list[dict[str, Any]], folder: Path, seconds: float) -> None:
    """Add times to rows, engines of one network and batch size interleaved."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        if "engine" in row and "ap" not in row:
            groups.setdefault((row["network"], row["batch"]), []).append(row)
    for (network, batch), members in groups.items():
        engines = [load_engine(folder / row["engine"]) for row in members]
        results = benchmark_many(
            engines, batch=batch, duration=seconds, warm_up=0.3, progress=False
        )
        for row, result, engine in zip(members, results, engines, strict=True):
            row["ms"] = round(result.latency.median * 1e3, 4)
            row["fps"] = round(result.throughput_fps)
            print(f"{network} b{batch} {row['precision']} {row['how']}: {row['ms']} ms", flush=True)
            engine.close()


def score(rows: list[dict[str, Any]], folder: Path) -> None:
    """Add the sample's AP to the rows of detectors that were trained, and how far outputs differ.

    Differences are those from the same file in ONNX Runtime, over the first eight images: of
    scores, and in pixels of boxes whose score is above 0.3 there.
    """
    from trt_yolov6.data.coco import load_coco
    from trt_yolov6.runtime.evaluate import evaluate

    data = load_coco(ROOT / "samples")
    for row in rows:
        if "ap" in row and "engine" in row:
            with load_engine(folder / row["engine"]) as engine:
                found = evaluate(engine, data, PredictOptions(batch=8), progress=False)
                row["ap"] = None if found.ap is None else round(found.ap, 4)
                images = np.concatenate(list(itertools.islice(_sample_images(row["graph"]), 8)))[:8]
                outputs = engine.infer(images)
            with load_engine(row["graph"], "onnxruntime") as engine:
                expected = engine.infer(images)
            far = expected["scores"].astype(np.float32) - outputs["scores"]
            seen = expected["scores"].max(axis=2) > 0.3
            moved = np.abs(expected["boxes"] - outputs["boxes"])[seen]
            row["score_difference"] = float(np.abs(far).max())
            row["box_difference_px"] = [float(value) for value in np.percentile(moved, [50, 99])]
            print(
                f"{row['network']} {row['precision']} {row['how']}: AP {row['ap']}, scores "
                f"{row['score_difference']:.4f}, boxes {row['box_difference_px']}",
                flush=True,
            )


def _sample_images(graph: str) -> Iterator[NDArray[Any]]:
    from trt_yolov6.data.calibration import calibration_batches
    from trt_yolov6.graph.inputs import input_spec

    model = graph_from_onnx(graph).model
    return calibration_batches(ROOT / "samples" / "images" / "val", input_spec(model))


def layers(folder: Path, engine: str) -> dict[str, float]:
    """Return the microseconds of each layer of an engine, launched one by one."""
    from trt_yolov6.bench.sampling import random_input

    with load_engine(folder / engine, options=LoadOptions(cuda_graph=False)) as loaded:
        times = loaded.layer_times(random_input(loaded, loaded.batch.opt))
    return {name: round(seconds * 1e6, 2) for name, seconds in times.items()}


def layer_kind(name: str) -> str:
    """Return the kind of a layer of our networks, by its name in TensorRT 8."""
    for kind, words in _KINDS.items():
        if any(word in name for word in words):
            return kind
    return "convolutions"


_KINDS = {
    "decoding": ("decode", "scores", "boxes", "anchor_points"),
    "the input's conversion": ("images/quantize", "graph_input_cast"),
    "transposed convolutions": ("neck.up",),
    "pooling": ("pool",),
    "copies between formats": ("Reformatting", "quantize", " copy"),
}
"""Words in layers' names, looked for in this order."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    actions = parser.add_subparsers(dest="action", required=True)
    graphs = actions.add_parser("graphs")
    measuring = actions.add_parser("measure")
    for one in (graphs, measuring):
        one.add_argument("folder", type=Path)
    graphs.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    graphs.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    measuring.add_argument("--json", type=Path, required=True)
    measuring.add_argument("--seconds", type=float, default=1.5)
    measuring.add_argument("--level", type=int, default=2)
    measuring.add_argument("--workers", type=int, default=4)
    measuring.add_argument("--no-timing-cache", action="store_true")
    measuring.add_argument("--deadline", type=float, default=420, help="seconds for building")
    options = parser.parse_args()
    if options.action == "graphs":
        make_graphs(options.folder, options.networks, options.batches)
    else:
        _measure_all(options)


def _measure_all(options: argparse.Namespace) -> None:
    jobs = jobs_in(options.folder)
    until = time.monotonic() + options.deadline
    context = multiprocessing.get_context("spawn")
    rows: list[dict[str, Any]] = []
    pool = ProcessPoolExecutor(options.workers, mp_context=context)
    futures = [
        pool.submit(build, job, options.folder, options.level, not options.no_timing_cache)
        for job in jobs
    ]
    for job, future in zip(jobs, futures, strict=True):
        try:
            row = future.result(timeout=max(0.0, until - time.monotonic()))
        except concurrent.futures.TimeoutError:
            row = {"network": job.network, "precision": job.precision, "how": job.how}
            row |= {"batch": job.batch, "error": "not built in time"}
        rows.append(row | ({"ap": None} if job.accuracy else {}))
    for process in list(pool._processes.values()):
        process.kill()
    pool.shutdown(wait=False, cancel_futures=True)
    gpu = read_gpus()[0]
    found: dict[str, Any] = {
        "device": gpu.name,
        "driver": gpu.driver,
        "date": timestamp(),
        "command": f"python -m benchmarks.tensorrt8 measure {options.folder} --json FILE",
        "software": software_versions(),
        "rows": rows,
    }
    write_json(options.json, found)
    score(rows, options.folder)
    write_json(options.json, found)
    measure(rows, options.folder, options.seconds)
    write_json(options.json, found)
    found["layers"] = {}
    for row in rows:
        if row.get("engine") and row["network"] in ("yolov6n", "yolov6s") and row["batch"] == 32:
            found["layers"][row["engine"]] = layers(options.folder, row["engine"])
    write_json(options.json, found)
    print(json.dumps([row for row in rows if "error" in row], indent=1))


if __name__ == "__main__":
    main()
