"""Mutated inputs of every kind, given to the commands: none may crash, hang or leave half a file.

    python tests/fuzz.py --count 10000 --seed 0 --keep /tmp/found

Each input runs in a process of its own, forked from one that has imported everything. A finding is
an exit code other than 0, 1 and 2, a traceback, more than 60 seconds or 4 GiB, or a file that a
refused command left. Inputs that bring the package's own lines to run that no earlier one
did are mutated further, for the kinds that Python reads; for the others, inputs with a message that
is new. The seed decides all, so that a run can be repeated.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from support.imports import import_everything

TIMEOUT = 60.0
MEMORY = 4 * 2**30

PACKAGE = str(Path(__file__).resolve().parents[1] / "trt_yolov6")


@dataclass
class Kind:
    """One kind of input."""

    name: str
    command: Callable[[Path, Path], list[str]]
    """Takes the mutated file and the output folder, returns the arguments."""
    place: str
    """Where the file goes, below the folder of a case."""
    seeds: list[bytes] = field(default_factory=list)
    setting: Path | None = None
    """A folder that each case gets a copy of, with what the command needs besides."""
    unmutated: int = 0
    """The exit code of what is not mutated."""
    traced: bool = False
    """Python reads it: lines that run are looked at."""
    mutate: Callable[[bytes, random.Random], bytes] | None = None
    seen: set[Any] = field(default_factory=set)
    corpus: list[bytes] = field(default_factory=list)


@dataclass(frozen=True)
class Outcome:
    """The result of one input."""

    code: int
    seconds: float
    peak: int
    """Bytes of memory at most."""
    error: str
    feedback: frozenset[Any]
    left_over: tuple[str, ...]

    @property
    def fault(self) -> str | None:
        """The fault in one or two words; None for none."""
        if "Traceback" in self.error:
            return "a traceback"
        if self.code not in (0, 1, 2):
            return f"exit code {self.code}" if self.code != -signal.SIGKILL else "a hang or a kill"
        if self.peak > MEMORY:
            return f"{self.peak / 2**30:.1f} GiB"
        if self.code == 2 and self.left_over:
            return f"left: {', '.join(self.left_over)}"
        if any(name.startswith(".") for name in self.left_over):
            return f"half written: {', '.join(self.left_over)}"
        if self.code == 2 and not self.error.strip().splitlines()[-1:]:
            return "no word"
        return None


# --- mutations ----------------------------------------------------------------------------------

_TOKENS = [
    *(b"-1", b"0", b"1", b"null", b"true", b"NaN", b"Infinity", b"1e400", b'""', b"[]", b"{}"),
    *(b"99999999999999999999", b"-0.0", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"../../x", b"%s"),
    *(b'"\\ud800"', b"0x10", b"1_000", b"\r\n", b"&a [*a]", b"!!python/object:os.system", b"<<: x"),
]


def of_bytes(content: bytes, rng: random.Random) -> bytes:
    """Change a few bytes, cut, repeat, or put tokens in."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        if not data:
            return bytes(rng.randrange(256) for _ in range(rng.randrange(8)))
        place = rng.randrange(len(data))
        choice = rng.randrange(8)
        if choice == 0:
            data[place] ^= 1 << rng.randrange(8)
        elif choice == 1:
            data[place] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif choice == 2:
            del data[place : place + rng.choice((1, 2, 4, 16, 256))]
        elif choice == 3:
            data[place:place] = data[place : place + rng.choice((1, 4, 32))]
        elif choice == 4:
            data[place:place] = rng.choice(_TOKENS)
        elif choice == 5:
            del data[place:]
        elif choice == 6:
            data[place : place + 4] = rng.choice((0, 1, 2**31 - 1, 2**32 - 1)).to_bytes(4, "little")
        else:
            other = rng.randrange(len(data))
            data[place : place + 8], data[other : other + 8] = (
                data[other : other + 8],
                data[place : place + 8],
            )
    return bytes(data)


_VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, float("nan")),
    *(float("inf"), "", "x", "0", "-1", "NaN", "../../etc/passwd", "/", "\x00", "\ud800", "\n"),
    *([], {}, [[]], [1, 2, 3, 4], {"id": 1}, "a" * 300, [0] * 5),
]


