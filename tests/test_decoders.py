"""Detectors of other families: recognized, decoded, fed with the images they were trained on.

What is planted are coloured cells in a picture; see family_graphs for the detectors that find them.
The expected boxes and classes come from there, in NumPy and from the families' formulas.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnxruntime.transformers.float16 import convert_float_to_float16
from support import family_graphs as families
from support.family_graphs import NAMES, SURE

from trt_yolov6.cli import main
from trt_yolov6.data.coco import load_coco
from trt_yolov6.data.letterbox import fit
from trt_yolov6.data.preprocessing import Preprocessing, parse_changes
from trt_yolov6.detectors.detections import Detections, postprocess
from trt_yolov6.detectors.families import FAMILIES
from trt_yolov6.detectors.layouts import LAYOUTS, YOLOV5_ANCHORS, YOLOV7_ANCHORS, Anchors
from trt_yolov6.detectors.recognition import GraphFacts, is_detector, recognize
from trt_yolov6.engines import load_engine
from trt_yolov6.engines.base import LoadOptions
from trt_yolov6.engines.build import build_engine
from trt_yolov6.engines.manifest import read_manifest
from trt_yolov6.errors import UserError
from trt_yolov6.graph.onnx_import import graph_from_onnx
from trt_yolov6.quantization.judge import Judge
from trt_yolov6.quantization.pipeline import quantize
from trt_yolov6.quantization.settings import QuantizationSettings
from trt_yolov6.runtime.evaluate import evaluate
from trt_yolov6.runtime.predict import detect
from trt_yolov6.spec import NmsSettings, OutputLayout, PredictOptions, TensorSpec

NMS = NmsSettings(confidence=0.5)
OPTIONS = PredictOptions(confidence=0.5)
"""Above the gray around a letterbox, 114 / 255, below the painted cells."""


@dataclasses.dataclass(frozen=True)
class Export:
    """A family's export, and what has to be made of it."""

    make: Callable[[], onnx.ModelProto]
    family: str
    layout: OutputLayout
    score: float
    named: bool = False
    """Nothing in the graph tells the family: it has to be named."""


BOTH = SURE * SURE
EXPORTS = {
    "yolov6": Export(families.yolov6, "yolov6", "rows", SURE),
    "yolov6-0.1": Export(lambda: families.yolov6(first_release=True), "yolov6", "rows", BOTH),
    "yolov5": Export(families.yolov5, "yolov5", "rows", BOTH),
    "yolov5-grids": Export(
        lambda: families.yolov5(grids=True), "yolov5", "grids_yolov5", BOTH, named=True
    ),
    "yolov7-grids": Export(
        lambda: families.yolov5(True, families.V7_ANCHORS), "yolov7", "grids_yolov7", BOTH, True
    ),
    "yolov7-end2end": Export(families.yolov7_end2end, "yolov7", "end2end_yolov7", BOTH),
    "efficient-nms": Export(families.efficient_nms, "yolov7", "efficient_nms", BOTH),
    "yolox": Export(families.yolox, "yolox", "grid_rows", BOTH),
    "yolox-decoded": Export(lambda: families.yolox(decoded=True), "yolox", "rows", BOTH),
    "ppyoloe": Export(families.ppyoloe, "ppyoloe", "split_by_class", SURE, named=True),
    "ppyoloe-rows": Export(
        lambda: families.ppyoloe("exclude_post_process"), "ppyoloe", "corner_rows", SURE, True
    ),
    "ppyoloe-nms": Export(
        lambda: families.ppyoloe("nms"), "ppyoloe", "end2end_ppyoloe", SURE, named=True
    ),
    "ppyoloe-plus": Export(
        lambda: families.ppyoloe(plus=True), "ppyoloe-plus", "split_by_class", SURE, named=True
    ),
    "yolov8": Export(families.yolov8, "yolov8", "columns", SURE),
    "yolov8-bare": Export(lambda: families.yolov8(metadata=False), "yolov8", "columns", SURE),
    "yolov10": Export(lambda: families.yolov8("best"), "yolov8", "best", SURE),
    "yolov10-bare": Export(lambda: families.yolov8("best", False), "yolov8", "best", SURE),
}

each_export = pytest.mark.parametrize("name", EXPORTS)


def written(name: str, folder: Path) -> Path:
    path = folder / f"{name}.onnx"
    onnx.save(EXPORTS[name].make(), path)
    return path


def decoder_of(name: str) -> str | None:
    return EXPORTS[name].family if EXPORTS[name].named else None


def assert_found(found: Detections, boxes: NDArray[np.float64], score: float) -> None:
    """Assert that the painted cells were found, and nothing else."""
    wanted = sorted(
        (label, *box) for (_, _, label), box in zip(families.OBJECTS, boxes.tolist(), strict=True)
    )
    got = sorted(
        (label, *box)
        for label, box in zip(found.class_id.tolist(), found.xyxy.tolist(), strict=True)
    )
    assert len(got) == len(wanted)
    np.testing.assert_allclose(got, wanted, atol=1e-3)
    np.testing.assert_allclose(found.confidence, score, rtol=1e-4)


