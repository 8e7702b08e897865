"""Options that several commands have, the types of their values, and default folders.

A parsed option has the name of the parameter that it sets (`dest`), so that settings are made of
the options that were `chosen`, and messages about parameters name options (`option_names`).
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from trt_yolov6.backends import BACKENDS, PLAN_SUFFIXES
from trt_yolov6.checkpoints import is_named_as_checkpoint
from trt_yolov6.cli.output import say
from trt_yolov6.errors import UserError, did_you_mean

SAMPLE_WEIGHTS = Path("samples/yolov6n_bccd.pt")
SAMPLE_DATA = Path("samples")
SAMPLE_IMAGES = SAMPLE_DATA / "images" / "val"
SAMPLE_CALIB = Path("calib")
CACHE_VERSION = "8.6.1"
CALIBRATORS = ("auto", "margin", "minmax", "entropy", "percentile", "mse")
ENGINE_SUFFIXES = {*(row.suffix for row in BACKENDS.values()), *PLAN_SUFFIXES}

Commands: TypeAlias = "argparse._SubParsersAction[Any]"
"""Group of the command line's commands, for `add_parser`."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line and suggest what was probably meant."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}{self._nearest(message)}; see {self.prog} --help\n")

    def parse_args(self, arguments: Any = None, namespace: Any = None) -> Any:
        """Parse; an unknown option is reported with the command's own help."""
        words = sys.argv[1:] if arguments is None else arguments
        options, unknown = self.parse_known_args(words, namespace)
        parser = getattr(options, "parser", self)
        if unknown:
            parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        # As a path it would be the working directory.
        for before, word in zip(["", *words], words, strict=False):
            if not word or re.fullmatch(r"--[\w-]+=", word):
                parser.error(
                    f"{word[:-1] or before} has an empty value: an unset variable, perhaps"
                )
        return options

    def _nearest(self, message: str) -> str:
        """Suggest the nearest option or choice for a misspelt word of an error."""
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        if unknown:
            return did_you_mean(unknown[1], self._option_string_actions)
        file = re.match(r"unrecognized arguments: ([^-]\S*)$", message)
        if file and (option := self._option_of(Path(file[1]))):
            return f"; give it as {option} {file[1]}"
        invalid = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        if invalid:
            return did_you_mean(invalid[1], re.split(r"[', ]+", invalid[2]))
        return ""

    def _option_of(self, file: Path) -> str | None:
        """Return the option of this command that takes a file of that kind."""
        if is_named_as_checkpoint(file):
            kinds = ["--weights"]
        elif file.suffix in ENGINE_SUFFIXES:
            kinds = ["--engine", "--onnx"] if file.suffix == ".onnx" else ["--engine"]
        else:  # a folder, which is a data set where no other folder is asked for
            kinds = [] if "--calib" in self._option_string_actions else ["--data"]
        return next((kind for kind in kinds if kind in self._option_string_actions), None)


class _Help(argparse.HelpFormatter):
    """Help that names values by their type or option, not by the parameter that they set."""

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        named: dict[Any, str] = {positive: "N", int: "N", float: "X", Path: "FILE"}
        return named.get(action.type) or action.option_strings[0].rpartition("-")[2].upper()


def add_command(
    commands: Commands, name: str, run: Callable[[argparse.Namespace], object], text: str
) -> argparse.ArgumentParser:
    """Add a command that calls `run` with its options.

    `run` returns None when it has done what was asked, or an exit code.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog="Defaults are in parentheses.",
        formatter_class=_Help,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run, parser=parser)
    return parser


def add_graph_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the graph that a checkpoint is exported to."""
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument("--fp32", action="store_true", help="single precision (default)")
    precision.add_argument("--fp16", action="store_true", help="half precision")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--batch", type=positive, help="fixed batch size")
    add_dynamic(
        size, "batch", "smallest batch size, the one to tune for, and the largest (1,32,32)"
    )
    add_image_size(parser)
    add_ends(parser)
    parser.add_argument(
        "--conf", dest="confidence", type=float, help="confidence threshold of --end2end (0.03)"
    )
    parser.add_argument("--iou", type=float, help="IoU threshold of --end2end (0.65)")
    parser.add_argument("--opset", type=int, help="ONNX opset, 17 or later (18)")


def add_dynamic(parser: argparse._ActionsContainer, dest: str, text: str) -> None:
    """Add --dynamic."""
    parser.add_argument(
        "--dynamic", dest=dest, type=three_numbers, metavar="MIN,OPT,MAX", help=text
    )


