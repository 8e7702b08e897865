"""Export a model to ONNX: the fused network traced by torch.onnx, then decoding (and NMS).

Only convolutions, activations, pooling and concatenation are traced, so no shape arithmetic can
arise. Decoding is appended node by node, in the form with the least work: strides and signs of the
box distances live in the weights of the last convolutions, so that decoding is one concatenation
and one addition.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import dataclasses
import itertools
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from trt_yolov6 import __version__
from trt_yolov6.checkpoints.loading import Checkpoint, load_checkpoint
from trt_yolov6.common.files import sha256_file
from trt_yolov6.detectors.spec import DetectorSpec
from trt_yolov6.errors import UserError
from trt_yolov6.graph.editing import add_initializers, replace_tensor, set_nodes
from trt_yolov6.graph.float16 import tail_nodes, to_fp16
from trt_yolov6.graph.index import attribute, shapes_of, tensor_value
from trt_yolov6.graph.model import CHECKPOINT, Graph
from trt_yolov6.graph.operators import CONVOLUTIONS
from trt_yolov6.graph.reference import reference_session
from trt_yolov6.models import Architecture, YOLOv6, fold_shortcuts, fuse
from trt_yolov6.models.decode import anchor_points, decode
from trt_yolov6.models.head import HeadLevel
from trt_yolov6.models.network import Raw
from trt_yolov6.spec import BatchProfile, NmsSettings, OutputLayout

MIN_OPSET, DEFAULT_OPSET, MAX_OPSET = 17, 18, 23

# Signs of the distances left, top, right, bottom from an anchor point to x1, y1, x2, y2.
_SIDES = np.array([-1, -1, 1, 1], np.float32)


MAX_PIXELS = 4096 * 4096
"""Largest input: 32 times the area of the images the networks are trained on."""


@dataclass(frozen=True)
class ExportSettings:
    """Form of the exported graph."""

    image_size: tuple[int, int] | None = None
    """Input height and width in pixels, multiples of `Architecture.size_multiple`; None: those that
    the authors train the network at, mostly 640."""
    batch: BatchProfile = dataclasses.field(default_factory=BatchProfile)
    """A static profile (min = max) fixes the batch axis; any other leaves it free."""
    fp16: bool = False
    """Half-precision weights, activations and scores; input and box coordinates stay float32."""
    nms: NmsSettings | None = None
    """Non-maximum suppression in the graph with these thresholds; None leaves it to the host."""
    uint8_input: bool = False
    """uint8 (batch, height, width, 3) RGB input, normalized in the graph."""
    opset: int = DEFAULT_OPSET

    def __post_init__(self) -> None:
        if self.image_size is not None:
            _check_size(self.image_size, 32)
        if not MIN_OPSET <= self.opset <= MAX_OPSET:
            raise UserError(
                f"`opset` {self.opset} is not supported; give {MIN_OPSET} to {MAX_OPSET}."
            )

    def size_for(self, arch: Architecture) -> tuple[int, int]:
        """Return the input's height and width in pixels for a network.

        Raises:
            UserError: the size is not a multiple of the network's coarsest stride.
        """
        size = self.image_size or (arch.image_size, arch.image_size)
        _check_size(size, arch.size_multiple)
        return size

    @property
    def output_layout(self) -> OutputLayout:
        """Layout of the graph's outputs (see `OutputLayout`)."""
        return "end2end" if self.nms else "split"


