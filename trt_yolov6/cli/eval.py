"""`eval`: COCO average precision."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from trt_yolov6.cli import options as common
from trt_yolov6.cli.engines import load, newest_engine, predict_options, ray_options, resolved
from trt_yolov6.cli.output import say, say_next, write_result
from trt_yolov6.common.files import check_writable
from trt_yolov6.common.text import counted
from trt_yolov6.errors import UserError

if TYPE_CHECKING:
    from trt_yolov6.runtime.evaluate import Evaluation


def add(commands: common.Commands) -> None:
    """Add the command to the parser."""
    parser = common.add_command(commands, "eval", run, "measure COCO average precision")
    parser.add_argument("--engine", type=Path, help="engine (the newest in engines/)")
    common.add_data(parser)
    parser.add_argument("--batch", type=common.positive, help="images per batch (up to 8)")
    parser.add_argument(
        "--workers",
        type=common.positive,
        help="threads that decode images (one per core, at most 16)",
    )
    parser.add_argument(
        "--plots", type=Path, metavar="DIR", help="write PR curves and a confusion matrix there"
    )
    common.add_border(parser)
    common.add_thresholds(parser)
    common.add_loading(parser)
    common.add_machines(parser)
    common.add_json(parser)


def run(options: argparse.Namespace) -> None:
    """Do what the options ask."""
    from trt_yolov6.data.sources import check_source
    from trt_yolov6.runtime.evaluation_plots import write_plots

    options.data = common.or_sample(options.data, "--data", common.SAMPLE_DATA)
    check_source(options.data, options.split)
    if options.plots is not None:
        check_writable(options.plots / "pr-curves.png")
    path = resolved(options.engine or newest_engine())
    result = (_evaluated_here if options.address is None else _evaluated_on_ray)(options, path)
    for note in result.notes:
        say(f"note: {note}")
    several = options.gpus > 1 or options.address is not None
    print(_evaluation_text(result, several=several))
    if options.json:
        write_result(options.json, result.to_json())
    if options.plots and result.curves is not None and result.confusion is not None:
        for plot in write_plots(options.plots, result.class_names, result.curves, result.confusion):
            say(f"{plot}: drawn")
    say_next(options, "its speed", "bench", "--engine", path)


def _evaluated_here(options: argparse.Namespace, path: Path) -> Evaluation:
    from trt_yolov6 import api

    with load(path, options) as detector:
        return api.evaluate(
            detector,
            options.data,
            options.split,
            predict_options(options),
            confusion=options.plots is not None,
            progress=not options.quiet,
        )


def _evaluated_on_ray(options: argparse.Namespace, path: Path) -> Evaluation:
    from trt_yolov6.data.coco import load_coco
    from trt_yolov6.serving.ray.jobs import evaluate_on_ray

    if options.workers is not None:
        raise UserError(
            "--workers is not for --ray, where engines read with their --threads; leave it out."
        )
    return evaluate_on_ray(
        path,
        load_coco(options.data, options.split),
        ray_options(options),
        predict_options(options),
        confusion=options.plots is not None,
    )


def _evaluation_text(result: Evaluation, *, several: bool) -> str:
    """Return a result as text; the times of `several` engines are sums over all of them."""

    def ap(value: float | None) -> str:
        return "   n/a" if value is None else f"{value:6.4f}"

    seconds = result.seconds
    of = (
        "summed over engines" if several else f"{seconds.inference / result.wall_seconds:.0%} of it"
    )
    return "\n".join(
        [
            f"{result.engine} ({result.precision}, {result.backend}) on "
            f"{counted(result.images, 'image')}, {counted(result.detections, 'detection')}",
            f"  AP {ap(result.ap)}   AP50 {ap(result.ap50)}   AP75 {ap(result.ap75)}",
            f"  APs {ap(result.ap_small)}  APm {ap(result.ap_medium)}  APl {ap(result.ap_large)}",
            *(
                f"  AP {ap(value)}   {name}"
                for name, value in zip(result.class_names, result.per_class, strict=True)
            ),
            f"  {result.wall_seconds:.2f} s in all; inference {seconds.inference:.2f} s ({of}); in "
            f"parallel read {seconds.read:.2f}, pre-process "
            f"{seconds.preprocess:.2f}, post-process {seconds.postprocess:.2f}, COCO matching "
            f"{seconds.coco:.2f}; {seconds.tail:.2f} s after the last batch",
        ]
    )
