"""Engines into a model repository of Triton Inference Server, which serves them on many GPUs.

    <repository>/yolov6n_int8/config.pbtxt      how it is batched and where it runs
                             /labels.txt        the class names
                             /1/model.plan      the engine, or model.onnx

`config.pbtxt` is a `ModelConfig` in protobuf's text format. It is written here by hand, since
Triton's schema comes with its client only; the tests parse it with that schema. What a client needs
to prepare images and to read the outputs stands in the configuration's `parameters`.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trt_yolov6.common.files import check_writable
from trt_yolov6.engines import LoadOptions, load_engine
from trt_yolov6.engines.manifest import Manifest, check_plan, read_manifest
from trt_yolov6.errors import MissingDependencyError, UserError
from trt_yolov6.spec import BatchProfile, TensorSpec

PLATFORMS = {
    "tensorrt": ("tensorrt_plan", "model.plan"),
    "onnxruntime": ("onnxruntime_onnx", "model.onnx"),
}
"""Triton's platform and its name for the file, by backend."""

_TYPES = {
    "float16": "TYPE_FP16",
    "float32": "TYPE_FP32",
    "float64": "TYPE_FP64",
    "int8": "TYPE_INT8",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "uint8": "TYPE_UINT8",
}

_SHARED_OUTPUTS = ("end2end", "end2end_yolov7", "end2end_ppyoloe")
"""Layouts whose outputs hold the boxes of all images together: Triton cannot part them again."""


@dataclass(frozen=True)
class ServingSettings:
    """How Triton is to run the engines."""

    instances: int = 1
    """Copies of the engine on each GPU, or on the CPU, that work side by side."""
    gpus: tuple[int, ...] | None = None
    """Numbers of the GPUs; None takes all that the server has, `()` the CPU (ONNX only)."""
    max_queue_delay_us: int = 100
    """Microseconds a request waits at most for others to share a batch with."""
    default_cpu: bool = False
    """Where `gpus` is None, ONNX files run on the CPU: the server has no GPU."""

    def __post_init__(self) -> None:
        if self.instances < 1:
            raise UserError(f"--instances {self.instances} is too few; give 1 or more.")
        if self.max_queue_delay_us < 0:
            raise UserError(
                f"--max-queue-delay-us {self.max_queue_delay_us} is negative; give 0 or more."
            )
        if self.gpus and (min(self.gpus) < 0 or len(set(self.gpus)) < len(self.gpus)):
            raise UserError("--gpus names a GPU twice or below 0; give numbers such as 0,1.")


@dataclass(frozen=True)
class ServedModel:
    """An engine as Triton knows it."""

    engine: Path
    name: str
    """Of the entry: the network's name and precision, such as `yolov6n_int8`."""
    platform: str
    file_name: str
    input: TensorSpec
    outputs: tuple[TensorSpec, ...]
    batch: BatchProfile
    class_names: tuple[str, ...]
    parameters: dict[str, str]
    """What a client has to know: decoder, layout, pre-processing, names, where it came from."""
    shared_outputs: bool
    """The outputs hold the boxes of all images of a batch together."""

    @property
    def max_batch_size(self) -> int:
        """Triton's: 0 where it must not put requests together, and shapes are given in full."""
        return 0 if self.batch.is_static or self.shared_outputs else self.batch.max


def export_triton(
    engines: Sequence[str | Path],
    output: str | Path,
    settings: ServingSettings | None = None,
    loading: LoadOptions | None = None,
    names: Sequence[str] | None = None,
) -> tuple[Path, ...]:
    """Write engines into a model repository, one entry each, all of them or none.

    Args:
        engines: plans of TensorRT or ONNX files, with manifests beside them or, for ONNX, without.
        output: the repository; made if missing. Other entries in it are left alone.
        settings: instances, GPUs, batching.
        loading: the decoder of ONNX files without a manifest, where the graph does not tell.
        names: of the entries, in the order of `engines`; default: network and precision.

    Returns:
        The folders that were written, in the order of `engines`.

    Raises:
        UserError: an engine is missing, damaged or none that Triton loads, two would have the same
            name, or an entry of that name is there already.
    """
    settings = settings or ServingSettings()
    output = Path(output)
    models = [served_model(path, loading) for path in engines]
    if names is not None:
        models = [
            dataclasses.replace(model, name=_checked_name(name))
            for model, name in zip(models, names, strict=True)
        ]
    texts = [config_text(model, settings) for model in models]
    entries = [model.name for model in models]
    for name in entries:
        if entries.count(name) > 1:
            twice = " and ".join(str(model.engine) for model in models if model.name == name)
            raise UserError(f"{twice} would both become {name}; name the entries with --name.")
        if (output / name).exists():
            raise UserError(
                f"{output / name} is there already; remove it or choose another --output."
            )
    check_writable(output / "config.pbtxt")
    made = next(
        (
            folder
            for folder in (*reversed(output.absolute().parents), output)
            if not folder.exists()
        ),
        None,
    )
    written: list[Path] = []
    try:
        output.mkdir(parents=True, exist_ok=True)
        # A name with a dot in front, which Triton does not take for a model.
        with tempfile.TemporaryDirectory(prefix=".writing.", dir=output) as draft:
            for model, text in zip(models, texts, strict=True):
                _write_entry(Path(draft) / model.name, model, text)
            for name in entries:
                (Path(draft) / name).rename(output / name)
                written.append(output / name)
    except BaseException as error:
        for folder in written:
            shutil.rmtree(folder, ignore_errors=True)
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(
                f"{output} cannot be written ({error.strerror or error}); free the disk or choose "
                "a folder you may write to."
            ) from error
        raise
    return tuple(written)


