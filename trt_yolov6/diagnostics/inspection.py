"""What a file is: an ONNX graph or engine, a checkpoint, a TensorRT plan."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trt_yolov6.common.files import sha256_file
from trt_yolov6.engines.manifest import Manifest, read_manifest
from trt_yolov6.errors import UserError
from trt_yolov6.graph.operators import MOVING_OPS, subgraphs

if TYPE_CHECKING:
    import onnx

ONNX_SUFFIXES = (".onnx",)
CHECKPOINT_SUFFIXES = (".pt", ".pth")
PLAN_SUFFIXES = (".trt", ".plan", ".engine")

# Operators with weights that make nearly all of a network's work.
_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# Which of an operator's inputs are learned.
_LEARNED_INPUTS = {**dict.fromkeys(_LAYERS, (1, 2)), "BatchNormalization": (1, 2), "PRelu": (1,)}
_PASS_THROUGH = ("DequantizeLinear", "QuantizeLinear", "Cast", "Identity")
_SHORT_DTYPES = {
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "float64": "fp64",
    "int8": "int8",
    "uint8": "int8",
}
_PLAN_HEADER_BYTES = 28


@dataclass(frozen=True)
class TensorInfo:
    """An input or output: a free axis has its name, or `?`."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} ({', '.join(map(str, self.shape))})"


@dataclass(frozen=True)
class Storage:
    """The stored constants of one dtype."""

    tensors: int
    elements: int
    bytes: int


@dataclass(frozen=True)
class Layer:
    """A convolution or matrix product with its weights."""

    name: str
    operator: str
    weight_shape: tuple[int, ...]
    """As ONNX has it, such as (out, in / groups, height, width) of a convolution; empty where
    both factors of a product are computed."""
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    groups: int
    precision: str
    """What it computes in: `int8` or `fp8` where both factors are dequantized from it (TensorRT
    then multiplies in it), else the dtype of its input, `fp32` or `fp16`."""
    flops: int | None
    """Two a multiplication and addition, for one image; None where a size is not known."""
    paper_flops: int | None
    """As the paper's Table 1 counts: a transposed convolution by its output positions."""
    values: int | None
    """Elements of its input and output together, for one image; None where a size is not known."""


@dataclass(frozen=True)
class OnnxDetails:
    """What is in an ONNX graph."""

    opsets: dict[str, int]
    """Version by domain; the standard domain is `ai.onnx`."""
    ir_version: int
    producer: str
    """What wrote the graph, as the graph says; empty where it does not."""
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    operators: dict[str, int]
    """Nodes by operator, the most frequent first; those of subgraphs included."""
    parameters: int
    """Learned values: weights and biases of layers, scales and shifts of normalizations."""
    storage: dict[str, Storage]
    """The stored constants by dtype."""
    quantize_nodes: int
    dequantize_nodes: int
    precisions: dict[str, int]
    """Layers by what they compute in."""
    layers: tuple[Layer, ...]
    flops: int | None
    """Of all layers, for one image; None where the graph leaves the image size open."""
    paper_flops: int | None


@dataclass(frozen=True)
class CheckpointDetails:
    """What is in a checkpoint of the authors' code or of this package's training."""

    architecture: str
    release: str | None
    """Release of the authors' code that wrote it, such as `0.4`; None where this package did."""
    form: str
    """`training`, `fused` or `mixed`."""
    class_names: tuple[str, ...]
    parameters: int
    """Learned values in the form that the file has."""
    fused_parameters: int
    """Learned values after fusing."""
    fused_flops: int
    """Of the fused network for one image of `image_size` squared, as the paper's Table 1 counts."""
    image_size: int
    """Side of the input in pixels that the authors train and test the network at."""
    block: str
    """Of what the network is built: see `models.Architecture`."""
    activation: str
    regression_bins: int
    """Largest distance bin of the distribution focal loss; 0 for plain distances."""
    batch_norm_eps: tuple[float, ...]
    """The values that occur; empty when fused."""
    training: dict[str, Any] | None = None
    """`settings`, `epoch` and `ap`, where this package trained it; None for the authors' files."""


@dataclass(frozen=True)
class PlanDetails:
    """What is in a TensorRT plan."""

    flavour: str
    """`TensorRT` or `TensorRT-RTX`, by the first bytes."""
    version: str
    """Of the TensorRT that built it, by its header."""
    tensors: tuple[TensorInfo, ...]
    """Inputs and outputs; empty where the plan cannot be opened here."""
    layers: tuple[str, ...]
    """Names of the layers TensorRT made; empty where the plan cannot be opened here."""
    note: str
    """Why it could not be opened here; empty when it could."""


