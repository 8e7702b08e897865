"""ONNX in, plan out: the builder of TensorRT and TensorRT-RTX.

Networks are strongly typed: every tensor has the type that the ONNX graph gives it, so the graph
alone decides on half precision and quantization. TensorRT 11 and TensorRT-RTX have no other
networks. TensorRT 8 has none of these: it gets the same graph in single precision, with builder
flags and constraints instead of types (`weakly_typed`). TensorRT's own calibration, up to version
10, needs a weakly typed network too.

TF32, TensorRT's default for float32 convolutions, is off: its 10-bit mantissa moves boxes by more
than a pixel, as much as half precision does. TensorRT-RTX 1.6 uses it nevertheless (the environment
variable NVIDIA_TF32_OVERRIDE=0 prevents that at run time).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, TextIO

from msgspec import Meta
from tqdm import tqdm

from trt_yolov6.common.files import read_bytes, write_bytes
from trt_yolov6.common.ranges import Count, fitting
from trt_yolov6.engines.base import BuildSettings
from trt_yolov6.engines.tensorrt.flavour import Flavour, instance_of, logger_of, one_line
from trt_yolov6.engines.tensorrt.implicit_int8 import calibrate
from trt_yolov6.engines.tensorrt.layer_log import inspected, opened
from trt_yolov6.engines.tensorrt.weakly_typed import WeakGraph, implicit_graph, weak_graph
from trt_yolov6.errors import UserError

if TYPE_CHECKING:
    from trt_yolov6.engines.tensorrt import api as trt
    from trt_yolov6.engines.tensorrt.api import IProgressMonitor  # API: not tensorrt<10 (as below)
else:
    IProgressMonitor = object  # that of the module, see `instance_of`

_LOG = logging.getLogger(__name__)

_Level = Annotated[int, Meta(ge=0, le=5)]
"""TensorRT's optimization levels."""

# How often each kernel is timed: trtexec's number. With one timing, TensorRT's default, YOLOv6-M
# took 0.925 ms in INT8; with eight it takes 0.803 ms (one image, 8.6.0, H200).
_TIMING_ITERATIONS = 8

# Builds of one process go one after the other. Three threads that built with 8.6.0 made nothing in
# six minutes, with the GPU idle; and the logger and standard error are those of the process.
_ONE_BUILD = threading.Lock()


class _BuilderFailedError(UserError):
    """The builder accepted a network but made no plan of it."""


def build_plan(
    flavour: Flavour,
    model: bytes,
    settings: BuildSettings,
    set_target: Callable[[trt.IBuilderConfig], None] | None = None,
) -> bytes:
    """Build the plan of an ONNX model.

    Args:
        flavour: the TensorRT to build with.
        model: a serialized ONNX model with one input, float32 (batch, 3, height, width) or uint8
            (batch, height, width, 3), whose batch axis may be free.
        settings: `batch` becomes the optimization profile of a free batch axis; a fixed one has to
            lie inside it. `target` is not read here.
        set_target: sets the target GPU in the `IBuilderConfig`; None builds for the GPU in use.

    Returns:
        The serialized engine.

    Raises:
        UserError: the graph has no translation, a setting is out of range, or the builder fails;
            the sentence quotes its reason.
    """
    fitting(settings.optimization_level, _Level | None, "`optimization_level`")
    fitting(settings.workspace_mib, Count | None, "`workspace_mib`")
    weak = None
    if settings.calibration is not None or not has_strong_types(flavour.api):
        calibration = settings.calibration
        weak = weak_graph(model) if calibration is None else implicit_graph(model, calibration.fp16)
        if weak.depthwise:
            _LOG.warning(
                "%s computes the graph's %d depthwise convolutions in float; try fp16 as well, "
                "which is faster where they are many",
                flavour,
                weak.depthwise,
            )
    with _ONE_BUILD:
        try:
            return _built(flavour, model, weak, settings, set_target)
        except _BuilderFailedError:
            relaxed = None if settings.calibration is not None else relaxed_boxes(flavour, weak)
            if relaxed is None:
                raise
        _LOG.warning(
            "%s does not build this INT8 graph with boxes in single precision; trying with boxes "
            "in half precision, where coordinates above 512 are multiples of half a pixel",
            flavour,
        )
        return _built(flavour, model, relaxed, settings, set_target)


