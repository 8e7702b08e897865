"""`sensitivity`: which layers INT8 costs most in."""

from __future__ import annotations

import argparse
from pathlib import Path

from trt_yolov6.cli import options as common
from trt_yolov6.cli.graphs import calibration_folder, calibration_settings, weights_or_sample
from trt_yolov6.cli.output import say, say_next, write_result
from trt_yolov6.errors import UserError


def add(commands: common.Commands) -> None:
    """Add the command to the parser."""
    parser = common.add_command(
        commands, "sensitivity", run, "rank layers by their sensitivity to INT8"
    )
    common.add_checkpoint_or_onnx(parser, "a detector's float ONNX file")
    common.add_image_size(parser)
    parser.add_argument(
        "--metric",
        choices=("mse", "snr", "cosine", "ap"),
        default="snr",
        help="error at each layer's output, or the AP with only that layer in INT8 (snr)",
    )
    common.add_decoder(parser)
    common.add_calibration(parser, "minmax")
    text = "labelled data for AP (agreement with the float network instead)"
    common.add_data(parser, text)
    parser.add_argument(
        "--report",
        action="store_true",
        help="also report the AP with each metric's six most sensitive layers in float (by ap only "
        "with --metric ap, which evaluates one graph per layer)",
    )
    parser.add_argument(
        "--top", type=common.positive, default=12, help="number of layers to print (12)"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw a bar chart")
    common.add_json(parser)
    common.add_quiet(parser)


def run(options: argparse.Namespace) -> None:
    """Do what the options ask."""
    from trt_yolov6.data.sources import check_source
    from trt_yolov6.pipeline import export, labelled_score
    from trt_yolov6.quantization.metrics import MEANING, direction
    from trt_yolov6.quantization.pipeline import calibrate
    from trt_yolov6.quantization.sensitivity import check_chart, write_chart
    from trt_yolov6.runtime.sensitivity_report import fallback_report, measure

    if options.plot:
        check_chart(options.plot)
    if options.data is None and options.split is not None:
        raise UserError("--split is part of a data set; name that with --data.")
    if options.data is not None:
        check_source(options.data, options.split)
        if options.metric != "ap" and not options.report:
            raise UserError("--data is for --metric ap and --report; add one of them.")
    graph = export(
        options.onnx or weights_or_sample(options.weights),
        image_size=options.image_size,
        decoder=options.decoder,
        preprocess=common.preprocess_changes(options) or None,
    )
    settings = calibration_settings(options)
    calibrated = calibrate(graph, calibration_folder(options.calibration), settings)
    score = labelled_score(graph, options.data, options.split)
    result = measure(graph, calibrated, options.metric, score)
    print(f"{options.metric}: {MEANING[options.metric]}; {direction(options.metric)}, first")
    for name, value in result.layers[: options.top]:
        print(f"{value:12.5g}  {name}")
    if len(result.layers) > options.top:
        print(f"{'...':>12}  {len(result.layers) - options.top} more, less sensitive")
    if options.report:
        by_ap = result if result.metric == "ap" else None
        print(fallback_report(graph, calibrated, score, by_ap=by_ap))
    if options.json:
        write_result(options.json, result.to_json())
    if options.plot:
        write_chart(result, options.plot)
        say(f"{options.plot}: drawn")
    source = ("--onnx", options.onnx) if options.onnx else ("--weights", graph.source)
    kept = ["--float-layers", min(6, len(result.layers))]
    if options.calibration:
        kept += ["--calib", options.calibration]
    say_next(options, "without the most sensitive", "build", "--int8", *source, *kept)
