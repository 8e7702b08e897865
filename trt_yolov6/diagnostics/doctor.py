"""Which backends work on this machine, and what each missing one needs.

Nothing here raises: a broken package is a finding, not a failure.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import platform
import sys
from dataclasses import dataclass
from typing import Any

import trt_yolov6
from trt_yolov6.common import machine
from trt_yolov6.common.text import aligned, joined, of_highest
from trt_yolov6.engines import BACKENDS, backend, best_backend
from trt_yolov6.engines.base import Availability
from trt_yolov6.engines.tensorrt.flavour import FIRST_WITH_FP8
from trt_yolov6.errors import install_command

# What this package needs, by distribution, and the module that shows whether it works.
_REQUIRED = {
    "numpy": "numpy",
    "onnx": "onnx",
    "onnx-graphsurgeon": "onnx_graphsurgeon",
    "onnxruntime": "onnxruntime",
    "opencv-python-headless": "cv2",
    "pycocotools": "pycocotools.mask",
    "tqdm": "tqdm",
    "msgspec": "msgspec",
    "torch": "torch",
    "onnxscript": "onnxscript",
}
# Importing these takes seconds, so it is only checked that they are there.
_SLOW_TO_IMPORT = ("torch", "onnxscript")


@dataclass(frozen=True)
class Diagnosis:
    """Capabilities of this machine."""

    version: str
    """Version of this package."""
    python: str
    executable: str
    system: str
    cpu: machine.Cpu
    cpu_clock: machine.CpuClock
    int8_on_cpu: str
    """Effect of the CPU's INT8 instructions on convolutions."""
    gpus: tuple[machine.Gpu, ...]
    packages: dict[str, str | None]
    """Installed version by distribution, None where absent."""
    problems: tuple[str, ...]
    """Required packages that are missing or do not import, a line each."""
    backends: tuple[Availability, ...]
    """In the order in which `--backend auto` prefers them."""
    auto_build: str | None
    """The backend that `build --backend auto` takes; None if none works."""
    auto_run: dict[str, str | None]
    """The backend that runs an engine without a manifest, by its suffix."""

    def to_json(self) -> dict[str, Any]:
        """Return everything as a JSON-ready dict."""
        return dataclasses.asdict(self)


def diagnose() -> Diagnosis:
    """Look at the machine, the packages and every backend; takes about a second."""
    cpu = machine.describe_cpu()
    gpus = machine.read_gpus()
    packages = machine.package_versions()
    states = tuple(
        dataclasses.replace(state, remedy=remedy(state, packages, gpus))
        for state in map(_availability, BACKENDS)
    )
    running = [state.backend for state in states if state.can_run]
    return Diagnosis(
        version=trt_yolov6.__version__,
        python=platform.python_version(),
        executable=sys.executable,
        system=machine.system_name(),
        cpu=cpu,
        cpu_clock=machine.read_cpu_clock(),
        int8_on_cpu=machine.int8_on_cpu(cpu),
        gpus=gpus,
        packages=packages,
        problems=find_problems(_REQUIRED),
        backends=states,
        auto_build=_auto_build(),
        auto_run={
            ".onnx": "onnxruntime" if "onnxruntime" in running else None,
            ".trt": next((name for name in running if name != "onnxruntime"), None),
        },
    )


def format_diagnosis(diagnosis: Diagnosis) -> str:
    """Return a diagnosis as text for a terminal."""
    installed = [f"{name} {text}" for name, text in diagnosis.packages.items() if text]
    absent = [name for name, text in diagnosis.packages.items() if not text]
    rows = [
        ("trt-yolov6", diagnosis.version),
        ("Python", f"{diagnosis.python} at {diagnosis.executable}"),
        ("system", diagnosis.system),
        ("CPU", _cpu_text(diagnosis.cpu, diagnosis.cpu_clock)),
        ("INT8 on it", diagnosis.int8_on_cpu),
        ("", "(ONNX Runtime engines compute Q/DQ graphs in float: exact anywhere, but no faster)"),
        *(("GPU", _gpu_text(gpu)) for gpu in diagnosis.gpus),
        *(
            ()
            if diagnosis.gpus
            else (("GPU", "none that nvidia-smi lists and CUDA_VISIBLE_DEVICES leaves"),)
        ),
        ("installed", ", ".join(installed) or "nothing"),
        ("absent", ", ".join(absent) or "nothing"),
        *(("PROBLEM", problem) for problem in diagnosis.problems),
    ]
    lines = [*aligned(rows, left=2), "", "backends, best first"]
    width = max((len(state.backend) for state in diagnosis.backends), default=0)
    for state in diagnosis.backends:
        version = f" {state.version}" if state.version else ""
        lines.append(f"  {state.backend:{width}}  {_abilities(state)}{version}: {state.detail}")
        if state.remedy:
            lines.append(f"  {' ' * width}  -> {state.remedy}")
    runs = ", ".join(
        f"{suffix} with {name or 'nothing here'}" for suffix, name in diagnosis.auto_run.items()
    )
    lines += [
        "",
        f"--backend auto builds with {diagnosis.auto_build or 'nothing here'}; runs {runs}",
    ]
    return "\n".join(lines)


