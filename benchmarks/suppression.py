"""Check and time suppression: on the GPU against the CPU, box by box, and both against the clock.

    python -m benchmarks.suppression --json benchmarks/results/NAME.json

Needs an NVIDIA GPU with cuda-python and NVRTC (`--only cpu` needs none); no network, and about two
minutes. `--only` takes some of the parts: speed, real, cpu, leak, equality.
"""

from __future__ import annotations

import argparse
import functools
import gc
import math
import resource
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import cv2
import numpy as np
from numpy.typing import NDArray

from trt_yolov6.bench.sampling import seconds_of
from trt_yolov6.common.files import write_json
from trt_yolov6.common.machine import cpu_model, package_versions, software_versions, timestamp
from trt_yolov6.data.images import list_images, read_image
from trt_yolov6.data.letterbox import fit
from trt_yolov6.data.loader import fill_row
from trt_yolov6.detectors.detections import Detections, postprocess
from trt_yolov6.detectors.suppression import suppress
from trt_yolov6.engines import load_engine
from trt_yolov6.engines.build import build_engine
from trt_yolov6.engines.cuda.device import (
    DeviceMemory,
    Stopwatch,
    Stream,
    current_device,
    free_memory,
)
from trt_yolov6.engines.cuda.suppression import MAX_KEPT, Suppression, reading_of
from trt_yolov6.graph.export import ExportSettings, graph_from_checkpoint
from trt_yolov6.spec import NmsSettings, TensorSpec

SIZE = (640, 640)
SAMPLE = "samples/yolov6n_bccd.pt"
IMAGES = "samples/images/val"

Outputs = dict[str, NDArray[Any]]


class OnGpu:
    """Outputs of the `split` layout on the GPU, and their suppression."""

    def __init__(self, batch: int, anchors: int, classes: int, scores: Any = np.float32) -> None:
        specs = (
            TensorSpec("boxes", (None, anchors, 4), np.dtype(np.float32)),
            TensorSpec("scores", (None, anchors, classes), np.dtype(scores)),
        )
        reading = reading_of("split", specs, SIZE)
        assert reading is not None
        self.stream = Stream()
        self.suppression = Suppression(reading, batch)
        self.memory = {
            spec.name: DeviceMemory(batch * anchors * (spec.shape[2] or 0) * spec.dtype.itemsize)
            for spec in specs
        }

    def send(self, outputs: Outputs) -> None:
        """Copy outputs to the GPU."""
        arrays = {name: np.ascontiguousarray(outputs[name]) for name in self.memory}
        for name, array in arrays.items():
            self.stream.copy_in(self.memory[name], array.ctypes.data, array.nbytes)
        self.stream.wait()

    def run(self, batch: int, nms: NmsSettings) -> Any:
        """Suppress what was sent last, and wait for it."""
        self.suppression.enqueue(self.stream, self.memory, batch, nms)
        self.stream.wait()
        return self.suppression.fetch(batch, nms)

    def seconds(self, batch: int, nms: NmsSettings, rounds: int = 30) -> float:
        """Return the median seconds of a run launched as a CUDA graph, copy included."""
        self.run(batch, nms)
        with self.stream.capture() as graph:
            self.suppression.enqueue(self.stream, self.memory, batch, nms)
        stopwatch, each = Stopwatch(self.stream), 10

        def several() -> None:
            for _ in range(each):
                graph.launch(self.stream)

        several()
        times = [stopwatch.time(several) / each for _ in range(rounds)]
        graph.free()
        return statistics.median(times)


def crowd(rng: np.random.Generator, count: int, clusters: int) -> NDArray[np.float32]:
    """Return boxes in clusters, as a network gives them: (count, 4)."""
    which = rng.integers(0, clusters, count)
    spread = rng.choice([0.02, 0.1, 0.3])
    half = rng.uniform(6, 64, (clusters, 2))[which]
    centres = rng.uniform(0, 640, (clusters, 2))[which] + half * rng.normal(0, spread, (count, 2))
    half = half * rng.lognormal(0, spread, (count, 2))
    return np.concatenate([centres - half, centres + half], axis=1).astype(np.float32)


