"""The calibration table: each tensor's range, and its inputs, as JSON next to the engine.

It is used again while model, images and settings are the same; else the reason is said.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import onnx
from onnx import numpy_helper

from trt_yolov6.common.files import read_json, write_json
from trt_yolov6.common.records import as_record
from trt_yolov6.errors import UserError
from trt_yolov6.quantization.calibrators import Method
from trt_yolov6.quantization.learned import Learned, read_learned, write_learned

SCHEMA = 3

Setting = str | int | float | bool | None

Variant = Literal["plain", "equalized", "smoothed", "shifted"]

VARIANTS: tuple[Variant, ...] = get_args(Variant)
"""Forms of the float graph, from the least changed on; all compute the same function.

plain:     as it is
equalized: channels rescaled where weights can absorb it (`solve.equalize`)
smoothed:  the same, and after SiLU and HardSwish too, by multiplications that are put there
shifted:   the same, and what is added to the channels before them centres their ranges on zero
           where only convolutions without padding read them; where that is much, so that their most
           frequent values lie on levels (`equalization.alignment`)
"""

Weights = Literal["nearest", "biases", "reconstructed"]
"""Weight rounding: rounded to the nearest level; that, with corrected biases
(`bias_correction`); or rounded so that each layer's output is nearest (`gptq`), biases included."""


@dataclass(frozen=True)
class CalibrationKey:
    """Inputs of a table: two equal keys make equal tables."""

    model_sha256: str
    """`model_sha256` of the graph that was calibrated."""
    images_sha256: str
    """`images_sha256` of the calibration images."""
    settings: Mapping[str, Setting] = field(default_factory=dict)
    """Type, calibrator, its parameters, border: whatever changes the ranges."""


@dataclass(frozen=True)
class CalibrationTable:
    """Ranges of a graph's tensors."""

    amax: Mapping[str, float]
    """Magnitude that INT8's 127, or FP8's 448, stands for, by tensor, in the graph's order; finite,
    above 0."""
    method: Method
    """Calibrator that gave them."""
    key: CalibrationKey
    variant: Variant = "plain"
    """Form of the graph whose tensors these are."""
    float_layers: tuple[str, ...] = ()
    """Layers that were given or chosen to stay in float."""
    weights: Weights = "nearest"
    """Rounding of the layers' weights, with what becomes of their biases."""
    learned: Learned | None = None
    """Weights and biases that are stored because the table does not say how to make them: those
    of a search for float layers, and those that gradients made."""
    by_gradients: bool = False
    """True if gradients made them (`reconstruction.reconstruct`)."""


def table_path(engine: str | Path) -> Path:
    """Return where the table of an engine lies: `engines/yolov6s.calibration.json`."""
    return Path(engine).with_suffix(".calibration.json")


def learned_path(table: str | Path) -> Path:
    """Return where what was learned with a table lies: `engines/yolov6s.calibration.npz`."""
    return Path(table).with_suffix(".npz")


def write_table(path: str | Path, table: CalibrationTable) -> None:
    """Write a table, and what was learned with it next to it.

    Raises:
        UserError: the path cannot be written to.
        ValueError: a range is not a finite number above 0.
    """
    for name, amax in table.amax.items():
        if not (math.isfinite(amax) and amax > 0):
            raise ValueError(f"the range of tensor {name!r} is {amax}")
    if table.learned is not None:
        write_learned(learned_path(path), table.learned)
    write_json(
        path,
        {
            "schema": SCHEMA,
            "variant": table.variant,
            "float_layers": list(table.float_layers),
            "biases_corrected": table.weights != "nearest",
            "reconstructed": table.weights == "reconstructed",
            "by_gradients": table.by_gradients,
            "learned_sha256": None if table.learned is None else table.learned.sha256,
            "key": {**asdict(table.key), "settings": dict(sorted(table.key.settings.items()))},
            "tensors": {
                name: {"amax": amax, "method": table.method} for name, amax in table.amax.items()
            },
        },
    )