@each_export
def test_what_is_painted_is_found_through_a_built_engine(name: str, tmp_path: Path) -> None:
    export = EXPORTS[name]
    graph = graph_from_onnx(written(name, tmp_path), decoder=decoder_of(name), class_names=None)
    assert (graph.decoder, graph.output_layout) == (export.family, export.layout)
    built = build_engine(graph, backend="onnxruntime", output=tmp_path / "built" / "x.onnx")
    stored = read_manifest(built.path)
    assert stored is not None
    assert stored.preprocessing == FAMILIES[export.family].preprocessing
    assert (stored.decoder, stored.output_layout) == (export.family, export.layout)
    image, boxes = families.picture(stored.preprocessing.fit)
    with load_engine(built.path) as engine:
        count = 1 if engine.batch.is_static else 3
        for found in detect(engine, [image] * count, OPTIONS):
            assert_found(found, boxes, export.score)


@each_export
def test_a_bare_file_is_read_alike(name: str, tmp_path: Path) -> None:
    export = EXPORTS[name]
    options = LoadOptions(decoder=decoder_of(name))
    with load_engine(written(name, tmp_path), options=options) as engine:
        assert (engine.decoder, engine.output_layout) == (export.family, export.layout)
        image, boxes = families.picture(engine.preprocessing.fit)
        (found,) = detect(engine, [image], OPTIONS)
    assert_found(found, boxes, export.score)


@pytest.mark.parametrize("free", [0, -1])
@each_export
def test_lengths_that_the_file_leaves_free_are_worked_out(
    name: str, free: int, tmp_path: Path
) -> None:
    path, decoder = written(name, tmp_path), decoder_of(name)
    model = onnx.load(path)
    for output in model.graph.output:
        for axis in output.type.tensor_type.shape.dim:
            axis.Clear()
            axis.dim_value = free
    onnx.save(model, path)
    graph = graph_from_onnx(path, decoder=decoder)
    assert (graph.decoder, graph.output_layout) == (EXPORTS[name].family, EXPORTS[name].layout)
    with load_engine(path, options=LoadOptions(decoder=decoder)) as engine:
        assert engine.detector == graph.detector


@each_export
def test_an_output_for_debugging_before_the_detectors_is_dropped(name: str, tmp_path: Path) -> None:
    # 7 rows of 256: alone they would be a detector's, for another size of the input.
    path, decoder = written(name, tmp_path), decoder_of(name)
    model = onnx.load(path)
    source = model.graph.input[0]
    batch = source.type.tensor_type.shape.dim[0].dim_value or "batch"
    ones = ", ".join(["1"] * 7 * 48)
    made = onnx.parser.parse_graph(f"""
        debug () => () <float[7, 3, 4, 4] w = {{ {ones} }}, int64[3] rows = {{ 0, 7, 256 }}> {{
            pooled = Conv <strides = [4, 4]> ({source.name}, w)
            features = Reshape (pooled, rows)
        }}""")
    model.graph.node.extend(made.node)
    model.graph.initializer.extend(made.initializer)
    features = onnx.helper.make_tensor_value_info("features", 1, [batch, 7, 256])
    model.graph.output.insert(0, features)
    onnx.save(model, path)
    graph = graph_from_onnx(path, decoder=decoder)
    with load_engine(path, options=LoadOptions(decoder=decoder)) as engine:
        assert engine.dropped_outputs == ("features",)
        assert engine.output_layout == graph.output_layout == EXPORTS[name].layout
        image, boxes = families.picture(engine.preprocessing.fit)
        assert_found(detect(engine, [image], OPTIONS)[0], boxes, EXPORTS[name].score)


@each_export
def test_ap_is_1_with_the_familys_images_only(name: str, tmp_path: Path) -> None:
    export = EXPORTS[name]
    own = FAMILIES[export.family].preprocessing
    dataset = load_coco(families.write_dataset(tmp_path / "data", own.fit), "val")
    path = written(name, tmp_path)
    other = "fit=corner" if own.fit != "corner" else "fit=letterbox"
    aps = []
    for changes in ((), (other,), (f"colour={'bgr' if own.colour == 'rgb' else 'rgb'}",)):
        options = LoadOptions(decoder=decoder_of(name), preprocess=parse_changes(changes))
        with load_engine(path, options=options) as engine:
            aps.append(evaluate(engine, dataset, OPTIONS, progress=False).ap)
    assert aps[0] == pytest.approx(1)
    assert max(aps[1] or 0, aps[2] or 0) < 0.7


