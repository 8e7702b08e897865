"""Inspect a TensorRT plan: flavour and version, and tensors and layers where it opens."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from trt_yolov6.errors import UserError
from trt_yolov6.graph.inspect import TensorInfo

if TYPE_CHECKING:
    from trt_yolov6.engines.tensorrt import api as trt

_HEADER_BYTES = 28


@dataclass(frozen=True)
class PlanDetails:
    """Content of a TensorRT plan."""

    flavour: str
    """`TensorRT` or `TensorRT-RTX`, by the first bytes."""
    version: str
    """Version of the TensorRT that built it, by its header."""
    tensors: tuple[TensorInfo, ...]
    """Inputs and outputs; empty where the plan cannot be opened here."""
    layers: tuple[str, ...]
    """Names of the layers TensorRT made; empty where the plan cannot be opened here."""
    note: str
    """Why it could not be opened here; empty when it could."""


def read_plan_header(path: Path) -> tuple[str, str]:
    """Return which TensorRT built a plan, and its version, from the first 28 bytes.

    A plan of TensorRT begins with `ftrt`, one of TensorRT-RTX with `vtrt`; bytes 24 to 27 are the
    version since TensorRT 8.6 (`trtexec --getPlanVersionOnly` reads the same).

    Raises:
        UserError: the file begins like neither.
    """
    with path.open("rb") as file:
        header = file.read(_HEADER_BYTES)
    flavours = {b"ftrt": "TensorRT", b"vtrt": "TensorRT-RTX"}
    flavour = flavours.get(header[:4])
    if flavour is None or len(header) < _HEADER_BYTES:
        raise UserError(
            f"{path} does not begin like a TensorRT plan; build it again with `trt-yolov6 build`."
        )
    return flavour, ".".join(map(str, header[24:28]))


def inspect_plan(path: Path) -> PlanDetails:
    """Inspect a plan, as far as this machine's TensorRT opens it.

    Raises:
        UserError: the file does not begin like a plan.
    """
    flavour, version = read_plan_header(path)
    module = "tensorrt" if flavour == "TensorRT" else "tensorrt_rtx"
    try:
        tensors, layers = _open_plan(path, cast("trt.Api", importlib.import_module(module)))
    except Exception as error:  # missing or broken TensorRT, no GPU, another version …
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        note = f"its layers cannot be listed here: {reason}"
        return PlanDetails(flavour, version, (), (), note)
    return PlanDetails(flavour, version, tensors, layers, "")


def _open_plan(path: Path, api: trt.Api) -> tuple[tuple[TensorInfo, ...], tuple[str, ...]]:
    """Deserialize a plan and list its inputs, outputs and layers; needs the GPU it is for."""
    from trt_yolov6.engines.cuda import device as cuda_device
    from trt_yolov6.engines.tensorrt.flavour import logger_of
    from trt_yolov6.engines.tensorrt.layer_log import inspected, inspector_layers, opened

    cuda_device.current_device()
    logger = logger_of(api)
    logger.clear()
    engine = opened(path.read_bytes(), api)
    if engine is None:
        raise RuntimeError(logger.reason())
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    tensors = tuple(
        TensorInfo(
            name,
            str(engine.get_tensor_dtype(name)).rsplit(".", 1)[-1].lower(),
            tuple("?" if size < 0 else int(size) for size in engine.get_tensor_shape(name)),
        )
        for name in names
    )
    # With detailed profiling a layer is an object, else only its name.
    layers = tuple(
        str(layer.get("Name", layer)) if isinstance(layer, dict) else str(layer)
        for layer in inspector_layers(inspected(engine, api))
    )
    return tensors, layers
