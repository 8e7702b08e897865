"""Calibration tables: written and read alike, used again only for the same model and images."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from trt_yolov6.errors import UserError
from trt_yolov6.quantization.table import (
    SCHEMA,
    CalibrationKey,
    CalibrationTable,
    model_sha256,
    read_table,
    reusable_table,
    table_path,
    write_table,
)

KEY = CalibrationKey("aa", "bb", {"calibrator": "percentile", "percentile": 99.9, "limit": None})
TABLE = CalibrationTable({"images": 1.0, "relu:0": 0.1 + 0.2, "a b": 1e-30}, "mse", KEY)


def test_a_table_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = table_path(tmp_path / "yolov6s.trt")
    assert path.name == "yolov6s.calibration.json"
    write_table(path, TABLE)
    assert read_table(path) == TABLE
    assert list(read_table(path).amax) == list(TABLE.amax)


def test_equal_tables_are_equal_bytes(tmp_path: Path) -> None:
    settings = dict(reversed(list(KEY.settings.items())))
    other = dataclasses.replace(TABLE, key=dataclasses.replace(KEY, settings=settings))
    write_table(tmp_path / "1", TABLE)
    write_table(tmp_path / "2", other)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_a_table_is_used_again_for_the_same_key(tmp_path: Path) -> None:
    write_table(tmp_path / "t.json", TABLE)
    table, sentence = reusable_table(tmp_path / "t.json", KEY)
    assert table == TABLE
    assert sentence.startswith("Using the calibration in")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_sha256": "cc"}, "for another model or other weights"),
        ({"images_sha256": "cc"}, "from other calibration images"),
        (
            {"settings": {**KEY.settings, "percentile": 99.99}},
            "with the setting percentile 99.9, now 99.99",
        ),
        ({"settings": {**KEY.settings, "border": 3}}, "with the setting border absent, now 3"),
        ({"settings": {"calibrator": "percentile", "limit": None}}, "percentile 99.9, now absent"),
    ],
)
def test_another_key_says_what_changed(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    write_table(tmp_path / "t.json", TABLE)
    table, sentence = reusable_table(tmp_path / "t.json", dataclasses.replace(KEY, **change))
    assert table is None
    assert sentence.startswith("Calibrating again")
    assert reason in sentence


def test_no_table_needs_no_reason(tmp_path: Path) -> None:
    assert reusable_table(tmp_path / "t.json", KEY) == (None, "")


def damaged(change: Callable[[Any], Any]) -> str:
    value: dict[str, Any] = {
        "schema": SCHEMA,
        "variant": "plain",
        "float_layers": [],
        **dict.fromkeys(("biases_corrected", "reconstructed", "by_gradients"), False),
        "learned_sha256": None,
        "key": {"model_sha256": "aa", "images_sha256": "bb", "settings": {}},
        "tensors": {"x": {"amax": 1.0, "method": "mse"}, "y": {"amax": 2.0, "method": "mse"}},
    }
    change(value)
    return json.dumps(value)


BAD = {
    "no JSON": "{",
    "a list": "[]",
    "an engine's manifest": '{"schema": 1, "engine": "yolov6s.trt"}',
    "a newer version": damaged(lambda v: v.update(schema=SCHEMA + 1)),
    "no tensors": damaged(lambda v: v.pop("tensors")),
    "a list of tensors": damaged(lambda v: v.update(tensors=[1])),
    "a range of text": damaged(lambda v: v["tensors"]["x"].update(amax="wide")),
    "a range of zero": damaged(lambda v: v["tensors"]["x"].update(amax=0)),
    "an infinite range": damaged(lambda v: v["tensors"]["x"].update(amax=1e999)),
    "a range that is not a number": damaged(lambda v: v["tensors"]["x"].update(amax=float("nan"))),
    "two methods": damaged(lambda v: v["tensors"]["x"].update(method="minmax")),
    "an unknown method": damaged(lambda v: v["tensors"]["x"].update(method="guess")),
    "an empty table": damaged(lambda v: v["tensors"].clear()),
    "a key of numbers": damaged(lambda v: v["key"].update(model_sha256=3)),
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD.keys())
def test_a_damaged_table_is_a_sentence_to_the_reader_and_a_reason_to_calibrate(
    tmp_path: Path, content: str
) -> None:
    path = tmp_path / "t.json"
    path.write_text(damaged(lambda v: None))
    assert read_table(path).amax == {"x": 1.0, "y": 2.0}
    path.write_text(content)
    with pytest.raises(UserError, match=r"t\.json .*; .*\.$"):
        read_table(path)
    table, sentence = reusable_table(path, KEY)
    assert table is None
    assert sentence.startswith(f"Calibrating again: {path}")


@pytest.mark.parametrize("amax", [0.0, -1.0, float("nan"), float("inf")])
def test_a_range_that_cannot_be_is_not_written(tmp_path: Path, amax: float) -> None:
    with pytest.raises(ValueError, match="the range of tensor 'x'"):
        write_table(tmp_path / "t.json", dataclasses.replace(TABLE, amax={"x": amax}))
    assert not list(tmp_path.iterdir())


def one_layer(weights: list[float], *, pads: int = 0, raw: bool = True) -> onnx.ModelProto:
    kernel = np.array(weights, np.float32).reshape(1, 1, 1, -1)
    tensor = (
        numpy_helper.from_array(kernel, "kernel")
        if raw
        else helper.make_tensor("kernel", TensorProto.FLOAT, kernel.shape, weights)
    )
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "kernel"], ["y"], "conv", pads=[pads] * 4)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [tensor],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


def test_the_hash_of_a_model_follows_what_it_computes() -> None:
    model = one_layer([1.0, 2.0])
    same = one_layer([1.0, 2.0], raw=False)
    same.producer_version, same.doc_string = "9.9", "exported elsewhere"
    same.graph.node[0].doc_string = "line 17"
    assert model_sha256(model) == model_sha256(same)
    assert model_sha256(model) != model_sha256(one_layer([1.0, 2.5]))
    assert model_sha256(model) != model_sha256(one_layer([1.0, 2.0], pads=1))
