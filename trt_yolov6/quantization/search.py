"""The search for the quantized graph that agrees best with the float one, a decision at a time.

    graph ─▶ ranges ─▶ weights ─▶ float layers ─▶ ranges and weights again ─▶ tuning by gradients

Everything is made from one part of the calibration images and judged on the other; of few images,
both ways round.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import onnx

from trt_yolov6.common.statistics import Interval
from trt_yolov6.common.text import counted
from trt_yolov6.data.calibration import evenly
from trt_yolov6.detectors.detections import Detections
from trt_yolov6.errors import UserError
from trt_yolov6.graph.model import Graph
from trt_yolov6.quantization.bias_correction import without_mean_rounding
from trt_yolov6.quantization.calibrators import Method
from trt_yolov6.quantization.displacement import Displacement
from trt_yolov6.quantization.judge import (
    CONFIDENCES,
    FEWEST_TO_PART,
    ImageSplit,
    Judge,
    LabelledScore,
    batches_of,
    images_to_build_from,
    least_agreement,
    likely_agreement,
    pooled_agreement,
    pooled_gain,
    pooled_interval,
)
from trt_yolov6.quantization.learned import as_built, learned_of, with_learned
from trt_yolov6.quantization.mixed_precision import (
    Fallback,
    LayerCost,
    choose_float_layers,
    layer_costs,
    most_sensitive,
    rankings,
    rankings_by_displacement,
)
from trt_yolov6.quantization.preparation import (
    FEWEST_IMAGES,
    Fold,
    Form,
    Prepared,
    calibrators,
    formed,
    images_to_compare,
    plain_statistics,
    prepare,
    weight_tuning,
)
from trt_yolov6.quantization.sensitivity import Distortion, layer_distortions, ranked, scores_alone
from trt_yolov6.quantization.settings import QuantizationSettings
from trt_yolov6.quantization.table import (
    VARIANTS,
    CalibrationKey,
    CalibrationTable,
    Variant,
    Weights,
)
from trt_yolov6.quantization.trials import Candidate, Decision, simplest_of_the_best
from trt_yolov6.quantization.weights import DESCRIPTIONS, WeightTuning, weight_choices

_log = logging.getLogger(__name__)

CLEAR_GAIN = 0.1
"""Part of the loss that changed weights have to take away, or another calibrator than the first, or
for FP8 rescaled channels: less may be chance."""

TOLERANCE = 0.05
"""A simpler candidate is kept where it loses more than the best by at most this part."""

_LEAST_GAIN = 0.01
"""Agreement that float layers have to bring where a budget is not met."""

_NEAR_FORM = 0.5
"""Part of the loss by which another form of the graph may exceed the best one's and is still looked
at closely."""

_WATCHED_IMAGES = 6
"""Images in which each layer's effect on detections is looked at: some thousand anchors."""

_MOST_SETS, _MORE_SETS = 40, 16
"""Sets of float layers that are tried, at first and after ranges or weights have changed."""


@dataclass(frozen=True)
class Choice:
    """Ranges, weights and float layers of a graph in one variant."""

    method: Method
    weights: Weights
    float_layers: tuple[str, ...] = ()
    like: tuple[Choice, ...] = ()
    """Choices to copy tuned weights and biases from, the last one first: those of a layer hardly
    depend on which other layers are in float."""


@dataclass(frozen=True)
class Found:
    """Choice of a search."""

    prepared: Prepared
    table: CalibrationTable
    candidates: tuple[Candidate, ...]
    tuning: WeightTuning
    agreement: Interval | None
    """Agreement of the built graph or, with several folds, of each fold's; None where nothing had
    to be chosen."""
    images: int
    """Images that it was judged on."""
    budget: Mapping[str, Any] | None = None
    """Budget of the automatic float layers and what they reached, JSON-ready; None without them."""


_Tuned = tuple["onnx.ModelProto", Mapping[str, float]]
"""A graph tuned by gradients, and the ranges of its tensors."""


@dataclass(frozen=True)
class _Budget:
    """Score of a set of float layers, and the least score that meets the budget."""

    score: Callable[[Sequence[onnx.ModelProto]], float]
    """Scores the graphs of all folds together; higher is better."""
    name: str
    least: float
    least_gain: float
    """Least gain of a set that does not reach `least`."""

    def text(self, value: float) -> str:
        """Return a score with its name; a tenth of a point of AP counts, of agreement less so."""
        return f"{self.name} {value:.{4 if self.name == 'AP' else 3}f}"


