"""`doctor` and what it knows of the machine: real answers of real tools, and broken packages."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from trt_yolov6.common import machine
from trt_yolov6.common.machine import Cpu, int8_on_cpu, parse_gpus, read_gpus
from trt_yolov6.diagnostics.doctor import diagnose, find_problems, format_diagnosis, remedy
from trt_yolov6.engines import BACKENDS, best_backend
from trt_yolov6.engines.base import Availability
from trt_yolov6.errors import install_command

ROOT = Path(__file__).parents[1]

# What nvidia-smi 580.159.04 answered on an H200, idle.
H200 = (
    "NVIDIA H200, 580.159.04, 9.0, 143771, 1980, 1980, 3201, 3201, 700.00, Enabled, "
    "0x0000000000000001\n"
)


def doctor_beside(stubs: Path, code: str = "") -> str:
    """Run `doctor` in a fresh interpreter that finds the packages in `stubs` first."""
    script = (
        "from trt_yolov6.diagnostics.doctor import diagnose, format_diagnosis\n"
        f"print(format_diagnosis(diagnose()))\n{code}"
    )
    search = os.pathsep.join([str(stubs), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": search},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout


def on_path(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put a shell script on the path as `nvidia-smi`."""
    program = folder / "nvidia-smi"
    program.write_text("#!/bin/sh\n" + script)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


def test_the_diagnosis_of_this_machine_agrees_with_what_is_installed() -> None:
    diagnosis = diagnose()
    assert diagnosis.python == platform.python_version()
    assert diagnosis.packages["numpy"] == importlib.metadata.version("numpy")
    assert diagnosis.problems == ()
    assert [state.backend for state in diagnosis.backends] == list(BACKENDS)
    assert diagnosis.auto_build == best_backend()
    assert diagnosis.auto_run[".onnx"] == "onnxruntime"
    assert diagnosis.cpu.threads == len(os.sched_getaffinity(0))
    value = json.loads(json.dumps(diagnosis.to_json()))
    assert value["backends"][-1]["backend"] == "onnxruntime"
    assert value["backends"][-1]["can_run"] is True
    text = format_diagnosis(diagnosis)
    for expected in (*BACKENDS, platform.python_version(), f"auto builds with {best_backend()}"):
        assert expected in text


def test_doctor_imports_nothing_that_takes_seconds(tmp_path: Path) -> None:
    output = doctor_beside(tmp_path, "import sys; print('torch' in sys.modules)")
    assert output.splitlines()[-1] == "False"


def test_packages_that_break_when_imported_are_reported(tmp_path: Path) -> None:
    for package in ("onnxruntime", "tensorrt", "tensorrt_rtx", "cv2"):
        (tmp_path / f"{package}.py").write_text(f"raise OSError('lib{package}.so is missing')")
    output = doctor_beside(tmp_path)
    lines = output.splitlines()
    problems = [line for line in lines if line.startswith("PROBLEM")]
    assert len(problems) == 2
    for package in ("onnxruntime", "cv2"):
        assert any(f"lib{package}.so is missing" in line for line in problems)
    assert sum("does not work here" in line for line in lines) == len(BACKENDS)
    assert "--backend auto builds with nothing here" in output
    assert install_command("tensorrt") in output
    assert "pip install --force-reinstall onnxruntime" in output


def test_a_required_package_that_is_absent_is_a_problem_with_its_install_line() -> None:
    problems = find_problems({"numpy": "numpy", "no-such-thing": "no_such_thing"})
    assert len(problems) == 1
    assert problems[0].endswith("pip install --force-reinstall no-such-thing")


GPU = parse_gpus(H200)
TENSORRT = install_command("tensorrt")
TENSORRT_RTX = install_command("tensorrt-rtx")
OLD_DRIVER = "there is no NVIDIA driver, or it is too old for this CUDA"