@pytest.mark.parametrize("name", ["yolox", "ppyoloe", "yolov8", "yolov10", "yolov5-grids"])
def test_commands_take_the_file_as_a_user_has_it(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export = EXPORTS[name]
    data = families.write_dataset(tmp_path / "data", FAMILIES[export.family].preprocessing.fit)
    names = tmp_path / "names.txt"
    names.write_text("\n".join(NAMES))
    engine = tmp_path / "engine.onnx"
    named = ["--decoder", export.family] if export.named else []
    build = ["build", "--onnx", str(written(name, tmp_path)), "--names", str(names), *named]
    assert main([*build, "--backend", "onnxruntime", "--output", str(engine)]) == 0
    assert f"decoder {export.family}, outputs {export.layout}" in capsys.readouterr().out
    result = tmp_path / "eval.json"
    threshold = ["--conf", "0.5", "--quiet"]
    evaluated = ["eval", "--engine", str(engine), "--data", str(data), "--json", str(result)]
    assert main([*evaluated, *threshold]) == 0
    assert json.loads(result.read_text())["AP"] == pytest.approx(1)
    drawn = tmp_path / "drawn"
    source = str(data / "images" / "val" / "1.png")
    inferred = ["infer", "--engine", str(engine), "--source", source, "--output", str(drawn)]
    assert main([*inferred, *threshold]) == 0
    (record,) = json.loads((drawn / "detections.json").read_text())
    assert sorted(one["name"] for one in record["detections"]) == ["blue", "green", "red", "red"]
    timed = ["bench", "--engine", str(engine), "--end-to-end", "--source", source]
    assert main([*timed, "--duration", "0.2", "--quiet"]) == 0


@pytest.mark.parametrize("name", ["yolox", "ppyoloe", "yolov8", "yolov10-bare", "yolov5"])
def test_int8_is_calibrated_on_the_familys_images(name: str, tmp_path: Path) -> None:
    export = EXPORTS[name]
    own = FAMILIES[export.family].preprocessing
    data = families.write_dataset(tmp_path / "data", own.fit, images=4)
    graph = graph_from_onnx(written(name, tmp_path), decoder=decoder_of(name))
    settings = QuantizationSettings(calibrator="minmax", equalize=False, bias_correction=False)
    result = quantize(graph, data / "images" / "val", settings)
    # The range of the input is that of the family's own images.
    source = graph.model.graph.input[0].name
    first = result.table.amax.get(source)
    if first is not None:
        limits = [
            abs(value - mean) / std for _, mean, std in own.channels for value in (0.0, 255.0)
        ]
        assert first == pytest.approx(max(limits), rel=0.02)
    assert len(result.placement.layers) >= 6
    built = build_engine(result.graph, backend="onnxruntime", output=tmp_path / "int8.onnx")
    with load_engine(built.path) as engine:
        assert engine.precision == "int8"
        ap = evaluate(engine, load_coco(data, "val"), OPTIONS, progress=False).ap
    assert ap is not None
    assert ap > 0.75


def test_agreement_counts_classes_that_the_graph_does_not_tell(tmp_path: Path) -> None:
    graph = graph_from_onnx(written("yolov10-bare", tmp_path))
    assert graph.class_names == ()
    # As large as the input: with gray around it there would be more to agree on.
    image = np.zeros((64, 64, 3), np.uint8)
    for row, column, label in families.OBJECTS:
        image[row * 8 : row * 8 + 8, column * 8 : column * 8 + 8, 2 - label] = 255  # BGR
    paths = [tmp_path / "1.png", tmp_path / "2.png"]
    for path in paths:
        cv2.imwrite(str(path), image)
    judge = Judge(graph, paths)
    assert judge.agreement(graph.model) == 1
    blind = onnx.ModelProto()
    blind.CopyFrom(graph.model)
    (weight,) = (w for w in blind.graph.initializer if w.name == "backbone.0.weight")
    values = onnx.numpy_helper.to_array(weight).copy()
    values[2] = 0  # no more blue, the highest class
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    assert judge.agreement(blind) == pytest.approx(2 / 3, abs=0.01)


# --- recognition --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("yolov5-grids", "yolov5 .*, yolov7"),
        ("ppyoloe", "ppyoloe .*, ppyoloe-plus"),
        ("ppyoloe-rows", "ppyoloe .*, ppyoloe-plus"),
        ("ppyoloe-nms", "ppyoloe .*, ppyoloe-plus"),
    ],
)
def test_what_a_graph_does_not_show_is_asked(name: str, choices: str, tmp_path: Path) -> None:
    path = written(name, tmp_path)
    for attempt in (graph_from_onnx, load_engine):
        with pytest.raises(UserError, match=f"name one as `decoder`: {choices}"):
            attempt(path)


def test_axes_of_one_length_are_rows_or_columns_and_free_ones_are_rows() -> None:
    with pytest.raises(UserError, match=r"that several families share.*yolov6.*yolov8"):
        recognize(facts(("output0", (1, 300, 300))), "square.onnx")
    family, layout = recognize(facts(("output0", (1, None, None))), "free.onnx")
    assert (family.name, layout) == ("yolov6", "rows")


