"""Skeletons of graphs: what they keep, what they lose, and the random weights that fill them."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from benchmarks import peers
from benchmarks.skeletons import (
    at_batch,
    constants_as_initializers,
    parameters,
    settled,
    skeleton,
    with_random_weights,
)
from trt_yolov6.errors import MissingDependencyError

LAYERS, WIDTH, SIZE = 40, 24, 16


def deep_graph(batch: int = 1, seed: int = 0) -> onnx.ModelProto:
    """Forty convolutions with SiLU, then rows (batch, positions, width) scaled by a large grid."""
    generator = np.random.default_rng(seed)
    constants: dict[str, NDArray[np.generic]] = {
        "rows": np.array([batch, WIDTH, SIZE * SIZE], np.int64),
        "grid": np.arange(SIZE * SIZE, dtype=np.float32).reshape(1, -1, 1) + 1,
        "projection": np.ones((1, 4, 1, 1), np.float32),
    }
    nodes, source = [], "images"
    for index in range(LAYERS):
        channels = WIDTH if index else 3
        weight = generator.normal(size=(WIDTH, channels, 3, 3)).astype(np.float32)
        constants[f"w{index}"] = weight
        constants[f"b{index}"] = generator.normal(size=WIDTH).astype(np.float32)
        nodes += [
            helper.make_node(
                "Conv", [source, f"w{index}", f"b{index}"], [f"c{index}"], pads=[1, 1, 1, 1]
            ),
            helper.make_node("Sigmoid", [f"c{index}"], [f"s{index}"]),
            helper.make_node("Mul", [f"c{index}", f"s{index}"], [f"a{index}"]),
        ]
        source = f"a{index}"
    nodes += [
        helper.make_node("Reshape", [source, "rows"], ["joined"]),
        helper.make_node("Transpose", ["joined"], ["moved"], perm=[0, 2, 1]),
        helper.make_node("Mul", ["moved", "grid"], ["output"]),
    ]
    graph = helper.make_graph(
        nodes,
        "deep",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, (batch, 3, SIZE, SIZE))],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, (batch, SIZE * SIZE, WIDTH))],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 12)], ir_version=8)


def run(model: onnx.ModelProto, images: NDArray[np.float32]) -> NDArray[np.float32]:
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (output,) = session.run(None, {"images": images})
    return np.asarray(output)


def images_of(batch: int) -> NDArray[np.float32]:
    return np.random.default_rng(7).random((batch, 3, SIZE, SIZE), np.float32)


@pytest.fixture(scope="module")
def bare() -> onnx.ModelProto:
    return skeleton(settled(deep_graph()))


def test_a_skeleton_is_small_and_keeps_what_is_no_weight(bare: onnx.ModelProto) -> None:
    tensors = {tensor.name: tensor for tensor in bare.graph.initializer}
    whole = deep_graph()

    assert bare.ByteSize() < whole.ByteSize() / 20
    assert not tensors["w1"].raw_data
    assert list(tensors["w1"].dims) == [WIDTH, WIDTH, 3, 3]
    np.testing.assert_array_equal(
        numpy_helper.to_array(tensors["grid"]).ravel(), np.arange(SIZE * SIZE) + 1
    )
    assert parameters(bare) == parameters(whole)
    assert parameters(whole) == LAYERS * WIDTH * (WIDTH * 9 + 1) - (WIDTH - 3) * WIDTH * 9


def test_a_filled_skeleton_is_a_model_and_the_seed_decides_its_weights(
    bare: onnx.ModelProto,
) -> None:
    with pytest.raises(onnx.checker.ValidationError):
        onnx.checker.check_model(bare)
    first, again, other = (with_random_weights(bare, seed) for seed in (0, 0, 1))

    onnx.checker.check_model(first)
    assert first == again
    assert first != other


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_signal_crosses_forty_layers_without_vanishing_or_exploding(
    bare: onnx.ModelProto, seed: int
) -> None:
    grid = np.arange(SIZE * SIZE, dtype=np.float32).reshape(1, -1, 1) + 1
    deviation = float((run(with_random_weights(bare, seed), images_of(1)) / grid).std())
    # Weights of unit variance, as the graph came with them, end beyond float32.
    assert not np.isfinite(run(deep_graph(), images_of(1))).all()
    assert 0.05 < deviation < 5


def test_each_layer_of_a_settled_graph_has_outputs_of_unit_variance() -> None:
    graph = settled(deep_graph(), seed=3)
    names = [f"c{index}" for index in range(LAYERS)]
    graph.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = onnxruntime.InferenceSession(
        graph.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    # Another image than the one that it was settled with.
    outputs = session.run(names, {"images": images_of(1)})
    assert all(0.5 < float(output.std()) < 2 for output in outputs)


def test_a_batch_is_computed_as_its_images_are_one_by_one() -> None:
    one = settled(deep_graph(1))
    three = at_batch(one, deep_graph(2, seed=9), 3)
    onnx.checker.check_model(three)
    images = images_of(3)

    assert [axis.dim_value for axis in three.graph.input[0].type.tensor_type.shape.dim] == [
        3, 3, SIZE, SIZE,
    ]  # fmt: skip
    expected = np.concatenate([run(one, images[index : index + 1]) for index in range(3)])
    np.testing.assert_allclose(run(three, images), expected, rtol=1e-4, atol=1e-3)


def test_weights_do_not_depend_on_the_batch() -> None:
    one = settled(deep_graph(1))
    first, second = skeleton(one), skeleton(at_batch(one, deep_graph(2), 4))
    weights = [
        {tensor.name: tensor.raw_data for tensor in with_random_weights(bare).graph.initializer}
        for bare in (first, second)
    ]
    assert weights[0]["w5"] == weights[1]["w5"]


def test_graphs_of_two_networks_are_no_pair() -> None:
    other = deep_graph(2)
    del other.graph.node[-1]
    with pytest.raises(ValueError, match="other nodes"):
        at_batch(deep_graph(1), other, 4)


def test_constant_nodes_become_initializers() -> None:
    value = numpy_helper.from_array(np.ones(3, np.float32))
    nodes = [
        helper.make_node("Constant", [], ["ones"], value=value),
        helper.make_node("Add", ["x", "ones"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (3,)) for name in "xy"]
    graph = helper.make_graph(nodes, "constants", ends[:1], ends[1:])
    model = constants_as_initializers(helper.make_model(graph))
    onnx.checker.check_model(model)
    assert [node.op_type for node in model.graph.node] == ["Add"]
    assert [tensor.name for tensor in model.graph.initializer] == ["ones"]


def test_a_peer_whose_package_is_absent_says_what_to_install() -> None:
    with pytest.raises(MissingDependencyError, match="pip install yolox"):
        peers.skeletons(peers.PEERS["yolox-s"], [1])


def test_the_command_line_refuses_an_unknown_peer(
    tmp_path: object, capsys: pytest.CaptureFixture[str]
) -> None:
    assert peers.main(["--output", str(tmp_path), "yolov9"]) == 2
    assert "there is no 'yolov9'" in capsys.readouterr().err
