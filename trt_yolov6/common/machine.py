"""Describe this machine: processor, clocks, GPUs, package versions (for benchmarks and `doctor`).

Nothing here raises: what cannot be found out is None, or left out.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import importlib.util
import math
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import trt_yolov6

PACKAGES = (
    "numpy",
    "torch",
    "onnx",
    "onnxscript",
    "onnx-graphsurgeon",
    "onnxruntime",
    "onnxruntime-gpu",
    "opencv-python-headless",
    "pycocotools",
    "tqdm",
    "PyYAML",
    "tensorrt",
    "tensorrt-rtx-cu13",
    "cuda-python",
    "nvidia-nvimgcodec-cu13",
)
"""Distributions this package uses, required and optional."""

# Instruction sets that decide how fast, and for INT8 how exactly, a CPU convolves.
_INSTRUCTION_SETS = (
    *("sse4_1", "avx", "avx2", "fma", "f16c"),
    *("avx512f", "avx512bw", "avx512_bf16", "avx512_fp16"),
    *("avx_vnni", "avx512_vnni", "amx_int8", "amx_bf16"),
    *("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve"),
)

# Bits of NVML's clock event reasons that mean a GPU runs slower than it could.
_SLOWDOWNS = {
    0x04: "power limit",
    0x08: "hardware slowdown",
    0x20: "software thermal limit",
    0x40: "hardware thermal limit",
    0x80: "power brake",
}

# Names of `nvidia-smi --query-gpu` fields; the older name of the last is known to all drivers.
_GPU_FIELDS = (
    "name",
    "driver_version",
    "compute_cap",
    "memory.total",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "clocks.max.mem",
    "power.limit",
    "persistence_mode",
    "clocks_throttle_reasons.active",
)


@dataclass(frozen=True)
class Cpu:
    """The processor, as far as this process may use it."""

    model: str
    architecture: str
    """Machine type, such as `x86_64` or `aarch64`."""
    cores: int | None
    """Physical cores this process may run on."""
    threads: int
    """Hardware threads this process may run on."""
    quota: float | None
    """CPU time a control group (a container) allows, in cores; None where it sets no limit."""
    instruction_sets: tuple[str, ...]
    """Instruction sets of interest, in the kernel's spelling; empty where unknown."""


@dataclass(frozen=True)
class CpuClock:
    """Clock of the fastest core when it was read, in MHz, and what governs it."""

    mhz: float | None
    max_mhz: float | None
    governor: str | None


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU, its clocks in MHz when they were read, and its limits."""

    name: str
    driver: str | None
    compute_capability: str | None
    memory_mib: int | None
    sm_mhz: int | None
    sm_max_mhz: int | None
    memory_mhz: int | None
    memory_max_mhz: int | None
    power_limit_w: float | None
    persistence: bool | None
    slowed_by: tuple[str, ...]
    """Reasons for throttled clocks at the time of reading; empty without any."""


def cpu_model() -> str:
    """Return the processor's name, on Linux that of /proc/cpuinfo."""
    name = _cpuinfo().get("model name")
    return name[0] if name else platform.processor() or platform.machine()


def describe_cpu() -> Cpu:
    """Return the processor and the share of it that this process may use."""
    cpuinfo = _cpuinfo()
    flags = set((cpuinfo.get("flags") or cpuinfo.get("Features") or [""])[0].split())
    usable = usable_cpus()
    siblings = {
        _read(f"/sys/devices/system/cpu/cpu{index}/topology/thread_siblings_list")
        for index in usable
    }
    return Cpu(
        model=cpu_model(),
        architecture=platform.machine(),
        cores=None if None in siblings or not siblings else len(siblings),
        threads=len(usable) or os.cpu_count() or 1,
        quota=cgroup_quota(_read("/sys/fs/cgroup/cpu.max")),
        instruction_sets=tuple(name for name in _INSTRUCTION_SETS if name in flags),
    )


def int8_on_cpu(cpu: Cpu) -> str:
    """Return one line: what this processor's own INT8 instructions do to convolutions."""
    flags = set(cpu.instruction_sets)
    if flags & {"avx_vnni", "avx512_vnni", "amx_int8"}:
        return "has VNNI: products of 8 bits are added in 32 bits, as on TensorRT"
    if flags & {"asimddp", "i8mm"}:
        return "has dot products: those of 8 bits are added in 32 bits, as on TensorRT"
    if flags & {"avx2", "sse4_1"}:
        return "has no VNNI: products of 8 bits saturate in 16 bits, which can ruin accuracy"
    return "unknown: the system does not say which instructions this processor has"


def read_cpu_clock() -> CpuClock:
    """Read the fastest core's clock, the highest it may have, and the governor's name."""
    frequency = "/sys/devices/system/cpu/cpu0/cpufreq/"
    cores = (_number(value) for value in _cpuinfo().get("cpu MHz", ()))
    current_khz = _number(_read(frequency + "scaling_cur_freq"))
    highest_khz = _number(_read(frequency + "cpuinfo_max_freq"))
    return CpuClock(
        mhz=max(
            (mhz for mhz in cores if mhz is not None),
            default=current_khz / 1000 if current_khz else None,
        ),
        max_mhz=highest_khz / 1000 if highest_khz else None,
        governor=_read(frequency + "scaling_governor"),
    )


