"""Checkpoint or ONNX file → engine: plan and manifest, side by side."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trt_yolov6.data.preprocessing import YOLOV6, Preprocessing
from trt_yolov6.decoders.inputs import runtime_inputs, with_one_input
from trt_yolov6.decoders.layouts import class_count
from trt_yolov6.decoders.outputs import drop_other_outputs, dropped_text
from trt_yolov6.decoders.recognition import facts_of, recognize
from trt_yolov6.engines import backend as backend_module
from trt_yolov6.engines import best_backend
from trt_yolov6.engines.base import BuildSettings
from trt_yolov6.engines.layout import check_input, image_size_in, names_in, nms_in
from trt_yolov6.engines.manifest import (
    BatchProfile,
    Manifest,
    NmsSettings,
    OutputLayout,
    Precision,
    choose_manifest_path,
    write_pair,
)
from trt_yolov6.errors import UserError
from trt_yolov6.files import check_writable, file_name, sha256_bytes, sha256_file
from trt_yolov6.onnx_files import graph_precision, read_onnx, value_spec
from trt_yolov6.quantization.placement import layer_names

if TYPE_CHECKING:
    import onnx

    from trt_yolov6.checkpoint import Checkpoint
    from trt_yolov6.export import ExportSettings
    from trt_yolov6.quantization.levels import QuantizedName

SUFFIXES = {"onnxruntime": ".onnx", "tensorrt": ".trt", "tensorrt-rtx": ".trt"}

_UINT8 = 2
"""`TensorProto.UINT8`."""

ENGINES = Path("engines")
"""Where an engine goes unless a path is given."""


@dataclass(frozen=True)
class Graph:
    """An ONNX model ready to be built, with what the manifest has to say about it."""

    model: onnx.ModelProto
    name: str
    class_names: tuple[str, ...]
    image_size: tuple[int, int]
    batch: BatchProfile
    precision: Precision
    output_layout: OutputLayout
    nms: NmsSettings | None
    source: Path
    calibration: dict[str, Any] | None = None
    """How an INT8 or FP8 graph was calibrated; None for others."""
    float_layers: tuple[str, ...] = ()
    """Layers of such a graph that were asked to stay in float."""
    decoder: str = "yolov6"
    """The family the detector is of, see `decoders.families`."""
    preprocessing: Preprocessing = YOLOV6
    """How images become its input."""
    notes: tuple[str, ...] = ()
    """What was changed of a file's graph as it was read, or rewritten for TensorRT: sentences."""


@dataclass(frozen=True)
class BuiltEngine:
    """What `build_engine` wrote."""

    path: Path
    manifest_path: Path
    manifest: Manifest
    seconds: float
    """Time the backend took for the plan."""
    quantized_asked: int
    """Convolutions with INT8 or FP8 weights in the graph; the manifest says how many the engine
    has."""


def graph_from_checkpoint(weights: str | Path | Checkpoint, settings: ExportSettings) -> Graph:
    """Export a checkpoint: a file, or what `load_checkpoint` made of it.

    Raises:
        UserError: the file is no YOLOv6 checkpoint this package reads, or the size does not fit it.
    """
    from trt_yolov6.checkpoint import load_checkpoint
    from trt_yolov6.export import export_onnx

    checkpoint = load_checkpoint(weights) if isinstance(weights, (str, Path)) else weights
    return Graph(
        model=export_onnx(checkpoint.model, settings, checkpoint.class_names),
        name=checkpoint.arch.name,
        class_names=tuple(checkpoint.class_names),
        image_size=settings.size_for(checkpoint.arch),
        batch=settings.batch,
        precision="fp16" if settings.fp16 else "fp32",
        output_layout=settings.output_layout,
        nms=settings.nms,
        source=checkpoint.path,
    )


