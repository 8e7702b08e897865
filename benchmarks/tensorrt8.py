"""INT8 and FP16 on TensorRT 8: speed of all variants side by side, accuracy of the sample.

    python -m benchmarks.tensorrt8 graphs DIR [--peers SKELETONS]      needs PyTorch for ours
    python -m benchmarks.tensorrt8 build DIR --gpus 0 1 --deadline S   needs TensorRT 8, GPUs
    python -m benchmarks.tensorrt8 measure DIR --json FILE             needs TensorRT 8, a GPU

TensorRT 8 runs in Python 3.10, where a machine may have no PyTorch; so the graphs are made first.
Speed is that of networks with random weights, 80 classes (S also with 3), 640 x 640; INT8's ranges
are those of four of the sample's images. A calibration cache is written next to `int8-cache`, which
has no Q/DQ: TensorRT itself chooses what to compute in INT8. Accuracy is that of the detectors that
lie in DIR as `NAME.ap.onnx`, on the sample's validation images; other detectors with weights of
their own lie there as `NAME.PRECISION.bBATCH.onnx`, as the rest. Several processes build on a GPU;
what is built already is left, so that a run that was stopped goes on. Engines of one network and
batch size are measured interleaved; figures are medians.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import threading
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
from trt_yolov6.data.coco import CocoDataset, load_coco
from trt_yolov6.detectors.detections import Detections
from trt_yolov6.detectors.labels import objects_of
from trt_yolov6.engines import LoadOptions, load_engine
from trt_yolov6.engines.base import BuildSettings, Engine, ImplicitCalibration
from trt_yolov6.engines.build import build_engine
from trt_yolov6.errors import UserError
from trt_yolov6.graph.model import Graph
from trt_yolov6.graph.onnx_import import graph_from_onnx
from trt_yolov6.quantization.resampling import interval, matched
from trt_yolov6.runtime.evaluate import evaluate
from trt_yolov6.runtime.predict import detect
from trt_yolov6.spec import PredictOptions

ROOT = Path(__file__).parents[1]
NETWORKS = ("yolov6n", "yolov6t", "yolov6s", "yolov6m", "yolov6l", "yolov6l-relu")
FEW_CLASSES = "yolov6s-3classes"
"""S as BCCD's detectors are: decoding 80 classes takes a part of the time that INT8 does not."""
BATCHES = (1, 32)
OWN_TACTICS = ("edge_mask_convolutions", "jit_convolutions")
"""TensorRT's own kernels: a machine without cuBLAS and cuDNN has no others."""
PARTS = ("speed", "layers", "accuracy")
PEER = "own-export"
"""`how` of the detectors of `benchmarks.peers`."""


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
    with ProcessPoolExecutor(6, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_make, [(folder, name, tuple(batches)) for name in networks]))


