"""Import a detector's ONNX file: recognize it and make it ready to be built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from trt_yolov6.common.files import sha256_file
from trt_yolov6.common.text import counted
from trt_yolov6.detectors.layouts import LAYOUTS
from trt_yolov6.detectors.metadata import (
    check_input,
    image_size_in,
    names_in,
    nms_in,
    numbered_classes,
)
from trt_yolov6.detectors.recognition import recognize
from trt_yolov6.detectors.spec import DetectorSpec
from trt_yolov6.errors import UserError
from trt_yolov6.graph.editing import at_opset
from trt_yolov6.graph.files import graph_precision, read_onnx, value_spec
from trt_yolov6.graph.float16 import tail_nodes, to_fp16
from trt_yolov6.graph.inputs import runtime_inputs, with_one_input
from trt_yolov6.graph.model import CHECKPOINT, Graph
from trt_yolov6.graph.normalize import with_folded_weights
from trt_yolov6.graph.operators import HALF_SCALES_OPSET, QDQ_OPS
from trt_yolov6.graph.outputs import drop_other_outputs, dropped_text, facts_of
from trt_yolov6.spec import BatchProfile


def graph_from_onnx(
    path: str | Path,
    *,
    batch: BatchProfile | None = None,
    image_size: tuple[int, int] | None = None,
    fp16: bool = False,
    class_names: Sequence[str] | None = None,
    decoder: str | None = None,
    preprocess: Mapping[str, Any] | None = None,
) -> Graph:
    """Read a detector's ONNX file as a graph to build, in half precision if asked.

    Auxiliary inputs of PaddleDetection's exports become constants, and batch normalization is
    folded into the convolutions before it.

    Args:
        path: a graph with one image input and outputs of a layout in `OutputLayout`.
        batch: profile of a free batch axis; must agree with a fixed one.
        image_size: height and width, for graphs that leave them free; must agree with fixed ones.
            None takes those that Ultralytics' exporter notes.
        fp16: convert a float32 graph; decoding stays in float32.
        class_names: in the order of the scores; None takes the file's own, or `class_0` …
        decoder: the family it is of, a name of `detectors.families`; None finds out.
        preprocess: changes to the family's pre-processing, fields of `Preprocessing` by name.

    Raises:
        UserError: the file is not such a graph, or disagrees with what was asked.
    """
    path = Path(path)
    model = read_onnx(path)
    metadata = {item.key: item.value for item in model.metadata_props}
    with_one_input(model, path, image_size)
    size, profile = _fix_input(model, path, image_size, batch, metadata)
    dropped = drop_other_outputs(model, path, decoder)
    outputs = [value_spec(item, path) for item in model.graph.output]
    family, layout = recognize(facts_of(model, outputs, size), path, decoder)
    precision = graph_precision(model)
    if precision == "fp32":
        model = with_folded_weights(model)
    if precision not in ("fp32", "fp16") and fp16:
        raise UserError(
            f"{path} is quantized ({precision}), so its precision is decided already; leave fp16 "
            "out."
        )
    if fp16 and precision == "fp32":
        _name_anonymous_nodes(model)
        if any(node.op_type in QDQ_OPS for node in model.graph.node):  # weights alone in INT8
            model = at_opset(model, HALF_SCALES_OPSET)
        model = to_fp16(model, keep_float32=tail_nodes(model))
        precision = "fp16"
    names = names_in(metadata) if class_names is None else tuple(class_names)
    return Graph(
        model=model,
        # A name in a file is anyone's; it becomes that of the engine's file.
        name=Path(metadata.get("model", "").replace("\\", "/")).name.lstrip(".") or path.stem,
        detector=DetectorSpec(
            _class_names(path, names, LAYOUTS[layout].classes(outputs)),
            size,
            layout,
            family.name,
            family.preprocessing.with_changes(preprocess or {}),
            nms_in(metadata) if layout == "end2end" else None,
        ),
        batch=profile,
        precision=precision,
        source=path,
        source_sha256=sha256_file(path),
        checkpoint_sha256=metadata.get(CHECKPOINT, ""),
        notes=(dropped_text(dropped),) if dropped else (),
    )


def _fix_input(
    model: onnx.ModelProto,
    path: Path,
    image_size: tuple[int, int] | None,
    batch: BatchProfile | None,
    metadata: Mapping[str, str],
) -> tuple[tuple[int, int], BatchProfile]:
    """Fix the image size of a graph's one input, in place; return it, and the batch profile."""
    (value,) = runtime_inputs(model)
    given = value_spec(value, path)
    spatial = (1, 2) if given.dtype == np.uint8 else (2, 3)
    if len(given.shape) != 4:
        raise UserError(
            f"{path} takes {list(given.shape)}, not a batch of images; a detector is needed."
        )
    if image_size is None and None in given.sides:
        image_size = image_size_in(metadata)
    size = _fixed_size(path, given.sides, image_size)
    profile = _fixed_batch(path, given.shape[0], batch)
    for axis, side in zip(spatial, size, strict=True):
        value.type.tensor_type.shape.dim[axis].dim_value = side
    check_input(value_spec(value, path), path)
    return size, profile


def _class_names(path: Path, names: tuple[str, ...] | None, count: int | None) -> tuple[str, ...]:
    if names is None:
        return numbered_classes(count, path)
    if count is not None and len(names) != count:
        raise UserError(
            f"{path} has {counted(count, 'class')}, and `class_names` has {len(names)}; give "
            "as many names.",
        )
    return names


def _fixed_size(
    path: Path, sides: Sequence[int | None], requested: tuple[int, int] | None
) -> tuple[int, int]:
    if requested is None:
        if None in sides:
            raise UserError(f"{path} leaves its image size free; fix it with `image_size`.")
        requested = (sides[0] or 0, sides[1] or 0)
    elif any(own not in (None, asked) for own, asked in zip(sides, requested, strict=True)):
        raise UserError(
            f"{path} takes images of {sides[0]}x{sides[1]}, not {requested[0]}x{requested[1]}; "
            "leave `image_size` out, or export it again.",
        )
    return requested


def _fixed_batch(path: Path, own: int | None, requested: BatchProfile | None) -> BatchProfile:
    if own is None:
        return requested or BatchProfile()
    if requested and (requested.min, requested.max) != (own, own):
        raise UserError(
            f"{path} takes batch {own} only; leave `batch` out, or export it again "
            "with a free batch axis.",
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
