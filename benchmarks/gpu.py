"""Measure, in one run, everything docs/measurements/speed.md reports for a GPU.

    python -m benchmarks.gpu --json benchmarks/results/NAME.json

Needs a GPU with TensorRT or TensorRT-RTX, and PyTorch with CUDA for the ceilings; no network, and
under 8 minutes. What is compared is measured interleaved, and every figure is a median. `--only`
takes some of the parts: ceilings, decoding, streams, boxes, jpeg, fp8, accuracy, overhead.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import pickle
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from benchmarks.fp8_variants import REFERENCE, variant_graph
from benchmarks.gpu_graphs import (
    Job,
    as_graph,
    bytes_moved,
    make_all,
    random_model,
    with_batch,
)
from trt_yolov6 import __version__
from trt_yolov6.backends import BACKENDS
from trt_yolov6.bench.latency import BenchmarkResult, benchmark_many
from trt_yolov6.bench.roofline import gpu_ceilings
from trt_yolov6.bench.sampling import in_turns, random_input, rate, seconds_of, timed
from trt_yolov6.common.files import write_json
from trt_yolov6.common.machine import package_versions, read_gpus, software_versions, timestamp
from trt_yolov6.data.coco import load_coco
from trt_yolov6.data.images import list_images, read_image
from trt_yolov6.data.letterbox import Letterbox, fit
from trt_yolov6.data.loader import default_workers, load_batches
from trt_yolov6.detectors.detections import Detections, postprocess
from trt_yolov6.engines import Engine, LoadOptions, backend, load_engine
from trt_yolov6.engines.build import build_engine
from trt_yolov6.engines.manifest import read_manifest
from trt_yolov6.errors import UserError
from trt_yolov6.graph.export import ExportSettings, graph_from_checkpoint
from trt_yolov6.graph.model import Graph
from trt_yolov6.models import count_flops
from trt_yolov6.quantization.pipeline import quantize
from trt_yolov6.quantization.settings import QuantizationSettings
from trt_yolov6.quantization.types import FP8
from trt_yolov6.runtime.evaluate import evaluate
from trt_yolov6.runtime.predict import process
from trt_yolov6.spec import BatchProfile, NmsSettings, PrecisionName, PredictOptions

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "samples" / "yolov6n_bccd_authors.pt"
VARIANTS = ("yolov6n", "yolov6s")
DECODINGS = ("ours", "authors", "heads only", "ours, uint8 input")
FP8_SAMPLES = {
    "the default checkpoint, the rest FP16": (ROOT / "samples" / "yolov6n_bccd.pt", True),
    "the default checkpoint, the rest FP32": (ROOT / "samples" / "yolov6n_bccd.pt", False),
    "the authors' checkpoint, the rest FP16": (SAMPLE, True),
    "the authors' checkpoint, the rest FP32": (SAMPLE, False),
}
"""Networks whose AP in FP8 is measured: weights, and whether half precision is around it."""
FP8_PLACEMENTS = ("default", "no_head_from_2000", "no_head", "all", "default_layer_scales")


@dataclass
class Bench:
    """State shared by all parts: folder of engines, measuring time, graphs."""

    backend: str
    folder: Path
    seconds: float
    size: int
    """Height and width of the input."""
    graphs: dict[Job, bytes]
    ceilings: dict[str, float] = field(default_factory=dict)

    def graph(self, kind: str, variant: str, batch: int = 0) -> onnx.ModelProto:
        """Return one of our graphs with a free batch axis, or the authors' for a batch size."""
        return onnx.load_from_string(self.graphs[Job(kind, variant, self.size, batch)])

    def build(self, graph: Graph, name: str) -> Path:
        """Build an engine unless it is there."""
        path = self.folder / f"{name}{BACKENDS[self.backend].suffix}"
        if not path.exists():
            start = time.perf_counter()
            build_engine(graph, backend=self.backend, output=path)
            print(f"  built {name} in {time.perf_counter() - start:.1f} s", flush=True)
        return path

    def engine(self, kind: str, variant: str, batch: int) -> Path:
        """Build a graph of a variant with random weights for one batch size."""
        model = (
            self.graph(kind, variant, batch)
            if kind == "authors"
            else with_batch(self.graph(kind, variant), batch)
        )
        name = f"{variant}_{kind}_b{batch}".replace(", ", "_").replace(" ", "_")
        return self.build(as_graph(model, variant, self.size, batch), name)

    def floor(self, variant: str, batch: int, element: int = 2) -> dict[str, float]:
        """Return the roofline of a batch: seconds by arithmetic and by memory, the larger last."""
        if not self.ceilings:
            return {}
        flops = batch * count_flops(random_model(variant), self.size)
        moved = bytes_moved(self.graph("ours", variant), batch, element)
        rate = self.ceilings["fp8_flops" if element == 1 else "fp16_flops"]
        arithmetic = flops / rate
        memory = moved / self.ceilings["bytes_per_second"]
        return {
            "flops": flops,
            "bytes": moved,
            "arithmetic_ms": arithmetic * 1e3,
            "memory_ms": memory * 1e3,
            "roofline_ms": max(arithmetic, memory) * 1e3,
        }