def _make(job: tuple[Path, str, tuple[int, ...]]) -> None:
    import onnx
    import torch

    from benchmarks.authors_graph import authors_graph
    from benchmarks.gpu_graphs import as_graph, random_model, with_batch
    from trt_yolov6.data.calibration import calibration_images
    from trt_yolov6.graph.export import ExportSettings, export_onnx
    from trt_yolov6.graph.float16 import tail_nodes, to_fp16
    from trt_yolov6.models.blocks import BottleRep
    from trt_yolov6.quantization.calibrators import group_amax
    from trt_yolov6.quantization.collect import collect
    from trt_yolov6.quantization.implicit import inner_tensors
    from trt_yolov6.quantization.judge import batches_of
    from trt_yolov6.quantization.mixed_precision import layer_costs, most_sensitive, rankings
    from trt_yolov6.quantization.qdq.insert import insert_qdq
    from trt_yolov6.quantization.qdq.placement import place
    from trt_yolov6.quantization.sensitivity import layer_distortions, ranked
    from trt_yolov6.quantization.tensorrt_cache import write_cache

    folder, name, batches = job
    few = name == FEW_CLASSES
    variant = name.removesuffix("-3classes").replace("-", "_")
    network = random_model(variant, 3) if few else random_model(variant)
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, BottleRep) and module.alpha is not None:
            # Shortcuts' factors are 1 before training only.
            with torch.no_grad():
                module.alpha.copy_(0.8 + 0.4 * torch.rand(1, generator=generator))
    model = export_onnx(network, ExportSettings(), verify=False)
    half = to_fp16(model, keep_float32=tail_nodes(model))
    graph = dataclasses.replace(as_graph(model, name, 640, 1), precision="fp32")
    paths = calibration_images(ROOT / "calib", 4)

    def quantized(layers: Sequence[str]) -> onnx.ModelProto:
        placement = place(model, layers)
        statistics = collect(model, batches_of(graph, paths), placement.tensors)
        amax = group_amax(statistics, placement.groups, "minmax")
        return insert_qdq(model, placement, amax, fp16=True)

    forms = {"fp16": half, "int8": quantized(()), "int8-cache": model}
    names = (model.graph.input[0].name, *inner_tensors(model))
    ranges = group_amax(collect(model, batches_of(graph, paths), names), (), "minmax")
    if name in ("yolov6n", "yolov6s"):
        placement = place(model)
        statistics = collect(model, batches_of(graph, paths), placement.tensors)
        amax = group_amax(statistics, placement.groups, "minmax")
        distortions = layer_distortions(model, placement, amax, batches_of(graph, paths))
        forms["int8+float6"] = quantized(most_sensitive(ranked(distortions, "snr").names, 6))
        worth = rankings(distortions, layer_costs(model))[-1]
        forms["int8+float6-by_time"] = quantized(worth[:6])
    for form, content in forms.items():
        for batch in batches:
            path = folder / f"{name}.{form}.b{batch}.onnx"
            onnx.save(with_batch(content, batch), path)
            if form == "int8-cache":
                write_cache(path.with_suffix(".cache"), ranges, "8.6.0")
    if name == "yolov6s":
        for batch in batches:
            authors = authors_graph(network, (640, 640), batch)
            for index, node in enumerate(authors.graph.node):
                node.name = node.name or f"{node.op_type}_{index}"
            onnx.save(to_fp16(authors), folder / f"{name}.fp16-authors.b{batch}.onnx")


def make_peers(skeletons: Path, folder: Path) -> None:
    """Fill the skeletons of `benchmarks.peers` and write them in half precision throughout.

    That is the graph and the flag that `trtexec --fp16` builds from.
    """
    import onnx

    from benchmarks.peers import load
    from trt_yolov6.graph.float16 import to_fp16

    for path in sorted(skeletons.glob("*.b*.onnx")):
        name, batch = path.name.removesuffix(".onnx").rsplit(".", 1)
        target = folder / f"{name}.fp16-{PEER}.{batch}.onnx"
        if not target.exists():
            onnx.save(to_fp16(load(path)), target)


# --- building -----------------------------------------------------------------------------------


def jobs_in(folder: Path) -> list[Job]:
    """Return the builds of a folder's graphs: large batches, then accuracy, one image, peers."""
    jobs: list[Job] = []
    for path in sorted(folder.glob("*.b*.onnx")):
        network, form, batch = path.name.removesuffix(".onnx").rsplit(".", 2)
        precision, _, how = form.partition("-")
        how = how or ("ptq" if precision.startswith("int8") else "ours")
        given = _cache_of(path)
        jobs.append(
            Job(path, network, precision, how, int(batch.removeprefix("b")), calibration=given)
        )
    for path in sorted(folder.glob("*.ap.onnx")):
        network, form = path.name.removesuffix(".ap.onnx").split(".", 1)
        precision, _, how = form.partition("-")
        given = _cache_of(path)
        how = how or ("ptq" if precision.startswith("int8") else "ours")
        jobs.append(Job(path, network, precision, how, 8, True, given))
        if form == "fp32":
            for algorithm in ("entropy", "minmax"):
                own = ImplicitCalibration(
                    algorithm="minmax" if algorithm == "minmax" else "entropy", fp16=True
                )
                jobs.append(Job(path, network, "int8", f"tensorrt-{algorithm}", 8, True, own))
    return sorted(jobs, key=_urgency)


