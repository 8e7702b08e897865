"""TensorRT's calibration cache against the example that NVIDIA publishes, and damaged files."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trt_yolov6.errors import UserError
from trt_yolov6.quantization.tensorrt_cache import (
    header_version,
    read_cache,
    write_cache,
)

# The file that the README of NVIDIA's sampleINT8 shows, as TensorRT 7.0 wrote it for MNIST.
MNIST = """TRT-7000-EntropyCalibration2
data: 3c008912
conv1: 3c88edfc
pool1: 3c88edfc
conv2: 3ddc858b
pool2: 3ddc858b
ip1: 3db6bd6e
ip2: 3e691968
prob: 3c010a14
"""


def written(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "calibration.cache"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_nvidias_example_is_read(tmp_path: Path) -> None:
    scales = read_cache(written(tmp_path, MNIST))
    assert list(scales) == ["data", "conv1", "pool1", "conv2", "pool2", "ip1", "ip2", "prob"]
    # A softmax is 1 at most; TensorRT's range ends half of its 2048 bins' width above that.
    assert 127 * scales["prob"] == pytest.approx(1 * 2048.5 / 2048, rel=1e-6)
    # MNIST's pixels, as that sample prepares them, are 255/256 at most.
    assert 127 * scales["data"] == pytest.approx(255 / 256 * 2048.5 / 2048, rel=1e-6)


def test_nvidias_example_is_written_back_digit_by_digit(tmp_path: Path) -> None:
    scales = read_cache(written(tmp_path, MNIST))
    amax = {name: 127 * scale for name, scale in scales.items()}
    write_cache(tmp_path / "again.cache", amax, "7.0.0")
    assert (tmp_path / "again.cache").read_text() == MNIST


@given(
    st.dictionaries(
        st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1),
        st.floats(2**-100, 2.0**100, width=32),
        min_size=1,
    )
)
def test_what_was_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, amax: dict[str, float]
) -> None:
    path = tmp_path_factory.getbasetemp() / "some.cache"
    write_cache(path, amax, "8.6.1")
    scales = read_cache(path)
    assert scales == {name: np.float32(value / 127) for name, value in amax.items()}


def test_names_with_colons_and_spaces_are_tensors_too(tmp_path: Path) -> None:
    text = "TRT-100300-EntropyCalibration2\ninput_1:0: 3c010a14\n(Unnamed Layer* 4) [Fully]: 3d\n"
    scales = read_cache(written(tmp_path, text.replace("3d\n", "3d65992f\n")))
    assert list(scales) == ["input_1:0", "(Unnamed Layer* 4) [Fully]"]


def test_windows_line_ends_and_missing_leading_zeros_are_no_obstacle(tmp_path: Path) -> None:
    scales = read_cache(
        written(tmp_path, "TRT-8601-EntropyCalibration2\r\nx: 0a141414\r\ny: a141414")
    )
    assert scales["x"] == scales["y"] == struct.unpack(">f", b"\n\x14\x14\x14")[0]


@pytest.mark.parametrize(
    ("version", "header"),
    [
        ("7.0.0", "7000"),
        ("8.4", "8400"),
        ("8.5.3.1", "8503"),
        ("8.6.1", "8601"),
        ("10.3.0", "100300"),
        ("10.13.2", "101302"),
    ],
)
def test_header_versions_are_those_of_tensorrts_macro(version: str, header: str) -> None:
    assert header_version(version) == header


def test_tensorrt_11_reads_no_cache(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"TensorRT 11\.0\.0 no longer has calibrators"):
        write_cache(tmp_path / "c", {"x": 1.0}, "11.0.0")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "is not a TensorRT calibration cache"),
        (b"\x89PNG\r\n\x1a\n\xff", "is not a TensorRT calibration cache"),
        ('{"schema": 1}', "is not a TensorRT calibration cache"),
        ("images: 3c010a14\n", "is not a TensorRT calibration cache"),
        ("TRT-8601-EntropyCalibration2\n", "holds no scale"),
        ("TRT-8601-Entropy9\nx: 3c010a14\n", "made by the calibrator Entropy9"),
        (MNIST + "fc 3c010a14\n", "line 10, is not"),
        (MNIST + "fc: 0.0078\n", "line 10, is not"),
        (MNIST + "fc: 3c010a14ff\n", "line 10, is not"),
        (MNIST + "fc: 00000000\n", "scale 0.0, which"),
        (MNIST + "fc: bc010a14\n", "scale -0.00"),
        (MNIST + "fc: 7f800000\n", "scale inf"),
        (MNIST + "fc: 7fc00000\n", "scale nan"),
        (MNIST + "prob: 3c010a15\n", "second scale"),
    ],
)
def test_a_file_that_is_no_cache_is_refused_in_a_sentence(
    tmp_path: Path, text: str | bytes, complaint: str
) -> None:
    with pytest.raises(UserError, match=rf"calibration\.cache.*{complaint}.*; .*\.$"):
        read_cache(written(tmp_path, text))


@pytest.mark.parametrize("amax", [0.0, -1.0, float("nan"), float("inf"), 1e300, 1e-300])
def test_a_range_no_scale_can_hold_is_not_written(tmp_path: Path, amax: float) -> None:
    with pytest.raises(UserError, match="tensor 'x' has the scale"):
        write_cache(tmp_path / "c", {"x": amax}, "8.6.1")
    assert not list(tmp_path.iterdir())


def test_a_name_of_two_lines_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be named"):
        write_cache(tmp_path / "c", {"x\ny": 1.0}, "8.6.1")
