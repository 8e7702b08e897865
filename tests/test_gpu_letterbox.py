"""The GPU's letterbox makes the pixels that OpenCV makes: its kernel, compiled for the CPU."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
from importlib import resources
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.host_images import run_letterbox
from support.kernels_on_cpu import letterbox_on_cpu

from trt_yolov6.data.images import read_image
from trt_yolov6.data.letterbox import Letterbox, fit
from trt_yolov6.data.loader import fill_row
from trt_yolov6.data.preprocessing import Fit, Interpolation, Preprocessing
from trt_yolov6.detectors.families import FAMILIES
from trt_yolov6.engines.cuda.kernels import machine_code
from trt_yolov6.engines.cuda.letterbox import (
    SOURCE,
    ImageView,
    defines_of,
    interleaved,
    upright,
)
from trt_yolov6.spec import TensorSpec

CUDA = resources.files("trt_yolov6.engines.cuda")
sides = st.integers(1, 160)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, ctypes.CDLL]:
    with resources.as_file(CUDA / SOURCE) as source:
        folder = tmp_path_factory.mktemp("kernel")
        return {
            is_byte: letterbox_on_cpu(source, folder, byte_input=is_byte)
            for is_byte in (False, True)
        }


def spec_of(size: tuple[int, int], is_byte: bool) -> TensorSpec:
    shape = (None, *size, 3) if is_byte else (None, 3, *size)
    return TensorSpec("images", shape, np.dtype(np.uint8 if is_byte else np.float32))


def run(
    kernels: dict[bool, ctypes.CDLL],
    images: list[tuple[ImageView, Letterbox]],
    spec: TensorSpec,
    how: Preprocessing,
    rows: int,
) -> NDArray[Any]:
    """Return the input that the kernel makes of images in this machine's memory."""
    result = np.full((rows, *(length or 0 for length in spec.shape[1:])), 77, spec.dtype)
    run_letterbox(kernels[spec.dtype == np.uint8], result, images, how, images[0][1].size)
    return result


def random_image(seed: int, height: int, width: int) -> NDArray[np.uint8]:
    random = np.random.default_rng(seed)
    image = random.integers(0, 256, (height, width, 3), np.uint8)
    if seed % 3 == 0:  # smooth, as pictures are, and with flat black and white
        image = cv2.GaussianBlur(image, (0, 0), 2).astype(np.uint8)
        image[: height // 3] = 255 * (seed % 2)
    return image


def view_of(image: NDArray[np.uint8]) -> ImageView:
    return interleaved(image.ctypes.data, *image.shape[:2])


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.tuples(sides, sides), min_size=1, max_size=3),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.integers(0, 6),
    st.sampled_from(["letterbox", "corner", "stretch"]),
    st.sampled_from(["area", "linear"]),
    st.booleans(),
)
def test_a_batch_is_bit_for_bit_what_the_cpu_makes(
    kernels: dict[bool, ctypes.CDLL],
    seed: int,
    sizes: list[tuple[int, int]],
    tiles: tuple[int, int],
    border: int,
    mode: Fit,
    interpolation: Interpolation,
    is_byte: bool,
) -> None:
    how = Preprocessing(
        mode,
        interpolation,
        "bgr" if seed % 2 else "rgb",
        (seed % 5, 103.53, 0.0),
        (1.0, 57.375, 255),
    )
    spec = spec_of((32 * tiles[0], 32 * tiles[1]), is_byte)
    border = border if mode == "letterbox" else 0
    images = [random_image(seed + index, *size) for index, size in enumerate(sizes)]
    wanted = np.zeros((len(images) + 1, *(length or 0 for length in spec.shape[1:])), spec.dtype)
    placed = [
        fill_row(row, image, spec, border, how)
        for row, image in zip(wanted[:-1], images, strict=True)
    ]
    views = [view_of(image) for image in images]
    found = run(kernels, list(zip(views, placed, strict=True)), spec, how, len(images) + 1)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("factor", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("interpolation", ["area", "linear", "cubic"])
def test_whole_factors_are_averaged_as_opencv_averages_them(
    kernels: dict[bool, ctypes.CDLL], factor: int, interpolation: Interpolation
) -> None:
    image = random_image(factor, 64 * factor, 96 * factor)
    how, spec = Preprocessing("stretch", interpolation), spec_of((64, 96), True)
    wanted = np.zeros((1, 64, 96, 3), np.uint8)
    placed = fill_row(wanted[0], image, spec, 0, how)
    found = run(kernels, [(view_of(image), placed)], spec, how, 1)
    np.testing.assert_allclose(found.astype(int), wanted, atol=interpolation == "cubic")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), sides, sides)
