"""An execution slot: execution contexts of a TensorRT engine, their stream and their buffers.

A slot has one batch in flight. An engine begins with one slot. A second one lets a batch be copied
while another is computed; more serve concurrent requests. Slots share the engine's weights; each
has its own scratch memory.

A slot has a context for each batch size. TensorRT-RTX 1.6 loses 3.4 KB of host memory whenever a
context runs with another shape than before, and a CUDA graph belongs to one shape. Only one of a
slot's contexts runs at a time, so they share the scratch memory.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from trt_yolov6.common.machine import usable_cpus
from trt_yolov6.detectors.candidates import Suppressed
from trt_yolov6.engines.cuda.arrays import output_view
from trt_yolov6.engines.cuda.device import (
    CudaError,
    CudaGraph,
    DeviceMemory,
    OutOfGpuMemoryError,
    PinnedMemory,
    PinnedPool,
    Stream,
    recorded,
)
from trt_yolov6.engines.cuda.suppression import Reading, Suppression
from trt_yolov6.engines.tensorrt.flavour import Flavour, instance_of, logger_of
from trt_yolov6.errors import UserError
from trt_yolov6.spec import BatchProfile, NmsSettings, TensorSpec

if TYPE_CHECKING:
    from trt_yolov6.engines.tensorrt import api as trt
    from trt_yolov6.engines.tensorrt.api import IOutputAllocator, IProfiler
else:
    IOutputAllocator = IProfiler = object  # those of the module, see `instance_of`

_COPY_THREADS = min(16, len(usable_cpus()))

_Resource = TypeVar("_Resource", DeviceMemory, PinnedMemory, Stream, Suppression)


_MOST_CONTEXTS = 8
"""Batch sizes that a slot keeps a context for."""


@dataclass(frozen=True)
class SharedState:
    """State shared by all slots of an engine."""

    flavour: Flavour
    path: Path
    device: str
    """Name of the GPU."""
    engine: trt.ICudaEngine
    context_config: trt.IRuntimeConfig | None  # API: tensorrt-rtx (the other gives None)
    """Argument of `create_execution_context`, for scratch memory from outside; None: a context
    allocates its own."""
    input: TensorSpec
    outputs: tuple[TensorSpec, ...]
    batch: BatchProfile
    pinned: PinnedPool
    """The engine's page-locked arrays."""
    record_graph: bool
    """Record runs as CUDA graphs here; TensorRT-RTX does so by itself."""
    reading: Reading | None
    """Places of scores and boxes, for suppression on the GPU; None where there can be none."""


@dataclass
class _BoundContext:
    """An `IExecutionContext` for one shape of the input, and its run recorded as a CUDA graph."""

    context: trt.IExecutionContext
    address: int
    """Memory that it reads its input from."""
    runs: int = 0
    """Runs with the input at this address."""
    graph: CudaGraph | None = None

    def drop_graph(self, stream: Stream) -> None:
        """Free the recorded run, which belongs to one address of the input."""
        self.runs = 0
        if self.graph is not None:
            stream.wait()
            self.graph.free()
            self.graph = None