def relaxed_boxes(flavour: Flavour, weak: WeakGraph | None) -> WeakGraph | None:
    """Return a graph with Q/DQ that TensorRT 8.5 may build where it failed, or None.

    8.5.3 builds the box prediction of an INT8 head only if nothing after it has to be in single
    precision (YOLOv6-N on an H200).
    """
    if weak is None or not (weak.quantized and weak.single) or flavour.release >= (8, 6):
        return None
    return dataclasses.replace(weak, single=frozenset())


def _built(
    flavour: Flavour,
    model: bytes,
    weak: WeakGraph | None,
    settings: BuildSettings,
    set_target: Callable[[trt.IBuilderConfig], None] | None,
) -> bytes:
    api = flavour.api
    logger = logger_of(api)
    logger.clear()
    try:
        builder = api.Builder(logger)
    except TypeError as error:  # pybind11's word for a null pointer
        raise UserError(
            f"{flavour} cannot start its builder ({logger.reason()}); `trt-yolov6 doctor` says "
            "what it needs."
        ) from error
    network = builder.create_network(_network_flags(api, weakly_typed=weak is not None))
    parser = api.OnnxParser(network, logger)
    if not parser.parse(model if weak is None else weak.model):
        raise UserError(_parser_message(flavour, parser))
    config = builder.create_builder_config()
    if weak is not None:
        _set_precisions(api, network, config, weak)
    if set_target is not None:
        set_target(config)
    config.clear_flag(api.BuilderFlag.TF32)
    config.avg_timing_iterations = _TIMING_ITERATIONS
    # Without it the message about the layers is incomplete (see `layer_log`).
    config.profiling_verbosity = api.ProfilingVerbosity.DETAILED
    if settings.workspace_mib is not None:
        config.set_memory_pool_limit(api.MemoryPoolType.WORKSPACE, settings.workspace_mib << 20)
    if settings.optimization_level is not None:  # API: not tensorrt<8.6 (the backend refuses it)
        config.builder_optimization_level = settings.optimization_level
    if settings.tactic_sources is not None:
        set_tactic_sources(api, config, settings.tactic_sources)
    _set_profile(api, builder, network, config, settings)
    calibrator = None
    if settings.calibration is not None:
        calibrator = calibrate(api, network, config, settings.calibration, settings.batch.opt)
    extended = settings.timing_cache
    if extended is not None and not attach_timing_cache(flavour, config, extended):
        extended = None
    logger.clear()
    explicit = weak is not None and weak.quantized and settings.calibration is None
    remedy = remedy_of(flavour.release, explicit_int8=explicit)
    try:
        plan = _run_builder(flavour, builder, network, config, settings, remedy)
    finally:
        if calibrator is not None:  # also where the build failed, for its error is the cause
            calibrator.finish()
    if settings.on_layers is not None:
        engine = None if logger.layers else opened(plan, api)
        settings.on_layers(inspected(engine, api) if engine else logger.layers)
    if extended is not None:
        write_bytes(extended, bytes(config.get_timing_cache().serialize()))
    return plan


def remedy_of(release: tuple[int, int], *, explicit_int8: bool) -> str:
    """Say what to try where the builder of a release fails, also on a graph with INT8's Q/DQ."""
    if explicit_int8 and release < (8, 6):
        # Where boxes in half precision do not help 8.5.3, no other form did (tensorrt8.md).
        return "build INT8 with TensorRT 8.6 or later, or FP16 with this one"
    return "try another `workspace_mib`, batch or precision"


def has_strong_types(api: trt.Api) -> bool:
    """Return whether networks can be strongly typed: from TensorRT 10 on, and in TensorRT-RTX."""
    return "STRONGLY_TYPED" in api.NetworkDefinitionCreationFlag.__members__


def _network_flags(api: trt.Api, *, weakly_typed: bool) -> int:
    flags = api.NetworkDefinitionCreationFlag.__members__
    if not weakly_typed:
        # TensorRT 11 and TensorRT-RTX ignore the flag: all their networks are strongly typed.
        return 1 << int(flags["STRONGLY_TYPED"])
    # From TensorRT 10 on, batches are always explicit.
    return 1 << int(flags["EXPLICIT_BATCH"]) if not has_strong_types(api) else 0


