"""ONNX files as tools leave them: weights elsewhere, nodes out of order, outputs to spare."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from support import family_graphs
from support.small_graphs import SIZE, GraphWriter, detector, random_images

from trt_yolov6.detectors.metadata import nms_in
from trt_yolov6.engines import load_engine
from trt_yolov6.engines.build import build_engine
from trt_yolov6.errors import UserError
from trt_yolov6.graph.editing import set_nodes
from trt_yolov6.graph.files import graph_precision, has_other_files, read_onnx, sort_nodes
from trt_yolov6.graph.float16 import to_fp16
from trt_yolov6.graph.onnx_import import graph_from_onnx
from trt_yolov6.quantization.qdq.symmetric import with_symmetric_int8
from trt_yolov6.spec import BatchProfile, NmsSettings


def run(model: onnx.ModelProto, image: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    """Return the outputs, Q/DQ computed exactly."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    outputs: list[np.ndarray[Any, Any]] = session.run(None, {session.get_inputs()[0].name: image})
    return outputs


def save(model: onnx.ModelProto, path: Path, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path, **options)
    return path


def external(folder: Path) -> Path:
    options = {"save_as_external_data": True, "location": "d.onnx.data", "size_threshold": 0}
    return save(detector(), folder / "d.onnx", **options)


def test_weights_beside_the_model_end_up_in_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = external(tmp_path / "in")
    monkeypatch.chdir(tmp_path)
    for fp16 in (False, True):
        graph = graph_from_onnx("in/d.onnx", fp16=fp16)
        built = build_engine(graph, backend="onnxruntime", output=tmp_path / f"{fp16}" / "e.onnx")
        monkeypatch.chdir(path.parent)  # from whichever folder
        with load_engine(built.path) as engine:
            found = engine.infer(random_images(1)[0])
        expected = run(detector(), random_images(1)[0])
        np.testing.assert_allclose(found["boxes"], expected[0], atol=0.01 if fp16 else 1e-5)
        monkeypatch.chdir(tmp_path)


def test_an_engine_without_a_manifest_reads_its_weights_from_its_folder(tmp_path: Path) -> None:
    with load_engine(external(tmp_path)) as engine:
        found = engine.infer(random_images(1)[0])
        assert engine.layer_times(random_images(1)[0], runs=1)
    np.testing.assert_allclose(found["boxes"], run(detector(), random_images(1)[0])[0], atol=1e-5)


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_weights_that_are_missing_or_cut_short_are_named(tmp_path: Path, damage: str) -> None:
    path = external(tmp_path)
    weights = tmp_path / "d.onnx.data"
    if damage == "missing":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:-8])
    for read in (read_onnx, load_engine):
        with pytest.raises(UserError, match=r"d\.onnx\.data") as error:
            read(path)
        assert "\n" not in str(error.value)


def test_weights_that_are_a_link_are_refused_as_one(tmp_path: Path) -> None:
    path = external(tmp_path)
    weights = tmp_path / "d.onnx.data"
    weights.rename(tmp_path / "blob")
    weights.symlink_to(tmp_path / "blob")  # as Hugging Face's cache has it
    with pytest.raises(
        UserError, match=r"cannot be read from its folder \(it is a symbolic link\)"
    ):
        read_onnx(path)


def test_weights_elsewhere_are_not_read(tmp_path: Path) -> None:
    path = external(tmp_path)
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for item in tensor.external_data:
            if item.key == "location":
                item.value = "../../etc/passwd"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match="cannot be read from its folder"):
        read_onnx(path)