def test_rows_decoded_with_an_exponential_are_yolox_or_the_first_yolov6(tmp_path: Path) -> None:
    path = tmp_path / "anonymous.onnx"
    onnx.save(families.yolox(decoded=True, head="some"), path)
    with pytest.raises(UserError, match=r"`decoder`: yolov6 .*, yolox"):
        graph_from_onnx(path)
    assert graph_from_onnx(path, decoder="yolox").output_layout == "rows"
    raw = tmp_path / "raw.onnx"
    onnx.save(families.yolox(head="some"), raw)
    assert graph_from_onnx(raw).output_layout == "grid_rows"
    assert graph_from_onnx(raw, decoder="yolox").output_layout == "grid_rows"


def test_a_decoder_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = written("yolov8", tmp_path)
    with pytest.raises(UserError, match=r"`decoder` yolox reads .*output0 \[None, 7, 84\]"):
        graph_from_onnx(path, decoder="yolox")
    with pytest.raises(UserError, match="choose one of yolov6, yolov5"):
        graph_from_onnx(path, decoder="detr")
    built = build_engine(
        graph_from_onnx(path), backend="onnxruntime", output=tmp_path / "built.onnx"
    )
    with pytest.raises(UserError, match="was built as yolov8, not yolox"):
        load_engine(built.path, options=LoadOptions(decoder="yolox"))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"task": "segment"}, "task segment"),
        ({"author": "Ultralytics", "head": "RTDETRDecoder"}, "no known layout"),
    ],
)
def test_other_tasks_and_heads_are_refused(
    metadata: dict[str, str], message: str, tmp_path: Path
) -> None:
    model = families.yolov8("best", metadata=False)
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(UserError, match=message):
        graph_from_onnx(tmp_path / "other.onnx")


def facts(*outputs: tuple[str, Sequence[int | None]], size: int = 640, **more: Any) -> GraphFacts:
    specs = tuple(
        TensorSpec(name, tuple(shape), np.dtype(np.int32 if "num" in name else np.float32))
        for name, shape in outputs
    )
    return GraphFacts(specs, (size, size), **more)


@pytest.mark.parametrize(
    ("graph", "expected"),
    [
        (facts(("output0", [1, 300, 6])), True),
        (facts(("detections", [None, 7])), True),
        (facts(("output", [None, 7])), True),
        (facts(("num", [1]), ("boxes", [None, 6])), True),
        (
            facts(
                ("num_dets", [1, 1]),
                ("det_boxes", [1, 100, 4]),
                ("det_scores", [1, 100]),
                ("det_classes", [1, 100]),
            ),
            True,
        ),
        (facts(("outputs", [1, 8400, 85])), True),
        (facts(("outputs", [1, 8401, 85])), False),
        (facts(("boxes", [1, 8400, 4]), ("scores", [1, 8400, 80])), True),
        (facts(("boxes", [1, 500, 4]), ("scores", [1, 500, 80])), False),
        (facts(("logits", [1, 1000])), False),
    ],
)
def test_what_suppresses_by_itself_needs_no_known_number_of_anchors(
    graph: GraphFacts, expected: bool
) -> None:
    assert is_detector(graph, only_known_anchors=True) is expected
    # Without that, all but the classifier may be one.
    assert is_detector(graph) is (graph.outputs[0].name != "logits")


def test_rows_of_five_are_corners_and_the_score_of_the_only_class() -> None:
    graph = dataclasses.replace(facts(("concat_14.tmp_0", [1, 84, 5])), producer="PaddlePaddle")
    assert recognize(graph, "x.onnx", "ppyoloe")[1] == "corner_rows"
    assert LAYOUTS["corner_rows"].classes(graph.outputs) == 1
    with pytest.raises(UserError, match="name one as `decoder`: ppyoloe"):
        recognize(graph, "x.onnx")
    outputs = {"concat_14.tmp_0": np.array([[[8, 16, 24, 40, 0.75], [0, 0, 8, 8, 0.01]]])}
    (found,) = postprocess(outputs, "corner_rows", NMS, [fit((64, 64), (64, 64))])
    assert found.xyxy.tolist() == [[8, 16, 24, 40]]
    assert (found.confidence.tolist(), found.class_id.tolist()) == ([0.75], [0])


def test_boxes_and_scores_by_class_come_in_either_order() -> None:
    outputs = ("scores_out", [1, 80, 8400]), ("boxes_out", [1, 8400, 4])
    named = facts(("boxes", [1, 8400, 4]), ("scores", [1, 80, 8400]))
    for graph in (facts(*outputs), facts(*outputs[::-1]), named):
        family, layout = recognize(graph, "x.onnx", "ppyoloe")
        assert (family.name, layout) == ("ppyoloe", "split_by_class")


def test_scores_with_an_anchor_a_row_are_not_taken_for_scores_by_class(tmp_path: Path) -> None:
    # As YOLO-NAS is exported. Its anchors would be taken for classes, its classes for anchors.
    graph = facts(("pred_bboxes", [1, 8400, 4]), ("pred_scores", [1, 8400, 80]))
    with pytest.raises(UserError, match="no layout that `decoder` ppyoloe reads"):
        recognize(graph, "nas.onnx", "ppyoloe")
    with pytest.raises(UserError, match="no known layout"):
        recognize(graph, "nas.onnx")
    # With free axes only the outputs show it.
    free = facts(("pred_bboxes", [None, None, 4]), ("pred_scores", [None, None, 80]))
    assert recognize(free, "nas.onnx", "ppyoloe")[1] == "split_by_class"
    outputs = {"pred_bboxes": np.zeros((1, 84, 4)), "pred_scores": np.zeros((1, 84, 3))}
    with pytest.raises(UserError, match=r"do not have scores \(batch, classes, anchors\)"):
        postprocess(outputs, "split_by_class", NMS, [fit((64, 64), (64, 64))])


