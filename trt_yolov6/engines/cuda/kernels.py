"""CUDA kernels from the sources in this package, compiled for the GPU in the machine by NVRTC.

NVRTC is NVIDIA's compiler as a library (the package `nvidia-cuda-nvrtc`). Where it is missing,
engines do in NumPy what the kernels do; nothing else changes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from importlib import resources
from typing import Any

from trt_yolov6.engines.cuda.device import CudaError, Stream, current_device

_EARLY_CAPABILITY, _EARLY_DRIVER = (9, 0), 12030
"""Compute capability and CUDA version of the driver from which on kernels can begin early, recorded
ones too."""


class Kernels:
    """The kernels of one source file, loaded on a GPU (see `compiled`).

    Args:
        module: what was loaded.
        begin_early: the GPU and its driver can do so, see `launch`.
    """

    def __init__(self, module: Any, begin_early: bool) -> None:
        self._module = module
        self._begin_early = begin_early
        self._functions: dict[str, Any] = {}

    def launch(
        self,
        stream: Stream,
        name: str,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        types: Sequence[Any],
        values: Sequence[Any],
        *,
        early: bool = False,
    ) -> None:
        """Put a kernel on a stream.

        Args:
            stream: on the GPU where the kernels are.
            name: of the kernel, which is `extern "C"`.
            grid, block: how many blocks, and threads of a block, in x, y and z.
            types: ctypes types of the arguments.
            values: the arguments; addresses are int.
            early: it may begin before the kernel before it on the stream has ended, and waits for
                that itself (programmatic dependent launch).
        """
        from cuda.bindings import driver

        function = self._functions.get(name)
        if function is None:
            function = _check_driver(driver.cuModuleGetFunction(self._module, name.encode()))
            self._functions[name] = function
        arguments = (tuple(values), tuple(types))
        if not (early and self._begin_early):
            _check_driver(
                driver.cuLaunchKernel(function, *grid, *block, 0, stream.handle, arguments, 0)
            )
            return
        allowed = driver.CUlaunchAttributeValue()
        allowed.programmaticStreamSerializationAllowed = 1
        attribute, kinds = driver.CUlaunchAttribute(), driver.CUlaunchAttributeID
        attribute.id = kinds.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value = allowed
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = block
        config.hStream = driver.CUstream(stream.handle)
        config.attrs, config.numAttrs = [attribute], 1
        _check_driver(driver.cuLaunchKernelEx(config, function, arguments, 0))


def compiled(source: str, defines: Sequence[str]) -> Kernels:
    """Return the kernels of a source file of this package on the current GPU.

    Args:
        source: the file's name.
        defines: macros, `NAME` or `NAME=value`.

    Raises:
        CudaError: there is no NVRTC, or it cannot compile for this GPU.
    """
    from cuda.bindings import runtime

    error, ordinal = runtime.cudaGetDevice()
    if int(error) == 0:
        # Makes the device's context current: the driver's calls, which load code, make none.
        (error,) = runtime.cudaFree(0)
    if int(error) != 0:
        raise CudaError(f"CUDA failed ({error.name}); see whether `nvidia-smi` works.")
    return _loaded(int(ordinal), source, tuple(defines))


def source_of(name: str) -> str:
    """Return the text of a source file in this package."""
    return resources.files(__package__).joinpath(name).read_text("utf-8")


def machine_code(source: str, capability: tuple[int, int], defines: Sequence[str]) -> bytes:
    """Return a source file of this package as machine code for a compute capability.

    Multiplications and additions are not fused, so that results are the CPU's to the last bit.

    Raises:
        CudaError: there is no NVRTC, or it refuses the source or the capability.
    """
    try:
        from cuda.bindings import nvrtc

        program = _check_nvrtc(
            nvrtc.nvrtcCreateProgram(source_of(source).encode(), source.encode(), 0, [], [])
        )
    except (ImportError, RuntimeError) as error:  # the second: its library is not found
        raise CudaError(f"NVRTC does not start ({error}); install nvidia-cuda-nvrtc.") from error
    try:
        options = [
            f"--gpu-architecture=sm_{capability[0]}{capability[1]}".encode(),
            b"--fmad=false",
            *(f"--define-macro={define}".encode() for define in defines),
        ]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if int(status) != 0:
            raise CudaError(
                f"NVRTC cannot compile {source} for compute capability "
                f"{capability[0]}.{capability[1]} ({status.name}: {_log(nvrtc, program)}); install "
                "the newest nvidia-cuda-nvrtc."
            )
        code = bytes(_check_nvrtc(nvrtc.nvrtcGetCUBINSize(program)))
        _check_nvrtc(nvrtc.nvrtcGetCUBIN(program, code))  # writes into the bytes it is given
        return code
    finally:
        nvrtc.nvrtcDestroyProgram(program)


@functools.cache
def _loaded(ordinal: int, source: str, defines: tuple[str, ...]) -> Kernels:
    """Return the kernels on a GPU by its number; what is loaded belongs to that one."""
    from cuda.bindings import driver

    capability = current_device().capability
    version = _check_driver(driver.cuDriverGetVersion())
    module = _check_driver(driver.cuModuleLoadData(machine_code(source, capability, defines)))
    return Kernels(module, capability >= _EARLY_CAPABILITY and version >= _EARLY_DRIVER)


def _log(nvrtc: Any, program: Any) -> str:
    log = bytes(_check_nvrtc(nvrtc.nvrtcGetProgramLogSize(program)))
    _check_nvrtc(nvrtc.nvrtcGetProgramLog(program, log))
    return " ".join(log.rstrip(b"\0").decode(errors="replace").split())


def _check_nvrtc(result: tuple[Any, ...]) -> Any:
    error, *values = result
    if int(error) != 0:
        raise CudaError(f"NVRTC failed ({error.name}); install nvidia-cuda-nvrtc again.")
    return values[0] if values else None


def _check_driver(result: tuple[Any, ...]) -> Any:
    error, *values = result
    if int(error) != 0:
        raise CudaError(
            f"CUDA failed ({error.name}); see whether `nvidia-smi` works, and try again."
        )
    return values[0] if values else None