def read_table(path: str | Path) -> CalibrationTable:
    """Read a table that `write_table` wrote.

    Raises:
        UserError: the file is missing or no calibration table, or a range is zero or not finite.
    """
    value = read_json(path)
    schema = value.get("schema", SCHEMA) if isinstance(value, dict) else SCHEMA
    if schema != SCHEMA:
        raise UserError(
            f"{path} is a calibration table of version {schema}, not {SCHEMA}; delete it and "
            "calibrate again."
        )
    subject = f"{path} is not a calibration table of this package"
    table = as_record(value, _File, subject, "delete it and calibrate again.")
    methods = {entry.method for entry in table.tensors.values()}
    if len(methods) != 1:
        raise UserError(f"{subject}: tensors: not of one method; delete it and calibrate again.")
    for name, entry in table.tensors.items():
        if not (math.isfinite(entry.amax) and entry.amax > 0):
            raise UserError(
                f"{path} gives tensor {name!r} the range {entry.amax}, not a finite number above "
                "0; delete the file and calibrate again."
            )
    weights: Weights = "biases" if table.biases_corrected else "nearest"
    if table.reconstructed:
        weights = "reconstructed"
    learned = table.learned_sha256
    return CalibrationTable(
        {name: entry.amax for name, entry in table.tensors.items()},
        methods.pop(),
        table.key,
        table.variant,
        table.float_layers,
        weights,
        None if learned is None else read_learned(learned_path(path), learned),
        table.by_gradients,
    )


@dataclass(frozen=True)
class _Range:
    amax: float
    method: Method


@dataclass(frozen=True)
class _File:
    """Content of a table's file."""

    variant: Variant
    float_layers: tuple[str, ...]
    biases_corrected: bool
    reconstructed: bool
    by_gradients: bool
    learned_sha256: str | None
    key: CalibrationKey
    tensors: dict[str, _Range]


def reusable_table(path: str | Path, key: CalibrationKey) -> tuple[CalibrationTable | None, str]:
    """Return the table at `path` if it was made from the same things, and a sentence either way.

    The sentence says that the table is used again, or why it must be made again; it is empty where
    there is none yet. A damaged table is a reason, not an error.
    """
    if not Path(path).exists():
        return None, ""
    try:
        table = read_table(path)
    except UserError as error:
        reason = str(error).split(";")[0]
        return None, f"Calibrating again: {reason}."
    changed = _difference(table.key, key)
    if changed:
        return None, f"Calibrating again: {path} was made {changed}."
    return table, f"Using the calibration in {path}: same model, images and settings."


def model_sha256(model: onnx.ModelProto) -> str:
    """Return a SHA-256 of what a graph computes: inputs, nodes, weights, outputs.

    Metadata, documentation and the way weights are stored in the file do not count.
    """
    digest = hashlib.sha256()

    def add(*parts: bytes) -> None:
        for part in parts:
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)

    graph = model.graph
    for item in (*graph.input, *graph.output):
        add(item.name.encode(), item.type.SerializeToString(deterministic=True))
    for opset in model.opset_import:
        add(opset.domain.encode(), str(opset.version).encode())
    for node in graph.node:
        attributes = sorted(node.attribute, key=lambda attribute: attribute.name)
        names = [node.domain, node.op_type, *node.input, "", *node.output]
        add(*(name.encode() for name in names))
        add(*(attribute.SerializeToString(deterministic=True) for attribute in attributes))
    for tensor in graph.initializer:
        array = numpy_helper.to_array(tensor)
        add(tensor.name.encode(), str((array.dtype, array.shape)).encode(), array.tobytes())
    return digest.hexdigest()


def _difference(old: CalibrationKey, new: CalibrationKey) -> str:
    """Say what of `old` is not as in `new`, or nothing."""
    if old.model_sha256 != new.model_sha256:
        return "for another model or other weights"
    if old.images_sha256 != new.images_sha256:
        return "from other calibration images"
    for name in sorted({*old.settings, *new.settings}):
        before, now = (_shown(key.settings, name) for key in (old, new))
        if before != now:
            return f"with the setting {name} {before}, now {now}"
    return ""


def _shown(settings: Mapping[str, Any], name: str) -> str:
    return str(settings[name]) if name in settings else "absent"
