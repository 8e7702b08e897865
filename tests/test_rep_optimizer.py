"""RepOptimizer: a plain network follows the branches it has not, step by step."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch
from support.forks import two_that_share
from support.kills import Kill, run_killed
from support.runs import TRAINING, assert_same_bits, complaint
from support.training_data import CLASS_NAMES, read_log, tiny_architecture, write_shapes, write_tiny
from torch import Tensor, nn

from trt_yolov6.checkpoints.loading import load_checkpoint
from trt_yolov6.checkpoints.native import Training, write_checkpoint
from trt_yolov6.cli import main
from trt_yolov6.errors import UserError
from trt_yolov6.graph.export import ExportSettings, graph_from_checkpoint
from trt_yolov6.models import Architecture, YOLOv6, fuse, single_branch
from trt_yolov6.models.blocks import ConvBN, ScaledRepConv
from trt_yolov6.models.fusion import merge_scaled
from trt_yolov6.models.variants import VARIANTS, Variant
from trt_yolov6.training.initialization import starting_model
from trt_yolov6.training.optimizer import OptimizerSettings, make_optimizer, parameter_groups
from trt_yolov6.training.recipe import TrainSettings, recipe_for, search_settings
from trt_yolov6.training.rep_optimizer import (
    RepOptimizerSettings,
    gradient_multiplier,
    gradient_multipliers,
    scaled_blocks,
)
from trt_yolov6.training.state import STATE_FILE
from trt_yolov6.training.trainer import train

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[1]

SHAPES = ((3, 8, 2), (8, 8, 1), (8, 12, 1), (12, 12, 1))
"""Channels in, channels out and stride: stride 2, with identity, without, with it again."""
MINI = Variant(depth=0.01, width=0.125)
KNOWN = f"""
from trt_yolov6.models.variants import VARIANTS, Variant
VARIANTS["yolov6mini"] = {MINI!r}
"""
"""Makes another process know the fixture `mini`."""
COMMAND = """
import torch
torch.set_num_threads(1)
from trt_yolov6.cli import main
raise SystemExit(main())
"""
"""The command line in a process of its own."""


class Branches(nn.Module):
    """The network that RepOptimizer stands for: three branches with constant scales.

    The scale of the identity is what that branch learns; it has nothing else.
    """

    def __init__(self, block: ScaledRepConv) -> None:
        super().__init__()
        out_channels, in_channels = block.dense.shape[:2]
        stride = block.stride
        self.conv3 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False).double()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 1, stride, 0, bias=False).double()
        self.conv3.weight.data.copy_(block.dense)
        self.conv1.weight.data.copy_(block.pointwise)
        self.s = block.dense_scale.detach().clone().reshape(1, -1, 1, 1)
        self.t = block.pointwise_scale.detach().clone().reshape(1, -1, 1, 1)
        self.c = (
            None
            if block.identity_scale is None
            else nn.Parameter(block.identity_scale.detach().clone().reshape(1, -1, 1, 1))
        )
        self.bn = nn.BatchNorm2d(out_channels, eps=block.bn.eps, momentum=block.bn.momentum)
        self.bn.double()

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.s * self.conv3(x) + self.t * self.conv1(x)
        if self.c is not None:
            total = total + self.c * x
        return torch.relu(self.bn(total))

    def summed(self) -> Tensor:
        """The kernel that does the same, one weight after the other."""
        kernel = self.conv3.weight.detach().clone()
        out_channels, in_channels = kernel.shape[:2]
        for o, i in itertools.product(range(out_channels), range(in_channels)):
            kernel[o, i] *= self.s[0, o, 0, 0]
            kernel[o, i, 1, 1] += self.t[0, o, 0, 0] * self.conv1.weight.detach()[o, i, 0, 0]
            if self.c is not None and o == i:
                kernel[o, i, 1, 1] += self.c.detach()[0, o, 0, 0]
        return kernel


def random_blocks() -> nn.Sequential:
    """Scaled blocks of all kinds in double precision, with random scales, some negative."""
    torch.manual_seed(5)
    blocks = nn.Sequential(*(ScaledRepConv(*shape) for shape in SHAPES)).double()
    for block in scaled_blocks(blocks).values():
        for scale in (block.dense_scale, block.pointwise_scale, block.identity_scale):
            if scale is not None:
                scale.data.uniform_(0.3, 2.0).mul_(torch.where(torch.rand(len(scale)) < 0.2, -1, 1))
    return blocks


def scaled_tiny(num_classes: int = len(CLASS_NAMES)) -> Architecture:
    return dataclasses.replace(tiny_architecture(num_classes), block="scaled")


def random_search() -> YOLOv6:
    """A tiny hyper-search network with random scales and statistics."""
    torch.manual_seed(6)
    model = YOLOv6(scaled_tiny())
    for name, value in model.state_dict().items():
        if name.endswith(("_scale", "bn.weight", "running_var")):
            value.uniform_(0.5, 1.5)
        elif name.endswith(("bn.bias", "running_mean")):
            value.uniform_(-0.3, 0.3)
    return model


def write_scales(path: Path, num_classes: int = len(CLASS_NAMES)) -> Path:
    """Write a tiny hyper-search network, as training leaves it."""
    torch.manual_seed(0)
    model = YOLOv6(scaled_tiny(num_classes))
    for block in scaled_blocks(model).values():
        for scale in (block.dense_scale, block.pointwise_scale, block.identity_scale):
            if scale is not None:
                scale.data.uniform_(0.5, 1.5)
    write_checkpoint(path, model, tuple(map(str, range(num_classes))), Training({}, 0, None))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight images of 96 pixels."""
    return write_shapes(tmp_path_factory.mktemp("shapes"))


