"""`inspect`: what an engine, ONNX file or checkpoint is."""

from __future__ import annotations

import argparse
from pathlib import Path

from trt_yolov6.checkpoints import is_named_as_checkpoint
from trt_yolov6.cli import options as common
from trt_yolov6.cli.engines import resolved
from trt_yolov6.cli.output import say_next, write_result


def add(commands: common.Commands) -> None:
    """Add the command to the parser."""
    parser = common.add_command(
        commands, "inspect", run, "describe an engine, ONNX file or checkpoint"
    )
    parser.add_argument(
        "file", type=Path, metavar="FILE", help="engine, ONNX file, checkpoint or TensorRT plan"
    )
    parser.add_argument("--layers", action="store_true", help="list every layer")
    common.add_json(parser)
    common.add_quiet(parser)


def run(options: argparse.Namespace) -> None:
    """Do what the options ask."""
    from trt_yolov6.diagnostics.inspection import inspect_file
    from trt_yolov6.diagnostics.inspection_text import format_inspection

    file = resolved(options.file)
    result = inspect_file(file)
    print(format_inspection(result, layers=options.layers))
    if options.json:
        write_result(options.json, result.to_json())
    say_next(options, *_next(file))


def _next(file: Path) -> tuple[str, str, str, Path]:
    """Return the next step for a file of its kind, and the words of its command."""
    if is_named_as_checkpoint(file):
        return "an engine of it", "build", "--weights", file
    return "its speed", "bench", "--engine", file
