"""`infer`: boxes drawn on images, folders and videos."""

from __future__ import annotations

import argparse
import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from trt_yolov6.cli import options as common
from trt_yolov6.cli.engines import load, newest_engine, predict_options, ray_options, resolved
from trt_yolov6.cli.output import say, say_next
from trt_yolov6.common.text import counted
from trt_yolov6.errors import UserError

_FILES = ("json", "csv", "yolo")
_PARTS = ("jsonl", "parquet")
_SHOWN_FAILURES = 20


def add(commands: common.Commands) -> None:
    """Add the command to the parser."""
    parser = common.add_command(commands, "infer", run, "detect objects in images and videos")
    parser.add_argument("--engine", type=Path, help="engine (the newest in engines/)")
    parser.add_argument(
        "--source",
        required=True,
        help="image, folder, video, 'glob*', http:// or rtsp:// address, or a camera's number; "
        "with --ray also a list of them (.txt), or an address such as s3://bucket/folder",
    )
    parser.add_argument(
        "--format",
        dest="formats",
        nargs="+",
        action="extend",
        choices=(*_FILES, *_PARTS),
        help="format of the detections (json); with --ray jsonl or parquet (jsonl)",
    )
    parser.add_argument(
        "--frames", type=common.positive, help="stop a video or stream after N frames (all)"
    )
    parser.add_argument(
        "--output",
        default="runs/infer",
        metavar="DIR",
        help="folder to write to (runs/infer); with --ray also an address",
    )
    parser.add_argument("--batch", type=common.positive, help="images per batch (up to 8)")
    common.add_border(parser)
    common.add_thresholds(parser, confidence=0.4)
    common.add_loading(parser)
    common.add_machines(parser)


def run(options: argparse.Namespace) -> None:
    """Do what the options ask."""
    taken, where = (_FILES, "without") if options.address is None else (_PARTS, "with")
    for form in options.formats or ():
        if form not in taken:
            raise UserError(f"--format {form} is not written {where} --ray; give {_or(taken)}.")
    if options.address is None:
        _infer_here(options)
    else:
        _infer_on_ray(options)


def _or(words: tuple[str, ...]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"


def _infer_here(options: argparse.Namespace) -> None:
    with load(options.engine or newest_engine(), options) as detector, _stopped_by_ctrl_c() as stop:
        summary = detector.annotate(
            options.source,
            options.output,
            predict_options(options),
            formats=options.formats or ["json"],
            frames=options.frames,
            stop=stop,
            progress=not options.quiet,
        )
    for _, reason in summary.failures:
        say(f"skipped: {reason}")
    for warning in summary.warnings:
        say(f"warning: {warning}")
    shown = summary.outputs[0] if len(summary.outputs) == 1 else options.output
    print(
        f"{counted(summary.objects, 'object')} in {counted(summary.images, 'image')}, "
        f"{summary.inference_seconds / max(summary.images, 1) * 1e3:.1f} ms an image in the engine"
    )
    print(f"{shown}: drawn")
    for path in summary.files:
        print(f"{path}: the detections")
    engine = detector.engine.path
    say_next(options, "its AP on labelled images", "eval", "--engine", engine, "--data", "DATA")


def _infer_on_ray(options: argparse.Namespace) -> None:
    from trt_yolov6.serving.ray.jobs import infer_on_ray

    if options.frames is not None:
        raise UserError("--frames is for videos, which --ray does not take; leave one of them out.")
    if len(options.formats or ()) > 1:
        raise UserError("--ray writes one --format; give jsonl or parquet.")
    engine = resolved(options.engine or newest_engine())
    summary = infer_on_ray(
        engine,
        options.source,
        options.output,
        ray_options(options),
        predict_options(options),
        form=(options.formats or ["jsonl"])[0],
    )
    if summary.done_before:
        say(f"done already: {counted(summary.done_before, 'image')}")
    for _, reason in summary.failures[:_SHOWN_FAILURES]:
        say(f"skipped: {reason}")
    more = len(summary.failures) - _SHOWN_FAILURES
    if more > 0:
        say(f"and {more} more, see failures.jsonl")
    for warning in summary.warnings:
        say(f"warning: {warning}")
    count = 0 if summary.actors is None else summary.actors.count
    by = f" by {counted(count, 'engine')}" if count else ""
    print(
        f"{counted(summary.objects, 'object')} in {counted(summary.images, 'image')}{by}, "
        f"{summary.wall_seconds:.1f} s in all"
    )
    print(f"{summary.output}: the detections, in {counted(summary.parts, 'part')}")
    data = "--data", "DATA", "--ray", "..."
    say_next(options, "its AP on labelled images", "eval", "--engine", engine, *data)


@contextlib.contextmanager
def _stopped_by_ctrl_c() -> Iterator[Callable[[], bool]]:
    """Yield what says whether Ctrl-C was pressed, so that a video or stream ends whole.

    Where nobody asks, as with images, and when it is pressed again, it interrupts.
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