def export_onnx(
    model: YOLOv6,
    settings: ExportSettings | None = None,
    class_names: Sequence[str] = (),
    *,
    verify: bool = True,
) -> onnx.ModelProto:
    """Export a model as a checked ONNX graph with decoding inside.

    Args:
        model: in training or fused form, float32, on the CPU; it is not changed.
        settings: shape, precision and ends of the graph.
        class_names: written into the graph's metadata.
        verify: compare the graph in ONNX Runtime with the PyTorch model on a random batch.

    Returns:
        A graph with input `images` and the outputs `boxes` and `scores`, or `detections` with NMS
        (shapes: see `OutputLayout`).

    Raises:
        UserError: the size does not fit the network, or `verify` found outputs that differ by more
            than rounding explains.
    """
    settings = settings or ExportSettings()
    fused = fuse(model).eval()
    fold_shortcuts(fused)
    traced = _trace(_with_scaled_boxes(fused), settings)
    _name_nodes(traced)
    _use_older_operators(traced)
    graph = plain = _composed(traced, model.arch, settings, class_names)
    if verify and settings.nms:
        settings = dataclasses.replace(settings, nms=None)
        plain = _composed(traced, model.arch, settings, class_names)
    if verify:
        _verify(plain, model, settings)
    return graph


def _composed(
    traced: onnx.ModelProto,
    arch: Architecture,
    settings: ExportSettings,
    class_names: Sequence[str],
) -> onnx.ModelProto:
    """Add decoding, NMS, normalization and half precision to a traced network."""
    proto = copy.deepcopy(traced)
    _append_decoding(proto.graph, arch, settings)
    exact = tail_nodes(proto) if settings.fp16 else set()
    if settings.nms:
        _append_nms(proto.graph, settings.nms)
    if settings.uint8_input:
        _prepend_normalization(proto.graph, settings, settings.size_for(arch))
    if settings.fp16:
        exact.update(node.name for node in proto.graph.node if node.name.startswith("nms/"))
        proto = to_fp16(proto, keep_float32=exact)
    _finish(proto, arch.name, class_names, settings)
    return proto


