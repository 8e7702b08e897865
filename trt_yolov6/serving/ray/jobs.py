"""`infer` and `eval` on a cluster: pictures to the actors, and what they find into one place."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trt_yolov6.common.files import is_utf8, one_writer
from trt_yolov6.common.progress import progress_bar
from trt_yolov6.data.coco import CocoDataset, CocoImage
from trt_yolov6.data.letterbox import resolve_border
from trt_yolov6.data.media import is_address
from trt_yolov6.engines.base import EngineFacts, LoadOptions
from trt_yolov6.errors import UserError
from trt_yolov6.runtime.annotate import check_outside
from trt_yolov6.runtime.evaluate import Evaluation, FoundBatch, evaluate_found
from trt_yolov6.runtime.predict import measured_nms, shown_nms
from trt_yolov6.serving.ray.cluster import Actors, connected, fitting_actors
from trt_yolov6.serving.ray.detector import Detector, FoundInBlock, Item, Work, row_of, values_of
from trt_yolov6.serving.ray.engine_files import EngineFiles, read_engine
from trt_yolov6.serving.ray.parts import (
    PartFormat,
    PartWriter,
    ResultFolder,
    files_in,
    open_job,
    part_names,
)
from trt_yolov6.serving.ray.pictures import RemotePicture, find_pictures
from trt_yolov6.spec import NmsSettings, PredictOptions

MOST_IN_A_BLOCK = 256
"""Pictures an actor does together: what is done again when its machine dies, twice that at most."""

MOST_IN_A_BLOCK_ON_GPUS = 1024
"""Images an actor with a GPU does together: it has done 256 before Ray hands it the next."""

FAILURES_FILE = "failures.jsonl"


@dataclass(frozen=True)
class RayOptions:
    """Place and manner of a job's work, which do not affect its results."""

    address: str
    """`local`, `auto`, or the address of a cluster's head."""
    backend: str = "auto"
    load: LoadOptions = dataclasses.field(default_factory=LoadOptions)
    """`threads` are the cores of an actor."""
    progress: bool = True


@dataclass(frozen=True)
class RaySummary:
    """Summary of an `infer_on_ray` run."""

    output: str
    done_before: int
    """Pictures that earlier runs had done."""
    parts: int = 0
    """Files of results in the folder now."""
    images: int = 0
    """Pictures done by this run."""
    objects: int = 0
    """Found by this run."""
    failures: tuple[tuple[str, str], ...] = ()
    """Pictures that could not be read, each with why; the next run tries them again."""
    warnings: tuple[str, ...] = ()
    actors: Actors | None = None
    """None where there was nothing left to do."""
    start_seconds: float = 0.0
    """Seconds until the first results came: Ray, the actors, and one block."""
    wall_seconds: float = 0.0


