"""JSON and YAML as the types they stand for: what is wrong is named by its place, in a sentence."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from trt_yolov6.common.ranges import Checked, Count, Positive, ShareBelow1, fitting
from trt_yolov6.common.records import as_record, check_keys, read_yaml
from trt_yolov6.errors import UserError


@dataclass(frozen=True)
class Size:
    height: int
    width: int = 3

    def __post_init__(self) -> None:
        if self.height < 1:
            raise UserError(f"height {self.height} is too small; give `height` 1 or more.")


@dataclass(frozen=True)
class Picture:
    name: str
    sizes: tuple[Size, ...]
    kind: Literal["rgb", "bgr"] = "rgb"
    weight: float | None = None
    file: Path = Path()


def test_plain_values_become_the_types_they_stand_for() -> None:
    value = {"name": "a", "sizes": [{"height": 2}], "weight": 1, "file": "b/c", "later": 7}
    assert as_record(value, Picture, "x.json") == Picture(
        "a", (Size(2),), weight=1.0, file=Path("b/c")
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 1}, "x.json: name: expected str, got int; correct it."),
        ({"sizes": [{"height": 1}, {"height": "2"}]}, "sizes[1].height: expected int, got str"),
        ({"sizes": [{"height": True}]}, "sizes[0].height: expected int, got bool"),
        ({"sizes": [{}]}, "sizes[0]: object missing required field height"),
        ({"kind": "gray"}, "kind: invalid enum value 'gray'"),
        ({"weight": "1"}, "weight: expected float | null, got str"),
        ({"file": 3}, "file: expected Path, got int"),
        ({"sizes": [{"height": 0}]}, "height 0 is too small; give height 1 or more"),
        ({"weight": "\ud800"}, "x.json: 'utf-8' codec can't encode"),  # half a surrogate pair
        ({"\udce9": 1}, "x.json: 'utf-8' codec can't encode"),
    ],
)
def test_what_is_wrong_is_named_by_its_place(change: dict[str, Any], message: str) -> None:
    value = {"name": "a", "sizes": [], **change}
    with pytest.raises(UserError) as caught:
        as_record(value, Picture, "x.json")
    assert message in str(caught.value)
    assert "`" not in str(caught.value)


def test_a_list_in_place_of_an_object_is_refused() -> None:
    with pytest.raises(UserError, match=r"^x is damaged: expected object, got array; copy it\.$"):
        as_record([], Picture, "x is damaged", "copy it.")
    with pytest.raises(UserError, match=r"^sizes\[1\]: expected int, got str; correct it\.$"):
        as_record([1, "2"], tuple[int, ...], "sizes")


def test_an_unknown_key_is_named_with_the_nearest() -> None:
    check_keys("p.yaml", "", ["sizes"], ["sizes", "name"])
    with pytest.raises(UserError, match=r"p\.yaml: 'size' is not a key \(did you mean sizes\?\)"):
        check_keys("p.yaml", "", ["size"], ["sizes", "name"])


def test_yaml_is_read_with_a_byte_order_mark_and_runs_nothing(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_bytes(b"\xef\xbb\xbfnames: [a, b]\n")
    assert read_yaml(file) == {"names": ["a", "b"]}
    file.write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(UserError, match=r"a\.yaml is not a YAML file .*; correct it\.$"):
        read_yaml(file)
    file.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match="is not a YAML file"):
        read_yaml(file)
    with pytest.raises(UserError, match="cannot be read"):
        read_yaml(tmp_path / "none.yaml")


@dataclass(frozen=True)
class Ranged(Checked):
    epochs: Count = 3
    rate: Positive | None = None
    part: ShareBelow1 = 0.5
    kind: Literal["a", "b"] = "a"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"epochs": 0}, "`epochs` must be at least 1, got 0."),
        ({"epochs": 2.5}, "`epochs` must be a whole number, got 2.5."),
        ({"rate": 0.0}, "`rate` must be above 0, got 0.0."),
        ({"rate": math.inf}, "`rate` must be finite, got inf."),
        ({"rate": math.nan}, "`rate` must be above 0, got nan."),
        ({"part": 1}, "`part` must be below 1, got 1."),
        ({"part": "half"}, "`part` must be a number, got half."),
        ({"kind": "c"}, "`kind` must be one of a, b, got c."),
    ],
)
def test_a_field_out_of_its_range_is_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        Ranged(**changes)
    assert str(error.value).startswith(said)


def test_fields_within_their_ranges_are_taken() -> None:
    assert Ranged(np.int64(1), np.float32(0.5), 0, "b").epochs == 1
    assert fitting("0.25", ShareBelow1, "it", strict=False) == 0.25
