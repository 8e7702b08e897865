"""ONNX Runtime sessions that compute Q/DQ pairs in float: the reference for backends."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trt_yolov6.errors import MissingDependencyError, UserError

if TYPE_CHECKING:
    import onnxruntime

WRONG_REWRITES = ("ReluQuantRewrite", "ClipQuantRewrite", "ConvMulFusion")
"""Rewritings that Q/DQ graphs are computed without. The first two take a Relu or Clip in front of a
QuantizeLinear away where the integers' range clips as well, and ONNX Runtime (1.32) does so with
FP8, too, whose range does not. The last would multiply weights' codes by their scales again."""


def reference_session(model: bytes, threads: int | None = None) -> onnxruntime.InferenceSession:
    """Open a graph of this package's own making on the CPU, Q/DQ pairs computed in float.

    Args:
        model: a serialized ONNX model.
        threads: CPU threads; None for one a physical core.
    """
    return open_session(model, "the graph", threads=threads)


def open_session(
    model: bytes,
    source: str | Path,
    *,
    threads: int | None = None,
    providers: Callable[[], Sequence[Any]] = lambda: ["CPUExecutionProvider"],
    fallback: bool = False,
    profile: Path | None = None,
) -> onnxruntime.InferenceSession:
    """Open an ONNX Runtime session that does not fuse Q/DQ pairs.

    Args:
        model: a serialized ONNX model.
        source: what to call it in messages.
        threads: CPU threads; None for one a physical core.
        providers: returns the execution providers, best first.
        fallback: let ONNX Runtime take the next provider where one does not start.
        profile: prefix of the file for ONNX Runtime's profile; None for no profile.

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
    if threads is not None and threads > 4 * processors:
        raise UserError(
            f"`threads` {threads} is far more than this machine's {processors} processors; give "
            "fewer.",
            "threads",
        )
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    if threads is not None:
        settings.intra_op_num_threads = threads
    if profile is not None:
        settings.enable_profiling = True
        settings.profile_file_prefix = str(profile)
    quantized = has_qdq(model)
    if quantized:
        # Without VNNI, ONNX Runtime's INT8 convolutions saturate in 16 bits and give other results
        # than TensorRT. Left as Q/DQ pairs around float operators, the arithmetic is exact.
        settings.add_session_config_entry("session.disable_quant_qdq", "1")
    chosen = list(providers())
    try:
        return onnxruntime.InferenceSession(
            model,
            settings,
            providers=chosen,
            disabled_optimizers=list(WRONG_REWRITES) if quantized else None,
            enable_fallback=int(fallback),
        )
    except Exception as error:  # its exception classes share no public base
        raise UserError(
            f"{source} is not an ONNX model that ONNX Runtime {onnxruntime.__version__} takes "
            f"({first_line(error)}); export or build it again."
        ) from error


def has_qdq(model: bytes) -> bool:
    """Return whether a serialized model has Q/DQ nodes."""
    return b"QuantizeLinear" in model


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, at most 300 characters."""
    text = str(error).strip().splitlines()
    return text[0][:300] if text else type(error).__name__
