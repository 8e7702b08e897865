"""Compare quantized graphs by their detections in images without labels."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
from numpy.typing import NDArray

from trt_yolov6.common.files import sha256_bytes
from trt_yolov6.common.statistics import Interval
from trt_yolov6.data.calibration import calibration_batches
from trt_yolov6.data.letterbox import fit
from trt_yolov6.data.preprocessing import Preprocessing
from trt_yolov6.detectors.detections import Detections, postprocess
from trt_yolov6.detectors.layouts import Outputs
from trt_yolov6.errors import UserError
from trt_yolov6.graph.inputs import input_spec
from trt_yolov6.graph.model import Graph
from trt_yolov6.graph.reference import reference_session, runner
from trt_yolov6.quantization.agreement import agreement, least_score
from trt_yolov6.quantization.displacement import Displacement
from trt_yolov6.quantization.qdq.integer_arithmetic import with_integer_convolutions
from trt_yolov6.quantization.resampling import MatchedDetections, interval, matched
from trt_yolov6.spec import NmsSettings, OutputLayout

CONFIDENCES = (0.1, 0.2, 0.3)
"""Scores from which on a float detection counts as true; the mean over several of them varies less
by chance than one."""

HARMLESS_NOISE = 2.0
"""Standard deviation, in gray levels of 255, of noise as any camera has it.

Agreement depends on the data as well: the sample in INT8 loses no AP at 0.909, YOLOv6Lite-L one
point of 35 at 0.915. Their float networks' agreement with themselves tells them apart with noise;
images moved by a pixel would rank them the other way round."""

SURE = 0.8
"""Confidence of the interval whose lower end counts where a claim has to hold in nine of ten cases:
that gradients have brought something, that a budget is met."""

_RESAMPLES = 200
"""Bootstrap resamples of the built graph's interval, which is printed with two digits."""

FEWEST_TO_PART = 16
"""Images from which on half of them only judge. Fewer are parted in two folds: each half judges
what the other one made, and what is built is then made from all."""

FEWEST_TO_FOLD = 4
"""Images from which on there are folds. Of fewer, all calibrate and all judge."""


@dataclass(frozen=True)
class ImageSplit:
    """Calibration images in two parts, so that nothing is judged on what it was made from."""

    calibrate: tuple[Path, ...]
    judge: tuple[Path, ...]

    @property
    def is_held_out(self) -> bool:
        """True if no image is in both parts."""
        return not set(self.calibrate) & set(self.judge)


def split_images(paths: Sequence[Path]) -> tuple[ImageSplit, ...]:
    """Split images: every other one calibrates, the rest judges; if they are few, also the reverse.

    Args:
        paths: sorted; neighbours are often alike, so both halves have some of each kind.

    Returns:
        The folds, mostly one: candidates are made from each fold's `calibrate` and judged on its
        `judge`.
    """
    if len(paths) < FEWEST_TO_FOLD:
        return (ImageSplit(tuple(paths), tuple(paths)),)
    even, odd = tuple(paths[::2]), tuple(paths[1::2])
    if len(paths) < FEWEST_TO_PART:
        return ImageSplit(even, odd), ImageSplit(odd, even)
    return (ImageSplit(even, odd),)


def images_to_build_from(folds: Sequence[ImageSplit]) -> tuple[Path, ...]:
    """Return the images that the built graph is made from, sorted: with several folds, all."""
    return tuple(sorted({path for fold in folds for path in fold.calibrate}))


def batches_of(graph: Graph, paths: Sequence[Path], border: int = 0) -> Iterator[NDArray[Any]]:
    """Yield the graph's input for one image after the other, with a gray border if asked for."""
    return calibration_batches(
        paths, input_spec(graph.model), border=border, preprocessing=graph.preprocessing
    )


