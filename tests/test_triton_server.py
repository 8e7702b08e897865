"""Entries of Triton's Python backend, served by NVIDIA's tritonserver over HTTP and gRPC."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from support.tiny_detector import NAMES, load_tiny

from benchmarks.triton_server import SHARED_MEMORY, Server, find_tritonserver, tritonserver
from trt_yolov6.data.images import list_images, read_image
from trt_yolov6.engines import load_engine
from trt_yolov6.engines.build import BuiltEngine, build_engine
from trt_yolov6.graph.onnx_import import graph_from_onnx
from trt_yolov6.runtime.annotate import infer_source
from trt_yolov6.runtime.predict import detect
from trt_yolov6.serving.triton import ServingSettings, export_triton
from trt_yolov6.spec import BatchProfile, PredictOptions

try:
    find_tritonserver()
    import tritonclient.grpc as over_grpc
    import tritonclient.http as over_http
    from tritonclient.utils import InferenceServerException
except (FileNotFoundError, ImportError) as reason:
    pytest.skip(f"no server to ask: {reason}", allow_module_level=True)

CLIENTS = {"http": over_http, "grpc": over_grpc}

CACHED = "response_cache { enable: true }"
FIRST_COME = """
# Two levels: 1 goes first.
dynamic_batching { priority_levels: 2 default_priority_level: 2 }
"""


@pytest.fixture(scope="module")
def tiny_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The detector of coloured cells, in batches of 1 to 8."""
    folder = tmp_path_factory.mktemp("tiny")
    with load_tiny(folder) as tiny:
        graph = graph_from_onnx(tiny.path, batch=BatchProfile(1, 4, 8), class_names=NAMES)
    return build_engine(graph, backend="onnxruntime", output=folder / "built" / "tiny.onnx").path


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, tiny_engine: Path, sample_engine: BuiltEngine
) -> Iterator[Server]:
    """A server of several entries, one for all tests of this file."""
    folder = tmp_path_factory.mktemp("triton")
    repository = folder / "models"

    def add(engine: Path, name: str, python: Any, extra: str = "", **settings: Any) -> None:
        chosen = ServingSettings(gpus=(), extra=extra, **settings)
        export_triton([engine], repository, chosen, names=[name], python=python)

    add(sample_engine.path, "sample", "pictures")
    add(tiny_engine, "tensors", "tensors", max_queue_delay_us=50_000)
    add(tiny_engine, "pictures", "pictures", instances=2)
    add(tiny_engine, "sure", "pictures", CACHED, predict=PredictOptions(confidence=0.9))
    with load_tiny(folder, batch=4, uint8=True) as fixed:
        add(fixed.path, "fixed", "pictures", FIRST_COME)
        add(fixed.path, "fixed_tensors", "tensors")
    log = folder / "server.log"
    with tritonserver(repository, log, ["--cache-config=local,size=1000000"]) as started:
        yield started


@pytest.fixture
def server_of_tensors(tmp_path: Path, tiny_engine: Path) -> Iterator[Server]:
    """A server for one test, whose log is shown if it does not survive that."""
    repository, log = tmp_path / "models", tmp_path / "server.log"
    settings = ServingSettings(gpus=(), max_queue_delay_us=50_000)
    export_triton([tiny_engine], repository, settings, names=["tensors"], python="tensors")
    with tritonserver(repository, log) as started:
        yield started
        assert started.process.poll() is None, log.read_text()[-4000:]


def client_of(server: Server, protocol: str, **options: Any) -> Any:
    """Return a client; close it."""
    return CLIENTS[protocol].InferenceServerClient(getattr(server, protocol), **options)


def inputs_of(protocol: str, **tensors: NDArray[Any]) -> list[Any]:
    """Return arrays as a client sends them, by name; `object` arrays are bytes."""
    kinds = {"float32": "FP32", "uint8": "UINT8", "object": "BYTES", "float64": "FP64"}
    inputs = []
    for name, value in tensors.items():
        one = CLIENTS[protocol].InferInput(name, list(value.shape), kinds[value.dtype.name])
        one.set_data_from_numpy(value)
        inputs.append(one)
    return inputs


def bytes_array(*pictures: bytes) -> NDArray[np.object_]:
    """Return pictures as a request has them, (n, 1)."""
    array = np.empty((len(pictures), 1), object)
    array[:, 0] = pictures
    return array