def of_json(content: bytes, rng: random.Random) -> bytes:
    """Change values, keys and lengths in JSON; bytes at times."""
    if rng.random() < 0.25:
        return of_bytes(content, rng)
    try:
        value = json.loads(content)
    except ValueError:
        return of_bytes(content, rng)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            break
        holder, key = rng.choice(places)
        choice = rng.randrange(5)
        if choice == 0 and isinstance(holder, dict):
            del holder[key]
        elif choice == 1 and isinstance(holder, list):
            holder.append(holder[key])
        elif choice == 2 and isinstance(holder, list):
            del holder[key]
        else:
            holder[key] = rng.choice(_VALUES)
    return json.dumps(value).encode()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, (dict, list)):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def of_onnx(content: bytes, rng: random.Random) -> bytes:
    """Change operators, names, shapes and values of a graph; bytes at times."""
    import onnx

    if rng.random() < 0.4:
        return of_bytes(content, rng)
    try:
        model = onnx.load_from_string(content)
    except Exception:  # a mutation of a mutation
        return of_bytes(content, rng)
    graph = model.graph
    for _ in range(rng.choice((1, 1, 2, 3))):
        choice = rng.randrange(9)
        node = rng.choice(graph.node) if graph.node else None
        value = rng.choice([*graph.input, *graph.output] or [onnx.ValueInfoProto()])
        if choice == 0 and node is not None:
            node.op_type = rng.choice(("Relu", "Loop", "If", "Conv", "QuantizeLinear", "", "Nope"))
        elif choice == 1 and node is not None and node.input:
            place = rng.randrange(len(node.input))
            node.input[place] = rng.choice(
                ["", "images", *(n for m in graph.node for n in m.output)]
            )
        elif choice == 2 and graph.node:
            del graph.node[rng.randrange(len(graph.node))]
        elif choice == 3 and value.type.tensor_type.shape.dim:
            dim = rng.choice(value.type.tensor_type.shape.dim)
            dim.dim_value = rng.choice((-1, 0, 1, 3, 64, 2**31, 2**40))
        elif choice == 4:
            value.type.tensor_type.elem_type = rng.randrange(25)
        elif choice == 5 and graph.initializer:
            tensor = rng.choice(graph.initializer)
            tensor.raw_data = of_bytes(tensor.raw_data, rng)
        elif choice == 6 and graph.initializer:
            tensor = rng.choice(graph.initializer)
            if tensor.dims:
                tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice((-1, 0, 1, 7, 2**33))
        elif choice == 7:
            entry = model.metadata_props.add()
            entry.key = rng.choice(("names", "imgsz", "task", "nms", "model", "head", "args"))
            entry.value = rng.choice(("", "{", "[1]", "{0: 'a'}", "[" * 500, "segment", "../x"))
        elif choice == 8 and node is not None and node.attribute:
            attribute = rng.choice(node.attribute)
            attribute.i = rng.choice((-1, 0, 1, 99, 2**40))
            if attribute.ints:
                attribute.ints[0] = rng.choice((-1, 0, 1, 99, 2**40))
    changed: bytes = model.SerializeToString()
    return changed


def of_checkpoint(content: bytes, rng: random.Random) -> bytes:
    """Change bytes of one member of the archive, mostly the pickle; of the archive at times."""
    if rng.random() < 0.2:
        return of_bytes(content, rng)
    try:
        archive = zipfile.ZipFile(io.BytesIO(content))
        members = [(item.filename, archive.read(item)) for item in archive.infolist()]
    except Exception:  # a mutation of a mutation
        return of_bytes(content, rng)
    pickles = [index for index, (name, _) in enumerate(members) if name.endswith("data.pkl")]
    some = pickles if pickles and rng.random() < 0.85 else range(len(members))
    chosen = rng.choice(list(some)) if members else 0
    result = io.BytesIO()
    with zipfile.ZipFile(result, "w") as out:
        for index, (name, data) in enumerate(members):
            out.writestr(name, of_bytes(data, rng) if index == chosen else data)
    return result.getvalue()


# --- running ------------------------------------------------------------------------------------


