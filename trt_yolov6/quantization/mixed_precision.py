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
    A depthwise convolution with one hundredth of the multiply-adds may take as long as a dense one.

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

    With other layers in float, pairs move: after a concatenation rather than before it, to the
    other term of an addition. The model is the float graph.
    """
    wanted = set(place(model, requantize=True).tensors)
    graph = GraphIndex(model)
    wanted.update(
        name
        for node in graph.nodes
        if node.op_type in ("Add", "Sum") and is_quantized_after(graph, node, wanted)
        for name in node.input
        if name not in graph.constants
    )
    return tuple(name for name in graph.order if name in wanted)


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
    """Return orders in which layers may be left in float, the first to be first.

    By signal-to-noise ratio, by mean squared error, and by noise to signal for the run time and
    for its root: the noise of several layers does not simply add up at the output, and which order
    serves best differs from network to network and from budget to budget.
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
    """Return orders in which layers may be left in float, by what each does to the detections.

    Movements of independent noise add up in square. First what is best worth its time, then what
    moves most, whatever it costs.

    Args:
        displacements: of each layer alone (`sensitivity.scores_alone` by `Judge.loss`).
        costs: of the layers.
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

    Of each order the shortest beginning that reaches the score is searched for, by doubling and
    halving its length; the cheapest of them is then thinned, each layer being put back into INT8,
    most expensive first, if the score allows. Nothing is tried that costs more than what has been
    found.

    Args:
        orders: layers from the most sensitive on, see `rankings`.
        costs: of the layers, see `layer_costs`.
        score: AP, or agreement with the float network, with certain layers in float; higher is
            better.
        least_score: what is to be reached.
        most_share: share of the multiply-adds that may be left in float.
        most_trials: how often `score` is called at most.
        least_gain: what a set that does not reach the score has to bring at least.
        most_time: share of the run time that may be left in float; None leaves that open.

    Returns:
        The cheapest set that reaches `least_score`. If none was found, with `most_time` the best of
        those tried, for that time was granted; without it the one, none in float among them, that
        is best worth its time: where the part that it closes of the gap to `least_score` exceeds
        its share of the run time the most.
    """
    search = _Search(costs, score, least_score, most_share, most_trials, least_gain, most_time)
    if not search.reaches(()):
        for order in orders:
            search.shortest_beginning(search.fitting(order))
        search.thin_out()
    return search.result()


@dataclass
class _Search:
    """The trials so far, and the best of them; arguments as of `choose_float_layers`."""

    costs: Mapping[str, LayerCost]
    score: Callable[[tuple[str, ...]], float]
    least_score: float
    most_share: float
    most_trials: int
    least_gain: float
    most_time: float | None
    trials: dict[frozenset[str], Trial] = field(default_factory=dict)

    def reaches(self, layers: tuple[str, ...]) -> bool:
        """Score a set of layers unless that is done; false for one that may not be tried."""
        key = frozenset(layers)
        if key not in self.trials:
            if len(self.trials) >= self.most_trials:
                return False
            self.trials[key] = Trial(layers, self.score(layers), self._time(layers))
        return self.trials[key].score >= self.least_score

    def fitting(self, order: Sequence[str]) -> tuple[str, ...]:
        """Return an order without the layers for which, after those before, no time is left."""
        if self.most_time is None:
            return tuple(order)
        kept: list[str] = []
        for name in order:
            if self._time((*kept, name)) <= self.most_time + 1e-9:
                kept.append(name)
        return tuple(kept)

    def shortest_beginning(self, order: Sequence[str]) -> None:
        """Look for the shortest beginning of an order that reaches the score."""
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
        """Return how many of the first layers may be in float and cost no more than the best."""
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