def test_a_named_decoder_is_asked_for_its_own_layouts() -> None:
    columns, rows = facts(("output0", [1, 84, 8400])), facts(("output0", [1, 8400, 85]))
    assert is_detector(columns, "yolov8")
    assert not is_detector(columns, "yolox")
    assert is_detector(rows, "yolox")
    assert not is_detector(rows, "yolov8")


@pytest.mark.parametrize(
    "graph",
    [
        facts(("logits", [1, 1000])),
        facts(("num", [1]), ("boxes", [None, 8])),
        facts(("count", [1]), ("boxes", [None, 6])),  # a count of floats
        facts(("one", [1, 80, 8400]), ("other", [1, 80, 8400])),  # no boxes
        facts(("one", [1, 8400, 4]), ("other", [1, 8400, 4])),  # nothing but boxes
        facts(("output", [None, 8])),
        facts(("output", [1, 8400, 5])),  # no class
        facts(("output", [1, 4, 8400])),
        facts(("boxes", [1, 100, 4]), ("scores", [1, 100]), ("classes", [1, 100])),
        facts(("one", [1, 3, 80, 80, 85]), ("other", [1, 3, 40, 40, 85])),
    ],
)
def test_other_shapes_are_no_detector_s(graph: GraphFacts) -> None:
    assert not is_detector(graph)
    with pytest.raises(UserError, match=r"no known layout \(.*\); export it"):
        recognize(graph, "other.onnx")


ULTRALYTICS = {"author": "Ultralytics", "task": "detect"}


@pytest.mark.parametrize(
    ("graph", "family", "layout"),
    [
        # The shapes of the releases' own files at 640 (and 1280), COCO's 80 classes or few.
        (facts(("output0", [1, 25200, 85])), "yolov5", "rows"),
        (facts(("output0", [1, 102000, 85]), size=1280), "yolov5", "rows"),  # P6
        (
            facts(
                ("output", [1, 25200, 85]),
                *((f"{side}", [1, 3, side, side, 85]) for side in (80, 40, 20)),
            ),
            "yolov5",
            "rows",
        ),
        (facts(("outputs", [1, 8400, 85])), "yolov6", "rows"),
        (facts(("outputs", [None, 8400, 6])), "yolov6", "rows"),  # one class
        (facts(("output0", [1, 84, 8400])), "yolov8", "columns"),
        (facts(("output0", [None, 5, 8400])), "yolov8", "columns"),
        (facts(("output0", [1, 84, None])), "yolov8", "columns"),
        (facts(("output0", [1, 300, 6])), "yolov8", "best"),
        (facts(("output0", [None, None, None]), metadata=ULTRALYTICS), "yolov8", "columns"),
        (
            facts(
                ("output0", [None, None, None]),
                metadata={**ULTRALYTICS, "args": "{'nms': True, 'data': None}"},
            ),
            "yolov8",
            "best",
        ),
        (
            facts(
                ("output0", [None, None, None]),
                metadata={**ULTRALYTICS, "end2end": "True"},
            ),
            "yolov8",
            "best",
        ),
        (
            facts(
                ("output0", [None, None, None]),
                metadata={"description": "Ultralytics YOLO11n model trained on coco.yaml"},
            ),
            "yolov8",
            "columns",
        ),
        (facts(("output0", [None, None, 6]), metadata=ULTRALYTICS), "yolov8", "best"),
        (facts(("output0", [1, 1000, 6])), "yolov8", "best"),
        # Numbers of anchors that no known head has: the longer axis is theirs.
        (facts(("output0", [1, 1001, 6])), "yolov6", "rows"),
        (facts(("output0", [None, None, 85])), "yolov6", "rows"),
        (facts(("output0", [1, 84, 8401])), "yolov8", "columns"),
        (facts(("outputs", [1, 84, 90]), size=64), "yolov6", "rows"),  # fewer anchors than columns
        (facts(("output0", [1, 90, 84]), size=64), "yolov8", "columns"),
        (facts(("output0", [1, 252, 300]), size=64), "yolov5", "rows"),
        (facts(("output0", [1, 84, 84]), size=64, metadata=ULTRALYTICS), "yolov8", "columns"),
        (facts(("output", [None, 7])), "yolov7", "end2end_yolov7"),
        (facts(("detections", [None, 7])), "yolov6", "end2end"),
        (
            facts(
                ("num_detections", [1, 1]),
                ("detection_boxes", [1, 100, 4]),
                ("detection_scores", [1, 100]),
                ("detection_classes", [1, 100]),
            ),
            "yolov7",
            "efficient_nms",
        ),
        (facts(("boxes", [None, 8400, 4]), ("scores", [None, 8400, 80])), "yolov6", "split"),
    ],
)
def test_shapes_of_real_exports_are_told_apart(
    graph: GraphFacts, family: str, layout: OutputLayout
) -> None:
    found, how = recognize(graph, "x.onnx")
    assert (found.name, how) == (family, layout)


