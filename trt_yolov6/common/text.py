"""Tables and numbers as text for a terminal."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Align columns.

    Args:
        rows: all of one length; the head is one of them.
        left: columns that are aligned to the left; the others, numbers, to the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def fitted(rows: Sequence[Sequence[str]], left: int, width: int | None) -> list[str]:
    """Align columns, of which the first holds names, in lines of at most `width` if possible.

    Where they are longer, what all names begin with is a line of its own; where that is not
    enough, each name is. None allows any length.
    """

    def fit(lines: list[str]) -> bool:
        return width is None or max(map(len, lines)) <= width

    lines = aligned(rows, left)
    if fit(lines):
        return lines
    head, *body = rows
    names = [row[0] for row in body]
    shared = os.path.commonprefix(names)  # noqa: RUF071 - letters, not folders
    shared = shared[: 1 + max(map(shared.rfind, "/ -_."))]
    if shared and len(set(names)) > 1:
        short = [(row[0].removeprefix(shared), *row[1:]) for row in body]
        lines = [f"{shared}...", *aligned([head, *short], left)]
        if fit(lines):
            return lines
    first, *others = (f"  {line}" for line in aligned([row[1:] for row in rows], left - 1))
    return [first, *(line for pair in zip(names, others, strict=True) for line in pair)]


def joined(*parts: object) -> str:
    """Join parts with commas, without those that are empty, None, 0 or False."""
    return ", ".join(str(part) for part in parts if part)


def counted(number: int, what: str) -> str:
    """Return a number of things, such as `1 image`, `2 images` or `2 classes`."""
    plural = "es" if what.endswith("s") else "s"
    return f"{number} {what}{plural * (number != 1)}"


def of_highest(now: float | None, highest: float | None) -> str:
    """Return a clock and the highest it may have, such as `1410 of 1980`."""
    text = "unknown" if now is None else f"{now:.0f}"
    return text if highest is None else f"{text} of {highest:.0f}"


def four_digits(value: float) -> str:
    """Return a number of 0 or more with four significant digits, without an exponent."""
    if value <= 0:
        return "0"
    return f"{value:.{max(0, 3 - math.floor(math.log10(value)))}f}"