def graph_from_onnx(
    path: str | Path,
    *,
    batch: BatchProfile | None = None,
    image_size: tuple[int, int] | None = None,
    fp16: bool = False,
    class_names: Sequence[str] | None = None,
    decoder: str | None = None,
    preprocess: Sequence[str] = (),
) -> Graph:
    """Take a detector's ONNX file as it is, made half precision if asked.

    Inputs beside the image that PaddleDetection's exports have become constants, and batch
    normalization goes into the convolutions before it.

    Args:
        path: a graph with one image input and outputs of a layout in `OutputLayout`.
        batch: profile of a free batch axis; must agree with a fixed one.
        image_size: height and width, for graphs that leave them free; must agree with fixed ones.
            None takes those that Ultralytics' exporter notes.
        fp16: convert a float32 graph; decoding stays in float32.
        class_names: in the order of the scores; None takes the file's own, or `class_0` …
        decoder: the family it is of, a name of `decoders.families`; None finds out.
        preprocess: changes to the family's pre-processing, each FIELD=VALUE of `Preprocessing`.

    Raises:
        UserError: the file is no such graph, or disagrees with what was asked.
    """

    from trt_yolov6.folding import with_folded_weights
    from trt_yolov6.precision import tail_nodes, to_fp16

    path = Path(path)
    model = read_onnx(path)
    metadata = {item.key: item.value for item in model.metadata_props}
    model = with_one_input(model, path, image_size)
    inputs = runtime_inputs(model)
    given = value_spec(inputs[0], path)
    spatial = (1, 2) if given.dtype == np.uint8 else (2, 3)
    if len(given.shape) != 4:
        raise UserError(
            f"{path} takes {list(given.shape)}, not a batch of images; a detector is needed."
        )
    sides = [given.shape[axis] for axis in spatial]
    if image_size is None and None in sides:
        image_size = image_size_in(metadata)
    size = _fixed_size(path, sides, image_size)
    profile = _fixed_batch(path, given.shape[0], batch)
    dims = inputs[0].type.tensor_type.shape.dim
    for axis, value in zip(spatial, size, strict=True):
        dims[axis].dim_value = value
    check_input(value_spec(inputs[0], path), path)
    _fill_in_output_shapes(model)
    dropped = drop_other_outputs(model, path, size, decoder)
    outputs = [value_spec(item, path) for item in model.graph.output]
    family, layout = recognize(facts_of(model, outputs, size), path, decoder)
    precision = graph_precision(model)
    if precision == "fp32":
        model = with_folded_weights(model)
    if precision not in ("fp32", "fp16") and fp16:
        raise UserError(
            f"{path} is quantized ({precision}), so its precision is decided already; leave --fp16 "
            "out."
        )
    if fp16 and precision == "fp32":
        _name_anonymous_nodes(model)
        model = to_fp16(model, keep_float32=tail_nodes(model))
        precision = "fp16"
    count = class_count(outputs, layout)
    labels = names_in(metadata) if class_names is None else tuple(class_names)
    if labels is None:
        labels = tuple(f"class_{index}" for index in range(count or 0))
    elif count is not None and len(labels) != count:
        raise UserError(
            f"{len(labels)} class names were given for {path}, which has {count} classes; "
            "check --names."
        )
    return Graph(
        model=model,
        # A name in a file is anyone's; it becomes that of the engine's file.
        name=Path(metadata.get("model", "").replace("\\", "/")).name.lstrip(".") or path.stem,
        class_names=labels,
        image_size=size,
        batch=profile,
        precision=precision,
        output_layout=layout,
        nms=nms_in(metadata) if layout == "end2end" else None,
        source=path,
        decoder=family.name,
        preprocessing=family.preprocessing.with_changes(preprocess),
        notes=(dropped_text(dropped),) if dropped else (),
    )


def for_tensorrt(graph: Graph) -> Graph:
    """Return a graph as TensorRT computes it: unsigned INT8 levels become signed ones.

    Raises:
        UserError: see `quantization.symmetric.check_symmetric`.
    """
    if graph.precision not in ("int8", "int8-dynamic"):
        return graph
    from trt_yolov6.quantization.symmetric import with_symmetric_int8

    model, said = with_symmetric_int8(graph.model, graph.source)
    if said is None:
        return graph
    return dataclasses.replace(graph, model=model, notes=(*graph.notes, said))


def engine_stem(graph: Graph, target: str | None = None) -> str:
    """Return what an engine is called by what it is: `yolov6s-int8`, `yolov6s-fp16-320-b1`.

    That is its checkpoint or ONNX file and precision, and where they are not the default, size,
    batch, uint8 input, NMS in the graph, and the target.
    """
    height, width = graph.image_size
    batch = graph.batch
    default = BatchProfile()
    parts = [graph.source.stem, graph.precision]
    if (height, width) != (640, 640):
        parts.append(str(height) if height == width else f"{height}x{width}")
    if batch.is_static:
        parts.append(f"b{batch.min}")
    elif batch != default:
        parts.append(f"b{batch.min}-{batch.opt}-{batch.max}")
    if any(item.type.tensor_type.elem_type == _UINT8 for item in runtime_inputs(graph.model)):
        parts.append("uint8")
    if graph.source.suffix == ".pt" and graph.output_layout == "end2end":
        parts.append("end2end")
    if target is not None:
        parts.append(target)
    return "-".join(parts)


def engine_path(
    graph: Graph, backend: str, output: str | Path | None = None, target: str | None = None
) -> Path:
    """Return where `build_engine` writes: `output`, or into `engines/` under `engine_stem`."""
    return Path(output) if output else ENGINES / f"{engine_stem(graph, target)}{SUFFIXES[backend]}"