def run_case(kind: Kind, content: bytes, folder: Path) -> Outcome:
    """Run the command on an input in a forked process."""
    case = folder / "case"
    shutil.rmtree(case, ignore_errors=True)
    if kind.setting is not None:
        shutil.copytree(kind.setting, case)
    target = case / kind.place
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)
    output = case / "out"
    arguments = kind.command(target, output)
    report = folder / "report"
    errors = folder / "errors"
    report.write_bytes(b"")
    start = time.monotonic()
    child = os.fork()
    if not child:
        _run_here(arguments, case, errors, report, kind.traced)
    status, usage = _wait(child, start)
    error = errors.read_text("utf-8", "replace") if errors.exists() else ""
    lines = report.read_text().split()
    feedback = frozenset(lines) if kind.traced else frozenset([_shape(error)])
    left = tuple(
        str(path.relative_to(output))
        for path in sorted(output.rglob("*"))
        if path.is_file() and path != target
    )
    hidden = tuple(name for name in left if Path(name).name.startswith("."))
    code = os.waitstatus_to_exitcode(status)
    return Outcome(
        code,
        time.monotonic() - start,
        usage.ru_maxrss * 1024,
        error,
        feedback,
        tuple(Path(name).name for name in hidden) or left,
    )


def _wait(child: int, start: float) -> tuple[int, Any]:
    pause = 0.002
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            return status, usage
        if time.monotonic() - start > TIMEOUT:
            os.kill(child, signal.SIGKILL)
            _, status, usage = os.wait4(child, 0)
            return status, usage
        time.sleep(pause)
        pause = min(0.02, pause * 1.5)


def _run_here(arguments: list[str], case: Path, errors: Path, report: Path, traced: bool) -> None:
    """Run a command in this process, which then ends."""
    code = 70
    try:
        os.chdir(case)
        with contextlib.suppress(ValueError):
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        null = os.open(os.devnull, os.O_RDWR)
        file = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(null, 0)
        os.dup2(null, 1)
        os.dup2(file, 2)
        sys.stdout = open(1, "w", errors="replace")  # noqa: SIM115
        sys.stderr = open(2, "w", errors="replace")  # noqa: SIM115
        lines: set[str] = set()
        if traced:
            sys.settrace(_tracer(lines))
        from trt_yolov6.cli import main

        try:
            code = main(arguments)
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException:  # what a user would see
            traceback.print_exc()
            code = 70
        sys.settrace(None)
        sys.stdout.flush()
        sys.stderr.flush()
        report.write_text("\n".join(lines))
    finally:
        os._exit(code)


def _tracer(lines: set[str]) -> Callable[[FrameType, str, Any], Any]:
    def inside(frame: FrameType, event: str, value: Any) -> Any:
        lines.add(f"{frame.f_code.co_filename[len(PACKAGE) :]}:{frame.f_lineno}")
        return inside

    def outside(frame: FrameType, event: str, value: Any) -> Any:
        return inside if frame.f_code.co_filename.startswith(PACKAGE) else None

    return outside


def _shape(error: str) -> str:
    """Return a message without what differs from input to input."""
    return re.sub(r"'[^']*'|\d+|/\S+", "", error)[:200]


# --- the kinds ----------------------------------------------------------------------------------


