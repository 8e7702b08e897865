"""A TensorRT engine on a GPU, besides its arithmetic: copies, graphs, caches, threads, memory.

The reference is ONNX Runtime on the CPU, or the same engine used in the plainest way.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import resource
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray
from support.gpu import needs_gpu
from support.plan_graphs import detector

from trt_yolov6.data.letterbox import fit
from trt_yolov6.detectors.candidates import Suppressed
from trt_yolov6.detectors.detections import Detections, postprocess
from trt_yolov6.engines.base import BuildSettings, LoadOptions
from trt_yolov6.engines.cuda import device as cuda_device
from trt_yolov6.engines.cuda.arrays import is_contiguous, lies_on_gpu
from trt_yolov6.engines.cuda.suppression import MAX_KEPT
from trt_yolov6.engines.tensorrt import rtx as tensorrt_rtx
from trt_yolov6.engines.tensorrt.runtime_cache import RuntimeCache, cache_path
from trt_yolov6.errors import UserError
from trt_yolov6.spec import BatchProfile, NmsSettings

# --- without a GPU ------------------------------------------------------------------------------


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple),
    st.lists(st.sampled_from([0, 1, 2, 3, 4, 6, 8, 12, 24]), min_size=4, max_size=4),
)
def test_contiguity_is_what_numpy_calls_it(shape: tuple[int, ...], steps: list[int]) -> None:
    strides = tuple(steps[: len(shape)])
    array = as_strided(np.zeros(400, np.int8), shape, strides)
    assert is_contiguous(shape, strides) == array.flags.c_contiguous
    assert is_contiguous(shape, None)


def test_arrays_on_the_cpu_do_not_count_as_gpu_tensors() -> None:
    torch = pytest.importorskip("torch")
    assert not lies_on_gpu(np.zeros(3))
    assert not lies_on_gpu(torch.zeros(3))
    assert not lies_on_gpu([1, 2])


class HostMemory:
    """Ordinary memory in the place of page-locked memory."""

    made = 0

    def __init__(self, nbytes: int) -> None:
        HostMemory.made += 1
        self._content = (ctypes.c_uint8 * nbytes)()
        self.nbytes, self.address, self.freed = nbytes, ctypes.addressof(self._content), False

    def content(self) -> Any:
        return (ctypes.c_uint8 * self.nbytes).from_address(self.address)

    def free(self) -> None:
        self.freed = True


def test_pinned_arrays_are_lent_as_long_as_a_view_lives_and_then_used_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda_device, "PinnedMemory", HostMemory)
    HostMemory.made = 0
    pool = cuda_device.PinnedPool()
    first = pool.array((2, 3), np.dtype(np.float32))
    address = first.ctypes.data
    row = first[1]
    row[:] = 7
    assert pool.holds(first)
    assert pool.holds(row)
    assert not pool.holds(np.zeros((2, 3), np.float32))
    del first
    gc.collect()
    second = pool.array((2, 3), np.dtype(np.float32))
    assert second.ctypes.data != address, "the row still needs the first memory"
    assert (row == 7).all()
    del row
    gc.collect()
    third = pool.array((3, 2), np.dtype(np.float32))
    assert third.ctypes.data == address
    assert HostMemory.made == 2
    pool.close()
    del third
    gc.collect()
    pool.array((1,), np.dtype(np.uint8))


class Cache:
    """A runtime cache that takes contents which begin with its version."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def deserialize(self, content: bytes) -> bool:
        if not content.startswith(b"1.6"):
            return False
        self.content = content
        return True

    def serialize(self) -> bytes:
        return self.content


class Config:
    def __init__(self) -> None:
        self.cache: Any = None

    def create_runtime_cache(self) -> Cache:
        return Cache(b"1.6 empty")

    def set_runtime_cache(self, cache: Cache) -> None:
        self.cache = cache


def test_a_runtime_cache_is_read_only_where_it_fits_and_written_when_it_has_grown(
    tmp_path: Path,
) -> None:
    path = cache_path(tmp_path / "n.trt")
    assert path == tmp_path / "n.trt.runtime-cache"
    for stored, used in ((None, False), (b"1.5 of another version", False), (b"1.6 kernels", True)):
        if stored is not None:
            path.write_bytes(stored)
        cache = RuntimeCache(path)
        config: Any = Config()
        cache.attach(config)
        assert cache.used is used
        if used:
            cache.save()
            assert path.read_bytes() == stored
        config.cache.content += b" and more"
        cache.save()
        assert path.read_bytes() == config.cache.content


def test_a_folder_that_takes_no_runtime_cache_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = RuntimeCache(tmp_path / "file" / "n.trt.runtime-cache")
    config: Any = Config()
    cache.attach(config)
    cache.save()
    assert not cache.used


# --- on a GPU -----------------------------------------------------------------------------------


@pytest.fixture
def plan(gpu_backend: Any, tmp_path: Path) -> Path:
    path = tmp_path / "detector.trt"
    settings = BuildSettings(batch=BatchProfile(1, 2, 4), progress=False)
    path.write_bytes(gpu_backend.build(detector().SerializeToString(), settings))
    return path


