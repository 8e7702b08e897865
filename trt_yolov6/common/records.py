"""JSON and YAML read as the types they stand for, or refused in one sentence."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from trt_yolov6.common.files import read_bytes
from trt_yolov6.errors import UserError, did_you_mean

Record = TypeVar("Record")


def as_record(
    value: Any,
    kind: type[Record],
    subject: str,
    remedy: str = "correct it.",
    *,
    strict: bool = True,
    decode: Callable[[type[Any], Any], Any] | None = None,
) -> Record:
    """Return plain values, as JSON and YAML give them, as a dataclass or another type.

    Keys that the type does not have are passed over.

    Args:
        value: dictionaries, lists, texts, numbers, None.
        kind: dataclass, `TypedDict` or any other type that msgspec converts to.
        subject: first words of the message, such as the file's name and `is damaged`.
        remedy: last clause of the message.
        strict: False reads numbers from texts as well.
        decode: makes a value of a type that is not one of msgspec's; default: calls the type.

    Raises:
        UserError: a value is missing, of another type, or refused by its class.
    """
    import msgspec

    try:
        return msgspec.convert(value, kind, strict=strict, dec_hook=decode or _call)
    except (msgspec.ValidationError, UserError, RecursionError, UnicodeEncodeError) as error:
        # The last for half a surrogate pair, which JSON may hold, in place of a number.
        raise UserError(f"{subject}{_where(str(error))}; {remedy}") from error


def check_keys(source: str | Path, where: str, given: Iterable[object], known: list[str]) -> None:
    """Raise UserError for a key that is not known, with the one that was probably meant."""
    for key in given:
        if key not in known:
            raise UserError(
                f"{source}: {where}{key!r} is not a key{did_you_mean(str(key), known)}; the keys "
                f"are {', '.join(known)}."
            )


def read_yaml(path: str | Path, *, texts: bool = False) -> Any:
    """Read a YAML file, in UTF-8, with a byte order mark or without; nothing in it is executed.

    Args:
        texts: leave words such as `no`, `1.10` and `null` the texts that they are written as.

    Raises:
        UserError: the file is missing, unreadable or not YAML.
    """
    import yaml

    try:
        text = read_bytes(path).decode("utf-8-sig")
        return yaml.load(text, yaml.BaseLoader if texts else yaml.SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # ValueError: bytes that are not UTF-8, or what YAML takes for a date, such as 2024-13-45.
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is not a YAML file ({reason}); correct it.") from error


def _call(kind: type[Any], value: Any) -> Any:
    made = getattr(kind, "__origin__", kind)
    try:
        return made(value)
    except TypeError:  # in words that depend on Python's version
        raise TypeError(f"Expected {made.__name__}, got {type(value).__name__}") from None


def _where(message: str) -> str:
    """Return the place in the value and the reason of one of msgspec's messages."""
    found = re.fullmatch(r"(.*) - at `\$(\.?)(.*)`", message, re.DOTALL)
    reason, dot, place = (found[1], found[2], found[3]) if found else (message, ".", "")
    words = " ".join(reason.replace("`", "").rstrip(".").split())[:300]
    if words.startswith(("Expected", "Object", "Invalid")):  # msgspec's, not those of a class
        words = words[0].lower() + words[1:]
    return f"{': ' if dot else ''}{place}{': ' if place else ''}{words}"
