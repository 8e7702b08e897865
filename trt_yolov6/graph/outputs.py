"""Find and drop outputs that are not a detector's, such as those kept for debugging."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trt_yolov6.detectors.recognition import is_detector
from trt_yolov6.graph.editing import drop_unread_initializers, set_nodes
from trt_yolov6.graph.facts import facts_of
from trt_yolov6.graph.files import value_spec
from trt_yolov6.graph.index import names_read

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
    """Drop outputs that are not a detector's, and the nodes that only they needed.

    The largest set of outputs with a known layout is kept, the first one of several; sets whose
    shapes fit the input's size take precedence.

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
            kept.append(node)
    set_nodes(model.graph, reversed(kept))
    drop_unread_initializers(model.graph)
