"""Build an engine from a graph: its plan and manifest, and the checks before the work."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from trt_yolov6.backends import BACKENDS, ENGINES
from trt_yolov6.checkpoints import is_named_as_checkpoint
from trt_yolov6.common.files import (
    check_folder,
    check_writable,
    file_name,
    sha256_bytes,
)
from trt_yolov6.engines import backend as backend_module
from trt_yolov6.engines import best_backend
from trt_yolov6.engines.base import BuildSettings
from trt_yolov6.engines.manifest import Manifest, choose_manifest_path, write_pair
from trt_yolov6.engines.tensorrt import layer_log
from trt_yolov6.errors import UserError
from trt_yolov6.graph.files import value_spec
from trt_yolov6.graph.inputs import runtime_inputs
from trt_yolov6.graph.model import Graph
from trt_yolov6.graph.operators import layer_names
from trt_yolov6.graph.quantized import quantized_layers
from trt_yolov6.quantization.types import QuantizedName
from trt_yolov6.spec import BatchProfile


@dataclass(frozen=True)
class BuiltEngine:
    """Engine and manifest that `build_engine` wrote."""

    path: Path
    manifest_path: Path
    manifest: Manifest
    seconds: float
    """Time the backend took for the plan."""
    quantized_asked: int
    """Convolutions with INT8 or FP8 weights in the graph; the manifest says how many the engine
    has."""
    layers: str = ""
    """The builder's account of the engine's layers, see `engines.tensorrt.layer_log`."""

    def __fspath__(self) -> str:
        return str(self.path)


def engine_stem(graph: Graph, target: str | None = None) -> str:
    """Return an engine's descriptive name: `yolov6s-int8`, `yolov6s-fp16-320-b1`.

    It consists of the checkpoint's or ONNX file's name, the precision and, where they are not the
    default, size, batch, uint8 input, NMS in the graph, and the target. What an ONNX file's name
    already ends with is not repeated.
    """
    height, width = graph.image_size
    batch = graph.batch
    default = BatchProfile()
    stem = graph.source.stem
    parts: list[str] = [graph.precision]
    if (height, width) != (640, 640):
        parts.append(str(height) if height == width else f"{height}x{width}")
    if batch.is_static:
        parts.append(f"b{batch.min}")
    elif batch != default:
        parts.append(f"b{batch.min}-{batch.opt}-{batch.max}")
    if any(
        item.type.tensor_type.elem_type == onnx.TensorProto.UINT8
        for item in runtime_inputs(graph.model)
    ):
        parts.append("uint8")
    if is_named_as_checkpoint(graph.source) and graph.output_layout == "end2end":
        parts.append("end2end")
    if target is not None:
        parts.append(target)
    known = 0
    if not is_named_as_checkpoint(graph.source):
        ends = (n for n in range(len(parts), 0, -1) if stem.endswith("-" + "-".join(parts[:n])))
        known = next(ends, 0)
    return "-".join([stem, *parts[known:]])


def engine_path(graph: Graph, backend: str, output: str | Path | None, target: str | None) -> Path:
    """Return where `build_engine` writes: `output`, or into `engines/` under `engine_stem`."""
    if output:
        return Path(output)
    stem, suffix = engine_stem(graph, target), BACKENDS[backend].suffix
    path = ENGINES / f"{stem}{suffix}"
    if path.exists() and graph.source.exists() and path.samefile(graph.source):
        return path.with_name(f"{stem}-{graph.precision}{suffix}")
    return path


def check_build(backend: str, output: str | Path | None, settings: BuildSettings) -> str:
    """Return the backend that `build_engine` would use, before the graph is exported.

    Raises:
        UserError: that backend is missing, refuses a setting, or does not write such a file, or
            the output (default: `engines/`) cannot be written.
    """
    name = best_backend() if backend == "auto" else backend
    backend_module(name).check(settings)
    suffix = BACKENDS[name].suffix
    if output and (Path(output).suffix == ".onnx") != (suffix == ".onnx"):
        raise UserError(
            f"`output` {output} does not fit the {name} backend; give a name that ends in "
            f"{suffix}, or another `backend`.",
        )
    if output:
        check_writable(output)
        choose_manifest_path(output)
    else:  # the engine's name depends on the graph
        check_folder(ENGINES)
    return name


def build_engine(
    graph: Graph,
    *,
    backend: str,
    output: str | Path | None = None,
    settings: BuildSettings | None = None,
    allow_float: bool = False,
) -> BuiltEngine:
    """Build an engine and write plan and manifest.

    The arguments are those of `pipeline.build`; of the settings, the batch profile is replaced by
    the graph's.

    Raises:
        UserError: the backend is missing, refuses a setting, cannot build the graph, or computes
            none of its convolutions in the 8 bits asked for.
    """
    fp8 = graph.precision == "fp8"
    settings = dataclasses.replace(settings or BuildSettings(), batch=graph.batch, fp8=fp8)
    name = check_build(backend, output, settings)
    module = backend_module(name)
    path = engine_path(graph, name, output, settings.target)
    asked = len(quantized_layers(graph.model))
    if settings.calibration is not None:
        asked = len(layer_names(graph.model))
    texts: list[str] = []
    settings = dataclasses.replace(settings, on_layers=texts.append)
    start = time.perf_counter()
    plan = module.build(graph.model.SerializeToString(), settings)
    seconds = time.perf_counter() - start
    quantized: QuantizedName = "fp8" if fp8 else "int8"
    found = quantized_layers_of(graph.model, quantized, texts) if asked and texts else asked or None
    target = settings.target or ("this machine's GPU" if BACKENDS[name].tensorrt else "any")
    if asked and found == 0 and not allow_float:
        raise all_in_float(graph.precision, name, target)
    manifest = dataclasses.replace(
        graph_manifest(graph, path, plan),
        backend=name,
        backend_version=module.availability().version or "unknown",
        target=target,
        int8_layers=None if fp8 else found,
        fp8_layers=found if fp8 else None,
    )
    manifest_path = write_pair(path, plan, manifest)
    return BuiltEngine(path, manifest_path, manifest, seconds, asked, "\n".join(texts))


def check_not_source(source: object, output: str | Path | None) -> None:
    """Raise UserError where the output is the source file."""
    if output is None or not isinstance(source, (str, os.PathLike)):
        return
    if Path(output).exists() and Path(source).exists() and Path(output).samefile(source):
        raise UserError(f"`output` {output} is the source itself; give another file.")


def check_graph_output(source: object, output: str | Path | None) -> None:
    """Raise UserError where `write_graph` cannot or should not write, before the work."""
    if output is None:
        return
    check_not_source(source, output)
    if Path(output).suffix != ".onnx":
        raise UserError(f"`output` {output} is to be an ONNX file; give a name ending in .onnx.")
    check_writable(output)
    choose_manifest_path(output)


def write_graph(graph: Graph, output: str | Path) -> Path:
    """Write a graph as an ONNX file, with a manifest that says what it is; return its path.

    ONNX Runtime runs it, and `build --onnx` takes it.

    Raises:
        UserError: it cannot be written there.
    """
    path = Path(output)
    content = graph.model.SerializeToString()
    write_pair(path, content, graph_manifest(graph, path, content))
    return path


def all_in_float(precision: str, backend: str, target: str) -> UserError:
    """Return the error for a backend that computes a quantized graph in float."""
    label = precision.upper()
    instead = (
        "build with `backend` tensorrt on that GPU"
        if backend == "tensorrt-rtx"
        else "build for a GPU that has it"
    )
    return UserError(
        f"{backend} computes no convolution in {label} for {target}: the engine would be no faster "
        f"than fp16. Build with fp16 instead of {precision}, or {instead}; `allow_float` "
        "builds it all the same.",
    )


def graph_manifest(graph: Graph, path: Path, plan: bytes) -> Manifest:
    """Return the manifest of a graph's ONNX file, which ONNX Runtime runs as it is."""
    return Manifest(
        engine=file_name(path),
        model=graph.name,
        detector=graph.detector,
        batch=graph.batch,
        precision=graph.precision,
        backend="onnxruntime",
        backend_version=backend_module("onnxruntime").availability().version or "unknown",
        target="any",
        plan_sha256=sha256_bytes(plan),
        source=file_name(graph.source),
        source_sha256=graph.source_sha256,
        checkpoint_sha256=graph.checkpoint_sha256,
        calibration=graph.calibration,
        float_layers=graph.float_layers,
        tensors=tuple(
            value_spec(item, graph.source)
            for item in (*runtime_inputs(graph.model), *graph.model.graph.output)
        ),
    )


def quantized_layers_of(
    model: onnx.ModelProto, quantized: QuantizedName, texts: Sequence[str]
) -> int | None:
    """Return how many convolutions the builder says are in 8 bits; None if it says nothing.

    `texts` holds the arguments of its calls of `BuildSettings.on_layers`.
    """
    names = layer_names(model).values()
    found = layer_log.quantized_layers(texts[-1], names, quantized) if texts and texts[-1] else None
    return None if found is None else len(found)
