"""The commands: parsing and printing only. The work is done by the functions that they call.

Nothing heavy is imported before a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from trt_yolov6 import __version__, cli_compare, cli_report
from trt_yolov6.errors import UserError

if TYPE_CHECKING:
    import onnx

    from trt_yolov6.building import Graph
    from trt_yolov6.engines.base import Engine
    from trt_yolov6.engines.manifest import BatchProfile, NmsSettings
    from trt_yolov6.evaluation import Evaluation
    from trt_yolov6.export import ExportSettings
    from trt_yolov6.quantization.ptq import QuantizationSettings
    from trt_yolov6.training.recipe import TrainSettings

SAMPLE_WEIGHTS = Path("samples/yolov6n_bccd.pt")
SAMPLE_DATA = Path("samples")
SAMPLE_IMAGES = SAMPLE_DATA / "images" / "val"
SAMPLE_CALIB = Path("calib")
CACHE_VERSION = "8.6.1"
ENGINES = Path("engines")
ENGINE_SUFFIXES = (".onnx", ".trt", ".plan", ".engine")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0 done, 1 a comparison fell short of its baseline, 2 wrong usage or bad input.
    """
    options = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int | None] = options.run
    code: int | None = 0
    try:
        _check_json(getattr(options, "json", None))
        code = run(options)
        sys.stdout.flush()
    except UserError as error:
        print(f"trt-yolov6 {options.command}: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if not package or package == "trt_yolov6":
            raise
        print(
            f"trt-yolov6 {options.command}: this needs the Python package {package}, which is not "
            "installed; `trt-yolov6 doctor` says how to get it.",
            file=sys.stderr,
        )
        return 2
    except BrokenPipeError:
        # The reader (`| head`) has gone; Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print(f"trt-yolov6 {options.command}: interrupted", file=sys.stderr)
        return 130
    return code or 0


# --- commands -----------------------------------------------------------------------------------


def _build(options: argparse.Namespace) -> None:
    from trt_yolov6.building import build_engine, check_build
    from trt_yolov6.engines.base import BuildSettings

    settings = BuildSettings(
        target=options.target,
        timing_cache=options.timing_cache,
        workspace_mib=options.workspace,
        optimization_level=options.optimization_level,
        calibration_cache=options.calibration_cache,
        implicit_fp16=bool(options.calibration_cache and options.fp16),
        fp8=options.fp8,
        progress=not options.quiet,
    )
    if options.names and not options.onnx:
        raise UserError("--names is for --onnx: a checkpoint brings its class names along.")
    if options.calibration_cache and (options.int8 or options.fp8 or not options.onnx):
        raise UserError(
            "--calibration-cache goes with the float graph that `export` wrote beside it; give "
            "that as --onnx, without --int8 or --fp8."
        )
    # Exporting takes seconds: what cannot be built is better refused before.
    check_build(options.backend, options.output, settings)
    quantization = _quantization(options)
    if quantization:
        from trt_yolov6.quantization.images import calibration_images

        calibration_images(options.calib or SAMPLE_CALIB)
    graph = _graph_from_onnx(options) if options.onnx else _exported(options)
    if quantization:
        graph = _quantized(graph, options, quantization)
    elif graph.precision == "fp8":
        _say("surgery: FP8's Q/DQ nodes are left as they are")
    elif graph.precision == "int8" and not options.no_surgery:
        graph = _cleaned(graph, options)
    built = build_engine(graph, backend=options.backend, output=options.output, settings=settings)
    manifest = built.manifest
    height, width = manifest.image_size
    print(
        f"{built.path}: {manifest.model}, {manifest.precision}, {height}x{width}, "
        f"batch {_profile_text(manifest.batch)}, {manifest.backend} {manifest.backend_version} "
        f"for {manifest.target}, {built.path.stat().st_size / 2**20:.1f} MiB"
    )
    print(f"{built.manifest_path}: its manifest")
    if built.quantized_asked:
        label, found = manifest.precision.upper(), manifest.quantized_layers
        print(
            f"in {label}: {'the builder does not say how many' if found is None else found} of the "
            f"{built.quantized_asked} convolutions that the graph has in {label}"
        )


def _export(options: argparse.Namespace) -> None:
    from trt_yolov6.export import write_onnx
    from trt_yolov6.files import check_writable

    if not options.calibration_cache:
        for name in ("calib", "calibrator", "calib_images", "no_equalize", "cache_version"):
            if getattr(options, name):
                option = name.replace("_", "-")
                raise UserError(f"--{option} belongs to --calibration-cache; add it.")
    else:
        from trt_yolov6.quantization.trt_cache import header_version

        # Refuses a version that reads no cache, before the work.
        header_version(options.cache_version or CACHE_VERSION)
    for path in (options.output, options.calibration_cache):
        if path:
            check_writable(path)
    graph = _exported(options)
    output = options.output or Path(f"{graph.name}.onnx")
    if options.calibration_cache:
        graph = _calibrated(graph, options)
    write_onnx(output, graph.model)
    print(
        f"{output}: {graph.name}, {graph.precision}, batch {_profile_text(graph.batch)}, "
        f"{len(graph.model.graph.node)} nodes, {output.stat().st_size / 2**20:.1f} MiB"
    )


def _bench(options: argparse.Namespace) -> None:
    from trt_yolov6.benchmarking import (
        benchmark_end_to_end_many,
        benchmark_many,
        format_report,
        layer_report,
    )

    if options.layers and not options.no_cuda_graph:
        raise UserError("--layers times layers one by one; add --no-cuda-graph.")
    for name in ("conf", "iou", "max_detections", "source"):
        if getattr(options, name) is not None and not options.end_to_end:
            option = name.replace("_", "-")
            raise UserError(f"--{option} is for --end-to-end: the engine alone has no such stage.")
    if options.end_to_end and options.streams > 1:
        raise UserError("--streams is for the engine alone; leave it or --end-to-end out.")
    engines = [_load(path, options) for path in options.engine or [_newest_engine()]]
    if options.end_to_end:
        from trt_yolov6.data.images import list_images

        images = list_images(options.source or SAMPLE_IMAGES)
        results = benchmark_end_to_end_many(
            engines,
            images,
            batch=options.batch,
            duration=options.duration,
            nms=_nms(options),
            progress=not options.quiet,
        )
    else:
        results = benchmark_many(
            engines,
            batch=options.batch,
            streams=options.streams,
            duration=options.duration,
            progress=not options.quiet,
        )
    print(format_report(results))
    if options.layers:
        for engine in engines:
            print(layer_report(engine, options.batch))
    if options.json:
        values = [result.to_json() for result in results]
        _write_json(options.json, values[0] if len(values) == 1 else values)


def _eval(options: argparse.Namespace) -> None:
    from trt_yolov6.data.coco import load_coco
    from trt_yolov6.data.letterbox import resolve_border
    from trt_yolov6.evaluation import evaluate

    with _load(options.engine or _newest_engine(), options) as engine:
        if options.data is None:
            _say(f"no --data given: evaluating on the sample data set {SAMPLE_DATA}/")
        dataset = load_coco(options.data or SAMPLE_DATA, options.split)
        result = evaluate(
            engine,
            dataset,
            batch=options.batch,
            nms=_nms(options),
            border=resolve_border(options.resize, options.border, engine.image_size),
            workers=options.workers,
            progress=not options.quiet,
        )
    print(_evaluation_text(result))
    if options.json:
        _write_json(options.json, result.to_json())


def _infer(options: argparse.Namespace) -> None:
    from trt_yolov6.data.letterbox import resolve_border
    from trt_yolov6.inference import infer_source

    with _load(options.engine or _newest_engine(), options) as engine:
        summary = infer_source(
            engine,
            options.source,
            options.output,
            nms=_nms(options),
            border=resolve_border(options.resize, options.border, engine.image_size),
            batch=options.batch,
            progress=not options.quiet,
        )
    for _, reason in summary.failures:
        _say(f"skipped: {reason}")
    for warning in summary.warnings:
        _say(f"warning: {warning}")
    shown = summary.outputs[0] if len(summary.outputs) == 1 else options.output
    print(
        f"{summary.objects} objects in {summary.images} images, "
        f"{summary.inference_seconds / max(summary.images, 1) * 1e3:.1f} ms an image in the engine"
    )
    print(f"{shown}: drawn")
    print(f"{summary.detections_file}: the detections")


def _sensitivity(options: argparse.Namespace) -> None:
    from trt_yolov6.files import check_writable
    from trt_yolov6.quantization.ptq import QuantizationSettings, calibrate
    from trt_yolov6.quantization.report import fallback_report, measure

    if options.plot:
        check_writable(options.plot)
    if options.data is None and options.split is not None:
        raise UserError("--split is part of a data set; name that with --data.")
    if options.onnx:
        from trt_yolov6.building import graph_from_onnx

        graph = graph_from_onnx(options.onnx, image_size=options.imgsz)
    else:
        graph = _exported(options)
    settings = QuantizationSettings(
        calibrator=options.calibrator or "minmax",
        equalize=not options.no_equalize,
        image_limit=options.calib_images,
    )
    calibrated = calibrate(graph, _calibration_folder(options), settings, tell=_say)
    score = _labelled_score(graph, options)
    result = measure(graph, calibrated, options.metric, score)
    for name, value in result.layers[: options.top]:
        print(f"{value:12.5g}  {name}")
    if len(result.layers) > options.top:
        print(f"{'...':>12}  {len(result.layers) - options.top} more, less sensitive")
    if options.report:
        by_ap = result if result.metric == "ap" else None
        print(fallback_report(graph, calibrated, score, by_ap=by_ap, tell=_say))
    if options.plot:
        from trt_yolov6.quantization.sensitivity import write_chart

        write_chart(result, options.plot)
        _say(f"{options.plot}: drawn")
    if options.json:
        _write_json(options.json, result.to_json())


def _labelled_score(
    graph: Graph, options: argparse.Namespace
) -> Callable[[onnx.ModelProto], float] | None:
    """Return a function for the AP on --data; None without it."""
    if options.data is None:
        return None
    from trt_yolov6.data.coco import load_coco
    from trt_yolov6.quantization.report import ap_on

    return ap_on(graph, load_coco(options.data, options.split))


def _inspect(options: argparse.Namespace) -> None:
    from trt_yolov6.inspection import format_inspection, inspect_file

    result = inspect_file(options.file)
    print(format_inspection(result, layers=options.layers))
    if options.json:
        _write_json(options.json, result.to_json())


def _doctor(options: argparse.Namespace) -> None:
    from trt_yolov6.doctor import diagnose, format_diagnosis

    result = diagnose()
    print(format_diagnosis(result))
    if options.json:
        _write_json(options.json, result.to_json())


def _train(options: argparse.Namespace) -> None:
    from trt_yolov6.training.trainer import stored_settings, train

    if options.resume:
        for name, value in vars(options).items():
            if value not in (None, False) and name not in _RESUMING:
                raise UserError(
                    f"--{name.replace('_', '-')} was chosen when the training began; with "
                    "--resume leave it out."
                )
        if options.output is None:
            raise UserError("--resume needs the folder of the training; name it with --output.")
        settings, output = stored_settings(options.output), options.output
    else:
        settings = _train_settings(options)
        output = options.output or Path("runs/train") / settings.variant
    first = os.environ.get("RANK", "0") == "0"
    result = train(
        settings,
        output,
        device=options.device,
        resume=options.resume,
        progress=not options.quiet,
        tell=_say,
    )
    if not first:
        return
    for path, ap in ((result.last, result.last_ap), (result.best, result.best_ap)):
        if path is not None:
            of = f", of epoch {result.best_epoch}" if path == result.best else ""
            print(f"{path}: " + ("not evaluated" if ap is None else f"AP {ap:.4f}{of}"))
    print(
        f"{result.epochs} epochs, {result.epoch_seconds:.2f} s an epoch (median, without "
        f"evaluation), {result.wall_seconds:.0f} s in all"
    )
    if options.json:
        _write_json(options.json, result.to_json())


# --- from options to values ---------------------------------------------------------------------


def _quantization(options: argparse.Namespace) -> QuantizationSettings | None:
    """Return the settings of --int8 or --fp8, or None without either."""
    only_quantized = [
        "calibrator",
        "calib_images",
        "float_layers",
        "no_equalize",
        "no_bias_correction",
        "adaptive_rounding",
    ]
    for name in ("max_ap_drop", "data", "split"):
        if getattr(options, name) is not None and options.float_layers != "auto":
            raise UserError(f"--{name.replace('_', '-')} is for --float-layers auto; add it.")
    if not (options.int8 or options.fp8):
        for name in only_quantized:
            if getattr(options, name) not in (None, False):
                raise UserError(
                    f"--{name.replace('_', '-')} is for --int8 and --fp8; add one of them."
                )
        if options.calib and not options.onnx:
            raise UserError(
                "--calib is for --int8 and --fp8, or for an --onnx file with Q/DQ nodes."
            )
        return None
    from trt_yolov6.quantization.levels import FP8, INT8
    from trt_yolov6.quantization.ptq import QuantizationSettings, check_settings

    settings = QuantizationSettings(
        quantized=FP8 if options.fp8 else INT8,
        calibrator=options.calibrator or "auto",
        equalize=not options.no_equalize,
        fp16=options.fp16,
        image_limit=options.calib_images,
        float_layers=() if options.float_layers is None else options.float_layers,
        bias_correction=not options.no_bias_correction,
        adaptive_rounding=options.adaptive_rounding,
        max_ap_drop=0.5 if options.max_ap_drop is None else options.max_ap_drop,
    )
    check_settings(settings)
    return settings


def _quantized(graph: Graph, options: argparse.Namespace, settings: QuantizationSettings) -> Graph:
    from trt_yolov6.quantization.ptq import quantize
    from trt_yolov6.quantization.table import table_path, write_table

    folder = _calibration_folder(options)
    output = options.output or ENGINES / f"{graph.name}.onnx"
    score = _labelled_score(graph, options) if options.float_layers == "auto" else None
    result = quantize(
        graph, folder, settings, table_file=table_path(output), score=score, tell=_say
    )
    write_table(table_path(output), result.table)
    placement = result.placement
    _say(
        f"{len(placement.layers)} of {len(placement.layers) + len(placement.float_layers)} "
        f"convolutions in {settings.quantized.label}; ranges in {table_path(output)}"
    )
    return result.graph


_RESUMING = ("command", "run", "resume", "output", "device", "quiet", "json")
"""What may be given along with `train --resume`."""


def _train_settings(options: argparse.Namespace) -> TrainSettings:
    """Return the paper's recipe with what the options change."""
    from dataclasses import replace

    from trt_yolov6.checkpoint import load_checkpoint
    from trt_yolov6.training.recipe import ArchitectureOptions, recipe_for, with_field

    if options.data is None:
        raise UserError("--data is missing; name a data set in COCO layout.")
    weights = load_checkpoint(options.weights) if options.weights else None
    variant = weights.arch.name if weights else "yolov6s"
    if options.model is not None:
        variant = options.model if options.model.startswith("yolov6") else f"yolov6{options.model}"
    elif weights is None:
        _say("no --model given: training yolov6s")

    def given(**named: Any) -> dict[str, Any]:
        return {name: value for name, value in named.items() if value is not None}

    settings = recipe_for(
        variant,
        str(options.data),
        options=ArchitectureOptions(
            block=options.block,
            activation=options.activation,
            csp_ratio=options.csp_ratio,
            dfl=options.dfl,
            objectness=options.objectness or None,
        ),
        weights=weights,
        **given(
            epochs=options.epochs,
            plain_epochs=options.plain_epochs,
            image_size=options.imgsz,
            batch=options.batch,
            seed=options.seed,
            train_split=options.split,
            eval_interval=options.eval_interval,
            eval_border=options.border,
            on_bad_data=options.bad_data,
            precision=options.precision,
            teacher=str(options.distill) if options.distill else None,
        ),
        compile=options.compile,
        deterministic=options.deterministic,
    )
    losses = given(
        classification=options.cls_loss,
        box=options.box_loss,
        assigner=options.assigner,
        warmup_assigner=options.warmup_assigner,
    )
    settings = replace(
        settings,
        losses=replace(settings.losses, **losses),
        augmentation=replace(
            settings.augmentation,
            **given(mosaic=options.mosaic, mixup=options.mixup, border=options.border),
        ),
        optimizer=replace(settings.optimizer, **given(learning_rate=options.lr)),
    )
    if options.val_split is not None:
        chosen = None if options.val_split == "none" else options.val_split
        settings = replace(settings, val_split=chosen)
    for assignment in options.set or ():
        settings = with_field(settings, assignment)
    return settings


def _calibrated(graph: Graph, options: argparse.Namespace) -> Graph:
    """Write a TensorRT calibration cache; return the float graph whose tensors it names."""
    from dataclasses import replace

    from trt_yolov6.quantization.ptq import QuantizationSettings, quantize
    from trt_yolov6.quantization.trt_cache import write_cache

    version = options.cache_version or CACHE_VERSION
    settings = QuantizationSettings(
        calibrator=options.calibrator or "auto",
        equalize=not options.no_equalize,
        # Corrected biases would be in the graph with Q/DQ nodes, which this route does without.
        bias_correction=False,
        image_limit=options.calib_images,
    )
    result = quantize(graph, _calibration_folder(options), settings, tell=_say)
    write_cache(options.calibration_cache, result.table.amax, version)
    print(
        f"{options.calibration_cache}: {len(result.table.amax)} scales for TensorRT {version}; "
        "build with `--onnx ... --calibration-cache ...`"
    )
    return replace(graph, model=result.float_model)


def _calibration_folder(options: argparse.Namespace) -> Path:
    if options.calib is not None:
        folder: Path = options.calib
        return folder
    _say(f"no --calib given: calibrating on {SAMPLE_CALIB}/")
    return SAMPLE_CALIB


def _cleaned(graph: Graph, options: argparse.Namespace) -> Graph:
    """Take surplus Q/DQ nodes out of a graph that came with some, and prove it on images."""
    from collections import Counter
    from dataclasses import replace

    from trt_yolov6.quantization.images import calibration_batches, input_spec
    from trt_yolov6.quantization.surgery import clean, verify_clean

    model, removals = clean(graph.model)
    if not removals:
        _say("surgery: no Q/DQ node of the graph is surplus")
        return graph
    for kind, count in Counter(removal.kind for removal in removals).items():
        first = next(removal for removal in removals if removal.kind == kind)
        _say(f"surgery: {count} x {kind.replace('_', ' ')}, such as {first}")
    folder = options.calib or (SAMPLE_CALIB if SAMPLE_CALIB.is_dir() else None)
    if folder is None:
        _say("surgery: not verified; --calib DIR compares the outputs on its images")
        return replace(graph, model=model)
    images = calibration_batches(folder, input_spec(model), limit=8)
    for shift in verify_clean(graph.model, model, images):
        _say(
            f"surgery: {shift.output} moved by {shift.moved:.3g} (RMS); quantization itself moves "
            f"it by {shift.quantization:.3g}"
        )
        if not shift.explained:
            raise UserError(
                f"surgery on {graph.source} moved {shift.output} more than quantization explains; "
                "build it with --no-surgery and please report the file."
            )
    return replace(graph, model=model)


def _exported(options: argparse.Namespace) -> Graph:
    from trt_yolov6.building import graph_from_checkpoint
    from trt_yolov6.checkpoint import load_checkpoint

    settings = _export_settings(options)
    checkpoint = load_checkpoint(_weights(options))
    _say(f"exporting {checkpoint.arch.name} from {checkpoint.path} to ONNX (some seconds) ...")
    return graph_from_checkpoint(checkpoint, settings)


def _weights(options: argparse.Namespace) -> Path:
    weights: Path | None = options.weights
    if weights is not None:
        return weights
    if not SAMPLE_WEIGHTS.is_file():
        raise UserError(
            f"neither --weights nor --onnx is given and the sample {SAMPLE_WEIGHTS} is not here; "
            "name a checkpoint with --weights."
        )
    _say(f"no --weights given: taking the sample checkpoint {SAMPLE_WEIGHTS}")
    return SAMPLE_WEIGHTS


def _export_settings(options: argparse.Namespace) -> ExportSettings:
    from trt_yolov6.engines.manifest import NmsSettings
    from trt_yolov6.export import DEFAULT_OPSET, ExportSettings

    if not options.end2end and (options.conf is not None or options.iou is not None):
        raise UserError("--conf and --iou belong to NMS in the graph; add --end2end.")
    return ExportSettings(
        image_size=options.imgsz or (640, 640),
        batch=_profile(options) or _default_profile(),
        # Quantization starts from float32; the rest becomes half precision with the Q/DQ pairs.
        fp16=options.fp16 and not _quantizes(options),
        nms=_thresholds(options, NmsSettings()) if options.end2end else None,
        uint8_input=options.uint8_input,
        opset=options.opset or DEFAULT_OPSET,
    )


def _graph_from_onnx(options: argparse.Namespace) -> Graph:
    from trt_yolov6.building import graph_from_onnx, read_class_names

    for option in ("end2end", "uint8_input", "opset", "conf", "iou"):
        if getattr(options, option) not in (None, False):
            raise UserError(
                f"--{option.replace('_', '-')} changes how a checkpoint is exported and cannot be "
                "applied to --onnx; leave it out, or give --weights."
            )
    graph = graph_from_onnx(
        options.onnx,
        batch=_profile(options),
        image_size=options.imgsz,
        fp16=options.fp16 and not _quantizes(options) and not options.calibration_cache,
        class_names=read_class_names(options.names) if options.names else None,
    )
    if options.fp32 and not _quantizes(options) and graph.precision != "fp32":
        raise UserError(
            f"{options.onnx} is {graph.precision} and cannot be made --fp32; leave --fp32 out."
        )
    return graph


def _quantizes(options: argparse.Namespace) -> bool:
    return bool(getattr(options, "int8", False) or getattr(options, "fp8", False))


def _profile(options: argparse.Namespace) -> BatchProfile | None:
    from trt_yolov6.engines.manifest import BatchProfile

    if options.batch is not None:
        return BatchProfile(options.batch, options.batch, options.batch)
    return BatchProfile(*options.dynamic) if options.dynamic else None


def _default_profile() -> BatchProfile:
    from trt_yolov6.engines.manifest import BatchProfile

    return BatchProfile()


def _nms(options: argparse.Namespace) -> NmsSettings:
    from trt_yolov6.engines.manifest import NmsSettings

    return _thresholds(options, NmsSettings())


def _thresholds(options: argparse.Namespace, default: NmsSettings) -> NmsSettings:
    from dataclasses import replace

    given = {
        "confidence": options.conf,
        "iou": options.iou,
        "max_detections": getattr(options, "max_detections", None),
    }
    return replace(default, **{key: value for key, value in given.items() if value is not None})


def _load(path: Path, options: argparse.Namespace) -> Engine:
    from trt_yolov6.engines import load_engine
    from trt_yolov6.engines.base import LoadOptions

    load_options = LoadOptions(
        threads=options.threads,
        provider=options.provider,
        cuda_graph=not options.no_cuda_graph,
    )
    return load_engine(path, options.backend, load_options)


def _newest_engine() -> Path:
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
    _say(f"no --engine given: taking {newest}, {taken}")
    return taken


# --- printing -----------------------------------------------------------------------------------


def _say(text: str) -> None:
    # On standard output: standard error is for what went wrong.
    print(text, flush=True)


def _profile_text(profile: BatchProfile) -> str:
    if profile.is_static:
        return str(profile.min)
    return f"{profile.min}..{profile.max} (best at {profile.opt})"


def _evaluation_text(result: Evaluation) -> str:
    def ap(value: float | None) -> str:
        return "   n/a" if value is None else f"{value:6.4f}"

    seconds = result.seconds
    share = seconds.inference / result.wall_seconds
    return "\n".join(
        [
            f"{result.engine} ({result.precision}, {result.backend}) on {result.images} images, "
            f"{result.detections} detections",
            f"  AP {ap(result.ap)}   AP50 {ap(result.ap50)}   AP75 {ap(result.ap75)}",
            f"  APs {ap(result.ap_small)}  APm {ap(result.ap_medium)}  APl {ap(result.ap_large)}",
            f"  {result.wall_seconds:.2f} s in all, {share:.0%} of it in the engine: inference "
            f"{seconds.inference:.2f} s; beside it read {seconds.read:.2f}, pre-process "
            f"{seconds.preprocess:.2f}, post-process {seconds.postprocess:.2f}, COCO matching "
            f"{seconds.coco:.2f}; {seconds.tail:.2f} s after the last batch",
        ]
    )


def _check_json(path: Path | None) -> None:
    """Refuse a --json that cannot be written, before the work."""
    if path is None:
        return
    from trt_yolov6.files import check_writable

    if path.suffix == ".json" and check_writable(path).is_file():
        from trt_yolov6.engines.manifest import manifest_owner

        owner = manifest_owner(path)
        if owner:
            raise UserError(f"--json {path} is the manifest of {owner}; choose another file.")
    check_writable(path)


def _write_json(path: Path, value: object) -> None:
    from trt_yolov6.files import write_json

    write_json(path, value)
    _say(f"{path}: written")


# --- parsing ------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="trt-yolov6",
        description="YOLOv6 from a trained checkpoint to a measured, validated engine.",
    )
    parser.add_argument("--version", action="version", version=f"trt-yolov6 {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> _Parser:
        sub: _Parser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(run=run)
        return sub

    build = command("build", _build, "build an engine from a checkpoint or an ONNX file")
    source = build.add_mutually_exclusive_group()
    source.add_argument("--weights", type=Path, metavar="FILE.pt", help="YOLOv6 checkpoint")
    source.add_argument("--onnx", type=Path, metavar="FILE", help="a detector's ONNX file")
    _add_graph_options(build)
    build.add_argument("--names", type=Path, help="class names for --onnx: text or COCO JSON")
    int8 = build.add_argument_group("INT8 and FP8")
    types = int8.add_mutually_exclusive_group()
    types.add_argument(
        "--int8", action="store_true", help="quantize; the rest is float32, or half with --fp16"
    )
    types.add_argument(
        "--fp8",
        action="store_true",
        help="the same in 8-bit floating point (E4M3), from compute capability 8.9 on",
    )
    _add_calibration(int8)
    int8.add_argument(
        "--float-layers",
        type=_float_layers,
        metavar="K|auto|NAMES",
        help="keep so many of the most sensitive layers in float; as few as --max-ap-drop allows "
        "(both with --int8 only); or these, with commas (0)",
    )
    int8.add_argument(
        "--max-ap-drop", type=float, metavar="POINTS", help="for --float-layers auto (0.5)"
    )
    int8.add_argument(
        "--data",
        type=Path,
        help="labelled data that --float-layers auto holds the budget on; without it, the "
        "agreement with the float network tells",
    )
    int8.add_argument("--split", help="part of that data set, such as val")
    int8.add_argument(
        "--no-bias-correction", action="store_true", help="leave the layers' biases as they are"
    )
    int8.add_argument(
        "--adaptive-rounding",
        action="store_true",
        help="--int8: round weights for the inputs that they meet (some minutes)",
    )
    int8.add_argument(
        "--no-surgery", action="store_true", help="leave the Q/DQ nodes of --onnx as they are"
    )
    int8.add_argument(
        "--calibration-cache",
        type=Path,
        metavar="FILE",
        help="TensorRT up to 10: scales for a float --onnx graph (see export)",
    )
    _add_backend(build)
    build.add_argument("--target", help="GPU to cross-build for with tensorrt-rtx, such as t4")
    build.add_argument("--output", type=Path, help="default: engines/<model>.onnx or .trt")
    build.add_argument("--timing-cache", type=Path, help="TensorRT timing cache to use and extend")
    build.add_argument("--workspace", type=_positive, metavar="MIB", help="scratch memory limit")
    build.add_argument(
        "--optimization-level", type=int, choices=range(6), help="TensorRT builder effort"
    )
    _add_quiet(build)

    export = command("export", _export, "export a checkpoint to ONNX")
    export.add_argument("--weights", type=Path, metavar="FILE.pt", help="YOLOv6 checkpoint")
    _add_graph_options(export)
    export.add_argument("--output", type=Path, help="default: <model>.onnx")
    cache = export.add_argument_group("INT8 for TensorRT up to 10, without Q/DQ nodes")
    cache.add_argument(
        "--calibration-cache", type=Path, metavar="FILE", help="write the tensors' scales there"
    )
    cache.add_argument(
        "--cache-version", metavar="X.Y.Z", help=f"TensorRT that reads it ({CACHE_VERSION})"
    )
    _add_calibration(cache)

    bench = command("bench", _bench, "measure latency and throughput")
    bench.add_argument(
        "--engine", type=Path, nargs="+", help="one or several; default: the newest in engines/"
    )
    bench.add_argument("--batch", type=_positive, default=1, help="images a run (1)")
    bench.add_argument(
        "--streams", type=_positive, default=1, help="batches side by side on a GPU (1)"
    )
    bench.add_argument(
        "--duration", type=float, default=10.0, help="most seconds of measuring an engine (10)"
    )
    bench.add_argument(
        "--layers", action="store_true", help="TensorRT: also the time of each layer"
    )
    bench.add_argument(
        "--end-to-end", action="store_true", help="with decoding, letterbox and NMS, in sequence"
    )
    bench.add_argument(
        "--source",
        type=Path,
        help=f"pictures for --end-to-end ({SAMPLE_IMAGES})",
    )
    _add_thresholds(bench)
    _add_loading(bench)
    _add_json(bench)

    evaluate = command("eval", _eval, "measure COCO average precision")
    evaluate.add_argument("--engine", type=Path, help="default: the newest in engines/")
    evaluate.add_argument("--data", type=Path, help="folder in COCO layout (samples/)")
    evaluate.add_argument("--split", help="part of the data set, such as val or val2017")
    evaluate.add_argument("--batch", type=_positive, help="images at a time")
    evaluate.add_argument("--workers", type=_positive, help="threads that decode images")
    _add_border(evaluate)
    _add_thresholds(evaluate)
    _add_loading(evaluate)
    _add_json(evaluate)

    infer = command("infer", _infer, "detect objects in a picture, a folder or a video")
    infer.add_argument("--engine", type=Path, help="default: the newest in engines/")
    infer.add_argument("--source", type=Path, required=True, help="picture, folder or video")
    infer.add_argument("--output", type=Path, default=Path("runs/infer"), help="(runs/infer)")
    infer.add_argument("--batch", type=_positive, help="images at a time")
    _add_border(infer)
    _add_thresholds(infer, confidence=0.4)
    _add_loading(infer)

    sensitivity = command("sensitivity", _sensitivity, "rank layers by what INT8 costs in them")
    source = sensitivity.add_mutually_exclusive_group()
    source.add_argument("--weights", type=Path, metavar="FILE.pt", help="YOLOv6 checkpoint")
    source.add_argument("--onnx", type=Path, metavar="FILE", help="a detector's float ONNX file")
    sensitivity.add_argument("--imgsz", type=_size, metavar="N|HxW", help="input size (640)")
    sensitivity.add_argument(
        "--metric",
        choices=("mse", "snr", "cosine", "ap"),
        default="snr",
        help="at each layer's output, or the AP with only that layer in INT8 (snr)",
    )
    _add_calibration(sensitivity)
    sensitivity.add_argument(
        "--data",
        type=Path,
        help="labelled data for AP; without it, the agreement with the float network counts",
    )
    sensitivity.add_argument("--split", help="part of the data set, such as val")
    sensitivity.add_argument(
        "--report",
        action="store_true",
        help="also the AP with each metric's six most sensitive layers in float (those by ap only "
        "with --metric ap, which scores a graph for every layer)",
    )
    sensitivity.add_argument("--top", type=_positive, default=12, help="layers printed (12)")
    sensitivity.add_argument("--plot", type=Path, metavar="FILE.png", help="draw a bar chart")
    _add_json(sensitivity)
    sensitivity.set_defaults(
        fp16=False,
        end2end=False,
        conf=None,
        iou=None,
        uint8_input=False,
        opset=None,
        batch=None,
        dynamic=None,
    )

    _add_train(command("train", _train, "train a network, or train a checkpoint on"))

    inspect = command("inspect", _inspect, "say what an engine, ONNX file or checkpoint is")
    inspect.add_argument("file", type=Path, metavar="FILE")
    inspect.add_argument("--layers", action="store_true", help="list every layer")
    _add_json(inspect)

    cli_compare.add(commands)
    cli_report.add(commands)

    doctor = command("doctor", _doctor, "say which backends work here, and what others need")
    _add_json(doctor)
    return parser


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, metavar="DIR", help="data set in COCO layout")
    parser.add_argument("--split", help="part to train on (train)")
    parser.add_argument("--val-split", help="part to evaluate on, or none (val)")
    parser.add_argument(
        "--bad-data",
        choices=("refuse", "skip"),
        help="what is wrong with the data: say it and end, or leave it out (refuse)",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="(runs/train/<model>)")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the interrupted training in --output"
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N (a GPU where there is one)")
    parser.add_argument(
        "--precision",
        choices=("auto", "bf16", "fp16", "fp32"),
        help="(auto: bf16 or fp16 on a GPU, fp32 on a CPU)",
    )
    parser.add_argument("--compile", action="store_true", help="compile with torch.compile")
    parser.add_argument(
        "--deterministic", action="store_true", help="the same bits every time on a GPU too; slower"
    )
    _add_quiet(parser)
    _add_json(parser)

    model = parser.add_argument_group("network (paper, Tables 2 to 4 and 11)")
    model.add_argument(
        "--model", metavar="n|t|s|m|l|NAME", help="variant (s, or that of --weights)"
    )
    model.add_argument("--weights", type=Path, metavar="FILE.pt", help="checkpoint to train on")
    model.add_argument("--block", choices=("repvgg", "conv"))
    model.add_argument("--activation", choices=("relu", "silu"))
    model.add_argument(
        "--csp-ratio", type=float, metavar="R", help="channels inside CSPStackRep; 0: none"
    )
    model.add_argument(
        "--dfl",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="predict distributions over distances",
    )
    model.add_argument("--objectness", action="store_true", help="predict objectness, as v0.1")

    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--epochs", type=_positive, help="(300)")
    recipe.add_argument("--batch", type=_positive, help="images a step, over all GPUs (32)")
    recipe.add_argument(
        "--imgsz", type=_positive, metavar="N", help="input size, a multiple of 32 (640)"
    )
    recipe.add_argument(
        "--lr", type=float, help="learning rate for 32 images (N 0.02, others 0.01)"
    )
    recipe.add_argument("--seed", type=int, help="(0)")
    recipe.add_argument("--mosaic", type=float, help="probability of Mosaic (1)")
    recipe.add_argument("--mixup", type=float, help="probability of Mixup (M and L 0.1, others 0)")
    recipe.add_argument(
        "--plain-epochs", type=int, help="last epochs without Mosaic and Mixup (15)"
    )
    recipe.add_argument(
        "--border", type=int, help="gray pixels on every side, in training and evaluation (0)"
    )
    recipe.add_argument("--eval-interval", type=int, help="epochs between evaluations (10)")
    recipe.add_argument(
        "--set",
        action="append",
        metavar="FIELD=VALUE",
        help="any other field of the settings, such as optimizer.momentum=0.9",
    )

    losses = parser.add_argument_group("assignment and losses (paper, Tables 6 to 11)")
    losses.add_argument("--assigner", choices=("tal", "atss", "simota"), help="(tal)")
    losses.add_argument(
        "--warmup-assigner", choices=("tal", "atss", "simota"), help="of the first epochs (atss)"
    )
    losses.add_argument(
        "--cls-loss", choices=("varifocal", "focal", "quality_focal", "poly"), help="(varifocal)"
    )
    losses.add_argument(
        "--box-loss", choices=("siou", "giou", "ciou"), help="(N and T siou, others giou)"
    )
    losses.add_argument(
        "--distill", type=Path, metavar="TEACHER.pt", help="self-distillation (paper, 2.4.2)"
    )


