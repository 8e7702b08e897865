"""Write engines into a model repository of Triton Inference Server.

    <repository>/yolov6n_int8/config.pbtxt      how it is batched and where it runs
                             /labels.txt        the class names
                             /1/model.plan      the engine, or model.onnx

or, for Triton's Python backend, which runs this package and with it engines of every backend,

    <repository>/yolov6n_int8_python/config.pbtxt
                                    /labels.txt
                                    /1/model.py         calls `serving.python_backend`
                                    /1/engine.onnx      or engine.trt
                                    /1/engine.json      its manifest

`config.pbtxt` is a `ModelConfig` in protobuf's text format. It is written by hand, since Triton's
schema comes only with its client; the tests parse it with that schema. Its `parameters` tell
clients how to prepare images and read the outputs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shutil
import tempfile
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from msgspec import Meta

from trt_yolov6.common.files import check_writable, made_folder, unwritable
from trt_yolov6.common.ranges import Checked, Count
from trt_yolov6.detectors.layouts import LAYOUTS
from trt_yolov6.engines import LoadOptions
from trt_yolov6.engines.manifest import Manifest, check_plan, read_manifest, write_manifest
from trt_yolov6.errors import UserError
from trt_yolov6.runtime.predict import check_thresholds, shown_nms
from trt_yolov6.serving.config_text import fields_of, quoted
from trt_yolov6.serving.python_backend import ENGINE_FILES, MAX_PIXELS
from trt_yolov6.spec import BatchProfile, NmsSettings, PredictOptions, TensorSpec

PLATFORMS = {
    "tensorrt": ("tensorrt_plan", "model.plan"),
    "onnxruntime": ("onnxruntime_onnx", "model.onnx"),
}
"""Triton's platform and its name for the file, by backend."""

MODEL_FILE = "model.py"

PYTHON = "python"
"""Triton's name of the backend that runs a `model.py`."""

Serves = Literal["tensors", "pictures"]
"""Input of an entry of the Python backend: the engine's own input, for its own outputs; or
encoded images, for boxes, scores and classes."""

_PICTURES = TensorSpec("picture", (None, 1), np.dtype(object))
"""The content of an image file each."""

_DETECTIONS = (
    TensorSpec("boxes", (None, None, 4), np.dtype(np.float32)),
    TensorSpec("scores", (None, None), np.dtype(np.float32)),
    TensorSpec("classes", (None, None), np.dtype(np.int64)),
    TensorSpec("count", (None, 1), np.dtype(np.int32)),
)
"""Outputs as `serving.requests.stacked` makes them."""

_TYPES = {
    "float16": "TYPE_FP16",
    "float32": "TYPE_FP32",
    "float64": "TYPE_FP64",
    "int8": "TYPE_INT8",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "uint8": "TYPE_UINT8",
    "object": "TYPE_STRING",
}


@dataclass(frozen=True)
class ServingSettings(Checked):
    """Settings for running the engines in Triton."""

    instances: Count = 1
    """Concurrent copies of the engine on each GPU, or on the CPU."""
    gpus: tuple[int, ...] | None = None
    """Numbers of the GPUs; None: all of the server's; `()`: the CPU (ONNX only)."""
    max_queue_delay_us: Annotated[int, Meta(ge=0)] = 100
    """Most microseconds that a request waits to share a batch with others."""
    default_cpu: bool = False
    """True for a server without a GPU: ONNX files run on the CPU if `gpus` is None."""
    predict: PredictOptions = dataclasses.field(default_factory=PredictOptions)
    """Thresholds of entries that take images; default: those of `infer`."""
    extra: str = ""
    """Further fields of `ModelConfig` in protobuf's text format, such as a response cache. They
    replace fields of the same name; `parameters` are added."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gpus and (min(self.gpus) < 0 or len(set(self.gpus)) < len(self.gpus)):
            raise UserError("`gpus` names a GPU twice or below 0; give numbers such as 0,1.")
        fixed = sorted(set(fields_of(self.extra)) & set(_OF_THE_ENGINE))
        if fixed:
            raise UserError(
                f"`extra` sets {', '.join(fixed)}, which the engine decides; leave it out."
            )


_OF_THE_ENGINE = (
    *("name", "platform", "backend", "default_model_filename"),
    *("max_batch_size", "input", "output"),
)


@dataclass(frozen=True)
class ServedModel:
    """Triton's description of an engine."""

    engine: Path
    name: str
    """Name of the entry: the network's name and precision, such as `yolov6n_int8`."""
    platform: str
    file_name: str
    input: TensorSpec
    outputs: tuple[TensorSpec, ...]
    batch: BatchProfile
    class_names: tuple[str, ...]
    parameters: dict[str, str]
    """Facts for clients: decoder, layout, preprocessing, class names, origin."""
    shared_outputs: bool
    """The outputs hold the boxes of all images together, which Triton cannot split."""
    backend: str = "onnxruntime"
    """Backend that the engine was built for."""
    serves: Serves | None = None
    """Input of the Python backend; None where Triton runs the engine itself."""
    nms: NmsSettings | None = None
    """Thresholds inside the engine."""

    @property
    def max_batch_size(self) -> int:
        """`max_batch_size` of the configuration: 0 where requests must not be batched."""
        if self.serves == "pictures":
            return self.batch.max
        return 0 if self.batch.is_static or self.shared_outputs else self.batch.max


