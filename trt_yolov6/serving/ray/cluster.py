"""Ray: connecting to a cluster, and how many actors of which size it has room for."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trt_yolov6.common.machine import usable_cpus
from trt_yolov6.errors import MissingDependencyError, UserError, first_line, install_command

MOST_CORES = 4
"""Cores of an actor where none are asked for: more help one small network little."""

MOST_CORES_OF_A_GPU = 16
"""Most cores that an actor with a GPU has by default: a GPU takes pictures faster than four decode
them."""

_REACH_SECONDS = 5.0


@dataclass(frozen=True)
class Actors:
    """Number of parallel engines, and the resources that Ray reserves for each."""

    count: int
    cpus: int
    gpus: int


@contextlib.contextmanager
def connected(address: str) -> Iterator[Any]:
    """Yield the package `ray`, connected to a cluster until the block ends.

    A connection that is there already is the caller's: it is used, and left open.

    Args:
        address: `local` for a cluster of this machine alone, which listens on loopback and ends
            with the block; else what `ray.init` takes, such as `auto` or `host:6379`.

    Raises:
        UserError: Ray is not installed, or no cluster answers.
    """
    ray = _import_ray(address)
    if address.startswith("ray://"):
        raise UserError(
            f"`address` {address} is one of Ray's client, which Ray Data does not work through; "
            "run the command on a machine of the cluster, with `address` auto."
        )
    if ray.is_initialized():
        with _quiet(ray):
            yield ray
        return
    here: dict[str, Any] = {"address": address}
    if address == "local":
        here |= {"num_cpus": len(usable_cpus()), "include_dashboard": False}
    try:
        _check_reachable(address)
        ray.init(**here, logging_level=logging.ERROR, log_to_driver=False)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"`address` {address} does not lead to a cluster ({first_line(error, 200)}); give that "
            "of its head, auto on one of its machines, or local."
        ) from error
    try:
        _check_loopback(ray, address)
        with _quiet(ray):
            yield ray
    finally:
        ray.shutdown()


def _import_ray(address: str) -> Any:
    """Import Ray, after setting the environment that it reads then."""
    # No usage reports; logs of the C++ part only go to the session's folder.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    if address == "local":
        # Whoever reaches a cluster can run code on it. With this, all of Ray's servers listen on
        # loopback, as on Windows and macOS; otherwise they take the machine's address, whatever
        # the arguments of `ray.init`.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"work on a cluster needs the Python package {error.name}; "
            f"`{install_command('ray')}` gives it."
        ) from error
    return ray


def _check_reachable(address: str) -> None:
    """Raise OSError or ValueError where nothing listens: Ray itself tries for minutes."""
    host, colon, port = address.rpartition(":")
    if colon:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_SECONDS).close()


def _check_loopback(ray: Any, address: str) -> None:
    head = ray.get_runtime_context().gcs_address
    if address == "local" and not head.startswith(("127.0.0.1:", "localhost:", "[::1]:")):
        raise UserError(
            f"Ray listens on {head}, where others reach it; import ray only after setting "
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0, or start a cluster yourself and give its address."
        )


@contextlib.contextmanager
def _quiet(ray: Any) -> Iterator[None]:
    """Leave what is drawn and logged to our own bar."""
    context = ray.data.DataContext.get_current()
    before = context.enable_progress_bars, context.print_on_execution_start
    context.enable_progress_bars = context.print_on_execution_start = False
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.enable_progress_bars, context.print_on_execution_start = before
        logger.setLevel(level)


def fitting_actors(
    nodes: Sequence[Mapping[str, float]], *, needs_gpu: bool, cores: int | None
) -> Actors:
    """Return how many actors a cluster has room for: one a GPU, or one a group of cores.

    Args:
        nodes: what each living machine has, by Ray's names `CPU` and `GPU`.
        needs_gpu: an actor takes a GPU, and a share of the cores for reading and boxes.
        cores: of an actor; default: those of the smallest machine that has any, at most
            `MOST_CORES`; with GPUs, the cores there are for each, at most `MOST_CORES_OF_A_GPU`.

    Raises:
        UserError: no machine has room for one.
    """
    if needs_gpu:
        with_gpu = [(int(node.get("CPU", 0)), int(node.get("GPU", 0))) for node in nodes]
        with_gpu = [(cpus, gpus) for cpus, gpus in with_gpu if gpus]
        if not with_gpu:
            raise UserError(
                "the engine needs a GPU, and no machine of the cluster offers one; start Ray there "
                "with GPUs, or give an .onnx engine."
            )
        each = cores or min(MOST_CORES_OF_A_GPU, *(cpus // gpus for cpus, gpus in with_gpu))
        count = sum(min(gpus, cpus // each if each else gpus) for cpus, gpus in with_gpu)
        if not count:
            raise UserError(f"no machine has {each} cores for a GPU; give fewer `threads`.")
        return Actors(count, each, 1)
    sizes = [int(node.get("CPU", 0)) for node in nodes if node.get("CPU", 0) >= 1]
    if not sizes:
        raise UserError(
            "no machine of the cluster offers Ray a core; start Ray there with `--num-cpus N`."
        )
    each = cores or min(MOST_CORES, *sizes)
    count = sum(size // each for size in sizes)
    if not count:
        raise UserError(
            f"no machine of the cluster has the {each} cores of `threads` (the largest has "
            f"{max(sizes)}); give fewer."
        )
    return Actors(count, each, 0)