@pytest.mark.parametrize(
    "graph",
    [
        facts(("output0", [1, 84, 84]), size=64),  # anchors first or last?
        facts(("output0", [1, None, 6])),  # one class, or NMS done?
    ],
)
def test_shapes_that_are_either_of_two_are_asked_about(graph: GraphFacts) -> None:
    with pytest.raises(UserError, match=r"several families share.*yolov8"):
        recognize(graph, "x.onnx")
    assert recognize(graph, "x.onnx", "yolov8")[0].name == "yolov8"


def test_the_documents_and_the_help_know_every_family(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (root / "docs" / "how-to" / "other-detectors.md").read_text()
    with pytest.raises(SystemExit):
        main(["build", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name in FAMILIES:
        assert f"`{name}`" in page
        assert name in text


def test_every_layout_is_some_familys() -> None:
    of_families = {layout for family in FAMILIES.values() for layout in family.layouts}
    assert of_families == set(LAYOUTS)


# --- what comes with an export ------------------------------------------------------------------


def test_inputs_beside_the_image_become_constants(tmp_path: Path) -> None:
    model = families.ppyoloe()
    for name in ("im_shape",):
        value = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 2])
        model.graph.input.insert(0, value)
    path = tmp_path / "ppyoloe.onnx"
    onnx.save(model, path)
    graph = graph_from_onnx(path, decoder="ppyoloe")
    assert [item.name for item in graph.model.graph.input] == ["image"]
    constants = {
        item.name: onnx.numpy_helper.to_array(item).tolist()
        for item in graph.model.graph.initializer
    }
    assert constants["scale_factor"] == [[1, 1]]
    assert constants["im_shape"] == [[64, 64]]
    odd = onnx.helper.make_tensor_value_info("text", onnx.TensorProto.FLOAT, [1, 7])
    model.graph.input.append(odd)
    onnx.save(model, path)
    with pytest.raises(UserError, match="im_shape, image, scale_factor, text"):
        graph_from_onnx(path)


def test_images_in_half_precision_are_cast_to_it(tmp_path: Path) -> None:
    model = convert_float_to_float16(families.yolov8(), keep_io_types=False)
    path = tmp_path / "half.onnx"
    onnx.save(model, path)
    graph = graph_from_onnx(path)
    assert graph.precision == "fp16"
    built = build_engine(graph, backend="onnxruntime", output=tmp_path / "built.onnx")
    images = np.random.default_rng(0).random((1, 3, 64, 64), np.float32)
    (expected,) = onnxruntime.InferenceSession(path).run(None, {"images": images.astype("f2")})
    for one in (built.path, path):
        with load_engine(one) as engine:
            found = engine.infer(images)["output0"]
        np.testing.assert_allclose(found, expected, rtol=2e-3)  # a last digit or two


@pytest.mark.parametrize("ir_version", [3, 8])
def test_weights_that_are_inputs_too_become_constants(ir_version: int, tmp_path: Path) -> None:
    path, data = tmp_path / "v8.onnx", families.write_dataset(tmp_path / "data", "letterbox")
    found = []
    for as_inputs in (False, True):
        model = families.yolov8()
        if as_inputs:
            model.ir_version = ir_version
            model.graph.input.extend(
                onnx.helper.make_tensor_value_info(item.name, item.data_type, item.dims)
                for item in model.graph.initializer
            )
        onnx.save(model, path)
        graph, half = graph_from_onnx(path), graph_from_onnx(path, fp16=True)
        assert half.model.ByteSize() < 0.6 * graph.model.ByteSize()
        settings = QuantizationSettings(calibrator="minmax", equalize=False, bias_correction=False)
        int8 = quantize(graph, data / "images" / "val", settings).graph
        engines = [build_engine(int8, backend="onnxruntime", output=tmp_path / "8.onnx").path, path]
        for one in engines:
            with load_engine(one) as engine:
                images = np.random.default_rng(0).random((1, 3, 64, 64), np.float32)
                found.append(engine.infer(images))
    for plain, with_inputs in zip(found[:2], found[2:], strict=True):
        np.testing.assert_array_equal(plain["output0"], with_inputs["output0"])


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        *(("FLOAT", []), ("FLOAT", [2]), ("FLOAT", [1, 2, 1]), ("FLOAT", [2**40, 2])),
        ("STRING", [1, 2]),
    ],
)
def test_a_scale_factor_of_another_shape_or_type_is_refused(
    kind: str, shape: list[int], tmp_path: Path
) -> None:
    model = families.ppyoloe()
    (factor,) = (item for item in model.graph.input if item.name == "scale_factor")
    model.graph.input.remove(factor)
    elem_type = onnx.TensorProto.DataType.Value(kind)
    odd = onnx.helper.make_tensor_value_info("scale_factor", elem_type, shape)
    model.graph.input.append(odd)
    onnx.save(model, tmp_path / "odd.onnx")
    with pytest.raises(UserError, match="takes scale_factor as"):
        graph_from_onnx(tmp_path / "odd.onnx", decoder="ppyoloe")


