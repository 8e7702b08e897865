"""`DetectorSpec`: what a detector takes and gives, whatever computes it."""

from __future__ import annotations

from dataclasses import dataclass

from trt_yolov6.data.preprocessing import YOLOV6, Preprocessing
from trt_yolov6.spec import NmsSettings, OutputLayout


@dataclass(frozen=True)
class DetectorSpec:
    """Description of a detector that its graph, its engine and its manifest share."""

    class_names: tuple[str, ...]
    """Class names in the order of the scores."""
    image_size: tuple[int, int]
    """Input height and width in pixels."""
    output_layout: OutputLayout = "split"
    decoder: str = "yolov6"
    """The family it is of, see `detectors.families`."""
    preprocessing: Preprocessing = YOLOV6
    """Preprocessing of its images: RGB in 0..1, letterboxed, unless its family's differ."""
    nms: NmsSettings | None = None
    """The thresholds of the suppression inside an `end2end` graph, where they are known."""

    def __str__(self) -> str:
        """Return how its outputs are read and its images prepared, in a line for people."""
        return f"decoder {self.decoder}, outputs {self.output_layout}; images: {self.preprocessing}"


class Described:
    """Base of what has a `DetectorSpec`: its fields are attributes here too."""

    detector: DetectorSpec

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the scores."""
        return self.detector.class_names

    @property
    def image_size(self) -> tuple[int, int]:
        """Input height and width in pixels."""
        return self.detector.image_size

    @property
    def output_layout(self) -> OutputLayout:
        """Layout of the outputs."""
        return self.detector.output_layout

    @property
    def decoder(self) -> str:
        """Family of detectors."""
        return self.detector.decoder

    @property
    def preprocessing(self) -> Preprocessing:
        """Preprocessing of images."""
        return self.detector.preprocessing

    @property
    def nms(self) -> NmsSettings | None:
        """Thresholds of the suppression inside the graph, where they are known."""
        return self.detector.nms