# --- parts --------------------------------------------------------------------------------------


def measure_ceilings(bench: Bench) -> dict[str, Any]:
    """Measure what the GPU can do at most: a large copy, large products in 16 and 8 bits."""
    ceilings = gpu_ceilings()
    if ceilings is None:
        return {"none": "PyTorch sees no GPU"}
    found = {f"{name}_flops": rate for name, rate in ceilings.flops.items()}
    found["bytes_per_second"] = ceilings.bytes_per_second
    bench.ceilings.update(found)
    return dict(found)


def measure_decoding(bench: Bench) -> list[dict[str, Any]]:
    """Our graph, the authors' decoding and the bare heads, side by side."""
    rows = []
    for variant in VARIANTS:
        for batch in (32, 1):
            paths = {kind: bench.engine(kind, variant, batch) for kind in DECODINGS}
            for graph, result in zip(paths, bench_paths(bench, paths.values(), batch), strict=True):
                rows.append(row_of(result, bench, variant, graph=graph))
                if graph == "ours" and batch == 32:
                    rows[-1]["layers_us"] = layers_us(paths[graph], batch)
    for row in rows:
        base = next(
            one
            for one in rows
            if one["graph"] == "authors"
            and (one["variant"], one["batch"]) == (row["variant"], row["batch"])
        )
        row["fps_to_authors"] = row["fps"] / base["fps"]
    return rows


def measure_streams(bench: Bench) -> list[dict[str, Any]]:
    """Batch 1 on one stream and on several."""
    rows: list[dict[str, Any]] = []
    for variant in VARIANTS:
        with load_engine(bench.engine("ours, uint8 input", variant, 1)) as engine:
            runs = {count: engine.resident_run(random_input(engine, 1), count) for count in (1, 4)}
            times = in_turns(list(runs.values()), bench.seconds)
        for count, seconds in zip(runs, times, strict=True):
            rows.append({"variant": variant, "streams": count, "fps": count / np.median(seconds)})
        rows[-1]["to_one_stream"] = rows[-1]["fps"] / rows[-2]["fps"]
    return rows


def measure_boxes(bench: Bench) -> list[dict[str, Any]]:
    """From uint8 images in host memory to final boxes in host memory, against the engine alone."""
    rows = []
    place = fit((bench.size, bench.size), (bench.size, bench.size))
    nms = NmsSettings()
    with load_engine(bench.engine("ours, uint8 input", "yolov6n", 1)) as engine:
        locked, ordinary = engine.empty_input(1), random_input(engine, 1)
        locked[:] = ordinary

        def boxes(images: NDArray[Any]) -> float:
            def once() -> None:
                outputs = engine.start(images, nms).wait()
                postprocess(outputs, engine.output_layout, nms, [place])

            return seconds_of(once)

        own, first, second = in_turns(
            [engine.resident_run(ordinary), lambda: boxes(locked), lambda: boxes(ordinary)],
            bench.seconds,
        )
        for memory, seconds in (("page-locked", first), ("ordinary", second)):
            rows.append(
                {
                    "variant": "yolov6n",
                    "batch": 1,
                    "memory": memory,
                    "engine_ms": float(np.median(own)) * 1e3,
                    "ms": float(np.median(seconds)) * 1e3,
                    "to_engine": float(np.median(seconds) / np.median(own)),
                }
            )
    with load_engine(bench.engine("ours, uint8 input", "yolov6s", 32)) as engine:
        for memory in ("page-locked", "ordinary"):
            batches = []
            for _ in range(3):
                array = engine.empty_input(32) if memory == "page-locked" else None
                images = random_input(engine, 32)
                if array is not None:
                    array[:] = images
                batches.append(images if array is None else array)
            own_run = engine.resident_run(batches[0])
            own_times, fps = [], []
            for _ in range(3):
                own_times += timed(own_run, bench.seconds / 3)
                fps.append(pipelined(engine, batches, nms, place, bench.seconds))
            own_fps = 32 / float(np.median(own_times))
            rows.append(
                {
                    "variant": "yolov6s",
                    "batch": 32,
                    "memory": memory,
                    "engine_fps": own_fps,
                    "fps": float(np.median(fps)),
                    "to_engine": float(np.median(fps)) / own_fps,
                }
            )
    return rows


