"""Reduce a graph's inputs to one: images in float32 or uint8.

PaddleDetection's graphs also take an image's resize factor (`scale_factor`), to return boxes in the
original image, and some its size (`im_shape`). With a factor of 1, boxes are in input pixels, as
elsewhere. Before version 4 of the format, weights had to be inputs, too, as some exporters still
write them; ONNX Runtime then folds nothing into them, and conversions leave them out. Ultralytics'
exports in half precision take half-precision images.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx

from trt_yolov6.errors import UserError
from trt_yolov6.graph.editing import add_initializers
from trt_yolov6.graph.files import value_spec
from trt_yolov6.spec import TensorSpec

SCALE_FACTOR, IMAGE_SHAPE = "scale_factor", "im_shape"


def runtime_inputs(model: onnx.ModelProto) -> list[Any]:
    """Return the graph's inputs that are not constants (`onnx.ValueInfoProto`)."""
    constants = {item.name for item in model.graph.initializer}
    return [item for item in model.graph.input if item.name not in constants]


def input_spec(model: onnx.ModelProto) -> TensorSpec:
    """Return name, shape and dtype of a graph's one input.

    Raises:
        UserError: it has several, or none.
    """
    inputs = runtime_inputs(model)
    if len(inputs) != 1:
        names = ", ".join(item.name for item in inputs) or "none"
        raise UserError(
            f"the graph has the inputs {names}; quantization needs a detector with one image input."
        )
    return value_spec(inputs[0], "the graph")


def with_one_input(
    model: onnx.ModelProto, path: str | Path, image_size: tuple[int, int] | None = None
) -> bool:
    """Make the image a graph's only input, not in half precision; return whether it was not so.

    Args:
        model: changed in place.
        path: for messages.
        image_size: height and width of the input; None reads it off the image input.

    Raises:
        UserError: it has inputs whose meaning or shape is not known, or no fixed image size where
            it asks for that.
    """
    inputs = runtime_inputs(model)
    others = [item for item in inputs if item.name in (SCALE_FACTOR, IMAGE_SHAPE)]
    if len(inputs) - len(others) != 1:
        names = ", ".join(item.name for item in inputs) or "none"
        raise UserError(
            f"{path} has the inputs {names}; a detector with one image input is needed (and at "
            f"most {SCALE_FACTOR} and {IMAGE_SHAPE} besides)."
        )
    for item in others:
        spec = value_spec(item, path)
        batch = spec.shape[0] or 1 if len(spec.shape) == 2 else 0
        if not 0 < batch <= 2**16 or spec.dtype.kind not in "fiu":
            raise UserError(
                f"{path} takes {spec.name} as {spec.dtype} {list(spec.shape)}, not as numbers "
                "(batch, 2); a detector that PaddleDetection exported is needed."
            )
        row = (1, 1) if item.name == SCALE_FACTOR else image_size or input_size(model, path)
        if row is None:
            raise UserError(f"{path} leaves its image size free; fix it with `image_size`.")
        # One row serves a free batch: it is broadcast.
        value = np.tile(np.array(row, spec.dtype), (batch, 1))
        add_initializers(model.graph, {item.name: value})
    image = onnx.ValueInfoProto()
    image.CopyFrom(runtime_inputs(model)[0])
    is_half = image.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    if len(model.graph.input) == 1 and not is_half:
        return False
    if is_half:
        name, image.name = image.name, f"{image.name}_float32"
        image.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
        cast = onnx.helper.make_node(
            "Cast", [image.name], [name], f"{name}_cast", to=onnx.TensorProto.FLOAT16
        )
        model.graph.node.insert(0, cast)
    del model.graph.input[:]
    model.graph.input.append(image)
    model.ir_version = max(model.ir_version, 4)
    return True


def input_size(model: onnx.ModelProto, path: str | Path) -> tuple[int, int] | None:
    """Return height and width in pixels of a graph's image input; None where one is free."""
    for item in runtime_inputs(model):
        if item.name not in (SCALE_FACTOR, IMAGE_SHAPE):
            match value_spec(item, path).sides:
                case (int(height), int(width)):
                    return height, width
    return None
