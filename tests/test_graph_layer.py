"""Look-ups, edits and views of ONNX graphs, against graphs small enough to read."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from trt_yolov6.graph.cost import Ceilings, layers_of, macs_per_input
from trt_yolov6.graph.editing import at_opset, drop_unread_initializers, set_nodes, with_outputs
from trt_yolov6.graph.index import (
    GraphIndex,
    attribute,
    attributes,
    names_read,
    nodes_after_layers,
    shapes_of,
)
from trt_yolov6.graph.quantized import quantized_layers, quantized_type, quantizer
from trt_yolov6.graph.reference import is_quantized, reference_session


def model(
    nodes: list[onnx.NodeProto], output: str = "out", opset: int = 17, **constants: np.ndarray
) -> onnx.ModelProto:
    """Return a graph from `images` (1, 2, 4, 4) to one output, with constants by name."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value("images", TensorProto.FLOAT, [1, 2, 4, 4])],
        [value(output, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


WEIGHT = np.ones((3, 2, 1, 1), np.float32)


@pytest.fixture
def two_layers() -> onnx.ModelProto:
    """A convolution, a Relu, a convolution, a Sigmoid; the second's weights in a Constant node."""
    second = numpy_helper.from_array(np.ones((1, 3, 2, 2), np.float32), "second")
    return model(
        [
            helper.make_node("Conv", ["images", "w"], ["a"], "first"),
            helper.make_node("Relu", ["a"], ["b"]),
            helper.make_node("Constant", [], ["v"], value=second),
            helper.make_node("Conv", ["b", "v"], ["c"], "last", strides=[2, 2]),
            helper.make_node("Sigmoid", ["c"], ["out"]),
        ],
        w=WEIGHT,
    )


def test_producers_readers_and_constants_are_found_by_name(two_layers: onnx.ModelProto) -> None:
    graph = GraphIndex(two_layers)
    producer = graph.producer("b")
    assert producer is not None
    assert producer.op_type == "Relu"
    assert graph.producer("images") is None
    assert [node.name for node in graph.readers("b")] == ["last"]
    assert graph.order == ("images", "a", "b", "v", "c", "out")
    value = graph.value("v")
    assert value is not None
    assert value.shape == (1, 3, 2, 2)
    assert graph.value("a") is None
    assert graph.ancestors(["c"]) == {"a", "b", "v", "c"}


def test_attributes_are_plain_values() -> None:
    node = helper.make_node("Resize", ["x"], ["y"], mode="linear", axes=[2, 3])
    assert attributes(node) == {"mode": "linear", "axes": [2, 3]}
    assert attribute(node, "missing", 7) == 7


def test_what_comes_after_the_last_layer(two_layers: onnx.ModelProto) -> None:
    assert [node.op_type for node in nodes_after_layers(two_layers)] == ["Sigmoid"]
    counts = GraphIndex(two_layers).layers_after
    assert (counts["a"], counts["b"], counts["c"], counts["out"]) == (1, 1, 0, 0)


def test_branches_read_tensors_by_name() -> None:
    inner = helper.make_graph(
        [helper.make_node("Neg", ["outside"], ["n"])],
        "branch",
        [],
        [helper.make_tensor_value_info("n", TensorProto.FLOAT, None)],
    )
    node = helper.make_node("If", ["condition"], ["y"], then_branch=inner, else_branch=inner)
    assert set(names_read(node)) == {"condition", "outside", "n"}


def test_an_initializer_that_only_a_branch_reads_is_kept(two_layers: onnx.ModelProto) -> None:
    inner = helper.make_graph(
        [helper.make_node("Identity", ["w"], ["n"])],
        "branch",
        [],
        [helper.make_tensor_value_info("n", TensorProto.FLOAT, None)],
    )
    graph = two_layers.graph
    set_nodes(graph, [helper.make_node("If", ["x"], ["out"], then_branch=inner, else_branch=inner)])
    graph.initializer.append(numpy_helper.from_array(WEIGHT, "unread"))
    drop_unread_initializers(graph)
    assert [item.name for item in graph.initializer] == ["w"]


def test_nodes_of_the_graph_itself_can_be_put_in_another_order(two_layers: onnx.ModelProto) -> None:
    before = [node.SerializeToString() for node in two_layers.graph.node]
    set_nodes(two_layers.graph, reversed(two_layers.graph.node))
    assert [node.SerializeToString() for node in two_layers.graph.node] == before[::-1]


def test_a_copy_at_a_higher_opset_is_converted_and_any_other_is_equal() -> None:
    old = model([helper.make_node("Relu", ["images"], ["out"])], opset=12)
    assert at_opset(old, 13).opset_import[0].version == 13
    same = at_opset(old, 12)
    assert same is not old
    assert same == old


def test_further_outputs_are_computed(two_layers: onnx.ModelProto) -> None:
    images = np.ones((1, 2, 4, 4), np.float32)
    session = reference_session(two_layers, outputs=["a", "a", "images"], threads=1)
    assert [item.name for item in session.get_outputs()] == ["out", "a"]
    assert np.array_equal(session.run(["a"], {"images": images})[0], np.full((1, 3, 4, 4), 2.0))
    assert len(with_outputs(two_layers, ["b"]).graph.output) == 2


def test_costs_are_the_textbooks(two_layers: onnx.ModelProto) -> None:
    assert shapes_of(two_layers)["v"] == (1, 3, 2, 2)
    first, last = layers_of(two_layers)
    assert first.flops == 2 * 3 * 2 * 16
    assert last.flops == 2 * 3 * 4 * 4
    assert last.values == 3 * 16 + 4
    assert last.weights == 12
    assert macs_per_input(two_layers.graph.node[0], (3, 2, 1, 1)) == 3
    assert macs_per_input(two_layers.graph.node[3], (1, 3, 2, 2)) == 1
    device = Ceilings(100.0, {"fp32": 10.0}, "by hand")
    assert device.seconds(last, 2, "fp32") == (2 * 96 / 10, (2 * 52 + 12) * 4 / 100)
    assert device.seconds(last, 2, "fp8") is None


# --- quantized layers ---------------------------------------------------------------------------


def quantized(op: str = "Conv", shared: bool = False, axis: int = 0) -> onnx.ModelProto:
    """Return a layer whose INT8 weights (3, 2, 1, 1) are dequantized by channel."""
    name = "w_" if shared else "out"
    nodes = [
        helper.make_node("QuantizeLinear", ["images", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["x"]),
        helper.make_node("DequantizeLinear", ["codes", "scales", "zeros"], ["w"], axis=axis),
        helper.make_node(op, ["x", "w"], [name], "layer"),
    ]
    if shared:
        nodes.append(helper.make_node("Conv", ["images", "w"], ["out"], "other"))
    count = (3, 2)[axis]
    return model(
        nodes,
        codes=np.arange(6, dtype=np.int8).reshape(3, 2, 1, 1),
        scales=np.arange(1, count + 1, dtype=np.float32),
        zeros=np.zeros(count, np.int8),
        s=np.array(0.5, np.float32),
        z=np.array(0, np.int8),
    )


def test_a_quantized_layer_tells_its_codes_scales_and_values() -> None:
    (layer,) = quantized_layers(quantized())
    assert (layer.position, layer.input, layer.output, layer.weight) == (3, "x", "out", "codes")
    assert layer.activations is not None
    assert layer.has_own_codes
    assert layer.has_scale_by_output
    assert layer.scale.ravel().tolist() == [1, 2, 3]
    assert layer.weights.values().ravel().tolist() == [0, 1, 4, 6, 12, 15]
    (cost,) = layers_of(quantized())
    assert cost.precision == "int8"


@pytest.mark.parametrize("computed", ["codes", "scales"])
def test_codes_and_scales_that_are_computed_have_no_values(computed: str) -> None:
    changed = quantized()
    at = next(i for i, node in enumerate(changed.graph.node) if computed in node.input)
    for stored in changed.graph.initializer:
        if stored.name == computed:
            stored.name = "stored"
    changed.graph.node.insert(at, helper.make_node("Identity", ["stored"], [computed]))
    (layer,) = quantized_layers(changed)
    assert not layer.has_scale_by_output
    with pytest.raises(ValueError, match=f"'{computed}' (is|are) computed"):
        layer.weights.values()


@pytest.mark.parametrize("zero_points", [(), ("z",), ("z", "z")])
def test_codes_are_of_the_type_that_onnx_runtime_gives_them(zero_points: tuple[str, ...]) -> None:
    """Without a zero point a quantizer writes uint8, and what reads it takes what is there."""
    pair = [
        helper.make_node("QuantizeLinear", ["images", "s", *zero_points[:1]], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", *zero_points[1:]], ["x"]),
        helper.make_node("Conv", ["x", "w"], ["out"]),
    ]
    graph = model(pair, w=WEIGHT, s=np.array(0.5, np.float32), z=np.array(0, np.int8))
    session = reference_session(with_outputs(graph, ["q"]))
    (codes,) = session.run(["q"], {"images": np.zeros((1, 2, 4, 4), np.float32)})
    index = GraphIndex(graph)
    for node in graph.graph.node[:2]:
        assert helper.tensor_dtype_to_np_dtype(quantizer(index, node).type) == codes.dtype
    assert helper.tensor_dtype_to_np_dtype(quantized_type(index, "x") or 0) == codes.dtype


def test_stored_codes_without_a_zero_point_tell_their_type() -> None:
    changed = quantized()
    del changed.graph.node[2].input[2]
    (layer,) = quantized_layers(changed)
    assert layer.weights.type == TensorProto.INT8


def test_scales_along_another_axis_are_not_by_output() -> None:
    (layer,) = quantized_layers(quantized(axis=1))
    assert not layer.has_scale_by_output
    assert layer.scale.shape == (1, 2, 1, 1)


def test_weights_that_two_layers_read_belong_to_neither() -> None:
    layers = quantized_layers(quantized(shared=True))
    assert [layer.has_own_codes for layer in layers] == [False, False]
    assert [layer.activations is None for layer in layers] == [False, True]


def test_a_float_layer_is_not_quantized_whatever_its_tensors_are_called() -> None:
    graph = model(
        [helper.make_node("Conv", ["images", "QuantizeLinear"], ["out"])], QuantizeLinear=WEIGHT
    )
    assert quantized_layers(graph) == ()
    assert not is_quantized(graph.SerializeToString())
    assert is_quantized(quantized().SerializeToString())