def test_names_and_size_are_read_from_the_metadata(tmp_path: Path) -> None:
    model = families.yolov8()
    dims = model.graph.input[0].type.tensor_type.shape.dim
    for axis, name in ((2, "height"), (3, "width")):
        dims[axis].dim_param = name
    for axis in (1, 2):
        model.graph.output[0].type.tensor_type.shape.dim[axis].dim_param = f"free_{axis}"
    path = tmp_path / "dynamic.onnx"
    onnx.save(model, path)
    graph = graph_from_onnx(path)
    assert graph.class_names == NAMES
    assert graph.image_size == (64, 64)
    shape = [d.dim_value for d in graph.model.graph.output[0].type.tensor_type.shape.dim]
    assert shape == [0, 7, 84]


@pytest.mark.parametrize(
    "names",
    [
        *("__import__('os').system('true')", "{0: 'a', 'x': 'b'}", "{[]: 1}", "{" * 5000, "3"),
        *("{0: 'a', 2: 'b', 3: 'c'}", "{1: 'a', 2: 'b', 3: 'c'}", "{0: 'a', 1: 'b', '1': 'c'}"),
    ],
)
def test_metadata_that_is_no_list_of_names_is_left_alone(names: str, tmp_path: Path) -> None:
    model = families.yolov8(metadata=False)
    model.metadata_props.add(key="names", value=names)
    onnx.save(model, tmp_path / "odd.onnx")
    graph = graph_from_onnx(tmp_path / "odd.onnx")
    assert graph.class_names == ("class_0", "class_1", "class_2")


def test_names_in_json_are_what_json_means(tmp_path: Path) -> None:
    model, names = families.yolov8(metadata=False), ("🚗", "a/b", "\\n")
    text = json.dumps(names).replace("/", "\\/")  # as PHP escapes it
    model.metadata_props.add(key="names", value=text)
    onnx.save(model, tmp_path / "json.onnx")
    assert graph_from_onnx(tmp_path / "json.onnx").class_names == names


def test_a_changed_preprocessing_is_kept_in_the_manifest(tmp_path: Path) -> None:
    changes = ("colour=rgb", "mean=123.675,116.28,103.53", "std=58.395,57.12,57.375")
    graph = graph_from_onnx(written("yolox", tmp_path), preprocess=parse_changes(changes))
    built = build_engine(graph, backend="onnxruntime", output=tmp_path / "legacy.onnx")
    with load_engine(built.path, options=LoadOptions(preprocess=None)) as engine:
        assert engine.preprocessing == Preprocessing(
            "corner", "linear", "rgb", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
        )
    with load_engine(built.path, options=LoadOptions(preprocess={"fit": "stretch"})) as engine:
        assert engine.preprocessing.fit == "stretch"
        assert engine.preprocessing.colour == "rgb"


# --- arithmetic, against the formulas of the families' releases ----------------------------------

sides = st.tuples(*[st.sampled_from([64, 96, 160, 256])] * 2)