def ask(server: Server, model: str, pictures: Sequence[bytes], protocol: str = "http") -> Any:
    """Send pictures in one request, by a client of its own."""
    with contextlib.closing(client_of(server, protocol)) as client:
        return client.infer(model, inputs_of(protocol, picture=bytes_array(*pictures)))


def painted(*cells: tuple[int, int, int], size: int = 64) -> bytes:
    """Return a black PNG with cells of 8 pixels: row, column, and class as in NAMES."""
    image = np.zeros((size, size, 3), np.uint8)
    for row, column, label in cells:
        image[row * 8 : row * 8 + 8, column * 8 : column * 8 + 8, label] = 255
    return encoded(image)


def encoded(image: NDArray[np.uint8], suffix: str = ".png") -> bytes:
    """Return an RGB image as a file's content."""
    return bytes(cv2.imencode(suffix, image[..., ::-1])[1])


def statistics(server: Server, model: str) -> dict[str, Any]:
    """Return the server's counts of a model's requests."""
    with contextlib.closing(client_of(server, "http")) as client:
        return dict(client.get_inference_statistics(model)["model_stats"][0])


def batches_run(server: Server, model: str) -> dict[int, int]:
    """Return how often each batch size was run."""
    return {
        int(one["batch_size"]): int(one["compute_infer"]["count"])
        for one in statistics(server, model)["batch_stats"]
    }


# --- what is answered ---------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", CLIENTS)
def test_boxes_equal_those_of_infer_to_the_last_digit(
    protocol: str, server: Server, sample_engine: BuiltEngine, root: Path, tmp_path: Path
) -> None:
    paths = list_images(root / "samples" / "images" / "val")[:6]
    for path in paths:
        (tmp_path / path.name).symlink_to(path)
    with load_engine(sample_engine.path) as engine:
        summary = infer_source(engine, tmp_path, tmp_path / "out", progress=False)
        expected = detect(engine, [read_image(path) for path in paths])
    written = json.loads(summary.files[0].read_text())
    with ThreadPoolExecutor(len(paths)) as pool:  # at once: so that they share batches
        answers = list(
            pool.map(lambda path: ask(server, "sample", [path.read_bytes()], protocol), paths)
        )
    assert sum(len(one) for one in expected) > 20
    for answer, found, record in zip(answers, expected, written, strict=True):
        boxes, scores, classes = (answer.as_numpy(n)[0] for n in ("boxes", "scores", "classes"))
        assert (boxes.dtype, scores.dtype, classes.dtype) == (np.float32, np.float32, np.int64)
        np.testing.assert_array_equal(boxes, found.xyxy)
        np.testing.assert_array_equal(scores, found.confidence)
        np.testing.assert_array_equal(classes, found.class_id)
        assert answer.as_numpy("count").tolist() == [[len(found)]]
        assert [[round(v, 2) for v in box] for box in boxes.tolist()] == [
            one["box"] for one in record["detections"]
        ]


@pytest.mark.parametrize("protocol", CLIENTS)
def test_raw_outputs_are_the_engines_own(protocol: str, server: Server, tiny_engine: Path) -> None:
    images = np.random.default_rng(0).random((3, 3, 64, 64), np.float32)
    with load_engine(tiny_engine) as engine:
        expected = engine.infer(images)
    with contextlib.closing(client_of(server, protocol)) as client:
        answer = client.infer("tensors", inputs_of(protocol, images=images))
    for name, value in expected.items():
        np.testing.assert_array_equal(answer.as_numpy(name), value)


def test_pictures_of_one_request_are_told_apart(server: Server) -> None:
    pictures = [painted((1, 2, 0), (5, 5, 2)), painted(), painted((0, 0, 1))]
    answer = ask(server, "pictures", pictures)
    assert answer.as_numpy("count").tolist() == [[2], [0], [1]]
    assert answer.as_numpy("classes").tolist() == [[0, 2], [-1, -1], [1, -1]]
    assert answer.as_numpy("boxes")[0].tolist() == [[16, 8, 24, 16], [40, 40, 48, 48]]
    assert answer.as_numpy("scores")[2].tolist() == [1, 0]


def test_class_names_come_with_the_configuration(server: Server) -> None:
    with contextlib.closing(client_of(server, "http")) as client:
        config = client.get_model_config("pictures")
    assert json.loads(config["parameters"]["class_names"]["string_value"]) == list(NAMES)


