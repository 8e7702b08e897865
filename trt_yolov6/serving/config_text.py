"""Protobuf's text format, as far as `config.pbtxt` needs it: strings, and the names of fields."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from trt_yolov6.errors import UserError

_TOKEN = re.compile(
    r"""
    (?P<space> \s+ | \#[^\n]* )
    | (?P<string> "(?:[^"\\\n]|\\.)*" | '(?:[^'\\\n]|\\.)*' )
    | (?P<open> [{<\[] )
    | (?P<close> [}>\]] )
    | (?P<word> [A-Za-z_][A-Za-z0-9_]* )
    | (?P<other> [-+.0-9][A-Za-z0-9_.+-]* | [:,;] )
    """,
    re.VERBOSE,
)

_CLOSING = {"{": "}", "<": ">", "[": "]"}


def quoted(text: str) -> str:
    """Return a string of protobuf's text format: bytes beyond printable ASCII as octal escapes."""
    characters = []
    for byte in text.encode():
        if byte in b'"\\':
            characters.append("\\" + chr(byte))
        else:
            characters.append(chr(byte) if 32 <= byte < 127 else f"\\{byte:03o}")
    return '"' + "".join(characters) + '"'


def fields_of(text: str) -> tuple[str, ...]:
    """Return the names of a message's own fields, in their order, those of messages inside aside.

    Raises:
        UserError: the text is not a message: an open bracket or string, or an invalid character.
    """
    return tuple(name for name, _, _ in _fields(text))


def without_fields(text: str, names: Collection[str]) -> str:
    """Return a message without its own fields of these names.

    Raises:
        UserError: as `fields_of`.
    """
    kept, end = [], 0
    for name, start, stop in _fields(text):
        if name in names:
            kept.append(text[end:start])
            end = stop
    return "".join([*kept, text[end:]])


def _fields(text: str) -> Iterator[tuple[str, int, int]]:
    """Yield each field's name, where it starts and where the next does."""
    open_brackets: list[str] = []
    found: list[tuple[str, int]] = []
    after_colon = False
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise _unreadable(text, position)
        kind, token = match.lastgroup, match[0]
        if not found and kind not in ("space", "word"):
            raise _unreadable(text, position)
        if kind == "open":
            open_brackets.append(_CLOSING[token])
        elif kind == "close":
            if not open_brackets or open_brackets.pop() != token:
                raise _unreadable(text, position)
        elif kind == "word" and not open_brackets and not after_colon:
            found.append((token, position))
        if kind != "space":
            after_colon = token == ":"
        position = match.end()
    if open_brackets:
        raise UserError(f"`extra` lacks a {open_brackets[-1]!r} at its end; add it.")
    starts = [start for _, start in found] + [len(text)]
    yield from ((name, start, end) for (name, start), end in zip(found, starts[1:], strict=True))


def _unreadable(text: str, position: int) -> UserError:
    line = text.count("\n", 0, position) + 1
    return UserError(
        f"`extra` cannot be read from line {line} on, at {text[position : position + 20]!r}; give "
        "fields of Triton's ModelConfig in protobuf's text format."
    )
