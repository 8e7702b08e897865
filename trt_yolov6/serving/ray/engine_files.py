"""An engine on every machine of a cluster: the same file where it lies there, else a copy."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from trt_yolov6.common.files import sha256_bytes, sha256_file
from trt_yolov6.engines import load_engine
from trt_yolov6.engines.base import Engine, EngineFacts, LoadOptions
from trt_yolov6.engines.manifest import manifest_of, read_manifest
from trt_yolov6.errors import UserError


@dataclass(frozen=True)
class EngineFiles:
    """The files of an engine, to be written into one folder."""

    path: Path
    """Absolute, on the machine that starts the job."""
    plan: bytes
    manifest_name: str | None
    manifest: bytes

    @property
    def sha256(self) -> str:
        """The hash of the plan, in hexadecimal."""
        return sha256_bytes(self.plan)


def read_engine(path: Path, backend: str, options: LoadOptions) -> tuple[EngineFiles, EngineFacts]:
    """Read an engine's files and say what it is, by its manifest.

    Args:
        path: a plan with its manifest, or any detector's ONNX file, which is loaded for its facts.
        backend, options: as for `load_engine`.

    Raises:
        UserError: the file is missing or no engine.
    """
    path = path.absolute()
    manifest = read_manifest(path)
    if manifest is None:
        with load_engine(path, backend, options) as engine:
            facts = engine.facts
        plan = _with_weights(path) if path.suffix == ".onnx" else path.read_bytes()
        return EngineFiles(path, plan, None, b""), facts
    plan = path.read_bytes()
    if sha256_bytes(plan) != manifest.plan_sha256:
        raise UserError(
            f"{path} is not the file its manifest describes (cut short, or replaced); build it "
            "again with `trt-yolov6 build`."
        )
    found = manifest_of(path)
    assert found is not None
    ran_by = manifest.backend if backend == "auto" else backend
    facts = EngineFacts(path.name, manifest.detector, manifest.precision, ran_by)
    return EngineFiles(path, plan, found.name, found.read_bytes()), facts


def load_here(
    files: EngineFiles, sha256: str, backend: str, options: LoadOptions
) -> tuple[Engine, tempfile.TemporaryDirectory[str] | None]:
    """Load an engine on this machine.

    Args:
        files: the engine.
        sha256: of its plan.
        backend, options: as for `load_engine`.

    Returns:
        The engine, and the folder of its copy, to be kept as long as it is used; None where the
        file lies at the same path here, so that caches next to it serve again.

    Raises:
        UserError: see `load_engine`.
    """
    if _is_the_same(files, sha256):
        return load_engine(files.path, backend, options), None
    folder = tempfile.TemporaryDirectory(prefix="trt-yolov6-", ignore_cleanup_errors=True)
    copy = Path(folder.name) / files.path.name
    copy.write_bytes(files.plan)
    if files.manifest_name is not None:
        copy.with_name(files.manifest_name).write_bytes(files.manifest)
    return load_engine(copy, backend, options), folder


def _is_the_same(files: EngineFiles, sha256: str) -> bool:
    try:
        if not files.path.is_file() or sha256_file(files.path) != sha256:
            return False
        found = manifest_of(files.path)
        name = None if found is None else found.name
        return name == files.manifest_name and (
            found is None or found.read_bytes() == files.manifest
        )
    except OSError:
        return False


def _with_weights(path: Path) -> bytes:
    """Return an ONNX file with the weights inside that it may keep in other files."""
    import onnx

    from trt_yolov6.graph.files import read_weights

    model = onnx.load(path, load_external_data=False)
    return model.SerializeToString() if read_weights(model, path) else path.read_bytes()
