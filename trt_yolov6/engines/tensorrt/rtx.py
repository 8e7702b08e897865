"""TensorRT-RTX: builds in seconds and without a GPU, and compiles the kernels where it runs.

Its builder times nothing, so a machine without a GPU can build for a T4; what belongs to timing
(the timing cache) has no meaning here. Its kernels are compiled for the GPU when the engine runs,
which makes the first run of each batch size slow.
"""

# API: tensorrt-rtx (targets, kernel and CUDA graph strategies)

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast

from trt_yolov6.engines.base import Availability, BuildSettings, Engine, LoadOptions
from trt_yolov6.engines.cuda import device as cuda_device
from trt_yolov6.engines.manifest import Manifest
from trt_yolov6.engines.tensorrt.flavour import FIRST_WITH_FP8, Flavour, check_fp8
from trt_yolov6.engines.tensorrt.runtime_cache import RuntimeCache, cache_path
from trt_yolov6.errors import MissingDependencyError, UserError, install_command
from trt_yolov6.spec import BatchProfile

if TYPE_CHECKING:
    from trt_yolov6.engines.tensorrt import api as trt

NAME = "tensorrt-rtx"

TARGETS: dict[str, tuple[str, ...]] = {
    "t4": ("SM75",),
    "turing": ("SM75",),
    "a100": ("SM80",),
    "a30": ("SM80",),
    "a10": ("SM86",),
    "a40": ("SM86",),
    "ampere": ("SM80", "SM86"),
    "orin": ("SM87",),
    "l4": ("SM89",),
    "l40s": ("SM89",),
    "ada": ("SM89",),
    "h100": ("SM90",),
    "h200": ("SM90",),
    "hopper": ("SM90",),
    "b200": ("SM100",),
    "blackwell": ("SM120",),
    "gb10": ("SM121",),
    "portable": (),
}
"""`--target` names and the compute capabilities they stand for, as members of `ComputeCapability`.

`portable` sets none, which builds for all of Ampere, Ada and consumer Blackwell; a T4 is not among
them. Which of the names a version of TensorRT-RTX builds for, `targets()` says.
"""

_REFUSED = {
    "timing_cache": "`timing_cache` is for TensorRT: TensorRT-RTX times nothing when it builds",
    "calibration": "TensorRT-RTX has no calibrators, as TensorRT up to version 10 has",
    "tactic_sources": "`tactic_sources` is for TensorRT: TensorRT-RTX has kernels of its own only",
}
"""Settings that it cannot honour, and why."""

# Seen with 1.6.1 and 1.7.1: "has no runners that implement it", for every target.
_DATA_DEPENDENT = {"NonMaxSuppression", "NonZero"}


def availability() -> Availability:
    """Say whether TensorRT-RTX is here, which version, and what it builds for and runs on."""
    try:
        flavour = _flavour()
    except Exception as error:  # a broken installation raises more than ImportError
        return Availability(NAME, False, False, None, str(error).rstrip("."))
    try:
        device = cuda_device.current_device()
        _check_device(flavour, device)
    except Exception as error:
        reason = str(error).rstrip(".")
        names = ", ".join(targets(flavour.api))
        return Availability(
            NAME, True, False, flavour.version, f"builds for a target ({names}) only: {reason}"
        )
    return Availability(NAME, True, True, flavour.version, str(device))


def targets(api: trt.Api) -> tuple[str, ...]:
    """Return the names of `TARGETS` that this version of TensorRT-RTX builds for."""
    offered = api.ComputeCapability.__members__
    return tuple(name for name, needed in TARGETS.items() if all(sm in offered for sm in needed))


def check(settings: BuildSettings) -> None:
    """Raise UserError where TensorRT-RTX is missing, or for a setting it cannot honour.

    That is a target it does not build for, none where there is no GPU, one without FP8 for a graph
    in FP8, or a timing cache.
    """
    flavour = _flavour()
    for name, why in _REFUSED.items():
        if getattr(settings, name) is not None:
            raise UserError(f"{why}; leave the option out, or give `backend` tensorrt.")
    capabilities = _capabilities(flavour, settings.target)
    if settings.fp8:
        _check_fp8(settings.target, capabilities)


def build(model: bytes, settings: BuildSettings) -> bytes:
    """Build a plan for `settings.target`, or for the GPU in this machine.

    Raises:
        UserError: see `check`, or the graph has NMS in it, or see `builder.build_plan`.
    """
    check(settings)
    flavour = _flavour()
    capabilities = _capabilities(flavour, settings.target)
    _check_operators(flavour, model)
    from trt_yolov6.engines.tensorrt.builder import build_plan

    set_target = _target_setter(flavour.api, capabilities)
    try:
        return build_plan(flavour, model, settings, set_target)
    except UserError:
        _forget_failure(flavour, set_target)
        raise


def _forget_failure(flavour: Flavour, set_target: Callable[[trt.IBuilderConfig], None]) -> None:
    """Build an engine of one operator, so that the next is not built as the one that failed.

    After a build that failed for a T4, TensorRT-RTX 1.7 gives the next one in the process, for
    Ada, the layers that it has for a T4, most of them in float.
    """
    import onnx.parser

    from trt_yolov6.engines.tensorrt.builder import build_plan

    model = onnx.parser.parse_model(
        """<ir_version: 9, opset_import: ["" : 17]>
        one_operator (float[1, 3, 32, 32] images) => (float[1, 3, 32, 32] result)
        { result = Relu(images) }"""
    )
    with contextlib.suppress(UserError):
        settings = BuildSettings(BatchProfile.of(1), progress=False)
        build_plan(flavour, model.SerializeToString(), settings, set_target)