def test_nodes_out_of_order_are_sorted_and_built(tmp_path: Path) -> None:
    model = detector()
    expected = run(model, random_images(1)[0])
    nodes = [type(node).FromString(node.SerializeToString()) for node in model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(reversed(nodes))
    graph = graph_from_onnx(save(model, tmp_path / "r.onnx"))
    for given, wanted in zip(run(graph.model, random_images(1)[0]), expected, strict=True):
        np.testing.assert_array_equal(given, wanted)
    # In order already: nothing moves.
    before = detector().SerializeToString()
    again = onnx.load_from_string(before)
    assert not sort_nodes(again)
    assert again.SerializeToString() == before


def with_functions(model: onnx.ModelProto, operator: str) -> onnx.ModelProto:
    """Make a function of each node of an operator, as some exporters do of each module."""
    (opset,) = model.opset_import
    for index, node in enumerate(model.graph.node):
        if node.op_type == operator:
            inner = onnx.NodeProto.FromString(node.SerializeToString())
            inner.input[:] = [f"x{place}" for place in range(len(node.input))]
            inner.output[:] = ["y"]
            name = f"Own{index}"
            model.functions.append(
                helper.make_function("own", name, inner.input, inner.output, [inner], [opset])
            )
            node.CopyFrom(helper.make_node(name, node.input, node.output, domain="own"))
    model.opset_import.append(helper.make_opsetid("own", 1))
    return model


@pytest.mark.parametrize("opset", [17, 13])
def test_functions_of_the_file_s_own_are_put_in_place(opset: int, tmp_path: Path) -> None:
    # A convolution is the same in both opsets.
    model = with_functions(detector(), "Conv")
    for function in model.functions:
        function.opset_import[0].version = opset
    path = save(model, tmp_path / "functions.onnx")
    for fp16 in (False, True):
        own, plain = (
            graph_from_onnx(one, fp16=fp16).model
            for one in (path, save(detector(), tmp_path / "plain.onnx"))
        )
        assert sorted(n.op_type for n in own.graph.node) == sorted(
            n.op_type for n in plain.graph.node
        )
        for given, wanted in zip(*(run(m, random_images(1)[0]) for m in (own, plain)), strict=True):
            np.testing.assert_array_equal(given, wanted)


def test_functions_of_operators_that_another_opset_changed_are_refused(tmp_path: Path) -> None:
    model = with_functions(detector(), "Conv")
    model.functions[0].opset_import[0].version = 22
    with pytest.raises(UserError, match=r"function op Conv *is not compatible"):
        read_onnx(save(model, tmp_path / "other.onnx"))


def test_what_is_in_functions_is_recognized_in_an_engine_too(tmp_path: Path) -> None:
    # Recognition goes by what comes after the last convolutions: in YOLOX's own export, nothing.
    path = save(with_functions(family_graphs.yolox(), "Conv"), tmp_path / "yolox.onnx")
    with load_engine(path) as engine:
        assert engine.output_layout == graph_from_onnx(path).detector.output_layout == "grid_rows"


def test_a_function_that_is_called_with_other_inputs_is_refused(tmp_path: Path) -> None:
    model = with_functions(detector(), "Conv")
    del model.functions[0].input[-1]
    path = save(model, tmp_path / "other.onnx")
    for read in (read_onnx, load_engine):
        with pytest.raises(UserError, match="not a whole ONNX model"):
            read(path)


def test_nodes_in_a_circle_are_refused(tmp_path: Path) -> None:
    model = detector()
    model.graph.node[0].input[0] = model.graph.node[1].output[0]
    with pytest.raises(UserError, match="not a whole ONNX model"):
        read_onnx(save(model, tmp_path / "circle.onnx"))


@pytest.mark.parametrize("place", [0, 2])
def test_outputs_for_debugging_are_dropped_and_named(tmp_path: Path, place: int) -> None:
    model = detector()
    shape: list[str | int | None] = ["batch", 8, 16, 16]
    model.graph.output.insert(
        place, helper.make_tensor_value_info("stem_out", TensorProto.FLOAT, shape)
    )
    path = save(model, tmp_path / "extra.onnx")
    graph = graph_from_onnx(path)
    assert [item.name for item in graph.model.graph.output] == ["boxes", "scores"]
    assert graph.notes == ("dropped the output stem_out: not a detector's",)
    with load_engine(path) as engine:
        assert engine.dropped_outputs == ("stem_out",)
        assert engine.infer(random_images(1)[0]).keys() == {"boxes", "scores"}


def test_an_output_that_is_a_sequence_is_dropped(tmp_path: Path) -> None:
    model = detector()
    for output in model.graph.output:
        output.type.tensor_type.shape.dim[1].dim_param = "anchors"
    model.graph.node.append(helper.make_node("SequenceConstruct", ["images"], ["all"]))
    some = helper.make_tensor_sequence_value_info("all", TensorProto.FLOAT, None)
    model.graph.output.append(some)
    path = save(model, tmp_path / "sequence.onnx")
    assert graph_from_onnx(path).notes == ("dropped the output all: not a detector's",)
    with load_engine(path) as engine:
        assert engine.dropped_outputs == ("all",)


def test_a_graph_of_which_nothing_is_a_detector_s_is_refused(tmp_path: Path) -> None:
    graph = GraphWriter()
    one = graph.conv_relu("one", "images", (3, 8))
    two = graph.conv_relu("two", one, (8, 8))
    with pytest.raises(UserError, match="no known layout"):
        graph_from_onnx(save(graph.model(one, two), tmp_path / "none.onnx"))


def with_input(*shape: int | str) -> onnx.ModelProto:
    """The detector with another shape of its input."""
    model = detector()
    value = model.graph.input[0]
    value.CopyFrom(helper.make_tensor_value_info(value.name, TensorProto.FLOAT, list(shape)))
    for output in model.graph.output:
        for place, dim in enumerate(output.type.tensor_type.shape.dim):
            dim.dim_param = f"{output.name}_{place}"
    return model


@pytest.mark.parametrize(
    ("shape", "options", "said"),
    [
        ((1, 3, "height", "width"), {}, "leaves its image size free; fix it with `image_size`"),
        ((1, 3, 32, 32), {"image_size": (64, 64)}, "takes images of 32x32, not 64x64"),
        ((1, 3, 32, 32), {"batch": BatchProfile(2, 2, 2)}, "takes batch 1 only"),
        ((1, 3 * 32 * 32), {}, r"takes \[1, 3072\], not a batch of images"),
        ((1, 3, 32, 32), {"class_names": ("one",)}, r"has \d+ class.* `class_names` has 1;"),
    ],
)
def test_what_a_file_leaves_open_or_fixes_is_said(
    tmp_path: Path, shape: tuple[int | str, ...], options: dict[str, Any], said: str
) -> None:
    path = save(with_input(*shape), tmp_path / "open.onnx")
    with pytest.raises(UserError, match=said):
        graph_from_onnx(path, **options)


def test_a_free_size_and_batch_become_those_asked_for(tmp_path: Path) -> None:
    path = save(with_input("n", 3, "height", "width"), tmp_path / "free.onnx")
    batch = BatchProfile(1, 2, 4)
    graph = graph_from_onnx(path, image_size=(SIZE, SIZE), batch=batch)
    assert (graph.image_size, graph.batch) == ((SIZE, SIZE), batch)
    # The outputs' lengths follow from the size.
    assert all(
        dim.dim_value for o in graph.model.graph.output for dim in o.type.tensor_type.shape.dim[1:]
    )


def test_nodes_without_names_are_named_before_they_become_half_precision(tmp_path: Path) -> None:
    model = detector()
    expected = run(model, random_images(1)[0])
    for node in model.graph.node:
        node.name = ""
    model.metadata_props.add(key="names", value=str([f"c{i}" for i in range(256)]))
    model.producer_name = "PaddlePaddle"
    graph = graph_from_onnx(save(model, tmp_path / "anonymous.onnx"), fp16=True)
    # By these the file that is written is known again.
    assert graph.model.metadata_props == model.metadata_props
    assert graph.model.producer_name == "PaddlePaddle"
    names = [node.name for node in graph.model.graph.node]
    assert all(names)
    assert len(set(names)) == len(names)
    for found, wanted in zip(run(graph.model, random_images(1)[0]), expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=0.02)


@pytest.mark.parametrize("opset", [17, 19])
def test_weights_in_int8_alone_go_with_half_precision(tmp_path: Path, opset: int) -> None:
    # Scales in half precision are valid from opset 19 on.
    model = detector()
    model.opset_import[0].version = opset
    weight = next(item for item in model.graph.initializer if item.name == "stem.w")
    stored = {
        "codes": np.random.default_rng(0).integers(-127, 128, weight.dims).astype(np.int8),
        "scale": np.float32(0.01),
        "zero": np.int8(0),
    }
    model.graph.initializer.remove(weight)
    model.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(value), name) for name, value in stored.items()
    )
    dequantize = helper.make_node("DequantizeLinear", [*stored], ["stem.w"], "weights")
    model.graph.node.insert(0, dequantize)
    half = graph_from_onnx(save(model, tmp_path / "w8.onnx"), fp16=True).model
    onnx.checker.check_model(half, full_check=True)
    image = random_images(1)[0]
    for found, wanted in zip(run(half, image), run(model, image), strict=True):
        np.testing.assert_allclose(found, wanted, atol=0.02 * np.abs(wanted).max())


