"""ONNX Runtime's execution providers: the choice of one, and the reasons why one does not start.

By default ONNX Runtime continues on the CPU if a GPU's provider does not start. Here a provider
that was chosen by name starts, or is refused with the loader's reason.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trt_yolov6.common.machine import nvidia_folders
from trt_yolov6.errors import MissingDependencyError, UserError

PROVIDERS = {
    "tensorrt": "TensorrtExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "cpu": "CPUExecutionProvider",
}

_REMEDIES = {
    "cuda": (
        "it takes CUDA's and cuDNN's libraries from `pip install \"onnxruntime-gpu[cuda,cudnn]\"` "
        "or LD_LIBRARY_PATH, and an NVIDIA GPU with its driver"
    ),
    "tensorrt": (
        "it takes the libraries of the TensorRT that it was built with from LD_LIBRARY_PATH; "
        "the backend tensorrt needs none of it"
    ),
}


def usable() -> tuple[str, ...]:
    """Return the short names of the providers that this ONNX Runtime holds, the CPU's last."""
    import onnxruntime

    present = onnxruntime.get_available_providers()
    return tuple(short for short, full in PROVIDERS.items() if full in present)


def providers_for(provider: str | None) -> list[str]:
    """Return the execution providers to ask ONNX Runtime for, the chosen one first.

    Args:
        provider: a key of `PROVIDERS`; None takes CUDA where it loads, else the CPU.

    Raises:
        MissingDependencyError: this ONNX Runtime has no such provider, or its libraries do not
            load.
    """
    import onnxruntime

    present = usable()
    if provider is None:
        takes_cuda = "cuda" in present and obstacle("cuda") is None
        return [PROVIDERS[short] for short in (("cuda", "cpu") if takes_cuda else ("cpu",))]
    if provider not in PROVIDERS:
        raise UserError(
            f"`provider` {provider} is not known; choose one of {', '.join(PROVIDERS)}."
        )
    if provider not in present:
        raise MissingDependencyError(
            f"this ONNX Runtime has no {provider!r} provider; install onnxruntime-gpu, or leave "
            "`provider` out.",
        )
    reason = obstacle(provider)
    if reason is not None:
        raise MissingDependencyError(
            f"the {provider!r} provider of ONNX Runtime {onnxruntime.__version__} does not load "
            f"({reason}); {_REMEDIES[provider]}."
        )
    if provider == "tensorrt" and "cuda" in present:
        # TensorRT's provider leaves to the next what it cannot compute.
        return [PROVIDERS[provider], PROVIDERS["cuda"]]
    return [PROVIDERS[provider]]


def on_gpu(providers: Sequence[str], index: int) -> list[Any]:
    """Return providers as ONNX Runtime takes them, those of GPUs with the number of theirs."""
    return [
        one if one == PROVIDERS["cpu"] else (one, {"device_id": str(index)}) for one in providers
    ]


def check_started(provider: str | None, used: str) -> None:
    """Raise MissingDependencyError where a session runs on another provider than was asked for.

    `provider` is a key of `PROVIDERS`, or None for any; `used` is ONNX Runtime's name of one.
    """
    if provider is not None and used != PROVIDERS[provider]:
        raise MissingDependencyError(
            f"the {provider!r} provider of ONNX Runtime loads but does not start, and ONNX Runtime "
            f"would use {used}; {_REMEDIES[provider]}."
        )


@functools.cache
def obstacle(short: str) -> str | None:
    """Return the loader's complaint about a provider's library; None where it loads.

    CUDA's libraries are loaded on the way, from NVIDIA's wheels or PyTorch's. The CPU's provider is
    not a library of its own, so nothing stands against it.
    """
    import onnxruntime

    if short == "cpu" or sys.platform != "linux":
        return None
    load_cuda_libraries()
    return loader_says(Path(onnxruntime.__file__).parent / "capi", short)


def loader_says(folder: Path, short: str) -> str | None:
    """Load a provider's library from ONNX Runtime's folder; return the loader's error, or None."""
    library = folder / f"libonnxruntime_providers_{short}.so"
    if not library.exists():
        return None
    try:
        # What the others call in ONNX Runtime.
        ctypes.CDLL(str(folder / "libonnxruntime_providers_shared.so"), ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(library))
    except OSError as error:
        return str(error)
    return None


def load_cuda_libraries() -> None:
    """Load CUDA's and cuDNN's libraries from NVIDIA's wheels, where those are installed.

    ONNX Runtime looks in its own folder. PyTorch's may be in another folder of packages, as the
    system's under a virtual environment. What is on the loader's own path needs none of this.
    """
    import onnxruntime

    preload = getattr(onnxruntime, "preload_dlls", None)
    if preload is None:  # before 1.21
        return
    if "Failed to load" in _said(preload):
        for folder in library_folders():
            _said(functools.partial(preload, directory=str(folder)))


def library_folders() -> list[Path]:
    """Return the folders of all of NVIDIA's wheels that hold libraries, such as nvidia/cu13/lib."""
    return sorted(folder for root in nvidia_folders() for folder in root.glob("*/lib"))


_redirecting = threading.Lock()


def _said(call: Callable[[], object]) -> str:
    """Return a call's output: ONNX Runtime reports there, and the reader has no use for it."""
    text = io.StringIO()
    # One at a time: of two redirections that overlap one may stay.
    with _redirecting, contextlib.redirect_stdout(text):
        call()
    return text.getvalue()
