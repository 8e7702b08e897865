"""Measure, in one run, the way from pictures to boxes that docs/measurements/speed.md reports.

    python -m benchmarks.picture_pipeline --json benchmarks/results/NAME.json

Needs a GPU with TensorRT or TensorRT-RTX, and nvImageCodec for the JPEG parts; no network. What is
compared is measured interleaved, in one process, and every figure is a median. `--only` takes some
of the parts: accuracy, decoding, single, steps, batches, jpeg, stages, gpus, leaks. `--plans` keeps
engines in a folder, or takes those that are there: `N_32.trt`, `S_1.trt` and so on, of uint8 input,
and those of `ACCURACY`; `--build "N, sample:32"` only builds that one.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import faulthandler
import functools
import itertools
import multiprocessing
import os
import platform
import queue
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from trt_yolov6 import __version__
from trt_yolov6.backends import BACKENDS
from trt_yolov6.bench.sampling import in_turns, random_input, rate, seconds_of, timed
from trt_yolov6.bench.stages import benchmark_stages, benchmark_together, format_stages
from trt_yolov6.common.files import write_json
from trt_yolov6.common.machine import (
    package_versions,
    read_gpus,
    software_versions,
    timestamp,
    usable_cpus,
)
from trt_yolov6.data.coco import CocoImage, load_coco, read_coco_image
from trt_yolov6.data.images import list_images, read_image
from trt_yolov6.data.jpeg import Jpeg, open_image
from trt_yolov6.data.letterbox import Letterbox, fit
from trt_yolov6.detectors.detections import Detections, postprocess
from trt_yolov6.engines import Engine, backend, load_engine
from trt_yolov6.engines.build import build_engine
from trt_yolov6.engines.tensorrt.engine import TensorRTEngine
from trt_yolov6.runtime.detector import Detector
from trt_yolov6.runtime.evaluate import evaluate
from trt_yolov6.runtime.gpu_loading import load_images
from trt_yolov6.runtime.predict import process
from trt_yolov6.runtime.several_gpus import check_gpus, process_on_gpus, visible_gpus
from trt_yolov6.spec import BatchProfile, NmsSettings, PredictOptions

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "samples" / "yolov6n_bccd_authors.pt"
DEFAULT = ROOT / "samples" / "yolov6n_bccd.pt"
IMAGES = ROOT / "samples" / "images" / "val"
BATCH = 32
THRESHOLDS = (0.03, 0.25)
NAMES = ("N, sample", "S, random weights")
ACCURACY = {
    "default, float32, uint8 input": (DEFAULT, False, True),
    "default, FP16, float32 input": (DEFAULT, True, False),
    "default, FP16, uint8 input": (DEFAULT, True, True),
    "authors, FP16, uint8 input": (SAMPLE, True, True),
}
"""Checkpoint, half precision and uint8 input of the engines whose AP is compared."""
OFF = 7e-6
"""Part of the values that the hardware decodes to a level above or below OpenCV's."""
DRAWS = 4


@dataclass
class Bench:
    """State shared by all parts."""

    backend: str
    folder: Path
    seconds: float
    size: int
    paths: dict[tuple[str, int], Path] = field(default_factory=dict)

    def engine(self, name: str, batch: int) -> Path:
        """Build the network of a name for one batch size, once."""
        if (name, batch) not in self.paths:
            stem = name[0] if name in NAMES else name.replace(", ", "-").replace(" ", "-")
            path = self.folder / f"{stem}_{batch}{BACKENDS[self.backend].suffix}"
            self.paths[name, batch] = path
            if path.exists():
                return path
            # PyTorch is needed to build only.
            from benchmarks.gpu_graphs import Job, as_graph, make_all, with_batch
            from trt_yolov6.graph.export import ExportSettings, graph_from_checkpoint

            start = time.perf_counter()
            if name != NAMES[1]:
                checkpoint, fp16, uint8 = ACCURACY.get(name, (SAMPLE, True, True))
                settings = ExportSettings(
                    (self.size, self.size),
                    fp16=fp16,
                    uint8_input=uint8,
                    batch=BatchProfile(batch, batch, batch),
                )
                graph = graph_from_checkpoint(checkpoint, settings)
            else:
                job = Job("ours, uint8 input", "yolov6s", self.size, 0)
                import onnx

                model = onnx.load_from_string(make_all([job])[job])
                graph = as_graph(with_batch(model, batch), "yolov6s", self.size, batch)
            build_engine(graph, backend=self.backend, output=path)
            print(f"  built {path.name} in {time.perf_counter() - start:.1f} s", flush=True)
        return self.paths[name, batch]