@dataclass(frozen=True)
class Inspection:
    """What a file is."""

    path: Path
    kind: str
    """`onnx`, `checkpoint` or `plan`."""
    size: int
    """In bytes."""
    sha256: str
    manifest: Manifest | None
    details: OnnxDetails | CheckpointDetails | PlanDetails

    @property
    def matches_manifest(self) -> bool | None:
        """Whether the file is the one its manifest describes; None without a manifest."""
        return None if self.manifest is None else self.manifest.plan_sha256 == self.sha256

    def to_json(self) -> dict[str, Any]:
        """Return everything as a JSON-ready dict, the details beside the rest."""
        return {
            "path": str(self.path),
            "kind": self.kind,
            "bytes": self.size,
            "sha256": self.sha256,
            **dataclasses.asdict(self.details),
            "manifest": dataclasses.asdict(self.manifest) if self.manifest else None,
            "matches_manifest": self.matches_manifest,
        }


def inspect_file(path: str | Path) -> Inspection:
    """Say what a file is; its suffix tells the kind, its content must agree.

    Raises:
        UserError: the file is missing, damaged or of no kind this package knows.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file in it.")
    if not path.is_file():
        raise UserError(f"{path} does not exist; check the path.")
    suffix = path.suffix.lower()
    details: OnnxDetails | CheckpointDetails | PlanDetails
    try:
        if suffix in ONNX_SUFFIXES:
            kind, details = "onnx", _inspect_onnx(path)
        elif suffix in CHECKPOINT_SUFFIXES:
            kind, details = "checkpoint", _inspect_checkpoint(path)
        elif suffix in PLAN_SUFFIXES:
            kind, details = "plan", _inspect_plan(path)
        else:
            known = ", ".join((*ONNX_SUFFIXES, *CHECKPOINT_SUFFIXES, *PLAN_SUFFIXES))
            raise UserError(
                f"{path} is of no kind that can be inspected; give a file that ends in {known}."
            )
        return Inspection(
            path=path,
            kind=kind,
            size=path.stat().st_size,
            sha256=sha256_file(path),
            manifest=None if kind == "checkpoint" else read_manifest(path),
            details=details,
        )
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check the path.") from error


def format_inspection(inspection: Inspection, *, layers: bool = False) -> str:
    """Return an inspection as text for a terminal.

    Args:
        inspection: what `inspect_file` returned.
        layers: list every layer too.
    """
    details = inspection.details
    rows = [
        ("file", f"{inspection.path}, {_size(inspection.size)}"),
        ("SHA-256", inspection.sha256),
    ]
    listing: list[str] = []
    if isinstance(details, OnnxDetails):
        rows += _onnx_rows(details)
        listing = _layer_lines(details.layers)
    elif isinstance(details, CheckpointDetails):
        rows += _checkpoint_rows(details)
    else:
        rows += _plan_rows(details)
        listing = [f"  {name}" for name in details.layers]
    rows += _manifest_rows(inspection)
    width = max(len(name) for name, _ in rows)
    lines = [f"{name.ljust(width)}  {text}" for name, text in rows]
    if layers:
        lines += ["layers", *listing] if listing else ["layers: none can be listed"]
    return "\n".join(lines)


# --- ONNX


class _Graph:
    """An ONNX graph with look-ups by tensor name, its shapes inferred for one image."""

    def __init__(self, model: onnx.ModelProto) -> None:
        import onnx

        self.batch = 1
        sized = onnx.ModelProto()
        sized.CopyFrom(model)
        stored = {item.name for item in sized.graph.initializer}
        for item in sized.graph.input:
            axes = item.type.tensor_type.shape.dim
            if item.name not in stored and len(axes) > 1:
                if not axes[0].dim_value:
                    axes[0].dim_value = 1
                self.batch = axes[0].dim_value
        for output in sized.graph.output:
            output.type.tensor_type.ClearField("shape")  # they may name the batch axis
        try:
            sized = onnx.shape_inference.infer_shapes(sized, data_prop=True)
        except Exception:  # its error classes share no public base; sizes stay unknown then
            sized = model
        graph = sized.graph
        self.shapes: dict[str, tuple[int | None, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for value in (*graph.input, *graph.value_info, *graph.output):
            tensor = value.type.tensor_type
            self.dtypes[value.name] = _dtype_name(tensor.elem_type)
            if tensor.HasField("shape"):
                self.shapes[value.name] = tuple(
                    axis.dim_value if axis.HasField("dim_value") else None
                    for axis in tensor.shape.dim
                )
        self.constants: dict[str, onnx.TensorProto] = {
            item.name: item for item in graph.initializer
        }
        self.producers: dict[str, onnx.NodeProto] = {}
        for node in graph.node:
            self.producers.update((output, node) for output in node.output)
            if node.op_type == "Constant":
                for attribute in node.attribute:
                    if attribute.name == "value":
                        self.constants[node.output[0]] = attribute.t
        for name, constant in self.constants.items():
            self.shapes[name] = tuple(constant.dims)
            self.dtypes[name] = _dtype_name(constant.data_type)

    def constant_behind(self, name: str) -> str | None:
        """Return the stored constant a tensor is made from by casts and (de)quantization."""
        while name not in self.constants:
            producer = self.producers.get(name)
            if producer is None or producer.op_type not in _PASS_THROUGH:
                return None
            name = producer.input[0]
        return name

    def precision_of(self, node: onnx.NodeProto) -> str:
        """Return what a layer computes in: the quantized dtype if both its factors have one."""
        quantized = [self._quantized(name) for name in node.input[:2]]
        if None not in quantized:
            return " x ".join(sorted({_short_dtype(dtype) for dtype in quantized if dtype}))
        return _short_dtype(self.dtypes.get(node.input[0], "unknown"))

    def _quantized(self, name: str) -> str | None:
        """Return the dtype that a tensor is dequantized from, or None.

        What only moves values may stand in between: TensorRT lets it work on the quantized ones.
        """
        producer = self.producers.get(name)
        if producer is None:
            return None
        if producer.op_type in MOVING_OPS:
            return self._quantized(producer.input[0])
        if producer.op_type == "Concat":
            joined = {self._quantized(part) for part in producer.input}
            return joined.pop() if len(joined) == 1 else None
        if producer.op_type != "DequantizeLinear":
            return None
        source = producer.input[0]
        quantizer = self.producers.get(source)
        if source in self.dtypes or quantizer is None:
            return self.dtypes.get(source, "unknown")
        # Without a zero point, QuantizeLinear makes uint8.
        return self.dtypes.get(quantizer.input[2], "unknown") if quantizer.input[2:] else "uint8"


def _inspect_onnx(path: Path) -> OnnxDetails:
    from trt_yolov6.graph.files import read_onnx

    return inspect_onnx(read_onnx(path))


def inspect_onnx(model: onnx.ModelProto) -> OnnxDetails:
    """Say what is in an ONNX graph."""
    graph = _Graph(model)
    operators = Counter(
        node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"
        for node in _all_nodes(model.graph)
    )
    layers = tuple(_layer(graph, node) for node in model.graph.node if node.op_type in _LAYERS)
    learned = {
        constant
        for node in model.graph.node
        for index in _LEARNED_INPUTS.get(node.op_type, ())
        if index < len(node.input)
        and (constant := graph.constant_behind(node.input[index])) is not None
    }
    return OnnxDetails(
        opsets={item.domain or "ai.onnx": item.version for item in model.opset_import},
        ir_version=model.ir_version,
        producer=f"{model.producer_name} {model.producer_version}".strip(),
        inputs=tuple(
            _tensor_info(item) for item in model.graph.input if item.name not in graph.constants
        ),
        outputs=tuple(_tensor_info(item) for item in model.graph.output),
        operators=dict(operators.most_common()),
        parameters=sum(math.prod(graph.constants[name].dims) for name in learned),
        storage=_storage(graph.constants.values()),
        quantize_nodes=operators["QuantizeLinear"],
        dequantize_nodes=operators["DequantizeLinear"],
        precisions=dict(Counter(layer.precision for layer in layers).most_common()),
        layers=layers,
        flops=_sum_or_none(layer.flops for layer in layers),
        paper_flops=_sum_or_none(layer.paper_flops for layer in layers),
    )


def layers_of(model: onnx.ModelProto) -> tuple[Layer, ...]:
    """Return the convolutions and matrix products of a graph, in its order."""
    graph = _Graph(model)
    return tuple(_layer(graph, node) for node in model.graph.node if node.op_type in _LAYERS)


def _layer(graph: _Graph, node: onnx.NodeProto) -> Layer:
    attributes = {item.name: item for item in node.attribute}
    weight = graph.constant_behind(node.input[1])
    weight_shape = tuple(graph.constants[weight].dims) if weight else ()
    inputs, factor = (graph.shapes.get(node.input[index]) for index in (0, 1))
    output = graph.shapes.get(node.output[0])
    convolves = node.op_type in ("Conv", "ConvTranspose")
    kernel = weight_shape[2:] if convolves else ()
    if convolves:
        # Each output value sums over its kernel's inputs; transposed, each input value is
        # multiplied with its kernel's outputs.
        values = output if node.op_type == "Conv" else inputs
        per_value = _product((factor or (None,))[1:])
    else:
        values = output
        transposed = "transA" in attributes and attributes["transA"].i
        per_value = None if not inputs else inputs[-2 if transposed else -1]
    flops = _flops(_product(values), per_value, graph.batch)
    paper_flops = flops
    if node.op_type == "ConvTranspose" and output:
        paper_flops = _flops(_product(output[2:]), _product(factor), 1)
    return Layer(
        name=node.name or node.output[0],
        operator=node.op_type,
        weight_shape=weight_shape,
        kernel=kernel,
        strides=(
            tuple(attributes["strides"].ints) if "strides" in attributes else (1,) * len(kernel)
        ),
        groups=attributes["group"].i if "group" in attributes else 1,
        precision=graph.precision_of(node),
        flops=flops,
        paper_flops=paper_flops,
        values=_sum_or_none(
            None if size is None else size // graph.batch
            for size in (_product(inputs), _product(output))
        ),
    )


def _flops(values: int | None, per_value: int | None, batch: int) -> int | None:
    return None if values is None or per_value is None else 2 * values * per_value // batch


def _product(shape: Sequence[int | None] | None) -> int | None:
    if shape is None:
        return None
    sizes = [size for size in shape if size is not None]
    return math.prod(sizes) if len(sizes) == len(shape) else None


def _sum_or_none(values: Iterable[int | None]) -> int | None:
    known = list(values)
    return None if None in known else sum(value for value in known if value is not None)


def _all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Yield the nodes of a graph and of the subgraphs in its `If`s and loops."""
    for node in graph.node:
        yield node
        for inner in subgraphs(node):
            yield from _all_nodes(inner)


