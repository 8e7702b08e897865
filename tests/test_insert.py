"""Insertion of Q/DQ pairs: the arithmetic against PyTorch, the file, what TensorRT-RTX makes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from onnx import numpy_helper
from support.accuracy import first_images, graph_precision
from support.pictures import prepared
from support.small_graphs import GraphWriter, detector, random_images

from trt_yolov6.data.coco import load_coco
from trt_yolov6.data.images import list_images, read_image
from trt_yolov6.engines import backend
from trt_yolov6.engines.base import BuildSettings
from trt_yolov6.errors import UserError
from trt_yolov6.graph.model import Graph
from trt_yolov6.graph.operators import layer_names
from trt_yolov6.quantization.qdq.insert import insert_qdq, quantize_weights
from trt_yolov6.quantization.qdq.placement import place
from trt_yolov6.spec import BatchProfile, TensorSpec


def load(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """Load a graph for exact arithmetic."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def run(model: onnx.ModelProto, images: NDArray[Any]) -> list[NDArray[Any]]:
    results: list[NDArray[Any]] = load(model).run(None, {model.graph.input[0].name: images})
    return results


def ranges(
    model: onnx.ModelProto, tensors: Sequence[str], images: Sequence[NDArray[Any]]
) -> dict[str, float]:
    """Largest magnitude of each tensor over the images."""
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    given = {item.name for item in (*model.graph.input, *model.graph.output)}
    computed = [name for name in tensors if name not in given]
    probe.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in computed)
    session, images_name = load(probe), model.graph.input[0].name
    found = dict.fromkeys([images_name, *computed], 0.0)
    for image in images:
        found[images_name] = max(found[images_name], float(np.abs(image).max()))
        for name, value in zip(computed, session.run(computed, {images_name: image}), strict=True):
            found[name] = max(found[name], float(np.abs(value).max()))
    return found


