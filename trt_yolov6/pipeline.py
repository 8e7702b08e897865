"""From a checkpoint or ONNX file to an engine: `export`, `quantize`, `build`."""

from __future__ import annotations

import dataclasses
import logging
import os
import reprlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict

from trt_yolov6.backends import BACKENDS
from trt_yolov6.checkpoints import is_named_as_checkpoint
from trt_yolov6.common.files import check_writable, path_of
from trt_yolov6.common.progress import a_line_a_minute
from trt_yolov6.common.ranges import fitting, of_class
from trt_yolov6.data.sources import check_source
from trt_yolov6.engines.base import BuildSettings
from trt_yolov6.engines.build import (
    BuiltEngine,
    all_in_float,
    build_engine,
    check_build,
    check_graph_output,
    check_not_source,
    engine_path,
    write_graph,
)
from trt_yolov6.errors import UserError
from trt_yolov6.graph.model import Graph
from trt_yolov6.spec import BatchProfile, NmsSettings, Precision, is_whole, two_sides

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from trt_yolov6.checkpoints.loading import Checkpoint
    from trt_yolov6.quantization.settings import QuantizationSettings
    from trt_yolov6.runtime.sensitivity_report import LabelledAp

Source: TypeAlias = "str | os.PathLike[str] | Checkpoint | Graph"
"""Source of an engine: a checkpoint (`.pt`), any detector's ONNX file, or a graph."""

_log = logging.getLogger(__name__)


class GraphOptions(TypedDict, total=False):
    """Options for making a graph: keywords of `export`, `quantize` and `build`."""

    image_size: int | tuple[int, int] | None
    """Side, or height and width, of the input in pixels; multiples of 32. Default: what a
    checkpoint was trained at (the authors' mostly 640), and an ONNX file's own."""
    batch: int | tuple[int, int, int] | BatchProfile | None
    """A fixed batch size, or (min, opt, max). Default: (1, 32, 32), and an ONNX file's own."""
    nms: NmsSettings | None
    """Checkpoints: put non-maximum suppression with these thresholds into the graph."""
    uint8_input: bool
    """Checkpoints: take uint8 RGB pixels (batch, height, width, 3), normalized in the graph."""
    opset: int | None
    """Checkpoints: ONNX opset, 17 or later. Default: 18."""
    class_names: Sequence[str] | str | Path | None
    """ONNX files: names in the order of the scores, or a file of them (text or COCO JSON)."""
    decoder: str | None
    """ONNX files: the detector's family, see `detectors.families`. Default: recognized."""
    preprocess: Mapping[str, Any] | None
    """ONNX files: fields of `Preprocessing` that differ from the family's, by name."""


class LabelledOptions(GraphOptions, total=False):
    """Further keywords of `quantize` and `build`."""

    data: str | Path | None
    """Labelled data set to measure the AP budget of `:auto` on; without it, the budget is one of
    agreement with the float network on the calibration images."""
    split: str | None
    """Split of that data set."""
    progress: bool
    """Show a progress bar; off a terminal, log a line a minute (True)."""


class QuantizeOptions(LabelledOptions, total=False):
    """Further keywords of `quantize`."""

    table: str | Path | None
    """Calibration table to reuse where it still applies, and to write."""


class BuildOptions(LabelledOptions, total=False):
    """Further keywords of `build`."""

    quantization: QuantizationSettings | None
    """Calibration settings for INT8 and FP8; `precision` decides type, rest and float layers."""
    target: str | None
    """GPU to cross-build for with TensorRT-RTX, such as `t4`."""
    clean: bool
    """Remove surplus Q/DQ nodes of an ONNX file (True)."""
    allow_float: bool
    """Build even where the backend would compute a quantized graph in float (False)."""


