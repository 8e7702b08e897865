"""TensorRT cannot run here: its API, as its own bindings describe it, is what our code is held to.

`engines/tensorrt/api.pyi` has what any supported release has, for mypy and editors. Here mypy
checks the folder once more for each release in tests/data/tensorrt_api.json: a copy of it, in
which `api.pyi` is that release's.

What only some releases have is marked in the code, with the releases and the reason:

    # API: tensorrt<11 (calibrators are gone in 11)
    # API: not tensorrt<10 (8 tells no progress; TensorRT-RTX does)

at the end of a statement's first line for that statement with all its body, or on a line of its own
before the first import for the file.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from support import tensorrt_api

from trt_yolov6.engines.tensorrt.rtx import TARGETS

ROOT = Path(__file__).parents[1]
MARK = re.compile(
    r"#\s*API: (?P<other>not )?(?P<requirement>[\w-]+(?:[<>=!~][\w.,<>=!~]*)?) \((?P<reason>.+)\)"
)
RELEASES = tensorrt_api.read_snapshot()
OF_ANY_KIND = {"images", "batch", "in_use"}
"""Names annotated `Any`: NumPy arrays, or views of GPU memory."""


@dataclass(frozen=True)
class Mark:
    """A part of a file that is for some releases only."""

    first: int
    last: int
    requirement: Requirement
    other: bool
    """For the releases that do not meet the requirement."""

    @classmethod
    def of(cls, match: re.Match[str], first: int, last: int) -> Mark:
        return cls(first, last, Requirement(match["requirement"]), match["other"] is not None)

    def admits(self, release: str) -> bool:
        name, version = release.split()
        met = self.requirement.name == name and version in self.requirement.specifier
        return met != self.other


@dataclass(frozen=True)
class Source:
    """A file of the folder."""

    path: Path

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.path.read_text())

    @cached_property
    def marks(self) -> tuple[Mark, ...]:
        """Parts of the file that are for some releases."""
        found = []
        lines = self.path.read_text().splitlines()
        for number, text in enumerate(lines, start=1):
            if match := MARK.search(text):
                last = number
                if text.startswith("#"):
                    number, last = 1, len(lines)
                for node in ast.walk(self.tree):
                    if isinstance(node, ast.stmt) and node.lineno == number:
                        last = max(last, node.end_lineno or 0)
                found.append(Mark.of(match, number, last))
        return tuple(found)

    def releases(self, line: int) -> list[str]:
        """Return the releases that a line is for."""
        marks = [mark for mark in self.marks if mark.first <= line <= mark.last]
        return [release for release in RELEASES if all(mark.admits(release) for mark in marks)]


SOURCES = {path.stem: Source(path) for path in sorted(tensorrt_api.PACKAGE.glob("*.py"))}


@dataclass(frozen=True)
class Problem:
    """An error that mypy reports in a copy."""

    package: str
    file: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.file}.py:{self.line}: {self.message}"


def check(folder: Path, stubs: Mapping[str, str], others: Mapping[str, str]) -> list[Problem]:
    """Type-check the folder against stubs.

    Args:
        folder: where the copies go.
        stubs: text of `api.pyi` by release.
        others: more files for each copy, by name.
    """
    for release, stub in stubs.items():
        package = folder / package_name(release)
        package.mkdir()
        (package / "api.pyi").write_text(stub)
        copies = {name: source.path.read_text() for name, source in SOURCES.items()}
        for name, text in {**copies, **others}.items():
            copy = text.replace("trt_yolov6.engines.tensorrt", package.name)
            (package / f"{name}.py").write_text(copy)
    (folder / "mypy.ini").write_text(MYPY)
    command = [sys.executable, "-m", "mypy", "--config-file=mypy.ini", "--output=json"]
    done = subprocess.run(
        [*command, "--cache-dir=cache", *map(package_name, stubs)],
        cwd=folder,
        env=os.environ | {"MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    problems = []
    for line in done.stdout.splitlines():
        report = json.loads(line)
        path = Path(report["file"])
        message = report["message"].splitlines()[0]
        problems.append(Problem(path.parent.name, path.stem, report["line"], message))
    return problems


MYPY = """
[mypy]
python_version = 3.10
strict = True
warn_unused_ignores = False
explicit_package_bases = True
ignore_missing_imports = True
follow_imports = silent
# Large, and nothing of TensorRT's.
[mypy-onnx.*,torch.*,tqdm.*,cv2.*,onnxruntime.*,google.*,supervision.*,matplotlib.*,PIL.*,ml_dtypes.*]
follow_imports = skip
"""


def package_name(release: str) -> str:
    return re.sub(r"\W", "_", release)


MISUSE = """
from __future__ import annotations
from trt_yolov6.engines.tensorrt import api as trt
def use(
    api: trt.Api, builder: trt.Builder, config: trt.IBuilderConfig, context: trt.IExecutionContext
) -> None:
    builder.create_network(1, 2)
    builder.create_network(flag=1)
    builder.create_netwerk(1)
    config.set_flag(api.BuilderFlag.EXPLICIT_BATCH)
    config.set_memory_pool_limit(api.MemoryPoolType.WORKSPACE, "1 GiB")
    config.profiling_verbosity = 2
    config.num_optimization_profiles = 1
    config.max_workspace_size = 1  # API: not tensorrt<10 (gone)
    context.execute_async_v3()
    context.set_input_shape("images", 3)
    context.execute_async_v2([0], 0)  # API: not tensorrt<10 (gone)
