"""The pipeline to an engine that takes images: the same boxes in the same order."""

from __future__ import annotations

import io
import threading
import weakref
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from support.host_images import HostDecoder, HostImagesEngine, Library
from support.kernels_on_cpu import letterbox_on_cpu
from support.tiny_detector import CELL, load_tiny

from trt_yolov6.data.coco import CocoImage, open_coco_image, read_coco_image
from trt_yolov6.data.images import read_image
from trt_yolov6.data.jpeg import Jpeg, open_image
from trt_yolov6.detectors.detections import Detections
from trt_yolov6.engines.cuda.jpeg import DecodedBatch
from trt_yolov6.engines.cuda.letterbox import ImageView
from trt_yolov6.errors import UserError
from trt_yolov6.runtime.predict import detect, process
from trt_yolov6.runtime.several_gpus import get_ready
from trt_yolov6.spec import PredictOptions

MANY = PredictOptions(confidence=0.6, batch=8)
SURE = PredictOptions(confidence=0.6, batch=4)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    kernel = resources.files("trt_yolov6.engines.cuda") / "letterbox.cu"
    with resources.as_file(kernel) as source:
        return letterbox_on_cpu(source, tmp_path_factory.mktemp("kernel"), byte_input=False)


def picture(index: int, factor: int = 8) -> NDArray[np.uint8]:
    """Paint a cell of a black picture of 64 x 48, enlarged, by the picture's number."""
    pixels = np.zeros((48, 64, 3), np.uint8)
    x, y, channel = index % 8, index // 8 % 6, index % 3
    pixels[y * CELL : (y + 1) * CELL, x * CELL : (x + 1) * CELL, channel] = 255
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)


def encoded(index: int) -> bytes:
    """Return a picture as some file: a JPEG of some kind, some turned, or another format."""
    image = Image.fromarray(picture(index, 4 + index % 3))
    kind = index % 7
    options: dict[str, Any] = {"quality": 95}
    if kind == 1:
        exif = Image.Exif()
        exif[0x0112] = 1 + index % 8
        options["exif"] = exif
    if kind == 2:
        image = image.convert("CMYK")
    out = io.BytesIO()
    image.save(out, "PNG" if kind == 3 else "JPEG", **({} if kind == 3 else options))
    return out.getvalue()


def write_all(folder: Path, count: int) -> list[Path]:
    paths = [folder / f"{index:03}.jpg" for index in range(count)]
    for index, path in enumerate(paths):
        path.write_bytes(encoded(index))
    return paths


def found_in(engine: Any, items: list[Path], **options: Any) -> tuple[list[Detections], list[Any]]:
    found: list[Detections] = []
    failures: list[Any] = []
    for step in process(
        engine,
        items,
        read_image,
        lambda _, detections: detections,
        SURE,
        open_item=open_image,
        **options,
    ):
        found += step.result
        failures += step.batch.failures
    return found, failures


def assert_same(found: list[Detections], wanted: list[Detections]) -> None:
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one.xyxy, other.xyxy)
        np.testing.assert_array_equal(one.confidence, other.confidence)
        np.testing.assert_array_equal(one.class_id, other.class_id)


@pytest.mark.parametrize("refused", [(), ("005", "012")])
def test_the_boxes_are_those_of_the_other_way(
    tmp_path: Path, library: Library, refused: tuple[str, ...]
) -> None:
    paths = write_all(tmp_path, 43)
    decoder = HostDecoder(refused)
    with load_tiny(tmp_path) as plain:
        engine = HostImagesEngine(plain, library, decoder)
        wanted, _ = found_in(plain, paths)
        found, failures = found_in(engine, paths)
    assert sum(map(len, wanted)) > 35
    assert_same(found, wanted)
    assert not failures
    # The first four were checked; the rest came as images, JPEGs except for CMYK by the decoder.
    assert engine.taken == [4] * 9 + [3]
    usual = [index for index in range(4, 43) if index % 7 not in (2, 3)]
    assert decoder.decoded == len(usual) - len(refused)
    # Two in the engine, two ready or in the making, one being taken.
    assert len(decoder.batches) <= 5


