"""Outputs beside a detector's, such as those kept for debugging: found and dropped."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trt_yolov6.detectors.recognition import facts_of, is_detector
from trt_yolov6.graph.files import names_read, value_spec

if TYPE_CHECKING:
    import onnx

_MOST_OUTPUTS = 8
"""Graphs with more outputs are not searched for those of a detector."""


def drop_other_outputs(
    model: onnx.ModelProto,
    path: str | Path,
    size: tuple[int, int] | None = None,
    decoder: str | None = None,
) -> tuple[str, ...]:
    """Take outputs away that are not a detector's, and the nodes that only they needed.

    As many are kept as together are of a known layout, the first ones among as many; those whose
    shapes fit the input's size go before others.

    Args:
        model: changed in place where its outputs together are of no known layout.
        path: of the model, for messages.
        size: height and width of its input, where known.
        decoder: the family whose layouts are looked for; None for all.

    Returns:
        The names of those dropped; none where no part of the outputs is a detector's either.
    """
    names = tuple(item.name for item in model.graph.output)

    def fits(names: tuple[str, ...], only_known_anchors: bool) -> bool:
        chosen = [item for item in model.graph.output if item.name in names]
        if not all(item.type.HasField("tensor_type") for item in chosen):
            return False
        facts = facts_of(model, [value_spec(item, path) for item in chosen], size)
        return is_detector(facts, decoder, only_known_anchors=only_known_anchors)

    if not 1 < len(names) <= _MOST_OUTPUTS or fits(names, False):
        return ()
    kept = _largest(names, lambda some: fits(some, True)) or _largest(
        names, lambda some: fits(some, False)
    )
    if not kept:
        return ()
    dropped = tuple(name for name in names if name not in kept)
    for item in [item for item in model.graph.output if item.name in dropped]:
        model.graph.output.remove(item)
    _drop_unread(model)
    return dropped


def dropped_text(names: Sequence[str]) -> str:
    """Say which outputs are not a detector's."""
    return f"dropped the output{'s' * (len(names) > 1)} {', '.join(names)}: not a detector's"


def _largest(
    names: tuple[str, ...], fits: Callable[[tuple[str, ...]], bool]
) -> tuple[str, ...] | None:
    some = (
        kept
        for count in range(len(names) - 1, 0, -1)
        for kept in itertools.combinations(names, count)
    )
    return next(filter(fits, some), None)


def _drop_unread(model: onnx.ModelProto) -> None:
    needed = {item.name for item in model.graph.output}
    kept = []
    for node in reversed(model.graph.node):
        if needed.intersection(node.output):
            needed.update(names_read(node))
            kept.append(type(node).FromString(node.SerializeToString()))
    del model.graph.node[:]
    model.graph.node.extend(reversed(kept))
    for item in [item for item in model.graph.initializer if item.name not in needed]:
        model.graph.initializer.remove(item)
