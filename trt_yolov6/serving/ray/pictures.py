"""Sources of a job on many machines: folders, listings, globs and object store addresses."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlunsplit

from trt_yolov6.data.images import IMAGE_SUFFIXES
from trt_yolov6.data.media import Video, find_media, is_address, split_address
from trt_yolov6.errors import MissingDependencyError, UserError, first_line

LISTING_SUFFIXES = (".txt", ".lst")
"""A file of paths and addresses, one a line."""


@dataclass(frozen=True)
class RemotePicture:
    """A picture that every machine of a cluster can read."""

    name: str
    """Path below the source, with slashes; for a listing, the line as written."""
    store: str
    """Address of the file system, such as `s3://bucket/?region=eu-west-1`; empty for a path."""
    path: str
    """An absolute path, or the place in the store as pyarrow names it (`bucket/key`)."""

    def source(self) -> tuple[Path | bytes, str | None]:
        """Return its file, or its content and a name for messages where it lies in a store.

        Raises:
            UserError: the store does not give it.
        """
        if not self.store:
            return Path(self.path), None
        return read_bytes(self.store, self.path), f"{_scheme(self.store)}://{self.path}"


def find_pictures(source: str | Path) -> tuple[RemotePicture, ...]:
    """List the pictures of a source; nothing of them is read yet.

    Args:
        source: a folder with its sub-folders, a picture, a glob, a listing (`.txt` or `.lst`, a
            path or an address a line, paths being relative to it), or the address of a folder, a
            listing or a picture in a store that pyarrow or fsspec reads: `s3://`, `gs://`,
            `hdfs://`, `abfs://` and others. Paths must be the same on every machine.

    Returns:
        Each picture once, under a name of its own, sorted by name; a listing keeps its order.

    Raises:
        UserError: nothing is there, it is a video, or the store does not answer.
    """
    text = str(source)
    if is_address(text):
        return _below_address(text)
    path = Path(text)
    if path.suffix.lower() in LISTING_SUFFIXES and path.is_file():
        try:
            lines = path.read_text("utf-8-sig").splitlines()
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read as a listing ({error}); check it.") from error
        return _listed(lines, str(path), path.absolute().parent)
    media = find_media(text)
    if isinstance(media, Video):
        raise UserError(
            f"{text} is a video, which one machine decodes in order; infer it without Ray."
        )
    return tuple(
        RemotePicture(item.name, "", str(item.path.absolute()))
        for item in media.items
        if item.path is not None
    )


def read_bytes(store: str, path: str) -> bytes:
    """Return a file of a store.

    Raises:
        UserError: the store does not give it.
    """
    system, _ = file_system(store)
    try:
        with system.open_input_file(path) as file:
            content: bytes = file.read()
    except OSError as error:
        raise UserError(
            f"{_scheme(store)}://{path} cannot be read ({first_line(error, 200)}); check the "
            "address and the credentials."
        ) from error
    return content


@functools.lru_cache(maxsize=64)
def file_system(store: str) -> tuple[Any, str]:
    """Return pyarrow's file system for the address of a store, and the path that it stands for.

    Raises:
        UserError: no installed package reads such addresses.
    """
    from pyarrow import ArrowException
    from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem

    try:
        system, path = FileSystem.from_uri(store)
    except (ArrowException, ValueError, OSError) as error:
        import fsspec

        if _scheme(store) not in fsspec.available_protocols():
            raise UserError(
                f"{store} cannot be opened ({first_line(error, 200)}); give a path, or an address "
                "that pyarrow or fsspec reads."
            ) from error
        try:
            inner, path = fsspec.core.url_to_fs(store)
        except ImportError as missing:
            raise MissingDependencyError(f"{store} needs a package: {missing}.") from missing
        except (ValueError, OSError) as other:
            raise UserError(f"{store} cannot be opened ({other}); check the address.") from other
        system = PyFileSystem(FSSpecHandler(inner))
    return system, path.rstrip("/")


def place_of(address: str) -> tuple[str, str]:
    """Split an address into that of its store, which keeps the options, and the path there."""
    parts = split_address(address)
    store = urlunsplit((parts.scheme.lower(), parts.netloc, "/", parts.query, ""))
    inside = parts.path.strip("/")
    _, base = file_system(store)
    if not base and store.startswith("file:"):
        return store, f"/{inside}"
    return store, "/".join(part for part in (base, inside) if part) or "/"


def _below_address(address: str) -> tuple[RemotePicture, ...]:
    from pyarrow.fs import FileSelector, FileType

    store, place = place_of(address)
    system, _ = file_system(store)
    try:
        what = system.get_file_info(place)
        if what.type == FileType.File:
            if PurePosixPath(place).suffix.lower() in LISTING_SUFFIXES:
                lines = read_bytes(store, place).decode("utf-8-sig").splitlines()
                return _listed(lines, address, None)
            return (RemotePicture(PurePosixPath(place).name, store, place),)
        found = system.get_file_info(FileSelector(place, recursive=True, allow_not_found=True))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{address} cannot be listed ({first_line(error, 200)}); check the address and the "
            "credentials."
        ) from error
    pictures = [
        RemotePicture(name, store, place + "/" + name)
        for name in (one.path[len(place) :].lstrip("/") for one in found if one.is_file)
        if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in name.split("/"))
    ]
    if not pictures:
        raise UserError(
            f"{address} holds no image ({', '.join(IMAGE_SUFFIXES)}); check the address."
        )
    return tuple(sorted(pictures, key=lambda picture: picture.name))


def _listed(lines: Iterable[str], listing: str, folder: Path | None) -> tuple[RemotePicture, ...]:
    entries = map(str.strip, lines)
    # Twice in a listing is one picture.
    names = dict.fromkeys(entry for entry in entries if entry and not entry.startswith("#"))
    if not names:
        raise UserError(f"{listing} lists no image; write one path or address per line.")
    return tuple(_entry(name, listing, folder) for name in names)


def _entry(name: str, listing: str, folder: Path | None) -> RemotePicture:
    if is_address(name):
        return RemotePicture(name, *place_of(name))
    if folder is None and not os.path.isabs(name):
        raise UserError(
            f"{listing} lists {name}, a relative path; a listing in a store needs addresses "
            "or absolute paths."
        )
    return RemotePicture(name, "", str((folder or Path("/")) / name))


def _scheme(store: str) -> str:
    return store.partition("://")[0]
