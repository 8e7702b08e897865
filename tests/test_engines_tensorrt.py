"""TensorRT and TensorRT-RTX: real T4 plans without a GPU, and real runs where there is one.

ONNX Runtime is the reference for outputs; the size of the weights is the reference for plans.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import io
import os
import sys
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from support.logs import logged
from support.plan_graphs import detector

from trt_yolov6.engines.base import BuildSettings, Engine, ImplicitCalibration, LoadOptions
from trt_yolov6.engines.cuda import device as cuda_device
from trt_yolov6.engines.onnxruntime import backend as onnxruntime_backend
from trt_yolov6.engines.tensorrt import builder as tensorrt_build
from trt_yolov6.engines.tensorrt import enterprise as tensorrt
from trt_yolov6.engines.tensorrt import rtx as tensorrt_rtx
from trt_yolov6.engines.tensorrt.flavour import Flavour, logger_of, one_line
from trt_yolov6.errors import MissingDependencyError, UserError, install_command
from trt_yolov6.pipeline import settings_for
from trt_yolov6.quantization.settings import QuantizationSettings
from trt_yolov6.spec import BatchProfile, NmsSettings

SAMPLE = Path(__file__).parents[1] / "samples" / "yolov6n_bccd_authors.pt"
T4 = BuildSettings(target="t4", batch=BatchProfile(1, 2, 4), progress=False)


def _device() -> cuda_device.Device | None:
    try:
        return cuda_device.current_device()
    except MissingDependencyError:
        return None


needs_gpu = pytest.mark.skipif(_device() is None, reason="needs an NVIDIA GPU and cuda-python")
without_gpu = pytest.mark.skipif(_device() is not None, reason="there is a GPU")


def plan_of(model: onnx.ModelProto, settings: BuildSettings = T4) -> bytes:
    pytest.importorskip("tensorrt_rtx")
    return tensorrt_rtx.build(model.SerializeToString(), settings)


def refusal(call: Callable[[], Any]) -> str:
    """Return the one sentence with which a call is refused."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


# --- what is here -------------------------------------------------------------------------------


@without_gpu
def test_tensorrt_rtx_without_a_gpu_builds_for_a_t4_but_does_not_run() -> None:
    installed = pytest.importorskip("tensorrt_rtx").__version__
    state = tensorrt_rtx.availability()
    assert (state.can_build, state.can_run, state.version) == (True, False, installed)
    assert "t4" in state.detail


@without_gpu
def test_tensorrt_without_a_gpu_neither_builds_nor_runs_and_says_why() -> None:
    state = tensorrt.availability()
    assert not state.can_build
    assert not state.can_run
    assert "import" in state.detail or "driver" in state.detail or "cuda-python" in state.detail
    assert refusal(lambda: tensorrt.build(b"", BuildSettings()))


# --- plans --------------------------------------------------------------------------------------


@pytest.mark.parametrize("uint8", [False, True], ids=["float32", "uint8"])
@pytest.mark.parametrize("batch", ["batch", 2], ids=["dynamic", "static"])
def test_a_t4_plan_holds_the_weights_in_the_precision_of_the_graph(
    batch: int | str, uint8: bool
) -> None:
    # Without a GPU no plan can be opened again, but the weights are in it: 1.5 million of them are
    # more than all else together, and half precision halves them.
    count = 1 << 12
    whole = len(plan_of(detector(batch=batch, uint8=uint8, width=count)))
    half = len(plan_of(detector(batch=batch, uint8=uint8, width=count, fp16=True)))
    weights = count * (3 * 3 * 3 + 6 * 8 * 8)
    assert whole >= 4 * weights
    assert 2 * weights <= half <= 0.75 * whole


def test_every_offered_target_builds_a_plan_of_its_own() -> None:
    api = pytest.importorskip("tensorrt_rtx")
    offered = tensorrt_rtx.targets(api)
    assert {"t4", "ampere", "l4", "blackwell"} <= set(offered)
    plans = {
        name: plan_of(detector(), BuildSettings(target=name, progress=False)) for name in offered
    }
    # Two names of one GPU generation are one target.
    different = {tensorrt_rtx.TARGETS[name]: plan for name, plan in plans.items()}
    assert len(different) >= 6
    assert len(set(different.values())) == len(different)