def _set_precisions(  # API: tensorrt<11 (weakly typed networks)
    api: trt.Api, network: trt.INetworkDefinition, config: trt.IBuilderConfig, weak: WeakGraph
) -> None:
    """Translate the precisions of a graph's types into flags and constraints."""
    if weak.quantized:
        config.set_flag(api.BuilderFlag.INT8)
    if weak.half:
        config.set_flag(api.BuilderFlag.FP16)
        for index in range(network.num_outputs):
            result = network.get_output(index)
            if result.name in weak.half_outputs:
                result.dtype = api.float16
    if not weak.single:
        return
    config.set_flag(api.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        for output in range(layer.num_outputs):
            if layer.get_output(output).name in weak.single:
                layer.precision = api.float32
                layer.set_output_type(output, api.float32)


def set_tactic_sources(api: trt.Api, config: trt.IBuilderConfig, names: Collection[str]) -> None:
    """Have the builder choose among these libraries' kernels only."""
    offered = api.TacticSource.__members__
    unknown = sorted(set(names) - {name.lower() for name in offered})
    if unknown:
        raise UserError(
            f"`tactic_sources` {unknown[0]} is not known; choose among "
            f"{', '.join(sorted(name.lower() for name in offered))}.",
        )
    config.set_tactic_sources(sum(1 << int(offered[name.upper()]) for name in names))


def _parser_message(flavour: Flavour, parser: trt.OnnxParser) -> str:
    """Say which node of the graph TensorRT does not take, and why."""
    if not parser.num_errors:
        return f"{flavour} does not parse the ONNX graph; check it with onnx.checker."
    error = parser.get_error(0)
    reason = one_line(error.desc())
    if not hasattr(error, "node_operator"):  # TensorRT 8
        return (
            f"{flavour} does not take node number {error.node()} of the ONNX graph ({reason}); "
            "export the graph without it, or use `backend` onnxruntime."
        )
    if not error.node_operator():
        return f"{flavour} does not parse the ONNX graph ({reason}); export it again."
    name = error.node_name() or f"number {error.node()}"  # API: not tensorrt<10 (returned above)
    return (
        f"{flavour} does not take node {name} ({error.node_operator()}) of the ONNX graph "
        f"({reason}); export the graph without it, or use `backend` onnxruntime."
    )


def _set_profile(
    api: trt.Api,
    builder: trt.Builder,
    network: trt.INetworkDefinition,
    config: trt.IBuilderConfig,
    settings: BuildSettings,
) -> None:
    """Give a free batch axis its optimization profile; check a fixed one against the settings."""
    if network.num_inputs != 1:
        names = ", ".join(network.get_input(index).name for index in range(network.num_inputs))
        raise UserError(
            f"the ONNX graph has {network.num_inputs} inputs ({names}); export the detector with "
            "a single image input."
        )
    images = network.get_input(0)
    batch, *size = (int(length) for length in images.shape)
    if len(size) != 3 or min(size) < 1 or images.dtype not in (api.float32, api.uint8):
        raise UserError(
            f"the ONNX graph's input {images.name} is {images.dtype} {[batch, *size]}; an engine "
            "takes float32 (batch, 3, height, width) or uint8 (batch, height, width, 3) of a "
            "fixed size."
        )
    batches = settings.batch
    if batch >= 0:
        if not batches.min <= batch <= batches.max:
            raise UserError(
                f"the ONNX graph takes only batch {batch}; give `batch` {batch}, or export it with "
                "a free batch axis.",
            )
        return
    profile = builder.create_optimization_profile()
    shapes = [(number, *size) for number in (batches.min, batches.opt, batches.max)]
    profile.set_shape(images.name, *shapes)
    config.add_optimization_profile(profile)
    # From TensorRT 10 on, profiles are shared anyway.
    if not has_strong_types(api) and "PROFILE_SHARING_0806" in api.PreviewFeature.__members__:
        config.set_preview_feature(api.PreviewFeature.__members__["PROFILE_SHARING_0806"], True)


def attach_timing_cache(flavour: Flavour, config: trt.IBuilderConfig, path: Path) -> bool:
    """Read the timing cache, or start an empty one, and have the builder use and extend it.

    TensorRT 8 cannot read back a cache of a graph that its compiler Myelin worked on (seen in
    8.6.0; 10 can). The builder then does without it, and the file stays as it is.

    Returns:
        True if the file is to be written again after the build.

    Raises:
        UserError: the file is not a timing cache of this TensorRT on this GPU.
    """
    content = read_bytes(path) if path.exists() else b""
    logger = logger_of(flavour.api)
    logger.clear()
    cache = config.create_timing_cache(content)
    accepted = cache is not None and config.set_timing_cache(cache, False)
    # It replaces an unreadable cache by an empty one, with a warning only; writing that back would
    # destroy the user's file.
    if accepted and not (content and logger.problems):
        return True
    reason = logger.reason()
    if not has_strong_types(flavour.api) and "Myelin" in reason:
        _LOG.warning(
            "%s cannot read the timing cache %s (%s; TensorRT 10 can): it is not used",
            flavour,
            path,
            reason,
        )
        config.set_timing_cache(config.create_timing_cache(b""), False)
        return False
    raise UserError(
        f"{path} is not a timing cache of {flavour} on this GPU ({reason}); name another file for "
        "`timing_cache`, or remove this one.",
    )


def _run_builder(
    flavour: Flavour,
    builder: trt.Builder,
    network: trt.INetworkDefinition,
    config: trt.IBuilderConfig,
    settings: BuildSettings,
    remedy: str,
) -> bytes:
    with (
        _without_chatter() as terminal,
        # Off a terminal tqdm's `None` shows nothing, so that logs stay clean.
        tqdm(
            total=100,
            desc=f"building with {flavour.label}",
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}{postfix}",
            disable=None if settings.progress else True,
            file=terminal,
        ) as bar,
    ):
        monitor = None
        if hasattr(flavour.api, "IProgressMonitor"):  # API: not tensorrt<10 (8 reports no progress)
            monitor = instance_of(ProgressMonitor, flavour.api.IProgressMonitor, bar)
            config.progress_monitor = monitor
        plan = builder.build_serialized_network(network, config)
        if monitor is not None:  # API: not tensorrt<10 (as above)
            # The monitor must not be called after the build.
            config.progress_monitor = None
            if monitor.interrupted:
                raise KeyboardInterrupt
        if plan is None:
            raise _BuilderFailedError(
                f"{flavour} cannot build the engine ({logger_of(flavour.api).reason()}); {remedy}.",
            )
        bar.update(100 - bar.n)
    return bytes(plan)


