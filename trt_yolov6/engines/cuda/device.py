"""The little of CUDA that a TensorRT engine needs: device, memory, streams, events, graphs.

Everything goes through cuda-python, whose calls return an error code first; `_checked` turns that
into an exception. Nothing is imported from it before it is needed, so that this module can say in
one sentence what is missing.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trt_yolov6.errors import MissingDependencyError, UserError


class CudaError(UserError):
    """A CUDA call failed."""


class OutOfGpuMemoryError(CudaError):
    """The GPU has not enough free memory for an allocation."""


@dataclass(frozen=True)
class Device:
    """The GPU that CUDA, and so TensorRT, uses in this process."""

    name: str
    capability: tuple[int, int]
    """Compute capability, major and minor."""

    def __str__(self) -> str:
        return f"{self.name}, compute capability {self.capability[0]}.{self.capability[1]}"


def current_device() -> Device:
    """Return the GPU in use.

    Raises:
        MissingDependencyError: there is no cuda-python, no driver or no GPU; the message says
            which, as one clause without a remedy.
    """
    cudart = _cudart()
    error, count = cudart.cudaGetDeviceCount()
    codes = cudart.cudaError_t
    if error == codes.cudaErrorInsufficientDriver:
        # CUDA says the same of a driver too old and of none at all.
        raise MissingDependencyError("there is no NVIDIA driver, or it is too old for this CUDA")
    if error == codes.cudaErrorNoDevice or not count:
        raise MissingDependencyError("there is no NVIDIA GPU that this process may use")
    index = _checked((error, 0), "cudaGetDeviceCount") or _checked(cudart.cudaGetDevice())
    properties = _checked(cudart.cudaGetDeviceProperties(index))
    return Device(properties.name.decode(), (properties.major, properties.minor))


def free_memory() -> tuple[int, int]:
    """Return the GPU's free and total memory in bytes."""
    cudart = _cudart()
    error, free, total = cudart.cudaMemGetInfo()
    _checked((error,))
    return int(free), int(total)


class DeviceMemory:
    """Bytes on the GPU, freed with this object or by `free`."""

    def __init__(self, nbytes: int) -> None:
        cudart = _cudart()
        self.nbytes = max(nbytes, 1)
        self.address: int = int(_checked(cudart.cudaMalloc(self.nbytes), f"{nbytes / 2**20:.0f}"))
        self.free = weakref.finalize(self, _release, cudart.cudaFree, self.address)


