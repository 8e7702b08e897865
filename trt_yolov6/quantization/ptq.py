"""Post-training quantization as a whole: float graph and calibration images in, Q/DQ graph out.

    float graph ─ equalize ─ collect ─ calibrate ─ place ─ insert ─▶ Q/DQ graph

No calibrator and no equalization wins everywhere: min-max takes nothing from one network and much
from another, entropy the reverse. So the default tries them on the calibration images themselves
and keeps what agrees best with the float network's own detections; no labels are needed.

FP8 goes the same way. What it has no use for is left out: entropy calibration, multiplications
behind activations, ranking of layers and adaptive rounding are about INT8's evenly spaced levels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from trt_yolov6.common.files import sha256_bytes
from trt_yolov6.data.calibration import (
    calibration_batches,
    calibration_images,
    images_sha256,
)
from trt_yolov6.data.letterbox import fit
from trt_yolov6.data.preprocessing import Preprocessing
from trt_yolov6.detectors.detections import Detections, postprocess
from trt_yolov6.errors import UserError
from trt_yolov6.graph.inputs import input_spec
from trt_yolov6.graph.model import Graph
from trt_yolov6.quantization.agreement import agreement
from trt_yolov6.quantization.bias_correction import BiasCorrection, with_errors_removed
from trt_yolov6.quantization.calibrators import METHODS, Method, group_amax, methods_for
from trt_yolov6.quantization.collect import check_weights, collect
from trt_yolov6.quantization.equalization.solve import equalize, tensors_to_measure
from trt_yolov6.quantization.gptq import adapt_rounding
from trt_yolov6.quantization.mixed_precision import (
    choose_float_layers,
    layer_costs,
    most_sensitive,
    rankings,
)
from trt_yolov6.quantization.mixed_precision import tensors_to_measure as tensors_for_any_choice
from trt_yolov6.quantization.qdq.insert import insert_qdq
from trt_yolov6.quantization.qdq.placement import Placement, place_for
from trt_yolov6.quantization.sensitivity import Sensitivity, layer_distortions, ranked
from trt_yolov6.quantization.statistics import TensorStatistics
from trt_yolov6.quantization.table import (
    CalibrationKey,
    CalibrationTable,
    model_sha256,
    reusable_table,
)
from trt_yolov6.quantization.types import INT8, QuantizedType
from trt_yolov6.spec import NmsSettings, OutputLayout

if TYPE_CHECKING:
    import onnx

Variant = Literal["plain", "equalized", "smoothed"]

VARIANTS: tuple[Variant, ...] = ("plain", "equalized", "smoothed")
"""Forms of the float graph, from the least changed on; all compute the same function.

plain:     as it is
equalized: channels rescaled where weights can absorb it (`equalization.equalize`)
smoothed:  the same, and behind SiLU and HardSwish too, by multiplications that are put there
"""

FEWEST_IMAGES, MOST_IMAGES = 16, 64
"""Calibration images that candidates are compared on, spread evenly over all: the lighter the
network the more, since few images agree by chance."""

CLEAR_GAIN = 0.01
"""Agreement that corrected biases have to bring, or for FP8 another calibrator than min-max, or
rescaled channels: less may be chance, and the AP may fall by it."""

CONFIDENCES = (0.1, 0.2, 0.3)
"""Scores from which on a float detection counts as true; the mean over several of them varies less
by chance than one."""

HARMLESS_NOISE = 2.0
"""Standard deviation, in gray levels of 255, of noise as any camera has it.

Agreement depends on the data as well: the sample in INT8 loses no AP at 0.909, YOLOv6Lite-L one
point of 35 at 0.915. Their float networks' agreement with themselves tells them apart with noise;
images moved by a pixel would rank them the other way round."""

_COMPARISON = 100e9
"""Multiply-adds spent on comparing one candidate, within those limits."""

TOLERANCE = 0.005
"""A simpler candidate is kept where its agreement is this near to the best one's."""