@pytest.mark.parametrize("op", ["QuantizeLinear", "DequantizeLinear", "Conv"])
def test_nodes_of_a_quantized_graph_without_their_inputs_are_refused(
    tmp_path: Path, op: str
) -> None:
    graph = GraphWriter()
    graph.conv("cls", graph.pair(graph.conv_relu("stem", "images", (3, 8)), 0.05), (8, 3))
    model = graph.model("cls_out")
    for node in model.graph.node:
        if node.op_type == op:
            del node.input[1:]
    with pytest.raises(UserError, match=r"bad\.onnx is not .* input size 1 not in range"):
        load_engine(save(model, tmp_path / "bad.onnx"))


def test_a_file_without_operators_and_one_that_is_not_there(tmp_path: Path) -> None:
    model = detector()
    del model.graph.node[:]
    with pytest.raises(UserError, match=r"not an? (ONNX model with any operator|whole ONNX)"):
        read_onnx(save(model, tmp_path / "empty.onnx"))
    assert not has_other_files(tmp_path / "empty.onnx")
    assert not has_other_files(tmp_path / "none.onnx")
    assert has_other_files(external(tmp_path / "outside"))


def test_more_classes_than_any_detector_has_are_refused(tmp_path: Path) -> None:
    model = family_graphs.yolov8(metadata=False)
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 2**62
    path = save(model, tmp_path / "huge.onnx")
    with pytest.raises(UserError, match=r"huge\.onnx has outputs for \d+ classes"):
        graph_from_onnx(path, decoder="yolov8")


