"""What TensorRT-RTX made of a graph, layer by layer, from what its builder logs.

A plan can only be inspected on the GPU it was built for. But a builder whose
`config.profiling_verbosity` is DETAILED logs, as its last verbose message, the layers of the engine
with the types that they compute in; so what runs in INT8 or FP8 is known without a GPU. (Seen in
1.5, 1.6 and 1.7.)
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from trt_yolov6.engines.tensorrt_common import LAYERS_HEADER
from trt_yolov6.quantization.levels import QuantizedName

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


def engine_layers(log: str) -> tuple[EngineLayer, ...]:
    """Return the layers that a builder's message lists; none for a log without one."""
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


def quantized_layers(
    log: str, names: Collection[str], quantized: QuantizedName = "int8"
) -> tuple[str, ...]:
    """Return which of the graph's convolutions the engine computes in 8 bits, as `names` has them.

    Args:
        log: what the builder logged, or its message with the layers.
        names: ONNX names of the convolutions (`quantization.placement.layer_names`).
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