def encoded_images() -> list[bytes]:
    """Return the sample's JPEGs, 640 x 480."""
    return [path.read_bytes() for path in list_images(IMAGES)]


# --- one image ----------------------------------------------------------------------------------


def measure_single(bench: Bench) -> list[dict[str, Any]]:
    """One image in host memory to its boxes, against the engine alone."""
    pixels = read_image(encoded_images()[0])
    rows = []
    for name, confidence in itertools.product(NAMES, THRESHOLDS):
        with load_engine(bench.engine(name, 1)) as engine:
            runs = single_runs(engine, pixels, NmsSettings(confidence))
            times = in_turns(list(runs.values()), bench.seconds)
        medians = [float(np.median(one)) for one in times]
        for what, median in zip(runs, medians, strict=True):
            rows.append(
                {
                    "network": name,
                    "confidence": confidence,
                    "what": what,
                    "ms": median * 1e3,
                    "to_engine": median / medians[0],
                }
            )
    return rows


def single_runs(
    engine: Any, pixels: NDArray[np.uint8], nms: NmsSettings
) -> dict[str, Callable[[], float]]:
    """Return, by name, functions that go from an image to its boxes once and return the seconds."""
    engine.is_checked = True
    size = engine.image_size
    square = np.ascontiguousarray(np.resize(pixels, (*size, 3)))
    locked = engine.empty_image(*pixels.shape[:2])
    locked[:] = pixels
    detector = Detector(engine)

    def boxes(image: NDArray[np.uint8]) -> None:
        placed = [fit((image.shape[0], image.shape[1]), size)]
        outputs = engine.start_images([image], placed, nms, clip=True).wait()
        postprocess(outputs, engine.output_layout, nms, placed)

    def before() -> None:
        placed = [fit(size, size)]
        outputs = engine.start(square[None], nms).wait()
        postprocess(outputs, engine.output_layout, nms, placed)

    works: dict[str, Callable[[], Any]] = {
        "page-locked 640x480": lambda: boxes(locked),
        "ordinary 640x480": lambda: boxes(pixels),
        "ordinary 640x640": lambda: boxes(square),
        "Detector.predict, ordinary 640x480": lambda: detector.predict(
            pixels, confidence=nms.confidence
        ),
        "prepared input, ordinary 640x640": before,
    }
    return {
        "engine": engine.resident_run(random_input(engine, 1)),
        **{what: functools.partial(seconds_of, work) for what, work in works.items()},
    }


def measure_steps(bench: Bench) -> list[dict[str, Any]]:
    """Microseconds of the steps of one image in page-locked memory, on the GPU and on the host."""
    pixels = read_image(encoded_images()[0])
    rows = []
    for name, confidence in itertools.product(NAMES, THRESHOLDS):
        nms = NmsSettings(confidence)
        with load_engine(bench.engine(name, 1)) as engine:
            engine.is_checked = True
            assert isinstance(engine, TensorRTEngine)
            locked = engine.empty_image(*pixels.shape[:2])
            locked[:] = pixels
            placed = [fit((pixels.shape[0], pixels.shape[1]), engine.image_size)]
            steps = host_steps(engine, locked, placed, nms, bench.seconds)
            alone = engine.image_stage_seconds([locked], placed, nms)
        found = {key: seconds * 1e6 for key, seconds in (alone | steps).items()}
        rows.append({"network": name, "confidence": confidence, **found})
    return rows


