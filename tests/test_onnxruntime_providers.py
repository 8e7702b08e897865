"""ONNX Runtime's providers start or are refused with a reason; its threads keep to their cores."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import onnxruntime
import pytest
from support.tiny_detector import load_tiny

from trt_yolov6.engines import LoadOptions, load_engine
from trt_yolov6.engines.onnxruntime import providers
from trt_yolov6.errors import MissingDependencyError

linux = pytest.mark.skipif(sys.platform != "linux", reason="libraries are named as on Linux")
on_cpu = pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(),
    reason="this ONNX Runtime has CUDA's provider",
)


@linux
def test_it_reports_to_nobody_and_leaves_the_home_folder_alone(tmp_path: Path) -> None:
    kept = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    code = "import trt_yolov6.engines.onnxruntime.backend as b; assert b.availability().can_run"
    subprocess.run([sys.executable, "-c", code], env=kept, check=True)
    assert [path.name for path in tmp_path.rglob("*")] == []
    chosen = {**kept, "ORT_DISABLE_TELEMETRY": "0"}
    code = "import os, trt_yolov6; assert os.environ['ORT_DISABLE_TELEMETRY'] == '0'"
    subprocess.run([sys.executable, "-c", code], env=chosen, check=True)


@pytest.fixture
def broken_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """ONNX Runtime as with onnxruntime-gpu whose library for CUDA the loader refuses."""
    capi = tmp_path / "onnxruntime" / "capi"
    capi.mkdir(parents=True)
    shared = next(Path(onnxruntime.__file__).parent.rglob("libonnxruntime_providers_shared.so"))
    (capi / shared.name).write_bytes(shared.read_bytes())
    (capi / "libonnxruntime_providers_cuda.so").write_text("not machine code, and long enough " * 9)
    monkeypatch.setattr(onnxruntime, "__file__", str(capi.parent / "__init__.py"))
    monkeypatch.setattr(
        onnxruntime,
        "get_available_providers",
        lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
    )
    providers.obstacle.cache_clear()
    yield capi
    providers.obstacle.cache_clear()


@on_cpu
def test_without_cuda_the_cpu_is_taken_and_cuda_is_refused() -> None:
    assert providers.usable() == ("cpu",)
    assert providers.providers_for(None) == ["CPUExecutionProvider"]
    assert providers.providers_for("cpu") == ["CPUExecutionProvider"]
    with pytest.raises(MissingDependencyError, match="install onnxruntime-gpu"):
        providers.providers_for("cuda")


@linux
def test_a_library_that_does_not_load_is_refused_with_the_loaders_words(broken_cuda: Path) -> None:
    reason = providers.obstacle("cuda")
    assert reason is not None
    assert "libonnxruntime_providers_cuda.so: invalid ELF header" in reason
    with pytest.raises(MissingDependencyError, match=r"invalid ELF header.*pip install") as raised:
        providers.providers_for("cuda")
    assert onnxruntime.__version__ in str(raised.value)
    assert "\n" not in str(raised.value)


@linux
def test_an_engine_on_the_cpu_says_why_it_is_not_on_the_gpu(
    broken_cuda: Path, tmp_path: Path
) -> None:
    path = load_tiny(tmp_path).path
    engine = load_engine(path)
    assert engine.note.startswith("on the CPU, for CUDA's provider does not start")
    assert "invalid ELF header" in engine.note
    assert engine.computed_in is None  # a note says how, it does not mean another precision
    assert load_engine(path, options=LoadOptions(provider="cpu")).note == ""
    with pytest.raises(MissingDependencyError, match="does not load"):
        load_engine(path, options=LoadOptions(provider="cuda"))


@linux
def test_a_provider_without_a_library_of_its_own_has_no_obstacle(tmp_path: Path) -> None:
    assert providers.loader_says(tmp_path, "cuda") is None
    assert providers.obstacle("cpu") is None


@pytest.mark.parametrize("wanted", ["cuda", "tensorrt"])
def test_a_session_that_fell_back_to_the_cpu_is_refused(wanted: str) -> None:
    with pytest.raises(MissingDependencyError, match="would use CPUExecutionProvider"):
        providers.check_started(wanted, "CPUExecutionProvider")


def test_a_session_where_it_was_asked_for_is_taken() -> None:
    providers.check_started("cuda", "CUDAExecutionProvider")
    providers.check_started(None, "CPUExecutionProvider")


def test_looking_for_cudas_libraries_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    providers.load_cuda_libraries()
    assert capsys.readouterr() == ("", "")


@linux
def test_the_libraries_of_nvidias_wheels_are_found() -> None:
    pytest.importorskip("nvidia", reason="needs a wheel of NVIDIA's, such as nvidia-cuda-nvrtc")
    files = [file.name for folder in providers.library_folders() for file in folder.iterdir()]
    assert any(name.startswith("lib") and ".so" in name for name in files)


@linux
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="there is one core")
def test_no_thread_runs_where_the_process_may_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Tests have one thread a session otherwise.
    plain = onnxruntime.capi.onnxruntime_pybind11_state.SessionOptions
    monkeypatch.setattr(onnxruntime, "SessionOptions", plain)

    def threads() -> set[str]:
        return set(os.listdir("/proc/self/task"))

    allowed, earlier = os.sched_getaffinity(0), threads()
    core = min(allowed)
    os.sched_setaffinity(0, {core})
    try:
        with load_tiny(tmp_path):
            found = {
                number
                for thread in threads() - earlier
                for number in os.sched_getaffinity(int(thread))
            }
    finally:
        os.sched_setaffinity(0, allowed)
    assert found <= {core}
