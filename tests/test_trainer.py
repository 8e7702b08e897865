"""Whole trainings, tiny: what they write, resuming after a kill, several processes, ablations."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import resource
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support import authors_format
from support.authors_format import FACTS, Facts
from support.kills import Kill, run_killed
from support.logs import logged
from support.runs import TRAINING, assert_same_bits, complaint, weights_of
from support.training_data import (
    CLASS_NAMES,
    read_log,
    tiny_architecture,
    without_objects,
    write_shapes,
    write_tiny,
)

from trt_yolov6.checkpoints.loading import load_checkpoint
from trt_yolov6.checkpoints.native import Training, write_checkpoint
from trt_yolov6.cli import main
from trt_yolov6.common.files import sole_writer
from trt_yolov6.diagnostics.inspection import inspect_file
from trt_yolov6.errors import UserError
from trt_yolov6.models import Architecture, YOLOv6, architecture
from trt_yolov6.training import optimizer
from trt_yolov6.training.initialization import starting_model
from trt_yolov6.training.log import scalars
from trt_yolov6.training.losses import DistillationSettings
from trt_yolov6.training.recipe import (
    ArchitectureOptions,
    TrainSettings,
    recipe_for,
    settings_from_json,
)
from trt_yolov6.training.schedule import Plan
from trt_yolov6.training.state import STATE_FILE
from trt_yolov6.training.trainer import stored_settings, train

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight images of 96 pixels."""
    return write_shapes(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the tiny network."""
    return write_tiny(tmp_path_factory.mktemp("tiny") / "tiny.pt")


def tiny_settings(data: Path, tiny: Path, **changes: Any) -> TrainSettings:
    values = {"epochs": 4, "batch": 4, "image_size": 96, "val_split": None, **changes}
    return recipe_for("yolov6-custom", str(data), weights=load_checkpoint(tiny), **values)


def test_a_training_leaves_checkpoints_a_log_and_its_settings(
    data: Path, tiny: Path, tmp_path: Path
) -> None:
    settings = tiny_settings(data, tiny, val_split="val", eval_interval=2)
    with logged() as said:
        result = train(settings, tmp_path / "run", progress=False)
    assert [line["epoch"] for line in result.log] == [1, 2, 3, 4]
    assert all(line["loss"] > 0 and line["seconds"] > 0 for line in result.log)
    assert [line["epoch"] for line in result.log if "AP" in line] == [2, 4]
    assert result.best is not None
    for path in (result.last, result.best):
        checkpoint = load_checkpoint(path)
        assert checkpoint.arch == tiny_architecture()
        assert checkpoint.class_names == CLASS_NAMES
        assert checkpoint.form == "training"
        assert checkpoint.training is not None
        assert settings_from_json(checkpoint.training.settings, "it") == settings
        assert checkpoint.training.ap == (result.last_ap if path == result.last else result.best_ap)
    assert stored_settings(tmp_path / "run") == settings
    assert said == list(result.notes)
    assert "all weights are taken" in said[0]
    # The shapes of both splits are the same.
    assert said[-1].startswith("warning: training has 8 of 8 validation images, too")
    assert "images/val/001.png is " in said[-1]
    row = inspect_file(result.last).to_json()["training"]
    assert row["epoch"] == 4
    assert torch.load(result.last, weights_only=True)["AP"] == result.last_ap


def test_the_loss_falls_and_the_weights_move(data: Path, tiny: Path, tmp_path: Path) -> None:
    settings = tiny_settings(data, tiny, epochs=25)
    fast = dataclasses.replace(settings.optimizer, learning_rate=0.05, accumulate=1)
    result = train(dataclasses.replace(settings, optimizer=fast), tmp_path, progress=False)
    assert result.log[-1]["loss"] < 0.8 * result.log[0]["loss"]
    before, after = load_checkpoint(tiny).model.state_dict(), weights_of(tmp_path)
    moved = [
        name for name in after if name in before and not torch.equal(before[name], after[name])
    ]
    assert len(moved) == len([name for name in before if "num_batches" not in name])


def test_a_killed_run_ends_with_the_same_bits(data: Path, tiny: Path, tmp_path: Path) -> None:
    # A state after every step of the optimizer, ten of them; `last.pt` first after the eighth.
    # (A kill right after a state has been written is in test_rep_optimizer, as is training by two
    # processes.)
    settings = tiny_settings(data, tiny, epochs=10, plain_epochs=4)
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    train(settings, undisturbed, progress=False, state_seconds=1e9)
    for start, kill in (
        ("start", Kill(STATE_FILE, 4, after=False)),  # with the third state in its place
        ("resume", Kill("last.pt", 1, after=True)),  # with a checkpoint newer than the state
    ):
        run_killed(TRAINING, [json.dumps(settings.to_json()), str(killed), start], kill)
    result = train(settings, killed, resume=True, progress=False)
    assert [line["epoch"] for line in result.log] == list(range(1, 11))
    assert_same_bits(undisturbed, killed)
    losses = [[line["loss"] for line in read_log(folder)] for folder in (undisturbed, killed)]
    assert losses[0] == losses[1]
    assert not list(killed.glob(".*"))


def test_a_run_that_is_over_can_be_resumed_and_changes_nothing(
    data: Path, tiny: Path, tmp_path: Path
) -> None:
    settings = tiny_settings(data, tiny, epochs=1, val_split="val")
    first = train(settings, tmp_path, progress=False)
    content = {path.name: path.read_bytes() for path in tmp_path.glob("*.pt")}
    assert main(["train", "--resume", "--output", str(tmp_path), "--quiet"]) == 0
    again = train(settings, tmp_path, resume=True, progress=False)
    assert content == {path.name: path.read_bytes() for path in tmp_path.glob("*.pt")}
    assert (again.best_ap, again.last_ap, again.log) == (first.best_ap, first.last_ap, first.log)


def test_fine_tuning_with_other_classes_keeps_all_but_the_class_predictions(
    data: Path, tmp_path: Path
) -> None:
    weights = write_tiny(tmp_path / "five.pt", num_classes=5)
    start = starting_model(tiny_settings(data, weights), CLASS_NAMES)
    (note,) = start.notes
    assert "5 classes, the data set 2" in note
    before, after = load_checkpoint(weights).model.state_dict(), start.model.state_dict()
    differing = {name for name in after if not torch.equal(before[name], after[name])}
    assert differing == {
        f"head.levels.{level}.cls_pred.{part}" for level in range(3) for part in ("weight", "bias")
    }
    assert start.model.arch == tiny_architecture(2)


def test_names_of_classes_may_be_written_otherwise_than_the_checkpoint_s(
    tiny: Path, tmp_path: Path
) -> None:
    data = write_shapes(tmp_path / "data")
    for file in (data / "annotations").iterdir():
        content = json.loads(file.read_text())
        for category in content["categories"]:
            category["name"] = category["name"].upper()
        content["categories"].append({"id": 0, "name": "of nothing"})
        file.write_text(json.dumps(content))
    settings = tiny_settings(data, tiny, epochs=1, val_split="val")
    result = train(settings, tmp_path / "run", progress=False)
    assert result.last_ap is not None
    assert load_checkpoint(result.last).class_names == load_checkpoint(tiny).class_names
    content["categories"][0]["name"] = "another"
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="different classes"):
        train(settings, tmp_path / "other", progress=False)


def later(name: str, **changes: Any) -> Facts:
    """One of release 0.4's networks, small."""
    stages = len(FACTS[name].repeats)
    small: dict[str, Any] = {
        "backbone": (8, 8, 16, 16, 16, 16)[: stages + 1],
        "neck": (16, 8, 8, 16, 16, 16) if stages == 4 else (16, 16, 8, 16, 16, 16),
        "repeats": (1, 1, 2, 1, 1)[:stages],
        "neck_repeats": (1,) * (4 if stages == 4 else 6),
        "classes": 3,
    }
    return dataclasses.replace(FACTS[name], **{**small, **changes})


LATER = {
    "N, self-distilled": later("yolov6n_v3", head="distill"),
    "S, anchor-aided": later("yolov6s_v3", head="fuse_ab"),
    "M": later("yolov6m_v3", ratio=0.5),
    "L": later("yolov6l_v3"),
    "N6": later("yolov6n6"),
    "QARepVGG": later("yolov6n_qa"),
    "MBLA": later("yolov6s_mbla"),
}


@pytest.mark.parametrize("kind", LATER)
def test_a_file_of_release_0_4_is_trained_on_with_other_classes(
    data: Path, tmp_path: Path, kind: str
) -> None:
    path = authors_format.write_checkpoint(
        tmp_path / "0.4.pt", authors_format.authors_model(LATER[kind])
    )
    before = load_checkpoint(path)
    side = 128 if before.arch.size_multiple == 64 else 96
    settings = tiny_settings(data, path, epochs=1, plain_epochs=0, image_size=side)
    start = starting_model(settings, CLASS_NAMES).model
    kept = before.model.state_dict()
    other = [name for name, value in start.state_dict().items() if not kept[name].equal(value)]
    assert other
    assert all(".cls_pred." in name for name in other)
    result = train(settings, tmp_path / "run", progress=False)
    after = load_checkpoint(result.last)
    assert after.arch == dataclasses.replace(before.arch, num_classes=len(CLASS_NAMES))
    assert after.form == "training"
    assert after.model.state_dict().keys() == kept.keys()


def test_a_network_with_four_levels_needs_multiples_of_64(data: Path, tmp_path: Path) -> None:
    path = authors_format.write_checkpoint(
        tmp_path / "n6.pt", authors_format.authors_model(LATER["N6"])
    )
    with pytest.raises(UserError, match="96 is not a multiple of 64"):
        starting_model(tiny_settings(data, path), CLASS_NAMES)


def test_an_official_checkpoint_is_fine_tuned(data: Path, tmp_path: Path) -> None:
    sample = ROOT / "samples" / "yolov6n_bccd_authors.pt"
    arguments = ["train", "--data", str(data), "--weights", str(sample), "--epochs", "1"]
    arguments += ["--batch", "4", "--imgsz", "64", "--quiet", "--output", str(tmp_path / "run")]
    assert main(arguments) == 0
    checkpoint = load_checkpoint(tmp_path / "run" / "best.pt")
    assert checkpoint.arch.name == "yolov6n"
    assert checkpoint.class_names == CLASS_NAMES
    assert stored_settings(tmp_path / "run").optimizer.learning_rate == 0.0032
    assert stored_settings(tmp_path / "run").losses.warmup_epochs == 0


@pytest.mark.parametrize(
    "options",
    [
        ArchitectureOptions(block="conv"),
        ArchitectureOptions(activation="silu", dfl=True),
        ArchitectureOptions(csp_ratio=2 / 3),
        ArchitectureOptions(objectness=True),
    ],
    ids=["block", "activation-dfl", "csp", "objectness"],
)
def test_a_model_remembers_how_it_was_built(
    data: Path, tmp_path: Path, options: ArchitectureOptions
) -> None:
    settings = recipe_for(
        "yolov6n",
        str(data),
        options=options,
        epochs=1,
        batch=8,
        image_size=64,
        val_split=None,
    )
    result = train(settings, tmp_path, progress=False)
    checkpoint = load_checkpoint(result.last)
    expected = starting_model(settings, CLASS_NAMES).model.arch
    assert dataclasses.replace(checkpoint.arch, name="") == dataclasses.replace(expected, name="")
    assert checkpoint.training is not None
    assert settings_from_json(checkpoint.training.settings, "it").architecture == options


def test_self_distillation_from_a_checkpoint(data: Path, tiny: Path, tmp_path: Path) -> None:
    teacher = train(tiny_settings(data, tiny, epochs=2), tmp_path / "teacher", progress=False).last
    settings = tiny_settings(data, tiny, epochs=2, teacher=str(teacher))
    result = train(settings, tmp_path / "student", progress=False)
    assert all(line["loss_distill_class"] > 0 for line in result.log)
    # It decays over all epochs, unless it is said over how many.
    over_two = dataclasses.replace(settings, distillation=DistillationSettings(epochs=2))
    same = train(over_two, tmp_path / "same", progress=False)
    assert [line["loss"] for line in same.log] == [line["loss"] for line in result.log]
    other = write_tiny(tmp_path / "five.pt", num_classes=5)
    with pytest.raises(UserError, match="knows other classes"):
        train(tiny_settings(data, tiny, teacher=str(other)), tmp_path / "no", progress=False)


P6 = dataclasses.replace(
    tiny_architecture(),
    stage_channels=(8, 8, 16, 16, 16, 16),
    stage_repeats=(1,) * 5,
    neck_channels=(16,) * 9,
    neck_repeats=(1,) * 6,
)


def test_a_teacher_of_other_levels_or_another_image_size_is_refused_before_training(
    data: Path, tiny: Path, tmp_path: Path
) -> None:
    def written(name: str, arch: Architecture) -> str:
        path = tmp_path / name
        write_checkpoint(path, YOLOv6(arch), CLASS_NAMES, Training({}, 0, None))
        return str(path)

    teacher = written("p6.pt", P6)
    with pytest.raises(UserError, match=r"p6\.pt predicts boxes in another way"):
        train(tiny_settings(data, tiny, teacher=teacher), tmp_path / "one", progress=False)
    # Lite has four levels, too, and takes multiples of 32.
    lite = written("lite.pt", architecture("yolov6lite_s", num_classes=2))
    settings = recipe_for(
        "yolov6lite_s",
        str(data),
        weights=load_checkpoint(lite),
        batch=4,
        image_size=96,
        val_split=None,
        teacher=teacher,
    )
    with pytest.raises(UserError, match=r"96 is not a multiple of 64, which .*p6\.pt needs"):
        train(settings, tmp_path / "two", progress=False)
    assert not (tmp_path / "one").exists()
    assert not (tmp_path / "two").exists()


def test_epochs_that_are_done_again_replace_those_that_tensorboard_shows(tmp_path: Path) -> None:
    """Also all of them, where a kill came before the first state."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for from_epoch, losses in ((0, {1: 9.0, 2: 8.0}), (0, {1: 7.0, 2: 6.0}), (1, {2: 5.0})):
        with scalars(tmp_path, from_epoch) as add:
            for epoch, loss in losses.items():
                add({"epoch": epoch, "loss": loss})
        time.sleep(1.1)  # the files are in the order of their names, which end in seconds
    shown = EventAccumulator(str(tmp_path))
    shown.Reload()
    assert [(one.step, one.value) for one in shown.Scalars("train/loss")] == [(1, 7.0), (2, 5.0)]


def test_bf16_and_clipping_train_too(data: Path, tiny: Path, tmp_path: Path) -> None:
    settings = tiny_settings(data, tiny, epochs=2, precision="bf16")
    clipped = dataclasses.replace(settings.optimizer, clip_norm=1.0)
    result = train(
        dataclasses.replace(settings, optimizer=clipped), tmp_path / "run", progress=False
    )
    assert result.log[-1]["loss"] > 0


def test_a_training_that_diverges_says_so(data: Path, tiny: Path, tmp_path: Path) -> None:
    settings = tiny_settings(data, tiny, epochs=30)
    wild = dataclasses.replace(settings.optimizer, learning_rate=1e6)
    with pytest.raises(UserError, match="diverged"):
        train(dataclasses.replace(settings, optimizer=wild), tmp_path, progress=False)


def test_a_training_whose_last_update_diverges_says_so_and_keeps_the_last_checkpoint(
    data: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # All of its losses are finite: none is computed after the last step.
    settings = tiny_settings(data, tiny, epochs=2, batch=8, val_split="val", eval_interval=1)

    def rates(plan: Plan, step: int, **_: float) -> float:
        return 1e-3 if step + 1 < plan.total_steps else math.inf

    monkeypatch.setattr(optimizer, "learning_rate", rates)
    with pytest.raises(UserError, match="not finite numbers after epoch 2: training diverged"):
        train(settings, tmp_path, progress=False)
    training = load_checkpoint(tmp_path / "last.pt").training
    assert training is not None
    assert training.epoch == 1


def test_one_step_trains_all_weights(data: Path, tiny: Path, tmp_path: Path) -> None:
    train(tiny_settings(data, tiny, epochs=1, batch=32), tmp_path, progress=False)
    after = weights_of(tmp_path)
    before = dict(load_checkpoint(tiny).model.named_parameters())
    assert not [name for name, weight in before.items() if torch.equal(weight, after[name])]


# The command line: one sentence and exit code 2.


def test_mistakes_cost_one_line(
    data: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ("--data", str(data), "--output", str(tmp_path / "run"))
    assert "--data is missing" in complaint(capsys)
    assert "there is no variant" in complaint(capsys, *base, "--model", "q")
    assert "multiple of 32" in complaint(capsys, *base, "--imgsz", "100")
    assert "larger --batch" in complaint(capsys, *base, "--imgsz", "32", "--batch", "1")
    assert "--lr must be above 0" in complaint(capsys, *base, "--lr", "-1")
    assert "not of the form" in complaint(capsys, *base, "--set", "ema_decay")
    assert "there is no speed" in complaint(capsys, *base, "--set", "optimizer.speed=1")
    assert "momentum must be a number" in complaint(
        capsys, *base, "--set", "optimizer.momentum=high"
    )
    assert "leave --model out" in complaint(capsys, *base, "--weights", str(tiny), "--model", "s")
    assert "fixes the architecture" in complaint(
        capsys, *base, "--weights", str(tiny), "--block", "conv"
    )
    said = complaint(capsys, *base, "--weights", str(tiny), "--warmup-assigner", "simota")
    assert "--warmup-assigner is for trainings from random weights" in said
    assert "holds no training" in complaint(capsys, "--resume", "--output", str(tmp_path / "none"))
    assert "was chosen when" in complaint(capsys, *base, "--resume")
    for given in (("--seed", "0"), ("--mosaic", "0"), ("--no-dfl",)):
        said = complaint(capsys, "--resume", "--output", "x", *given)
        assert f"{given[0].replace('no-', '')} was chosen when" in said
    assert "DFL" in complaint(capsys, *base, "--objectness", "--dfl")
    assert "no GPU" in complaint(capsys, *base, "--device", "cuda:7")
    assert "needs a GPU" in complaint(capsys, *base, "--precision", "fp16", "--device", "cpu")
    assert "for a GPU" in complaint(capsys, *base, "--compile", "--device", "cpu")
    assert "no_such" in complaint(capsys, *base, "--val-split", "no_such")
    said = complaint(capsys, *base, "--model", "n", "--set", "losses.use_dfl=true")
    assert "give `losses.use_dfl` false, or train from random weights with --dfl" in said
    assert not (tmp_path / "run" / "settings.json").exists()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        # The recipe follows these: the teacher's decay and the plain epochs, losses, learning rate.
        ("--set epochs=2", "give epochs as --epochs"),
        ("--set teacher=tiny.pt", "give teacher as --distill"),
        ("--set variant=yolov6t", "give variant as --model"),
        ("--set architecture.dfl=true", "give dfl as --dfl"),
        ("--lr 0.1 --set optimizer.learning_rate=0.2", "give learning_rate as --lr"),
        # Their names are those of options for something else.
        ("--set optimizer.epochs=3", "optimizer.epochs=3: there is no epochs (did you mean"),
        ("--set augmentation.border=320", "border of 320"),
        ("--set distillation.epochs=5", "distillation is none"),
        ("--mosaic 0 --mixup 0.5", "give --mosaic above 0"),
        ("--epochs 3 --assigner simota", "--assigner simota would begin after 4 epochs"),
        ("--set losses.dfl_weight=7", "no effect without --dfl"),
        ("--set losses.objectness_weight=2", "no effect without --objectness"),
        ("--set losses.poly_epsilon=2", "no effect without --cls-loss poly"),
    ],
)
def test_options_without_effect_are_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: str, says: str
) -> None:
    base = ("--data", str(data), "--output", str(tmp_path), "--model", "n", "--imgsz", "64")
    assert says in complaint(capsys, *base, *given.split())


def test_a_validation_split_without_an_object_is_refused(tiny: Path, tmp_path: Path) -> None:
    data = without_objects(write_shapes(tmp_path / "data"), "val")
    with pytest.raises(UserError, match=r"instances_val\.json has no object to evaluate on"):
        train(tiny_settings(data, tiny, val_split="val"), tmp_path / "run", progress=False)


def test_a_full_disk_is_one_sentence_and_leaves_no_part_of_a_checkpoint(
    data: Path, tiny: Path, tmp_path: Path
) -> None:
    """A limit on the size of files stands for the disk: PyTorch hides either error."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"\.pt cannot be written"):
            train(tiny_settings(data, tiny, epochs=1), tmp_path / "run", progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["settings.json"]


def test_a_folder_in_use_is_left_alone(data: Path, tiny: Path, tmp_path: Path) -> None:
    settings = tiny_settings(data, tiny, epochs=1)
    with sole_writer(tmp_path), pytest.raises(UserError, match="another process is writing to"):
        train(settings, tmp_path, progress=False)
    train(settings, tmp_path, progress=False)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "best.pt").write_bytes(b"another program's")
    for folder, what in ((tmp_path, "a training already"), (tmp_path / "other", r"a best\.pt of")):
        with pytest.raises(UserError, match=f"holds {what}"):
            train(settings, folder, progress=False)
    slow = dataclasses.replace(settings.optimizer, momentum=0.5)
    other = dataclasses.replace(settings, optimizer=slow)
    with pytest.raises(UserError, match=r"another optimizer\.momentum"):
        train(other, tmp_path, resume=True, progress=False)
    (tmp_path / STATE_FILE).write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(UserError, match="damaged"):
        train(settings, tmp_path, resume=True, progress=False)


def test_other_data_than_a_training_began_with_is_refused(tiny: Path, tmp_path: Path) -> None:
    settings = tiny_settings(write_shapes(tmp_path / "data"), tiny, epochs=1)
    train(settings, tmp_path / "run", progress=False)
    file = tmp_path / "data" / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    last = content["images"].pop()["id"]
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] != last]
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"was started with 8 images, and .* has 7 now"):
        train(settings, tmp_path / "run", resume=True, progress=False)


