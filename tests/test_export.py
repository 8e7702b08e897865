"""The exported graph computes what the PyTorch model computes, with no node too many."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from support.networks import FOUR_LEVELS, KINDS, ONE, TINY, random_model

from trt_yolov6.data.letterbox import fit
from trt_yolov6.detectors.detections import Detections, postprocess
from trt_yolov6.errors import UserError
from trt_yolov6.graph.export import ExportSettings, export_onnx
from trt_yolov6.models import VARIANTS, Architecture, YOLOv6, architecture
from trt_yolov6.models.head import HeadLevel
from trt_yolov6.spec import BatchProfile, NmsSettings


@functools.cache
def exported(kind: str, settings: ExportSettings) -> onnx.ModelProto:
    """A network of KINDS as a graph, which is not to be changed: tracing takes seconds."""
    return export_onnx(random_model(KINDS[kind]), settings)


def pixels(batch: int, height: int = 64, width: int = 96) -> NDArray[np.uint8]:
    return np.random.default_rng(1).integers(0, 256, (batch, height, width, 3), dtype=np.uint8)


def planar(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    result: NDArray[np.float32] = images.transpose(0, 3, 1, 2).astype(np.float32) / 255
    return np.ascontiguousarray(result)


def run(model: onnx.ModelProto, images: NDArray[Any]) -> list[NDArray[Any]]:
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    outputs: list[NDArray[Any]] = session.run(None, {"images": images})
    return outputs


def assert_outputs_equal_pytorch(
    model: YOLOv6, settings: ExportSettings | None = None
) -> onnx.ModelProto:
    settings = settings or ExportSettings((64, 96), ONE)
    images = planar(pixels(1, *settings.size_for(model.arch)))
    graph = export_onnx(model, settings, verify=False)
    boxes, scores = run(graph, images)
    with torch.inference_mode():
        wanted_boxes, wanted_scores = model(torch.from_numpy(images))
    scale = float(wanted_boxes.abs().max())
    np.testing.assert_allclose(boxes / scale, wanted_boxes.mT.numpy() / scale, atol=2e-5)
    np.testing.assert_allclose(scores, wanted_scores.mT.numpy(), atol=2e-5)
    return graph


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_equal_pytorch_for_every_kind_of_network(kind: str) -> None:
    for batch in (BatchProfile(), ONE):  # with a free batch axis, and with one that is fixed
        assert_outputs_equal_pytorch(random_model(KINDS[kind]), ExportSettings((64, 96), batch))


def kinds_of_layers(arch: Architecture) -> Architecture:
    """An architecture with the kinds of layers of another, whatever their numbers."""
    alike = dataclasses.replace(arch, name="", num_classes=1, stage_channels=(), neck_channels=())
    return dataclasses.replace(
        alike,
        stage_repeats=(),
        neck_repeats=(),
        csp_ratio=arch.csp_ratio and 0.5,
        reg_max=arch.reg_max and 16,
    )


def test_every_variant_is_of_one_of_these_kinds() -> None:
    kinds = {kinds_of_layers(arch) for arch in KINDS.values()}
    names = [name for name, variant in VARIANTS.items() if variant.neck == "pan"]
    assert len(names) > 5
    for name in names:
        assert kinds_of_layers(architecture(name)) in kinds, name


def test_a_network_that_is_traced_once_is_what_its_own_trace_gives(
    traced_once: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Biases of zeros and equal ones, as before any training.
    torch.manual_seed(0)
    model = YOLOv6(KINDS["plain"])
    found = export_onnx(model, verify=False)
    monkeypatch.setattr(torch.onnx, "export", traced_once)
    assert export_onnx(model, verify=False) == found


PLAIN_OPERATORS = {
    "Conv", "ConvTranspose", "Relu", "Sigmoid", "Mul", "MaxPool", "Concat", "Reshape", "Add",
    "Transpose",
}  # fmt: skip
DFL_OPERATORS = {"Clip", "Exp", "MatMul", "Split", "Div"}
LATER_KINDS = {
    "four levels": (FOUR_LEVELS, {"LeakyRelu"}),
    "mbla": (
        dataclasses.replace(
            TINY,
            neck="bifusion",
            block="conv",
            activation="silu",
            csp_ratio=0.5,
            mbla=True,
            stage_repeats=(1, 1, 2, 1),
            reg_max=16,
        ),
        {"Split", *DFL_OPERATORS},
    ),
    "lite": (
        dataclasses.replace(
            architecture("yolov6lite_s", num_classes=5),
            stage_channels=(8, 16, 16, 24, 32),
            neck_channels=(16,),
            stage_repeats=(1, 2, 1, 1),
        ),
        {"Split", "HardSwish", "HardSigmoid", "GlobalAveragePool", "Resize"},
    ),
}


@pytest.mark.parametrize("kind", LATER_KINDS)
def test_later_releases_outputs_equal_pytorch_without_shape_arithmetic(kind: str) -> None:
    arch, operators = LATER_KINDS[kind]
    size = (64, 128) if arch.size_multiple == 64 else (64, 96)
    # A free batch axis, and only what opset 17 knows: the graph is checked against it.
    settings = ExportSettings(size, BatchProfile(1, 4, 8), opset=17)
    graph = assert_outputs_equal_pytorch(random_model(arch), settings).graph
    assert {node.op_type for node in graph.node} <= PLAIN_OPERATORS | operators
    height, width = size
    anchors = sum(-(-height // stride) * -(-width // stride) for stride in arch.strides)
    assert graph.output[0].type.tensor_type.shape.dim[1].dim_value == anchors


def test_distances_are_pytorchs_softmax_whatever_the_size_of_the_logits() -> None:
    model = random_model(KINDS["csp, dfl"])
    for level, size in zip(model.head.levels, (1, 20, 75), strict=True):
        assert isinstance(level, HeadLevel)
        assert level.reg_pred.bias is not None
        torch.nn.init.uniform_(level.reg_pred.bias, -size, size)
    assert_outputs_equal_pytorch(model)


def test_a_free_batch_axis_takes_any_batch_and_each_image_stands_alone() -> None:
    graph = exported("plain", ExportSettings((64, 96)))
    for batch in (1, 3, 7):
        images = planar(pixels(batch))
        together = run(graph, images)
        for index in range(batch):
            alone = run(graph, images[index : index + 1])
            for joint, single in zip(together, alone, strict=True):
                np.testing.assert_allclose(joint[index], single[0], atol=1e-4)


@pytest.mark.parametrize("batch", [BatchProfile(2, 2, 2), BatchProfile()])
@pytest.mark.parametrize("kind", ["plain", "csp, dfl"])
def test_the_graph_has_no_shape_arithmetic_and_no_constant_column(
    batch: BatchProfile, kind: str
) -> None:
    graph = exported(kind, ExportSettings((64, 96), batch)).graph
    kinds = Counter(node.op_type for node in graph.node)
    dfl = DFL_OPERATORS if KINDS[kind].reg_max else set()
    assert set(kinds) <= dfl | PLAIN_OPERATORS
    assert [output.name for output in graph.output] == ["boxes", "scores"]


def test_each_network_has_its_own_size_and_multiple() -> None:
    for name, side in (("yolov6n", 640), ("yolov6n6", 1280), ("yolov6lite_s", 320)):
        assert ExportSettings().size_for(architecture(name)) == (side, side)
    for name in ("yolov6n", "yolov6lite_s"):
        assert ExportSettings((96, 160)).size_for(architecture(name)) == (96, 160)
    with pytest.raises(UserError, match=r"96x160 is not a multiple of 64.*give 128x192"):
        ExportSettings((96, 160)).size_for(architecture("yolov6n6"))


def test_n_takes_no_more_nodes_than_its_layers_and_a_decoding_of_sixteen() -> None:
    # The sample's, which is traced anyway.
    model = YOLOv6(architecture("yolov6n", num_classes=3))
    graph = export_onnx(model, ExportSettings((64, 96)), verify=False).graph
    kinds = Counter(node.op_type for node in graph.node)
    # Counted on paper: 20 backbone, 21 neck and 15 head convolutions; 41 ReLU; 9 SiLU of two nodes;
    # 3 pools and their concatenation; 2 upsamplings; 4 concatenations of the neck.
    layers = (20 + 21 + 15) + 41 + 9 * 2 + 3 + 1 + 2 + 4
    # For each of six maps channels last and flattened; two concatenations, the sigmoid and the
    # addition of anchors.
    assert len(graph.node) == layers + 6 * 2 + 2 + 1 + 1
    assert kinds["Reshape"] == 6
    assert kinds["Add"] == 1


def test_uint8_input_gives_what_normalized_floats_give() -> None:
    images = pixels(2)
    floats = run(exported("plain", ExportSettings((64, 96))), planar(images))
    bytes_in = run(exported("plain", ExportSettings((64, 96), uint8_input=True)), images)
    for wanted, got in zip(floats, bytes_in, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-4)


def test_a_free_batch_axis_is_free_in_half_precision_too() -> None:
    graph = exported("plain", ExportSettings((64, 96), fp16=True)).graph
    first = [value.type.tensor_type.shape.dim[0] for value in (*graph.input, *graph.output)]
    assert [axis.dim_param for axis in first] == ["batch"] * 3


def test_half_precision_keeps_input_and_coordinates_in_float32() -> None:
    images = planar(pixels(1))
    single = run(exported("plain", ExportSettings((64, 96))), images)
    graph = exported("plain", ExportSettings((64, 96), ONE, fp16=True))
    half = run(graph, images)
    assert [array.dtype for array in half] == [np.float32, np.float16]
    weights = [item for item in graph.graph.initializer if len(item.dims) == 4]
    assert {item.data_type for item in weights} == {onnx.TensorProto.FLOAT16}
    anchors = next(item for item in graph.graph.initializer if item.name == "anchor_points")
    assert anchors.data_type == onnx.TensorProto.FLOAT
    # One cast in, one before the coordinates.
    assert sum(node.op_type == "Cast" for node in graph.graph.node) == 2
    for wanted, got in zip(single, half, strict=True):
        scale = max(1.0, float(np.abs(wanted).max()))
        np.testing.assert_allclose(got / scale, wanted / scale, atol=1e-2)


@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize("kind", ["csp, dfl", "v0.1"])
def test_nms_in_the_graph_gives_what_nms_on_the_host_gives(fp16: bool, kind: str) -> None:
    images = planar(pixels(2))
    # No limit: where scores tie, which of them are within it is open.
    nms = NmsSettings(confidence=0.3, iou=0.5, max_detections=2000)
    plain = exported(kind, ExportSettings((64, 96), fp16=fp16))
    inside = exported(kind, ExportSettings((64, 96), fp16=fp16, nms=nms))
    assert [item.name for item in inside.graph.output] == ["detections"]
    placed = [fit((64, 96), (64, 96))] * 2
    boxes, scores = run(plain, images)
    host = postprocess({"boxes": boxes, "scores": scores}, "split", nms, placed, clip=False)
    found = run(inside, images)[0]
    graph = postprocess({"detections": found}, "end2end", nms, placed, clip=False)
    assert sum(len(found) for found in host) > 10
    for wanted, got in zip(host, graph, strict=True):
        if not fp16:
            assert sorted(got.class_id) == sorted(wanted.class_id)
            order = [np.lexsort((*one.xyxy.T.round(2), one.class_id)) for one in (wanted, got)]
            np.testing.assert_allclose(got.xyxy[order[1]], wanted.xyxy[order[0]], atol=0.2)
            np.testing.assert_allclose(
                got.confidence[order[1]], wanted.confidence[order[0]], atol=1e-3
            )
        # Half-precision scores tie, and which of two boxes goes first is then open. But what one
        # keeps the other keeps as well, or a box of the class, no worse, that overlaps it.
        assert_covers(got, wanted, nms.iou)
        assert_covers(wanted, got, nms.iou)


def assert_covers(kept: Detections, others: Detections, iou: float) -> None:
    for box, score, label in zip(others.xyxy, others.confidence, others.class_id, strict=True):
        rivals = (kept.class_id == label) & (kept.confidence >= score - 1e-3)
        assert overlaps(box, kept.xyxy[rivals]).max(initial=0) > min(iou, 0.999) - 1e-3


def overlaps(box: NDArray[np.float32], boxes: NDArray[np.float32]) -> NDArray[np.float64]:
    """IoU of a box with each of several."""
    one, many = box.astype(np.float64), boxes.astype(np.float64)
    shared = np.minimum(one[2:], many[:, 2:]) - np.maximum(one[:2], many[:, :2])
    inner = np.clip(shared, 0, None).prod(axis=1)
    areas = (many[:, 2:] - many[:, :2]).prod(axis=1)
    result: NDArray[np.float64] = inner / ((one[2:] - one[:2]).prod() + areas - inner)
    return result


@pytest.mark.parametrize("opset", [17, 18, 20])
def test_the_opset_is_the_one_asked_for(opset: int) -> None:
    graph = export_onnx(random_model(), ExportSettings((64, 64), ONE, opset=opset))
    assert [(item.domain, item.version) for item in graph.opset_import] == [("", opset)]


def test_the_file_names_its_model_and_classes() -> None:
    names = ["a", "b", "c", "d", "e"]
    graph = export_onnx(random_model(), ExportSettings((64, 64), ONE), names)
    metadata = {item.key: item.value for item in graph.metadata_props}
    assert metadata["model"] == TINY.name
    assert metadata["names"] == '["a", "b", "c", "d", "e"]'


def test_nodes_are_named_after_their_modules() -> None:
    graph = export_onnx(random_model(), ExportSettings((64, 64), ONE), verify=False).graph
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)
    assert {"backbone.stem.conv", "head.levels.0.cls_pred", "decode/boxes"} <= set(names)


def test_exporting_leaves_the_model_as_it_was() -> None:
    model = random_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    export_onnx(model, ExportSettings((64, 64), ONE), verify=False)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("size", [(100, 640), (640, 0), (639, 639)])
def test_a_size_that_is_no_multiple_of_32_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(UserError, match="multiple of 32"):
        ExportSettings(image_size=size)


def test_an_opset_out_of_range_is_refused() -> None:
    with pytest.raises(UserError, match="`opset` 12"):
        ExportSettings(opset=12)
