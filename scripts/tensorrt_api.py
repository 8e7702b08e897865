"""Writes tests/data/tensorrt_api.json: what the Python API of each TensorRT release is.

    .venv/bin/python scripts/tensorrt_api.py          the facts, and api.pyi in engines/tensorrt
    .venv/bin/python scripts/tensorrt_api.py --stub   api.pyi alone, without any download

The Python bindings of every release from 10 on are on PyPI, though the library that they bind is
not. pip downloads them here; a C compiler makes an empty library with the few functions that they
look up; and then they import, without a GPU, and can be asked for their classes and signatures.
Releases of TensorRT 8 are there with their library, which links cuBLAS and cuDNN; only those are
replaced by empty ones. Nothing can be built or run without a GPU, but our callbacks can be derived
from TensorRT's classes and made, which is tried too. The 10.13 facts are then compared with
`tensorrt-stubs`, and our code is type-checked against those as well.

Needs gcc and binutils (`readelf`, `nm`), a Python for which the later releases have wheels (3.11),
and for TensorRT 8 a Python 3.10: `python3.10`, or what the environment variable PYTHON310 names. It
needs no packages. TensorRT 8 takes 1.4 GB to download and 3 GB of room in the temporary folder.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path.insert(0, str(TESTS))

from support import tensorrt_api  # noqa: E402

RELEASES = {
    "tensorrt 8.5.3.1": "tensorrt==8.5.3.1",
    "tensorrt 8.6.0": "tensorrt==8.6.0",
    "tensorrt 10.0.1": "tensorrt-cu12-bindings==10.0.1",
    "tensorrt 10.13.0.35": "tensorrt-cu12-bindings==10.13.0.35",
    "tensorrt 11.0.0.114": "tensorrt-cu13-bindings==11.0.0.114",
    "tensorrt 11.4.0.106": "tensorrt-cu13-bindings==11.4.0.106",
    "tensorrt-rtx 1.4.0.76": "tensorrt-rtx-cu13-bindings==1.4.0.76",
    "tensorrt-rtx 1.7.1.116": "tensorrt-rtx-cu13-bindings==1.7.1.116",
}
"""The oldest and the newest of what the backends admit, and what lies at the turns between."""

WHOLE = "tensorrt=="
"""Prefixes of requirements that also contain TensorRT's library. They need Python 3.10."""

FOR_PYTHON_310 = (
    "--python-version=3.10",
    "--implementation=cp",
    "--platform=manylinux_2_17_x86_64",
    "--only-binary=:all:",
)
"""Options of `pip download`."""

OUR_NEEDS = ("numpy", "ml-dtypes", "tqdm")
"""Modules that our code imports before TensorRT."""

STUBS = ("tensorrt 10.13.0.35", "tensorrt-stubs==10.13.0.35.1")


READ = """
import json, sys
from support import tensorrt_api
import {module} as api
from trt_yolov6.engines.base import BuildSettings
from trt_yolov6.engines.tensorrt.builder import ProgressMonitor, build_plan
from trt_yolov6.engines.tensorrt.flavour import Flavour, instance_of, logger_of
from trt_yolov6.engines.tensorrt.execution import OutputAllocator, Profiler
from trt_yolov6.errors import UserError

logger_of(api).log(api.ILogger.ERROR, "tried")
assert logger_of(api).reason() == "tried"
instance_of(Profiler, api.IProfiler), instance_of(OutputAllocator, api.IOutputAllocator)
if hasattr(api, "IProgressMonitor"):
    instance_of(ProgressMonitor, api.IProgressMonitor, None)
# Not in any signature: `Dims` can be iterated over, and a tuple is taken for one.
assert tuple(api.Dims((1, 2))) == (1, 2)
if hasattr(api, "PluginTensorDesc"):  # TensorRT 8 has no object to set one of
    described = api.PluginTensorDesc()
    described.dims = (1, 2)
    assert tuple(described.dims) == (1, 2)
# TensorRT-RTX crashes where TensorRT says that its library makes no builder.
try:
    if api.__name__ != "tensorrt_rtx_bindings":
        build_plan(Flavour("tensorrt", "TensorRT", api), b"", BuildSettings())
        raise AssertionError("built without a GPU")
except UserError as error:
    assert "cannot start its builder" in str(error), error
json.dump(tensorrt_api.facts(api), sys.stdout)
"""
"""Script that runs with each release's bindings."""


