"""A Q/DQ graph as a differentiable PyTorch function whose scales, weights and biases can learn.

What is interpreted is the deployed graph itself, node by node: a Q/DQ pair on a tensor becomes fake
quantization, stored INT8 weights become float weights with fake quantization, and all else computes
as ONNX says. What was learned goes back into the same graph's constants.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from trt_yolov6.errors import UserError
from trt_yolov6.graph.editing import add_initializers, replace_tensor
from trt_yolov6.graph.index import GraphIndex, attributes, constants_of, tensor_value
from trt_yolov6.graph.quantized import QuantizedLayer, quantized_layers
from trt_yolov6.quantization.bias_correction import bias_of
from trt_yolov6.quantization.fake_quantize import (
    WIDEST,
    FakeQuantizer,
    activation_levels,
    fake_quantize,
    weight_levels,
)
from trt_yolov6.quantization.types import INT8

Attributes = Mapping[str, Any]
Operator = Callable[[Attributes, Sequence[Any]], Any]
"""Takes a node's attributes and inputs; returns one tensor, or a sequence of them."""


@dataclass(frozen=True)
class Step:
    """One node, ready to be computed."""

    operator: Operator
    attributes: Attributes
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    last: tuple[str, ...] = ()
    """Tensors that nothing reads any more afterwards."""


def with_ends(steps: Sequence[Step], source: str, kept: Collection[str]) -> list[Step]:
    """Return steps that know which tensors end with them, of the source and all that they make."""
    last = {source: 0}
    for index, step in enumerate(steps):
        last.update(dict.fromkeys(step.outputs, index))
        last.update((name, index) for name in step.inputs if name in last)
    ends: dict[int, list[str]] = {}
    for name, index in last.items():
        if name and name not in kept:
            ends.setdefault(index, []).append(name)
    return [replace(step, last=tuple(ends.get(index, ()))) for index, step in enumerate(steps)]


