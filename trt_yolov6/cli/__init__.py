"""The commands, one module each: parsing and printing only. The work is done by what they call.

Nothing heavy is imported before a command runs, so that `--help` answers at once.

A command's module has `add`, which adds it to the parser, and `run`, which is called with its
options. `options` holds what several have in common, `graphs` and `engines` turn options into
values, `output` prints.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from trt_yolov6 import __version__
from trt_yolov6.cli import (
    bench,
    build,
    compare,
    doctor,
    eval,
    export,
    export_triton,
    infer,
    inspect,
    qat,
    report,
    sensitivity,
    train,
)
from trt_yolov6.cli.options import Parser, option_names
from trt_yolov6.cli.output import check_json, log_shown
from trt_yolov6.errors import UserError

_COMMANDS = (
    build,
    export,
    bench,
    eval,
    infer,
    compare,
    report,
    sensitivity,
    train,
    qat,
    export_triton,
    inspect,
    doctor,
)
"""Commands in the order in which `--help` lists them."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0 done, 1 a comparison fell short of its baseline, 2 wrong usage or bad input, 130 interrupted.
    """
    _prepare_streams()
    options = parser().parse_args(arguments)

    def refused(message: str, code: int = 2) -> int:
        print(f"trt-yolov6 {options.command}: {message}", file=sys.stderr)
        return code

    run: Callable[[argparse.Namespace], int | None] = options.run
    try:
        check_json(getattr(options, "json", None))
        with log_shown():
            code = run(options)
        sys.stdout.flush()
    except UserError as error:
        return refused(error.with_names(option_names(options.parser)))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if not package or package == "trt_yolov6":
            raise
        return refused(
            f"this needs the Python package {package}, which is not installed; `trt-yolov6 doctor` "
            "says how to get it."
        )
    except BrokenPipeError:
        # The reader (`| head`) has gone; Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        # The system's own word on a file: a name too long, a disk that is gone.
        place = error.filename if isinstance(error.filename, str) else "a file"
        reason = error.strerror or error
        return refused(f"{place[:200]} cannot be used ({reason}); check the path and the disk.")
    except KeyboardInterrupt:
        return refused("interrupted", 130)
    except Exception as error:
        # Ctrl-C in the middle of an import leaves half a module, on which cleaning up can fail.
        if not isinstance(error.__context__, KeyboardInterrupt):
            raise
        return refused("interrupted", 130)
    return code or 0


def _prepare_streams() -> None:
    """Print characters outside the terminal's encoding as escapes; print nowhere if closed."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # `>&-`; the next file would get its number
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        # What a test or a notebook puts in their place need not have it.
        reconfigure = getattr(getattr(sys, name), "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    whole = Parser(
        prog="trt-yolov6",
        description="From a trained YOLOv6 checkpoint to an engine of measured speed and accuracy.",
        epilog="To begin: doctor, build, eval, bench, infer. Options: trt-yolov6 COMMAND --help.",
    )
    whole.add_argument("--version", action="version", version=f"trt-yolov6 {__version__}")
    commands = whole.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add(commands)
    return whole
