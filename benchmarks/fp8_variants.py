"""Where FP8 pays: one network with Q/DQ pairs in different places, timed side by side with FP16.

    python -m benchmarks.fp8_variants --output DIR [--json FILE] [--kernels]

Makes the graphs on the spot, with random weights and ranges from a random image, or takes them from
DIR on a machine that cannot export. On a machine without the GPU, `--target ada` builds them for
another and prints what the engines are made of; that is how the candidates were found. With a GPU
all are timed in turns, so that a drift of the clocks hits all alike.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from trt_yolov6.backends import BACKENDS
from trt_yolov6.bench.latency import benchmark_many
from trt_yolov6.bench.sampling import random_input
from trt_yolov6.bench.text import format_report
from trt_yolov6.common.files import write_json
from trt_yolov6.common.machine import timestamp
from trt_yolov6.engines import LoadOptions, backend, load_engine
from trt_yolov6.engines.base import BuildSettings
from trt_yolov6.engines.build import build_engine
from trt_yolov6.engines.tensorrt.layer_log import engine_layers
from trt_yolov6.errors import UserError
from trt_yolov6.graph.float16 import tail_nodes, to_fp16
from trt_yolov6.graph.index import GraphIndex
from trt_yolov6.graph.onnx_import import graph_from_onnx
from trt_yolov6.quantization.qdq.insert import insert_qdq
from trt_yolov6.quantization.qdq.placement import (
    FP8_RULES,
    Rule,
    is_among_the_last,
    is_transposed,
    place,
    reads_few_channels,
    works_less_than,
)
from trt_yolov6.quantization.types import FP8

REFERENCE = "fp16"


def is_small(graph: GraphIndex, node: onnx.NodeProto) -> str | None:
    """A 1x1 convolution, or one of fewer than 64 channels, does little work for each value."""
    outputs, inputs, *kernel = graph.constants[node.input[1]].dims
    few = max(kernel) == 1 or min(outputs, inputs) < 64
    return "is a 1x1 convolution or has fewer than 64 channels" if few else None


@dataclass(frozen=True)
class Variant:
    """One way to put FP8 into a graph: arguments of `place`, and the weights' scales."""

    rules: tuple[Rule, ...] = ()
    propagate: bool = False
    channel_scales: bool = True


_NO_STEM = (reads_few_channels, is_transposed)
_NO_HEAD = (*_NO_STEM, is_among_the_last(3))

VARIANTS: dict[str, Variant] = {
    "all": Variant(),
    "all_layer_scales": Variant(channel_scales=False),
    "all_handed_on": Variant(propagate=True),
    "no_stem": Variant(_NO_STEM),
    "no_predictions": Variant((*_NO_STEM, is_among_the_last(1))),
    "no_head": Variant(_NO_HEAD),
    "only_3x3_from_64": Variant((*_NO_STEM, is_small)),
    "no_head_from_250": Variant((*_NO_HEAD, works_less_than(250))),
    "no_head_from_500": Variant((*_NO_HEAD, works_less_than(500))),
    "no_head_from_1000": Variant((*_NO_HEAD, works_less_than(1000))),
    "no_head_from_2000": Variant((*_NO_HEAD, works_less_than(2000))),
    "from_1000": Variant((*_NO_STEM, works_less_than(1000))),
    "default": Variant(FP8_RULES),
    "default_layer_scales": Variant(FP8_RULES, channel_scales=False),
}


def main() -> None:
    """Make, build and time the graphs that are asked for."""
    parser = argparse.ArgumentParser(description="Where FP8 pays.")
    parser.add_argument("--output", type=Path, required=True, help="folder for graphs and plans")
    parser.add_argument("--model", default="yolov6s")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=640)
    parser.add_argument("--variants", default=",".join(VARIANTS), help="names, with commas")
    parser.add_argument("--backend", default="tensorrt-rtx")
    parser.add_argument("--target", help="build for another GPU, and time nothing")
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="of measuring an engine, at most"
    )
    parser.add_argument("--kernels", action="store_true", help="time every kernel as well")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    folder = options.output / f"{options.model}_{options.size}_b{options.batch}"
    folder.mkdir(parents=True, exist_ok=True)
    names = [REFERENCE, *options.variants.split(",")]
    write_missing(folder, names, options)
    state = backend(options.backend).availability()
    if not state.can_build or not (state.can_run or options.target):
        print(f"{folder}: {len(names)} graphs; not built here: {state.detail}")
        return
    settings = BuildSettings(target=options.target, progress=False)
    results: dict[str, Any] = {
        "command": "python -m benchmarks.fp8_variants " + " ".join(sys.argv[1:]),
        "date": timestamp(),
        "backend": options.backend,
        "backend_version": state.version,
        "device": options.target or state.detail,
        "variants": {},
    }
    found = results["variants"]
    for name in names:
        found[name] = built(folder, name, options.backend, settings)
        print(name, json.dumps(found[name]), flush=True)
    if not options.target:
        time_all(folder, [name for name in names if "refused" not in found[name]], options, found)
    if options.json:
        write_json(options.json, results)


