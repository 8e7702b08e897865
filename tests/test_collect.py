"""Statistics of a graph's tensors against NumPy on the same values, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from support.logs import logged

from trt_yolov6.data.calibration import calibration_batches, calibration_images, images_sha256
from trt_yolov6.data.letterbox import letterbox
from trt_yolov6.engines.build import BuiltEngine
from trt_yolov6.errors import UserError
from trt_yolov6.graph.inputs import input_spec
from trt_yolov6.quantization.collect import collect
from trt_yolov6.spec import TensorSpec


def small_model(weight: float = 1.0) -> onnx.ModelProto:
    """A convolution with random weights, then ReLU and the mean over the picture, and a tensor of
    integers."""
    kernel = np.random.default_rng(1).standard_normal((4, 3, 3, 3)).astype(np.float32)
    kernel[0, 0, 0, 0] = weight
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["images", "kernel"], ["conv"], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["conv"], ["relu"]),
            helper.make_node("GlobalAveragePool", ["relu"], ["mean"]),
            helper.make_node("Shape", ["relu"], ["shape"]),
        ],
        "small",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, 8, 10])],
        [helper.make_tensor_value_info("mean", TensorProto.FLOAT, ["n", 4, 1, 1])],
        [numpy_helper.from_array(kernel, "kernel")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def pictures(count: int) -> list[NDArray[np.float32]]:
    generator = np.random.default_rng(7)
    return [generator.random((1, 3, 8, 10), np.float32) * (i + 1) for i in range(count)]


def test_statistics_are_those_of_the_values_the_graph_computes() -> None:
    convolutions = []
    kernel = numpy_helper.to_array(small_model().graph.initializer[0]).astype(np.float64)
    for image in pictures(5):
        padded = np.pad(image[0].astype(np.float64), ((0, 0), (1, 1), (1, 1)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
        convolutions.append(np.einsum("chwij,ocij->ohw", windows, kernel))
    expected = np.stack(convolutions)

    found = collect(small_model(), pictures(5), ["relu", "conv", "images", "mean"])

    assert list(found) == ["relu", "conv", "images", "mean"]
    conv, relu, mean = found["conv"], found["relu"], found["mean"]
    assert conv.channels is not None
    assert relu.channels is not None
    assert mean.channels is not None
    assert conv.name == "conv"
    assert conv.amax == pytest.approx(np.abs(expected).max(), rel=1e-5)
    assert conv.amin == pytest.approx(expected.min(), rel=1e-5)
    assert relu.amin == 0
    assert conv.count == conv.histogram.sum() == expected.size
    np.testing.assert_allclose(conv.channels.amax, np.abs(expected).max(axis=(0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(
        relu.channels.mean, np.maximum(expected, 0).mean(axis=(0, 2, 3)), rtol=1e-5
    )
    np.testing.assert_allclose(mean.channels.mean, relu.channels.mean, rtol=1e-5)
    assert found["images"].amax == max(image.max() for image in pictures(5))


def test_the_model_is_left_as_it_was() -> None:
    model = small_model()
    before = model.SerializeToString()
    collect(model, pictures(2), ["conv"])
    assert model.SerializeToString() == before


def test_images_are_taken_one_by_one_as_they_come() -> None:
    alive, most = 0, 0

    class Picture(np.ndarray):
        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def stream() -> Iterator[NDArray[np.float32]]:
        nonlocal alive, most
        for _ in range(40):
            alive += 1
            most = max(most, alive)
            yield np.ones((1, 3, 8, 10), np.float32).view(Picture)

    assert collect(small_model(), stream(), ["relu"])["relu"].count == 40 * 4 * 80
    assert most <= 4


def test_no_image_is_refused() -> None:
    with pytest.raises(UserError, match="no calibration image"):
        collect(small_model(), [], ["relu"])


@pytest.mark.parametrize("weight", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_named(weight: float) -> None:
    with pytest.raises(UserError, match="the weight 'kernel' holds NaN or infinity"):
        collect(small_model(weight), pictures(2), ["relu"])


def test_an_image_that_overflows_a_tensor_is_named_by_its_number() -> None:
    images = pictures(3)
    images[1] *= np.float32(1e37)
    with pytest.raises(UserError, match=r"image number 2 .* makes tensor 'conv' NaN or infinite"):
        collect(small_model(1e3), images, ["conv"])


def test_black_images_are_refused_and_dead_channels_are_not() -> None:
    black = [np.zeros((1, 3, 8, 10), np.float32)] * 2
    with pytest.raises(UserError, match="all calibration images are black"):
        collect(small_model(), black, ["images", "relu"])
    assert collect(small_model(), black, ["relu"])["relu"].amax == 0


def test_tensors_that_have_no_range_are_refused() -> None:
    with pytest.raises(ValueError, match="no tensor 'nowhere'"):
        collect(small_model(), pictures(1), ["nowhere"])
    with pytest.raises(ValueError, match="'shape' is int64"):
        collect(small_model(), pictures(1), ["shape"])


def folder_of(tmp_path: Path, count: int) -> Path:
    generator = np.random.default_rng(4)
    for index in range(count):
        picture = generator.integers(0, 256, (20, 30, 3), np.uint8)
        cv2.imwrite(str(tmp_path / f"{index}.png"), picture)
    return tmp_path


FLOAT = TensorSpec("images", (None, 3, 16, 16), np.dtype(np.float32))
BYTES = TensorSpec("images", (None, 16, 16, 3), np.dtype(np.uint8))


def test_inputs_are_letterboxed_rgb_in_the_order_of_the_names(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, 3)
    floats, uints = (list(calibration_batches(folder, spec)) for spec in (FLOAT, BYTES))
    for index in range(3):
        pixels = np.array(Image.open(folder / f"{index}.png"))
        expected, _ = letterbox(pixels, (16, 16))
        np.testing.assert_array_equal(uints[index][0], expected)
        np.testing.assert_allclose(floats[index][0], expected.transpose(2, 0, 1) / 255, atol=1e-6)


def test_a_graph_of_fixed_batch_gets_full_batches(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, 3)
    fixed = TensorSpec("images", (2, 3, 16, 16), np.dtype(np.float32))
    singles = [batch[0] for batch in calibration_batches(folder, FLOAT)]
    pairs = [row for batch in calibration_batches(folder, fixed) for row in batch]
    np.testing.assert_array_equal(pairs, [*singles, singles[0]])


def test_a_limit_spreads_over_the_folder(tmp_path: Path) -> None:
    names = [path.name for path in calibration_images(folder_of(tmp_path, 10), limit=5)]
    assert names == ["0.png", "2.png", "4.png", "6.png", "8.png"]
    with logged() as told:
        assert len(calibration_images(tmp_path, limit=500, report=True)) == 10
    assert told == [f"{tmp_path} has 10 images, not 500"]


@pytest.mark.parametrize(("count", "message"), [(0, "hold no image"), (1, "one image is too few")])
def test_too_few_images_are_refused(tmp_path: Path, count: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        calibration_images(folder_of(tmp_path, count))


def test_a_damaged_image_is_left_out_and_named(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, 3)
    (folder / "1.png").write_bytes(b"no picture")
    with logged() as told:
        found = calibration_images(folder, report=True)
    assert [path.name for path in found] == ["0.png", "2.png"]
    assert len(told) == 1
    assert "1.png is damaged" in told[0]
    assert len(list(calibration_batches(folder, FLOAT))) == 2
    for path in folder.iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"no image in .* can be read.*0\.png"):
        calibration_images(folder)


def test_sub_folders_are_searched(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, 4)
    for number in range(4):
        inner = folder / f"s{number % 2}"
        inner.mkdir(exist_ok=True)
        (folder / f"{number}.png").rename(inner / f"{number}.png")
    names = [str(path.relative_to(folder)) for path in calibration_images(folder)]
    assert names == ["s0/0.png", "s0/2.png", "s1/1.png", "s1/3.png"]


def test_copies_of_a_picture_count_once(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, 2)
    shutil.copy(folder / "0.png", folder / "3.png")
    # The same pixels in another file.
    Image.open(folder / "0.png").save(folder / "4.bmp")
    with logged() as told:
        found = calibration_images(folder, report=True)
    assert [path.name for path in found] == ["0.png", "1.png"]
    assert "2 copies" in told[0]
    (folder / "1.png").unlink()
    with pytest.raises(UserError, match=r"one image is too few .*0\.png, 3 times"):
        calibration_images(folder)


def test_pictures_that_show_nothing_are_refused(tmp_path: Path) -> None:
    for level in range(5):
        Image.new("RGB", (20, 20), (level, level, level)).save(tmp_path / f"{level}.png")
    with pytest.raises(UserError, match="single colour, such as all black"):
        calibration_images(tmp_path)


def test_the_hash_of_images_follows_their_contents_not_their_names(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, 3)
    before = images_sha256(calibration_images(folder))
    (folder / "2.png").rename(folder / "3.png")
    assert images_sha256(calibration_images(folder)) == before
    cv2.imwrite(str(folder / "1.png"), np.eye(20, dtype=np.uint8) * 255)
    assert images_sha256(calibration_images(folder)) != before


def test_the_sample_is_collected_alike_twice_and_as_a_plain_session_computes_it(
    sample_engine: BuiltEngine, root: Path
) -> None:
    model = onnx.load(sample_engine.path)
    paths = calibration_images(root / "calib", limit=3)
    spec = input_spec(model)
    tensors = [node.output[0] for node in model.graph.node if node.op_type in ("Relu", "Concat")]
    once, again = (collect(model, calibration_batches(paths, spec), tensors) for _ in range(2))
    for name in tensors:
        assert once[name].amax == again[name].amax
        np.testing.assert_array_equal(once[name].histogram, again[name].histogram)
        first, second = once[name].channels, again[name].channels
        assert first is not None
        assert second is not None
        np.testing.assert_array_equal(first.mean, second.mean)

    last = tensors[-1]
    model.graph.output.append(onnx.ValueInfoProto(name=last))
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    values = np.concatenate(
        [session.run([last], {spec.name: image})[0] for image in calibration_batches(paths, spec)]
    )
    assert once[last].amax == pytest.approx(np.abs(values).max(), rel=1e-4)
    assert once[last].count == values.size
