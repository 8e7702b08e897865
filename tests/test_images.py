"""Images are read as Pillow, an independent reader, reads them; bad ones get one sentence."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps
from support.logs import logged

from trt_yolov6.data.images import list_images, read_image, same_files, upright_size
from trt_yolov6.errors import UserError


@pytest.fixture
def picture() -> NDArray[np.uint8]:
    """A smooth picture, 48 x 64, so that JPEG keeps it."""
    noise = np.random.default_rng(0).integers(0, 256, (6, 8, 3)).astype(np.uint8)
    smooth = cv2.resize(noise, (64, 48), interpolation=cv2.INTER_CUBIC)
    return np.asarray(smooth, np.uint8)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def with_pillow(data: bytes) -> NDArray[np.uint8]:
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "JPEG"])
def test_colours_come_out_as_rgb(picture: NDArray[np.uint8], kind: str) -> None:
    data = encode(Image.fromarray(picture), kind)
    assert np.abs(read_image(data).astype(int) - with_pillow(data)).max() <= 1


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA"])
def test_gray_palette_and_transparent_pngs_become_rgb(
    picture: NDArray[np.uint8], mode: str
) -> None:
    data = encode(Image.fromarray(picture).convert(mode), "PNG")
    read = read_image(data)
    assert read.shape == (48, 64, 3)
    assert read.dtype == np.uint8
    assert np.array_equal(read, with_pillow(data))


def test_a_gray_jpeg_has_three_equal_channels(picture: NDArray[np.uint8]) -> None:
    read = read_image(encode(Image.fromarray(picture).convert("L"), "JPEG"))
    assert (read == read[..., :1]).all()


def test_a_cmyk_jpeg_becomes_rgb(picture: NDArray[np.uint8]) -> None:
    data = encode(Image.fromarray(picture).convert("CMYK"), "JPEG", quality=95)
    assert np.abs(read_image(data).astype(int) - with_pillow(data)).mean() < 3


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_gray_is_scaled_to_the_full_range_of_8_bits(kind: str) -> None:
    deep = np.linspace(0, 65535, 48 * 64).reshape(48, 64).astype(np.uint16)
    read = read_image(encode(Image.fromarray(deep), kind))
    assert np.abs(read[..., 0] - deep / 257).max() <= 0.5 + 1e-6
    assert (read == read[..., :1]).all()


def test_16_bit_colour_keeps_its_channel_order() -> None:
    deep = np.random.default_rng(0).integers(0, 65536, (48, 64, 3)).astype(np.uint16)
    encoded = cv2.imencode(".png", deep[..., ::-1])[1].tobytes()
    assert np.abs(read_image(encoded) - deep / 257).max() <= 0.5 + 1e-6


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_exif_orientation_turns_the_picture_upright(
    tmp_path: Path, picture: NDArray[np.uint8], kind: str, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{kind.lower()}"
    path.write_bytes(encode(Image.fromarray(picture), kind, exif=exif))
    read, wanted = read_image(path), with_pillow(path.read_bytes())
    assert read.shape == wanted.shape == ((48, 64, 3) if orientation < 5 else (64, 48, 3))
    assert np.abs(read.astype(int) - wanted).mean() < 1
    assert upright_size(path) == wanted.shape[1::-1]
    if kind != "TIFF":  # OpenCV turns it in any case
        assert read_image(path, as_stored=True).shape == (48, 64, 3)


def test_the_orientation_of_a_png_may_follow_its_pixels(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    chunk = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    data = encode(Image.new("RGB", (64, 48)), "PNG")
    length, checksum = (len(chunk) - 4).to_bytes(4, "big"), zlib.crc32(chunk).to_bytes(4, "big")
    path = tmp_path / "late.png"
    path.write_bytes(data[:-12] + length + chunk + checksum + data[-12:])
    assert read_image(path).shape == with_pillow(path.read_bytes()).shape == (64, 48, 3)
    assert upright_size(path) == (48, 64)


def test_the_size_of_a_file_is_that_of_its_pixels_whatever_its_xmp_says(tmp_path: Path) -> None:
    said = b'http://ns.adobe.com/xap/1.0/\0<rdf:Description tiff:Orientation="6"/>'
    data = encode(Image.new("RGB", (64, 48)), "JPEG")
    path = tmp_path / "xmp.jpg"
    path.write_bytes(data[:2] + b"\xff\xe1" + (len(said) + 2).to_bytes(2, "big") + said + data[2:])
    with Image.open(path) as image:
        assert image.getexif()[0x0112] == 6
    assert upright_size(path) == read_image(path).shape[1::-1] == (64, 48)


def test_every_sample_image_is_read_as_pillow_reads_it() -> None:
    paths = list_images(Path(__file__).parents[1] / "calib")
    assert len(paths) == 32
    for path in paths:
        difference = np.abs(read_image(path).astype(int) - with_pillow(path.read_bytes()))
        # Decoders may round differently where they upsample colour.
        assert difference.mean() < 0.5


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_a_file_cut_short_is_refused(
    tmp_path: Path, picture: NDArray[np.uint8], kind: str, share: float
) -> None:
    data = encode(Image.fromarray(picture).resize((640, 480)), kind)
    path = tmp_path / f"part.{kind.lower()}"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UserError, match="cut short"):
        read_image(path)


def test_a_jpeg_with_a_thumbnail_is_still_known_to_be_cut_short(
    picture: NDArray[np.uint8],
) -> None:
    thumbnail = encode(Image.fromarray(picture), "JPEG")
    segment = b"\xff\xe1" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail
    whole = encode(Image.fromarray(picture).resize((640, 480)), "JPEG")
    data = whole[:2] + segment + whole[2:]
    assert read_image(data).shape == (480, 640, 3)
    with pytest.raises(UserError, match="cut short"):
        read_image(data[:-500])


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "empty"), (b"hello, I am a text", "not an image"), (b"\xff\xd8\xff", "cut short")],
)
def test_what_is_no_image_is_named_in_one_line(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "bad.jpg"
    path.write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        read_image(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_images_leave_nothing_on_stderr(
    capfd: pytest.CaptureFixture[str], picture: NDArray[np.uint8]
) -> None:
    for kind in ("PNG", "JPEG", "BMP", "TIFF"):
        data = encode(Image.fromarray(picture), kind)
        for cut in (data[: len(data) // 2], data[:60]):
            with pytest.raises(UserError):
                read_image(cut)
    assert capfd.readouterr() == ("", "")


def test_a_picture_of_more_pixels_than_are_decoded_is_called_that() -> None:
    data = bytearray(encode(Image.new("RGB", (1, 1)), "PNG"))
    data[16:24] = (2**17).to_bytes(4, "big") * 2  # what its header says
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    with pytest.raises(UserError, match="huge has more pixels than are decoded"):
        read_image(bytes(data), "huge")


@pytest.mark.parametrize(
    ("shape", "kind"), [((8, 8, 3), np.float32), ((8, 8), np.float32), ((8, 8), np.int32)]
)
def test_samples_of_32_bits_are_refused_because_their_range_is_unknown(
    shape: tuple[int, ...], kind: type[np.generic]
) -> None:
    encoded = cv2.imencode(".tiff", np.ones(shape, kind))[1].tobytes()
    with pytest.raises(UserError, match=f"has {kind.__name__} samples, whose range is unknown"):
        read_image(encoded)


@pytest.mark.parametrize("look", [read_image, upright_size])
def test_more_pixels_than_pillow_opens_are_called_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, look: Callable[[Path], object]
) -> None:
    path = tmp_path / "large.avif"
    path.write_bytes(encode(Image.new("RGB", (64, 48)), "AVIF"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match=r"large\.avif has more pixels than are decoded"):
        look(path)


def test_a_missing_image_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.jpg cannot be read"):
        read_image(tmp_path / "nothing.jpg")


def test_a_folder_lists_its_images_sorted_and_nothing_else(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.png", "notes.txt", ".hidden.jpg"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "c.jpg").mkdir()
    assert [path.name for path in list_images(tmp_path)] == ["a.png", "b.JPG"]
    assert list_images(tmp_path / "notes.txt") == [tmp_path / "notes.txt"]
    with pytest.raises(UserError, match="hold no image"):
        list_images(tmp_path / "c.jpg")
    with pytest.raises(UserError, match="does not exist"):
        list_images(tmp_path / "nowhere")


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    for folder in ("set", "elsewhere"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{folder}.png").write_bytes(b"x")
    (tmp_path / "set" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "set")
    found = [path.relative_to(tmp_path).as_posix() for path in list_images(tmp_path / "set")]
    assert found == ["set/more/elsewhere.png", "set/set.png"]


def test_an_image_is_named_by_its_own_folder_not_by_a_link(tmp_path: Path) -> None:
    # The order of a folder's entries is by a hash of their names on ext4: some of these links came
    # before what they point to.
    expected = []
    for number in range(16):
        folder = tmp_path / f"{number:02}" / "real"
        folder.mkdir(parents=True)
        expected.append(folder / "a.png")
        expected[-1].write_bytes(b"x")
        (folder.parent / "link").symlink_to("real")
        (tmp_path / "00" / f"link{number:02}").symlink_to(folder.parent)
    assert list_images(tmp_path) == expected


def test_pictures_that_a_folder_leaves_out_are_counted_once(tmp_path: Path) -> None:
    for name in ("a.jfif", "b.heic", "c.HEIC", "d.gif", ".e.gif"):
        (tmp_path / name).write_bytes(b"x")
    with logged() as said:
        assert [path.name for path in list_images(tmp_path)] == ["a.jfif"]
        list_images(tmp_path)
    (warning,) = said
    assert warning.endswith("1 .gif, 2 .heic are left out; convert them to JPEG or PNG")


def test_the_same_bytes_are_found_under_whatever_name(tmp_path: Path) -> None:
    contents = {"a": b"one", "b": b"two", "c": b"longer", "d": b"two", "e": b"six", "f": b"other"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    some, others = ([tmp_path / name for name in names] for names in ("abc", "def"))
    assert same_files(some, others) == [(tmp_path / "b", tmp_path / "d")]
