"""An exported float graph as a PyTorch network, with fake quantization where Q/DQ pairs will stand.

Quantization-aware training trains the very graph that `quantize` places pairs in: same tensors,
same groups that share a scale, same rescaled channels. What it learned goes back into that graph's
weights and into the ranges, and `insert_qdq` makes of them what it makes of calibrated ones.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trt_yolov6.errors import UserError
from trt_yolov6.graph.editing import replace_tensor
from trt_yolov6.graph.export import box_factors, raw_names
from trt_yolov6.graph.index import GraphIndex, attributes, tensor_value
from trt_yolov6.graph.operators import CODE_PRESERVING_OPS, CONVOLUTIONS, layer_names, weight_axis
from trt_yolov6.models.variants import Architecture
from trt_yolov6.quantization.fake_quantize import WIDEST, FakeQuantizer, Levels, weight_levels
from trt_yolov6.quantization.qdq.insert import quantize_weights
from trt_yolov6.quantization.qdq.placement import Placement
from trt_yolov6.quantization.torch_graph import OPERATORS, Step, with_ends
from trt_yolov6.quantization.types import INT8

_KNOWN = frozenset(
    {
        *("Add", "Concat", "Conv", "ConvTranspose", "HardSwish", "LeakyRelu", "MaxPool", "Mul"),
        *("Relu", "Sigmoid", "Sub"),
    }
)
"""Operators of exported YOLOv6 networks, and of what calibration makes of them."""


@dataclass(frozen=True)
class Quantization:
    """Places and grids of a graph's fake quantization."""

    placement: Placement
    scales: Mapping[str, float]
    """Scale of each of the placement's tensors, float32 values, equal within a group."""
    levels: Mapping[str, Levels]
    """Quantization grid of each tensor, by name."""
    weight_bits: Mapping[str, int]
    """Bit width of the weights of each quantized layer, by name."""


@dataclass(frozen=True)
class Trained:
    """Weights and scales after training a graph."""

    model: onnx.ModelProto
    """The float graph with the trained weights."""
    amax: dict[str, float]
    """Range by quantized tensor, see `CalibrationTable`."""
    weight_scales: dict[str, NDArray[np.float32]]
    """Scale by channel, float32 (channels,), by the name of the quantized weights."""


