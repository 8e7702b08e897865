"""A PyTorch network as an engine gives what the same network gives as an ONNX engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.training_data import CLASS_NAMES, write_shapes, write_tiny

from trt_yolov6.checkpoints.loading import load_checkpoint
from trt_yolov6.data.coco import load_coco
from trt_yolov6.data.images import read_image
from trt_yolov6.detectors.candidates import Candidates
from trt_yolov6.engines import load_engine
from trt_yolov6.engines.build import BuiltEngine
from trt_yolov6.errors import UserError
from trt_yolov6.runtime.evaluate import evaluate
from trt_yolov6.runtime.predict import detect
from trt_yolov6.spec import NmsSettings
from trt_yolov6.training.torch_engine import TorchEngine


def test_it_detects_what_onnx_runtime_detects(root: Path, sample_engine: BuiltEngine) -> None:
    checkpoint = load_checkpoint(root / "samples" / "yolov6n_bccd_authors.pt")
    images = [read_image(root / "samples" / "images" / "val" / "BloodImage_00007.jpg")]
    with (
        TorchEngine(checkpoint.model, checkpoint.class_names, 640) as ours,
        load_engine(sample_engine.path) as other,
    ):
        (found,), (expected,) = detect(ours, images), detect(other, images)
        assert ours.precision == "fp32"
        assert ours.image_size == (640, 640)
    np.testing.assert_array_equal(found.class_id, expected.class_id)
    np.testing.assert_allclose(found.xyxy, expected.xyxy, atol=0.05)
    np.testing.assert_allclose(found.confidence, expected.confidence, atol=1e-3)


def test_candidates_are_the_scores_above_the_threshold(root: Path) -> None:
    checkpoint = load_checkpoint(root / "samples" / "yolov6n_bccd_authors.pt")
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 96, 3), dtype=np.uint8)
    with TorchEngine(checkpoint.model, checkpoint.class_names, (64, 96)) as engine:
        outputs = engine.infer(images)
        assert all(spec.fits(outputs[spec.name]) for spec in engine.outputs)
        threshold = float(np.quantile(outputs["scores"], 0.99))
        found = engine.start(images, NmsSettings(threshold)).wait()
        assert isinstance(found, Candidates)
        image, anchor, label = np.nonzero(outputs["scores"] > threshold)
        np.testing.assert_array_equal(found.images, image)
        np.testing.assert_array_equal(found.classes, label)
        np.testing.assert_array_equal(found.scores, outputs["scores"][image, anchor, label])
        np.testing.assert_array_equal(found.boxes, outputs["boxes"][image, anchor])
        assert engine.resident_run(images)() > 0
        with pytest.raises(UserError, match="takes uint8 images"):
            engine.infer(images.astype(np.float32))
    with pytest.raises(UserError, match="is closed"):
        engine.infer(images)


def test_the_network_stays_as_it_is(root: Path) -> None:
    model = load_checkpoint(root / "samples" / "yolov6n_bccd_authors.pt").model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = np.zeros((1, 64, 64, 3), np.uint8)
    with TorchEngine(model, ("a", "b", "c"), 64) as engine:
        engine.infer(images)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_network_that_knows_nothing_yet_is_evaluated(tmp_path: Path) -> None:
    model = load_checkpoint(write_tiny(tmp_path / "tiny.pt")).model
    biases = {"cls_pred": 3.0, "reg_pred": -1.0}  # boxes that end before they begin
    with torch.no_grad():
        for name, value in model.named_parameters():
            for layer, bias in biases.items():
                if f".{layer}." in name:
                    value.fill_(bias if name.endswith(".bias") else 0)
    data = load_coco(write_shapes(tmp_path / "data"), "val")
    with TorchEngine(model, CLASS_NAMES, 96) as engine:
        assert evaluate(engine, data, progress=False).ap == 0
