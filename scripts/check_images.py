"""Does what the Dockerfiles do in a fresh folder, without Docker, and checks what images would do.

    python3 scripts/check_images.py cpu          or tensorrt, or both
    python3 scripts/check_images.py --list cpu   the RUN lines alone

The RUN lines are taken from the Dockerfile and run as they stand, except for the folders /src and
/opt/trt-yolov6, which become folders of their own, and for the base image's Python packages. The
health check, the entry point and the commands run as the image's user where this is root. Needs
.venv (scripts/environment.sh) for an engine to run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ("cpu", "tensorrt")
PREFIXES = ("/src", "/opt/trt-yolov6")
"""Folders of the images, which this machine gets under another root."""


@dataclass(frozen=True)
class Dockerfile:
    """The steps of a Dockerfile, in order."""

    runs: tuple[str, ...]
    """Its RUN lines, of all stages."""
    user: int
    health: tuple[str, ...]
    entry: tuple[str, ...]
    command: tuple[str, ...]


def read_dockerfile(path: Path) -> Dockerfile:
    """Read the instructions that the check needs; each is one line."""
    found: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        word, _, rest = line.partition(" ")
        if word.isupper():
            found.setdefault(word, []).append(rest)
    return Dockerfile(
        runs=tuple(found["RUN"]),
        user=int(found["USER"][-1]),
        health=_words(found["HEALTHCHECK"][-1].partition("CMD ")[2]),
        entry=_words(found["ENTRYPOINT"][-1]),
        command=_words(found["CMD"][-1]),
    )


def _words(text: str) -> tuple[str, ...]:
    return tuple(json.loads(text))


def context(into: Path) -> None:
    """Copy what .dockerignore lets into the build."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    for pattern in (line[1:] for line in lines if line.startswith("!")):
        for path in ROOT.glob(pattern):
            target = into / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                shutil.copytree(path, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(path, target)


def moved(text: str, root: Path) -> str:
    """Return a command with the image's folders below `root`."""
    for prefix in PREFIXES:
        text = re.sub(rf"(?<![\w/]){re.escape(prefix)}(?=[/\s]|$)", str(root) + prefix, text)
    return text


def check(name: str, root: Path) -> None:
    """Do an image's steps below `root` and run what it would run.

    Raises:
        SystemExit: a step or a command does not do what it must.
    """
    image = read_dockerfile(ROOT / "docker" / f"{name}.Dockerfile")
    (root / "src").mkdir()
    (root / "opt").mkdir()
    work = root / "work"
    work.mkdir()
    context(root / "src")
    engine, pictures = example(work)
    for line in image.runs:
        if line.startswith("useradd "):
            continue  # below, commands run under its number
        print(f"RUN {line}", flush=True)
        # The packages of this machine's Python are not those of NVIDIA's container.
        step = moved(line, root).replace(" --system-site-packages", "")
        subprocess.run(["sh", "-ec", step], check=True)
    shutil.rmtree(root / "src", ignore_errors=True)
    as_user: list[str] = []
    if os.getuid() == 0:
        for place in (root, work):
            place.chmod(0o755)
        shutil.chown(work, image.user, image.user)
        numbers = ["--reuid", str(image.user), "--regid", str(image.user), "--clear-groups"]
        as_user = ["setpriv", *numbers]

    def run(*words: str, fine: tuple[int, ...] = (0,)) -> str:
        command = [moved(word, root) for word in words]
        print(f"-> {shlex.join(words)[:150]}", flush=True)
        environment = {"PATH": os.environ["PATH"], "MPLCONFIGDIR": str(work)}
        done = subprocess.run(
            [*as_user, *command], cwd=work, env=environment, capture_output=True, text=True
        )
        if done.returncode not in fine:
            sys.exit(f"exit code {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout

    # Without a GPU, the image for GPUs must call itself unhealthy.
    run(*image.health, fine=(0,) if name == "cpu" else (0, 1))
    print(run(*image.entry, *image.command))
    run(*image.entry, "infer", "--engine", engine, "--source", pictures, "--output", "out")
    found = json.loads((work / "out" / "detections.json").read_text())
    if [len(one["detections"]) > 0 for one in found] != [True, True]:
        sys.exit("infer found nothing in two pictures full of cells")
    run(*image.entry, "bench", "--engine", engine, "--duration", "1", "--batch", "1")
    run(*image.entry, "build", "--onnx", engine, "--backend", "onnxruntime", "--output", "b.onnx")
    run(*image.entry, "inspect", "b.onnx")
    python = str(Path(image.entry[0]).with_name("python"))
    run(python, "-c", "import importlib.util as u, sys; sys.exit(u.find_spec('torch') is not None)")
    if as_user:
        site = next((root / "opt").rglob("site-packages"))
        run(python, "-c", f"import os, sys; sys.exit(os.access({str(site)!r}, os.W_OK))")
    size = sum(one.lstat().st_size for one in (root / "opt").rglob("*")) / 2**20
    print(f"{name}: all of it works; {size:.0f} MiB on top of the base image")


def example(work: Path) -> tuple[str, str]:
    """Write an engine of the sample and two pictures to run it on; return their names."""
    build = [str(ROOT / ".venv/bin/trt-yolov6"), "build", "--backend", "onnxruntime", "--quiet"]
    weights = str(ROOT / "samples" / "yolov6n_bccd.pt")
    subprocess.run(
        [*build, "--weights", weights, "--imgsz", "320", "--output", str(work / "n.onnx")],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    (work / "pictures").mkdir()
    for path in sorted((ROOT / "samples/images/val").glob("*.jpg"))[:2]:
        shutil.copy(path, work / "pictures")
    return "n.onnx", "pictures"


def main() -> int:
    """Run as the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("image", nargs="+", choices=IMAGES)
    parser.add_argument("--list", action="store_true", help="print the RUN lines and end")
    options = parser.parse_args()
    for name in options.image:
        if options.list:
            print("\n".join(read_dockerfile(ROOT / "docker" / f"{name}.Dockerfile").runs))
            continue
        with tempfile.TemporaryDirectory(prefix="trt-yolov6-image-") as folder:
            check(name, Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
