"""On a GPU: letterbox, JPEG decoder and the whole way from images to boxes, against the CPU's."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from support.gpu import needs_gpu

from trt_yolov6.data.coco import CocoImage, load_coco, read_coco_image
from trt_yolov6.data.images import list_images, read_image
from trt_yolov6.data.jpeg import Jpeg, open_image
from trt_yolov6.data.letterbox import fit
from trt_yolov6.data.loader import fill_row
from trt_yolov6.data.preprocessing import Preprocessing
from trt_yolov6.detectors.detections import Detections, postprocess
from trt_yolov6.detectors.families import FAMILIES
from trt_yolov6.engines import LoadOptions, load_engine
from trt_yolov6.engines.base import Engine
from trt_yolov6.engines.build import build_engine
from trt_yolov6.errors import MissingDependencyError
from trt_yolov6.graph.export import ExportSettings, graph_from_checkpoint
from trt_yolov6.runtime.evaluate import evaluate
from trt_yolov6.runtime.predict import SHOWN_CONFIDENCE, detect, process
from trt_yolov6.spec import BatchProfile, NmsSettings, PredictOptions, TensorSpec

pytestmark = needs_gpu

ROOT = Path(__file__).parents[1]
VAL = ROOT / "samples" / "images" / "val"
EIGHT = PredictOptions(batch=8)
OFF = 7e-6
"""Part of the values that the hardware decodes to another number than OpenCV, a level off."""


@pytest.fixture(scope="module", params=[False, True], ids=["float32", "uint8"])
def plan(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample in half precision, for batches of 1 to 8."""
    pytest.importorskip("tensorrt_rtx")
    settings = ExportSettings(fp16=True, uint8_input=request.param, batch=BatchProfile(1, 8, 8))
    graph = graph_from_checkpoint(ROOT / "samples" / "yolov6n_bccd.pt", settings)
    path = tmp_path_factory.mktemp("engine") / "sample.trt"
    build_engine(graph, backend="tensorrt-rtx", output=path)
    return path


@pytest.fixture(scope="module")
def engine(plan: Path) -> Iterator[Engine]:
    with load_engine(plan) as loaded:
        assert loaded.takes_images(), "is nvidia-cuda-nvrtc there?"
        yield loaded


@pytest.fixture
def on_cpu(plan: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """The same engine, images prepared on the CPU."""
    with load_engine(plan) as loaded:
        monkeypatch.setattr(type(loaded), "takes_images", lambda self: self is not loaded)
        yield loaded


def random_image(seed: int) -> NDArray[np.uint8]:
    random = np.random.default_rng(seed)
    height, width = random.integers(1, 1500, 2)
    return random.integers(0, 256, (height, width, 3), np.uint8)


def real_images(count: int) -> list[NDArray[np.uint8]]:
    paths = list_images(VAL)
    images = [read_image(paths[index % len(paths)]) for index in range(count)]
    return [np.ascontiguousarray(image[index:, 2 * index :]) for index, image in enumerate(images)]


def assert_same(found: list[Detections], wanted: list[Detections]) -> None:
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one.xyxy, other.xyxy)
        np.testing.assert_array_equal(one.confidence, other.confidence)
        np.testing.assert_array_equal(one.class_id, other.class_id)


def assert_close(found: Detections, wanted: Detections) -> None:
    """Each of the boxes found is wanted, within what half precision makes of a level of 255.

    Boxes of nearly equal scores may change places, and those near the threshold come and go.
    """
    for one in found:
        if one.confidence < SHOWN_CONFIDENCE + 0.02:
            continue
        assert any(
            one.class_id == other.class_id
            and abs(one.confidence - other.confidence) < 0.02
            and np.allclose(one.xyxy, other.xyxy, atol=3)
            for other in wanted
        ), f"{one} is not among {list(wanted)}"


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("is_byte", [False, True])
def test_the_letterbox_is_bit_for_bit_the_cpus(family: str, is_byte: bool) -> None:
    how, size = FAMILIES[family].preprocessing, (384, 640)
    shape = (None, *size, 3) if is_byte else (None, 3, *size)
    spec = TensorSpec("images", shape, np.dtype(np.uint8 if is_byte else np.float32))
    images = [random_image(seed) for seed in range(12)]
    wanted = np.zeros((13, *(length or 0 for length in shape[1:])), spec.dtype)
    placed = [
        fill_row(row, image, spec, 0, how) for row, image in zip(wanted[:-1], images, strict=True)
    ]
    found = letterboxed(images, placed, spec, how, 13)
    if how.interpolation == "cubic":
        level = 1 if is_byte else max(1 / std for std in how.std)
        np.testing.assert_allclose(found.astype(float), wanted, rtol=0, atol=1.01 * level)
    else:
        np.testing.assert_array_equal(found, wanted)


