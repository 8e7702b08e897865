"""Results of a job on disk or in a store, in parts that are written whole.

A job's folder has `job.json`, all that decides the results, and `part-000000.jsonl` (or `.parquet`)
and so on, in the order of writing. A picture is done if a part has it.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trt_yolov6.common.closing import Closing
from trt_yolov6.common.files import check_writable, write_bytes
from trt_yolov6.data.media import is_address
from trt_yolov6.errors import UserError, first_line
from trt_yolov6.serving.ray.pictures import file_system, place_of

if TYPE_CHECKING:
    import pyarrow

PartFormat = Literal["jsonl", "parquet"]


JOB_FILE = "job.json"

ROWS = 1000
"""Pictures of a part at most."""

SECONDS = 30.0
"""Longest time between two parts: what a kill costs."""

_PART = re.compile(r"part-(\d{6,})\.(jsonl|parquet)")


class ResultFolder:
    """The files of a job's folder, by name, on disk or in a store."""

    def __init__(self, place: str | Path) -> None:
        from pyarrow.fs import LocalFileSystem

        self.place = str(place)
        self.is_local = not is_address(self.place)
        """True for a folder of the machine that starts the job."""
        if self.is_local:
            self._system, self._path = LocalFileSystem(), self.place
        else:
            store, self._path = place_of(self.place)
            self._system, _ = file_system(store)

    def names(self) -> list[str]:
        """Return the names of the files, sorted; none where there is no folder yet."""
        from pyarrow.fs import FileSelector

        with self._faults("listed"):
            found = self._system.get_file_info(FileSelector(self._path, allow_not_found=True))
        return sorted(one.base_name for one in found)

    def read(self, name: str) -> bytes:
        """Return the content of a file."""
        with self._faults("read"), self._system.open_input_file(f"{self._path}/{name}") as file:
            content: bytes = file.read()
        return content

    def write(self, name: str, content: bytes) -> None:
        """Write a file, whole or not at all."""
        if self.is_local:
            write_bytes(Path(self._path) / name, content)
            return
        with self._faults("written"):
            self._system.create_dir(self._path, recursive=True)
            with self._system.open_output_stream(f"{self._path}/{name}") as stream:
                stream.write(content)

    @contextlib.contextmanager
    def _faults(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.place} cannot be {what} ({first_line(error, 200)}); check `output` and the "
                "right to it."
            ) from error


def open_job(folder: ResultFolder, job: dict[str, Any]) -> None:
    """Make sure that a folder can be written to, and that the parts that it holds are of this job.

    A job is all that decides the results, as values of JSON. A store is written to at once, to see
    whether it can be; a folder of this machine with the first part (see `PartWriter`).

    Raises:
        UserError: they are of another job, or the folder cannot be written to.
    """
    names = folder.names()
    if not any(_PART.fullmatch(name) for name in names):
        if folder.is_local:
            check_writable(Path(folder.place) / JOB_FILE)
        else:
            _write_job(folder, job)
        return
    if JOB_FILE in names:
        try:
            kept = json.loads(folder.read(JOB_FILE))
            differing = sorted(
                key for key in kept.keys() | job.keys() if kept.get(key) != job.get(key)
            )
        except (ValueError, AttributeError) as error:
            raise UserError(
                f"{folder.place}/{JOB_FILE} is damaged; give another `output`."
            ) from error
        if differing:
            raise UserError(
                f"{folder.place} holds results of another {differing[0]} "
                f"({kept.get(differing[0])!r}, not {job.get(differing[0])!r}); give another "
                "`output`, or the options it was begun with."
            )
        return
    raise UserError(f"{folder.place} holds parts but no {JOB_FILE}; give another `output`.")


def _write_job(folder: ResultFolder, job: dict[str, Any]) -> None:
    folder.write(JOB_FILE, (json.dumps(job, indent=2) + "\n").encode())


def part_names(folder: ResultFolder) -> list[str]:
    """Return the names of the parts that are there, in the order they were written."""
    return [name for name in folder.names() if _PART.fullmatch(name)]


def files_in(folder: ResultFolder) -> Iterator[str]:
    """Yield the `file` of every picture in a folder's parts.

    Raises:
        UserError: a part is damaged.
    """
    for name in part_names(folder):
        content = folder.read(name)
        try:
            if name.endswith(".jsonl"):
                yield from [json.loads(line)["file"] for line in content.splitlines()]
            else:
                import pyarrow
                import pyarrow.parquet

                table = pyarrow.parquet.read_table(pyarrow.BufferReader(content), columns=["file"])
                yield from table["file"].to_pylist()
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise UserError(
                f"{folder.place}/{name} is damaged; delete it to compute its images again."
            ) from error


class PartWriter(Closing):
    """Gathers rows and writes them as parts; use it in a `with` block, which writes the last.

    What the job is, is written before the first part.
    """

    def __init__(
        self,
        folder: ResultFolder,
        kind: PartFormat,
        job: dict[str, Any],
        rows: int = ROWS,
        seconds: float = SECONDS,
    ) -> None:
        self._folder, self._kind, self._job = folder, kind, job
        self._most, self._seconds = rows, seconds
        self._rows: list[str] = []
        self._since = 0.0
        numbers = [int(match[1]) for name in folder.names() if (match := _PART.fullmatch(name))]
        self._next = max(numbers, default=-1) + 1

    def add(self, row: str) -> None:
        """Take a picture: a JSON object of `file`, `width`, `height` and `detections`, one line."""
        if not self._rows:
            self._since = time.monotonic()
        self._rows.append(row)
        if len(self._rows) >= self._most:
            self.flush()

    def flush_if_due(self) -> None:
        """Write a part if its first row has waited long enough."""
        if self._rows and time.monotonic() - self._since >= self._seconds:
            self.flush()

    def flush(self) -> None:
        """Write what has been gathered as a part."""
        if not self._rows:
            return
        content = "".join(f"{row}\n" for row in self._rows).encode()
        if self._kind == "parquet":
            content = _parquet(content)
        if self._next == 0:
            _write_job(self._folder, self._job)
        self._folder.write(f"part-{self._next:06d}.{self._kind}", content)
        self._next += 1
        self._rows = []

    def close(self) -> None:
        """Write the last part; also when the job fails, as what was computed is right."""
        self.flush()


def parquet_schema(box_length: int = 4) -> pyarrow.Schema:
    """Return the columns of a Parquet part; a row is a picture.

    A `box_length` of -1 leaves it open, as Arrow's reader of JSON wants it.
    """
    import pyarrow as pa

    detection = pa.struct(
        [
            ("box", pa.list_(pa.float64(), box_length)),
            ("score", pa.float64()),
            ("class", pa.int64()),
            ("name", pa.string()),
        ]
    )
    return pa.schema(
        [
            ("file", pa.string()),
            ("width", pa.int32()),
            ("height", pa.int32()),
            ("detections", pa.list_(detection)),
        ]
    )


def _parquet(lines: bytes) -> bytes:
    """Return a Parquet file of rows that are JSON objects, one a line."""
    import pyarrow as pa
    import pyarrow.json
    import pyarrow.parquet

    table = pyarrow.json.read_json(
        pa.BufferReader(lines),
        read_options=pyarrow.json.ReadOptions(block_size=len(lines) + 1),
        parse_options=pyarrow.json.ParseOptions(explicit_schema=parquet_schema(-1)),
    )
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(table.cast(parquet_schema()), sink)
    content: bytes = sink.getvalue().to_pybytes()
    return content