def add_checkpoint_or_onnx(parser: argparse.ArgumentParser, onnx: str) -> None:
    """Add --weights and --onnx, one of which may be given."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--weights", type=Path, metavar="FILE.pt", help="YOLOv6 checkpoint")
    source.add_argument("--onnx", type=Path, help=onnx)


def add_data(
    parser: argparse._ActionsContainer, text: str = "data set: a folder or data.yaml (samples/)"
) -> None:
    """Add --data and --split."""
    parser.add_argument("--data", type=Path, metavar="DIR", help=text)
    parser.add_argument("--split", help="part of the data set (the only one; else val or val2017)")


def add_image_size(
    parser: argparse._ActionsContainer,
    text: str = "input size, a multiple of 32 (`train`'s; the authors' 640, P6 1280, Lite 320)",
) -> None:
    """Add --imgsz."""
    parser.add_argument("--imgsz", dest="image_size", type=image_size, metavar="N|HxW", help=text)


def add_ends(parser: argparse._ActionsContainer) -> None:
    """Add the steps that may come before and after the network in its graph."""
    parser.add_argument("--end2end", action="store_true", help="put NMS into the graph")
    parser.add_argument(
        "--uint8-input", action="store_true", help="take uint8 RGB pixels, normalize in the graph"
    )


def add_calibration(parser: argparse._ActionsContainer, calibrator: str = "auto") -> None:
    """Add the choice of calibration images and calibrator, of which one is the default."""
    parser.add_argument(
        "--calib", dest="calibration", type=Path, metavar="DIR", help="calibration images (calib/)"
    )
    parser.add_argument(
        "--calibrator",
        choices=CALIBRATORS,
        default=calibrator,
        help=f"auto: the one that moves the float network's detections least ({calibrator})",
    )
    parser.add_argument(
        "--calib-images",
        dest="image_limit",
        type=positive,
        help="use N of the calibration images, evenly spread (all)",
    )
    parser.add_argument(
        "--no-equalize", dest="equalize", action="store_false", help="do not equalize channels"
    )


def add_float_layers(parser: argparse._ActionsContainer, text: str) -> None:
    """Add --float-layers."""
    parser.add_argument("--float-layers", type=layers_in_float, metavar="K|auto|NAMES", help=text)


def add_cache(parser: argparse._ActionsContainer, text: str) -> None:
    """Add the calibration cache to write, and the release that reads it."""
    parser.add_argument("--calibration-cache", type=Path, help=text)
    parser.add_argument(
        "--cache-version",
        metavar="X.Y.Z",
        help=f"TensorRT release that reads the cache ({CACHE_VERSION})",
    )


def add_backend(parser: argparse.ArgumentParser) -> None:
    """Add --backend."""
    parser.add_argument(
        "--backend",
        default="auto",
        choices=("auto", *BACKENDS),
        help="backend (auto: the best one that works here)",
    )


def add_session(parser: argparse._ActionsContainer) -> None:
    """Add the options of ONNX Runtime's sessions."""
    parser.add_argument(
        "--threads", type=positive, help="CPU threads of ONNX Runtime (one per core)"
    )
    parser.add_argument(
        "--provider",
        choices=("cpu", "cuda", "tensorrt"),
        help="ONNX Runtime execution provider (the best that works here)",
    )


def add_loading(parser: argparse.ArgumentParser) -> None:
    """Add the options of running an engine."""
    add_backend(parser)
    add_session(parser)
    parser.add_argument(
        "--no-cuda-graph",
        dest="cuda_graph",
        action="store_false",
        help="TensorRT: launch kernels one by one, without CUDA graphs",
    )
    add_decoder(parser)
    add_quiet(parser)


def add_machines(parser: argparse.ArgumentParser) -> None:
    """Add --gpus and --ray."""
    parser.add_argument(
        "--gpus", type=positive, default=1, help="TensorRT: number of GPUs to use (1)"
    )
    parser.add_argument(
        "--ray",
        dest="address",
        metavar="ADDRESS",
        help="run on a Ray cluster: host:port of its head, auto on one of its machines, or local; "
        "one engine per GPU, or per --threads cores",
    )


def add_decoder(parser: argparse.ArgumentParser) -> None:
    """Add the options of other families' detectors."""
    group = parser.add_argument_group("detectors of other families (ONNX files without a manifest)")
    group.add_argument(
        "--decoder",
        metavar="FAMILY",
        help="yolov6, yolov5, yolov7, yolox, ppyoloe, ppyoloe-plus, or yolov8 for v8 and later "
        "(recognized from the graph, unless that is ambiguous)",
    )
    group.add_argument(
        "--preprocess",
        nargs="+",
        action="extend",
        metavar="FIELD=VALUE",
        help="changes to the family's preprocessing: fit=letterbox|corner|stretch, "
        "interpolation=area|linear|cubic, colour=rgb|bgr, mean=R,G,B and std=R,G,B in 0..255",
    )


def preprocess_changes(options: argparse.Namespace) -> dict[str, Any]:
    """Return the changes of --preprocess: fields of `Preprocessing` by name."""
    from trt_yolov6.data.preprocessing import parse_changes

    return parse_changes(options.preprocess or ())


