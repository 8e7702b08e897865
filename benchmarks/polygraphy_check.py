"""NVIDIA's Polygraphy as an independent client: it reads our files, and our engines run its plans.

    python -m benchmarks.polygraphy_check --onnx FILE [...] [--plan FILE [...]] [--json FILE]

For each ONNX file: `polygraphy inspect model`; `polygraphy run --onnxrt` against our ONNX Runtime
engine on the same input; and with `--convert`, on a machine with TensorRT, `polygraphy convert`,
after which our engine runs the plan and `polygraphy run --trt` checks its outputs. For each plan:
`inspect` and `run`. Prints a line for each step; the exit code is 1 where one fails.

Needs `pip install polygraphy`, which drives TensorRT from 8.5 on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from trt_yolov6.common.files import write_json
from trt_yolov6.engines import LoadOptions, load_engine
from trt_yolov6.errors import MissingDependencyError, UserError

TOLERANCE = 1e-3
"""Largest difference from Polygraphy's outputs: its Euclidean norm over the output's."""

QUANTIZED_TOLERANCE = 0.05
"""The same for a Q/DQ graph in ONNX Runtime. Its pairs round float sums there and integers in
our engine, and where a value lies between two codes, they take different ones. A plan is the same
arithmetic on both sides."""

# tensorrt.nptype of 8.5 and 8.6 names `numpy.bool`, which NumPy 1.24 to 1.26 lack. Of PyTorch,
# Polygraphy asks whether a value is a tensor of its: importing it takes most of a run's time.
_START = """
import sys
import numpy
if not hasattr(numpy, "bool"):
    numpy.bool = numpy.bool_
sys.modules["torch"] = None
from polygraphy.tools import main
sys.exit(main())
"""

# TensorRT's own kernels only: no cuBLAS and cuDNN, which TensorRT 8 would load.
_TACTICS = ("EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS")


@dataclass(frozen=True)
class Step:
    """Result of one call of Polygraphy."""

    file: str
    step: str
    """inspect, run or convert."""
    command: str
    passed: bool
    seconds: float
    difference: float | None = None
    """Difference of the output that differs most; see `TOLERANCE`."""
    found: str = ""
    """Counts of `inspect`, or the end of a failed call's output."""


@dataclass(frozen=True)
class Conversion:
    """Options of `polygraphy convert` for building a plan."""

    precisions: tuple[str, ...] = ("fp16",)
    """TensorRT's flags; int8 where the graph has Q/DQ nodes."""
    optimization_level: int | None = None
    """None leaves it to TensorRT; 8.5 has none."""
    workspace: str = "8G"
    tactics: tuple[str, ...] = _TACTICS