def test_the_last_batch_is_filled_up_where_each_size_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = write_all(tmp_path, 10)
    paths[9].write_bytes(b"no picture")
    sizes: list[int] = []
    with load_tiny(tmp_path) as engine:
        infer = engine.infer

        def counted(images: Any) -> dict[str, NDArray[Any]]:
            sizes.append(len(images))
            return infer(images)

        monkeypatch.setattr(engine, "infer", counted)
        wanted, _ = found_in(engine, paths, skip_unreadable=True)
        engine.batch_steps = (1, 2, 4, 8)
        found, _ = found_in(engine, paths, skip_unreadable=True)
    assert_same(found, wanted)
    assert sizes == [4, 4, 1, 4, 4, 4]


def test_without_a_decoder_files_are_decoded_here(tmp_path: Path, library: Library) -> None:
    paths = write_all(tmp_path, 11)
    with load_tiny(tmp_path) as plain:
        wanted, _ = found_in(plain, paths)
        for keep in (False, True):
            found, _ = found_in(HostImagesEngine(plain, library), paths, keep_images=keep)
            assert_same(found, wanted)


def test_the_original_images_are_handed_on_where_they_are_wanted(
    tmp_path: Path, library: Library
) -> None:
    paths = write_all(tmp_path, 9)
    decoder = HostDecoder()
    with load_tiny(tmp_path) as plain:
        engine = HostImagesEngine(plain, library, decoder)
        steps = process(
            engine, paths, read_image, lambda batch, _: batch.images, SURE, keep_images=True
        )
        kept = [image for step in steps for image in step.result]
    for path, image in zip(paths, kept, strict=True):
        np.testing.assert_array_equal(image, read_image(path))
    assert decoder.decoded == 0


@pytest.mark.parametrize("bad", [range(2), range(4), (1, 6, 9), range(10)])
def test_unreadable_files_are_left_out_and_named(
    tmp_path: Path, library: Library, bad: Any
) -> None:
    paths = write_all(tmp_path, 10)
    for index in bad:
        paths[index].write_bytes(b"no picture")
    damaged = tmp_path / "damaged.jpg"  # its header is sound
    good = encoded(4)
    damaged.write_bytes(good[: good.index(b"\xff\xda") + 4] + b"\xff\xd9")
    paths.append(damaged)
    with load_tiny(tmp_path) as plain:
        wanted, wanted_failures = found_in(plain, paths, skip_unreadable=True)
        engine = HostImagesEngine(plain, library, HostDecoder(["damaged"]))
        found, failures = found_in(engine, paths, skip_unreadable=True)
        assert_same(found, wanted)
        assert [(item, str(error)) for item, error in failures] == [
            (item, str(error)) for item, error in wanted_failures
        ]
        with pytest.raises(UserError, match=f"{min(bad):03}.jpg is damaged"):
            found_in(engine, paths)