def check_build(backend: str, output: str | Path | None, settings: BuildSettings) -> str:
    """Return the backend that `build_engine` would use, before the graph is exported.

    Raises:
        UserError: that backend is missing, refuses a setting, or does not write such a file, or
            there (without `output`, in `engines/`) no file can be written.
    """
    name = best_backend() if backend == "auto" else backend
    backend_module(name).check(settings)
    suffix = SUFFIXES[name]
    if output and (Path(output).suffix == ".onnx") != (suffix == ".onnx"):
        raise UserError(
            f"--output {output} does not fit the {name} backend; give a name that ends in "
            f"{suffix}, or another --backend."
        )
    # The engine's name is known only once its graph is; its folder is known now.
    check_writable(output or ENGINES / f"<name>{suffix}")
    if output:
        choose_manifest_path(output)
    return name


def build_engine(
    graph: Graph,
    *,
    backend: str = "auto",
    output: str | Path | None = None,
    settings: BuildSettings | None = None,
    allow_float: bool = False,
) -> BuiltEngine:
    """Build an engine and write plan and manifest.

    Args:
        graph: from `graph_from_checkpoint` or `graph_from_onnx`.
        backend: `onnxruntime`, `tensorrt`, `tensorrt-rtx`, or `auto` for the best that builds and
            runs on this machine.
        output: path of the plan; None for one in `engines/`, see `engine_stem`.
        settings: target, caches and limits; their batch profile is replaced by the graph's.
        allow_float: build an INT8 or FP8 graph even where the backend computes all of it in float.

    Raises:
        UserError: the backend is missing, refuses a setting, cannot build the graph, or computes
            none of its convolutions in the 8 bits asked for.
    """
    fp8 = graph.precision == "fp8"
    settings = dataclasses.replace(settings or BuildSettings(), batch=graph.batch, fp8=fp8)
    name = check_build(backend, output, settings)
    module = backend_module(name)
    if name != "onnxruntime":
        graph = for_tensorrt(graph)
    path = engine_path(graph, name, output, settings.target)
    asked = _quantized_convolutions(graph.model)
    if settings.calibration is not None:
        asked = len(layer_names(graph.model))
    said: list[str] = []
    settings = dataclasses.replace(settings, on_layers=_both(said.append, settings.on_layers))
    start = time.perf_counter()
    plan = module.build(graph.model.SerializeToString(), settings)
    seconds = time.perf_counter() - start
    quantized: QuantizedName = "fp8" if fp8 else "int8"
    found = quantized_layers_of(graph.model, quantized, said) if asked and said else asked or None
    target = settings.target or ("any" if name == "onnxruntime" else "this machine's GPU")
    if asked and found == 0 and not allow_float:
        raise all_in_float(graph.precision, name, target)
    manifest = dataclasses.replace(
        _manifest(graph, path, plan),
        backend=name,
        backend_version=module.availability().version or "unknown",
        target=target,
        int8_layers=None if fp8 else found,
        fp8_layers=found if fp8 else None,
    )
    manifest_path = write_pair(path, plan, manifest)
    return BuiltEngine(path, manifest_path, manifest, seconds, asked)


def write_graph(graph: Graph, output: str | Path) -> Path:
    """Write a graph as an ONNX file, with a manifest that says what it is; return its path.

    ONNX Runtime runs it, and `build --onnx` takes it.

    Raises:
        UserError: it cannot be written there.
    """
    path = Path(output)
    content = graph.model.SerializeToString()
    write_pair(path, content, _manifest(graph, path, content))
    return path


def all_in_float(precision: str, backend: str, target: str) -> UserError:
    """Return the error for a backend that computes a quantized graph in float."""
    label = precision.upper()
    instead = (
        "build with --backend tensorrt on that GPU"
        if backend == "tensorrt-rtx"
        else "build for a GPU that has it"
    )
    return UserError(
        f"{backend} computes no convolution in {label} for {target}: the engine would be no faster "
        f"than --fp16. Build with --fp16 instead of --{precision}, or {instead}; --allow-float "
        "builds it all the same."
    )