def _storage(constants: Any) -> dict[str, Storage]:
    import onnx

    found: dict[str, Storage] = {}
    for constant in constants:
        dtype = _dtype_name(constant.data_type)
        elements = math.prod(constant.dims)
        try:
            width = onnx.helper.tensor_dtype_to_np_dtype(constant.data_type).itemsize
        except (KeyError, TypeError, ValueError):
            width = 0
        old = found.get(dtype, Storage(0, 0, 0))
        found[dtype] = Storage(
            old.tensors + 1, old.elements + elements, old.bytes + elements * width
        )
    return dict(sorted(found.items(), key=lambda item: -item[1].bytes))


def _tensor_info(value: onnx.ValueInfoProto) -> TensorInfo:
    tensor = value.type.tensor_type
    return TensorInfo(
        value.name,
        _dtype_name(tensor.elem_type),
        tuple(
            axis.dim_value if axis.HasField("dim_value") else axis.dim_param or "?"
            for axis in tensor.shape.dim
        ),
    )


def _dtype_name(elem_type: int) -> str:
    import onnx

    known = onnx.TensorProto.DataType.values()
    name = onnx.TensorProto.DataType.Name(elem_type).lower() if elem_type in known else "unknown"
    return {"float": "float32", "double": "float64"}.get(name, name)