def _add_graph_options(parser: argparse.ArgumentParser) -> None:
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument("--fp32", action="store_true", help="single precision (default)")
    precision.add_argument("--fp16", action="store_true", help="half precision")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--batch", type=_positive, metavar="N", help="a fixed batch size")
    size.add_argument(
        "--dynamic",
        type=_three,
        metavar="MIN,OPT,MAX",
        help="batch sizes taken and the one tuned for (1,32,32)",
    )
    parser.add_argument(
        "--imgsz", type=_size, metavar="N|HxW", help="input size, a multiple of 32 (640)"
    )
    parser.add_argument("--end2end", action="store_true", help="NMS in the graph")
    parser.add_argument("--conf", type=float, help="confidence threshold of --end2end (0.03)")
    parser.add_argument("--iou", type=float, help="IoU threshold of --end2end (0.65)")
    parser.add_argument(
        "--uint8-input", action="store_true", help="take uint8 RGB pixels, normalize in the graph"
    )
    parser.add_argument("--opset", type=int, help="ONNX opset, 17 or later (18)")


def _add_calibration(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--calib", type=Path, metavar="DIR", help="calibration images (calib/)")
    parser.add_argument(
        "--calibrator",
        choices=("auto", "minmax", "entropy", "percentile", "mse"),
        help="(auto: what agrees best with the float network on the images)",
    )
    parser.add_argument(
        "--calib-images", type=_positive, metavar="N", help="take N of them, spread evenly"
    )
    parser.add_argument("--no-equalize", action="store_true", help="leave channels as they are")


def _add_backend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend",
        default="auto",
        choices=("auto", "tensorrt", "tensorrt-rtx", "onnxruntime"),
        help="(auto: the best that works here)",
    )


