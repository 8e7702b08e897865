"""Parts of detectors in several INT8 forms on TensorRT 8, each timed alone: what to write them as.

    python -m benchmarks.tensorrt8_forms graphs DIR              needs ONNX Runtime
    python -m benchmarks.tensorrt8_forms time DIR --json FILE    needs TensorRT 8, a GPU

The parts are those that are not a convolution: the shortcuts of M and L-ReLU, the upsampling of the
neck, the class branch of a head, each between convolutions as in the network, with random weights,
batch 32. The first command writes `PART.FORM.onnx`; the second builds each, TensorRT's own kernels
only, and times all that build, interleaved, by CUDA events.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from benchmarks.tensorrt8 import OWN_TACTICS
from trt_yolov6.common.files import write_json
from trt_yolov6.common.machine import read_gpus, software_versions, timestamp
from trt_yolov6.engines.base import BuildSettings
from trt_yolov6.errors import UserError
from trt_yolov6.graph.float16 import tail_nodes, to_fp16
from trt_yolov6.quantization.qdq.insert import insert_qdq
from trt_yolov6.quantization.qdq.placement import Placement, place
from trt_yolov6.spec import BatchProfile

BATCH = 32
AMAX = 6.0
"""Range of every quantized tensor: times do not depend on it."""


class Part:
    """A graph that is written node after node; its input has three channels."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []
        self._random = np.random.default_rng(0)

    def node(self, kind: str, inputs: list[str], **attributes: Any) -> str:
        """Add a node and return the name of its output, which is its own."""
        name = f"{kind.lower()}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, inputs, [name], name, **attributes))
        return name

    def constant(self, value: NDArray[Any]) -> str:
        """Add a constant and return its name."""
        name = f"constant_{len(self._constants)}"
        self._constants.append(numpy_helper.from_array(value, name))
        return name

    def conv(
        self,
        source: str,
        channels: tuple[int, int],
        kernel: int,
        stride: int = 1,
        dilation: int = 1,
    ) -> str:
        """Add a convolution with random weights, from and to numbers of channels."""
        shape = (channels[1], channels[0], kernel, kernel)
        weights = self._random.normal(0, (2 / np.prod(shape[1:])) ** 0.5, shape)
        return self.conv_by(source, weights.astype(np.float32), stride, dilation)

    def conv_by(
        self, source: str, weights: NDArray[np.float32], stride: int = 1, dilation: int = 1
    ) -> str:
        """Add a convolution with given weights, padded to keep the size at stride 1."""
        kernel = weights.shape[-1]
        return self.node(
            "Conv",
            [source, self.constant(weights), self.constant(np.zeros(len(weights), np.float32))],
            kernel_shape=[kernel, kernel],
            strides=[stride, stride],
            pads=[dilation * (kernel // 2)] * 4,
            dilations=[dilation, dilation],
        )

    def conv_relu(
        self,
        source: str,
        channels: tuple[int, int],
        kernel: int,
        stride: int = 1,
        dilation: int = 1,
    ) -> str:
        """Add a convolution and ReLU."""
        return self.node("Relu", [self.conv(source, channels, kernel, stride, dilation)])

    def split(self, source: str, channels: int) -> list[str]:
        """Add a Split into halves of a number of channels, and return the names of its outputs."""
        names = [f"half_{index}_of_{source}" for index in range(2)]
        sizes = self.constant(np.array([channels, channels]))
        self._nodes.append(helper.make_node("Split", [source, sizes], names, names[0], axis=1))
        return names

    def split_last(self, source: str, channels: int) -> list[str]:
        """Add a Split of the last axis into halves, and return the names of its outputs."""
        names = self.split(source, channels)
        self._nodes[-1].attribute[0].i = -1
        return names

    def model(self, size: int, output: str) -> onnx.ModelProto:
        """Return the graph, for square images of a size in pixels."""
        self._nodes.append(helper.make_node("Identity", [output], ["out"], "out"))
        images = helper.make_tensor_value_info("images", TensorProto.FLOAT, [BATCH, 3, size, size])
        out = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
        graph = helper.make_graph(self._nodes, "part", [images], [out], self._constants)
        opsets = [helper.make_opsetid("", 17)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
        return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def shortcuts(
    form: str, side: str | None = None, *, channels: int = 128, size: int = 80
) -> onnx.ModelProto:
    """Return a row of four blocks of two convolutions with plain shortcuts.

    Args:
        form: `sum`, `convolution` (the sum as a 1x1 convolution of both terms) or `none`.
        side: with the other path and the concatenation of CSPStackRep, whose convolution reads what
            the first of the row reads: `twin` (as in the network), `dilated` (the same numbers,
            but not to TensorRT), `joined` (both are one convolution and a Split) or `later` (it
            reads another tensor). None: the row alone.
    """
    part, same = Part(), (channels, channels)
    whole = part.conv_relu("images", (3, channels), 3, 2)
    other = ""
    if side == "joined":
        both = part.conv_relu(whole, (channels, 2 * channels), 1)
        tensor, other = part.split(both, channels)
    else:
        tensor = part.conv_relu(whole, same, 1)
        if side:
            source = tensor if side == "later" else whole
            other = part.conv_relu(source, same, 1, dilation=2 if side == "dilated" else 1)
    for _ in range(4):
        inner = part.conv_relu(part.conv_relu(tensor, same, 3), same, 3)
        if form == "sum":
            tensor = part.node("Add", [inner, tensor])
        elif form == "convolution":
            weights = np.tile(np.eye(channels, dtype=np.float32), 2)[:, :, None, None]
            tensor = part.conv_by(part.node("Concat", [inner, tensor], axis=1), weights)
        else:
            tensor = inner
    if side:
        tensor = part.node("Concat", [tensor, other], axis=1)
        tensor = part.conv_relu(tensor, (2 * channels, channels), 1)
    return part.model(2 * size, part.conv(tensor, (channels, 16), 1))


def weighted_shortcuts(form: str, channels: int = 128, size: int = 80) -> onnx.ModelProto:
    """Return a stack of L: four blocks with SiLU and weighted shortcuts, and the other path.

    Args:
        form: `sum`, `plain` (without the factor: what it costs), `rescaled` (`plain`, channels
            multiplied after SiLU, as equalization does), `convolution` (the factor and the sum as
            a 1x1 convolution of both terms) or `none` (no shortcuts).
        channels: of every tensor.
        size: width and height of every tensor.
    """
    part, same, factor = Part(), (channels, channels), 0.75
    scales = np.linspace(0.5, 2, channels, dtype=np.float32)[:, None, None]

    def block(source: str, kernel: int) -> str:
        inner = part.conv(source, same, kernel)
        gated = part.node("Mul", [inner, part.node("Sigmoid", [inner])])
        return part.node("Mul", [gated, part.constant(scales)]) if form == "rescaled" else gated

    whole = part.conv_relu("images", (3, channels), 3, 2)
    tensor, other = block(whole, 1), block(whole, 1)
    for _ in range(4):
        inner = block(block(tensor, 3), 3)
        if form == "sum":
            number = part.constant(np.array(factor, np.float32))
            tensor = part.node("Add", [inner, part.node("Mul", [tensor, number])])
        elif form in ("plain", "rescaled"):
            tensor = part.node("Add", [inner, tensor])
        elif form == "convolution":
            eye = np.eye(channels, dtype=np.float32)
            weights = np.concatenate([eye, factor * eye], axis=1)[:, :, None, None]
            tensor = part.conv_by(part.node("Concat", [inner, tensor], axis=1), weights)
        else:
            tensor = inner
    tensor = part.conv_relu(
        part.node("Concat", [tensor, other], axis=1), (2 * channels, channels), 1
    )
    return part.model(2 * size, part.conv(tensor, (channels, 16), 1))


def upsampling(form: str, channels: int = 64, size: int = 80) -> onnx.ModelProto:
    """Return the upsampling of a neck: `transposed`, or `shuffled` (a 1x1 one, DepthToSpace)."""
    part, same = Part(), (channels, channels)
    fine = part.conv_relu("images", (3, channels), 3, 2)
    coarse = part.conv_relu(part.conv_relu(fine, (channels, 2 * channels), 3, 2), same[::-1], 1)
    if form == "transposed":
        weights = np.full((*same, 2, 2), 0.1, np.float32)
        bias = part.constant(np.zeros(channels, np.float32))
        inputs = [coarse, part.constant(weights), bias]
        large = part.node("ConvTranspose", inputs, kernel_shape=[2, 2], strides=[2, 2])
    else:
        wide = part.conv(coarse, (channels, 4 * channels), 1)
        large = part.node("DepthToSpace", [wide], blocksize=2, mode="CRD")
    joined = part.conv_relu(part.node("Concat", [large, fine], axis=1), (2 * channels, channels), 3)
    return part.model(2 * size, part.conv(joined, (channels, 16), 1))


def class_branch(channels: int = 64, size: int = 80, classes: int = 80) -> onnx.ModelProto:
    """Return a head's class branch: a block, the prediction, its transposition and Sigmoid."""
    part = Part()
    inner = part.conv(part.conv_relu("images", (3, channels), 3, 2), (channels, channels), 3)
    inner = part.node("Mul", [inner, part.node("Sigmoid", [inner])])
    logits = part.conv(inner, (channels, classes), 1)
    shape = part.constant(np.array([BATCH, classes, size * size]))
    rows = part.node("Transpose", [part.node("Reshape", [logits, shape])], perm=[0, 2, 1])
    return part.model(2 * size, part.node("Sigmoid", [rows]))


def _branches(part: Part) -> Iterator[tuple[str, int]]:
    """Add what the last convolutions of a head's three levels read; yield each and its channels."""
    trunk = part.conv_relu("images", (3, 64), 3, 2)
    for index, channels in enumerate((64, 128, 256)):
        if index:
            trunk = part.conv_relu(trunk, (channels // 2, channels), 3, 2)
        inner = part.conv(trunk, (channels, channels), 3)
        yield part.node("Mul", [inner, part.node("Sigmoid", [inner])]), channels


def class_scores(form: str, classes: int = 80, size: int = 80) -> onnx.ModelProto:
    """Return the class branches of a head's three levels, joined to (batch, anchors, classes).

    Args:
        form: `rows` (each level transposed as an image, then joined, as exported), `columns` (the
            same after a Reshape), `early` (`rows` after the Sigmoid), `joined` (joined, then
            transposed), `last` (the same after the Sigmoid), `product` (the prediction as a matrix
            product that writes rows), or `bare` (not transposed at all: what the rest takes).
        classes: number of classes.
        size: width of the finest level in cells.
    """
    part, found = Part(), []
    for index, (inner, channels) in enumerate(_branches(part)):
        cells = (size >> index) ** 2
        if form == "product":
            shape = part.constant(np.array([BATCH, channels, cells]))
            rows = part.node("Transpose", [part.node("Reshape", [inner, shape])], perm=[0, 2, 1])
            weights = np.full((channels, classes), 0.01, np.float32)
            found.append(part.node("MatMul", [rows, part.constant(weights)]))
            continue
        logits = part.conv(inner, (channels, classes), 1)
        if form == "early":
            logits = part.node("Sigmoid", [logits])
        if form in ("rows", "early"):
            last = part.node("Transpose", [logits], perm=[0, 2, 3, 1])
            shape = part.constant(np.array([BATCH, cells, classes]))
            found.append(part.node("Reshape", [last, shape]))
            continue
        flat = part.node("Reshape", [logits, part.constant(np.array([BATCH, classes, cells]))])
        if form == "columns":
            flat = part.node("Transpose", [flat], perm=[0, 2, 1])
        found.append(flat)
    in_rows = form in ("rows", "early", "columns", "product")
    whole = part.node("Concat", found, axis=1 if in_rows else 2)
    if form == "joined":
        whole = part.node("Transpose", [whole], perm=[0, 2, 1])
    if form != "early":
        whole = part.node("Sigmoid", [whole])
    if form == "last":
        whole = part.node("Transpose", [whole], perm=[0, 2, 1])
    return part.model(2 * size, whole)


def boxes(form: str, size: int = 80, bins: int = 17) -> onnx.ModelProto:
    """Return the box branches of a head with DFL, three levels, up to the distances.

    Args:
        form: `softmax` (over the last axis, then a product with the bins), `exponentials` (one
            product of the exponentials gives numerators and denominators), `sums` (the same by two
            ReduceSum), `columns` (softmax over the channels, not transposed before), or `bare` (the
            logits alone: what the rest takes).
        size: width of the finest level in cells.
        bins: of each distance.
    """
    part, found = Part(), []
    for inner, channels in _branches(part):
        logits = part.conv(inner, (channels, 4 * bins), 1)
        if form != "columns":
            logits = part.node("Transpose", [logits], perm=[0, 2, 3, 1])
        shapes = {
            "columns": [0, 4, bins, -1],
            "softmax": [0, -1, 4, bins],
            "sums": [0, -1, 4, bins],
        }
        shape = part.constant(np.array(shapes.get(form, [0, -1, 4 * bins])))
        found.append(part.node("Reshape", [logits, shape]))
    whole = part.node("Concat", found, axis=3 if form == "columns" else 1)
    numbers = np.arange(bins, dtype=np.float32)
    if form == "softmax":
        shares = part.node("Softmax", [whole], axis=3)
        whole = part.node("MatMul", [shares, part.constant(numbers[:, None])])
    elif form == "columns":
        shares = part.node("Softmax", [whole], axis=2)
        weighted = part.node("Mul", [shares, part.constant(numbers[:, None])])
        axis = part.constant(np.array([2]))
        whole = part.node("ReduceSum", [weighted, axis], keepdims=0)
    elif form in ("exponentials", "sums"):
        # Softmax is a quotient of exponentials; a limit keeps them finite.
        limits = [part.constant(np.array(limit, np.float32)) for limit in (-80.0, 80.0)]
        powers = part.node("Exp", [part.node("Clip", [whole, *limits])])
        if form == "exponentials":
            blocks = np.kron(np.eye(4), np.stack([numbers, np.ones(bins)], axis=1))
            columns = np.concatenate([blocks[:, ::2], blocks[:, 1::2]], axis=1).astype(np.float32)
            both = part.split_last(part.node("MatMul", [powers, part.constant(columns)]), 4)
        else:
            axis = part.constant(np.array([3]))
            weighted = part.node("Mul", [powers, part.constant(numbers)])
            both = [part.node("ReduceSum", [item, axis], keepdims=0) for item in (weighted, powers)]
        whole = part.node("Div", both)
    return part.model(2 * size, whole)


def stem(form: str, channels: int = 64, size: int = 640) -> onnx.ModelProto:
    """Return the first layer of a network, `silu` or `relu`, and the one after it."""
    part = Part()
    inner = part.conv("images", (3, channels), 3, 2)
    if form == "silu":
        inner = part.node("Mul", [inner, part.node("Sigmoid", [inner])])
    else:
        inner = part.node("Relu", [inner])
    return part.model(size, part.conv_relu(inner, (channels, 2 * channels), 3, 2))


def quantized(
    model: onnx.ModelProto,
    change: Callable[[onnx.ModelProto, Placement], Placement] = lambda _, placement: placement,
    exclude: Collection[str] = (),
) -> onnx.ModelProto:
    """Return a part in INT8 and half precision, as `build` places the pairs except for a change."""
    placement = change(model, place(model, exclude))
    return insert_qdq(model, placement, dict.fromkeys(placement.tensors, AMAX), fp16=True)


def _with_both_terms(model: onnx.ModelProto, placement: Placement) -> Placement:
    """Quantize both terms of sums, too."""
    wanted = {name for node in model.graph.node if node.op_type == "Add" for name in node.input}
    order = ["images", *(name for node in model.graph.node for name in node.output)]
    tensors = sorted(wanted.union(placement.tensors), key=order.index)
    return dataclasses.replace(placement, tensors=tuple(tensors))


def _with_one_term(model: onnx.ModelProto, placement: Placement) -> Placement:
    """Leave the first terms of sums out."""
    first = {node.input[0] for node in model.graph.node if node.op_type == "Add"}
    kept = tuple(name for name in placement.tensors if name not in first)
    return dataclasses.replace(placement, tensors=kept)


def _with_first_output(model: onnx.ModelProto, placement: Placement) -> Placement:
    """Quantize what the first convolution writes, before its activation."""
    (name, *_) = (node.output[0] for node in model.graph.node if node.op_type == "Conv")
    tensors = ("images", name, *(item for item in placement.tensors if item != "images"))
    return dataclasses.replace(placement, tensors=tensors)


def _with_factors_in_scales(model: onnx.ModelProto, factor: float) -> onnx.ModelProto:
    """Multiply the second terms of sums by a factor, by dequantizing their codes with its scale."""
    found = {node.output[0]: node for node in model.graph.node}
    scales = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    nodes = []
    for node in model.graph.node:
        if node.op_type == "Add":
            pair = found[node.input[1]]
            value = np.asarray(scales[pair.input[1]] * factor)
            name = f"{node.output[0]}/factor"
            model.graph.initializer.append(numpy_helper.from_array(value, name))
            read = [pair.input[0], name, *pair.input[2:]]
            nodes.append(helper.make_node("DequantizeLinear", read, [f"{name}/term"], f"{name}/dq"))
            node.input[1] = f"{name}/term"
        nodes.append(node)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)
    return model


def forms() -> dict[str, onnx.ModelProto]:
    """Return all parts in all forms, by `PART.FORM`."""
    found: dict[str, onnx.ModelProto] = {}
    for side in (None, "twin", "dilated", "joined", "later"):
        name = f"stack_{side}" if side else "shortcuts"
        row = shortcuts("sum", side)
        found[f"{name}.fp16"] = to_fp16(row)
        found[f"{name}.int8"] = quantized(row)
        found[f"{name}.int8-both_terms"] = quantized(row, _with_both_terms)
        found[f"{name}.int8-convolution"] = quantized(shortcuts("convolution", side))
        found[f"{name}.int8-without"] = quantized(shortcuts("none", side))
    row = weighted_shortcuts("sum")
    found["weighted_stack.fp16"] = to_fp16(row)
    found["weighted_stack.int8"] = quantized(row)
    found["weighted_stack.int8-both_terms"] = quantized(row, _with_both_terms)
    plain = weighted_shortcuts("plain")
    found["weighted_stack.int8-plain"] = quantized(plain, _with_one_term)
    found["weighted_stack.int8-plain_both_terms"] = quantized(plain, _with_both_terms)
    rescaled = weighted_shortcuts("rescaled")
    found["rescaled_stack.fp16"] = to_fp16(rescaled)
    found["rescaled_stack.int8-one_term"] = quantized(rescaled, _with_one_term)
    found["rescaled_stack.int8-both_terms"] = quantized(rescaled, _with_both_terms)
    found["weighted_stack.int8-scales"] = _with_factors_in_scales(
        quantized(plain, _with_both_terms), 0.75
    )
    for form in ("convolution", "none"):
        found[f"weighted_stack.int8-{form}"] = quantized(weighted_shortcuts(form))
    found["upsampling.fp16"] = to_fp16(upsampling("transposed"))
    found["upsampling.int8-transposed"] = quantized(upsampling("transposed"))
    found["upsampling.int8-shuffled"] = quantized(upsampling("shuffled"))
    branch = class_branch()
    last = [node.name for node in branch.graph.node if node.op_type == "Conv"][-1]
    found["class_branch.fp16"] = to_fp16(branch)
    found["class_branch.int8"] = quantized(branch)
    found["class_branch.int8-prediction_in_float"] = quantized(branch, exclude=[last])
    for form in ("rows", "early", "columns", "joined", "last", "product", "bare"):
        found[f"class_scores.fp16-{form}"] = to_fp16(class_scores(form))
        found[f"class_scores.int8-{form}"] = quantized(class_scores(form))
    for form in ("softmax", "exponentials", "sums", "columns", "bare"):
        model = boxes(form)
        found[f"boxes.fp16-{form}"] = to_fp16(model, keep_float32=tail_nodes(model))
        found[f"boxes.int8-{form}"] = quantized(model)
    for form in ("silu", "relu"):
        first = stem(form)
        found[f"stem.fp16-{form}"] = to_fp16(first)
        found[f"stem.int8-{form}"] = quantized(first)
        found[f"stem.int8-{form}-first_in_float"] = quantized(first, exclude=["conv_0"])
        found[f"stem.int8-{form}-pair_before"] = quantized(first, _with_first_output)
    return found


# --- with TensorRT ------------------------------------------------------------------------------


def time_forms(folder: Path, json: Path, only: Collection[str], level: int | None) -> None:
    """Build the graphs of a folder and write how long each takes, in microseconds."""
    from cuda.bindings import runtime

    from trt_yolov6.engines.tensorrt import enterprise

    settings = BuildSettings(
        batch=BatchProfile(BATCH, BATCH, BATCH),
        workspace_mib=4096,
        optimization_level=level,
        tactic_sources=OWN_TACTICS,
        progress=False,
    )
    rows: list[dict[str, Any]] = []
    turns: list[tuple[dict[str, Any], Callable[[], float]]] = []
    stream = _done(runtime.cudaStreamCreate())
    for path in sorted(folder.glob("*.onnx")):
        if only and not any(text in path.name for text in only):
            continue
        start = time.perf_counter()
        row: dict[str, Any] = {"part": path.stem.split(".")[0], "form": path.stem.split(".")[1]}
        rows.append(row)
        try:
            plan = enterprise.build(path.read_bytes(), settings)
            turns.append((row, _timed(plan, stream)))
        except UserError as error:
            row["error"] = str(error)
        row["build_s"] = round(time.perf_counter() - start, 1)
        print(row, flush=True)
    times: dict[int, list[float]] = {index: [] for index in range(len(turns))}
    for _ in range(10):
        for index, (_, once) in enumerate(turns):
            times[index].append(once())
    for index, (row, _) in enumerate(turns):
        row["us"] = round(1000 * statistics.median(times[index][1:]), 1)
        print(row["part"], row["form"], row["us"], flush=True)
    result = {
        "device": [gpu.name for gpu in read_gpus()],
        "date": timestamp(),
        "software": software_versions(),
        "optimization_level": level,
        "rows": rows,
    }
    write_json(json, result)


def _timed(plan: bytes, stream: Any, runs: int = 10) -> Callable[[], float]:
    """Return a function that runs a plan several times and returns milliseconds a run."""
    import tensorrt
    from cuda.bindings import runtime

    loader = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.ERROR))
    engine = loader.deserialize_cuda_engine(plan)
    context = engine.create_execution_context()
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        size = 4 * int(np.prod(engine.get_tensor_shape(name)))
        context.set_tensor_address(name, int(_done(runtime.cudaMalloc(size))))
    begin, end = (_done(runtime.cudaEventCreate()) for _ in range(2))

    def once() -> float:
        _done(runtime.cudaEventRecord(begin, stream))
        for _ in range(runs):
            context.execute_async_v3(int(stream))
        _done(runtime.cudaEventRecord(end, stream))
        _done(runtime.cudaEventSynchronize(end))
        return float(_done(runtime.cudaEventElapsedTime(begin, end))) / runs

    return once


def _done(answer: tuple[Any, ...]) -> Any:
    """Return the value that a call of CUDA gave, or raise the error that it reports."""
    error, *values = answer
    if int(error) != 0:
        raise RuntimeError(error.name)
    return values[0] if values else None


def main() -> None:
    """Run as the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    actions = parser.add_subparsers(dest="action", required=True)
    for name in ("graphs", "time"):
        action = actions.add_parser(name)
        action.add_argument("folder", type=Path)
        if name == "time":
            action.add_argument("--json", type=Path, required=True)
            action.add_argument("--only", nargs="+", default=(), help="parts of names")
            action.add_argument("--level", type=int, help="optimization level (TensorRT's own)")
    options = parser.parse_args()
    if options.action == "time":
        time_forms(options.folder, options.json, options.only, options.level)
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, model in forms().items():
        onnx.save(model, options.folder / f"{name}.onnx")
        print(name)


if __name__ == "__main__":
    main()
