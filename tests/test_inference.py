"""Detection on pictures, folders and videos: files, boxes, drawings, and what bad input brings."""

from __future__ import annotations

import contextlib
import csv
import functools
import http.server
import json
import os
import socket
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from support.tiny_detector import CELL, load_tiny

from trt_yolov6.detectors.detections import Detections
from trt_yolov6.engines.base import Engine
from trt_yolov6.errors import UserError
from trt_yolov6.runtime import video as video_writing
from trt_yolov6.runtime.annotate import infer_source
from trt_yolov6.runtime.draw import class_colour, draw_detections
from trt_yolov6.runtime.predict import detect
from trt_yolov6.runtime.video import LONGEST_PAUSE, VideoWriter, h264_encoder
from trt_yolov6.spec import PredictOptions

SURE = PredictOptions(confidence=0.6)


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return load_tiny(tmp_path)


def picture(x: int, y: int, channel: int, factor: int = 1) -> NDArray[np.uint8]:
    """Paint the cell at column x, row y on a black picture of 64 x 48, enlarged by `factor`."""
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[y * CELL : (y + 1) * CELL, x * CELL : (x + 1) * CELL, channel] = 255
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)


def test_detect_takes_arrays_of_any_size_in_order(engine: Engine) -> None:
    found = detect(engine, [picture(1, 2, 0), picture(3, 4, 2, 10)], PredictOptions(0.6, batch=1))
    np.testing.assert_allclose(found[0].xyxy, [[8, 16, 16, 24]])
    np.testing.assert_allclose(found[1].xyxy, [[240, 320, 320, 400]])
    assert [one.class_id.tolist() for one in found] == [[0], [2]]
    assert detect(engine, []) == []


def test_a_generator_s_images_are_let_go_of(engine: Engine, tmp_path: Path) -> None:
    made: list[weakref.ref[NDArray[np.uint8]]] = []
    most = 0
    file = tmp_path / "last.png"
    cv2.imwrite(str(file), picture(1, 1, 0))

    def images() -> Iterator[NDArray[np.uint8] | Path]:
        nonlocal most
        for number in range(40):
            image = picture(number % 8, number % 6, 2)
            made.append(weakref.ref(image))
            most = max(most, sum(one() is not None for one in made))
            yield image
        yield file

    found = detect(engine, images(), PredictOptions(0.6, batch=2))
    corners = [one.xyxy[0, :2].tolist() for one in found[:-1]]
    assert corners == [[CELL * (n % 8), CELL * (n % 6)] for n in range(40)]
    assert [one.path for one in found] == [None] * 40 + [file]
    # Three that came first, three batches on their way, and two whose boxes are being found.
    assert most <= 16


def test_a_missing_file_of_a_list_is_named_before_any_work(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: list[object] = []
    monkeypatch.setattr(engine, "infer", run.append)
    with pytest.raises(UserError, match=r"nothing\.png"):
        detect(engine, [*[picture(1, 1, 0)] * 9, "nothing.png"], PredictOptions(0.6, batch=2))
    assert not run


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((8, 8), np.uint8),
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((8, 8, 3), np.float32),
        np.zeros((0, 8, 3), np.uint8),
    ],
)
def test_detect_refuses_arrays_that_are_no_rgb_images(engine: Engine, image: Any) -> None:
    with pytest.raises(UserError, match="image 1 is"):
        detect(engine, [picture(0, 0, 0), image])


def test_a_folder_gives_pictures_and_one_json_and_names_what_was_unreadable(
    tmp_path: Path, engine: Engine
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    Image.fromarray(picture(1, 2, 0, 10)).save(source / "a.png")
    (source / "b.jpg").write_bytes(b"")
    Image.fromarray(picture(3, 4, 2, 2)).save(source / "c.jpg", quality=95)
    (source / "d.png").write_bytes(b"text")
    summary = infer_source(
        engine, source, tmp_path / "out", PredictOptions(0.6, batch=1), progress=False
    )
    assert [path.name for path in summary.outputs] == ["a.png", "c.jpg"]
    assert (summary.images, summary.objects) == (2, 2)
    assert [Path(path).name for path, _ in summary.failures] == ["b.jpg", "d.png"]
    assert "empty" in summary.failures[0][1]
    first, second = json.loads(summary.files[0].read_text())
    assert (first["file"], first["width"], first["height"]) == ("a.png", 640, 480)
    assert first["detections"] == [
        {"box": [80, 160, 160, 240], "score": 1.0, "class": 0, "name": engine.class_names[0]}
    ]
    assert second["detections"][0]["class"] == 2
    # What was drawn: the picture's size is kept, and something was added to it.
    drawn = np.asarray(Image.open(summary.outputs[0]))
    assert drawn.shape == (480, 640, 3)
    assert (drawn != picture(1, 2, 0, 10)).any()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "a.png",
        "c.jpg",
        "detections.json",
    ]


