"""Post-training quantization as a whole: float graph and calibration images in, Q/DQ graph out.

    float graph ─ equalize ─ collect ─ calibrate ─ place ─ insert ─ tune weights ─▶ Q/DQ graph

No calibrator and no equalization is best everywhere: min-max costs one network nothing and another
much, entropy the reverse. So the default tries them (`search`): half of the calibration images make
a candidate, the other half judge how well its detections agree with the float network's. No labels
are needed.

FP8 goes the same way, without entropy calibration, multiplications after activations, ranking of
layers and reconstruction, which assume INT8's uniform grid.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from trt_yolov6.data.calibration import calibration_images, images_sha256
from trt_yolov6.errors import UserError
from trt_yolov6.graph.model import Graph
from trt_yolov6.quantization.collect import check_weights
from trt_yolov6.quantization.judge import (
    ImageSplit,
    LabelledScore,
    images_to_build_from,
    split_images,
)
from trt_yolov6.quantization.learned import with_learned
from trt_yolov6.quantization.mixed_precision import layer_costs
from trt_yolov6.quantization.preparation import (
    Prepared,
    copies_of,
    prepare,
    weight_tuning,
)
from trt_yolov6.quantization.qdq.insert import insert_qdq
from trt_yolov6.quantization.qdq.placement import Placement
from trt_yolov6.quantization.search import Found, Search
from trt_yolov6.quantization.settings import (
    QuantizationSettings,
    check_float_layers,
    check_settings,
    described,
)
from trt_yolov6.quantization.table import (
    CalibrationKey,
    CalibrationTable,
    model_sha256,
    reusable_table,
)
from trt_yolov6.quantization.trials import Candidate
from trt_yolov6.quantization.types import INT8

_log = logging.getLogger(__name__)

_PLACEMENT = 2
"""To be raised with a change of `placement`: tables lack the ranges of tensors new to it."""


@dataclass(frozen=True)
class QuantizedGraph:
    """A Q/DQ graph, ready to be built, and how it was made."""

    graph: Graph
    float_model: onnx.ModelProto
    """The float graph that the pairs were put into; its tensors are those of the table."""
    table: CalibrationTable
    placement: Placement
    candidates: tuple[Candidate, ...]
    """Compared candidates, in order; empty where nothing had to be chosen."""
    note: str
    """Note on reusing an earlier table, or why not; empty without one."""


def quantize(
    graph: Graph,
    folder: str | Path,
    settings: QuantizationSettings | None = None,
    *,
    table_file: str | Path | None = None,
    score: LabelledScore | None = None,
) -> QuantizedGraph:
    """Quantize a float graph with the images of a folder.

    Args:
        graph: from `graph.export.graph_from_checkpoint` or `graph_from_onnx`, float32.
        folder: calibration images, a few dozen like those the detector will see.
        settings: calibrator, equalization, float layers, companion precision.
        table_file: an earlier calibration table, used again if it was made from the same things.
        score: AP on labelled data (`sensitivity_report.LabelledAp`), on which the budget of
            automatic float layers then holds; None: on agreement with the float network.

    Raises:
        UserError: the graph is not float32, has a NaN in its weights or nothing that FP8 would
            speed up, the folder has too few images, unreadable ones, or nothing but black, or see
            `check_settings`.
    """
    settings = settings or QuantizationSettings()
    check_settings(settings)
    _check_graph(graph, settings)
    check_float_layers(graph, settings)
    paths = calibration_images(folder, settings.image_limit, report=True)
    folds = split_images(paths)
    key = _key(graph, paths, settings, score)
    table, note = reusable_table(table_file, key) if table_file else (None, "")
    if note:
        _log.info(note)
    found: Found | None = None
    if table is not None:
        sources = images_to_build_from(folds)
        prepared = prepare(graph, sources, settings, table.variant, measure=False)
        tuning = weight_tuning(graph, prepared, sources, settings)
    else:
        found = Search(graph, folds, settings, key, score).run()
        prepared, table, tuning = found.prepared, found.table, found.tuning
    quantized = settings.quantized
    placement = prepared.placed(table.float_layers)
    model = insert_qdq(
        prepared.model, placement, table.amax, quantized=quantized, fp16=settings.fp16
    )
    if table.learned is None:
        model = tuning.tuned(model, table.weights)
    else:
        model = with_learned(model, table.learned)
    costs = layer_costs(prepared.model)
    share = sum(costs[name].multiply_add_share for name in placement.layers)
    calibration = _record(table, len(paths)) | {
        f"{quantized.name}_layers": len(placement.layers),
        f"{quantized.name}_share_of_multiply_adds": round(share, 4),
        "rest": "fp16" if settings.fp16 else "fp32",
        **({} if found is None else _judged(found, folds)),
    }
    made = dataclasses.replace(
        graph,
        model=model,
        precision=quantized.name,
        calibration=calibration,
        float_layers=table.float_layers,
    )
    candidates = () if found is None else found.candidates
    return QuantizedGraph(made, prepared.model, table, placement, candidates, note)


def _record(table: CalibrationTable, images: int) -> dict[str, Any]:
    """Describe a calibration for the manifest."""
    return {
        "calibrator": table.method,
        "variant": table.variant,
        "weights": table.weights,
        "biases_corrected": table.weights != "nearest",
        "adaptive_rounding": table.weights == "reconstructed",
        "tuned_by_gradients": table.by_gradients,
        "images": images,
        "images_sha256": table.key.images_sha256,
    }


def _check_graph(graph: Graph, settings: QuantizationSettings) -> None:
    """Raise UserError for a graph that cannot be quantized with these settings."""
    quantized = settings.quantized
    if graph.precision != "fp32":
        raise UserError(
            f"{graph.source} is {graph.precision} already; {quantized.label} starts from a "
            "float32 graph."
        )
    check_weights(graph.model)
    if not settings.placement(graph.model).layers:
        why = (
            "they all do little work for each value that is quantized"
            if quantized.is_floating
            else "none has weights that are stored in float"
        )
        raise UserError(
            f"{graph.source} has no convolution that {quantized.label} would speed up: {why}; "
            "build it in fp16."
        )


def _key(
    graph: Graph,
    paths: Sequence[Path],
    settings: QuantizationSettings,
    score: LabelledScore | None,
) -> CalibrationKey:
    return CalibrationKey(
        model_sha256(graph.model),
        images_sha256(paths),
        {
            "type": settings.quantized.name,
            "calibrator": settings.calibrator,
            "equalize": settings.equalize,
            "shift": "aligned" if settings.shift else False,
            "bias_correction": settings.bias_correction,
            "reconstruct": settings.reconstruct,
            "reconstruct_minutes": settings.reconstruct_minutes,
            "adaptive_rounding": settings.adaptive_rounding,
            "float_layers": described(settings),
            "border": settings.border,
            "placement": _PLACEMENT,
            "preprocessing": str(graph.preprocessing),
            **({} if settings.depthwise else {"depthwise": False}),
            **({"mirrored": True} if copies_of(graph) > 1 else {}),
            **({} if score is None else {"labelled data": score.data_sha256}),
        },
    )


def _judged(found: Found, folds: Sequence[ImageSplit]) -> dict[str, Any]:
    """Return the manifest's record of the agreement with float and of what was tried."""
    agreement, held_out = found.agreement, all(fold.is_held_out for fold in folds)
    if agreement is None:
        return {}
    kind = "held-out" if held_out else "calibration"
    how = f", {len(folds)} folds" if len(folds) > 1 else ""
    _log.info(
        f"agreement with float {agreement.value:.3f} (95 % interval {agreement.low:.3f} to "
        f"{agreement.high:.3f}) on {found.images} {kind} images{how}"
    )
    return {
        "agreement": round(agreement.value, 4),
        "agreement_interval": [round(agreement.low, 4), round(agreement.high, 4)],
        "judged_on": {"images": found.images, "held_out": held_out, "folds": len(folds)},
        **({} if found.budget is None else {"budget": dict(found.budget)}),
        "tried": [item.to_json() for item in found.candidates],
    }


@dataclass(frozen=True)
class Calibrated:
    """A float graph calibrated for INT8, before any pair is put into it."""

    prepared: Prepared
    table: CalibrationTable
    paths: tuple[Path, ...]
    """The calibration images."""

    def with_float(self, layers: tuple[str, ...]) -> onnx.ModelProto:
        """Return the Q/DQ graph with some layers in float."""
        return self.prepared.inserted(self.table.method, layers)


def calibrate(
    graph: Graph,
    folder: str | Path,
    settings: QuantizationSettings | None = None,
) -> Calibrated:
    """Calibrate a float graph for INT8 as `quantize` does, to analyse its layers.

    Raises:
        UserError: see `quantize`.
    """
    settings = dataclasses.replace(
        settings or QuantizationSettings(),
        quantized=INT8,
        float_layers=0,
        bias_correction=False,
        reconstruct_minutes=0.0,
    )
    _check_graph(graph, settings)
    paths = calibration_images(folder, settings.image_limit, report=True)
    key = CalibrationKey(model_sha256(graph.model), images_sha256(paths))
    found = Search(graph, split_images(paths), settings, key).run()
    return Calibrated(found.prepared, found.table, tuple(paths))
