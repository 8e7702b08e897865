"""The Dockerfiles, without Docker: what they copy is there, and scripts/check_images.py agrees."""

from __future__ import annotations

import fnmatch
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
IMAGES = ("cpu", "tensorrt")


def instructions(name: str) -> list[tuple[str, str]]:
    """Return the instructions of a Dockerfile; the test's own reading, a line each."""
    lines = (ROOT / "docker" / f"{name}.Dockerfile").read_text().splitlines()
    kept = [line for line in lines if line and not line.startswith("#")]
    assert not any(line.endswith("\\") or line[0].isspace() for line in kept)
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in kept]


@pytest.mark.parametrize("name", IMAGES)
def test_the_check_runs_the_lines_of_the_dockerfile(name: str) -> None:
    listed = subprocess.run(
        [sys.executable, "scripts/check_images.py", "--list", name],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert listed.stdout.splitlines() == [
        rest for word, rest in instructions(name) if word == "RUN"
    ]


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_runs_as_a_user_and_says_how_it_is(name: str) -> None:
    words = [word for word, _ in instructions(name)]
    said = dict(instructions(name))
    assert int(said["USER"]) > 0
    assert any(rest.startswith(f"useradd --uid {said['USER']} ") for _, rest in instructions(name))
    # Nothing is written after the user is chosen.
    assert set(words[words.index("USER") + 1 :]) <= {"WORKDIR", "HEALTHCHECK", "ENTRYPOINT", "CMD"}
    assert "trt_yolov6.engines" in said["HEALTHCHECK"]


@pytest.mark.parametrize("name", IMAGES)
def test_what_the_lines_read_is_in_the_context(name: str) -> None:
    allowed = [
        line[1:]
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    ]
    for file in re.findall(r"/src/(\S+)", " ".join(rest for _, rest in instructions(name))):
        assert (ROOT / file).is_file()
        assert any(fnmatch.fnmatch(file, pattern) for pattern in allowed)
    for pattern in allowed:
        assert list(ROOT.glob(pattern)), pattern


def test_the_images_have_the_bounds_of_the_package() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 and later read TOML")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    known = {*project["dependencies"], *extras["tensorrt"], *extras["tensorrt-rtx"]}

    def listed(name: str) -> set[str]:
        lines = (ROOT / "docker" / name).read_text().splitlines()
        return {line for line in lines if line and not line.startswith("#")}

    left_out = {re.split(r"[<>=]", one)[0] for one in project["dependencies"]} - {
        re.split(r"[<>=]", one)[0] for one in listed("runtime.txt")
    }
    assert left_out == {"torch", "onnxscript"}
    assert listed("runtime.txt") <= known
    assert {re.split(r"[<>=]", one)[0] for one in listed("cuda.txt")} == {
        "cuda-python",
        "cuda-core",
        "nvidia-cuda-nvrtc",
    }
