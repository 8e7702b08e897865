"""Sensitivity as the paper reports it: layers ranked, and what keeping some in float brings.

Fig. 7 ranks layers by AP with only one of them in INT8; Table 21 compares metrics by the AP with
the six layers in float that each finds most sensitive.
"""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

import onnx

from trt_yolov6.common.files import sha256_bytes
from trt_yolov6.common.statistics import Interval
from trt_yolov6.data.coco import CocoDataset
from trt_yolov6.detectors.detections import Detections
from trt_yolov6.detectors.labels import objects_of
from trt_yolov6.engines import load_engine
from trt_yolov6.engines.build import build_engine
from trt_yolov6.graph.model import Graph
from trt_yolov6.quantization.judge import Judge, batches_of
from trt_yolov6.quantization.metrics import MEANING, TENSOR_METRICS, Metric, direction
from trt_yolov6.quantization.pipeline import Calibrated
from trt_yolov6.quantization.resampling import MatchedDetections, interval, matched
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

_KEPT = 8
"""Forms of a graph whose detections are kept."""


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


class LabelledAp:
    """COCO AP of forms of a graph on a data set, and the difference between two of them."""

    def __init__(self, graph: Graph, dataset: CocoDataset) -> None:
        self._graph = graph
        self._dataset = dataset
        self._known: dict[str, tuple[float, MatchedDetections]] = {}

    def __call__(self, model: onnx.ModelProto) -> float:
        """Return a form's AP, 0..1."""
        return self._measured(model)[0]

    @property
    def data_sha256(self) -> str:
        """Hash of the images' names and of their labels."""
        return self._dataset.labels_sha256

    def change(self, model: onnx.ModelProto, base: onnx.ModelProto) -> Interval:
        """Return by how much a form's AP is higher than another's, with its 95 % interval.

        Both are resampled alike, so that it is far narrower than that of either AP.
        """
        (ap, own), (ap_base, other) = (self._measured(one) for one in (model, base))
        found = interval(lambda draws: own.ap(draws) - other.ap(draws), own.images)
        # The evaluation's own APs, which ignore crowds, give the centre.
        moved = ap - ap_base - found.value
        return Interval(*(one + moved for one in (found.value, found.low, found.high)))

    def _measured(self, model: onnx.ModelProto) -> tuple[float, MatchedDetections]:
        digest = sha256_bytes(model.SerializeToString())
        if digest not in self._known:
            while len(self._known) >= _KEPT:
                # The first one is the float network, which all others are compared with.
                del self._known[list(self._known)[1]]
            self._known[digest] = self._evaluated(model)
        return self._known[digest]

    def _evaluated(self, model: onnx.ModelProto) -> tuple[float, MatchedDetections]:
        found: dict[int, Detections] = {}
        form = dataclasses.replace(self._graph, model=model)
        with tempfile.TemporaryDirectory() as folder:
            built = build_engine(form, backend="onnxruntime", output=Path(folder) / "x.onnx")
            with load_engine(built.path) as engine:
                ap = evaluate(
                    engine,
                    self._dataset,
                    progress=False,
                    seen=lambda image, detections: found.update({image.id: detections}),
                ).ap
        images = self._dataset.images
        scored = matched(objects_of(self._dataset, images), [found[one.id] for one in images])
        return ap or 0.0, scored