def remedy(
    available: Availability,
    packages: dict[str, str | None],
    gpus: tuple[machine.Gpu, ...],
    python: tuple[int, int] = sys.version_info[:2],
) -> str:
    """Return a line of advice that makes a backend work, or work on the GPU; empty if it does.

    Args:
        available: the backend's own report.
        packages: installed versions, by distribution.
        gpus: the GPUs of this machine.
        python: version of Python, on which depends whether there is a TensorRT 8 to install.
    """
    name = available.backend
    if name == "onnxruntime":
        if not available.can_run:
            return "pip install --force-reinstall onnxruntime"
        if gpus and "cuda does not load" in available.detail:
            return 'for the GPU: pip install "onnxruntime-gpu[cuda,cudnn]"'
        if gpus and "cuda" not in available.detail:
            if packages.get("onnxruntime-gpu"):
                return (
                    "for the GPU: onnxruntime covers onnxruntime-gpu; pip uninstall -y onnxruntime "
                    "onnxruntime-gpu && pip install onnxruntime-gpu"
                )
            return "for the GPU: pip uninstall -y onnxruntime && pip install onnxruntime-gpu"
        return ""
    install = install_command(name)  # the extras are named as the backends are
    if name == "tensorrt" and python < (3, 11):
        install += f" (or, for TensorRT 8.6, {install_command('tensorrt8')})"
    if available.can_build and available.can_run:
        return ""
    # RTX builds on machines without a GPU, so there the package alone is worth installing.
    missing = available.version is None or not _is_importable("cuda.bindings")
    if gpus and "too old for this CUDA" in available.detail:
        older = 'for a driver of CUDA 12: pip install "cuda-python==12.*" nvidia-cuda-nvrtc-cu12'
        return "a newer driver of the GPU" + (f"; or {older}" if name == "tensorrt" else "")
    if gpus:
        return install if missing else ""
    gpu = "an NVIDIA GPU with its driver"
    if missing and name == "tensorrt-rtx" and not available.can_build:
        return f"to build for other machines: {install}; to run: {gpu} too"
    what = "run" if available.can_build else "build and run"
    return f"to {what}: {gpu}" + (f", then {install}" if missing else "")


def find_problems(required: dict[str, str]) -> tuple[str, ...]:
    """Return a line for each package that is absent or whose module does not import."""
    problems = []
    for distribution, module in required.items():
        if module in _SLOW_TO_IMPORT:
            if not _is_importable(module):
                problems.append(f"{distribution} is not installed: pip install {distribution}")
            continue
        try:
            importlib.import_module(module)
        except Exception as error:  # broken packages raise anything
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            problems.append(
                f"{distribution} does not import ({reason}): "
                f"pip install --force-reinstall {distribution}"
            )
    return tuple(problems)


def _availability(name: str) -> Availability:
    try:
        found = backend(name).availability()
        if name == "onnxruntime" and found.can_run:
            # Beyond what is there: whether it loads.
            from trt_yolov6.engines.onnxruntime.providers import obstacle, usable

            against = {short: obstacle(short) for short in usable()}
            reasons = [f"; {short} does not load ({why})" for short, why in against.items() if why]
            found = dataclasses.replace(found, detail=found.detail + "".join(reasons))
        return found
    except Exception as error:  # the module itself may need something that is broken
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        return Availability(name, False, False, None, f"does not load ({reason})")


def _auto_build() -> str | None:
    try:
        return best_backend()
    except Exception:  # none works, or as in _availability
        return None


def _is_importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _abilities(available: Availability) -> str:
    if available.can_build and available.can_run:
        return "builds and runs"
    if available.can_build:
        return "builds only"
    return "runs only" if available.can_run else "does not work here"


def _cpu_text(cpu: machine.Cpu, clock: machine.CpuClock) -> str:
    return joined(
        cpu.model,
        cpu.architecture,
        cpu.cores is not None and f"{cpu.cores} cores",
        f"{cpu.threads} threads",
        cpu.quota is not None and f"limited to {cpu.quota:g} cores' time",
        clock.mhz is not None and f"{of_highest(clock.mhz, clock.max_mhz)} MHz",
        " ".join(cpu.instruction_sets),
    )


def has_fp8(capability: str) -> bool:
    """Return whether GPUs of a compute capability, such as `8.9`, compute in FP8."""
    version = tuple(int(part) for part in capability.split(".") if part.isdigit())
    return version >= FIRST_WITH_FP8


def _gpu_text(gpu: machine.Gpu) -> str:
    capability = gpu.compute_capability
    return joined(
        gpu.name,
        capability and f"compute capability {capability}",
        capability and ("FP8" if has_fp8(capability) else "no FP8"),
        gpu.memory_mib and f"{gpu.memory_mib} MiB",
        f"driver {gpu.driver or 'unknown'}",
        gpu.sm_max_mhz and f"up to {gpu.sm_max_mhz} MHz",
        gpu.power_limit_w and f"power limit {gpu.power_limit_w:.0f} W",
    )