def _short_dtype(dtype: str) -> str:
    return "fp8" if dtype.startswith("float8") else _SHORT_DTYPES.get(dtype, dtype)


# --- checkpoints


def _inspect_checkpoint(path: Path) -> CheckpointDetails:
    from torch import nn

    from trt_yolov6.checkpoints.loading import load_checkpoint
    from trt_yolov6.models import count_flops, count_parameters, fuse

    checkpoint = load_checkpoint(path)
    fused = fuse(checkpoint.model)
    return CheckpointDetails(
        architecture=checkpoint.arch.name,
        release=checkpoint.release,
        form=checkpoint.form,
        class_names=checkpoint.class_names,
        parameters=count_parameters(checkpoint.model),
        fused_parameters=count_parameters(fused),
        fused_flops=count_flops(fused, checkpoint.arch.image_size),
        image_size=checkpoint.arch.image_size,
        block=checkpoint.arch.block,
        activation=checkpoint.arch.activation,
        regression_bins=checkpoint.arch.reg_max,
        batch_norm_eps=tuple(
            sorted(
                {
                    module.eps
                    for module in checkpoint.model.modules()
                    if isinstance(module, nn.BatchNorm2d)
                }
            )
        ),
        training=dataclasses.asdict(checkpoint.training) if checkpoint.training else None,
    )


