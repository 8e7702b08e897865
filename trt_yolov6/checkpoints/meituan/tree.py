"""A pickled network as a flat tree of modules, read without running anything of it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trt_yolov6.checkpoints.archive import TorchArchive
from trt_yolov6.checkpoints.inert_pickle import EXPORT_IT, Shell, damaged
from trt_yolov6.errors import UserError

RELEASES = "releases 0.1 to 0.4"
"""Releases whose files are read."""

_COUNTER = "num_batches_tracked"
"""A batch normalization's count of steps, which nothing here needs."""


@dataclass(frozen=True)
class Tree:
    """A pickled module tree, flattened; keys are dotted paths as in a state dict."""

    path: Path
    tensors: dict[str, Tensor]
    origins: dict[str, str]
    """Full class name of each module."""
    attributes: dict[str, dict[Any, Any]]

    def __contains__(self, prefix: str) -> bool:
        """Return whether there is a module of this name."""
        return prefix in self.origins

    def tensor(self, key: str) -> Tensor:
        """Return a weight, or refuse the file that lacks it."""
        if key not in self.tensors:
            raise self.lacks(key)
        return self.tensors[key]

    def class_of(self, prefix: str) -> str:
        """Return a module's class name without its package, or refuse the file that lacks it."""
        if prefix not in self.origins:
            raise self.lacks(prefix)
        return self.origins[prefix].rpartition(".")[2]

    def lacks(self, what: str) -> UserError:
        """Return the refusal of a file without some part."""
        return self._refusal(f"no network of YOLOv6's {RELEASES} ({what} is missing)")

    def unknown(self, what: str) -> UserError:
        """Return the refusal of a file with something that no release has."""
        return self._refusal(f"a YOLOv6 with {what[:80]}, which is in none of the {RELEASES}")

    def _refusal(self, what: str) -> UserError:
        return UserError(f"{self.path} holds {what}; {EXPORT_IT}.")


def flatten(archive: TorchArchive, root: Shell) -> Tree:
    """Read all modules and weights below `root`; weights become float32.

    Raises:
        UserError: the tree or a weight in it is damaged.
    """
    tree = Tree(archive.path, {}, {}, {})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        _fill(tree, archive, root)
    _check_finite(tree)
    return tree


def _fill(tree: Tree, archive: TorchArchive, root: Shell) -> None:
    pending: list[tuple[str, Any, int]] = [("", root, 0)]
    while pending:
        prefix, shell, depth = pending.pop()
        state = shell.state if isinstance(shell, Shell) else None
        # A hostile tree may contain itself.
        if not isinstance(state, dict) or depth > 16 or len(tree.origins) > 20_000:
            raise damaged(tree.path, f"{prefix or 'its network'} is not a module")
        assert isinstance(shell, Shell)
        tree.origins[prefix] = shell.origin
        tree.attributes[prefix] = state
        for group in ("_parameters", "_buffers"):
            for name, value in _named(state, group):
                if name != _COUNTER:
                    key = f"{prefix}.{name}" if prefix else name
                    tree.tensors[key] = archive.tensor(value, widened=True)
        for name, child in _named(state, "_modules"):
            pending.append((f"{prefix}.{name}" if prefix else name, child, depth + 1))


def _named(state: dict[Any, Any], group: str) -> Iterator[tuple[str, Shell]]:
    """Yield what a module registered under a name; empty places (None) are left out."""
    members = state.get(group)
    if isinstance(members, dict):
        for name, value in members.items():
            if isinstance(name, str) and isinstance(value, Shell):
                yield name, value


def _check_finite(tree: Tree) -> None:
    # A sum with a value that is not finite is not finite; others may overflow, so check these too.
    sums = [tensor.sum() for tensor in tree.tensors.values() if tensor.is_floating_point()]
    if not sums or torch.isfinite(torch.stack(sums)).all():
        return
    for key, tensor in tree.tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(
                f"{tree.path} has weights that are not finite numbers ({key}); its training "
                "diverged or overflowed half precision: use another checkpoint."
            )
