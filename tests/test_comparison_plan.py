"""Plans: from YAML and from Python, and what is wrong with one in a sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trt_yolov6.comparison.plan import ModelEntry, Plan, plan_of, settings_of
from trt_yolov6.errors import UserError
from trt_yolov6.spec import Precision


def test_a_plan_in_yaml_is_that_in_python(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(
        """
models:
  - n.pt
  - {path: other/x.onnx, name: x, precisions: [fp16], names: x.txt, image_size: [320, 640]}
precisions: [fp32, "int8+fp16:6"]
batches: 4
data: d
calibration: /c
rounds: 5
"""
    )
    assert plan_of(file, duration=2.0, batches=(1, 8)) == Plan(
        models=(
            ModelEntry(tmp_path / "n.pt"),
            ModelEntry(tmp_path / "other/x.onnx", "x", ("fp16",), tmp_path / "x.txt", (320, 640)),
        ),
        precisions=("fp32", "int8+fp16:6"),
        batches=(1, 8),
        data=tmp_path / "d",
        calibration=Path("/c"),
        rounds=5,
        duration=2.0,
    )
    one = plan_of("n.pt", precisions="int8", batches=4, backends="onnxruntime")
    assert (one.precisions, one.batches, one.backends) == (("int8",), (4,), ("onnxruntime",))
    changed = plan_of(one, precisions="fp16", batches=8, data="other")
    assert changed == Plan(one.models, ("fp16",), (8,), ("onnxruntime",), Path("other"))
    given: dict[str, Any] = {"models": "n.pt", "batches": np.array([4, 8]), "rounds": np.int64(4)}
    given["data"] = "samples"
    plain = Plan((ModelEntry(Path("n.pt")),), batches=(4, 8), rounds=4)
    assert json.dumps(settings_of(Plan(**given))) == json.dumps(settings_of(plain))
    for batches in (("1",), (1.5,), (True,), (None,)):
        with pytest.raises(UserError, match="batch sizes are whole numbers"):
            plan_of(one, batches=batches)
    with pytest.raises(UserError, match="None is not a precision"):
        plan_of(one, precisions=(None,))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("models: [", "not a YAML file"),
        ("- n.pt", "no list `models`"),
        ("models: n.pt", "no list `models`"),
        ("models: []", "nothing to compare"),
        ("models: [{name: n}]", "neither a path"),
        ("models: [n.pt]\nbatch: 1", "'batch' is not a key"),
        ("models: [{path: n.pt, int8: yes}]", "'int8' is not a key"),
        ("models: [n.pt]\nbatches: [one]", r"plan\.yaml: batches\[0\]: expected int, got"),
        ("models: [n.pt]\nbatches: [0]", "above 0"),
        ("models: [n.pt]\nrounds: 2", "`rounds` must be at least 3"),
        ("models: [n.pt]\nduration: -1", "`duration` must be above 0"),
        ("models: [n.pt]\niou: 3", "IoU"),
        ("models: [n.pt]\nprecisions: [int4]", "'int4' is not a precision"),
        ("models: [n.pt]\nprecisions: []", "no precision"),
        ("models: [n.pt]\nbackends: []", "no backend"),
        ("models: [n.pt]\nbatches: [1, 4, 1]", "given twice"),
        ("models: [n.pt]\nborder: -5", "border"),
        ("models: [n.pt]\nthreads: -3", "threads"),
        ("models: [n.pt]\nsplit: 2024-13-45", "not a YAML file"),  # YAML takes it for a date
        ("models: !!python/object/apply:os.system ['touch pwned']", "not a YAML file"),
    ],
)
def test_what_is_wrong_with_a_plan_is_one_sentence(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        plan_of(file)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("text", "base", "half", "layers"),
    [
        ("fp32", "fp32", False, 0),
        ("INT8", "int8", False, 0),
        ("int8+fp16", "int8", True, 0),
        ("int8:6", "int8", False, 6),
        ("int8+fp16:auto", "int8", True, "auto"),
        ("fp8+fp16", "fp8", True, 0),
    ],
)
def test_a_precision_says_what_is_quantized_and_what_is_not(
    text: str, base: str, half: bool, layers: int | str
) -> None:
    found = Precision.parse(text)
    assert (found.base, found.rest == "fp16", found.float_layers) == (base, half, layers)
    assert str(found) == text.lower()


@pytest.mark.parametrize("text", ["", "fp64", "fp32+fp16", "fp16:6", "int8:", "int8:-1", "fp8:6"])
def test_other_precisions_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"precision|layers are ranked"):
        Precision.parse(text)


def test_files_of_other_kinds_are_refused() -> None:
    with pytest.raises(UserError, match=r"table\.csv is not a checkpoint.*\.pth"):
        plan_of([Path("n.pth"), Path("table.csv")])