@dataclass(frozen=True)
class QuantizationSettings:
    """How a graph is quantized."""

    quantized: QuantizedType = INT8
    """What it is quantized to."""
    calibrator: Method | Literal["auto"] = "auto"
    """One for all tensors; `auto` takes the one whose detections agree best with the float ones."""
    equalize: bool = True
    """Try rescaled channels as well; off, the graph's weights stay as they are."""
    bias_correction: bool = True
    """Try biases that take back the mean error of each layer."""
    adaptive_rounding: bool = False
    """Round weights for the inputs that they meet (some minutes); corrects biases as well. INT8's
    only."""
    float_layers: tuple[str, ...] | int | Literal["auto"] = ()
    """Layers that stay in float: by name; so many of the most sensitive; or as few as keep the
    accuracy within `max_ap_drop`. FP8's by name only."""
    max_ap_drop: float = 0.5
    """What `auto` may lose, in AP points (hundredths)."""
    fp16: bool = False
    """Everything that is not quantized in half precision."""
    image_limit: int | None = None
    """Calibration images taken, spread evenly over the folder; None for all."""
    border: int = 0
    """Gray pixels around each image, as in evaluation."""


@dataclass(frozen=True)
class Candidate:
    """One way to quantize, and what came of it."""

    variant: Variant
    method: Method
    agreement: float
    """AP of its detections against the float network's confident ones, 0..1."""


@dataclass(frozen=True)
class QuantizedGraph:
    """A Q/DQ graph, ready to be built, and how it came about."""

    graph: Graph
    float_model: onnx.ModelProto
    """The float graph that the pairs were put into; its tensors are those of the table."""
    table: CalibrationTable
    placement: Placement
    candidates: tuple[Candidate, ...]
    """What was compared, in order; empty where nothing had to be chosen."""
    note: str
    """Whether an earlier table was used again, or why not; empty where there was none."""


@dataclass(frozen=True)
class Prepared:
    """A float graph in one variant, with the statistics that calibration needs."""

    variant: Variant
    model: onnx.ModelProto
    placement: Placement
    statistics: Mapping[str, TensorStatistics]


def quantize(
    graph: Graph,
    folder: str | Path,
    settings: QuantizationSettings | None = None,
    *,
    table_file: str | Path | None = None,
    score: Callable[[onnx.ModelProto], float] | None = None,
    tell: Callable[[str], None] | None = None,
) -> QuantizedGraph:
    """Quantize a float graph with the images of a folder.

    Args:
        graph: from `building.graph_from_checkpoint` or `graph_from_onnx`, float32.
        folder: calibration images, a few dozen like those the detector will see.
        settings: calibrator, equalization, float layers, companion precision.
        table_file: an earlier calibration table, used again if it was made from the same things.
        score: a graph's AP on labelled data (`report.ap_on`), which then holds the budget of
            automatic float layers; None estimates it by agreement with the float network.
        tell: called with a line of progress now and then.

    Raises:
        UserError: the graph is not float32, has a NaN in its weights or nothing that FP8 would
            speed up, the folder has too few images, unreadable ones, or nothing but black, or see
            `check_settings`.
    """
    settings = settings or QuantizationSettings()
    say = tell or (lambda _: None)
    check_settings(settings)
    quantized_type = settings.quantized
    if graph.precision != "fp32":
        raise UserError(
            f"{graph.source} is {graph.precision} already; {quantized_type.option} starts from a "
            "float32 graph."
        )
    check_weights(graph.model)
    if quantized_type.is_floating and not place_for(quantized_type, graph.model).layers:
        raise UserError(
            f"{graph.source} has no convolution that {quantized_type.option} would speed up: they "
            "all do little work for each value that is quantized; build it with --fp16."
        )
    _check_float_layers(graph, settings)
    paths = calibration_images(folder, settings.image_limit, tell)
    key = CalibrationKey(
        model_sha256(graph.model),
        images_sha256(paths),
        {
            "type": quantized_type.name,
            "calibrator": settings.calibrator,
            "equalize": settings.equalize,
            "bias_correction": settings.bias_correction,
            "adaptive_rounding": settings.adaptive_rounding,
            "float_layers": _described(settings) + (", by AP" if score else ""),
            "border": settings.border,
            "preprocessing": str(graph.preprocessing),
        },
    )
    table, note = reusable_table(table_file, key) if table_file else (None, "")
    if note:
        say(note)
    candidates: tuple[Candidate, ...] = ()
    if table is not None:
        prepared = _prepare(graph, paths, settings, _variant(table.variant), say, measure=False)
        correction = BiasCorrection(prepared.model, _inputs(graph, paths, settings))
    else:
        prepared, table, candidates, correction = _calibrate(
            graph, paths, settings, key, say, score
        )
    placement = place_for(quantized_type, prepared.model, table.float_layers)
    model = insert_qdq(
        prepared.model, placement, table.amax, quantized=quantized_type, fp16=settings.fp16
    )
    if settings.adaptive_rounding:
        say("adaptive rounding of the weights (some minutes) ...")
        model = adapt_rounding(prepared.model, model, _inputs(graph, paths, settings))
    elif table.biases_corrected:
        model = correction.correct(model)
    quantized = dataclasses.replace(
        graph,
        model=model,
        precision=quantized_type.name,
        calibration={
            "calibrator": "+".join(sorted(set(table.methods.values()))),
            "variant": table.variant,
            "biases_corrected": table.biases_corrected or settings.adaptive_rounding,
            "adaptive_rounding": settings.adaptive_rounding,
            "images": len(paths),
            "images_sha256": key.images_sha256,
            f"{quantized_type.name}_layers": len(placement.layers),
            f"{quantized_type.name}_share_of_multiply_adds": round(
                _quantized_share(prepared.model, placement), 4
            ),
            "rest": "fp16" if settings.fp16 else "fp32",
        },
        float_layers=table.float_layers,
    )
    return QuantizedGraph(quantized, prepared.model, table, placement, candidates, note)


