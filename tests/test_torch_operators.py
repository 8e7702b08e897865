"""Graphs in PyTorch: operators compute what ONNX Runtime's do, and anchors what NumPy's do."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from trt_yolov6.detectors.layouts import LAYOUTS, Anchors
from trt_yolov6.errors import UserError
from trt_yolov6.quantization.torch_anchors import READERS
from trt_yolov6.quantization.torch_graph import OPERATORS, TorchGraph
from trt_yolov6.spec import OutputLayout

SHAPE = (2, 4, 6, 8)
RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.normal(size=SHAPE).astype(np.float32)


def whole(*values: int) -> NDArray[np.int64]:
    return np.array(values, np.int64)


def real(*shape: int) -> NDArray[np.float32]:
    return RANDOM.uniform(0.5, 2, shape).astype(np.float32)


def graph_of(
    op: str, constants: list[NDArray[Any] | None], attributes: dict[str, Any], opset: int = 18
) -> onnx.ModelProto:
    """A graph of one node that reads the images and constants."""
    names = ["" if value is None else f"c{at}" for at, value in enumerate(constants)]
    made = ["one", "other", "third"] if op == "Split" else ["one"]
    if op == "Split":
        made = made[: attributes.pop("parts")]
    nodes = [helper.make_node(op, ["images", *names], made, **attributes)]
    stored = [
        numpy_helper.from_array(value, name)
        for value, name in zip(constants, names, strict=True)
        if value is not None
    ]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in made]
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, SHAPE)
    graph = helper.make_graph(nodes, "one", [images], outputs, stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def run(model: onnx.ModelProto) -> list[NDArray[Any]]:
    session = onnxruntime.InferenceSession(model.SerializeToString())
    found: list[NDArray[Any]] = session.run(None, {"images": IMAGES})
    return found


Case = tuple[str, list[NDArray[Any] | None], dict[str, Any]]

CASES: list[Case] = [
    ("Add", [real(4, 1, 1)], {}),
    ("Sub", [real(4, 1, 1)], {}),
    ("Mul", [real(4, 1, 1)], {}),
    ("Div", [real(4, 1, 1)], {}),
    ("Max", [real(4, 1, 1)], {}),
    ("Min", [real(4, 1, 1)], {}),
    *(
        (op, [], {})
        for op in ("Exp", "GlobalAveragePool", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu")
    ),
    *((op, [], {}) for op in ("Neg", "Relu", "Sigmoid", "Softmax", "Softplus", "Tanh", "Flatten")),
    ("HardSigmoid", [], {"alpha": 1 / 6, "beta": 0.5}),
    ("LeakyRelu", [], {"alpha": 0.3}),
    ("Pow", [np.array(2, np.float32)], {}),
    ("Cast", [], {"to": TensorProto.FLOAT}),
    ("Clip", [np.array(-0.5, np.float32), np.array(0.5, np.float32)], {}),
    ("Clip", [None, np.array(0.5, np.float32)], {}),
    ("Clip", [np.array(0.0, np.float32)], {}),
    ("AveragePool", [], {"kernel_shape": [2, 2], "strides": [2, 2]}),
    ("AveragePool", [], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
    ("AveragePool", [], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1}),
    ("MaxPool", [], {"kernel_shape": [5, 5], "pads": [2, 2, 2, 2]}),
    ("MaxPool", [], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [0, 0, 1, 1]}),
    ("Conv", [real(6, 2, 3, 3), real(6)], {"group": 2, "pads": [1, 1, 1, 1], "strides": [2, 1]}),
    ("Conv", [real(4, 4, 2, 3)], {"pads": [0, 1, 1, 0], "dilations": [1, 2]}),
    ("ConvTranspose", [real(4, 3, 2, 2), real(6)], {"group": 2, "strides": [2, 2]}),
    ("ConvTranspose", [real(4, 3, 3, 3)], {"pads": [1, 1, 1, 1], "output_padding": [1, 0],
                                           "strides": [2, 2]}),
    ("Flatten", [], {"axis": 2}),
    ("Gather", [whole(3, 0)], {"axis": 1}),
    ("Gather", [np.array(2)], {"axis": 3}),
    ("MatMul", [real(8, 5)], {}),
    ("Pad", [whole(0, 0, 1, 2, 0, 0, 3, 4)], {}),
    ("Pad", [whole(0, 1, 0, 0, 0, 0, 0, 2), np.array(7, np.float32)], {}),
    ("ReduceMean", [whole(2, 3)], {}),
    ("ReduceMean", [whole(-1)], {"keepdims": 0}),
    ("ReduceMean", [], {}),
    ("Reshape", [whole(0, 2, -1, 8)], {}),
    ("Resize", [None, np.array([1, 1, 2, 2], np.float32)], {"mode": "nearest",
     "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}),
    ("Resize", [None, None, whole(2, 4, 12, 16)], {"mode": "linear"}),
    ("Resize", [None, None, whole(2, 4, 9, 5)],
     {"mode": "linear", "coordinate_transformation_mode": "align_corners"}),
    ("Slice", [whole(1), whole(4)], {}),
    ("Slice", [whole(1, 0), whole(2**62, -1), whole(3, -2)], {}),
    ("Slice", [whole(0), whole(2**63 - 1), whole(2), whole(2)], {}),
    ("Softmax", [], {"axis": 1}),
    ("Split", [whole(1, 3)], {"axis": 1, "parts": 2}),
    ("Split", [], {"axis": -1, "num_outputs": 3, "parts": 3}),
    ("Transpose", [], {"perm": [0, 2, 3, 1]}),
    ("Unsqueeze", [whole(0, 3)], {}),
    ("Unsqueeze", [whole(-1, -2)], {}),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_an_operator_computes_what_it_does_in_onnx_runtime(case: Case) -> None:
    op, constants, attributes = case
    model = graph_of(op, constants, dict(attributes))
    expected = run(model)
    found = TorchGraph(model)(torch.from_numpy(IMAGES))
    assert len(found) == len(expected)
    for mine, theirs in zip(found.values(), expected, strict=True):
        assert mine.shape == theirs.shape
        np.testing.assert_allclose(mine.detach().numpy(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("op", "attributes"),
    [
        ("ReduceMean", {"axes": [1], "keepdims": 1}),
        ("Unsqueeze", {"axes": [1]}),
        ("Clip", {"min": -0.5, "max": 0.25}),
        ("Split", {"axis": 1, "split": [1, 3], "parts": 2}),
    ],
)
def test_older_opsets_have_attributes_where_newer_ones_have_inputs(
    op: str, attributes: dict[str, Any]
) -> None:
    model = graph_of(op, [], dict(attributes), opset=10)
    found = TorchGraph(model)(torch.from_numpy(IMAGES))
    for mine, theirs in zip(found.values(), run(model), strict=True):
        np.testing.assert_allclose(mine.numpy(), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("case", "said"),
    [
        (("Sign", [], {}), "has the operator Sign"),
        (("MaxPool", [], {"kernel_shape": [2, 2], "auto_pad": "SAME_UPPER"}), "pads automatically"),
        (
            ("AveragePool", [], {"kernel_shape": [2, 2], "pads": [0, 0, 1, 1]}),
            "pads one side of an average pooling more than the other",
        ),
        (("Pad", [whole(0, 0, 1, 1, 0, 0, 1, 1)], {"mode": "reflect"}), "pads in a way"),
        (
            ("Resize", [None, None, whole(2, 4, 12, 16)], {"mode": "cubic"}),
            r"resizes \(cubic, half_pixel\)",
        ),
    ],
)
def test_what_is_computed_otherwise_here_is_refused(case: Case, said: str) -> None:
    with pytest.raises(UserError, match=said):
        TorchGraph(graph_of(*case))(torch.from_numpy(IMAGES))


def test_operators_that_detectors_use_are_all_tried() -> None:
    elsewhere = {"Concat", "Sqrt", "Squeeze"}
    assert {case[0] for case in CASES} | elsewhere == set(OPERATORS)


# --- anchors ------------------------------------------------------------------------------------

SIZE = (64, 96)
CELLS = [(SIZE[0] // stride, SIZE[1] // stride) for stride in (8, 16, 32)]
ANCHORS = sum(rows * columns for rows, columns in CELLS)


def probabilities(*shape: int) -> NDArray[np.float32]:
    return RANDOM.uniform(0, 1, shape).astype(np.float32)


def rows(boxes: NDArray[Any], *scores: NDArray[Any]) -> NDArray[Any]:
    return np.concatenate([boxes, *scores], axis=2)


BOXES = RANDOM.uniform(0, 60, (2, ANCHORS, 4)).astype(np.float32)
RAW = RANDOM.normal(size=(2, ANCHORS, 4)).astype(np.float32)
SURE, SCORES = probabilities(2, ANCHORS, 1), probabilities(2, ANCHORS, 5)
GRIDS = {
    f"level{at}": RANDOM.normal(size=(2, 3, *cells, 10)).astype(np.float32)
    for at, cells in enumerate(CELLS)
}
SAID: dict[OutputLayout, dict[str, NDArray[Any]]] = {
    "split": {"boxes": BOXES, "scores": SCORES},
    "split_by_class": {"a": BOXES, "b": SCORES.transpose(0, 2, 1).copy()},
    "rows": {"output": rows(BOXES, SURE, SCORES)},
    "corner_rows": {"output": rows(BOXES, SCORES)},
    "columns": {"output": rows(BOXES, SCORES).transpose(0, 2, 1).copy()},
    "grid_rows": {"output": rows(RAW, SURE, SCORES)},
    "grids_yolov5": GRIDS,
    "grids_yolov7": GRIDS,
}


@pytest.mark.parametrize("layout", list(READERS))
def test_anchors_are_those_that_predictions_are_made_of(layout: OutputLayout) -> None:
    said = SAID[layout]
    found = READERS[layout]({name: torch.from_numpy(a) for name, a in said.items()}, SIZE)
    read = LAYOUTS[layout].read(said, SIZE)
    for image in range(2):
        expected = read(image)
        assert isinstance(expected, Anchors)
        np.testing.assert_allclose(found.scores[image].numpy(), expected.scores, atol=1e-5)
        corners = expected.corners(np.arange(len(expected.scores)))
        np.testing.assert_allclose(found.corners[image].numpy(), corners, rtol=1e-4, atol=1e-3)


def test_every_layout_with_anchors_has_a_reader() -> None:
    assert set(READERS) == {name for name, layout in LAYOUTS.items() if not layout.nms_inside}
