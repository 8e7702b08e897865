"""PyTorch's zip files, read without running anything in them.

The pickle is read inertly (see `inert_pickle`); tensors are made afterwards, from the archive's
records, with every size checked.

`torch.load` is not used, not even with an unpickler of ours: it hands TorchScript archives and two
older formats to other loaders, and a pickled tensor larger than its record makes PyTorch allocate
whatever size the pickle names.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trt_yolov6.checkpoints.inert_pickle import (
    DAMAGE,
    Shell,
    StorageReference,
    damaged,
    load_inert,
)
from trt_yolov6.common.closing import Closing
from trt_yolov6.errors import UserError

_TENSOR = "torch._utils._rebuild_tensor_v2"
_PARAMETER = "torch._utils._rebuild_parameter"


class TorchArchive(Closing):
    """An opened file: `root` is what was pickled, and `tensor` makes a tensor in it real.

    Close it, or use it in a `with` block.
    """

    def __init__(self, path: Path) -> None:
        """Open a file and read its pickle.

        Raises:
            UserError: it is missing, no archive of PyTorch's, damaged, or asks for anything that
                no checkpoint needs.
        """
        self.path = path
        # How many bytes tensors may still take: in all, no more than the file has. A hostile pickle
        # could name one record many times.
        self._budget = _checked_size(path)
        try:
            self._zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, *DAMAGE) as error:
            raise UserError(
                f"{path} is damaged or cut short (its directory of records cannot be read); "
                "copy or download it again."
            ) from error
        try:
            self._folder = self._find_folder()
            self._check_byte_order()
            self.root: Any = load_inert(self._record("data.pkl"), path)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file; tensors made from it stay valid."""
        self._zip.close()

    def is_tensor(self, value: Any) -> bool:
        """Return True where `value` stands for a tensor or a parameter."""
        return isinstance(value, Shell) and value.origin in (_TENSOR, _PARAMETER)

    def tensor(self, value: Shell, *, widened: bool = False) -> Tensor:
        """Return the tensor that a shell stands for, contiguous.

        Args:
            value: of this file's `root`.
            widened: make other floating-point numbers float32; else the file's dtype is kept.

        Raises:
            UserError: the record is missing, damaged or smaller than the tensor.
        """
        match value.args:
            case (Shell() as data, *_) if value.origin == _PARAMETER:
                value = data
        match value.args:
            case (StorageReference() as storage, int(offset), tuple(size), tuple(stride), *_) if (
                value.origin == _TENSOR and _inside(storage.numel, offset, size, stride)
            ):
                pass
            case _:
                raise damaged(self.path, "a tensor does not fit its record")
        dtype: torch.dtype = getattr(torch, storage.dtype)
        length = storage.numel * dtype.itemsize
        if length > self._budget:
            raise damaged(self.path, "its tensors are larger than the file")
        self._budget -= length
        record = self._record(f"data/{storage.key}")
        if len(record) != length:
            raise damaged(self.path, "a tensor does not fit its record")
        if not record:
            return torch.empty(size, dtype=dtype)
        if widened and dtype.is_floating_point and dtype != torch.float32:
            # Widening copies, so the bytes themselves need not be writable, as PyTorch warns.
            flat = torch.frombuffer(record, dtype=dtype)
            return flat.as_strided(size, stride, offset).float().contiguous()
        flat = torch.frombuffer(bytearray(record), dtype=dtype)
        return flat.as_strided(size, stride, offset).contiguous()

    def _find_folder(self) -> str:
        """Return the archive's one top folder, or refuse what torch.save did not write."""
        records = self._zip.NameToInfo
        folders = [name.partition("/")[0] for name in records if name.endswith("/data.pkl")]
        if len(folders) != 1 or f"{folders[0]}/data.pkl" not in records:
            raise UserError(
                f"{self.path} is a zip file, but not one that torch.save wrote; "
                "give a YOLOv6 checkpoint (.pt)."
            )
        folder = folders[0]
        if f"{folder}/constants.pkl" in records:
            raise UserError(
                f"{self.path} is a TorchScript archive; give the checkpoint (.pt) that it was "
                "exported from."
            )
        # torch.save stores records as they are. A compressed one could swell to any size.
        if any(info.compress_type != zipfile.ZIP_STORED for info in records.values()):
            raise UserError(
                f"{self.path} has compressed records, which torch.save never writes; "
                "give the original checkpoint."
            )
        return folder

    def _check_byte_order(self) -> None:
        written = f"{self._folder}/byteorder" in self._zip.NameToInfo
        if written and self._record("byteorder") != b"little":
            raise UserError(
                f"{self.path} was written on a big-endian machine; save it again on another."
            )

    def _record(self, name: str) -> bytes:
        try:
            return self._zip.read(f"{self._folder}/{name}")
        except (zipfile.BadZipFile, *DAMAGE) as error:
            raise damaged(self.path, f"its record {name[:40]} cannot be read") from error


def _checked_size(path: Path) -> int:
    """Return a file's size in bytes; refuse, by its first bytes, anything but a zip archive."""
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder; give the checkpoint file (.pt) in it.")
    try:
        with path.open("rb") as file:
            start = file.read(16)
            size = file.seek(0, 2)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check the path.") from error
    if not start:
        raise UserError(f"{path} is empty; copy or download it again.")
    if start.startswith(b"PK\x03\x04"):
        return size
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < size:
        raise UserError(
            f"{path} is a safetensors file, which holds weights without their network; "
            "give the YOLOv6 checkpoint (.pt)."
        )
    if start.startswith(b"\x80"):
        raise UserError(
            f"{path} is a bare pickle or a checkpoint from before PyTorch 1.6; ask its author for "
            "the zip archive that torch.save writes today, and do not convert it yourself: loading "
            "a pickle runs whatever code it holds."
        )
    raise UserError(f"{path} is not a PyTorch checkpoint; give a YOLOv6 checkpoint (.pt).")


def _inside(numel: int, offset: int, size: tuple[Any, ...], stride: tuple[Any, ...]) -> bool:
    """Return True where a strided view stays inside its storage and is not larger than it."""
    if len(size) != len(stride) or len(size) > 8 or offset < 0 or numel < 0:
        return False
    if not all(type(value) is int and value >= 0 for value in (*size, *stride)):
        return False
    elements = 1
    last = offset
    for extent, step in zip(size, stride, strict=True):
        elements *= extent
        last += (extent - 1) * step
    return elements == 0 or (elements <= numel and last < numel)