def check_settings(settings: QuantizationSettings) -> None:
    """Raise UserError for what the type that is quantized to has no use for."""
    quantized = settings.quantized
    methods = methods_for(quantized)
    if settings.calibrator != "auto" and settings.calibrator not in methods:
        raise UserError(
            f"--calibrator {settings.calibrator} is for --int8: it compares with levels that stand "
            f"evenly; choose one of {', '.join(methods)} with {quantized.option}."
        )
    if not quantized.is_floating:
        return
    if settings.adaptive_rounding:
        raise UserError(
            f"--adaptive-rounding is for --int8; leave it out with {quantized.option}, whose "
            "levels lie close together where most weights are."
        )
    if not isinstance(settings.float_layers, tuple) and settings.float_layers != 0:
        raise UserError(
            f"--float-layers {settings.float_layers} ranks layers by what --int8 costs in them; "
            f"name the layers with {quantized.option}."
        )


@dataclass(frozen=True)
class Calibrated:
    """A float graph calibrated for INT8, before any pair is put into it."""

    model: onnx.ModelProto
    placement: Placement
    table: CalibrationTable
    paths: tuple[Path, ...]
    """The calibration images."""
    statistics: Mapping[str, TensorStatistics]
    """Of every tensor that any choice of float layers may quantize."""

    def with_float(self, layers: tuple[str, ...]) -> onnx.ModelProto:
        """Return the Q/DQ graph with some layers in float."""
        prepared = Prepared(
            _variant(self.table.variant), self.model, self.placement, self.statistics
        )
        table = _table(prepared, _method(self.table), self.table.key, INT8, layers)
        return insert_qdq(self.model, place_for(INT8, self.model, layers), table.amax)


def calibrate(
    graph: Graph,
    folder: str | Path,
    settings: QuantizationSettings | None = None,
    tell: Callable[[str], None] | None = None,
) -> Calibrated:
    """Calibrate a float graph for INT8 as `quantize` does, for a look at its layers.

    Raises:
        UserError: see `quantize`.
    """
    settings = dataclasses.replace(
        settings or QuantizationSettings(),
        quantized=INT8,
        float_layers=0,
        bias_correction=False,
    )
    check_weights(graph.model)
    paths = calibration_images(folder, settings.image_limit, tell)
    key = CalibrationKey(model_sha256(graph.model), images_sha256(paths))
    prepared, table, _, _ = _calibrate(graph, paths, settings, key, tell or (lambda _: None))
    return Calibrated(prepared.model, prepared.placement, table, tuple(paths), prepared.statistics)