def test_thresholds_are_those_of_the_export(server: Server) -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    image[:8, :8, 0], image[:8, 8:16, 0] = 255, 180
    assert ask(server, "pictures", [encoded(image)]).as_numpy("count").tolist() == [[2]]
    assert ask(server, "sure", [encoded(image)]).as_numpy("count").tolist() == [[1]]


def test_an_engine_of_a_fixed_batch_serves_fewer_pictures(server: Server) -> None:
    picture = painted((3, 3, 1))
    for count in (1, 3, 4):
        answer = ask(server, "fixed", [picture] * count)
        assert answer.as_numpy("classes").tolist() == [[1]] * count
    with contextlib.closing(client_of(server, "grpc")) as client:
        images = np.zeros((4, 64, 64, 3), np.uint8)
        answer = client.infer("fixed_tensors", inputs_of("grpc", images=images))
    assert answer.as_numpy("scores").shape == (4, 64, 3)


def test_the_example_prints_the_boxes_of_every_picture(
    server: Server, root: Path, tmp_path: Path
) -> None:
    (tmp_path / "one.png").write_bytes(painted((1, 2, 0), (5, 5, 2)))
    (tmp_path / "none.png").write_bytes(b"no picture")
    (tmp_path / "two.png").write_bytes(painted((0, 0, 1)))
    command = [sys.executable, str(root / "examples" / "triton_client.py"), "--model", "pictures"]
    names = ["one.png", "none.png", "two.png"]
    done = subprocess.run(
        [*command, "--server", server.grpc, *names], cwd=tmp_path, capture_output=True, text=True
    )
    assert sorted(done.stdout.splitlines()) == [
        "one.png blue 1.0000 40.00 40.00 48.00 48.00",
        "one.png red 1.0000 16.00 8.00 24.00 16.00",
        "two.png green 1.0000 0.00 0.00 8.00 8.00",
    ]
    assert done.returncode == 1
    assert "none.png: " in done.stderr
    assert "not an image" in done.stderr


# --- batching and the configuration -------------------------------------------------------------


def test_requests_share_batches(server: Server, tiny_engine: Path) -> None:
    images = np.random.default_rng(1).random((32, 1, 3, 64, 64), np.float32)
    with load_engine(tiny_engine) as engine:
        expected = [engine.infer(image)["scores"] for image in images]
    before = statistics(server, "tensors")
    with contextlib.closing(client_of(server, "http", concurrency=32)) as client:
        under_way = [
            client.async_infer("tensors", inputs_of("http", images=image)) for image in images
        ]
        answers = [one.get_result().as_numpy("scores") for one in under_way]
    for answer, scores in zip(answers, expected, strict=True):
        np.testing.assert_array_equal(answer, scores)
    after = statistics(server, "tensors")
    assert after["inference_count"] - before["inference_count"] == 32
    assert 4 <= after["execution_count"] - before["execution_count"] <= 16
    # The engine is tuned for 4, which Triton therefore prefers.
    assert 4 in batches_run(server, "tensors")


def test_two_instances_run_side_by_side(server: Server) -> None:
    log = server.log.read_text()
    assert "pictures_0_0" in log
    assert "pictures_0_1" in log


def test_a_response_cache_is_an_option_of_the_configuration(server: Server) -> None:
    picture = painted((2, 2, 2))
    before = statistics(server, "sure")["inference_stats"]
    first, second = (ask(server, "sure", [picture]).as_numpy("boxes") for _ in range(2))
    np.testing.assert_array_equal(first, second)
    after = statistics(server, "sure")["inference_stats"]
    for outcome in ("cache_miss", "cache_hit"):
        assert after[outcome]["count"] - before[outcome].get("count", 0) == 1


def test_priorities_are_an_option_of_the_configuration(server: Server) -> None:
    with contextlib.closing(client_of(server, "grpc")) as client:
        config = client.get_model_config("fixed").config
        assert config.dynamic_batching.priority_levels == 2
        assert config.dynamic_batching.default_priority_level == 2
        given = inputs_of("grpc", picture=bytes_array(painted((1, 1, 2))))
        answer = client.infer("fixed", given, priority=1)
    assert answer.as_numpy("classes").tolist() == [[2]]


# --- trouble ------------------------------------------------------------------------------------


