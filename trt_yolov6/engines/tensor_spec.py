"""What a graph's or an engine's input or output looks like."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape (None where it varies) and NumPy dtype of an engine's input or output."""

    name: str
    shape: tuple[int | None, ...]
    dtype: np.dtype[Any]

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON has it: the dtype by its name, null where a length varies."""
        return {"name": self.name, "shape": list(self.shape), "dtype": self.dtype.name}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TensorSpec:
        """Return what `to_json` gave.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        shape = tuple(None if length is None else int(length) for length in value["shape"])
        return cls(str(value["name"]), shape, np.dtype(value["dtype"]))
