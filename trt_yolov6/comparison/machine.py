"""Inputs of a measurement besides the engine: machine, versions, how engines are run."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from trt_yolov6 import __version__
from trt_yolov6.common.machine import (
    cpu_model,
    describe_cpu,
    package_versions,
    read_cpu_clock,
    read_gpus,
    system_name,
)
from trt_yolov6.comparison.plan import Plan
from trt_yolov6.engines import backend as backend_module


def run_inputs(plan: Plan, backend: str, *packages: str) -> dict[str, Any]:
    """Return the environment of a measurement on a backend, as inputs of a step.

    `packages` are distributions whose version matters besides the backend's and NumPy's.
    """
    return {
        "threads": plan.threads,
        "provider": plan.provider,
        "versions": versions(backend, "numpy", *packages),
        "machine": machine(),
    }


def versions(backend: str, *packages: str) -> dict[str, str | None]:
    """Return the versions of this package, of a backend and of some distributions."""
    return {
        "trt-yolov6": __version__,
        backend: backend_module(backend).availability().version,
        **package_versions(packages),
    }


@functools.cache
def machine() -> Mapping[str, Any]:
    """Return the values that must be equal for a measurement to be reused."""
    return {
        "cpu": cpu_model(),
        "processors": describe_cpu().threads,
        "gpus": [[gpu.name, gpu.driver] for gpu in read_gpus()],
    }


def clocks() -> dict[str, Any]:
    """Return the clocks as they are now, JSON-ready."""
    return {
        "cpu_clock": dataclasses.asdict(read_cpu_clock()),
        "gpus": [dataclasses.asdict(gpu) for gpu in read_gpus()],
    }


def environment(clocks: Mapping[str, Any]) -> dict[str, Any]:
    """Describe this machine; its clocks are as `clocks` read them."""
    return {
        "cpu": dataclasses.asdict(describe_cpu()),
        **clocks,
        "system": system_name(),
        "packages": {name: value for name, value in package_versions().items() if value},
    }