def pipelined(
    engine: Engine,
    batches: Sequence[NDArray[Any]],
    nms: NmsSettings,
    place: Letterbox,
    seconds: float,
) -> float:
    """Return images a second with as many batches in flight as the engine takes."""
    turns = itertools.cycle(batches)
    running = [engine.start(next(turns), nms) for _ in range(engine.in_flight)]

    def collect() -> int:
        outputs = running.pop(0).wait()
        # The engine is given its next batch before this one's boxes are looked at.
        running.append(engine.start(next(turns), nms))
        postprocess(outputs, engine.output_layout, nms, [place] * len(batches[0]))
        return len(batches[0])

    found = rate(collect, seconds, least=4)
    for run in running:
        run.wait()
    return found


def measure_jpeg(bench: Bench) -> list[dict[str, Any]]:
    """From JPEG files in memory to boxes, against what the slowest stage alone would allow."""
    encoded = [path.read_bytes() for path in list_images(ROOT / "samples" / "images" / "val")]
    sample = graph_from_checkpoint(
        SAMPLE,
        ExportSettings(
            (bench.size, bench.size),
            fp16=True,
            uint8_input=True,
            batch=BatchProfile(32, 32, 32),
        ),
    )
    engines = {
        "yolov6s, random weights": bench.engine("ours, uint8 input", "yolov6s", 32),
        "yolov6n, sample": bench.build(sample, "sample_uint8_b32"),
    }
    rows = []
    for name, path in engines.items():
        with load_engine(path) as engine:
            count = 32 * int(max(30, 60 * bench.seconds))
            items = [encoded[index % len(encoded)] for index in range(count)]

            def whole(engine: Engine = engine, items: list[bytes] = items) -> int:
                steps = process(engine, items, read_image, keep, PredictOptions(batch=32))
                return sum(len(step.result) for step in steps)

            def loading(engine: Engine = engine, items: list[bytes] = items) -> int:
                loaded = load_batches(
                    items, read_image, engine.input, batch=32, allocate=engine.empty_input
                )
                return sum(len(batch.letterboxes) for batch in loaded)

            rates: dict[str, list[float]] = {"whole": [], "loading": [], "engine": [], "boxes": []}
            own = engine.resident_run(random_input(engine, 32))
            whole()
            for _ in range(3):
                rates["whole"].append(rate(whole, 0))
                rates["loading"].append(rate(loading, 0))
                rates["engine"].append(32 / float(np.median(timed(own, bench.seconds / 3))))
                rates["boxes"].append(boxes_rate(engine, encoded, bench.seconds / 3))
            medians = {stage: float(np.median(values)) for stage, values in rates.items()}
            slowest = min(value for stage, value in medians.items() if stage != "whole")
            rows.append(
                {
                    "engine": name,
                    "workers": default_workers(),
                    "images": count,
                    **{f"{stage}_fps": value for stage, value in medians.items()},
                    "to_slowest_stage": medians["whole"] / slowest,
                }
            )
    return rows


def keep(_batch: Any, found: list[Detections]) -> list[Detections]:
    """Hand detections on as they are."""
    return found


def boxes_rate(engine: Engine, encoded: Sequence[bytes], seconds: float) -> float:
    """Return images a second of the last stage alone, on what the engine finds in real images."""
    batches = load_batches(encoded[:32], read_image, engine.input, batch=32)
    batch = next(iter(batches))
    nms = NmsSettings()
    outputs = engine.start(batch.input, nms).wait()
    with ThreadPoolExecutor(default_workers()) as executor:

        def suppress() -> int:
            placed = batch.letterboxes
            return len(postprocess(outputs, engine.output_layout, nms, placed, executor=executor))

        return rate(suppress, seconds)


