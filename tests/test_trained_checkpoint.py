"""Checkpoints of our own: whole when read back, one sentence where they are not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.forks import forked
from support.training_data import CLASS_NAMES, tiny_architecture, write_tiny

from trt_yolov6.checkpoints.loading import load_checkpoint
from trt_yolov6.checkpoints.native import Training, write_checkpoint
from trt_yolov6.errors import UserError
from trt_yolov6.graph.export import ExportSettings, graph_from_checkpoint
from trt_yolov6.models import Architecture, YOLOv6, architecture

pytestmark = pytest.mark.usefixtures("one_thread")


def rewritten(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Write a checkpoint again with something changed in it."""
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert str(path) in message
    assert message.endswith(".")
    assert message.replace(str(path), "FILE").count(". ") == 0, "more than one sentence"
    return message


def assert_stored(model: torch.nn.Module, read: torch.nn.Module) -> None:
    """Check that a network has the weights of another, kernels rounded to half precision."""
    found = read.state_dict()
    for name, value in model.state_dict().items():
        expected = value.half().float() if value.ndim > 1 else value
        assert torch.equal(found[name], expected), name


def test_a_full_disk_is_named_and_leaves_nothing_that_crashes(tmp_path: Path) -> None:
    code = """
import gc, resource, signal, sys, torch
from trt_yolov6.checkpoints.native import write_torch
from trt_yolov6.errors import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, 10**5))
def fail():
    try:
        gc.collect()
        write_torch(sys.argv[1], {"weights": torch.zeros(2**20)})
    except UserError as error:
        print(error)
        error.itself = error  # so that it goes with the garbage: Python 3.12 crashed there
fail()
gc.collect()
"""
    with forked(code, [str(tmp_path / "a.pt")]) as process:
        status, words = process.ended()
    assert (status, words.count("\n")) == (0, 1), words
    assert "a.pt cannot be written (File too large)" in words
    assert not list(tmp_path.iterdir())


