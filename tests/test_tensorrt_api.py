"""TensorRT cannot run here: its API, as its own bindings describe it, is what our code is held to.

Every file of the package that uses a TensorRT module is type-checked by mypy against every release
in tests/data/tensorrt_api.json. The code takes the module as a parameter `api`, because one process
can use both flavours, so it is a copy that is checked. There, `api` is the release's stub, and what
is annotated `Any` has the class that its name stands for (`TYPES`).

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
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeGuard

import pytest
from packaging.requirements import Requirement
from support import tensorrt_api

from trt_yolov6.engines.tensorrt.rtx import TARGETS

TYPES = {
    "builder": "Builder",
    "cache": "ITimingCache",
    "config": "IBuilderConfig",
    "context": "IExecutionContext",
    "context_config": "IRuntimeConfig | None",
    "engine": "ICudaEngine",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "profile": "IOptimizationProfile",
    "runtime": "Runtime",
    "severity": "ILogger.Severity",
    "runtime_cache.cache": "IRuntimeCache",
    "runtime_cache.config": "IRuntimeConfig",
}
"""What a name annotated `Any` stands for, also with an underscore before it; `file.name` is first.

Attributes (`self._context`) are given their class where they are read.
"""

UNKNOWN = {
    "logger": "made by `logger_of`, whose class is written inside it",
    "logger_of": "the same",
    "monitor": "made by `_progress_monitor`, in the same way",
    "allocator": "made by `output_allocator`, in the same way",
    "allocators": "a dictionary of them",
    "profiler": "made by `_profiler`, in the same way",
    "bar": "a tqdm bar",
    "images": "a NumPy array, or a view of GPU memory",
    "batch": "the same",
}
"""Names whose type mypy does not know, and which are nothing of TensorRT's own."""

HANDED_ON = {"constants", "content", "dtype", "in_use", "shape"}
"""Names annotated `Any` of which no attribute is taken."""

PACKAGE = Path(__file__).parents[1] / "trt_yolov6"
MARK = re.compile(
    r"#\s*API: (?P<other>not )?(?P<requirement>[\w-]+(?:[<>=!~][\w.,<>=!~]*)?) \((?P<reason>.+)\)"
)
RELEASES = tensorrt_api.read_snapshot()


# --- the checked copy ---------------------------------------------------------------------------


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
class Edit:
    """How a piece of code reads in the copy; `kind`: only if that class is there."""

    node: ast.expr | ast.arg
    text: str
    kind: str = ""


@dataclass
class Source:
    """A file that uses TensorRT, and how its copy differs."""

    path: Path
    text: str
    tree: ast.Module = field(init=False)
    edits: list[Edit] = field(init=False)

    def __post_init__(self) -> None:
        self.tree = ast.parse(self.text)
        self.edits = list(self._edits())

    @property
    def name(self) -> str:
        return self.path.stem

    def releases(self, line: int) -> list[str]:
        """Return the releases that a line is for."""
        marks = [mark for mark in self.marks() if mark.first <= line <= mark.last]
        return [release for release in RELEASES if all(mark.admits(release) for mark in marks)]

    def marks(self) -> list[Mark]:
        """Return what the file says about the releases its parts are for."""
        found = []
        lines = self.text.splitlines()
        for number, text in enumerate(lines, start=1):
            if match := MARK.search(text):
                last = number
                if text.startswith("#"):
                    number, last = 1, len(lines)
                for node in ast.walk(self.tree):
                    if isinstance(node, ast.stmt) and node.lineno == number:
                        last = max(last, node.end_lineno or 0)
                found.append(Mark.of(match, number, last))
        return found

    def concerns(self, line: int) -> bool:
        """Say whether a line is in a function or class that uses TensorRT."""
        return any(
            node.lineno <= line <= (node.end_lineno or 0)
            and any(
                node.lineno <= edit.node.lineno <= (node.end_lineno or 0) for edit in self.edits
            )
            for node in self.tree.body
        )

    def copy(self, release: str) -> str:
        """Return the text with the type stub of a release for `api`; lines stay where they are."""
        lines = [line.encode() for line in self.text.splitlines(keepends=True)]
        for edit in sorted(self.edits, key=lambda edit: -edit.node.col_offset):
            node = edit.node
            assert node.end_lineno == node.lineno, f"{self.path}:{node.lineno}: put it on one line"
            if not edit.kind or edit.kind in RELEASES[release]:
                old = lines[node.lineno - 1]
                new = old[: node.col_offset] + edit.text.encode() + old[node.end_col_offset :]
                lines[node.lineno - 1] = new
        package = package_name(release)
        copy = b"".join(lines).decode()
        copy = re.sub(r"(class \w+\(api\.\w+\):)  # type: ignore\[misc\]", r"\1", copy)
        copy = re.sub(
            r"from trt_yolov6\.(?:\w+\.)*(\w+) import",
            lambda match: f"from {package}.{match[1]} import" if match[1] in SOURCES else match[0],
            copy,
        )
        future = "from __future__ import annotations"
        assert future in copy, f"{self.path} does not begin as the other files do"
        return copy.replace(
            future,
            f"{future}; import {stub_name(release)} as api; from typing import Any, cast as _cast",
            1,
        )

    def _edits(self) -> Iterator[Edit]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.arg) and node.arg == "api":
                yield Edit(node, "_api: Any")
            elif isinstance(node, ast.arg) and _is_any(node.annotation):
                if kind := self.type_of(node.arg):
                    yield Edit(node.annotation, f"api.{kind}", kind.split()[0])
            elif isinstance(node, ast.AnnAssign) and _is_any(node.annotation):
                if isinstance(node.target, ast.Name) and (kind := self.type_of(node.target.id)):
                    yield Edit(node.annotation, f"api.{kind}", kind.split()[0])
            elif isinstance(node, ast.Name) and node.id == "api":
                if isinstance(node.ctx, ast.Store):
                    yield Edit(node, "_api")
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                if node.attr == "api":
                    yield Edit(node, "api")
                elif node.attr.startswith("_") and (kind := self.type_of(node.attr)):
                    text = f"_cast(api.{kind}, {ast.unparse(node)})"
                    yield Edit(node, text, kind.split()[0])

    def type_of(self, name: str) -> str | None:
        """Return the class that a name stands for in this file."""
        name = name.lstrip("_")
        return TYPES.get(f"{self.name}.{name}") or TYPES.get(name)


