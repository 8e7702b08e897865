"""The search for the quantized graph that agrees best with the float one, a decision at a time.

    graph ─▶ ranges ─▶ weights and biases ─▶ float layers

Everything is made from one part of the calibration images and judged on the other.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from numpy.typing import NDArray

from trt_yolov6.common.files import sha256_bytes
from trt_yolov6.data.calibration import evenly
from trt_yolov6.errors import UserError
from trt_yolov6.quantization.bias_correction import BiasCorrection, with_layers_of
from trt_yolov6.quantization.calibrators import METHODS, Method, group_amax, methods_for
from trt_yolov6.quantization.collect import collect
from trt_yolov6.quantization.displacement import Displacement, layer_displacements
from trt_yolov6.quantization.equalization.solve import equalize, tensors_to_measure
from trt_yolov6.quantization.gptq import adapt_rounding
from trt_yolov6.quantization.judge import ImageSplit, Judge, batches_of, least_agreement
from trt_yolov6.quantization.mixed_precision import (
    Fallback,
    LayerCost,
    choose_float_layers,
    layer_costs,
    most_sensitive,
    rankings,
    rankings_by_displacement,
)
from trt_yolov6.quantization.mixed_precision import tensors_to_measure as tensors_for_any_choice
from trt_yolov6.quantization.qdq.insert import insert_qdq
from trt_yolov6.quantization.qdq.placement import Placement, place_for
from trt_yolov6.quantization.sensitivity import Distortion, layer_distortions, ranked
from trt_yolov6.quantization.statistics import TensorStatistics
from trt_yolov6.quantization.table import CalibrationKey, CalibrationTable
from trt_yolov6.quantization.types import INT8, QuantizedType

if TYPE_CHECKING:
    import onnx

    from trt_yolov6.graph.model import Graph
    from trt_yolov6.quantization.settings import QuantizationSettings

Variant = Literal["plain", "equalized", "smoothed"]

VARIANTS: tuple[Variant, ...] = ("plain", "equalized", "smoothed")
"""Forms of the float graph, from the least changed on; all compute the same function.

plain:     as it is
equalized: channels rescaled where weights can absorb it (`equalization.equalize`)
smoothed:  the same, and after SiLU and HardSwish too, by multiplications that are put there
"""

Weights = Literal["nearest", "biases", "reconstructed"]
"""Weight rounding: rounded to the nearest level; that, with corrected biases
(`bias_correction`); or rounded so that each layer's output is nearest (`gptq`), biases included."""

FEWEST_IMAGES, MOST_IMAGES = 16, 64
"""Images that candidates are compared on, spread evenly over those that judge: the lighter the
network the more, since few images agree by chance."""

CLEAR_GAIN = 0.01
"""Agreement that changed weights have to bring, or for FP8 another calibrator than min-max, or
rescaled channels: less may be chance, and the AP may fall by it."""

TOLERANCE = 0.005
"""A simpler candidate is kept where its agreement is this near to the best one's."""

_WATCHED_IMAGES = 6
"""Images in which each layer's effect on detections is looked at: some thousand anchors."""

_COMPARISON = 100e9
"""Multiply-adds spent on comparing one candidate, within those limits."""

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Candidate:
    """One way to quantize, and what came of it."""

    variant: Variant
    method: Method
    agreement: float
    """AP of its detections against the float network's confident ones, 0..1."""
    weights: Weights = "nearest"
    float_layers: tuple[str, ...] = ()
    seconds: float = 0.0
    """Seconds of making and judging it."""
    slowdown: float = 0.0
    """By how much its float layers lengthen INT8's run time, estimated, 0..1."""

    @property
    def decides(self) -> str:
        """Which decision it was tried for."""
        if self.float_layers:
            return "float layers"
        return "graph and ranges" if self.weights == "nearest" else "weights"


@dataclass(frozen=True)
class Prepared:
    """A float graph in one variant, with the statistics that calibration needs."""

    variant: Variant
    model: onnx.ModelProto
    placement: Placement
    statistics: Mapping[str, TensorStatistics]

    def table(
        self,
        method: Method,
        key: CalibrationKey,
        quantized: QuantizedType,
        float_layers: tuple[str, ...] = (),
    ) -> CalibrationTable:
        """Return the ranges by a calibrator, with some layers in float."""
        placement = self.placement
        if float_layers:
            placement = place_for(quantized, self.model, float_layers)
        statistics = {name: self.statistics[name] for name in placement.tensors}
        amax = group_amax(statistics, placement.groups, method, quantized)
        methods = dict.fromkeys(amax, str(method))
        return CalibrationTable(amax, methods, key, self.variant, float_layers)


