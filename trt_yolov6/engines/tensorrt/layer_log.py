"""Read how TensorRT built a graph, layer by layer: from TensorRT-RTX's log, or from the plan.

A plan can only be inspected on the GPU it was built for, which is where TensorRT builds. But a
builder of TensorRT-RTX whose `config.profiling_verbosity` is DETAILED logs, as its last verbose
message, the layers of the engine with the types that they compute in; so what runs in INT8 or FP8
is known without a GPU. (Seen in 1.5, 1.6 and 1.7.)
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trt_yolov6.engines.tensorrt.flavour import LAYERS_HEADER, logger_of
from trt_yolov6.quantization.types import QuantizedName

if TYPE_CHECKING:
    from trt_yolov6.engines.tensorrt import api as trt

_LAYER = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\]"
    r"(?:, Constants: \[(?P<constants>.*?)\])?, Outputs: \[(?P<outputs>.*?)\], TacticName: .*?"
    r", Metadata: (?P<metadata>.*)$",
    re.MULTILINE,
)
_DTYPE = re.compile(r"Datatype: (\w+)")
# As TensorRT spells them.
_SPELLING: dict[QuantizedName, str] = {"int8": "Int8", "fp8": "FP8"}
# Names are parted by control characters, which cannot be in them.
_NODE = re.compile(r"\[ONNX Layer: ([^\x1e\x1f]*)\]")


@dataclass(frozen=True)
class EngineLayer:
    """One kernel of an engine; types as TensorRT spells them (Int8, FP8, Half, Float …)."""

    name: str
    kind: str
    """`correlation` is a convolution, `deconv` a transposed one, `kgen` a generated kernel."""
    inputs: tuple[str, ...]
    """Types of what it reads, without stored constants."""
    outputs: tuple[str, ...]
    nodes: tuple[str, ...]
    """Names of the ONNX nodes in it."""


def inspected(engine: trt.ICudaEngine, api: trt.Api) -> str:
    """Return TensorRT's inspector's JSON on the layers of an engine."""
    inspector = engine.create_engine_inspector()
    return str(inspector.get_engine_information(api.LayerInformationFormat.JSON))


def opened(plan: bytes, api: trt.Api) -> trt.ICudaEngine | None:
    """Return the engine of a plan; needs the plan's GPU. None where it does not open."""
    return api.Runtime(logger_of(api)).deserialize_cuda_engine(plan)


def inspector_layers(text: str) -> list[Any]:
    """Return the layers in an inspector's JSON: objects, or names where it was not told more.

    In TensorRT 8 names hold control characters, which strict JSON does not allow.
    """
    layers: list[Any] = json.loads(text, strict=False).get("Layers", [])
    return layers


def engine_layers(log: str) -> tuple[EngineLayer, ...]:
    """Return the layers of a builder's message or an inspector's JSON; none for another text."""
    if log.startswith("{"):
        described = [item for item in inspector_layers(log) if isinstance(item, dict)]
        return tuple(_from_inspector(item) for item in described)
    start = log.rfind(LAYERS_HEADER)
    if start < 0:
        return ()
    return tuple(
        EngineLayer(
            name=match["name"],
            kind=match["kind"],
            inputs=tuple(_DTYPE.findall(match["inputs"])),
            outputs=tuple(_DTYPE.findall(match["outputs"])),
            nodes=tuple(_NODE.findall(match["metadata"])),
        )
        for match in _LAYER.finditer(log, start)
    )


def _from_inspector(layer: dict[str, Any]) -> EngineLayer:
    kinds = {"Convolution": "correlation", "Deconvolution": "deconv"}
    name = str(layer.get("Name", ""))
    nodes = _NODE.findall(str(layer.get("Metadata", "")))
    return EngineLayer(
        name=name,
        kind=kinds.get(layer.get("ParameterType", ""), str(layer.get("LayerType", "")).lower()),
        inputs=_formats(layer, "Inputs"),
        outputs=_formats(layer, "Outputs"),
        # TensorRT 8 has no metadata, but joins the names of what it fused and merged.
        nodes=tuple(nodes) or tuple(re.split(r" \+ | \|\| ", name)),
    )


def _formats(layer: dict[str, Any], side: str) -> tuple[str, ...]:
    """Return the types in descriptions such as `Thirty-two wide channel vectorized Int8 format`."""
    texts = [str(tensor.get("Format/Datatype", "")) for tensor in layer.get(side, [])]
    return tuple(
        next((kind for word, kind in _FORMATS.items() if word in text), text) for text in texts
    )


_FORMATS = {"Int8": "Int8", "INT8": "Int8", "FP8": "FP8", "FP16": "Half", "FP32": "Float"}


def quantized_layers(
    log: str, names: Collection[str], quantized: QuantizedName = "int8"
) -> tuple[str, ...]:
    """Return which of the graph's convolutions the engine computes in 8 bits, as `names` has them.

    Args:
        log: what the builder logged, or its message with the layers.
        names: ONNX names of the convolutions (`graph.operators.layer_names`).
        quantized: the type that is looked for.
    """
    computed = {
        node
        for layer in engine_layers(log)
        if layer.kind in ("correlation", "deconv", "runtime_fusion")
        if layer.inputs and set(layer.inputs) == {_SPELLING[quantized]}
        for node in layer.nodes
    }
    return tuple(name for name in names if name in computed)