def unpacked(folder: Path, *wanted: str) -> Path:
    """Download wheels, without what they depend on, and return the folder they are unpacked in.

    Args:
        folder: where to work.
        wanted: requirements, and options of `pip download`.
    """
    wheels = folder / "wheels"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(wheels)]
    subprocess.run([*command, *wanted], check=True)
    target = folder / "unpacked"
    for wheel in wheels.iterdir():
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target)
        wheel.unlink()
    return target


def make_empty_libraries(user: Path, replaced: str, functions: str, folder: Path) -> None:
    """Compile libraries that do nothing, in the place of those that a library needs.

    Args:
        user: the library whose needs are met.
        replaced: pattern of the names of libraries to make.
        functions: pattern of the names of functions to put into each.
        folder: where they go.
    """
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", _output("readelf", "-d", str(user)))
    undefined = _output("nm", "-D", "--undefined-only", str(user))
    wanted = re.findall(rf"^ +U ({functions})(?:@(?!GLIBC)\S+)?$", undefined, re.MULTILINE)
    source = folder / "empty.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in wanted))
    for name in needed:
        if re.match(replaced, name):
            # NVIDIA's mathematical libraries name the version of each symbol as themselves.
            versions = folder / f"{name}.versions"
            versions.write_text(f"{name} {{ global: *; }};")
            flags = ["-shared", "-fPIC", f"-Wl,-soname,{name}", f"-Wl,--version-script={versions}"]
            subprocess.run(["gcc", *flags, "-o", str(folder / name), str(source)], check=True)


def python_310() -> str:
    """Return a Python 3.10.

    Raises:
        SystemExit: there is none.
    """
    python = os.environ.get("PYTHON310") or shutil.which("python3.10")
    if python is not None:
        ask = [python, "-c", "import sys; print(*sys.version_info[:2])"]
        if subprocess.run(ask, stdout=subprocess.PIPE, text=True).stdout.strip() == "3 10":
            return python
    raise SystemExit(
        f"TensorRT 8 needs Python 3.10, and {python or 'python3.10'} is not one; install it or "
        "name one by the environment variable PYTHON310."
    )


