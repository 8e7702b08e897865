"""ONNX Runtime sessions that compute Q/DQ pairs in float: the reference for backends."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from trt_yolov6.common.machine import usable_cpus
from trt_yolov6.common.ranges import Count, fitting
from trt_yolov6.errors import MissingDependencyError, UserError, first_line
from trt_yolov6.graph.operators import QDQ_OPS

if TYPE_CHECKING:
    import onnx
    import onnxruntime

WRONG_REWRITES = ("ReluQuantRewrite", "ClipQuantRewrite", "ConvMulFusion")
"""Optimizers that Q/DQ graphs are computed without. The first two remove a Relu or Clip before a
QuantizeLinear where the integers' range clips as well, and ONNX Runtime (1.32) does so with FP8,
too, whose range does not. The last would multiply weights' codes by their scales again."""


def reference_session(
    model: onnx.ModelProto | bytes,
    *,
    outputs: Iterable[str] = (),
    threads: int | None = None,
    spinning: bool = True,
    optimized: bool = True,
    source: str | Path = "the graph",
) -> onnxruntime.InferenceSession:
    """Open a graph on the CPU with Q/DQ pairs computed in float, and without `WRONG_REWRITES`.

    Args:
        model: an ONNX model; it is not changed.
        outputs: names of tensors to have as outputs besides the graph's own.
        threads, spinning, optimized, source: see `open_session`.

    Raises:
        UserError: see `open_session`.
    """
    if not isinstance(model, bytes):
        from trt_yolov6.graph.editing import with_outputs

        model = (with_outputs(model, outputs) if outputs else model).SerializeToString()
    return open_session(
        model, source, threads=threads, spinning=spinning, optimized=optimized, rewrites=False
    )


def open_session(
    model: bytes,
    source: str | Path,
    *,
    threads: int | None = None,
    providers: Callable[[], Sequence[Any]] = lambda: ["CPUExecutionProvider"],
    fallback: bool = False,
    profile: Path | None = None,
    spinning: bool = True,
    optimized: bool = True,
    rewrites: bool | None = None,
) -> onnxruntime.InferenceSession:
    """Open an ONNX Runtime session that does not fuse Q/DQ pairs.

    Args:
        model: a serialized ONNX model.
        source: what to call it in messages.
        threads: CPU threads; None for one a physical core, or a core that the process may use.
        providers: returns the execution providers, best first.
        fallback: let ONNX Runtime take the next provider where one does not start.
        profile: prefix of the file for ONNX Runtime's profile; None for no profile.
        spinning: let threads spin while they wait for work.
        optimized: let ONNX Runtime rewrite the graph.
        rewrites: allow `WRONG_REWRITES`; None allows them in graphs without Q/DQ pairs.

    Raises:
        UserError: ONNX Runtime is missing, refuses the model, or `threads` is absurd.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError(
            f"onnxruntime does not import ({error}); install it with `pip install onnxruntime`."
        ) from error
    processors = os.cpu_count() or 1
    fitting(threads, Count | None, "`threads`")
    if threads is not None and threads > 4 * processors:
        raise UserError(
            f"`threads` {threads} is far more than this machine's {processors} processors; give "
            "fewer.",
        )
    usable = len(usable_cpus())
    if threads is None and usable < processors:
        # By itself ONNX Runtime starts a thread for each core of the machine and binds it there,
        # even to those that the process may not use, as in a container with some of them.
        threads = usable
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    if threads is not None:
        settings.intra_op_num_threads = threads
    if profile is not None:
        settings.enable_profiling = True
        settings.profile_file_prefix = str(profile)
    if not spinning:
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not optimized:
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    # Without VNNI, ONNX Runtime's INT8 convolutions saturate in 16 bits and give other results than
    # TensorRT. As Q/DQ pairs around float operators they do not. Float graphs are not affected.
    settings.add_session_config_entry("session.disable_quant_qdq", "1")
    if rewrites is None:
        rewrites = not is_quantized(model)
    chosen = list(providers())
    try:
        return onnxruntime.InferenceSession(
            model,
            settings,
            providers=chosen,
            disabled_optimizers=None if rewrites else list(WRONG_REWRITES),
            enable_fallback=int(fallback),
        )
    except Exception as error:  # its exception classes share no public base
        raise UserError(
            f"{source} is not an ONNX model that ONNX Runtime {onnxruntime.__version__} takes "
            f"({first_line(error)}); export or build it again."
        ) from error


def runner(
    session: onnxruntime.InferenceSession, outputs: Iterable[str] | None = None
) -> Callable[[NDArray[Any]], dict[str, NDArray[Any]]]:
    """Return a function from what a session's one input takes to outputs by name; None: all."""
    names = [item.name for item in session.get_outputs()] if outputs is None else list(outputs)
    source = session.get_inputs()[0].name
    if not names:  # for which ONNX Runtime would return all
        return lambda _: {}
    return lambda images: dict(zip(names, session.run(names, {source: images}), strict=True))


def is_quantized(model: bytes) -> bool:
    """Return whether a serialized model has Q/DQ nodes."""
    # Most models need not be parsed: the operator's name is in every one that has it.
    if b"QuantizeLinear" not in model:
        return False
    parsed = parsed_model(model)
    return parsed is not None and any(node.op_type in QDQ_OPS for node in parsed.graph.node)


def parsed_model(content: bytes) -> onnx.ModelProto | None:
    """Return a serialized model; None where it is not one, which ONNX Runtime will say."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return onnx.load_from_string(content)
    except (DecodeError, ValueError):
        return None