def _method(table: CalibrationTable) -> Method:
    used = set(table.methods.values())
    return next(method for method in METHODS if method in used)


def _calibrate(
    graph: Graph,
    paths: Sequence[Path],
    settings: QuantizationSettings,
    key: CalibrationKey,
    say: Callable[[str], None],
    labelled: Callable[[onnx.ModelProto], float] | None = None,
) -> tuple[Prepared, CalibrationTable, tuple[Candidate, ...], BiasCorrection]:
    """Choose a variant on some of the images, then the calibrator on all of them."""
    quantized = settings.quantized
    methods: tuple[Method, ...] = (
        methods_for(quantized) if settings.calibrator == "auto" else (settings.calibrator,)
    )
    variants = VARIANTS[: 2 if quantized.is_floating else 3] if settings.equalize else VARIANTS[:1]
    some = _spread(paths, FEWEST_IMAGES)
    inputs = _inputs(graph, paths, settings)
    many = _spread(paths, _images_to_compare(graph))
    candidates: list[Candidate] = []
    choices: list[Candidate] = []
    variant, method = variants[0], methods[0]
    judge = Judge(graph, many, settings.border) if len(variants) + len(methods) > 2 else None
    if judge and len(variants) > 1:
        models: list[onnx.ModelProto] = []
        # One pass over the plain graph serves its own calibration and both rescaled variants.
        wanted = (*tensors_to_measure(graph.model), *_tensors(graph.model, settings))
        known = collect(graph.model, inputs, wanted)
        for trial in variants:
            prepared = _prepare(graph, some, settings, trial, say, known=known, images=inputs)
            if prepared.model not in models:  # else there was nothing to rescale
                models.append(prepared.model)
                candidates.append(_judged(judge, prepared, method, key, quantized, say))
        tolerance = CLEAR_GAIN if quantized.is_floating else TOLERANCE
        variant = _simplest_of_the_best(candidates, tolerance).variant
    prepared = _prepare(graph, paths, settings, variant, say)
    if judge and len(methods) > 1:
        choices = [_judged(judge, prepared, one, key, quantized, say) for one in methods]
        # A floating type loses nothing to a range that is too wide, so min-max comes first.
        tolerance = CLEAR_GAIN if quantized.is_floating else 0.0
        method = _simplest_of_the_best(choices, tolerance).method
    if judge:
        say(f"chosen: calibrator {method}, graph {variant}")
    table = _table(prepared, method, key, quantized)
    judge = judge or (Judge(graph, many, settings.border) if _needs_judge(settings) else None)
    correction = BiasCorrection(prepared.model, inputs)
    errors: Mapping[str, NDArray[np.float64]] = {}
    correctable = settings.bias_correction or settings.adaptive_rounding
    searched = settings.float_layers == "auto"
    if judge and searched and correctable:
        # What is searched is what will be built: float layers are to bring what biases cannot.
        model = insert_qdq(prepared.model, prepared.placement, table.amax, quantized=quantized)
        if _biases_help(judge, correction, model, say):
            errors = correction.errors(model)
    layers = _float_layers(
        graph, prepared, table, method, many, settings, say, labelled, judge, errors
    )
    if layers:
        # With other layers in float, pairs stand elsewhere and groups are other ones.
        table = _table(prepared, method, key, quantized, layers)
    if judge and settings.bias_correction and not settings.adaptive_rounding:
        if searched:
            corrected = bool(errors)
        else:
            placement = place_for(quantized, prepared.model, layers)
            model = insert_qdq(prepared.model, placement, table.amax, quantized=quantized)
            corrected = _biases_help(judge, correction, model, say)
        table = dataclasses.replace(table, biases_corrected=corrected)
    return prepared, table, (*candidates, *choices), correction