def _cache_of(path: Path) -> ImplicitCalibration | None:
    """Return the calibration that lies next to a graph without Q/DQ."""
    cache = path.with_suffix(".cache")
    return ImplicitCalibration(cache=cache, fp16=True) if cache.exists() else None


def _urgency(job: Job) -> tuple[int, ...]:
    # What takes longest first, so that the last builds end together.
    early = ("yolov6l-relu", "yolov6l", "yolov6m", "yolov6s", "yolov6n", "yolov6t")
    place = early.index(job.network) if job.network in early else len(early)
    if job.how == PEER:
        return (3, -job.batch)
    if job.accuracy:
        return (1, 0)
    if job.batch > 1 and place < len(early):
        return (0, place)
    return (2, place, -job.batch)


def build(job: Job, folder: Path, level: int | None) -> dict[str, Any]:
    """Build an engine into a folder. Returns its row, without times."""
    from trt_yolov6.spec import BatchProfile

    row: dict[str, Any] = {
        "network": job.network,
        "precision": job.precision,
        "how": job.how,
        "batch": job.batch,
        "graph": str(job.graph),
    }
    start = time.perf_counter()
    if level is not None and job.accuracy:
        level = 0  # it computes the same, whichever kernels
    try:
        batch = BatchProfile(job.batch, job.batch, job.batch)
        decoder = "ppyoloe" if job.network.startswith("ppyoloe") else None
        graph = graph_from_onnx(job.graph, batch=batch, decoder=decoder)
        calibration = job.calibration
        if calibration is not None:
            graph = dataclasses.replace(graph, precision="int8")
            if calibration.cache is None:
                calibration = dataclasses.replace(calibration, images=lambda: _images(graph))
        settings = BuildSettings(
            workspace_mib=4096,
            optimization_level=level,
            tactic_sources=OWN_TACTICS,
            calibration=calibration,
            progress=False,
        )
        built = build_engine(
            graph, backend="tensorrt", output=folder / f"{job.name}.trt", settings=settings
        )
    except UserError as error:
        return row | {"error": str(error)}
    return row | {
        "engine": built.path.name,
        "build_s": round(time.perf_counter() - start, 1),
        "int8_convolutions": built.manifest.int8_layers or 0,
        "convolutions": built.quantized_asked or None,
        "backend_version": built.manifest.backend_version,
        "optimization_level": level,
        **({"ap": None} if job.accuracy else {}),
    }


