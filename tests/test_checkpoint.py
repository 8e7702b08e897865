"""The authors' files come in whole, whatever variant and form; anything else gets one sentence."""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
import re
import struct
import tarfile
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import authors_format
from support.authors_format import FACTS, Facts, authors_model, fuse_as_authors, write_checkpoint
from torch import nn

from trt_yolov6.checkpoints.archive import TorchArchive
from trt_yolov6.checkpoints.loading import Checkpoint, load_checkpoint
from trt_yolov6.checkpoints.meituan.recognition import recognize
from trt_yolov6.checkpoints.meituan.tree import Tree
from trt_yolov6.data.class_names import COCO_NAMES
from trt_yolov6.errors import UserError
from trt_yolov6.models import VARIANTS, YOLOv6, architecture, fuse

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "samples" / "yolov6n_bccd_authors.pt"
REFERENCE = ROOT.parent / "shared" / "checkpoints" / "yolov6n_bccd.reference.npz"


def refusal(path: Path) -> str:
    """Return the sentence that refuses a file; fail where that is not one sentence."""
    with pytest.raises(UserError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert message.endswith(".")
    assert message.replace(str(path), "FILE").count(". ") == 0, "more than one sentence"
    return message


# The sample, trained by the authors' code.


def test_the_sample_is_recognized_from_the_file_alone() -> None:
    checkpoint = load_checkpoint(SAMPLE)
    assert checkpoint.arch == architecture("yolov6n", num_classes=3)
    assert checkpoint.class_names == ("RBC", "WBC", "Platelets")
    assert checkpoint.form == "training"
    assert checkpoint.path == SAMPLE
    assert not checkpoint.model.training
    assert {p.dtype for p in checkpoint.model.parameters()} == {torch.float32}


@pytest.mark.skipif(not REFERENCE.exists(), reason="the reference outputs are not here")
@pytest.mark.parametrize("form", ["training", "fused"])
def test_outputs_equal_the_authors_models(form: str) -> None:
    reference = np.load(REFERENCE)
    model = load_checkpoint(SAMPLE).model
    if form == "fused":
        model = fuse(model)
    rows = decoded(model, reference["images"])
    expected = reference["outputs"]
    for part in (slice(0, 4), slice(4, None)):
        difference = np.abs(rows[..., part] - expected[..., part]).max()
        assert difference < 1e-3 * expected[..., part].max()


# Files of release 0.4 with the outputs of the authors' code for them.


@pytest.mark.parametrize(
    ("name", "variant", "anchors"),
    [
        ("yolov6n_0.4_random", "yolov6n_v3", 2100),
        ("yolov6n_distill_0.4_random", "yolov6n_v3", 2100),
        ("yolov6n_fuseab_0.4_random", "yolov6n_v3", 2100),
        ("yolov6lite_s_0.4_random", "yolov6lite_s", 2125),
    ],
)
@pytest.mark.parametrize("form", ["training", "fused"])
def test_outputs_equal_those_of_release_0_4(
    name: str, variant: str, anchors: int, form: str
) -> None:
    path = REFERENCE.with_name(f"{name}.pt")
    if not path.exists():
        pytest.skip("the reference outputs are not here")
    loaded = load_checkpoint(path)
    assert loaded.arch == architecture(variant)
    assert (loaded.release, loaded.form) == ("0.4", "training")
    assert loaded.class_names == COCO_NAMES
    reference = np.load(path.with_suffix(".reference.npz"))
    rows = decoded(loaded.model if form == "training" else fuse(loaded.model), reference["images"])
    expected = reference["outputs"]
    assert rows.shape == expected.shape == (1, anchors, 85)
    for part in (slice(0, 4), slice(4, 5), slice(5, None)):
        difference = np.abs(rows[..., part] - expected[..., part]).max()
        assert difference < 1e-4 * expected[..., part].max()


def decoded(model: YOLOv6, images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return rows as the authors' code gives them: centre, size, 1, scores."""
    with torch.no_grad():
        boxes, scores = model(torch.from_numpy(images).float() / 255)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    sizes = boxes[:, 2:] - boxes[:, :2]
    rows: np.ndarray[Any, Any] = torch.cat(
        (centres, sizes, torch.ones_like(scores[:, :1]), scores), 1
    ).mT.numpy()
    return rows


# Files made in the authors' format: every variant, form, head and set of classes.


def narrow(name: str, **changes: Any) -> Facts:
    """A network with few channels and short stages, for small files."""
    small: dict[str, Any] = {
        "backbone": (6, 12, 24, 36, 48),
        "neck": (24, 12, 18, 30, 36, 42),
        "repeats": (2, 3, 1, 2),
        "neck_repeats": (1, 2, 3, 1),
        "classes": 3,
    }
    if len(FACTS[name].repeats) == 5:
        small["backbone"] = (6, 12, 24, 36, 42, 48)
        small["neck"] = (36, 24, 12, 18, 30, 42)
        small["repeats"], small["neck_repeats"] = (2, 3, 1, 2, 1), (1, 2, 1, 2, 1, 1)
    if FACTS[name].stack == "mbla":
        small["repeats"], small["neck_repeats"] = (1, 2, 4, 1), (2, 1, 4, 1)
    return dataclasses.replace(FACTS[name], **{**small, **changes})


def assert_loads(path: Path, facts: Facts | None, model: nn.Module) -> Checkpoint:
    """Check that a file loads as what it is and computes what the model in it computes."""
    loaded = load_checkpoint(path)
    if facts is not None:
        assert loaded.release == facts.release
        assert loaded.arch.stage_channels == facts.backbone
        assert loaded.arch.num_classes == facts.classes
        assert loaded.arch.reg_max == facts.bins
        assert loaded.arch.csp_ratio == (
            None if facts.stack == "plain" else pytest.approx(facts.ratio)
        )
    images = torch.rand(1, 3, 64, 128)
    with torch.no_grad():
        expected = model(images)
        for candidate, tolerance in ((loaded.model, 1e-4), (fuse(loaded.model), 1e-3)):
            for level, wanted in zip(candidate.raw(images), expected, strict=True):
                assert len(level) == len(wanted)
                for output, truth in zip(level, wanted, strict=True):
                    difference = (output - truth).abs().max()
                    assert difference <= tolerance * truth.abs().max()
    return loaded


KINDS = {
    "plain": narrow("yolov6n"),
    "offset head of v0.1": narrow("yolov6n", head="offset", release="0.1"),
    "RepOptimizer": narrow("yolov6s", block="opt"),
    "RepOptimizer's search": narrow("yolov6s", block="hs"),
    "CSP 2/3 with DFL": narrow("yolov6m"),
    "CSP 1/2, SiLU except for the neck's ReLU, plain convolutions, DFL": narrow("yolov6l"),
    "CSP 1/2, ReLU, DFL": narrow("yolov6l_relu"),
    "DFL with fewer bins": narrow("yolov6m", bins=7),
    "one class": narrow("yolov6n", classes=1),
    "0.3": narrow("yolov6n_v3", release="0.3"),
    "0.3, anchor-aided": narrow("yolov6n_v3", release="0.3", head="fuse_ab"),
    "0.3, anchor-aided, DFL": narrow("yolov6m_v3", release="0.3", head="fuse_ab"),
    "0.3, self-distilled": narrow("yolov6n_v3", release="0.3", head="distill"),
    "0.3, L": narrow("yolov6l_v3", release="0.3"),
    "0.3, base": narrow("yolov6s_base", release="0.3"),
    "0.3, PAN": narrow("yolov6s", release="0.3", block="opt"),
    "0.4": narrow("yolov6n_v3"),
    "0.4, anchor-aided": narrow("yolov6n_v3", head="fuse_ab"),
    "0.4, self-distilled": narrow("yolov6n_v3", head="distill"),
    "0.4, M": narrow("yolov6m_v3"),
    "0.4, L": narrow("yolov6l_v3"),
    "0.4, P6": narrow("yolov6n6"),
    "0.4, P6, L": narrow("yolov6l6"),
    "0.4, QARepVGG": narrow("yolov6n_qa"),
    "0.4, QARepVGG, M": narrow("yolov6m_qa"),
    "0.4, base": narrow("yolov6n_base"),
    "0.4, base, CSP": narrow("yolov6s_base"),
    "0.4, MBLA": narrow("yolov6s_mbla"),
    "0.4, PAN": narrow("yolov6t", release="0.4"),
    "0.4, PAN, RepOptimizer": narrow("yolov6s", release="0.4", block="opt"),
    "0.4, PAN, CSP": narrow("yolov6m", release="0.4"),
    "0.4, search": narrow("yolov6s_v3", block="hs"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_loads(tmp_path: Path, kind: str) -> None:
    facts = KINDS[kind]
    model = authors_model(facts)
    loaded = assert_loads(write_checkpoint(tmp_path / "best_ckpt.pt", model), facts, model)
    assert loaded.form == "training"
    unused = ["detect.proj", "detect.cls_preds_ab", "detect.reg_preds_ab"]
    if facts.head == "distill":
        unused.append("detect.reg_preds" + ("_dist" if facts.release == "0.4" else "."))
    if facts.release == "0.3" and facts.block.startswith("conv"):
        # 0.3's convolutions have a bias before a normalization; it becomes a part of that.
        unused += [name for name, _ in model.named_parameters() if name.endswith("block.conv.bias")]
    assert sum(p.numel() for p in loaded.model.parameters()) == sum(
        p.numel() for name, p in model.named_parameters() if not name.startswith(tuple(unused))
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_loads_fused(tmp_path: Path, kind: str) -> None:
    model = fuse_as_authors(authors_model(KINDS[kind]))
    path = write_checkpoint(tmp_path / "fused.pt", model)
    # The bound methods that the authors' fusing leaves in the modules.
    assert b"getattr" in zipfile.ZipFile(path).read("fused/data.pkl")
    loaded = assert_loads(path, KINDS[kind], model)
    # Some classes are never fused there. QARepVGG's last normalization is not, either, but here.
    never = (authors_format.RealVGGBlock, authors_format.LinearAddBlock, authors_format.Conv_C3)
    rest = any(isinstance(module, never) for module in model.modules())
    assert loaded.form == ("mixed" if rest else "fused")


@pytest.mark.parametrize("kind", ["plain", "CSP 2/3 with DFL", "0.4, M", "0.4, QARepVGG"])
def test_a_file_whose_convolutions_alone_are_fused_loads(tmp_path: Path, kind: str) -> None:
    model = fuse_as_authors(authors_model(KINDS[kind]), only_convolutions=True)
    path = write_checkpoint(tmp_path / "fused.pt", model)
    assert assert_loads(path, KINDS[kind], model).form == "mixed"


def test_lite_loads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = authors_format.LiteModel((8, 16, 24, 32, 48), (1, 2, 2, 1), width=16, classes=3)
    model = authors_format.randomized(small)
    loaded = assert_loads(write_checkpoint(tmp_path / "lite.pt", model), None, model)
    assert loaded.arch.stage_channels == (8, 16, 24, 32, 48)
    assert loaded.arch.stage_repeats == (1, 2, 2, 1)
    assert (loaded.release, loaded.form) == ("0.4", "training")
    # The authors fold nothing into the depthwise pairs of neck and head.
    fused = fuse_as_authors(model)
    assert assert_loads(write_checkpoint(tmp_path / "x.pt", fused), None, fused).form == "mixed"


@pytest.mark.parametrize("name", VARIANTS)
def test_each_size_is_recognized_by_name(name: str) -> None:
    with torch.device("meta"):
        model: nn.Module
        if name in FACTS:
            model = authors_format.Model(FACTS[name])
        else:
            model = authors_format.LiteModel(authors_format.LITE_CHANNELS[name])
    tensors, origins = authors_format.parts_of(model)
    found = recognize(Tree(Path("x.pt"), tensors, origins, {}))
    assert dataclasses.replace(found, csp_ratio=None) == dataclasses.replace(
        architecture(name), csp_ratio=None
    )


def test_boxes_of_0_3s_self_distillation_are_not_those_it_trains_with(tmp_path: Path) -> None:
    """The names of both swapped between 0.3.0 and 0.4; either would load."""
    for release, used in (("0.3", "reg_preds_lrtb"), ("0.4", "reg_preds")):
        model = authors_model(narrow("yolov6n_v3", release=release, head="distill"))
        loaded = load_checkpoint(write_checkpoint(tmp_path / "x.pt", model)).model
        for index, level in enumerate(loaded.head.levels):
            theirs = model.state_dict()[f"detect.{used}.{index}.weight"]
            assert torch.equal(level.get_submodule("reg_pred").get_parameter("weight"), theirs)


def test_recognizing_a_file_takes_little_beside_reading_its_tensors(tmp_path: Path) -> None:
    """At most twice the time, counted in the processor's seconds: others may use this machine."""
    path = write_checkpoint(tmp_path / "x.pt", authors_model(FACTS["yolov6n_v3"]))

    def read_tensors() -> list[torch.Tensor]:
        tensors: list[torch.Tensor] = []
        with TorchArchive(path) as archive:
            pending = [archive.root["model"]]
            while pending:
                state = pending.pop().state
                for group in ("_parameters", "_buffers"):
                    values = (value for value in state[group].values() if value is not None)
                    tensors += map(archive.tensor, values)
                pending += [child for child in state["_modules"].values() if child is not None]
        return tensors

    def seconds(action: Callable[[], object]) -> float:
        start = time.process_time()
        action()
        return time.process_time() - start

    pairs = [(seconds(lambda: load_checkpoint(path)), seconds(read_tensors)) for _ in range(3)]
    # 1.3 on a quiet machine; the processor's caches are shared with whatever else runs.
    assert min(whole / tensors for whole, tensors in pairs) < 2


def test_weights_arrive_unchanged(tmp_path: Path) -> None:
    model = authors_model(KINDS["CSP 2/3 with DFL"])
    loaded = load_checkpoint(write_checkpoint(tmp_path / "x.pt", model)).model
    theirs = model.state_dict()
    ours = loaded.state_dict()
    for own, key in {
        "backbone.stem.dense.conv.weight": "backbone.stem.rbr_dense.conv.weight",
        "backbone.stages.3.body.bottlenecks.1.alpha": "backbone.ERBlock_5.1.m.block.0.alpha",
        "neck.bottomup4.merge.bn.running_var": "neck.Rep_n3.cv3.bn.running_var",
        "head.levels.2.reg_pred.bias": "detect.reg_preds.2.bias",
    }.items():
        torch.testing.assert_close(ours[own], theirs[key], rtol=0, atol=0)


def test_batch_normalization_constants_come_from_the_file(tmp_path: Path) -> None:
    model = authors_model(KINDS["plain"])
    model.backbone.get_submodule("stem.rbr_dense.bn").__dict__["eps"] = 1e-2
    loaded = load_checkpoint(write_checkpoint(tmp_path / "x.pt", model)).model
    found = [m.eps for m in loaded.backbone.stem.modules() if isinstance(m, nn.BatchNorm2d)]
    assert found == [1e-2, 1e-3]


def test_the_moving_average_wins_over_the_model(tmp_path: Path) -> None:
    model, average = authors_model(KINDS["plain"], 1), authors_model(KINDS["plain"], 2)
    # As while training goes on: with an optimizer's state and NumPy's numbers next to the network.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.rand(1, 3, 64, 64))[0][0].sum().backward()
    optimizer.step()
    path = write_checkpoint(
        tmp_path / "x.pt",
        model,
        ema=average.half(),
        optimizer=optimizer.state_dict(),
        updates=np.float64(3),
    )
    assert_loads(path, KINDS["plain"], average.float())


def test_a_model_saved_without_its_wrapping_loads(tmp_path: Path) -> None:
    model = authors_model(KINDS["plain"])
    with authors_format.installed():
        torch.save(model, tmp_path / "x.pt")
    assert_loads(tmp_path / "x.pt", KINDS["plain"], model)


@pytest.mark.parametrize(
    ("on_model", "in_file", "count", "expected"),
    [
        (["a", "b"], None, 2, ("a", "b")),
        ({1: "b", 0: "a"}, None, 2, ("a", "b")),
        (None, ["left", "right"], 2, ("left", "right")),
        (None, None, 2, ("class_0", "class_1")),
        (None, None, 80, COCO_NAMES),
        (["Ratte", "鼠", ""], None, 3, ("Ratte", "鼠", "")),
    ],
)
def test_class_names_come_from_the_file(
    tmp_path: Path, on_model: Any, in_file: Any, count: int, expected: tuple[str, ...]
) -> None:
    model: Any = authors_model(narrow("yolov6n", classes=count))
    if on_model is not None:
        model.names = on_model
    entries = {} if in_file is None else {"names": in_file}
    path = write_checkpoint(tmp_path / "x.pt", model, **entries)
    assert load_checkpoint(path).class_names == expected


# Not a YOLOv6 of these releases.


def test_parts_of_later_releases_are_refused_by_name(tmp_path: Path) -> None:
    class NewBlock(nn.Module):
        pass

    NewBlock.__qualname__ = NewBlock.__name__
    for place, words in (
        ("backbone.stem", "blocks of class NewBlock"),
        ("backbone.ERBlock_2.1", "stacks of class NewBlock"),
        ("backbone.ERBlock_3.0", "a block of class NewBlock at backbone.ERBlock_3.0"),
    ):
        model: Any = authors_model(KINDS["0.4"])
        parent, _, name = place.rpartition(".")
        old = model.get_submodule(place)
        new = NewBlock()
        new.__dict__.update(old.__dict__)
        setattr(model.get_submodule(parent), name, new)
        with authors_format.installed({"yolov6.layers.more": (NewBlock,)}):
            torch.save({"model": model}, tmp_path / "x.pt")
        message = refusal(tmp_path / "x.pt")
        assert f"holds a YOLOv6 with {words}, which is in none of the releases 0.1 to 0.4" in (
            message
        )
        assert "trt-yolov6 build --onnx" in message


def test_four_levels_without_the_bifusion_that_every_release_has_there_are_refused(
    tmp_path: Path,
) -> None:
    model: Any = authors_model(KINDS["0.4, P6"])
    for name in [name for name, _ in model.neck.named_children() if name.startswith("Bifusion")]:
        delattr(model.neck, name)
    assert "neck.Bifusion0" in refusal(write_checkpoint(tmp_path / "x.pt", model))
    model.backbone.ERBlock_7 = model.backbone.ERBlock_6
    assert "with 7 stages" in refusal(write_checkpoint(tmp_path / "x.pt", model))


@pytest.mark.parametrize(
    ("part", "task"),
    [
        ("seg_preds", "segmentation"),
        ("proto", "segmentation"),
        ("lmk_preds", "faces with landmarks"),
        ("landmark_preds", "faces with landmarks"),
    ],
)
def test_other_tasks_are_refused_by_name(tmp_path: Path, part: str, task: str) -> None:
    model: Any = authors_model(KINDS["0.4"])
    model.detect.add_module(part, nn.ModuleList([nn.Conv2d(4, 10, 1)]))
    message = refusal(write_checkpoint(tmp_path / "x.pt", model))
    assert f"is a YOLOv6 for {task} ({part})" in message


def test_a_head_from_a_module_for_faces_is_refused(tmp_path: Path) -> None:
    class Detect(nn.Module):
        pass

    Detect.__qualname__ = "Detect"
    model: Any = authors_model(KINDS["0.4"])
    head = Detect()
    head.__dict__.update(model.detect.__dict__)
    model.detect = head
    with authors_format.installed({"yolov6.models.heads.effidehead_face": (Detect,)}):
        torch.save({"model": model}, tmp_path / "x.pt")
    assert "is a YOLOv6 for faces with landmarks" in refusal(tmp_path / "x.pt")


@pytest.mark.parametrize("home", ["models.yolo", "ultralytics.nn.tasks"])
def test_other_detectors_are_refused_by_their_class(tmp_path: Path, home: str) -> None:
    class DetectionModel(nn.Module):
        pass

    DetectionModel.__qualname__ = "DetectionModel"
    with authors_format.installed({home: (DetectionModel,)}):
        torch.save({"epoch": 3, "model": DetectionModel()}, tmp_path / "yolov5s.pt")
    message = refusal(tmp_path / "yolov5s.pt")
    assert f"holds {home}.DetectionModel, not a YOLOv6" in message
    assert "trt-yolov6 build --onnx" in message


def test_a_plain_pytorch_network_is_refused_by_its_class(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "x.pt")
    assert "holds torch.nn.modules.linear.Linear, not a YOLOv6" in refusal(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "wrap", [lambda s: s, lambda s: {"model": s}, lambda s: {"ema": None, **s}]
)
def test_a_state_dict_is_named_as_such(tmp_path: Path, wrap: Callable[[Any], Any]) -> None:
    torch.save(wrap(authors_model(KINDS["plain"]).state_dict()), tmp_path / "x.pt")
    assert "holds a state dict" in refusal(tmp_path / "x.pt")


@pytest.mark.parametrize("value", [{}, [], 3, None, {"model": None, "ema": None}, {"model": 3}])
def test_a_file_without_a_network_is_refused(tmp_path: Path, value: Any) -> None:
    torch.save(value, tmp_path / "x.pt")
    assert "holds no network" in refusal(tmp_path / "x.pt")


def change_stem_stride(model: Any) -> None:
    model.backbone.stem.rbr_dense.conv.stride = (1, 1)


def add_a_module(model: Any) -> None:
    model.neck.attention = nn.Conv2d(2, 2, 1)


def remove_a_module(model: Any) -> None:
    del model.neck.Rep_n4


def remove_the_last_stage(model: Any) -> None:
    del model.backbone.ERBlock_5


def change_an_activation(model: Any) -> None:
    model.backbone.ERBlock_3[0].nonlinearity = nn.Mish()


def mix_activations(model: Any) -> None:
    model.backbone.ERBlock_3[0].nonlinearity = nn.SiLU()


def widen_a_layer(model: Any) -> None:
    model.detect.cls_preds[1] = nn.Conv2d(30, 4, 1)


def flatten_a_weight(model: Any) -> None:
    convolution = model.backbone.stem.rbr_dense.conv
    convolution.weight = nn.Parameter(convolution.weight.detach().flatten())


def change_the_pooling(model: Any) -> None:
    model.backbone.ERBlock_5[2].m.kernel_size = 9


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (change_stem_stride, "another stride at backbone.stem.rbr_dense.conv"),
        (add_a_module, "the first is neck.attention.bias"),
        (remove_a_module, "neck.Rep_n4"),
        (remove_the_last_stage, "backbone.ERBlock_5"),
        (change_an_activation, "the activation Mish"),
        (mix_activations, "another activation at backbone.ERBlock_3.0 (silu)"),
        (widen_a_layer, "detect.cls_preds.1.weight of shape (4, 30, 1, 1)"),
        (flatten_a_weight, "backbone.stem.rbr_dense.conv.weight of shape (162,)"),
        (change_the_pooling, "another pooling size"),
    ],
)
def test_an_altered_network_is_refused_with_the_place(
    tmp_path: Path, change: Callable[[Any], None], words: str
) -> None:
    model = authors_model(KINDS["plain"])
    change(model)
    assert words in refusal(write_checkpoint(tmp_path / "x.pt", model))


def test_distance_bins_that_are_not_counted_out_are_refused(tmp_path: Path) -> None:
    model = authors_model(KINDS["CSP 2/3 with DFL"])
    with torch.no_grad():
        model.detect.proj[3] = 3.5
    assert "other distance bins (detect.proj)" in refusal(
        write_checkpoint(tmp_path / "x.pt", model)
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    model = authors_model(KINDS["plain"])
    with torch.no_grad():
        bias = model.neck.upsample0.upsample_transpose.bias
        assert bias is not None
        bias[0] = value
    message = refusal(write_checkpoint(tmp_path / "x.pt", model))
    assert "not finite numbers (neck.upsample0.upsample_transpose.bias)" in message


def test_class_names_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model: Any = authors_model(KINDS["plain"])
    model.names = ["one", "two"]
    assert "class names do not fit its 3 classes" in refusal(
        write_checkpoint(tmp_path / "x.pt", model)
    )


# Not a checkpoint at all, or a damaged one.


def test_files_that_are_no_checkpoint_get_a_sentence_each(tmp_path: Path) -> None:
    assert "check the path" in refusal(tmp_path / "missing.pt")
    assert "is a folder" in refusal(tmp_path)
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, buffer, _use_new_zipfile_serialization=False)
    for content, words in (
        (b"", "is empty"),
        (b"weights, to come\n", "is not a PyTorch checkpoint"),
        (struct.pack("<Q", len(header)) + header + bytes(4), "is a safetensors file"),
        (tar.getvalue(), "is not a PyTorch checkpoint"),
        (buffer.getvalue(), "before PyTorch 1.6"),
        (pickle.dumps({"a": 1}), "is a bare pickle"),
    ):
        path = tmp_path / "x.pt"
        path.write_bytes(content)
        assert words in refusal(path)


def test_nobody_is_sent_to_load_a_bare_pickle(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(pickle.dumps({"a": 1}))
    text = refusal(path)
    assert "save it again" not in text
    assert "do not convert it yourself" in text
    assert "ask its author" in text


def test_other_zip_files_get_a_sentence_each(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("photo.jpg", b"x")
    assert "not one that torch.save wrote" in refusal(path)
    torch.jit.script(nn.Linear(2, 2)).save(str(path))  # type: ignore[no-untyped-call]
    assert "is a TorchScript archive" in refusal(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(1000))
    assert "compressed records" in refusal(path)


@pytest.mark.parametrize("kept", [4, 100, 20_000, 200_000, 0.5, 0.9, 0.999, -1])
def test_a_file_cut_short_is_refused(tmp_path: Path, kept: float) -> None:
    content = SAMPLE.read_bytes()
    length = int(len(content) * kept) if isinstance(kept, float) else kept
    path = tmp_path / "cut.pt"
    path.write_bytes(content[:length])
    assert "damaged or cut short" in refusal(path)


def test_a_flipped_bit_in_the_weights_is_noticed(tmp_path: Path) -> None:
    content = bytearray(SAMPLE.read_bytes())
    content[len(content) // 2] ^= 1
    path = tmp_path / "flipped.pt"
    path.write_bytes(content)
    assert "is damaged" in refusal(path)


# What means harm.


def write_pickle(path: Path, content: bytes, records: dict[str, bytes] | None = None) -> Path:
    """Write an archive as torch.save would, with a pickle of our own making."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", content)
        for name, record in (records or {}).items():
            archive.writestr(f"x/data/{name}", record)
    return path


def call(module: str, name: str, argument: str) -> bytes:
    """A pickle that calls a function with a string."""
    text = argument.encode()
    return (
        b"\x80\x02c"
        + f"{module}\n{name}\n".encode()
        + b"X"
        + struct.pack("<I", len(text))
        + text
        + b"\x85R."
    )


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("posix", "system"),
        ("builtins", "eval"),
        ("__builtin__", "eval"),
        ("builtins", "__import__"),
        ("subprocess", "Popen"),
        ("torch.hub", "load"),
        ("torch", "load"),
        ("torch._utils", "_import_dotted_name"),
        ("torch.serialization", "load"),
        ("torch.utils.cpp_extension", "load"),
        ("torch.nnx", "system"),
        ("copyreg", "_reconstructor"),
        ("functools", "partial"),
        ("operator", "attrgetter"),
        ("pickle", "loads"),
    ],
)
def test_a_pickle_that_wants_to_run_something_is_refused_by_name(
    tmp_path: Path, module: str, name: str
) -> None:
    marker = tmp_path / "ran"
    path = write_pickle(tmp_path / "x.pt", call(module, name, f"touch {marker}"))
    message = refusal(path)
    assert f"asks for {module.replace('__builtin__', 'builtins')}.{name}" in message
    assert not marker.exists()


def test_what_torch_save_writes_of_an_evil_object_is_refused(tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {marker}",)

    for protocol in (2, 3, 4, 5):
        torch.save({"model": Evil()}, tmp_path / "x.pt", pickle_protocol=protocol)
        assert "asks for posix.system" in refusal(tmp_path / "x.pt")
    assert not marker.exists()


def test_names_below_admitted_packages_are_never_resolved(tmp_path: Path) -> None:
    # Protocol 4 resolves dotted names: torch.nn.modules.module.torch.hub.load and the like.
    module, name = b"torch.nn.modules.module", b"torch.serialization.os.system"
    marker = tmp_path / "ran"
    argument = f"touch {marker}".encode()
    content = b"\x80\x04"
    for text in (module, name):
        content += b"\x8c" + bytes([len(text)]) + text
    content += b"\x93\x8c" + bytes([len(argument)]) + argument + b"\x85R."
    assert "not a YOLOv6" in refusal(write_pickle(tmp_path / "x.pt", content))
    assert not marker.exists()


def test_getattr_in_a_pickle_gets_nothing(tmp_path: Path) -> None:
    # getattr(OrderedDict, "fromkeys") would be a real function; here it is a shell without powers.
    content = (
        b"\x80\x02}X\x05\x00\x00\x00modelc__builtin__\ngetattr\nccollections\nOrderedDict\n"
        b"X\x08\x00\x00\x00fromkeys\x86Rs."
    )
    assert "holds builtins.getattr, not a YOLOv6" in refusal(
        write_pickle(tmp_path / "x.pt", content)
    )


def test_a_pickle_cannot_alter_classes_or_functions(tmp_path: Path) -> None:
    before = torch._utils._rebuild_tensor_v2.__defaults__
    state = b"N}X\x0c\x00\x00\x00__defaults__Ns\x86b."
    for target in (
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"ccollections\nOrderedDict\n",
        b"cyolov6.models.yolo\nModel\n",
        b"cbuiltins\nset\n",
    ):
        refusal(write_pickle(tmp_path / "x.pt", b"\x80\x02" + target + state))
    assert torch._utils._rebuild_tensor_v2.__defaults__ is before
    assert load_checkpoint(SAMPLE).arch.name == "yolov6n"


def model_with_tensor(storage: bytes, view: bytes) -> bytes:
    """A pickled yolov6 module with one parameter, of the storage and view given."""
    return (
        b"\x80\x02cyolov6.models.yolo\nModel\n)\x81}X\x0b\x00\x00\x00_parameters}X\x01\x00\x00\x00w"
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + view + b"\x89Nt" + b"Rssb."
    )


def storage(numel: bytes, key: bytes = b"0") -> bytes:
    name = b"X" + struct.pack("<I", len(key)) + key
    return (
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
        + name
        + b"X\x03\x00\x00\x00cpu"
        + numel
        + b"tQ"
    )


EIGHT, MANY = b"K\x08", b"\x8a\x06\x00\x00\x00\x00\x00\x10"
VIEW = b"K\x00(K\x08t(K\x01t"


@pytest.mark.parametrize(
    ("values", "view"),
    [
        (storage(MANY), VIEW),  # more values than the record has
        (storage(b"K\x04"), VIEW),  # fewer
        (storage(EIGHT, b"../../data.pkl"), VIEW),  # no such record
        (storage(EIGHT), b"K\x01(K\x08t(K\x01t"),  # past the end by its offset
        (storage(EIGHT), b"K\x00(K\x08t(K\x02t"),  # by its stride
        (storage(EIGHT), b"J\xff\xff\xff\xff(K\x02t(K\x01t"),  # before the start
        (storage(EIGHT), b"K\x07(K\x02t(J\xff\xff\xff\xfft"),  # backwards
        (storage(EIGHT), b"K\x00(" + MANY + MANY + b"t(K\x00K\x00t"),  # swollen by stride 0
        (storage(EIGHT), b"K\x00(" + MANY + b"t(K\x01t"),  # larger than its storage
        (storage(EIGHT), b"K\x00(K\x08t(K\x01K\x01t"),  # dimensions that do not match
        (storage(EIGHT), b"K\x00X\x01\x00\x00\x00a(K\x01t"),  # no size
        (b"N", VIEW),  # no storage
    ],
)
def test_tensors_that_do_not_fit_their_records_are_refused(
    tmp_path: Path, values: bytes, view: bytes
) -> None:
    content = model_with_tensor(values, view)
    path = write_pickle(tmp_path / "x.pt", content, {"0": bytes(32)})
    assert re.search(r"is damaged: (a|its) (tensor|record).*(fit|read|larger)", refusal(path))


def test_one_record_cannot_fill_the_memory(tmp_path: Path) -> None:
    one = model_with_tensor(storage(EIGHT), VIEW)
    start = one.index(b"X\x01\x00\x00\x00w")
    tensor = one[start + 6 : -len(b"ssb.")]
    names = [b"X\x02\x00\x00\x00" + f"{index:02}".encode() for index in range(100)]
    many = b"".join(name + tensor + b"s" for name in names)
    million_bytes = b"J" + struct.pack("<i", 1 << 18)
    content = (one[:start] + many + b"sb.").replace(EIGHT + b"tQ", million_bytes + b"tQ")
    path = write_pickle(tmp_path / "x.pt", content, {"0": bytes(1 << 20)})
    assert "its tensors are larger than the file" in refusal(path)


def test_a_tensor_that_fits_is_read(tmp_path: Path) -> None:
    content = model_with_tensor(storage(EIGHT), VIEW)
    path = write_pickle(tmp_path / "x.pt", content, {"0": bytes(32)})
    assert "backbone.ERBlock_3 is missing" in refusal(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x02.",
        b"\x80\x02N",
        b"\x80\x02}K\x01",
        b"\x80\x02r\xff\xff\xff\x7f.",  # a memo of two thousand million slots
        b"\x80\x02Nr\xff\xff\xff\x7f.",
        b"\x80\x02\x82\x01.",  # an extension code
        b"\x80\x04\x8e" + b"\xff" * 8 + b".",  # a string of 2^64 bytes
        b"\x80\x02})" + b"\x85" * 300_000 + b"K\x01s.",  # a key nested too deep to hash
        b"\x80\x02(0})" + b"\x85" * 300_000 + b"K\x01s.",
        b"\x80\x02X\x01\x00\x00\x00aQ.",  # a storage that is a string
        b"I" + b"9" * 10_000 + b"\n.",
    ],
)
def test_a_pickle_made_to_break_the_reader_is_refused(tmp_path: Path, content: bytes) -> None:
    assert "is damaged" in refusal(write_pickle(tmp_path / "x.pt", content))


def test_a_network_that_contains_itself_is_refused(tmp_path: Path) -> None:
    content = (
        b"\x80\x02cyolov6.models.yolo\nModel\n)\x81q\x00}X\x08\x00\x00\x00_modules}"
        b"X\x01\x00\x00\x00ah\x00ssb."
    )
    assert "is damaged" in refusal(write_pickle(tmp_path / "x.pt", content))


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_no_damage_to_the_pickle_ends_in_a_traceback(tmp_path: Path, data: st.DataObject) -> None:
    original = _small_pickle()
    content = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = write_pickle(tmp_path / "x.pt", bytes(content), {"0": bytes(32)})
    refusal(path)


def _small_pickle() -> bytes:
    """A pickle with most of what a checkpoint's has, except for a whole network."""
    buffer = io.BytesIO()
    value = {"model": OrderedDict(a=torch.zeros(8), b=[{1: "x"}, {2.5}, None]), "epoch": -1}
    torch.save(value, buffer)
    with zipfile.ZipFile(buffer) as archive:
        return archive.read("archive/data.pkl")
