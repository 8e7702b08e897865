"""The suppression kernels compiled by a C++ compiler, so that they are tested without a GPU."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from trt_yolov6.data.letterbox import Letterbox
from trt_yolov6.detectors.candidates import Suppressed
from trt_yolov6.engines.cuda.kernels import source_of
from trt_yolov6.engines.cuda.letterbox import RECORD_BYTES, interleaved, write_record
from trt_yolov6.engines.cuda.suppression import (
    MAX_KEPT,
    SOURCE,
    Reading,
    float32_thresholds,
    least_logit,
    result_bytes,
    results_in,
    suppressed_of,
)
from trt_yolov6.spec import NmsSettings

_RUN = r"""
namespace {
struct Arguments {
    const void *first, *second, *third;
    float confidence, least, low, high, reach;
    double iou;
    u32 limit, capacity, clip;
    u32* counts;
    u64* keys;
    Ranked* ranked;
    const Picture* pictures;
    unsigned char* results;
} given;
void find_block() {
    find(given.first, given.second, given.third, given.confidence, given.least, given.capacity,
        given.counts, given.keys);
}
void rank_block() {
    rank(given.first, given.second, given.third, given.confidence, given.capacity, given.counts,
        given.keys, given.ranked);
}
void compare_block() { compare(given.iou, given.low, given.high, given.reach, given.ranked); }
void suppress_block() {
    suppress(given.first, given.second, given.third, given.confidence, given.iou, given.low,
        given.high, given.reach, given.limit, given.capacity, given.counts, given.keys,
        given.ranked, given.pictures, given.clip, given.results);
}
}

extern "C" int run(const Arguments* arguments, unsigned batch, unsigned seed) {
    given = *arguments;
    on_cpu::drawn = (seed + 1) * 0x9E3779B97F4A7C15u;  // bits of all weights, never none
    const unsigned each = FIND_THREADS * FIND_EACH;
    for (unsigned image = 0; image < batch; ++image)
        for (unsigned part = 0; part * each < ANCHORS * CLASSES; ++part) {
            blockIdx = {part, image, 0};
            if (!on_cpu::run_block(FIND_THREADS, find_block)) return 1;
        }
    std::vector<Ranked> best(given.ranked ? batch : 0);
    given.ranked = best.data();
    for (unsigned image = 0; image < best.size(); ++image) {
        for (unsigned part = 0; part < RANK_BLOCKS; ++part) {
            blockIdx = {part, image, 0};
            if (!on_cpu::run_block(THREADS, rank_block)) return 3;
        }
        for (unsigned x = 0; x < (CHUNK + COMPARE_THREADS) / 32; ++x)
            for (unsigned y = 0; y < CHUNK / COMPARE_THREADS / 2; ++y) {
                blockIdx = {x, y, image};
                if (!on_cpu::run_block(COMPARE_THREADS, compare_block)) return 4;
            }
    }
    for (unsigned image = 0; image < batch; ++image) {
        blockIdx = {image, 0, 0};
        if (!on_cpu::run_block(THREADS, suppress_block)) return 2;
    }
    return 0;
}
"""


class _Arguments(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("first", "second", "third")),
        *((name, ctypes.c_float) for name in ("confidence", "least", "low", "high", "reach")),
        ("iou", ctypes.c_double),
        ("limit", ctypes.c_uint),
        ("capacity", ctypes.c_uint),
        ("clip", ctypes.c_uint),
        *((name, ctypes.c_void_p) for name in ("counts", "keys", "ranked", "pictures", "results")),
    )


def suppressed_on_cpu(
    reading: Reading,
    outputs: Mapping[str, NDArray[Any]],
    nms: NmsSettings,
    *,
    capacity: int | None = None,
    seed: int = 0,
    placed: Sequence[Letterbox] = (),
    clip: bool | None = None,
    ranked: bool = False,
) -> Suppressed | None:
    """Return the kernels' boxes for some outputs, with blocks of 128 threads, chunks of 256 keys.

    Args:
        reading: how to read them.
        outputs: by name.
        nms: thresholds.
        capacity: candidates an image has room for; default: the reading's.
        seed: of the order in which threads continue.
        ranked: have many blocks compare the best candidates, as of few images.
        placed, clip: have boxes mapped to the images, see `Suppression.enqueue`.
    """
    arrays = [np.ascontiguousarray(outputs[name]) for name in reading.tensors]
    batch = len(arrays[0])
    capacity = capacity or reading.capacity
    low, high, reach = float32_thresholds(nms.iou)
    counts = np.zeros(batch, np.uint32)
    keys = np.zeros((batch, capacity), np.uint64)
    results = np.zeros((batch, result_bytes(nms.max_detections)), np.uint8)
    records = np.zeros(RECORD_BYTES * batch, np.uint8)
    for row, one in enumerate(placed):
        write_record(records, row, interleaved(0, *one.source), one, "linear")
    arguments = _Arguments(
        *(array.ctypes.data for array in arrays),
        *(nms.confidence, least_logit(nms.confidence), low, high, reach, nms.iou),
        *(nms.max_detections, capacity, bool(clip), counts.ctypes.data, keys.ctypes.data),
        int(ranked),
        *(None if clip is None else records.ctypes.data, results.ctypes.data),
    )
    failed = _library(reading.defines).run(ctypes.byref(arguments), batch, seed)
    assert not failed, "threads wait for a barrier that the others do not come to"
    assert not counts.any(), "the next batch's candidates are counted from zero"
    return suppressed_of(results_in(results, nms.max_detections), capacity, nms, clip)


@functools.cache
def _library(defines: Sequence[str]) -> ctypes.CDLL:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    folder = Path(tempfile.mkdtemp(prefix="suppression-"))
    small = (
        *("LOG_THREADS=7", "THREADS=128", "TILE=64", "FIND_THREADS=64", "FIND_EACH=4"),
        *("RANK_BLOCKS=4", "COMPARE_THREADS=64", "AT_HAND=2"),
    )
    macros = (f"MAX_KEPT={MAX_KEPT}", *small, *defines)
    program, library = folder / "kernels.cpp", folder / "kernels.so"
    header = Path(__file__).with_name("cuda_on_cpu.h")
    program.write_text(f'#include "{header}"\n{source_of(SOURCE)}\n{_RUN}')
    # a * b + c is rounded twice, as by `--fmad=false`. The checks of `longjmp` know no coroutines.
    flags = ["-std=c++17", "-O0", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-shared", "-fPIC"]
    options = [f"-D{macro}" for macro in macros]
    subprocess.run([compiler, *flags, *options, "-o", library, program], check=True)
    try:
        return ctypes.CDLL(str(library))
    finally:
        shutil.rmtree(folder)