def measure_fp8(bench: Bench) -> dict[str, Any]:
    """FP8 in several placements against FP16: S at batch 32, with the times of its layers."""
    model, ranges = pickle.loads(bench.graphs[Job("to quantize", "yolov6s", bench.size, 32)])
    paths = {}
    for name in (REFERENCE, *FP8_PLACEMENTS):
        graph = as_graph(variant_graph(name, model, ranges), "yolov6s", bench.size, 32)
        precision: PrecisionName = "fp16" if name == REFERENCE else "fp8"
        try:
            paths[name] = bench.build(
                dataclasses.replace(graph, precision=precision), f"yolov6s_fp8_{name}"
            )
        except UserError as error:
            return {"refused": str(error)}
    rows = []
    results = bench_paths(bench, paths.values(), 32)
    for (name, path), result in zip(paths.items(), results, strict=True):
        row = row_of(result, bench, "yolov6s", element=1 if name != REFERENCE else 2, graph=name)
        manifest = read_manifest(path)
        row["fp8_convolutions"] = manifest.fp8_layers if manifest else None
        row["fps_to_fp16"] = row["fps"] * results[0].latency.median / 32
        row["layers_us"] = layers_us(path, 32)
        rows.append(row)
    return {"speed": rows, "accuracy": measure_fp8_accuracy(bench)}


def layers_us(path: Path, batch: int) -> dict[str, float]:
    """Return the microseconds of an engine's layers; none where it does not report them."""
    options = LoadOptions(cuda_graph=False)
    with contextlib.suppress(UserError), load_engine(path, options=options) as engine:
        times = engine.layer_times(random_input(engine, batch))
        return {layer: 1e6 * seconds for layer, seconds in times.items()}
    return {}


def measure_fp8_accuracy(bench: Bench) -> list[dict[str, Any]]:
    """AP of the samples in FP8, as `build --fp8` with and without `--fp16` makes them."""
    rows: list[dict[str, Any]] = []
    for name, (weights, fp16) in FP8_SAMPLES.items():
        graph = fp8_sample(weights, fp16)
        rows.append(judged(name, bench.build(graph, f"fp8_accuracy_{len(rows)}")))
    return rows


def fp8_sample(weights: Path, fp16: bool) -> Graph:
    """Return a checkpoint's Q/DQ graph in FP8, calibrated on the repository's images."""
    graph = graph_from_checkpoint(weights, ExportSettings(batch=BatchProfile(1, 8, 8)))
    return quantize(graph, ROOT / "calib", QuantizationSettings(quantized=FP8, fp16=fp16)).graph


def judged(name: str, path: Path) -> dict[str, Any]:
    """Return an engine's AP on the sample data set; ONNX Runtime's runs on the CPU."""
    with load_engine(path, options=LoadOptions(provider="cpu")) as engine:
        result = evaluate(
            engine, load_coco(ROOT / "samples"), PredictOptions(batch=8), progress=False
        ).to_json()
        result.pop("per_class")
        return {**result, "engine": name, "device": engine.device}


def measure_accuracy(bench: Bench) -> list[dict[str, Any]]:
    """AP of the sample through engines on the GPU, and of the FP32 graph on this CPU."""
    wanted: dict[str, tuple[str, dict[str, Any]]] = {
        "FP32, ONNX Runtime on the CPU": ("onnxruntime", {}),
        "FP32": (bench.backend, {}),
        "FP16": (bench.backend, {"fp16": True}),
        "FP16, uint8 input": (bench.backend, {"fp16": True, "uint8_input": True}),
    }
    rows: list[dict[str, Any]] = []
    for name, (backend_name, options) in wanted.items():
        graph = graph_from_checkpoint(
            SAMPLE, ExportSettings(batch=BatchProfile(1, 8, 8), **options)
        )
        path = bench.folder / f"accuracy_{len(rows)}{BACKENDS[backend_name].suffix}"
        build_engine(graph, backend=backend_name, output=path)
        rows.append(judged(name, path))
        rows[-1]["AP_to_FP32_on_CPU"] = rows[-1]["AP"] - rows[0]["AP"]
    return rows


def measure_overhead(bench: Bench) -> list[dict[str, Any]]:
    """The median that `bench` reports, against bare CUDA events around the launch."""
    from cuda.bindings import runtime as cudart

    rows = []
    for variant, batch in (("yolov6n", 1), ("yolov6s", 32)):
        with load_engine(bench.engine("ours", variant, batch)) as loaded:
            engine: Any = loaded
            run = engine.resident_run(random_input(engine, batch))
            run()
            slot = engine._slots[0]
            context, stream = slot._bound.context, slot.stream.handle
            _, start = cudart.cudaEventCreate()
            _, stop = cudart.cudaEventCreate()

            def bare(
                context: Any = context, stream: int = stream, start: Any = start, stop: Any = stop
            ) -> float:
                cudart.cudaEventRecord(start, stream)
                context.execute_async_v3(stream)
                cudart.cudaEventRecord(stop, stream)
                cudart.cudaEventSynchronize(stop)
                return float(cudart.cudaEventElapsedTime(start, stop)[1]) / 1e3

            ours, theirs = in_turns([run, bare], bench.seconds)
            rows.append(
                {
                    "variant": variant,
                    "batch": batch,
                    "bench_ms": float(np.median(ours)) * 1e3,
                    "bare_ms": float(np.median(theirs)) * 1e3,
                    "ratio": float(np.median(ours) / np.median(theirs)),
                }
            )
    return rows