@pytest.mark.slow
def test_the_sample_builds_for_a_t4_in_half_precision() -> None:
    pytest.importorskip("tensorrt_rtx")
    from trt_yolov6.checkpoints.loading import load_checkpoint
    from trt_yolov6.graph.export import ExportSettings, export_onnx

    model = load_checkpoint(SAMPLE).model
    profile = BatchProfile(1, 8, 8)
    settings = BuildSettings(target="t4", batch=profile, progress=False)
    half = export_onnx(model, ExportSettings(fp16=True, batch=profile), verify=False)
    # 4.3 million parameters (the paper's Table 1) at 2 bytes, and what TensorRT-RTX adds.
    assert 8.6e6 < len(plan_of(half, settings)) < 14e6
    ended = export_onnx(model, ExportSettings(nms=NmsSettings(), batch=profile), verify=False)
    message = refusal(lambda: plan_of(ended, settings))
    assert "NonMaxSuppression" in message
    assert "leave out `nms`" in message


# --- what is refused ----------------------------------------------------------------------------


@without_gpu
def test_without_a_gpu_and_a_target_the_user_is_asked_for_one() -> None:
    message = refusal(lambda: plan_of(detector(), BuildSettings(progress=False)))
    assert "`target`" in message
    assert "t4" in message


@pytest.mark.parametrize("target", ["orin", "h100", "b200"])
def test_a_gpu_that_tensorrt_rtx_does_not_build_for_is_refused(target: str) -> None:
    message = refusal(lambda: plan_of(detector(), BuildSettings(target=target)))
    assert target in message
    assert "compute capability" in message


def test_an_unknown_target_is_answered_with_the_known_ones() -> None:
    message = refusal(lambda: plan_of(detector(), BuildSettings(target="voodoo2")))
    assert "voodoo2" in message
    assert "t4, turing" in message


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (BuildSettings(target="t4", timing_cache=Path("timing.cache")), "`timing_cache`"),
        (
            BuildSettings(target="t4", optimization_level=6),
            "`optimization_level` must be at most 5",
        ),
        (BuildSettings(target="t4", workspace_mib=0), "`workspace_mib` must be at least 1"),
    ],
)
def test_a_setting_that_cannot_be_honoured_is_refused_by_name(
    settings: BuildSettings, named: str
) -> None:
    assert named in refusal(lambda: plan_of(detector(), settings))


def test_a_fixed_batch_is_not_built_as_another() -> None:
    settings = BuildSettings(target="t4", batch=BatchProfile(1, 1, 1))
    assert "`batch` 2" in refusal(lambda: plan_of(detector(batch=2), settings))


def test_an_operator_that_does_not_exist_is_named_with_its_node() -> None:
    model = detector()
    model.graph.node[1].op_type = "Frobnicate"
    message = refusal(lambda: plan_of(model))
    assert "relu" in message
    assert "Frobnicate" in message


@pytest.mark.parametrize("content", [b"", b"no model", detector().SerializeToString()[:500]])
def test_bytes_that_are_no_graph_are_refused(content: bytes) -> None:
    pytest.importorskip("tensorrt_rtx")
    refusal(lambda: tensorrt_rtx.build(content, T4))


def test_a_free_image_size_is_refused() -> None:
    assert "fixed size" in refusal(lambda: plan_of(detector(size="side")))


@without_gpu
def test_a_plan_cannot_be_loaded_without_a_gpu_and_the_reason_is_said(tmp_path: Path) -> None:
    path = tmp_path / "small.trt"
    path.write_bytes(plan_of(detector()))
    message = refusal(lambda: tensorrt_rtx.load(path, None, LoadOptions()))
    assert "small.trt" in message
    assert "GPU" in message


@pytest.mark.parametrize(
    ("backend", "version", "shares"),
    [
        ("tensorrt", "8.5.3.1", False),
        ("tensorrt", "8.6.0", True),
        ("tensorrt", "10.9.0.34", True),
        ("tensorrt-rtx", "1.6.1.120", True),
    ],
)
def test_only_before_tensorrt_8_6_do_contexts_not_share_a_profile(
    backend: str, version: str, shares: bool
) -> None:
    api: Any = types.SimpleNamespace(__version__=version)
    assert Flavour(backend, "TensorRT", api).shares_profiles is shares