def load(path: Path, manifest: Manifest | None, options: LoadOptions) -> Engine:
    """Load a plan; of the options only `cuda_graph` concerns it.

    The kernels that are compiled for this GPU are kept next to the plan, in
    `<plan>.runtime-cache`, so that the next start is quick.

    Raises:
        UserError: see `TensorRTEngine`.
    """
    flavour = _flavour()
    from trt_yolov6.engines.tensorrt.engine import ContextSettings, TensorRTEngine

    cache = RuntimeCache(cache_path(path))
    make_config = _runtime_config(flavour.api, cache, options.cuda_graph)
    contexts = ContextSettings(
        make_config,
        make_config_for_recording=_runtime_config(flavour.api, cache, False),
        launches_graphs=options.cuda_graph,
        compiles_batch_sizes=True,
        after_first_run=cache.save,
    )
    return TensorRTEngine(flavour, path, manifest, contexts, options)


def _flavour() -> Flavour:
    try:
        import tensorrt_rtx
    except Exception as error:  # a missing library raises more than ImportError
        raise MissingDependencyError(
            f"TensorRT-RTX does not import ({error}); install it with `{install_command(NAME)}`."
        ) from error
    return Flavour(NAME, "TensorRT-RTX", cast("trt.Api", tensorrt_rtx))


def _check_device(flavour: Flavour, device: cuda_device.Device) -> None:
    """Refuse a GPU that this version does not run on."""
    # Versions 1.4 to 1.6 ran there in tests, though no list of supported GPUs names it.
    if device.capability == (9, 0) and flavour.release >= (1, 7):
        raise UserError(
            f"{flavour} refuses the {device.name} (Hopper); install version 1.6, or TensorRT."
        )


def _capabilities(flavour: Flavour, target: str | None) -> tuple[str, ...]:
    if target is None:
        try:
            device = cuda_device.current_device()
        except MissingDependencyError as error:
            raise MissingDependencyError(
                f"TensorRT-RTX does not know which GPU to build for, because {error}; give "
                f"`target` {'|'.join(targets(flavour.api))}.",
            ) from error
        _check_device(flavour, device)
        return ("CURRENT",)
    needed = TARGETS.get(target.lower())
    offered = targets(flavour.api)
    if needed is None:
        raise UserError(f"`target` {target} is not known; choose one of {', '.join(offered)}.")
    if target.lower() not in offered:
        sm = needed[0].removeprefix("SM")
        raise UserError(
            f"{flavour} does not build for {target} (compute capability {sm[:-1]}.{sm[-1]}); "
            f"choose one of {', '.join(offered)}, or build with TensorRT on that machine."
        )
    return needed


def _check_fp8(target: str | None, capabilities: tuple[str, ...]) -> None:
    """Refuse a target without FP8; `portable` is one, as some of its GPUs lack it."""
    if target is None:
        check_fp8(cuda_device.current_device())
        return
    # `portable` names none, and would serve Ampere too.
    versions = [(int(name[2:-1]), int(name[-1])) for name in capabilities] or [(8, 0)]
    if min(versions) < FIRST_WITH_FP8:
        major, minor = min(versions)
        raise UserError(
            f"`target` {target} includes compute capability {major}.{minor}, which has no FP8 (8.9 "
            "and later do: Ada, Hopper, Blackwell); build with int8 or fp16 for it.",
        )


def _check_operators(flavour: Flavour, model: bytes) -> None:
    """Refuse what TensorRT-RTX parses or takes for a plugin, but has no kernels for."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        nodes = onnx.load_from_string(model).graph.node
    except DecodeError:
        return  # the parser says it better
    for node in nodes:
        if node.op_type in _DATA_DEPENDENT:
            raise UserError(
                f"{flavour} has no {node.op_type} (node {node.name or node.output[0]}), nor any "
                "output whose size depends on the image; leave out `nms`, or use `backend` "
                "tensorrt or onnxruntime.",
            )


def _target_setter(
    api: trt.Api, capabilities: tuple[str, ...]
) -> Callable[[trt.IBuilderConfig], None]:
    def set_target(config: trt.IBuilderConfig) -> None:
        config.num_compute_capabilities = len(capabilities)
        for index, name in enumerate(capabilities):
            if not config.set_compute_capability(getattr(api.ComputeCapability, name), index):
                raise UserError(
                    f"TensorRT-RTX {api.__version__} does not take {name} as a target; choose "
                    "another `target`.",
                )

    return set_target


def _runtime_config(
    api: trt.Api, cache: RuntimeCache, cuda_graph: bool
) -> Callable[[trt.ICudaEngine], trt.IRuntimeConfig]:
    """Return a factory for `IRuntimeConfig`: eager kernels, CUDA graphs, runtime cache, scratch.

    Eager: the kernels of a batch size are compiled before its first run, not during the first few,
    in which a slower kernel for all shapes would run: timings and the last bits of results would
    change. The contexts of a slot share scratch memory from outside.
    """

    def make_config(engine: trt.ICudaEngine) -> trt.IRuntimeConfig:
        config = engine.create_runtime_config()
        config.dynamic_shapes_kernel_specialization_strategy = (
            api.DynamicShapesKernelSpecializationStrategy.EAGER
        )
        config.cuda_graph_strategy = (
            api.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            if cuda_graph
            else api.CudaGraphStrategy.DISABLED
        )
        config.set_execution_context_allocation_strategy(
            api.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        cache.attach(config)
        return config

    return make_config
