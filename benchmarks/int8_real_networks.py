"""INT8 of networks that others trained: AP, and agreement with float, on held-out images.

    python -m benchmarks.int8_real_networks --networks yolox-nano,lite-l

Each network is quantized from 64 images as the command line does by default, and judged in exact
arithmetic on its validation images and on all training images that were not among the 64, so
neither by what calibrated nor by what chose. Draw 0 are 64 images spread evenly over the training
images, other draws are random ones. With "labels" float layers are chosen by AP on three quarters
of the other training images, which then do not judge. Beside it ONNX Runtime's quantizer and, where
`--modelopt` names its Python, NVIDIA ModelOpt's. Rows of other networks, tools and draws in the
results file are kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from benchmarks.int8_tools import Contender, Task, contenders
from benchmarks.rescaling import rescale_channels
from trt_yolov6.common.files import read_json, write_json
from trt_yolov6.common.machine import cpu_model
from trt_yolov6.data.calibration import calibration_images, evenly
from trt_yolov6.data.coco import load_coco
from trt_yolov6.data.images import read_image
from trt_yolov6.data.loader import load_batches
from trt_yolov6.detectors.detections import Detections, postprocess
from trt_yolov6.detectors.labels import objects_of
from trt_yolov6.graph.cost import layers_of
from trt_yolov6.graph.export import ExportSettings, graph_from_checkpoint
from trt_yolov6.graph.inputs import input_spec
from trt_yolov6.graph.model import Graph
from trt_yolov6.graph.onnx_import import graph_from_onnx
from trt_yolov6.graph.operators import CONVOLUTIONS
from trt_yolov6.graph.reference import reference_session
from trt_yolov6.quantization.mixed_precision import layer_costs
from trt_yolov6.quantization.pipeline import quantize
from trt_yolov6.quantization.qdq.integer_arithmetic import with_integer_convolutions
from trt_yolov6.quantization.resampling import interval, matched
from trt_yolov6.quantization.settings import QuantizationSettings
from trt_yolov6.quantization.types import FP8
from trt_yolov6.runtime.sensitivity_report import LabelledAp
from trt_yolov6.spec import NmsSettings

RESULTS = Path("benchmarks/results/int8-real-networks.json")
SHARED = Path("../shared")

CALIBRATION = 64
"""Images that each tool is given."""

RESAMPLES = 200

_EVERY = 4
"""Stride of the images that judge among the other training images, where labels may be used."""

_CONFIDENT = 0.3
"""Score from which on a float detection counts for the agreement."""


@dataclass(frozen=True)
class Network:
    """A detector and its images."""

    name: str
    graph: Callable[[], Graph]
    data: Path
    calibrated_on: str
    """Split that the calibration images are of."""
    validation: str
    """Split that is judged on whole."""


def _rescaled() -> Graph:
    graph = graph_from_checkpoint(Path("samples/yolov6n_bccd.pt"), ExportSettings())
    model = rescale_channels(graph.model, np.random.default_rng(0), 1, 256)
    return dataclasses.replace(graph, model=model)


_COCO, _BCCD = SHARED / "data" / "coco256", SHARED / "data" / "bccd"

NETWORKS = (
    Network(
        "yolox-nano",
        lambda: graph_from_onnx(SHARED / "models" / "yolox_nano_416.onnx"),
        *(_COCO, "train2017", "val2017"),
    ),
    Network(
        "lite-l",
        lambda: graph_from_onnx(SHARED / "models" / "yolov6lite_l_320.onnx"),
        *(_COCO, "train2017", "val2017"),
    ),
    Network(
        "sample",
        lambda: graph_from_checkpoint(Path("samples/yolov6n_bccd.pt"), ExportSettings()),
        *(_BCCD, "train", "val"),
    ),
    Network(
        "authors-n",
        lambda: graph_from_checkpoint(Path("samples/yolov6n_bccd_authors.pt"), ExportSettings()),
        *(_BCCD, "train", "val"),
    ),
    Network("rescaled", _rescaled, *(_BCCD, "train", "val")),
)

WITH_LABELS = ", labels"
"""Ending of the names of tools that are given labels."""

_WITHIN = QuantizationSettings(float_layers="auto", max_ap_drop=0.3)

TOOLS: dict[str, QuantizationSettings] = {
    "ours": QuantizationSettings(),
    "ours, auto 5 %": QuantizationSettings(float_layers="auto", max_ap_drop=None, max_slowdown=5.0),
    "ours, auto 0.3 points": _WITHIN,
    f"ours, auto 0.3 points{WITH_LABELS}": _WITHIN,
    "ours, gradients 5 minutes": QuantizationSettings(reconstruct_minutes=5.0),
    "ours, FP8": QuantizationSettings(quantized=FP8),
}


def main() -> None:
    """Quantize, judge, and write a row for each network and tool."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--networks", default=",".join(one.name for one in NETWORKS))
    parser.add_argument("--tools", help="with semicolons; default: all there are")
    parser.add_argument("--draws", default="0", help="numbers, with commas")
    parser.add_argument("--modelopt", type=Path, help="Python with ModelOpt")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    wanted = options.tools.split(";") if options.tools else None
    for network in NETWORKS:
        if network.name not in options.networks.split(","):
            continue
        for draw in map(int, options.draws.split(",")):
            for judged, tool, make in _tools(network, draw, wanted, options.modelopt):
                start, used = time.perf_counter(), time.process_time()
                model, said = make()
                seconds = round(time.perf_counter() - start, 1)
                used = round(time.process_time() - used, 1)
                row = {
                    "network": network.name,
                    "tool": tool,
                    "draw": draw,
                    **judged.figures(model),
                    **said,
                    # Seconds say little where others used the cores, those of the processor more.
                    "seconds": seconds,
                    "processor_seconds": used,
                    "machine": cpu_model(),
                    "load": round(os.getloadavg()[1], 1),
                }
                print(row, flush=True)
                _keep(options.output, row)


