"""An inspection as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trt_yolov6.checkpoints.inspect import CheckpointDetails
from trt_yolov6.common.text import aligned, counted
from trt_yolov6.diagnostics.inspection import Inspection
from trt_yolov6.engines.tensorrt.plan import PlanDetails
from trt_yolov6.graph.cost import Layer
from trt_yolov6.graph.inspect import OnnxDetails


def format_inspection(inspection: Inspection, *, layers: bool = False) -> str:
    """Return an inspection as text for a terminal; with `layers`, every layer too."""
    details = inspection.details
    rows = [
        ("file", f"{inspection.path}, {_size(inspection.size)}"),
        ("SHA-256", inspection.sha256),
    ]
    listing: list[str] = []
    if isinstance(details, OnnxDetails):
        rows += _onnx_rows(details)
        listing = _layer_lines(details.layers)
    elif isinstance(details, CheckpointDetails):
        rows += _checkpoint_rows(details)
    else:
        rows += _plan_rows(details)
        listing = [f"  {name}" for name in details.layers]
    rows += _manifest_rows(inspection)
    lines = aligned(rows, left=2)
    if layers:
        lines += ["layers", *listing] if listing else ["layers: none can be listed"]
    return "\n".join(lines)


def _onnx_rows(details: OnnxDetails) -> list[tuple[str, str]]:
    opsets = ", ".join(f"{domain} {version}" for domain, version in details.opsets.items())
    producer = f", by {details.producer}" if details.producer else ""
    stored = [
        f"{dtype} {item.elements:,} values in {item.tensors} ({_size(item.bytes)})"
        for dtype, item in details.storage.items()
    ]
    pairs = details.quantize_nodes, details.dequantize_nodes
    rows = [
        ("kind", f"ONNX graph, opset {opsets}, IR {details.ir_version}{producer}"),
        *(("input", str(tensor)) for tensor in details.inputs),
        *(("output", str(tensor)) for tensor in details.outputs),
        ("nodes", f"{sum(details.operators.values())}: {_counts(details.operators)}"),
        ("parameters", f"{details.parameters:,}"),
        ("stored", ", ".join(stored) or "nothing"),
        ("layers", f"{len(details.layers)}: {_counts(details.precisions)}"),
    ]
    if any(pairs):
        rows.append(("Q/DQ", f"{pairs[0]} QuantizeLinear, {pairs[1]} DequantizeLinear"))
    if details.flops is None or details.paper_flops is None:
        rows.append(("FLOPs", "unknown: the graph leaves the image size or a shape open"))
    else:
        text = f"{details.flops / 1e9:.2f} G an image"
        if details.paper_flops != details.flops:
            text += f" ({details.paper_flops / 1e9:.2f} G as the paper counts)"
        rows.append(("FLOPs", text))
    return rows


def _checkpoint_rows(details: CheckpointDetails) -> list[tuple[str, str]]:
    eps = ", ".join(f"{value:g}" for value in details.batch_norm_eps) or "none left"
    boxes = f"DFL with {details.regression_bins + 1} bins" if details.regression_bins else "direct"
    size = details.image_size
    origin = f" of release {details.release}" if details.release else ""
    rows = [
        ("kind", f"checkpoint{origin}: {details.architecture}, {details.form} form"),
        ("classes", f"{len(details.class_names)}: {', '.join(details.class_names)}"),
        ("parameters", f"{details.parameters:,} in the file, {details.fused_parameters:,} fused"),
        ("FLOPs", f"{details.fused_flops / 1e9:.2f} G fused at {size}x{size}, as the paper counts"),
        ("network", f"{details.block} blocks, {details.activation}, boxes {boxes}, BN eps {eps}"),
    ]
    if details.training:
        settings, ap = details.training["settings"], details.training["ap"]
        text = f"{details.training['epoch']} of {settings.get('epochs', '?')} epochs"
        text += f" on {settings.get('data', '?')}, input {settings.get('image_size', '?')}"
        rows.append(("training", text + ("" if ap is None else f", AP {ap:.4f}")))
    return rows


def _plan_rows(details: PlanDetails) -> list[tuple[str, str]]:
    return [
        ("kind", f"plan of {details.flavour} {details.version}"),
        *(("tensor", str(tensor)) for tensor in details.tensors),
        ("layers", details.note or f"{len(details.layers)}"),
    ]


def _manifest_rows(inspection: Inspection) -> list[tuple[str, str]]:
    manifest = inspection.manifest
    if manifest is None:
        return [] if inspection.kind == "checkpoint" else [("manifest", "none")]
    height, width = manifest.image_size
    check = "matches this file"
    if not inspection.matches_manifest:
        check = "describes ANOTHER file (cut short, or replaced): build the engine again"
    classes = counted(len(manifest.class_names), "class")
    outputs = f"outputs {manifest.output_layout}; images: {manifest.preprocessing}"
    rows = [
        ("manifest", check),
        ("  model", f"{manifest.model}, {manifest.precision}, {height}x{width}, {classes}"),
        ("  decoder", f"{manifest.decoder}, {outputs}"),
        ("  batch", str(manifest.batch)),
        ("  built", f"by {manifest.backend} {manifest.backend_version} for {manifest.target}"),
        ("  source", f"{manifest.source}, SHA-256 {manifest.source_sha256 or 'unknown'}"),
    ]
    if manifest.nms:
        nms = manifest.nms
        at_most = f"at most {nms.max_detections}"
        rows.append(("  NMS", f"confidence {nms.confidence}, IoU {nms.iou}, {at_most}"))
    if manifest.precision in ("int8", "fp8"):
        layers = manifest.quantized_layers
        count = "unknown" if layers is None else str(layers)
        rows.append((f"  in {manifest.precision.upper()}", f"{count} convolutions of the engine"))
    if manifest.calibration:
        rows.append(("  calibration", _in_words(manifest.calibration)))
    if manifest.float_layers:
        rows.append(("  in float", ", ".join(manifest.float_layers)))
    return rows


def _in_words(record: Mapping[str, Any]) -> str:
    """Say what a manifest's record of a calibration holds: hashes and trials are in `--json`."""
    parts = []
    for key, value in record.items():
        name = key.replace("_", " ")
        if value is True:
            parts.append(name)
        elif isinstance(value, Mapping):
            parts.append(f"{name} {_in_words(value)}")
        elif isinstance(value, list) and key != "tried":
            parts.append(f"{name} {' to '.join(map(str, value))}")
        elif isinstance(value, list):
            parts.append(f"{counted(len(value), 'way')} tried (--json lists them)")
        elif value is not None and value is not False and not key.endswith("sha256"):
            parts.append(f"{name} {value}")
    return ", ".join(parts)


def _layer_lines(layers: Sequence[Layer]) -> list[str]:
    rows = [("name", "operator", "weights", "stride", "groups", "precision", "MFLOPs")]
    rows += [
        (
            layer.name,
            layer.operator,
            _times(layer.weight_shape),
            _times(layer.strides),
            str(layer.groups),
            layer.precision,
            "unknown" if layer.flops is None else f"{layer.flops / 1e6:.1f}",
        )
        for layer in layers
    ]
    return [f"  {line}" for line in aligned(rows, left=len(rows[0]) - 1)]


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "-"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"


def _size(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 10_000 else f"{count} bytes"
