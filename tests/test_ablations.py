"""The five folds, the scheduling of many trainings, and the verdicts that are drawn from them."""

from __future__ import annotations

import argparse
import io
import json
import math
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from benchmarks import ablation_variants, paper
from benchmarks.ablation_scores import collect, over_folds
from benchmarks.ablation_variants import FOUND_FILE, RESULT_FILE, TABLES, VARIANTS
from benchmarks.ablations import jobs_of, parser, results_in, take_over, write_out
from benchmarks.folds import (
    FOLDS,
    ap_by_fold,
    ap_of,
    deal,
    difference,
    match_all,
    pack,
    read_truth,
    restored,
    stored,
    train_split,
    unpack,
    val_split,
    without_missing_boxes,
    write_folds,
)
from benchmarks.gradient_norms import main as gradient_norms
from benchmarks.gradient_norms import norm_of_gradients
from benchmarks.packing import MARK, Claims, Job, Schedule, run_jobs
from benchmarks.paper_tables import broke_away, sentence, verdict
from benchmarks.training_speed import COMMON, parts_of, write_repeated
from trt_yolov6.data.coco import load_coco
from trt_yolov6.detectors.detections import Detections
from trt_yolov6.models.variants import architecture
from trt_yolov6.training.recipe import ArchitectureOptions, adapted, recipe_for, with_field

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The samples' 72 images as a data set of two splits."""
    source = tmp_path_factory.mktemp("source")
    content = json.loads((ROOT / "samples/annotations/instances_val.json").read_text())
    (source / "annotations").mkdir()
    (source / "images").mkdir()
    for split, part in (("train", slice(0, 50)), ("val", slice(50, None))):
        images = content["images"][part]
        kept = {image["id"] for image in images}
        boxes = [entry for entry in content["annotations"] if entry["image_id"] in kept]
        text = json.dumps({**content, "images": images, "annotations": boxes})
        (source / "annotations" / f"instances_{split}.json").write_text(text)
        (source / "images" / split).symlink_to(ROOT / "samples" / "images" / "val")
    return source