def export_triton(
    engines: Sequence[str | Path],
    output: str | Path,
    settings: ServingSettings | None = None,
    loading: LoadOptions | None = None,
    names: Sequence[str] | None = None,
    python: Serves | None = None,
) -> tuple[Path, ...]:
    """Write engines into a model repository, one entry each, all of them or none.

    Args:
        engines: plans of TensorRT or ONNX files, with manifests next to them or, for ONNX, without;
            for the Python backend also plans of TensorRT-RTX.
        output: the repository; made if missing. Other entries in it are left alone.
        settings: instances, GPUs, batching.
        loading: the decoder and the pre-processing of ONNX files without a manifest.
        names: of the entries, in the order of `engines`; default: network and precision.
        python: write entries of Triton's Python backend, which take this; default: Triton runs the
            engines itself.

    Returns:
        The folders that were written, in the order of `engines`.

    Raises:
        UserError: an engine is missing, damaged or not one that Triton loads, or two entries would
            have one name, or there is an entry of that name already.
    """
    settings = settings or ServingSettings()
    output = Path(output)
    loading = loading or LoadOptions()
    models = [served_model(path, loading, python) for path in engines]
    if names is not None:
        if len(names) != len(models):
            raise UserError(
                f"`names` has {len(names)} names for {len(models)} engines; give one for each."
            )
        models = [
            dataclasses.replace(model, name=_checked_name(name))
            for model, name in zip(models, names, strict=True)
        ]
    texts = [config_text(model, settings) for model in models]
    entries = [model.name for model in models]
    for name in entries:
        if entries.count(name) > 1:
            twice = " and ".join(str(model.engine) for model in models if model.name == name)
            raise UserError(f"{twice} would both become {name}; name the entries with `names`.")
        if (output / name).exists():
            raise UserError(
                f"{output / name} is there already; remove it or choose another `output`."
            )
    check_writable(output / "config.pbtxt")
    _write_entries(models, texts, output)
    return tuple(output / name for name in entries)


def _write_entries(models: Sequence[ServedModel], texts: Sequence[str], output: Path) -> None:
    """Write all entries, or none."""
    undo = contextlib.ExitStack()
    try:
        with made_folder(output), undo:
            # A name with a dot in front, which Triton does not take for a model.
            with tempfile.TemporaryDirectory(prefix=".writing.", dir=output) as draft:
                for model, text in zip(models, texts, strict=True):
                    _write_entry(Path(draft) / model.name, model, text)
                for model in models:
                    (Path(draft) / model.name).rename(output / model.name)
                    undo.callback(shutil.rmtree, output / model.name, ignore_errors=True)
            undo.pop_all()
    except OSError as error:
        raise unwritable(output, error) from error


def served_model(
    engine: str | Path, loading: LoadOptions | None = None, python: Serves | None = None
) -> ServedModel:
    """Return Triton's description of an engine.

    It is made from the manifest, without loading the plan, or from an ONNX file without one.

    Args:
        engine: the file.
        loading, python: see `export_triton`.

    Raises:
        UserError: it is missing, damaged, not one that Triton loads, or a plan without a manifest.
    """
    path = Path(engine)
    if not path.is_file():
        raise UserError(f"{path} does not exist; check the path.")
    manifest = read_manifest(path)
    if manifest is not None:
        check_plan(path, manifest)
        if loading and (loading.decoder not in (None, manifest.decoder) or loading.preprocess):
            raise UserError(
                f"{path} has a manifest, which names its decoder and its preprocessing; leave "
                "`decoder` and `preprocess` out, or build it again with them."
            )
    elif path.suffix == ".onnx":
        from trt_yolov6.engines.build import graph_manifest
        from trt_yolov6.graph.onnx_import import graph_from_onnx

        _check_graph(path, python)
        loading = loading or LoadOptions()
        graph = graph_from_onnx(path, decoder=loading.decoder, preprocess=loading.preprocess)
        manifest = graph_manifest(graph, path, path.read_bytes())
    if manifest is None or not manifest.tensors:
        raise UserError(f"{path} has no manifest that lists its tensors; build it again.")
    _check_backend(path, manifest.backend, python)
    model = _model(path, manifest, python)
    return model if python is None else _in_python(model, python, loading)


