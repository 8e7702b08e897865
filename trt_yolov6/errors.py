"""The exception a user's mistake raises: one sentence that names the culprit and the remedy."""

from __future__ import annotations


class UserError(Exception):
    """Bad input or wrong usage.

    The message is one sentence (or two short clauses) that names the file or option at fault and
    says what to do. The command line prints it on stderr and exits with code 2.
    """


class MissingDependencyError(UserError):
    """An optional package or device is absent; the message says what to install."""