def host_steps(
    engine: Engine,
    image: NDArray[np.uint8],
    placed: Sequence[Letterbox],
    nms: NmsSettings,
    seconds: float,
) -> dict[str, float]:
    """Return the median seconds of starting one image, waiting for it, and its boxes."""
    times: dict[str, list[float]] = {"start": [], "wait": [], "boxes": []}

    def run() -> float:
        points = [time.perf_counter()]
        started = engine.start_images([image], placed, nms, clip=True)
        points.append(time.perf_counter())
        outputs = started.wait()
        points.append(time.perf_counter())
        postprocess(outputs, engine.output_layout, nms, placed)
        points.append(time.perf_counter())
        for one, (begin, end) in zip(times.values(), itertools.pairwise(points), strict=True):
            one.append(end - begin)
        return points[-1] - points[0]

    whole = timed(run, seconds)
    found = {f"{what} on the host": float(np.median(one)) for what, one in times.items()}
    return {**found, "all": float(np.median(whole))}


# --- batches of arrays --------------------------------------------------------------------------


def measure_batches(bench: Bench) -> list[dict[str, Any]]:
    """32 uint8 images in ordinary memory to boxes, batch after batch, against the engine alone."""
    pixels = [read_image(content) for content in encoded_images()]
    rows = []
    for name in NAMES:
        with load_engine(bench.engine(name, BATCH)) as engine:
            own = engine.resident_run(random_input(engine, BATCH))
            # Copies, so that batches are as far apart in memory as in use.
            batches = [
                [pixels[(turn + index) % len(pixels)].copy() for index in range(BATCH)]
                for turn in range(4)
            ]
            stream = list(itertools.chain.from_iterable(batches))
            for confidence in THRESHOLDS:
                nms = NmsSettings(confidence)
                rates: dict[str, list[float]] = {"engine": [], "direct": [], "process": []}
                pipelined(engine, batches, nms, 0.5)
                for _ in range(3):
                    median = float(np.median(timed(own, bench.seconds / 3)))
                    rates["engine"].append(BATCH / median)
                    rates["direct"].append(pipelined(engine, batches, nms, bench.seconds))
                    whole = benchmark_together(
                        engine,
                        stream,
                        options_of(nms),
                        bench.seconds,
                        read=as_it_is,
                        open_item=None,
                        in_memory=True,
                    )
                    rates["process"].append(whole.fps)
                medians = {what: float(np.median(values)) for what, values in rates.items()}
                for what, fps in medians.items():
                    rows.append(
                        {
                            "network": name,
                            "confidence": confidence,
                            "what": what,
                            "fps": fps,
                            "to_engine": fps / medians["engine"],
                        }
                    )
    return rows


def pipelined(
    engine: Engine, batches: Sequence[Sequence[NDArray[np.uint8]]], nms: NmsSettings, seconds: float
) -> float:
    """Return images a second with as many batches in flight as the engine takes."""
    placed = [fit(image.shape[:2], engine.image_size) for image in batches[0]]
    turns = itertools.cycle(batches)

    def give() -> Any:
        return engine.start_images(next(turns), placed, nms, clip=True, patient=True)

    running = [give() for _ in range(engine.in_flight + 1)]  # as `process` has of images in memory

    def step() -> int:
        outputs = running.pop(0).wait()
        running.append(give())
        postprocess(outputs, engine.output_layout, nms, placed)
        return BATCH

    fps = rate(step, seconds, least=4)
    for run in running:
        run.wait()
    return fps