@pytest.fixture
def engine(gpu_backend: Any, plan: Path) -> Iterator[Any]:
    with gpu_backend.load(plan, None, LoadOptions()) as loaded:
        yield loaded


def images(batch: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).random((batch, 3, 32, 32), dtype=np.float32)


def same(found: list[Detections], wanted: list[Detections]) -> bool:
    return len(found) == len(wanted) and all(
        np.array_equal(getattr(one, part.name), getattr(other, part.name))
        for one, other in zip(found, wanted, strict=True)
        for part in dataclasses.fields(Detections)
    )


def assert_equal(found: Any, wanted: Any) -> None:
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value)


def assert_same_over_changing_batches(engine: Any, other: Any) -> None:
    for batch in (1, 1, 1, 4, 4, 4, 1, 2, 2, 2):
        for seed in range(2):
            assert_equal(engine.infer(images(batch, seed)), other.infer(images(batch, seed)))


def has_recorded(engine: Any) -> bool:
    """Return whether a CUDA graph of a whole batch has been recorded by this package."""
    bindings = [one for slot in engine._slots for one in slot._contexts.values()]
    return any(one.graph is not None for one in bindings)


@needs_gpu
def test_cuda_graphs_change_no_result(gpu_backend: Any, plan: Path) -> None:
    plain = gpu_backend.load(plan, None, LoadOptions(cuda_graph=False))
    graphed = gpu_backend.load(plan, None, LoadOptions(cuda_graph=True))
    with plain, graphed:
        assert_same_over_changing_batches(graphed, plain)
        # TensorRT-RTX records its graphs itself.
        assert has_recorded(graphed) == (gpu_backend is not tensorrt_rtx)
        assert not has_recorded(plain)


@needs_gpu
def test_a_graph_recorded_here_of_tensorrt_rtx_changes_no_result(
    gpu_backend: Any, plan: Path
) -> None:
    if gpu_backend is not tensorrt_rtx:
        pytest.skip("TensorRT's graphs are always recorded here")
    from trt_yolov6.engines.tensorrt.engine import ContextSettings, TensorRTEngine

    flavour = tensorrt_rtx._flavour()
    cache = RuntimeCache(plan.with_suffix(".cache"))
    config = tensorrt_rtx._runtime_config(flavour.api, cache, False)
    graphed = TensorRTEngine(flavour, plan, None, ContextSettings(config, record_graph=True))
    with gpu_backend.load(plan, None, LoadOptions(cuda_graph=False)) as plain, graphed:
        assert_same_over_changing_batches(graphed, plain)
        assert has_recorded(graphed)


@needs_gpu
def test_batches_in_flight_do_not_disturb_each_other(engine: Any) -> None:
    batches = [images(1 + seed % 4, seed) for seed in range(12)]
    wanted = [engine.infer(batch) for batch in batches]
    running: list[Any] = []
    for index, batch in enumerate(batches):
        running.append(engine.start(batch))
        if index >= engine.in_flight:
            assert_equal(running[index - engine.in_flight].wait(), wanted[index - engine.in_flight])
    for run, outputs in zip(running[-engine.in_flight :], wanted[-engine.in_flight :], strict=True):
        assert_equal(run.wait(), outputs)


@needs_gpu
def test_page_locked_input_gives_what_ordinary_input_gives(engine: Any) -> None:
    for batch in (4, 1):
        ordinary = images(batch, batch)
        locked = engine.empty_input(batch)
        locked[:] = ordinary
        assert_equal(engine.infer(locked), engine.infer(ordinary))


@needs_gpu
def test_gpu_tensors_go_in_and_come_out_without_the_host(engine: Any) -> None:
    torch = pytest.importorskip("torch")
    for batch in (2, 4):
        wanted = engine.infer(images(batch))
        tensor = torch.from_numpy(images(batch)).cuda()
        assert_equal(engine.infer(tensor), wanted)
        outputs = engine.infer_on_gpu(tensor)
        for name, value in wanted.items():
            out = torch.from_dlpack(outputs[name])
            assert out.is_cuda
            np.testing.assert_array_equal(out.cpu().numpy(), value)
    with pytest.raises(UserError, match="contiguous"):
        engine.infer(torch.zeros(2, 32, 32, 3, device="cuda").permute(0, 3, 1, 2))
    with pytest.raises(UserError, match="takes float32"):
        engine.infer(torch.zeros(2, 3, 32, 32, dtype=torch.float16, device="cuda"))
    with pytest.raises(UserError, match="batches of 1 to 4"):
        engine.infer(torch.zeros(5, 3, 32, 32, device="cuda"))


@needs_gpu
@pytest.mark.parametrize("confidence", [0.0, 0.5, 0.999])
def test_what_the_gpu_keeps_is_what_the_cpu_keeps(engine: Any, confidence: float) -> None:
    nms = NmsSettings(confidence, 0.5, 10)
    for batch in (4, 1, 3):
        placed = [fit((50, 64), (32, 32))] * batch
        wanted = postprocess(engine.infer(images(batch)), "split", nms, placed, clip=False)
        found = engine.start(images(batch), nms).wait()
        assert isinstance(found, Suppressed), "is nvidia-cuda-nvrtc there?"
        assert same(postprocess(found, "split", nms, placed, clip=False), wanted)