def _needs_judge(settings: QuantizationSettings) -> bool:
    return settings.float_layers == "auto" or (
        settings.bias_correction and not settings.adaptive_rounding
    )


def _biases_help(
    judge: Judge,
    correction: BiasCorrection,
    model: onnx.ModelProto,
    say: Callable[[str], None],
) -> bool:
    """Return whether a Q/DQ graph agrees clearly better with its biases corrected."""
    before = judge.agreement(model)
    after = judge.agreement(correction.correct(model))
    say(f"biases corrected: agreement with float {after:.3f} after {before:.3f}")
    return after > before + CLEAR_GAIN


def _inputs(
    graph: Graph, paths: Sequence[Path], settings: QuantizationSettings
) -> list[NDArray[Any]]:
    """Return a few of the images as the graph takes them."""
    some = _spread(paths, FEWEST_IMAGES)
    return list(batches_of(graph, some, settings.border))


def batches_of(graph: Graph, paths: Sequence[Path], border: int = 0) -> Iterator[NDArray[Any]]:
    """Yield what the graph takes for one image after the other, with a gray border or without."""
    return calibration_batches(
        paths, input_spec(graph.model), border=border, preprocessing=graph.preprocessing
    )


def _float_layers(
    graph: Graph,
    prepared: Prepared,
    table: CalibrationTable,
    method: Method,
    paths: Sequence[Path],
    settings: QuantizationSettings,
    say: Callable[[str], None],
    labelled: Callable[[onnx.ModelProto], float] | None,
    judge: Judge | None,
    errors: Mapping[str, NDArray[np.float64]],
) -> tuple[str, ...]:
    """Return the layers that stay in float: as named, or chosen by sensitivity.

    `errors` are those that the biases will take back, see `BiasCorrection`.
    """
    wanted = settings.float_layers
    if isinstance(wanted, tuple):
        return wanted
    if wanted == 0:
        return ()
    say(f"sensitivity of {len(prepared.placement.layers)} layers over {len(paths)} images ...")
    images = batches_of(graph, paths, settings.border)
    distortions = layer_distortions(prepared.model, prepared.placement, table.amax, images)
    if isinstance(wanted, int):
        chosen = most_sensitive(ranked(distortions, "snr"), wanted)
        say(f"in float: {', '.join(chosen)}")
        return chosen
    if labelled:
        judged, name, least_gain = labelled, "AP", 0.0
        least = labelled(graph.model) - settings.max_ap_drop / 100
    else:
        judge = judge or Judge(graph, paths, settings.border)
        judged, name, least_gain = judge.confident_agreement, "agreement with float", CLEAR_GAIN
        budget, harmless = least_agreement(settings.max_ap_drop), judge.harmless_agreement()
        say(
            f"the budget of {settings.max_ap_drop:g} AP points stands for an agreement of "
            f"{budget:.3f}; the float network's with itself, a little noise on the images, is "
            f"{harmless:.3f}"
        )
        least = min(budget, harmless)
    say(f"float layers until the {name} is {least:.3f} ...")

    def score(layers: tuple[str, ...]) -> float:
        trial = _table(prepared, method, table.key, INT8, layers)
        model = insert_qdq(prepared.model, place_for(INT8, prepared.model, layers), trial.amax)
        value = judged(with_errors_removed(model, errors) if errors else model)
        say(f"{len(layers)} layers in float: {name} {value:.3f}")
        return value

    costs = layer_costs(prepared.model)
    found = choose_float_layers(
        rankings(distortions, costs), costs, score, least, least_gain=least_gain
    )
    say(
        f"in float: {', '.join(found.layers) or 'nothing'} ({found.multiply_add_share:.1%} of the "
        f"multiply-adds, about {found.time_share:.1%} of the time), {name} {found.score:.3f}"
        + (
            ""
            if found.met
            else f", less than {least:.3f}, which no set within half of the "
            "multiply-adds reaches; more layers would not be worth their time"
        )
    )
    return found.layers


