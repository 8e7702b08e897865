"""The exception a user's mistake raises: one sentence that names the culprit and the remedy."""

from __future__ import annotations

import difflib
import importlib.metadata
import re
from collections.abc import Iterable, Mapping
from pathlib import Path


class UserError(Exception):
    """Bad input or wrong usage.

    The message is one sentence (or two short clauses) that names the file or parameter at fault and
    says what to do. The command line prints it on stderr, with its own options in place of the
    parameters, and exits with code 2.

    Examples:
        >>> error = UserError("IoU threshold 2 is out of range; give `iou` in 0..1.")
        >>> str(error)
        'IoU threshold 2 is out of range; give `iou` in 0..1.'
        >>> error.with_names({"iou": "--iou"})
        'IoU threshold 2 is out of range; give --iou in 0..1.'
    """

    def __init__(self, message: str) -> None:
        """Take the message, with parameters in backticks."""
        super().__init__(message)

    def with_names(self, names: Mapping[str, str]) -> str:
        """Return the message with other names, such as options, in place of parameters."""
        return re.sub(r"`(\w+)`", lambda found: names.get(found[1], found[0]), str(self))


class MissingDependencyError(UserError):
    """An optional package or device is absent; the message says what to install."""


class ClassesDifferError(UserError):
    """A detector does not know the classes of a data set, so that its AP there means nothing."""


def install_command(extra: str) -> str:
    """Return the command that installs what an extra of this package needs.

    pip reads the extras of a package that is installed, from a folder or a wheel, in its metadata
    and asks no index for it. There is none where the package is only on the path.
    """
    try:
        importlib.metadata.distribution("trt-yolov6")
    except importlib.metadata.PackageNotFoundError:
        return f'pip install "{Path(__file__).parents[1]}[{extra}]"'
    return f'pip install "trt-yolov6[{extra}]"'


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ` (did you mean ...?)` for a word that is nearly a known one; else nothing."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def first_line(error: BaseException, most: int = 300) -> str:
    """Return the first line of an error's text, at most `most` characters; else its class."""
    lines = str(error).strip().splitlines()
    return lines[0][:most] if lines else type(error).__name__