def write_missing(folder: Path, names: list[str], options: argparse.Namespace) -> None:
    """Make the graphs that the folder does not hold yet."""
    missing = [name for name in names if not (folder / f"{name}.onnx").exists()]
    if not missing:
        return
    model, ranges = random_graph(options.model, options.size, options.batch)
    for name in missing:
        onnx.save(variant_graph(name, model, ranges), folder / f"{name}.onnx")


def variant_graph(
    name: str, model: onnx.ModelProto, ranges: Mapping[str, float]
) -> onnx.ModelProto:
    """Return a float32 graph in one of `VARIANTS`, or in half precision (`REFERENCE`)."""
    if name == REFERENCE:
        return to_fp16(model, keep_float32=tail_nodes(model))
    variant = VARIANTS[name]
    placement = place(model, exclude_rules=variant.rules, propagate=variant.propagate)
    quantized = dataclasses.replace(FP8, channel_scales=variant.channel_scales)
    return insert_qdq(model, placement, ranges, quantized=quantized, fp16=True)


def random_graph(name: str, size: int, batch: int) -> tuple[onnx.ModelProto, dict[str, float]]:
    """Return a float32 graph with random weights, and the ranges of its tensors on noise."""
    import numpy as np
    import torch

    from trt_yolov6.graph.export import ExportSettings, export_onnx
    from trt_yolov6.models import YOLOv6, architecture
    from trt_yolov6.quantization.collect import collect
    from trt_yolov6.quantization.mixed_precision import tensors_for_any_choice
    from trt_yolov6.spec import BatchProfile

    torch.manual_seed(0)
    network = YOLOv6(architecture(name)).eval()

    def export(images: int) -> onnx.ModelProto:
        profile = BatchProfile(images, images, images)
        settings = ExportSettings(image_size=(size, size), batch=profile)
        return export_onnx(network, settings, [f"class_{i}" for i in range(80)], verify=False)

    one = export(1)
    noise = np.random.default_rng(0).random((1, 3, size, size), dtype=np.float32)
    statistics = collect(one, [noise], tensors_for_any_choice(one))
    # What random weights leave at zero needs a range too.
    ranges = {tensor: max(item.amax, 0.01) for tensor, item in statistics.items()}
    return export(batch), ranges


def built(folder: Path, name: str, backend_name: str, settings: BuildSettings) -> dict[str, Any]:
    """Build an engine; return its kernels, by kind and the types of what they read and write."""
    try:
        engine = build_engine(
            graph_from_onnx(folder / f"{name}.onnx"),
            backend=backend_name,
            output=plan_path(folder, name, backend_name),
            settings=settings,
        )
    except UserError as error:
        return {"refused": str(error)}
    (folder / f"{name}.layers.txt").write_text(engine.layers)
    layers = engine_layers(engine.layers)
    kinds = Counter(
        f"{layer.kind} {'+'.join(layer.inputs)} -> {'+'.join(layer.outputs)}" for layer in layers
    )
    return {
        "convolutions_asked": engine.quantized_asked,
        "convolutions_in_fp8": engine.manifest.fp8_layers,
        "kernels": len(layers),
        "kinds": dict(kinds.most_common()),
    }


def plan_path(folder: Path, name: str, backend_name: str) -> Path:
    """Return where an engine lies."""
    return folder / "engines" / f"{name}{BACKENDS[backend_name].suffix}"


def time_all(
    folder: Path, names: list[str], options: argparse.Namespace, found: dict[str, Any]
) -> None:
    """Time all engines in turns, and then their kernels."""
    engines = [load_engine(plan_path(folder, name, options.backend)) for name in names]
    results = benchmark_many(engines, batch=options.batch, duration=options.seconds, progress=False)
    print(format_report(results))
    base = results[0].latency.median
    for name, result in zip(names, results, strict=True):
        found[name]["bench"] = result.to_json()
        found[name]["speed_of_fp16"] = base / result.latency.median
        print(f"{name:28s} {result.throughput_fps:9.0f} FPS", f"{base / result.latency.median:.3f}")
    for engine in engines:
        engine.close()
    for name in names if options.kernels else ():
        with load_engine(folder / f"{name}.trt", options=LoadOptions(cuda_graph=False)) as engine:
            times = engine.layer_times(random_input(engine, options.batch))
        found[name]["kernel_us"] = {kernel: 1e6 * value for kernel, value in times.items()}


if __name__ == "__main__":
    main()
