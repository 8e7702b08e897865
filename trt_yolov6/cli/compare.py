"""`compare`: which detector, at which precision, is best for its latency here; and the gate."""

from __future__ import annotations

import argparse
from pathlib import Path

from trt_yolov6.cli import options as common
from trt_yolov6.cli.output import say_next, width

DEFAULT_OUTPUT = Path("runs/compare")

_LIMITS = ("max_slowdown", "max_ap_drop", "strict", "other_device")

_PLAN = (
    *("precisions", "batches", "backends", "image_size", "data", "split", "calibration"),
    *("calibrator", "rounds", "duration", "layers", "examples", "confidence", "iou"),
    *("max_detections", "border", "threads", "provider"),
)


def add(commands: common.Commands) -> None:
    """Add the command to the parser."""
    text = "compare detectors at several precisions and batch sizes: AP, latency, layers"
    parser = common.add_command(commands, "compare", run, text)
    parser.description = (
        f"{text[0].upper()}{text[1:]}. Continues an interrupted comparison in --output; what has "
        "not changed is not measured again."
    )
    parser.epilog = f"{parser.epilog} Exit code: 0 done, 1 the gate failed, 2 wrong usage or input."
    parser.add_argument(
        "models",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="checkpoints, ONNX files and engines, or one plan (.yaml)",
    )
    parser.add_argument(
        "--precisions",
        type=_texts,
        metavar="P,...",
        help="fp32, fp16, int8 or fp8; the last two with +fp16 for the rest, and :K or :auto for "
        "layers kept in float (fp32)",
    )
    parser.add_argument("--batches", type=_numbers, metavar="N,...", help="batch sizes (1,32)")
    parser.add_argument(
        "--backends",
        type=_texts,
        metavar="B,...",
        help="backends, such as tensorrt,onnxruntime (auto: the best one that works here)",
    )
    text = "input size in pixels of what is built (that of the training, or the ONNX file's own)"
    common.add_image_size(parser, text)
    common.add_data(parser)
    parser.add_argument(
        "--calib",
        dest="calibration",
        type=Path,
        metavar="DIR",
        help="calibration images (calib/)",
    )
    parser.add_argument("--calibrator", choices=common.CALIBRATORS, help="calibrator (auto)")
    parser.add_argument(
        "--output",
        type=Path,
        default=DEFAULT_OUTPUT,
        metavar="DIR",
        help=f"folder to write to ({DEFAULT_OUTPUT})",
    )
    parser.add_argument(
        "--again", action="store_true", help="measure latencies again, though they are there"
    )
    common.add_quiet(parser)
    _add_measuring(parser)
    _add_gate(parser)


def _add_measuring(parser: argparse.ArgumentParser) -> None:
    how = parser.add_argument_group("measurement")
    how.add_argument(
        "--rounds", type=common.positive, help="rounds over all engines, at least 3 (8)"
    )
    how.add_argument(
        "--duration",
        type=float,
        metavar="SECONDS",
        help="time of each engine at each batch size, all rounds together (10)",
    )
    how.add_argument(
        "--no-layers",
        dest="layers",
        action="store_const",
        const=False,
        help="do not time layers",
    )
    how.add_argument("--examples", type=int, help="images kept for the report (3)")
    common.add_thresholds(how)
    how.add_argument("--border", type=int, help="gray pixels on each side of an image (0)")
    common.add_session(how)


def _add_gate(parser: argparse.ArgumentParser) -> None:
    gate = parser.add_argument_group("gate")
    gate.add_argument(
        "--baseline", type=Path, help="results.json of an earlier comparison, or its folder"
    )
    gate.add_argument(
        "--max-slowdown",
        type=common.percent,
        metavar="PERCENT",
        help="fail if a latency has certainly grown by more (3%%)",
    )
    gate.add_argument(
        "--max-ap-drop",
        type=float,
        metavar="POINTS",
        help="fail if an AP has fallen by more points, hundredths of AP (0.2)",
    )
    gate.add_argument(
        "--strict", action="store_true", help="fail also where noise leaves it undecided"
    )
    gate.add_argument(
        "--allow-other-device",
        dest="other_device",
        action="store_true",
        help="accept a baseline from another device",
    )


def run(options: argparse.Namespace) -> int:
    """Compare, print the results and, with a baseline, the gate's verdict."""
    from trt_yolov6.api import compare
    from trt_yolov6.comparison.gate import Limits, check, format_verdict
    from trt_yolov6.comparison.plan import plan_of
    from trt_yolov6.comparison.results import FILE, read_results
    from trt_yolov6.comparison.run import side_by_side
    from trt_yolov6.comparison.summary import format_results

    if options.baseline is None:
        common.refuse(options, _LIMITS, "belongs to --baseline; add it.")
    plan = plan_of(options.models, **common.chosen(options, *_PLAN))
    limits = Limits(**common.chosen(options, *_LIMITS))
    # Read first: the comparison may write to where it lies.
    baseline = read_results(options.baseline) if options.baseline else None
    results = compare(
        plan,
        options.output,
        again=options.again,
        baseline=baseline,
        other_device=limits.other_device,
        progress=not options.quiet,
    )
    print(format_results(results, width()))
    print(f"{options.output / FILE}: written")
    if baseline is None:
        say_next(options, "as a page", "report", options.output)
        return 0
    folder = options.baseline if options.baseline.is_dir() else options.baseline.parent
    paired = side_by_side(
        results, options.output, baseline, folder, plan, progress=not options.quiet
    )
    verdict = check(results, baseline, limits, paired=paired)
    print(format_verdict(verdict))
    say_next(options, "as a page", "report", options.output)
    return 0 if verdict.ok else 1


def _texts(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(text: str) -> tuple[int, ...]:
    parts = _texts(text)
    if not parts:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers above 0")
    return tuple(common.positive(part) for part in parts)
