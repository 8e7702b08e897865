"""Roofline of each layer: its work, its time, and the machine's ceilings.

A layer's roofline is the larger of two times: its floating-point operations at the measured rate
of large matrix products, and the bytes it must move (input, weights and output, once each) at
the measured rate of a large copy (Williams, Waterman and Patterson, 2009). Activations are taken to
be fused and concatenations to be free, so for a whole network it is a bound that is hard to reach.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
import onnx.parser

from trt_yolov6.bench.sampling import DISTURBED, Watched, seconds_of
from trt_yolov6.common.machine import cpu_model, describe_cpu
from trt_yolov6.engines.base import Engine
from trt_yolov6.graph.cost import Ceilings, Layer, layers_of
from trt_yolov6.graph.index import constants_of
from trt_yolov6.graph.operators import ACTIVATIONS
from trt_yolov6.graph.reference import reference_session

# What backends append to the name of the node, or tensor, that a kernel computes.
_KERNEL_ENDINGS = re.compile(r"(_nchwc|_token_\d+|_myl\d+_\d+|/QuickGeluFusion/)+$")

# Operators that backends compute along with the layer that they follow.
_FUSED = ACTIVATIONS | {"Add"}

_MATRIX_SIDE = 1024
_COPY_BYTES = 1 << 26
_TRIALS, _MOST_TRIALS = 7, 60


@dataclass(frozen=True)
class GraphWork:
    """A graph's layers and which of them a kernel belongs to."""

    layers: tuple[Layer, ...]
    """Layers whose FLOPs and shapes are known."""
    owners: Mapping[str, str]
    """Layer by the name of a node or tensor that it, or what is fused with it, computes."""


@dataclass(frozen=True)
class LayerTime:
    """One layer, or one kernel that is of no layer, of an engine."""

    name: str
    operator: str
    """Empty for a kernel that is of no layer."""
    precision: str
    seconds: float
    roofline: float | None
    """Least seconds that the ceilings allow; None where work or ceiling is unknown."""
    bound: Literal["arithmetic", "memory", ""]
    """Limit that the roofline is from; empty without a roofline."""


def graph_work(model: onnx.ModelProto) -> GraphWork:
    """Return the layers of a graph and which of them each node and tensor belongs to.

    Args:
        model: an ONNX graph with a free batch axis or a fixed one.
    """
    layers = layers_of(model)
    names = {layer.name for layer in layers}
    constants = constants_of(model)
    owners: dict[str, str] = {}
    for node in model.graph.node:
        name = node.name or node.output[0]
        owner = name if name in names else None
        if owner is None and node.op_type in _FUSED:
            # What is fused with a layer reads that and nothing else that was computed.
            computed = [item for item in node.input if item not in constants]
            owner = owners.get(computed[0]) if len(set(computed)) == 1 else None
        if owner is not None:
            owners |= dict.fromkeys((name, *node.output), owner)
    known = (layer for layer in layers if layer.flops is not None and layer.values is not None)
    return GraphWork(tuple(known), owners)


def layer_times(
    kernels: Mapping[str, float],
    work: GraphWork,
    batch: int,
    ceilings: Ceilings | None,
    computed_in: str = "",
) -> list[LayerTime]:
    """Return the time of each layer with its roofline, in the order they ran.

    Args:
        kernels: seconds by kernel, from `Engine.layer_times`.
        work: of the graph that the engine was built from.
        batch: images a run.
        ceilings: of the machine; None leaves the rooflines out.
        computed_in: precision that everything is computed in, where that is not the graph's.
    """
    layers = {layer.name: layer for layer in work.layers}
    seconds: dict[str, float] = {}
    for kernel, taken in kernels.items():
        plain = _KERNEL_ENDINGS.sub("", kernel)
        name = work.owners.get(kernel) or work.owners.get(plain) or kernel
        seconds[name] = seconds.get(name, 0.0) + taken
    found = []
    for name, taken in seconds.items():
        layer, roofline = layers.get(name), None
        bound: Literal["arithmetic", "memory", ""] = ""
        if layer is not None and ceilings is not None:
            least = ceilings.seconds(layer, batch, computed_in or layer.precision)
            if least is not None:
                roofline = max(least)
                bound = "arithmetic" if least[0] == roofline else "memory"
        operator, precision = (layer.operator, layer.precision) if layer else ("", "")
        found.append(LayerTime(name, operator, precision, taken, roofline, bound))
    return found