def letterboxed(
    images: list[NDArray[np.uint8]],
    placed: list[Any],
    spec: TensorSpec,
    how: Preprocessing,
    rows: int,
) -> NDArray[Any]:
    from trt_yolov6.engines.cuda.device import DeviceMemory, PinnedPool, Stream
    from trt_yolov6.engines.cuda.letterbox import (
        RECORD_BYTES,
        LetterboxKernel,
        interleaved,
        write_record,
    )
    from trt_yolov6.engines.cuda.staging import Staging

    kernel, stream, pool = LetterboxKernel(spec, how), Stream(), PinnedPool()
    result = np.empty((rows, *(length or 0 for length in spec.shape[1:])), spec.dtype)
    target, records = DeviceMemory(result.nbytes), DeviceMemory(RECORD_BYTES * rows)
    table = np.zeros(RECORD_BYTES * rows, np.uint8)
    staging = Staging(pool)
    locked = pool.array(images[0].shape, np.dtype(np.uint8))
    locked[:] = images[0]
    addresses, step = staging.place([locked, *images[1:]], stream)
    for row, (address, place) in enumerate(zip(addresses, placed, strict=True)):
        view = interleaved(address, place.source[0], place.source[1], step)
        write_record(table, row, view, place, how.interpolation)
    stream.copy_in(records, table.ctypes.data, table.nbytes)
    kernel.enqueue(stream, records.address, target.address, rows)
    stream.copy_out(result.ctypes.data, target, result.nbytes)
    stream.wait()
    return result


def decoded(jpegs: list[Jpeg], *, first: int = 0) -> list[NDArray[np.uint8] | None]:
    """Decode on the GPU and copy back, upright; before, some of them as a batch of their own."""
    from trt_yolov6.engines.cuda.device import DeviceMemory, Stream
    from trt_yolov6.engines.cuda.jpeg import DecodedBatch, JpegDecoder, nvimgcodec

    try:
        nvimgcodec()
    except MissingDependencyError:
        pytest.skip("needs nvidia-nvimgcodec")
    buffers, stream = DecodedBatch(), Stream()
    found: list[NDArray[np.uint8] | None] = []
    decoder = JpegDecoder()
    decoder.decode(jpegs[:first], DecodedBatch())
    views = decoder.decode(jpegs, buffers)
    assert buffers.ready is not None
    buffers.ready.wait()
    for view in views:
        if view is None:
            found.append(None)
            continue
        spec = TensorSpec("images", (None, *view.shape), np.dtype(np.uint8))
        result = np.empty((1, *view.shape), np.uint8)
        from trt_yolov6.engines.cuda.letterbox import RECORD_BYTES, LetterboxKernel, write_record

        table = np.zeros(RECORD_BYTES, np.uint8)
        target, records = DeviceMemory(result.nbytes), DeviceMemory(RECORD_BYTES)
        write_record(table, 0, view, fit(view.shape[:2], view.shape[:2]), "linear")
        stream.copy_in(records, table.ctypes.data, table.nbytes)
        LetterboxKernel(spec, Preprocessing()).enqueue(stream, records.address, target.address, 1)
        stream.copy_out(result.ctypes.data, target, result.nbytes)
        stream.wait()
        found.append(result[0])
    return found


def test_decoded_pixels_are_opencvs_within_a_few_levels() -> None:
    paths = list_images(VAL)
    jpegs = [one for path in paths if isinstance(one := open_image(path), Jpeg)]
    assert len(jpegs) == len(paths)
    for pixels, path in zip(decoded(jpegs), paths, strict=True):
        assert pixels is not None, path
        difference = np.abs(pixels.astype(int) - read_image(path))
        print(f"{path.name}: mean {difference.mean():.4f}, most {difference.max()}")
        assert difference.mean() < 0.6
        assert difference.max() <= 12


