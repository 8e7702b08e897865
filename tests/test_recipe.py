"""Settings of a training: the paper's values, JSON and back, one sentence for what cannot be."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.training_data import write_tiny

from trt_yolov6.checkpoints.loading import load_checkpoint
from trt_yolov6.checkpoints.native import Training
from trt_yolov6.errors import UserError
from trt_yolov6.models import VARIANTS, architecture
from trt_yolov6.training.losses import check_losses
from trt_yolov6.training.recipe import (
    ArchitectureOptions,
    adapted,
    recipe_for,
    settings_from_json,
    with_field,
)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_paper_s_recipe_of_every_variant(variant: str) -> None:
    settings = recipe_for(variant, "data")
    assert settings.optimizer.learning_rate == (0.02 if variant[6] == "n" else 0.01)
    assert settings.optimizer.clip_norm == (10 if variant == "yolov6l" else None)
    assert settings.losses.box == ("siou" if variant[6] in "nt" else "giou")
    assert settings.losses.use_dfl == (architecture(variant).reg_max > 0)
    larger = variant[6] in "mlx" and "lite" not in variant
    assert settings.augmentation.mixup == (0.1 if larger else 0)
    assert settings.image_size == architecture(variant).image_size
    assert settings.last_plain_epochs == 15
    check_losses(settings.losses, adapted(architecture(variant), settings.architecture))
    assert settings_from_json(json.loads(json.dumps(settings.to_json())), "it") == settings


def test_short_trainings_have_fewer_plain_epochs() -> None:
    assert recipe_for("yolov6s", "data", epochs=20).last_plain_epochs == 5
    assert recipe_for("yolov6s", "data", epochs=1).last_plain_epochs == 0


def test_another_number_of_epochs_takes_along_what_follows_from_it() -> None:
    settings = recipe_for("yolov6s", "data", teacher="teacher.pt")
    shorter = dataclasses.replace(settings, epochs=20)
    assert shorter == recipe_for("yolov6s", "data", teacher="teacher.pt", epochs=20)
    assert (settings.last_plain_epochs, shorter.last_plain_epochs) == (15, 5)
    chosen = recipe_for("yolov6s", "data", plain_epochs=12)
    assert dataclasses.replace(chosen, epochs=20).last_plain_epochs == 12
    with pytest.raises(UserError, match=r"12 last epochs without Mosaic .* the 10 in all"):
        dataclasses.replace(chosen, epochs=10)


def test_numpy_s_numbers_are_written_as_python_s() -> None:
    repeats = ArchitectureOptions(stage_repeats=tuple(np.array([2, 4, 4, 2])))
    settings = recipe_for(
        "yolov6s", "data", options=repeats, batch=np.int64(8), epochs=np.int64(20)
    )
    repeats = ArchitectureOptions(stage_repeats=(2, 4, 4, 2))
    plain = recipe_for("yolov6s", "data", options=repeats, batch=8, epochs=20)
    assert json.dumps(settings.to_json()) == json.dumps(plain.to_json())


def test_a_teacher_may_be_a_path() -> None:
    settings = recipe_for("yolov6s", "data", epochs=40, teacher="teacher.pt")
    assert recipe_for("yolov6s", "data", epochs=40, teacher=Path("teacher.pt")) == settings
    assert settings_from_json(json.loads(json.dumps(settings.to_json())), "it") == settings


def test_fine_tuning_goes_on_at_the_size_of_the_training(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "tiny.pt")
    weights = load_checkpoint(path)
    assert recipe_for("yolov6-custom", "data", weights=weights).image_size == 640
    at_320 = dataclasses.replace(weights, training=Training({"image_size": 320}, 0, None))
    assert recipe_for("yolov6-custom", "data", weights=at_320).image_size == 320
    larger = recipe_for("yolov6-custom", "data", weights=at_320, image_size=416)
    assert larger.image_size == 416


def test_options_change_the_architecture() -> None:
    n, m = architecture("yolov6n"), architecture("yolov6m")
    assert adapted(n, ArchitectureOptions()) == n
    assert adapted(n, ArchitectureOptions(block="conv", activation="silu")).block == "conv"
    assert adapted(n, ArchitectureOptions(dfl=True)).reg_max == 16
    # N stays N, whose boxes learn by SIoU, whatever it is built of.
    for options in (ArchitectureOptions(activation="silu"), ArchitectureOptions(csp_ratio=0.5)):
        assert recipe_for("yolov6n", "data", options=options).losses.box == "siou"
    assert adapted(m, ArchitectureOptions(dfl=False)).reg_max == 0
    assert adapted(m, ArchitectureOptions(objectness=True)).head == "offset"
    assert adapted(m, ArchitectureOptions(csp_ratio=0.5)).stage_repeats == m.stage_repeats
    stacked = adapted(n, ArchitectureOptions(csp_ratio=0.5))
    assert stacked.csp_ratio == 0.5
    assert stacked.stage_repeats == (1, 2, 3, 1)
    plain = adapted(m, ArchitectureOptions(csp_ratio=0))
    assert plain.csp_ratio is None
    assert plain.stage_repeats == tuple(2 * length for length in m.stage_repeats)
    silu = adapted(n, ArchitectureOptions(activation="silu"))
    assert (silu.activation, silu.neck_activation) == ("silu", "silu")
    longer = adapted(n, ArchitectureOptions(stage_repeats=(1, 2, 3, 4), neck_channels=(8,) * 6))
    assert longer.stage_repeats == (1, 2, 3, 4)
    assert longer.neck_channels == (8,) * 6
    assert longer.neck_repeats == n.neck_repeats
    with pytest.raises(UserError, match="give 4 numbers above 0"):
        adapted(n, ArchitectureOptions(neck_repeats=(1, 2, 3)))
    with pytest.raises(UserError, match="give 4 numbers above 0"):
        adapted(n, ArchitectureOptions(stage_repeats=(1, 2, 3, 0)))
    with pytest.raises(UserError, match="`csp_ratio` must be at most 1, got 2"):
        ArchitectureOptions(csp_ratio=2)
    with pytest.raises(UserError, match=r"`activation` must be one of relu, silu, .* got gelu"):
        ArchitectureOptions(activation="gelu")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="leave `block`"):
        adapted(architecture("yolov6lite_s"), ArchitectureOptions(block="scaled"))
    with pytest.raises(UserError, match="MBLA"):
        adapted(architecture("yolov6s_mbla"), ArchitectureOptions(csp_ratio=0))


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("yolov6n", {"block": "lite"}),
        ("yolov6n", {"csp_ratio": 0.01}),
        ("yolov6lite_s", {"neck_channels": (63,)}),
        ("yolov6m_v3", {"neck_channels": (20_000,) * 6}),
    ],
)
def test_what_no_checkpoint_could_hold_is_refused(variant: str, options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(UserError, match=rf"{variant} cannot be built with `{name}` .*; give"):
        adapted(architecture(variant), ArchitectureOptions(**options))


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("epochs=70", 70),
        ("optimizer.momentum=0.5", 0.5),
        ("optimizer.accumulate=3", 3),
        ("optimizer.clip_norm=none", None),
        ("losses.classification=poly", "poly"),
        ("ema_decay=0.9", 0.9),
        ("val_split=none", None),
        ("compile=true", True),
        ("architecture.block=conv", "conv"),
        ("on_bad_data=skip", "skip"),
        ("architecture.stage_repeats=1,2, 3,1", (1, 2, 3, 1)),
    ],
)
def test_any_field_can_be_set(assignment: str, value: object) -> None:
    found: object = with_field(recipe_for("yolov6s", "data"), assignment)
    for name in assignment.partition("=")[0].split("."):
        found = getattr(found, name)
    assert found == value


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("epochs", "FIELD=VALUE"),
        ("epoch=1", "there is no epoch"),
        ("epochs=many", "epochs=many: epochs must be a whole number, got many"),
        ("optimizer=1", "name a part"),
        ("epochs.most=1", "is a single value"),
        ("distillation.box_weight=2", "distillation is none"),
        ("losses.box=biou", ": box must be one of siou, giou, ciou"),
        ("compile=perhaps", ": compile must be true or false"),
        ("epochs=0", "epochs must be at least 1"),
        ("optimizer.momentum=1.5", "momentum must be below 1"),
        ("optimizer.weight_decay=-1", "weight_decay must be at least 0"),
        ("optimizer.accumulate=0", "accumulate"),
        ("plain_epochs=301", "`plain_epochs`"),
        ("eval_interval=-1", "eval_interval must be at least 0"),
        ("ema_decay=1", "ema_decay must be below 1"),
        ("eval_border=320", "border of 320"),
        ("augmentation.border=320", "border of 320"),
        ("architecture.stage_repeats=1,b", "stage_repeats must be a whole number"),
        ("optimizer.learning_rate=nan", "learning_rate must be above 0"),
    ],
)
def test_what_cannot_be_is_refused(assignment: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        with_field(recipe_for("yolov6s", "data"), assignment)
    assert str(caught.value).endswith(".")


def test_other_json_is_refused() -> None:
    for value in ({}, {"epochs": 3}, {**recipe_for("yolov6s", "d").to_json(), "more": 1}):
        with pytest.raises(UserError, match="holds no settings"):
            settings_from_json(value, "settings.json")
