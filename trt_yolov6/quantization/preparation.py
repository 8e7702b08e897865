"""A float graph in the form that is quantized, with the statistics that calibration needs."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from trt_yolov6.data.calibration import evenly
from trt_yolov6.graph.inputs import input_spec
from trt_yolov6.graph.model import Graph
from trt_yolov6.graph.operators import CONVOLUTIONS
from trt_yolov6.quantization.calibrators import Method, group_amax, methods_to_try
from trt_yolov6.quantization.collect import collect
from trt_yolov6.quantization.equalization.alignment import aligned
from trt_yolov6.quantization.equalization.solve import Solution, equalize, tensors_to_measure
from trt_yolov6.quantization.judge import ImageSplit, Judge, batches_of
from trt_yolov6.quantization.mixed_precision import layer_costs, tensors_for_any_choice
from trt_yolov6.quantization.qdq.insert import activation_scales, insert_qdq
from trt_yolov6.quantization.qdq.placement import Placement
from trt_yolov6.quantization.settings import QuantizationSettings
from trt_yolov6.quantization.statistics import TensorStatistics
from trt_yolov6.quantization.table import Variant
from trt_yolov6.quantization.weights import WeightTuning

_log = logging.getLogger(__name__)

RANGE_BITS = 11
"""Significant bits of a range. Float sums differ in their last bits from processor to processor;
the ranges made of them, and all that follows, hardly ever do when rounded up so, and none is wider
by more than 0.1 %."""

FEWEST_IMAGES, MOST_IMAGES = 16, 64
"""Images that candidates are compared on, spread evenly over those that judge: the lighter the
network the more, since few images agree by chance."""

_COMPARISON = 100e9
"""Multiply-adds spent on comparing one candidate, within those limits."""

_MUCH = 0.25
"""Part of the convolutions from which on shifted tensors make a form of its own."""


@dataclass(frozen=True)
class Form:
    """A float graph in one variant."""

    model: onnx.ModelProto
    solution: Solution | None = None
    """Factors and shifts of the shifted form; None of others."""

    @property
    def shifts_much(self) -> bool:
        """True if more than a few tensors are shifted."""
        kinds = Counter(node.op_type for node in self.model.graph.node)
        return kinds["Sub"] >= _MUCH * sum(kinds[operator] for operator in CONVOLUTIONS)


@dataclass(frozen=True)
class Prepared:
    """A float graph in one variant, with the statistics that calibration needs."""

    variant: Variant
    settings: QuantizationSettings
    model: onnx.ModelProto
    placement: Placement
    statistics: Mapping[str, TensorStatistics]

    def placed(self, float_layers: tuple[str, ...]) -> Placement:
        """Return the placement with some layers in float."""
        if not float_layers:
            return self.placement
        return self.settings.placement(self.model, float_layers)

    @property
    def means(self) -> dict[str, NDArray[np.float64]]:
        """Mean of each channel of the tensors that were measured, (channels,)."""
        return {
            name: one.channels.mean
            for name, one in self.statistics.items()
            if one.channels is not None
        }

    def ranges(self, method: Method, float_layers: tuple[str, ...] = ()) -> dict[str, float]:
        """Return the tensors' ranges by a calibrator, with some layers in float.

        They depend on the float layers: other pairs and groups are then placed.
        """
        return self._ranges(self.placed(float_layers), method)

    def inserted(self, method: Method, float_layers: tuple[str, ...]) -> onnx.ModelProto:
        """Return the Q/DQ graph by a calibrator, with some layers in float."""
        placement = self.placed(float_layers)
        amax = self._ranges(placement, method)
        return insert_qdq(self.model, placement, amax, quantized=self.settings.quantized)

    def _ranges(self, placement: Placement, method: Method) -> dict[str, float]:
        statistics = {name: self.statistics[name] for name in placement.tensors}
        amax = group_amax(statistics, placement.groups, method, self.settings.quantized)
        return {name: _rounded_up(value) for name, value in amax.items()}


def _rounded_up(value: float) -> float:
    """Return a number rounded up to `RANGE_BITS`: min-max still clips nothing."""
    fraction, exponent = math.frexp(value)
    return math.ldexp(math.ceil(math.ldexp(fraction, RANGE_BITS)), exponent - RANGE_BITS)


def prepare(
    graph: Graph,
    paths: Sequence[Path],
    settings: QuantizationSettings,
    variant: Variant,
    measure: bool = True,
    known: Mapping[str, TensorStatistics] | None = None,
    images: Sequence[NDArray[Any]] | None = None,
    form: Form | None = None,
) -> Prepared:
    """Bring the graph into a variant and, with `measure`, collect its tensors' statistics.

    Args:
        graph: the float graph.
        paths: images that calibrate.
        settings: what is quantized to, and the border of the images.
        variant: the form to prepare.
        measure: collect statistics, where the form itself does not take them.
        known: the plain graph's statistics on the same images, of what `equalize` wants to know
            and of what the plain variant quantizes, where they have been collected.
        images: the paths' images as `inputs_of` gives them, where they have been read.
        form: the graph in that variant (`formed`), where it has been made of these images.
    """
    _log.info(f"{variant}: {len(paths)} images ...")

    def measured(model: onnx.ModelProto, tensors: Sequence[str]) -> Mapping[str, TensorStatistics]:
        if model is graph.model and known is not None:
            return {name: known[name] for name in dict.fromkeys(tensors)}
        inputs = inputs_of(graph, paths, settings.border) if images is None else images
        return collect(model, inputs, tensors, copies=copies_of(graph))

    if form is None:
        tensors = tensors_to_measure(graph.model) if variant != "plain" else ()
        form = formed(graph, variant, measured(graph.model, tensors) if tensors else {})
    placement = settings.placement(form.model)
    to_align = form.solution is not None and form.shifts_much
    names = quantizable_tensors(form.model, settings) if measure or to_align else ()
    statistics = measured(form.model, names) if names else {}
    prepared = Prepared(variant, settings, form.model, placement, statistics)
    if form.solution is None or not to_align:
        return prepared
    ranges = prepared.ranges(calibrators(settings)[0])
    few = inputs_of(graph, evenly(paths, FEWEST_IMAGES), settings.border)
    solution = aligned(
        form.solution,
        form.model,
        activation_scales(placement, ranges, settings.quantized),
        few if images is None else images,
    )
    # Middles move by half a step at most: the statistics still hold.
    return dataclasses.replace(prepared, model=solution.applied(graph.model))


def weight_tuning(
    graph: Graph, prepared: Prepared, paths: Sequence[Path], settings: QuantizationSettings
) -> WeightTuning:
    """Return the tuning of a prepared graph's weights, on a few of the images that calibrate."""
    few = evenly(paths, FEWEST_IMAGES)
    return WeightTuning(prepared.model, list(inputs_of(graph, few, settings.border)))