def polygraphy(*arguments: str) -> tuple[int, str, float]:
    """Call Polygraphy's command line; return its exit code, all that it prints, and the seconds."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", _START, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env=_environment(),
    )
    return done.returncode, done.stdout, time.perf_counter() - start


def inspect(path: Path) -> Step:
    """Let `polygraphy inspect model` read a file; `found` says which tensors and how many nodes."""
    arguments = ["inspect", "model", str(path), *_type_of(path)]
    if path.suffix == ".onnx":
        # Of a plan, layers come from the engine inspector, whose JSON Polygraphy cannot read where
        # TensorRT 8 puts control characters into it.
        arguments += ["--show", "layers"]
    code, text, seconds = polygraphy(*arguments)
    counted = re.findall(r"---- \d+ [^\n]*?----", text)
    found = "; ".join(line.strip("- ") for line in counted) if code == 0 else _end(text)
    return Step(path.name, "inspect", _said(arguments), code == 0, seconds, None, found)


def run(
    path: Path,
    ours: Callable[[NDArray[Any]], Mapping[str, NDArray[Any]]],
    name: str,
    images: NDArray[Any],
    tolerance: float = TOLERANCE,
) -> Step:
    """Let `polygraphy run` compute what our engine computed, and compare.

    Args:
        path: an ONNX file, for ONNX Runtime on the CPU, or a plan, for TensorRT.
        ours: maps images to outputs by name.
        name: of the graph's input.
        images: one batch.
        tolerance: see `TOLERANCE`.
    """
    from polygraphy.comparator import RunResults
    from polygraphy.json import save_json
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = G_LOGGER.ERROR
    expected = {key: np.asarray(value) for key, value in ours(images).items()}
    with tempfile.TemporaryDirectory() as folder:
        inputs, outputs, theirs = (
            str(Path(folder) / file) for file in ("inputs.json", "ours.json", "theirs.json")
        )
        save_json([{name: images}], inputs)
        results = RunResults()
        results.add([expected], runner_name="trt-yolov6")
        results.save(outputs)
        arguments = ["run", str(path), *_type_of(path)]
        if path.suffix == ".onnx":
            # Left as they are, Q/DQ pairs are computed exactly, as our engine does.
            arguments += ["--onnxrt", "--providers", "cpu"]
            arguments += ["--graph-optimization-level", "ORT_DISABLE_ALL"]
        else:
            arguments += ["--trt"]
        arguments += ["--load-inputs", inputs, "--save-outputs", theirs]
        code, text, seconds = polygraphy(*arguments)
        if code:
            return Step(path.name, "run", _said(arguments), False, seconds, None, _end(text))
        ((_, iterations),) = RunResults.load(theirs).items()
        found = {key: np.asarray(value) for key, value in iterations[0].items()}
    missing = sorted(set(expected) ^ set(found))
    if missing:
        said = f"outputs on one side only: {', '.join(missing)}"
        return Step(path.name, "run", _said(arguments), False, seconds, None, said)
    difference = max(_difference(expected[key], found[key]) for key in expected)
    return Step(path.name, "run", _said(arguments), difference <= tolerance, seconds, difference)


def convert(path: Path, plan: Path, conversion: Conversion, images: tuple[int, ...]) -> Step:
    """Let `polygraphy convert` build a plan from an ONNX file.

    Args:
        path: the ONNX file.
        plan: where to write.
        conversion: flags.
        images: the input's shape, for a free batch axis.
    """
    arguments = ["convert", str(path), "--convert-to", "trt", "--output", str(plan)]
    arguments += [f"--{precision}" for precision in conversion.precisions]
    arguments += ["--pool-limit", f"workspace:{conversion.workspace}"]
    if conversion.tactics:
        arguments += ["--tactic-sources", *conversion.tactics]
    if conversion.optimization_level is not None:
        arguments += ["--builder-optimization-level", str(conversion.optimization_level)]
    source = onnx.load(str(path)).graph.input[0]
    if any(not axis.dim_value for axis in source.type.tensor_type.shape.dim):
        shape = f"{source.name}:[{','.join(map(str, images))}]"
        for which in ("min", "opt", "max"):
            arguments += [f"--trt-{which}-shapes", shape]
    code, text, seconds = polygraphy(*arguments)
    passed = code == 0 and plan.is_file()
    said = "" if passed else _end(text)
    return Step(path.name, "convert", _said(arguments), passed, seconds, None, said)


def check(
    path: Path,
    batch: int = 1,
    conversion: Conversion | None = None,
    folder: Path | None = None,
    seed: int = 0,
) -> list[Step]:
    """Check one file of ours.

    Args:
        path: an ONNX file, or a plan with its manifest next to it.
        batch: images, where the file leaves it open.
        conversion: also build a plan from the ONNX file and run it.
        folder: for that plan, which is kept; else it is deleted.
        seed: of the input's random pixels.

    Raises:
        UserError: our own engine does not load.
    """
    options = LoadOptions(provider="cpu") if path.suffix == ".onnx" else LoadOptions()
    steps = [inspect(path)]
    with load_engine(path, options=options) as engine:
        images = _images(engine.input.shape, engine.input.dtype, batch, seed)
        exact = path.suffix != ".onnx" or not is_quantized(path)
        tolerance = TOLERANCE if exact else QUANTIZED_TOLERANCE
        steps.append(run(path, engine.infer, engine.input.name, images, tolerance))
    if conversion is None or path.suffix != ".onnx":
        return steps
    with tempfile.TemporaryDirectory() as temporary:
        plan = (folder or Path(temporary)) / f"{path.stem}.polygraphy.trt"
        steps.append(convert(path, plan, conversion, images.shape))
        if steps[-1].passed:
            steps.append(inspect(plan))
            with load_engine(plan, "tensorrt") as engine:
                steps.append(run(plan, engine.infer, engine.input.name, images))
    return steps


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the files named; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--onnx", type=Path, nargs="+", default=[], metavar="FILE")
    parser.add_argument("--plan", type=Path, nargs="+", default=[], metavar="FILE")
    parser.add_argument("--convert", action="store_true", help="also build plans from --onnx")
    parser.add_argument("--optimization-level", type=int, help="of --convert")
    parser.add_argument("--batch", type=int, default=1, help="where a file leaves it open (1)")
    parser.add_argument("--output", type=Path, help="keep the plans of --convert in this folder")
    parser.add_argument("--json", type=Path, help="write all steps there")
    options = parser.parse_args(arguments)
    if not options.onnx and not options.plan:
        parser.error("name at least one file with --onnx or --plan")
    steps: list[Step] = []
    try:
        if find_spec("polygraphy") is None:
            raise MissingDependencyError("polygraphy is not installed; pip install polygraphy.")
        if options.output:
            options.output.mkdir(parents=True, exist_ok=True)
        for path in (*options.onnx, *options.plan):
            conversion = None
            if options.convert and path.suffix == ".onnx":
                precisions = ("fp16", "int8") if is_quantized(path) else ("fp16",)
                conversion = Conversion(precisions, options.optimization_level)
            for step in check(path, options.batch, conversion, options.output):
                steps.append(step)
                print(_line(step), flush=True)
    except (UserError, OSError) as error:
        print(f"polygraphy_check: {error}", file=sys.stderr)
        return 2
    finally:
        summary = {
            "polygraphy": version("polygraphy") if find_spec("polygraphy") else None,
            "tensorrt": _installed("tensorrt"),
            "numpy": np.__version__,
            "steps": [dataclasses.asdict(step) for step in steps],
        }
        if options.json and steps:
            write_json(options.json, summary)
    print(json.dumps({**summary, "steps": len(steps), "passed": sum(s.passed for s in steps)}))
    return 0 if all(step.passed for step in steps) else 1


def is_quantized(path: Path) -> bool:
    """Return True for an ONNX file with Q/DQ nodes."""
    return b"QuantizeLinear" in path.read_bytes()


def _images(
    shape: Sequence[int | None], dtype: np.dtype[Any], batch: int, seed: int
) -> NDArray[Any]:
    whole = tuple(length or batch for length in shape)
    generator = np.random.default_rng(seed)
    if dtype == np.uint8:
        return generator.integers(0, 256, whole, np.uint8)
    return generator.random(whole, np.float32).astype(dtype)


def _difference(ours: NDArray[Any], theirs: NDArray[Any]) -> float:
    """Return the Euclidean norm of the difference over that of `theirs`; infinite for NaN."""
    if ours.shape != theirs.shape:
        return float("inf")
    first, second = ours.astype(np.float64), theirs.astype(np.float64)
    difference = float(np.linalg.norm(first - second) / (np.linalg.norm(second) or 1.0))
    return difference if np.isfinite(difference) else float("inf")


def _environment() -> dict[str, str]:
    """Return the environment, in which Polygraphy finds the CUDA runtime of NVIDIA's wheels."""
    environment = dict(os.environ)
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        folder = os.path.dirname(str(load_nvidia_dynamic_lib("cudart").abs_path))
    except Exception:  # no cuda-pathfinder, or no such library: Polygraphy looks itself
        return environment
    paths = environment.get("LD_LIBRARY_PATH", "").split(os.pathsep)
    # At the end: TensorRT 8 may have been given stand-ins for its libraries.
    environment["LD_LIBRARY_PATH"] = os.pathsep.join([*filter(None, paths), folder])
    return environment


def _type_of(path: Path) -> list[str]:
    return ["--model-type", "onnx" if path.suffix == ".onnx" else "engine"]


def _said(arguments: Sequence[str]) -> str:
    return "polygraphy " + " ".join(arguments)


def _end(text: str) -> str:
    return " | ".join(line.strip() for line in text.strip().splitlines()[-4:])[-600:]


def _installed(distribution: str) -> str | None:
    try:
        return version(distribution)
    except ModuleNotFoundError:
        return None


def _line(step: Step) -> str:
    share = "" if step.difference is None else f", difference {step.difference:.2g}"
    said = f": {step.found}" if step.found else ""
    verdict = "ok" if step.passed else "FAILED"
    return f"{step.file}: {step.step} {verdict}{share} ({step.seconds:.1f} s){said}"


if __name__ == "__main__":
    sys.exit(main())
