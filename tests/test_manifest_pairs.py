"""An engine and its manifest stay a pair: with two writers, after a kill, under any locale."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.small_graphs import detector

from trt_yolov6.common.files import file_name, sha256_bytes, sha256_file
from trt_yolov6.engines import LoadOptions, load_engine, manifest
from trt_yolov6.engines.build import BuiltEngine, build_engine
from trt_yolov6.engines.manifest import read_manifest, write_pair
from trt_yolov6.graph.onnx_import import graph_from_onnx
from trt_yolov6.serving.ray.engine_files import read_engine


@pytest.fixture
def built(tmp_path: Path) -> BuiltEngine:
    source = tmp_path / "source.onnx"
    source.write_bytes(detector().SerializeToString())
    return build_engine(
        graph_from_onnx(source), backend="onnxruntime", output=tmp_path / "out" / "e.onnx"
    )


def write_often(path: Path, value: Any, number: int, times: int) -> None:
    plan = bytes([number]) * 100_000
    own = dataclasses.replace(value, model=f"network {number}", plan_sha256=sha256_bytes(plan))
    for _ in range(times):
        write_pair(path, plan, own)


def test_several_writers_of_one_engine_leave_one_whole_pair(built: BuiltEngine) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [
        context.Process(target=write_often, args=(built.path, built.manifest, number, 30))
        for number in (1, 2)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    left = read_manifest(built.path)
    assert left is not None
    assert left.plan_sha256 == sha256_file(built.path)
    assert left.model == f"network {built.path.read_bytes()[0]}"
    assert sorted(path.name for path in built.path.parent.iterdir()) == ["e.json", "e.onnx"]


@pytest.mark.parametrize("step", ["atomic_path", "write_manifest"])
def test_a_kill_while_writing_leaves_the_old_pair_or_the_new(
    built: BuiltEngine, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """The two places where one file of the pair is there already."""
    plan = b"another plan"
    new = dataclasses.replace(built.manifest, plan_sha256=sha256_bytes(plan))

    class Killed(BaseException):
        pass

    def die(*arguments: Any) -> Any:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(manifest, step, die)
        with pytest.raises(Killed):
            write_pair(built.path, plan, new)
    left = read_manifest(built.path)
    assert left is not None
    assert left.plan_sha256 == sha256_file(built.path)
    is_new = built.path.read_bytes() == plan
    assert is_new == (step == "write_manifest")
    assert [path.name for path in built.path.parent.iterdir() if "pending" in path.name] == []


def test_a_name_outside_the_terminal_s_encoding_is_printed_and_found_again(
    built: BuiltEngine, root: Path, tmp_path: Path
) -> None:
    ascii_only = {
        **os.environ,
        "PYTHONPATH": str(root),
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONIOENCODING": "ascii",
    }
    command = [sys.executable, "-m", "trt_yolov6"]
    arguments = ["build", "--onnx", "source.onnx", "--backend", "onnxruntime"]
    done = subprocess.run(
        [*command, *arguments, "--output", "\u8840.onnx"],
        cwd=tmp_path,
        env=ascii_only,
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b".onnx" in done.stdout
    path = tmp_path / "\u8840.onnx"
    assert json.loads((tmp_path / "\u8840.json").read_text())["engine"] == path.name
    with load_engine(path) as engine:
        assert engine.manifest is not None
    latin = {**os.environ, "PYTHONPATH": str(root), "PYTHONIOENCODING": "latin-1"}
    for environment in (ascii_only, latin):
        done = subprocess.run(
            [*command, "inspect", path.name],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, b"")
        assert b"source.onnx" in done.stdout


def test_a_link_has_the_manifest_of_the_file_it_leads_to(
    built: BuiltEngine, tmp_path: Path
) -> None:
    known = read_manifest(built.path)
    link = tmp_path / "latest.onnx"
    link.symlink_to(built.path)
    (tmp_path / "of-it.onnx").symlink_to(link)
    for path in (link, tmp_path / "of-it.onnx"):
        assert read_manifest(path) == known
        assert manifest.manifest_of(path) == built.manifest_path
        with load_engine(path) as engine:
            assert engine.manifest == known
    files, facts = read_engine(link, "auto", LoadOptions())
    assert (set(files.contents), facts.name) == ({"e.onnx", "e.json"}, "e.onnx")


def test_file_names_are_spelled_alike_under_every_locale() -> None:
    assert file_name("a/\u8840.onnx") == "\u8840.onnx"
    surrogates = os.fsencode("\u8840.onnx").decode("ascii", "surrogateescape")
    assert file_name(surrogates) == "\u8840.onnx"