class TorchGraph(nn.Module):
    """An ONNX graph in PyTorch, float or with Q/DQ pairs.

    In a float graph nothing learns. In a Q/DQ graph the weights and biases of INT8 layers do, and
    the scales of activations.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        watched: Iterable[str] = (),
    ) -> None:
        """Read a graph.

        Args:
            model: float32, or from `insert_qdq`; it is not changed.
            watched: tensors that are returned after the graph's outputs.

        Raises:
            UserError: the graph has an operator that is not known here.
        """
        super().__init__()
        self._model = model
        graph = GraphIndex(model)
        self.outputs = tuple(item.name for item in model.graph.output)
        self._watched = frozenset(watched)
        self.input = next(i.name for i in model.graph.input if i.name not in graph.constants)
        self._layers: dict[str, QuantizedLayer] = {
            layer.output: layer for layer in quantized_layers(graph) if layer.has_own_codes
        }
        dequantized = {layer.weights.node.output[0] for layer in self._layers.values()}
        needed = graph.ancestors({*self.outputs, *self._watched})
        nodes = [node for node in graph.nodes if needed.intersection(node.output)]
        self.quantizers = nn.ModuleDict()
        # Parameters and buffers of each layer, by its output, begin with this.
        self._keys: dict[str, str] = {}
        self._scale_names: dict[str, str] = {}
        fixed: dict[str, NDArray[Any]] = {}
        steps: list[Step] = []
        paired: set[str] = set()
        for node in nodes:
            if node.op_type == "Constant":
                continue
            names, made = tuple(node.input), tuple(node.output)
            if node.op_type == "QuantizeLinear":
                steps.append(Step(self._quantizer(graph, node), {}, names[:1], made))
                paired.add(made[0])
                continue
            if node.op_type == "DequantizeLinear" and names[0] in paired:
                steps.append(Step(_same, {}, names[:1], made))
                continue
            if made[0] in dequantized:
                continue
            operator = OPERATORS.get(node.op_type)
            if operator is None or node.domain not in ("", "ai.onnx"):
                raise UserError(
                    f"the graph has the operator {node.op_type}, which reconstruction by gradients "
                    "does not support; leave `reconstruct_minutes` out."
                )
            if made[0] in self._layers:
                self._add_layer(graph, self._layers[made[0]])
                names = (names[0], f"weight:{made[0]}", f"bias:{made[0]}")
            fixed |= {
                name: tensor_value(graph.constants[name])
                for name in names
                if name in graph.constants
            }
            steps.append(Step(operator, attributes(node), names, made))
        self._constants = {
            # A scale or a bias may be a float64 scalar, too.
            name: torch.from_numpy(np.array(value))
            for name, value in fixed.items()
        }
        self._steps = with_ends(steps, self.input, self.outputs)

    def _apply(self, fn: Any, recurse: bool = True) -> TorchGraph:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._constants = {name: fn(value) for name, value in self._constants.items()}
        return self

    def forward(
        self, images: Tensor, part: Callable[[Tensor], Tensor] = lambda whole: whole
    ) -> dict[str, Tensor]:
        """Compute the graph's outputs and the watched tensors.

        Args:
            images: what the graph's one input takes.
            part: what is wanted of a watched tensor; the rest need not be held.

        Returns:
            By name, watched ones in the graph's order and then the outputs in theirs.
        """
        values: dict[str, Tensor] = {self.input: images}
        parts: dict[str, Tensor] = {}
        for step in self._steps:
            inputs = [self._read(values, name) for name in step.inputs]
            made = step.operator(step.attributes, inputs)
            values.update(
                zip(step.outputs, [made] if isinstance(made, Tensor) else made, strict=False)
            )
            del made
            parts.update((n, part(values[n])) for n in step.outputs if n in self._watched)
            for name in step.last:
                del values[name]
        return parts | {name: values[name] for name in self.outputs}

    def scale_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the scales of activations."""
        return [p for key, p in self.named_parameters() if key.startswith("quantizers.act")]

    def weight_parameters(self) -> list[nn.Parameter]:
        """Return the weights of the INT8 layers, in steps of their scales."""
        return [self.get_parameter(f"{key}_weight") for key in self._keys.values()]

    def bias_parameters(self) -> list[nn.Parameter]:
        """Return by how much the biases of the INT8 layers have changed, in their units."""
        return [self.get_parameter(f"{key}_bias") for key in self._keys.values()]

    def set_bias_units(self, units: Mapping[str, Tensor]) -> None:
        """Have biases learn in units of their own, (channels,), by the layers' outputs."""
        for output, key in self._keys.items():
            if output in units:
                self.get_buffer(f"{key}_unit").copy_(units[output])

    @torch.no_grad()
    def learned(self) -> onnx.ModelProto:
        """Return the Q/DQ graph with what was learned in its constants."""
        result = copy.deepcopy(self._model)
        constants = constants_of(result)
        for name, key in self._scale_names.items():
            quantizer = self.quantizers[key]
            assert isinstance(quantizer, FakeQuantizer)
            value = quantizer.scale.detach().cpu().numpy().astype(np.float32)
            replace_tensor(constants[name], value.reshape(tuple(constants[name].dims)))
        for output, key in self._keys.items():
            layer = self._layers[output]
            steps = self.get_parameter(f"{key}_weight").detach().cpu().numpy()
            replace_tensor(constants[layer.weight], INT8.encode(steps))
            bias = self._bias(key).detach().cpu().numpy()
            own = f"{output}_bias_learned"
            node = result.graph.node[layer.position]
            del node.input[2:]
            node.input.append(own)
            add_initializers(result.graph, {own: bias.astype(np.float32)})
        return result

    # --- inside

    def _read(self, values: Mapping[str, Tensor], name: str) -> Tensor | None:
        if name in values:
            return values[name]
        kind, _, output = name.partition(":")
        if kind == "weight" and output in self._keys:
            key = self._keys[output]
            steps = self.get_parameter(f"{key}_weight")
            levels = fake_quantize(steps, steps.new_ones(()), weight_levels(WIDEST))
            return levels * self.get_buffer(f"{key}_scale")
        if kind == "bias" and output in self._keys:
            return self._bias(self._keys[output])
        return self._constants[name] if name else None

    def _quantizer(self, graph: GraphIndex, node: onnx.NodeProto) -> Operator:
        name = node.input[1]
        key = f"act{len(self._scale_names)}"
        if name in self._scale_names:
            key = self._scale_names[name]
        else:
            scale = graph.value(name)
            assert scale is not None
            self._scale_names[name] = key
            self.quantizers[key] = FakeQuantizer(
                torch.tensor(np.float32(scale.reshape(()))), activation_levels(WIDEST), learn=True
            )
        return lambda _, inputs: self.quantizers[key](inputs[0])

    def _add_layer(self, graph: GraphIndex, layer: QuantizedLayer) -> None:
        key = self._keys[layer.output] = f"layer{len(self._keys)}"
        scale, bias = layer.scale, bias_of(layer, graph.constants)
        steps = np.asarray(layer.weights.values() / scale, np.float32)
        self.register_parameter(f"{key}_weight", nn.Parameter(torch.from_numpy(steps)))
        self.register_buffer(f"{key}_scale", torch.from_numpy(np.array(scale)))
        self.register_buffer(f"{key}_start", torch.from_numpy(bias.astype(np.float32)))
        self.register_buffer(f"{key}_unit", torch.ones(len(bias)))
        self.register_parameter(f"{key}_bias", nn.Parameter(torch.zeros(len(bias))))

    def _bias(self, key: str) -> Tensor:
        start, unit = self.get_buffer(f"{key}_start"), self.get_buffer(f"{key}_unit")
        return start + unit * self.get_parameter(f"{key}_bias")


