"""The model that Triton's Python backend runs: an engine of any backend, from its entry's folder.

`export-triton --python-backend` writes an entry whose `model.py` imports `TritonPythonModel` from
here. What it needs to know stands in the `Parameters` of the entry's `config.pbtxt`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trt_yolov6.common.machine import usable_cpus
from trt_yolov6.common.records import as_record
from trt_yolov6.errors import UserError

if TYPE_CHECKING:
    from trt_yolov6.engines.base import Engine, LoadOptions
    from trt_yolov6.spec import PredictOptions

ENGINE_FILES = ("engine.onnx", "engine.trt")
"""Name of the engine in a version's folder, with its manifest."""

MAX_PIXELS = 2**26
"""Default limit of an image's pixels: 67 megapixels, 200 MB once decoded."""

_OPENCV_LIMIT = "OPENCV_IO_MAX_IMAGE_PIXELS"


@dataclass(frozen=True)
class Parameters:
    """The `parameters` of an entry's configuration that concern this package."""

    serves: Literal["tensors", "pictures"] = "tensors"
    decoder: str | None = None
    """Family of an ONNX file without a manifest."""
    preprocess: str = "{}"
    """Fields of `Preprocessing` that differ from the family's, as JSON."""
    confidence: float | None = None
    """Threshold for entries that take images, like the next two; default: as `infer`."""
    iou: float | None = None
    max_detections: int | None = None
    max_pixels: int = MAX_PIXELS
    """Largest image that is read, width times height."""
    threads: int | None = None
    """CPU threads of an ONNX Runtime session; default: those there are, shared by the instances."""


def read_parameters(texts: Mapping[str, str]) -> Parameters:
    """Return the parameters of a configuration; those of others, such as clients, are passed over.

    Raises:
        UserError: one is not what it should be.
    """
    remedy = "correct config.pbtxt."
    return as_record(texts, Parameters, "a parameter is wrong", remedy, strict=False)


