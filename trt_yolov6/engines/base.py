"""Interface of every engine, and the values that backends (`engines.Backend`) take and give."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from trt_yolov6.common.closing import Closing
from trt_yolov6.common.ranges import Checked, Count
from trt_yolov6.detectors.spec import Described, DetectorSpec
from trt_yolov6.engines.manifest import Manifest
from trt_yolov6.errors import UserError
from trt_yolov6.spec import BatchProfile, EnginePrecision, NmsSettings, PrecisionName, empty_input
from trt_yolov6.spec import TensorSpec as TensorSpec

if TYPE_CHECKING:
    from trt_yolov6.data.letterbox import Letterbox
    from trt_yolov6.detectors.candidates import Candidates, Suppressed
    from trt_yolov6.engines.cuda.device import Event
    from trt_yolov6.engines.cuda.jpeg import JpegDecoder
    from trt_yolov6.engines.cuda.letterbox import ImageView


@dataclass(frozen=True)
class Availability:
    """Capabilities of a backend on this machine, for `doctor` and for `--backend auto`."""

    backend: str
    can_build: bool
    can_run: bool
    version: str | None
    detail: str
    """One line: the device it would use, or what is missing and how to get it."""
    remedy: str = ""
    """Advice of `doctor` on what to install; empty when there is nothing to gain."""


@dataclass(frozen=True)
class ImplicitCalibration:
    """Calibration of TensorRT up to 10, which then chooses by itself what runs in INT8."""

    cache: Path | None = None
    """A calibration cache to read; None to calibrate."""
    algorithm: Literal["entropy", "minmax"] = "entropy"
    """TensorRT's calibrator: `IInt8EntropyCalibrator2` or `IInt8MinMaxCalibrator`."""
    images: Callable[[], Iterator[NDArray[Any]]] | None = None
    """Yields the graph's input image by image, float32 (1, 3, height, width)."""
    new_cache: Path | None = None
    """File to write the calibrated scales to."""
    fp16: bool = False
    """Layers outside INT8 may run in half precision."""


@dataclass(frozen=True)
class BuildSettings:
    """Settings for building a plan. A backend raises UserError for those it cannot honour."""

    batch: BatchProfile = dataclasses.field(default_factory=BatchProfile)
    target: str | None = None
    """Cross-build target such as `t4`; None builds for the device in this machine."""
    timing_cache: Path | None = None
    """TensorRT timing cache to read and extend."""
    workspace_mib: int | None = None
    """Upper limit of scratch memory in MiB while building and running."""
    optimization_level: int | None = None
    """TensorRT builder optimization level, 0..5."""
    tactic_sources: tuple[str, ...] | None = None
    """TensorRT: libraries to take kernels from, members of `TacticSource` in lower case; None:
    TensorRT's default."""
    calibration: ImplicitCalibration | None = None
    """TensorRT up to 10: INT8 for a float32 graph without Q/DQ nodes."""
    fp8: bool = False
    """The graph computes in FP8; a GPU without it is refused."""
    progress: bool = True
    """Show a progress bar while building."""
    on_layers: Callable[[str], None] | None = None
    """Called with the builder's description of the engine's layers (see `layer_log`)."""


@dataclass(frozen=True)
class LoadOptions(Checked):
    """Settings for loading an engine."""

    threads: Count | None = None
    """CPU threads an ONNX Runtime session uses; None for one a physical core."""
    provider: str | None = None
    """ONNX Runtime execution provider: `cpu`, `cuda`, `tensorrt`; None for the best that works."""
    cuda_graph: bool = True
    """TensorRT: launch a run as one CUDA graph instead of kernel by kernel."""
    decoder: str | None = None
    """Family of a detector without a manifest (see `detectors.families`); None finds out."""
    preprocess: Mapping[str, Any] | None = None
    """Changes to how images are prepared: fields of `Preprocessing` by name; None changes none."""
    gpu: Annotated[int, Meta(ge=0)] = 0
    """Number of the GPU for ONNX Runtime's providers. TensorRT takes CUDA's current one."""


