"""`inspect`, against hand-made graphs, PyTorch's FLOP counter and others' files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from trt_yolov6.checkpoints.inspect import CheckpointDetails
from trt_yolov6.common.files import sha256_file
from trt_yolov6.detectors.spec import DetectorSpec
from trt_yolov6.diagnostics.inspection import inspect_file
from trt_yolov6.diagnostics.inspection_text import format_inspection
from trt_yolov6.engines.manifest import Manifest, write_manifest
from trt_yolov6.engines.tensorrt.plan import PlanDetails
from trt_yolov6.errors import UserError
from trt_yolov6.graph.inspect import OnnxDetails
from trt_yolov6.spec import BatchProfile

SAMPLE = Path(__file__).parents[1] / "samples" / "yolov6n_bccd_authors.pt"


def graph(batch: int | str = "batch", size: int | str = 16) -> onnx.ModelProto:
    """Return a graph with every kind of layer that is counted, and weights by a known seed.

    Conv 3->8, 3x3, stride 2; depthwise Conv 8, 3x3; ConvTranspose 8->4, 2x2, stride 2; MatMul with
    16 columns on the last axis; Gemm on what is left after pooling.
    """
    generator = np.random.default_rng(3)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array(generator.standard_normal(shape).astype(np.float32), name)

    nodes = [
        helper.make_node(
            "Conv", ["images", "w1", "b1"], ["c1"], name="stem", strides=[2, 2], pads=[1] * 4
        ),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], name="depthwise", group=8, pads=[1] * 4),
        helper.make_node("ConvTranspose", ["c2", "w3"], ["c3"], name="up", strides=[2, 2]),
        helper.make_node("MatMul", ["c3", "w4"], ["c4"], name="project"),
        helper.make_node("GlobalAveragePool", ["c4"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w5", "b5"], ["scores"], name="classify", transB=1),
    ]
    width = size if isinstance(size, int) else 16
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "layers",
            [helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, 3, size, size])],
            [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [batch, 5])],
            [
                *(weight("w1", 8, 3, 3, 3), weight("b1", 8), weight("w2", 8, 1, 3, 3)),
                *(weight("w3", 8, 4, 2, 2), weight("w4", width, 16)),
                *(weight("w5", 5, 4), weight("b5", 5)),
            ],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=9,
        producer_name="a test",
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def saved(model: onnx.ModelProto, path: Path) -> Path:
    onnx.save(model, path)
    return path


def details_of(model: onnx.ModelProto, folder: Path) -> OnnxDetails:
    details = inspect_file(saved(model, folder / "graph.onnx")).details
    assert isinstance(details, OnnxDetails)
    return details


def test_flops_are_those_that_pytorch_counts_for_the_same_layers(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from torch.nn import functional as F
    from torch.utils.flop_counter import FlopCounterMode

    model = graph()
    weights = {
        item.name: torch.from_numpy(numpy_helper.to_array(item).copy())
        for item in model.graph.initializer
    }
    with FlopCounterMode(display=False) as counter:
        x = F.conv2d(torch.zeros(1, 3, 16, 16), weights["w1"], stride=2, padding=1)
        x = F.conv2d(x, weights["w2"], padding=1, groups=8)
        x = F.conv_transpose2d(x, weights["w3"], stride=2)
        x = x @ weights["w4"]
        F.linear(x.mean((2, 3)), weights["w5"])
    assert details_of(model, tmp_path).flops == counter.get_total_flops()


def test_each_layers_flops_are_two_a_multiplication(tmp_path: Path) -> None:
    layers = {layer.name: layer for layer in details_of(graph(), tmp_path).layers}
    assert {name: layer.flops for name, layer in layers.items()} == {
        "stem": 2 * 8 * 8 * 8 * 27,
        "depthwise": 2 * 8 * 8 * 8 * 9,
        "up": 2 * 8 * 8 * 8 * 4 * 4,
        "project": 2 * 4 * 16 * 16 * 16,
        "classify": 2 * 4 * 5,
    }
    # The paper counts a transposed convolution at each output position: four times as much here.
    assert layers["up"].paper_flops == 4 * 2 * 8 * 8 * 8 * 4 * 4
    assert layers["stem"].paper_flops == layers["stem"].flops
    stem, depthwise = layers["stem"], layers["depthwise"]
    assert (stem.kernel, stem.strides, stem.groups) == ((3, 3), (2, 2), 1)
    assert (depthwise.weight_shape, depthwise.groups) == ((8, 1, 3, 3), 8)


@pytest.mark.parametrize("batch", [1, 7, "n"])
def test_flops_are_of_one_image_whatever_the_batch(tmp_path: Path, batch: int | str) -> None:
    assert details_of(graph(batch), tmp_path).flops == details_of(graph(), tmp_path).flops


def test_flops_of_a_graph_that_leaves_the_image_size_open_are_unknown(tmp_path: Path) -> None:
    details = details_of(graph(size="side"), tmp_path)
    assert details.flops is None
    assert details.inputs[0].shape == ("batch", 3, "side", "side")
    assert "leaves the image size" in format_inspection(inspect_file(tmp_path / "graph.onnx"))


def test_a_graphs_contents_are_counted(tmp_path: Path) -> None:
    details = details_of(graph(), tmp_path)
    assert details.opsets == {"ai.onnx": 17}
    assert details.producer == "a test"
    assert str(details.inputs[0]) == "images float32 (batch, 3, 16, 16)"
    assert str(details.outputs[0]) == "scores float32 (batch, 5)"
    assert details.operators["Conv"] == 2
    assert sum(details.operators.values()) == 8
    elements = 8 * 27 + 8 + 72 + 8 * 16 + 256 + 20 + 5
    assert details.parameters == elements
    assert dataclasses.astuple(details.storage["float32"]) == (7, elements, 4 * elements)
    assert details.precisions == {"fp32": 5}


def test_nodes_in_subgraphs_are_counted_too(tmp_path: Path) -> None:
    def branch(operator: str) -> onnx.GraphProto:
        out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
        return helper.make_graph([helper.make_node(operator, ["x"], ["y"])], operator, [], [out])

    model = helper.make_model(
        helper.make_graph(
            [
                helper.make_node(
                    "If", ["c"], ["z"], then_branch=branch("Abs"), else_branch=branch("Neg")
                )
            ],
            "choice",
            [
                helper.make_tensor_value_info("c", TensorProto.BOOL, []),
                helper.make_tensor_value_info("x", TensorProto.FLOAT, [1]),
            ],
            [helper.make_tensor_value_info("z", TensorProto.FLOAT, [1])],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=9,
    )
    assert details_of(model, tmp_path).operators == {"If": 1, "Abs": 1, "Neg": 1}


@pytest.mark.parametrize("activations", ["QInt8", "QUInt8"])
def test_a_graph_that_onnx_runtime_quantized_shows_its_int8_layers(
    tmp_path: Path, activations: str
) -> None:
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            generator = np.random.default_rng(0)
            self._left: list[NDArray[Any]] = [
                generator.random((1, 3, 16, 16), dtype=np.float32) for _ in range(2)
            ]

        def get_next(self) -> dict[str, NDArray[Any]] | None:
            return {"images": self._left.pop()} if self._left else None

    float_path, path = saved(graph(), tmp_path / "float.onnx"), tmp_path / "int8.onnx"
    quantization.quantize_static(
        float_path,
        path,
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        op_types_to_quantize=["Conv"],
        activation_type=quantization.QuantType[activations],
        per_channel=True,
    )
    details = inspect_file(path).details
    assert isinstance(details, OnnxDetails)
    operators = [node.op_type for node in onnx.load(path).graph.node]
    assert details.quantize_nodes == operators.count("QuantizeLinear") > 0
    assert details.dequantize_nodes == operators.count("DequantizeLinear") > 0
    assert details.precisions == {"fp32": 3, "int8": 2}
    assert {layer.name for layer in details.layers if layer.precision == "int8"} == {
        "stem",
        "depthwise",
    }
    # Quantizing changes neither the layers nor their work.
    before = inspect_file(float_path).details
    assert isinstance(before, OnnxDetails)
    assert (details.flops, details.parameters) == (before.flops, before.parameters)
    assert "int8" in details.storage
    assert "Q/DQ" in format_inspection(inspect_file(path))


def test_a_half_precision_graph_shows_its_fp16_layers(tmp_path: Path) -> None:
    from trt_yolov6.graph.float16 import to_fp16

    details = details_of(to_fp16(graph()), tmp_path)
    assert details.precisions == {"fp16": 5}
    assert details.inputs[0].dtype == "float32"
    assert details.storage["float16"].bytes == 2 * details.parameters


def test_layers_are_listed_when_asked_for(tmp_path: Path) -> None:
    inspection = inspect_file(saved(graph(), tmp_path / "graph.onnx"))
    lines = format_inspection(inspection, layers=True).splitlines()
    stem = next(line.split() for line in lines if line.strip().startswith("stem"))
    assert stem == ["stem", "Conv", "8x3x3x3", "2x2", "1", "fp32", "0.0"]
    assert len(lines) == len(format_inspection(inspection).splitlines()) + 1 + 1 + 5


def test_a_checkpoint_and_the_graph_exported_from_it_agree(tmp_path: Path) -> None:
    from trt_yolov6.checkpoints.loading import load_checkpoint
    from trt_yolov6.graph.export import ExportSettings, export_onnx

    checkpoint = inspect_file(SAMPLE)
    details = checkpoint.details
    assert isinstance(details, CheckpointDetails)
    loaded = load_checkpoint(SAMPLE)
    model = export_onnx(
        loaded.model, ExportSettings(batch=BatchProfile(1, 1, 1)), loaded.class_names
    )
    exported = details_of(model, tmp_path)
    assert exported.parameters == details.fused_parameters
    assert exported.paper_flops == details.fused_flops
    assert exported.flops is not None
    assert 0.99 < exported.flops / details.fused_flops < 0.995


def test_a_checkpoint_says_what_network_it_holds() -> None:
    inspection = inspect_file(SAMPLE)
    details = inspection.details
    assert isinstance(details, CheckpointDetails)
    assert details.architecture == "yolov6n"
    assert details.release == "0.2"
    assert details.form == "training"
    assert details.class_names == ("RBC", "WBC", "Platelets")
    assert details.batch_norm_eps == (0.001,)
    assert details.parameters > details.fused_parameters
    text = format_inspection(inspection)
    assert "RBC, WBC, Platelets" in text
    assert "checkpoint of release 0.2: yolov6n, training form" in text
    assert "3: RBC" in text
    assert json.loads(json.dumps(inspection.to_json()))["sha256"] == sha256_file(SAMPLE)


def manifest_for(path: Path) -> Manifest:
    return Manifest(
        engine=path.name,
        model="yolov6n",
        detector=DetectorSpec(("cell",), (640, 640)),
        batch=BatchProfile(1, 8, 32),
        precision="fp32",
        backend="onnxruntime",
        backend_version="1.0",
        target="cpu",
        plan_sha256=sha256_file(path),
        source="yolov6n.pt",
        source_sha256="0" * 64,
    )


def test_an_engines_manifest_is_shown_and_held_against_the_file(tmp_path: Path) -> None:
    path = saved(graph(), tmp_path / "engine.onnx")
    assert inspect_file(path).matches_manifest is None
    write_manifest(path, manifest_for(path))
    inspection = inspect_file(path)
    assert inspection.matches_manifest is True
    assert "1 to 32, tuned for 8" in format_inspection(inspection)
    assert inspection.to_json()["manifest"]["model"] == "yolov6n"
    saved(graph(batch=1), path)
    inspection = inspect_file(path)
    assert inspection.matches_manifest is False
    assert "ANOTHER file" in format_inspection(inspection)


def test_a_calibration_is_told_in_words_without_its_trials(tmp_path: Path) -> None:
    path = saved(graph(), tmp_path / "engine.onnx")
    calibration = {
        "calibrator": "margin",
        "biases_corrected": True,
        "tuned_by_gradients": False,
        "images": 32,
        "images_sha256": "0" * 64,
        "agreement_interval": [0.92, 0.95],
        "judged_on": {"images": 16, "held_out": True},
        "budget": {"max_ap_drop": 0.0, "max_slowdown": 0.05},
        "tried": [{"decides": "graph"}, {"decides": "ranges"}],
    }
    write_manifest(path, dataclasses.replace(manifest_for(path), calibration=calibration))
    inspection = inspect_file(path)
    rows = dict(line.split(maxsplit=1) for line in format_inspection(inspection).splitlines())
    assert rows["calibration"] == (
        "calibrator margin, biases corrected, images 32, agreement interval 0.92 to 0.95, "
        "judged on images 16, held out, budget max ap drop 0.0, max slowdown 0.05, "
        "2 ways tried (--json lists them)"
    )
    assert inspection.to_json()["manifest"]["calibration"] == calibration


def test_a_plan_names_the_tensorrt_that_built_it(tmp_path: Path) -> None:
    tensorrt_rtx: Any = pytest.importorskip("tensorrt_rtx")
    if not hasattr(tensorrt_rtx.ComputeCapability, "SM75"):
        pytest.skip("this TensorRT-RTX does not build for a T4")
    builder = tensorrt_rtx.Builder(tensorrt_rtx.Logger(tensorrt_rtx.Logger.ERROR))
    network = builder.create_network(0)
    image = network.add_input("images", tensorrt_rtx.float32, (1, 3, 8, 8))
    relu = network.add_activation(image, tensorrt_rtx.ActivationType.RELU)
    network.mark_output(relu.get_output(0))
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(tensorrt_rtx.ComputeCapability.SM75, 0)
    path = tmp_path / "relu.trt"
    path.write_bytes(bytes(builder.build_serialized_network(network, config)))
    details = inspect_file(path).details
    assert isinstance(details, PlanDetails)
    assert details.flavour == "TensorRT-RTX"
    assert details.version == tensorrt_rtx.__version__
    # Either it opens, on the right GPU, or one line says why not.
    assert bool(details.layers) != bool(details.note)
    assert "\n" not in details.note


def test_the_header_of_a_tensorrt_plan_is_read_as_trtexec_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "model.plan"
    path.write_bytes(b"ftrt" + bytes(20) + bytes([10, 13, 2, 6]) + bytes(100))
    details = inspect_file(path).details
    assert isinstance(details, PlanDetails)
    assert (details.flavour, details.version) == ("TensorRT", "10.13.2.6")
    assert details.layers == ()
    assert details.note


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.onnx", b""),
        ("text.onnx", b"these are words, not a graph"),
        ("empty.pt", b""),
        ("text.pt", b"these are words, not weights"),
        ("empty.trt", b""),
        ("text.trt", b"these are words, not a plan of TensorRT"),
        ("short.trt", b"vtrt\x00\x00"),
        ("notes.txt", b"these are words"),
    ],
)
def test_other_files_are_refused_in_one_sentence_that_names_them(
    tmp_path: Path, name: str, content: bytes
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as raised:
        inspect_file(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        inspect_file(tmp_path / "missing.onnx")
    with pytest.raises(UserError, match="is a folder"):
        inspect_file(tmp_path)


def test_a_graph_cut_short_is_refused(tmp_path: Path) -> None:
    path = saved(graph(), tmp_path / "graph.onnx")
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(UserError, match=r"graph\.onnx"):
        inspect_file(path)


def test_a_layer_behind_what_only_moves_quantized_values_is_int8(tmp_path: Path) -> None:
    def pair(name: str, nodes: list[onnx.NodeProto]) -> str:
        nodes += [
            helper.make_node("QuantizeLinear", [name, "scale", "zero"], [f"{name}_q"]),
            helper.make_node("DequantizeLinear", [f"{name}_q", "scale", "zero"], [f"{name}_dq"]),
        ]
        return f"{name}_dq"

    def model(second: str) -> onnx.ModelProto:
        nodes: list[onnx.NodeProto] = []
        parts = [pair("x", nodes), pair("y", nodes) if second == "pair" else "y"]
        nodes += [
            helper.make_node("Concat", parts, ["joined"], axis=1),
            helper.make_node("MaxPool", ["joined"], ["pooled"], kernel_shape=[1, 1]),
            helper.make_node("DequantizeLinear", ["weights", "scale", "zero"], ["w"]),
            helper.make_node("Conv", ["pooled", "w"], ["out"], name="layer"),
        ]
        return helper.make_model(
            helper.make_graph(
                nodes,
                "joined",
                [
                    helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, 1, 4, 4))
                    for name in "xy"
                ],
                [helper.make_tensor_value_info("out", TensorProto.FLOAT, (1, 1, 4, 4))],
                [
                    numpy_helper.from_array(np.float32(0.1), "scale"),
                    numpy_helper.from_array(np.int8(0), "zero"),
                    numpy_helper.from_array(np.ones((1, 2, 1, 1), np.int8), "weights"),
                ],
            ),
            opset_imports=[helper.make_opsetid("", 17)],
            ir_version=9,
        )

    assert details_of(model("pair"), tmp_path).precisions == {"int8": 1}
    assert details_of(model("float"), tmp_path).precisions == {"fp32": 1}