def least_agreement(max_ap_drop: float) -> float:
    """Return the agreement with the float network that an AP drop corresponds to on average.

    Fitted to twenty-one ways to quantize YOLOv6Lite-L: the relative loss of AP is about
    (1 - agreement) ** 1.7. An AP of 0.5 is assumed, since images without labels do not give it.
    For five networks quantized in twelve ways, with agreements of 0.95 to 0.983, it predicts a mean
    drop of 0.19 points; 129 to 192 labelled images showed 0.19, standard deviation 0.30.

    Args:
        max_ap_drop: in AP points (hundredths), above 0.

    Raises:
        UserError: it is not above 0.
    """
    if not max_ap_drop > 0:
        raise UserError(
            f"`max_ap_drop` {max_ap_drop} is out of range; give AP points above 0, such as 0.5."
        )
    return float(1 - (min(max_ap_drop, 50) / 50) ** (1 / 1.7))


class LabelledScore(Protocol):
    """COCO AP of forms of a graph on labelled images, see `sensitivity_report.LabelledAp`."""

    def __call__(self, model: onnx.ModelProto) -> float:
        """Return a form's AP, 0..1."""

    @property
    def data_sha256(self) -> str:
        """Hash of the labelled data."""

    def change(self, model: onnx.ModelProto, base: onnx.ModelProto) -> Interval:
        """Return by how much a form's AP is higher than another's, with its 95 % interval."""


_Seen = tuple[list[Detections], "NDArray[np.float64] | None"]
"""Detections of a graph in a batch, and how far confident anchors have moved."""


class Judge:
    """Compares quantized graphs with the float one on calibration images, a few dozen at most.

    It reports the agreement of detections, since an engine's user sees nothing else: the quantized
    graph's AP against the float network's confident detections, averaged over `CONFIDENCES`. It
    decides by `loss`: matches are few, and which of two near graphs has more is mostly chance.
    """

    def __init__(self, graph: Graph, paths: Sequence[Path], border: int = 0) -> None:
        self._images = list(batches_of(graph, paths, border))
        # A fixed batch is filled up with images that are counted already.
        size = len(self._images[0])
        self._sizes = [min(size, len(paths) - first) for first in range(0, len(paths), size)]
        self._preprocessing = graph.preprocessing
        self._layout: OutputLayout = graph.output_layout
        self._image_size = graph.image_size
        self._model = graph.model
        self._found: dict[tuple[str, int], _Seen] = {}
        self._watch = Displacement(graph) if Displacement.can_watch(graph) else None
        self._reference: list[list[Detections]] = []
        self._batches = range(len(self._images))
        for found, outputs in self._run(graph.model, self._batches):
            self._reference.append(found)
            if self._watch is not None:
                self._watch.watch(outputs, len(found))

    @property
    def reference(self) -> list[Detections]:
        """Detections of the float network, one an image."""
        return [one for batch in self._batches for one in self._reference[batch]]

    @property
    def images(self) -> int:
        """Number of images."""
        return len(self.reference)

    def thinned(self) -> Judge:
        """Return a judge by every other image, if there are enough; both share their cache."""
        result = copy.copy(self)
        if self.images >= FEWEST_TO_PART:
            result._batches = self._batches[::2]
        return result

    def agreement(self, model: onnx.ModelProto) -> float:
        """Return the agreement of a quantized graph's detections with the float one's, 0..1."""
        return pooled_agreement([(self, self.detections(model))])

    def confident_agreement(self, model: onnx.ModelProto) -> float:
        """Return the agreement from the highest of `CONFIDENCES` on, see `least_agreement`."""
        return pooled_agreement([(self, self.detections(model))], CONFIDENCES[-1:])

    def harmless_agreement(self) -> float:
        """Return the float network's likely agreement with itself on images with a little noise.

        Noise of `HARMLESS_NOISE` costs no AP, so a higher agreement, counted as in
        `likely_agreement`, says nothing more.
        """
        values = []
        for seed in range(2):
            rng = np.random.default_rng(seed)
            found = [one for seen, _ in self._run(self._model, self._batches, rng) for one in seen]
            values.append(likely_agreement([(self, found)]))
        return sum(values) / len(values)

    def detections(self, model: onnx.ModelProto) -> list[Detections]:
        """Return a graph's detections in the images, in pixels of its input; cached."""
        return self._judged(model)[0]

    def loss(self, model: onnx.ModelProto) -> float:
        """Return a graph's distance from the float one, 0 or more; cached.

        It is the mean displacement of confident anchors or, with NMS inside, 1 - agreement.
        """
        return self._judged(model)[1]

    def _judged(self, model: onnx.ModelProto) -> tuple[list[Detections], float]:
        digest = sha256_bytes(model.SerializeToString())
        missing = [batch for batch in self._batches if (digest, batch) not in self._found]
        if missing:
            for batch, (found, outputs) in zip(missing, self._run(model, missing), strict=True):
                own = None if self._watch is None else self._watch.moved(batch, outputs)
                self._found[digest, batch] = found, own
        seen = [self._found[digest, batch] for batch in self._batches]
        detections = [one for found, _ in seen for one in found]
        moved = [each for _, each in seen if each is not None]
        if moved:
            return detections, float(np.concatenate(moved).mean())
        return detections, 1 - pooled_agreement([(self, detections)])

    def _run(
        self,
        model: onnx.ModelProto,
        batches: Iterable[int],
        noise: np.random.Generator | None = None,
    ) -> Iterator[tuple[list[Detections], Outputs]]:
        """Yield detections and outputs of one batch after the other, with noise or without."""
        # Exact integer sums, as in the engine; they are also faster than dequantized ones.
        run = runner(reference_session(with_integer_convolutions(model)))
        whole = fit(self._image_size, self._image_size)
        for batch in batches:
            images = self._images[batch]
            if noise is not None:
                images = with_noise(images, noise, self._preprocessing)
            outputs, placed = run(images), [whole] * len(images)
            found = postprocess(outputs, self._layout, NmsSettings(), placed, clip=False)
            yield found[: self._sizes[batch]], outputs