def export(
    source: Source,
    *,
    precision: str | Precision | None = None,
    output: str | Path | None = None,
    **options: Unpack[GraphOptions],
) -> Graph:
    """Export a checkpoint to ONNX, or read a detector's ONNX file.

    Args:
        source: a checkpoint or an ONNX file.
        precision: `fp32` or `fp16`; None: fp32 for a checkpoint, the file's own for ONNX.
        output: ONNX file to write, with a manifest next to it; None writes nothing.
        options: see `GraphOptions`.

    Returns:
        The graph, for `quantize` and `build`.

    Raises:
        UserError: the source is not a detector, or an option does not apply to it.

    Examples:
        >>> from trt_yolov6 import export
        >>> graph = export("yolov6n.pt", image_size=64, batch=1, output="yolov6n.onnx")
        >>> graph.name, graph.precision, graph.image_size, graph.class_names
        ('yolov6n', 'fp32', (64, 64), ('RBC', 'WBC', 'Platelets'))
    """
    _check_paths(source, output=output)
    _check_options("export", options, GraphOptions)
    precision = None if precision is None else Precision.parse(precision)
    if precision is not None and precision.quantizes:
        raise UserError(
            f"export writes fp32 or fp16, not {precision}; quantize the graph with `quantize`."
        )
    check_graph_output(source, output)
    graph = _float_graph(source, precision, options)
    if output is not None:
        write_graph(graph, output)
    return graph


def quantize(
    source: Source,
    calibration: str | Path,
    *,
    precision: str | Precision = "int8",
    settings: QuantizationSettings | None = None,
    output: str | Path | None = None,
    **options: Unpack[QuantizeOptions],
) -> Graph:
    """Quantize a float detector after training, by inserting Q/DQ nodes.

    Args:
        source: a checkpoint, a float32 ONNX file or graph.
        calibration: folder of images like those the detector will see, a few dozen.
        precision: `int8` or `fp8`, with `+fp16` for the rest and `:6` or `:auto` for layers that
            stay in float, such as `int8+fp16:auto`.
        settings: how to calibrate; `precision` decides its type, rest and float layers.
        output: ONNX file to write, with a manifest next to it; None writes nothing.
        options: see `QuantizeOptions` and `GraphOptions`.

    Raises:
        UserError: the source is not a float32 detector, or the images cannot calibrate it.

    Examples:
        >>> from trt_yolov6 import QuantizationSettings, quantize
        >>> quick = QuantizationSettings(calibrator="minmax", equalize=False, bias_correction=False)
        >>> graph = quantize("yolov6n.onnx", "calib", settings=quick)
        >>> graph.precision, graph.calibration["calibrator"]
        ('int8', 'minmax')
    """
    from trt_yolov6.quantization import pipeline
    from trt_yolov6.quantization.settings import check_settings
    from trt_yolov6.quantization.table import write_table
    from trt_yolov6.quantization.trials import tried_table

    _check_paths(source, calibration, output)
    _check_options("quantize", options, QuantizeOptions)
    precision = Precision.parse(precision)
    if not precision.quantizes:
        raise UserError(f"quantize makes int8 or fp8, not {precision}; give that to `export`.")
    _check_given(calibration, precision)
    settings = quantization_settings(precision, settings, "settings")
    check_settings(settings)
    _check_labelled(precision, options)
    data, table = options.get("data"), options.get("table")
    check_graph_output(source, output)
    if table is not None:
        check_writable(table)
    graph = _float_graph(source, None, options)
    progress = options.get("progress", True)
    with a_line_a_minute(f"quantizing {graph.name}", progress=progress):
        result = pipeline.quantize(
            graph,
            calibration,
            settings,
            table_file=table,
            score=labelled_score(graph, data, options.get("split")),
        )
    if table is not None:
        write_table(table, result.table)
    for line in tried_table(result.candidates):
        _log.info("%s", line)
    layers, kept = result.placement.layers, result.placement.float_layers
    count = f"{len(kept)} of {len(layers) + len(kept)}" if kept else "none"
    ranges = "" if table is None else f"; ranges in {table}"
    _log.info(f"convolutions left in float: {count}{ranges}")
    if output is not None:
        write_graph(result.graph, output)
    return result.graph


