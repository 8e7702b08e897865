"""Exchange GPU tensors with other libraries through DLPack, without copies.

`engine.infer(tensor)` takes CUDA tensors of PyTorch, CuPy and JAX, and
`torch.from_dlpack(engine.infer_on_gpu(images)["scores"])` is a tensor of an engine's output.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np

from trt_yolov6.engines.cuda.device import DeviceMemory, Stream
from trt_yolov6.errors import MissingDependencyError, UserError
from trt_yolov6.spec import TensorSpec

_CUDA = 2
"""DLPack's number of a CUDA device (kDLCUDA)."""


@runtime_checkable
class SupportsDLPack(Protocol):
    """An array or tensor that DLPack can hand over."""

    def __dlpack__(self, *, stream: Any = None) -> Any: ...

    def __dlpack_device__(self) -> tuple[Any, int]: ...


def lies_on_gpu(images: Any) -> bool:
    """Return whether images are a tensor of another library that lies on a CUDA GPU."""
    return (
        not isinstance(images, np.ndarray)
        and isinstance(images, SupportsDLPack)
        and int(images.__dlpack_device__()[0]) == _CUDA
    )


def view_of(tensor: SupportsDLPack, stream: Stream) -> Any:
    """Return a `StridedMemoryView` of a CUDA tensor, readable by what comes next on the stream.

    Raises:
        UserError: the tensor is not contiguous, or of a type that NumPy does not know.
        MissingDependencyError: there is no cuda-core.
    """
    try:
        view = _strided_memory_view().from_dlpack(tensor, stream_ptr=stream.handle)
        dtype = view.dtype
    except (BufferError, NotImplementedError, TypeError) as error:
        raise UserError(f"the GPU tensor cannot be read ({error}); give float32 or uint8.") from (
            error
        )
    if dtype is None or not is_contiguous(view.shape, view.strides):
        raise UserError(
            "the GPU tensor is not contiguous; give it as `tensor.contiguous()`, of the shape that "
            "the engine takes."
        )
    return view


def is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...] | None) -> bool:
    """Return whether elements lie in C order without gaps; strides count elements."""
    expected = 1
    for length, stride in zip(reversed(shape), reversed(strides or ()), strict=False):
        if length > 1 and stride != expected:
            return False
        expected *= length
    return True


def output_view(memory: DeviceMemory, spec: TensorSpec, shape: tuple[int, ...]) -> Any:
    """Return an engine's output on the GPU as a DLPack object.

    It keeps the memory alive.

    Raises:
        MissingDependencyError: there is no cuda-core.
    """
    view = _strided_memory_view()
    from cuda.core import Buffer

    buffer = Buffer.from_handle(memory.address, memory.nbytes, owner=memory)
    return view.from_buffer(buffer, shape=shape, dtype=spec.dtype)


def _strided_memory_view() -> Any:
    try:
        from cuda.core.utils import StridedMemoryView
    except ImportError as error:
        raise MissingDependencyError(
            f"GPU tensors need cuda-core, which does not import ({error}); install it with "
            "`pip install cuda-core`."
        ) from error
    return StridedMemoryView
