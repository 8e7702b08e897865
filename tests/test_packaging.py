"""The sdist and the wheel: they hold the whole package, and their extras can be installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from trt_yolov6.errors import install_command

pytest.importorskip("setuptools", minversion="70.1")

SOURCES = ("CHANGELOG.md", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py")


def make(kind: str, source: Path, folder: Path) -> Path:
    """Have the build backend make an sdist or a wheel of the sources in a folder."""
    folder.mkdir()
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    (made,) = folder.iterdir()
    return made


@pytest.fixture(scope="module")
def sdist(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packaging")
    source = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("trt_yolov6", "tests"):
        shutil.copytree(root / name, source / name, ignore=ignored)
    for name in SOURCES:
        shutil.copyfile(root / name, source / name)
    return make("sdist", source, folder / "sdist")


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    folder = sdist.parents[1] / "unpacked"
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    return make("wheel", source, folder.parent / "wheel")


def package_files(root: Path) -> set[str]:
    files = (path for path in (root / "trt_yolov6").rglob("*") if path.is_file())
    return {str(path.relative_to(root)) for path in files if path.suffix != ".pyc"}


def test_an_sdist_holds_the_package_and_no_tests_without_their_data(
    root: Path, sdist: Path
) -> None:
    with tarfile.open(sdist) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
    assert package_files(root) | set(SOURCES) <= found
    assert not {name for name in found if name.startswith("tests")}
    assert sdist.stat().st_size < 2 << 20


def test_a_wheel_of_an_sdist_holds_the_whole_package(root: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert found == package_files(root)


def test_pip_asks_no_index_for_the_extras_of_an_installed_wheel(
    wheel: Path, tmp_path: Path
) -> None:
    pytest.importorskip("pip")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}

    def said(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        return done.stdout + done.stderr

    extras = "gpu-images,ray,tensorrt,tensorrt-rtx,tensorrt8"
    code = f"from trt_yolov6.errors import install_command; print(install_command({extras!r}))"
    assert said("-c", code) == f'pip install "trt-yolov6[{extras}]"\n'
    # Of what the extras need it then finds nothing, unless it is here.
    options = ("--dry-run", "--no-index", "--disable-pip-version-check")
    words = said("-m", "pip", "install", *options, f"trt-yolov6[{extras}]")
    assert f"Requirement already satisfied: trt-yolov6[{extras}] in " in words
    assert "does not provide" not in words


def test_a_package_that_is_not_installed_names_its_folder(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert install_command("ray") == f'pip install "{root}[ray]"'