def _check_float_layers(graph: Graph, settings: QuantizationSettings) -> None:
    """Raise UserError for a wrong choice of float layers: calibrating takes a minute."""
    wanted = settings.float_layers
    if wanted == "auto":
        least_agreement(settings.max_ap_drop)
        return
    kept = wanted if isinstance(wanted, tuple) else ()
    layers = place_for(settings.quantized, graph.model, kept).layers
    if isinstance(wanted, int):
        most_sensitive(Sensitivity("snr", tuple((name, 0.0) for name in layers)), wanted)


def least_agreement(max_ap_drop: float) -> float:
    """Return the agreement with the float network that an AP drop stands for.

    Found on YOLOv6Lite-L, over twenty-one ways to quantize it: relative AP lost is about
    (1 - agreement) ** 1.7. The AP is taken for 0.5, since images without labels do not tell it.

    Args:
        max_ap_drop: in AP points (hundredths), above 0.

    Raises:
        UserError: it is not above 0.
    """
    if not max_ap_drop > 0:
        raise UserError(
            f"--max-ap-drop {max_ap_drop} is out of range; give AP points above 0, such as 0.5."
        )
    return float(1 - (min(max_ap_drop, 50) / 50) ** (1 / 1.7))


def _images_to_compare(graph: Graph) -> int:
    work = sum(cost.multiply_adds for cost in layer_costs(graph.model).values())
    return max(FEWEST_IMAGES, min(MOST_IMAGES, round(_COMPARISON / max(work, 1))))