def test_what_has_changed_since_a_training_began_is_named(tiny: Path, tmp_path: Path) -> None:
    data, run = write_shapes(tmp_path / "data"), tmp_path / "run"
    teacher = write_tiny(tmp_path / "teacher.pt")
    settings = tiny_settings(data, tiny, epochs=1, val_split="val", teacher=teacher)
    train(settings, run, progress=False)
    labels = data / "annotations"
    for file, named in (
        (labels / "instances_train.json", f"{data}, split train, has changed since the run"),
        (labels / "instances_val.json", f"{data}, split val, has changed"),
        (teacher, f"{teacher} has changed"),
    ):
        before = file.read_bytes()
        if file == teacher:
            file.write_bytes((run / "last.pt").read_bytes())
        else:
            content = json.loads(before)
            content["annotations"][0]["bbox"][2] -= 1
            file.write_text(json.dumps(content))
        with pytest.raises(UserError, match=re.escape(named)):
            train(settings, run, resume=True, progress=False)
        file.write_bytes(before)
    train(settings, run, resume=True, progress=False)


def test_bad_data_is_refused_or_left_out_as_chosen(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_shapes(tmp_path / "data")
    file = data / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["bbox"][2] = 0
    content["annotations"][1]["category_id"] = 9
    file.write_text(json.dumps(content))
    (data / "images" / "train" / "001.png").write_bytes(b"no picture")
    base = ("--data", str(data), "--weights", str(tiny), "--output", str(tmp_path / "run"))
    assert "skip" in complaint(capsys, *base)
    arguments = [*base, "--bad-data", "skip", "--epochs", "1", "--imgsz", "96", "--batch", "4"]
    assert main(["train", *arguments, "--val-split", "none", "--quiet"]) == 0
    assert "left out of training: 3 problems of the data" in capsys.readouterr().out
    assert (tmp_path / "run" / "bad_data.json").is_file()
