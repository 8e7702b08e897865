"""Plan in, runner out: one `Engine` for TensorRT and TensorRT-RTX, with cuda-python underneath."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from trt_yolov6.engines import cuda_device
from trt_yolov6.engines.base import Engine, TensorSpec, check_images
from trt_yolov6.engines.cuda_device import DeviceMemory, OutOfGpuMemoryError, PinnedMemory
from trt_yolov6.engines.layout import class_names_of, guess_output_layout
from trt_yolov6.engines.manifest import BatchProfile, Manifest
from trt_yolov6.engines.tensorrt_common import Flavour, logger_of
from trt_yolov6.errors import MissingDependencyError, UserError

_COPY_THREADS = min(8, os.cpu_count() or 1)

_Resource = TypeVar("_Resource", DeviceMemory, PinnedMemory, cuda_device.Stream)


class TensorRTEngine(Engine):
    """A TensorRT or TensorRT-RTX plan on the GPU, with buffers for its largest batch.

    Args:
        flavour: the TensorRT that built the plan.
        path: the plan.
        manifest: what `build` wrote beside it, if anything.
        context_config: makes the argument of `create_execution_context` from an `ICudaEngine`.

    Raises:
        UserError: no GPU; a plan cut short, of another version or for another GPU; tensors that are
            no detector's; too little GPU memory.
    """

    def __init__(
        self,
        flavour: Flavour,
        path: Path,
        manifest: Manifest | None,
        context_config: Callable[[Any], Any] | None = None,
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.nms = manifest.nms if manifest else None
        self.backend = flavour.backend
        self.backend_version = flavour.version
        self._flavour = flavour
        self._logger = logger_of(flavour.api)
        try:
            device = cuda_device.current_device()
        except MissingDependencyError as error:
            raise MissingDependencyError(
                f"{path} runs on an NVIDIA GPU only, and {error}; `trt-yolov6 doctor` says what "
                "is missing, and an .onnx engine runs on any machine."
            ) from error
        self.device = device.name
        self._owned: list[DeviceMemory | PinnedMemory | cuda_device.Stream] = []
        self._device_outputs: dict[str, DeviceMemory] = {}
        self._host_outputs: dict[str, PinnedMemory] = {}
        self._allocators: dict[str, Any] = {}
        self._bound: tuple[int, tuple[int, ...]] | None = None
        self._copiers = ThreadPoolExecutor(_COPY_THREADS, thread_name_prefix="to-gpu")
        self._context: Any = None
        self._runtime, self._engine = _deserialize(flavour, path, device)
        self._read_tensors()
        try:
            self._open(context_config)
        except OutOfGpuMemoryError as error:
            self.close()
            raise UserError(
                f"{path} does not fit on the {self.device} with batch {self.batch.max}, where "
                f"{error}"
            ) from error

    def infer(self, images: NDArray[Any]) -> dict[str, NDArray[Any]]:
        self._check(images)
        shape = images.shape
        self._send(images)
        self._bind(self._device_input.address, shape)
        self._enqueue()
        for name, memory in self._host_outputs.items():
            nbytes = math.prod(self._context.get_tensor_shape(name)) * self._itemsize(name)
            self._stream.copy_out(memory.address, self._device_outputs[name], nbytes)
        self._stream.wait()
        return {output.name: self._result(output) for output in self.outputs}

    def resident_run(self, images: NDArray[Any]) -> Callable[[], float]:
        self._check(images)
        shape = images.shape
        images = np.ascontiguousarray(images)
        resident = DeviceMemory(images.nbytes)
        self._stream.copy_in(resident, images.ctypes.data, images.nbytes)
        self._stream.wait()
        stopwatch = cuda_device.Stopwatch(self._stream)

        def run() -> float:
            self._check_open()
            self._bind(resident.address, shape)
            return stopwatch.time(self._enqueue)

        return run

    def kernel_seconds(self, images: NDArray[Any], runs: int = 20) -> dict[str, float]:
        """Return the median seconds of each kernel on a resident batch, in the engine's order.

        Kernels are timed one by one, so that they add up to more than a run takes. It slows down
        what the engine runs later: measure that before.

        Args:
            images: as `infer` takes them.
            runs: how often each is timed; as many runs before do not count.
        """
        run = self.resident_run(images)
        times: dict[str, list[float]] = {}
        profiler = _profiler(self._flavour.api, times)
        self._context.profiler = profiler
        for _ in range(2 * runs):
            run()
        return {name: float(np.median(values[-runs:])) for name, values in times.items()}

    def close(self) -> None:
        # Dependents first: TensorRT wants the context gone before the engine.
        self._context = None
        self._engine = None
        self._runtime = None
        self._bound = None
        self._allocators.clear()
        self._copiers.shutdown()
        while self._owned:
            self._owned.pop().free()

    # --- opening ----------------------------------------------------------------------------------

    def _read_tensors(self) -> None:
        """Fill in the tensors, the batch profile and the output layout from the engine."""
        api, engine = self._flavour.api, self._engine
        inputs: list[TensorSpec] = []
        outputs: list[TensorSpec] = []
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            is_input = engine.get_tensor_mode(name) == api.TensorIOMode.INPUT
            shape = tuple(
                None if length < 0 else int(length) for length in engine.get_tensor_shape(name)
            )
            spec = TensorSpec(name, shape, _dtype(api, engine.get_tensor_dtype(name), name))
            (inputs if is_input else outputs).append(spec)
        if len(inputs) != 1:
            names = ", ".join(spec.name for spec in inputs)
            raise UserError(
                f"{self.path} has {len(inputs)} inputs ({names}); build it from a detector with a "
                "single image input."
            )
        self.input = inputs[0]
        self.outputs = tuple(outputs)
        _check_input(self.input, self.path)
        fixed = self.input.shape[0]
        if fixed is not None:
            self.batch = BatchProfile(fixed, fixed, fixed)
        else:
            shapes = engine.get_tensor_profile_shape(self.input.name, 0)
            self.batch = BatchProfile(*(int(shape[0]) for shape in shapes))
        self.output_layout = (
            self.manifest.output_layout
            if self.manifest
            else guess_output_layout(self.outputs, self.path)
        )
        self.class_names = class_names_of(self.outputs, self.output_layout, self.manifest)

    def _open(self, context_config: Callable[[Any], Any] | None) -> None:
        """Make the context, the stream and buffers for the largest batch."""
        self._logger.clear()
        arguments = () if context_config is None else (context_config(self._engine),)
        self._context = self._engine.create_execution_context(*arguments)
        if self._context is None:
            raise OutOfGpuMemoryError(
                f"{self._flavour.label} cannot make room to run ({self._logger.reason()}); end "
                "other programs that use the GPU, or build it for a smaller batch."
            )
        self._stream = self._own(cuda_device.Stream())
        shape = (self.batch.max, *(length or 0 for length in self.input.shape[1:]))
        nbytes = math.prod(shape) * self.input.dtype.itemsize
        self._device_input = self._own(DeviceMemory(nbytes))
        self._host_input = self._own(PinnedMemory(nbytes))
        self._bind(self._device_input.address, shape)
        for output in self.outputs:
            largest = tuple(self._context.get_tensor_shape(output.name))
            if min(largest, default=1) < 0:
                # With the input's shape given, only what depends on the data is still unknown.
                allocator = _output_allocator(self._flavour.api)
                self._allocators[output.name] = allocator
                self._context.set_output_allocator(output.name, allocator)
                continue
            nbytes = math.prod(largest) * output.dtype.itemsize
            memory = self._own(DeviceMemory(nbytes))
            self._device_outputs[output.name] = memory
            self._host_outputs[output.name] = self._own(PinnedMemory(nbytes))
            self._context.set_tensor_address(output.name, memory.address)

    def _own(self, resource: _Resource) -> _Resource:
        """Have `close` free a resource."""
        self._owned.append(resource)
        return resource

    # --- running ----------------------------------------------------------------------------------

    def _check(self, images: NDArray[Any]) -> None:
        self._check_open()
        check_images(self, images)

    def _check_open(self) -> None:
        if self._context is None:
            raise UserError(f"the engine {self.path} is closed; load it again.")
        self._logger.clear()

    def _send(self, images: NDArray[Any]) -> None:
        """Start the copy of a batch to the GPU.

        Several threads copy into pinned memory, which one alone fills more slowly than the GPU
        reads it; while they do, the images that are ready travel. A single image is faster sent
        from where it is (on an H200: 0.34 ms against 0.68; 32 images 5.6 ms against 25).
        """
        if len(images) == 1:
            images = np.ascontiguousarray(images)
            self._stream.copy_in(self._device_input, images.ctypes.data, images.nbytes)
            return
        pinned = self._host_input.array(images.shape, self.input.dtype)

        def stage(index: int) -> int:
            np.copyto(pinned[index], images[index])
            return index

        nbytes = images.nbytes // len(images)
        for index in self._copiers.map(stage, range(len(images))):
            self._stream.copy_in(
                self._device_input, self._host_input.address, nbytes, index * nbytes
            )

    def _bind(self, address: int, shape: tuple[int, ...]) -> None:
        """Say where the input lies and of which shape it is."""
        if self._bound == (address, shape):
            return
        name = self.input.name
        if not (
            self._context.set_input_shape(name, shape)
            and self._context.set_tensor_address(name, address)
        ):
            raise UserError(
                f"{self.path} does not take a batch of {shape[0]} ({self._logger.reason()}); "
                "build it again for that batch."
            )
        self._bound = (address, shape)

    def _enqueue(self) -> None:
        """Put one run of the bound input on the stream."""
        if not self._context.execute_async_v3(self._stream.handle):
            for allocator in self._allocators.values():
                if allocator.error is not None:
                    raise UserError(
                        f"{self.path} cannot store its detections: {allocator.error}"
                    ) from allocator.error
            raise UserError(
                f"{self.path} does not run on the {self.device} ({self._logger.reason()}); build "
                "it again on this machine."
            )

    def _itemsize(self, name: str) -> int:
        return next(output.dtype.itemsize for output in self.outputs if output.name == name)

    def _result(self, output: TensorSpec) -> NDArray[Any]:
        """Return a fresh copy of an output of the run that has just ended."""
        if output.name in self._host_outputs:
            shape = tuple(self._context.get_tensor_shape(output.name))
            fresh: NDArray[Any] = self._host_outputs[output.name].array(shape, output.dtype).copy()
            return fresh
        allocator = self._allocators[output.name]
        result: NDArray[Any] = np.empty(allocator.shape, output.dtype)
        if result.size:
            self._stream.copy_out(result.ctypes.data, allocator.memory, result.nbytes)
            self._stream.wait()
        return result


def _deserialize(flavour: Flavour, path: Path, device: cuda_device.Device) -> tuple[Any, Any]:
    """Return the `IRuntime` and the `ICudaEngine` of a plan."""
    try:
        plan = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check --engine.") from error
    logger = logger_of(flavour.api)
    logger.clear()
    runtime = flavour.api.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(plan) if plan else None
    if engine is None:
        reason = _cause(logger.reason()) if plan else "the file is empty"
        raise UserError(
            f"{path} is not an engine that {flavour} loads on the {device.name} ({reason}); build "
            f"it again on this machine with `trt-yolov6 build --backend {flavour.backend}`."
        )
    return runtime, engine


_CAUSES = {
    "blobSize": "the file is cut short",
    "minBufferSize": "the file is cut short",
    "magicTag": "the file is no plan",
    "kSERIALIZATION_VERSION": "another version built it",
}
"""What a failed assertion in TensorRT's plan reader means, by a word of it."""