# --- operators ----------------------------------------------------------------------------------


def _same(_: Attributes, inputs: Sequence[Any]) -> Any:
    return inputs[0]


def _pads(given: Attributes) -> tuple[int, ...]:
    """Return F.pad's argument: left, right, top, bottom."""
    if given.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise UserError(
            "the graph pads automatically (auto_pad), which reconstruction by gradients does not "
            "support; leave `reconstruct_minutes` out."
        )
    top, left, bottom, right = given.get("pads", (0, 0, 0, 0))
    return left, right, top, bottom


def _padded(given: Attributes, image: Tensor, value: float = 0.0) -> tuple[Tensor, tuple[int, int]]:
    """Return an image and the even padding that an operator still has to do."""
    left, right, top, bottom = _pads(given)
    if left == right and top == bottom:
        return image, (top, left)
    return F.pad(image, (left, right, top, bottom), value=value), (0, 0)


def _conv(given: Attributes, inputs: Sequence[Any]) -> Tensor:
    image, padding = _padded(given, inputs[0])
    return F.conv2d(
        image,
        inputs[1],
        inputs[2] if len(inputs) > 2 else None,
        stride=tuple(given.get("strides", (1, 1))),
        padding=padding,
        dilation=tuple(given.get("dilations", (1, 1))),
        groups=given.get("group", 1),
    )


def _even_padding(given: Attributes, what: str) -> tuple[int, int]:
    """Return the rows and columns of padding on each side; `what` is padded, in words."""
    left, right, top, bottom = _pads(given)
    if (left, top) != (right, bottom):
        raise UserError(
            f"the graph pads one side of {what} more than the other, which reconstruction by "
            "gradients does not support; leave `reconstruct_minutes` out."
        )
    return top, left


def _conv_transpose(given: Attributes, inputs: Sequence[Any]) -> Tensor:
    padding = _even_padding(given, "a transposed convolution")
    return F.conv_transpose2d(
        inputs[0],
        inputs[1],
        inputs[2] if len(inputs) > 2 else None,
        stride=tuple(given.get("strides", (1, 1))),
        padding=padding,
        output_padding=tuple(given.get("output_padding", (0, 0))),
        groups=given.get("group", 1),
        dilation=tuple(given.get("dilations", (1, 1))),
    )


