"""Files: read, written whole or not at all, and their hashes."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import reprlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from trt_yolov6.errors import UserError

_Made = TypeVar("_Made")

_PART = 2**20
"""Bytes read at a time where the size is not known before."""


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`; rename it to `path` on success, delete it on failure.

    The temporary name keeps the suffix, because some writers choose the format by it. A link is
    followed; anything but a regular file (`/dev/stdout`, a pipe) is written to, never replaced.

    Raises:
        UserError: `path` is a folder, or it, its folder or its disk cannot be written to.
    """
    path = check_writable(path)
    in_place = path.exists() and not path.is_file()
    # By the stem, `training.state.sweep` knows what a kill left; names have a limit.
    prefix = f".{path.stem[:40]}."
    try:
        with made_folder(path.parent):
            place = None if in_place else path.parent
            handle, name = _made_in(
                path.parent, lambda: tempfile.mkstemp(path.suffix, prefix, place)
            )
            os.close(handle)
            temporary = Path(name)
            try:
                yield temporary
                if in_place:
                    path.write_bytes(temporary.read_bytes())
                else:
                    # mkstemp makes files private; a plain open() gives these permissions.
                    umask = os.umask(0)
                    os.umask(umask)
                    temporary.chmod(0o666 & ~umask)
                    temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise unwritable(path, error) from error


@contextlib.contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Make a folder and its parents for a block; at its end the new ones go that are empty."""
    new = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        _made_in(folder, lambda: None)
        yield
    finally:
        with contextlib.suppress(OSError):  # there are files in it
            for one in new:
                one.rmdir()


def _made_in(folder: Path, make: Callable[[], _Made], tries: int = 20) -> _Made:
    """Make a file in a folder, and the folder where it is missing; return the result of `make`.

    Until there is a file in it, a process that made it and then failed may remove it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return make()
    except (FileNotFoundError, FileExistsError):  # the last: it went after `mkdir` met it
        if not tries:
            raise
        return _made_in(folder, make, tries - 1)


@contextlib.contextmanager
def one_writer(folder: str | Path) -> Iterator[None]:
    """Wait until no other process is in such a block for this folder; made if missing.

    For files that belong together, written in turn. Where the file system has no locks, nothing is
    waited for.
    """
    with contextlib.ExitStack() as stack:
        # OSError: not such a system, or what writes there will say why.
        with contextlib.suppress(ImportError, OSError):
            stack.enter_context(made_folder(Path(folder)))
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def sole_writer(folder: str | Path) -> Iterator[None]:
    """Refuse a folder, made if missing, that another process is in such a block for.

    For work of hours, where `one_writer` would wait. Its file `.lock` goes at the end, and so does
    a new folder without a file; where the file system has no locks, nothing is refused.

    Raises:
        UserError: there is such a process, or the folder cannot be written to.
    """
    file = Path(folder) / ".lock"
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(made_folder(file.parent))
            handle = _made_in(file.parent, lambda: os.open(file, os.O_CREAT | os.O_WRONLY))
        except OSError as error:
            raise unwritable(Path(folder), error) from error
        stack.callback(os.close, handle)
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"another process is writing to {folder}; give another `output`."
                ) from None
        stack.callback(file.unlink, missing_ok=True)
        yield


def file_name(path: str | Path) -> str:
    """Return a file's name as UTF-8 spells it, whatever the locale."""
    return in_utf8(Path(path).name)


def path_of(value: Any, name: str) -> Path:
    """Return a path that is given as a text or a path.

    Raises:
        UserError: it is something else; the message names `name`.
    """
    if not isinstance(value, (str, os.PathLike)):
        raise UserError(f"`{name}` is {reprlib.repr(value)}; give a path.")
    return Path(value)


def in_utf8(path: str) -> str:
    """Return a path as UTF-8 spells it.

    Under `LC_ALL=C`, Python has the bytes of names outside ASCII as surrogates.
    """
    return os.fsencode(path).decode("utf-8", "surrogateescape")


def is_utf8(text: str) -> bool:
    """Return whether a name that `in_utf8` gave is in UTF-8, without a byte as a surrogate."""
    return text.encode(errors="ignore").decode() == text


def native_name(name: str) -> str:
    """Return a name that `file_name` gave as this process spells it in paths."""
    return os.fsdecode(name.encode("utf-8", "surrogateescape"))


def check_writable(path: str | Path) -> Path:
    """Return the path with links followed; quick, so ask before long work.

    Raises:
        UserError: it is a folder, or its parent is not a folder that can be written to.
    """
    path = Path(path)
    # `/dev/stdout` leads to a pipe's name, which no path is.
    try:
        if path.is_symlink() and (path.is_file() or not path.exists()):
            path = path.resolve()
    except OSError as error:  # the name is longer than the system allows
        raise unwritable(path, error) from error
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file in it.")
    if not path.exists() or path.is_file():
        check_folder(path.parent, path)
    # What is there and no regular file (a pipe) is written to in place.
    elif not os.access(path, os.W_OK):
        raise _denied(path)
    return path


def check_folder(folder: Path, shown: Path | None = None) -> None:
    """Check that files can be written into a folder that is there or can be made.

    Raises:
        UserError: they cannot; it names `shown`, or else the folder with its whole path.
    """
    folder = folder.absolute()
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if there.is_file():
        raise UserError(
            f"{shown or folder} cannot be written ({there} is a file); choose another path."
        )
    # It may have gone since: the new folder of a process that failed.
    if not os.access(there, os.W_OK) and there.exists():
        raise _denied(shown or folder)


def _denied(path: Path) -> UserError:
    return unwritable(path, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))


def unwritable(path: Path, error: OSError) -> UserError:
    """Return the error for a file or folder that the system does not let be written."""
    return UserError(
        f"{path} cannot be written ({error.strerror or error}); free disk space or choose a folder "
        "you may write to."
    )


def write_bytes(path: str | Path, content: bytes | memoryview) -> None:
    """Write `content` to `path` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def read_bytes(path: str | Path) -> bytes:
    """Read a file.

    Raises:
        UserError: it is missing or cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        try:
            # Four system calls; `Path.read_bytes` makes nine, and each lets go of the interpreter,
            # for which threads that read files then queue.
            size = os.fstat(descriptor).st_size
            content = os.read(descriptor, size + 1)
            if len(content) == size:
                return content
            parts = [content]  # a pipe, a file that grows, or one beyond what is read at a time
            while parts[-1]:
                parts.append(os.read(descriptor, max(size, _PART)))
            return b"".join(parts)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check the path.") from error


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON to `path` atomically."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: str | Path) -> Any:
    """Read a JSON file, in UTF-8, 16 or 32, with a byte order mark or without.

    Raises:
        UserError: the file is missing, unreadable or no JSON.
    """
    try:
        return json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a JSON file ({error}); check or replace it.") from error


def sha256_bytes(content: bytes) -> str:
    """Return the SHA-256 of `content`, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def sha256_file(path: str | Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else sha256_bytes(file.read())
        )