# --- TensorRT plans


def read_plan_header(path: Path) -> tuple[str, str]:
    """Return which TensorRT built a plan, and its version, from the first 28 bytes.

    A plan of TensorRT begins with `ftrt`, one of TensorRT-RTX with `vtrt`; bytes 24 to 27 are the
    version since TensorRT 8.6 (`trtexec --getPlanVersionOnly` reads the same).

    Raises:
        UserError: the file begins like neither.
    """
    with path.open("rb") as file:
        header = file.read(_PLAN_HEADER_BYTES)
    flavours = {b"ftrt": "TensorRT", b"vtrt": "TensorRT-RTX"}
    flavour = flavours.get(header[:4])
    if flavour is None or len(header) < _PLAN_HEADER_BYTES:
        raise UserError(
            f"{path} does not begin like a TensorRT plan; build it again with `trt-yolov6 build`."
        )
    return flavour, ".".join(map(str, header[24:28]))


def _inspect_plan(path: Path) -> PlanDetails:
    flavour, version = read_plan_header(path)
    module = "tensorrt" if flavour == "TensorRT" else "tensorrt_rtx"
    try:
        tensors, layers = _open_plan(path, importlib.import_module(module))
    except Exception as error:  # missing or broken TensorRT, no GPU, another version …
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        note = f"its layers cannot be listed here: {reason}"
        return PlanDetails(flavour, version, (), (), note)
    return PlanDetails(flavour, version, tensors, layers, "")


def _open_plan(path: Path, api: Any) -> tuple[tuple[TensorInfo, ...], tuple[str, ...]]:
    """Deserialize a plan and list its inputs, outputs and layers; needs the GPU it is for."""
    from trt_yolov6.engines.cuda import device as cuda_device
    from trt_yolov6.engines.tensorrt.flavour import logger_of
    from trt_yolov6.engines.tensorrt.layer_log import inspector_layers

    cuda_device.current_device()
    logger = logger_of(api)
    logger.clear()
    runtime = api.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise RuntimeError(logger.reason())
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    tensors = tuple(
        TensorInfo(
            name,
            str(engine.get_tensor_dtype(name)).rsplit(".", 1)[-1].lower(),
            tuple("?" if size < 0 else int(size) for size in engine.get_tensor_shape(name)),
        )
        for name in names
    )
    inspector = engine.create_engine_inspector()
    text = inspector.get_engine_information(api.LayerInformationFormat.JSON)
    # With detailed profiling a layer is an object, else only its name.
    layers = tuple(
        str(layer.get("Name", layer)) if isinstance(layer, dict) else str(layer)
        for layer in inspector_layers(text)
    )
    return tensors, layers


# --- text


def _onnx_rows(details: OnnxDetails) -> list[tuple[str, str]]:
    opsets = ", ".join(f"{domain} {version}" for domain, version in details.opsets.items())
    producer = f", by {details.producer}" if details.producer else ""
    rows = [
        ("kind", f"ONNX graph, opset {opsets}, IR {details.ir_version}{producer}"),
        *(("input", str(tensor)) for tensor in details.inputs),
        *(("output", str(tensor)) for tensor in details.outputs),
        ("nodes", f"{sum(details.operators.values())}: {_counts(details.operators)}"),
        ("parameters", f"{details.parameters:,}"),
        (
            "stored",
            ", ".join(
                f"{dtype} {item.elements:,} values in {item.tensors} ({_size(item.bytes)})"
                for dtype, item in details.storage.items()
            )
            or "nothing",
        ),
        ("layers", f"{len(details.layers)}: {_counts(details.precisions)}"),
    ]
    if details.quantize_nodes or details.dequantize_nodes:
        rows.append(
            (
                "Q/DQ",
                f"{details.quantize_nodes} QuantizeLinear, "
                f"{details.dequantize_nodes} DequantizeLinear",
            )
        )
    if details.flops is None or details.paper_flops is None:
        rows.append(("FLOPs", "unknown: the graph leaves the image size or a shape open"))
    else:
        text = f"{details.flops / 1e9:.2f} G an image"
        if details.paper_flops != details.flops:
            text += f" ({details.paper_flops / 1e9:.2f} G as the paper counts)"
        rows.append(("FLOPs", text))
    return rows