@pytest.mark.parametrize(
    ("release", "explicit_int8", "named"),
    [
        ((8, 5), True, "TensorRT 8.6"),
        ((8, 5), False, "`workspace_mib`"),
        ((8, 6), True, "`workspace_mib`"),
    ],
)
def test_a_failed_int8_build_of_tensorrt_8_5_is_answered_with_8_6(
    release: tuple[int, int], explicit_int8: bool, named: str
) -> None:
    from trt_yolov6.engines.tensorrt.builder import remedy_of

    assert named in remedy_of(release, explicit_int8=explicit_int8)


def test_a_build_that_fails_for_want_of_an_image_says_which(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """TensorRT drops what a calibrator's callback raises, and gives a reason of its own."""
    api = pytest.importorskip("tensorrt_rtx")

    def finish() -> None:
        raise UserError("cells.jpg is damaged; replace it.")

    calibrator = types.SimpleNamespace(finish=finish)
    monkeypatch.setattr(tensorrt_build, "calibrate", lambda *_: calibrator)
    settings = dataclasses.replace(T4, workspace_mib=1, calibration=CALIBRATION)
    flavour = Flavour("tensorrt-rtx", "TensorRT-RTX", api)
    set_target = tensorrt_rtx._target_setter(api, ("SM75",))
    model = detector().SerializeToString()
    message = refusal(lambda: tensorrt_build._built(flavour, model, None, settings, set_target))
    assert message == "cells.jpg is damaged; replace it."


def test_builds_in_threads_leave_standard_error_where_it_was() -> None:
    pytest.importorskip("tensorrt_rtx")
    before = os.fstat(2)
    with ThreadPoolExecutor(4) as pool:
        plans = list(pool.map(lambda _: plan_of(detector()), range(8)))
    assert all(plans)
    assert os.path.samestat(before, os.fstat(2))


@pytest.mark.parametrize(
    ("version", "quantized", "single", "relaxes"),
    [
        ("8.5.3.1", True, {"boxes"}, True),
        ("8.5.3.1", True, set(), False),
        ("8.5.3.1", False, {"boxes"}, False),
        ("8.6.0", True, {"boxes"}, False),
    ],
)
def test_only_int8_heads_on_tensorrt_8_5_may_have_boxes_in_half_precision(
    version: str, quantized: bool, single: set[str], relaxes: bool
) -> None:
    from trt_yolov6.engines.tensorrt.builder import relaxed_boxes
    from trt_yolov6.engines.tensorrt.weakly_typed import WeakGraph

    api: Any = types.SimpleNamespace(__version__=version)
    weak = WeakGraph(b"graph", True, quantized, frozenset(single), frozenset({"scores"}))
    found = relaxed_boxes(Flavour("tensorrt", "TensorRT", api), weak)
    assert (found is not None) is relaxes
    if found is not None:
        assert found == dataclasses.replace(weak, single=frozenset())


def test_messages_of_tensorrt_lose_the_places_in_its_source() -> None:
    message = (
        "IBuilder::buildSerializedNetwork: Error Code 4: API Usage Error (Network has dynamic or "
        "shape inputs, but no optimization profile has been defined. In validate at "
        "/_src/optimizer/api/network.cpp:4023)"
    )
    assert one_line(message).endswith("but no optimization profile has been defined)")
    message = "Cuda Runtime (In run at /_src/runner.cpp:25 (cudaError 2: out of memory))"
    assert one_line(message) == "Cuda Runtime (cudaError 2: out of memory)"
    assert one_line("two\n  lines.") == "two lines"
    assert len(one_line("word " * 500)) <= 300


# --- releases that are not installed: a stand-in says its version, and nothing else is asked ------


def pretend(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """Have `import tensorrt` find a package of some version."""
    module = types.ModuleType("tensorrt")
    module.__version__ = version  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", module)


@pytest.mark.parametrize(("version", "depthwise"), [("8.6.0", False), ("10.9.0.34", True)])
def test_depthwise_convolutions_are_quantized_for_releases_that_have_them_in_int8(
    monkeypatch: pytest.MonkeyPatch, version: str, depthwise: bool
) -> None:
    pretend(monkeypatch, version)
    given = QuantizationSettings(calibrator="minmax")
    expected = dataclasses.replace(given, shift=False, depthwise=depthwise)
    assert settings_for("tensorrt", given) == expected
    assert settings_for("onnxruntime", given) == given


@pytest.mark.parametrize(
    ("python", "remedy"),
    [
        ((3, 10, 13), f"or `{install_command('tensorrt8')}` (8.6)"),
        ((3, 11, 2), "(10 or 11; TensorRT 8 needs Python 3.10)"),
    ],
)
def test_what_installs_tensorrt_depends_on_the_python(
    monkeypatch: pytest.MonkeyPatch, python: tuple[int, ...], remedy: str
) -> None:
    monkeypatch.setattr(sys, "version_info", python)
    pretend(monkeypatch, "8.4.3.1")
    message = refusal(lambda: tensorrt.check(BuildSettings()))
    assert "TensorRT 8.4.3.1 is too old; install version 8.5 or later" in message
    assert remedy in message
    assert not tensorrt.availability().can_build
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    message = refusal(lambda: tensorrt.check(BuildSettings()))
    assert "TensorRT does not import" in message
    assert remedy in message


@without_gpu
@pytest.mark.parametrize("version", ["8.5.3.1", "8.6.0", "11.4.0.106"])
def test_without_a_gpu_every_tensorrt_says_what_it_lacks(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    pretend(monkeypatch, version)
    found = tensorrt.availability()
    assert (found.version, found.can_build, found.can_run) == (version, False, False)
    assert "builds on the GPU it builds for" in refusal(lambda: tensorrt.check(BuildSettings()))


CALIBRATION = ImplicitCalibration()


@pytest.mark.parametrize(
    ("version", "settings", "said"),
    [
        ("8.5.3.1", BuildSettings(optimization_level=3), "8.5.3.1 has no `optimization_level`"),
        ("8.5.3.1", BuildSettings(fp8=True), "8.5.3.1 has no FP8"),
        ("8.6.0", BuildSettings(fp8=True), "8.6.0 has no FP8"),
        ("8.6.0", BuildSettings(target="t4"), "`target` t4 needs `backend` tensorrt-rtx"),
        ("11.0.0.114", BuildSettings(calibration=CALIBRATION), "calibration ends with version 10"),
    ],
)
def test_what_a_release_of_tensorrt_does_not_have_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, version: str, settings: BuildSettings, said: str
) -> None:
    pretend(monkeypatch, version)
    assert said in refusal(lambda: tensorrt.check(settings))


def test_tensorrts_own_calibration_is_refused_by_the_other_backends() -> None:
    settings = BuildSettings(calibration=CALIBRATION)
    message = refusal(lambda: onnxruntime_backend.check(settings))
    assert "TensorRT's own calibration is for TensorRT engines" in message
    assert message.endswith("`backend` tensorrt.")
    pytest.importorskip("tensorrt_rtx")
    assert "TensorRT-RTX has no calibrators" in refusal(lambda: tensorrt_rtx.check(settings))


def test_an_unknown_tactic_source_is_answered_with_the_known_ones() -> None:
    class TacticSource(enum.IntEnum):
        CUDNN = 2
        EDGE_MASK_CONVOLUTIONS = 3

    chosen: list[int] = []
    api: Any = types.SimpleNamespace(TacticSource=TacticSource)
    config: Any = types.SimpleNamespace(set_tactic_sources=chosen.append)
    message = refusal(lambda: tensorrt_build.set_tactic_sources(api, config, ("cudnn", "cudn")))
    assert "`tactic_sources` cudn is not known; choose among cudnn, edge_mask" in message
    assert not chosen
    tensorrt_build.set_tactic_sources(api, config, ("edge_mask_convolutions", "cudnn"))
    assert chosen == [0b1100]


class Severity(enum.Enum):
    ERROR = 1


class CacheApi:
    """A TensorRT whose timing caches cannot be read."""

    ILogger = object
    __version__ = "8.6.0"

    def __init__(self, reason: str, *, strong: bool) -> None:
        flags = {"STRONGLY_TYPED": 1} if strong else {}
        self.NetworkDefinitionCreationFlag = types.SimpleNamespace(__members__=flags)
        self.reason = reason
        self.caches: list[bytes] = []
        """Contents of the caches that were set."""

    def create_timing_cache(self, content: bytes) -> bytes | None:
        if content:
            logger_of(cast(Any, self)).log(cast(Any, Severity.ERROR), self.reason)
        return None if content else content

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        self.caches.append(cache)
        return True


MYELIN = "1: Error Code 1: Myelin (Myelin error from unknown graph)"


def test_a_timing_cache_that_tensorrt_8_cannot_read_back_is_left_alone(tmp_path: Path) -> None:
    api: Any = CacheApi(MYELIN, strong=False)
    attach = functools.partial(
        tensorrt_build.attach_timing_cache, Flavour("tensorrt", "TensorRT", api), api
    )
    path = tmp_path / "timing.cache"
    assert attach(path), "a new one is written"
    path.write_bytes(b"what the first build wrote")
    with logged() as lines:
        assert not attach(path), "this one is not written again"
    assert "TensorRT 8.6.0 cannot read the timing cache" in lines[0]
    assert api.caches == [b"", b""]


@pytest.mark.parametrize(
    ("reason", "strong"), [("Serialization assertion magicTag failed", False), (MYELIN, True)]
)
def test_any_other_file_than_a_timing_cache_is_refused(
    reason: str, strong: bool, tmp_path: Path
) -> None:
    api: Any = CacheApi(reason, strong=strong)
    path = tmp_path / "timing.cache"
    path.write_bytes(b"something else")
    flavour = Flavour("tensorrt", "TensorRT", api)
    message = refusal(lambda: tensorrt_build.attach_timing_cache(flavour, api, path))
    assert "is not a timing cache of TensorRT 8.6.0" in message
    assert message.endswith("or remove this one.")
    assert not api.caches


# --- progress -----------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _shown(model: onnx.ModelProto, settings: BuildSettings, *, fails: bool = False) -> str:
    """Return a terminal's text of a build with a progress bar."""
    settings = dataclasses.replace(settings, progress=True)
    with contextlib.redirect_stderr(Terminal()) as terminal:
        if fails:
            assert "workspace" in refusal(lambda: plan_of(model, settings))
        else:
            plan_of(model, settings)
    return terminal.getvalue()


def test_one_bar_runs_to_the_end_and_is_closed() -> None:
    shown = _shown(detector(), T4)
    assert "100%" in shown
    assert shown.endswith("\n")
    assert shown.count("\n") == 1


def test_the_bar_is_closed_short_of_the_end_when_the_build_fails() -> None:
    shown = _shown(detector(), dataclasses.replace(T4, workspace_mib=1), fails=True)
    assert "0%" in shown
    assert "100%" not in shown
    assert shown.endswith("\n")
    assert shown.count("\n") == 1


def test_nothing_is_shown_off_a_terminal_or_where_it_is_not_wanted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan_of(detector(), dataclasses.replace(T4, progress=True))
    assert capsys.readouterr().err == ""
    with contextlib.redirect_stderr(Terminal()) as terminal:
        plan_of(detector(), T4)
    assert terminal.getvalue() == ""


def test_ctrl_c_stops_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    from tqdm import tqdm

    calls = iter([KeyboardInterrupt])

    def interrupt_once(*_: Any) -> None:
        for interruption in calls:
            raise interruption

    monkeypatch.setattr(tqdm, "update", interrupt_once)  # where Ctrl-C arrives, inside a callback
    with pytest.raises(KeyboardInterrupt):
        plan_of(detector())


# --- on a GPU -----------------------------------------------------------------------------------


@pytest.fixture
def engine(gpu_backend: Any, tmp_path: Path) -> Iterator[Engine]:
    path = tmp_path / "detector.trt"
    settings = BuildSettings(batch=BatchProfile(1, 2, 4), progress=False)
    path.write_bytes(gpu_backend.build(detector().SerializeToString(), settings))
    with gpu_backend.load(path, None, LoadOptions()) as loaded:
        yield loaded


def _reference(model: onnx.ModelProto, images: NDArray[Any]) -> dict[str, NDArray[Any]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"images": images}), strict=True))