def _keep(path: Path, row: dict[str, Any]) -> None:
    rows = read_json(path)["rows"] if path.is_file() else []
    same = ("network", "tool", "draw")
    rows = [item for item in rows if any(item.get(key, 0) != row[key] for key in same)]
    write_json(path, {"command": "python -m benchmarks.int8_real_networks", "rows": [*rows, row]})


_Made = tuple[onnx.ModelProto, dict[str, Any]]
"""A quantized graph, and what its row says besides."""


class _Judged:
    """A network's float detections on the images that judge."""

    def __init__(self, network: Network, draw: int, every: int) -> None:
        """Take a network, the number of a draw of calibration images, and the stride of those that
        judge among the other training images."""
        self.graph = network.graph()
        paths = calibration_images(network.data / "images" / network.calibrated_on)
        self.calibration = _drawn(paths, draw)
        left = set(paths) - set(self.calibration)
        other = load_coco(network.data, network.calibrated_on)
        validation = load_coco(network.data, network.validation)
        rest = [image for image in other.images if image.path in left][::every]
        judging = {image.id for image in rest}
        self.spare = dataclasses.replace(
            other,
            images=tuple(image for image in other.images if image.id not in judging),
            annotations=tuple(a for a in other.annotations if a["image_id"] not in judging),
        )
        self._parts = ((validation, validation.images), (other, tuple(rest)))
        self.truth = [one for part in self._parts for one in objects_of(*part, crowds=True)]
        self.float_found = self._detections(self.graph.model)

    @cached_property
    def folder(self) -> Path:
        """A folder of links to the calibration images."""
        result = Path(tempfile.mkdtemp(prefix="calibration-"))
        for path in self.calibration:
            (result / path.name).symlink_to(path.resolve())
        return result

    @property
    def task(self) -> Task:
        """Inputs for other tools."""
        return Task(self.graph, self.calibration, self.folder, {})

    def figures(self, model: onnx.ModelProto) -> dict[str, Any]:
        """Return a quantized graph's row: AP and agreement with their intervals."""
        found = self._detections(with_integer_convolutions(model))
        count = len(found)
        own, reference = (matched(self.truth, each) for each in (found, self.float_found))
        agree = matched(self.float_found, found, _CONFIDENT)
        agreed = interval(agree.ap, count, resamples=RESAMPLES)
        change = interval(
            lambda draws: own.ap(draws) - reference.ap(draws), count, resamples=RESAMPLES
        )
        layers = [layer for layer in layers_of(model) if layer.operator in CONVOLUTIONS]
        return {
            "ap": round(own.ap(), 4),
            "ap_float": round(reference.ap(), 4),
            "ap_change": [round(v, 4) for v in (change.value, change.low, change.high)],
            "agreement": round(agreed.value, 4),
            "interval": [round(agreed.low, 4), round(agreed.high, 4)],
            "images": count,
            "int8_convolutions": sum(layer.precision in ("int8", "fp8") for layer in layers),
            "convolutions": len(layers),
        }

    def _detections(self, model: onnx.ModelProto) -> list[Detections]:
        session = reference_session(model)
        names = [item.name for item in session.get_outputs()]
        source = session.get_inputs()[0].name
        paths = [image.path for _, images in self._parts for image in images]
        found: list[Detections] = []
        for batch in load_batches(
            paths,
            read_image,
            input_spec(self.graph.model),
            batch=1,
            border=0,
            preprocessing=self.graph.preprocessing,
        ):
            outputs = dict(zip(names, session.run(names, {source: batch.input}), strict=True))
            found += postprocess(
                outputs, self.graph.output_layout, NmsSettings(), batch.letterboxes, clip=False
            )
        return found


