"""`infer`: boxes drawn on pictures, folders and videos."""

from __future__ import annotations

import argparse
from pathlib import Path

from trt_yolov6.cli.engines import load, newest_engine, nms_settings
from trt_yolov6.cli.options import (
    Commands,
    add_border,
    add_command,
    add_loading,
    add_thresholds,
    positive,
)
from trt_yolov6.cli.output import say


def add(commands: Commands) -> None:
    """Add the command to the parser."""
    parser = add_command(commands, "infer", run, "detect objects in a picture, a folder or a video")
    parser.add_argument("--engine", type=Path, help="default: the newest in engines/")
    parser.add_argument("--source", type=Path, required=True, help="picture, folder or video")
    parser.add_argument("--output", type=Path, default=Path("runs/infer"), help="(runs/infer)")
    parser.add_argument("--batch", type=positive, help="images at a time")
    add_border(parser)
    add_thresholds(parser, confidence=0.4)
    add_loading(parser)


def run(options: argparse.Namespace) -> None:
    """Do what the options ask."""
    from trt_yolov6.data.letterbox import resolve_border
    from trt_yolov6.inference import infer_source

    with load(options.engine or newest_engine(), options) as engine:
        summary = infer_source(
            engine,
            options.source,
            options.output,
            nms=nms_settings(options),
            border=resolve_border(options.resize, options.border, engine.image_size),
            batch=options.batch,
            progress=not options.quiet,
        )
    for _, reason in summary.failures:
        say(f"skipped: {reason}")
    for warning in summary.warnings:
        say(f"warning: {warning}")
    shown = summary.outputs[0] if len(summary.outputs) == 1 else options.output
    print(
        f"{summary.objects} objects in {summary.images} images, "
        f"{summary.inference_seconds / max(summary.images, 1) * 1e3:.1f} ms an image in the engine"
    )
    print(f"{shown}: drawn")
    print(f"{summary.detections_file}: the detections")