def _images(batch: int, *, uint8: bool = False) -> NDArray[Any]:
    rng = np.random.default_rng(batch)
    if uint8:
        return rng.integers(0, 256, (batch, 32, 32, 3), dtype=np.uint8)
    return rng.random((batch, 3, 32, 32), dtype=np.float32)


@needs_gpu
@pytest.mark.parametrize("fp16", [False, True], ids=["fp32", "fp16"])
@pytest.mark.parametrize("uint8", [False, True], ids=["float32", "uint8"])
def test_outputs_equal_onnx_runtimes_at_every_batch_size(
    gpu_backend: Any, tmp_path: Path, uint8: bool, fp16: bool
) -> None:
    model = detector(uint8=uint8, fp16=fp16)
    path = tmp_path / "detector.trt"
    settings = BuildSettings(batch=BatchProfile(1, 2, 4), progress=False)
    path.write_bytes(gpu_backend.build(model.SerializeToString(), settings))
    with gpu_backend.load(path, None, LoadOptions()) as loaded:
        for batch in (4, 1, 2, 3, 2):
            images = _images(batch, uint8=uint8)
            found = loaded.infer(images)
            for name, wanted in _reference(model, images).items():
                # Box values reach 16, where numbers of 10 bits (half precision, and the TF32 that
                # TensorRT-RTX takes for float32) are 2 ** -7 apart.
                np.testing.assert_allclose(found[name], wanted, rtol=0, atol=0.05)