def served_model(engine: str | Path, loading: LoadOptions | None = None) -> ServedModel:
    """Return what Triton has to know of an engine.

    Its manifest tells, so that a plan need not be loaded; an ONNX file without one is, with
    `loading`.

    Raises:
        UserError: it is missing, damaged or no engine that Triton loads, or the manifest is of an
            early version and the engine cannot be loaded here either.
    """
    path = Path(engine)
    if not path.is_file():
        raise UserError(f"{path} does not exist; check --engine.")
    manifest = read_manifest(path)
    if manifest is not None:
        check_plan(path, manifest)
        _check_backend(path, manifest.backend)
    if manifest is None and path.suffix == ".onnx":
        _check_inputs(path)
    if manifest is None or not manifest.tensors:
        return _loaded_model(path, manifest, loading)
    source, *outputs = manifest.tensors
    return _model(path, manifest.backend, manifest, source, tuple(outputs))


def _loaded_model(
    path: Path, manifest: Manifest | None, loading: LoadOptions | None
) -> ServedModel:
    try:
        with load_engine(path, options=loading) as engine:
            _check_backend(path, engine.backend)
            batch = manifest.batch if manifest else engine.batch
            # An ONNX file with a free batch axis sets no limit itself.
            free = BatchProfile() if batch.max > 1024 else batch
            details: dict[str, Any] = {
                "model": path.stem,
                "precision": _precision_of(path),
                "batch": free,
                "class_names": engine.class_names,
                "decoder": engine.decoder,
                "output_layout": engine.output_layout,
                "preprocessing": engine.preprocessing,
            }
            found = manifest or _Details(**details)
            return _model(path, engine.backend, found, engine.input, engine.outputs)
    except MissingDependencyError as error:
        raise UserError(
            f"{path} has no manifest that tells its tensors, and cannot be loaded to ask it "
            f"({error}); build it again, or export it on the machine that runs it."
        ) from error


@dataclass(frozen=True)
class _Details:
    """What stands in a manifest, of an engine that has none."""

    model: str
    precision: str
    batch: BatchProfile
    class_names: tuple[str, ...]
    decoder: str
    output_layout: str
    preprocessing: Any


def _check_inputs(path: Path) -> None:
    """Raise UserError for inputs that this package fills in itself: Triton would ask clients."""
    from trt_yolov6.graph.files import read_onnx
    from trt_yolov6.graph.inputs import runtime_inputs

    names = [item.name for item in runtime_inputs(read_onnx(path))]
    if len(names) > 1:
        raise UserError(
            f"{path} has the inputs {', '.join(names)}, of which an engine has the image only; "
            "build it with `trt-yolov6 build --onnx`, and export what was built."
        )


def _precision_of(path: Path) -> str:
    from trt_yolov6.graph.files import graph_precision, read_onnx

    return graph_precision(read_onnx(path)) if path.suffix == ".onnx" else "unknown"


def _check_backend(path: Path, backend: str) -> None:
    if backend == "tensorrt-rtx":
        raise UserError(
            f"{path} is a plan of TensorRT-RTX, which Triton's TensorRT backend does not load; "
            "build it with --backend tensorrt, or with --backend onnxruntime."
        )
    if backend not in PLATFORMS:
        raise UserError(f"{path} runs in {backend}, which Triton has no platform for.")


def _model(
    path: Path,
    backend: str,
    details: Manifest | _Details,
    source: TensorSpec,
    outputs: tuple[TensorSpec, ...],
) -> ServedModel:
    platform, file_name = PLATFORMS[backend]
    batch = details.batch
    fixed = source.shape[0]
    if fixed is not None:
        batch = BatchProfile(fixed, fixed, fixed)
    shared = details.output_layout in _SHARED_OUTPUTS
    if not batch.is_static and batch.min > 1 and not shared:
        raise UserError(
            f"{path} takes batches of {batch.min} or more, and Triton forms smaller ones where "
            "requests are few; build it with --dynamic 1,OPT,MAX, or with --batch."
        )
    for spec in (source, *outputs):
        if spec.dtype.name not in _TYPES:
            raise UserError(f"{path} has a tensor {spec.name!r} of {spec.dtype}, not for Triton.")
    parameters = {
        "decoder": details.decoder,
        "output_layout": details.output_layout,
        "preprocessing": str(details.preprocessing),
        "precision": details.precision,
        "class_names": json.dumps(list(details.class_names)),
    }
    if isinstance(details, Manifest):
        parameters["backend"] = f"{details.backend} {details.backend_version}"
        parameters["plan_sha256"] = details.plan_sha256
        if details.nms:
            nms = details.nms
            parameters["nms"] = f"confidence {nms.confidence}, IoU {nms.iou}"
    return ServedModel(
        engine=path,
        name=_safe(f"{details.model}_{details.precision}"),
        platform=platform,
        file_name=file_name,
        input=source,
        outputs=outputs,
        batch=batch,
        class_names=details.class_names,
        parameters=parameters,
        shared_outputs=shared,
    )