@dataclass(frozen=True)
class Found:
    """Choice of a search."""

    prepared: Prepared
    table: CalibrationTable
    candidates: tuple[Candidate, ...]
    tuning: WeightTuning
    judge: Judge | None
    """None where nothing had to be chosen."""


class WeightTuning:
    """Makes a Q/DQ graph's weights and biases those of a choice of `Weights`.

    What was made of the last graphs is kept: the graph that is built was mostly tried before.
    """

    def __init__(self, float_model: onnx.ModelProto, images: Sequence[NDArray[Any]]) -> None:
        self._float_model = float_model
        self._images = images
        self._correction = BiasCorrection(float_model, images)
        self._kept: dict[tuple[str, Weights], onnx.ModelProto] = {}

    def tuned(self, model: onnx.ModelProto, weights: Weights) -> onnx.ModelProto:
        """Return the graph with its weights and biases chosen so."""
        if weights == "nearest":
            return model
        key = sha256_bytes(model.SerializeToString()), weights
        if key not in self._kept:
            if weights == "biases":
                self._kept[key] = self._correction.correct(model)
            else:
                self._kept[key] = adapt_rounding(self._float_model, model, self._images)
        return self._kept[key]


class Search:
    """Chooses graph, ranges, weights and float layers, one after the other."""

    def __init__(
        self,
        graph: Graph,
        split: ImageSplit,
        settings: QuantizationSettings,
        key: CalibrationKey,
        tell: Tell,
        labelled: Callable[[onnx.ModelProto], float] | None = None,
    ) -> None:
        self._graph = graph
        self._split = split
        self._settings = settings
        self._quantized = settings.quantized
        self._key = key
        self._tell = tell
        self._labelled = labelled
        self._inputs = list(
            batches_of(graph, evenly(split.calibrate, FEWEST_IMAGES), settings.border)
        )
        self._methods: tuple[Method, ...] = (
            methods_for(self._quantized)
            if settings.calibrator == "auto"
            else (settings.calibrator,)
        )
        last = 1 if not settings.equalize else 2 if self._quantized.is_floating else 3
        self._variants = VARIANTS[:last]
        self._judge: Judge | None = None
        self._candidates: list[Candidate] = []

    def run(self) -> Found:
        """Decide everything."""
        variant = self._choose_variant()
        prepared = prepare(self._graph, self._split.calibrate, self._settings, variant, self._tell)
        method = self._choose_method(prepared)
        if self._candidates:
            self._tell(f"chosen: calibrator {method}, graph {variant}")
        table = prepared.table(method, self._key, self._quantized)
        tuning = WeightTuning(prepared.model, self._inputs)
        weights = self._choose_weights(prepared, table, method, tuning)
        layers = self._choose_float_layers(prepared, table, method, weights, tuning)
        if layers:
            # With other layers in float, pairs stand elsewhere and groups are other ones.
            table = prepared.table(method, self._key, self._quantized, layers)
        table = dataclasses.replace(
            table, biases_corrected=weights != "nearest", reconstructed=weights == "reconstructed"
        )
        return Found(prepared, table, tuple(self._candidates), tuning, self._judge)

    # --- decisions ------------------------------------------------------------------------------

    def _choose_variant(self) -> Variant:
        """Compare the forms of the graph by the first calibrator, ranges of a few images."""
        if len(self._variants) == 1:
            return self._variants[0]
        # One pass over the plain graph serves its own calibration and both rescaled variants.
        plain = self._graph.model
        wanted = (*tensors_to_measure(plain), *_tensors(plain, self._settings))
        known = collect(plain, self._inputs, wanted)
        tried: list[Candidate] = []
        models: list[onnx.ModelProto] = []
        for variant in self._variants:
            prepared = prepare(
                self._graph,
                evenly(self._split.calibrate, FEWEST_IMAGES),
                self._settings,
                variant,
                self._tell,
                known=known,
                images=self._inputs,
            )
            if prepared.model not in models:  # else there was nothing to rescale
                models.append(prepared.model)
                tried.append(self._tried(prepared, self._methods[0]))
        tolerance = CLEAR_GAIN if self._quantized.is_floating else TOLERANCE
        return _simplest_of_the_best(tried, tolerance).variant

    def _choose_method(self, prepared: Prepared) -> Method:
        """Compare the calibrators on the chosen form of the graph."""
        if len(self._methods) == 1:
            return self._methods[0]
        tried = [self._tried(prepared, method) for method in self._methods]
        # A floating type loses nothing to a range that is too wide, so min-max comes first.
        tolerance = CLEAR_GAIN if self._quantized.is_floating else 0.0
        return _simplest_of_the_best(tried, tolerance).method

    def _choose_weights(
        self, prepared: Prepared, table: CalibrationTable, method: Method, tuning: WeightTuning
    ) -> Weights:
        """Compare what may become of weights; the next one has to be clearly better."""
        settings = self._settings
        if settings.adaptive_rounding:
            return "reconstructed"
        if not settings.bias_correction:
            return "nearest"
        model = self._inserted(prepared, table)
        chosen: Weights = "nearest"
        best = self._judged(model)
        for weights in weight_choices(settings):
            value = self._try_weights(prepared, method, model, weights, tuning)
            self._tell(f"{_SAID[weights]}: agreement with float {value:.3f} after {best:.3f}")
            least = best + CLEAR_GAIN if chosen == "nearest" else best
            if value > least:
                chosen, best = weights, value
        return chosen

    def _choose_float_layers(
        self,
        prepared: Prepared,
        table: CalibrationTable,
        method: Method,
        weights: Weights,
        tuning: WeightTuning,
    ) -> tuple[str, ...]:
        """Return the layers that stay in float: as named, or chosen by what they cost."""
        wanted = self._settings.float_layers
        if isinstance(wanted, tuple):
            return wanted
        if wanted == 0:
            return ()
        costs = layer_costs(prepared.model)
        if isinstance(wanted, int):
            chosen = most_sensitive(ranked(self._distortions(prepared, table), "snr"), wanted)
            slower = sum(costs[name].time_share for name in chosen)
            self._tell(
                f"in float: {', '.join(chosen)}; ranked by signal-to-noise ratio whatever they "
                f"cost, here about {slower:.1%} of INT8's time (auto weighs it)"
            )
            return chosen
        tuned = tuning.tuned(self._inserted(prepared, table), weights)
        orders = self._orders(prepared, table, costs)
        return self._searched_float_layers(prepared, costs, orders, method, weights, tuned)

    def _orders(
        self, prepared: Prepared, table: CalibrationTable, costs: Mapping[str, LayerCost]
    ) -> tuple[tuple[str, ...], ...]:
        """Return orders to leave layers in float, by what they do to detections if that is seen."""
        graph = self._graph
        if not Displacement.can_watch(graph):
            return rankings(self._distortions(prepared, table), costs)
        paths = evenly(self._split.calibrate, _WATCHED_IMAGES)
        count = len(prepared.placement.layers)
        self._tell(f"what each of {count} layers does to detections in {len(paths)} images ...")
        images = list(batches_of(graph, paths, self._settings.border))
        watch = Displacement(graph, images)
        alone = layer_displacements(prepared.model, prepared.placement, table.amax, watch.of)
        return rankings_by_displacement(alone, costs)

    def _searched_float_layers(
        self,
        prepared: Prepared,
        costs: Mapping[str, LayerCost],
        orders: Sequence[Sequence[str]],
        method: Method,
        weights: Weights,
        tuned: onnx.ModelProto,
    ) -> tuple[str, ...]:
        judged, name, least, least_gain = self._budget()
        self._tell(f"float layers until the {name} is {least:.3f} ...")

        def time_of(layers: tuple[str, ...]) -> float:
            return sum(costs[one].time_share for one in layers)

        def score(layers: tuple[str, ...]) -> float:
            start = time.perf_counter()
            trial = prepared.table(method, self._key, INT8, layers)
            model = insert_qdq(prepared.model, place_for(INT8, prepared.model, layers), trial.amax)
            # What is searched is what will be built: a layer's own weights hardly depend on which
            # others are in float.
            value = judged(with_layers_of(model, tuned))
            seconds = time.perf_counter() - start
            self._candidates.append(
                Candidate(
                    prepared.variant, method, value, weights, layers, seconds, time_of(layers)
                )
            )
            self._tell(f"{len(layers)} layers in float: {name} {value:.3f}")
            return value

        slower = self._settings.max_slowdown
        found = choose_float_layers(
            orders,
            costs,
            score,
            least,
            least_gain=least_gain,
            most_time=None if slower is None else slower / 100,
        )
        self._tell(_fallback_sentence(found, name, least, slower))
        return found.layers

    def _budget(self) -> tuple[Callable[[onnx.ModelProto], float], str, float, float]:
        """Return how float layers are scored, the score's name, what to reach, the least gain."""
        drop = self._settings.max_ap_drop
        if drop is None:  # the best that the time allows
            if self._labelled is not None:
                return self._labelled, "AP", 1.0, 0.0
            return self._the_judge().confident_agreement, "agreement with float", 1.0, 0.0
        if self._labelled is not None:
            return self._labelled, "AP", self._labelled(self._graph.model) - drop / 100, 0.0
        judge = self._the_judge()
        budget, harmless = least_agreement(drop), judge.harmless_agreement()
        self._tell(
            f"the budget of {drop:g} AP points stands for an agreement of {budget:.3f}; the float "
            f"network's with itself, a little noise on the images, is {harmless:.3f}"
        )
        name = "agreement with float"
        return judge.confident_agreement, name, min(budget, harmless), CLEAR_GAIN

    # --- trying ---------------------------------------------------------------------------------

    def _tried(self, prepared: Prepared, method: Method) -> Candidate:
        start = time.perf_counter()
        table = prepared.table(method, self._key, self._quantized)
        value = self._judged(self._inserted(prepared, table))
        seconds = time.perf_counter() - start
        result = Candidate(prepared.variant, method, value, seconds=seconds)
        self._candidates.append(result)
        self._tell(f"{result.variant}, {method}: agreement with float {value:.3f}")
        return result

    def _try_weights(
        self,
        prepared: Prepared,
        method: Method,
        model: onnx.ModelProto,
        weights: Weights,
        tuning: WeightTuning,
    ) -> float:
        start = time.perf_counter()
        value = self._judged(tuning.tuned(model, weights))
        seconds = time.perf_counter() - start
        self._candidates.append(
            Candidate(prepared.variant, method, value, weights, seconds=seconds)
        )
        return value

    def _inserted(self, prepared: Prepared, table: CalibrationTable) -> onnx.ModelProto:
        return insert_qdq(prepared.model, prepared.placement, table.amax, quantized=self._quantized)

    def _judged(self, model: onnx.ModelProto) -> float:
        return self._the_judge().agreement(model)

    def _the_judge(self) -> Judge:
        if self._judge is None:
            many = evenly(self._split.judge, images_to_compare(self._graph))
            self._judge = Judge(self._graph, many, self._settings.border)
        return self._judge

    def _distortions(self, prepared: Prepared, table: CalibrationTable) -> Mapping[str, Distortion]:
        paths = evenly(self._split.calibrate, images_to_compare(self._graph))
        count = len(prepared.placement.layers)
        self._tell(f"sensitivity of {count} layers over {len(paths)} images ...")
        images = batches_of(self._graph, paths, self._settings.border)
        return layer_distortions(prepared.model, prepared.placement, table.amax, images)


