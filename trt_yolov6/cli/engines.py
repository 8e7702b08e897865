"""Options turned into the engine that runs, and its thresholds."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from trt_yolov6.backends import ENGINES
from trt_yolov6.cli.options import ENGINE_SUFFIXES, chosen, preprocess_changes
from trt_yolov6.cli.output import say
from trt_yolov6.errors import UserError

if TYPE_CHECKING:
    from trt_yolov6.engines.base import LoadOptions
    from trt_yolov6.runtime.detector import Detector
    from trt_yolov6.serving.ray.jobs import RayOptions
    from trt_yolov6.spec import PredictOptions


def load(path: Path, options: argparse.Namespace) -> Detector:
    """Load a detector as the options say, and say what was found out of one without a manifest."""
    from trt_yolov6 import api

    detector = api.load(resolved(path), load_options(options), backend=options.backend)
    engine = detector.engine
    if engine.manifest is None:
        say(f"{path} has no manifest: {engine.detector}")
    if engine.dropped_outputs:
        from trt_yolov6.graph.outputs import dropped_text

        say(f"{path}: {dropped_text(engine.dropped_outputs)}")
    return detector


def load_options(options: argparse.Namespace) -> LoadOptions:
    """Return how the options want an engine loaded."""
    from trt_yolov6.engines.base import LoadOptions

    return LoadOptions(
        **chosen(options, "threads", "provider", "cuda_graph", "decoder"),
        preprocess=preprocess_changes(options),
    )


def ray_options(options: argparse.Namespace) -> RayOptions:
    """Return where and how the options want work on a cluster done."""
    from trt_yolov6.serving.ray.jobs import RayOptions

    if options.gpus > 1:
        raise UserError(
            "--gpus is for this machine; leave it out, since --ray runs one engine per GPU."
        )
    return RayOptions(
        address=options.address,
        backend=options.backend,
        load=load_options(options),
        progress=not options.quiet,
    )


def resolved(path: Path) -> Path:
    """Return the engine file that an option means, and say so where it is another than named."""
    from trt_yolov6.engines import find_engine

    found = find_engine(path)
    if found != path:
        say(f"{path}: taking the newest build of it, {found}")
    return found


def newest_engine() -> Path:
    """Return the newest engine in engines/, of those that run here."""
    from trt_yolov6.engines import runs_here

    # A name with a dot in front is a file that is still being written.
    found = [
        path for path in ENGINES.glob("[!.]*") if path.suffix in ENGINE_SUFFIXES and path.is_file()
    ]
    if not found:
        raise UserError(
            f"no --engine given and {ENGINES}/ holds none; build one with `trt-yolov6 build`."
        )
    found.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    taken = next((path for path in found if runs_here(path)), found[0])
    newest = "the newest" if taken == found[0] else f"the newest that runs here (not {found[0]})"
    say(f"no --engine given: taking {newest}, {taken}")
    return taken


def predict_options(options: argparse.Namespace) -> PredictOptions:
    """Return how the options want images to become detections."""
    from trt_yolov6.spec import PredictOptions

    names = "confidence", "iou", "max_detections", "resize", "border", "batch", "workers", "gpus"
    return PredictOptions(**chosen(options, *(name for name in names if hasattr(options, name))))