def _drawn(paths: Sequence[Path], draw: int) -> tuple[Path, ...]:
    """Return the images to calibrate on: spread evenly, or of another draw than the first random
    ones, sorted."""
    if not draw:
        return tuple(evenly(paths, CALIBRATION))
    order = np.random.default_rng(draw).permutation(len(paths))
    return tuple(paths[index] for index in np.sort(order[:CALIBRATION]))


def _tools(
    network: Network, draw: int, wanted: Sequence[str] | None, modelopt: Path | None
) -> Iterator[tuple[_Judged, str, Callable[[], _Made]]]:
    """Yield each wanted tool with the images that judge it."""
    known: dict[int, _Judged] = {}

    def judged(every: int) -> _Judged:
        if every not in known:
            known[every] = _Judged(network, draw, every)
        return known[every]

    for name, settings in TOOLS.items():
        if wanted is None or name in wanted:
            labelled = name.endswith(WITH_LABELS)
            one = judged(_EVERY if labelled else 1)
            yield one, name, functools.partial(_own, one, settings, labelled=labelled)
    if wanted is not None and all(name in TOOLS for name in wanted):
        return
    work = Path(tempfile.mkdtemp(prefix="int8-"))
    for contender in contenders(judged(1).task, work, modelopt or Path("none"), ()):
        if contender.tool == "modelopt" and modelopt is None:
            continue

        def made(contender: Contender = contender) -> _Made:
            contender.make(work / "quantized.onnx")
            return onnx.load(work / "quantized.onnx"), {}

        if wanted is None or contender.name in wanted:
            yield judged(1), contender.name, made


def _own(judged: _Judged, settings: QuantizationSettings, *, labelled: bool) -> _Made:
    score = LabelledAp(judged.graph, judged.spare) if labelled else None
    made = quantize(judged.graph, judged.folder, settings, score=score)
    said: dict[str, Any] = {}
    if settings.float_layers == "auto":
        costs = layer_costs(made.float_model)
        slower = sum(costs[name].time_share for name in made.table.float_layers)
        budget = (made.graph.calibration or {}).get("budget")
        said = {"slower": round(slower, 4), "budget": budget}
    if labelled:
        said["labels"] = len(judged.spare.images)
    return made.graph.model, said


if __name__ == "__main__":
    main()
