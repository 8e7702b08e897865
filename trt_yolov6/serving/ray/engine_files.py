"""An engine on every machine of a cluster: the same file where it lies there, else a copy."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trt_yolov6.common.files import sha256_bytes
from trt_yolov6.engines import load_engine
from trt_yolov6.engines.base import Engine, EngineFacts, LoadOptions
from trt_yolov6.engines.manifest import check_plan, manifest_of, read_manifest


@dataclass(frozen=True)
class EngineFiles:
    """The files of an engine, to be written into one folder."""

    path: Path
    """Absolute, on the machine that starts the job."""
    contents: Mapping[str, bytes]
    """Contents by file name: the plan, and its manifest if it has one."""

    @property
    def sha256(self) -> str:
        """The hash of the plan, in hexadecimal."""
        return sha256_bytes(self.contents[self.path.name])


def read_engine(path: Path, backend: str, options: LoadOptions) -> tuple[EngineFiles, EngineFacts]:
    """Read an engine's files and say what it is, by its manifest.

    Args:
        path: a plan with its manifest, or any detector's ONNX file, which is loaded for its facts.
        backend, options: as for `load_engine`.

    Raises:
        UserError: the file is missing or no engine.
    """
    path = path.resolve()  # a link has another name than the manifest says
    manifest = read_manifest(path)
    if manifest is None:
        with load_engine(path, backend, options) as engine:
            facts = engine.facts
        plan = _with_weights(path) if path.suffix == ".onnx" else path.read_bytes()
        return EngineFiles(path, {path.name: plan}), facts
    check_plan(path, manifest)
    found = manifest_of(path)
    assert found is not None
    ran_by = manifest.backend if backend == "auto" else backend
    facts = EngineFacts(path.name, manifest.detector, manifest.precision, ran_by)
    return EngineFiles(path, {one.name: one.read_bytes() for one in (path, found)}), facts


def load_here(
    files: EngineFiles, backend: str, options: LoadOptions
) -> tuple[Engine, tempfile.TemporaryDirectory[str] | None]:
    """Load an engine on this machine, see `load_engine`.

    Returns:
        The engine, and the folder of its copy, to be kept as long as it is used; None where the
        file lies at the same path here, so that caches next to it serve again.
    """
    if _is_here(files):
        return load_engine(files.path, backend, options), None
    folder = tempfile.TemporaryDirectory(prefix="trt-yolov6-", ignore_cleanup_errors=True)
    for name, content in files.contents.items():
        Path(folder.name, name).write_bytes(content)
    return load_engine(Path(folder.name, files.path.name), backend, options), folder


def _is_here(files: EngineFiles) -> bool:
    try:
        found = manifest_of(files.path)
        own = [files.path] if found is None else [files.path, found]
        return files.contents == {path.name: path.read_bytes() for path in own}
    except OSError:
        return False


def _with_weights(path: Path) -> bytes:
    """Return an ONNX file with the weights inside that it may keep in other files."""
    import onnx

    from trt_yolov6.graph.files import read_weights

    model = onnx.load(path, load_external_data=False)
    return model.SerializeToString() if read_weights(model, path) else path.read_bytes()