def _is_any(annotation: ast.expr | None) -> TypeGuard[ast.Name]:
    return isinstance(annotation, ast.Name) and annotation.id == "Any"


def sources() -> dict[str, Source]:
    """Return the files that use TensorRT: in engines/ by `TYPES`, elsewhere by the name `api`."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text()
        if PACKAGE / "engines" in path.parents or re.search(r"\bapi\b", text):
            source = Source(path, text)
            # What hands the copies' classes on is copied too, or the two would be strangers.
            if source.edits or "LanePlan" in text:
                found[source.name] = source
    return found


SOURCES = sources()


# --- the check ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """What mypy says of a copy."""

    package: str
    file: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.file}.py:{self.line}: {self.message}"


def check(
    folder: Path, copies: Mapping[str, Mapping[str, str]], stubs: Mapping[str, str]
) -> list[Problem]:
    """Type-check copies, package -> file -> text, beside the stubs of releases."""
    for release, stub in stubs.items():
        (folder / f"{stub_name(release)}.pyi").write_text(stub)
    for package, files in copies.items():
        (folder / package).mkdir()
        (folder / package / "__init__.py").touch()
        for name, text in files.items():
            (folder / package / f"{name}.py").write_text(text)
    (folder / "mypy.ini").write_text(MYPY)
    command = [sys.executable, "-m", "mypy", "--config-file=mypy.ini", "--output=json"]
    environment = os.environ | {"MYPYPATH": str(PACKAGE.parent)}
    done = subprocess.run(
        [*command, "--cache-dir=cache", *copies],
        cwd=folder,
        env=environment,
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
[mypy-onnx.*,torch.*,tqdm.*,cv2.*,onnxruntime.*,google.*]
follow_imports = skip
"""


def package_name(release: str) -> str:
    return re.sub(r"\W", "_", release)


def stub_name(release: str) -> str:
    return f"api_{package_name(release)}"


@dataclass(frozen=True)
class Misspelling:
    """An attribute, of whatever object, spelt wrongly on one line of a file."""

    file: str
    function: int
    """Line of the innermost function or class around it."""
    line: int
    name: str

    def __str__(self) -> str:
        return f"{self.file}.py:{self.line}: {self.name}"


def misspellings() -> list[Misspelling]:
    """Return one for every attribute on every line of the code that concerns TensorRT."""
    found = set()
    for source in SOURCES.values():
        for node, function in _with_functions(source.tree, 0):
            line = node.end_lineno or 0
            if source.concerns(line) and _last_name(node.value) not in {"self", *UNKNOWN}:
                found.add(Misspelling(source.name, function, line, node.attr))
    return sorted(found, key=str)


def _with_functions(tree: ast.AST, function: int) -> Iterator[tuple[ast.Attribute, int]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Attribute):
            if node.attr == "api":
                continue
            yield node, function
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield from _with_functions(node, node.lineno)
        else:
            yield from _with_functions(node, function)