def _checkpoint_rows(details: CheckpointDetails) -> list[tuple[str, str]]:
    eps = ", ".join(f"{value:g}" for value in details.batch_norm_eps) or "none left"
    boxes = f"DFL with {details.regression_bins + 1} bins" if details.regression_bins else "direct"
    size = details.image_size
    origin = f" of release {details.release}" if details.release else ""
    rows = [
        ("kind", f"checkpoint{origin}: {details.architecture}, {details.form} form"),
        ("classes", f"{len(details.class_names)}: {', '.join(details.class_names)}"),
        (
            "parameters",
            f"{details.parameters:,} in the file, {details.fused_parameters:,} when fused",
        ),
        (
            "FLOPs",
            f"{details.fused_flops / 1e9:.2f} G fused, at {size}x{size}, as the paper counts",
        ),
        (
            "network",
            f"{details.block} blocks, {details.activation}, box regression {boxes}, batch norm "
            f"eps {eps}",
        ),
    ]
    if details.training:
        settings, ap = details.training["settings"], details.training["ap"]
        text = f"{details.training['epoch']} of {settings.get('epochs', '?')} epochs"
        text += f" on {settings.get('data', '?')}, input {settings.get('image_size', '?')}"
        rows.append(("training", text + ("" if ap is None else f", AP {ap:.4f}")))
    return rows


def _plan_rows(details: PlanDetails) -> list[tuple[str, str]]:
    rows = [
        ("kind", f"plan of {details.flavour} {details.version}"),
        *(("tensor", str(tensor)) for tensor in details.tensors),
    ]
    rows.append(("layers", details.note or f"{len(details.layers)}"))
    return rows


def _manifest_rows(inspection: Inspection) -> list[tuple[str, str]]:
    manifest = inspection.manifest
    if manifest is None:
        return [] if inspection.kind == "checkpoint" else [("manifest", "none")]
    height, width = manifest.image_size
    batch = manifest.batch
    check = (
        "matches this file"
        if inspection.matches_manifest
        else "describes ANOTHER file (cut short, or replaced): build the engine again"
    )
    rows = [
        ("manifest", check),
        (
            "  model",
            f"{manifest.model}, {manifest.precision}, {height}x{width}, "
            f"{len(manifest.class_names)} classes",
        ),
        (
            "  decoder",
            f"{manifest.decoder}, outputs {manifest.output_layout}; images: "
            f"{manifest.preprocessing}",
        ),
        (
            "  batch",
            f"{batch.min}"
            if batch.is_static
            else f"{batch.min} to {batch.max}, tuned for {batch.opt}",
        ),
        ("  built", f"by {manifest.backend} {manifest.backend_version} for {manifest.target}"),
        ("  source", f"{manifest.source}, SHA-256 {manifest.source_sha256}"),
    ]
    if manifest.nms:
        nms = manifest.nms
        rows.append(
            (
                "  NMS",
                f"confidence {nms.confidence}, IoU {nms.iou}, at most {nms.max_detections}",
            )
        )
    if manifest.precision in ("int8", "fp8"):
        layers = manifest.quantized_layers
        count = "unknown" if layers is None else str(layers)
        rows.append((f"  in {manifest.precision.upper()}", f"{count} convolutions of the engine"))
    if manifest.calibration:
        rows.append(("  calibration", json.dumps(manifest.calibration)))
    if manifest.float_layers:
        rows.append(("  in float", ", ".join(manifest.float_layers)))
    return rows


def _layer_lines(layers: Sequence[Layer]) -> list[str]:
    rows = [("name", "operator", "weights", "stride", "groups", "precision", "MFLOPs")]
    rows += [
        (
            layer.name,
            layer.operator,
            _times(layer.weight_shape),
            _times(layer.strides),
            str(layer.groups),
            layer.precision,
            "unknown" if layer.flops is None else f"{layer.flops / 1e6:.1f}",
        )
        for layer in layers
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  "
        + "  ".join(
            cell.rjust(width) if index == len(row) - 1 else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "-"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"


def _size(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 10_000 else f"{count} bytes"
