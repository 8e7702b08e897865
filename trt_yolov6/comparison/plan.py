"""Plan of a comparison: models, precisions, batch sizes and data, from YAML or Python.

A plan in YAML; every key but `models` may be left out, and paths are relative to the file:

    models:
      - samples/yolov6n_bccd.pt            # a checkpoint, an ONNX file, or an engine
      - path: other/yolox_s.onnx
        name: yolox-s                      # what it is called in the results
        precisions: [fp16]                 # instead of those below
        names: classes.txt                 # class names, one a line or COCO JSON
        image_size: 640                    # where not that of all below
        decoder: yolox                     # where the family cannot be recognized
        preprocess: [colour=rgb]           # what differs from the family's pre-processing
    precisions: [fp32, int8, "int8:6"]
    batches: [1, 32]
    backends: [auto]
    data: samples
    split: val
    calibration: calib
    rounds: 8
    duration: 10
    image_size: 640                        # of checkpoints, and of graphs that leave it open

A precision is `fp32`, `fp16`, `int8` or `fp8`; after the last two, `+fp16` makes the rest half
precision, and `:6` or `:auto` leaves that many sensitive layers in float, as in `int8+fp16:6`.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_origin, get_type_hints

from msgspec import Meta

from trt_yolov6.backends import PLAN_SUFFIXES
from trt_yolov6.checkpoints import SUFFIXES as CHECKPOINT_SUFFIXES
from trt_yolov6.common.files import path_of
from trt_yolov6.common.ranges import Count, Positive, fitting, plain
from trt_yolov6.common.records import as_record, check_keys, read_yaml
from trt_yolov6.errors import UserError
from trt_yolov6.spec import NmsSettings, Precision, PredictOptions, is_whole, two_sides

YAML_SUFFIXES = (".yaml", ".yml")

MODEL_SUFFIXES = (*CHECKPOINT_SUFFIXES, ".onnx", *PLAN_SUFFIXES)
"""A checkpoint, an ONNX file or engine, and TensorRT's plans under their usual names."""


@dataclass(frozen=True)
class ModelEntry:
    """One detector of a plan."""

    path: Path
    name: str = ""
    """Name in the results; default: the file's name without its extension."""
    precisions: tuple[str, ...] = ()
    """Instead of the plan's."""
    names: Path | None = None
    """Class names for an ONNX file: text, one a line, or COCO JSON."""
    image_size: tuple[int, int] | None = None
    """Height and width; default: those of the training, and an ONNX file's own."""
    decoder: str | None = None
    """The family of an ONNX file, see `detectors.families`; None finds out."""
    preprocess: tuple[str, ...] = ()
    """Changes to the family's pre-processing, each FIELD=VALUE of `Preprocessing`."""

    def __post_init__(self) -> None:
        size = None if self.image_size is None else two_sides(self.image_size)
        _change(self, path=path_of(self.path, "models"), image_size=size)

    @property
    def label(self) -> str:
        """The name, or the file's."""
        return self.name or self.path.stem


@dataclass(frozen=True)
class Plan:
    """Models, precisions and data to compare, and how to measure.

    Paths may be given as strings, a single item instead of several, and models by their paths.
    """

    models: tuple[ModelEntry, ...]
    precisions: tuple[str, ...] = ("fp32",)
    """Precisions of checkpoints and float ONNX files; other files are taken as they are."""
    batches: tuple[int, ...] = (1, 32)
    """Batch sizes that latency is measured at."""
    backends: tuple[str, ...] = ("auto",)
    data: Path = Path("samples")
    """A data set's folder or `data.yaml`."""
    split: str | None = None
    calibration: Path = Path("calib")
    """Calibration images for INT8 and FP8."""
    calibrator: str = "auto"
    rounds: Annotated[int, Meta(ge=3)] = 8
    """Turns that each engine gets, spread over the whole measurement; at least 3."""
    duration: Positive = 10.0
    """Seconds of measuring each engine at each batch size, all rounds together."""
    confidence: float = NmsSettings.confidence
    iou: float = NmsSettings.iou
    max_detections: int = NmsSettings.max_detections
    border: int = 0
    """Gray pixels on every side of an image."""
    threads: Count | None = None
    """CPU threads of ONNX Runtime; None for one a physical core."""
    provider: str | None = None
    """ONNX Runtime execution provider."""
    layers: bool = True
    """Also time single layers, at the smallest batch size, where the backend can."""
    examples: Annotated[int, Meta(ge=0)] = 3
    """Images whose detections are kept for the report."""

    def __post_init__(self) -> None:
        _change(self, **{name: plain(value) for name, value in vars(self).items()})
        models, batches = _several(self.models), _several(self.batches)
        _change(
            self,
            models=tuple(one if isinstance(one, ModelEntry) else ModelEntry(one) for one in models),
            batches=tuple(int(one) if is_whole(one) else one for one in batches),
            precisions=_several(self.precisions),
            backends=_several(self.backends),
            data=path_of(self.data, "data"),
            calibration=path_of(self.calibration, "calibration"),
        )
        if not self.models:
            raise UserError("there is nothing to compare; name checkpoints, ONNX files or engines.")
        for text in (*self.precisions, *(p for model in self.models for p in model.precisions)):
            Precision.parse(text)
        if not self.precisions:
            raise UserError(
                "no precision is given; name some with `precisions`, such as fp32,int8.",
            )
        if not self.batches or not all(type(one) is int and one > 0 for one in self.batches):
            raise UserError("batch sizes are whole numbers above 0; correct `batches`.")
        if len(set(self.batches)) < len(self.batches):
            raise UserError("a batch size is given twice; name each once in `batches`.")
        if not self.backends:
            raise UserError("no backend is given; name some with `backends`, such as auto.")
        kinds = get_type_hints(Plan, include_extras=True)
        for name in (
            "rounds",
            "duration",
            "examples",
            "threads",
            "calibrator",
            "split",
            "provider",
        ):
            fitting(getattr(self, name), kinds[name], f"`{name}`")
        _ = self.predict_options

    @property
    def predict_options(self) -> PredictOptions:
        """Thresholds and border of the evaluation.

        Raises:
            UserError: one is out of range.
        """
        return PredictOptions(
            self.confidence, self.iou, self.max_detections, border=self.border or None
        )


