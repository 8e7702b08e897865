"""`infer`: boxes drawn on pictures, folders and videos."""

from __future__ import annotations

import argparse
import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from trt_yolov6.cli.engines import load, newest_engine, thresholds
from trt_yolov6.cli.options import (
    Commands,
    add_border,
    add_command,
    add_loading,
    add_thresholds,
    positive,
)
from trt_yolov6.cli.output import say, say_next


def add(commands: Commands) -> None:
    """Add the command to the parser."""
    parser = add_command(commands, "infer", run, "detect objects in a picture, a folder or a video")
    parser.add_argument("--engine", type=Path, help="default: the newest in engines/")
    parser.add_argument(
        "--source",
        required=True,
        help="picture, folder, video, 'glob*', http:// or rtsp:// address, or a camera's number",
    )
    parser.add_argument(
        "--format",
        nargs="+",
        choices=("json", "csv", "yolo"),
        default=["json"],
        help="of what was found (json)",
    )
    parser.add_argument(
        "--frames", type=positive, metavar="N", help="of a video or stream: end then"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/infer"), help="(runs/infer)")
    parser.add_argument("--batch", type=positive, help="images at a time")
    add_border(parser)
    add_thresholds(parser, confidence=0.4)
    add_loading(parser)


def run(options: argparse.Namespace) -> None:
    """Do what the options ask."""
    from trt_yolov6.data.letterbox import resolve_border
    from trt_yolov6.runtime.annotate import infer_source
    from trt_yolov6.runtime.predict import default_nms

    with load(options.engine or newest_engine(), options) as engine, _stopped_by_ctrl_c() as stop:
        summary = infer_source(
            engine,
            options.source,
            options.output,
            formats=options.format,
            frames=options.frames,
            stop=stop,
            nms=thresholds(options, default_nms(engine)),
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
    for path in summary.files:
        print(f"{path}: the detections")
    say_next(options, "its AP on labelled images", f"eval --engine {engine.path} --data DATA")


@contextlib.contextmanager
def _stopped_by_ctrl_c() -> Iterator[Callable[[], bool]]:
    """Yield what says whether Ctrl-C was pressed, so that a video or stream ends whole.

    Where nobody asks, as with pictures, and when it is pressed again, it interrupts.
    """
    pressed = asked = False

    def note(number: int, frame: object) -> None:
        nonlocal pressed
        if pressed or not asked:
            raise KeyboardInterrupt
        pressed = True

    def stop() -> bool:
        nonlocal asked
        asked = True
        return pressed

    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may handle signals
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