@contextlib.contextmanager
def _without_chatter() -> Iterator[TextIO]:
    """Discard what the library writes to standard error; yield the real standard error.

    TensorRT-RTX 1.7 prints two lines for every INT8 convolution, past its logger.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        if _descriptor(sys.stderr) != 2:  # redirected in Python: a notebook, say
            yield sys.stderr
        else:
            with os.fdopen(os.dup(kept), "w") as terminal:
                yield terminal
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _descriptor(stream: TextIO) -> int | None:
    try:
        return stream.fileno()
    except (OSError, ValueError, AttributeError):
        return None


@dataclass
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


class ProgressMonitor(IProgressMonitor):  # API: not tensorrt<10 (8 reports no progress)
    """Shows the builder's nested phases on one bar of 100."""

    def __init__(self, bar: tqdm[NoReturn]) -> None:
        self._bar = bar
        self.interrupted = False
        """Ctrl-C was pressed: TensorRT swallows exceptions of its callbacks."""
        self._phases: dict[str, _Phase] = {}
        self._lock = threading.Lock()  # TensorRT reports from several threads

    @contextlib.contextmanager
    def _noticing(self) -> Iterator[None]:
        try:
            with self._lock:
                yield
        except KeyboardInterrupt:
            self.interrupted = True

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        with self._noticing():
            self._phases[phase_name] = _Phase(parent_phase, max(num_steps, 1))

    def step_complete(self, phase_name: str, step: int) -> bool:
        with self._noticing():
            if phase_name in self._phases:
                self._phases[phase_name].done = step + 1
                self._show()
        return not self.interrupted

    def phase_finish(self, phase_name: str) -> None:
        with self._noticing():
            self._phases.pop(phase_name, None)

    def _show(self) -> None:
        roots = [name for name, phase in self._phases.items() if phase.parent is None]
        percent = 100 * max((self._fraction(name) for name in roots), default=0.0)
        if percent > self._bar.n:
            self._bar.update(percent - self._bar.n)

    def _fraction(self, name: str) -> float:
        """Return how much of a phase is done, counting the running step's own phases."""
        phase = self._phases[name]
        inner = [key for key, child in self._phases.items() if child.parent == name]
        running = max((self._fraction(key) for key in inner), default=0.0)
        return min(1.0, (phase.done + running) / phase.steps)