def build_all(folder: Path, output: Path, options: argparse.Namespace) -> None:
    """Build what is not built yet, several processes on each GPU, until a deadline.

    A process builds one engine after the other: loading TensorRT's kernels takes most of the time
    of the first.
    """
    output.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + options.deadline
    command = [sys.executable, "-s", "-m", "benchmarks.tensorrt8", "work", str(folder)]
    command += ["--output", str(output)]
    command += ["--level", str(options.level)] if options.level is not None else []
    command += ["--only", *options.only] if options.only else []

    def work(number: int, gpu: int) -> None:
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu), "PYTHONUNBUFFERED": "1"}
        code = 1
        while code and time.monotonic() < until:
            with open(output / f"builder-{number}.log", "a") as log:
                process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
                try:
                    code = process.wait(max(1.0, until - time.monotonic()))
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                    code = 0
            _release(output, process.pid, f"the builder ended with {code}" if code else None)

    gpus = [gpu for _ in range(options.each) for gpu in options.gpus]
    threads = [threading.Thread(target=work, args=item) for item in enumerate(gpus)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(f"{len(_left(folder, output, options.only))} engines are left", flush=True)


def _left(folder: Path, output: Path, only: Sequence[str] | None) -> list[Job]:
    return [
        job
        for job in jobs_in(folder)
        if (not only or any(text in job.name for text in only))
        and not (output / f"{job.name}.row.json").exists()
    ]


def _release(output: Path, pid: int, error: str | None) -> None:
    """Free the job of a process that ended in the middle of it; with an error it is over."""
    for claim in output.glob("*.claim"):
        if claim.read_text() == str(pid):
            if error:
                name = claim.name.removesuffix(".claim")
                write_json(output / f"{name}.row.json", {"engine_name": name, "error": error})
            claim.unlink()


def build_in_turn(folder: Path, output: Path, options: argparse.Namespace) -> None:
    """Build engines that no other process builds, one after the other, until none is left."""
    for job in _left(folder, output, options.only):
        claim = output / f"{job.name}.claim"
        if not _claimed(claim):
            continue
        if (output / f"{job.name}.row.json").exists():
            claim.unlink()
            continue
        start = time.perf_counter()
        row = build(job, output, options.level)
        write_json(output / f"{job.name}.row.json", row)
        claim.unlink()
        counts = f"{row.get('int8_convolutions')} of {row.get('convolutions')} in INT8"
        seconds = time.perf_counter() - start
        print(f"{job.name}: {seconds:.0f} s, {row.get('error', counts)}", flush=True)


def _claimed(path: Path) -> bool:
    """Take a job for this process; False if another that still runs has it."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        try:
            os.kill(int(path.read_text()), 0)
        except ProcessLookupError:
            path.unlink()
    try:
        with open(path, "x") as file:
            file.write(str(os.getpid()))
    except FileExistsError:
        return False
    return True


def _images(graph: Graph) -> Iterator[NDArray[Any]]:
    """Yield the calibration images as the graph takes them."""
    from trt_yolov6.data.calibration import calibration_batches
    from trt_yolov6.graph.inputs import input_spec

    return calibration_batches(
        ROOT / "calib", input_spec(graph.model), preprocessing=graph.preprocessing
    )


# --- measuring ----------------------------------------------------------------------------------


def measure(rows: list[dict[str, Any]], folder: Path, seconds: float) -> None:
    """Add times to rows, engines of one network and batch size interleaved."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        if "engine" in row and "ap" not in row:
            groups.setdefault((row["network"], row["batch"]), []).append(row)
    for (network, batch), members in groups.items():
        engines: list[Engine] = []
        try:
            engines += [load_engine(folder / row["engine"]) for row in members]
            results = benchmark_many(
                engines, batch=batch, duration=seconds, warm_up=0.3, progress=False
            )
        except UserError as error:
            print(f"{network} b{batch}: {error}", flush=True)
            continue
        finally:
            for engine in engines:
                engine.close()
        for row, result in zip(members, results, strict=True):
            row["ms"] = round(result.latency.median * 1e3, 4)
            row["fps"] = round(result.throughput_fps)
            print(f"{network} b{batch} {row['precision']} {row['how']}: {row['ms']} ms", flush=True)


def score(rows: list[dict[str, Any]], folder: Path) -> None:
    """Add the sample's AP to the rows of detectors that were trained, and how far outputs differ.

    Differences are those from the same file in ONNX Runtime, over the first eight images: of
    scores, and in pixels of boxes whose score is above 0.3 there.
    """
    for row in rows:
        if "ap" in row and "engine" in row:
            try:
                _score(row, folder)
            except UserError as error:
                print(f"{row['engine']}: {error}", flush=True)


def _score(row: dict[str, Any], folder: Path) -> None:
    data = load_coco(ROOT / "samples")
    options = PredictOptions(batch=8)
    with load_engine(folder / row["engine"]) as engine:
        row["ap"] = rounded(evaluate(engine, data, options, progress=False).ap)
        images = np.concatenate(list(itertools.islice(_sample_images(row["graph"]), 8)))[:8]
        outputs = engine.infer(images)
        found = _detections(engine, data)
    print(f"{row['engine']}: AP {row['ap']}", flush=True)
    if row["how"].startswith(("cache", "tensorrt")):
        return  # the graph holds no quantization to compare with
    with load_engine(row["graph"], "onnxruntime") as engine:
        expected = engine.infer(images)
        row["ap_cpu"] = rounded(evaluate(engine, data, options, progress=False).ap)
        on_cpu = _detections(engine, data)
    far = expected["scores"].astype(np.float32) - outputs["scores"]
    seen = expected["scores"].max(axis=2) > 0.3
    moved = np.abs(expected["boxes"] - outputs["boxes"])[seen]
    row["score_difference"] = float(np.abs(far).max())
    row["box_difference_px"] = [float(value) for value in np.percentile(moved, [50, 99])]
    truth = objects_of(data, data.images)
    own, other = matched(truth, found), matched(truth, on_cpu)
    change = interval(lambda draws: own.ap(draws) - other.ap(draws), len(truth))
    row["ap_change"] = [round(value, 4) for value in (change.value, change.low, change.high)]
    row["agreement_with_cpu"] = round(matched(on_cpu, found, 0.3).ap(), 4)
    print(
        f"{row['engine']}: AP on the CPU {row['ap_cpu']}, scores {row['score_difference']:.4f}, "
        f"boxes {row['box_difference_px']}, change {row['ap_change']}, agreement "
        f"{row['agreement_with_cpu']}",
        flush=True,
    )


def _detections(engine: Engine, data: CocoDataset) -> list[Detections]:
    options = PredictOptions(confidence=0.03, batch=8, clip=False)
    return detect(engine, [image.path for image in data.images], options)


def rounded(ap: float | None) -> float | None:
    """Return an AP with the four digits that results hold."""
    return None if ap is None else round(ap, 4)


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
    building = actions.add_parser("build")
    working = actions.add_parser("work")
    measuring = actions.add_parser("measure")
    for action in (graphs, building, working, measuring):
        action.add_argument("folder", type=Path, help="of the graphs")
    graphs.add_argument(
        "--networks", nargs="*", default=list(NETWORKS), choices=(*NETWORKS, FEW_CLASSES)
    )
    graphs.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    graphs.add_argument("--peers", type=Path, help="folder that benchmarks.peers wrote")
    for action in (building, working, measuring):
        action.add_argument("--output", type=Path, help="of the engines (the folder)")
    for action in (building, working):
        action.add_argument("--level", type=int, help="optimization level (TensorRT's own)")
        action.add_argument("--only", nargs="+", help="parts of engines' names")
    building.add_argument("--gpus", type=int, nargs="+", default=[0])
    building.add_argument("--each", type=int, default=4, help="builders a GPU (4)")
    building.add_argument("--deadline", type=float, default=420, help="seconds (420)")
    measuring.add_argument("--json", type=Path, required=True)
    measuring.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    measuring.add_argument("--seconds", type=float, default=1.5, help="an engine (1.5)")
    options = parser.parse_args()
    output = getattr(options, "output", None) or options.folder
    if options.action == "graphs":
        if options.networks:
            make_graphs(options.folder, options.networks, options.batches)
        if options.peers:
            make_peers(options.peers, options.folder)
    elif options.action == "build":
        build_all(options.folder, output, options)
    elif options.action == "work":
        build_in_turn(options.folder, output, options)
    else:
        _measure_all(output, options.json, options.seconds, options.parts)


def _measure_all(folder: Path, path: Path, seconds: float, parts: Sequence[str]) -> None:
    rows = [json.loads(file.read_text()) for file in sorted(folder.glob("*.row.json"))]
    gpu = read_gpus()[0]
    found: dict[str, Any] = {
        "device": gpu.name,
        "driver": gpu.driver,
        "date": timestamp(),
        "command": f"python -m benchmarks.tensorrt8 measure {folder} --json FILE",
        "software": software_versions(),
        "rows": rows,
    }
    if "speed" in parts:
        measure(rows, folder, seconds)
        write_json(path, found)
    if "layers" in parts:
        found["layers_us"] = {
            row["engine"]: layers(folder, row["engine"])
            for row in rows
            if row.get("ms") and row["network"] in ("yolov6n", "yolov6s") and row["batch"] == 32
        }
        write_json(path, found)
    if "accuracy" in parts:
        score(rows, folder)
    write_json(path, found)
    print(json.dumps([row for row in rows if "error" in row], indent=1))


if __name__ == "__main__":
    main()