def initializers(model: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    return {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}


@pytest.fixture(scope="module")
def sample_graph(sample_320: Graph) -> onnx.ModelProto:
    return sample_320.model


@pytest.fixture(scope="module")
def sample_ranges(sample_graph: onnx.ModelProto, root: Path) -> dict[str, float]:
    spec = TensorSpec("images", (1, 3, 320, 320), np.dtype(np.float32))
    images = [prepared([read_image(path)], spec) for path in list_images(root / "calib")[:8]]
    return ranges(sample_graph, place(sample_graph).tensors, images)


class TestWeights:
    @settings(max_examples=50, deadline=None)
    @given(
        hnp.arrays(
            np.float32, (3, 4, 2), elements=st.floats(-1e3, 1e3, width=32, allow_subnormal=False)
        ),
        st.sampled_from([0, 1]),
        st.booleans(),
    )
    def test_no_weight_is_off_by_more_than_half_a_step(
        self, weights: NDArray[np.float32], axis: int, half: bool
    ) -> None:
        levels, scales = quantize_weights(weights, axis, half_scales=half)
        assert levels.dtype == np.int8
        assert levels.min() >= -127
        assert scales.shape == (weights.shape[axis],)
        steps = scales.reshape((-1, 1, 1) if axis == 0 else (1, -1, 1)).astype(np.float64)
        assert (np.abs(levels * steps - weights) <= steps * 0.50001).all()
        if half:
            assert (scales.astype(np.float16) == scales).all()

    def test_a_channel_of_zeros_stays_zero(self) -> None:
        levels, scales = quantize_weights(np.zeros((2, 3), np.float32), 0)
        assert not levels.any()
        assert (scales > 0).all()

    def test_they_are_stored_once_as_int8(self) -> None:
        model = detector()
        result = insert_qdq(model, place(model), dict.fromkeys(place(model).tensors, 1.0))
        stored = initializers(result)
        names = [name for name in stored if ".w" in name and stored[name].ndim == 4]
        assert len(names) == len(layer_names(model))
        assert all(stored[name].dtype == np.int8 for name in names)

    def test_layers_that_share_weights_share_the_stored_ones(self) -> None:
        graph = GraphWriter()
        first = graph.conv_relu("first", "images", (3, 3))
        graph.conv("second", first, (3, 3))
        graph.nodes[-1].input[1] = "first.w"
        model = graph.model("second_out")
        result = insert_qdq(model, place(model), {"images": 1, "first_relu": 1})
        assert sum(value.ndim == 4 for value in initializers(result).values()) == 1

    def test_a_transposed_convolution_has_a_scale_for_each_output_channel(self) -> None:
        graph = GraphWriter()
        graph.conv("up", "images", (3, 8), kernel=2, strides=[2, 2], op="ConvTranspose")
        model = graph.model("up_out")
        result = insert_qdq(model, place(model), {"images": 1})
        dequantize = next(node for node in result.graph.node if node.output[0] == "up_out/weight")
        assert initializers(result)[dequantize.input[1]].shape == (8,)
        assert [item.i for item in dequantize.attribute if item.name == "axis"] == [1]


class TestArithmetic:
    def test_a_layer_computes_what_pytorch_computes_with_fake_quantization(self) -> None:
        graph = GraphWriter()
        graph.conv("layer", "images", (3, 8), kernel=3, strides=[2, 2])
        model = graph.model("layer_out")
        image = random_images(1)[0] * 3 - 1.5
        amax = 1.25  # less than the range, so that some values saturate
        result = insert_qdq(model, place(model), {"images": amax})
        weight, bias = (torch.from_numpy(graph.constants[f"layer.{kind}"]) for kind in "wb")
        scale = weight.abs().amax(dim=(1, 2, 3)) / 127
        expected = torch.nn.functional.conv2d(
            torch.fake_quantize_per_tensor_affine(
                torch.from_numpy(image), amax / 127, 0, -128, 127
            ).clamp(min=-amax * 128 / 127),
            torch.fake_quantize_per_channel_affine(
                weight, scale, torch.zeros(8, dtype=torch.int32), 0, -127, 127
            ),
            bias,
            stride=2,
            padding=1,
        )
        np.testing.assert_allclose(run(result, image)[0], expected.numpy(), atol=1e-5)

    def test_pairs_behind_what_hands_int8_on_change_no_value(self) -> None:
        model, images = detector(), random_images(2)
        lean, full = place(model), place(model, requantize=True)
        amax = ranges(model, full.tensors, images)
        for image in images:
            for one, other in zip(
                run(insert_qdq(model, lean, amax), image),
                run(insert_qdq(model, full, amax), image),
                strict=True,
            ):
                np.testing.assert_allclose(one, other, atol=1e-6)

    def test_half_precision_rest_agrees_with_float_rest(self) -> None:
        model, image = detector(), random_images(1)[0]
        placement = place(model)
        amax = ranges(model, placement.tensors, [image])
        half = insert_qdq(model, placement, amax, fp16=True)
        assert half.opset_import[0].version >= 19
        assert half.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
        stored = initializers(half)
        scales = [
            stored[node.input[1]] for node in half.graph.node if node.op_type == "QuantizeLinear"
        ]
        assert len(scales) == len(placement.tensors) + len(placement.repeated)
        assert all(scale.dtype == np.float16 for scale in scales)
        for one, other in zip(
            run(half, image), run(insert_qdq(model, placement, amax), image), strict=True
        ):
            assert np.abs(one - other).max() < 0.02 * np.abs(other).max()

    def test_half_precision_does_not_depend_on_nodes_having_names(self) -> None:
        named, bare = detector(), detector()
        for node in bare.graph.node:
            node.name = ""
        casts = [
            Counter(
                node.op_type
                for node in insert_qdq(
                    model, place(model), dict.fromkeys(place(model).tensors, 1.0), fp16=True
                ).graph.node
            )
            for model in (named, bare)
        ]
        assert casts[0] == casts[1]

    @pytest.mark.parametrize("fp16", [False, True])
    def test_the_graph_keeps_its_metadata(self, fp16: bool) -> None:
        model = detector()
        model.metadata_props.add(key="names", value='["cell"]')
        amax = dict.fromkeys(place(model).tensors, 1.0)
        result = insert_qdq(model, place(model), amax, fp16=fp16)
        assert [(item.key, item.value) for item in result.metadata_props] == [("names", '["cell"]')]

    def test_the_same_arguments_give_the_same_bytes(self) -> None:
        model = detector()
        amax = dict.fromkeys(place(model).tensors, 1.0)
        before = model.SerializeToString()
        for half in (False, True):
            first, second = (
                insert_qdq(model, place(model), amax, fp16=half).SerializeToString()
                for _ in range(2)
            )
            assert first == second
        assert model.SerializeToString() == before


class TestBadInput:
    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (0.0, "too small to scale to"),
            (float("inf"), "NaN and infinity"),
            (float("nan"), "NaN and infinity"),
            (None, "no range for tensor 'stem_relu'"),
        ],
    )
    def test_a_range_that_is_none_is_refused(self, value: float | None, message: str) -> None:
        model = detector()
        amax = dict.fromkeys(place(model).tensors, 1.0)
        amax.pop("stem_relu")
        if value is not None:
            amax["stem_relu"] = value
        with pytest.raises(UserError, match=message):
            insert_qdq(model, place(model), amax)

    def test_weights_that_are_not_finite_are_refused(self) -> None:
        graph = GraphWriter()
        graph.conv("layer", "images", (3, 8))
        graph.constants["layer.w"][0, 0] = np.nan
        model = graph.model("layer_out")
        with pytest.raises(UserError, match=r"weights 'layer\.w' hold NaN"):
            insert_qdq(model, place(model), {"images": 1})

    def test_a_range_beyond_half_precision_is_refused(self) -> None:
        graph = GraphWriter()
        graph.conv("layer", "images", (3, 8))
        model = graph.model("layer_out")
        with pytest.raises(UserError, match="too large for half precision"):
            insert_qdq(model, place(model), {"images": 1e8}, fp16=True)


