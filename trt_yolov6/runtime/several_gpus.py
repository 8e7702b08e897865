"""Images through an engine on several GPUs of one machine: a process each, results in order.

Processes, not threads: what Python does for an image takes a hundredth of a millisecond to a tenth,
so that one interpreter, whose threads take turns, is busy with one fast GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import multiprocessing
import os
import pickle
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from trt_yolov6.common.machine import read_gpus
from trt_yolov6.data.letterbox import fit
from trt_yolov6.data.loader import Batch
from trt_yolov6.detectors.detections import Detections
from trt_yolov6.engines import load_engine
from trt_yolov6.engines.base import Engine
from trt_yolov6.errors import UserError
from trt_yolov6.runtime.predict import Processed, choose_batch, process, resolve
from trt_yolov6.spec import PredictOptions

Item = TypeVar("Item")
Result = TypeVar("Result")

_AHEAD = 32
"""Batches a GPU may be ahead of the one whose results come next: more than a process has at work
and asks for, so that GPUs hardly wait for each other."""
_ASKED = 4
"""Batches that a process asks for at a time, while it still has as many: it does not wait for them
then."""
_PATIENCE = 10
"""Seconds that a process has to end by itself."""


def loader_of(engine: Engine) -> Callable[[], Engine]:
    """Return how another process loads an engine."""
    return functools.partial(load_engine, engine.path, engine.backend, engine.load_options)


def visible_gpus() -> tuple[str, ...]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return tuple(str(index) for index in range(len(read_gpus())))
    return tuple(name.strip() for name in named.split(",") if name.strip())


def check_gpus(count: int) -> tuple[str, ...]:
    """Return the first GPUs.

    Raises:
        UserError: there are fewer.
    """
    found = visible_gpus()
    if count > len(found):
        raise UserError(
            f"this process may use {len(found)} NVIDIA GPUs, not {count}; give a smaller `gpus`, "
            "or check CUDA_VISIBLE_DEVICES.",
        )
    return found[:count]


def process_on_gpus(
    gpus: tuple[str, ...],
    engine: Engine,
    items: Iterable[Item],
    read: Callable[[Item], NDArray[np.uint8]],
    finish: Callable[[Batch[Item], list[Detections]], Result],
    options: PredictOptions | None = None,
    **others: Any,
) -> Generator[Processed[Item, Result], None, None]:
    """Do what `predict.process` does on several GPUs; batches come in the order of the items.

    Args:
        gpus: from `check_gpus`.
        engine: its file is loaded once a GPU.
        items, read, finish: as in `process`, but they travel to other processes, by pickle; what
            `finish` returns travels back. Original images do not.
        options: as in `process`.
        others: of `process`.

    Raises:
        UserError: as `process`; or a process has died.
    """
    context = multiprocessing.get_context("spawn")
    workers: dict[Any, Any] = {}
    options = options or PredictOptions()
    batch = choose_batch(engine, options.batch)
    options = dataclasses.replace(options, batch=batch)
    arguments = (loader_of(engine), read, finish, options, others)
    try:
        for gpu in gpus:
            ours, theirs = context.Pipe()
            worker = context.Process(target=_work, args=(theirs, gpu, *arguments), daemon=True)
            worker.start()
            theirs.close()
            workers[ours] = worker
        yield from _in_order(workers, gpus, iter(items), batch)
    finally:
        for ours in workers:
            ours.close()  # a process that waits for work ends
        for worker in workers.values():
            worker.join(_PATIENCE)
            if worker.is_alive():
                worker.terminate()
                worker.join()


def _in_order(
    workers: dict[Any, Any],
    gpus: tuple[str, ...],
    items: Iterator[Any],
    batch: int,
) -> Generator[Any, None, None]:
    """Give out batches as they are asked for, and yield their results in order."""
    given: dict[Any, list[int]] = {ours: [] for ours in workers}
    chunks: dict[int, list[Any]] = {}
    asking: list[Any] = []
    done: dict[int, Any] = {}
    noted: set[str] = set()
    open_ends = dict(zip(workers, gpus, strict=True))
    ended: set[Any] = set()
    number = following = 0
    while open_ends:
        parcels: dict[Any, list[list[Any]]] = {}
        for ours in list(asking):
            if ours in ended:
                continue
            # The process that has the next results gets what it asks for: it may hand none out
            # before there are some batches after it.
            is_next = bool(given[ours]) and given[ours][0] == following
            if not is_next and number >= following + _AHEAD * len(workers):
                continue
            asking.remove(ours)
            chunk = list(itertools.islice(items, batch))
            parcels.setdefault(ours, []).append(chunk)
            if chunk:
                given[ours].append(number)
                chunks[number] = chunk
                number += 1
            else:  # the end, said once
                ended.add(ours)
        for ours, parcel in parcels.items():
            ours.send(parcel)
        ready: list[Any] = wait(list(open_ends))
        for ours in ready:
            try:
                kind, value = ours.recv()
            except (EOFError, OSError) as error:
                raise UserError(
                    f"the process of GPU {open_ends[ours]} ended before its work; see its messages "
                    "above, and whether another program takes the GPU's memory."
                ) from error
            if kind == "give":
                asking += [ours] * value
            elif kind == "done":
                index = given[ours].pop(0)
                done[index] = _unpacked(value, chunks.pop(index))
            elif kind == "failed":
                raise value
            else:
                del open_ends[ours]
        while following in done:
            step = done.pop(following)
            notes = tuple(note for note in step.notes if note not in noted)
            noted.update(notes)
            yield dataclasses.replace(step, notes=notes)
            following += 1


def _packed(step: Processed[Any, bytes]) -> Processed[Any, bytes]:
    """Leave out what the other end has."""
    batch = dataclasses.replace(step.batch, images=())
    if not batch.failures:
        batch = dataclasses.replace(batch, items=())
    return dataclasses.replace(step, batch=batch)


def _unpacked(step: Processed[Any, bytes], chunk: list[Any]) -> Processed[Any, Any]:
    """Undo `_packed`, except that images are gone; `chunk` are the items of the batch."""
    batch = step.batch
    if not batch.failures:
        batch = dataclasses.replace(batch, items=tuple(chunk))
    return dataclasses.replace(step, batch=batch, result=pickle.loads(step.result))


def _receive(theirs: Connection, received: queue.SimpleQueue[Any]) -> None:
    """Hand on what comes, up to an empty batch; None if the other end is closed before."""
    try:
        chunk = None
        while chunk != []:
            for chunk in theirs.recv():
                received.put(chunk)
    except (EOFError, OSError):
        received.put(None)


def _send(theirs: Connection, outgoing: queue.SimpleQueue[Any]) -> None:
    """Send what comes, up to None, or until nobody reads any more."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        while (message := outgoing.get()) is not None:
            try:
                theirs.send(message)
            except (BrokenPipeError, ConnectionResetError):
                raise
            except Exception as error:  # what cannot be pickled
                theirs.send(("failed", error))
                return