@pytest.fixture
def mini(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a variant of the smallest sizes."""
    monkeypatch.setitem(VARIANTS, "yolov6mini", MINI)
    return "yolov6mini"


# The equivalence.


def followed(*, steps: int, multiplied: bool) -> tuple[nn.Sequential, nn.Sequential, float]:
    """Train plain convolutions and branches alike; return both and the largest loss difference."""
    blocks = random_blocks()
    branches = nn.Sequential(*(Branches(block) for block in scaled_blocks(blocks).values()))
    plain = nn.Sequential(*(merge_scaled(block) for block in scaled_blocks(blocks).values()))
    multipliers = {
        f"{name}.conv.weight": gradient_multiplier(block)
        for name, block in scaled_blocks(blocks).items()
    }
    rate, momentum, decay = 0.05, 0.9, 0.02
    optimizer = make_optimizer(
        plain,
        OptimizerSettings(learning_rate=rate, momentum=momentum, weight_decay=decay, accumulate=1),
        64,
        fused=False,
        multipliers=multipliers if multiplied else None,
    )
    bns = [p for block in branches for p in block.bn.parameters()]  # type: ignore[union-attr]
    others = [p for p in branches.parameters() if not any(p is bn for bn in bns)]
    reference = torch.optim.SGD(
        [{"params": others, "weight_decay": decay}, {"params": bns, "weight_decay": 0.0}],
        lr=rate,
        momentum=momentum,
        nesterov=True,
    )
    generator = torch.Generator().manual_seed(7)
    largest = 0.0
    for _ in range(steps):
        x = torch.randn(4, 3, 12, 12, dtype=torch.float64, generator=generator)
        wanted = torch.randn(4, 12, 6, 6, dtype=torch.float64, generator=generator)
        losses = []
        for network, its_optimizer in ((plain, optimizer), (branches, reference)):
            loss = (network(x) - wanted).square().mean()
            its_optimizer.zero_grad()
            loss.backward()
            its_optimizer.step()
            losses.append(loss.item())
        largest = max(largest, abs(losses[0] - losses[1]))
    return plain, branches, largest


def test_the_plain_network_follows_the_branches() -> None:
    plain, branches, largest = followed(steps=12, multiplied=True)
    assert largest < 1e-12
    for mine, theirs in zip(plain, branches, strict=True):
        assert isinstance(mine, ConvBN)
        assert isinstance(theirs, Branches)
        torch.testing.assert_close(mine.conv.weight.detach(), theirs.summed(), rtol=0, atol=1e-12)
        for name, value in mine.bn.state_dict().items():
            torch.testing.assert_close(value, theirs.bn.state_dict()[name], rtol=0, atol=1e-12)


def test_without_multipliers_it_goes_elsewhere() -> None:
    plain, branches, _ = followed(steps=12, multiplied=False)
    differences = [
        (mine.conv.weight - theirs.summed()).abs().max().item()  # type: ignore[union-attr,operator]
        for mine, theirs in zip(plain, branches, strict=True)
    ]
    assert min(differences) > 1e-3


def test_multipliers_are_those_of_the_closed_form() -> None:
    block = ScaledRepConv(2, 2)
    assert block.identity_scale is not None
    with torch.no_grad():
        block.dense_scale.copy_(torch.tensor([2.0, -3.0]))
        block.pointwise_scale.copy_(torch.tensor([5.0, 7.0]))
        block.identity_scale.copy_(torch.tensor([11.0, 13.0]))
    found = gradient_multiplier(block)
    edges = found.clone()
    edges[:, :, 1, 1] = torch.tensor([[4.0], [9.0]])
    assert torch.equal(edges, torch.tensor([4.0, 9.0]).reshape(2, 1, 1, 1).expand(2, 2, 3, 3))
    assert found[:, :, 1, 1].tolist() == [[4 + 25 + 1, 4 + 25], [9 + 49, 9 + 49 + 1]]


# The networks.


def test_a_scaled_block_is_its_branches_in_values_and_gradients() -> None:
    for block in scaled_blocks(random_blocks()).values():
        branches = Branches(block)
        branches.s.requires_grad_(True)
        branches.t.requires_grad_(True)
        x = torch.randn(3, block.dense.shape[1], 7, 9, dtype=torch.float64)
        mine, theirs = block(x), branches(x)
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
        weights = torch.randn_like(mine)
        (mine * weights).sum().backward()
        (theirs * weights).sum().backward()
        pairs = [
            (block.dense, branches.conv3.weight),
            (block.pointwise, branches.conv1.weight),
            (block.dense_scale, branches.s),
            (block.pointwise_scale, branches.t),
        ]
        if block.identity_scale is not None:
            assert branches.c is not None
            pairs.append((block.identity_scale, branches.c))
        for one, other in pairs:
            assert one.grad is not None
            assert other.grad is not None
            torch.testing.assert_close(
                one.grad.flatten(), other.grad.flatten(), rtol=1e-9, atol=1e-11
            )


def test_the_target_starts_as_the_function_of_the_search_network() -> None:
    search = random_search().double()
    target = single_branch(search)
    assert target.arch == dataclasses.replace(tiny_architecture(), block="conv")
    assert target.state_dict().keys() == YOLOv6(target.arch).state_dict().keys()
    assert gradient_multipliers(search).keys() <= dict(target.named_parameters()).keys()
    images = torch.rand(2, 3, 64, 96, dtype=torch.float64)
    for training in (True, False):
        search.train(training)
        target = single_branch(search)
        assert target.training == training
        for one, other in zip(search.raw(images), target.raw(images), strict=True):
            for mine, theirs in zip(one, other, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)
    assert not {p.data_ptr() for p in search.parameters()} & {
        p.data_ptr() for p in target.parameters()
    }


def test_with_csp_stacks_the_plain_convolutions_keep_their_bias() -> None:
    arch = dataclasses.replace(scaled_tiny(), csp_ratio=0.5)
    torch.manual_seed(0)
    search = YOLOv6(arch).double().eval()
    target = single_branch(search)
    assert target.state_dict().keys() == YOLOv6(target.arch).state_dict().keys()
    images = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(target(images), search(images))


def test_a_search_network_is_fused_and_exported_like_any_other(tmp_path: Path) -> None:
    search = random_search().double().eval()
    images = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(fuse(search)(images), search(images))
    path = write_scales(tmp_path / "scales.pt")
    assert load_checkpoint(path).arch == scaled_tiny()
    # Exporting compares the graph's outputs with the network's.
    graph_from_checkpoint(path, ExportSettings(image_size=(64, 64)))


def test_scales_are_learned_and_do_not_decay(data: Path, mini: str, tmp_path: Path) -> None:
    settings = recipe_for(
        mini,
        str(data),
        epochs=6,
        batch=4,
        image_size=64,
        val_split=None,
        rep_optimizer=RepOptimizerSettings(),
    )
    fast = dataclasses.replace(settings.optimizer, learning_rate=0.1, accumulate=1)
    settings = search_settings(dataclasses.replace(settings, optimizer=fast))
    start = starting_model(settings, CLASS_NAMES).model
    scales = {name: p for name, p in start.named_parameters() if name.endswith("_scale")}
    blocks = scaled_blocks(start).values()
    assert len(scales) == sum(2 if block.identity_scale is None else 3 for block in blocks)
    undecayed, kernels, _ = parameter_groups(start)
    assert {id(p) for p in scales.values()} <= {id(p) for p in undecayed}
    assert {id(block.pointwise) for block in blocks} <= {id(p) for p in kernels}
    train(settings, tmp_path, progress=False)
    after = torch.load(tmp_path / STATE_FILE, weights_only=True)["model"]
    assert all((value == 1).all() for value in scales.values())
    # In so few steps the coarsest levels of the neck see hardly an object.
    assert all((after[name] != 1).any() for name in scales if name.startswith("backbone."))


# Training with it.


def mini_settings(data: Path, variant: str) -> TrainSettings:
    return recipe_for(
        variant,
        str(data),
        epochs=12,
        batch=4,
        image_size=64,
        val_split=None,
        rep_optimizer=RepOptimizerSettings(search_epochs=6),
    )


@pytest.mark.slow
def test_killed_in_the_search_and_after_it_a_run_ends_with_the_same_bits(
    data: Path, mini: str, tmp_path: Path
) -> None:
    settings = mini_settings(data, mini)
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    result = train(settings, undisturbed, progress=False, state_seconds=1e9)
    assert len(result.log) == 12
    assert [note.partition(" ")[0] for note in result.notes] == ["the", "RepOptimizer's"]
    for resume, kill in (
        ("start", Kill(STATE_FILE, 5, after=True)),
        ("resume", Kill(STATE_FILE, 12, after=False)),
    ):
        arguments = [json.dumps(settings.to_json()), str(killed), resume]
        run_killed(KNOWN + TRAINING, arguments, kill)
    assert (killed / STATE_FILE).exists(), "it was killed in the search again"
    assert len(read_log(killed)) < 12, "it was over before the kill"
    assert main(["train", "--resume", "--output", str(killed), "--quiet"]) == 0
    for name in (".", "search"):
        assert_same_bits(undisturbed / name, killed / name)
    states = [
        torch.load(folder / STATE_FILE, weights_only=True)["optimizer"]["state"]
        for folder in (undisturbed, killed)
    ]
    multipliers = [[s["multiplier"] for s in one.values() if "multiplier" in s] for one in states]
    assert len(multipliers[0]) == len(scaled_blocks(build_model_of(undisturbed / "search")))
    assert all(torch.equal(a, b) for a, b in zip(*multipliers, strict=True))


def build_model_of(folder: Path) -> YOLOv6:
    return load_checkpoint(folder / "last.pt").model


def test_one_command_searches_and_trains(
    data: Path, mini: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    common = ["train", "--data", str(data), "--batch", "4", "--imgsz", "64", "--quiet"]
    common += ["--val-split", "none", "--epochs", "3"]
    arguments = ["--rep-optimizer", "--search-epochs", "1", "--model", mini, "--output", str(run)]
    assert main([*common, *arguments]) == 0
    assert "RepOptimizer's scales of" in capsys.readouterr().out
    assert [len(read_log(folder)) for folder in (run, run / "search")] == [3, 1]
    assert load_checkpoint(run / "last.pt").arch.block == "conv"
    assert load_checkpoint(run / "search" / "last.pt").arch.block == "scaled"
    # The scales by name make the same training of it.
    named = tmp_path / "named"
    scales = str(run / "search" / "last.pt")
    assert main([*common, "--rep-optimizer", scales, "--output", str(named)]) == 0
    assert_weights_equal(run, named)
    # Nothing is left to do; the search, and its data, are not looked at again.
    before = (run / "search" / STATE_FILE).stat().st_mtime_ns
    assert main(["train", "--resume", "--output", str(run), "--quiet"]) == 0
    assert (run / "search" / STATE_FILE).stat().st_mtime_ns == before
    graph = graph_from_checkpoint(run / "last.pt", ExportSettings(image_size=(64, 64)))
    assert graph.class_names == CLASS_NAMES


def assert_weights_equal(one: Path, other: Path) -> None:
    a, b = (torch.load(folder / STATE_FILE, weights_only=True)["model"] for folder in (one, other))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_scales_of_other_classes_serve_as_well(data: Path, tmp_path: Path) -> None:
    scales = load_checkpoint(write_scales(tmp_path / "five.pt", num_classes=5))
    settings = recipe_for("yolov6-custom", str(data), scales=scales, epochs=1)
    start = starting_model(settings, CLASS_NAMES, scales=scales.path)
    assert start.model.arch == dataclasses.replace(tiny_architecture(), block="conv")
    assert start.multipliers.keys() == gradient_multipliers(scales.model).keys()
    for name, value in gradient_multipliers(scales.model).items():
        assert torch.equal(start.multipliers[name], value)
    # From the values for random weights, not those for fine-tuning.
    assert settings.optimizer.learning_rate == 0.01
    assert settings.losses.warmup_epochs > 0


def test_a_search_without_a_teacher_is_part_of_a_distillation(data: Path) -> None:
    settings = recipe_for(
        "yolov6n", str(data), epochs=40, teacher="t.pt", rep_optimizer=RepOptimizerSettings()
    )
    search = search_settings(settings)
    assert (search.epochs, search.last_plain_epochs, search.teacher) == (40, 10, None)
    shorter = dataclasses.replace(settings, rep_optimizer=RepOptimizerSettings(search_epochs=8))
    assert search_settings(shorter).last_plain_epochs == 2


def test_a_teacher_of_other_classes_is_refused_before_the_search(
    data: Path, mini: str, tmp_path: Path
) -> None:
    teacher = write_tiny(tmp_path / "five.pt", num_classes=5)
    settings = dataclasses.replace(
        recipe_for(mini, str(data), epochs=1, teacher=teacher, image_size=64, val_split=None),
        rep_optimizer=RepOptimizerSettings(),
    )
    with pytest.raises(UserError, match="knows other classes than the data set"):
        train(settings, tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "search").exists()


@pytest.mark.slow
def test_two_processes_search_and_train_as_one(data: Path, mini: str, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    arguments = ["train", "--data", str(data), "--val-split", "none", "--model", mini]
    arguments += ["--rep-optimizer", "--search-epochs", "1", "--epochs", "2", "--batch", "4"]
    arguments += ["--imgsz", "64", "--quiet", "--device", "cpu"]
    arguments += ["--set", "optimizer.accumulate=2", "--set", "losses.warmup_epochs=1"]
    with two_that_share(KNOWN + COMMAND, [*arguments, "--output", str(two)]):
        assert main([*arguments, "--output", str(one)]) == 0
    for name, epochs in (("search", 1), (".", 2)):
        alone, together = read_log(one / name), read_log(two / name)
        assert len(alone) == len(together) == epochs
        for a, b in zip(alone, together, strict=True):
            for part in ("loss", "loss_class", "loss_box"):
                assert b[part] == pytest.approx(a[part], rel=1e-4)
        weights = [
            torch.load(run / name / STATE_FILE, weights_only=True)["model"] for run in (one, two)
        ]
        for key, value in weights[0].items():
            torch.testing.assert_close(value, weights[1][key], rtol=1e-3, atol=1e-5)


# The command line: one sentence and exit code 2.


def test_mistakes_cost_one_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny, scales = write_tiny(tmp_path / "tiny.pt"), write_scales(tmp_path / "scales.pt")
    base = ("--data", str(data), "--output", str(tmp_path / "run"))
    with_scales = (*base, "--rep-optimizer", str(scales))
    for arguments, says in (
        ((*base, "--search-epochs", "3"), "is for --rep-optimizer"),
        ((*base, "--rep-optimizer", str(tiny)), "not a hyper-search network"),
        ((*base, "--rep-optimizer", str(tmp_path / "none.pt")), "none.pt"),
        ((*base, "--rep-optimizer", "--weights", str(tiny)), "leave --weights"),
        ((*base, "--rep-optimizer", "--block", "conv"), "leave --block"),
        ((*with_scales, "--search-epochs", "3"), "leave --search-epochs out"),
        ((*with_scales, "--model", "s"), "leave --model out"),
        ((*with_scales, "--dfl"), "fixes the architecture"),
        (("--resume", "--output", "x", "--rep-optimizer"), "--rep-optimizer was chosen"),
    ):
        assert says in complaint(capsys, *arguments), says
    assert not (tmp_path / "run" / "settings.json").exists()


def test_a_search_that_cannot_start_leaves_no_run_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_shapes(tmp_path / "data")
    (data / "images" / "train" / "001.png").write_bytes(b"no picture")
    run = tmp_path / "run"
    arguments = ["--data", str(data), "--rep-optimizer", "--model", "n", "--output", str(run)]
    assert "skip" in complaint(capsys, *arguments)
    assert not list(run.rglob("settings.json"))