Found: TypeAlias = "dict[str, NDArray[Any]] | Candidates | Suppressed"
"""Outputs by name, or what is left of them."""


class Run(abc.ABC):
    """A batch that an engine is working on."""

    @abc.abstractmethod
    def wait(self) -> Found:
        """Wait for the end and return what was found; call it once."""


@dataclass(frozen=True)
class FinishedRun(Run):
    """A run that was over before `start` returned."""

    found: Found

    def wait(self) -> Found:
        return self.found


class StartedRun(Run):
    """A run in progress, and what to do when it has been waited for."""

    def __init__(self, finish: Callable[[], Found], done: Callable[[], None]) -> None:
        self._finish: Callable[[], Found] | None = finish
        self._done = done

    def wait(self) -> Found:
        assert self._finish is not None, "a run is waited for once"
        finish, self._finish = self._finish, None
        try:
            return finish()
        finally:
            self._done()


@dataclass(frozen=True)
class EngineFacts(Described):
    """Facts of an engine that are known without loading it."""

    name: str
    """File name of the engine."""
    detector: DetectorSpec
    precision: EnginePrecision
    backend: str


class Engine(Described, Closing):
    """A loaded engine. One thread at a time may call it; close it, or use it in a `with` block."""

    path: Path
    manifest: Manifest | None
    backend: str
    backend_version: str
    device: str
    """Name of the processor it runs on."""
    threads: int | None = None
    """CPU threads, where they were chosen; None: the backend's default."""
    input: TensorSpec
    """float32 (batch, 3, height, width) or uint8 (batch, height, width, 3), as `preprocessing`
    makes them."""
    outputs: tuple[TensorSpec, ...]
    batch: BatchProfile
    """Batch sizes it takes."""
    batch_steps: tuple[int, ...] = ()
    """Batch sizes to run, ascending, where each new one takes seconds of compilation; else ()."""
    note: str = ""
    """Arithmetic of the engine where it differs from its precision."""
    computed_in: PrecisionName | None = None
    """Precision of all arithmetic, where it is not the graph's."""
    dropped_outputs: tuple[str, ...] = ()
    """Outputs of a file without a manifest that are not a detector's and are not computed."""
    is_checked: bool = False
    """A batch's outputs have been found to be a detector's (see `plausibility`)."""
    is_trusted: bool = False
    """Outputs are never checked: a network in training may know nothing yet."""
    in_flight: int = 1
    """Batches that `start` takes before the first is waited for."""
    load_options: LoadOptions = LoadOptions()
    """Options that it was loaded with."""

    @abc.abstractmethod
    def infer(self, images: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """Run one batch.

        Args:
            images: an array of the shape and dtype that `input` says, C-contiguous.

        Returns:
            One array an output, by name; they stay valid after the next call.

        Raises:
            UserError: wrong shape or dtype, or a batch size outside the engine's profile.
        """

    def start(self, images: NDArray[Any], nms: NmsSettings | None = None) -> Run:
        """Start a batch, to be waited for later; up to `in_flight` may run at a time.

        Args:
            images: as for `infer`; not to be changed before the run has been waited for.
            nms: thresholds, with which an engine on a GPU may return `Suppressed` boxes or
                `Candidates` instead of all outputs.

        Raises:
            UserError: as `infer`.
        """
        return FinishedRun(self.infer(images))

    def rows_for(self, images: int) -> int:
        """Return the batch size to run for a number of images, the rest of it padding.

        It is the smallest that the engine takes, or the next one of its `batch_steps`.
        """
        return next(
            (step for step in self.batch_steps if step >= images), max(images, self.batch.min)
        )

    def takes_images(self) -> bool:
        """Return whether `start_images` works: the engine letterboxes images on its GPU."""
        return False

    def start_images(
        self,
        images: Sequence[NDArray[np.uint8] | ImageView],
        placed: Sequence[Letterbox],
        nms: NmsSettings,
        *,
        clip: bool | None = None,
        rows: int | None = None,
        after: Event | None = None,
        patient: bool = False,
    ) -> Run:
        """Start a batch of images of any size: letterbox, engine and suppression on the GPU.

        The run gives kept boxes where the suppression is done there, and outputs otherwise.

        Args:
            images: uint8 (height, width, 3), RGB, C-contiguous, or views of images on the GPU; not
                to be changed or freed before the run has been waited for.
            placed: place of each in the input, see `data.letterbox.fit`.
            nms: thresholds.
            clip: map kept boxes to the images, clipped or not, see `Suppressed.clip`; default: they
                stay in input pixels.
            rows: batch size, padded beyond the images; default: the number of images.
            after: event on the GPU after which views can be read.
            patient: wait for the run without using a core, some microseconds longer.

        Raises:
            UserError: the engine takes no batch of that size.
        """
        raise NotImplementedError

    def image_stage_seconds(
        self,
        images: Sequence[NDArray[np.uint8] | ImageView],
        placed: Sequence[Letterbox],
        nms: NmsSettings,
    ) -> dict[str, float]:
        """Return the median seconds of each stage of `start_images` alone, in order, by name."""
        raise NotImplementedError

    def jpeg_decoder(self) -> JpegDecoder | None:
        """Return the decoder of JPEGs on the engine's GPU; None where nvImageCodec is missing."""
        return None

    def first_non_finite(self, images: NDArray[Any]) -> str | None:
        """Return the first tensor inside the network that is not finite; None if unknown."""
        return None

    def empty_input(self, rows: int) -> NDArray[Any]:
        """Return an uninitialized input array for `rows` images.

        For an engine on a GPU it is page-locked memory, which the GPU reads directly.

        Raises:
            UserError: it takes more memory than there is.
        """
        return empty_input(self.input, rows)

    @abc.abstractmethod
    def resident_run(self, images: NDArray[Any], streams: int = 1) -> Callable[[], float]:
        """Place a batch where the engine reads it and return a function that runs it once.

        Each call runs the engine on the resident input, waits for the end and returns the seconds
        it took, without copies from or to the host.

        Args:
            images: as for `infer`.
            streams: on a GPU, copies of the batch that run concurrently, each on its own stream;
                the seconds are then those of one run on every stream.

        Raises:
            UserError: as `infer`, or the engine has no streams.
        """

    def layer_times(self, images: NDArray[Any], runs: int = 20) -> dict[str, float]:
        """Return the median seconds of each layer, in the engine's order, by name.

        Raises:
            UserError: the backend does not time layers.
        """
        raise UserError(
            f"{self.path} runs in {self.backend}, which does not time layers; build it with "
            "TensorRT."
        )

    @property
    def facts(self) -> EngineFacts:
        """Name, detector, precision and backend."""
        return EngineFacts(self.path.name, self.detector, self.precision, self.backend)

    def described(self) -> dict[str, Any]:
        """Return the facts that measurements record of an engine, JSON-ready."""
        names = "precision", "backend", "backend_version", "device", "threads", "note"
        return {name: getattr(self, name) for name in names} | {"image_size": self.image_size}

    @property
    def precision(self) -> EnginePrecision:
        """Precision in the manifest; `unknown` without one."""
        return self.manifest.precision if self.manifest else "unknown"


def check_images(engine: Engine, images: Any) -> None:
    """Raise UserError unless an array's `shape` and `dtype` are what the engine takes."""
    expected = engine.input
    if not expected.fits(images):
        shape = ["batch", *expected.shape[1:]]
        raise UserError(
            f"{engine.path} takes {expected.dtype} images of shape {shape}, not {images.dtype} "
            f"{list(images.shape)}; prepare them with trt_yolov6.data.loader.fill_row."
        )
    check_batch(engine, images.shape[0])


def check_batch(engine: Engine, batch: int) -> None:
    """Raise UserError unless the engine takes this batch size."""
    profile = engine.batch
    if not profile.min <= batch <= profile.max:
        takes = (
            f"only batch {profile.min}"
            if profile.is_static
            else f"batches of {profile.min} to {profile.max}"
        )
        raise UserError(
            f"{engine.path} takes {takes}, not {batch}; give another `batch`, or build it again "
            "for that size.",
        )
