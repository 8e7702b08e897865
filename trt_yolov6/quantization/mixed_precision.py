"""Which layers stay in float: the most sensitive, or the cheapest set that keeps the accuracy.

A layer's price is its share of the run time, since leaving it in float gives up what INT8 would
have saved there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import onnx

from trt_yolov6.errors import UserError
from trt_yolov6.graph.cost import T4, layers_of
from trt_yolov6.graph.index import GraphIndex
from trt_yolov6.graph.operators import CONVOLUTIONS, layer_names
from trt_yolov6.quantization.qdq.placement import is_quantized_after, place
from trt_yolov6.quantization.sensitivity import Distortion

_BATCH = 32
"""Images at a time for which run time is estimated: the paper's, and enough to fill the GPU."""


@dataclass(frozen=True)
class LayerCost:
    """Cost of a convolution."""

    multiply_adds: int
    """Multiply-adds for one image."""
    multiply_add_share: float
    """Share of all convolutions' multiply-adds, in 0..1."""
    time_share: float
    """Estimated share of all convolutions' run time, in 0..1."""


@dataclass(frozen=True)
class Trial:
    """A set of float layers that was tried."""

    layers: tuple[str, ...]
    score: float
    time_share: float


@dataclass(frozen=True)
class Fallback:
    """The layers to keep in float, and how they were found."""

    layers: tuple[str, ...]
    """Layers in float, in the order of their ranking, the most sensitive first."""
    score: float
    """AP, or agreement, with them in float."""
    met: bool
    """True if that meets the request."""
    multiply_add_share: float
    """Share of the multiply-adds that is left in float."""
    time_share: float
    """Estimated share of the run time that is left in float. INT8 takes half of a layer's time
    (`layer_costs`), so that a share t in float takes (1 - t) / 2 + t in place of 1 / 2: t is also
    the share by which layers in float lengthen INT8's run time."""
    trials: tuple[Trial, ...]
    """Everything that was scored, in order."""

    def is_better_than(self, other: Fallback) -> bool:
        """Return whether it meets the budget for less time than the other, or is nearer to it."""
        if self.met != other.met:
            return self.met
        return self.time_share < other.time_share if self.met else self.score > other.score


def layer_costs(model: onnx.ModelProto) -> dict[str, LayerCost]:
    """Return each convolution's cost, by layer name, in the graph's order.

    Run time is the larger of what computing and what moving the data takes on a T4 (roofline: 65
    TFLOPS in half precision, 320 GB/s, batch 32). INT8 halves either, so that shares are the same.
    A depthwise convolution may take as long as a dense one of a hundred times its multiply-adds.

    Raises:
        UserError: the graph's shapes cannot be inferred.
    """
    layers = (layer for layer in layers_of(model) if layer.operator in CONVOLUTIONS)
    amounts: dict[str, tuple[int, float]] = {}
    for name, layer in zip(layer_names(model).values(), layers, strict=True):
        seconds = T4.seconds(layer, _BATCH, "fp16")
        if layer.flops is None or seconds is None:
            raise UserError(
                f"the shapes around {name} are not known, so that its cost is not; export the "
                "graph with a fixed image size."
            )
        amounts[name] = layer.flops // 2, max(seconds)
    work = sum(item[0] for item in amounts.values())
    time = sum(item[1] for item in amounts.values())
    return {
        name: LayerCost(count, count / work, seconds / time)
        for name, (count, seconds) in amounts.items()
    }


def tensors_for_any_choice(model: onnx.ModelProto) -> tuple[str, ...]:
    """Return the tensors whose ranges are enough for any choice of float layers.

    The float layers decide where pairs stand: before a concatenation or after it, on one term of an
    addition or the other. `model` is the float graph.
    """
    needed = set(place(model, requantize=True).tensors)
    graph = GraphIndex(model)
    needed.update(
        name
        for node in graph.nodes
        if node.op_type in ("Add", "Sum") and is_quantized_after(graph, node, needed)
        for name in node.input
        if name not in graph.constants
    )
    return tuple(name for name in graph.order if name in needed)


def most_sensitive(names: tuple[str, ...], count: int) -> tuple[str, ...]:
    """Return the first `count` of layers, which are in order of their sensitivity.

    Raises:
        UserError: there are fewer.
    """
    if not 0 <= count <= len(names):
        raise UserError(f"`float_layers` {count} is out of range; {len(names)} layers run in INT8.")
    return names[:count]


def rankings(
    distortions: Mapping[str, Distortion], costs: Mapping[str, LayerCost]
) -> tuple[tuple[str, ...], ...]:
    """Return orders in which to leave layers in float, the most sensitive first.

    By noise to signal, by mean squared error, and by noise to signal over the run time's root and
    over the run time: the noise of several layers does not simply add up at the output, and the
    best order differs between networks and budgets.
    """

    def noise_to_signal(name: str) -> float:
        return distortions[name].error / max(distortions[name].reference, 1e-30)

    keys: tuple[Callable[[str], float], ...] = (
        noise_to_signal,
        lambda name: distortions[name].mse,
        lambda name: noise_to_signal(name) / math.sqrt(max(costs[name].time_share, 1e-9)),
        lambda name: noise_to_signal(name) / max(costs[name].time_share, 1e-9),
    )
    return tuple(dict.fromkeys(tuple(sorted(distortions, key=key, reverse=True)) for key in keys))