def _in_python(model: ServedModel, serves: Serves, loading: LoadOptions | None) -> ServedModel:
    """Return an engine as this package runs it in Triton's Python backend."""
    name = f"{model.name}_{PYTHON if serves == 'tensors' else serves}"
    parameters = {**model.parameters, "serves": serves}
    if loading is not None and loading.preprocess:
        parameters["preprocess"] = json.dumps(dict(loading.preprocess))
    changes: dict[str, Any] = {"name": name, "platform": "", "parameters": parameters}
    if serves == "pictures":
        parameters["max_pixels"] = str(MAX_PIXELS)
        changes.update(input=_PICTURES, outputs=_DETECTIONS, shared_outputs=False)
    suffix = ".onnx" if model.backend == "onnxruntime" else ".trt"
    file_name = next(name for name in ENGINE_FILES if name.endswith(suffix))
    return dataclasses.replace(model, file_name=file_name, serves=serves, **changes)


def _check_graph(path: Path, python: Serves | None) -> None:
    """Raise UserError for an ONNX file with external weights or inputs other than images.

    This package fills in or casts such inputs; Triton would require them of clients.
    """
    from trt_yolov6.graph.files import has_other_files, read_onnx, value_spec
    from trt_yolov6.graph.inputs import runtime_inputs

    if has_other_files(path):
        raise UserError(
            f"{path} keeps weights in other files; build it with `trt-yolov6 build --onnx`, which "
            "puts them inside, and export what was built."
        )
    if python is not None:
        return
    inputs = [value_spec(item, path) for item in runtime_inputs(read_onnx(path))]
    if len(inputs) > 1 or inputs[0].dtype == np.float16:
        listed = ", ".join(f"{one.name} ({one.dtype})" for one in inputs)
        raise UserError(
            f"{path} takes {listed}, and an engine takes images alone, in float32 or uint8; build "
            "it with `trt-yolov6 build --onnx`, and export what was built."
        )


def _check_backend(path: Path, backend: str, python: Serves | None) -> None:
    if python is not None:
        return
    if backend == "tensorrt-rtx":
        raise UserError(
            f"{path} is a plan of TensorRT-RTX, which Triton's TensorRT backend does not load; "
            "give `python`, or build it with the backend tensorrt."
        )
    if backend not in PLATFORMS:
        raise UserError(f"{path} runs in {backend}, which Triton does not; give `python`.")


def _model(path: Path, details: Manifest, python: Serves | None) -> ServedModel:
    platform, file_name = PLATFORMS.get(details.backend, ("", ""))
    source, *outputs = details.tensors
    fixed = source.shape[0]
    batch = details.batch if fixed is None else BatchProfile.of(fixed)
    shared = LAYOUTS[details.output_layout].shared
    # The Python backend pads small batches.
    if not batch.is_static and batch.min > 1 and not shared and python is None:
        raise UserError(
            f"{path} takes batches of {batch.min} or more, and Triton forms smaller ones where "
            "requests are few; build it for batches from 1, or for one size."
        )
    for spec in (source, *outputs):
        if spec.dtype.name not in _TYPES:
            raise UserError(
                f"{path} has a tensor {spec.name!r} of {spec.dtype}, which Triton does not have; "
                "export the detector with float or uint8 input."
            )
    parameters = {
        "decoder": details.decoder,
        "output_layout": details.output_layout,
        "preprocessing": str(details.preprocessing),
        "precision": details.precision,
        "class_names": json.dumps(list(details.class_names)),
        "backend": f"{details.backend} {details.backend_version}",
        "plan_sha256": details.plan_sha256,
    }
    if details.nms:
        nms = details.nms
        parameters["nms"] = f"confidence {nms.confidence}, IoU {nms.iou}"
    return ServedModel(
        engine=path,
        name=_safe(f"{details.model}_{details.precision}"),
        platform=platform,
        file_name=file_name,
        input=source,
        outputs=tuple(outputs),
        batch=batch,
        class_names=details.class_names,
        parameters=parameters,
        nms=details.nms,
        shared_outputs=shared,
        backend=details.backend,
    )


def _checked_name(name: str) -> str:
    """Return a name for an entry; raise UserError for one that Triton does not take."""
    if _safe(name) != name:
        raise UserError(
            f"`names`: {name} has characters that a model's name cannot have; give letters, "
            "digits, dots, hyphens and underscores."
        )
    return name


