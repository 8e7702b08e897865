"""`report`: the results of comparisons as one page to look at, and as Markdown and CSV."""

from __future__ import annotations

import argparse
from pathlib import Path

from trt_yolov6.cli import options as common
from trt_yolov6.cli.output import say_next

DEFAULT_OUTPUT = Path("report.html")


def add(commands: common.Commands) -> None:
    """Add the command to the parser."""
    text = "write the results of `compare` as a page (HTML), Markdown or CSV"
    parser = common.add_command(commands, "report", run, text)
    parser.add_argument(
        "results",
        type=Path,
        nargs="+",
        metavar="RESULTS",
        help="folders or results.json of `compare`, and files of `sensitivity --json`",
    )
    parser.add_argument(
        "--output",
        type=Path,
        nargs="+",
        action="extend",
        metavar="FILE",
        help=f"one or several files, ending in .html, .md or .csv ({DEFAULT_OUTPUT})",
    )
    parser.add_argument("--title", default="", help="title of the page")
    common.add_quiet(parser)


def run(options: argparse.Namespace) -> None:
    """Read everything, then write each form."""
    from trt_yolov6.reports.material import read_material
    from trt_yolov6.reports.write import check_form, write_report

    material = read_material(options.results)
    outputs = options.output or [DEFAULT_OUTPUT]
    for path in outputs:
        check_form(path)
    for path in outputs:
        write_report(material, path, options.title)
        print(f"{path}: written, {path.stat().st_size / 1024:.0f} KiB")
    first = material.comparisons[0]
    say_next(options, "a comparison with it", "compare", "...", "--baseline", first.path)