"""
"""Every line of the function's body is wrong."""


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> list[Problem]:
    """Mypy's complaints about the code and the misuse, against every release."""
    stubs = {release: tensorrt_api.stub(found) for release, found in RELEASES.items()}
    found = check(tmp_path_factory.mktemp("api"), stubs, {"misuse": MISUSE})
    assert not [problem for problem in found if problem.file == "api"], "a stub has errors itself"
    return found


def in_code(problems: list[Problem], release: str) -> list[Problem]:
    """Return the problems of the code with a release."""
    package = package_name(release)
    return [one for one in problems if one.package == package and one.file in SOURCES]


def uncalled(source: Source, release: str) -> Iterator[ast.FunctionDef]:
    """Yield methods of classes derived from a release's that neither it calls nor we do."""
    trees = [source.tree for source in SOURCES.values()]
    used = {
        node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)
    }
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.ClassDef):
            continue
        bases = [ast.unparse(base) for base in node.bases]
        known = {"__init__", *used}
        for base in bases:
            known |= set(RELEASES[release].get(base, ()))
        if any(base in tensorrt_api.CLASSES for base in bases):
            for item in node.body:
                if isinstance(item, ast.FunctionDef) and item.name not in known:
                    yield item


def test_the_stub_in_the_package_says_what_the_releases_do() -> None:
    # That it says enough, mypy finds.
    def members(stub: str) -> set[tuple[str, str]]:
        return {
            (owner.name, ast.unparse(node))
            for owner in ast.walk(ast.parse(stub))
            if isinstance(owner, ast.ClassDef)
            for node in owner.body
            if not isinstance(node, ast.ClassDef)
        }

    wrong = members(tensorrt_api.STUB.read_text())
    wrong -= members(tensorrt_api.package_stub(RELEASES))
    assert not wrong, f"{wrong}; write it again: python scripts/tensorrt_api.py --stub"


def test_nothing_of_tensorrt_is_annotated_any() -> None:
    for source in SOURCES.values():
        for node in ast.walk(source.tree):
            if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
                name = node.arg if isinstance(node, ast.arg) else ast.unparse(node.target)
                if ast.unparse(node.annotation) == "Any":
                    assert name.rpartition(".")[2].lstrip("_") in OF_ANY_KIND, (
                        f"{source.path}:{node.lineno}: give {name} its type, of api.pyi"
                    )


@pytest.mark.parametrize("release", RELEASES)
def test_the_code_fits_the_api_of(release: str, problems: list[Problem]) -> None:
    wrong = [
        f"{problem}\n    (for some releases only? Mark it: `# API: tensorrt<11 (reason)`)"
        for problem in in_code(problems, release)
        if release in SOURCES[problem.file].releases(problem.line)
    ]
    assert not wrong, "\n".join(wrong)


def test_what_is_marked_for_some_releases_is_not_in_the_others(problems: list[Problem]) -> None:
    for source in SOURCES.values():
        for mark in source.marks:
            assert any(
                problem.file == source.path.stem and mark.first <= problem.line <= mark.last
                for release in RELEASES
                if not mark.admits(release)
                for problem in in_code(problems, release)
            ) or any(
                mark.first <= callback.lineno <= mark.last
                for release in RELEASES
                if not mark.admits(release)
                for callback in uncalled(source, release)
            ), f"{source.path}:{mark.first}: all releases have this; remove the mark"


def test_every_callback_is_one_that_tensorrt_calls_or_that_we_call() -> None:
    for source in SOURCES.values():
        for release in RELEASES:
            for callback in uncalled(source, release):
                assert release not in source.releases(callback.lineno), (
                    f"{source.path}:{callback.lineno}: {release} does not call {callback.name}"
                )


def test_the_names_that_the_code_looks_up_are_there() -> None:
    # `getattr(api.ComputeCapability, ...)`; `targets` leaves out what a release does not have.
    for release, found in RELEASES.items():
        if release.startswith("tensorrt-rtx"):
            assert {"CURRENT", *TARGETS["t4"], *TARGETS["l4"]} <= set(found["ComputeCapability"])


@pytest.mark.parametrize("release", RELEASES)
def test_wrong_arguments_and_what_is_gone_are_found(release: str, problems: list[Problem]) -> None:
    found = {
        problem.line
        for problem in problems
        if (problem.package, problem.file) == (package_name(release), "misuse")
    }
    lines = MISUSE.splitlines()
    missed = [
        text.strip()
        for number, text in enumerate(lines, start=1)
        if text.startswith(("    b", "    c")) and number not in found
        if (match := MARK.search(text)) is None or Mark.of(match, number, number).admits(release)
    ]
    assert not missed


def test_the_snapshot_says_what_the_installed_tensorrt_rtx_says() -> None:
    module = pytest.importorskip("tensorrt_rtx")
    release = f"tensorrt-rtx {module.__version__}"
    if release not in RELEASES:
        pytest.skip(f"no facts about {release}: add it to scripts/tensorrt_api.py and run that")
    # The snapshot's were read with an empty library in the place of TensorRT-RTX's own.
    bindings = pytest.importorskip("tensorrt_rtx_bindings")
    assert tensorrt_api.facts(bindings) == RELEASES[release]