class ExecutionSlot:
    """Contexts with their stream (`stream`) and buffers for the largest batch.

    Raises:
        OutOfGpuMemoryError: they do not fit on the GPU.
    """

    def __init__(self, shared: SharedState) -> None:
        self._shared = shared
        self._logger = logger_of(shared.flavour.api)
        self._owned: list[DeviceMemory | PinnedMemory | Stream | Suppression] = []
        self._device_outputs: dict[str, DeviceMemory] = {}
        self._host_outputs: dict[str, PinnedMemory] = {}
        self._allocators: dict[str, OutputAllocator] = {}
        self._contexts: dict[tuple[int, ...], _BoundContext] = {}
        self._scratch: DeviceMemory | None = None
        self._record_graph = shared.record_graph
        self._suppression: Suppression | None = None
        self._can_suppress = shared.reading is not None
        self._suppressed: tuple[int, NmsSettings] | None = None
        self._in_use: Any = None
        self._generation = 0
        self._copiers = ThreadPoolExecutor(_COPY_THREADS, thread_name_prefix="to-gpu")
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def start(self, images: Any, nms: NmsSettings | None, *, fetch: bool = True) -> None:
        """Enqueue a run without waiting: copy in, compute, copy out.

        Args:
            images: a NumPy array, or a view of GPU memory (`cuda.arrays.view_of`), of the
                engine's shape and dtype; not to be changed before `finish` returns.
            nms: copy only the boxes that these thresholds keep; None copies all outputs.
            fetch: False leaves the outputs on the GPU.
        """
        shape = tuple(images.shape)
        self._in_use = images
        if isinstance(images, np.ndarray):
            self._send(images)
            address = self._device_input.address
        else:
            address = int(images.ptr)
        self._bind(address, shape)
        self._enqueue()
        self._suppressed = None
        if not fetch:
            return
        suppression = None if nms is None else self._suppression_for(nms)
        if suppression is not None and nms is not None:
            suppression.enqueue(self.stream, self._device_outputs, shape[0], nms)
            self._suppressed = shape[0], nms
        else:
            self.copy_outputs()

    def finish(self) -> dict[str, NDArray[Any]] | Suppressed:
        """Wait for the run that was started, and return what it copied out."""
        try:
            self.stream.wait()
            if self._suppressed is not None:
                assert self._suppression is not None
                found = self._suppression.fetch(*self._suppressed)
                if found is not None:
                    return found
                self.copy_outputs()
                self.stream.wait()
            return self.results()
        finally:
            self._in_use = None

    def finish_on_gpu(self) -> dict[str, Any]:
        """Wait for the run, and return its outputs on the GPU as DLPack objects."""
        self.stream.wait()
        self._in_use = None
        return {
            output.name: output_view(
                self._output_memory(output.name), output, self._output_shape(output.name)
            )
            for output in self._shared.outputs
        }

    def resident(self, images: NDArray[Any]) -> Callable[[], None]:
        """Place a batch on the GPU; return a function that enqueues a run of it."""
        images = np.ascontiguousarray(images)
        memory = DeviceMemory(images.nbytes)
        shape = images.shape
        self.stream.copy_in(memory, images.ctypes.data, images.nbytes)
        self.stream.wait()

        def enqueue() -> None:
            self._bind(memory.address, shape)
            self._enqueue()

        return enqueue

    # --- for runs that others record, see `image_slots` -------------------------------------------

    @property
    def input_memory(self) -> DeviceMemory:
        """Memory that `run` reads its input from."""
        return self._device_input

    @property
    def output_memory(self) -> Mapping[str, DeviceMemory]:
        """Memory that `run` writes outputs to, except those whose size depends on the images."""
        return self._device_outputs

    @property
    def can_be_recorded(self) -> bool:
        """A run allocates nothing, so that a CUDA graph can hold it."""
        return not self._allocators

    def prepare(self, rows: int) -> int:
        """Make the next `run` one of the slot's own input, with `rows` images.

        Returns:
            A number that changes when earlier recordings become invalid.
        """
        self._bind(self._device_input.address, (rows, *self._shared.input.row_shape))
        return self._generation

    def run(self) -> None:
        """Enqueue a run kernel by kernel, so that it can be recorded as a graph."""
        if self._bound.context.execute_async_v3(self.stream.handle):
            return
        for allocator in self._allocators.values():
            if allocator.error is not None:
                raise UserError(
                    f"{self._shared.path} cannot store its detections: {allocator.error}"
                ) from allocator.error
        raise UserError(
            f"{self._shared.path} does not run on the {self._shared.device} "
            f"({self._logger.reason()}); build it again on this machine."
        )

    def copy_outputs(self) -> None:
        """Enqueue the copy of all outputs to the host."""
        for output in self._shared.outputs:
            source = self._device_outputs.get(output.name)
            if source is None:
                continue
            memory = self._host_outputs.get(output.name)
            if memory is None:  # allocated late: suppression usually makes it unnecessary
                memory = self._host_outputs[output.name] = self._own(PinnedMemory(source.nbytes))
            nbytes = math.prod(self._output_shape(output.name)) * output.dtype.itemsize
            self.stream.copy_out(memory.address, source, nbytes)

    def results(self) -> dict[str, NDArray[Any]]:
        """Return the outputs of the run that has just ended, after `copy_outputs`."""
        return {output.name: self._result(output) for output in self._shared.outputs}

    def profile(self, images: NDArray[Any], runs: int) -> dict[str, list[float]]:
        """Run a resident batch several times; return each layer's seconds, one a run, by name.

        Layers are timed one by one, so their sum exceeds the time of a run.
        """
        enqueue = self.resident(images)
        for _ in range(3):
            enqueue()
        self.stream.wait()
        profiler = instance_of(Profiler, self._shared.flavour.api.IProfiler)
        context = self._bound.context
        context.profiler = profiler
        try:
            for _ in range(runs):
                enqueue()
                self.stream.wait()
        finally:
            context.profiler = None
        return profiler.times

    def close(self) -> None:
        """Free the slot's resources, after waiting for a run in progress."""
        if self._in_use is not None:
            with contextlib.suppress(CudaError):
                self.stream.wait()
            self._in_use = None
        # TensorRT wants the contexts gone before the engine.
        while self._contexts:
            self._contexts.popitem()[1].drop_graph(self.stream)
        self._allocators.clear()
        self._copiers.shutdown()
        while self._owned:
            self._owned.pop().free()

    # --- opening ----------------------------------------------------------------------------------

    def _open(self) -> None:
        shared = self._shared
        self.stream = self._own(Stream())
        if shared.context_config is not None:  # API: tensorrt-rtx (the other has no such argument)
            self._scratch = self._own(DeviceMemory(shared.engine.device_memory_size_v2))
        shape = (shared.batch.max, *shared.input.row_shape)
        nbytes = math.prod(shape) * shared.input.dtype.itemsize
        self._device_input = self._own(DeviceMemory(nbytes))
        self._bind(self._device_input.address, shape)
        for output in shared.outputs:
            largest = self._output_shape(output.name)
            if min(largest, default=1) < 0:
                # With the input's shape set, only sizes that depend on the data are unknown.
                self._allocate_late(output.name)
                continue
            nbytes = math.prod(largest) * output.dtype.itemsize
            self._device_outputs[output.name] = self._own(DeviceMemory(nbytes))
        self._place_outputs(self._bound.context)

    def _allocate_late(self, name: str) -> None:
        """Have TensorRT ask for an output's memory when a run knows its size."""
        allocator = instance_of(OutputAllocator, self._shared.flavour.api.IOutputAllocator)
        self._allocators[name] = allocator
        self._host_outputs.pop(name, None)
        self._device_outputs.pop(name, None)
        # Allocating cannot be recorded.
        self._record_graph = False
        for bound in self._contexts.values():
            bound.drop_graph(self.stream)
            bound.context.set_output_allocator(name, allocator)

    def _new_context(self) -> trt.IExecutionContext:
        """Return a context that shares scratch memory and outputs with the others."""
        shared = self._shared
        self._logger.clear()
        arguments = () if shared.context_config is None else (shared.context_config,)
        context = shared.engine.create_execution_context(*arguments)
        if not context:
            raise OutOfGpuMemoryError(
                f"{shared.flavour.label} cannot make room to run ({self._logger.reason()}); end "
                "other programs that use the GPU, or build it for a smaller batch."
            )
        if self._scratch is not None:  # API: tensorrt-rtx (as in `_open`)
            context.set_device_memory(self._scratch.address, self._scratch.nbytes)
        self._place_outputs(context)
        return context

    def _place_outputs(self, context: trt.IExecutionContext) -> None:
        for name, memory in self._device_outputs.items():
            context.set_tensor_address(name, memory.address)
        for name, allocator in self._allocators.items():
            context.set_output_allocator(name, allocator)

    def _own(self, resource: _Resource) -> _Resource:
        """Have `close` free a resource."""
        self._owned.append(resource)
        return resource

    def _suppression_for(self, nms: NmsSettings) -> Suppression | None:
        """Return the suppression on the GPU, made on first use; None without one.

        There is none without NVRTC, or for outputs whose layout or size it does not take.
        """
        shared = self._shared
        if not self._can_suppress or not Suppression.fits(nms):
            return None
        if self._suppression is None:
            assert shared.reading is not None
            if not self._device_outputs.keys() >= set(shared.reading.tensors):
                self._can_suppress = False
                return None
            try:
                self._suppression = self._own(Suppression(shared.reading, shared.batch.max))
            except CudaError:
                self._can_suppress = False
        return self._suppression

    # --- running ----------------------------------------------------------------------------------

    def _send(self, images: NDArray[Any]) -> None:
        """Start the copy of a batch to the GPU.

        Page-locked arrays (`Engine.empty_input`) are copied directly. Others go through page-locked
        memory, which several threads fill, since one is slower than the GPU; finished images are
        sent meanwhile. A single image is faster without that (0.34 ms instead of 0.68 on an H200;
        32 images take 5.6 ms with it and 25 without).
        """
        if len(images) == 1 or self._shared.pinned.holds(images):
            images = np.ascontiguousarray(images)
            self._in_use = images
            self.stream.copy_in(self._device_input, images.ctypes.data, images.nbytes)
            return
        staging = self._shared.pinned.array(images.shape, self._shared.input.dtype)
        self._in_use = staging

        def stage(part: range) -> range:
            np.copyto(staging[part.start : part.stop], images[part.start : part.stop])
            return part

        each = images.nbytes // len(images)
        size = -(-len(images) // _COPY_THREADS)
        parts = [
            range(first, min(first + size, len(images))) for first in range(0, len(images), size)
        ]
        address = staging.ctypes.data
        for part in self._copiers.map(stage, parts):
            offset = part.start * each
            self.stream.copy_in(self._device_input, address + offset, len(part) * each, offset)

    @property
    def _bound(self) -> _BoundContext:
        """The context that runs: the one bound last."""
        return self._contexts[next(reversed(self._contexts))]

    def _bind(self, address: int, shape: tuple[int, ...]) -> None:
        """Bind the input: its address and shape."""
        name = self._shared.input.name
        bound = self._contexts.pop(shape, None)
        if bound is None:
            bound = self._spare_context()
            if not bound.context.set_input_shape(name, shape):
                raise self._misfit(shape)
        if bound.address != address:
            bound.drop_graph(self.stream)
            if not bound.context.set_tensor_address(name, address):
                raise self._misfit(shape)
            bound.address = address
        self._contexts[shape] = bound

    def _spare_context(self) -> _BoundContext:
        """Return a new context or, at the limit of their number, the one unused for longest.

        Where each context has its own scratch memory, there is only one, whose shape changes.
        """
        most = 1 if self._scratch is None else _MOST_CONTEXTS
        if len(self._contexts) < most:
            return _BoundContext(self._new_context(), 0)
        spare = self._contexts.pop(next(iter(self._contexts)))
        spare.drop_graph(self.stream)
        self._generation += 1
        return spare

    def _misfit(self, shape: tuple[int, ...]) -> UserError:
        return UserError(
            f"{self._shared.path} does not take a batch of {shape[0]} ({self._logger.reason()}); "
            "build it again for that batch."
        )

    def _enqueue(self) -> None:
        """Enqueue one run of the bound input.

        From the second run on, TensorRT's kernels are launched as one CUDA graph: a small network
        has some sixty of them, and launching each takes longer than its work. The first run does
        what TensorRT does only once.
        """
        bound = self._bound
        if bound.graph is None and self._record_graph and bound.runs:
            bound.graph = recorded(self.run, self.stream)
            self._record_graph = bound.graph is not None  # otherwise runs are only slower
        if bound.graph is not None:
            bound.graph.launch(self.stream)
        else:
            self.run()
        bound.runs += 1

    def _output_shape(self, name: str) -> tuple[int, ...]:
        if name in self._allocators:
            return self._allocators[name].shape
        return tuple(int(length) for length in self._bound.context.get_tensor_shape(name))

    def _output_memory(self, name: str) -> DeviceMemory:
        memory = self._device_outputs.get(name) or self._allocators[name].memory
        return memory if memory is not None else DeviceMemory(1)

    def _result(self, output: TensorSpec) -> NDArray[Any]:
        """Return a fresh copy of an output of the run that has just ended."""
        shape = self._output_shape(output.name)
        if output.name in self._host_outputs:
            fresh: NDArray[Any] = self._host_outputs[output.name].array(shape, output.dtype).copy()
            return fresh
        result: NDArray[Any] = np.empty(shape, output.dtype)
        if result.size:
            memory = self._output_memory(output.name)
            self.stream.copy_out(result.ctypes.data, memory, result.nbytes)
            self.stream.wait()
        return result


class Profiler(IProfiler):
    """Records the seconds that TensorRT reports, by layer in the engine's order."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = {}

    def report_layer_time(self, layer_name: str, ms: float) -> None:
        self.times.setdefault(layer_name, []).append(ms / 1000)


class OutputAllocator(IOutputAllocator):
    """Memory of an output whose shape only a run determines; the largest so far is kept."""

    def __init__(self) -> None:
        self.memory: DeviceMemory | None = None
        self.shape: tuple[int, ...] = ()
        """Shape of what the last run wrote, which is less than the memory holds."""
        self.error: Exception | None = None

    def reallocate_output_async(  # API: not tensorrt<10 (8 calls the other one)
        self, tensor_name: str, memory: object, size: int, alignment: int, stream: int
    ) -> int:
        return self.reallocate_output(tensor_name, memory, size, alignment)

    def reallocate_output(self, tensor_name: str, memory: object, size: int, alignment: int) -> int:
        # cudaMalloc aligns to 256 bytes, which is all that is ever asked for.
        try:
            if self.memory is None or self.memory.nbytes < size:
                self.memory = DeviceMemory(size)
        except UserError as error:  # TensorRT drops exceptions; a null pointer stops it
            self.error = error
            return 0
        return self.memory.address

    def notify_shape(self, tensor_name: str, shape: trt.Dims) -> None:
        self.shape = tuple(int(length) for length in shape)
