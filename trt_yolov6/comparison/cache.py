"""Steps that are done once: each result is kept under what it depends on, and found again by that.

A step's file holds its inputs and its value, so that a person can see what a result is of. What
is kept is found by the SHA-256 of the inputs: hashes of the files, settings, versions, device. A
step whose inputs changed is another step; nothing has to be cleared by hand.
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
        """Return the value of a step: the one kept, where that is still whole, else that of `work`.

        `inputs` are all that the value depends on. A value is whole where the files are there that
        it names; None is not kept.

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
        except UserError:  # whatever it was, the step is done again
            return None
        if not isinstance(content, dict) or content.get("inputs") != _plain(inputs):
            return None
        return content.get("value")

    def keep(self, kind: str, inputs: Inputs, value: Any) -> None:
        """Keep the value of a step, or what there is of it so far.

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