def infer_on_ray(
    engine: str | Path,
    source: str | Path,
    output: str | Path,
    options: RayOptions,
    predict: PredictOptions | None = None,
    *,
    form: PartFormat = "jsonl",
) -> RaySummary:
    """Find objects in many pictures on the machines of a Ray cluster.

    Writes parts into the folder (see `parts`), each of them a row a picture: `file`, `width`,
    `height` and `detections`, as in `detections.json` of `infer_source`. Nothing is drawn. Only the
    machine that calls this writes, so each picture is in the parts once, whatever other machines
    fail; called again, it continues with pictures that no part has. `failures.jsonl` lists those
    that this run could not read.

    Args:
        engine: an engine file; machines that do not have it at this path are sent a copy.
        source: see `pictures.find_pictures`.
        output: a folder, or an address in a store.
        options: where it runs.
        predict: thresholds, border and batch; default thresholds: confidence 0.4, or what the
            engine has inside.
        form: of the parts.

    Raises:
        UserError: see `connected`, `find_pictures`, `check_outside`, `open_job` and `load_engine`;
            or no picture could be read.
    """
    start = time.perf_counter()
    files, facts = read_engine(Path(engine), options.backend, options.load)
    predict = _resolved(predict, facts, shown_nms(facts.nms))
    pictures = find_pictures(source)
    odd = next((one.name for one in pictures if not is_utf8(one.name)), None)
    if odd is not None and form == "parquet":
        raise UserError(f"{odd} is not a name in UTF-8, as Parquet has it; write jsonl instead.")
    folder = ResultFolder(output)
    if folder.is_local and Path(source).is_dir():  # what a listing names is meant
        check_outside(Path(output), (Path(one.path).parent for one in pictures))
    place = str(source) if is_address(str(source)) else str(Path(source).absolute())
    changes = options.load.preprocess or {}
    job = {
        "engine": facts.name,
        "engine_sha256": files.sha256,
        "source": place,
        "format": form,
        "border": predict.border,
        "decoder": options.load.decoder,
        "preprocess": {key: str(one) for key, one in changes.items()} or None,
        **dataclasses.asdict(predict.nms()),
    }
    lock = one_writer(Path(output)) if folder.is_local else contextlib.nullcontext()
    with lock:
        open_job(folder, job)
        done = set(files_in(folder))
        left = [picture for picture in pictures if picture.name not in done]
        summary = RaySummary(folder.place, done_before=len(pictures) - len(left))
        if left:
            with PartWriter(folder, form, job) as writer:
                summary = _infer(files, facts, predict, left, writer, options, summary)
        _write_failures(folder, summary.failures)
        parts = len(part_names(folder))
    if not summary.images and not summary.done_before:
        raise UserError(
            f"no image of {source} could be read; the first problem: {summary.failures[0][1]}"
        )
    return dataclasses.replace(summary, parts=parts, wall_seconds=time.perf_counter() - start)


def _infer(
    files: EngineFiles,
    facts: EngineFacts,
    predict: PredictOptions,
    pictures: Sequence[RemotePicture],
    writer: PartWriter,
    options: RayOptions,
    summary: RaySummary,
) -> RaySummary:
    failures: dict[int, str] = {}
    notes: dict[str, None] = {}
    written: set[int] = set()
    objects = 0
    start, first = time.perf_counter(), 0.0
    before = summary.done_before
    bar = progress_bar(
        len(pictures) + before, initial=before, desc="infer", unit="image", shown=options.progress
    )
    job = _running(files, facts, predict, options, pictures, is_evaluation=False)
    with bar, job as (actors, blocks):
        for block in blocks:
            first = first or time.perf_counter() - start
            notes |= dict.fromkeys(block.notes)
            # A block that was computed twice, because its machine died, counts once.
            failures |= {index: why for index, why in block.failures if index not in written}
            for row in block.rows:
                if row.index in written:
                    continue
                written.add(row.index)
                failures.pop(row.index, None)
                objects += row.objects
                writer.add(row.text)
            bar.update(before + len(written) + len(failures) - bar.n)
            writer.flush_if_due()
    missing = len(pictures) - len(written) - len(failures)
    if missing:
        raise UserError(
            f"Ray lost {missing} of {len(pictures)} images; run the same command again for these."
        )
    return dataclasses.replace(
        summary,
        images=len(written),
        objects=objects,
        failures=tuple((pictures[index].name, why) for index, why in sorted(failures.items())),
        warnings=tuple(notes),
        actors=actors,
        start_seconds=first,
    )


