"""Images through a slot of an engine, its memory in this machine and its kernels on the CPU.

A graph replays the calls that were recorded, with their arguments: what changes from batch to batch
must lie in memory, or the second batch would give the first one's boxes.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.host_images import Library
from support.kernels_on_cpu import letterbox_on_cpu
from support.tiny_detector import load_tiny

from trt_yolov6.data.letterbox import fit
from trt_yolov6.data.loader import fill_row
from trt_yolov6.engines.base import Engine
from trt_yolov6.engines.cuda import letterbox, staging
from trt_yolov6.engines.cuda.device import CudaError
from trt_yolov6.engines.tensorrt import image_slots
from trt_yolov6.engines.tensorrt.image_slots import ImageSlots
from trt_yolov6.errors import UserError
from trt_yolov6.spec import NmsSettings

NMS = NmsSettings()
KINDS = [False, True]


class HostMemory:
    """Memory of this machine in the place of a GPU's and of page-locked memory."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._content = np.full(nbytes, 0xAB, np.uint8)
        self.address = self._content.ctypes.data
        self.freed = False

    def array(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        size = int(np.prod(shape)) * dtype.itemsize
        return self._content[:size].view(dtype).reshape(shape)

    def free(self) -> None:
        self.freed = True


class HostStream:
    """Does what is put on it when it is waited for, in order; records it meanwhile if asked to."""

    handle = 0

    def __init__(self) -> None:
        self.queue: list[Callable[[], None]] = []
        self.recorded: list[Callable[[], None]] | None = None
        self.records = True

    def do(self, work: Callable[[], None]) -> None:
        (self.queue if self.recorded is None else self.recorded).append(work)

    def copy_in(self, target: HostMemory, source: int, nbytes: int, offset: int = 0) -> None:
        assert offset + nbytes <= target.nbytes
        assert not target.freed
        self.do(lambda: _move(target.address + offset, source, nbytes))

    def wait_for(self, event: Any) -> None:
        self.do(event.check)

    def wait(self) -> None:
        while self.queue:
            self.queue.pop(0)()

    @contextlib.contextmanager
    def capture(self) -> Iterator[Any]:
        self.recorded = []
        graph = SimpleNamespace(free=lambda: None)
        try:
            yield graph
            recorded = self.recorded
        finally:
            self.recorded = None
        if not self.records:
            raise UserError("this cannot be recorded")
        graph.launch = lambda stream: [stream.do(work) for work in recorded]


def _move(target: int, source: int, nbytes: int) -> None:
    ctypes.memmove(target, source, nbytes)


class HostEvent:
    def __init__(self) -> None:
        self.stream: Any = None

    def record(self, stream: HostStream) -> None:
        self.stream = stream

    def wait(self) -> None:
        self.stream.wait()


class HostSlot:
    """A slot whose engine is ONNX Runtime."""

    made: list[HostSlot]
    engine: Engine
    records = True

    def __init__(self, shared: Any) -> None:
        self.stream = HostStream()
        self.stream.records = self.records
        self.rows = shared.batch.max
        self.whole: NDArray[Any] = self.engine.empty_input(self.rows)
        self.input_memory = SimpleNamespace(address=self.whole.ctypes.data)
        self.output_memory: dict[str, Any] = {}
        self.can_be_recorded = True
        self.runs = 0
        self.generation = 0
        self.closed = False
        self.made.append(self)

    def prepare(self, rows: int) -> int:
        self.rows = rows
        return self.generation

    def run(self) -> None:
        self.runs += 1
        rows = self.rows

        def work() -> None:
            self.outputs = self.engine.infer(self.whole[:rows])

        self.stream.do(work)

    def copy_outputs(self) -> None:
        self.stream.do(lambda: None)

    def results(self) -> dict[str, NDArray[Any]]:
        return self.outputs

    def close(self) -> None:
        self.closed = True


class HostKernels:
    def __init__(self, library: Library) -> None:
        self.library = library

    def launch(
        self, stream: HostStream, name: str, grid: Any, block: Any, types: Any, values: Any
    ) -> None:
        records, target, height, width, is_bgr, *floats = values
        assert grid == (-(-width // 128), -(-height // 8), grid[2])
        assert block == (32, 8, 1)
        assert len(types) == len(values)
        array = ctypes.c_float * 3

        def work() -> None:
            self.library.run(
                ctypes.c_void_p(records),
                ctypes.c_void_p(target),
                grid[2],
                height,
                width,
                is_bgr,
                array(*floats[:3]),
                array(*floats[3:]),
            )

        stream.do(work)


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Library]:
    kernel = resources.files("trt_yolov6.engines.cuda") / "letterbox.cu"
    with resources.as_file(kernel) as source:
        folder = tmp_path_factory.mktemp("kernel")
        return {kind: letterbox_on_cpu(source, folder, byte_input=kind) for kind in KINDS}


@pytest.fixture(params=KINDS, ids=["float32", "uint8"])
def engine(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    libraries: dict[bool, Library],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Engine]:
    monkeypatch.setattr(
        letterbox,
        "compiled",
        lambda source, defines: HostKernels(libraries["BYTE_INPUT" in defines]),
    )
    for module in (image_slots, staging):
        monkeypatch.setattr(module, "DeviceMemory", HostMemory)
        monkeypatch.setattr(module, "PinnedMemory", HostMemory)
    monkeypatch.setattr(image_slots, "Event", HostEvent)
    monkeypatch.setattr(image_slots, "ExecutionSlot", HostSlot)
    with load_tiny(tmp_path, uint8=request.param) as loaded:
        monkeypatch.setattr(HostSlot, "engine", loaded, raising=False)
        monkeypatch.setattr(HostSlot, "made", [], raising=False)
        yield loaded


def slots_of(engine: Engine) -> ImageSlots:
    locked = SimpleNamespace(holds=lambda array: array.flags.writeable is False)
    made: Any = SimpleNamespace(
        input=engine.input,
        outputs=engine.outputs,
        batch=SimpleNamespace(max=4),
        pinned=locked,
        reading=None,
        record_graph=True,
    )
    return ImageSlots(made, engine.preprocessing)


def image(seed: int) -> NDArray[np.uint8]:
    random = np.random.default_rng(seed)
    pixels: NDArray[np.uint8] = random.integers(0, 256, (*random.integers(1, 200, 2), 3), np.uint8)
    pixels.flags.writeable = seed % 4 != 0  # such lie in page-locked memory here
    return pixels


def wanted(engine: Engine, images: list[NDArray[np.uint8]], rows: int) -> dict[str, NDArray[Any]]:
    array = engine.empty_input(rows)
    array[len(images) :] = 0
    for row, one in zip(array, images, strict=False):
        fill_row(row, one, engine.input, 0, engine.preprocessing)
    return engine.infer(array)


def start(slots: ImageSlots, engine: Engine, images: list[NDArray[np.uint8]], rows: int) -> Any:
    placed = [fit((one.shape[0], one.shape[1]), engine.image_size) for one in images]
    return slots.start(images, placed, rows, NMS, patient=rows % 2 == 0)


def assert_results(found: Any, engine: Engine, images: list[NDArray[np.uint8]], rows: int) -> None:
    for name, value in wanted(engine, images, rows).items():
        np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize("records", [True, False])
def test_batches_give_what_prepared_input_gives(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, records: bool
) -> None:
    monkeypatch.setattr(HostSlot, "records", records)
    slots = slots_of(engine)
    for turn, (count, rows) in enumerate([(1, 1), (4, 4), (1, 1), (4, 4), (2, 4), (1, 1), (3, 3)]):
        images = [image(10 * turn + index) for index in range(count)]
        assert_results(start(slots, engine, images, rows).wait(), engine, images, rows)
    (slot,) = HostSlot.made
    # Of seven batches four were of a size seen before: with graphs, one recording for each of two.
    assert slot.runs == (5 if records else 8)
    slots.close()
    assert slot.closed


@pytest.mark.parametrize("size", [(64, 48), (150, 211)])
def test_images_of_one_size_are_placed_at_once(engine: Engine, size: tuple[int, int]) -> None:
    slots = slots_of(engine)
    random = np.random.default_rng(3)
    for count, locked in [(4, ()), (4, (1, 2)), (3, (0,)), (1, ()), (1, (0,)), (2, (0, 1))]:
        images = [random.integers(0, 256, (*size, 3), np.uint8) for _ in range(count)]
        for index in locked:
            images[index].flags.writeable = False
        assert_results(start(slots, engine, images, count).wait(), engine, images, count)


def test_as_many_slots_are_made_as_batches_are_in_flight(engine: Engine) -> None:
    slots = slots_of(engine)
    batches = [[image(7 * turn + index) for index in range(2)] for turn in range(9)]
    running: list[Any] = []
    for turn, images in enumerate(batches):
        running.append(start(slots, engine, images, 2))
        if turn >= 2:
            assert_results(running[turn - 2].wait(), engine, batches[turn - 2], 2)
    assert len(HostSlot.made) == 3
    found: Any = slots.start([], [], 1, NMS).wait()
    assert found["scores"].shape[0] == 1


def test_what_was_recorded_is_forgotten_when_a_context_changes(engine: Engine) -> None:
    slots = slots_of(engine)
    for turn in range(5):
        images = [image(turn)]
        assert_results(start(slots, engine, images, 1).wait(), engine, images, 1)
        if turn == 2:
            HostSlot.made[0].generation += 1
    assert HostSlot.made[0].runs == 4  # twice: run once, recorded once


def test_memory_that_could_not_grow_is_not_written_to(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A single image of a size seen before goes where the last one went, while that is there."""

    def too_large(nbytes: int) -> HostMemory:
        if nbytes > 100_000:
            raise CudaError("there is no room")
        return HostMemory(nbytes)

    slots = slots_of(engine)
    same = np.random.default_rng(0).integers(0, 256, (*engine.image_size, 3), np.uint8)
    monkeypatch.setattr(staging, "PinnedMemory", too_large)
    assert_results(start(slots, engine, [same], 1).wait(), engine, [same], 1)
    with pytest.raises(CudaError, match="no room"):
        start(slots, engine, [np.zeros((400, 400, 3), np.uint8)], 1)
    assert_results(start(slots, engine, [same], 1).wait(), engine, [same], 1)


def test_a_batch_that_fails_to_start_leaves_its_slot_to_the_next(engine: Engine) -> None:
    slots = slots_of(engine)
    images = [image(1), image(2)]
    with pytest.raises(ValueError, match="zip"):
        slots.start(images, [fit(images[0].shape[:2], engine.image_size)], 2, NMS)
    assert_results(start(slots, engine, images, 2).wait(), engine, images, 2)
    assert len(HostSlot.made) == 1