def prepare(folder: Path) -> None:
    """Write the inputs that are mutated."""
    import cv2
    import numpy as np
    import onnx
    from support.small_graphs import detector
    from support.tiny_detector import NAMES, load_tiny
    from support.training_data import write_tiny

    from trt_yolov6.engines.build import build_engine
    from trt_yolov6.graph.onnx_import import graph_from_onnx

    rng = np.random.default_rng(0)
    for name in ("images/val", "calib", "annotations", "seeds"):
        (folder / name).mkdir(parents=True)
    for index in range(3):
        pixels = rng.integers(0, 256, (48, 64, 3), np.uint8)
        for place in ("images/val", "calib"):
            cv2.imwrite(str(folder / place / f"{index}.png"), pixels)
    for suffix in ("jpg", "png", "bmp", "webp", "tiff"):
        cv2.imwrite(str(folder / "seeds" / f"image.{suffix}"), pixels)
    for suffix, code in (("avi", "MJPG"), ("mp4", "mp4v")):
        writer = cv2.VideoWriter(
            str(folder / "seeds" / f"video.{suffix}"), cv2.VideoWriter.fourcc(*code), 10, (64, 48)
        )
        for _ in range(4):
            writer.write(rng.integers(0, 256, (48, 64, 3), np.uint8))
        writer.release()
    content = {
        "images": [{"id": n, "file_name": f"{n}.png", "width": 64, "height": 48} for n in range(3)],
        "categories": [{"id": n, "name": name} for n, name in enumerate(NAMES, start=1)],
        "annotations": [
            {"id": n + 1, "image_id": n % 3, "category_id": n % 3 + 1, "bbox": [n, 2 * n, 20, 10]}
            for n in range(6)
        ],
    }
    (folder / "annotations" / "instances_val.json").write_text(json.dumps(content))
    (folder / "labels" / "val").mkdir(parents=True)
    (folder / "labels" / "val" / "0.txt").write_text("0 0.5 0.5 0.3 0.2\n")
    data = {"path": ".", "train": "images/val", "val": "images/val", "names": list(NAMES)}
    (folder / "seeds" / "data.yaml").write_text(json.dumps(data))
    plan = {
        "models": [{"path": "gone.onnx", "name": "a", "decoder": "yolov8"}, "other.pt"],
        "precisions": ["fp32", "int8+fp16:3"],
        "batches": [1, 8],
        "data": "data",
        "rounds": 4,
        "duration": 2.5,
        "iou": 0.65,
    }
    (folder / "seeds" / "plan.yaml").write_text(json.dumps(plan))
    load_tiny(folder).close()
    (folder / "tiny_split_None_False.onnx").rename(folder / "tiny.onnx")
    onnx.save(detector(), folder / "seeds" / "detector.onnx")
    build_engine(
        graph_from_onnx(folder / "tiny.onnx"),
        backend="onnxruntime",
        output=folder / "built" / "e.onnx",
    )
    write_tiny(folder / "seeds" / "tiny.pt")
    from trt_yolov6.quantization.pipeline import quantize
    from trt_yolov6.quantization.settings import QuantizationSettings
    from trt_yolov6.quantization.table import write_table

    settings = QuantizationSettings(calibrator="minmax", equalize=False, bias_correction=False)
    graph = graph_from_onnx(folder / "seeds" / "detector.onnx")
    write_table(folder / "seeds" / "table.json", quantize(graph, folder / "calib", settings).table)


def kinds(folder: Path, setting: Path) -> list[Kind]:
    """Return all kinds of input; `folder` is what `prepare` filled."""
    seeds = folder / "seeds"
    tiny = str(folder / "tiny.onnx")
    common = ["--quiet"]

    def read(*names: str) -> list[bytes]:
        return [(seeds / name).read_bytes() for name in names]

    evaluate = ["eval", "--engine", tiny, "--batch", "2", "--threads", "1", *common]
    infer = ["infer", "--engine", tiny, "--threads", "1", *common]
    onnx_build = ["--backend", "onnxruntime", "--decoder", "yolov6"]
    return [
        Kind(
            "annotations",
            lambda file, out: [
                *evaluate,
                "--data",
                str(file.parents[1]),
                "--json",
                f"{out}/e.json",
            ],
            "annotations/instances_val.json",
            [(folder / "annotations" / "instances_val.json").read_bytes()],
            setting=setting,
            traced=True,
            mutate=of_json,
        ),
        Kind(
            "data.yaml",
            lambda file, out: [*evaluate, "--data", str(file), "--json", f"{out}/e.json"],
            "data.yaml",
            read("data.yaml"),
            setting=setting,
            traced=True,
            mutate=of_json,
        ),
        Kind(
            "plan",
            lambda file, out: ["compare", str(file), "--output", str(out), *common],
            "plan.yaml",
            read("plan.yaml"),
            unmutated=2,  # a plan whose models are gone: comparing takes too long
            traced=True,
            mutate=of_json,
        ),
        Kind(
            "manifest",
            lambda file, out: [
                *(*infer[:2], str(file.with_suffix(".onnx")), *infer[3:], "--output", str(out)),
                *("--source", str(folder / "images" / "val" / "0.png")),
            ],
            "e.json",
            [(folder / "built" / "e.json").read_bytes()],
            setting=folder / "built",
            traced=True,
            mutate=of_json,
        ),
        Kind(
            "table",
            lambda file, out: [
                *("build", "--onnx", str(seeds / "detector.onnx"), "--int8", *onnx_build),
                *("--calib", str(folder / "calib"), "--calibrator", "minmax", "--no-equalize"),
                *("--no-bias-correction", "--output", f"{out}/q.onnx", *common),
            ],
            "out/q.calibration.json",
            read("table.json"),
            traced=True,
            mutate=of_json,
        ),
        Kind(
            "onnx",
            lambda file, out: [
                *("build", "--onnx", str(file), *onnx_build, *common),
                *("--output", f"{out}/e.onnx"),
            ],
            "d.onnx",
            [*read("detector.onnx"), (folder / "tiny.onnx").read_bytes()],
            mutate=of_onnx,
        ),
        Kind(
            "checkpoint",
            lambda file, out: ["inspect", str(file), "--json", f"{out}/i.json"],
            "c.pt",
            read("tiny.pt"),
            mutate=of_checkpoint,
        ),
        Kind(
            "image",
            lambda file, out: [*infer, "--source", str(file), "--output", str(out)],
            "in/picture",
            read("image.jpg", "image.png", "image.bmp", "image.webp", "image.tiff"),
            mutate=of_bytes,
        ),
        Kind(
            "video",
            lambda file, out: [*infer, "--source", str(file), "--output", str(out)],
            "in/video",
            read("video.avi", "video.mp4"),
            mutate=of_bytes,
        ),
    ]