def random_outputs(rng: np.random.Generator, batch: int, anchors: int, classes: int) -> Outputs:
    """Return outputs with what is awkward: ties, equal and empty boxes, extremes, NaN, infinity."""
    boxes = np.stack([crowd(rng, anchors, int(rng.integers(1, 80))) for _ in range(batch)])
    scores = rng.uniform(0, 1, (batch, anchors, classes)) ** float(rng.choice([1, 4, 12]))
    for image in range(batch):
        kind = rng.integers(0, 6)
        if kind == 1:
            boxes[image] = np.round(boxes[image] / 32)  # many are equal, many have no area
        if kind in (1, 2):
            scores[image] = np.round(scores[image] * 8) / 8
        if kind == 3:
            scores[image] = 0.5
        if kind == 4:
            odd = rng.integers(0, anchors, anchors // 4)
            boxes[image, odd, rng.integers(0, 4)] = rng.choice(
                [np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-38, 0], len(odd)
            )
            scores[image, odd[::2], rng.integers(0, classes)] = rng.choice(
                [np.nan, np.inf, -np.inf, 1.5, -1], len(odd[::2])
            )
    return {"boxes": boxes.astype(np.float32), "scores": scores.astype(np.float32)}


def detections(outputs: Any, batch: int, nms: NmsSettings) -> list[Detections]:
    """Return detections in input pixels."""
    return postprocess(outputs, "split", nms, [fit(SIZE, SIZE)] * batch, clip=False)


def differs(one: Detections, other: Detections) -> bool:
    """Return whether two differ in a bit."""
    return any(
        getattr(one, name).tobytes() != getattr(other, name).tobytes()
        for name in ("xyxy", "confidence", "class_id")
    )


def ranked_rows(rows: int) -> Any:
    """Have many blocks suppress an image of batches up to a size, instead of one."""
    return mock.patch("trt_yolov6.engines.cuda.suppression.RANKED_ROWS", rows)


def equality(sets: int, seed: int) -> dict[str, Any]:
    """Compare the GPU with the CPU on random sets, by one block an image and by many."""
    rng = np.random.default_rng(seed)
    shapes = [(64, 40, 1), (64, 300, 3), (32, 900, 4), (16, 3000, 1), (16, 700, 20), (8, 8400, 3)]
    with ranked_rows(64):
        made = {shape: OnGpu(*shape) for shape in shapes}
    done = wrong = too_many = most = 0
    while done < sets:
        for shape, gpu in made.items():
            batch = shape[0]
            outputs = random_outputs(rng, *shape)
            nms = NmsSettings(
                float(rng.choice([0.0, 0.03, 0.25, 0.5])),
                float(rng.choice([0.1, 0.45, 0.5, 0.65, 0.9, rng.uniform(0.01, 1)])),
                int(rng.choice([1, 20, 300, MAX_KEPT])),
            )
            gpu.send(outputs)
            found = []
            for most_rows in (0, 64):
                with ranked_rows(most_rows):
                    found.append(gpu.run(batch, nms))
            if found[0] is None or found[1] is None:
                assert found[0] is found[1]
                too_many += batch
                continue
            both = [detections(one, batch, nms) for one in found]
            rows = zip(detections(outputs, batch, nms), *both, strict=True)
            for image, (cpu, by_one_block, by_many) in enumerate(rows):
                most = max(most, int((outputs["scores"][image] > nms.confidence).sum()))
                done += 1
                mine = by_many if differs(cpu, by_many) else by_one_block
                if differs(cpu, mine):
                    wrong += 1
                    if wrong <= 3:
                        print("DIFFERS", shape, "image", image, nms, len(cpu), len(mine))
                        same = min(len(cpu), len(mine))
                        unlike = (cpu.xyxy[:same] != mine.xyxy[:same]).any(axis=1)
                        at = int(np.argmax(unlike)) if unlike.any() else same
                        print("  from", at, list(cpu[at : at + 2]), list(mine[at : at + 2]))
    return {"sets": done, "different": wrong, "beyond_capacity": too_many, "most_candidates": most}


def sample_outputs(images: int) -> Outputs:
    """Return the sample network's outputs for the sample's pictures, from ONNX Runtime."""
    pictures = list_images(Path(IMAGES))[:images]
    parts: dict[str, list[NDArray[Any]]] = {"boxes": [], "scores": []}
    graph = graph_from_checkpoint(SAMPLE, ExportSettings())
    with tempfile.TemporaryDirectory() as folder:
        built = build_engine(graph, backend="onnxruntime", output=Path(folder) / "sample.onnx")
        with load_engine(built.path) as engine:
            for picture in pictures:
                array = engine.empty_input(1)
                pixels = read_image(picture)
                fill_row(array[0], pixels, engine.input, 0, engine.preprocessing)
                for name, value in engine.infer(array).items():
                    parts[name].append(value)
    return {name: np.concatenate(values) for name, values in parts.items()}


def repeated(outputs: Outputs, batch: int) -> Outputs:
    """Return a batch of images, taken again from the first where there are not enough."""
    count = len(outputs["boxes"])
    return {name: array[np.arange(batch) % count] for name, array in outputs.items()}


def dense_outputs(batch: int, candidates: int, anchors: int = 8400, classes: int = 1) -> Outputs:
    """Return outputs with a number of candidates an image, in 300 clusters of boxes."""
    rng = np.random.default_rng(0)
    boxes = np.stack([crowd(rng, anchors, 300) for _ in range(batch)])
    scores = np.zeros((batch, anchors * classes), np.float32)
    for row in scores:
        chosen = rng.choice(len(row), candidates, replace=False)
        row[chosen] = rng.uniform(0.0301, 1, candidates) ** 2 * 0.9 + 0.0301
    return {"boxes": boxes, "scores": scores.reshape(batch, anchors, classes)}


def real(sample: Outputs) -> dict[str, Any]:
    """Compare and time the suppression of the sample network's outputs."""
    result: dict[str, Any] = {}
    for batch in (32, 1):
        outputs = repeated(sample, batch)
        gpu = OnGpu(*outputs["scores"].shape)
        gpu.send(outputs)
        for confidence in (0.03, 0.25):
            nms = NmsSettings(confidence, 0.65, 300)
            found = detections(gpu.run(batch, nms), batch, nms)
            wanted = detections(outputs, batch, nms)
            result[f"batch {batch}, confidence {confidence}"] = {
                "candidates": float((outputs["scores"] > confidence).sum() / batch),
                "kept": float(np.mean([len(one) for one in found])),
                "different": sum(map(differs, found, wanted)),
                "ms": gpu.seconds(batch, nms) * 1e3,
            }
    return result


def speed() -> dict[str, Any]:
    """Time random outputs with many candidates an image."""
    result: dict[str, Any] = {}
    nms = NmsSettings()
    for batch, candidates, classes in (
        (32, 6400, 1),
        (32, 6400, 80),
        (1, 6400, 1),
        (1, 6400, 80),
        (1, 100, 80),
        (32, 30000, 80),
        (64, 6400, 1),
    ):
        outputs = dense_outputs(batch, candidates, classes=classes)
        gpu = OnGpu(*outputs["scores"].shape)
        gpu.send(outputs)
        found, wanted = (detections(one, batch, nms) for one in (gpu.run(batch, nms), outputs))
        result[f"batch {batch}, {candidates} candidates, {classes} classes"] = {
            "kept": float(np.mean([len(one) for one in found])),
            "different": sum(map(differs, found, wanted)),
            "ms": gpu.seconds(batch, nms) * 1e3,
        }
    return result


def leak(batches: int) -> dict[str, Any]:
    """Suppress many batches, and compare the memory in use before and after."""
    outputs = dense_outputs(8, 1000)
    gpu = OnGpu(*outputs["scores"].shape)
    gpu.send(outputs)

    def host_bytes() -> int:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()

    for _ in range(500):
        gpu.run(8, NmsSettings())
    free, host = free_memory()[0], host_bytes()
    for _ in range(batches):
        gpu.run(8, NmsSettings())
    return {
        "batches": batches,
        "gpu_bytes": free - free_memory()[0],
        "host_bytes": host_bytes() - host,
    }


def cpu(sample: Outputs) -> dict[str, Any]:
    """Time suppression on one core of the CPU, and OpenCV's of all candidates, class by class.

    Both take turns, and the best of their times counts: the others are disturbed. After OpenCV's,
    suppression finds nothing in the processor's caches; it is timed once more with nothing between.
    """
    cv2.setNumThreads(1)
    result: dict[str, Any] = {}
    for name, outputs in (
        ("sample", sample),
        ("6400 candidates, 1 class", dense_outputs(4, 6400)),
        ("6400 candidates, 80 classes", dense_outputs(4, 6400, classes=80)),
    ):
        times: dict[str, list[float]] = {
            key: [] for key in ("suppress", "postprocess", "opencv", "suppress_again")
        }
        counts = []
        for image in range(len(outputs["boxes"])):
            scores = outputs["scores"][image]
            flat = scores.reshape(-1)
            chosen = np.flatnonzero(flat > 0.03)
            chosen = chosen[np.argsort(-flat[chosen], kind="stable")]
            anchors, labels = np.divmod(chosen, scores.shape[1])
            boxes = outputs["boxes"][image][anchors]
            one = {key: value[image : image + 1] for key, value in outputs.items()}
            counts.append(len(chosen))
            work = functools.partial(suppress, boxes, labels, 0.65, 300)
            best = _best_of(
                {
                    "suppress": work,
                    "postprocess": functools.partial(detections, one, 1, NmsSettings()),
                    "opencv": functools.partial(_by_opencv, boxes, labels, flat[chosen]),
                }
            )
            best |= _best_of({"suppress_again": work})
            for key, seconds in best.items():
                times[key].append(seconds)
        result[name] = {
            "candidates": float(np.mean(counts)),
            **{f"{key}_ms": statistics.median(values) * 1e3 for key, values in times.items()},
            "suppress_ms_of_the_slowest_image": max(times["suppress"]) * 1e3,
        }
    return result


def _by_opencv(boxes: NDArray[Any], labels: NDArray[Any], scores: NDArray[Any]) -> None:
    rectangles = boxes.astype(np.float64)
    rectangles[:, 2:] -= rectangles[:, :2]
    for label in np.unique(labels):
        mine = labels == label
        cv2.dnn.NMSBoxes(rectangles[mine], scores[mine], 0.0, 0.65)


def _best_of(works: dict[str, Callable[[], Any]], rounds: int = 25) -> dict[str, float]:
    """Return the shortest time of each work in seconds; they take turns."""
    times = dict.fromkeys(works, math.inf)
    for _ in range(rounds):
        for name, work in works.items():
            times[name] = min(times[name], seconds_of(work))
    return times


def parts(
    only: list[str], sets: int, batches: int, seed: int
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the name and the work of each part that is wanted."""
    sample: Outputs = {}

    def of_sample(work: Callable[[Outputs], Any]) -> Any:
        if not sample:
            sample.update(sample_outputs(16))
        return work(sample)

    every: dict[str, Callable[[], Any]] = {
        "speed": speed,
        "real": lambda: of_sample(real),
        "cpu": lambda: of_sample(cpu),
        "leak": lambda: leak(batches),
        "equality": lambda: equality(sets, seed),
    }
    for name, work in every.items():
        if not only or name in only:
            yield name, work


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--only", nargs="*", default=[], help="some of the parts")
    parser.add_argument("--sets", type=int, default=10_000, help="random sets to compare")
    parser.add_argument("--seed", type=int, default=17, help="of those sets")
    parser.add_argument("--batches", type=int, default=10_000, help="batches of the leak check")
    given = parser.parse_args()
    gpu = None if given.only == ["cpu"] else str(current_device())
    if gpu is not None:
        free_memory()  # starts CUDA
    report: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.suppression", *sys.argv[1:]]),
        "time": timestamp(),
        "gpu": gpu,
        "cpu_model": cpu_model(),
        "software": {**software_versions(), **package_versions()},
    }
    failed = False
    for name, work in parts(given.only, given.sets, given.batches, given.seed):
        start = time.perf_counter()
        try:
            report[name] = work()
            print(name, f"{time.perf_counter() - start:.1f} s", report[name], flush=True)
        except Exception as error:
            traceback.print_exc()
            report[name] = {"error": repr(error)}
            failed = True
        if given.json:
            write_json(given.json, report)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