_SAID: Mapping[Weights, str] = {
    "nearest": "weights rounded to the nearest",
    "biases": "biases corrected",
    "reconstructed": "layers reconstructed",
}


def weight_choices(settings: QuantizationSettings) -> tuple[Weights, ...]:
    """Return the alternatives to rounding to the nearest, the quickest first."""
    if settings.quantized.is_floating or not settings.reconstruct:
        return ("biases",)
    return ("biases", "reconstructed")


def tried_table(candidates: Sequence[Candidate]) -> list[str]:
    """Return a search's candidates as lines of a table; none without candidates."""
    if not candidates:
        return []
    rows = [("decision", "tried", "agreement", "slower", "seconds")]
    for item in candidates:
        what = {
            "graph and ranges": f"{item.variant}, {item.method}",
            "weights": item.weights,
            "float layers": f"{len(item.float_layers)} in float",
        }[item.decides]
        slower = f"{item.slowdown:.1%}" if item.float_layers else ""
        cells = (f"{item.agreement:.3f}", slower, f"{item.seconds:.1f}")
        rows.append((item.decides, what, *cells))
    widths = [max(len(row[place]) for row in rows) for place in range(5)]
    return [
        "  ".join(
            cell.ljust(width) if place < 2 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def prepare(
    graph: Graph,
    paths: Sequence[Path],
    settings: QuantizationSettings,
    variant: Variant,
    say: Tell,
    measure: bool = True,
    known: Mapping[str, TensorStatistics] | None = None,
    images: Sequence[NDArray[Any]] | None = None,
) -> Prepared:
    """Bring the graph into a variant and, with `measure`, collect its tensors' statistics.

    Args:
        graph: the float graph.
        paths: images that calibrate.
        settings: what is quantized to, and the border of the images.
        variant: the form wanted.
        say: called with a line of progress.
        measure: collect statistics.
        known: the plain graph's statistics on the same images, of what `equalize` wants to know
            and of what the plain variant quantizes, where they have been collected.
        images: the paths' images as the graph takes them, where they have been read.
    """
    model = graph.model
    say(f"{variant}: {len(paths)} images ...")

    def measured(form: onnx.ModelProto, tensors: Sequence[str]) -> Mapping[str, TensorStatistics]:
        if form is graph.model and known is not None:
            return {name: known[name] for name in dict.fromkeys(tensors)}
        batches = batches_of(graph, paths, settings.border)
        return collect(form, batches if images is None else images, tensors)

    if variant != "plain":
        ranges = measured(model, tensors_to_measure(model))
        model = equalize(model, ranges, smooth=variant == "smoothed")
    placement = place_for(settings.quantized, model)
    statistics = measured(model, _tensors(model, settings)) if measure else {}
    return Prepared(variant, model, placement, statistics)


def chosen_weights(table: CalibrationTable) -> Weights:
    """Return a table's record on weights."""
    if table.reconstructed:
        return "reconstructed"
    return "biases" if table.biases_corrected else "nearest"


def method_of(table: CalibrationTable) -> Method:
    """Return the calibrator that made a table."""
    used = set(table.methods.values())
    return next(method for method in METHODS if method in used)


def variant_of(table: CalibrationTable) -> Variant:
    """Return the form of the graph that a table is for.

    Raises:
        UserError: there is no such form.
    """
    for variant in VARIANTS:
        if variant == table.variant:
            return variant
    raise UserError(
        f"the calibration table is for an unknown form {table.variant!r} of the graph; delete it "
        "and calibrate again."
    )


def images_to_compare(graph: Graph) -> int:
    """Return how many images candidates are compared on."""
    work = sum(cost.multiply_adds for cost in layer_costs(graph.model).values())
    return max(FEWEST_IMAGES, min(MOST_IMAGES, round(_COMPARISON / max(work, 1))))


def _tensors(model: onnx.ModelProto, settings: QuantizationSettings) -> Sequence[str]:
    """Return the tensors whose statistics calibrating a graph takes."""
    if settings.float_layers != ():
        return tensors_for_any_choice(model)
    return place_for(settings.quantized, model).tensors


def _simplest_of_the_best(candidates: Sequence[Candidate], tolerance: float) -> Candidate:
    """Return the first candidate that is as good as the best but for a tolerance."""
    best = max(candidate.agreement for candidate in candidates)
    return next(item for item in candidates if item.agreement >= best - tolerance)


def _fallback_sentence(found: Fallback, name: str, least: float, slower: float | None) -> str:
    """Say what was chosen, what it costs, and where that falls short."""
    text = (
        f"in float: {', '.join(found.layers) or 'nothing'} ({found.multiply_add_share:.1%} of the "
        f"multiply-adds, about {found.slowdown:.1%} slower), {name} {found.score:.3f}"
    )
    if found.met:
        return text
    limit = "within half of the multiply-adds" if slower is None else f"at most {slower:g}% slower"
    return (
        f"{text}, less than {least:.3f}; it is the best found of {len(found.trials)} sets {limit}"
    )