@st.composite
def planted(draw: st.DrawFn) -> tuple[tuple[int, int], int, int, int, NDArray[np.float64]]:
    """An input size, a level, a cell of it (row, column), and a box around that cell's middle."""
    size = draw(sides)
    level = draw(st.integers(0, 2))
    stride = 8 << level
    row = draw(st.integers(0, size[0] // stride - 1))
    column = draw(st.integers(0, size[1] // stride - 1))
    shares = st.floats(0.02, 0.98)
    centre = np.array([column + draw(shares), row + draw(shares)]) * stride
    half = np.array([draw(st.floats(0.3, 1.5)), draw(st.floats(0.3, 1.5))]) * stride
    return size, level, row, column, np.concatenate([centre - half, centre + half])


def only_found(outputs: dict[str, NDArray[Any]], layout: OutputLayout, size: Any) -> Detections:
    (found,) = postprocess(outputs, layout, NmsSettings(0.5), [fit(size, size)], clip=False)
    assert len(found) == 1
    return found


@given(planted())
@settings(deadline=None, max_examples=60)
def test_a_box_planted_in_a_yolox_grid_comes_back(plant: Any) -> None:
    size, level, row, column, box = plant
    shapes = [(size[0] // stride, size[1] // stride) for stride in (8, 16, 32)]
    before = sum(rows * columns for rows, columns in shapes[:level])
    rows = np.zeros((1, sum(r * c for r, c in shapes), 7), np.float32)
    place = before + row * shapes[level][1] + column
    rows[0, place, :4] = families.yolox_offsets(box[None], np.array([[column, row]]), 8 << level)[0]
    rows[0, place, 4:] = 0.9, 0.1, 0.8
    found = only_found({"output": rows}, "grid_rows", size)
    np.testing.assert_allclose(found.xyxy[0], box, atol=1e-3)
    assert found.class_id.tolist() == [1]
    assert found.confidence[0] == pytest.approx(0.72)


@given(planted(), st.integers(0, 2), st.sampled_from([YOLOV5_ANCHORS, YOLOV7_ANCHORS]))
@settings(deadline=None, max_examples=60)
def test_a_box_planted_in_anchor_grids_comes_back(plant: Any, anchor: int, anchors: Any) -> None:
    size, level, row, column, box = plant
    # The formula reaches sides of four times the anchor's.
    centre, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 2
    half = np.minimum(half, 1.9 * np.array(anchors[level][anchor]))
    box = np.concatenate([centre - half, centre + half])
    grids = [
        np.full((1, 3, size[0] // stride, size[1] // stride, 7), -20, np.float32)
        for stride in (8, 16, 32)
    ]
    cell = grids[level][0, anchor, row, column]
    cell[:4] = families.anchor_logits(
        box[None], np.array([[column, row]]), 8 << level, anchors[level][anchor]
    )[0]
    cell[4:] = families.logit([0.9, 0.8, 0.1])
    layout: OutputLayout = "grids_yolov5" if anchors is YOLOV5_ANCHORS else "grids_yolov7"
    # In any order of the outputs.
    outputs = {str(index): grids[index] for index in np.random.default_rng(row).permutation(3)}
    found = only_found(outputs, layout, size)
    np.testing.assert_allclose(found.xyxy[0], box, atol=2e-3)
    assert found.class_id.tolist() == [0]
    assert found.confidence[0] == pytest.approx(0.72, rel=1e-4)


def test_the_anchors_are_the_releases() -> None:
    assert YOLOV5_ANCHORS == families.V5_ANCHORS
    assert YOLOV7_ANCHORS == families.V7_ANCHORS


def test_anchors_that_fit_no_grid_are_refused() -> None:
    with pytest.raises(UserError, match="100 anchors are not those of an input of 64x64"):
        postprocess({"o": np.zeros((1, 100, 7))}, "grid_rows", NMS, [fit((64, 64), (64, 64))])


def test_sides_that_overflow_are_dropped(recwarn: pytest.WarningsRecorder) -> None:
    rows = np.zeros((1, 84, 6), np.float32)
    rows[0, :2, 4:] = 0.9
    rows[0, 0, 2] = 1e5
    found = only_found({"o": rows}, "grid_rows", (64, 64))
    np.testing.assert_allclose(found.xyxy, [[-4, -4, 12, 4]], atol=12)
    assert not recwarn.list


def test_padding_of_graphs_with_nms_inside_is_no_detection() -> None:
    whole = [fit((64, 64), (64, 64))] * 2
    best = np.zeros((2, 5, 6), np.float32)
    best[1, 0] = 1, 2, 30, 40, 0.9, 2
    first, second = postprocess({"o": best}, "best", NmsSettings(0.0), whole)
    assert (len(first), second.class_id.tolist()) == (0, [2])
    outputs = {
        "num_dets": np.array([[1], [0]]),
        "det_boxes": np.tile(np.array([1.0, 2, 30, 40], np.float32), (2, 3, 1)),
        "det_scores": np.full((2, 3), 0.9, np.float32),
        "det_classes": np.array([[1, -1, -1], [-1, -1, -1]]),
    }
    first, second = postprocess(outputs, "efficient_nms", NMS, whole)
    assert (first.class_id.tolist(), len(second)) == ([1], 0)
    # PaddleDetection gives a row of class -1 where it finds nothing at all.
    rows = np.array([[2, 0.9, 1, 2, 30, 40], [-1, 0.9, 0, 0, 0, 0]], np.float32)
    outputs = {"rows": rows, "counts": np.array([1, 1], np.int32)}
    first, second = postprocess(outputs, "end2end_ppyoloe", NMS, whole)
    assert (first.class_id.tolist(), len(second)) == ([2], 0)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "split"])
def test_outputs_of_another_layout_are_refused(layout: OutputLayout) -> None:
    with pytest.raises(UserError, match="its output layout promises"):
        postprocess(
            {"a": np.zeros(3), "b": np.zeros((1, 2, 3, 4))}, layout, NMS, [fit((8, 8), (8, 8))]
        )


def test_half_precision_outputs_are_taken() -> None:
    columns = np.zeros((1, 7, 84), np.float16)
    columns[0, :, 5] = 20, 30, 8, 4, 0.25, 0.75, 0
    read = LAYOUTS["columns"].read({"o": columns}, (64, 64))(0)
    assert isinstance(read, Anchors)
    found = only_found({"o": columns}, "columns", (64, 64))
    np.testing.assert_allclose(found.xyxy, [[16, 28, 24, 32]])
    assert found.confidence.tolist() == [0.75]