def _several(value: Any) -> tuple[Any, ...]:
    """Return several values as a tuple, or one as a tuple of one."""
    is_one = isinstance(value, (str, os.PathLike)) or not isinstance(value, Iterable)
    return (value,) if is_one else tuple(value)


def _change(record: ModelEntry | Plan, **fields: Any) -> None:
    """Set fields of a frozen record that is being made."""
    for name, value in fields.items():
        object.__setattr__(record, name, value)


def plan_of(
    models: Plan | str | os.PathLike[str] | Sequence[str | os.PathLike[str]], **changes: Any
) -> Plan:
    """Return a plan of checkpoints, ONNX files and engines, or the one that a YAML file holds.

    Args:
        models: their paths, or a plan or that of its file.
        changes: fields of `Plan`, which replace a plan's own, and, except for a `Plan`,
            `image_size`, the height and width of what is built.

    Raises:
        UserError: a model is of a kind that cannot be compared, or the plan's file is missing, is
            not YAML, or has a key or value that means nothing here.
    """
    if isinstance(models, Plan):
        return dataclasses.replace(models, **changes)
    paths = [path_of(path, "models") for path in _several(models)]
    for path in paths:
        if path.suffix.lower() in YAML_SUFFIXES:
            if len(paths) == 1:
                return _read_plan(path, changes)
            raise UserError(
                f"{path} is a plan, which names its models itself; give it alone, or models alone."
            )
    for path in paths:
        if path.suffix.lower() not in MODEL_SUFFIXES:
            raise UserError(
                f"{path} is not a checkpoint, ONNX file or engine ({', '.join(MODEL_SUFFIXES)}); "
                "name such a file."
            )
    size = changes.pop("image_size", None)
    return Plan(tuple(ModelEntry(path, image_size=size) for path in paths), **changes)


def _read_plan(path: Path, changes: dict[str, Any]) -> Plan:
    value = read_yaml(path)
    if not isinstance(value, dict) or not isinstance(value.get("models"), list):
        raise UserError(f"{path} has no list `models`; name what is to be compared there.")
    models = value.pop("models")
    fields = {**_fields(path, "", value, {**get_type_hints(Plan), "image_size": _SIZE}), **changes}
    size = fields.pop("image_size", None)
    entries = [_model(path, entry) for entry in models]
    sized = tuple(
        dataclasses.replace(entry, image_size=entry.image_size or size) for entry in entries
    )
    return Plan(sized, **fields)


_SIZE = tuple[int, int] | None


def _model(path: Path, entry: object) -> ModelEntry:
    if isinstance(entry, str):
        return ModelEntry(path.parent / entry)
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
        raise UserError(
            f"{path}: an entry of `models` is neither a path nor has one under `path`; correct it."
        )
    return ModelEntry(**_fields(path, "models: ", entry, get_type_hints(ModelEntry)))


def _fields(path: Path, where: str, value: dict[Any, Any], types: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a mapping: paths from the file's folder, single items as lists."""
    types.pop("models", None)
    check_keys(path, where, value, list(types))
    found: dict[str, Any] = {}
    for key, item in value.items():
        if not isinstance(item, list) and (get_origin(types[key]) is tuple or key == "image_size"):
            item = [item]
        if key == "image_size" and len(item) == 1:
            item = item * 2
        found[key] = as_record(
            item,
            types[key],
            f"{path}: {where}{key}",
            decode=lambda _, name: path.parent / Path(name),
        )
        if key == "image_size" and min(found[key]) < 1:
            raise UserError(f"{path}: {where}image_size: a side is below 1; correct it.")
    return found


def settings_of(plan: Plan) -> dict[str, Any]:
    """Return how a plan measures, JSON-ready: everything but the models."""
    settings: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(plan), default=str))
    del settings["models"]
    return settings