def test_what_is_written_is_read(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = YOLOv6(tiny_architecture()).eval()
    settings = {"epochs": 3, "losses": {"box": "siou"}}
    write_checkpoint(tmp_path / "a.pt", model, CLASS_NAMES, Training(settings, 3, 0.25))
    checkpoint = load_checkpoint(tmp_path / "a.pt")
    assert checkpoint.arch == tiny_architecture()
    assert checkpoint.class_names == CLASS_NAMES
    assert checkpoint.training == Training(settings, 3, 0.25)
    assert_stored(model, checkpoint.model)
    assert {value.dtype for value in checkpoint.model.parameters()} == {torch.float32}
    write_checkpoint(tmp_path / "b.pt", model, CLASS_NAMES, Training(settings, 3, 0.25))
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


def small(name: str, **changes: Any) -> Architecture:
    """A variant with few channels and short stages."""
    arch = architecture(name, 2)
    lite = arch.neck == "lite"
    narrow = {
        "stage_channels": tuple(8 * (index + 1) for index in range(len(arch.stage_channels))),
        "neck_channels": (16,) * len(arch.neck_channels),
        "stage_repeats": (2,) * len(arch.stage_repeats),
        "neck_repeats": (1,) * len(arch.neck_repeats),
        "head_activation": "hardswish" if lite else "silu",
    }
    return dataclasses.replace(arch, **{"name": "yolov6-custom", **narrow, **changes})


@pytest.mark.parametrize("name", ["n_v3", "l_v3", "s6", "m_qa", "s_mbla", "lite_s"])
def test_later_releases_networks_are_read_back(tmp_path: Path, name: str) -> None:
    torch.manual_seed(1)
    model = YOLOv6(small(f"yolov6{name}")).eval()
    write_checkpoint(tmp_path / "a.pt", model, CLASS_NAMES, Training({}, 0, None))
    read = load_checkpoint(tmp_path / "a.pt")
    assert read.arch == model.arch
    assert read.release is None
    assert_stored(model, read.model)


def test_version_1_had_one_activation_in_the_whole_neck(tmp_path: Path) -> None:
    arch = small("yolov6l", neck_activation="silu")
    write_checkpoint(tmp_path / "a.pt", YOLOv6(arch), CLASS_NAMES, Training({}, 0, None))

    def as_before(content: dict[str, Any]) -> None:
        content["version"] = 1
        for name in ("neck_activation", "neck", "pooling", "mbla"):
            del content["architecture"][name]

    read = load_checkpoint(rewritten(tmp_path / "a.pt", as_before))
    assert read.arch == arch
    assert isinstance(read.model.neck.get_submodule("lateral5.act"), torch.nn.SiLU)


def test_a_kernel_beyond_half_precision_is_kept_in_float32(tmp_path: Path) -> None:
    model = YOLOv6(tiny_architecture())
    name, kernel = next((n, p) for n, p in model.named_parameters() if p.ndim > 1)
    with torch.no_grad():
        kernel.view(-1)[0] = 1e6
    write_checkpoint(tmp_path / "a.pt", model, CLASS_NAMES, Training({}, 0, None))
    assert torch.equal(load_checkpoint(tmp_path / "a.pt").model.state_dict()[name], kernel)


def test_it_exports(tmp_path: Path) -> None:
    graph = graph_from_checkpoint(
        write_tiny(tmp_path / "tiny.pt"), ExportSettings(image_size=(64, 64))
    )
    assert graph.class_names == CLASS_NAMES


def set_architecture(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["architecture"].update(changes)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.update(version=3), "update it"),
        (lambda c: c.update(version=10**5000), "update it"),
        (lambda c: c.pop("architecture"), "architecture"),
        (set_architecture(block="mystery"), "architecture"),
        (set_architecture(stage_repeats=(1, 1, 1, 10**9)), "architecture"),
        (set_architecture(stage_channels=(10**9,) * 5), "architecture"),
        (set_architecture(csp_ratio=7.0), "architecture"),
        (set_architecture(block=[]), "architecture"),
        (set_architecture(neck="lite"), "architecture"),
        (set_architecture(stage_repeats=(1, 1, 1)), "architecture"),
        (set_architecture(mbla=True), "architecture"),
        (lambda c: c["class_names"].pop(), "class names"),
        (lambda c: c.update(class_names=[1, 2]), "class names"),
        (lambda c: c.update(weights=None), "no weights"),
        (lambda c: c["weights"].pop("backbone.stem.dense.conv.weight"), "missing"),
        (lambda c: c["weights"].update(extra=torch.zeros(1)), "not known"),
        (lambda c: c["weights"].update({"backbone.stem.dense.conv.weight": 3}), "missing"),
        (
            lambda c: c["weights"].update({"backbone.stem.dense.conv.weight": torch.zeros(2)}),
            "does not fit",
        ),
        (
            lambda c: c["weights"]["backbone.stem.dense.conv.weight"].fill_(float("nan")),
            "not finite",
        ),
        (lambda c: c["weights"]["backbone.stem.dense.bn.running_var"].fill_(-1), "negative"),
        (lambda c: c.update(settings="{"), "how it was trained"),
        (lambda c: c.update(epoch=None), "how it was trained"),
        (lambda c: c.update(AP=3.0), "AP"),
    ],
)
def test_a_damaged_one_gets_one_sentence(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], says: str
) -> None:
    assert says in refusal(rewritten(write_tiny(tmp_path / "tiny.pt"), change))


def test_one_cut_short_gets_one_sentence(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "tiny.pt")
    content = path.read_bytes()
    for length in (1, 100, len(content) // 2, len(content) - 10):
        path.write_bytes(content[:length])
        refusal(path)


def test_another_package_s_file_is_not_taken_for_one(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "tiny.pt")
    assert "state dict" in refusal(rewritten(path, lambda c: c.update(format="another")))


def test_the_variant_is_named_by_its_shape(tmp_path: Path) -> None:
    arch = dataclasses.replace(architecture("yolov6n", 2), name="my own")
    write_checkpoint(tmp_path / "n.pt", YOLOv6(arch), CLASS_NAMES, Training({}, 0, None))
    assert load_checkpoint(tmp_path / "n.pt").arch.name == "yolov6n"