def png_of_zeros(width: int, height: int) -> bytes:
    """Return a gray PNG of a bit a pixel: a hundred thousandth of what it takes once decoded."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((1 + (width + 7) // 8) * height), 9)
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


JPEG = encoded(np.full((80, 80, 3), 128, np.uint8), ".jpg")

BAD_PICTURES = {
    "text": (b"GET / HTTP/1.1\r\n\r\n", "not an image"),
    "nothing": (b"", "is empty"),
    "a half": (JPEG[: len(JPEG) // 2], "cut short"),
    "400 megapixels": (png_of_zeros(20_000, 20_000), "more pixels than are decoded"),
}


@pytest.mark.parametrize("protocol", CLIENTS)
@pytest.mark.parametrize("kind", BAD_PICTURES)
def test_a_bad_picture_is_an_error_of_its_request_alone(
    kind: str, protocol: str, server: Server
) -> None:
    content, message = BAD_PICTURES[kind]
    good = painted((4, 4, 0))

    def one(index: int) -> str:
        try:
            answer = ask(server, "pictures", [content if index == 3 else good], protocol)
        except InferenceServerException as error:
            return str(error)
        return str(answer.as_numpy("classes").tolist())

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(one, range(8)))
    assert message in answers.pop(3)
    assert answers == ["[[0]]"] * 7


def test_a_huge_picture_is_not_decoded(server: Server) -> None:
    before = server.used()["memory"]
    with pytest.raises(InferenceServerException, match="more pixels"):
        ask(server, "pictures", [BAD_PICTURES["400 megapixels"][0]])
    # Its pixels would take 1.2 GB.
    assert server.used()["memory"] - before < 100e6


@pytest.mark.parametrize("protocol", CLIENTS)
@pytest.mark.parametrize(
    "images",
    [
        np.zeros((1, 3, 64, 63), np.float32),
        np.zeros((1, 64, 64), np.float32),
        np.zeros((9, 3, 64, 64), np.float32),
        np.zeros((1, 3, 64, 64), np.float64),
    ],
    ids=lambda images: f"{images.dtype}{list(images.shape)}",
)
def test_tensors_of_another_shape_are_refused(
    protocol: str, images: NDArray[Any], server: Server
) -> None:
    with contextlib.closing(client_of(server, protocol)) as client:
        with pytest.raises(InferenceServerException):
            client.infer("tensors", inputs_of(protocol, images=images))
        good = np.zeros((1, 3, 64, 64), np.float32)
        client.infer("tensors", inputs_of(protocol, images=good))


def test_clients_that_go_away_leave_the_others_served(server_of_tensors: Server) -> None:
    server = server_of_tensors
    body = json.dumps(
        {
            "inputs": [
                {"name": "images", "shape": [1, 3, 64, 64], "datatype": "FP32", "data": [0] * 12288}
            ]
        }
    ).encode()
    head = (
        f"POST /v2/models/tensors/infer HTTP/1.1\r\nHost: {server.http}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode()
    host, port = server.http.split(":")
    before = server.used()["files"]
    for content in (head, head + body[:100], head + body, b"\x00\xff" * 50):
        for _ in range(5):
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(content)
    images = np.zeros((1, 3, 64, 64), np.float32)
    with contextlib.closing(client_of(server, "grpc")) as client:
        calls = [
            client.async_infer("tensors", inputs_of("grpc", images=images), lambda *_: None)
            for _ in range(20)
        ]
        for call in calls:
            call.cancel()
        assert client.infer("tensors", inputs_of("grpc", images=images)) is not None
    end = time.monotonic() + 10
    while server.used()["files"] > before + 2 and time.monotonic() < end:
        time.sleep(0.1)
    assert server.used()["files"] <= before + 2


def test_a_thousand_requests_at_once_are_all_answered(server: Server) -> None:
    pictures = [painted((row, column, label)) for row in range(8) for column in range(8)
                for label in range(3)]  # fmt: skip
    answers: dict[int, Any] = {}
    done = threading.Semaphore(0)

    def collect(index: int) -> Callable[[Any, Any], None]:
        def call(result: Any, error: Any) -> None:
            answers[index] = error or result
            done.release()

        return call

    with contextlib.closing(client_of(server, "grpc")) as client:
        for index in range(1000):
            given = inputs_of("grpc", picture=bytes_array(pictures[index % len(pictures)]))
            client.async_infer("pictures", given, collect(index))
        for _ in range(1000):
            assert done.acquire(timeout=60)
    for index, answer in answers.items():
        row, rest = divmod(index % len(pictures), 24)
        column, label = divmod(rest, 3)
        assert answer.as_numpy("classes").tolist() == [[label]]
        assert answer.as_numpy("boxes")[0, 0, :2].tolist() == [column * 8, row * 8]
    sizes = batches_run(server, "pictures")
    assert sum(sizes.values()) < sum(size * count for size, count in sizes.items()) / 2


def test_load_leaves_nothing_behind(server: Server) -> None:
    picture = painted((1, 1, 1))
    images = np.zeros((1, 3, 64, 64), np.float32)

    def load(seconds: float) -> int:
        def one(worker: int) -> int:
            protocol = ("http", "grpc")[worker % 2]
            count = 0
            with contextlib.closing(client_of(server, protocol)) as client:
                while time.monotonic() < end:
                    client.infer("tensors", inputs_of(protocol, images=images))
                    client.infer("pictures", inputs_of(protocol, picture=bytes_array(picture)))
                    with contextlib.suppress(InferenceServerException):
                        client.infer("pictures", inputs_of(protocol, picture=bytes_array(b"no")))
                    count += 3
            return count

        end = time.monotonic() + seconds
        with ThreadPoolExecutor(6) as pool:
            return sum(pool.map(one, range(6)))

    load(0.5)
    time.sleep(0.5)
    before = server.used()
    assert load(1) > 50
    time.sleep(0.5)
    after = server.used()
    assert after["shared_memory"] == before["shared_memory"] > 0
    assert after["files"] <= before["files"] + 2
    assert after["memory"] - before["memory"] < 15e6


def test_names_and_paths_stay_inside_the_repository(server: Server) -> None:
    for name in ("..%2f..%2fetc", "..", "%2e%2e/%2e%2e/etc/passwd", "tensors/versions/..%2f.."):
        request = urllib.request.Request(f"http://{server.http}/v2/models/{name}/config")
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request)
        assert refused.value.code in (400, 404)
    with contextlib.closing(client_of(server, "grpc")) as client:
        for name in ("../models/tensors", "/etc"):
            with pytest.raises(InferenceServerException):
                client.load_model(name)


def test_the_server_is_reached_from_this_machine_alone(server: Server) -> None:
    ports = {int(address.rsplit(":", 1)[1]) for address in (server.http, server.grpc)}
    bound = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            address, _, state = line.split()[1:4]
            host, port = address.split(":")
            if state == "0A" and int(port, 16) in ports:
                bound[int(port, 16)] = host
    assert set(bound) == ports
    # 127.0.0.1, as the kernel writes it, for IPv4 and inside IPv6.
    assert set(bound.values()) <= {"0100007F", "0000000000000000FFFF00000100007F"}


def test_a_server_stopped_while_busy_ends_well(tiny_engine: Path, tmp_path: Path) -> None:
    export_triton(
        [tiny_engine], tmp_path / "models", ServingSettings(gpus=()), names=["t"], python="tensors"
    )
    images = np.zeros((1, 3, 64, 64), np.float32)
    stopping = threading.Event()

    def send(protocol: str) -> tuple[int, str]:
        """Return how many requests were answered, and what ended it."""
        answered = 0
        with contextlib.closing(client_of(busy, protocol)) as client:
            while answered < 10 or not stopping.is_set():
                try:
                    answer = client.infer("t", inputs_of(protocol, images=images))
                except InferenceServerException as error:
                    return answered, str(error)
                assert answer.as_numpy("scores").shape == (1, 64, 3)
                answered += 1
        return answered, ""

    with (
        tritonserver(tmp_path / "models", tmp_path / "log") as busy,
        ThreadPoolExecutor(8) as pool,
    ):
        over = [pool.submit(send, protocol) for protocol in ("http", "grpc") * 4]
        time.sleep(0.5)
        children = busy.processes()[1:]
        # HTTP connections are served until their clients close them, of gRPC no new request is.
        threading.Timer(0.5, stopping.set).start()
        assert busy.stop() == 0
        ends = [one.result(20) for one in over]
    assert all(answered >= 10 for answered, _ in ends)
    assert [reason for _, reason in ends[0::2]] == [""] * 4
    assert all("Server is stopping" in reason or not reason for _, reason in ends[1::2])
    assert children
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)
    assert not list(SHARED_MEMORY.glob(f"{busy.region}*"))
