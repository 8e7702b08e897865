"""Shared by TensorRT and TensorRT-RTX at building and running: the flavour and its messages.

The two have nearly the same Python API in two modules, `tensorrt` and `tensorrt_rtx`. All shared
code takes the imported module as a parameter, so that one process can use both: `eval` and `bench`
compare their engines side by side. That is why Polygraphy's TensorRT loaders are not used here:
Polygraphy settles on one of the two for the whole process, by an environment variable.
"""

from __future__ import annotations

import functools
import logging
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from trt_yolov6.engines.cuda.device import Device
from trt_yolov6.errors import UserError

if TYPE_CHECKING:
    from trt_yolov6.engines.tensorrt import api as trt
    from trt_yolov6.engines.tensorrt.api import ILogger
else:
    ILogger = object  # that of the module, see `instance_of`

_Own = TypeVar("_Own")

_LOG = logging.getLogger(__name__)

LAYERS_HEADER = "Layers:\n"
"""Prefix of the builder's verbose message about an engine's layers."""


FIRST_WITH_FP8 = (8, 9)
"""Compute capability from which on GPUs multiply in FP8: Ada, Hopper, Blackwell."""


def check_fp8(device: Device) -> None:
    """Raise UserError for a GPU without FP8."""
    if device.capability < FIRST_WITH_FP8:
        raise UserError(
            f"the {device} has no FP8 (8.9 and later do: Ada, Hopper, Blackwell); build with "
            "int8 or fp16 for it."
        )


@dataclass(frozen=True)
class Flavour:
    """One of the two TensorRTs."""

    backend: str
    """Name of the backend, as in `--backend`."""
    label: str
    """Name of the product, for sentences."""
    api: trt.Api
    """The imported module."""

    @property
    def version(self) -> str:
        """Version of the imported module."""
        return str(self.api.__version__)

    @property
    def release(self) -> tuple[int, int]:
        """Major and minor version."""
        major, minor = self.version.split(".")[:2]
        return int(major), int(minor)

    @property
    def shares_profiles(self) -> bool:
        """Contexts of one engine share its optimization profile.

        TensorRT's do from 8.6 on, TensorRT-RTX's always.
        """
        return self.backend != "tensorrt" or self.release >= (8, 6)

    def __str__(self) -> str:
        return f"{self.label} {self.version}"


class Logger(ILogger):
    """A logger of TensorRT: errors are kept to be quoted, warnings go to Python's `logging`."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        """Errors and warnings since `clear`."""
        self._errors: list[str] = []
        self.layers = ""
        """The builder's message about the engine's layers, see `layer_log`."""

    def log(self, severity: trt.ILogger.Severity, message: str) -> None:
        if severity.name in ("ERROR", "INTERNAL_ERROR"):
            self._errors.append(message)
            self.problems.append(message)
            _LOG.debug("%s", message)
        elif severity.name == "WARNING":
            self.problems.append(message)
            _LOG.warning("%s", message)
        elif message.startswith(LAYERS_HEADER):
            self.layers = message

    def clear(self) -> None:
        """Forget what was said before."""
        self._errors.clear()
        self.problems.clear()
        self.layers = ""

    def reason(self) -> str:
        """Return the first error since `clear`, the cause of those after it, on one line."""
        return one_line(self._errors[0]) if self._errors else "it gives no reason"


@functools.cache
def logger_of(api: trt.Api) -> Logger:
    """Return the one logger of a TensorRT module.

    TensorRT keeps a single logger a process and complains about a second, so all builders and
    runtimes share this one.
    """
    return instance_of(Logger, api.ILogger)


def instance_of(own: type[_Own], base: type[object], *arguments: object) -> _Own:
    """Return an object of a class of ours that TensorRT can call.

    Args:
        own: its methods are those that TensorRT calls; it does not call its base's `__init__`.
        base: the class to derive from, of the TensorRT module in use.
        arguments: of `own`.
    """

    class Derived(own, base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            base.__init__(self)
            own.__init__(self, *arguments)

    return Derived()


def one_line(message: str) -> str:
    """Return a TensorRT message without the places in its source code, as one short line."""
    text = re.sub(r"\[[\w.]+::\w+::\d+\] ", "", message)
    text = re.sub(r"\(In [\w:~]+ at \S+:\d+ (\(.*?\))\)", r"\1", text)
    text = re.sub(r"[,.]?\s*In (function )?[\w:~]+ at \S+:\d+", "", text)
    text = " ".join(text.split()).rstrip(". ")
    return text if len(text) <= 300 else text[:297] + "..."
