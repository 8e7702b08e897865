"""Boxes above a confidence threshold: the few that post-processing looks at, chosen on the GPU.

A batch of 32 images with 80 classes has 86 MB of scores, of which some thousand matter. Copying
them all to the host, and searching them there, takes longer than the network. So an engine on a GPU
searches its own outputs with one small kernel and copies only what it finds.

The kernel is compiled for the GPU in the machine by NVRTC, NVIDIA's compiler as a library (the
package `nvidia-cuda-nvrtc`). Where that is missing, outputs are copied whole; nothing else changes.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trt_yolov6.detectors.candidates import Candidates
from trt_yolov6.engines.cuda.device import (
    CudaError,
    DeviceMemory,
    PinnedMemory,
    Stream,
    current_device,
)

_SOURCE = r"""
struct Row { int place; float score; float box[4]; };

#ifdef HALF_SCORES
typedef unsigned short Score;  // the bits of a half
__device__ __forceinline__ float value(Score bits) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(bits));
    return result;
}
#else
typedef float Score;
__device__ __forceinline__ float value(Score score) { return score; }
#endif

extern "C" __global__ void candidates(
    const float* __restrict__ boxes,   // (batch, anchors, 4)
    const Score* __restrict__ scores,  // (batch, anchors, classes)
    long long total, int classes, float threshold, unsigned int capacity,
    unsigned int* count, Row* rows)
{
    long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < total; i += step) {
        float score = value(scores[i]);
        if (score > threshold) {
            unsigned int slot = atomicAdd(count, 1u);
            if (slot < capacity) {
                const float* corner = boxes + i / classes * 4;
                Row row;
                row.place = (int)i;
                row.score = score;
                for (int side = 0; side < 4; ++side) row.box[side] = corner[side];
                rows[slot] = row;
            }
        }
    }
}
"""

_ROW = np.dtype([("place", np.int32), ("score", np.float32), ("box", np.float32, 4)])
_TYPES = (
    *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_longlong, ctypes.c_int),
    *(ctypes.c_float, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p),
)
"""Types of the kernel's arguments, in order."""
_HEADER = _ROW.itemsize
"""Bytes in front of the rows: the number of candidates, and padding."""
_THREADS = 256
_PER_THREAD = 8
_FIRST_GUESS = 1024
"""Rows that are copied along with their number, before it is known."""
_CAPACITY = 4096
"""Rows an image has room for on average; with more, the outputs are copied whole."""


class CandidateFilter:
    """The kernel with its buffers, for an engine of the `split` layout.

    Args:
        classes, anchors: of the outputs `boxes` (batch, anchors, 4), float32, and `scores` (batch,
            anchors, classes).
        max_batch: images of the largest batch.
        half_scores: the scores are float16, not float32.

    Raises:
        CudaError: there is no NVRTC, or it cannot compile for this GPU.
    """

    def __init__(
        self, classes: int, anchors: int, max_batch: int, *, half_scores: bool = False
    ) -> None:
        self._kernel = _compiled(current_device().capability, half_scores)
        self._classes = classes
        self._anchors = anchors
        self._capacity = max(30000, _CAPACITY * max_batch)
        nbytes = _HEADER + self._capacity * _ROW.itemsize
        self._found = DeviceMemory(nbytes)
        self._copy = PinnedMemory(nbytes)
        self._guess = _FIRST_GUESS

    def start(
        self, stream: Stream, boxes: DeviceMemory, scores: DeviceMemory, batch: int, least: float
    ) -> None:
        """Search the outputs of a run that is on the stream already, and copy what is found.

        Args:
            boxes, scores: where the engine writes its outputs.
            batch: images in them.
            least: scores above this are candidates.
        """
        from cuda.bindings import driver

        total = batch * self._classes * self._anchors
        blocks = min(-(-total // (_THREADS * _PER_THREAD)), 65535)
        stream.clear(self._found, _HEADER)
        values = (
            boxes.address,
            scores.address,
            total,
            self._classes,
            float(np.float32(least)),
            self._capacity,
            self._found.address,
            self._found.address + _HEADER,
        )
        _check_driver(
            driver.cuLaunchKernel(
                self._kernel, blocks, 1, 1, _THREADS, 1, 1, 0, stream.handle, (values, _TYPES), 0
            )
        )
        self._copied = min(self._guess, self._capacity)
        stream.copy_out(self._copy.address, self._found, _HEADER + self._copied * _ROW.itemsize)

    def finish(self, stream: Stream) -> Candidates | None:
        """Wait for the stream and return what was found; None if there was no room for it."""
        stream.wait()
        count = int(self._copy.array((1,), np.dtype(np.uint32))[0])
        self._guess = max(_FIRST_GUESS, count + count // 4)
        if count > self._capacity:
            return None
        if count > self._copied:
            done = _HEADER + self._copied * _ROW.itemsize
            rest = (count - self._copied) * _ROW.itemsize
            stream.copy_out(self._copy.address, self._found, rest, done)
            stream.wait()
        content = self._copy.array((_HEADER + count * _ROW.itemsize,), np.dtype(np.uint8))
        rows = content[_HEADER:].view(_ROW)
        # Threads finish in any order.
        return candidates_of(rows[np.argsort(rows["place"])], self._classes, self._anchors)

    def free(self) -> None:
        """Free the buffers."""
        self._found.free()
        self._copy.free()


def candidates_of(rows: NDArray[Any], classes: int, anchors: int) -> Candidates:
    """Return candidates from rows of (place in the scores, score, box), sorted by place."""
    images, places = np.divmod(rows["place"].astype(np.int64), classes * anchors)
    points, labels = np.divmod(places, classes)
    return Candidates(images, labels, points, rows["score"].copy(), rows["box"].copy())


@functools.cache
def _compiled(capability: tuple[int, int], half_scores: bool) -> Any:
    """Compile the kernel for a compute capability and load it; a driver's `CUfunction`."""
    try:
        from cuda.bindings import driver, nvrtc

        program = _check_nvrtc(
            nvrtc.nvrtcCreateProgram(_SOURCE.encode(), b"candidates.cu", 0, [], [])
        )
    except (ImportError, RuntimeError) as error:  # the second: its library is not found
        raise CudaError(f"NVRTC does not start ({error}); install nvidia-cuda-nvrtc.") from error
    options = compile_options(capability, half_scores)
    _check_nvrtc(nvrtc.nvrtcCompileProgram(program, len(options), options))
    code = bytes(_check_nvrtc(nvrtc.nvrtcGetCUBINSize(program)))
    _check_nvrtc(nvrtc.nvrtcGetCUBIN(program, code))  # writes into the bytes it is given
    module = _check_driver(driver.cuModuleLoadData(code))
    return _check_driver(driver.cuModuleGetFunction(module, b"candidates"))


def compile_options(capability: tuple[int, int], half_scores: bool) -> list[bytes]:
    """Return NVRTC's options for a compute capability and the scores' type."""
    options = [f"--gpu-architecture=sm_{capability[0]}{capability[1]}".encode()]
    return [*options, b"--define-macro=HALF_SCORES"] if half_scores else options


def _check_nvrtc(result: tuple[Any, ...]) -> Any:
    error, *values = result
    if int(error) != 0:
        raise CudaError(f"NVRTC failed ({error.name}); install nvidia-cuda-nvrtc again.")
    return values[0] if values else None


def _check_driver(result: tuple[Any, ...]) -> Any:
    error, *values = result
    if int(error) != 0:
        raise CudaError(
            f"CUDA failed ({error.name}); see whether `nvidia-smi` works, and try again."
        )
    return values[0] if values else None