class PinnedMemory:
    """Page-locked bytes of the host, which the GPU copies at full speed."""

    def __init__(self, nbytes: int) -> None:
        cudart = _cudart()
        self.nbytes = max(nbytes, 1)
        self.address: int = int(
            _checked(cudart.cudaMallocHost(self.nbytes), f"{nbytes / 2**20:.0f}")
        )
        self.free = weakref.finalize(self, _release, cudart.cudaFreeHost, self.address)
        # Made once: every type of another length would live on until Python's cycles are collected.
        self._type = ctypes.c_uint8 * self.nbytes
        self._whole = np.frombuffer(memoryview(self.content()), np.uint8)

    def array(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return the first bytes as an array; it must not outlive this object."""
        size = math.prod(shape) * dtype.itemsize
        return self._whole[:size].view(dtype).reshape(shape)

    def content(self) -> Any:
        """Return the bytes as a new ctypes array, whose own life can be watched."""
        return self._type.from_address(self.address)


class PinnedPool:
    """Page-locked arrays to be filled and handed to an engine; they return when nobody uses them.

    Page-locking takes milliseconds, so memory is kept for the next array of the same size.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[PinnedMemory]] = {}
        self._lent: dict[int, PinnedMemory] = {}
        self._closed = False

    def array(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return an array of undefined content; its memory lives as long as it or a view of it."""
        nbytes = math.prod(shape) * dtype.itemsize
        kept = self._free.get(nbytes)
        memory = kept.pop() if kept else PinnedMemory(nbytes)
        content = memory.content()
        self._lent[memory.address] = memory
        weakref.finalize(content, self._take_back, memory)
        return np.frombuffer(memoryview(content), dtype).reshape(shape)

    def holds(self, array: NDArray[Any]) -> bool:
        """Return whether an array lies in memory of this pool, from its first byte to its last."""
        if not self._lent:
            return False
        # `array.ctypes.data`, in a third of its time.
        start = array.__array_interface__["data"][0]
        memory = self._lent.get(start)
        if memory is None:  # not the beginning of a buffer, but perhaps a part of one
            memory = next(
                (
                    one
                    for one in list(self._lent.values())
                    if one.address <= start < one.address + one.nbytes
                ),
                None,
            )
        return memory is not None and start + array.nbytes <= memory.address + memory.nbytes

    def close(self) -> None:
        """Free what is not lent; the rest follows when its arrays are gone."""
        self._closed = True
        for memories in self._free.values():
            for memory in memories:
                memory.free()
        self._free.clear()

    def _take_back(self, memory: PinnedMemory) -> None:
        self._lent.pop(memory.address, None)
        if self._closed:
            memory.free()
        else:
            self._free.setdefault(memory.nbytes, []).append(memory)


class Stream:
    """A CUDA stream: work put on it runs in order, concurrently with the host and other streams."""

    def __init__(self) -> None:
        self._cudart = _cudart()
        # Without the flag it would wait for whatever else the process does on the default stream.
        flag = self._cudart.cudaStreamNonBlocking
        self.handle: int = int(_checked(self._cudart.cudaStreamCreateWithFlags(flag)))
        self.free = weakref.finalize(self, _release, self._cudart.cudaStreamDestroy, self.handle)

    def copy_in(self, target: DeviceMemory, source: int, nbytes: int, offset: int = 0) -> None:
        """Start a copy of `nbytes` from a host address to `offset` bytes into GPU memory."""
        assert offset + nbytes <= target.nbytes
        self._copy(target.address + offset, source, nbytes, "cudaMemcpyHostToDevice")

    def copy_out(self, target: int, source: DeviceMemory, nbytes: int) -> None:
        """Start a copy of the first bytes of GPU memory to a host address."""
        assert nbytes <= source.nbytes
        self._copy(target, source.address, nbytes, "cudaMemcpyDeviceToHost")

    def clear(self, target: DeviceMemory, nbytes: int) -> None:
        """Start setting the first bytes of GPU memory to zero."""
        assert nbytes <= target.nbytes
        _checked(self._cudart.cudaMemsetAsync(target.address, 0, nbytes, self.handle))

    def wait(self) -> None:
        """Wait until all work put on the stream is done, looking all the time."""
        result = self._cudart.cudaStreamSynchronize(self.handle)
        if result[0]:
            _checked(result)

    def wait_for(self, event: Event) -> None:
        """Have what comes next on the stream wait for an event, without waiting here."""
        _checked(self._cudart.cudaStreamWaitEvent(self.handle, event.handle, 0))

    @contextlib.contextmanager
    def capture(self) -> Iterator[CudaGraph]:
        """Record what the block puts on the stream, instead of running it, as a CUDA graph.

        Raises:
            CudaError: the block did what cannot be recorded, such as allocating memory.
        """
        # Only this thread's calls may break the recording, not those of another engine's.
        mode = self._cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        graph = CudaGraph()
        _checked(self._cudart.cudaStreamBeginCapture(self.handle, mode))
        try:
            yield graph
        except BaseException:
            error, recorded = self._cudart.cudaStreamEndCapture(self.handle)
            if int(error) == 0 and int(recorded):
                self._cudart.cudaGraphDestroy(recorded)
            raise
        recorded = _checked(self._cudart.cudaStreamEndCapture(self.handle))
        try:
            graph.instantiate(recorded)
        finally:
            _checked(self._cudart.cudaGraphDestroy(recorded))

    def _copy(self, target: int, source: int, nbytes: int, kind: str) -> None:
        kinds = self._cudart.cudaMemcpyKind
        _checked(
            self._cudart.cudaMemcpyAsync(target, source, nbytes, getattr(kinds, kind), self.handle)
        )


class Event:
    """A point in a stream's work that streams wait for, or this thread without using a core.

    One that is `timed` has a time, and this thread waits for it looking all the time.
    """

    def __init__(self, *, timed: bool = False) -> None:
        self._cudart = cudart = _cudart()
        untimed = cudart.cudaEventDisableTiming | cudart.cudaEventBlockingSync
        flags = cudart.cudaEventDefault if timed else untimed
        self.handle: Any = _checked(cudart.cudaEventCreateWithFlags(flags))
        self.free = weakref.finalize(self, _release, self._cudart.cudaEventDestroy, self.handle)

    def record(self, stream: Stream) -> None:
        """Put the event after all that is on the stream."""
        _checked(self._cudart.cudaEventRecord(self.handle, stream.handle))

    def wait(self) -> None:
        """Wait until the event has happened."""
        _checked(self._cudart.cudaEventSynchronize(self.handle))


class CudaGraph:
    """Work recorded from a stream, launched as a whole: one call instead of one a kernel."""

    def __init__(self) -> None:
        self._cudart = _cudart()
        self._handle: Any = None
        self.free: Callable[[], Any] = lambda: None

    def instantiate(self, recorded: Any) -> None:
        """Make it launchable."""
        self._handle = _checked(self._cudart.cudaGraphInstantiate(recorded, 0))
        self.free = weakref.finalize(
            self, _release, self._cudart.cudaGraphExecDestroy, self._handle
        )

    def launch(self, stream: Stream) -> None:
        """Put the recorded work on a stream."""
        result = self._cudart.cudaGraphLaunch(self._handle, stream.handle)
        if result[0]:
            _checked(result)


def recorded(work: Callable[[], None], stream: Stream) -> CudaGraph | None:
    """Record some work on a stream, instead of running it; None if it cannot be recorded."""
    try:
        with stream.capture() as graph:
            work()
    except UserError:
        return None
    return graph


class Stopwatch:
    """Two CUDA events around work on a stream."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._start, self._stop = Event(timed=True), Event(timed=True)

    def time(self, work: Callable[[], None]) -> float:
        """Return the seconds the GPU took for what `work` puts on the stream."""
        self._start.record(self._stream)
        work()
        self._stop.record(self._stream)
        self._stop.wait()
        events = self._start.handle, self._stop.handle
        return float(_checked(_cudart().cudaEventElapsedTime(*events))) / 1000


def _cudart() -> Any:
    try:
        from cuda.bindings import runtime
    except Exception as error:  # a broken installation raises more than ImportError
        raise MissingDependencyError(
            f"cuda-python is not installed ({error}; `pip install cuda-python`)"
        ) from error
    return runtime


def _checked(result: tuple[Any, ...], mebibytes: str = "?") -> Any:
    """Return the value of a cuda-python call, or raise what its error code means."""
    error, *values = result
    if int(error) != 0:
        cudart = _cudart()
        if error == cudart.cudaError_t.cudaErrorMemoryAllocation:
            raise OutOfGpuMemoryError(
                f"there is no memory for another {mebibytes} MiB; end other programs that use "
                "the GPU, or take a smaller batch."
            )
        if error == cudart.cudaError_t.cudaErrorDevicesUnavailable:
            raise CudaError(
                "the GPU is busy or reserved by another process (see `nvidia-smi`); end that, or "
                "choose another GPU with CUDA_VISIBLE_DEVICES."
            )
        _, text = cudart.cudaGetErrorString(error)
        raise CudaError(
            f"CUDA failed ({text.decode() if text else error}); see whether `nvidia-smi` works, "
            "and try again."
        )
    return values[0] if values else None


def _release(function: Callable[[Any], Any], handle: Any) -> None:
    # The driver may be gone when the interpreter exits, and the memory with it: no error matters.
    function(handle)