def measure_ceilings(engine: Engine) -> Ceilings | None:
    """Measure the ceilings of an engine's device, in a second or two; see `gpu_ceilings`."""
    if engine.device == cpu_model():
        return cpu_ceilings(engine.threads)
    return gpu_ceilings()


def cpu_ceilings(threads: int | None) -> Ceilings:
    """Measure the CPU: ONNX Runtime's matrix product, and a copy, by threads; None: its choice."""
    shape = _MATRIX_SIDE, _MATRIX_SIDE
    matrix = f"float[{_MATRIX_SIDE}, {_MATRIX_SIDE}]"
    model = onnx.parser.parse_model(
        f"""<ir_version: 9, opset_import: ["" : 17]>
        product ({matrix} a, {matrix} b) => ({matrix} c) {{ c = MatMul(a, b) }}"""
    )
    session = reference_session(model, threads=threads)
    a = np.random.default_rng(0).random(shape, dtype=np.float32)
    product = _fastest(lambda: session.run(None, {"a": a, "b": a}))
    cpu = describe_cpu()
    workers = threads or cpu.cores or cpu.threads
    source, target = (np.ones((workers, _COPY_BYTES), np.uint8) for _ in range(2))
    with ThreadPoolExecutor(workers) as pool:
        copy = _fastest(lambda: list(pool.map(np.copyto, target, source)))
    return Ceilings(
        bytes_per_second=2 * source.nbytes / copy,
        flops={"fp32": 2 * _MATRIX_SIDE**3 / product},
        how=f"ONNX Runtime product of {_MATRIX_SIDE}x{_MATRIX_SIDE} matrices, copy by {workers} "
        "threads",
    )


def gpu_ceilings() -> Ceilings | None:
    """Measure GPU 0 with PyTorch: a large copy, and large products in each precision it has.

    Without PyTorch, or a GPU that it sees, there are none.
    """
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None

    def timed(run: Callable[[], Any]) -> float:
        def once() -> None:
            run()
            torch.cuda.synchronize()

        return _fastest(once)

    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = timed(lambda: target.copy_(source))
    side = 8192
    flops = {}
    for name, dtype in (("fp32", torch.float32), ("fp16", torch.float16)):
        a, b = (torch.randn(side, side, device="cuda", dtype=dtype) for _ in range(2))
        flops[name] = 2 * side**3 / timed(lambda a=a, b=b: torch.mm(a, b))  # type: ignore[misc]
    eight = torch.randint(-9, 9, (side, side), device="cuda", dtype=torch.int8)
    with contextlib.suppress(RuntimeError):  # a GPU without such products
        flops["int8"] = 2 * side**3 / timed(lambda: torch._int_mm(eight, eight.t()))
    with contextlib.suppress(RuntimeError):  # a GPU without FP8
        small = torch.randn(side, side, device="cuda").to(torch.float8_e4m3fn)
        one = torch.ones((), device="cuda")
        flops["fp8"] = (
            2
            * side**3
            / timed(lambda: torch._scaled_mm(small, small.t(), one, one, out_dtype=torch.float16))
        )
    return Ceilings(2 * source.numel() / copy, flops, f"PyTorch, products of {side}x{side}")


def _fastest(run: Callable[[], Any]) -> float:
    """Return the seconds of the fastest of several runs: a ceiling is what was reached once.

    Runs during which other processes kept this one waiting do not count towards the number of runs.
    """
    watched = Watched(functools.partial(seconds_of, run))
    quiet = 0
    while len(watched.seconds) < _MOST_TRIALS and quiet < _TRIALS:
        watched()
        shares = watched.shares or [0.0] * len(watched.seconds)
        quiet = sum(share <= DISTURBED for share in shares)
    return min(watched.seconds)