def _check_size(size: tuple[int, int], multiple: int) -> None:
    height, width = size
    if height < multiple or width < multiple or height % multiple or width % multiple:
        fitting = "x".join(str(max(multiple, -(-side // multiple) * multiple)) for side in size)
        raise UserError(
            f"`image_size` {height}x{width} is not a multiple of {multiple}, which this network "
            f"needs; give {fitting}, for example.",
        )
    if height * width > MAX_PIXELS:
        raise UserError(
            f"`image_size` {height}x{width} is more than {MAX_PIXELS:,} pixels; make it smaller.",
        )


# --- tracing ------------------------------------------------------------------------------------


_TRACED_BATCH = 3
"""`_verify` gives the graph one or two images: a batch that is still fixed fails there."""
_TRACED_CELLS = (2, 3)
"""Rows and columns of the coarsest map of the images that a network is traced with."""


def _trace(model: YOLOv6, settings: ExportSettings) -> onnx.ModelProto:
    """Trace a network with few and small images; the graph is that of any number and size."""
    arch = model.arch
    size = settings.size_for(arch)
    # Lite shuffles channels by reshapes, which contain the maps' sizes.
    rows, columns = _TRACED_CELLS
    small = (rows * arch.size_multiple, columns * arch.size_multiple)
    images = torch.zeros(_TRACED_BATCH, 3, *(size if arch.neck == "lite" else small))
    with warnings.catch_warnings(), _quiet("torch.onnx", "onnxscript", "torch.export"):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            Raw(model).eval(),
            (images,),
            input_names=["images"],
            output_names=list(itertools.chain(*raw_names(arch))),
            opset_version=max(settings.opset, 18),
            dynamo=True,
            optimize=True,
            verbose=False,
        )
    assert program is not None
    proto: onnx.ModelProto = program.model_proto
    _set_shape(proto.graph, settings.batch, size)
    return proto


def _set_shape(graph: onnx.GraphProto, profile: BatchProfile, size: tuple[int, int]) -> None:
    """Give a traced graph its number of images, fixed or free, and their size.

    The batch is the first axis of every tensor, so it is in the tensors' shapes and in the target
    shapes of reshapes. torch.export takes up to four times as long with a free axis, so it is freed
    here.
    """
    traced = [axis.dim_value for axis in graph.input[0].type.tensor_type.shape.dim[2:]]
    stored = {item.name for item in graph.initializer}
    for value in (*graph.input, *graph.output, *graph.value_info):
        axes = value.type.tensor_type.shape.dim
        if value.name in stored or len(axes) < 4:
            continue
        if profile.is_static:
            axes[0].dim_value = profile.min
        else:
            axes[0].dim_param = "batch"
        if len(axes) == 4:
            for axis, before, after in zip(axes[2:], traced, size, strict=True):
                axis.dim_value = axis.dim_value * after // before
    shapes = {node.input[1] for node in graph.node if node.op_type == "Reshape"}
    for item in graph.initializer:
        if item.name in shapes and (shape := tensor_value(item).copy())[0] == _TRACED_BATCH:
            shape[0] = profile.min if profile.is_static else -1
            replace_tensor(item, shape)


def raw_names(arch: Architecture) -> tuple[tuple[str, ...], ...]:
    """Return the names that the outputs of `YOLOv6.raw` have in an exported graph, by level."""
    kinds = ("cls", "reg", "obj") if arch.head == "offset" else ("cls", "reg")
    return tuple(tuple(f"{kind}_{stride}" for kind in kinds) for stride in arch.strides)


@contextlib.contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Keep loggers silent for the duration of a `with` block."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _name_nodes(proto: onnx.ModelProto) -> None:
    """Name each node after the module it comes from: `backbone.stem.conv`, `neck.reduce5.act` …"""
    taken: dict[str, int] = {}
    for node in proto.graph.node:
        notes = {item.key: item.value for item in node.metadata_props}
        scopes = ast.literal_eval(notes.get("pkg.torch.onnx.name_scopes", "[]"))
        module = scopes[-2].removeprefix("model.") if len(scopes) > 1 else ""
        if node.op_type in CONVOLUTIONS:
            name = module
        else:
            name = f"{module}/{node.op_type.lower()}".removeprefix("/")
        count = taken.get(name, 0)
        taken[name] = count + 1
        node.name = f"{name}_{count}" if count else name


def _use_older_operators(proto: onnx.ModelProto) -> None:
    """Replace what needs opset 18 by what opset 17 has, as other exporters do."""
    shapes = shapes_of(proto)
    for node in proto.graph.node:
        if node.op_type == "ReduceMean":
            # Squeeze-and-excitation's, over height and width.
            node.op_type = "GlobalAveragePool"
            del node.input[1:]
            _keep_attributes(node)
        elif node.op_type == "Split":
            axis = attribute(node, "axis")
            sizes = np.array([shapes[name][axis] for name in node.output], np.int64)
            node.input[1:] = [f"{node.name}_sizes"]
            add_initializers(proto.graph, {node.input[1]: sizes})
            _keep_attributes(node, "axis")
        elif node.op_type == "Resize":
            _keep_attributes(node, "mode", "coordinate_transformation_mode", "nearest_mode")


def _keep_attributes(node: onnx.NodeProto, *names: str) -> None:
    kept = [item for item in node.attribute if item.name in names]
    del node.attribute[:]
    node.attribute.extend(kept)


# --- decoding -----------------------------------------------------------------------------------


def _with_scaled_boxes(model: YOLOv6) -> YOLOv6:
    """Fold stride and sign into the last box convolutions, in place on the fused copy."""
    with torch.no_grad():
        for stride, level in zip(model.arch.strides, model.head.levels, strict=True):
            assert isinstance(level, HeadLevel)
            conv = level.reg_pred
            assert conv.bias is not None
            factor, shift = (torch.from_numpy(part) for part in box_factors(model.arch, stride))
            conv.weight *= factor[:, None, None, None]
            conv.bias.copy_(conv.bias * factor + shift)
    return model


def box_factors(arch: Architecture, stride: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return factor and shift that export folded into the box convolutions.

    Both are float32 (4 * (reg_max + 1),), for the level of a stride. Strides are powers of two, so
    nothing is rounded. With DFL a softmax comes first, so the factor has to be applied after it.
    """
    channels = 4 * (arch.reg_max + 1)
    factor, shift = np.ones(channels, np.float32), np.zeros(channels, np.float32)
    if arch.head == "offset":
        # cx, cy in pixels; w and h leave the exponential as half sides in pixels.
        factor[:2] = stride
        shift[2:] = np.log(stride / 2)
    elif not arch.reg_max:
        factor *= _SIDES * stride
    return factor, shift


def _anchors(
    size: tuple[int, int], level_strides: Sequence[int], cell_offset: float
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return anchor points in pixels, float32 (anchors, 2), and their strides (anchors, 1)."""
    height, width = size
    # Convolutions of stride 2 round up, which matters in Lite's coarsest level.
    sizes = [(-(-height // stride), -(-width // stride)) for stride in level_strides]
    points, strides = anchor_points(sizes, cell_offset, torch.zeros(()), level_strides)
    return (points * strides).numpy().T, strides.numpy().T


_DFL_LIMIT = 80.0
"""Largest size of a logit that DFL tells apart: the sum of 17 exponentials of it, times 16, is
1.5e37, which float32 still holds."""

_BOXES = {
    # Strides and signs of distances are folded into the weights.
    "distances": "boxes = Add (reg, anchor_points)",
    # DFL: each distance is the expectation over reg_max + 1 bins (Section 2.3.2), a quotient of two
    # sums of exponentials. One matrix product computes both for all four sides; TensorRT's
    # Softmax over so few bins takes seven times as long (H100, batch 32). Clipping the logits keeps
    # the sums finite.
    "dfl": """
        dfl_logits = Clip (reg, dfl_lowest, dfl_highest)
        dfl_exponentials = Exp (dfl_logits)
        dfl_sums = MatMul (dfl_exponentials, dfl_columns)
        dfl_weighted, dfl_total = Split <axis = 2> (dfl_sums, four_and_four)
        distances = Div (dfl_weighted, dfl_total)
        signed_distances = Mul (distances, signed_strides)
        boxes = Add (signed_distances, anchor_points)
    """,
    "offset": """
        offsets, half_size_logarithms = Split <axis = 2> (reg, two_and_two)
        centers = Add (offsets, anchor_points)
        half_sizes = Exp (half_size_logarithms)
        top_left = Sub (centers, half_sizes)
        bottom_right = Add (centers, half_sizes)
        boxes = Concat <axis = 2> (top_left, bottom_right)
    """,
}
_SCORES = "scores = Sigmoid (cls)"
_SCORES_OF_OBJECTS = """
    classes = Sigmoid (cls)
    objectness = Sigmoid (obj)
    scores = Mul (classes, objectness)
"""
# Each row of `selected` is batch, class, box: it indexes the scores as it stands.
_NMS = """
    by_class = Transpose <perm = [0, 2, 1]> (scores)
    selected = NonMaxSuppression (boxes, by_class, max_per_class, iou_threshold, score_threshold)
    selected_scores = GatherND (by_class, selected)
    score_column = Unsqueeze (selected_scores, last_axis)
    batch_and_box = Gather <axis = 1> (selected, zero_and_two)
    kept = GatherND (boxes, batch_and_box)
    index_floats = Cast <to = 1> (selected)
    batch_column = Gather <axis = 1> (index_floats, batch_index)
    class_column = Gather <axis = 1> (index_floats, last_axis)
    detections = Concat <axis = 1> (batch_column, kept, score_column, class_column)
"""
# TensorRT wants a uint8 input cast before anything else is done with it.
_NORMALIZATION = """
    cast = Cast <to = 1> (images)
    planar = Transpose <perm = [0, 3, 1, 2]> (cast)
    normalized = Mul (planar, one_255th)
"""


def _append_decoding(graph: onnx.GraphProto, arch: Architecture, settings: ExportSettings) -> None:
    points, strides = _anchors(
        settings.size_for(arch), arch.strides, 0.0 if arch.head == "offset" else 0.5
    )
    # The sigmoid comes after the concatenation, whose kernel waits for memory anyway. TensorRT-RTX
    # would fuse it with the convolutions, the largest of which then took 139 us (H200, N, batch
    # 32), ten times as long as moving its data. A zero in a shape copies the axis, so the batch
    # stays free without shape arithmetic.
    bins = arch.reg_max + 1
    shapes = {"cls": [0, -1, arch.num_classes], "reg": [0, -1, 4 * bins]}
    constants: dict[str, NDArray[Any]] = {"anchor_points": points[None]}
    boxes, scores = "distances", _SCORES
    if arch.head == "offset":
        boxes, scores = "offset", _SCORES_OF_OBJECTS
        shapes["obj"] = [0, -1, 1]
        constants["two_and_two"] = np.array([2, 2], np.int64)
    else:
        constants["anchor_points"] = np.concatenate([points, points], axis=1)[None]
    if arch.reg_max:
        boxes = "dfl"
        # Columns 0 to 3 weight the bins of a side by their numbers, 4 to 7 by one.
        weights = np.stack([np.arange(bins), np.ones(bins)]).astype(np.float32)
        constants["dfl_columns"] = np.concatenate(
            [np.kron(np.eye(4, dtype=np.float32), row[:, None]) for row in weights], axis=1
        )
        constants["dfl_lowest"] = np.array(-_DFL_LIMIT, np.float32)
        constants["dfl_highest"] = np.array(_DFL_LIMIT, np.float32)
        constants["four_and_four"] = np.array([4, 4], np.int64)
        constants["signed_strides"] = (strides * _SIDES)[None]
    joined = ""
    for kind, shape in shapes.items():
        constants[f"{kind}_shape"] = np.array(shape, np.int64)
        raw = [item.name for item in graph.output if item.name.startswith(f"{kind}_")]
        for name in raw:
            joined += f"{name}_last = Transpose <perm = [0, 2, 3, 1]> ({name})\n"
            joined += f"{name}_rows = Reshape ({name}_last, {kind}_shape)\n"
        joined += f"{kind} = Concat <axis = 1> ({', '.join(f'{name}_rows' for name in raw)})\n"
    graph.node.extend(_parsed("decode", "\n".join((joined, scores, _BOXES[boxes]))))
    add_initializers(graph, constants)
    batch = settings.batch.min if settings.batch.is_static else "batch"
    _set_outputs(
        graph, boxes=(batch, len(points), 4), scores=(batch, len(points), arch.num_classes)
    )


def _append_nms(graph: onnx.GraphProto, nms: NmsSettings) -> None:
    """Append NonMaxSuppression to `boxes` and `scores`, and gather what it selects into rows."""
    constants: dict[str, NDArray[Any]] = {
        "max_per_class": np.array([nms.max_detections], np.int64),
        "iou_threshold": np.array([nms.iou], np.float32),
        "score_threshold": np.array([nms.confidence], np.float32),
        "last_axis": np.array([1], np.int64),
        "zero_and_two": np.array([0, 2], np.int64),
        "batch_index": np.array([0], np.int64),
    }
    graph.node.extend(_parsed("nms", _NMS))
    add_initializers(graph, constants)
    _set_outputs(graph, detections=("detections", 7))


def _prepend_normalization(
    graph: onnx.GraphProto, settings: ExportSettings, size: tuple[int, int]
) -> None:
    """Take uint8 (batch, height, width, 3) images and scale them to 0..1 in the graph."""
    for node in graph.node:
        node.input[:] = ["normalized" if name == "images" else name for name in node.input]
    set_nodes(graph, [*_parsed("input", _NORMALIZATION), *graph.node])
    add_initializers(graph, {"one_255th": np.array(1 / 255, np.float32)})
    batch = settings.batch.min if settings.batch.is_static else "batch"
    images = ("images", onnx.TensorProto.UINT8, (batch, *size, 3))
    graph.input[0].CopyFrom(onnx.helper.make_tensor_value_info(*images))


def _parsed(scope: str, text: str) -> list[onnx.NodeProto]:
    """Return nodes of ONNX's textual syntax, named after their outputs, such as `decode/boxes`."""
    nodes = list(onnx.parser.parse_graph(f"{scope} () => () {{\n{text}\n}}").node)
    for node in nodes:
        node.name = f"{scope}/{node.output[0]}"
    return nodes


def _set_outputs(graph: onnx.GraphProto, **shapes: tuple[int | str, ...]) -> None:
    del graph.output[:]
    graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in shapes.items()
    )


# --- finishing ----------------------------------------------------------------------------------


def _finish(
    proto: onnx.ModelProto, name: str, class_names: Sequence[str], settings: ExportSettings
) -> None:
    """Stamp producer, opset and metadata, drop the tracer's notes, and check the graph."""
    graph = proto.graph
    del proto.metadata_props[:], graph.metadata_props[:], graph.value_info[:]
    parts: list[Any] = [*graph.node, *graph.input, *graph.output, *graph.initializer]
    for part in parts:
        del part.metadata_props[:]
    for node in graph.node:
        node.doc_string = ""
    # The graph is the same in opset 17 and 18, so only the stamp differs.
    proto.opset_import[0].version = settings.opset
    proto.producer_name, proto.producer_version = "trt-yolov6", __version__
    graph.name = name
    for key, value in {
        "model": name,
        "names": json.dumps(list(class_names)),
        "nms": json.dumps(dataclasses.asdict(settings.nms) if settings.nms else None),
    }.items():
        proto.metadata_props.add(key=key, value=value)
    onnx.checker.check_model(proto, full_check=True)


def _verify(proto: onnx.ModelProto, model: YOLOv6, settings: ExportSettings) -> None:
    """Compare the graph in ONNX Runtime with the PyTorch model on random images.

    A fixed batch is freed in a copy first: two images show as much as two hundred.
    """
    size = settings.size_for(model.arch)
    freed = copy.deepcopy(proto)
    for value in (*freed.graph.input, *freed.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    pixels = np.random.default_rng(0).integers(
        0, 256, (min(2, settings.batch.max), *size, 3), dtype=np.uint8
    )
    planar = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).astype(np.float32) / 255
    with torch.inference_mode():
        levels = model.eval().raw(torch.from_numpy(planar))
        boxes, scores = decode(levels, model.arch)
        largest = max(float(level[0].abs().max()) for level in levels)
    session = reference_session(freed, source="the exported graph")
    outputs = session.run(None, {"images": pixels if settings.uint8_input else planar})
    # Measured on the sample: 1e-6 in float32 and 2e-3 in half precision, of the largest value.
    limit = 2e-2 if settings.fp16 else 1e-4
    for name, got, expected, scale in zip(
        ("boxes", "scores"),
        outputs,
        (boxes.mT.numpy(), scores.mT.numpy()),
        # Rounding grows with what is rounded: logits of trained networks stay below about 16.
        (max(*size, float(boxes.abs().max())), max(1, largest / 16)),
        strict=True,
    ):
        error = float(np.abs(got - expected).max()) / scale
        if not error <= limit:
            raise UserError(
                f"the exported graph's {name} differ from the PyTorch model's by {error:.2g} of "
                "their range; please report this with the checkpoint's name."
            )


def graph_from_checkpoint(weights: str | Path | Checkpoint, settings: ExportSettings) -> Graph:
    """Export a checkpoint: a file, or what `load_checkpoint` returned.

    Raises:
        UserError: the file is not a YOLOv6 checkpoint, or the size does not fit the network.
    """
    checkpoint = load_checkpoint(weights) if isinstance(weights, (str, Path)) else weights
    sha256 = sha256_file(checkpoint.path) if checkpoint.path.is_file() else ""
    model = export_onnx(checkpoint.model, settings, checkpoint.class_names)
    if sha256:
        model.metadata_props.add(key=CHECKPOINT, value=sha256)
    return Graph(
        model=model,
        name=checkpoint.arch.name,
        detector=DetectorSpec(
            tuple(checkpoint.class_names),
            settings.size_for(checkpoint.arch),
            settings.output_layout,
            nms=settings.nms,
        ),
        batch=settings.batch,
        precision="fp16" if settings.fp16 else "fp32",
        source=checkpoint.path,
        source_sha256=sha256,
        checkpoint_sha256=sha256,
    )