def fuzz(count: int, seed: int, names: list[str] | None, keep: Path | None) -> int:
    """Run `count` inputs; return the number of those that showed a fault."""
    import_everything()
    rng = random.Random(seed)
    faults = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        inputs = folder / "inputs"
        # In a child: threads that have computed do not outlive a fork.
        child = os.fork()
        if not child:
            code = 1
            try:
                prepare(inputs)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        if os.waitpid(child, 0)[1]:
            print("the inputs could not be made", file=sys.stderr)
            return 1
        setting = folder / "setting"
        for name in ("images", "annotations", "labels"):
            shutil.copytree(inputs / name, setting / name)
        chosen = [kind for kind in kinds(inputs, setting) if not names or kind.name in names]
        tallies: dict[str, list[int]] = {kind.name: [0, 0, 0, 0] for kind in chosen}
        for kind in chosen:
            for content in kind.seeds:
                outcome = run_case(kind, content, folder)
                kind.seen |= outcome.feedback
                if outcome.code != kind.unmutated:
                    print(f"{kind.name}, not mutated: {outcome.code}\n{outcome.error}", flush=True)
                    faults += 1
        slowest = 0.0
        for number in range(count):
            kind = chosen[number % len(chosen)]
            base = rng.choice(kind.seeds if not kind.corpus or rng.random() < 0.4 else kind.corpus)
            assert kind.mutate is not None
            content = kind.mutate(base, rng)
            outcome = run_case(kind, content, folder)
            slowest = max(slowest, outcome.seconds)
            tallies[kind.name][min(outcome.code, 2) if outcome.code in (0, 1, 2) else 3] += 1
            if not outcome.feedback <= kind.seen:
                kind.seen |= outcome.feedback
                kind.corpus.append(content)
            if outcome.fault is not None:
                faults += 1
                print(f"{kind.name} {number}: {outcome.fault}\n{outcome.error[-1500:]}", flush=True)
                if keep is not None:
                    keep.mkdir(parents=True, exist_ok=True)
                    (keep / f"{kind.name}-{number}").write_bytes(content)
            if (number + 1) % 500 == 0:
                print(f"{number + 1} inputs, {faults} at fault", flush=True)
        for name, tally in tallies.items():
            print(f"{name}: {tally[0]} taken, {tally[1] + tally[2]} refused, {tally[3]} at fault")
        print(f"{count} inputs, {faults} at fault, the slowest took {slowest:.1f} s")
    return faults


def main() -> int:
    """Run as the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+")
    parser.add_argument("--keep", type=Path, help="folder for inputs at fault")
    options = parser.parse_args()
    return int(fuzz(options.count, options.seed, options.kinds, options.keep) > 0)


if __name__ == "__main__":
    sys.exit(main())