def _portable(error: Exception) -> Exception:
    """Return an error as the other end can have it: itself, or its text where pickle fails."""
    try:
        return pickle.loads(pickle.dumps(error))  # type: ignore[no-any-return]
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def _work(
    theirs: Connection,
    gpu: str,
    load: Callable[[], Engine],
    read: Callable[[Any], NDArray[np.uint8]],
    finish: Callable[[Batch[Any], list[Detections]], Any],
    options: PredictOptions,
    others: dict[str, Any],
) -> None:
    """Be the process of one GPU."""
    os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    # Each way has a thread of its own: the other end never waits to write, nor the engine for it to
    # read. A batch's boxes may take more than there is room for on the way.
    received: queue.SimpleQueue[Any] = queue.SimpleQueue()
    outgoing: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(theirs, received), daemon=True).start()
    sender = threading.Thread(target=_send, args=(theirs, outgoing), daemon=True)
    sender.start()

    def items() -> Iterator[Any]:
        outgoing.put(("give", 2 * _ASKED))
        for number in itertools.count(1):
            chunk = received.get()
            if not chunk:
                break
            if number % _ASKED == 0:
                outgoing.put(("give", _ASKED))
            yield from chunk
        if chunk is None:
            raise EOFError

    def packed(batch: Batch[Any], found: list[Detections]) -> bytes:
        """Do in the pipeline's thread what `send` would do in another."""
        return pickle.dumps(finish(batch, found), pickle.HIGHEST_PROTOCOL)

    try:
        with load() as engine:
            get_ready(engine, options, decodes=not others.get("keep_images"))
            for step in process(engine, items(), read, packed, options, **others):
                outgoing.put(("done", _packed(step)))
        outgoing.put(("end", None))
    except EOFError:  # closed at the other end: nobody wants more
        pass
    except Exception as error:
        outgoing.put(("failed", _portable(error)))
    outgoing.put(None)
    sender.join()


def get_ready(engine: Engine, options: PredictOptions, *, decodes: bool) -> None:
    """Do what takes seconds once, such as compiling kernels, with empty images.

    A process that took a batch before would have all results of the others wait for it.
    """
    rows, size = choose_batch(engine, options.batch), engine.image_size
    empty = engine.empty_input(rows)
    empty[:] = 0
    engine.infer(empty)
    if not engine.takes_images():
        return
    if decodes:
        engine.jpeg_decoder()
    images, placed = [np.zeros((*size, 3), np.uint8)] * rows, [fit(size, size)] * rows
    start = functools.partial(
        engine.start_images, images, placed, resolve(engine, options)[0], clip=options.clip
    )
    for _ in range(2):  # the second time, runs are recorded
        for run in [start(rows=rows, patient=True) for _ in range(engine.in_flight)]:
            run.wait()
