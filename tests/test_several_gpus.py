"""Several processes, one a GPU: the boxes of one, in order; errors and deaths are told."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.tiny_detector import CELL, load_named, load_tiny, write_cells

from trt_yolov6.data.images import read_image
from trt_yolov6.data.loader import Batch
from trt_yolov6.detectors.detections import Detections
from trt_yolov6.engines import load_engine
from trt_yolov6.engines.base import LoadOptions
from trt_yolov6.errors import UserError
from trt_yolov6.runtime.annotate import infer_source
from trt_yolov6.runtime.evaluate import evaluate
from trt_yolov6.runtime.predict import process
from trt_yolov6.runtime.several_gpus import (
    _AHEAD,
    _in_order,
    _work,
    check_gpus,
    loader_of,
    process_on_gpus,
    visible_gpus,
)
from trt_yolov6.spec import PredictOptions

SURE = PredictOptions(confidence=0.6, batch=4)


def write_pictures(folder: Path, count: int) -> list[Path]:
    paths = []
    for index in range(count):
        pixels = np.zeros((64, 64, 3), np.uint8)
        x, y = index % 8 * CELL, index // 8 % 8 * CELL
        pixels[y : y + CELL, x : x + CELL, index % 3] = 255
        paths.append(folder / f"{index:03}.png")
        Image.fromarray(pixels).save(paths[-1])
    return paths


def corners(batch: Batch[Path], found: list[Detections]) -> list[Any]:
    return [
        (path.name, one.xyxy.tolist()) for path, one in zip(batch.items, found, strict=True)
    ] + [os.environ.get("CUDA_VISIBLE_DEVICES")]


@dataclass(frozen=True)
class Meet:
    """Returns the corners once a process of every GPU has a batch."""

    folder: Path
    gpus: tuple[str, ...]

    def __call__(self, batch: Batch[Path], found: list[Detections]) -> list[Any]:
        (self.folder / os.environ["CUDA_VISIBLE_DEVICES"]).touch()
        end = time.monotonic() + 60
        while time.monotonic() < end and not all((self.folder / gpu).exists() for gpu in self.gpus):
            time.sleep(0.01)
        return corners(batch, found)


class CodeError(Exception):
    """One that pickle makes, but does not make again."""

    def __init__(self, code: int, *, text: str) -> None:
        super().__init__(f"code {code}: {text}")


def fail(batch: Batch[Path], found: list[Detections]) -> None:
    raise CodeError(7, text="full")


def die(batch: Batch[Path], found: list[Detections]) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_results_come_in_order_and_from_every_process(tmp_path: Path) -> None:
    paths = write_pictures(tmp_path, 50)
    paths[9].write_bytes(b"no picture")
    with load_tiny(tmp_path) as engine:
        wanted = list(process(engine, paths, read_image, corners, SURE, skip_unreadable=True))
        gpus = "5", "7"
        meet = Meet(tmp_path, gpus)
        steps = list(
            process_on_gpus(gpus, engine, iter(paths), read_image, meet, SURE, skip_unreadable=True)
        )
    assert [step.result[:-1] for step in steps] == [step.result[:-1] for step in wanted]
    assert {step.result[-1] for step in steps} == {"5", "7"}
    (failure,) = [failure for step in steps for failure in step.batch.failures]
    assert failure[0] == paths[9]


@dataclass(frozen=True)
class Sent:
    items: tuple[int, ...] = ()
    failures: tuple[int, ...] = ()


@dataclass(frozen=True)
class Step:
    result: bytes
    notes: tuple[str, ...] = ()
    batch: Sent = Sent()


def work(end: Any, begin: threading.Event, taken: list[int]) -> None:
    """Take batches as a process does: hand one out only when there are five after it."""
    held: list[int] = []

    def give_back() -> None:
        end.send(("done", Step(pickle.dumps(held.pop(0)))))

    while True:
        if held:
            begin.wait()
        end.send(("give", 1))
        (chunk,) = end.recv()
        if not chunk:
            break
        held += chunk
        taken += chunk
        if len(held) > 5:
            give_back()
    while held:
        give_back()
    end.send(("end", None))


def test_a_process_that_starts_late_does_not_stop_the_others() -> None:
    """They may have all that they may have ahead of the batch whose results come next."""
    begin, at_once = threading.Event(), threading.Event()
    at_once.set()
    taken: tuple[list[int], list[int]] = [], []
    pairs = [multiprocessing.Pipe() for _ in range(2)]
    late, early = (
        threading.Thread(target=work, args=(theirs, event, mine), daemon=True)
        for (_, theirs), event, mine in zip(pairs, (begin, at_once), taken, strict=True)
    )
    found: list[int] = []

    def gather() -> None:
        ends = {ours: None for ours, _ in pairs}
        found.extend(step.result for step in _in_order(ends, ("0", "1"), iter(range(80)), 1))

    gathering = threading.Thread(target=gather, daemon=True)
    late.start()
    gathering.start()
    wait_until(lambda: taken[0] == [0])
    early.start()
    wait_until(lambda: len(taken[1]) == 2 * _AHEAD - 1)
    begin.set()
    gathering.join(30)
    assert found == list(range(80))


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_an_engine_does_not_wait_for_its_results_to_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = write_pictures(tmp_path, 24)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    ours, theirs = multiprocessing.Pipe()
    finished: list[int] = []

    def finish(batch: Batch[Path], _: list[Detections]) -> bytes:
        finished.append(len(batch.items))
        return bytes(2**20)  # more than there is room for on the way

    with load_tiny(tmp_path) as engine:
        arguments: Any = theirs, "0", loader_of(engine), read_image, finish, SURE, {}
        working = threading.Thread(target=_work, args=arguments, daemon=True)
        working.start()
        ours.send([paths[start : start + 4] for start in range(0, 24, 4)])
        ours.send([[]])
        wait_until(lambda: finished == [4] * 6)
        kinds: list[str] = []
        while not kinds or kinds[-1] != "end":
            kinds.append(ours.recv()[0])
        working.join(30)
    assert kinds.count("done") == 6


def test_a_process_takes_no_batch_before_it_is_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The results of the others would wait for that batch as long as it takes to get ready."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    ours, theirs = multiprocessing.Pipe()
    with load_tiny(tmp_path) as engine:
        begun, may_end = threading.Event(), threading.Event()
        infer = type(engine).infer

        def slow(self: Any, images: Any) -> Any:
            begun.set()
            may_end.wait(30)
            return infer(self, images)

        monkeypatch.setattr(type(engine), "infer", slow)
        arguments: Any = theirs, "0", loader_of(engine), read_image, corners, SURE, {}
        working = threading.Thread(target=_work, args=arguments, daemon=True)
        working.start()
        assert begun.wait(30)
        assert not ours.poll(0.2)
        may_end.set()
        assert ours.recv()[0] == "give"
        ours.close()
        working.join(30)


def test_an_error_or_a_death_ends_all(tmp_path: Path) -> None:
    paths = write_pictures(tmp_path, 6)
    with load_tiny(tmp_path) as engine:
        for finish, sentence in ((die, "the process of GPU 3 ended"), (corners, "is damaged")):
            if finish is corners:
                paths[5].write_bytes(b"no picture")
            with pytest.raises(UserError, match=sentence):
                list(process_on_gpus(("3",), engine, paths, read_image, finish, SURE))


def test_an_error_that_cannot_travel_comes_as_its_text(tmp_path: Path) -> None:
    paths = write_pictures(tmp_path, 2)
    with (
        load_tiny(tmp_path) as engine,
        pytest.raises(RuntimeError, match="CodeError: code 7: full"),
    ):
        list(process_on_gpus(("3",), engine, paths, read_image, fail, SURE))


def test_eval_and_infer_give_what_one_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    data = write_cells(tmp_path / "data", 12)
    with load_named(tmp_path) as engine:
        one, two = (
            evaluate(engine, data, replace(SURE, gpus=gpus), progress=False, confusion=True)
            for gpus in (1, 2)
        )
        assert one.ap == two.ap == 1
        assert one.detections == two.detections
        np.testing.assert_array_equal(one.confusion, two.confusion)
        folder = tmp_path / "pictures"
        folder.mkdir()
        write_pictures(folder, 7)
        summaries = [
            infer_source(engine, folder, tmp_path / f"out{gpus}", replace(SURE, gpus=gpus))
            for gpus in (1, 2)
        ]
    names = [sorted(path.name for path in (tmp_path / f"out{gpus}").iterdir()) for gpus in (1, 2)]
    assert names[0] == names[1]
    assert len(names[0]) == 8
    for name in names[0]:
        assert (tmp_path / "out1" / name).read_bytes() == (tmp_path / "out2" / name).read_bytes()
    assert summaries[0].objects == summaries[1].objects == 7


def test_as_many_gpus_are_used_as_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 3")
    assert visible_gpus() == ("2", "3")
    assert check_gpus(1) == ("2",)
    with pytest.raises(UserError, match="2 NVIDIA GPUs, not 3"):
        check_gpus(3)


def test_an_engine_is_loaded_elsewhere_as_it_was_here(tmp_path: Path) -> None:
    options = LoadOptions(threads=1, decoder="yolov6")
    with load_tiny(tmp_path) as tiny, load_engine(tiny.path, options=options) as engine:
        load = pickle.loads(pickle.dumps(loader_of(engine)))
    with load() as other:
        assert (other.path, other.backend) == (engine.path, "onnxruntime")
        assert other.load_options == options