@pytest.fixture(scope="module")
def folds(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images of `source`, dealt into folds."""
    return write_folds(source, tmp_path_factory.mktemp("folds"))


# --- folds --------------------------------------------------------------------------------------


def test_every_image_is_judged_once_and_never_by_a_network_that_saw_it(folds: Path) -> None:
    judged: list[str] = []
    for fold in range(FOLDS):
        seen = {image.path.name for image in load_coco(folds, train_split(fold)).images}
        own = [image.path.name for image in load_coco(folds, val_split(fold)).images]
        assert seen.isdisjoint(own)
        assert len(seen) + len(own) == 72
        judged += own
    assert len(judged) == len(set(judged)) == 72


def test_an_image_has_the_same_boxes_in_all_splits(folds: Path) -> None:
    original = load_coco(ROOT / "samples", "val")
    wanted = _boxes_by_name(original)
    for split in ("all", train_split(1), val_split(1)):
        for name, boxes in _boxes_by_name(load_coco(folds, split)).items():
            assert boxes == wanted[name]


def _boxes_by_name(dataset: Any) -> dict[str, list[Any]]:
    names = {image.id: image.path.name for image in dataset.images}
    found: dict[str, list[Any]] = {name: [] for name in names.values()}
    for entry in dataset.annotations:
        found[names[entry["image_id"]]].append((entry["category_id"], *entry["bbox"]))
    return found


@given(st.integers(5, 500), st.integers(0, 5))
def test_folds_are_of_equal_size_but_for_one_image(images: int, seed: int) -> None:
    sizes = np.bincount(deal(images, seed=seed), minlength=FOLDS)
    assert sizes.max() - sizes.min() <= 1


def test_detections_survive_being_stored() -> None:
    rng = np.random.default_rng(0)
    found = {number: _random(rng, number) for number in (1, 4, 7)}
    back = unpack(pack(found), [1, 2, 4, 7])
    assert len(back[1]) == 0
    for number, one in zip((1, 4, 7), (back[0], *back[2:]), strict=True):
        np.testing.assert_allclose(one.xyxy, found[number].xyxy, atol=1 / 64)
        np.testing.assert_allclose(one.confidence, found[number].confidence, atol=1e-5)
        assert one.class_id.tolist() == found[number].class_id.tolist()


def _random(rng: np.random.Generator, count: int) -> Detections:
    corners = rng.uniform(-20, 300, (count, 2)).astype(np.float32)
    sides = rng.uniform(5, 300, (count, 2)).astype(np.float32)
    return Detections(
        xyxy=np.concatenate([corners, corners + sides], axis=1),
        confidence=rng.uniform(0.03, 1, count).astype(np.float32),
        class_id=rng.integers(0, 3, count),
    )


def test_ap_of_all_folds_is_pycocotools(folds: Path) -> None:
    truth = read_truth(folds)
    rng = np.random.default_rng(1)
    rows = pack(_shaken(truth, rng))
    ours = ap_of(match_all(truth, rows))
    coco = _coco(folds)
    results = [
        {
            "image_id": int(row["image"]),
            "category_id": int(row["label"]) + 1,
            "bbox": [*(row["box"][:2] / 32), *((row["box"][2:] - row["box"][:2]) / 32)],
            "score": row["score"] / 65535,
        }
        for row in rows
    ]
    evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, 2]
    assert ours.value == pytest.approx(precision[precision >= 0].mean(), abs=1e-6)
    assert ours.low < ours.value < ours.high


def test_what_is_stored_scores_as_what_was_found(folds: Path) -> None:
    truth = read_truth(folds)
    rng = np.random.default_rng(2)
    rows = np.concatenate([pack(_shaken(truth, rng, most)) for most in (0.2, 0.4)])
    back = restored(stored(without_missing_boxes(truth, rows)))
    assert len(back) == len(rows)
    assert len(restored(stored(rows[:0]))) == 0
    assert 0 < (back["box"] == 0).all(axis=1).sum() < len(rows)
    whole, kept = match_all(truth, rows), match_all(truth, back)
    for _ in range(20):
        draws = rng.integers(0, 3, len(truth.images))
        assert whole.ap(draws) == kept.ap(draws)


def _shaken(truth: Any, rng: np.random.Generator, most: float = 0.2) -> dict[int, Detections]:
    """Objects with edges off by up to `most` of their sides, and random scores."""
    return {
        number: Detections(
            xyxy=one.xyxy
            + rng.uniform(-most, most, one.xyxy.shape).astype(np.float32)
            * np.tile(one.xyxy[:, 2:] - one.xyxy[:, :2], 2),
            confidence=rng.uniform(0.1, 1, len(one)).astype(np.float32),
            class_id=one.class_id,
        )
        for number, one in zip(truth.images, truth.objects, strict=True)
    }


def _coco(folds: Path) -> COCO:
    before, sys.stdout = sys.stdout, io.StringIO()
    try:
        return COCO(folds / "annotations" / "instances_all.json")
    finally:
        sys.stdout = before


def test_a_difference_is_paired(folds: Path) -> None:
    truth = read_truth(folds)
    found = _shaken(truth, np.random.default_rng(1))
    own = match_all(truth, pack(found))
    same = difference(own, own)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    worse = match_all(truth, pack(_shaken(truth, np.random.default_rng(2), 0.4)))
    apart = difference(worse, own)
    assert apart.value == pytest.approx(worse.ap() - own.ap())
    assert apart.high < 0
    # The AP of a fold counts the objects and detections of its images alone.
    assert len(ap_by_fold(truth, own)) == FOLDS
    assert min(ap_by_fold(truth, own)) < own.ap() < max(ap_by_fold(truth, own))


@given(st.sampled_from([1, 2, 4, 8]))
def test_trainings_that_are_timed_side_by_side_have_a_gpu_each(gpus: int) -> None:
    options = argparse.Namespace(gpus=gpus, device="cuda", batch=256)
    turns = parts_of(options)
    assert all(sum(part.gpus for part in turn) <= gpus for turn in turns)
    assert [part.gpus for part in turns[-1]] == [gpus]
    alone = [part for turn in turns for part in turn if part.gpus == 1 and part.batch == 256]
    assert len(alone) == 1, "what the others are compared with"
    assert alone[0].kinds[0] == COMMON


def test_a_set_taken_several_times_has_the_boxes_of_its_images(
    source: Path, tmp_path: Path
) -> None:
    once = _boxes_by_name(load_coco(source, "train"))
    again = load_coco(write_repeated(source, tmp_path / "repeated", 120), "train")
    assert len(again.images) == 120
    for name, boxes in _boxes_by_name(again).items():
        assert boxes == once[name.partition("-")[2]]


# --- packing ------------------------------------------------------------------------------------


def _schedule(jobs: list[Job], seconds: float = 60.0, **others: Any) -> Schedule:
    return Schedule(jobs, set(), 10.0, time.monotonic() + seconds, **others)


def test_jobs_come_in_order_once_what_they_need_is_there() -> None:
    jobs = [Job("a", {}), Job("b", {}, needs=("a",)), Job("c", {})]
    schedule = _schedule(jobs)
    first = schedule.take("0")
    second = schedule.take("0")
    assert first is jobs[0]
    assert second is jobs[2]
    assert schedule.take("0") is None
    schedule.finish(jobs[0], None)
    assert schedule.take("0") is jobs[1]


def test_jobs_of_a_gpu_fit_into_its_memory_together() -> None:
    jobs = [Job("a", {}, memory=7), Job("b", {}, memory=7), Job("c", {}, memory=2)]
    schedule = _schedule(jobs)
    assert [schedule.take("0"), schedule.take("0"), schedule.take("1")] == [
        jobs[0],
        jobs[2],
        jobs[1],
    ]


def test_a_job_that_fails_twice_takes_with_it_what_needs_it() -> None:
    jobs = [Job("a", {}), Job("b", {}, needs=("a",))]
    schedule = _schedule(jobs)
    for _ in range(2):
        assert not schedule.is_over
        job = schedule.take("0")
        assert job is not None
        schedule.finish(job, "broken")
    assert schedule.is_over
    assert schedule.failed == {"a": "broken"}


def test_the_last_call_begins_nothing_that_it_cannot_end() -> None:
    jobs = [Job("long", {}, seconds=100), Job("short", {}, seconds=5)]
    schedule = _schedule(jobs, 20.0, is_last=True)
    assert schedule.take("0") is jobs[1]
    schedule.finish(jobs[1], None)
    assert schedule.take("0") is None
    assert schedule.is_over


def _claiming(jobs: list[Job], root: Path) -> Schedule:
    return _schedule(jobs, claims=Claims(root, "done"))


def test_drivers_of_one_folder_share_its_jobs(tmp_path: Path) -> None:
    jobs = [Job("a/0", {}), Job("b/0", {}), Job("c/0", {}, needs=("a/0",))]
    one, other = _claiming(jobs, tmp_path), _claiming(jobs, tmp_path)
    assert one.take("0") is jobs[0]
    assert other.take("1") is jobs[1]
    assert one.take("0") is None
    assert not one.is_over
    (tmp_path / "a/0/done").touch()
    one.finish(jobs[0], None)
    # What one has done, the other does not do again, and goes on from.
    other.finish(jobs[1], "broken")
    assert _claiming(jobs, tmp_path).take("1") is jobs[1]
    assert one.take("0") is jobs[2]


def test_a_driver_that_dies_gives_up_its_claims(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from benchmarks.packing import Claims, Job\n"
        "assert Claims(Path(sys.argv[1]), 'done').claim(Job('a/0', {})); print('claimed')\n"
        "sys.stdout.flush(); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    driver = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
    assert driver.stdout is not None
    assert driver.stdout.readline() == b"claimed\n"
    claims = Claims(tmp_path, "done")
    assert not claims.claim(Job("a/0", {}))
    driver.kill()
    driver.communicate()
    assert claims.claim(Job("a/0", {}))


WORKER = """
import os, sys, time
from benchmarks.packing import serve
def handle(order):
    if order["what"] == "die":
        os._exit(3)
    if order["what"] == "raise":
        raise ValueError("no")
    time.sleep(order.get("seconds", 0))
    return {"pid": os.getpid(), "gpu": os.environ["GPU"], "what": order["what"]}
serve(handle)
"""


def _run(jobs: list[Job], folder: Path, seconds: float = 30.0) -> tuple[Schedule, dict[str, Any]]:
    schedule, found, lock = _schedule(jobs, seconds), {}, threading.Lock()

    def finished(job: Job, result: dict[str, Any]) -> None:
        with lock:
            found[job.name] = result

    places = [("0", {"GPU": "0"}), ("1", {"GPU": "1"})]
    run_jobs(schedule, [sys.executable, "-c", WORKER], places, folder, finished)
    return schedule, found


def test_workers_do_all_jobs_and_survive_errors(tmp_path: Path) -> None:
    jobs = [Job(str(number), {"what": str(number), "seconds": 0.2}) for number in range(4)]
    jobs += [Job("raise", {"what": "raise"}), Job("die", {"what": "die"})]
    schedule, found = _run(jobs, tmp_path)
    assert schedule.done == {"0", "1", "2", "3"}
    assert {found[name]["gpu"] for name in schedule.done} == {"0", "1"}
    assert "ValueError: no" in schedule.failed["raise"]
    assert "ended with 3" in schedule.failed["die"]
    assert MARK not in schedule.failed["die"]


def test_the_deadline_ends_what_is_running(tmp_path: Path) -> None:
    start = time.monotonic()
    schedule, found = _run([Job("a", {"what": "a", "seconds": 60})], tmp_path, 3.0)
    assert time.monotonic() - start < 15
    assert found == {}
    assert schedule.done == set()


# --- variants -----------------------------------------------------------------------------------


def test_every_variant_is_a_recipe_that_can_be_built() -> None:
    for name, variant in VARIANTS.items():
        assert set(variant.needs) <= VARIANTS.keys(), name
        options = ArchitectureOptions(**dict(variant.architecture))
        adapted(architecture(f"yolov6{variant.model}"), options)
        teacher: dict[str, Any] = {} if variant.teacher is None else {"teacher": "t.pt"}
        settings = recipe_for(f"yolov6{variant.model}", "data", options=options, **teacher)
        for change in variant.changes:
            changed = with_field(settings, change)
            assert changed != settings, f"{name}: {change} changes nothing"
            settings = changed


def test_variants_are_trained_after_what_they_need() -> None:
    order = list(VARIANTS)
    for name, variant in VARIANTS.items():
        assert all(order.index(needed) < order.index(name) for needed in variant.needs), name


def test_variants_are_trained_in_the_order_given_each_after_what_it_needs() -> None:
    options = parser().parse_args(["--only", "s-v1-rep-ptq", "n", "s-search", "--folds", "0"])
    names = [job.order["variant"] for job in jobs_of(options)]
    assert names == ["s-v1-search", "s-v1-rep", "s-v1-rep-ptq", "n", "s-search"]


def test_one_fold_of_a_variant_can_be_asked_for() -> None:
    only = ["--only", "s-rep/3", "n", "s-search/1", "s-search/3"]
    jobs = jobs_of(parser().parse_args([*only, "--folds", "0", "1"]))
    names = ["s-search/3", "s-search/1", "s-rep/3", "n/0", "n/1"]
    assert [job.name for job in jobs] == names
    assert jobs[2].needs == ("s-search/3",)


@pytest.mark.parametrize("wrong", ["n-defualt", "n/5", "n/", "n/one"])
def test_a_variant_or_fold_that_is_not_there_is_refused(
    wrong: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["--only", wrong])
    assert wrong in capsys.readouterr().err


def test_our_tables_are_grids_of_the_papers() -> None:
    for number, table in TABLES.items():
        networks, theirs = paper.ABLATIONS[number]
        assert table.columns == networks
        assert table.rows.keys() <= theirs.keys()
        for row, cells in table.rows.items():
            assert len(cells) == len(networks) == len(theirs[row])
            for column, cell in enumerate(cells):
                if cell is not None:
                    assert cell.variant in VARIANTS
                    assert theirs[row][column] is not None, f"Table {number}: {row}"
                    base = table.base_of(row, column)
                    assert base is None or table.rows[base][column] is not None


def test_rebuilt_networks_have_the_parameters_of_table_2() -> None:
    from trt_yolov6.models.complexity import count_parameters
    from trt_yolov6.models.network import shapes_only

    for name, millions in {"n-csp": 2.3, "s-csp": 11.5, "m-csp-half": 27.7}.items():
        variant = VARIANTS[name]
        options = dict(variant.architecture) | {"block": "conv", "dfl": True}
        arch = adapted(architecture(f"yolov6{variant.model}"), ArchitectureOptions(**options))
        assert count_parameters(shapes_only(arch)) / 1e6 == pytest.approx(millions, abs=0.08)


# --- verdicts -----------------------------------------------------------------------------------


@given(st.integers(-50, 50), st.floats(-0.05, 0.05), st.floats(0.0001, 0.05))
def test_a_verdict_needs_intervals_without_zero(theirs: int, value: float, half: float) -> None:
    found = {"value": value, "low": value - half, "high": value + half}
    wide = {"value": value, "low": -1.0, "high": 1.0}
    said = verdict(theirs, {"folds": found, "images": None})
    assert verdict(theirs, {"folds": found, "images": found}) == said
    assert verdict(theirs, {"folds": found, "images": wide}) == "cannot tell"
    if abs(value) < half:
        assert said == "cannot tell"
    elif abs(value) > half:
        assert said == ("agree" if theirs * value > 0 else "contradict")


def test_a_sentence_counts_the_comparisons_and_says_what_could_be_shown() -> None:
    _, theirs = paper.ABLATIONS["8"]
    networks = paper.ABLATIONS["8"][0]
    rows = [
        _compared("YOLOv6-N", "poly", -0.02, 0.004),
        _compared("YOLOv6-N", "focal", 0.02, 0.006),
        _compared("YOLOv6-S", "focal", 0.001, 0.005),
    ]
    assert sentence(theirs, networks, rows) == (
        "Ours agree in 1 of 3 comparisons (poly in N); contradict in 1 of 3 comparisons (focal in "
        "N); cannot tell in 1 of 3 comparisons. The smallest difference that this can show is "
        "about 0.5 points."
    )


def test_trainings_whose_loss_ended_high_are_named_with_the_table() -> None:
    variants = {
        "l": {"losses": [1.9, 2.2, 1.9, 1.8, 2.0]},
        "l-wide-neck": {"losses": [2.0, 2.1, 1.9, 2.0, 2.1]},
        "m": {"losses": [9.0, 1.0, 1.0, 1.0, 1.0]},  # in another table
    }
    assert broke_away(TABLES["3"], variants).startswith(
        "Of these 10 trainings 1 diverged: the loss ended more than a tenth above the median of "
        "the five folds (fold 1 of slender and deep: 2.20, not 1.90). "
    )
    again = {"n": {"losses": [1.9, 2.0]}, "n-again": {"losses": [1.0, 1.0, 3.0]}}
    assert "fold 2 of TAL, other seeds: 3.00" in broke_away(TABLES["6"], again)
    assert broke_away(TABLES["3"], {"l": {"losses": [1.9, 2.0]}}) == ""


def _compared(network: str, row: str, value: float, half: float) -> dict[str, Any]:
    found = {"value": value, "low": value - half, "high": value + half}
    return {"network": network, "row": row, "base": "VariFocal", "folds": found, "images": None}


def test_the_interval_over_folds_is_students() -> None:
    values = [0.50, 0.52, 0.49, 0.51, 0.53]
    half = 2.776445 * 0.0158114 / math.sqrt(5)  # 97.5 % of Student's t of 4, deviation
    found = over_folds(values)
    assert (found.value, found.low, found.high) == pytest.approx((0.51, 0.51 - half, 0.51 + half))


def test_variants_of_other_schedules_are_not_compared(source: Path, tmp_path: Path) -> None:
    jobs = [
        {
            "variant": name,
            "fold": fold,
            "seed": fold,
            "epochs": epochs,
            "batch": 32,
            "image_size": 320,
            "AP": {"plain": 0.5 + 0.01 * fold + gain},
            "seconds": 1.0,
        }
        for name, epochs, gain in (("n", 60, 0.0), ("n-poly", 60, -0.1), ("n-focal", 80, 0.1))
        for fold in range(FOLDS)
    ]
    (tmp_path / "ablations.json").write_text(json.dumps({"jobs": jobs, "calls": []}))
    result = collect([tmp_path], source)
    assert set(result["variants"]) == {"n", "n-poly", "n-focal"}
    (row,) = result["tables"]["8"]
    assert row["row"] == "poly"
    assert row["folds"]["value"] == pytest.approx(-0.1)
    assert row["images"] is None


def test_norms_of_the_first_steps_are_those_of_all_gradients(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layer = torch.nn.Linear(2, 1)
    (3 * layer(torch.tensor([1.0, 2.0]))).backward()
    assert norm_of_gradients(layer) == pytest.approx(3 * math.sqrt(1 + 4 + 1))
    tiny = ["--limit", "10", "--batch", "4", "--epochs", "2"]
    gradient_norms(["--data", str(source), "--model", "n", *tiny, "--steps", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["step 1", "step 2"]
    assert all(float(line.split()[3].rstrip(",")) > 0 for line in lines)


def test_what_most_are_compared_with_is_the_mean_of_two_trainings(
    source: Path, tmp_path: Path
) -> None:
    jobs = [
        {
            "variant": name,
            "fold": fold,
            "seed": fold,
            "epochs": 60,
            "batch": 32,
            "image_size": 320,
            "AP": dict.fromkeys(("plain", "border", "inner"), 0.5 + 0.01 * fold + gain),
            "seconds": 1.0,
        }
        for name, gain in (("n", 0.02), ("n-again", -0.02), ("n-poly", -0.1))
        for fold in range(FOLDS)
    ]
    (tmp_path / "ablations.json").write_text(json.dumps({"jobs": jobs, "calls": []}))
    result = collect([tmp_path], source)
    (row,) = result["tables"]["8"]
    assert row["folds"]["value"] == pytest.approx(-0.1)
    assert result["means"]["n"]["plain"]["folds"]["value"] == pytest.approx(0.52)
    # One network with two inputs is compared with itself.
    assert {row["folds"]["value"] for row in result["tables"]["14"]} == {0}


def test_a_second_try_that_did_not_end_leaves_the_first(source: Path, tmp_path: Path) -> None:
    job = {"variant": "n", "epochs": 60, "batch": 32, "image_size": 320, "seconds": 1.0}
    for name, ap, folds in (("first", 0.5, FOLDS), ("second", 0.6, 3), ("third", 0.7, FOLDS)):
        jobs = [job | {"fold": fold, "seed": fold, "AP": {"plain": ap}} for fold in range(folds)]
        (tmp_path / name).mkdir()
        (tmp_path / name / "ablations.json").write_text(json.dumps({"jobs": jobs, "calls": []}))
    for names, ap in ((("first", "second"), 0.5), (("first", "third"), 0.7)):
        result = collect([tmp_path / name for name in names], source)
        assert result["variants"]["n"]["AP"]["plain"]["by_fold"] == [ap] * FOLDS


def test_folds_of_earlier_calls_are_not_trained_again_but_for_networks_that_are_needed(
    tmp_path: Path,
) -> None:
    before = tmp_path / "before"
    for name, fold, epochs in (("n", 0, 60), ("n-atss", 0, 60), ("n-atss", 1, 30), ("l", 0, 40)):
        folder = before / name / str(fold)
        folder.mkdir(parents=True)
        (folder / FOUND_FILE).write_bytes(b"detections")
        result = {"variant": name, "fold": fold, "epochs": epochs, "image_size": 320, "batch": 32}
        (folder / RESULT_FILE).write_text(json.dumps(result))
    write_out(tmp_path / "out", before)
    only = ["n-atss", "l-distilled"]  # which needs `l`
    state = tmp_path / "state"
    jobs = jobs_of(parser().parse_args(["--only", *only, "--state", str(state)]))
    assert take_over([tmp_path / "out"], state, jobs) == {"n-atss/0"}
    assert set(results_in(state, [job.name for job in jobs])) == {"n-atss/0"}
    assert (state / "n-atss" / "0" / FOUND_FILE).read_bytes() == b"detections"


def test_results_of_a_folder_are_scored_with_all_their_detections(
    source: Path, folds: Path, tmp_path: Path
) -> None:
    truth = read_truth(folds)
    state = tmp_path / "state"
    for name, most in (("n", 0.2), ("n-poly", 0.3)):
        rows = pack(_shaken(truth, np.random.default_rng(1), most))
        for fold in range(FOLDS):
            own = np.array(truth.images)[truth.fold_of == fold]
            folder = state / name / str(fold)
            folder.mkdir(parents=True)
            kept = without_missing_boxes(truth, rows[np.isin(rows["image"], own)])
            np.savez_compressed(folder / FOUND_FILE, plain=stored(kept))
            result = {"variant": name, "fold": fold, "seed": fold, "epochs": 60, "batch": 32}
            result |= {"image_size": 320, "AP": {"plain": 0.0}, "seconds": 1.0}
            (folder / RESULT_FILE).write_text(json.dumps(result))
    write_out(tmp_path / "out", state)
    assert len(list((tmp_path / "out").iterdir())) == 2
    found = collect([tmp_path / "out"], source)
    (row,) = found["tables"]["8"]
    wanted = [
        match_all(truth, pack(_shaken(truth, np.random.default_rng(1), most))).ap()
        for most in (0.3, 0.2)
    ]
    assert row["images"]["value"] == pytest.approx(wanted[0] - wanted[1], abs=1e-6)
    assert row["images"]["high"] < 0
    # A later call without them leaves all as it was. With another network of one of them, what
    # needs the other's detections is unknown.
    later = tmp_path / "later"
    later.mkdir()
    (later / "ablations.json").write_text(json.dumps({"jobs": [], "calls": []}))
    assert collect([later], source, earlier=found) == found
    again = {**result, "variant": "n-poly", "AP": {"plain": 0.25}}
    jobs = [again | {"fold": fold} for fold in range(FOLDS)]
    (later / "ablations.json").write_text(json.dumps({"jobs": jobs, "calls": []}))
    (row,) = collect([later], source, earlier=found)["tables"]["8"]
    before = found["variants"]["n"]["AP"]["plain"]["folds"]["value"]
    assert row["folds"]["value"] == pytest.approx(0.25 - before)
    assert row["images"] is None


def test_choices_that_inputs_are_named_after_exist() -> None:
    sides = ablation_variants.inputs_of(VARIANTS["n"], _Size(320))
    assert sides == {"plain": (320, 0), "border": (352, 16), "inner": (320, 3)}
    assert math.isclose(sides["border"][0] - 2 * sides["border"][1], 320)


class _Size:
    def __init__(self, side: int) -> None:
        self.image_size = side