@needs_gpu
def test_an_engine_describes_itself_without_a_manifest(engine: Engine) -> None:
    device = _device()
    assert device is not None
    assert engine.device == device.name
    assert engine.batch == BatchProfile(1, 2, 4)
    assert engine.input.shape == (None, 3, 32, 32)
    assert engine.output_layout == "split"
    assert engine.class_names == ("class_0", "class_1")


@needs_gpu
def test_results_stay_as_they_are_when_the_next_batch_runs(engine: Engine) -> None:
    first = engine.infer(_images(2))
    kept = {name: value.copy() for name, value in first.items()}
    engine.resident_run(_images(3))()
    engine.infer(_images(4))
    for name, value in kept.items():
        np.testing.assert_array_equal(first[name], value)


@needs_gpu
def test_a_resident_run_takes_some_of_a_second_and_can_be_repeated(engine: Engine) -> None:
    run = engine.resident_run(_images(4))
    run()
    assert all(0 < run() < 0.1 for _ in range(20))


@needs_gpu
def test_an_output_allocator_gives_what_fixed_buffers_give(engine: Any) -> None:
    # A graph with NMS needs it; TensorRT-RTX has none, but takes an allocator for any output.
    from trt_yolov6.engines import load_engine

    # Where an output's place changes from run to run, no CUDA graph may hold the old one.
    options = LoadOptions(cuda_graph=False)
    with load_engine(engine.path, engine.backend, options) as loaded:
        late: Any = loaded
        wanted = {batch: late.infer(_images(batch)) for batch in (1, 4, 2)}
        for slot in late._slots:
            slot._allocate_late("scores")
        for batch, outputs in wanted.items():
            found = late.infer(_images(batch))
            for name, value in outputs.items():
                np.testing.assert_array_equal(found[name], value)


@needs_gpu
def test_a_batch_outside_the_profile_is_refused(engine: Engine) -> None:
    assert "1 to 4" in refusal(lambda: engine.infer(_images(5)))
    assert "1 to 4" in refusal(lambda: engine.resident_run(_images(5)))


@needs_gpu
def test_a_closed_engine_says_so(engine: Engine) -> None:
    run = engine.resident_run(_images(1))
    engine.close()
    engine.close()
    assert "closed" in refusal(lambda: engine.infer(_images(1)))
    assert "closed" in refusal(run)


@needs_gpu
@pytest.mark.parametrize("kept", [0, 20, 5000])
def test_a_plan_cut_short_is_refused(gpu_backend: Any, engine: Engine, kept: int) -> None:
    path = engine.path.with_name("short.trt")
    path.write_bytes(engine.path.read_bytes()[:kept])
    message = refusal(lambda: gpu_backend.load(path, None, LoadOptions()))
    assert "short.trt" in message
    assert "empty" in message or "cut short" in message
