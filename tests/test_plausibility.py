"""Networks whose outputs are not a detector's are refused or named, whichever way they are used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from PIL import Image
from support.tiny_detector import GRID, SIZE, load_tiny

from trt_yolov6.engines import load_engine
from trt_yolov6.engines.base import Engine
from trt_yolov6.errors import UserError
from trt_yolov6.runtime.annotate import infer_source
from trt_yolov6.runtime.plausibility import has_non_finite
from trt_yolov6.runtime.predict import detect
from trt_yolov6.spec import PredictOptions

WHITE = np.full((SIZE, SIZE, 3), 200, np.uint8)


def changed(folder: Path, output: str, *steps: tuple[str, float], layout: str = "split") -> Engine:
    """Load the tiny detector with one output computed on with constants."""
    with load_tiny(folder, layout) as engine:  # type: ignore[arg-type]
        model = onnx.load(engine.path)
    maker = next(node for node in model.graph.node if output in node.output)
    maker.output[:] = [f"{output}_0"]
    for number, (op, value) in enumerate(steps):
        name = f"{output}_constant_{number}"
        model.graph.initializer.append(numpy_helper.from_array(np.float32(value), name))
        target = output if number == len(steps) - 1 else f"{output}_{number + 1}"
        model.graph.node.append(
            helper.make_node(op, [f"{output}_{number}", name], [target], f"step_{number}")
        )
    path = folder / "changed.onnx"
    onnx.save(model, path)
    return load_engine(path)


def assert_refused(engine: Engine, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        detect(engine, [WHITE])
    with pytest.raises(UserError, match=said):
        detect(engine, [WHITE] * 20, PredictOptions(batch=4))
    Image.fromarray(WHITE).save(tmp_path / "white.png")
    with pytest.raises(UserError, match=said):
        infer_source(engine, tmp_path / "white.png", tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


LOGITS = [("Mul", 12.0), ("Sub", 6.0)]


@pytest.mark.parametrize(
    ("output", "steps", "said"),
    [
        ("scores", LOGITS, "scores from .* these are not probabilities"),
        ("scores", [("Mul", 100.0)], "scores from .* these are not probabilities"),
        ("boxes", [("Div", float(SIZE))], "fractions of the image"),
        ("boxes", [("Mul", -1.0)], "end before they begin"),
        ("scores", [("Div", 0.0)], "not finite|not probabilities|NaN or infinity"),
    ],
)
def test_outputs_that_are_not_a_detector_s_are_refused(
    tmp_path: Path, output: str, steps: Sequence[tuple[str, float]], said: str
) -> None:
    with changed(tmp_path, output, *steps) as engine:
        assert_refused(engine, said, tmp_path)


@pytest.mark.filterwarnings("ignore:every anchor")
@pytest.mark.parametrize(
    ("anchors", "said"),
    [(GRID * GRID, "does not run on a batch of 2"), (-1, "are not for the 2 images of a batch")],
)
def test_a_batch_axis_that_is_free_at_the_input_only_is_named(
    tmp_path: Path, anchors: int, said: str
) -> None:
    """Some exports have a batch of 1 in a Reshape."""
    with load_tiny(tmp_path) as engine:
        model = onnx.load(engine.path)
    for output, last in (("boxes", 4), ("scores", 3)):
        maker = next(node for node in model.graph.node if output in node.output)
        maker.output[:] = [f"{output}_0"]
        shape = numpy_helper.from_array(np.array([1, anchors, last]), f"{output}_shape")
        model.graph.initializer.append(shape)
        model.graph.node.append(helper.make_node("Reshape", [f"{output}_0", shape.name], [output]))
    path = tmp_path / "one.onnx"
    onnx.save(model, path)
    with load_engine(path) as engine:
        assert len(detect(engine, [WHITE] * 2, PredictOptions(batch=1))) == 2
        with pytest.raises(UserError, match=f"{said}.* `batch`"):
            detect(engine, [WHITE] * 2)


def test_objectness_and_classes_before_their_sigmoid_are_refused(tmp_path: Path) -> None:
    """The product of two negative logits looks like a score above 1."""
    with changed(tmp_path, "rows", ("Mul", -9.0), layout="rows") as engine:
        assert_refused(engine, "not probabilities", tmp_path)


def test_a_network_that_gives_nan_is_refused_with_the_first_tensor_that_does(
    tmp_path: Path,
) -> None:
    with changed(tmp_path, "scores", ("Mul", 0.0), ("Div", 0.0), ("Mul", 1.0)) as engine:
        # 0 x, then 0 / 0: the second step is where it begins.
        assert_refused(
            engine, "NaN or infinity in scores; the first tensor that is not is scores_2", tmp_path
        )


def test_a_weight_that_is_nan_is_named(tmp_path: Path) -> None:
    with changed(tmp_path, "scores", ("Mul", float("nan"))) as engine:
        assert_refused(engine, "is the weight scores_constant_0", tmp_path)


def test_scores_that_every_anchor_has_are_named_and_used(tmp_path: Path) -> None:
    with changed(tmp_path, "scores", ("Max", 0.5)) as engine:
        with pytest.warns(UserWarning, match="every anchor of .* passes the threshold"):
            found = detect(engine, [WHITE])
        assert len(found[0]) == 3 * GRID * GRID
        detect(engine, [WHITE])  # said once


def test_a_detector_is_taken_without_a_word(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    dark = np.zeros_like(WHITE)
    dark[:8, :8, 0] = 255
    with load_tiny(tmp_path) as engine:
        assert len(detect(engine, [dark], PredictOptions(confidence=0.6))[0]) == 1
    assert not recwarn.list


def test_only_floats_can_be_other_than_finite() -> None:
    assert has_non_finite(np.array([0.0, np.nan]))
    assert has_non_finite(np.array([-np.inf, 3.0], np.float16))
    assert not has_non_finite(np.array([1e38, 1e38], np.float32))
    assert not has_non_finite(np.array([1, 2]))
    assert not has_non_finite(np.empty((0, 4), np.float32))