class TestSample:
    def test_all_its_convolutions_run_in_int8_in_less_than_6_mb(
        self, sample_graph: onnx.ModelProto, sample_ranges: dict[str, float]
    ) -> None:
        placement = place(sample_graph)
        assert len(placement.layers) == 58
        assert not placement.float_layers
        model = insert_qdq(sample_graph, placement, sample_ranges)
        assert len(model.SerializeToString()) < 6e6
        onnx.checker.check_model(model, full_check=True)

    @pytest.mark.slow
    def test_min_max_ranges_lose_no_accuracy(
        self,
        sample_graph: onnx.ModelProto,
        sample_ranges: dict[str, float],
        root: Path,
        tmp_path: Path,
    ) -> None:
        int8 = insert_qdq(sample_graph, place(sample_graph), sample_ranges)
        few = first_images(load_coco(root / "samples"), 24)
        found, expected = (graph_precision(graph, tmp_path, few) for graph in (int8, sample_graph))
        assert found >= expected - 0.01

    @pytest.mark.parametrize("fp16", [False, True])
    def test_tensorrt_rtx_builds_it_for_gpus_that_are_not_here(
        self, sample_graph: onnx.ModelProto, sample_ranges: dict[str, float], fp16: bool
    ) -> None:
        api = pytest.importorskip("tensorrt_rtx")
        from trt_yolov6.engines.tensorrt.flavour import logger_of
        from trt_yolov6.engines.tensorrt.layer_log import engine_layers, quantized_layers

        names = list(layer_names(sample_graph).values())
        model = insert_qdq(sample_graph, place(sample_graph), sample_ranges, fp16=fp16)
        counts = {}
        for target in ("t4", "l4"):
            settings = BuildSettings(BatchProfile(1, 8, 32), target=target, progress=False)
            assert backend("tensorrt-rtx").build(model.SerializeToString(), settings)
            layers = logger_of(api).layers
            assert len([one for one in engine_layers(layers) if one.kind == "correlation"]) == 56
            counts[target] = len(quantized_layers(layers, names))
        # On Ada all but the two transposed convolutions. On Turing 1.7 computes none in INT8: it
        # dequantizes weights and activations in front of every convolution.
        assert counts["l4"] == 56
        if api.__version__.startswith("1.7."):
            assert counts["t4"] == 0