class Search:
    """Chooses graph, ranges, weights and float layers, one after the other."""

    def __init__(
        self,
        graph: Graph,
        folds: Sequence[ImageSplit],
        settings: QuantizationSettings,
        key: CalibrationKey,
        labelled: LabelledScore | None = None,
    ) -> None:
        if settings.reconstruct_minutes:
            _check_learning(graph, folds)
        self._graph = graph
        self._folds = [Fold(graph, split, settings) for split in folds]
        self._settings = settings
        self._quantized = settings.quantized
        self._key = key
        self._labelled = labelled
        self._methods = calibrators(settings)
        last = 1 if not settings.equalize else 2 if self._quantized.is_floating else len(VARIANTS)
        self._variants = tuple(one for one in VARIANTS[:last] if settings.shift or one != "shifted")
        self._candidates: list[Candidate] = []
        self._reached: Mapping[str, Any] | None = None

    def run(self) -> Found:
        """Make all decisions, in their order."""
        requested = self._settings.float_layers
        named = requested if isinstance(requested, tuple) else ()
        # Of two near forms, ranges and weights may make the other one better.
        found: dict[Variant, tuple[float, Choice]] = {}
        promising = self._promising_variants(named)
        for variant in promising:
            for fold in self._folds:
                fold.go_on_with(variant)
            choice = self._choose(named)
            found[variant] = self._loss(choice) if len(promising) > 1 else 0.0, choice
        variant = min(found, key=lambda one: found[one][0])
        choice = found[variant][1]
        for fold in self._folds:
            fold.go_on_with(variant)
        if self._candidates:
            _log.info(f"chosen: calibrator {choice.method}, graph {variant}")
        if not isinstance(requested, tuple) and requested != 0:
            choice = self._with_float_layers(choice)
        tuned = self._tuned_by_gradients(choice) if self._settings.reconstruct_minutes else None
        return self._found(variant, choice, tuned)

    def _found(self, variant: Variant, choice: Choice, tuned: _Tuned | None) -> Found:
        (first, *others), agreement, images = self._folds, None, 0
        prepared, tuning = first.prepared, first.tuning
        if self._candidates:
            judged = self._judged(self._models(choice) if tuned is None else [tuned[0]])
            agreement = pooled_interval(judged)
            images = sum(judge.images for judge, _ in judged)
        if others:
            paths = images_to_build_from([fold.split for fold in self._folds])
            prepared = prepare(self._graph, paths, self._settings, variant)
            tuning = weight_tuning(self._graph, prepared, paths, self._settings)
        amax, learned = prepared.ranges(choice.method, choice.float_layers), None
        if tuned is not None:
            model, ranges = tuned
            amax |= ranges
            for group in prepared.placed(choice.float_layers).groups:
                # Some members have no pair, so no range either.
                amax |= dict.fromkeys(group, next(ranges[one] for one in group if one in ranges))
            learned = learned_of(model)
        elif choice.like and choice.float_layers and not others:
            # The table then builds exactly what was tried.
            learned = learned_of(self._model(first, choice))
        table = CalibrationTable(
            amax,
            choice.method,
            self._key,
            variant,
            choice.float_layers,
            choice.weights,
            learned,
            by_gradients=tuned is not None,
        )
        tried = tuple(self._candidates)
        return Found(prepared, table, tried, tuning, agreement, images, self._reached)

    # --- decisions ------------------------------------------------------------------------------

    def _promising_variants(self, layers: tuple[str, ...]) -> tuple[Variant, ...]:
        """Compare the forms of the graph by the first calibrator, ranges of a few images.

        Returns:
            The simplest of the best. If that is one of the two forms that change activations, also
            the other one where it is near and shifts many tensors: with ranges of a few images the
            two hardly differ.
        """
        if len(self._variants) == 1:
            return self._variants[:1]
        known = [plain_statistics(self._graph, f.inputs, self._settings) for f in self._folds]
        tried: list[Candidate] = []
        seen: list[Form] = []
        for variant in self._variants:
            forms = [formed(self._graph, variant, of_plain) for of_plain in known]
            if any(forms[0].model == one.model for one in seen):  # there was nothing to rescale
                continue
            seen.append(forms[0])
            for fold, form, of_plain in zip(self._folds, forms, known, strict=True):
                few = evenly(fold.split.calibrate, FEWEST_IMAGES)
                fold.take(
                    prepare(
                        self._graph,
                        few,
                        self._settings,
                        variant,
                        known=of_plain,
                        images=fold.inputs,
                        form=form,
                    ),
                    whole=len(few) == len(fold.split.calibrate),
                )
            tried.append(self._tried("graph", Choice(self._methods[0], "nearest", layers)))
        tolerance = CLEAR_GAIN if self._quantized.is_floating else TOLERANCE
        best = simplest_of_the_best(tried, tolerance)
        near = [
            item.variant
            for item in tried
            if {item.variant, best.variant} == {"smoothed", "shifted"}
            and item.loss < (1 + _NEAR_FORM) * best.loss
            and seen[-1].shifts_much
        ]
        return best.variant, *near

    def _choose(self, layers: tuple[str, ...]) -> Choice:
        """Choose ranges, weights and biases, with certain layers in float."""
        method = self._methods[0]
        if len(self._methods) > 1:
            tried = [self._tried("ranges", Choice(one, "nearest", layers)) for one in self._methods]
            # The first clips nothing. Weights that are rounded for their inputs mostly gain what
            # others gain by finer steps, but nothing makes up for clipping. So others have to be
            # clearly better, for which half of the images are enough.
            method = simplest_of_the_best(tried, CLEAR_GAIN).method
        return self._with_weights(Choice(method, "nearest", layers))

    def _with_weights(self, choice: Choice) -> Choice:
        """Take the first change of the weights that is clearly better than none."""
        settings = self._settings
        if settings.adaptive_rounding:
            return dataclasses.replace(choice, weights="reconstructed")
        if not settings.bias_correction:
            return choice
        # Known already: the graph that ranges were compared by has corrected means, so its loss is
        # mostly below that of the one to improve.
        least = self._mean_loss([self._compared(fold, choice) for fold in self._folds])
        for weights in weight_choices(settings):
            other = dataclasses.replace(choice, weights=weights)
            tried = self._tried("weights", other)
            _log.info(f"{DESCRIPTIONS[weights]}: {tried.outcome}, before {least:.4f}")
            if tried.loss < (1 - CLEAR_GAIN) * least:
                return other
            least = self._loss(choice)
            if tried.loss < (1 - CLEAR_GAIN) * least:
                return other
        return choice

    def _tuned_by_gradients(self, choice: Choice) -> _Tuned | None:
        """Return the graph that gradients have tuned and its ranges, if it is clearly better."""
        (fold,) = self._folds
        from trt_yolov6.quantization.reconstruction import reconstruct

        start, minutes = time.perf_counter(), self._settings.reconstruct_minutes
        before = self._model(fold, choice)
        _log.info(f"tuning by gradients, {minutes:g} minutes ...")
        images = list(batches_of(self._graph, fold.split.calibrate, self._settings.border))
        raw = reconstruct(self._graph, fold.prepared.model, before, images, 60 * minutes)
        tuned, ranges = as_built(raw)
        gain = pooled_gain(self._judged([tuned]), self._judged([before]))
        tried = self._keep("gradients", choice, [tuned], start)
        better = "kept" if gain.low > 0 else "not clearly better"
        _log.info(f"tuned by gradients: {tried.outcome}; {better}")
        return (tuned, ranges) if gain.low > 0 else None

    def _with_float_layers(self, choice: Choice) -> Choice:
        """Choose the layers that stay in float, and ranges and weights again with them."""
        requested = self._settings.float_layers
        if isinstance(requested, int):
            chosen = most_sensitive(ranked(self._distortions(choice), "snr").names, requested)
            slower = self._slowdown(chosen)
            _log.info(
                f"in float: {', '.join(chosen)}; ranked by signal-to-noise ratio whatever they "
                f"cost, here about {slower:.1%} of INT8's time (auto weighs it)"
            )
            return self._choose(chosen)
        orders = self._orders(choice)
        base = dataclasses.replace(choice, like=(choice,))
        found = self._searched(base, orders, _MOST_SETS)
        best = found, dataclasses.replace(base, float_layers=found.layers)
        while best[0].layers:
            # With noisy layers in float, other ranges and weights may be best; with those, other or
            # fewer layers in float.
            again = self._choose(best[0].layers)
            if self._budget.score(self._models(again)) <= best[0].score:
                break
            like = dataclasses.replace(again, like=(*best[1].like, again))
            found = self._searched(like, (best[0].layers, *orders), _MORE_SETS)
            if not found.is_better_than(best[0]):
                break
            best = found, dataclasses.replace(like, float_layers=found.layers)
        self._report(*best)
        return best[1]

    def _orders(self, choice: Choice) -> tuple[tuple[str, ...], ...]:
        """Return orders to leave layers in float in, by their effect on detections if possible."""
        fold = self._folds[0]
        if not Displacement.can_watch(self._graph):
            return rankings(self._distortions(choice), self._costs)
        prepared = fold.prepared
        amax = prepared.ranges(choice.method)
        paths = evenly(fold.split.calibrate, _WATCHED_IMAGES)
        count = len(prepared.placement.layers)
        _log.info(f"what each of {count} layers does to detections in {len(paths)} images ...")
        judge = Judge(self._graph, paths, self._settings.border)
        alone = scores_alone(prepared.model, prepared.placement, amax, judge.loss)
        return rankings_by_displacement(alone, self._costs)

    def _searched(
        self, choice: Choice, orders: Sequence[Sequence[str]], most_trials: int
    ) -> Fallback:
        """Search for float layers with certain ranges and weights.

        Args:
            choice: ranges and weights.
            orders: orders to leave layers in float in.
            most_trials: sets to try.
        """
        budget, slower = self._budget, self._settings.max_slowdown
        _log.info(f"float layers until {budget.text(budget.least)} is reached ...")

        def trial(layers: tuple[str, ...]) -> float:
            start = time.perf_counter()
            whole = dataclasses.replace(choice, float_layers=layers)
            models = self._models(whole)
            value = budget.score(models)
            ap = None if self._labelled is None else value
            self._keep("float layers", whole, models, start, ap)
            _log.info(f"{counted(len(layers), 'layer')} in float: {budget.text(value)}")
            return value

        return choose_float_layers(
            orders,
            self._costs,
            trial,
            budget.least,
            most_trials=most_trials,
            least_gain=budget.least_gain,
            most_time=None if slower is None else slower / 100,
        )

    @cached_property
    def _budget(self) -> _Budget:
        drop, labelled = self._settings.max_ap_drop, self._labelled
        if labelled is not None:
            # Any fold's model would do: the labelled images are in none.
            least = 1.0 if drop is None else labelled(self._graph.model) - drop / 100
            return _Budget(lambda models: labelled(models[0]), "AP", least, 0.0)
        if drop is None:  # the best that the time allows
            return _Budget(
                lambda models: pooled_agreement(self._judged(models), CONFIDENCES[-1:]),
                "agreement with float",
                1.0,
                0.0,
            )
        budget = least_agreement(drop)
        values = [fold.judge.harmless_agreement() for fold in self._folds]
        harmless = sum(values) / len(values)
        _log.info(
            f"the budget of {drop:g} AP points stands for an agreement of {budget:.3f}, in the "
            "mean of networks; it is likely where it holds in nine of ten draws of the images "
            f"(the float network's with itself, a little noise on the images: {harmless:.3f}); "
            "labelled images judge AP itself"
        )
        return _Budget(
            lambda models: likely_agreement(self._judged(models)),
            "likely agreement with float",
            min(budget, harmless),
            _LEAST_GAIN,
        )

    def _report(self, found: Fallback, choice: Choice) -> None:
        """Log what was chosen, what it costs and where it falls short, and store that."""
        budget = self._budget
        slower = self._settings.max_slowdown
        _log.info(_fallback_sentence(found, budget, slower))
        reached: dict[str, Any] = {
            "score": budget.name,
            "least": round(budget.least, 4),
            "reached": round(found.score, 4),
            "met": found.met,
        }
        if self._labelled is not None:
            change = self._labelled.change(self._models(choice)[0], self._graph.model)
            points = [100 * one for one in (change.value, change.low, change.high)]
            seen = 100 * change.half_width
            _log.info(
                f"on the labelled images AP is {points[0]:+.2f} points from float's (95 % interval "
                f"{points[1]:+.2f} to {points[2]:+.2f}); they show differences from {seen:.2f} on"
            )
            reached["ap_change"] = [round(one / 100, 4) for one in points]
        self._reached = reached

    # --- trying ---------------------------------------------------------------------------------

    def _tried(self, decides: Decision, choice: Choice) -> Candidate:
        start = time.perf_counter()
        make = self._model if decides == "weights" else self._compared
        models = [make(fold, choice) for fold in self._folds]
        result = self._keep(decides, choice, models, start)
        if decides != "weights":
            _log.info(f"{result.variant}, {result.method}: {result.outcome}")
        return result

    def _keep(
        self,
        decides: Decision,
        choice: Choice,
        models: Sequence[onnx.ModelProto],
        start: float,
        ap: float | None = None,
    ) -> Candidate:
        result = Candidate(
            decides,
            self._folds[0].prepared.variant,
            choice.method,
            pooled_agreement(self._judged(models, decides)),
            self._mean_loss(models, decides),
            choice.weights,
            choice.float_layers,
            time.perf_counter() - start,
            self._slowdown(choice.float_layers),
            ap,
        )
        self._candidates.append(result)
        return result

    @cached_property
    def _costs(self) -> Mapping[str, LayerCost]:
        return layer_costs(self._folds[0].prepared.model)

    def _slowdown(self, layers: Sequence[str]) -> float:
        return sum(self._costs[name].time_share for name in layers)

    def _inserted(self, fold: Fold, choice: Choice) -> onnx.ModelProto:
        return fold.prepared.inserted(choice.method, choice.float_layers)

    def _compared(self, fold: Fold, choice: Choice) -> onnx.ModelProto:
        """Return the graph to compare forms and ranges by: biases are tried later."""
        model = self._inserted(fold, choice)
        if self._quantized.is_floating or not self._settings.bias_correction:
            return model
        return without_mean_rounding(fold.prepared.model, model, fold.prepared.means)

    def _model(self, fold: Fold, choice: Choice) -> onnx.ModelProto:
        model = self._inserted(fold, choice)
        for other in choice.like:
            model = with_learned(model, learned_of(self._model(fold, other)))
        return model if choice.like else fold.tuning.tuned(model, choice.weights)

    def _models(self, choice: Choice) -> list[onnx.ModelProto]:
        return [self._model(fold, choice) for fold in self._folds]

    def _loss(self, choice: Choice) -> float:
        return self._mean_loss(self._models(choice))

    def _mean_loss(self, models: Sequence[onnx.ModelProto], decides: Decision = "graph") -> float:
        judges = self._judges(decides)
        losses = [judge.loss(model) for judge, model in zip(judges, models, strict=True)]
        return sum(losses) / len(losses)

    def _judged(
        self, models: Sequence[onnx.ModelProto], decides: Decision = "graph"
    ) -> list[tuple[Judge, list[Detections]]]:
        judges = self._judges(decides)
        return [(one, one.detections(model)) for one, model in zip(judges, models, strict=True)]

    def _judges(self, decides: Decision) -> list[Judge]:
        quick = decides == "ranges"
        return [fold.quick_judge if quick else fold.judge for fold in self._folds]

    def _distortions(self, choice: Choice) -> Mapping[str, Distortion]:
        fold = self._folds[0]
        prepared = fold.prepared
        amax = prepared.ranges(choice.method)
        paths = evenly(fold.split.calibrate, images_to_compare(self._graph))
        count = len(prepared.placement.layers)
        _log.info(f"sensitivity of {count} layers over {len(paths)} images ...")
        images = batches_of(self._graph, paths, self._settings.border)
        return layer_distortions(prepared.model, prepared.placement, amax, images)


def _check_learning(graph: Graph, folds: Sequence[ImageSplit]) -> None:
    """Raise UserError for what cannot be tuned by gradients, before minutes of calibration."""
    from trt_yolov6.quantization.torch_graph import TorchGraph

    if len(folds) > 1 or not folds[0].is_held_out:
        raise UserError(
            f"`reconstruct_minutes` needs {FEWEST_TO_PART} calibration images at least, so that "
            "half of them can judge; add some."
        )
    TorchGraph(graph.model)


def _fallback_sentence(found: Fallback, budget: _Budget, slower: float | None) -> str:
    """Return a sentence on what was chosen, what it costs, and where it falls short."""
    text = (
        f"in float: {', '.join(found.layers) or 'nothing'} ({found.multiply_add_share:.1%} of the "
        f"multiply-adds, about {found.time_share:.1%} slower), {budget.text(found.score)}"
    )
    if found.met:
        return text
    limit = "within half of the multiply-adds" if slower is None else f"at most {slower:g}% slower"
    return (
        f"{text} of {budget.least:.4f} wanted; it is the best found of {len(found.trials)} sets "
        f"{limit}"
    )