@needs_gpu
def test_more_candidates_than_there_is_room_for_bring_the_whole_outputs(engine: Any) -> None:
    outputs = engine.infer(images(4))
    nms = NmsSettings(0.0)
    engine.start(images(4), nms).wait()
    for slot in engine._slots:
        if slot._suppression is not None:
            slot._suppression._capacity = 10
    assert_equal(engine.start(images(4), nms).wait(), outputs)


@needs_gpu
def test_more_boxes_than_the_gpu_keeps_bring_the_whole_outputs(engine: Any) -> None:
    nms = NmsSettings(0.0, max_detections=MAX_KEPT + 1)
    assert_equal(engine.start(images(4), nms).wait(), engine.infer(images(4)))


@needs_gpu
def test_the_second_start_uses_the_kernels_that_the_first_compiled(
    gpu_backend: Any, plan: Path
) -> None:
    if gpu_backend is not tensorrt_rtx:
        pytest.skip("a plan of TensorRT holds its kernels")
    with tensorrt_rtx.load(plan, None, LoadOptions()) as first:
        wanted = first.infer(images(2))
    stored = cache_path(plan).read_bytes()
    assert stored
    with tensorrt_rtx.load(plan, None, LoadOptions()) as second:
        assert_equal(second.infer(images(2)), wanted)
    assert cache_path(plan).read_bytes() == stored
    cache_path(plan).write_bytes(stored[: len(stored) // 2])
    with tensorrt_rtx.load(plan, None, LoadOptions()) as third:
        assert_equal(third.infer(images(2)), wanted)


@needs_gpu
def test_two_engines_in_two_threads_give_their_own_results(gpu_backend: Any, plan: Path) -> None:
    engines = [gpu_backend.load(plan, None, LoadOptions()) for _ in range(2)]
    wanted = [[engine.infer(images(2, seed)) for seed in range(8)] for engine in engines]
    wrong: list[str] = []

    def work(index: int) -> None:
        for turn in range(200):
            seed = (turn * (index + 1)) % 8
            found = engines[index].infer(images(2, seed))
            if any(
                not np.array_equal(found[name], value)
                for name, value in wanted[index][seed].items()
            ):
                wrong.append(f"engine {index}, turn {turn}")

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for engine in engines:
        engine.close()
    assert not wrong


@needs_gpu
@pytest.mark.parametrize("sizes", [(2,), (1, 2, 3, 4)], ids=["one batch size", "changing"])
def test_ten_thousand_runs_leak_nothing(engine: Any, sizes: tuple[int, ...]) -> None:
    def use(count: int) -> None:
        for turn in range(count):
            batch = engine.empty_input(sizes[turn % len(sizes)])
            batch[:] = 0.5
            engine.start(batch, NmsSettings(0.5)).wait()

    def host_bytes() -> int:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()

    use(1000)
    free, host = cuda_device.free_memory()[0], host_bytes()
    use(10_000)
    assert cuda_device.free_memory()[0] >= free
    assert host_bytes() - host < 4 << 20


@needs_gpu
def test_the_layers_take_about_the_time_of_the_whole(gpu_backend: Any, plan: Path) -> None:
    with gpu_backend.load(plan, None, LoadOptions(cuda_graph=False)) as loaded:
        layers: Any = loaded
        seconds = layers.layer_times(images(4))
        run = loaded.resident_run(images(4))
        whole = float(np.median([run() for _ in range(50)]))
        assert len(seconds) >= 2
        assert 0 < sum(seconds.values()) < 3 * whole
        loaded.infer(images(2))  # it still runs


@needs_gpu
def test_several_streams_do_more_in_the_same_time(engine: Any) -> None:
    alone, together = engine.resident_run(images(1)), engine.resident_run(images(1), 4)
    for run in (alone, together):
        run()
    # A round is four runs; host time bounds what so small a network gains.
    assert np.median([together() for _ in range(20)]) < 4 * np.median([alone() for _ in range(20)])


@needs_gpu
def test_a_gpu_without_room_is_named_in_one_sentence(gpu_backend: Any, plan: Path) -> None:
    from trt_yolov6.engines.cuda.device import DeviceMemory, OutOfGpuMemoryError

    with pytest.raises(OutOfGpuMemoryError, match="no memory for another"):
        DeviceMemory(1 << 44)
    free, _ = cuda_device.free_memory()
    taken = [DeviceMemory(free - (96 << 20))]
    while True:
        try:
            taken.append(DeviceMemory(1 << 20))
        except OutOfGpuMemoryError:
            break
    try:
        with pytest.raises(UserError) as caught:
            gpu_backend.load(plan, None, LoadOptions()).infer(images(4))
        assert "\n" not in str(caught.value)
    finally:
        for memory in taken:
            memory.free()
