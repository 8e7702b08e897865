"""Weights and biases that were learned, stored next to a calibration table."""

from __future__ import annotations

import copy
import hashlib
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import onnx
from numpy.typing import NDArray

from trt_yolov6.common.files import atomic_path
from trt_yolov6.errors import UserError
from trt_yolov6.graph.editing import replace_tensor
from trt_yolov6.graph.index import constants_of, tensor_value
from trt_yolov6.graph.quantized import quantized_layers
from trt_yolov6.quantization.bias_correction import bias_of, shift_bias
from trt_yolov6.quantization.types import INT8


@dataclass(frozen=True, eq=False)
class Learned:
    """Weights and biases of the INT8 layers of a graph after learning."""

    codes: Mapping[str, NDArray[np.int8]]
    """Weights' codes by the layers' outputs, in the layers' shapes."""
    biases: Mapping[str, NDArray[np.float32]]
    """(channels,) by the layers' outputs."""
    scales: Mapping[str, NDArray[np.float32]]
    """(channels,) of the weights, by the layers' outputs."""

    @cached_property
    def sha256(self) -> str:
        """Hash of all of it."""
        digest = hashlib.sha256()
        arrays: list[tuple[str, NDArray[Any]]] = sorted(self.codes.items())
        arrays += [*sorted(self.biases.items()), *sorted(self.scales.items())]
        for name, value in arrays:
            digest.update(f"{name}{value.dtype}{value.shape}".encode())
            digest.update(np.ascontiguousarray(value).tobytes())
        return digest.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Learned) and self.sha256 == other.sha256

    def __hash__(self) -> int:
        return hash(self.sha256)


def learned_of(model: onnx.ModelProto) -> Learned:
    """Return the weights and biases of a Q/DQ graph's INT8 layers."""
    constants = constants_of(model)
    layers = [layer for layer in quantized_layers(model) if layer.has_own_codes]
    codes = {layer.output: tensor_value(constants[layer.weight]) for layer in layers}
    biases = {layer.output: bias_of(layer, constants).astype(np.float32) for layer in layers}
    scales = {
        layer.output: tensor_value(constants[layer.weight_scale]).astype(np.float32)
        for layer in layers
    }
    return Learned(codes, biases, scales)


def as_built(model: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, float]]:
    """Return a Q/DQ graph with the scales that `insert_qdq` makes of its ranges, and the ranges.

    Calibration tables hold float32 ranges, whose scales may differ from learned ones in the last
    bit.

    Returns:
        The graph, and the range of each quantized tensor.
    """
    result = copy.deepcopy(model)
    constants = constants_of(result)
    largest = np.float32(INT8.largest)
    by_scale = {
        name: tensor_value(constants[name]) * largest
        for name in {n.input[1] for n in model.graph.node if n.op_type == "QuantizeLinear"}
    }
    for name, amax in by_scale.items():
        replace_tensor(constants[name], np.asarray(amax / largest, np.float32))
    ranges = {
        node.input[0]: float(by_scale[node.input[1]].reshape(()))
        for node in model.graph.node
        if node.op_type == "QuantizeLinear"
    }
    return result, ranges


def with_learned(model: onnx.ModelProto, learned: Learned) -> onnx.ModelProto:
    """Return a Q/DQ graph with the weights and biases of another graph's layers.

    Args:
        model: made by `insert_qdq` from the same float graph; it is not changed. Layers that are in
            float in either graph stay as they are.
        learned: of the other graph, see `learned_of`.
    """
    result = copy.deepcopy(model)
    constants = constants_of(result)
    for layer in quantized_layers(result):
        if not layer.has_own_codes or layer.output not in learned.codes:
            continue
        replace_tensor(constants[layer.weight], learned.codes[layer.output])
        scale = learned.scales[layer.output].astype(layer.weights.scale_type)
        replace_tensor(constants[layer.weight_scale], scale)
        bias = learned.biases[layer.output]
        before = bias_of(layer, constants)
        if np.any(bias != before):
            shift_bias(result, layer, bias - before)
    return result


def write_learned(path: Path, learned: Learned) -> None:
    """Write it as an NPZ file.

    Raises:
        UserError: the path cannot be written to.
    """
    arrays = {f"codes:{name}": value for name, value in learned.codes.items()}
    biases = {f"bias:{name}": value for name, value in learned.biases.items()}
    scales = {f"scale:{name}": value for name, value in learned.scales.items()}
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays, **biases, **scales)


def read_learned(path: Path, sha256: str) -> Learned:
    """Return the weights and biases in a file that `write_learned` wrote.

    Raises:
        UserError: the file is missing, damaged or of another calibration.
    """
    parts: dict[str, dict[str, NDArray[Any]]] = {"codes": {}, "bias": {}, "scale": {}}
    try:
        with np.load(path, allow_pickle=False) as stored:
            for name in stored.files:
                kind, _, layer = name.partition(":")
                parts[kind][layer] = stored[name].astype(np.int8 if kind == "codes" else np.float32)
    except (OSError, EOFError, ValueError, KeyError, BadZipFile, zlib.error) as error:
        raise UserError(
            f"{path} does not hold the weights that were learned with the calibration next to it; "
            "calibrate again."
        ) from error
    learned = Learned(parts["codes"], parts["bias"], parts["scale"])
    if learned.sha256 != sha256:
        raise UserError(
            f"{path} is not of the calibration next to it; delete both and calibrate again."
        )
    return learned