@pytest.mark.parametrize("change", [-2, 4])
def test_weights_of_another_length_than_their_shape_s_are_refused(
    tmp_path: Path, change: int
) -> None:
    model = detector()
    tensor = model.graph.initializer[0]
    tensor.raw_data = (tensor.raw_data + bytes(4))[: len(tensor.raw_data) + change]
    with pytest.raises(UserError, match=f"not a whole ONNX model .*{tensor.name}.* shape"):
        read_onnx(save(model, tmp_path / "odd.onnx"))


@pytest.mark.parametrize("place", ["input", "weights", "weights in another file"])
def test_a_type_that_onnx_does_not_know_is_refused(tmp_path: Path, place: str) -> None:
    if place == "weights in another file":
        path = external(tmp_path)
        model = onnx.load(path, load_external_data=False)
    else:
        model, path = detector(), tmp_path / "odd.onnx"
    if place == "input":
        model.graph.input[0].type.tensor_type.elem_type = 99
    else:
        next(t for t in model.graph.initializer if len(t.dims) > 1).data_type = 99
    path.write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match=r"'[\w.]+'.* type"):
        graph_from_onnx(path)


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "[1]", "{", '{"max_detections": 10.5}', '{"confidence": "0.5"}', '{"iou": 7}'],
)
def test_thresholds_in_the_metadata_that_are_none_are_passed_over(text: str) -> None:
    assert nms_in({"nms": text}) is None
    own = NmsSettings(confidence=0.25, iou=0.5, max_detections=7)
    assert nms_in({"nms": json.dumps(dataclasses.asdict(own))}) == own


def test_dynamic_quantization_is_called_what_it_is(tmp_path: Path) -> None:
    from onnxruntime.quantization import quantize_dynamic

    path = save(detector(), tmp_path / "float.onnx")
    quantize_dynamic(path, tmp_path / "dynamic.onnx")
    graph = graph_from_onnx(tmp_path / "dynamic.onnx")
    assert graph.precision == "int8-dynamic"
    built = build_engine(graph, backend="onnxruntime", output=tmp_path / "e.onnx")
    assert json.loads(built.manifest_path.read_text())["precision"] == "int8-dynamic"
    with load_engine(built.path) as engine:
        assert engine.precision == "int8-dynamic"
    with load_engine(tmp_path / "dynamic.onnx") as engine:  # without a manifest
        assert engine.precision == "int8-dynamic"
    with pytest.raises(UserError, match=r"DynamicQuantizeLinear.*quant_format=QDQ"):
        with_symmetric_int8(graph.model, "dynamic.onnx")