def test_pixels_are_the_same_whatever_was_decoded_before() -> None:
    jpegs = [one for path in list_images(VAL) if isinstance(one := open_image(path), Jpeg)]
    for pixels, wanted in zip(decoded(jpegs, first=1), decoded(jpegs), strict=True):
        np.testing.assert_array_equal(pixels, wanted)


def test_views_lie_where_the_images_do_whatever_their_sizes() -> None:
    """Their addresses are remembered from batch to batch of the same buffers."""
    from trt_yolov6.engines.cuda.jpeg import DecodedBatch, JpegDecoder

    decoder, buffers = JpegDecoder(), DecodedBatch()
    rng = np.random.default_rng(0)
    for count in (4, 4, 3, 4, 5, 2, 5, 5):
        opened = []
        for height, width in rng.integers(16, 900, (count, 2)).tolist():
            out = io.BytesIO()
            Image.new("RGB", (width, height)).save(out, "JPEG")
            opened.append(open_image(out.getvalue()))
        jpegs = [one for one in opened if isinstance(one, Jpeg)]
        for view, jpeg in zip(decoder.decode(jpegs, buffers), jpegs, strict=True):
            assert view is not None
            assert view.shape[:2] == jpeg.size
            assert view.address == view.owner.__cuda_array_interface__["data"][0]


@pytest.mark.parametrize("options", [{}, {"subsampling": "4:4:4"}, {"progressive": True}])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_jpegs_come_upright(options: dict[str, Any], orientation: int) -> None:
    exif, out = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    picture = Image.open(list_images(VAL)[0]).crop((0, 0, 333, 201))
    picture.save(out, "JPEG", exif=exif, quality=92, **options)
    opened = open_image(out.getvalue())
    assert isinstance(opened, Jpeg)
    (found,) = decoded([opened])
    if found is None:
        pytest.skip("this decoder leaves such files to the CPU")
    wanted = read_image(out.getvalue())
    assert found.shape == wanted.shape
    assert np.abs(found.astype(int) - wanted).mean() < 1


@pytest.mark.parametrize("confidence", [0.03, 0.25])
def test_images_give_the_boxes_that_prepared_input_gives(engine: Engine, confidence: float) -> None:
    nms = NmsSettings(confidence)
    for count in (8, 1, 1, 8, 8, 3, 1):
        images = real_images(count)
        array = engine.empty_input(count)
        placed = [
            fill_row(row, image, engine.input, 0, engine.preprocessing)
            for row, image in zip(array, images, strict=True)
        ]
        wanted = postprocess(engine.infer(array), engine.output_layout, nms, placed)
        for rows in (count, 8):
            run = engine.start_images(images, placed, nms, rows=rows, patient=rows == 8)
            found = postprocess(run.wait(), engine.output_layout, nms, placed)
            if rows == count:
                assert_same(found, wanted)
            assert len(found) == count
    slots: Any = engine
    recorded = [len(slot._graphs) for slot in slots._image_slots._slots]
    assert sum(recorded) > 0, "no run was recorded as a CUDA graph"


def test_one_image_gives_its_boxes_wherever_it_lies(engine: Engine) -> None:
    whole: Any = engine
    nms, shown = NmsSettings(0.03), read_image(list_images(VAL)[0])
    for turn, height in enumerate((480, 480, 640, 33, 480, 250)):
        image = np.resize(np.roll(shown, 40 * turn, axis=1), (height, 640, 3))
        array, locked = engine.empty_input(1), whole.empty_image(height, 640)
        locked[:] = image
        placed = [fill_row(array[0], image, engine.input, 0, engine.preprocessing)]
        wanted = postprocess(engine.infer(array), engine.output_layout, nms, placed)
        for one in (image, locked, image[:, ::-1].copy(), image):
            run = engine.start_images([one], placed, nms, clip=True)
            found = postprocess(run.wait(), engine.output_layout, nms, placed)
            if (one == image).all():
                assert_same(found, wanted)


def test_batches_in_flight_do_not_disturb_each_other(engine: Engine) -> None:
    nms = NmsSettings(0.1)
    # Of three sizes: kernels are compiled for each, which takes seconds.
    batches = [real_images((8, 3, 1)[seed % 3])[::-1] for seed in range(16)]
    placed = [[fit(image.shape[:2], engine.image_size) for image in batch] for batch in batches]
    wanted = [
        postprocess(engine.start_images(*pair, nms).wait(), engine.output_layout, nms, pair[1])
        for pair in zip(batches, placed, strict=True)
    ]
    running: list[Any] = []
    for index in range(len(batches) + 3):
        if index < len(batches):
            running.append(engine.start_images(batches[index], placed[index], nms))
        if index >= 3:
            found = postprocess(
                running[index - 3].wait(), engine.output_layout, nms, placed[index - 3]
            )
            assert_same(found, wanted[index - 3])


