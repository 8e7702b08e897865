"""The little of CUDA that a TensorRT engine needs: the device, memory, a stream, events.

Everything goes through cuda-python, whose calls return an error code first; `_checked` turns that
into an exception. Nothing is imported from it before it is needed, so that this module can say in
one sentence what is missing.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
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

    def array(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return the first bytes as an array; it must not outlive this object."""
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        assert size <= self.nbytes
        content = (ctypes.c_uint8 * size).from_address(self.address)
        return np.frombuffer(memoryview(content), dtype).reshape(shape)


class Stream:
    """A CUDA stream: work put on it runs in order, beside the host."""

    def __init__(self) -> None:
        self._cudart = _cudart()
        self.handle: int = int(_checked(self._cudart.cudaStreamCreate()))
        self.free = weakref.finalize(self, _release, self._cudart.cudaStreamDestroy, self.handle)

    def copy_in(self, target: DeviceMemory, source: int, nbytes: int, offset: int = 0) -> None:
        """Start a copy to the GPU of `nbytes` that lie `offset` bytes behind a host address."""
        assert offset + nbytes <= target.nbytes
        self._copy(target.address + offset, source + offset, nbytes, "cudaMemcpyHostToDevice")

    def copy_out(self, target: int, source: DeviceMemory, nbytes: int) -> None:
        """Start a copy from the GPU to a host address."""
        self._copy(target, source.address, nbytes, "cudaMemcpyDeviceToHost")

    def wait(self) -> None:
        """Wait until all work put on the stream is done."""
        _checked(self._cudart.cudaStreamSynchronize(self.handle))

    def _copy(self, target: int, source: int, nbytes: int, kind: str) -> None:
        kinds = self._cudart.cudaMemcpyKind
        _checked(
            self._cudart.cudaMemcpyAsync(target, source, nbytes, getattr(kinds, kind), self.handle)
        )


class Stopwatch:
    """Two CUDA events around work on a stream."""

    def __init__(self, stream: Stream) -> None:
        self._cudart = _cudart()
        self._stream = stream
        self._start = _checked(self._cudart.cudaEventCreate())
        self._stop = _checked(self._cudart.cudaEventCreate())
        for event in (self._start, self._stop):
            weakref.finalize(self, _release, self._cudart.cudaEventDestroy, event)

    def time(self, work: Callable[[], None]) -> float:
        """Return the seconds the GPU took for what `work` puts on the stream."""
        _checked(self._cudart.cudaEventRecord(self._start, self._stream.handle))
        work()
        _checked(self._cudart.cudaEventRecord(self._stop, self._stream.handle))
        _checked(self._cudart.cudaEventSynchronize(self._stop))
        milliseconds = _checked(self._cudart.cudaEventElapsedTime(self._start, self._stop))
        return float(milliseconds) / 1000


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
        _, text = cudart.cudaGetErrorString(error)
        raise CudaError(
            f"CUDA failed ({text.decode() if text else error}); see whether `nvidia-smi` works, "
            "and try again."
        )
    return values[0] if values else None


def _release(function: Callable[[Any], Any], handle: Any) -> None:
    # The driver may be gone when the interpreter exits, and the memory with it: no error matters.
    function(handle)