def build(
    source: Source,
    *,
    precision: str | Precision | None = None,
    calibration: str | Path | None = None,
    backend: str = "auto",
    output: str | Path | None = None,
    settings: BuildSettings | None = None,
    **options: Unpack[BuildOptions],
) -> BuiltEngine:
    """Build an engine, and write it with its manifest.

    Args:
        source: a checkpoint, any detector's ONNX file, or a graph from `export` or `quantize`.
        precision: `fp32`, `fp16`, `int8`, `fp8` or, for example, `int8+fp16:auto`, see
            `Precision`; None: fp32 for a checkpoint, the source's own for ONNX files and graphs.
        calibration: folder of calibration images, for INT8 and FP8. With an ONNX file that has Q/DQ
            nodes, the images on which their clean-up is verified.
        backend: `tensorrt`, `tensorrt-rtx`, `onnxruntime`, or `auto`: the fastest that works here.
        output: path of the engine; None: `engines/<name>-<precision>.onnx` or `.trt`.
        settings: TensorRT's limits, caches and calibration.
        options: see `BuildOptions` and `GraphOptions`.

    Returns:
        Path and manifest; it stands for the path in `load`, `evaluate`, `benchmark`, `compare`,
        `inspect` and `open`.

    Raises:
        UserError: the backend is missing or refuses a setting, or see `export` and `quantize`.

    Examples:
        >>> from trt_yolov6 import build
        >>> built = build("yolov6n.onnx", precision="fp16", output="yolov6n-fp16.onnx")
        >>> built.manifest.precision, built.manifest.backend
        ('fp16', 'onnxruntime')
    """
    _check_paths(source, calibration, output)
    _check_options("build", options, BuildOptions)
    precision = None if precision is None else Precision.parse(precision)
    settings = of_class(settings, BuildSettings, "settings")
    # A profile in the settings counts as `batch`, unless it is the default or the graph's own.
    ignored = (BatchProfile(), source.batch if isinstance(source, Graph) else None)
    if options.get("batch") is None and settings.batch not in ignored:
        options = {**options, "batch": settings.batch}
    progress = options.get("progress", settings.progress)
    settings = dataclasses.replace(
        settings,
        target=options.get("target") or settings.target,
        fp8=precision is not None and precision.base == "fp8",
        progress=progress,
    )
    # Before the export, which takes seconds.
    name = check_build(backend, output, settings)
    check_not_source(source, output)
    _check_labelled(precision, options)
    quantized = precision if precision is not None and precision.quantizes else None
    if quantized is not None:
        _check_quantizing(quantized, calibration, name, settings, options)
    graph = _float_graph(source, None if quantized else precision, options)
    if quantized is None and settings.calibration is None:
        _check_unused(graph, calibration, options)
    if BACKENDS[name].tensorrt:
        graph = _for_tensorrt(graph)
    for note in graph.notes:
        _log.info("%s: %s", graph.source, note)
    if settings.calibration:
        graph, settings = _calibrated_by_tensorrt(graph, calibration, settings, options)
    elif quantized is not None:
        assert calibration is not None
        # The engine's name has the precision it will have, not the float graph's.
        named = dataclasses.replace(graph, precision=quantized.base)
        engine = engine_path(named, name, output, settings.target)
        graph = _quantized_for(name, engine, graph, quantized, calibration, options)
    elif not isinstance(source, Graph) and options.get("clean", True):
        graph = _cleaned(graph, calibration)
    path = engine_path(graph, name, output, settings.target)
    if path.is_file():
        _log_replaced(path, graph, chosen=output is not None)
    with a_line_a_minute(f"building {path}", progress=progress):
        return build_engine(
            graph,
            backend=name,
            output=path,
            settings=settings,
            allow_float=options.get("allow_float", False),
        )


def _quantized_for(
    backend: str,
    engine: Path,
    graph: Graph,
    precision: Precision,
    calibration: str | Path,
    options: BuildOptions,
) -> Graph:
    """Quantize a graph for a backend, with its calibration table next to the engine."""
    from trt_yolov6.quantization.settings import QuantizationSettings
    from trt_yolov6.quantization.table import table_path

    settings = settings_for(backend, options.get("quantization") or QuantizationSettings())
    return quantize(
        graph,
        calibration,
        precision=precision,
        settings=settings,
        data=options.get("data"),
        split=options.get("split"),
        table=table_path(engine),
        progress=options.get("progress", True),
    )


def settings_for(backend: str, settings: QuantizationSettings) -> QuantizationSettings:
    """Return quantization settings without what a backend loses by.

    For TensorRT that is `shift`, and in version 8 `depthwise`.
    """
    if backend != "tensorrt":
        return settings
    from trt_yolov6.engines.tensorrt.enterprise import has_int8_depthwise

    depthwise = settings.depthwise and has_int8_depthwise()
    return dataclasses.replace(settings, shift=False, depthwise=depthwise)