def evaluate_on_ray(
    engine: str | Path,
    dataset: CocoDataset,
    options: RayOptions,
    predict: PredictOptions | None = None,
    *,
    confusion: bool,
) -> Evaluation:
    """Measure an engine's COCO AP on the machines of a Ray cluster.

    They send their detections here, where AP is computed once, so it is what `evaluate` gives.
    Stage times are summed over the actors.

    Args:
        engine, options: see `infer_on_ray`.
        dataset: its images must lie at the same paths on every machine.
        predict, confusion: see `evaluate`.

    Raises:
        UserError: see `connected` and `evaluate`.
    """
    files, facts = read_engine(Path(engine), options.backend, options.load)
    predict = _resolved(predict, facts, measured_nms(facts.nms))
    images = [dataclasses.replace(one, path=one.path.absolute()) for one in dataset.images]

    def found() -> Iterator[FoundBatch]:
        seen: set[int] = set()
        with _running(files, facts, predict, options, images, is_evaluation=True) as (_, blocks):
            for block in blocks:
                fresh = {index: one for index, one in block.pictures if index not in seen}
                seen.update(fresh)
                yield FoundBatch(
                    images=tuple(dataset.images[index] for index in fresh),
                    detections=tuple(fresh.values()),
                    notes=block.notes,
                    stage_seconds=block.stage_seconds,
                )
        if len(seen) < len(images):
            raise UserError(
                f"Ray lost {len(images) - len(seen)} images; run the same command again."
            )

    return evaluate_found(facts, dataset, found(), progress=options.progress, confusion=confusion)


def _resolved(
    predict: PredictOptions | None, facts: EngineFacts, default: NmsSettings
) -> PredictOptions:
    """Return options that say the same of an engine on every machine."""
    predict = (predict or PredictOptions()).over(default)
    border = resolve_border(predict.resize, predict.border, facts.image_size)
    return dataclasses.replace(predict, resize=None, border=border)


@contextlib.contextmanager
def _running(
    files: EngineFiles,
    facts: EngineFacts,
    predict: PredictOptions,
    options: RayOptions,
    pictures: Sequence[RemotePicture | CocoImage],
    *,
    is_evaluation: bool,
) -> Iterator[tuple[Actors, Iterator[FoundInBlock]]]:
    """Yield the actors of a job and what they find, see `_blocks`, while Ray is connected."""
    with connected(options.address) as ray:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        on_gpu = facts.backend != "onnxruntime" or options.load.provider in ("cuda", "tensorrt")
        actors = fitting_actors(nodes, needs_gpu=on_gpu, cores=options.load.threads)
        cores = max(1, actors.cpus)
        work = Work(
            engine=ray.put(files),
            backend=options.backend,
            options=dataclasses.replace(options.load, threads=cores),
            predict=dataclasses.replace(predict, workers=cores, clip=not is_evaluation),
            class_names=facts.class_names,
            is_evaluation=is_evaluation,
        )
        yield actors, _blocks(ray, work, actors, list(enumerate(pictures)))


def _blocks(ray: Any, work: Work, actors: Actors, items: Sequence[Item]) -> Iterator[FoundInBlock]:
    """Yield what the actors find, block by block, in the order in which they are done.

    Raises:
        UserError: an actor says that the job cannot be done.
    """
    # Small enough that the last blocks end together, and that a death costs little.
    most = MOST_IN_A_BLOCK_ON_GPUS if actors.gpus else MOST_IN_A_BLOCK
    size = max(1, min(most, -(-len(items) // (8 * actors.count))))
    rows = [row_of(items[first : first + size]) for first in range(0, len(items), size)]
    # Not `from_arrow`, which has workers of the cluster look at every block first.
    found = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        Detector,
        fn_constructor_args=(work,),
        batch_size=1,  # a block; Ray wants a number where there are GPUs
        batch_format="pyarrow",
        zero_copy_batch=True,
        # So few at the start that a job begins although machines are still coming up.
        compute=ray.data.ActorPoolStrategy(
            min_size=1, max_size=actors.count, initial_size=actors.count
        ),
        num_cpus=actors.cpus,
        num_gpus=actors.gpus or None,
    )
    for table in found.iter_batches(batch_size=None, batch_format="pyarrow"):
        for block in values_of(table):
            if block.fault is not None:
                raise UserError(block.fault)
            yield block


def _write_failures(folder: ResultFolder, failures: Sequence[tuple[str, str]]) -> None:
    if failures or FAILURES_FILE in folder.names():
        lines = [json.dumps({"file": name, "error": why}) + "\n" for name, why in failures]
        folder.write(FAILURES_FILE, "".join(lines).encode())