class GraphNetwork(nn.Module):
    """The part of an exported detector from its normalized image to its head's raw outputs.

    In evaluation mode quantized convolutions add up integers (see `integer_arithmetic`): the values
    of training except for the last bit, the same on every device.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        arch: Architecture,
        quantization: Quantization | None = None,
        features: Sequence[str] = (),
        *,
        learn_scales: bool = True,
    ) -> None:
        """Read a graph.

        Args:
            model: float32, from `export_onnx`, as it is or equalized; it is not changed.
            arch: of the network that was exported.
            quantization: what to round; None: nothing, as for the teacher.
            features: tensors that `forward` also returns, see `feature_tensors`.
            learn_scales: else they stay.

        Raises:
            UserError: the graph has an operator that exported networks do not have.
        """
        super().__init__()
        self.arch = arch
        self.features = tuple(features)
        self._model = model
        self._quantization = quantization
        self._outputs = raw_names(arch)
        constants = {item.name: np.array(tensor_value(item)) for item in model.graph.initializer}
        nodes = _needed(model, {name for level in self._outputs for name in level})
        self._input = _first_input(nodes, constants)
        self._folded = _folded(nodes, arch)
        self._keys = {
            name: f"p{index}"
            for index, name in enumerate(
                dict.fromkeys(name for node in nodes for name in node.input if name in constants)
            )
        }
        for name, folded in self._folded.items():
            constants[name] = folded.unfold(constants[name])
        names = layer_names(model)
        bits = {} if quantization is None else quantization.weight_bits
        units = _units(
            nodes, constants, {key: bits.get(name, WIDEST) for key, name in names.items()}
        )
        for name, key in self._keys.items():
            unit = units.get(name, np.ones(()))
            # What smoothing multiplies channels by stays; all else learns.
            learns = name in units or constants[name].size == 1
            parameter = torch.from_numpy(np.asarray(constants[name] / unit, np.float32))
            self.register_parameter(key, nn.Parameter(parameter, requires_grad=learns))
            self.register_buffer(f"{key}_unit", torch.from_numpy(np.asarray(unit, np.float32)))
        self._weight_quantizers: dict[str, str] = {}
        self._tensor_quantizers: dict[str, str] = {}
        self.quantizers = nn.ModuleDict()
        self._unquantized_reads = frozenset[tuple[str, str]]()
        if quantization is not None:
            self._add_quantizers(nodes, quantization, learn_scales)
            self._unquantized_reads = quantization.placement.unquantized_reads
        self._codes = self._coded_convolutions(nodes)
        self._steps = self._compiled(nodes)

    def forward(self, images: Tensor) -> tuple[list[tuple[Tensor, ...]], list[Tensor]]:
        """Compute on images: float32 (batch, 3, h, w), RGB in 0..1.

        Returns:
            The head's raw outputs as `YOLOv6.raw` gives them, and the features as they are before
            any rounding of their own.
        """
        compact = _Compact()
        with torch.autograd.graph.saved_tensors_hooks(compact.pack, compact.unpack):
            return self._computed(images, compact)

    def _computed(
        self, images: Tensor, compact: _Compact
    ) -> tuple[list[tuple[Tensor, ...]], list[Tensor]]:
        found: dict[str, Tensor] = {}
        exact: dict[str, Tensor] = {self._input: images}
        kept: dict[str, Tensor] = {}

        def add(name: str) -> None:
            self._quantize_into(found, exact, name)
            if name in self._tensor_quantizers:
                scale = self._quantizer(self._tensor_quantizers[name]).scale.detach()
                compact.remember(found[name], scale)

        add(self._input)
        weights = {name: self._weight(name) for name in self._keys}
        for step in self._steps:
            (output,) = step.outputs
            inputs = [
                weights[name]
                if name in weights
                else (exact if (name, output) in self._unquantized_reads else found)[name]
                for name in step.inputs
            ]
            if output in self._codes and not self.training:
                exact[output] = self._in_integers(step, inputs)
            else:
                exact[output] = step.operator(step.attributes, inputs)
            add(output)
            if output in self.features:
                kept[output] = exact[output]
            for name in step.last:
                compact.forget(found[name])
                del exact[name], found[name]
        levels = [tuple(exact[name] for name in level) for level in self._outputs]
        return levels, [kept[name] for name in self.features]

    def _in_integers(self, step: Step, inputs: Sequence[Tensor]) -> Tensor:
        """Convolve as `with_integer_convolutions` does, in float32: the same bits on every device.

        Rounding the sums makes up for algorithms that are not exact on integers (Winograd's).
        """
        values, weights, *bias = (item.float() for item in inputs)
        of_values, of_weights = (self._quantizer(key).scale for key in self._codes[step.outputs[0]])
        sums: Tensor = step.operator(
            step.attributes, [(values / of_values).round(), (weights / of_weights).round()]
        ).round()
        result = sums * (of_values * of_weights).reshape(1, -1, 1, 1)
        return result + bias[0].reshape(1, -1, 1, 1) if bias else result

    def raw(self, images: Tensor) -> list[tuple[Tensor, ...]]:
        """Run without features: the same as `YOLOv6.raw`."""
        return self.forward(images)[0]

    def scale_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of learned scales; empty where they are fixed."""
        return list(self.quantizers.parameters())

    def weight_parameters(self) -> list[nn.Parameter]:
        """Return weights, biases and the factors of shortcuts."""
        found = (self.get_parameter(key) for key in self._keys.values())
        return [parameter for parameter in found if parameter.requires_grad]

    @torch.no_grad()
    def trained(self) -> Trained:
        """Return the trained values to export.

        Scales become such as a range in float32 stands for, here as well: the network computes from
        then on what the exported graph does.
        """
        if self._quantization is None:
            raise ValueError("a network without quantization has no ranges to export")
        model = copy.deepcopy(self._model)
        for item in model.graph.initializer:
            if item.name not in self._keys:
                continue
            value = self._value(item.name).float().cpu().numpy()
            if item.name in self._folded:
                value = self._folded[item.name].fold(value)
            replace_tensor(item, value)
        largest: dict[str, float] = {}
        for key in dict.fromkeys(self._tensor_quantizers.values()):
            quantizer = self._quantizer(key)
            amax = np.float32(float(quantizer.scale) * INT8.largest)
            scale = amax / np.float32(INT8.largest)
            quantizer.settle(torch.tensor(scale, device=quantizer.initial.device))
            largest[key] = float(amax)
        ranges = {tensor: largest[key] for tensor, key in self._tensor_quantizers.items()}
        scales: dict[str, NDArray[np.float32]] = {}
        for name, key in self._weight_quantizers.items():
            quantizer = self._quantizer(key)
            quantizer.settle(quantizer.scale)
            scale = quantizer.scale.float().cpu().numpy()
            if name in self._folded:
                scale = scale * np.abs(self._folded[name].factor)
            scales[name] = np.asarray(scale.reshape(-1), np.float32)
        return Trained(model, ranges, scales)

    # --- inside

    def _add_quantizers(
        self, nodes: Sequence[onnx.NodeProto], given: Quantization, learn_scales: bool
    ) -> None:
        known = {self._input, *(name for node in nodes for name in node.output)}
        for tensor, group in given.placement.group_of.items():
            if tensor not in known:
                continue
            key = f"tensor:{group[0]}".replace(".", ":")
            if key not in self.quantizers:
                scale = torch.tensor(np.float32(given.scales[tensor]))
                self.quantizers[key] = FakeQuantizer(
                    scale, given.levels[tensor], learn=learn_scales
                )
            self._tensor_quantizers[tensor] = key
        names = layer_names(self._model)
        for node in nodes:
            layer = names.get(node.output[0], "")
            weight = node.input[1] if node.op_type in CONVOLUTIONS else ""
            if layer not in given.weight_bits or weight in self._weight_quantizers:
                continue
            value = self._value(weight).detach()
            axis = weight_axis(node.op_type)
            scale = weight_scale(value, axis, given.weight_bits[layer])
            key = f"weight:{weight}".replace(".", ":")
            self.quantizers[key] = FakeQuantizer(
                scale, weight_levels(given.weight_bits[layer]), learn=learn_scales
            )
            self._weight_quantizers[weight] = key

    def _coded_convolutions(self, nodes: Sequence[onnx.NodeProto]) -> dict[str, tuple[str, str]]:
        """Return the quantizers of input and weights of convolutions that have both, by output."""
        found: dict[str, tuple[str, str]] = {}
        coded = dict(self._tensor_quantizers)
        for node in nodes:
            source, output = node.input[0], node.output[0]
            inside = {coded.get(name, "") for name in node.input}
            if node.op_type in CODE_PRESERVING_OPS and len(inside) == 1 and "" not in inside:
                coded.setdefault(output, inside.pop())
            if (
                node.op_type in CONVOLUTIONS
                and node.input[1] in self._weight_quantizers
                and source in coded
                and (source, output) not in self._unquantized_reads
            ):
                found[output] = coded[source], self._weight_quantizers[node.input[1]]
        return found

    def _compiled(self, nodes: Sequence[onnx.NodeProto]) -> list[Step]:
        for node in nodes:
            if node.op_type not in _KNOWN:
                raise UserError(
                    f"the graph has the operator {node.op_type}, which quantization-aware training "
                    "does not support; give a YOLOv6 checkpoint other than MBLA or Lite."
                )
        steps = [
            Step(OPERATORS[node.op_type], attributes(node), tuple(node.input), tuple(node.output))
            for node in nodes
        ]
        return with_ends(steps, self._input, {name for level in self._outputs for name in level})

    def _quantize_into(
        self, found: dict[str, Tensor], exact: Mapping[str, Tensor], name: str
    ) -> None:
        key = self._tensor_quantizers.get(name)
        found[name] = exact[name] if key is None else self.quantizers[key](exact[name])

    def _value(self, name: str) -> Tensor:
        key = self._keys[name]
        return self.get_parameter(key) * self.get_buffer(f"{key}_unit")

    def _weight(self, name: str) -> Tensor:
        value = self._value(name)
        key = self._weight_quantizers.get(name)
        return value if key is None else self._quantizer(key)(value)

    def _quantizer(self, key: str) -> FakeQuantizer:
        quantizer = self.quantizers[key]
        assert isinstance(quantizer, FakeQuantizer)
        return quantizer


class _Compact:
    """Keeps rounded tensors for the way back as their levels, one byte a value; loses nothing.

    A tensor is known by its memory, so it must be forgotten before that is freed.
    """

    def __init__(self) -> None:
        self._scales: dict[int, tuple[Tensor, Tensor]] = {}
        self._levels: dict[int, Tensor] = {}

    def remember(self, rounded: Tensor, scale: Tensor) -> None:
        if rounded.dtype == torch.float32:
            self._scales[rounded.data_ptr()] = (rounded, scale)

    def forget(self, tensor: Tensor) -> None:
        self._scales.pop(tensor.data_ptr(), None)
        self._levels.pop(tensor.data_ptr(), None)

    def pack(self, tensor: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        place = tensor.data_ptr()
        rounded, scale = self._scales.get(place, (None, tensor))
        if rounded is None or (tensor.shape, tensor.stride()) != (rounded.shape, rounded.stride()):
            return tensor
        if place not in self._levels:
            self._levels[place] = (tensor / scale).round_().to(torch.int8)
        return self._levels[place], scale

    def unpack(self, packed: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed[0].float().mul_(packed[1])


def feature_tensors(model: onnx.ModelProto) -> tuple[str, ...]:
    """Return the tensors that channel-wise distillation compares, in the graph's order.

    As the paper's Fig. 5 has it, those of backbone, neck and head: what the backbone hands to the
    neck, what the neck hands to the head, and what the head's predictions are made of. The graph's
    nodes are named after the network's modules.
    """
    parts = [re.split("[./]", node.name)[0] for node in model.graph.node]
    nodes = list(zip(model.graph.node, parts, strict=True))
    made_in = {name: part for node, part in nodes for name in node.output}
    features = set[str]()
    for node, part in nodes:
        for name in node.input:
            source = made_in.get(name, "")
            if (source, part) in (("backbone", "neck"), ("neck", "head")) or (
                source == "head" and node.name.endswith(("cls_pred", "reg_pred", "obj_pred"))
            ):
                features.add(name)
    return tuple(name for node in model.graph.node for name in node.output if name in features)


def weight_scale(weights: Tensor, axis: int, bits: int) -> Tensor:
    """Return a scale for each output channel: (n, 1, 1, 1) or, where `axis` is 1, (1, n, 1, 1).

    That of the largest magnitude for 8 bits, as `insert_qdq` takes; for fewer bits, 2 at least, the
    one of the least squared error, of 64 that clip more and more.
    """
    shape = [1] * weights.ndim
    shape[axis] = weights.shape[axis]
    if bits == WIDEST:
        _, scales = quantize_weights(weights.cpu().numpy(), axis)
        return torch.from_numpy(scales).reshape(shape)
    rows = weights.transpose(0, axis).flatten(1).double()
    levels = weight_levels(bits)
    full = rows.abs().amax(1, keepdim=True)
    full = torch.where(full > 0, full, 1.0) / levels.high
    best, least = full, torch.full_like(full, torch.inf)
    for part in range(64, 6, -1):
        scale = full * (part / 64)
        rounded = (rows / scale).round().clamp(levels.low, levels.high) * scale
        error = (rounded - rows).square().sum(1, keepdim=True)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best.float().reshape(shape)


# --- reading the graph --------------------------------------------------------------------------


def _needed(model: onnx.ModelProto, outputs: set[str]) -> list[onnx.NodeProto]:
    """Return the nodes from the first convolution to the raw outputs, in the graph's order."""
    graph = GraphIndex(model)
    missing = sorted(outputs.difference(graph.order))
    if missing:
        raise UserError(
            f"the graph has no tensor {missing[0]}; quantization-aware training takes graphs that "
            "this package exported from a YOLOv6 checkpoint."
        )
    after_layer: set[str] = set()
    for node in graph.nodes:
        if node.op_type in CONVOLUTIONS or after_layer.intersection(node.input):
            after_layer.update(node.output)
    needed = graph.ancestors(outputs) & after_layer
    return [node for node in graph.nodes if node.output[0] in needed]


def _first_input(nodes: Sequence[onnx.NodeProto], constants: Mapping[str, Any]) -> str:
    """Return the one tensor that the nodes read and do not make: the normalized image."""
    made = {name for node in nodes for name in node.output}
    read = {name for node in nodes for name in node.input if name} - made - constants.keys()
    (name,) = (str(item) for item in read)
    return name


@dataclass(frozen=True)
class _Folded:
    """Factor and shift that export folded into the last box convolutions.

    The loss wants outputs without it.
    """

    factor: NDArray[np.float32]
    shift: NDArray[np.float32]

    def fold(self, value: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.asarray(value * self.factor + self.shift, np.float32)

    def unfold(self, value: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.asarray((value - self.shift) / self.factor, np.float32)


def _folded(nodes: Sequence[onnx.NodeProto], arch: Architecture) -> dict[str, _Folded]:
    result = {}
    makers = {node.output[0]: node for node in nodes}
    for stride in arch.strides:
        factor, shift = box_factors(arch, stride)
        node = makers[f"reg_{stride}"]
        result[node.input[1]] = _Folded(factor[:, None, None, None], np.zeros((), np.float32))
        if len(node.input) > 2:
            result[node.input[2]] = _Folded(factor, shift)
    return result


def _units(
    nodes: Sequence[onnx.NodeProto], constants: Mapping[str, NDArray[Any]], bits: Mapping[str, int]
) -> dict[str, NDArray[np.float32]]:
    """Return the units of layers' weights and biases during training.

    That is, to the next power of two, which rounds nothing, a quantization step of each output
    channel, times each input channel's largest weight relative to the largest of all. Channels of
    re-parameterized networks differ in size a hundredfold, in weights as in what they are
    multiplied with: so counted, one learning rate suits all of them, and any number of bits.
    Without it the sample lost a point of AP, and a rescaled one all of it. `bits` are by outputs.
    """
    units: dict[str, NDArray[np.float32]] = {}
    for node in nodes:
        if node.op_type not in CONVOLUTIONS:
            continue
        weights, axis = np.abs(constants[node.input[1]]), weight_axis(node.op_type)
        of_output = _power_of_two(weights.max(axis=(1 - axis, 2, 3), keepdims=True))
        of_input = _power_of_two((weights / of_output).max(axis=(axis, 2, 3), keepdims=True))
        of_output = of_output * np.float32(2.0 ** (1 - bits[node.output[0]]))
        units[node.input[1]] = of_output * of_input
        if len(node.input) > 2 and constants[node.input[2]].size == of_output.size:
            units[node.input[2]] = of_output.reshape(-1)
    return units


def _power_of_two(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the powers of two next above positive values; 1 for zeros."""
    return np.exp2(np.ceil(np.log2(np.where(values > 0, values, 1)))).astype(np.float32)