@pytest.mark.parametrize(
    ("available", "packages", "gpus", "expected"),
    [
        # Everything works: nothing to say.
        (Availability("tensorrt", True, True, "11.0", "NVIDIA H200"), {}, GPU, ""),
        (Availability("onnxruntime", True, True, "1.32", "providers: cpu"), {}, (), ""),
        (Availability("onnxruntime", True, True, "1.32", "providers: cuda, cpu"), {}, GPU, ""),
        # A GPU, but not the package.
        (
            Availability("tensorrt", False, False, None, "TensorRT does not import"),
            {},
            GPU,
            TENSORRT,
        ),
        # No GPU either.
        (
            Availability("tensorrt", False, False, None, "TensorRT does not import"),
            {},
            (),
            f"to build and run: an NVIDIA GPU with its driver, then {TENSORRT}",
        ),
        (
            Availability("tensorrt-rtx", False, False, None, "TensorRT-RTX does not import"),
            {},
            (),
            f"to build for other machines: {TENSORRT_RTX}; "
            "to run: an NVIDIA GPU with its driver too",
        ),
        # A GPU whose driver is of CUDA 12, and cuda-python of CUDA 13.
        (
            Availability("tensorrt", False, False, "8.6.0", OLD_DRIVER),
            {},
            GPU,
            "a newer driver of the GPU; or for a driver of CUDA 12: "
            'pip install "cuda-python==12.*" nvidia-cuda-nvrtc-cu12',
        ),
        (
            Availability("tensorrt-rtx", True, False, "1.7.1", OLD_DRIVER),
            {},
            GPU,
            "a newer driver of the GPU",
        ),
        # A GPU, but not the libraries of CUDA.
        (
            Availability(
                "onnxruntime",
                True,
                True,
                "1.32",
                "providers: cuda, cpu; cuda does not load (libcublasLt.so.13: cannot open)",
            ),
            {"onnxruntime-gpu": "1.32"},
            GPU,
            'for the GPU: pip install "onnxruntime-gpu[cuda,cudnn]"',
        ),
        # A GPU that ONNX Runtime does not use.
        (
            Availability("onnxruntime", True, True, "1.32", "providers: cpu"),
            {"onnxruntime": "1.32"},
            GPU,
            "for the GPU: pip uninstall -y onnxruntime && pip install onnxruntime-gpu",
        ),
        (
            Availability("onnxruntime", True, True, "1.32", "providers: cpu"),
            {"onnxruntime": "1.32", "onnxruntime-gpu": "1.32"},
            GPU,
            "for the GPU: onnxruntime covers onnxruntime-gpu; pip uninstall -y onnxruntime "
            "onnxruntime-gpu && pip install onnxruntime-gpu",
        ),
    ],
)
def test_each_missing_piece_has_its_install_line(
    available: Availability,
    packages: dict[str, str | None],
    gpus: tuple[machine.Gpu, ...],
    expected: str,
) -> None:
    assert remedy(available, packages, gpus, python=(3, 11)) == expected


def test_tensorrt_8_is_offered_where_its_package_exists_only() -> None:
    absent = Availability("tensorrt", False, False, None, "TensorRT does not import")
    assert install_command("tensorrt8") in remedy(absent, {}, GPU, python=(3, 10))
    assert install_command("tensorrt8") in remedy(absent, {}, (), python=(3, 10))
    assert "tensorrt8" not in remedy(absent, {}, GPU, python=(3, 11))
    # Of TensorRT-RTX there is no such release.
    rtx = Availability("tensorrt-rtx", False, False, None, "TensorRT-RTX does not import")
    assert "tensorrt8" not in remedy(rtx, {}, GPU, python=(3, 10))


def test_an_installed_tensorrt_8_lacks_the_gpu_only(tmp_path: Path) -> None:
    pytest.importorskip("cuda.bindings")
    (tmp_path / "tensorrt.py").write_text('__version__ = "8.6.0"')
    output = doctor_beside(tmp_path)
    line = next(line for line in output.splitlines() if line.startswith("  tensorrt "))
    if read_gpus():
        assert "builds and runs 8.6.0" in line
    else:
        assert "does not work here 8.6.0" in line
        assert "import" not in line
        assert "-> to build and run: an NVIDIA GPU with its driver\n" in output


def test_the_extra_of_tensorrt_8_is_one_release_with_the_libraries_it_links() -> None:
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = project["optional-dependencies"]["tensorrt8"]
    # Without a marker, so that pip refuses the extra on a Python that has no such package.
    assert "tensorrt==8.6.0" in extra
    assert any(item.startswith("nvidia-cudnn-cu12") and "<9" in item for item in extra)
    assert any(item.startswith("nvidia-cublas-cu12") for item in extra)


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "onnxruntime"])
def test_the_extra_an_install_line_names_exists(name: str) -> None:
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    line = remedy(Availability(name, False, False, None, ""), {}, GPU)
    assert line.split("[")[1].split("]")[0] in project["optional-dependencies"]