def read_gpus(timeout: float = 10.0) -> tuple[Gpu, ...]:
    """Ask `nvidia-smi`, which comes with every driver, for the GPUs and their present clocks.

    They are those that CUDA_VISIBLE_DEVICES leaves, in its order; its numbers are nvidia-smi's, as
    among equal GPUs or with CUDA_DEVICE_ORDER=PCI_BUS_ID. There are none without a GPU, a driver or
    an answer within `timeout` seconds.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    fields = ",".join(("index", "uuid", *_GPU_FIELDS))
    command = [program, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    gpus = [line.split(",", 2) for line in answer.splitlines() if line.count(",") > 1]
    return parse_gpus("\n".join(_visible(gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))))


def _visible(gpus: list[list[str]], chosen: str | None) -> Iterator[str]:
    """Yield the facts of GPUs, each given with its number and UUID, that CUDA shows a process."""
    if chosen is None or "MIG-" in chosen:  # a part of a GPU has another UUID
        yield from (facts for *_, facts in gpus)
        return
    for name in map(str.strip, chosen.split(",")):
        same = [
            facts
            for index, uuid, facts in gpus
            if name == index.strip() or (name.startswith("GPU-") and uuid.strip().startswith(name))
        ]
        if not same:  # CUDA leaves out what follows, too
            return
        yield same[0]


def parse_gpus(answer: str) -> tuple[Gpu, ...]:
    """Parse `nvidia-smi`'s comma-separated answer; a field it does not support becomes None."""
    gpus = []
    for line in answer.splitlines():
        values = [value.strip() for value in line.split(",")]
        if len(values) != len(_GPU_FIELDS):
            continue
        name, driver, capability, memory, sm, sm_max, mem, mem_max, power, persistence, reasons = (
            None if "N/A" in value or "Not Supported" in value else value for value in values
        )
        bits = 0
        with contextlib.suppress(ValueError):
            bits = int(reasons or "0", 16)
        gpus.append(
            Gpu(
                name=name or "unknown GPU",
                driver=driver,
                compute_capability=capability,
                memory_mib=_integer(memory),
                sm_mhz=_integer(sm),
                sm_max_mhz=_integer(sm_max),
                memory_mhz=_integer(mem),
                memory_max_mhz=_integer(mem_max),
                power_limit_w=_number(power),
                persistence=None if persistence is None else persistence == "Enabled",
                slowed_by=tuple(text for bit, text in _SLOWDOWNS.items() if bits & bit),
            )
        )
    return tuple(gpus)


def timestamp() -> str:
    """Return the time, such as `2026-11-25T04:30:00+00:00` (ISO 8601, with the offset from UTC)."""
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def cpu_wait_seconds() -> float | None:
    """Return the seconds that this process's threads have waited for a processor so far.

    It is the sum over the live threads, which Linux counts; None elsewhere. Its growth while an
    engine runs is time that other processes took.
    """
    total = 0
    try:
        threads = os.listdir("/proc/self/task")
    except OSError:
        return None
    for thread in threads:
        try:
            with open(f"/proc/self/task/{thread}/schedstat", "rb") as file:
                total += int(file.read().split()[1])
        except (OSError, ValueError, IndexError):
            if thread == str(os.getpid()):
                return None  # no such count at all; another thread may just have ended
    return total * 1e-9


def nvidia_folders() -> list[Path]:
    """Return the folders below which NVIDIA's wheels have their libraries, if there are any."""
    found = importlib.util.find_spec("nvidia")
    return [Path(folder) for folder in (found.submodule_search_locations or ())] if found else []


def system_name() -> str:
    """Return the operating system and its kernel, such as `Debian GNU/Linux 12, Linux 6.1.0`."""
    kernel = f"{platform.system()} {platform.release()}"
    try:
        return f"{platform.freedesktop_os_release()['PRETTY_NAME']}, {kernel}"
    except (OSError, KeyError):
        return kernel


def package_versions(names: Iterable[str] = PACKAGES) -> dict[str, str | None]:
    """Return the installed version of each distribution, or None; nothing is imported."""
    versions: dict[str, str | None] = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except Exception:  # damaged metadata raises more than PackageNotFoundError
            versions[name] = None
    return versions


def software_versions() -> dict[str, str]:
    """Return the versions that belong to a measurement: package, Python, NumPy, system."""
    return {
        "trt-yolov6": trt_yolov6.__version__,
        "python": platform.python_version(),
        "numpy": package_versions(("numpy",))["numpy"] or "unknown",
        "os": system_name(),
    }


def _cpuinfo() -> dict[str, list[str]]:
    """Return /proc/cpuinfo as one list of values a key."""
    values: dict[str, list[str]] = {}
    for line in (_read("/proc/cpuinfo") or "").splitlines():
        key, colon, value = line.partition(":")
        if colon:
            values.setdefault(key.strip(), []).append(value.strip())
    return values


def usable_cpus() -> list[int]:
    """Return the numbers of the cores that this process may use."""
    try:
        return sorted(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # only Linux has it
        return list(range(os.cpu_count() or 1))


@contextlib.contextmanager
def single_torch_thread() -> Iterator[None]:
    """Have PyTorch compute in one thread meanwhile."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def cgroup_quota(text: str | None) -> float | None:
    """Parse a cgroup v2 `cpu.max`: `max 100000` or, for two cores, `200000 100000`."""
    parts = (text or "").split()
    if len(parts) != 2:
        return None
    allowed, period = _number(parts[0]), _number(parts[1])
    return allowed / period if allowed and period else None


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _integer(text: str | None) -> int | None:
    value = _number(text)
    return None if value is None else round(value)