def calibrators(settings: QuantizationSettings) -> tuple[Method, ...]:
    """Return the calibrators to choose from, the default first."""
    chosen = settings.calibrator
    return methods_to_try(settings.quantized) if chosen == "auto" else (chosen,)


def formed(graph: Graph, variant: Variant, ranges: Mapping[str, TensorStatistics]) -> Form:
    """Return the graph in a variant.

    Args:
        graph: the float graph.
        variant: the form to return.
        ranges: of what `equalize` wants to know of the plain graph.
    """
    if variant == "plain":
        return Form(graph.model)
    solution = equalize(
        graph.model, ranges, smooth=variant == "smoothed", shift=variant == "shifted"
    )
    model = solution.applied(graph.model)
    return Form(model, solution) if variant == "shifted" else Form(model)


def plain_statistics(
    graph: Graph, images: Sequence[NDArray[Any]], settings: QuantizationSettings
) -> Mapping[str, TensorStatistics]:
    """Return the statistics that `prepare` takes as `known`: one pass serves all variants."""
    plain = graph.model
    tensors = (*tensors_to_measure(plain), *quantizable_tensors(plain, settings))
    return collect(plain, images, tensors, copies=copies_of(graph))


def quantizable_tensors(model: onnx.ModelProto, settings: QuantizationSettings) -> Sequence[str]:
    """Return the tensors whose statistics calibrating a graph takes."""
    if settings.float_layers != ():
        return tensors_for_any_choice(model)
    return settings.placement(model).tensors


class Fold:
    """One part of the images that makes candidates and one that judges them."""

    def __init__(self, graph: Graph, split: ImageSplit, settings: QuantizationSettings) -> None:
        self.split = split
        self._graph = graph
        self._settings = settings
        self.prepared: Prepared
        self.tuning: WeightTuning
        self._known: dict[Variant, tuple[Prepared, WeightTuning]] = {}

    @cached_property
    def inputs(self) -> list[NDArray[Any]]:
        """Images for quick statistics and for tuning weights."""
        paths = evenly(self.split.calibrate, FEWEST_IMAGES)
        return list(inputs_of(self._graph, paths, self._settings.border))

    @cached_property
    def judge(self) -> Judge:
        """The judge on `images_to_compare` of the images that are held out."""
        many = evenly(self.split.judge, images_to_compare(self._graph))
        return Judge(self._graph, many, self._settings.border)

    @cached_property
    def quick_judge(self) -> Judge:
        """The judge for what has to be clearly better to be taken: on half of the images."""
        return self.judge.thinned()

    def take(self, prepared: Prepared, *, whole: bool = True) -> None:
        """Go on with one form of the graph.

        Args:
            prepared: it.
            whole: its statistics are of all images that calibrate.
        """
        self.prepared = prepared
        self.tuning = WeightTuning(prepared.model, self.inputs)
        if whole:
            self._known[prepared.variant] = prepared, self.tuning

    def go_on_with(self, variant: Variant) -> None:
        """Go on with a form of the graph with the statistics of all images."""
        if variant not in self._known:
            self.take(prepare(self._graph, self.split.calibrate, self._settings, variant))
        self.prepared, self.tuning = self._known[variant]


def copies_of(graph: Graph) -> int:
    """Return how many times a graph is calibrated with each image: light ones twice.

    Images that were not seen cost light networks most: their many equalized channels go beyond
    their ranges. A mirrored image is one for them, and costs no more than a few seconds.
    """
    # In larger batches an image's copies would not follow each other.
    alone = input_spec(graph.model).shape[0] in (None, 1)
    return 2 if alone and images_to_compare(graph) == MOST_IMAGES else 1


def inputs_of(graph: Graph, paths: Sequence[Path], border: int = 0) -> Iterator[NDArray[Any]]:
    """Yield what calibrates a graph: its images, mirrored ones too where `copies_of` says so."""
    mirrored = copies_of(graph) > 1
    for images in batches_of(graph, paths, border):
        yield images
        if mirrored:
            # (batch, 3, height, width) or, of uint8 pixels, (batch, height, width, 3)
            width = 2 if images.dtype == np.uint8 else 3
            yield np.ascontiguousarray(np.flip(images, width))


def images_to_compare(graph: Graph) -> int:
    """Return how many images candidates are compared on."""
    work = sum(cost.multiply_adds for cost in layer_costs(graph.model).values())
    return max(FEWEST_IMAGES, min(MOST_IMAGES, round(_COMPARISON / max(work, 1))))