def test_images_in_memory_are_handled_in_the_calling_thread(
    library: Library, tmp_path: Path
) -> None:
    images = [picture(seed) for seed in range(21)]
    threads: set[int] = set()

    def read(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if not any(image is one for one in images[:4]):  # those are prepared and checked
            threads.add(threading.get_ident())
        if image is images[9]:
            raise UserError("this one is bad")
        return image

    def finish(batch: Any, found: list[Detections]) -> tuple[Any, list[Detections]]:
        threads.add(threading.get_ident())
        return batch, found

    def run(engine: Any, **options: Any) -> list[Detections]:
        steps = process(engine, images, read, finish, SURE, in_memory=True, **options)
        return [one for step in steps for one in step.result[1]]

    with load_tiny(tmp_path) as plain:
        wanted = detect(plain, images[:9] + images[10:], MANY)
        engine = HostImagesEngine(plain, library)
        assert_same(run(engine, skip_unreadable=True), wanted)
        assert threads == {threading.get_ident()}
        assert engine.taken == [4, 3, 4, 4, 1]
        engine.taken.clear()
        assert_same(run(engine, skip_unreadable=True), wanted)
        assert engine.taken == [4, 4, 3, 4, 4, 1], "the outputs have been checked"
        with pytest.raises(UserError, match="this one is bad"):
            run(engine)


def test_getting_ready_with_empty_images_changes_no_result(
    tmp_path: Path, library: Library
) -> None:
    paths = write_all(tmp_path, 12)
    with load_tiny(tmp_path) as plain:
        engine = HostImagesEngine(plain, library, HostDecoder())
        wanted, _ = found_in(plain, paths)
        get_ready(engine, SURE, decodes=True)
        assert engine.taken == [4] * 4, "each batch that may be in flight, twice"
        found, _ = found_in(engine, paths)
    assert_same(found, wanted)


def test_it_can_be_left_early(tmp_path: Path, library: Library) -> None:
    paths = write_all(tmp_path, 30)
    with load_tiny(tmp_path) as plain:
        engine = HostImagesEngine(plain, library, HostDecoder())
        steps = process(
            engine,
            iter(paths),
            read_image,
            lambda _, found: found,
            PredictOptions(batch=2),
            open_item=open_image,
        )
        for _ in range(3):
            next(steps)
        steps.close()
        assert sum(engine.taken) < 20


def test_a_few_images_go_the_same_way_once_the_outputs_were_checked(
    tmp_path: Path, library: Library
) -> None:
    paths = write_all(tmp_path, 6)
    with load_tiny(tmp_path) as plain:
        engine = HostImagesEngine(plain, library, HostDecoder(["002"]))
        mixed: list[Any] = [*paths, picture(1)]
        wanted = detect(plain, mixed, MANY)
        for taken in ([], [7]):
            found = detect(engine, mixed, MANY)
            assert_same(found, wanted)
            assert engine.taken == taken


def test_the_files_of_a_few_images_are_there_until_the_run_is_over(
    tmp_path: Path, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU may still be reading them when `decode` returns."""
    files: list[weakref.ref[Jpeg]] = []
    are_there: list[bool] = []
    decoder = HostDecoder()
    decode = decoder.decode

    def keeping(images: Sequence[Jpeg], buffers: DecodedBatch) -> list[ImageView | None]:
        buffers.sources = [*images]
        files.extend(map(weakref.ref, images))
        return decode(images, buffers)

    def infer(images: NDArray[Any]) -> dict[str, NDArray[Any]]:
        are_there.extend(file() is not None for file in files)
        return plain.infer(images)

    monkeypatch.setattr(decoder, "decode", keeping)
    with load_tiny(tmp_path) as plain:
        engine = HostImagesEngine(plain, library, decoder)
        engine.is_checked = True
        monkeypatch.setattr(engine, "infer", infer)
        detect(engine, write_all(tmp_path, 2), MANY)
    assert are_there == [True, True]


def test_a_data_sets_record_says_whether_a_jpeg_is_turned(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.jpg"
    Image.fromarray(picture(3)).save(path, exif=exif)
    for height, width in ((512, 384), (384, 512)):
        record = CocoImage(1, path, height, width)
        opened = open_coco_image(record)
        assert isinstance(opened, Jpeg)
        assert opened.size == read_coco_image(record).shape[:2] == (height, width)
        assert opened.header.orientation == (6 if height > width else 1)
        # Where no GPU decodes it, as without nvImageCodec.
        np.testing.assert_array_equal(opened.read(), read_coco_image(record))
    with pytest.raises(UserError, match=r"turned\.jpg is .* pixels"):
        open_coco_image(CocoImage(1, path, 100, 100))
