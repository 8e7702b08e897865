"""The exception a user's mistake raises: one sentence that names the culprit and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input or wrong usage.

    The message is one sentence (or two short clauses) that names the file or option at fault and
    says what to do. The command line prints it on stderr and exits with code 2.
    """


class MissingDependencyError(UserError):
    """An optional package or device is absent; the message says what to install."""


class ClassesDifferError(UserError):
    """A detector does not know the classes of a data set, so that its AP there means nothing."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ` (did you mean ...?)` for a word that is nearly a known one; else nothing."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""