def _max_pool(given: Attributes, inputs: Sequence[Any]) -> Tensor:
    image, padding = _padded(given, inputs[0], float("-inf"))
    return F.max_pool2d(
        image,
        tuple(given["kernel_shape"]),
        tuple(given.get("strides", (1, 1))),
        padding,
        tuple(given.get("dilations", (1, 1))),
        bool(given.get("ceil_mode", 0)),
    )


def _average_pool(given: Attributes, inputs: Sequence[Any]) -> Tensor:
    padding = _even_padding(given, "an average pooling")
    return F.avg_pool2d(
        inputs[0],
        tuple(given["kernel_shape"]),
        tuple(given.get("strides", (1, 1))),
        padding,
        bool(given.get("ceil_mode", 0)),
        bool(given.get("count_include_pad", 0)),
    )


def _list(value: Any) -> list[int]:
    return [int(item) for item in value.reshape(-1).tolist()]


def _axes(given: Attributes, inputs: Sequence[Any]) -> list[int]:
    """Return axes, an attribute in older opsets and an input in newer ones."""
    if len(inputs) > 1 and inputs[1] is not None:
        return _list(inputs[1])
    return list(given.get("axes", ()))


def _reshape(given: Attributes, inputs: Sequence[Any]) -> Any:
    shape = _list(inputs[1])
    kept = [inputs[0].shape[at] if size == 0 else size for at, size in enumerate(shape)]
    return inputs[0].reshape(kept)