def rankings_by_displacement(
    displacements: Mapping[str, float], costs: Mapping[str, LayerCost]
) -> tuple[tuple[str, ...], ...]:
    """Return orders in which to leave layers in float, by how far each moves the detections.

    The first order is by squared movement for the run time, since squares of independent noise add
    up; the second by movement alone.

    Args:
        displacements: movement by each layer alone (`sensitivity.scores_alone` of `Judge.loss`).
        costs: see `layer_costs`.
    """

    def worth(name: str) -> float:
        return displacements[name] ** 2 / max(costs[name].time_share, 1e-9)

    keys: tuple[Callable[[str], float], ...] = (worth, lambda name: displacements[name])
    return tuple(dict.fromkeys(tuple(sorted(displacements, key=k, reverse=True)) for k in keys))


def choose_float_layers(
    orders: Iterable[Sequence[str]],
    costs: Mapping[str, LayerCost],
    score: Callable[[tuple[str, ...]], float],
    least_score: float,
    *,
    most_share: float = 0.5,
    most_trials: int = 40,
    least_gain: float = 0.0,
    most_time: float | None = None,
) -> Fallback:
    """Find the layers to keep in float so that a score is reached for the least run time.

    In each order, bisection finds the shortest prefix that reaches the score. From the cheapest of
    these, layers go back into INT8, the most expensive first, where the score allows. No set is
    tried that costs more than one that was found.

    Args:
        orders: see `rankings`.
        costs: see `layer_costs`.
        score: AP, or agreement with the float network, with certain layers in float; higher is
            better.
        least_score: score to reach.
        most_share: share of the multiply-adds that may be left in float.
        most_trials: most calls of `score`.
        least_gain: least gain in score of a set that does not reach `least_score`.
        most_time: share of the run time that may be left in float; None: any.

    Returns:
        The cheapest set that reaches `least_score`. If none does: with `most_time` the tried set of
        the best score, since that time was granted; otherwise the set, possibly empty, for which
        the closed share of the gap to `least_score` exceeds the share of the run time the most.
    """
    search = _Search(costs, score, least_score, most_share, most_trials, least_gain, most_time)
    if not search.reaches(()):
        for order in orders:
            search.shortest_prefix(search.fitting(order))
        search.thin_out()
    return search.result()


@dataclass
class _Search:
    """The trials so far; the fields are the arguments of `choose_float_layers`."""

    costs: Mapping[str, LayerCost]
    score: Callable[[tuple[str, ...]], float]
    least_score: float
    most_share: float
    most_trials: int
    least_gain: float
    most_time: float | None
    trials: dict[frozenset[str], Trial] = field(default_factory=dict)

    def reaches(self, layers: tuple[str, ...]) -> bool:
        """Return whether a set reaches the score; False too where no trial is left for it."""
        key = frozenset(layers)
        if key not in self.trials:
            if len(self.trials) >= self.most_trials:
                return False
            self.trials[key] = Trial(layers, self.score(layers), self._time(layers))
        return self.trials[key].score >= self.least_score

    def fitting(self, order: Sequence[str]) -> tuple[str, ...]:
        """Return an order without the layers that would exceed `most_time` after those before."""
        if self.most_time is None:
            return tuple(order)
        kept: list[str] = []
        for name in order:
            if self._time((*kept, name)) <= self.most_time + 1e-9:
                kept.append(name)
        return tuple(kept)

    def shortest_prefix(self, order: Sequence[str]) -> None:
        """Bisect for the shortest prefix of an order that reaches the score."""
        limit = self._affordable(order)
        low, high = 0, 1
        while high < limit and not self.reaches(tuple(order[:high])):
            low, high = high, 2 * high
        high = min(high, limit)
        if high <= low or not self.reaches(tuple(order[:high])):
            return
        while high - low > 1:
            middle = (low + high) // 2
            if self.reaches(tuple(order[:middle])):
                high = middle
            else:
                low = middle

    def thin_out(self) -> None:
        """Put layers of the cheapest set back into INT8 where the score allows."""
        found = self._cheapest()
        if found is None:
            return
        kept = found.layers
        for layer in sorted(kept, key=lambda name: self.costs[name].time_share, reverse=True):
            fewer = tuple(name for name in kept if name != layer)
            if self.reaches(fewer):
                kept = fewer

    def result(self) -> Fallback:
        found = self._cheapest()
        chosen = found or self._best_worth_its_time()
        return Fallback(
            layers=chosen.layers,
            score=chosen.score,
            met=found is not None,
            multiply_add_share=self._work(chosen.layers),
            time_share=chosen.time_share,
            trials=tuple(self.trials.values()),
        )

    def _best_worth_its_time(self) -> Trial:
        start = self.trials[frozenset()]
        if self.most_time is not None:
            return max(self.trials.values(), key=lambda trial: (trial.score, -trial.time_share))
        gap = self.least_score - start.score

        def worth(trial: Trial) -> float:
            gain = trial.score - start.score
            if trial is not start and gain < self.least_gain:
                return -math.inf
            return gain / gap - trial.time_share

        return max(self.trials.values(), key=lambda trial: (worth(trial), -trial.time_share))

    def _cheapest(self) -> Trial | None:
        reached = (item for item in self.trials.values() if item.score >= self.least_score)
        return min(reached, key=lambda trial: (trial.time_share, len(trial.layers)), default=None)

    def _affordable(self, order: Sequence[str]) -> int:
        """Return the longest prefix that is within the limits and cheaper than the best set."""
        best = self._cheapest()
        granted = math.inf if self.most_time is None else self.most_time + 1e-9
        most_time = min(best.time_share if best else math.inf, granted)
        count = 0
        while (
            count < len(order)
            # Shares of all layers add up to 1 only within rounding.
            and self._work(order[: count + 1]) <= self.most_share + 1e-9
            and self._time(order[: count + 1]) < most_time
        ):
            count += 1
        return count

    def _work(self, layers: Collection[str]) -> float:
        return math.fsum(self.costs[name].multiply_add_share for name in layers)

    def _time(self, layers: Collection[str]) -> float:
        return math.fsum(self.costs[name].time_share for name in layers)
