"""Which class of a detector is which of a data set: by name where both sides have names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trt_yolov6.common.text import counted
from trt_yolov6.errors import ClassesDifferError

_PLACEHOLDER = re.compile(r"class_\d+")
"""A name that says no more than a number does."""


@dataclass(frozen=True)
class ClassMatch:
    """Mapping from a detector's classes to a data set's."""

    matches: tuple[int | None, ...]
    """Index in the data set of each class of the detector; None where absent."""
    kept: tuple[int, ...]
    """The data set's classes that count, by their indices, ascending."""
    notes: tuple[str, ...]
    """Notes for the user, as sentences. None where both sides agree class by class."""


def match_classes(
    engine: str | Path,
    names: Sequence[str],
    data: str | Path,
    data_names: Sequence[str],
    used: Sequence[bool],
) -> ClassMatch:
    """Match a detector's classes to a data set's.

    By name, whatever the order, where both sides have names; case, blanks, hyphens and underscores
    are ignored. Names that only one side has are matched by their order where as many
    are left over on both sides, and that is noted. Categories without an object are left out where
    the detector does not know them.

    Args:
        engine: the detector's file, for messages.
        names: its class names; `class_0` and the like do not count as names, nor do numbers unless
            the data set has the same ones.
        data: the annotation file, for messages.
        data_names: the data set's.
        used: of each of these, whether any object is of it.

    Raises:
        ClassesDifferError: the detector does not know classes that the data set has objects of.
    """
    if not names:  # a graph with NMS inside and no manifest has none
        every = tuple(range(len(data_names)))
        return ClassMatch(every, every, ())
    own, other = _keys(names, data_names), _keys(data_names, names)
    if own is None or other is None:
        return _by_order(engine, names, data, data_names, used)
    index_of = {key: index for index, key in enumerate(other)}
    matches: list[int | None] = [index_of.get(key) for key in own]
    left = [index for index, match in enumerate(matches) if match is None]
    unknown = [index for index, key in enumerate(other) if key not in set(own)]
    if len(unknown) > len(left) or len(names) != len(data_names):
        # A category nobody annotated, such as the one Roboflow puts above all.
        without = [index for index in unknown if not used[index]]
        unknown = [index for index in unknown if used[index]]
    else:
        without = []
    notes = []
    if without:
        notes.append(_left_out(data, data_names, without))
    if unknown:
        if len(left) != len(unknown) or len(names) != len(data_names) - len(without):
            missing = ", ".join(data_names[index] for index in unknown[:5])
            raise ClassesDifferError(
                f"{engine} knows {counted(len(names), 'class')} ({_listed(names)}), but not "
                f"{missing} of {data}; evaluate the engine on the data set it was trained for."
            )
        for own_index, index in zip(left, unknown, strict=True):
            matches[own_index] = index
        pairs = ", ".join(
            f"{names[i]} as {data_names[p]}" for i, p in zip(left, unknown, strict=True)
        )
        notes.append(f"the names of some classes differ, so they are taken in order: {pairs}")
    elif left:
        notes.append(
            f"classes of {engine} that are not in {data} are not counted: "
            f"{_listed([names[index] for index in left])}"
        )
    found = [index for index in matches if index is not None]
    if found != sorted(found):
        notes.append(f"classes matched by name: {engine} and {data} have them in different orders")
    kept = [index for index in range(len(data_names)) if index not in without]
    return ClassMatch(tuple(matches), tuple(kept), tuple(notes))


def order_by_name(
    names: Sequence[str], data_names: Sequence[str], used: Sequence[bool]
) -> tuple[int | None, ...] | None:
    """Return the index in a network's order of each class of a data set that has the same ones.

    Args:
        names: the network's.
        data_names: the data set's, in its own order.
        used: of each of these, whether any object is of it.

    Returns:
        None for the classes without an object that the network does not know; nothing at all where
        the two do not have the same classes, or have no names.
    """
    own, other = _keys(names, data_names), _keys(data_names, names)
    if own is None or other is None or not set(own) <= set(other):
        return None
    index_of = {key: index for index, key in enumerate(own)}
    order = tuple(index_of.get(key) for key in other)
    is_known = all(index is not None or not use for index, use in zip(order, used, strict=True))
    return order if is_known else None


def _by_order(
    engine: str | Path,
    names: Sequence[str],
    data: str | Path,
    data_names: Sequence[str],
    used: Sequence[bool],
) -> ClassMatch:
    kept = list(range(len(data_names)))
    notes = [
        f"{whose} has two classes named {twice}, so all are taken in order"
        for whose, its in ((engine, names), (data, data_names))
        if (twice := next((name for name in its if its.count(name) > 1), None))
    ]
    if len(kept) != len(names):
        kept = [index for index in kept if used[index]]
        if len(kept) != len(names):
            raise ClassesDifferError(
                f"{engine} knows {counted(len(names), 'class')}, {data} has {len(data_names)}; "
                "evaluate the engine on the data set it was trained for."
            )
        without = [index for index in range(len(data_names)) if not used[index]]
        notes.append(_left_out(data, data_names, without))
    return ClassMatch(tuple(kept), tuple(kept), tuple(notes))


def _keys(names: Sequence[str], others: Sequence[str]) -> list[str] | None:
    """Return normalized names for comparison; None where they are generic or not unique."""
    are_numbers = all(name.isdecimal() for name in names)
    if all(map(_PLACEHOLDER.fullmatch, names)) or (are_numbers and set(names) != set(others)):
        return None
    keys = [re.sub(r"[\s_-]+", " ", name).strip().casefold() for name in names]
    return keys if len(set(keys)) == len(keys) else None


def _left_out(data: str | Path, names: Sequence[str], indices: Sequence[int]) -> str:
    listed = _listed([names[index] for index in indices])
    return f"left out of {data}, as no object is of it: {listed}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