def facts_of(requirement: str) -> tensorrt_api.Facts:
    """Return the facts of a release, read by a Python of its own; try our callbacks with it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if requirement.startswith(WHOLE):
            python = python_310()
            root = unpacked(folder, *FOR_PYTHON_310, requirement, *OUR_NEEDS)
            module = "tensorrt"
            (plugins,) = (root / module).glob("libnvinfer_plugin.so.*")
            make_empty_libraries(plugins, r"libcu(blas|dnn)", r"cu(?:blas|dnn)\w+", folder)
        else:
            python = sys.executable
            root = unpacked(folder, requirement)
            (bindings,) = root.glob("*_bindings/tensorrt*.so")
            module = bindings.parent.name
            make_empty_libraries(bindings, r"lib(nv|tensorrt)", r"(?:create|get|init)\w+", folder)
        environment = os.environ | {
            "CUDA_VISIBLE_DEVICES": "",
            "LD_LIBRARY_PATH": str(folder),
            "PYTHONPATH": os.pathsep.join([str(root), str(TESTS), str(TESTS.parent)]),
        }
        command = [python, "-c", READ.format(module=module)]
        output = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE)
    found: tensorrt_api.Facts = json.loads(output.stdout)
    return found


def published_stub(requirement: str) -> str:
    """Return the text of the published stubs, repaired so that Python and mypy can read it."""
    with tempfile.TemporaryDirectory() as name:
        root = unpacked(Path(name), requirement)
        text = (root / "tensorrt_bindings" / "tensorrt.pyi").read_text()
    # A parameter without a default after others that have one; a parameter named `in`.
    text = text.replace("= None, channel_axis: int)", "= None, channel_axis: int = ...)")
    text = re.sub(r"\bin: ", "in_: ", text)
    # A member of the module that is named `bool` hides the type.
    text = re.sub(r"\bbool\b(?!: DataType)", "builtins.bool", text)
    added = (
        "import builtins\n__version__: str\ndef nptype(trt_type: typing.Any) -> typing.Any: ...\n"
    )
    return f"{text}\n{added}"


def compare_with_stub(found: tensorrt_api.Facts, text: str) -> list[str]:
    """Return where the published stubs and the facts disagree on a member or its parameters."""
    classes: dict[str, dict[str, set[str]]] = {}
    _collect(ast.parse(text).body, "", classes)
    differences = []
    for owner, members in found.items():
        for member, fact in members.items() if owner else ():
            if member.startswith("(") or member in ("__members__", "__buffer__"):
                continue
            if fact.startswith("override"):
                continue
            known = classes.get(owner, {}).get(member)
            ours = set()
            if fact.startswith("("):
                ours = {_parameters(signature) for signature in fact.split(" ; ")}
            if known is None or (ours and known != ours):
                differences.append(f"{owner}.{member}: {fact}; the stubs: {known}")
    return differences


def _collect(body: list[ast.stmt], owner: str, classes: dict[str, dict[str, set[str]]]) -> None:
    for node in body:
        if isinstance(node, ast.ClassDef):
            name = f"{owner}.{node.name}".lstrip(".")
            classes.setdefault(owner, {})[node.name] = set()
            _collect(node.body, name, classes)
        elif isinstance(node, ast.FunctionDef):
            parameters = ", ".join(argument.arg for argument in node.args.args)
            classes.setdefault(owner, {}).setdefault(node.name, set()).add(parameters)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            classes.setdefault(owner, {})[node.target.id] = set()


def _parameters(signature: str) -> str:
    function = ast.parse(f"def f{signature}: ...").body[0]
    assert isinstance(function, ast.FunctionDef)
    return ", ".join(argument.arg for argument in function.args.args)


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    if sys.argv[1:] == ["--stub"]:
        write_stub()
        return
    releases = {}
    for release, requirement in RELEASES.items():
        releases[release] = facts_of(requirement)
        count = sum(len(members) for members in releases[release].values())
        print(f"{release}: {count} facts")
    tensorrt_api.write_snapshot(tensorrt_api.SNAPSHOT, releases)
    write_stub()
    release, requirement = STUBS
    text = published_stub(requirement)
    _show(f"{requirement} differs from the bindings", compare_with_stub(releases[release], text))
    text += "".join(f"{line}\n" for line in tensorrt_api.module_class(releases[release]))
    _show(f"mypy's objections to our code by {requirement}", objections(release, text))


def objections(release: str, text: str) -> list[str]:
    """Type-check the code as the test does, but against the published stubs."""
    from test_tensorrt_api import SOURCES, check, in_code

    with tempfile.TemporaryDirectory() as name:
        problems = check(Path(name), {release: text}, {})
    return [
        str(problem)
        for problem in in_code(problems, release)
        if release in SOURCES[problem.file].releases(problem.line)
    ]


def write_stub() -> None:
    """Write api.pyi: of the snapshot, what the package uses."""
    releases, used = tensorrt_api.read_snapshot(), tensorrt_api.used_names()
    tensorrt_api.STUB.write_text(tensorrt_api.package_stub(releases, used))


def _show(title: str, lines: list[str]) -> None:
    print(f"{title}: {len(lines)}")
    for line in lines:
        print(f"  {line}")


if __name__ == "__main__":
    main()
