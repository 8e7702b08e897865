"""`doctor`: which backends work here."""

from __future__ import annotations

import argparse

from trt_yolov6.cli import options as common
from trt_yolov6.cli.output import say_next, write_result


def add(commands: common.Commands) -> None:
    """Add the command to the parser."""
    text = "report which backends work here, and what the others need"
    parser = common.add_command(commands, "doctor", run, text)
    common.add_json(parser)
    common.add_quiet(parser)


def run(options: argparse.Namespace) -> None:
    """Do what the options ask."""
    from trt_yolov6.diagnostics.doctor import diagnose, format_diagnosis

    result = diagnose()
    print(format_diagnosis(result))
    if options.json:
        write_result(options.json, result.to_json())
    if common.SAMPLE_WEIGHTS.is_file():
        say_next(options, "an engine of the sample", "build")
    else:
        say_next(options, "an engine", "build", "--weights", "FILE.pt")
