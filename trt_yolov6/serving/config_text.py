"""Protobuf's text format, as far as `config.pbtxt` needs it: strings, and the names of fields."""

from __future__ import annotations

import re

from google.protobuf import text_encoding, text_format
from google.protobuf.empty_pb2 import Empty

from trt_yolov6.errors import UserError


def quoted(text: str) -> str:
    """Return a string of protobuf's text format: bytes beyond printable ASCII as octal escapes."""
    return f'"{text_encoding.CEscape(text.encode(), as_utf8=False)}"'


def fields_of(text: str) -> tuple[str, ...]:
    """Return the names of a message's own fields, in their order, those of messages inside aside.

    Raises:
        UserError: the text is not a message.
    """
    # Triton's documents write `instance_group [`, which is read of known fields alone.
    text = re.sub(r"(\w\s*)\[", r"\1: [", text)
    try:
        text_format.Parse(text, Empty(), allow_unknown_field=True)
    except text_format.ParseError as error:
        raise UserError(
            f"`extra` cannot be read ({error}); give fields of Triton's ModelConfig in protobuf's "
            "text format."
        ) from error
    tokens = text_format.Tokenizer(text.splitlines())
    names: list[str] = []
    depth, before = 0, ""
    while not tokens.AtEnd():
        token = tokens.token
        depth += (token in ("{", "<", "[")) - (token in ("}", ">", "]"))
        if depth == 0 and before != ":" and token.isidentifier():
            names.append(token)
        before = token
        tokens.NextToken()
    return tuple(names)