def quantization_settings(
    precision: Precision, settings: QuantizationSettings | None, name: str = "quantization"
) -> QuantizationSettings:
    """Return settings whose type, rest and float layers are those of a precision.

    `name` is the parameter's that they were passed as, for the message.

    Raises:
        UserError: they contradict it themselves.
    """
    from trt_yolov6.quantization.settings import QuantizationSettings
    from trt_yolov6.quantization.types import FP8, INT8

    given = of_class(settings, QuantizationSettings, name)
    result = dataclasses.replace(
        given,
        quantized=FP8 if precision.base == "fp8" else INT8,
        fp16=precision.rest == "fp16",
        float_layers=precision.float_layers or (),
    )
    for field in ("quantized", "fp16", "float_layers"):
        default = getattr(type(given), field)
        # `float_layers` may be 0 for ().
        if (getattr(given, field) or default) not in (default, getattr(result, field)):
            raise UserError(
                f"`{name}` contradicts `precision` {precision} on `{field}`; give it in "
                "`precision`, such as int8+fp16:6."
            )
    return result


def labelled_score(graph: Graph, data: str | Path | None, split: str | None) -> LabelledAp | None:
    """Return the function that measures a graph's AP on a data set; None without one."""
    if data is None:
        return None
    from trt_yolov6.data.coco import check_objects, load_coco
    from trt_yolov6.runtime.sensitivity_report import LabelledAp

    dataset = load_coco(data, split)
    check_objects(dataset, "give annotations, or leave `data` out")
    return LabelledAp(graph, dataset)


def _float_graph(
    source: Source,
    precision: Precision | None,
    options: GraphOptions | QuantizeOptions | BuildOptions,
) -> Graph:
    """Return a source's graph in fp32 or fp16, or (None) its own precision."""
    if isinstance(source, os.PathLike):
        source = Path(source)
    image_size, batch = options.get("image_size"), options.get("batch")
    size = None if image_size is None else two_sides(image_size)
    profile = None if batch is None else BatchProfile.of(batch)
    fp16 = precision is not None and precision.base == "fp16"
    of_checkpoint = {name: options.get(name) for name in ("nms", "uint8_input", "opset")}
    of_onnx = {name: options.get(name) for name in ("class_names", "decoder", "preprocess")}
    if isinstance(source, Graph):
        of_file = {"image_size": image_size, "batch": batch}
        _refuse({**of_checkpoint, **of_onnx, **of_file}, "a graph that is there already")
        graph = source
    elif _is_checkpoint(source):
        from trt_yolov6.checkpoints.loading import load_checkpoint
        from trt_yolov6.graph.export import DEFAULT_OPSET, ExportSettings, graph_from_checkpoint

        _refuse(of_onnx, "a checkpoint, which is a YOLOv6 and brings its class names along")
        checkpoint = load_checkpoint(source) if isinstance(source, (str, Path)) else source
        trained = checkpoint.training.image_size if checkpoint.training else None
        settings = ExportSettings(
            image_size=size or (two_sides(trained) if trained else None),
            batch=profile or BatchProfile(),
            fp16=fp16,
            nms=options.get("nms"),
            uint8_input=options.get("uint8_input", False),
            opset=options.get("opset") or DEFAULT_OPSET,
        )
        _log.info(
            "exporting %s from %s to ONNX (some seconds) ...", checkpoint.arch.name, checkpoint.path
        )
        graph = graph_from_checkpoint(checkpoint, settings)
    else:
        from trt_yolov6.data.class_names import read_class_names
        from trt_yolov6.graph.onnx_import import graph_from_onnx

        assert isinstance(source, (str, Path))
        _refuse(of_checkpoint, "an ONNX file: it changes how a checkpoint is exported")
        class_names = options.get("class_names")
        if isinstance(class_names, (str, Path)):
            class_names = read_class_names(class_names)
        graph = graph_from_onnx(
            source,
            batch=profile,
            image_size=size,
            fp16=fp16,
            class_names=class_names,
            decoder=options.get("decoder"),
            preprocess=options.get("preprocess"),
        )
    if precision is not None and graph.precision != precision.base:
        raise UserError(
            f"{graph.source} is {graph.precision} and cannot be made {precision}; "
            "leave `precision` out."
        )
    return graph


_INTEGERS = {
    "image_size": (2, "an integer, or two (height, width)"),
    "batch": (3, "an integer, or three (min, opt, max)"),
    "opset": (1, "an integer"),
}
"""Options that are one integer or this number of them, and that in words."""

