"""Files are written whole or not at all, and only plain files are ever replaced."""

from __future__ import annotations

import contextlib
import os
import pkgutil
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from trt_yolov6.common.files import (
    atomic_path,
    check_writable,
    one_writer,
    read_bytes,
    read_json,
    sha256_bytes,
    sha256_file,
    sole_writer,
    write_bytes,
)
from trt_yolov6.errors import UserError


def test_a_failure_leaves_the_old_content_and_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "value.txt"
    write_bytes(path, b"old")

    def fail_halfway() -> None:
        with atomic_path(path) as temporary:
            temporary.write_bytes(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_halfway()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("block", [atomic_path, one_writer, sole_writer])
def test_a_failure_leaves_no_new_folder(
    tmp_path: Path, block: Callable[[Path], contextlib.AbstractContextManager[object]]
) -> None:
    (tmp_path / "old").mkdir()

    def fail() -> None:
        with block(tmp_path / "old" / "new" / "newer" / "value.txt"):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.rglob("*")) == [tmp_path / "old"]


@pytest.mark.parametrize("block", [atomic_path, sole_writer])
@pytest.mark.parametrize("step", ["os.access", "pathlib.Path.mkdir", "tempfile.mkstemp", "os.open"])
def test_a_writer_makes_a_folder_again_that_another_one_made_and_takes_away(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    block: Callable[[Path], contextlib.AbstractContextManager[object]],
    step: str,
) -> None:
    folder = tmp_path / "new"
    folder.mkdir()
    module, _, name = step.rpartition(".")
    original = getattr(pkgutil.resolve_name(module), name)
    left = [folder]

    def without(*arguments: object, **more: object) -> object:
        if left:
            left.pop().rmdir()
        return original(*arguments, **more)

    monkeypatch.setattr(step, without)
    with block(folder / "value" if block is atomic_path else folder):
        assert folder.is_dir()


def test_a_new_folder_that_others_have_filled_stays(tmp_path: Path) -> None:
    def fail() -> None:
        with atomic_path(tmp_path / "new" / "value.txt"):
            (tmp_path / "new" / "other").touch()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.rglob("*")) == [tmp_path / "new", tmp_path / "new" / "other"]


def test_a_file_gets_the_permissions_of_a_plain_open(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a", b"")
    (tmp_path / "b").touch()
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in "ab"}
    assert len(modes) == 1


def test_a_name_may_be_as_long_as_the_file_system_takes(tmp_path: Path) -> None:
    name = "a" * 251 + ".png"
    write_bytes(tmp_path / name, b"whole")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(name, b"whole")]


def test_a_link_is_followed_not_replaced(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"old")
    link.symlink_to(target)
    write_bytes(link, b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"


def test_a_device_is_written_to_not_replaced() -> None:
    write_bytes("/dev/null", b"gone")
    assert not Path("/dev/null").is_file()


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_bytes(pipe, b"through")
        assert os.read(reader, 100) == b"through"
    finally:
        os.close(reader)


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        return
    with pytest.raises(UserError, match="cannot be written"):
        write_bytes(full, b"x" * 100_000)


def test_a_folder_has_one_sole_writer_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with (
        sole_writer(folder),
        pytest.raises(UserError, match=r"another process is writing to .*run"),
        sole_writer(folder),
    ):
        pass
    assert not folder.exists()
    with sole_writer(folder):
        assert [path.name for path in folder.iterdir()] == [".lock"]
        (folder / "last.pt").touch()
    assert [path.name for path in folder.iterdir()] == ["last.pt"]


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder"):
        write_bytes(tmp_path, b"")


def test_a_pipe_is_written_to_by_way_of_its_descriptor() -> None:
    end, start = os.pipe()
    with open(end, "rb") as reader:
        with open(start, "wb"):
            check_writable(f"/dev/fd/{start}")
            write_bytes(f"/dev/fd/{start}", b"result")
        assert reader.read() == b"result"


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[" * 200_000])
def test_what_is_no_json_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.json is not a JSON file"):
        read_json(tmp_path / "x.json")


def test_hashes_are_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    # The example of FIPS 180-2.
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_file(tmp_path / "x") == sha256_bytes(b"abc") == known


def test_a_read_only_folder_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # root may write anywhere, so the tests cannot make a folder that refuses.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(UserError, match=r"x\.onnx cannot be written"):
        check_writable(tmp_path / "new" / "x.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [0, 1, 3 * 2**20])
def test_a_file_is_read_whole_and_so_is_a_pipe(tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    file, pipe = tmp_path / "file", tmp_path / "pipe"
    file.write_bytes(content)
    assert read_bytes(file) == content
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(content,))
    writer.start()
    assert read_bytes(pipe) == content
    writer.join()


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(UserError, match=rf"{path.name} cannot be read \({reason}"):
            read_bytes(path)