# --- the machine


def test_the_answer_of_a_real_gpu_is_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_path(tmp_path, monkeypatch, f'echo "0, GPU-1a2b, {H200.strip()}"')
    (gpu,) = read_gpus()
    assert (gpu.name, gpu.driver, gpu.compute_capability) == ("NVIDIA H200", "580.159.04", "9.0")
    assert (gpu.sm_mhz, gpu.sm_max_mhz, gpu.memory_mhz) == (1980, 1980, 3201)
    assert (gpu.power_limit_w, gpu.persistence, gpu.slowed_by) == (700.0, True, ())


@pytest.mark.parametrize(
    ("visible", "clocks"),
    [
        (None, [300, 1500, 900]),
        ("1", [1500]),
        ("2, 0", [900, 300]),
        ("GPU-b", [1500]),
        ("0,7,1", [300]),
        ("-1", []),
        ("", []),
        ("MIG-GPU-b/1/0", [300, 1500, 900]),
    ],
)
def test_gpus_are_those_that_cuda_shows_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, clocks: list[int]
) -> None:
    # As NVIDIA's programming guide has CUDA_VISIBLE_DEVICES: numbers or the beginnings of UUIDs;
    # of several, those in front of the first that there is not.
    lines = [
        f"{index}, GPU-{'abc'[index]}0, A100, 580.1, 8.0, 81920, {mhz}, 1980, 1, 1, 400, Enabled, 0"
        for index, mhz in enumerate((300, 1500, 900))
    ]
    on_path(tmp_path, monkeypatch, "\n".join(f"echo '{line}'" for line in lines))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpu.sm_mhz for gpu in read_gpus()] == clocks


def test_gpu_fields_that_are_not_supported_are_unknown_and_slowdowns_are_named() -> None:
    (gpu,) = parse_gpus("GeForce, 535.1, 7.5, 8192, 300, [N/A], 405, 7001, [N/A], Disabled, 0x24\n")
    assert (gpu.sm_max_mhz, gpu.power_limit_w, gpu.persistence) == (None, None, False)
    assert gpu.slowed_by == ("power limit", "software thermal limit")


@pytest.mark.parametrize(
    "script", ["exit 9", "echo 'Unable to determine the device handle'", "kill $$", "sleep 5"]
)
def test_an_nvidia_smi_that_fails_means_no_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    on_path(tmp_path, monkeypatch, script)
    assert read_gpus(timeout=0.5) == ()


@pytest.mark.parametrize(
    ("sets", "start"),
    [
        (("avx2", "avx512f", "avx512_vnni"), "has VNNI"),
        (("avx2", "fma"), "has no VNNI"),
        (("asimd", "asimddp"), "has dot products"),
        ((), "unknown"),
    ],
)
def test_what_int8_does_follows_from_the_instruction_sets(
    sets: tuple[str, ...], start: str
) -> None:
    cpu = Cpu("a CPU", "x86_64", 2, 2, None, sets)
    assert int8_on_cpu(cpu).startswith(start)


@pytest.mark.parametrize(
    ("text", "cores"),
    [
        ("max 100000", None),
        ("200000 100000", 2.0),
        ("50000 100000", 0.5),
        ("", None),
        (None, None),
    ],
)
def test_a_containers_cpu_limit_is_read_from_cgroup_v2(
    text: str | None, cores: float | None
) -> None:
    assert machine.cgroup_quota(text) == cores


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="Linux only")
def test_the_cpu_is_described_as_lscpu_does() -> None:
    try:
        output = subprocess.run(["lscpu"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        pytest.skip("no lscpu")
    fields = dict(line.split(":", 1) for line in output.splitlines() if ":" in line)
    cpu = machine.describe_cpu()
    if "Model name" in fields and fields["Model name"].strip() != "-":
        assert cpu.model == fields["Model name"].strip()
    assert cpu.architecture == fields["Architecture"].strip()
    assert set(cpu.instruction_sets) <= set(fields.get("Flags", "").split())
