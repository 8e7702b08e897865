"""Description of an engine's detector: from its manifest, else recognized from its graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from trt_yolov6.detectors.layouts import LAYOUTS
from trt_yolov6.detectors.metadata import names_in, nms_in, numbered_classes
from trt_yolov6.detectors.recognition import GraphFacts, recognize
from trt_yolov6.detectors.spec import DetectorSpec
from trt_yolov6.engines.base import LoadOptions
from trt_yolov6.engines.manifest import Manifest
from trt_yolov6.errors import UserError


def detector_of(
    manifest: Manifest | None, options: LoadOptions, path: Path, facts: Callable[[], GraphFacts]
) -> DetectorSpec:
    """Return an engine's detector: as its manifest says, else as its graph lets recognize.

    Classes without names in the graph's metadata are `class_0`, `class_1` and so on. The facts are
    asked for only where there is no manifest.

    Raises:
        UserError: see `detectors.recognition.recognize`, or the manifest says otherwise.
    """
    if manifest is None:
        known = facts()
        assert known.image_size is not None
        family, layout = recognize(known, path, options.decoder)
        count = LAYOUTS[layout].classes(known.outputs)
        names = names_in(known.metadata)
        if names is None or count not in (None, len(names)):
            names = numbered_classes(count, path)
        nms = nms_in(known.metadata) if layout == "end2end" else None
        detector = DetectorSpec(
            names, known.image_size, layout, family.name, family.preprocessing, nms
        )
    else:
        if options.decoder not in (None, manifest.decoder):
            raise UserError(
                f"{path} was built as {manifest.decoder}, not {options.decoder}; leave `decoder` "
                "out, or build it again with it.",
            )
        detector = manifest.detector
    return replace(
        detector, preprocessing=detector.preprocessing.with_changes(options.preprocess or {})
    )