def jobs_for(parts: Sequence[str], size: int) -> list[Job]:
    """Return the graphs that some parts need."""
    jobs = []
    if "fp8" in parts:
        jobs.append(Job("to quantize", "yolov6s", size, 32))
    for variant in reversed(VARIANTS):  # what takes longest first
        if "decoding" in parts:
            jobs += [Job("authors", variant, size, batch) for batch in (32, 1)]
            jobs.append(Job("heads only", variant, size, 0))
        jobs += [Job(kind, variant, size, 0) for kind in ("ours", "ours, uint8 input")]
    return jobs


PARTS: dict[str, Callable[[Bench], Any]] = {
    "ceilings": measure_ceilings,
    "decoding": measure_decoding,
    "overhead": measure_overhead,
    "streams": measure_streams,
    "boxes": measure_boxes,
    "jpeg": measure_jpeg,
    "fp8": measure_fp8,
    "accuracy": measure_accuracy,
}


# --- timing -------------------------------------------------------------------------------------


def bench_paths(bench: Bench, paths: Any, batch: int) -> list[BenchmarkResult]:
    """Measure engines interleaved, as `trt-yolov6 bench` does."""
    with loaded_all(list(paths)) as engines:
        return benchmark_many(
            engines, batch=batch, duration=bench.seconds, warm_up=0.5, progress=False
        )


@contextmanager
def loaded_all(paths: Sequence[Path]) -> Iterator[list[Engine]]:
    """Load engines, and close them all."""
    engines = [load_engine(path) for path in paths]
    try:
        yield engines
    finally:
        for engine in engines:
            engine.close()


def row_of(
    result: BenchmarkResult, bench: Bench, variant: str, element: int = 2, **more: Any
) -> dict[str, Any]:
    """Return one line of a table: the figures, and how far they are from the roofline."""
    floor = bench.floor(variant, result.batch, element)
    median = result.latency.median * 1e3
    row = {
        "variant": variant,
        "batch": result.batch,
        **more,
        "ms": median,
        "ci95_ms": [value * 1e3 for value in result.latency.interval or ()],
        "fps": result.throughput_fps,
        "sm_mhz": result.gpu.sm_mhz if result.gpu else None,
        **floor,
    }
    if floor:
        row["roofline_share"] = floor["roofline_ms"] / median
    return row


def main() -> None:
    """Run the parts and write the results after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backend", default="tensorrt-rtx")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=2.0, help="of measuring one thing")
    parser.add_argument("--imgsz", type=int, default=640, help="height and width of the input")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    options = parser.parse_args()
    began = time.perf_counter()
    state = backend(options.backend).availability()
    gpus = read_gpus()
    results: dict[str, Any] = {
        "command": "python -m benchmarks.gpu " + " ".join(sys.argv[1:]),
        "date": timestamp(),
        "package": __version__,
        "backend": options.backend,
        "backend_version": state.version,
        "device": state.detail,
        "gpu": dataclasses.asdict(gpus[0]) if gpus else None,
        "machine": platform.platform(),
        "versions": software_versions()
        | {key: value for key, value in package_versions().items() if value},
        "parts": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        print("== graphs", flush=True)
        graphs = make_all(jobs_for(options.only.split(","), options.imgsz))
        print(f"  {time.perf_counter() - began:.0f} s", flush=True)
        bench = Bench(options.backend, Path(folder), options.seconds, options.imgsz, graphs)
        for name in options.only.split(","):
            start = time.perf_counter()
            print(f"== {name}", flush=True)
            results["parts"][name] = PARTS[name](bench)
            for row in rows_in(results["parts"][name]):
                print(" ", short(row), flush=True)
            print(f"  {time.perf_counter() - start:.0f} s", flush=True)
            results["seconds"] = time.perf_counter() - began
            write_json(options.json, results)


def rows_in(part: Any) -> list[dict[str, Any]]:
    """Return the rows of a part, whatever it is made of."""
    if isinstance(part, list):
        return part
    inner = [row for value in part.values() if isinstance(value, list) for row in value]
    return inner or [part]


def short(row: dict[str, Any]) -> str:
    """Return a row for the eye."""
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in row.items()
        if not isinstance(value, (list, dict))
    )


if __name__ == "__main__":
    main()