def _split(given: Attributes, inputs: Sequence[Any]) -> Sequence[Tensor]:
    axis = given.get("axis", 0)
    if len(inputs) > 1 and inputs[1] is not None:
        return torch.split(inputs[0], _list(inputs[1]), axis)
    if "split" in given:
        return torch.split(inputs[0], list(given["split"]), axis)
    count = given.get("num_outputs", 2)
    return torch.split(inputs[0], -(-inputs[0].shape[axis] // count), axis)


def _slice(given: Attributes, inputs: Sequence[Any]) -> Any:
    value = inputs[0]
    starts, ends = _list(inputs[1]), _list(inputs[2])
    axes = _list(inputs[3]) if len(inputs) > 3 and inputs[3] is not None else range(len(starts))
    steps = _list(inputs[4]) if len(inputs) > 4 and inputs[4] is not None else [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        index = [slice(None)] * value.ndim
        index[axis] = slice(start, min(end, 1 << 62), step)
        value = value[tuple(index)]
    return value


def _resize(given: Attributes, inputs: Sequence[Any]) -> Tensor:
    image = inputs[0]
    sizes = inputs[3] if len(inputs) > 3 and inputs[3] is not None else None
    if sizes is not None:
        size = _list(sizes)[-2:]
    else:
        factors = inputs[2].reshape(-1).tolist()[-2:]
        size = [int(length * by) for length, by in zip(image.shape[-2:], factors, strict=True)]
    mode = given.get("mode", "nearest")
    whole = all(to % old == 0 for to, old in zip(size, image.shape[-2:], strict=True))
    if mode == "nearest" and whole:
        return F.interpolate(image, size=size, mode="nearest")
    how = given.get("coordinate_transformation_mode", "half_pixel")
    if mode == "linear" and how in ("half_pixel", "pytorch_half_pixel", "align_corners"):
        return F.interpolate(
            image, size=size, mode="bilinear", align_corners=how == "align_corners"
        )
    raise UserError(
        f"the graph resizes ({mode}, {how}) in a way that reconstruction by gradients does not "
        "support; leave `reconstruct_minutes` out."
    )


def _clip(given: Attributes, inputs: Sequence[Any]) -> Tensor:
    low = inputs[1] if len(inputs) > 1 else given.get("min")
    high = inputs[2] if len(inputs) > 2 else given.get("max")
    return torch.clamp(inputs[0], low, high)


def _hard_sigmoid(given: Attributes, inputs: Sequence[Any]) -> Any:
    alpha, beta = given.get("alpha", 0.2), given.get("beta", 0.5)
    return (inputs[0] * alpha + beta).clamp(0, 1)


def _squeeze(given: Attributes, inputs: Sequence[Any]) -> Any:
    axes = _axes(given, inputs)
    return inputs[0].squeeze(axes) if axes else inputs[0].squeeze()


def _unsqueeze(given: Attributes, inputs: Sequence[Any]) -> Any:
    value, axes = inputs[0], _axes(given, inputs)
    # Axes count from the end of what comes out.
    for axis in sorted(axis % (value.ndim + len(axes)) for axis in axes):
        value = value.unsqueeze(axis)
    return value


def _reduce_mean(given: Attributes, inputs: Sequence[Any]) -> Any:
    axes = _axes(given, inputs)
    keep = bool(given.get("keepdims", 1))
    return inputs[0].mean(axes or None, keepdim=keep)


def _pad(given: Attributes, inputs: Sequence[Any]) -> Tensor:
    if given.get("mode", "constant") != "constant" or len(inputs) > 3:
        raise UserError(
            "the graph pads in a way that reconstruction by gradients does not support; leave "
            "`reconstruct_minutes` out."
        )
    pads = _list(inputs[1])
    half = len(pads) // 2
    given_pads = [
        size for axis in reversed(range(half)) for size in (pads[axis], pads[axis + half])
    ]
    value = float(inputs[2]) if len(inputs) > 2 and inputs[2] is not None else 0.0
    return F.pad(inputs[0], given_pads, value=value)


_TYPES = {1: torch.float32, 6: torch.int32, 7: torch.int64, 11: torch.float64, 10: torch.float32}

OPERATORS: dict[str, Operator] = {
    "Add": lambda _, i: i[0] + i[1],
    "AveragePool": _average_pool,
    "Cast": lambda a, i: i[0].to(_TYPES[a["to"]]),
    "Clip": _clip,
    "Concat": lambda a, i: torch.cat(list(i), a["axis"]),
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Div": lambda _, i: i[0] / i[1],
    "Exp": lambda _, i: i[0].exp(),
    "Flatten": lambda a, i: i[0].reshape(math.prod(i[0].shape[: a.get("axis", 1)]), -1),
    "Gather": lambda a, i: (
        i[0].index_select(a.get("axis", 0), i[1].reshape(-1))
        if i[1].ndim
        else i[0].select(a.get("axis", 0), int(i[1]))
    ),
    "GlobalAveragePool": lambda _, i: i[0].mean((2, 3), keepdim=True),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": lambda _, i: F.hardswish(i[0]),
    "Identity": _same,
    "LeakyRelu": lambda a, i: F.leaky_relu(i[0], a.get("alpha", 0.01)),
    "MatMul": lambda _, i: i[0] @ i[1],
    "Max": lambda _, i: torch.maximum(*i),
    "MaxPool": _max_pool,
    "Min": lambda _, i: torch.minimum(*i),
    "Mul": lambda _, i: i[0] * i[1],
    "Neg": lambda _, i: -i[0],
    "Pad": _pad,
    "Pow": lambda _, i: i[0] ** i[1],
    "ReduceMean": _reduce_mean,
    "Relu": lambda _, i: F.relu(i[0]),
    "Reshape": _reshape,
    "Resize": _resize,
    "Sigmoid": lambda _, i: torch.sigmoid(i[0]),
    "Slice": _slice,
    "Softmax": lambda a, i: i[0].softmax(a.get("axis", -1)),
    "Softplus": lambda _, i: F.softplus(i[0]),
    "Split": _split,
    "Sqrt": lambda _, i: i[0].sqrt(),
    "Squeeze": _squeeze,
    "Sub": lambda _, i: i[0] - i[1],
    "Tanh": lambda _, i: torch.tanh(i[0]),
    "Transpose": lambda a, i: i[0].permute(tuple(a["perm"])),
    "Unsqueeze": _unsqueeze,
}
"""Operators of detectors' graphs; each takes a node's attributes and inputs."""