class TritonPythonModel:
    """One instance of a model, in a process of its own; Triton calls its methods in turn."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the engine.

        Args:
            args: Triton's: the configuration as JSON, where the entry lies, the kind of processor
                and its number.
        """
        config = json.loads(args["model_config"])
        texts = config.get("parameters", {}).items()
        parameters = read_parameters({key: text.get("string_value", "") for key, text in texts})
        limit_pictures(parameters.max_pixels)

        from trt_yolov6.data.loader import default_workers
        from trt_yolov6.engines import load_engine
        from trt_yolov6.serving.requests import InputMemory, make_ready

        gpu = None
        if args["model_instance_kind"] == "GPU":
            gpu = int(args["model_instance_device_id"])
            _choose_gpu(gpu)
        folder = Path(args["model_repository"], args["model_version"])
        path = next((folder / name for name in ENGINE_FILES if (folder / name).is_file()), None)
        if path is None:
            raise UserError(f"{folder} holds none of {', '.join(ENGINE_FILES)}; export it again.")
        groups = config.get("instance_group", ())
        instances = sum(int(group.get("count") or 1) for group in groups)
        options = load_options(parameters, path, gpu=gpu, instances=instances)
        self._engine: Engine = load_engine(path, options=options)
        self._memory = InputMemory(self._engine)
        self._options = predict_options(parameters, self._engine)
        self._pictures = parameters.serves == "pictures"
        make_ready(self._engine, self._memory, self._options if self._pictures else None)
        self._input = config["input"][0]["name"]
        self._pool = ThreadPoolExecutor(default_workers(), thread_name_prefix="pictures")

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer requests that Triton has put together, in one batch of the engine.

        Args:
            requests: `InferenceRequest`s; of all together no more images than `max_batch_size`.

        Returns:
            An `InferenceResponse` each, with outputs or an error of its own.
        """
        import triton_python_backend_utils as triton

        answers: list[Any] = [None] * len(requests)
        live: list[int] = []
        inputs: list[Any] = []
        for index, request in enumerate(requests):
            if request.is_cancelled():
                gone = triton.TritonError("the client is gone", triton.TritonError.CANCELLED)
                answers[index] = triton.InferenceResponse(error=gone)
                continue
            live.append(index)
            inputs.append(triton.get_input_tensor_by_name(request, self._input).as_numpy())
        results: Sequence[dict[str, Any] | UserError]
        try:
            results = (self._detect if self._pictures else self._infer)(inputs) if inputs else []
        except UserError as error:
            results = [error] * len(inputs)
        for index, result in zip(live, results, strict=True):
            if isinstance(result, UserError):
                wrong = triton.TritonError(str(result), triton.TritonError.INVALID_ARG)
                answers[index] = triton.InferenceResponse(error=wrong)
            else:
                names = requests[index].requested_output_names()
                tensors = [triton.Tensor(name, result[name]) for name in names]
                answers[index] = triton.InferenceResponse(tensors)
        return answers

    def finalize(self) -> None:
        """Free the engine."""
        self._pool.shutdown()
        self._engine.close()

    def _infer(self, inputs: Sequence[Any]) -> Sequence[dict[str, Any] | UserError]:
        from trt_yolov6.serving.requests import run_tensors

        return run_tensors(self._engine, inputs, self._memory)

    def _detect(self, inputs: Sequence[Any]) -> Sequence[dict[str, Any] | UserError]:
        from trt_yolov6.serving.requests import detect_encoded, stacked

        pictures = [bytes(picture) for array in inputs for picture in array.reshape(-1)]
        found = iter(
            detect_encoded(self._engine, pictures, self._options, self._memory, self._pool)
        )
        results: list[dict[str, Any] | UserError] = []
        for array in inputs:
            mine = [next(found) for _ in range(array.size)]
            wrong = [one for one in mine if isinstance(one, UserError)]
            results.append(
                wrong[0]
                if wrong
                else stacked([one for one in mine if not isinstance(one, UserError)])
            )
        return results


def load_options(
    parameters: Parameters, engine: Path, *, gpu: int | None, instances: int
) -> LoadOptions:
    """Return how an entry's engine is loaded: on the GPU of a number, or on a CPU where it is None.

    Instances on a CPU share its processors unless `threads` says how many each has.
    """
    from trt_yolov6.engines import LoadOptions
    from trt_yolov6.engines.manifest import read_manifest

    threads = parameters.threads
    if threads is None and gpu is None and instances > 1:
        threads = max(1, len(usable_cpus()) // instances)
    has_manifest = read_manifest(engine) is not None
    return LoadOptions(
        threads=threads,
        provider="cpu" if gpu is None and engine.suffix == ".onnx" else None,
        gpu=gpu or 0,
        decoder=None if has_manifest else parameters.decoder,
        preprocess={} if has_manifest else _changes(parameters.preprocess),
    )


def predict_options(parameters: Parameters, engine: Engine) -> PredictOptions:
    """Return an entry's thresholds: its parameters', and `infer`'s where they say nothing.

    Raises:
        UserError: the engine has decided otherwise.
    """
    from trt_yolov6.runtime.predict import default_nms, resolve
    from trt_yolov6.spec import PredictOptions

    given = PredictOptions(parameters.confidence, parameters.iou, parameters.max_detections)
    options = given.over(default_nms(engine))
    resolve(engine, options)
    return options


def limit_pictures(pixels: int) -> None:
    """Let OpenCV refuse larger images before it decodes them; once, before it is imported.

    A file of a few kilobytes may claim a size whose pixels fill the memory.
    """
    if _OPENCV_LIMIT not in os.environ and "cv2" not in sys.modules:
        os.environ[_OPENCV_LIMIT] = str(pixels)


def _choose_gpu(index: int) -> None:
    """Make a GPU the current one of this thread, in which engines are loaded and run."""
    try:
        from cuda.bindings import runtime
    except ImportError:  # no TensorRT either
        return
    (error,) = runtime.cudaSetDevice(index)
    if int(error) != 0:
        raise UserError(f"GPU {index} cannot be used ({error.name}); see `nvidia-smi`.")


def _changes(text: str) -> dict[str, Any]:
    """Return fields of `Preprocessing` from JSON, which has lists for tuples."""
    fields = json.loads(text)
    return {key: tuple(one) if isinstance(one, list) else one for key, one in fields.items()}