def _cause(reason: str) -> str:
    return next((cause for word, cause in _CAUSES.items() if word in reason), reason)


def _dtype(api: Any, dtype: Any, name: str) -> np.dtype[Any]:
    try:
        known: np.dtype[Any] = np.dtype(api.nptype(dtype))
    except TypeError as error:
        raise UserError(
            f"tensor {name!r} has the type {dtype}, which NumPy does not know; build the engine "
            "with float32 inputs and outputs."
        ) from error
    return known


def _check_input(spec: TensorSpec, path: Path) -> None:
    planar = spec.dtype != np.uint8
    sound = (
        len(spec.shape) == 4
        and spec.dtype in (np.uint8, np.float32)
        and spec.shape[1 if planar else 3] == 3
        and None not in spec.shape[1:]
    )
    if not sound:
        raise UserError(
            f"{path} takes {spec.dtype} {list(spec.shape)}; an engine takes float32 "
            "(batch, 3, height, width) or uint8 (batch, height, width, 3) of a fixed size."
        )


def _profiler(api: Any, times: dict[str, list[float]]) -> Any:
    """Return an `IProfiler` that appends each kernel's seconds to its list in `times`."""

    class Profiler(api.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            api.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            times.setdefault(layer_name, []).append(ms / 1000)

    return Profiler()


def _output_allocator(api: Any) -> Any:
    """Return an `IOutputAllocator` for an output whose shape only the run tells.

    It keeps the largest buffer it was asked for. `shape` is what the last run wrote, which is less
    than the buffer holds.
    """

    class OutputAllocator(api.IOutputAllocator):  # type: ignore[misc]
        def __init__(self) -> None:
            api.IOutputAllocator.__init__(self)
            self.memory: DeviceMemory | None = None
            self.shape: tuple[int, ...] = ()
            self.error: Exception | None = None

        def reallocate_output_async(
            self, tensor_name: str, memory: int, size: int, alignment: int, stream: int
        ) -> int | None:
            return self.reallocate_output(tensor_name, memory, size, alignment)

        def reallocate_output(
            self, tensor_name: str, memory: int, size: int, alignment: int
        ) -> int | None:
            # cudaMalloc aligns to 256 bytes, which is all that is ever asked for.
            try:
                if self.memory is None or self.memory.nbytes < size:
                    self.memory = DeviceMemory(size)
            except UserError as error:  # TensorRT drops exceptions; None tells it to give up
                self.error = error
                return None
            return self.memory.address

        def notify_shape(self, tensor_name: str, shape: Any) -> None:
            self.shape = tuple(int(length) for length in shape)

    return OutputAllocator()