def _add_loading(parser: argparse.ArgumentParser) -> None:
    _add_backend(parser)
    parser.add_argument("--threads", type=_positive, help="CPU threads of ONNX Runtime")
    parser.add_argument(
        "--provider", choices=("cpu", "cuda", "tensorrt"), help="ONNX Runtime execution provider"
    )
    parser.add_argument(
        "--no-cuda-graph", action="store_true", help="TensorRT: launch kernels one by one"
    )
    _add_quiet(parser)


def _add_quiet(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _add_thresholds(parser: argparse.ArgumentParser, confidence: float | None = None) -> None:
    parser.add_argument(
        "--conf",
        type=float,
        default=confidence,
        help=f"confidence threshold ({0.03 if confidence is None else confidence})",
    )
    parser.add_argument("--iou", type=float, help="IoU threshold of NMS (0.65)")
    parser.add_argument("--max-detections", type=_positive, help="boxes kept an image (300)")


def _add_border(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--resize", type=_positive, help="side images are resized to; the rest is gray border"
    )
    parser.add_argument(
        "--border", type=int, help="gray pixels on each side; --resize 634 --border 3 makes 640"
    )


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON")


def _positive(text: str) -> int:
    value = int(text) if text.isascii() and text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return value


def _float_layers(text: str) -> tuple[str, ...] | int | str:
    if text == "auto":
        return text
    if text.isascii() and text.isdigit():
        return int(text)
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _three(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if len(parts) != 3:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form MIN,OPT,MAX")
    return tuple(_positive(part) for part in parts)


def _size(text: str) -> tuple[int, int]:
    sides = [_positive(part) for part in text.lower().split("x")]
    if len(sides) > 2:
        raise argparse.ArgumentTypeError(f"{text!r} is neither N nor HEIGHTxWIDTH")
    return sides[0], sides[-1]
