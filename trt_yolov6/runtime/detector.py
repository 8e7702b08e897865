"""`Detector`: a loaded engine that goes from images to detections."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trt_yolov6.common.closing import Closing
from trt_yolov6.common.ranges import of_class
from trt_yolov6.detectors.detections import Detections
from trt_yolov6.engines.base import Engine
from trt_yolov6.runtime.predict import Images, detect
from trt_yolov6.spec import PredictOptions

if TYPE_CHECKING:
    from trt_yolov6.runtime.annotate import InferenceSummary
    from trt_yolov6.runtime.detection_files import Format


class Detector(Closing):
    """A loaded detector. One thread at a time may use it; close it, or use it in a `with` block."""

    def __init__(self, engine: Engine) -> None:
        """Take an engine, which is closed with the detector."""
        self.engine = engine

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, by `class_id`."""
        return self.engine.class_names

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels of the network's input; images may be of any size."""
        return self.engine.image_size

    def predict(
        self,
        images: Images,
        options: PredictOptions | None = None,
        *,
        confidence: float | None = None,
        iou: float | None = None,
        max_detections: int | None = None,
    ) -> list[Detections]:
        """Find objects in images.

        Args:
            images: RGB arrays, uint8 (height, width, 3), or PIL images; paths of files, folders
                (searched with their sub-folders, sorted by path) and globs; or several of these.
                OpenCV reads BGR: give `image[..., ::-1]`.
            options: thresholds, border and batch.
            confidence: least score in 0..1; this and the next two replace those of `options`.
            iou: threshold of NMS, 0..1.
            max_detections: largest number of boxes per image.

        Returns:
            One `Detections` an image, in order; a list of one for a single image.

        Raises:
            UserError: an image cannot be read, or the engine cannot do what is asked.

        Examples:
            >>> from trt_yolov6 import load
            >>> with load("yolov6n.onnx") as detector:
            ...     (found,) = detector.predict("images/BloodImage_00007.jpg", confidence=0.1)
            ...     for one in found:
            ...         box = one.class_name, one.confidence, one.xyxy
            >>> found.xyxy.shape == (len(found), 4)
            True
        """
        given = {"confidence": confidence, "iou": iou, "max_detections": max_detections}
        changes: dict[str, Any] = {key: one for key, one in given.items() if one is not None}
        options = dataclasses.replace(of_class(options, PredictOptions, "options"), **changes)
        return detect(self.engine, images, options)

    def annotate(
        self,
        source: str | Path,
        output: str | Path,
        options: PredictOptions | None = None,
        *,
        formats: Format | Sequence[Format] = ("json",),
        frames: int | None = None,
        stop: Callable[[], bool] = lambda: False,
        progress: bool = False,
    ) -> InferenceSummary:
        """Draw detections on images or a video and write them, as the command `infer` does.

        Args:
            source: image, folder, video, glob, address or camera, see `data.media.find_media`.
            output: folder to write to; not the one that the source lies in.
            options: thresholds, border, batch, and the GPUs for images.
            formats: `json`, `csv`, `yolo`; see `runtime.annotate.infer_source`.
            frames: end a video or stream after this number.
            stop: called before each frame of a video or stream; True ends it.
            progress: show a progress bar on stderr.

        Raises:
            UserError: as `predict`, or the output cannot be written.
        """
        from trt_yolov6.runtime.annotate import infer_source

        return infer_source(
            self.engine,
            source,
            output,
            options,
            formats=formats,
            frames=frames,
            stop=stop,
            progress=progress,
        )

    def close(self) -> None:
        """Free what the engine holds; the detector cannot be used afterwards."""
        self.engine.close()

    def __repr__(self) -> str:
        engine = self.engine
        return f"<Detector {engine.path}: {engine.precision}, {engine.backend}, {engine.device}>"