_KINDS: dict[str, Any] = {
    "decoder": str | None,
    "preprocess": Mapping[str, Any] | None,
    "split": str | None,
    "target": str | None,
}
"""Types of other options."""


def _check_options(function: str, options: Mapping[str, Any], known: type[Any]) -> None:
    for name, value in options.items():
        if name not in known.__annotations__:
            raise TypeError(f"{function}() has no parameter {name!r}")
        if name == "nms" and not isinstance(value, (NmsSettings, NoneType)):
            raise UserError(f"`nms` is {value!r}; give thresholds, such as NmsSettings(), or None.")
        if name in ("data", "table") and value is not None:
            path_of(value, name)
        if name in _KINDS:
            fitting(value, _KINDS[name], f"`{name}`")
        if name not in _INTEGERS or value is None or isinstance(value, BatchProfile):
            continue
        count, words = _INTEGERS[name]
        values = value if isinstance(value, (tuple, list)) and count > 1 else (value,) * count
        if len(values) != count or not all(is_whole(one) for one in values):
            raise UserError(f"`{name}` is {value!r}; give {words}.")


def _check_paths(source: object, calibration: object = None, output: object = None) -> None:
    # A graph and a checkpoint are dataclasses.
    if not isinstance(source, (str, os.PathLike)) and not dataclasses.is_dataclass(source):
        raise UserError(
            f"`source` is {reprlib.repr(source)}; give the path of a checkpoint or ONNX file."
        )
    if not isinstance(calibration, (str, os.PathLike, NoneType)):
        raise UserError(
            f"`calibration` is {reprlib.repr(calibration)}; give the path of a folder of images."
        )
    if output is not None:
        path_of(output, "output")


def _check_unused(graph: Graph, calibration: str | Path | None, options: Mapping[str, Any]) -> None:
    """Refuse what only quantizing reads, where nothing is quantized."""
    unused: dict[str, Any] = {"quantization": options.get("quantization")}
    if graph.precision in ("fp32", "fp16"):  # else a clean-up is verified on the images
        unused["calibration"] = calibration
    for name, value in unused.items():
        if value is not None:
            raise UserError(
                f"`{name}` is for INT8 and FP8; give one of them as the precision, or leave it out."
            )


def _refuse(options: Mapping[str, Any], what: str) -> None:
    for name, value in options.items():
        if value is not None and value is not False:
            raise UserError(f"`{name}` is not for {what}; leave it out.")


def _is_checkpoint(source: str | Path | Checkpoint) -> bool:
    """Return whether a source is a checkpoint: by its ending, else by its first bytes."""
    if not isinstance(source, (str, Path)):
        return True
    path = Path(source)
    if is_named_as_checkpoint(path) or path.suffix.lower() == ".onnx" or not os.path.isfile(path):
        return is_named_as_checkpoint(path)
    with path.open("rb") as file:
        return file.read(2) in (b"PK", b"\x80\x02")  # an archive, or an early version's pickle


def _check_labelled(precision: Precision | None, options: LabelledOptions) -> None:
    data, split = options.get("data"), options.get("split")
    if data is not None and (precision is None or precision.float_layers != "auto"):
        kind = "the source's own" if precision is None else precision
        raise UserError(f"`data` is for a precision such as int8:auto, not {kind}.")
    if data is None and split is not None:
        raise UserError("`split` is part of a data set; name that as `data`.")
    if data is not None:
        check_source(data, split)


def _check_quantizing(
    precision: Precision,
    calibration: str | Path | None,
    backend: str,
    settings: BuildSettings,
    options: BuildOptions,
) -> None:
    """Refuse what cannot be quantized for this backend, before minutes of work."""
    from trt_yolov6.data.calibration import calibration_images
    from trt_yolov6.engines.int8_probe import computes
    from trt_yolov6.quantization.settings import check_settings

    calibration = _check_given(calibration, precision)
    how = quantization_settings(precision, options.get("quantization"))
    check_settings(how)
    calibration_images(calibration, how.image_limit)
    if not options.get("allow_float") and not computes(backend, settings, how.quantized):
        raise all_in_float(precision.base, backend, settings.target or "this machine's GPU")


def _check_given(calibration: str | Path | None, precision: Precision) -> str | Path:
    if calibration is None:
        raise UserError(
            f"{precision} needs calibration images; name a folder of them as `calibration`.",
        )
    return calibration