def test_onnx_runtime_s_own_operators_are_not_called_exact(tmp_path: Path) -> None:
    from onnxruntime.quantization import QuantFormat, quantize_static

    class Images:
        def __init__(self) -> None:
            self.batches = iter(random_images())

        def get_next(self) -> dict[str, Any] | None:
            return next(({"images": one} for one in self.batches), None)

    path = save(detector(), tmp_path / "float.onnx")
    for form, said in ((QuantFormat.QOperator, "QLinearConv"), (QuantFormat.QDQ, "exactly")):
        quantize_static(path, tmp_path / "int8.onnx", Images(), quant_format=form)
        with load_engine(tmp_path / "int8.onnx") as engine:
            assert said in (engine.note or "")
            assert (engine.computed_in == "fp32") == (form == QuantFormat.QDQ)


def test_half_precision_is_called_so_with_weights_in_constant_nodes(tmp_path: Path) -> None:
    # As Paddle2ONNX writes them.
    model = to_fp16(detector())
    weights = [
        helper.make_node("Constant", [], [item.name], value=item)
        for item in model.graph.initializer
    ]
    set_nodes(model.graph, [*weights, *model.graph.node])
    del model.graph.initializer[:]
    assert graph_from_onnx(save(model, tmp_path / "half.onnx")).precision == "fp16"


# --- unsigned levels ----------------------------------------------------------------------------

SCALE = 0.02


def quantized(zero: int | None, kind: Any = np.uint8, relu: bool = False) -> onnx.ModelProto:
    """A Q/DQ pair between two convolutions; it is the ReLU where `zero` is 0 or left out."""
    graph = GraphWriter()
    grid = [graph.constant("scale", np.array(SCALE, np.float32))]
    if zero is not None:
        grid.append(graph.constant("zero", np.array(zero, kind)))
    last = graph.conv("conv", "images", (3, 4))
    if relu:
        last = graph.node("Relu", [last], "relu")
    levels = graph.node("QuantizeLinear", [last, *grid], "levels")
    float_again = graph.node("DequantizeLinear", [levels, *grid], "float_again")
    return graph.model(graph.conv("next", float_again, (4, 4)))


@pytest.mark.parametrize("zero", [0, None])
@pytest.mark.parametrize("relu", [False, True])
def test_levels_from_0_up_become_int8_of_twice_the_scale(relu: bool, zero: int | None) -> None:
    model = quantized(zero, relu=relu)
    result, said = with_symmetric_int8(model, "u8.onnx")
    assert said is not None
    assert "half their resolution" in said
    zeros = [
        numpy_helper.to_array(item).dtype
        for item in result.graph.initializer
        if item.name.endswith("zero")
    ]
    assert zeros == [np.int8, np.int8]
    # A level is twice as wide: no value moves by more than one old step, through weights of the
    # last convolution.
    weights = next(numpy_helper.to_array(i) for i in model.graph.initializer if i.name == "next.w")
    limit = SCALE * np.abs(weights).sum(axis=(1, 2, 3)).max() * 1.01
    image = random_images(1)[0] * 4 - 2  # negative values as well
    (before,), (after,) = run(model, image), run(result, image)
    assert 0 < np.abs(before - after).max() <= limit


def test_levels_around_128_become_int8_with_the_same_values() -> None:
    model = quantized(128)
    result, said = with_symmetric_int8(model, "u8.onnx")
    assert said is not None
    assert "changes no value" in said
    image = random_images(1)[0] * 4 - 2
    np.testing.assert_array_equal(run(model, image)[0], run(result, image)[0])
    again, nothing = with_symmetric_int8(result, "i8.onnx")
    assert again is result
    assert nothing is None


@pytest.mark.parametrize(
    ("zero", "kind", "said"),
    [
        (-128, np.int8, r"that of 'conv_out' is -128.*ActivationSymmetric"),
        (3, np.uint8, r"that of 'conv_out' is 3.*ActivationSymmetric"),
    ],
)
def test_other_zero_points_are_refused_with_what_to_do(zero: int, kind: Any, said: str) -> None:
    model = quantized(zero, kind)
    assert graph_precision(model) == "int8"
    with pytest.raises(UserError, match=said):
        with_symmetric_int8(model, "asym.onnx")