def _safe(name: str) -> str:
    """Return a name that is a single folder, whatever a manifest says."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name).lstrip(".-") or "model"


# --- the configuration --------------------------------------------------------------------------


def runs_on_cpu(model: ServedModel, settings: ServingSettings) -> bool:
    """Return whether an engine is to run on the server's CPU."""
    by_default = settings.default_cpu and model.backend == "onnxruntime"
    return settings.gpus == () or (settings.gpus is None and by_default)


def config_text(model: ServedModel, settings: ServingSettings) -> str:
    """Return a model's `config.pbtxt`.

    Raises:
        UserError: a plan of TensorRT cannot run on the CPU, or see `check_thresholds`.
    """
    on_cpu = runs_on_cpu(model, settings)
    if on_cpu and model.backend != "onnxruntime":
        raise UserError(f"{model.engine} runs on GPUs only; give it `gpus`, not the CPU.")
    batched = model.max_batch_size > 0
    runner = f"platform: {quoted(model.platform)}"
    if model.serves is not None:
        runner = f"backend: {quoted(PYTHON)}"
    fields = [
        f"name: {quoted(model.name)}",
        runner,
        f"default_model_filename: {quoted(MODEL_FILE if model.serves else model.file_name)}",
        f"max_batch_size: {model.max_batch_size}",
        _block("input", *_tensor_lines(model.input, batched)),
    ]
    # Triton's classification extension reads class names from labels.txt.
    labelled = next((spec for spec in model.outputs if "score" in spec.name), model.outputs[0])
    has_labels = bool(model.class_names) and model.serves != "pictures"
    for spec in model.outputs:
        labels = ['label_filename: "labels.txt"'] if spec is labelled and has_labels else []
        fields.append(_block("output", *_tensor_lines(spec, batched), *labels))
    if batched:
        preferred = sorted({model.batch.opt, model.batch.max} - {1})
        size = f"preferred_batch_size: [ {', '.join(map(str, preferred))} ]"
        delay = f"max_queue_delay_microseconds: {settings.max_queue_delay_us}"
        fields.append(_block("dynamic_batching", size, delay))
    group = [f"count: {settings.instances}", f"kind: {'KIND_CPU' if on_cpu else 'KIND_GPU'}"]
    if settings.gpus:
        group.append(f"gpus: [ {', '.join(map(str, settings.gpus))} ]")
    fields.append(_block("instance_group", *group))
    parameters = dict(model.parameters)
    if model.serves == "pictures":
        check_thresholds(model.engine, model.nms, settings.predict.nms(shown_nms(model.nms)))
        parameters.update((key, str(value)) for key, value in settings.predict.thresholds().items())
    for key, value in parameters.items():
        block = _block("value", f"string_value: {quoted(value)}")
        fields.append(_block("parameters", f"key: {quoted(key)}", block))
    replaced = set(fields_of(settings.extra)) - {"parameters"}
    kept = [field for field in fields if re.split(r"\W", field, maxsplit=1)[0] not in replaced]
    return "\n".join([*kept, settings.extra.strip()]).rstrip("\n") + "\n"


def _tensor_lines(spec: TensorSpec, batched: bool) -> list[str]:
    # With batching, Triton adds the batch axis itself.
    shape = spec.shape[1:] if batched else spec.shape
    lengths = ", ".join("-1" if length is None else str(length) for length in shape)
    return [
        f"name: {quoted(spec.name)}",
        f"data_type: {_TYPES[spec.dtype.name]}",
        f"dims: [ {lengths} ]",
    ]


def _block(name: str, *fields: str) -> str:
    inside = textwrap.indent("\n".join(fields), "  ")
    return f"{name} {{\n{inside}\n}}"


def _write_entry(folder: Path, model: ServedModel, config: str) -> None:
    version = folder / "1"
    version.mkdir(parents=True)
    shutil.copyfile(model.engine, version / model.file_name)
    if model.serves is not None:
        shutil.copyfile(Path(__file__).with_name("triton_model.py"), version / MODEL_FILE)
        manifest = read_manifest(model.engine)
        if manifest is not None:
            write_manifest(
                version / model.file_name, dataclasses.replace(manifest, engine=model.file_name)
            )
    (folder / "config.pbtxt").write_text(config, "utf-8")
    if model.class_names:
        # A name of several lines would shift all after it.
        names = (" ".join(name.split()) for name in model.class_names)
        (folder / "labels.txt").write_text("".join(f"{name}\n" for name in names), "utf-8")
