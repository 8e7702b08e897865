"""Timing: statistics against closed forms, the stopping rule on a made-up clock, real engines."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper
from support.tiny_detector import load_tiny

from trt_yolov6.bench import sampling
from trt_yolov6.bench.end_to_end import benchmark_end_to_end_many
from trt_yolov6.bench.latency import STAGES, benchmark_many
from trt_yolov6.bench.sampling import (
    MIN_RUNS_NARROW,
    Watched,
    median_interval_ranks,
    random_input,
    sample,
    summarize,
    warm_up_run,
)
from trt_yolov6.bench.text import format_report
from trt_yolov6.engines import LoadOptions, load_engine
from trt_yolov6.errors import UserError

IMAGES = sorted((Path(__file__).parents[1] / "samples" / "images" / "val").glob("*.jpg"))


class Machine:
    """A clock and an engine on it: each run takes the time `seconds(run number)` says."""

    def __init__(self, seconds: Callable[[int], float], between: float = 0.0) -> None:
        self.now = 100.0
        self.runs = 0
        self._seconds = seconds
        self._between = between

    def clock(self) -> float:
        return self.now

    def run(self) -> float:
        taken = self._seconds(self.runs)
        self.runs += 1
        self.now += taken + self._between
        return taken


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real ONNX file of the `rows` layout: 32x32 pixels in, 16 rows of 5 + 2 out, any batch."""
    generator = np.random.default_rng(1)
    weights: dict[str, NDArray[Any]] = {
        "w": (0.1 * generator.standard_normal((7, 3, 8, 8))).astype(np.float32),
        "shape": np.array([0, 7, 16], dtype=np.int64),
    }
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["images", "w"], ["features"], strides=[8, 8]),
            helper.make_node("Reshape", ["features", "shape"], ["columns"]),
            helper.make_node("Transpose", ["columns"], ["rows"], perm=[0, 2, 1]),
        ],
        "detector",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 32, 32])],
        [helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["batch", 16, 7])],
        [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path = tmp_path_factory.mktemp("engine") / "tiny.onnx"
    onnx.save(model, path)
    return path


# --- the interval of the median


@pytest.mark.parametrize("runs", [*range(1, 60), 100, 333])
def test_interval_ranks_are_the_tightest_that_the_exact_binomial_allows(runs: int) -> None:
    def coverage(rank: int) -> Fraction:
        tail = sum(math.comb(runs, below) for below in range(rank + 1))
        return 1 - 2 * Fraction(tail, 2**runs)

    ranks = median_interval_ranks(runs)
    if ranks is None:
        assert coverage(0) < Fraction(95, 100)
        assert runs < 6
    else:
        low, high = ranks
        assert low + high == runs - 1
        assert coverage(low) >= Fraction(95, 100)
        assert low + 1 > (runs - 1) / 2 or coverage(low + 1) < Fraction(95, 100)


@pytest.mark.parametrize("runs", [1000, 54_321, 1_000_000])
def test_interval_ranks_of_large_samples_agree_with_scipy(runs: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    # The smallest k with P(B < k + 1) above 2.5 % is the largest rank that keeps the coverage.
    rank = stats.binom.ppf(0.025, runs, 0.5) - 1
    assert median_interval_ranks(runs) == (rank, runs - 1 - rank)


def test_five_runs_cannot_state_an_interval_and_six_can() -> None:
    assert summarize([1.0, 2.0, 3.0, 4.0, 5.0]).interval is None
    assert summarize([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).interval == (1.0, 6.0)


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=300))
def test_statistics_agree_with_their_definitions(seconds: list[float]) -> None:
    result = summarize(seconds)
    ordered = sorted(seconds)
    assert result.runs == len(seconds)
    assert result.min == ordered[0]
    assert result.mean == pytest.approx(math.fsum(seconds) / len(seconds))
    middle = ordered[(len(seconds) - 1) // 2], ordered[len(seconds) // 2]
    assert result.median == pytest.approx(sum(middle) / 2)
    for share, value in ((0.9, result.p90), (0.99, result.p99)):
        position = share * (len(seconds) - 1)
        low, high = ordered[math.floor(position)], ordered[math.ceil(position)]
        assert value == pytest.approx(low + (high - low) * (position % 1))
    if result.interval:
        assert result.interval[0] <= result.median <= result.interval[1]


def test_the_interval_covers_the_true_median_as_often_as_it_says_in_spite_of_early_stopping() -> (
    None
):
    # 5 % of skewed noise around 20 ms: a few hundred runs until narrow, so the rule is looked at
    # dozens of times in each of the 300 measurements.
    generator = np.random.default_rng(7)
    covered = stopped = 0
    for _ in range(300):
        noise = (0.02 * np.exp(0.05 * generator.standard_normal(3000))).tolist()
        machine = Machine(noise.__getitem__)
        (seconds,), reason = sample([machine.run], duration=20, clock=machine.clock)
        interval = summarize(seconds).interval
        assert interval is not None
        low, high = interval
        covered += low <= 0.02 <= high
        stopped += reason == "narrow"
    assert stopped > 290
    assert covered / 300 >= 0.92  # 0.95 less two standard errors and a half


# --- when to stop


def test_a_constant_engine_is_measured_for_a_second_and_no_longer() -> None:
    machine = Machine(lambda _: 0.01)
    (seconds,), reason = sample([machine.run], duration=60, clock=machine.clock)
    assert reason == "narrow"
    assert len(seconds) >= MIN_RUNS_NARROW
    assert 1.0 <= machine.now - 100 <= 1.0 + 0.26


def test_a_noisy_engine_is_measured_until_the_time_is_up() -> None:
    machine = Machine(lambda run: 0.01 if run % 2 else 0.02)
    (seconds,), reason = sample([machine.run], duration=3, clock=machine.clock)
    assert reason == "time"
    assert 3.0 <= machine.now - 100 <= 3.0 + 0.27
    assert summarize(seconds).interval == (0.01, 0.02)


def test_the_duration_is_a_bound_for_the_slowest_engine_too() -> None:
    machine = Machine(lambda _: 4.0)
    (seconds,), reason = sample([machine.run], duration=10, clock=machine.clock)
    assert (len(seconds), reason) == (3, "time")
    # A run that was begun is finished.
    machine = Machine(lambda _: 40.0)
    (seconds,), reason = sample([machine.run], duration=10, clock=machine.clock)
    assert (len(seconds), reason) == (1, "time")
    assert summarize(seconds).interval is None


def test_runs_are_known_by_how_long_they_waited_for_a_processor() -> None:
    waited = 0.0
    taken = iter([0.02, 0.04, 0.02, 0.0004, 0.0008, 0.02])
    waits = iter([0.0, 0.02, 0.0, 0.0, 0.0006, 0.0])

    def run() -> float:
        nonlocal waited
        waited += next(waits)
        return next(taken)

    watched = Watched(run, lambda: waited)
    for _ in range(6):
        watched()
    # The short runs share one look at the clock.
    assert watched.shares == pytest.approx([0, 0.5, 0, 0.5, 0.5, 0])
    watched.forget_last()
    assert watched.shares == pytest.approx([0, 0.5, 0, 0.5, 0.5])
    unknown = Watched(lambda: 0.02, lambda: None)
    unknown()
    assert unknown.shares == ()


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_disturbed_runs_are_left_out_or_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    """Where most runs are disturbed, all count and the figure has a star, as in `compare`."""
    generator = np.random.default_rng(0)
    waited = 0.0

    def wait() -> float:
        return waited

    class Busy:
        def __call__(self) -> float:
            nonlocal waited
            if generator.random() < share:
                waited += 0.05
                return 0.06
            return 0.01

    monkeypatch.setattr(sampling, "cpu_wait_seconds", wait)
    with load_tiny(tmp_path) as engine:
        monkeypatch.setattr(engine, "resident_run", lambda images, streams: Busy())
        (result,) = benchmark_many([engine], duration=0.02, warm_up=0, progress=False)
    assert result.disturbed is (share == 0.9)
    assert result.latency.median == pytest.approx(0.06 if result.disturbed else 0.01)
    assert 0 < result.quiet_runs < result.all_runs
    assert result.to_json()["disturbed"] is result.disturbed
    text = format_report([result])
    assert ("* other processes disturbed too many runs" in text) is result.disturbed
    assert ("disturbed by other processes, left out" in text) is not result.disturbed


def test_time_between_runs_counts_as_time_passed_but_not_as_latency() -> None:
    machine = Machine(lambda run: 0.01 if run % 2 else 0.02, between=0.1)
    passed: list[float] = []
    (seconds,), _ = sample([machine.run], duration=5, advance=passed.append, clock=machine.clock)
    assert sum(passed) == pytest.approx(machine.now - 100)
    assert machine.now - 100 < 5.5
    assert max(seconds) == 0.02


def test_engines_take_turns_so_that_drift_hits_all_alike() -> None:
    # Both engines are the same one, on a machine that gets slower all the time.
    machine = Machine(lambda _: 0.01 * (1 + (machine.now - 100) / 20))
    samples, reason = sample([machine.run, machine.run], duration=25, clock=machine.clock)
    first, second = (summarize(seconds) for seconds in samples)
    assert reason == "time"
    assert 50 <= machine.now - 100 <= 51
    assert first.p99 / first.min > 3
    assert first.median == pytest.approx(second.median, rel=0.02)


def test_the_first_run_after_a_change_of_engine_is_not_counted() -> None:
    # Whoever runs after the other finds cold caches and takes twice as long.
    last: list[str] = []

    def engine(name: str) -> Callable[[], float]:
        def run() -> float:
            cold = last[-1:] != [name]
            last.append(name)
            taken = 0.02 if cold else 0.01
            machine.now += taken
            return taken

        return run

    machine = Machine(lambda _: 0.0)
    uncounted: list[int] = []
    samples, reason = sample(
        [engine("a"), engine("b")],
        duration=20,
        clock=machine.clock,
        uncounted=uncounted.append,
    )
    assert reason == "narrow"
    for index, name in enumerate("ab"):
        assert last.count(name) == len(samples[index]) + uncounted.count(index)
    # Only each engine's very first run, before its speed is known, may be a cold one.
    assert [sum(seconds > 0.015 for seconds in times) for times in samples] == [1, 1]


# --- warming up


def test_warm_up_goes_on_until_the_engine_gets_no_faster() -> None:
    machine = Machine(lambda run: max(0.01, 0.05 * 0.97**run))  # as fast as it gets after 1.3 s
    warm = warm_up_run(machine.run, 0.5, clock=machine.clock)
    assert warm.steady
    assert warm.runs == machine.runs
    assert warm.seconds > 1.3


def test_warm_up_gives_up_on_an_engine_that_never_settles() -> None:
    machine = Machine(lambda run: 0.01 * 1.1 ** min(run, 40) + 0.001 * (run % 7))
    warm = warm_up_run(machine.run, 0.2, clock=machine.clock)
    assert warm.steady is False
    assert 0.6 <= warm.seconds < 0.8


def test_warm_up_of_a_slow_engine_is_two_runs() -> None:
    machine = Machine(lambda _: 40.0)
    warm = warm_up_run(machine.run, 1.0, clock=machine.clock)
    assert (warm.runs, warm.steady) == (2, None)


# --- real engines


def test_a_real_engine_is_measured_and_the_result_reads_as_documented(detector: Path) -> None:
    with load_engine(detector) as engine:
        (result,) = benchmark_many([engine], batch=4, duration=0.5, warm_up=0.1, progress=False)
    value = json.loads(json.dumps(result.to_json()))
    assert {
        *("batch", "latency_ms", "throughput_fps"),
        *("engine", "precision", "backend", "device"),
    } <= value.keys()
    latency = value["latency_ms"]
    assert latency["min"] <= latency["median"] <= latency["p90"] <= latency["p99"]
    assert value["throughput_fps"] == pytest.approx(4 / (latency["median"] / 1000))
    assert 1 <= value["runs"] <= result.all_runs
    assert value["engine"] == str(detector)
    assert len(value["engine_sha256"]) == 64
    assert value["versions"]["numpy"] == np.__version__
    assert "stages_ms" not in value
    report = format_report([result])
    assert "\ntiny " in report
    assert "resident input" in report
    assert max(map(len, report.splitlines())) < 200


def test_the_number_of_threads_asked_for_is_reported(detector: Path) -> None:
    with load_engine(detector, options=LoadOptions(threads=1)) as engine:
        (result,) = benchmark_many([engine], duration=0.1, warm_up=0, progress=False)
    assert result.to_json()["threads"] == 1
    assert "1 thread," in format_report([result])


def test_latency_is_the_engines_own_time(detector: Path) -> None:
    # The measured median against a plain loop around the same session: the same order of size.
    with load_engine(detector) as engine:
        images = random_input(engine, 64)
        engine.infer(images)
        loop = []
        for _ in range(200):
            start = time.perf_counter()
            engine.infer(images)
            loop.append(time.perf_counter() - start)
        (result,) = benchmark_many([engine], batch=64, duration=0.5, warm_up=0.1, progress=False)
    assert 0.2 < result.latency.median / float(np.median(loop)) < 2


def test_two_engines_give_two_results_in_order(detector: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.onnx"
    other.write_bytes(detector.read_bytes())
    with load_engine(detector) as first, load_engine(other) as second:
        results = benchmark_many([first, second], duration=0.3, warm_up=0.05, progress=False)
    assert [result.engine.name for result in results] == ["tiny.onnx", "other.onnx"]
    assert results[0].engine_sha256 == results[1].engine_sha256
    report = format_report(results)
    assert "\nother " in report
    assert report.count("\non ") == 1  # the same place is named once
    # Of one name they are told apart by their paths.
    folders = [
        dataclasses.replace(one, engine=Path(where, "s.onnx"), disturbed=False)
        for one, where in zip(results, "ab", strict=True)
    ]
    lines = format_report(folders).splitlines()
    assert [line.split()[0] for line in lines[2:6]] == [
        "a/s.onnx",
        "b/s.onnx",
        "a/s.onnx:",
        "b/s.onnx:",
    ]
    named = [
        dataclasses.replace(one, engine=Path(f"engines/yolov6s_of_my_data-{kind}.trt"))
        for one, kind in zip(results, ("fp32", "int8+fp16"), strict=True)
    ]
    narrow = max(map(len, format_report(named).splitlines()[1:4])) - 1
    lines = format_report(named, narrow).splitlines()
    assert lines[1] == "yolov6s_of_my_data-..."
    assert [line.split()[0] for line in lines[2:5]] == ["engine", "fp32", "int8+fp16"]
    assert all(len(line) <= narrow for line in lines[1:5])


def test_end_to_end_reports_stages_that_add_up_to_the_whole(detector: Path) -> None:
    with load_engine(detector) as engine:
        (result,) = benchmark_end_to_end_many(
            [engine], [*IMAGES[:3], IMAGES[3].read_bytes()], batch=3, duration=0.6, warm_up=0.1,
            progress=False,
        )  # fmt: skip
    assert result.end_to_end
    assert tuple(result.stages) == STAGES
    assert {stage.runs for stage in result.stages.values()} == {result.latency.runs}
    means = sum(stage.mean for stage in result.stages.values())
    assert means == pytest.approx(result.latency.mean, rel=1e-6)
    # Decoding three 640x480 JPEGs costs far more than this engine.
    assert result.stages["decode"].median > result.stages["infer"].median
    assert set(result.to_json()["stages_ms"]) == set(STAGES)
    assert "end to end" in format_report([result])


def test_end_to_end_engines_take_turns_and_each_has_its_own_stages(
    detector: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.onnx"
    other.write_bytes(detector.read_bytes())
    with load_engine(detector) as first, load_engine(other) as second:
        results = benchmark_end_to_end_many(
            [first, second], IMAGES[:2], duration=0.6, warm_up=0.05, progress=False
        )
    assert [result.engine.name for result in results] == ["tiny.onnx", "other.onnx"]
    for result in results:
        # Runs that only refill the caches are in neither count.
        assert {stage.runs for stage in result.stages.values()} == {result.latency.runs}
        means = sum(stage.mean for stage in result.stages.values())
        assert means == pytest.approx(result.latency.mean, rel=1e-6)


def test_stages_are_of_the_runs_that_the_latency_is_of(
    detector: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stages of disturbed runs are left out with the runs, so that they still add up."""
    readings = itertools.cycle(
        [0, 0, 0, 0, 0, 1]
    )  # before and after a block: each third one waited
    waited = 0.0

    def wait() -> float:
        nonlocal waited
        waited += next(readings) * 0.05
        return waited

    monkeypatch.setattr(sampling, "cpu_wait_seconds", wait)
    with load_engine(detector) as engine:
        (result,) = benchmark_end_to_end_many(
            [engine], IMAGES[:2], duration=0.5, warm_up=0, progress=False
        )
    assert not result.disturbed
    assert 0 < result.latency.runs < result.all_runs
    assert {stage.runs for stage in result.stages.values()} == {result.latency.runs}
    means = sum(stage.mean for stage in result.stages.values())
    assert means == pytest.approx(result.latency.mean, rel=1e-6)


@pytest.mark.parametrize("batch", [10**9, 10**18, 10**30])
def test_a_batch_that_does_not_fit_in_memory_is_refused(detector: Path, batch: int) -> None:
    with load_engine(detector) as engine:
        engine.batch = dataclasses.replace(engine.batch, max=batch)
        with pytest.raises(UserError, match=f"{batch} images .* smaller `batch`"):
            benchmark_many([engine], batch=batch, progress=False)
        with pytest.raises(UserError, match=f"{batch} images .* smaller `batch`"):
            benchmark_end_to_end_many([engine], IMAGES[:1], batch=batch, progress=False)


def test_a_batch_the_engine_does_not_take_is_refused(detector: Path, tmp_path: Path) -> None:
    model = onnx.load(detector)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 2
    path = tmp_path / "static.onnx"
    onnx.save(model, path)
    with load_engine(path) as engine:
        with pytest.raises(UserError, match=r"static\.onnx takes only batch 2, not 32; .*`batch`"):
            benchmark_many([engine], batch=32, progress=False)
        with pytest.raises(UserError, match="`batch`"):
            benchmark_end_to_end_many([engine], IMAGES[:1], batch=1, progress=False)


def test_end_to_end_names_a_picture_that_is_no_picture(detector: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")
    with load_engine(detector) as engine:
        with pytest.raises(UserError, match=r"broken\.jpg"):
            benchmark_end_to_end_many([engine], [IMAGES[0], broken], progress=False)
        with pytest.raises(UserError, match=r"missing\.jpg"):
            benchmark_end_to_end_many([engine], [tmp_path / "missing.jpg"], progress=False)
        with pytest.raises(UserError, match="no image"):
            benchmark_end_to_end_many([engine], [], progress=False)


@pytest.mark.parametrize(
    ("duration", "warm_up"), [(0, 1), (-1, 1), (math.inf, 1), (math.nan, 1), (1, -1), (1, math.nan)]
)
def test_durations_out_of_range_are_refused(
    detector: Path, duration: float, warm_up: float
) -> None:
    with (
        load_engine(detector) as engine,
        pytest.raises(UserError, match=r"`(duration|warm_up)` must be"),
    ):
        benchmark_many([engine], duration=duration, warm_up=warm_up, progress=False)


def test_random_input_has_the_engines_dtype_and_range_and_is_the_same_each_time(
    detector: Path,
) -> None:
    with load_engine(detector) as engine:
        images = random_input(engine, 5)
        assert images.shape == (5, 3, 32, 32)
        assert images.dtype == np.float32
        assert 0 <= images.min() < 0.01 < 0.99 < images.max() <= 1
        np.testing.assert_array_equal(images, random_input(engine, 5))