@pytest.mark.parametrize("name", ["plain.ppm", "plain.jfif"])
def test_a_picture_of_a_type_that_is_not_written_becomes_a_jpeg(
    tmp_path: Path, engine: Engine, name: str
) -> None:
    source = tmp_path / name
    Image.fromarray(picture(1, 2, 0, 10)).save(source)
    summary = infer_source(engine, source, tmp_path / "out", SURE, progress=False)
    assert [path.name for path in summary.outputs] == [f"{name}.jpg"]
    assert Image.open(summary.outputs[0]).format == "JPEG"


@pytest.mark.parametrize("name", ["bad.jpg", "bad.mp4", "missing.jpg", "missing.mp4"])
def test_a_single_unreadable_source_is_refused_and_nothing_written(
    tmp_path: Path, engine: Engine, name: str
) -> None:
    if name.startswith("bad"):
        (tmp_path / name).write_bytes(b"no pixels here")
    with pytest.raises(UserError, match=name):
        infer_source(engine, tmp_path / name, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_no_readable_image_is_refused(tmp_path: Path, engine: Engine) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.png").write_bytes(b"text")
    with pytest.raises(UserError, match=r"no image in .* could be read.*a\.png"):
        infer_source(engine, source, tmp_path / "out", progress=False)


def test_the_sources_own_folder_is_not_written_to(tmp_path: Path, engine: Engine) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(picture(0, 0, 0)).save(path)
    for source in (path, tmp_path):
        with pytest.raises(UserError, match="`output`"):
            infer_source(engine, source, tmp_path, progress=False)


def element(identity: int, content: bytes) -> bytes:
    """Return an element of Matroska's format: its identity, its length in 8 bytes, its content."""
    name = identity.to_bytes((identity.bit_length() + 7) // 8, "big")
    return name + (len(content) | 1 << 56).to_bytes(8, "big") + content


def write_matroska(path: Path, times: list[float]) -> None:
    """Write a video of JPEGs with these times in seconds, which OpenCV's own writer cannot."""
    track = b"".join(
        (
            element(0xD7, b"\x01"),  # number
            element(0x73C5, b"\x01"),
            element(0x83, b"\x01"),  # a video
            element(0x86, b"V_MJPEG"),
            element(
                0xE0,
                element(0xB0, (320).to_bytes(2, "big")) + element(0xBA, (240).to_bytes(2, "big")),
            ),
        )
    )
    clusters = b""
    for number, seconds in enumerate(times):
        frame = cv2.cvtColor(picture(number, 1, 1, 5), cv2.COLOR_RGB2BGR)
        encoded = cv2.imencode(".jpg", frame)[1].tobytes()
        stamp = element(0xE7, round(seconds * 1000).to_bytes(4, "big"))
        clusters += element(0x1F43B675, stamp + element(0xA3, b"\x81\x00\x00\x80" + encoded))
    segment = element(0x1549A966, element(0x2AD7B1, (1_000_000).to_bytes(4, "big")))
    segment += element(0x1654AE6B, element(0xAE, track)) + clusters
    header = element(0x1A45DFA3, element(0x4282, b"matroska"))
    path.write_bytes(header + element(0x18538067, segment))


def write_video(path: Path, frames: int) -> None:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (320, 240))
    assert writer.isOpened()
    for number in range(frames):
        writer.write(picture(number % 8, number % 6, 1, 5))
    writer.release()


def test_a_video_gives_a_video_and_the_boxes_of_each_frame(tmp_path: Path, engine: Engine) -> None:
    source = tmp_path / "ride.v2.avi"
    write_video(source, 13)
    summary = infer_source(
        engine,
        source,
        tmp_path / "out",
        PredictOptions(0.6, batch=4),
        formats=("json", "yolo"),
        progress=False,
    )
    assert summary.images == 13
    assert [path.name for path in summary.outputs] == ["ride.v2.mp4"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("detections.json", "labels", "ride.v2.mp4"),
    ]
    labels = sorted(path.name for path in (tmp_path / "out" / "labels").iterdir())
    assert labels == [f"ride.v2_{number:06d}.txt" for number in range(13)]
    frames = json.loads(summary.files[0].read_text())
    assert [frame["frame"] for frame in frames] == list(range(13))
    assert frames[10]["seconds"] == pytest.approx(1.0)
    for number, frame in enumerate(frames):
        (found,) = frame["detections"]
        x, y = number % 8 * 40, number % 6 * 40
        assert found["box"] == pytest.approx([x, y, x + 40, y + 40], abs=1)
        assert found["class"] == 1
    capture = cv2.VideoCapture(str(summary.outputs[0]))
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 13
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(10)
    there, frame = capture.read()
    assert there
    assert frame.shape == (240, 320, 3)


def test_every_frame_has_its_own_time(tmp_path: Path, engine: Engine) -> None:
    """A camera that records on motion: FFmpeg's own muxer gives a pause as a longer frame."""
    source = tmp_path / "motion.mkv"
    times = [0.0, 0.1, 0.2, 2.0, 2.1, 5.0, 5.1]
    write_matroska(source, times)
    summary = infer_source(engine, source, tmp_path / "out", SURE, progress=False)
    frames = json.loads(summary.files[0].read_text())
    assert [frame["seconds"] for frame in frames] == pytest.approx(times, abs=0.002)
    # The drawn video has a constant rate; a frame is repeated until the next one's time.
    capture = cv2.VideoCapture(str(summary.outputs[0]))
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(10)
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 52
    assert summary.images == 7


def test_a_long_pause_is_cut_to_a_minute(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "x.mp4", rate=1) as writer:
        for seconds in (0, 1, 3600, 3601):
            writer.add(picture(0, 0, 0), seconds)
    assert writer.frames == 2 + LONGEST_PAUSE + 2


@pytest.mark.parametrize("name", ["clip.flv", "clip", "clip.jpg"])
def test_a_video_is_told_by_its_content(tmp_path: Path, engine: Engine, name: str) -> None:
    write_video(tmp_path / "ride.avi", 4)
    (tmp_path / "ride.avi").rename(tmp_path / name)
    summary = infer_source(engine, tmp_path / name, tmp_path / "out", SURE, progress=False)
    assert (summary.images, summary.outputs[0].name) == (4, "clip.mp4")


def test_a_picture_is_told_by_its_content(tmp_path: Path, engine: Engine) -> None:
    Image.fromarray(picture(1, 2, 0, 10)).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.mp4")
    summary = infer_source(engine, tmp_path / "a.mp4", tmp_path / "out", SURE, progress=False)
    assert [path.name for path in summary.outputs] == ["a.mp4.jpg"]


def test_a_video_s_relative_path_may_have_a_colon(
    tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cam:1").mkdir()
    write_video(tmp_path / "cam:1" / "ride.avi", 4)
    monkeypatch.chdir(tmp_path)
    assert infer_source(engine, "cam:1/ride.avi", "out:1", SURE, progress=False).images == 4


def test_a_list_of_images_is_called_one(tmp_path: Path, engine: Engine) -> None:
    (tmp_path / "list.txt").write_text("a.jpg\nb.jpg\n")
    with pytest.raises(UserError, match=r"list\.txt is a text file; give images, .*only Ray reads"):
        infer_source(engine, tmp_path / "list.txt", tmp_path / "out", progress=False)


def test_frames_are_of_videos(tmp_path: Path, engine: Engine) -> None:
    Image.fromarray(picture(1, 2, 0, 10)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="`frames` is for videos"):
        infer_source(engine, tmp_path / "a.png", tmp_path / "out", frames=3, progress=False)


def test_a_format_given_twice_is_one(tmp_path: Path, engine: Engine) -> None:
    Image.fromarray(picture(1, 2, 0, 10)).save(tmp_path / "a.png")
    formats: list[Any] = ["csv", "json", "csv"]
    summary = infer_source(
        engine, tmp_path / "a.png", tmp_path / "out", SURE, formats=formats, progress=False
    )
    assert [path.name for path in summary.files] == ["detections.csv", "detections.json"]
    assert len((tmp_path / "out" / "detections.csv").read_text().splitlines()) == 2


def test_frames_can_be_limited_and_stopped(tmp_path: Path, engine: Engine) -> None:
    write_video(tmp_path / "ride.avi", 20)
    options: dict[str, Any] = {"options": SURE, "progress": False}
    summary = infer_source(engine, tmp_path / "ride.avi", tmp_path / "a", frames=5, **options)
    assert (summary.images, [w for w in summary.warnings if "announces" in w]) == (5, [])
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) > 7

    summary = infer_source(engine, tmp_path / "ride.avi", tmp_path / "b", stop=stop, **options)
    assert (summary.images, [w for w in summary.warnings if "announces" in w]) == (7, [])
    with pytest.raises(UserError, match="was stopped before its first frame"):
        infer_source(engine, tmp_path / "ride.avi", tmp_path / "c", stop=stop, **options)
    assert cv2.VideoCapture(str(summary.outputs[0])).get(cv2.CAP_PROP_FRAME_COUNT) == 7


@pytest.mark.skipif(h264_encoder() is None, reason="needs ffmpeg with an H.264 encoder")
def test_a_drawn_video_plays_in_a_browser_and_no_line_is_cut_off(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "x.mp4", rate=10) as writer:
        for _ in range(3):
            writer.add(np.full((31, 41, 3), 200, np.uint8), writer.frames / 10)
        assert writer.close()
    capture = cv2.VideoCapture(str(tmp_path / "x.mp4"))
    code = int(capture.get(cv2.CAP_PROP_FOURCC)).to_bytes(4, "little")
    assert code in (b"avc1", b"h264")
    assert capture.read()[1].shape == (32, 42, 3)


def test_sub_folders_and_globs_keep_their_folders(tmp_path: Path, engine: Engine) -> None:
    for name in ("in/one/a.png", "in/two/a.png", "in/b.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(1, 2, 0, 10)).save(tmp_path / name)
    for source in (tmp_path / "in", str(tmp_path / "in" / "**" / "*.png")):
        out = tmp_path / f"out{len(str(source))}"
        summary = infer_source(
            engine, source, out, SURE, progress=False, formats=["json", "csv", "yolo"]
        )
        written = sorted(str(path.relative_to(out)) for path in summary.outputs)
        assert written == ["b.png", "one/a.png", "two/a.png"]
        names = sorted(item["file"] for item in json.loads(summary.files[0].read_text()))
        assert names == written
        rows = list(csv.DictReader((out / "detections.csv").open()))
        assert {row["file"] for row in rows} == set(written)
        box = [float(rows[0][key]) for key in ("x1", "y1", "x2", "y2")]
        assert box == [80, 160, 160, 240]
        # Class, centre and sides as fractions of 640 x 480, score.
        line = (out / "labels" / "two" / "a.txt").read_text().split()
        assert [float(word) for word in line] == pytest.approx(
            [0, 120 / 640, 200 / 480, 80 / 640, 80 / 480, 1], abs=1e-4
        )


def test_what_was_drawn_within_the_source_is_not_drawn_on_again(
    tmp_path: Path, engine: Engine
) -> None:
    Image.fromarray(picture(1, 2, 0, 10)).save(tmp_path / "a.png")
    output = tmp_path / "runs" / "infer"
    assert infer_source(engine, tmp_path, output, SURE, progress=False).images == 1
    with pytest.raises(UserError, match=r"runs/infer lies within the source and holds images"):
        infer_source(engine, tmp_path, output, SURE, progress=False)
    # A folder above the source, and the source itself, are other cases.
    assert infer_source(engine, output, tmp_path, SURE, progress=False).images == 1
    with pytest.raises(UserError, match="is the folder of the source"):
        infer_source(engine, output, output, SURE, progress=False)


def test_a_name_that_is_not_utf_8_is_written_as_it_is(tmp_path: Path, engine: Engine) -> None:
    source = tmp_path / os.fsdecode(b"gr\xfcn.png")
    Image.fromarray(picture(1, 2, 0, 10)).save(source)
    done = infer_source(
        engine, source, tmp_path / "out", SURE, progress=False, formats=["json", "csv", "yolo"]
    )
    assert json.loads(done.files[0].read_text())[0]["file"] == source.name
    video = source.with_suffix(".avi")
    (tmp_path / "x").write_bytes(b"RIFF")
    (tmp_path / "x").rename(video)
    with pytest.raises(UserError, match=r"\.avi is not a name in UTF-8, .*; rename it"):
        infer_source(engine, video, tmp_path / "out", SURE, progress=False)
    assert b"\ngr\xfcn.png," in done.files[1].read_bytes()
    assert (tmp_path / "out" / "labels" / source.name).with_suffix(".txt").is_file()


def test_two_images_never_share_a_text_file_of_yolo_s(tmp_path: Path, engine: Engine) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.jpg", "a.png"):
        Image.fromarray(picture(1, 2, 0, 10)).save(tmp_path / "in" / name)
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"a\.jpg and a\.png would have one file of labels"):
        infer_source(engine, tmp_path / "in", out, SURE, progress=False, formats=["yolo"])
    assert not out.exists()
    assert infer_source(engine, tmp_path / "in", out, SURE, progress=False).images == 2


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """Serve `tmp_path` on this machine; return the address."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        thread = threading.Thread(target=served.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()


def test_addresses_of_pictures_and_videos_are_fetched(
    tmp_path: Path, engine: Engine, server: str
) -> None:
    Image.fromarray(picture(1, 2, 0, 10)).save(tmp_path / "a b.png")
    write_video(tmp_path / "ride.avi", 4)
    options: dict[str, Any] = {"options": SURE, "progress": False}
    summary = infer_source(engine, f"{server}/a%20b.png", tmp_path / "out", **options)
    assert ([path.name for path in summary.outputs], summary.objects) == (["a_b.png"], 1)
    (tmp_path / "a b.png").rename(tmp_path / "ä b.png")
    assert infer_source(engine, f"{server}/ä b.png", tmp_path / "out", **options).objects == 1
    summary = infer_source(engine, f"{server}/ride.avi", tmp_path / "out", **options)
    assert (summary.images, summary.outputs[0].name) == (4, "ride.mp4")
    # A picture's name does not make one: it is tried as a video, too.
    (tmp_path / "notes.png").write_text("nothing to see")
    with pytest.raises(UserError, match=r"notes\.png holds no frame that can be"):
        infer_source(engine, f"{server}/notes.png", tmp_path / "out", **options)
    with pytest.raises(UserError, match=r"none\.png does not answer \(File not found\)"):
        infer_source(engine, f"{server}/none.png", tmp_path / "out", **options)


def test_what_answers_in_another_protocol_is_named(tmp_path: Path, engine: Engine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
                connection.recv(1000)

        threading.Thread(target=answer, daemon=True).start()
        address = f"http://127.0.0.1:{listening.getsockname()[1]}/x.jpg"
        with pytest.raises(UserError, match=r"does not answer \(SSH-2\.0-OpenSSH_9\.2\); check"):
            infer_source(engine, address, tmp_path / "out", progress=False)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("rtsp://127.0.0.1:9/x", r"the stream rtsp://127\.0\.0\.1:9/x cannot be opened"),
        ("http://127.0.0.1:9/x.jpg", r"http://127\.0\.0\.1:9/x\.jpg does not answer"),
        ("http://127.0.0.1:port/x.jpg", r"does not answer \(nonnumeric port"),
        ("http://[::1/x.jpg", "is not an address"),
        ("http://127.0.0.1:9/\udcff.jpg", "does not answer"),
        ("98", "the camera 98 cannot be opened"),
        ("none/*.jpg", r"none/\*\.jpg matches no file"),
        ("", "an empty string is not the path of images"),
        ("file:///etc/passwd", "begins with file://, which is not supported"),
    ],
)
def test_a_source_that_is_not_there_is_called_what_it_is(
    tmp_path: Path, engine: Engine, source: str, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        infer_source(engine, source, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_video_cut_short_is_processed_as_far_as_it_goes_and_named(
    tmp_path: Path, engine: Engine
) -> None:
    source = tmp_path / "cut.avi"
    write_video(source, 20)
    data = source.read_bytes()
    source.write_bytes(data[: len(data) // 2])
    summary = infer_source(engine, source, tmp_path / "out", SURE, progress=False)
    assert 0 < summary.images < 15
    assert summary.failures == ()
    assert f"cut.avi ends after {summary.images} of the 20 frames" in summary.warnings[0]
    assert len(json.loads(summary.files[0].read_text())) == summary.images


@contextlib.contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """Let every write beyond `size` bytes of a file fail, as on a full disk."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("frames", "size", "named"),
    # The video of 40 frames takes about 58 KiB, the list 12 KiB.
    [(40, 40_000, r"ride\.mp4 could not be written in full"), (40, 9000, r"detections\.json")],
)
def test_a_video_that_the_disk_has_no_room_for_is_refused_and_not_left_behind(
    tmp_path: Path,
    engine: Engine,
    frames: int,
    size: int,
    named: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # An encoder of H.264 would need less than there is room for.
    monkeypatch.setattr(video_writing, "h264_encoder", lambda: None)
    source = tmp_path / "ride.avi"
    write_video(source, frames)
    with files_no_larger_than(size), pytest.raises(UserError, match=named):
        infer_source(engine, source, tmp_path / "out", SURE, progress=False)
    assert not (tmp_path / "out").exists()


def one(box: list[float], label: int = 0) -> Detections:
    return Detections(np.array([box], np.float32), np.array([0.9], np.float32), np.array([label]))


def test_drawing_changes_a_copy_only() -> None:
    image = np.zeros((100, 100, 3), np.uint8)
    drawn = draw_detections(image, one([20, 40, 60, 80]), ["cat"])
    assert not image.any()
    assert (drawn[60, 20] == class_colour(0)).all()
    assert not drawn[60, 35:45].any()  # the inside of the box stays as it was


@pytest.mark.parametrize("shape", [(40, 60), (480, 640), (1200, 900)])
def test_labels_stay_whole_inside_the_picture(shape: tuple[int, int]) -> None:
    height, width = shape
    image = np.full((height, width, 3), 128, np.uint8)

    def changed(x: float, y: float) -> int:
        """Draw a box of next to no size: nearly all that changes is its label."""
        x, y = x * (width - 2), y * (height - 2)
        drawn = draw_detections(image, one([x, y, x + 2, y + 2]), ["cat"])
        return int((drawn != image).any(axis=2).sum())

    free = changed(0.3, 0.6)
    assert free > min(shape) / 45 * min(shape) / 45 * 5
    for corner in ((0, 0), (1, 0), (0, 1), (1, 1)):
        assert changed(*corner) > 0.9 * free


def test_half_a_surrogate_pair_in_a_name_is_drawn_as_a_question_mark() -> None:
    image = np.zeros((100, 100, 3), np.uint8)
    half, mark = (draw_detections(image, one([9, 40, 60, 80]), [name]) for name in ("\ud83d", "?"))
    np.testing.assert_array_equal(half, mark)


def test_lines_grow_with_the_picture() -> None:
    def thickness(side: int) -> int:
        image = np.full((side, side, 3), 128, np.uint8)
        found = one([side * 0.3, side * 0.3, side * 0.8, side * 0.8])
        row = draw_detections(image, found, ["cat"])[side * 6 // 10, : side // 2]
        return int((row == class_colour(0)).all(axis=1).sum())

    assert thickness(100) == 1
    assert thickness(3000) >= 10


def test_classes_have_distinct_colours() -> None:
    colours = [class_colour(index) for index in range(80)]
    assert len(set(colours)) == 80
    near = np.abs(np.diff(np.array(colours), axis=0)).sum(axis=1)
    assert near.min() > 100  # neighbours differ plainly
