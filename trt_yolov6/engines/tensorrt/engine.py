"""Plan in, runner out: one `Engine` for TensorRT and TensorRT-RTX, with cuda-python underneath."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trt_yolov6.common.files import read_bytes
from trt_yolov6.data.letterbox import Letterbox
from trt_yolov6.detectors.metadata import check_input
from trt_yolov6.detectors.recognition import GraphFacts
from trt_yolov6.engines.base import Engine, LoadOptions, Run, StartedRun, check_batch, check_images
from trt_yolov6.engines.cuda import device as cuda_device
from trt_yolov6.engines.cuda.arrays import lies_on_gpu, view_of
from trt_yolov6.engines.cuda.device import CudaError, Event, OutOfGpuMemoryError, PinnedPool
from trt_yolov6.engines.cuda.jpeg import JpegDecoder
from trt_yolov6.engines.cuda.suppression import reading_of as reading_on_gpu
from trt_yolov6.engines.manifest import Manifest
from trt_yolov6.engines.reading import detector_of
from trt_yolov6.engines.tensorrt.execution import ExecutionSlot, SharedState
from trt_yolov6.engines.tensorrt.flavour import Flavour, logger_of
from trt_yolov6.engines.tensorrt.image_slots import Image, ImageSlots
from trt_yolov6.errors import MissingDependencyError, UserError
from trt_yolov6.spec import BatchProfile, NmsSettings, TensorSpec, image_size_of

if TYPE_CHECKING:
    from trt_yolov6.engines.tensorrt import api as trt

    MakeConfig = Callable[[trt.ICudaEngine], trt.IRuntimeConfig]  # API: tensorrt-rtx (has a choice)

_ROUNDS = 20
"""Rounds of runs on several streams between two looks at the clock."""


@dataclass(frozen=True)
class ContextSettings:
    """Settings of execution contexts, in which the two TensorRTs differ."""

    make_config: MakeConfig | None = None
    """Makes the argument of `create_execution_context`; None: it has none."""
    make_config_for_recording: MakeConfig | None = None
    """The same for contexts whose runs others record; None: `make_config`."""
    record_graph: bool = False
    """Runs are recorded as CUDA graphs by this package; False: by TensorRT-RTX or not at all."""
    launches_graphs: bool = False
    """Runs are launched as CUDA graphs, whoever records them."""
    compiles_batch_sizes: bool = False
    """Kernels are compiled for each batch size, which takes seconds."""
    after_first_run: Callable[[], None] = lambda: None
    """Called whenever a batch size has run for the first time, and at the end."""


class TensorRTEngine(Engine):
    """A TensorRT or TensorRT-RTX plan on the GPU, with buffers for its largest batch.

    Args:
        flavour: the TensorRT that built the plan.
        path: the plan.
        manifest: what `build` wrote next to it, if anything.
        contexts: how execution contexts are made.
        options: the decoder and the pre-processing of a plan without a manifest.

    Raises:
        UserError: no GPU; a plan cut short, of another version or for another GPU; tensors that are
            no detector's; too little GPU memory.
    """

    in_flight = 2

    def __init__(
        self,
        flavour: Flavour,
        path: Path,
        manifest: Manifest | None,
        contexts: ContextSettings,
        options: LoadOptions | None = None,
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.backend = flavour.backend
        self.backend_version = flavour.version
        self._flavour = flavour
        self._contexts = contexts
        self._options = options or LoadOptions()
        self._logger = logger_of(flavour.api)
        device = _started_gpu(path)
        self.device = device.name
        self._pinned = PinnedPool()
        self._slots: list[ExecutionSlot] = []
        self._idle: deque[ExecutionSlot] = deque()
        self._seen: set[int] = set()
        self._image_slots: ImageSlots | None = None
        self._takes_no_images = False
        self._decoder: JpegDecoder | None = None
        self._decoder_missing = False
        self._runtime: trt.Runtime | None
        self._engine: trt.ICudaEngine | None
        self._runtime, engine = _deserialize(flavour, path, device)
        self._engine = engine
        self._read_tensors(engine)
        if self._contexts.compiles_batch_sizes:
            self.batch_steps = self.batch.steps()
        # Plans have one profile.
        self._one_context = not flavour.shares_profiles and not self.batch.is_static
        if self._one_context:
            self.in_flight = 1
            self._takes_no_images = True
        make_config = self._contexts.make_config
        self._shared = SharedState(
            flavour=flavour,
            path=path,
            device=device.name,
            engine=engine,
            context_config=None if make_config is None else make_config(engine),
            input=self.input,
            outputs=self.outputs,
            batch=self.batch,
            pinned=self._pinned,
            record_graph=self._contexts.record_graph,
            reading=reading_on_gpu(self.output_layout, self.outputs, self.image_size),
        )
        try:
            self._idle.append(self._new_slot())
        except BaseException:
            self.close()
            raise

    def infer(self, images: Any) -> dict[str, NDArray[Any]]:
        """Run one batch; see `Engine.infer`. A CUDA tensor (DLPack) is read where it lies."""
        outputs = self.start(images).wait()
        assert isinstance(outputs, dict)
        return outputs

    def start(self, images: Any, nms: NmsSettings | None = None) -> Run:
        slot = self._take()
        try:
            batch = self._checked(images, slot)
            slot.start(batch, nms)
        except BaseException:
            self._idle.append(slot)
            raise
        return StartedRun(slot.finish, partial(self._done, slot, batch.shape[0]))

    def infer_on_gpu(self, images: Any) -> dict[str, Any]:
        """Run one batch and leave the outputs on the GPU.

        Args:
            images: as for `infer`.

        Returns:
            One DLPack object an output (for `torch.from_dlpack`), by name, in the engine's own
            memory: valid until the next run, or until the engine is closed.

        Raises:
            UserError: as `infer`; MissingDependencyError: there is no cuda-core.
        """
        slot = self._take()
        try:
            batch = self._checked(images, slot)
            slot.start(batch, None, fetch=False)
            outputs = slot.finish_on_gpu()
        except BaseException:
            self._idle.append(slot)
            raise
        self._done(slot, batch.shape[0])
        return outputs

    def takes_images(self) -> bool:
        return self._slots_for_images() is not None

    def start_images(
        self,
        images: Sequence[Image],
        placed: Sequence[Letterbox],
        nms: NmsSettings,
        *,
        clip: bool | None = None,
        rows: int | None = None,
        after: Event | None = None,
        patient: bool = False,
    ) -> Run:
        self._check_open()
        slots = self._slots_for_images()
        assert slots is not None, "`takes_images` says whether there is this way"
        rows = max(rows or len(images), self.batch.min)
        check_batch(self, rows)
        try:
            return slots.start(
                images, placed, rows, nms, clip=clip, after=after, patient=patient, done=self._ran
            )
        except OutOfGpuMemoryError as error:
            raise self._does_not_fit(error) from error

    def image_stage_seconds(
        self, images: Sequence[Image], placed: Sequence[Letterbox], nms: NmsSettings
    ) -> dict[str, float]:
        self._check_open()
        slots = self._slots_for_images()
        assert slots is not None, "`takes_images` says whether there is this way"
        check_batch(self, len(images))
        return slots.stage_seconds(images, placed, nms)

    def jpeg_decoder(self) -> JpegDecoder | None:
        if self._decoder is None and not self._decoder_missing:
            try:
                self._decoder = JpegDecoder()
            except MissingDependencyError:
                self._decoder_missing = True
        return self._decoder

    def empty_image(self, height: int, width: int) -> NDArray[np.uint8]:
        """Return an uninitialized uint8 image (height, width, 3) in page-locked memory."""
        return self._pinned.array((height, width, 3), np.dtype(np.uint8))

    def empty_input(self, rows: int) -> NDArray[Any]:
        return self._pinned.array((rows, *self.input.row_shape), self.input.dtype)

    def resident_run(self, images: NDArray[Any], streams: int = 1) -> Callable[[], float]:
        self._check_open()
        check_images(self, images)
        while len(self._slots) < streams:
            self._idle.append(self._new_slot())
        slots = self._slots[:streams]
        work = [slot.resident(images) for slot in slots]
        if streams == 1:
            stopwatch = cuda_device.Stopwatch(slots[0].stream)

            def run() -> float:
                self._check_open()
                return stopwatch.time(work[0])

            return run

        def rounds() -> float:
            self._check_open()
            start = time.perf_counter()
            for _ in range(_ROUNDS):
                for enqueue in work:
                    enqueue()
            for slot in slots:
                slot.stream.wait()
            return (time.perf_counter() - start) / _ROUNDS

        return rounds

    def layer_times(self, images: NDArray[Any], runs: int = 20) -> dict[str, float]:
        """Return the median seconds of each layer of the engine, in its order, by name.

        Layers then run one by one, so their sum exceeds a run's time; their shares count.

        Args:
            images: as for `infer`, a NumPy array.
            runs: how often to run.

        Raises:
            UserError: as `infer`, or runs are launched as CUDA graphs, which have no layers: load
                the engine with `LoadOptions(cuda_graph=False)`.
        """
        if self._contexts.launches_graphs:
            raise UserError(
                f"{self.path} is launched as a CUDA graph, whose layers cannot be timed; load it "
                "without one (`cuda_graph`).",
            )
        slot = self._take()
        try:
            check_images(self, images)
            times = slot.profile(images, runs)
        finally:
            self._idle.append(slot)
        return {name: float(np.median(seconds)) for name, seconds in times.items()}

    def close(self) -> None:
        if self._engine is None:
            return
        self._contexts.after_first_run()
        # Dependents first: TensorRT wants the contexts gone before the engine.
        if self._image_slots is not None:
            self._image_slots.close()
            self._image_slots = None
        self._decoder = None
        for slot in self._slots:
            slot.close()
        self._slots.clear()
        self._idle.clear()
        self._shared = None  # type: ignore[assignment]
        self._engine = None
        self._runtime = None
        self._pinned.close()

    # --- opening ----------------------------------------------------------------------------------

    def _read_tensors(self, engine: trt.ICudaEngine) -> None:
        """Fill in the tensors, the batch profile and the output layout from the engine."""
        api = self._flavour.api
        inputs: list[TensorSpec] = []
        outputs: list[TensorSpec] = []
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            is_input = engine.get_tensor_mode(name) == api.TensorIOMode.INPUT
            shape = tuple(
                None if length < 0 else int(length) for length in engine.get_tensor_shape(name)
            )
            spec = TensorSpec(name, shape, _dtype(engine.get_tensor_dtype(name), name))
            (inputs if is_input else outputs).append(spec)
        if len(inputs) != 1:
            names = ", ".join(spec.name for spec in inputs)
            raise UserError(
                f"{self.path} has {len(inputs)} inputs ({names}); build it from a detector with a "
                "single image input."
            )
        self.input = inputs[0]
        self.outputs = tuple(outputs)
        check_input(self.input, self.path)
        fixed = self.input.shape[0]
        if fixed is not None:
            self.batch = BatchProfile.of(fixed)
        else:
            shapes = engine.get_tensor_profile_shape(self.input.name, 0)
            self.batch = BatchProfile(*(int(shape[0]) for shape in shapes))
        self.detector = detector_of(
            self.manifest,
            self._options,
            self.path,
            lambda: GraphFacts(self.outputs, image_size_of(self.input)),
        )

    def _new_slot(self) -> ExecutionSlot:
        if self._one_context and self._slots:
            raise UserError(
                f"{self._flavour} runs one batch of {self.path} at a time, as its batch axis is "
                "free; build it for a fixed batch to run several."
            )
        try:
            slot = ExecutionSlot(self._shared)
        except OutOfGpuMemoryError as error:
            raise self._does_not_fit(error) from error
        self._slots.append(slot)
        return slot

    def _does_not_fit(self, error: OutOfGpuMemoryError) -> UserError:
        return UserError(
            f"{self.path} does not fit on the {self.device} with batch {self.batch.max}, where "
            f"{error}"
        )

    def _slots_for_images(self) -> ImageSlots | None:
        """Return the slots that take images, made when they are first wanted."""
        if self._image_slots is None and not self._takes_no_images:
            self._check_open()
            shared, make_config = self._shared, self._contexts.make_config_for_recording
            if make_config is not None:
                shared = dataclasses.replace(shared, context_config=make_config(shared.engine))
            shared = dataclasses.replace(shared, record_graph=self._contexts.launches_graphs)
            try:
                self._image_slots = ImageSlots(shared, self.preprocessing)
            except CudaError:  # no NVRTC, or no room
                self._takes_no_images = True
        return self._image_slots

    # --- running ----------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._engine is None:
            raise UserError(f"the engine {self.path} is closed; load it again.")
        self._logger.clear()

    def _take(self) -> ExecutionSlot:
        """Return an idle slot, or a new one."""
        self._check_open()
        return self._idle.popleft() if self._idle else self._new_slot()

    def _checked(self, images: Any, slot: ExecutionSlot) -> Any:
        """Return a batch as a NumPy array or a view of GPU memory."""
        # `asarray` takes a tensor on the CPU too.
        batch = view_of(images, slot.stream) if lies_on_gpu(images) else np.asarray(images)
        check_images(self, batch)
        return batch

    def _done(self, slot: ExecutionSlot, batch: int) -> None:
        """Take back a slot whose run has ended."""
        self._idle.append(slot)
        self._ran(batch)

    def _ran(self, batch: int) -> None:
        if batch not in self._seen:
            self._seen.add(batch)
            self._contexts.after_first_run()


def _started_gpu(path: Path) -> cuda_device.Device:
    """Return the GPU for an engine; CUDA is started, so a busy GPU is reported here."""
    try:
        device = cuda_device.current_device()
        cuda_device.free_memory()
    except MissingDependencyError as error:
        raise MissingDependencyError(
            f"{path} runs on an NVIDIA GPU only, and {error}; `trt-yolov6 doctor` says what "
            "is missing, and an .onnx engine runs on any machine."
        ) from error
    return device


def _deserialize(
    flavour: Flavour, path: Path, device: cuda_device.Device
) -> tuple[trt.Runtime, trt.ICudaEngine]:
    plan = read_bytes(path)
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
    "magicTag": "the file is not a plan",
    "kSERIALIZATION_VERSION": "another version built it",
}
"""Meaning of a failed assertion in TensorRT's plan reader, by a word of it."""


def _cause(reason: str) -> str:
    return next((cause for word, cause in _CAUSES.items() if word in reason), reason)


_DTYPES = {
    "BOOL": np.bool_,
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT32": np.int32,
    "INT64": np.int64,
    "INT8": np.int8,
    "UINT8": np.uint8,
}
"""NumPy's types by `DataType`'s names. `nptype` of TensorRT 8 names one that NumPy lost."""


def _dtype(dtype: trt.DataType, tensor: str) -> np.dtype[Any]:
    if dtype.name not in _DTYPES:
        raise UserError(
            f"tensor {tensor!r} has the type {dtype}, which NumPy does not know; build the engine "
            "with float32 inputs and outputs."
        )
    return np.dtype(_DTYPES[dtype.name])
