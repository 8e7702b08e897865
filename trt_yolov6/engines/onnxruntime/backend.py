"""ONNX Runtime: the engine that works everywhere. The plan is the ONNX graph itself.

It runs on the CPU, or on a GPU through the CUDA and TensorRT execution providers where
`onnxruntime-gpu` is installed. Only files without a manifest, and INT8, need the onnx package.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trt_yolov6.common.files import read_bytes, read_json
from trt_yolov6.common.machine import cpu_model
from trt_yolov6.detectors.metadata import check_input
from trt_yolov6.detectors.recognition import GraphFacts
from trt_yolov6.engines.base import Availability, BuildSettings, Engine, LoadOptions, check_images
from trt_yolov6.engines.manifest import Manifest
from trt_yolov6.engines.onnxruntime.providers import (
    PROVIDERS,
    check_started,
    obstacle,
    on_gpu,
    providers_for,
    usable,
)
from trt_yolov6.engines.reading import detector_of
from trt_yolov6.errors import MissingDependencyError, UserError, first_line
from trt_yolov6.graph.reference import is_quantized, open_session, parsed_model, reference_session
from trt_yolov6.spec import (
    BatchProfile,
    EnginePrecision,
    PrecisionName,
    TensorSpec,
    image_size_of,
)

if TYPE_CHECKING:
    import onnx
    import onnxruntime

NAME = "onnxruntime"

# A graph with a free batch axis and no manifest takes any batch.
_ANY_BATCH = BatchProfile(min=1, opt=1, max=2**31 - 1)

_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
}


def availability() -> Availability:
    """Say whether ONNX Runtime is here, which version, and on what it would run."""
    try:
        import onnxruntime
    except Exception as error:  # a broken installation raises more than ImportError
        return Availability(
            NAME, False, False, None, f"onnxruntime does not import ({error}); pip install it"
        )
    return Availability(
        NAME, True, True, onnxruntime.__version__, "providers: " + ", ".join(usable())
    )


def check(settings: BuildSettings) -> None:
    """Raise UserError for a setting that ONNX Runtime does not have."""
    ignored = {
        "target": "tensorrt-rtx",
        "timing_cache": "tensorrt",
        "workspace_mib": "tensorrt or tensorrt-rtx",
        "optimization_level": "tensorrt or tensorrt-rtx",
        "tactic_sources": "tensorrt",
    }
    for name, backends in ignored.items():
        if getattr(settings, name) is not None:
            raise UserError(
                f"`{name}` is for TensorRT engines; leave it out, or give `backend` {backends}.",
            )
    if settings.calibration is not None:
        raise UserError(
            "TensorRT's own calibration is for TensorRT engines; leave it out, or give `backend` "
            "tensorrt.",
        )


def build(model: bytes, settings: BuildSettings) -> bytes:
    """Return the plan of an ONNX model, which for ONNX Runtime is the model itself.

    The graph is not stored optimized: ONNX Runtime's own rewriting depends on the processor it runs
    on, so it is done when the engine is loaded.

    Raises:
        UserError: see `check`, or ONNX Runtime refuses the model.
    """
    check(settings)
    _session(model, "the exported ONNX graph", LoadOptions(provider="cpu"))
    return model


def load(path: Path, manifest: Manifest | None, options: LoadOptions) -> Engine:
    """Load an ONNX file as an engine.

    Raises:
        UserError: the file is cut short, no ONNX model, or not a detector this package decodes.
    """
    content, graph, dropped = _read(path, manifest, options.decoder)
    exact, whole = _exactly(content, options)
    session = _session(exact, path, options)
    engine = OnnxRuntimeEngine(path, manifest, session, options, graph)
    engine.dropped_outputs = dropped
    notes = []
    if b"QLinearConv" in content:
        notes.append("INT8 by ONNX Runtime's own QLinearConv, which saturates on CPUs without VNNI")
    elif is_quantized(content):
        label = "FP8" if manifest and manifest.precision == "fp8" else "INT8"
        how = "with integer arithmetic emulated in float32" if whole else "in float"
        engine.computed_in = "fp32"
        notes.append(f"Q/DQ computed exactly, {how}: the accuracy of {label}, not its speed")
    if options.provider is None and engine.provider == PROVIDERS["cpu"] and "cuda" in usable():
        reason = obstacle("cuda") or "no usable GPU or cuDNN"
        notes.append(f"on the CPU, for CUDA's provider does not start ({reason})")
    engine.note = "; ".join(notes)
    return engine


def _read(
    path: Path, manifest: Manifest | None, decoder: str | None
) -> tuple[bytes, onnx.ModelProto | None, tuple[str, ...]]:
    """Return a file's graph as it is run, parsed if it has no manifest, and outputs it is without.

    `build` has made engines that have a manifest ready to run.
    """
    content = read_bytes(path)
    graph = parsed_model(content) if manifest is None else None
    if graph is None or not graph.graph.input:  # cut short, which what opens the session says
        return content, None, ()
    from trt_yolov6.graph.files import inlined, read_weights, sort_nodes
    from trt_yolov6.graph.inputs import with_one_input
    from trt_yolov6.graph.outputs import drop_other_outputs

    # ONNX Runtime would do the first two itself; what recognizes and rewrites the graph goes by its
    # nodes and their order.
    whole = inlined(graph, path)
    changes = whole is not graph, sort_nodes(whole), read_weights(whole, path)
    has_changed = any((*changes, with_one_input(whole, path)))
    dropped = drop_other_outputs(whole, path, decoder)
    return whole.SerializeToString() if has_changed or dropped else content, whole, dropped


class OnnxRuntimeEngine(Engine):
    """An ONNX Runtime session as an `Engine`."""

    backend = NAME

    def __init__(
        self,
        path: Path,
        manifest: Manifest | None,
        session: onnxruntime.InferenceSession,
        options: LoadOptions,
        graph: onnx.ModelProto | None,
    ) -> None:
        """Wrap a session; `graph` is the model, to recognize its family without a manifest."""
        import onnxruntime

        self.path = path
        self.manifest = manifest
        self._precision: PrecisionName | None = None
        self.backend_version = onnxruntime.__version__
        self._session: onnxruntime.InferenceSession | None = session
        self.provider: str = session.get_providers()[0]
        self._gpu = options.gpu
        self.device = _device_name(self.provider, self._gpu)
        self.threads = session.get_session_options().intra_op_num_threads or None
        inputs = [_spec(item, path) for item in session.get_inputs()]
        if len(inputs) != 1:
            listed = ", ".join(f"{item.name} {list(item.shape)}" for item in inputs)
            raise UserError(
                f"{path} takes {listed}, not one batch of images; export the detector with a "
                "single image input."
            )
        self.input = inputs[0]
        self.outputs = tuple(_spec(item, path) for item in session.get_outputs())
        check_input(self.input, path)

        def facts() -> GraphFacts:
            from trt_yolov6.graph.files import graph_precision
            from trt_yolov6.graph.outputs import facts_of

            assert graph is not None  # no manifest, and ONNX Runtime has read the file
            self._precision = graph_precision(graph)
            return facts_of(graph, self.outputs, image_size_of(self.input))

        self.detector = detector_of(manifest, options, path, facts)
        fixed = self.input.shape[0]
        if fixed is not None:
            self.batch = BatchProfile.of(fixed)
        else:
            self.batch = manifest.batch if manifest else _ANY_BATCH

    @property
    def precision(self) -> EnginePrecision:
        """Precision in the manifest, else in the graph."""
        return self._precision or super().precision

    def infer(self, images: NDArray[Any]) -> dict[str, NDArray[Any]]:
        session = self._checked(images)
        names = [output.name for output in self.outputs]
        with self._running(images):
            return dict(zip(names, session.run(names, {self.input.name: images}), strict=True))

    def resident_run(self, images: NDArray[Any], streams: int = 1) -> Callable[[], float]:
        import onnxruntime

        session = self._checked(images)
        if streams > 1:
            raise UserError(
                f"{self.path} runs in ONNX Runtime, which has no streams; leave `streams` out, or "
                "build it with TensorRT.",
            )
        device = "cpu" if self.provider == PROVIDERS["cpu"] else "cuda"
        number = self._gpu if device == "cuda" else 0
        resident = onnxruntime.OrtValue.ortvalue_from_numpy(images, device, number)
        binding = session.io_binding()
        binding.bind_ortvalue_input(self.input.name, resident)
        for output in self.outputs:
            binding.bind_output(output.name, device, number)

        def run() -> float:
            with self._running(images):
                start = time.perf_counter()
                session.run_with_iobinding(binding)
                binding.synchronize_outputs()
                return time.perf_counter() - start

        return run

    def layer_times(self, images: NDArray[Any], runs: int = 20) -> dict[str, float]:
        """Return the median seconds of each kernel, in the order they run, by name.

        ONNX Runtime names a kernel by what it computes last of the graph, a node or a tensor, with
        an ending such as `_nchwc` for its own layout. Its profiler, in a session of its own, adds
        some microseconds to each. What runs there is the file's graph, not that with
        integer arithmetic, which breaks each INT8 convolution into three kernels.

        Raises:
            UserError: as `infer`.
        """
        self._checked(images)
        short = next(name for name, full in PROVIDERS.items() if full == self.provider)
        options = LoadOptions(threads=self.threads, provider=short, gpu=self._gpu)
        with tempfile.TemporaryDirectory() as folder:
            content, _, _ = _read(self.path, self.manifest, self.load_options.decoder)
            session = _session(content, self.path, options, Path(folder) / "run")
            for _ in range(runs + 1):
                session.run(None, {self.input.name: images})
            events = read_json(session.end_profiling())
        times: dict[str, list[float]] = {}
        for event in events:
            name, found, _ = str(event.get("name", "")).rpartition("_kernel_time")
            if event.get("cat") == "Node" and found:
                times.setdefault(name, []).append(float(event["dur"]) * 1e-6)
        # The first run allocates.
        return {name: float(np.median(seconds[1:] or seconds)) for name, seconds in times.items()}

    def first_non_finite(self, images: NDArray[Any]) -> str | None:
        """Return the name of the first tensor, in the graph's order, that is not finite.

        The graph is run once more, without ONNX Runtime's rewriting and with every tensor as an
        output.
        """
        from trt_yolov6.graph.index import tensor_value

        graph = parsed_model(_read(self.path, self.manifest, self.load_options.decoder)[0])
        if graph is None:
            return None
        for weight in graph.graph.initializer:
            values = tensor_value(weight)
            if np.issubdtype(values.dtype, np.floating) and not np.isfinite(values).all():
                return f"the weight {weight.name}"
        names: list[str] = [name for node in graph.graph.node for name in node.output if name]
        try:
            session = reference_session(graph, outputs=names, optimized=False)
            values_of = session.run(names, {self.input.name: images})
        except Exception:  # its exception classes share no public base; only a name is missing then
            return None
        for name, value in zip(names, values_of, strict=True):
            floats = isinstance(value, np.ndarray) and np.issubdtype(value.dtype, np.floating)
            if floats and not np.isfinite(value).all():
                return name
        return None

    def close(self) -> None:
        self._session = None

    @contextlib.contextmanager
    def _running(self, images: NDArray[Any]) -> Iterator[None]:
        """Say what ONNX Runtime cannot run, such as a graph whose batch axis is free in part."""
        try:
            yield
        except Exception as error:  # its exception classes share no public base
            raise UserError(
                f"{self.path} does not run on a batch of {len(images)} ({first_line(error)}); give "
                "another `batch`, or export it again."
            ) from error

    def _checked(self, images: NDArray[Any]) -> onnxruntime.InferenceSession:
        if self._session is None:
            raise UserError(f"the engine {self.path} is closed; load it again.")
        check_images(self, images)
        return self._session


def _session(
    model: bytes, source: str | Path, options: LoadOptions, profile: Path | None = None
) -> onnxruntime.InferenceSession:
    session = open_session(
        model,
        source,
        threads=options.threads,
        providers=lambda: on_gpu(providers_for(options.provider), options.gpu),
        fallback=options.provider is None,
        profile=profile,
    )
    check_started(options.provider, session.get_providers()[0])
    return session


def _exactly(content: bytes, options: LoadOptions) -> tuple[bytes, bool]:
    """Return a graph whose INT8 is exact on a CPU, and whether by integer arithmetic.

    Other providers get the Q/DQ pairs: TensorRT's makes INT8 of them itself.
    """
    if not is_quantized(content):
        return content, False
    try:
        on_cpu = providers_for(options.provider)[0] == PROVIDERS["cpu"]
    except (ImportError, MissingDependencyError):  # what opens the session says so
        return content, False
    graph = parsed_model(content) if on_cpu else None
    if graph is None:
        return content, False
    from trt_yolov6.quantization.qdq import integer_arithmetic as exactly

    if _lacks_inputs(graph):  # what opens the session says so
        return content, False
    whole = exactly.with_integer_convolutions(graph)
    exact = exactly.with_single_quantization(whole)
    return content if exact is graph else exact.SerializeToString(), whole is not graph


def _lacks_inputs(model: onnx.ModelProto) -> bool:
    """Return whether a node has fewer inputs than its operator takes."""
    import onnx

    versions = {item.domain.replace("ai.onnx", ""): item.version for item in model.opset_import}
    for node in model.graph.node:
        domain = node.domain.replace("ai.onnx", "")
        known = (node.op_type, versions.get(domain, 1), domain)
        if onnx.defs.has(*known) and len(node.input) < onnx.defs.get_schema(*known).min_input:
            return True
    return False


def _spec(item: Any, path: Path) -> TensorSpec:
    dtype = _DTYPES.get(item.type)
    if dtype is None:
        raise UserError(
            f"{path} has a tensor {item.name!r} of type {item.type}, which images and detections "
            "cannot have; export the detector with float or uint8 input."
        )
    shape = tuple(size if isinstance(size, int) and size > 0 else None for size in item.shape)
    return TensorSpec(item.name, shape, np.dtype(dtype))


def _device_name(provider: str, gpu: int) -> str:
    return cpu_model() if provider == PROVIDERS["cpu"] else f"GPU {gpu} through {provider}"