Judged = Sequence[tuple[Judge, Sequence[Detections]]]
"""Detections of quantized graphs in the images of judges, as if all were one set of images."""


def pooled_agreement(judged: Judged, confidences: Sequence[float] = CONFIDENCES) -> float:
    """Return the agreement with the float network's detections, the mean over confidences."""
    reference, found = _pooled(judged)
    return float(np.mean([agreement(reference, found, one) for one in confidences]))


def likely_agreement(judged: Judged) -> float:
    """Return the agreement that other images would reach in nine of ten cases.

    It is the lower end of an interval, with the highest of `CONFIDENCES`.
    """
    return pooled_interval(judged, CONFIDENCES[-1:], SURE).low


def pooled_interval(
    judged: Judged, confidences: Sequence[float] = CONFIDENCES, confidence: float = 0.95
) -> Interval:
    """Return `pooled_agreement` with its bootstrap interval over the images.

    Where either network detects nothing, all three values are the agreement.
    """
    whole, scored = pooled_agreement(judged, confidences), _scored(judged, confidences)
    images = scored[0].images

    def mean(draws: NDArray[np.int64]) -> float:
        return float(np.mean([one.ap(draws) for one in scored]))

    if not np.isfinite(mean(np.ones(images, np.int64))):
        return Interval(whole, whole, whole)
    return interval(mean, images, resamples=_RESAMPLES, confidence=confidence)


def pooled_gain(judged: Judged, before: Judged) -> Interval:
    """Return by how much the agreement is higher than that of other detections.

    Both are resampled alike, so the interval is far narrower than that of either.

    Args:
        judged: detections of one graph in the images of judges.
        before: those of the other in the same images.
    """
    pairs = list(zip(_scored(judged), _scored(before), strict=True))

    def gain(draws: NDArray[np.int64]) -> float:
        return float(np.mean([own.ap(draws) - other.ap(draws) for own, other in pairs]))

    return interval(gain, pairs[0][0].images, resamples=_RESAMPLES, confidence=SURE)


def _scored(judged: Judged, confidences: Sequence[float] = CONFIDENCES) -> list[MatchedDetections]:
    """Return the detections matched with the float network's, from each confidence on."""
    reference, found = _pooled(judged)
    return [matched(reference, found, least_score(reference, one)) for one in confidences]


def _pooled(judged: Judged) -> tuple[list[Detections], list[Detections]]:
    return (
        [one for judge, _ in judged for one in judge.reference],
        [one for _, found in judged for one in found],
    )


def with_noise(
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