def add_training(parser: argparse.ArgumentParser, output: str) -> None:
    """Add the options of any training's data and run; `output` is the default folder."""
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="data set: a folder or data.yaml; required"
    )
    parser.add_argument("--split", dest="train_split", help="split to train on (train)")
    parser.add_argument("--val-split", help="split to evaluate on, or none (val)")
    parser.add_argument(
        "--bad-data",
        dest="on_bad_data",
        choices=("refuse", "skip"),
        help="faulty images and annotations: report them and stop, or skip them (refuse)",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help=f"folder of the run ({output})")
    parser.add_argument(
        "--resume", action="store_true", help="continue the interrupted training in --output"
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N (a GPU if there is one)")


def check_training_data(options: argparse.Namespace) -> None:
    """Refuse a --data that is not a data set, before importing PyTorch, which takes seconds."""
    from trt_yolov6.data.sources import check_source

    if options.data is None:
        raise UserError("--data is missing; name a data set in COCO, YOLO or VOC layout.")
    check_source(options.data, options.train_split or "train")
    if options.val_split != "none":
        check_source(options.data, options.val_split, "val_split")


def add_quiet(parser: argparse.ArgumentParser) -> None:
    """Add --quiet."""
    parser.add_argument(
        "--quiet", action="store_true", help="no progress bar and no hint at the next step"
    )


def add_thresholds(parser: argparse._ActionsContainer, confidence: float = 0.03) -> None:
    """Add the thresholds of NMS; `confidence` is the default that the help gives."""
    parser.add_argument(
        "--conf", dest="confidence", type=float, help=f"confidence threshold ({confidence})"
    )
    parser.add_argument("--iou", type=float, help="IoU threshold of NMS (0.65)")
    parser.add_argument("--max-detections", type=positive, help="boxes to keep per image (300)")


def add_border(parser: argparse.ArgumentParser) -> None:
    """Add the size and the border of the letterbox."""
    parser.add_argument(
        "--resize",
        type=positive,
        help="side to resize images to; gray fills the rest (the input's, less twice --border)",
    )
    parser.add_argument(
        "--border", type=int, help="gray pixels on each side, such as 3 with --resize 634 (0)"
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add --json."""
    parser.add_argument("--json", type=Path, help="write the result as JSON")


_ALSO = {
    "backend": "backends",
    "border": "eval_border",
    "calibration": "calib",
    "image_size": "imgsz",
    "images": "source",
    "nms": "end2end",
    "split": "train_split",
    "state_file": "output",
}
"""Parameters that options of other names set too."""


def option_names(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Return the options of a command by the names of the parameters they set."""
    options: dict[str, str] = {}
    for action in parser._actions:
        if action.option_strings:
            options.setdefault(action.dest, action.option_strings[0])
    return {name: options[other] for name, other in _ALSO.items() if other in options} | options


def chosen(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Return the values of some options by name, without those left to their default, None."""
    values = {name: getattr(options, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def or_sample(given: Path | None, option: str, sample: Path) -> Path:
    """Return the path that an option gives, or else the sample's, and say so.

    Raises:
        UserError: none is given and the sample's is not here.
    """
    if given is not None:
        return given
    if not sample.exists():
        raise UserError(f"{option} is missing, and the sample's {sample} is not here; name yours.")
    say(f"no {option} given: taking the sample's {sample}")
    return sample


def refuse(options: argparse.Namespace, names: Iterable[str], why: str) -> None:
    """Raise UserError for the first of some options that was given; `why` follows its name."""
    for name in names:
        if getattr(options, name) != options.parser.get_default(name):
            raise UserError(f"{option_names(options.parser)[name]} {why}")


def percent(text: str) -> float:
    """Read a percentage: `5` or `5%`."""
    try:
        value = float(text.strip().removesuffix("%"))
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a percentage, such as 5%")
    return value


def positive(text: str) -> int:
    """Parse a whole number above 0."""
    value = int(text) if text.isascii() and text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return value


def layers_in_float(text: str) -> tuple[str, ...] | int | str:
    """Parse the value of --float-layers: `auto`, a number, or names."""
    if text == "auto":
        return text
    if text.isascii() and text.isdigit():
        return int(text)
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise argparse.ArgumentTypeError(f"{text!r} names no layer")
    return names


def three_numbers(text: str) -> tuple[int, ...]:
    """Parse three whole numbers above 0, with commas."""
    parts = text.split(",")
    if len(parts) != 3:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form MIN,OPT,MAX")
    return tuple(positive(part) for part in parts)


def image_size(text: str) -> tuple[int, int]:
    """Parse a side, or height and width: (height, width)."""
    sides = [positive(part) for part in text.lower().split("x")]
    if len(sides) > 2:
        raise argparse.ArgumentTypeError(f"{text!r} is neither N nor HEIGHTxWIDTH")
    return sides[0], sides[-1]