def as_it_is(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Hand an image on."""
    return image


def options_of(nms: NmsSettings) -> PredictOptions:
    """Return the options of batches of 32 with thresholds."""
    return PredictOptions(nms.confidence, nms.iou, nms.max_detections, batch=BATCH)


def keep(_batch: Any, found: list[Detections]) -> list[Detections]:
    """Hand detections on as they are."""
    return found


# --- JPEGs --------------------------------------------------------------------------------------

DECODINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "repeated chroma": {"options": ":fancy_upsampling=0"},
    "hardware only": {"backends": ["HW_GPU_ONLY"]},
    "hardware only, repeated chroma": {
        "backends": ["HW_GPU_ONLY"],
        "options": ":fancy_upsampling=0",
    },
    "hybrid only": {"backends": ["HYBRID_CPU_GPU"]},
    "CUDA only": {"backends": ["GPU_ONLY"]},
}


def measure_decoding(bench: Bench) -> list[dict[str, Any]]:
    """JPEG decoding alone, by the decoder's parts and by batch size; how far pixels differ."""
    context = multiprocessing.get_context("spawn")
    rows = []
    for name in DECODINGS:
        results = context.Queue()
        # A process each: a decoder that a GPU lacks may take its process along.
        worker = context.Process(target=decoding_row, args=(name, bench.seconds, results))
        worker.start()
        row: dict[str, Any] = {"decoder": name}
        with contextlib.suppress(queue.Empty):
            while not row.get("done"):
                row.update(results.get(timeout=60))
        worker.join(10)
        rows.append({**row, "exit": worker.exitcode})
    return rows


def decoding_row(name: str, seconds: float, results: Any) -> None:
    """Measure one decoder, and hand out what is known after each step."""
    faulthandler.enable()
    from trt_yolov6.engines.cuda.jpeg import DecodedBatch, JpegDecoder

    contents = encoded_images()
    jpegs = [one for content in contents if isinstance(one := open_image(content), Jpeg)]
    try:
        decoder = JpegDecoder(**DECODINGS[name])
        views = decoder.decode(jpegs[:BATCH], DecodedBatch())
        results.put({"decoded": sum(view is not None for view in views), "of": len(views)})
        differences = [
            np.abs(pixels_of(view).astype(int) - read_image(content))
            for view, content in zip(views, contents, strict=False)
            if view is not None
        ]
        if differences:
            results.put(
                {
                    "mean_levels": float(np.mean([one.mean() for one in differences])),
                    "most_levels": int(max(one.max() for one in differences)),
                    "differing": float(np.mean([(one > 0).mean() for one in differences])),
                }
            )
        for size in (1, 8, 32, 64):
            chunk = [jpegs[index % len(jpegs)] for index in range(size)]
            buffers = [DecodedBatch() for _ in range(4)]
            turn = itertools.cycle(buffers)
            for place in buffers:
                decoder.decode(chunk, place)
            for place in buffers:
                wait_for(place)

            def step(chunk: list[Jpeg] = chunk, turn: Any = turn) -> int:
                place = next(turn)
                wait_for(place)
                decoder.decode(chunk, place)
                return len(chunk)

            start, used = time.perf_counter(), time.process_time()
            fps = rate(step, min(seconds, 1))
            cores = (time.process_time() - used) / (time.perf_counter() - start)
            for place in buffers:
                wait_for(place)
            results.put({f"fps_{size}": fps, f"cores_{size}": cores})
    except Exception as error:  # one of them is missing on many GPUs
        results.put({"refused": f"{type(error).__name__}: {error}"})
    results.put({"done": True})


def wait_for(buffers: Any) -> None:
    """Wait until a batch is decoded."""
    if buffers.ready is not None:
        buffers.ready.wait()


def pixels_of(view: Any) -> NDArray[np.uint8]:
    """Copy a decoded image to the host."""
    from trt_yolov6.engines.cuda.device import _checked, _cudart

    cudart = _cudart()
    _checked(cudart.cudaDeviceSynchronize())
    result = np.empty((view.height, view.row_step), np.uint8)
    kind = cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
    _checked(cudart.cudaMemcpy(result.ctypes.data, view.address, result.nbytes, kind))
    return result[:, : 3 * view.width].reshape(view.height, view.width, 3)


def measure_jpeg(bench: Bench) -> list[dict[str, Any]]:
    """JPEGs in memory to boxes, against what each stage alone would allow."""
    contents = encoded_images()
    rows = []
    for name in NAMES:
        with load_engine(bench.engine(name, BATCH)) as engine:
            for confidence in THRESHOLDS:
                rows.append(
                    {
                        "network": name,
                        "confidence": confidence,
                        **jpeg_row(engine, contents, NmsSettings(confidence), bench.seconds),
                    }
                )
    return rows


def jpeg_row(
    engine: Engine, contents: Sequence[bytes], nms: NmsSettings, seconds: float
) -> dict[str, Any]:
    """Return the rate of the whole, and of each stage alone."""
    stages = jpeg_stages(engine, contents, nms)
    rates: dict[str, list[float]] = {
        what: [] for what in ("whole", "reading and decoding", *stages)
    }
    cores = []
    for _ in range(3):
        whole = benchmark_together(engine, contents, options_of(nms), seconds)
        rates["whole"].append(whole.fps)
        cores.append(whole.cores)
        for what, stage in stages.items():
            rates[what].append(BATCH / float(np.median(timed(stage, seconds / 3))))
        rates["reading and decoding"].append(loading_rate(engine, contents, seconds / 3))
    medians = {what: float(np.median(values)) for what, values in rates.items()}
    slowest = min((fps, what) for what, fps in medians.items() if what != "whole")
    return {
        **{f"{what}_fps": fps for what, fps in medians.items()},
        "slowest_stage": slowest[1],
        "to_slowest_stage": medians["whole"] / slowest[0],
        "cores": float(np.median(cores)),
        "boxes_per_image": whole.boxes,
    }


def jpeg_stages(
    engine: Engine, contents: Sequence[bytes], nms: NmsSettings
) -> dict[str, Callable[[], float]]:
    """Return, by name, functions that run one stage on a batch and return its seconds."""
    (loaded,) = itertools.islice(
        load_images(
            engine, itertools.islice(itertools.cycle(contents), BATCH), open_image, batch=BATCH
        ),
        1,
    )
    placed = loaded.batch.letterboxes
    outputs = engine.start_images(loaded.images, placed, nms, clip=True, after=loaded.ready).wait()
    own = engine.resident_run(random_input(engine, BATCH))

    def on_gpu() -> None:
        engine.start_images(loaded.images, placed, nms, clip=True).wait()

    def in_python() -> None:
        postprocess(outputs, engine.output_layout, nms, placed, clip=True)

    def headers() -> None:
        for index in range(BATCH):
            open_image(contents[index % len(contents)])

    return {
        "engine": own,
        "letterbox, engine and suppression": functools.partial(seconds_of, on_gpu),
        "boxes to the image": functools.partial(seconds_of, in_python),
        "headers": functools.partial(seconds_of, headers),
    }


def loading_rate(engine: Engine, contents: Sequence[bytes], seconds: float) -> float:
    """Return images a second that are read and decoded with nothing after them."""
    batches = load_images(engine, itertools.cycle(contents), open_image, batch=BATCH)
    with closing(batches):
        for _ in range(6):
            next(batches).give_back()

        def step() -> int:
            loaded = next(batches)
            if loaded.ready is not None:
                loaded.ready.wait()
            loaded.give_back()
            return len(loaded.images)

        return rate(step, seconds)


# --- stages -------------------------------------------------------------------------------------


def measure_stages(bench: Bench) -> list[dict[str, Any]]:
    """Each stage alone and all together, as `bench --stages` measures them."""
    rows = []
    for name in NAMES:
        with load_engine(bench.engine(name, BATCH)) as engine:
            report = benchmark_stages(
                engine, list_images(IMAGES), batch=BATCH, duration=3 * bench.seconds
            )
        print(format_stages(report), flush=True)
        rows.append({"network": name, **report.to_json()})
    return rows


# --- several GPUs -------------------------------------------------------------------------------


def measure_gpus(bench: Bench) -> list[dict[str, Any]]:
    """The JPEG pipeline on one GPU and on several: a process each by itself, and by `--gpus`.

    With JPEGs in memory, and from files: what reading them takes is then told apart.
    """
    count = len(visible_gpus())
    path = bench.engine(NAMES[0], BATCH)
    rows: list[dict[str, Any]] = []
    numbers = sorted({1, min(2, count), count})

    def add(way: str, number: int, fps: float, **more: Any) -> None:
        first = next((row["fps"] for row in rows if row["way"] == way), fps)
        rows.append({"gpus": number, "way": way, "fps": fps, "to_one": fps / first, **more})
        print(" ", short(rows[-1]), flush=True)

    with GpuProcesses(count, path) as processes:
        for what, number in itertools.product(("in memory", "files"), numbers):
            rates = processes.rates(number, what, 2 * bench.seconds)
            add(f"{what}, a process each", number, sum(rates), each=rates)
    with load_engine(path) as engine:
        for opened, what in ((open_kept, "in memory"), (open_image, "files")):
            for number in numbers:
                add(f"{what}, --gpus", number, on_gpus(engine, number, opened, bench.seconds))
    return rows


def on_gpus(
    engine: Engine,
    count: int,
    open_item: Callable[[Path], Jpeg | NDArray[np.uint8]],
    seconds: float,
) -> float:
    """Return images a second to boxes in this process, by `--gpus`."""
    steps = process_on_gpus(
        check_gpus(count),
        engine,
        itertools.cycle(list_images(IMAGES)),
        read_image,
        keep_whose,
        options_of(NmsSettings()),
        open_item=open_item,
    )
    batches: Counter[int] = Counter()
    with closing(steps):
        while len(batches) < count or min(batches.values()) < 50:  # of those that began last, too
            batches[next(steps).result[0]] += 1
        return rate(lambda: len(next(steps).result[1]), 2 * seconds)


def keep_whose(_batch: Any, found: list[Detections]) -> tuple[int, list[Detections]]:
    """Return the process that detections are of, and them as they are."""
    return os.getpid(), found


@functools.cache
def content_of(path: Path) -> bytes:
    """Read a file once in this process."""
    return path.read_bytes()


def open_kept(path: Path) -> Jpeg | NDArray[np.uint8]:
    """Do what `open_image` does, except for reading the file again."""
    return open_image(content_of(path))


class GpuProcesses:
    """A process a GPU, each with the engine loaded and warm; started once, all at the same time."""

    def __init__(self, count: int, path: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._ends: list[Any] = []
        self._processes: list[Any] = []
        started = time.perf_counter()
        for index in range(count):
            ours, theirs = context.Pipe()
            process_ = context.Process(target=one_gpu, args=(index, path, theirs), daemon=True)
            process_.start()
            theirs.close()
            self._ends.append(ours)
            self._processes.append(process_)
        for index in range(count):
            steps = self._answer(index)
            took = time.perf_counter() - started
            print(f"  GPU {index} is ready after {took:.1f} s: {steps}", flush=True)

    def rates(self, count: int, what: str, seconds: float) -> list[float]:
        """Return images a second of each of the first processes, at work at the same time."""
        for ours in self._ends[:count]:
            ours.send((what, seconds))
        return [self._answer(index) for index in range(count)]

    def _answer(self, index: int) -> Any:
        if not self._ends[index].poll(60):
            raise RuntimeError(f"the process of GPU {index} does not answer")
        answer = self._ends[index].recv()  # EOFError: it has ended
        if isinstance(answer, str):
            raise RuntimeError(f"the process of GPU {index} failed: {answer}")
        return answer

    def __enter__(self) -> GpuProcesses:
        return self

    def __exit__(self, *error: object) -> None:
        for ours in self._ends:
            ours.close()
        for one in self._processes:
            one.join(10)
            if one.is_alive():
                one.terminate()


def one_gpu(index: int, path: Path, theirs: Any) -> None:
    """Be the process of a GPU: say what starting took, then a rate whenever one is asked for."""
    faulthandler.enable()
    faulthandler.dump_traceback_later(45)  # where it hangs, if it does
    os.environ["CUDA_VISIBLE_DEVICES"] = visible_gpus()[index]
    start, steps = time.perf_counter(), {}
    with contextlib.suppress(EOFError, BrokenPipeError):
        try:
            with load_engine(path) as engine:
                steps["engine"] = round(time.perf_counter() - start, 1)
                items: dict[str, Sequence[Any]] = {
                    "in memory": encoded_images(),
                    "files": list_images(IMAGES),
                }
                options = options_of(NmsSettings())
                benchmark_together(engine, items["in memory"], options, 0.5)
                steps["first batches"] = round(time.perf_counter() - start, 1)
                theirs.send(steps)
                faulthandler.cancel_dump_traceback_later()
                while True:
                    what, seconds = theirs.recv()
                    theirs.send(benchmark_together(engine, items[what], options, seconds).fps)
        except (EOFError, BrokenPipeError):
            raise
        except Exception:
            theirs.send(traceback.format_exc())


# --- leaks and accuracy -------------------------------------------------------------------------


def measure_leaks(bench: Bench) -> dict[str, Any]:
    """Ten thousand batches of 32 JPEGs: memory of the GPU and of this process meanwhile."""
    from trt_yolov6.engines.cuda.device import free_memory

    contents = encoded_images()
    count = int(os.environ.get("LEAK_BATCHES", "10000"))
    found: list[dict[str, int]] = []
    with load_engine(bench.engine(NAMES[0], BATCH)) as engine:
        items = itertools.islice(itertools.cycle(contents), BATCH * (count + 200))
        steps = process(
            engine, items, read_image, keep, options_of(NmsSettings()), open_item=open_image
        )
        start = time.perf_counter()
        for done, _ in enumerate(steps, start=-200):
            if done >= 0 and done % max(count // 10, 1) == 0:
                used = {"gpu_bytes": -free_memory()[0], "host_bytes": resident_bytes()}
                first = found[0] if found else used
                found.append({"batches": done, **used})
                print("  ", done, {key: used[key] - first[key] for key in used}, flush=True)
        seconds = time.perf_counter() - start
    first, half, last = found[0], found[len(found) // 2], found[-1]
    return {
        "batches": count,
        "seconds": seconds,
        **{key: last[key] - first[key] for key in ("gpu_bytes", "host_bytes")},
        "host_bytes_of_the_second_half": last["host_bytes"] - half["host_bytes"],
        "host_bytes_each_tenth": [one["host_bytes"] - first["host_bytes"] for one in found],
    }


def resident_bytes() -> int:
    """Return the memory this process occupies."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure_accuracy(bench: Bench) -> list[dict[str, Any]]:
    """AP with pictures prepared on the CPU, partly and wholly on the GPU.

    And on the CPU with as many values a level off as the hardware's decoder has, at random: what
    it does to AP is what any such difference does.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(ACCURACY), context) as processes:
        work = functools.partial(accuracy_of, bench)
        return list(itertools.chain.from_iterable(processes.map(work, ACCURACY)))


def accuracy_of(bench: Bench, name: str) -> list[dict[str, Any]]:
    """Return a row for each way of preparing pictures for an engine of `ACCURACY`."""
    rows: list[dict[str, Any]] = []
    data = load_coco(ROOT / "samples")
    for way in ("CPU", "GPU, decoded on the CPU", "GPU", *range(DRAWS)):
        with load_engine(bench.engine(name, 8)) as engine, contextlib.ExitStack() as stack:
            if isinstance(way, int):
                stack.enter_context(values_off(way))
            if isinstance(way, int) or way == "CPU":
                engine.takes_images = lambda: False  # type: ignore[method-assign]
            elif way != "GPU":
                engine.jpeg_decoder = lambda: None  # type: ignore[method-assign]
            workers = 1 if isinstance(way, int) else None  # so that draws can be repeated
            options = PredictOptions(batch=8, workers=workers)
            result = evaluate(engine, data, options, progress=False)
            rows.append(
                {
                    "network": name,
                    "pictures on the": f"CPU, values off: {way}" if workers else way,
                    "decoder": engine.takes_images() and engine.jpeg_decoder() is not None,
                    "AP": result.ap,
                    "AP50": result.ap50,
                    "detections": result.detections,
                    "images": result.images,
                }
            )
            rows[-1]["AP_to_CPU"] = rows[-1]["AP"] - rows[0]["AP"]
            print(" ", short(rows[-1]), flush=True)
    return rows


@contextlib.contextmanager
def values_off(seed: int) -> Iterator[None]:
    """Have `evaluate` read images of which some values, at random, are a level off."""
    random = np.random.default_rng(seed)

    def read(image: CocoImage) -> NDArray[np.uint8]:
        pixels = read_coco_image(image).astype(np.int16)
        places = random.integers(0, pixels.size, random.poisson(OFF * pixels.size))
        pixels.reshape(-1)[places] += random.choice((-1, 1), len(places))
        return pixels.clip(0, 255).astype(np.uint8)

    with mock.patch("trt_yolov6.runtime.evaluate.read_coco_image", read):
        yield


PARTS: dict[str, Callable[[Bench], Any]] = {
    "accuracy": measure_accuracy,
    "decoding": measure_decoding,
    "single": measure_single,
    "steps": measure_steps,
    "batches": measure_batches,
    "jpeg": measure_jpeg,
    "stages": measure_stages,
    "gpus": measure_gpus,
    "leaks": measure_leaks,
}


def main() -> None:
    """Run the parts and write the results after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backend", default="tensorrt-rtx")
    parser.add_argument("--json", type=Path, default=Path("pictures.json"))
    parser.add_argument("--seconds", type=float, default=2.0, help="of measuring one thing")
    parser.add_argument("--imgsz", type=int, default=640, help="height and width of the input")
    parser.add_argument("--plans", type=Path, help="folder of engines")
    parser.add_argument("--build", nargs="*", default=[], help="only build: NAME:BATCH")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    options = parser.parse_args()
    faulthandler.enable()
    state = backend(options.backend).availability()
    results: dict[str, Any] = {
        "command": "python -m benchmarks.picture_pipeline " + " ".join(sys.argv[1:]),
        "date": timestamp(),
        "package": __version__,
        "backend": options.backend,
        "backend_version": state.version,
        "device": state.detail,
        "cores": len(usable_cpus()),
        "machine": platform.platform(),
        "versions": software_versions()
        | {key: value for key, value in package_versions().items() if value},
        "parts": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        plans = options.plans or Path(folder)
        plans.mkdir(parents=True, exist_ok=True)
        bench = Bench(options.backend, plans, options.seconds, options.imgsz)
        if options.build:
            for name, batch in (one.rsplit(":", 1) for one in options.build):
                bench.engine(name, int(batch))
            return
        for name in options.only.split(","):
            start = time.perf_counter()
            print(f"== {name}", flush=True)
            try:
                part = PARTS[name](bench)
            except Exception:  # the other parts are worth having
                part = {"failed": traceback.format_exc()}
                print(part["failed"], flush=True)
            gpus = read_gpus()
            results["parts"][name] = part
            results["gpu"] = dataclasses.asdict(gpus[0]) if gpus else None
            for row in part if isinstance(part, list) else [part]:
                print(" ", short(row), flush=True)
            print(f"  {time.perf_counter() - start:.0f} s", flush=True)
            write_json(options.json, results)


def short(row: dict[str, Any]) -> str:
    """Return a row for the eye."""
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in row.items()
        if not isinstance(value, dict)
    )


if __name__ == "__main__":
    main()
