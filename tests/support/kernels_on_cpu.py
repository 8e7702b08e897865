"""CUDA kernels compiled by a C++ compiler, so that their arithmetic is tested without a GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

_PROLOGUE = r"""
#include <cmath>
#define __device__
#define __global__
#define __forceinline__ inline
#define __noinline__
#define __restrict__
#define __shared__ static
struct Place { unsigned x, y, z; };
struct float4 { float x, y, z, w; };
static unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return (unsigned)((((unsigned long long)high << 32) | low) >> (shift & 31));
}
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static Place threadIdx, blockIdx, blockDim, gridDim;
// Threads run one after the other: all up to the first barrier, then all up to the second, each
// time from the start. What comes before a barrier writes only what all threads share.
static int barriers_passed, barriers_open;
#define __syncthreads() do { if (barriers_passed++ == barriers_open) return; } while (0)
"""

_EPILOGUE = r"""
extern "C" void run(const Picture* pictures, void* input, int count, int height, int width,
    int is_bgr, const float* means, const float* stds)
{
    for (unsigned z = 0; z < (unsigned)count; ++z)
    for (unsigned v = 0; v * TILE_HEIGHT < (unsigned)height; ++v)
    for (unsigned u = 0; u * COLUMNS < (unsigned)width; ++u)
    for (barriers_open = 0; barriers_open <= 2; ++barriers_open)
    for (unsigned y = 0; y < TILE_HEIGHT; ++y)
    for (unsigned x = 0; x < TILE_WIDTH; ++x) {
        blockIdx = {u, v, z};
        threadIdx = {x, y, 0};
        barriers_passed = 0;
        letterbox(pictures, (Element*)input, height, width, is_bgr, means[0], means[1], means[2],
            stds[0], stds[1], stds[2]);
    }
}
"""


def letterbox_on_cpu(
    source: Path, folder: Path, *, byte_input: bool, pixels: int = 4
) -> ctypes.CDLL:
    """Compile the letterbox kernel for this machine; skips the test without a C++ compiler."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    name = f"{'bytes' if byte_input else 'floats'}{pixels}"
    program, library = folder / f"{name}.cpp", folder / f"{name}.so"
    define = f"#define PIXELS {pixels}\n" + ("#define BYTE_INPUT\n" if byte_input else "")
    program.write_text(_PROLOGUE + define + source.read_text() + _EPILOGUE)
    # As `--fmad=false` does: a * b + c is rounded twice.
    flags = ["-O2", "-ffp-contract=off", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, "-o", str(library), str(program)], check=True)
    return ctypes.CDLL(str(library))
