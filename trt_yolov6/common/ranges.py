"""Ranges of settings: written next to a field's type, checked by msgspec."""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
import typing
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from trt_yolov6.errors import UserError

_Kind = TypeVar("_Kind")

_LARGEST = sys.float_info.max

Count = Annotated[int, Meta(ge=1)]
NotNegative = Annotated[float, Meta(ge=0, le=_LARGEST)]
Positive = Annotated[float, Meta(gt=0, le=_LARGEST)]
Share = Annotated[float, Meta(ge=0, le=1)]
ShareBelow1 = Annotated[float, Meta(ge=0, lt=1)]

_RELATIONS = {">=": "at least", ">": "above", "<=": "at most", "<": "below"}
_TYPES = {
    "array": "several values",
    "bool": "true or false",
    "float": "a number",
    "int": "a whole number",
    "str": "a text",
}


class Checked:
    """Base of dataclasses whose fields must fit their annotations: type, choices and range.

    Raises:
        UserError: a field does not fit.
    """

    def __post_init__(self) -> None:
        cls: Any = type(self)
        for name, kind in _annotations(cls).items():
            value = plain(getattr(self, name))
            object.__setattr__(self, name, value)
            if isinstance(value, dict):  # msgspec would take it for the class's fields
                raise UserError(
                    f"`{name}` is a dictionary; give a {getattr(kind, '__name__', kind)}."
                )
            if not dataclasses.is_dataclass(value):  # such a one checks itself
                fitting(value, kind, f"`{name}`")


def plain(value: Any) -> Any:
    """Return NumPy's numbers, which JSON does not take, as Python's; other values as they are."""
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    return value.item() if getattr(value, "shape", None) == () else value


def of_class(value: Any, kind: type[_Kind], name: str) -> _Kind:
    """Return options that were given, or those by default for None.

    Raises:
        UserError: they are something else, such as a dictionary; it names `name`.
    """
    if value is None:
        return kind()
    if not isinstance(value, kind):
        raise UserError(
            f"`{name}` is a {type(value).__name__}; give a {kind.__name__}, such as "
            f"{kind.__name__}({next(iter(vars(kind())))}=...)."
        )
    return value


def fitting(value: Any, kind: Any, subject: str, *, strict: bool = True) -> Any:
    """Return a value as the type that an annotation names.

    Args:
        value: number, text or anything else that msgspec converts.
        kind: the annotation, with its range.
        subject: first words of the message.
        strict: False takes texts for the numbers and truth values that they spell.

    Raises:
        UserError: it does not fit.
    """
    try:
        return msgspec.convert(plain(value), kind, strict=strict)
    except msgspec.ValidationError as error:
        raise UserError(f"{subject} must be {_wanted(kind, str(error))}, got {value}.") from error


@functools.cache
def _annotations(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


def _wanted(kind: Any, message: str) -> str:
    """Return in words what was expected, from the annotation or msgspec's message."""
    for part in (kind, *typing.get_args(kind)):
        if typing.get_origin(part) is Literal:
            return f"one of {', '.join(map(str, typing.get_args(part)))}"
    bound = re.fullmatch(r"Expected `\w+` ([<>]=?) (\S+)", message)
    if bound and float(bound[2]) == _LARGEST:
        return "finite"
    if bound:
        return f"{_RELATIONS[bound[1]]} {float(bound[2]):g}"
    expected = re.match(r"Expected `(\w+)", message)
    return _TYPES.get(expected[1], expected[1]) if expected else "of another form"