def _checked_name(name: str) -> str:
    """Return a name for an entry; raise UserError for one that Triton does not take."""
    if _safe(name) != name:
        raise UserError(
            f"--name {name} has characters that a model's name cannot have; give letters, digits, "
            "dots, hyphens and underscores."
        )
    return name


def _safe(name: str) -> str:
    """Return a name that is one folder of its own, whatever a file said of itself."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name).lstrip(".-") or "model"


# --- the configuration --------------------------------------------------------------------------


def runs_on_cpu(model: ServedModel, settings: ServingSettings) -> bool:
    """Return whether an engine is to run on the server's CPU."""
    by_default = settings.default_cpu and model.platform != "tensorrt_plan"
    return settings.gpus == () or (settings.gpus is None and by_default)


def config_text(model: ServedModel, settings: ServingSettings) -> str:
    """Return a model's `config.pbtxt`.

    Raises:
        UserError: a plan of TensorRT is to run on the CPU.
    """
    on_cpu = runs_on_cpu(model, settings)
    if on_cpu and model.platform == "tensorrt_plan":
        raise UserError(f"{model.engine} runs on GPUs only; leave --cpu out.")
    batched = model.max_batch_size > 0
    lines = [
        f"name: {_quoted(model.name)}",
        f"platform: {_quoted(model.platform)}",
        f"default_model_filename: {_quoted(model.file_name)}",
        f"max_batch_size: {model.max_batch_size}",
        *_block("input", _tensor_lines(model.input, batched)),
    ]
    # Triton's classification reads class names from there, by their place in the output.
    labelled = next((spec for spec in model.outputs if "score" in spec.name), model.outputs[0])
    for spec in model.outputs:
        labels = ['label_filename: "labels.txt"'] if spec is labelled and model.class_names else []
        lines += _block("output", [*_tensor_lines(spec, batched), *labels])
    if batched:
        preferred = sorted({model.batch.opt, model.batch.max} - {1})
        lines += _block(
            "dynamic_batching",
            [
                f"preferred_batch_size: [ {', '.join(map(str, preferred))} ]",
                f"max_queue_delay_microseconds: {settings.max_queue_delay_us}",
            ],
        )
    group = [f"count: {settings.instances}", f"kind: {'KIND_CPU' if on_cpu else 'KIND_GPU'}"]
    if settings.gpus:
        group.append(f"gpus: [ {', '.join(map(str, settings.gpus))} ]")
    lines += _block("instance_group", group)
    for key, value in model.parameters.items():
        text = _block("value", [f"string_value: {_quoted(value)}"])
        lines += _block("parameters", [f"key: {_quoted(key)}", *text])
    return "\n".join(lines) + "\n"


def _tensor_lines(spec: TensorSpec, batched: bool) -> list[str]:
    # With batching, Triton adds the batch axis itself.
    shape = spec.shape[1:] if batched else spec.shape
    lengths = ", ".join("-1" if length is None else str(length) for length in shape)
    return [
        f"name: {_quoted(spec.name)}",
        f"data_type: {_TYPES[spec.dtype.name]}",
        f"dims: [ {lengths} ]",
    ]


def _block(name: str, lines: Sequence[str]) -> list[str]:
    return [f"{name} {{", *(f"  {line}" for line in lines), "}"]


def _quoted(text: str) -> str:
    """Return a string of protobuf's text format: bytes beyond printable ASCII as octal escapes."""
    characters = []
    for byte in text.encode():
        if byte in b'"\\':
            characters.append("\\" + chr(byte))
        else:
            characters.append(chr(byte) if 32 <= byte < 127 else f"\\{byte:03o}")
    return '"' + "".join(characters) + '"'


def _write_entry(folder: Path, model: ServedModel, config: str) -> None:
    version = folder / "1"
    version.mkdir(parents=True)
    shutil.copyfile(model.engine, version / model.file_name)
    (folder / "config.pbtxt").write_text(config)
    if model.class_names:
        # A line a name: one that has several would shift all behind it.
        names = (" ".join(name.split()) for name in model.class_names)
        (folder / "labels.txt").write_text("".join(f"{name}\n" for name in names), "utf-8")
