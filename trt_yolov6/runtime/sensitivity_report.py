"""Sensitivity as the paper reports it: layers ranked, and what keeping some in float brings.

Fig. 7 ranks layers by AP with only one of them in INT8; Table 21 compares metrics by the AP that
each one's six most sensitive layers bring back when they stay in float.
"""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

import onnx

from trt_yolov6.data.coco import CocoDataset
from trt_yolov6.engines import load_engine
from trt_yolov6.engines.build import build_engine
from trt_yolov6.graph.model import Graph
from trt_yolov6.quantization.judge import Judge, batches_of
from trt_yolov6.quantization.metrics import MEANING, TENSOR_METRICS, Metric, direction
from trt_yolov6.quantization.pipeline import Calibrated
from trt_yolov6.quantization.sensitivity import (
    Distortion,
    Sensitivity,
    by_value,
    layer_distortions,
    ranked,
    scores_alone,
)
from trt_yolov6.runtime.evaluate import evaluate

Score = Callable[[onnx.ModelProto], float]

_log = logging.getLogger(__name__)

REPORTED_LAYERS = 6
"""Layers that the paper's partial quantization leaves in float (Appendix B)."""


def measure(
    graph: Graph, calibrated: Calibrated, metric: Metric, score: Score | None = None
) -> Sensitivity:
    """Rank the INT8 layers of a calibrated graph.

    Args:
        graph: the float graph that was calibrated.
        calibrated: from `calibrate`.
        metric: `mse`, `snr`, `cosine` at the layers' outputs, or `ap`.
        score: a graph's AP, for `ap`; None takes the agreement with the float network.
    """
    if metric != "ap":
        return ranked(_distortions(graph, calibrated), metric)
    score = score or Judge(graph, calibrated.paths).confident_agreement
    prepared = calibrated.prepared
    scores = scores_alone(prepared.model, prepared.placement, calibrated.table.amax, score)
    return by_value("ap", scores)


def fallback_report(
    graph: Graph,
    calibrated: Calibrated,
    score: Score | None = None,
    by_ap: Sensitivity | None = None,
) -> str:
    """Return a table like the paper's Table 21, in Markdown.

    Args:
        graph: the float graph that was calibrated.
        calibrated: from `calibrate`.
        score: a graph's AP; None takes the agreement with the float network.
        by_ap: the layers by `ap`, from `measure`, for one more row; None leaves it out, since that
            ranking takes a run over the images for every layer.
    """
    name = "AP" if score else "agreement with float"
    scored = score or Judge(graph, calibrated.paths).confident_agreement
    distortions = _distortions(graph, calibrated)
    rankings = [ranked(distortions, metric) for metric in TENSOR_METRICS]
    if by_ap is not None:
        rankings.append(by_ap)
    _log.info(f"scoring {len(rankings) + 2} graphs ...")
    rows = [
        f"| in float | {name} | layers |",
        "| --- | --- | --- |",
        f"| all | {scored(graph.model):.4f} | |",
        f"| none | {scored(calibrated.with_float(())):.4f} | |",
    ]
    for ranking in rankings:
        layers = ranking.names[:REPORTED_LAYERS]
        value = scored(calibrated.with_float(layers))
        which = direction(ranking.metric).split()[0]
        what = f"{REPORTED_LAYERS} of {which} {ranking.metric}"
        rows.append(f"| {what} | {value:.4f} | {', '.join(layers)} |")
    used = [f"{ranking.metric}: {MEANING[ranking.metric]}" for ranking in rankings]
    return "\n".join([*rows, "", "; ".join(used) + "."])


def _distortions(graph: Graph, calibrated: Calibrated) -> dict[str, Distortion]:
    images = batches_of(graph, calibrated.paths)
    prepared = calibrated.prepared
    return layer_distortions(prepared.model, prepared.placement, calibrated.table.amax, images)


def ap_on(graph: Graph, dataset: CocoDataset) -> Score:
    """Return a function that gives the COCO AP of a form of `graph` on a data set."""

    def score(model: onnx.ModelProto) -> float:
        with tempfile.TemporaryDirectory() as folder:
            form = dataclasses.replace(graph, model=model)
            built = build_engine(form, backend="onnxruntime", output=Path(folder) / "x.onnx")
            with load_engine(built.path) as engine:
                return evaluate(engine, dataset, progress=False).ap or 0.0

    return score
