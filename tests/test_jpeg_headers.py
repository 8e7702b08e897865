"""Which JPEGs are left to a GPU; their size and orientation are those that OpenCV reads."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support.gpu import has_gpu

from trt_yolov6.data.images import exif_orientation, list_images, read_image
from trt_yolov6.data.jpeg import Jpeg, open_image, read_header
from trt_yolov6.engines.cuda.jpeg import DecodedBatch, JpegDecoder, keep_for
from trt_yolov6.errors import MissingDependencyError, UserError

SAMPLES = Path(__file__).parents[1] / "samples" / "images"


def jpeg(mode: str = "RGB", size: tuple[int, int] = (40, 24), **options: Any) -> bytes:
    random = np.random.default_rng(0)
    channels = {"L": 1, "RGB": 3, "CMYK": 4}[mode]
    pixels = random.integers(0, 256, (size[1], size[0], channels), np.uint8)
    image = Image.fromarray(pixels.squeeze() if channels == 1 else pixels, mode)
    out = io.BytesIO()
    image.save(out, "JPEG", **options)
    return out.getvalue()


def with_segment(data: bytes, marker: int, content: bytes) -> bytes:
    """Return a JPEG with a segment right after its start."""
    segment = bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content
    return data[:2] + segment + data[2:]


def exif(orientation: int, order: str = ">", entries: int = 1) -> bytes:
    """Return EXIF with an orientation as the last of some entries."""
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    others = [struct.pack(order + "HHIHH", 0x0100 + i, 3, 1, 7, 0) for i in range(entries - 1)]
    mine = struct.pack(order + "HHIHH", 0x0112, 3, 1, orientation, 0)
    return start + struct.pack(order + "H", entries) + b"".join(others) + mine + bytes(4)


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("progressive", [False, True])
def test_usual_jpegs_are_left_to_the_gpu(subsampling: str, progressive: bool) -> None:
    data = jpeg(subsampling=subsampling, progressive=progressive)
    header = read_header(data)
    assert header is not None
    assert header.size == read_image(data).shape[:2] == (24, 40)


def test_gray_is_left_to_the_gpu() -> None:
    opened = open_image(jpeg("L"), "gray.jpg")
    assert isinstance(opened, Jpeg)
    assert opened.read().shape == (24, 40, 3)


def test_every_sample_is_left_to_the_gpu() -> None:
    for path in list_images(SAMPLES):
        opened = open_image(path)
        assert isinstance(opened, Jpeg), path
        assert opened.size == read_image(path).shape[:2]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", range(12))
def test_orientation_is_read_as_opencv_reads_it(orientation: int, order: str) -> None:
    data = with_segment(jpeg(), 0xE1, b"Exif\0\0" + exif(orientation, order, entries=3))
    header = read_header(data)
    assert header is not None
    assert header.size == read_image(data).shape[:2]
    assert header.orientation == (orientation if 1 <= orientation <= 8 else 1)


def test_other_metadata_may_come_before_the_orientation() -> None:
    data = with_segment(jpeg(), 0xE1, b"Exif\0\0" + exif(6))
    data = with_segment(data, 0xE1, b"http://ns.adobe.com/xap/1.0/\0<x/>")
    header = read_header(data)
    assert header is not None
    assert header.size == read_image(data).shape[:2] == (40, 24)


def test_what_a_gpu_reads_otherwise_is_decoded_here() -> None:
    encoded_png = cv2.imencode(".png", np.zeros((5, 6, 3), np.uint8))[1].tobytes()
    for data in (jpeg("CMYK"), encoded_png, jpeg(keep_rgb=True)):
        opened = open_image(data)
        assert not isinstance(opened, Jpeg)
        np.testing.assert_array_equal(opened, read_image(data))


def test_named_by_letters_components_are_colours_already() -> None:
    data = bytearray(jpeg(subsampling="4:4:4"))
    frame, scan = data.index(b"\xff\xc0"), data.index(b"\xff\xda")
    for component, letter in enumerate(b"RGB"):
        data[frame + 10 + 3 * component] = letter
        data[scan + 5 + 2 * component] = letter
    assert read_header(bytes(data)) is None


def test_arithmetic_coding_12_bits_and_odd_sampling_are_not_for_the_gpu() -> None:
    data = jpeg()
    frame = data.index(b"\xff\xc0")
    for place, value in ((frame + 1, 0xC9), (frame + 4, 12), (frame + 11, 0x33)):
        changed = bytearray(data)
        changed[place] = value
        assert read_header(bytes(changed)) is None


def test_fill_bytes_before_a_marker_are_passed_over() -> None:
    data = jpeg()
    filled = data[:2] + b"\xff\xff" + data[2:]
    assert read_header(filled) == read_header(data)
    assert np.array_equal(read_image(filled), read_image(data))


@pytest.mark.parametrize(
    "tiff",
    [
        b"",
        b"XX*\0\0\0\0\x08",  # neither order of bytes
        b"MM\0*\0\0\0\x7f",  # its directory lies beyond the end
        exif(6)[:-14],  # ends within the entry
        exif(9),  # there are eight orientations
        exif(0),
    ],
)
def test_metadata_that_says_no_orientation_turns_nothing(tiff: bytes) -> None:
    assert exif_orientation(tiff) == 1
    data = with_segment(jpeg(), 0xE1, b"Exif\0\0" + tiff)
    assert read_image(data).shape == (24, 40, 3)


def test_a_file_cut_short_is_refused_as_ever(tmp_path: Path) -> None:
    path = tmp_path / "cut.jpg"
    path.write_bytes(jpeg(size=(400, 400))[:-3000])
    for read in (open_image, read_image):
        with pytest.raises(UserError, match=r"cut\.jpg is cut short"):
            read(path)
    with pytest.raises(UserError, match=r"none\.jpg cannot be read"):
        open_image(tmp_path / "none.jpg")


@given(st.binary(max_size=200), st.integers(0, 600), st.integers(0, 255))
def test_no_bytes_make_the_reader_fail(tail: bytes, place: int, value: int) -> None:
    changed = bytearray(jpeg())
    changed[place % len(changed)] = value
    for data in (b"\xff\xd8" + tail, bytes(changed), bytes(changed)[:place]):
        header = read_header(data)
        assert header is None or 1 <= header.orientation <= 8
    assert 1 <= exif_orientation(b"II*\0" + tail) <= 8


def test_nvimagecodec_loads_without_a_word_and_takes_what_it_is_given() -> None:
    pytest.importorskip("nvidia.nvimgcodec")
    # In a process of its own: what it prints, it prints when it is loaded.
    program = (
        "from trt_yolov6.engines.cuda.jpeg import OPTIONS, nvimgcodec\n"
        "codec = nvimgcodec()\n"
        "codec.DecodeParams(apply_exif_orientation=False, color_spec=codec.ColorSpec.SRGB,"
        " allow_any_depth=False)\n"
        "[codec.Backend(kind) for kind in (codec.BackendKind.HW_GPU_ONLY,)]\n"
        "codec.CodeStream(open(__import__('sys').argv[1], 'rb').read())\n"
        "codec.Decoder(device_id=codec.NVIMGCODEC_DEVICE_CPU_ONLY, max_num_cpu_threads=0,"
        " backends=None, options=OPTIONS)\n"
    )
    path = list_images(SAMPLES)[0]
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_without_a_gpu_the_decoder_says_so() -> None:
    if has_gpu():
        pytest.skip("there is a GPU")
    with pytest.raises(MissingDependencyError):
        JpegDecoder()


def test_a_decoders_stream_lives_as_long_as_its_images() -> None:
    class Thing:
        pass

    stream: Any = Thing()
    images = [Thing(), None, Thing()]
    alive = weakref.ref(stream)
    keep_for(images, stream)
    del stream
    for _ in range(len(images)):
        assert alive() is not None
        images.pop()
    assert alive() is None


class Decoded:
    """An image as nvImageCodec reuses it: it moves when it needs more memory."""

    def __init__(self) -> None:
        self.capacity, self.asked, self._address = 0, 0, 0

    def hold(self, content: bytes) -> None:
        header = read_header(content)
        assert header is not None
        self.shape = header.height, header.width, 3
        self.strides = 3 * header.width, 3, 1
        if header.height * header.width * 3 > self.capacity:
            self.capacity = header.height * header.width * 3
            self._address += 4096

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        self.asked += 1
        return {"data": (self._address, False)}


def test_where_images_lie_is_asked_again_only_when_they_move(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each time it is asked, nvImageCodec loses a number of Python's."""

    def decode(
        streams: list[bytes], images: list[Decoded] | None = None, **_: Any
    ) -> list[Decoded]:
        images = images or [Decoded() for _ in streams]
        for image, content in zip(images, streams, strict=True):
            image.hold(content)
        return images

    monkeypatch.setattr("trt_yolov6.engines.cuda.jpeg.Event", Mock)
    decoder: Any = object.__new__(JpegDecoder)
    decoder._codec = SimpleNamespace(CodeStream=lambda content: content)
    decoder._stream, decoder._params, decoder._decoder = Mock(), None, Mock(decode=decode)
    buffers = DecodedBatch()
    for sides in ((9, 8), (9, 8), (9, 9), (4, 9), (9, 8, 7), (9, 8, 7), (30, 8, 7), (5, 8)):
        opened = [open_image(jpeg(size=(side, side))) for side in sides]
        views = decoder.decode([one for one in opened if isinstance(one, Jpeg)], buffers)
        for view, side in zip(views, sides, strict=True):
            assert view.shape == (side, side, 3)
            assert view.address == view.owner._address
    # Three images: told when made and when first reused, and one of them when it grew.
    assert [image.asked for image in buffers.images] == [3, 2, 2]