def _manifest(graph: Graph, path: Path, plan: bytes) -> Manifest:
    """Return the manifest of a graph as ONNX Runtime takes it."""
    return Manifest(
        engine=file_name(path),
        model=graph.name,
        class_names=graph.class_names,
        image_size=graph.image_size,
        batch=graph.batch,
        precision=graph.precision,
        output_layout=graph.output_layout,
        backend="onnxruntime",
        backend_version=backend_module("onnxruntime").availability().version or "unknown",
        target="any",
        plan_sha256=sha256_bytes(plan),
        source=file_name(graph.source),
        source_sha256=sha256_file(graph.source),
        nms=graph.nms,
        calibration=graph.calibration,
        float_layers=graph.float_layers,
        decoder=graph.decoder,
        preprocessing=graph.preprocessing,
        tensors=tuple(
            value_spec(item, graph.source)
            for item in (*runtime_inputs(graph.model), *graph.model.graph.output)
        ),
    )


def read_class_names(path: str | Path) -> tuple[str, ...]:
    """Read class names from a text file, one a line, or from a COCO annotation file's categories.

    Raises:
        UserError: the file is missing, empty or neither.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a readable text file; check --names.") from error
    if path.suffix == ".json":
        try:
            categories = sorted(json.loads(text)["categories"], key=lambda item: item["id"])
            return tuple(str(item["name"]) for item in categories)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} has no COCO categories; give such a file or one name a line as --names."
            ) from error
    names = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not names:
        raise UserError(f"{path} is empty; write one class name a line.")
    return names


def _both(one: Callable[[str], None], other: Callable[[str], None] | None) -> Callable[[str], None]:
    def call(text: str) -> None:
        one(text)
        if other is not None:
            other(text)

    return call


def _quantized_convolutions(model: onnx.ModelProto) -> int:
    """Return how many convolutions of a graph have INT8 or FP8 weights."""
    nodes = model.graph.node
    dequantized = {node.output[0] for node in nodes if node.op_type == "DequantizeLinear"}
    layers = (node for node in nodes if node.op_type in ("Conv", "ConvTranspose"))
    return sum(node.input[1] in dequantized for node in layers)


def quantized_layers_of(
    model: onnx.ModelProto, quantized: QuantizedName, said: Sequence[str]
) -> int | None:
    """Return how many convolutions the builder says are in 8 bits; None if it says nothing.

    Args:
        model: that was built.
        quantized: `int8` or `fp8`.
        said: what `BuildSettings.on_layers` was called with.
    """
    from trt_yolov6.engines.tensorrt_layers import quantized_layers

    names = layer_names(model).values()
    return len(quantized_layers(said[-1], names, quantized)) if said and said[-1] else None


# --- reading foreign graphs ---------------------------------------------------------------------


def _fill_in_output_shapes(model: onnx.ModelProto) -> None:
    """Give the outputs the lengths that follow from the image size, where the file leaves them."""
    import onnx

    shapes = [output.type.tensor_type.shape for output in model.graph.output]
    if all(dim.dim_value for shape in shapes for dim in shape.dim[1:]):
        return
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    # What the exporter noted of a free size would stand in the way.
    del bare.graph.value_info[:]
    for output in bare.graph.output:
        output.type.tensor_type.ClearField("shape")
    try:
        inferred = onnx.shape_inference.infer_shapes(bare, data_prop=True)
    except onnx.shape_inference.InferenceError:
        return
    for shape, output in zip(shapes, inferred.graph.output, strict=True):
        known = output.type.tensor_type.shape
        if not shape.dim:
            shape.CopyFrom(known)
        for own, found in zip(shape.dim, known.dim, strict=False):
            if not own.dim_value and found.dim_value:
                own.dim_value = found.dim_value


def _fixed_size(
    path: Path, sizes: Sequence[int | None], wanted: tuple[int, int] | None
) -> tuple[int, int]:
    if wanted is None:
        if None in sizes:
            raise UserError(f"{path} leaves its image size free; fix it with --imgsz.")
        wanted = (sizes[0] or 0, sizes[1] or 0)
    elif any(own is not None and own != asked for own, asked in zip(sizes, wanted, strict=True)):
        raise UserError(
            f"{path} takes images of {sizes[0]}x{sizes[1]}, not {wanted[0]}x{wanted[1]}; leave "
            "--imgsz out, or export it anew."
        )
    return wanted


def _fixed_batch(path: Path, own: int | None, wanted: BatchProfile | None) -> BatchProfile:
    if own is None:
        return wanted or BatchProfile()
    if wanted and (wanted.min, wanted.max) != (own, own):
        raise UserError(
            f"{path} takes batch {own} only; leave --batch and --dynamic out, or export it anew "
            "with a free batch axis."
        )
    return BatchProfile(own, own, own)


def _name_anonymous_nodes(model: onnx.ModelProto) -> None:
    taken = {node.name for node in model.graph.node}
    for index, node in enumerate(model.graph.node):
        if not node.name:
            node.name = f"{node.op_type}_{index}"
            while node.name in taken:
                node.name += "_"
            taken.add(node.name)