def _spread(paths: Sequence[Path], count: int) -> Sequence[Path]:
    """Return so many of the paths, spread evenly."""
    if len(paths) <= count:
        return paths
    return [paths[index * len(paths) // count] for index in range(count)]


def _described(settings: QuantizationSettings) -> str:
    layers = settings.float_layers
    if layers == "auto":
        return f"auto, {settings.max_ap_drop}, noise {HARMLESS_NOISE:g}"
    return ", ".join(layers) if isinstance(layers, tuple) else str(layers)


def _quantized_share(model: onnx.ModelProto, placement: Placement) -> float:
    costs = layer_costs(model)
    return sum(costs[name].multiply_add_share for name in placement.layers)


def _judged(
    judge: Judge,
    prepared: Prepared,
    method: Method,
    key: CalibrationKey,
    quantized: QuantizedType,
    say: Callable[[str], None],
) -> Candidate:
    table = _table(prepared, method, key, quantized)
    model = insert_qdq(prepared.model, prepared.placement, table.amax, quantized=quantized)
    result = Candidate(prepared.variant, method, judge.agreement(model))
    say(f"{result.variant}, {method}: agreement with float {result.agreement:.3f}")
    return result


def _simplest_of_the_best(candidates: Sequence[Candidate], tolerance: float) -> Candidate:
    """Return the first candidate that is as good as the best but for a tolerance."""
    best = max(candidate.agreement for candidate in candidates)
    return next(item for item in candidates if item.agreement >= best - tolerance)


def _prepare(
    graph: Graph,
    paths: Sequence[Path],
    settings: QuantizationSettings,
    variant: Variant,
    say: Callable[[str], None],
    measure: bool = True,
    known: Mapping[str, TensorStatistics] | None = None,
    images: Sequence[NDArray[Any]] | None = None,
) -> Prepared:
    """Bring the graph into a variant and, with `measure`, collect its tensors' statistics.

    Args:
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


def _tensors(model: onnx.ModelProto, settings: QuantizationSettings) -> Sequence[str]:
    """Return the tensors whose statistics calibrating a graph takes."""
    if settings.float_layers != ():
        return tensors_for_any_choice(model)
    return place_for(settings.quantized, model).tensors


def _table(
    prepared: Prepared,
    method: Method,
    key: CalibrationKey,
    quantized: QuantizedType,
    float_layers: tuple[str, ...] = (),
) -> CalibrationTable:
    placement = prepared.placement
    if float_layers:
        placement = place_for(quantized, prepared.model, float_layers)
    statistics = {name: prepared.statistics[name] for name in placement.tensors}
    amax = group_amax(statistics, placement.groups, method, quantized)
    methods = dict.fromkeys(amax, str(method))
    return CalibrationTable(amax, methods, key, prepared.variant, float_layers)


def _variant(name: str) -> Variant:
    for variant in VARIANTS:
        if variant == name:
            return variant
    raise UserError(
        f"the calibration table is for an unknown form {name!r} of the graph; delete it and "
        "calibrate again."
    )


class Judge:
    """Compares quantized graphs with the float one on calibration images, a few dozen at most.

    What is compared are detections, since the engine's user sees nothing else: the quantized
    graph's AP against the float network's from some confidence on, the mean over `CONFIDENCES`.
    """

    def __init__(self, graph: Graph, paths: Sequence[Path], border: int = 0) -> None:
        self._images = list(batches_of(graph, paths, border))
        self._preprocessing = graph.preprocessing
        self._layout: OutputLayout = graph.output_layout
        self._named_classes = len(graph.class_names)
        self._image_size = graph.image_size
        self._model = graph.model
        self._found: dict[str, list[Detections]] = {}
        self.reference = self.detections(graph.model)

    def agreement(self, model: onnx.ModelProto) -> float:
        """Return the agreement of a quantized graph's detections with the float one's, 0..1."""
        found = self.detections(model)
        values = [self._agreement(found, one) for one in CONFIDENCES]
        return sum(values) / len(values)

    def confident_agreement(self, model: onnx.ModelProto) -> float:
        """Return the agreement from the highest of `CONFIDENCES` on, see `least_agreement`."""
        return self._agreement(self.detections(model), CONFIDENCES[-1])

    def harmless_agreement(self) -> float:
        """Return the float network's agreement with itself on images with a little noise.

        Noise of `HARMLESS_NOISE` costs no AP, so an agreement this high, counted as in
        `confident_agreement`, is as good as the comparison can tell.
        """
        values = []
        for seed in range(2):
            rng = np.random.default_rng(seed)
            noisy = (_noisy(images, rng, self._preprocessing) for images in self._images)
            found = self._run(self._model, noisy)
            values.append(self._agreement(found, CONFIDENCES[-1]))
        return sum(values) / len(values)

    def _agreement(self, found: Sequence[Detections], confident: float) -> float:
        # A graph with NMS inside does not tell how many classes there are.
        seen = (one.class_id.max(initial=-1) + 1 for one in (*self.reference, *found))
        return agreement(self.reference, found, max(self._named_classes, 1, *seen), confident)

    def detections(self, model: onnx.ModelProto) -> list[Detections]:
        """Return what a graph finds in the images, in pixels of its input; kept for next time."""
        digest = sha256_bytes(model.SerializeToString())
        if digest not in self._found:
            self._found[digest] = self._run(model, self._images)
        return self._found[digest]

    def _run(self, model: onnx.ModelProto, batches: Iterable[NDArray[Any]]) -> list[Detections]:
        import onnxruntime

        from trt_yolov6.graph.reference import reference_session

        session: onnxruntime.InferenceSession = reference_session(model)
        names = [output.name for output in session.get_outputs()]
        size = self._image_size
        found: list[Detections] = []
        for images in batches:
            outputs: dict[str, NDArray[Any]] = dict(
                zip(names, session.run(names, {session.get_inputs()[0].name: images}), strict=True)
            )
            whole = [fit(size, size)] * len(images)
            found += postprocess(outputs, self._layout, NmsSettings(), whole, clip=False)
        return found


def _noisy(
    images: NDArray[Any], rng: np.random.Generator, preprocessing: Preprocessing
) -> NDArray[Any]:
    """Return a graph's input with `HARMLESS_NOISE`, of uint8 pixels or prepared float ones."""
    noise = rng.standard_normal(images.shape, np.float32) * HARMLESS_NOISE
    if images.dtype == np.uint8:
        result: NDArray[Any] = np.clip(np.rint(images + noise), 0, 255).astype(np.uint8)
        return result
    _, mean, std = np.array(preprocessing.channels, np.float32).T[..., None, None]
    result = np.clip(images + noise / std, -mean / std, (255 - mean) / std)
    return result.astype(images.dtype)
