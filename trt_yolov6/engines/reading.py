"""Decoding and preprocessing of an engine: from its manifest, else recognized from its graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from trt_yolov6.data.preprocessing import Preprocessing
from trt_yolov6.detectors.layouts import class_count
from trt_yolov6.detectors.metadata import names_in
from trt_yolov6.detectors.recognition import GraphFacts, recognize
from trt_yolov6.engines.base import LoadOptions
from trt_yolov6.engines.manifest import Manifest
from trt_yolov6.errors import UserError
from trt_yolov6.spec import OutputLayout, TensorSpec


@dataclass(frozen=True)
class Reading:
    """Decoding of an engine's outputs and preprocessing of its images."""

    decoder: str
    layout: OutputLayout
    preprocessing: Preprocessing


def reading_of(
    manifest: Manifest | None, options: LoadOptions, path: Path, facts: Callable[[], GraphFacts]
) -> Reading:
    """Return how to use an engine: as its manifest says, else as its graph lets recognize.

    Args:
        manifest: what `build` wrote, if anything.
        options: a decoder for an engine without a manifest, and changes to the pre-processing.
        path: of the engine, for messages.
        facts: called where there is no manifest.

    Raises:
        UserError: see `detectors.recognition.recognize`, or the manifest says otherwise.
    """
    if manifest is None:
        family, layout = recognize(facts(), path, options.decoder)
        reading = Reading(family.name, layout, family.preprocessing)
    else:
        if options.decoder not in (None, manifest.decoder):
            raise UserError(
                f"{path} was built as {manifest.decoder}, not {options.decoder}; leave `decoder` "
                "out, or build it again with it.",
                "decoder",
            )
        reading = Reading(manifest.decoder, manifest.output_layout, manifest.preprocessing)
    return replace(reading, preprocessing=reading.preprocessing.with_changes(options.preprocess))


def class_names_of(
    outputs: Sequence[TensorSpec],
    layout: OutputLayout,
    manifest: Manifest | None,
    metadata: Mapping[str, str] | None = None,
) -> tuple[str, ...]:
    """Return the class names of the manifest, else of the metadata, else `class_0`, `class_1` …"""
    if manifest:
        return manifest.class_names
    count = class_count(outputs, layout)
    names = names_in(metadata or {})
    if names is not None and count in (None, len(names)):
        return names
    return tuple(f"class_{index}" for index in range(count or 0))