def misspelt_copies() -> dict[str, dict[str, str]]:
    """Return copies with all misspellings, at most one a function and copy.

    A second in the same function could hide behind the first: what follows an error has no type.
    """
    copies: dict[str, dict[str, str]] = {}
    taken: Counter[tuple[str, int, str]] = Counter()
    for wrong in MISSPELLINGS:
        source = SOURCES[wrong.file]
        release = source.releases(wrong.line)[-1]
        package = f"misspelt_{taken[wrong.file, wrong.function, release]}_{package_name(release)}"
        taken[wrong.file, wrong.function, release] += 1
        files = copies.setdefault(package, {})
        text = files.get(wrong.file) or source.copy(release)
        lines = text.splitlines(keepends=True)
        line = lines[wrong.line - 1]
        lines[wrong.line - 1] = re.sub(rf"\.{wrong.name}\b", f".{wrong.name}x", line)
        files[wrong.file] = "".join(lines)
    return copies


def _last_name(node: ast.expr) -> str:
    """Return the name of what an expression reads, calls or indexes, as UNKNOWN has it."""
    while isinstance(node, ast.Call | ast.Subscript):
        node = node.func if isinstance(node, ast.Call) else node.value
    name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
    return str(name).lstrip("_")


MISSPELLINGS = misspellings()

MISUSE = """
from __future__ import annotations
def use(api, builder: api.Builder, config: api.IBuilderConfig, context: api.IExecutionContext):
    builder.create_network(1, 2)
    builder.create_network(flag=1)
    config.set_flag(api.BuilderFlag.EXPLICIT_BATCH)
    config.set_memory_pool_limit(api.MemoryPoolType.WORKSPACE, "1 GiB")
    config.profiling_verbosity = 2
    config.num_optimization_profiles = 1
    config.max_workspace_size = 1  # API: not tensorrt<10 (gone)
    context.execute_async_v3()
    context.set_input_shape("images", 3)
    context.execute_async_v2([0], 0)  # API: not tensorrt<10 (gone)
"""
"""Every line of the function is wrong, from its second on."""


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> list[Problem]:
    """What mypy says of the code against every release, of the misspellings and of the misuse."""
    copies = {
        package_name(release): {name: source.copy(release) for name, source in SOURCES.items()}
        for release in RELEASES
    }
    copies |= misspelt_copies()
    copies["misuse"] = {
        f"misuse_{package_name(release)}": MISUSE.replace("def use(api, ", "def use(").replace(
            "annotations\n", f"annotations; import {stub_name(release)} as api\n"
        )
        for release in RELEASES
    }
    stubs = {release: tensorrt_api.stub(found) for release, found in RELEASES.items()}
    found = check(tmp_path_factory.mktemp("api"), copies, stubs)
    assert not [problem for problem in found if not problem.package], "a stub has errors itself"
    return found


def in_code(problems: list[Problem], release: str) -> list[Problem]:
    """Return what is wrong for a release, on lines that use TensorRT."""
    package = package_name(release)
    return [
        problem
        for problem in problems
        if problem.package == package and SOURCES[problem.file].concerns(problem.line)
    ]


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
            known |= set(RELEASES[release].get(base.removeprefix("api."), ()))
        if any(base.startswith("api.") for base in bases):
            for item in node.body:
                if isinstance(item, ast.FunctionDef) and item.name not in known:
                    yield item


# --- the code -----------------------------------------------------------------------------------


def test_the_files_that_use_tensorrt_are_found() -> None:
    assert {"builder", "flavour", "rtx", "plan"} <= set(SOURCES)
    assert len(MISSPELLINGS) > 50


def test_what_is_annotated_any_says_by_its_name_what_it_is() -> None:
    nameless = []
    for source in SOURCES.values():
        for node in ast.walk(source.tree):
            if isinstance(node, ast.arg):
                target: ast.expr = ast.Name(node.arg)
            elif isinstance(node, ast.AnnAssign):
                target = node.target
            else:
                continue
            name = _last_name(target)
            known = source.type_of(name) or name in {"api", *UNKNOWN, *HANDED_ON}
            if _is_any(node.annotation) and not known:
                nameless.append(f"{source.name}.py:{node.lineno}: {name}")
    assert not nameless, "\n".join(["TYPES does not have these names:", *nameless])


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
        for mark in source.marks():
            assert any(
                problem.file == source.name and mark.first <= problem.line <= mark.last
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


# --- the check itself ---------------------------------------------------------------------------


def test_any_name_misspelt_anywhere_in_the_code_is_found(problems: list[Problem]) -> None:
    # So nothing is left unchecked because mypy does not know its type.
    found = {
        (problem.file, problem.line)
        for problem in problems
        if problem.package.startswith("misspelt")
    }
    missed = [str(wrong) for wrong in MISSPELLINGS if (wrong.file, wrong.line) not in found]
    assert not missed, "\n".join(["of unknown type; name the object as TYPES has it:", *missed])


@pytest.mark.parametrize("release", RELEASES)
def test_wrong_arguments_and_what_is_gone_are_found(release: str, problems: list[Problem]) -> None:
    found = {
        problem.line for problem in problems if problem.file == f"misuse_{package_name(release)}"
    }
    lines = MISUSE.splitlines()
    missed = [
        text.strip()
        for number, text in enumerate(lines, start=1)
        if text.startswith("    ") and number not in found
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
