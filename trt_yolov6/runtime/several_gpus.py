"""Images through an engine on several GPUs of one machine: a process each, results in order.

Processes, not threads: Python's work takes 0.01 to 0.1 ms an image, so one interpreter, whose
threads take turns, is busy with one fast GPU.
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
    """Return a function, which can be pickled, that loads the engine in another process."""
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
    """Run `predict.process` on several GPUs; batches come in the order of the items.

    Args:
        gpus: from `check_gpus`.
        engine: its file is loaded once per GPU.
        items, read, finish: as in `process`, but pickled for other processes, as is what `finish`
            returns. Original images do not come back.
        options: as in `process`.
        others: other arguments of `process`.

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
    """Hand out batches on request, and yield their results in order."""
    in_work: dict[Any, list[int]] = {ours: [] for ours in workers}
    chunks: dict[int, list[Any]] = {}
    requests: list[Any] = []
    done: dict[int, Any] = {}
    noted: set[str] = set()
    gpu_of = dict(zip(workers, gpus, strict=True))
    ended: set[Any] = set()
    next_batch = next_result = 0
    while gpu_of:
        outgoing: dict[Any, list[list[Any]]] = {}
        for ours in list(requests):
            if ours in ended:
                continue
            # The process with the next result always gets what it asks for: it may return none
            # before it has some batches more.
            is_next = bool(in_work[ours]) and in_work[ours][0] == next_result
            if not is_next and next_batch >= next_result + _AHEAD * len(workers):
                continue
            requests.remove(ours)
            chunk = list(itertools.islice(items, batch))
            outgoing.setdefault(ours, []).append(chunk)
            if chunk:
                in_work[ours].append(next_batch)
                chunks[next_batch] = chunk
                next_batch += 1
            else:  # the empty batch that means the end is sent once
                ended.add(ours)
        for ours, batches in outgoing.items():
            ours.send(batches)
        ready: list[Any] = wait(list(gpu_of))
        for ours in ready:
            try:
                kind, value = ours.recv()
            except (EOFError, OSError) as error:
                raise UserError(
                    f"the process of GPU {gpu_of[ours]} ended before its work; see its messages "
                    "above, and whether another program takes the GPU's memory."
                ) from error
            if kind == "give":
                requests += [ours] * value
            elif kind == "done":
                index = in_work[ours].pop(0)
                done[index] = _unpacked(value, chunks.pop(index))
            elif kind == "failed":
                raise value
            else:
                del gpu_of[ours]
        while next_result in done:
            step = done.pop(next_result)
            notes = tuple(note for note in step.notes if note not in noted)
            noted.update(notes)
            yield dataclasses.replace(step, notes=notes)
            next_result += 1


def _packed(step: Processed[Any, bytes]) -> Processed[Any, bytes]:
    """Return a batch without what the parent process has."""
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
    """Queue received batches up to an empty one; None if the connection closes before."""
    try:
        chunk = None
        while chunk != []:
            for chunk in theirs.recv():
                received.put(chunk)
    except (EOFError, OSError):
        received.put(None)


def _send(theirs: Connection, outgoing: queue.SimpleQueue[Any]) -> None:
    """Send queued messages up to None, or until the connection closes."""
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
    """Return an error that can be pickled: itself, or else one with its text."""
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
    """Run the process of one GPU."""
    os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    # A thread for each direction: the parent never waits to write, nor the engine for the parent to
    # read. A batch's boxes may exceed the pipe's buffer.
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
    except EOFError:  # the parent has closed the connection
        pass
    except Exception as error:
        outgoing.put(("failed", _portable(error)))
    outgoing.put(None)
    sender.join()


def get_ready(engine: Engine, options: PredictOptions, *, decodes: bool) -> None:
    """Do what takes seconds at first, such as compiling kernels, on empty images.

    Otherwise the results of all processes would wait for this one's first batch.
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
    for _ in range(2):  # the second round records CUDA graphs
        for run in [start(rows=rows, patient=True) for _ in range(engine.in_flight)]:
            run.wait()
