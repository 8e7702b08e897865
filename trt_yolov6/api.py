"""The functions of `trt_yolov6` that run, measure and train; the command line calls them too.

Those that make engines are in `pipeline`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict, overload

from trt_yolov6.common.files import path_of
from trt_yolov6.common.ranges import Count, fitting
from trt_yolov6.engines.base import Engine, LoadOptions
from trt_yolov6.errors import UserError
from trt_yolov6.runtime.detector import Detector
from trt_yolov6.spec import PredictOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from trt_yolov6.bench.latency import BenchmarkResult
    from trt_yolov6.comparison.plan import Plan
    from trt_yolov6.comparison.results import Results
    from trt_yolov6.diagnostics.inspection import Inspection
    from trt_yolov6.runtime.evaluate import Evaluation
    from trt_yolov6.training.recipe import TrainSettings
    from trt_yolov6.training.trainer import TrainResult

AnyDetector: TypeAlias = "Detector | Engine | str | os.PathLike[str]"
"""A loaded detector, its engine, or the path of an engine file, such as what `build` returns: it is
loaded for the call only."""


def load(
    path: str | os.PathLike[str],
    options: LoadOptions | None = None,
    *,
    backend: str = "auto",
) -> Detector:
    """Load an engine that `build` wrote, or any supported detector's ONNX file.

    Args:
        path: the engine; `engines/yolov6s.trt` also stands for the newest build of that name,
            such as `engines/yolov6s-int8.trt`.
        options: threads, provider, CUDA graphs; family and preprocessing of a detector without a
            manifest.
        backend: `tensorrt`, `tensorrt-rtx` or `onnxruntime`; `auto`: what the file was built for.

    Raises:
        UserError: the file is missing, damaged, not a detector, or needs a backend that does not
            run here.

    Examples:
        >>> from trt_yolov6 import load
        >>> with load("yolov6n.onnx") as detector:
        ...     found = detector.predict(["images/BloodImage_00007.jpg"])
        >>> len(found)
        1
    """
    from trt_yolov6.engines import find_engine, load_engine

    return Detector(load_engine(find_engine(path_of(path, "path")), backend, options))


def evaluate(
    detector: AnyDetector,
    data: str | Path,
    split: str | None = None,
    options: PredictOptions | None = None,
    *,
    confusion: bool = False,
    progress: bool = True,
) -> Evaluation:
    """Measure a detector's COCO average precision on labelled images.

    Args:
        detector: a loaded detector, or the path of an engine.
        data: data set in COCO, YOLO or Pascal VOC layout: its folder or `data.yaml`.
        split: part of it. Default: the only one, else `val`, else `val2017`.
        options: thresholds, border, batch, GPUs. Default thresholds: confidence 0.03, IoU 0.65, 300
            boxes, as in the YOLOv6 paper, or those of a graph with NMS inside.
        confusion: also count a confusion matrix.
        progress: show a progress bar, if standard error is a terminal.

    Returns:
        AP in 0..1, overall and by class, and the seconds of each stage.

    Raises:
        UserError: the data cannot be read, or its classes are not the detector's.

    Examples:
        >>> from trt_yolov6 import evaluate
        >>> result = evaluate("yolov6n.onnx", "cells")
        >>> result.images, 0 <= result.ap <= 1
        (4, True)
    """
    from trt_yolov6.data.coco import load_coco
    from trt_yolov6.runtime.evaluate import evaluate as evaluate_engine

    with _opened(detector) as engine:
        return evaluate_engine(
            engine, load_coco(data, split), options, confusion=confusion, progress=progress
        )


@overload
def benchmark(  # type: ignore[overload-overlap]  # a str is a Sequence[str]
    detectors: AnyDetector, **options: Unpack[BenchmarkOptions]
) -> BenchmarkResult: ...
@overload
def benchmark(
    detectors: Sequence[AnyDetector], **options: Unpack[BenchmarkOptions]
) -> list[BenchmarkResult]: ...
def benchmark(
    detectors: AnyDetector | Sequence[AnyDetector], **options: Unpack[BenchmarkOptions]
) -> BenchmarkResult | list[BenchmarkResult]:
    """Measure latency and throughput, with the confidence interval of the median.

    Without `images`, the engine alone is timed on resident input, as in the YOLOv6 paper; with
    them, everything from encoded images in memory to detections, stage after stage. Several
    detectors take turns, so drifting clocks affect all of them alike.

    Args:
        detectors: a loaded detector or the path of an engine, or several.
        options: see `BenchmarkOptions`.

    Returns:
        One result, or a list of them for several detectors; times in seconds.

    Raises:
        UserError: an engine does not take the batch size, or an image cannot be read.

    Examples:
        >>> from trt_yolov6 import benchmark
        >>> result = benchmark("yolov6n.onnx", batch=1, duration=0.1, warm_up=0)
        >>> result.throughput_fps == 1 / result.latency.median
        True
    """
    if isinstance(detectors, (str, os.PathLike)) or not isinstance(detectors, Iterable):
        return benchmark([detectors], **options)[0]
    from trt_yolov6.bench.end_to_end import benchmark_end_to_end_many
    from trt_yolov6.bench.latency import benchmark_many
    from trt_yolov6.data.images import list_images

    how: dict[str, Any] = {**options}
    images, predict = how.pop("images", None), how.pop("predict", None)
    if images is None and predict is not None:
        raise UserError("`predict` is for timing with `images`; leave it out.")
    for name in ("batch", "streams"):
        fitting(how.get(name, 1), Count, f"`{name}`")
    if images is not None and how.pop("streams", 1) > 1:
        raise UserError("`streams` is for the engine alone; leave it out.")
    with contextlib.ExitStack() as stack:
        engines = [stack.enter_context(_opened(one)) for one in detectors]
        if not engines:
            raise UserError("there is no detector to time; name one as `detectors`.")
        if images is None:
            return benchmark_many(engines, **how)
        if not isinstance(images, Iterable) or isinstance(images, str):
            images = list_images(path_of(images, "images"))
        files = [Path(image) if isinstance(image, str) else image for image in images]
        return benchmark_end_to_end_many(engines, files, predict, **how)


class BenchmarkOptions(TypedDict, total=False):
    """Options of `benchmark`."""

    batch: int
    """Images a run (1)."""
    duration: float
    """Most seconds to measure an engine (10). Measuring ends earlier once every engine's 95 %
    confidence interval of the median lies within 1 % of it."""
    warm_up: float
    """Least seconds to run an engine before that (1); up to three times as long, until it gets no
    faster."""
    progress: bool
    """Show a progress bar, if standard error is a terminal (True)."""
    streams: int
    """Batches that run concurrently on a GPU, each on its own stream (1); the latency is then that
    of one run on every stream. Not with `images`."""
    images: Sequence[str | Path | bytes] | str | Path | None
    """Encoded images to time end to end: a folder, files, or their bytes."""
    predict: PredictOptions | None
    """Thresholds and border of the end-to-end measurement; default: those of evaluation."""


def compare(
    models: Plan | str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output: str | Path = "runs/compare",
    *,
    again: bool = False,
    baseline: str | Path | Mapping[str, Any] | None = None,
    other_device: bool = False,
    progress: bool = True,
    **plan: Any,
) -> Results:
    """Compare detectors at several precisions and batch sizes: AP, latency and layer times.

    An earlier comparison in the same folder is continued: what has not changed is not measured
    again.

    Args:
        models: checkpoints, ONNX files and engines; or a plan, as a value or a YAML file.
        output: folder for `results.json`, the engines, and the finished steps.
        again: measure latencies again, even if they are there.
        baseline: earlier results, or their folder, to compare with later. Other data or thresholds
            are refused before anything is built, another device before anything is measured.
        other_device: accept a baseline from another device.
        progress: show a progress bar, if standard error is a terminal.
        plan: fields of `comparison.plan.Plan`, such as `precisions=("fp32", "int8")`,
            `batches=(1, 32)`, `data="samples"`, `calibration="calib"`, `rounds=8`, `duration=10`.

    Returns:
        The results, see `comparison.results`.

    Raises:
        UserError: a file cannot be compared, or a precision cannot be built here.

    Examples:
        >>> from trt_yolov6 import compare
        >>> results = compare(["yolov6n.onnx"], "comparison", data="cells", batches=(1,),
        ...                   rounds=3, duration=0.1, examples=0, layers=False, progress=False)
        >>> [engine["engine"] for engine in results["engines"]]
        ['yolov6n fp32']
    """
    from trt_yolov6.comparison.plan import plan_of
    from trt_yolov6.comparison.results import read_results
    from trt_yolov6.comparison.run import compare as compare_plan

    chosen = plan_of(models, **plan)
    if baseline is not None and not isinstance(baseline, Mapping):
        baseline = read_results(path_of(baseline, "baseline"))
    return compare_plan(
        chosen,
        path_of(output, "output"),
        again=again,
        baseline=baseline,
        other_device=other_device,
        progress=progress,
    )


def inspect(path: str | os.PathLike[str]) -> Inspection:
    """Describe an engine, ONNX file, checkpoint or TensorRT plan.

    Args:
        path: the file, or a short name of an engine as `load` takes it.

    Returns:
        Size, hash, manifest and, by kind, inputs and outputs, layers, parameters and FLOPs.

    Raises:
        UserError: the file is missing, damaged or of another kind.

    Examples:
        >>> from trt_yolov6 import inspect
        >>> found = inspect("yolov6n.onnx")
        >>> found.kind, found.manifest.class_names
        ('onnx', ('RBC', 'WBC', 'Platelets'))
    """
    from trt_yolov6.diagnostics.inspection import inspect_file

    return inspect_file(path_of(path, "path"))


def train(
    data: str | Path | TrainSettings,
    output: str | Path | None = None,
    *,
    model: str | None = None,
    weights: str | Path | None = None,
    device: str | None = None,
    resume: bool | Literal["auto"] = False,
    progress: bool = True,
    **recipe: Any,
) -> TrainResult:
    """Train a YOLOv6 from random weights, or fine-tune a checkpoint, by the paper's recipe.

    Args:
        data: data set in COCO, YOLO or Pascal VOC layout: its folder or `data.yaml`; or complete
            settings, without `model`, `weights` and `recipe`.
        output: folder for checkpoints, log and state; None: `runs/train/<model>`.
        model: variant, such as `n`, `s` or `l6`; default: `s`, or that of `weights`.
        weights: checkpoint to fine-tune.
        device: `cpu`, `cuda` or `cuda:N`. Default: a GPU where there is one.
        resume: continue the training in `output` with the same settings; after an interruption it
            ends with the same weights on a CPU. `auto`: only if the folder holds a training.
        progress: show a progress bar; off a terminal, log a line an epoch.
        recipe: changes to the recipe: `epochs`, `batch`, `image_size`, `seed`, `precision`,
            `teacher` and the other arguments of `training.recipe.recipe_for`.

    Returns:
        Paths and AP of the last and the best checkpoint, and the log.

    Raises:
        UserError: bad data, checkpoint or settings, a folder in use, or training diverged.

    Examples:
        >>> from trt_yolov6 import train
        >>> result = train("cells", "run", model="n", epochs=1, batch=4, image_size=64,
        ...                train_split="val", progress=False)
        >>> result.last.name, result.epochs
        ('last.pt', 1)
    """
    from trt_yolov6.checkpoints.loading import load_checkpoint
    from trt_yolov6.training.recipe import TrainSettings, recipe_for
    from trt_yolov6.training.trainer import train as train_settings

    if isinstance(data, TrainSettings):
        settings = data
        given = {"model": model, "weights": weights, **recipe}
        if unused := [name for name, value in given.items() if value is not None]:
            raise UserError(
                f"`data` holds all settings; leave `{unused[0]}` out, or change the settings."
            )
    else:
        checkpoint = load_checkpoint(path_of(weights, "weights")) if weights else None
        name = fitting(model, str | None, "`model`") or (
            checkpoint.arch.name if checkpoint else "s"
        )
        settings = recipe_for(
            name if name.startswith("yolov6") else f"yolov6{name}",
            str(path_of(data, "data")),
            weights=checkpoint,
            **recipe,
        )
    return train_settings(
        settings,
        path_of(output or Path("runs/train") / settings.variant, "output"),
        device=device,
        resume=resume,
        progress=progress,
    )


@contextlib.contextmanager
def _opened(detector: AnyDetector) -> Iterator[Engine]:
    """Yield a detector's engine; a file is loaded, and closed afterwards."""
    if isinstance(detector, Engine):
        yield detector
    elif isinstance(detector, Detector):
        yield detector.engine
    else:
        with load(path_of(detector, "detector")) as loaded:
            yield loaded.engine
