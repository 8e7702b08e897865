"""Read and check the inputs of a report: results of comparisons and rankings of layers."""

from __future__ import annotations

import base64
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trt_yolov6.common.files import read_json
from trt_yolov6.common.records import as_record
from trt_yolov6.comparison.results import FILE, KIND, other_basis, read_results
from trt_yolov6.errors import UserError
from trt_yolov6.quantization.metrics import METRICS, Metric

MAX_PICTURE_BYTES = 2_000_000
"""An image beyond that is left out: it would make the page slow."""


@dataclass(frozen=True)
class Comparison:
    """The results of one comparison and their file."""

    name: str
    """The folder's name, or its path where several are called the same; empty of the only one."""
    path: Path
    value: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        """The folder that the file lies in."""
        return self.path.parent

    @property
    def suffix(self) -> str:
        """Suffix of the names of its engines, such as ` (name)`."""
        return f" ({self.name})" if self.name else ""

    def picture(self, example: Mapping[str, Any]) -> str | None:
        """Return an example's image as base64 of a JPEG; None where it is gone."""
        try:
            path = (self.folder / example["picture"]).resolve()
            # A results file may name only images next to itself.
            if not path.is_relative_to(self.folder.resolve()) or not path.is_file():
                return None
            content = path.read_bytes()
        except (OSError, ValueError):  # the last for what no path holds, such as a null byte
            return None
        if not content.startswith(b"\xff\xd8") or len(content) > MAX_PICTURE_BYTES:
            return None
        return base64.b64encode(content).decode()


@dataclass(frozen=True)
class Ranking:
    """A ranking of layers by `trt-yolov6 sensitivity --json`."""

    file: str
    metric: Metric
    layers: tuple[tuple[str, float | None], ...]
    """Most sensitive first; None where the value is not finite."""


@dataclass(frozen=True)
class Material:
    """Everything that goes into a report."""

    comparisons: tuple[Comparison, ...]
    rankings: tuple[Ranking, ...]


def read_material(paths: Sequence[str | Path]) -> Material:
    """Read results of comparisons (or their folders), and rankings of `sensitivity --json`.

    Raises:
        UserError: one is neither, or damaged, there is no comparison among them, or their AP cannot
            be compared.
    """
    comparisons: list[Comparison] = []
    rankings: list[Ranking] = []
    for path in map(Path, paths):
        if path.is_dir():
            path = path / FILE
        value = read_json(path)
        if isinstance(value, dict) and value.get("kind") == KIND:
            comparisons.append(Comparison("", path, read_results(path)))
        elif isinstance(value, dict) and value.get("metric") in METRICS:
            rankings.append(_ranking(path, value))
        else:
            raise UserError(
                f"{path} is neither the results of `compare` nor of `sensitivity --json`; leave it "
                "out."
            )
    if not comparisons:
        raise UserError("there are no results of a comparison; run `trt-yolov6 compare` first.")
    for one in comparisons[1:]:
        _check_basis(one, comparisons[0])
    if len(comparisons) > 1:
        names = [one.folder.resolve().name for one in comparisons]
        comparisons = [
            dataclasses.replace(one, name=name if names.count(name) == 1 else str(one.folder))
            for one, name in zip(comparisons, names, strict=True)
        ]
    return Material(tuple(comparisons), tuple(rankings))


def _check_basis(one: Comparison, first: Comparison) -> None:
    key = other_basis(one.value["data"], one.value["settings"], first.value)
    if key is not None:
        data = {"annotations_sha256": "another data set", "images_sha256": "other images"}
        raise UserError(
            f"the AP in {one.path} is of {data.get(key, f'another {key}')} than in {first.path}; "
            "write a report of each."
        )


@dataclass(frozen=True)
class _Layer:
    name: str
    value: float | None


def _ranking(path: Path, value: Mapping[str, Any]) -> Ranking:
    layers = as_record(
        value.get("layers"),
        tuple[_Layer, ...],
        f"{path} is damaged: layers",
        "run `sensitivity --json` again.",
    )
    finite = tuple(
        (one.name, one.value if one.value is not None and math.isfinite(one.value) else None)
        for one in layers
    )
    return Ranking(path.name, value["metric"], finite)
