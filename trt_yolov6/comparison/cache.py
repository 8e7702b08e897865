"""Steps that are done once: a cache of results by their inputs.

A step's file has its inputs (hashes of files, settings, versions, device) and its value, readable
for people, and is found by the SHA-256 of the inputs. Changed inputs make another step, so nothing
has to be cleared by hand.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from trt_yolov6.common.files import read_json, sha256_bytes, write_json
from trt_yolov6.errors import UserError

Inputs = Mapping[str, Any]
"""Inputs of a step, JSON-ready."""

Value = TypeVar("Value")


@dataclass(frozen=True)
class Steps:
    """The finished steps of a comparison, one file each, in a folder."""

    folder: Path

    def once(
        self,
        kind: str,
        inputs: Inputs,
        work: Callable[[], Value],
        is_whole: Callable[[Value], bool] = lambda value: True,
    ) -> Value:
        """Return the value of a step: the stored one if `is_whole` accepts it, else that of `work`.

        `inputs` are all that the value depends on; `is_whole` checks files that it names. None is
        not stored.

        Raises:
            UserError: of `work`, or the folder cannot be written to.
        """
        value: Value = self.find(kind, inputs)
        if value is None or not is_whole(value):
            value = _plain(work())  # the same types as when it is found again
            if value is not None:
                self.keep(kind, inputs, value)
        return value

    def find(self, kind: str, inputs: Inputs) -> Any:
        """Return the value of a step that was done with the same inputs, or None."""
        path = self._path(kind, inputs)
        if not path.is_file():
            return None
        try:
            content = read_json(path)
        except UserError:  # an unreadable step is done again
            return None
        if not isinstance(content, dict) or content.get("inputs") != _plain(inputs):
            return None
        return content.get("value")

    def keep(self, kind: str, inputs: Inputs, value: Any) -> None:
        """Store the value of a step, finished or partial.

        Raises:
            UserError: the folder cannot be written to.
        """
        content = {"kind": kind, "inputs": _plain(inputs), "value": value}
        write_json(self._path(kind, inputs), content)

    def _path(self, kind: str, inputs: Inputs) -> Path:
        return self.folder / f"{kind}-{key_of(inputs)[:16]}.json"


def key_of(inputs: Inputs) -> str:
    """Return the SHA-256 of a step's inputs, whatever the order of their keys."""
    text = json.dumps(_plain(inputs), sort_keys=True, separators=(",", ":"))
    return sha256_bytes(text.encode())


def _plain(value: Any) -> Any:
    """Return a value as it comes back from a JSON file."""
    return json.loads(json.dumps(value))