def test_a_stream_of_arrays_gives_the_boxes_of_the_cpus_way(engine: Engine, on_cpu: Engine) -> None:
    images = real_images(30)
    found, wanted = (
        [
            one
            for step in process(which, range(30), images.__getitem__, lambda _, found: found, EIGHT)
            for one in step.result
        ]
        for which in (engine, on_cpu)
    )
    assert_same(found, wanted)
    assert_same(detect(engine, images[:5]), detect(on_cpu, images[:5]))
    assert_same(detect(engine, images), detect(on_cpu, images))


def test_odd_files_are_read_as_ever(engine: Engine, on_cpu: Engine, tmp_path: Path) -> None:
    picture = Image.open(list_images(VAL)[1])
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "a.jpg", quality=97)
    picture.convert("CMYK").save(tmp_path / "b.jpg", quality=97)
    picture.save(tmp_path / "c.png")
    picture.save(tmp_path / "d.jpg", quality=97, exif=exif)
    picture.convert("L").save(tmp_path / "e.jpg", quality=97)
    gray16 = np.asarray(picture.convert("L")).astype(np.uint16) * 257
    Image.fromarray(gray16).save(tmp_path / "f.png")
    paths = sorted(tmp_path.iterdir()) * 4
    for one, other in zip(detect(engine, paths), detect(on_cpu, paths), strict=True):
        assert one.path == other.path
        assert_close(one, other)
        assert_close(other, one)


def test_the_ap_is_the_cpus(
    engine: Engine, on_cpu: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or differs by what as many values a level off, at random, change it on the CPU's way, too.

    In half precision that is a box more or less at some threshold of the IoU, of 72 images.
    """
    data = load_coco(ROOT / "samples")
    found = evaluate(engine, data, EIGHT, progress=False).ap
    wanted = [evaluate(on_cpu, data, EIGHT, progress=False).ap]
    for seed in range(3):
        random = np.random.default_rng(seed)

        def read(image: CocoImage, random: Any = random) -> NDArray[np.uint8]:
            pixels = read_coco_image(image).astype(np.int16)
            places = random.integers(0, pixels.size, random.poisson(OFF * pixels.size))
            pixels.reshape(-1)[places] += random.choice((-1, 1), len(places))
            return pixels.clip(0, 255).astype(np.uint8)

        monkeypatch.setattr("trt_yolov6.runtime.evaluate.read_coco_image", read)
        one_thread = dataclasses.replace(EIGHT, workers=1)
        wanted.append(evaluate(on_cpu, data, one_thread, progress=False).ap)
    print(f"AP {found:.5f} on the GPU's way; {wanted} on the CPU's, the last with values off")
    assert found is not None
    assert min(filter(None, wanted)) - 5e-4 <= found <= max(filter(None, wanted)) + 5e-4


def test_thousands_of_batches_leak_nothing(engine: Engine) -> None:
    from trt_yolov6.engines.cuda.device import free_memory

    images, nms = real_images(2), NmsSettings()
    placed = [fit(image.shape[:2], engine.image_size) for image in images]
    for _ in range(20):
        engine.start_images(images, placed, nms).wait()
    before, _ = free_memory()
    for _ in range(2000):
        engine.start_images(images, placed, nms).wait()
    assert before - free_memory()[0] < 2**20


def test_without_graphs_the_boxes_are_the_same(engine: Engine, plan: Path) -> None:
    images, nms = real_images(4), NmsSettings()
    placed = [fit(image.shape[:2], engine.image_size) for image in images]
    with load_engine(plan, options=LoadOptions(cuda_graph=False)) as plain:
        for _ in range(3):
            found, wanted = (
                postprocess(
                    one.start_images(images, placed, nms).wait(), one.output_layout, nms, placed
                )
                for one in (engine, plain)
            )
            assert_same(found, wanted)
        slots: Any = plain
        assert not any(slot._graphs for slot in slots._image_slots._slots)