def test_cubic_interpolation_is_within_one_level(
    kernels: dict[bool, ctypes.CDLL], seed: int, height: int, width: int
) -> None:
    image, spec, how = (
        random_image(seed, height, width),
        spec_of((64, 96), True),
        (FAMILIES["ppyoloe-plus"].preprocessing),
    )
    wanted = np.zeros((1, 64, 96, 3), np.uint8)
    placed = fill_row(wanted[0], image, spec, 0, how)
    found = run(kernels, [(view_of(image), placed)], spec, how, 1)
    np.testing.assert_allclose(found.astype(int), wanted, atol=1)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_gets_its_input(kernels: dict[bool, ctypes.CDLL], family: str) -> None:
    how, spec = FAMILIES[family].preprocessing, spec_of((96, 128), False)
    image = random_image(3, 120, 90)
    wanted = np.zeros((1, 3, 96, 128), np.float32)
    placed = fill_row(wanted[0], image, spec, 0, how)
    found = run(kernels, [(view_of(image), placed)], spec, how, 1)
    level = max(1 / std for std in how.std) if how.interpolation == "cubic" else 0
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1.01 * level)


@pytest.mark.parametrize("orientation", range(9))
def test_turned_images_are_read_upright(kernels: dict[bool, ctypes.CDLL], orientation: int) -> None:
    # OpenCV turns a picture by its tag: the reference is its own reading.
    stored = random_image(4, 40, 72)
    encoded = cv2.imencode(".png", stored)[1].tobytes()
    shown = read_image(with_orientation(encoded, orientation))
    pixels = np.ascontiguousarray(stored[..., ::-1])
    view = upright(view_of(pixels), orientation)
    assert view.shape == shown.shape
    spec, how = spec_of((64, 64), True), Preprocessing()
    wanted = np.zeros((1, 64, 64, 3), np.uint8)
    placed = fill_row(wanted[0], shown, spec, 0, how)
    np.testing.assert_array_equal(run(kernels, [(view, placed)], spec, how, 1), wanted)


def with_orientation(png: bytes, orientation: int) -> bytes:
    """Return a PNG with an EXIF chunk that has this orientation."""
    import io

    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = orientation
    out = io.BytesIO()
    Image.open(io.BytesIO(png)).save(out, "PNG", exif=exif)
    return out.getvalue()


@pytest.mark.parametrize("is_byte", [False, True])
def test_widths_that_are_not_whole_fours_are_made_pixel_by_pixel(
    tmp_path: Path, is_byte: bool
) -> None:
    with resources.as_file(CUDA / SOURCE) as source:
        library = letterbox_on_cpu(source, tmp_path, byte_input=is_byte, pixels=1)
    spec, how, image = spec_of((50, 75), is_byte), Preprocessing(), random_image(7, 90, 120)
    assert defines_of(spec)[-1] == "PIXELS=1"
    wanted = np.zeros((1, *(length or 0 for length in spec.shape[1:])), spec.dtype)
    placed = fill_row(wanted[0], image, spec, 0, how)
    found = run({is_byte: library}, [(view_of(image), placed)], spec, how, 1)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("offset", range(8))
@pytest.mark.parametrize("is_rgb", [False, True])
def test_images_of_the_size_they_shall_have_are_copied_from_any_address(
    kernels: dict[bool, ctypes.CDLL], offset: int, is_rgb: bool
) -> None:
    # At the very end of a buffer: what lies after it must not be read (valgrind would tell).
    image = random_image(11, 62, 61 + offset)
    memory = np.zeros(image.nbytes + 16, np.uint8)
    lying = memory[offset : offset + image.nbytes].reshape(image.shape)
    lying[:] = image if is_rgb else image[..., ::-1]
    view = interleaved(lying.ctypes.data, *image.shape[:2])
    if not is_rgb:
        view = dataclasses.replace(view, address=view.address + 2, channel_step=-1)
    spec, how = spec_of((64, 96), True), Preprocessing("corner")
    wanted = np.full((1, 64, 96, 3), 114, np.uint8)
    placed = Letterbox(image.shape[:2], (64, 96), image.shape[:2], 1.0, 1, offset)
    wanted[0, 1:63, offset : offset + image.shape[1]] = image
    np.testing.assert_array_equal(run(kernels, [(view, placed)], spec, how, 1), wanted)


def test_planes_and_padded_rows_are_read_through_steps(kernels: dict[bool, ctypes.CDLL]) -> None:
    image = random_image(5, 50, 33)
    planes = np.zeros((3, 50, 64), np.uint8)
    planes[:, :, :33] = np.moveaxis(image, 2, 0)
    spec, how = spec_of((96, 64), True), Preprocessing()
    placed = fit((50, 33), (96, 64))
    view = ImageView(planes.ctypes.data, 50, 33, 64, 1, planes.strides[0])
    wanted = run(kernels, [(view_of(image), placed)], spec, how, 1)
    np.testing.assert_array_equal(run(kernels, [(view, placed)], spec, how, 1), wanted)


def test_it_compiles_for_every_gpu_that_tensorrt_runs_on() -> None:
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc")
    try:
        nvrtc.nvrtcVersion()
    except RuntimeError:
        pytest.skip("needs nvidia-cuda-nvrtc")
    # No line of the source asks which GPU it is compiled for.
    assert "__CUDA_ARCH__" not in SOURCE
    defines = itertools.cycle(((), ("BYTE_INPUT",), ("BYTE_INPUT", "PIXELS=1")))
    capabilities = ((7, 5), (8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (12, 0))
    for capability, define in zip(capabilities, defines, strict=False):
        assert machine_code(SOURCE, capability, define)