def _for_tensorrt(graph: Graph) -> Graph:
    """Return a graph that TensorRT takes: unsigned INT8 levels become signed ones.

    Raises:
        UserError: see `quantization.qdq.symmetric.check_symmetric`.
    """
    if graph.precision not in ("int8", "int8-dynamic"):
        return graph
    from trt_yolov6.quantization.qdq.symmetric import with_symmetric_int8

    model, note = with_symmetric_int8(graph.model, graph.source)
    if note is None:
        return graph
    return dataclasses.replace(graph, model=model, notes=(*graph.notes, note))


def _calibrated_by_tensorrt(
    graph: Graph,
    calibration: str | Path | None,
    settings: BuildSettings,
    options: BuildOptions,
) -> tuple[Graph, BuildSettings]:
    """Return a float graph as the INT8 one that TensorRT makes of it, and settings with images."""
    from trt_yolov6.data.calibration import calibration_images
    from trt_yolov6.quantization.judge import batches_of

    implicit = settings.calibration
    assert implicit is not None
    if graph.precision != "fp32":
        raise UserError(
            f"{graph.source} is {graph.precision}, and TensorRT calibrates float32 graphs; give "
            "one without Q/DQ nodes and casts."
        )
    how: dict[str, Any] = {"cache": str(implicit.cache)}
    if implicit.cache is None:
        if calibration is None:
            raise UserError("TensorRT calibrates on images; name `calibration`.")
        quantization = options.get("quantization")
        limit = quantization.image_limit if quantization else None
        paths = list(calibration_images(calibration, limit))
        implicit = dataclasses.replace(implicit, images=lambda: batches_of(graph, paths))
        how = {"tensorrt": implicit.algorithm, "images": len(paths)}
    quantized = dataclasses.replace(graph, precision="int8", calibration=how)
    return quantized, dataclasses.replace(settings, calibration=implicit)


def _cleaned(graph: Graph, calibration: str | Path | None) -> Graph:
    """Remove surplus Q/DQ nodes from a quantized file's graph, and verify that on images."""
    if graph.precision == "fp8":
        _log.info("surgery: FP8's Q/DQ nodes are left as they are")
    if graph.precision != "int8":
        return graph
    from trt_yolov6.data.calibration import calibration_batches
    from trt_yolov6.graph.inputs import input_spec
    from trt_yolov6.quantization.qdq.cleanup import clean
    from trt_yolov6.quantization.qdq.verify import verify_clean

    model, removals = clean(graph.model)
    if not removals:
        _log.info("surgery: no Q/DQ node of the graph is surplus")
        return graph
    for kind, count in Counter(removal.kind for removal in removals).items():
        first = next(removal for removal in removals if removal.kind == kind)
        _log.info("surgery: %d x %s, such as %s", count, kind.replace("_", " "), first)
    if calibration is None:
        _log.info("surgery: not verified; calibration images compare the outputs")
        return dataclasses.replace(graph, model=model)
    images = calibration_batches(
        calibration, input_spec(model), limit=8, preprocessing=graph.preprocessing
    )
    for shift in verify_clean(graph.model, model, images):
        _log.info(
            f"surgery: {shift.output} moved by {shift.moved:.3g} (RMS); quantization itself moves "
            f"it by {shift.quantization:.3g}"
        )
        if not shift.explained:
            raise UserError(
                f"surgery on {graph.source} moved {shift.output} more than quantization explains; "
                "turn it off (`clean`) and please report the file.",
            )
    return dataclasses.replace(graph, model=model)


def _log_replaced(path: Path, graph: Graph, *, chosen: bool) -> None:
    """Log what the engine that is about to be replaced is, by its manifest.

    It is a warning if that engine has another source and the user has not `chosen` the name: the
    `best.pt` of two trainings share one.
    """
    from trt_yolov6.engines.manifest import read_manifest

    try:
        manifest = read_manifest(path)
    except UserError:
        manifest = None
    if manifest is None:
        _log.info("replacing %s", path)
        return
    is_other = manifest.source_sha256 != graph.source_sha256
    level = logging.WARNING if is_other and not chosen else logging.INFO
    source = f"{'another ' if is_other else ''}{manifest.source}"
    _log.log(level, "replacing %s (%s, of %s)", path, manifest.precision, source)
