"""Batch work on a Ray cluster: two nodes of this machine, one killed in the middle."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from support.tiny_detector import load_named, load_tiny, write_cells

from trt_yolov6.cli import main
from trt_yolov6.data.coco import load_coco
from trt_yolov6.engines import load_engine
from trt_yolov6.engines.base import LoadOptions
from trt_yolov6.engines.build import build_engine
from trt_yolov6.errors import UserError
from trt_yolov6.graph.onnx_import import graph_from_onnx
from trt_yolov6.runtime.annotate import infer_source
from trt_yolov6.runtime.evaluate import evaluate
from trt_yolov6.serving.ray.cluster import Actors, connected, fitting_actors
from trt_yolov6.spec import PredictOptions

# Not imported here: every worker of the suite collects this file.
if importlib.util.find_spec("ray") is None:
    pytest.skip("Ray is not installed (extra `ray`)", allow_module_level=True)

from trt_yolov6.serving.ray import jobs, parts
from trt_yolov6.serving.ray.engine_files import load_here, read_engine
from trt_yolov6.serving.ray.jobs import RayOptions, evaluate_on_ray, infer_on_ray
from trt_yolov6.serving.ray.parts import PartFormat, PartWriter, ResultFolder, files_in, open_job

# Ray Data reads its own settings that are on their way out.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")

ANY = RayOptions(address="auto", progress=False)
"""The cluster of the fixture, whose connection is there already."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head and another node of one core each, on loopback, without what only serves people.

    Ray only counts GPUs: the nodes say that they have one.
    """
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "num_gpus": 1, "object_store_memory": 80 * 2**20}
    # Deaths are noticed within a second or two instead of half a minute.
    health = {"health_check_period_ms": 500, "health_check_failure_threshold": 3}
    head = {"include_dashboard": False, "include_log_monitor": False, "no_monitor": True}
    whole = Cluster(initialize_head=True, head_node_args={**node, **head, "_system_config": health})
    whole.add_node(**node)
    ray.init(address=whole.address, log_to_driver=False, logging_level="ERROR")
    yield whole
    ray.shutdown()
    whole.shutdown()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny detector's file."""
    with load_tiny(tmp_path_factory.mktemp("tiny")) as engine:
        return engine.path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Thirty small pictures, one of them below, and one that is not a picture."""
    return write_pictures(tmp_path / "pictures", 30)


def write_pictures(folder: Path, count: int) -> Path:
    rng = np.random.default_rng(0)
    (folder / "below").mkdir(parents=True)
    for number in range(count):
        pixels = np.zeros((64, 64 + number % 5, 3), np.uint8)
        row, column, channel = rng.integers(0, (8, 8, 3))
        pixels[8 * row : 8 * row + 8, 8 * column : 8 * column + 8, channel] = 255
        place = folder / "below" if number == 7 else folder
        cv2.imwrite(str(place / f"{number:04d}.png"), pixels)
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Read parts as a user would: line by line, or by pyarrow."""
    import pyarrow.parquet

    found: list[dict[str, Any]] = []
    for path in sorted(folder.glob("part-*")):
        if path.suffix == ".jsonl":
            found += map(json.loads, path.read_text().splitlines())
        else:
            found += pyarrow.parquet.read_table(path).to_pylist()
    return found


# On two nodes, until one dies.


def test_a_cluster_finds_what_one_process_finds(
    cluster: Any, tiny: Path, pictures: Path, tmp_path: Path
) -> None:
    with load_engine(tiny) as engine:
        infer_source(engine, pictures, tmp_path / "plain", progress=False)
    expected = json.loads((tmp_path / "plain" / "detections.json").read_text())
    summary = infer_on_ray(tiny, pictures, tmp_path / "out", ANY)
    assert sorted(rows_of(tmp_path / "out"), key=lambda row: row["file"]) == sorted(
        expected, key=lambda row: row["file"]
    )
    assert summary.actors == Actors(2, 1, 0)
    assert summary.images == 30
    assert summary.objects == 30
    ((name, why),) = summary.failures
    assert name == "broken.png"
    assert "not an image" in why
    told = [json.loads(line) for line in (tmp_path / "out/failures.jsonl").read_text().splitlines()]
    assert told == [{"file": name, "error": why}]


def test_an_evaluation_has_the_ap_of_one_process(cluster: Any, tmp_path: Path) -> None:
    write_cells(tmp_path / "cells", images=20)
    dataset = load_coco(tmp_path / "cells")
    with load_named(tmp_path) as engine:
        engine.detector = dataclasses.replace(engine.detector, class_names=())  # as in the file
        expected = evaluate(engine, dataset, progress=False, confusion=True)
        found = evaluate_on_ray(engine.path, dataset, ANY, confusion=True)
    assert found.ap == expected.ap
    assert found.per_class == expected.per_class
    assert (found.ap50, found.ap75, found.ap_small) == (
        expected.ap50,
        expected.ap75,
        expected.ap_small,
    )
    assert found.detections == expected.detections
    assert found.confusion is not None
    assert expected.confusion is not None
    assert np.array_equal(found.confusion, expected.confusion)


def test_every_picture_counts_once_although_a_node_dies(
    cluster: Any, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    folder, out = tmp_path / "many", tmp_path / "out"
    write_pictures(folder, 40)
    for source in list(folder.glob("00*.png")):
        for number in range(50):
            os.link(source, folder / f"copy{number:02d}_{source.name}")
    killed_after: list[int] = []
    add = PartWriter.add

    def add_and_kill(self: PartWriter, row: str) -> None:
        add(self, row)
        killed_after.append(1)
        if len(killed_after) == 200:
            cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)

    monkeypatch.setattr(PartWriter, "add", add_and_kill)
    summary = infer_on_ray(tiny, folder, out, ANY)
    files = Counter(row["file"] for row in rows_of(out))
    wanted = {path.relative_to(folder).as_posix() for path in folder.rglob("0*.png")}
    wanted |= {path.name for path in folder.glob("copy*.png")}
    assert set(files) == wanted
    assert set(files.values()) == {1}
    assert summary.images == len(wanted) == len(killed_after)
    assert sum(node["Alive"] for node in ray.nodes()) == 1


# On the head, which is left, with one actor: what follows is the same on any number.


def test_a_second_run_does_what_is_left_on_a_gpu_too(
    cluster: Any, tiny: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    add = PartWriter.add

    def add_until_interrupted(self: PartWriter, row: str) -> None:
        add(self, row)
        if json.loads(row)["file"] == stop:
            raise KeyboardInterrupt

    stop = "0011.png"
    with monkeypatch.context() as patch:
        patch.setattr(PartWriter, "add", add_until_interrupted)
        with pytest.raises(KeyboardInterrupt):
            infer_on_ray(tiny, pictures, out, ANY, form="parquet")
    before = len(rows_of(out))
    assert before >= 1
    (pictures / "broken.png").unlink()
    cv2.imwrite(str(pictures / "new.png"), np.zeros((64, 64, 3), np.uint8))
    # The node has no GPU, and the engine runs on its core.
    monkeypatch.setattr(jobs, "fitting_actors", lambda *_, **__: Actors(1, 1, 1))
    summary = infer_on_ray(tiny, pictures, out, ANY, form="parquet")
    assert summary.actors == Actors(1, 1, 1)
    assert (summary.done_before, summary.images) == (before, 31 - before)
    assert summary.objects == summary.images - 1  # none in the new one, one in each of the others
    assert set(Counter(row["file"] for row in rows_of(out)).values()) == {1}
    assert len(rows_of(out)) == 31
    assert summary.failures == ()
    # Nothing is left: no cluster is asked, and nothing is written.
    files = sorted(out.iterdir())
    assert infer_on_ray(tiny, pictures, out, ANY, form="parquet").actors is None
    assert sorted(out.iterdir()) == files
    # How images are prepared is a part of the job.
    for field, load in (
        ("preprocess", LoadOptions(preprocess={"colour": "bgr"})),
        ("decoder", LoadOptions(decoder="yolov6")),
    ):
        other = dataclasses.replace(ANY, load=load)
        with pytest.raises(UserError, match=f"holds results of another {field}"):
            infer_on_ray(tiny, pictures, out, other, form="parquet")


def test_a_mistake_comes_back_as_a_sentence(cluster: Any, tiny: Path, pictures: Path) -> None:
    with pytest.raises(UserError, match=r"takes batches|takes only|not 99999"):
        infer_on_ray(
            tiny,
            pictures,
            pictures.parent / "out",
            RayOptions(address="auto", progress=False),
            PredictOptions(batch=2**40),
        )


def test_local_runs_from_the_command_line_and_listens_on_loopback_alone(
    tiny: Path, pictures: Path, tmp_path: Path
) -> None:
    mark = f"TRT_YOLOV6_MARK={uuid.uuid4()}"
    listing = tmp_path / "listing.txt"
    (tmp_path / "out").mkdir()
    shutil.copy(pictures / "0002.png", tmp_path / "out")
    listing.write_text("# two of them\npictures/0001.png\n\nout/0002.png\npictures/0001.png\n")
    command = [sys.executable, "-m", "trt_yolov6", "infer", "--ray", "local", "--engine", str(tiny)]
    command += ["--source", str(listing), "--output", str(tmp_path / "out"), "--quiet"]
    environment = {**os.environ, "RAY_ADDRESS": "", **dict([mark.split("=")])}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    seen: set[str] = set()
    while process.poll() is None:
        seen |= listening(mark)
        time.sleep(0.3)
    assert process.stdout is not None
    output = process.stdout.read()
    assert process.returncode == 0, output
    assert {row["file"] for row in rows_of(tmp_path / "out")} == {
        "pictures/0001.png",
        "out/0002.png",
    }
    if Path("/proc/net/tcp").exists():
        assert seen
        assert seen <= {"0100007F", "0000000000000000FFFF00000100007F", "0" * 24 + "01000000"}


def listening(mark: str) -> set[str]:
    """Return the addresses, as /proc has them, on which processes with a mark listen."""
    sockets = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                sockets |= {os.readlink(one) for one in (folder / "fd").iterdir()}
        except OSError:
            continue
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                found.add(fields[1].partition(":")[0])
    return found


# Without a cluster.


def test_an_actor_takes_a_gpu_or_a_group_of_cores() -> None:
    def fit(*nodes: tuple[int, int], gpu: bool = False, cores: int | None = None) -> Actors:
        offered = [{"CPU": float(c), "GPU": float(g)} for c, g in nodes]
        return fitting_actors(offered, needs_gpu=gpu, cores=cores)

    assert fit((16, 0)) == Actors(4, 4, 0)
    assert fit((0, 0), (1, 0), (3, 0)) == Actors(4, 1, 0)
    assert fit((8, 0), (6, 0), cores=4) == Actors(3, 4, 0)
    assert fit((64, 4), (16, 0), gpu=True) == Actors(4, 16, 1)
    assert fit((64, 1), gpu=True) == Actors(1, 16, 1)
    assert fit((4, 4), gpu=True) == Actors(4, 1, 1)
    assert fit((8, 4), gpu=True, cores=4) == Actors(2, 4, 1)
    with pytest.raises(UserError, match="needs a GPU"):
        fit((8, 0), gpu=True)
    with pytest.raises(UserError, match="no machine of the cluster has the 9 cores"):
        fit((8, 0), cores=9)
    with pytest.raises(UserError, match="offers Ray a core"):
        fit((0, 0))


@pytest.mark.parametrize("address", ["127.0.0.1:1", "[::1]:1", "nowhere.invalid:1", "a:b"])
def test_an_address_where_nothing_listens_is_told_at_once(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(UserError, match="does not lead to a cluster"), connected(address):
        pass


def test_sources_are_listed_once_and_by_name(pictures: Path, tmp_path: Path) -> None:
    from trt_yolov6.data.images import read_image
    from trt_yolov6.serving.ray.pictures import find_pictures

    below = find_pictures(pictures)
    assert len(below) == 31
    assert "below/0007.png" in {one.name for one in below}
    # The same folder by an address, which pyarrow reads.
    stored = find_pictures(f"file://{pictures}")
    assert [one.name for one in stored] == [one.name for one in below]
    pairs = [(a, b) for a, b in zip(below, stored, strict=True) if a.name != "broken.png"]
    for one, other in pairs[:3]:
        assert np.array_equal(read_image(*one.source()), read_image(*other.source()))
    listing = tmp_path / "list.txt"
    listing.write_text(f"pictures/0003.png\nfile://{pictures}/0002.png\npictures/0003.png\n")
    names = [one.name for one in find_pictures(listing)]
    assert names == ["pictures/0003.png", f"file://{pictures}/0002.png"]
    assert len(find_pictures(f"{pictures}/00*.png")) == 29
    assert len(find_pictures(f"file://{pictures}/0003.png")) == 1
    with pytest.raises(UserError, match="holds no image"):
        find_pictures(f"file://{tmp_path}/nothing")
    with pytest.raises(UserError, match="does not exist"):
        find_pictures(tmp_path / "nothing")
    with pytest.raises(UserError, match="pyarrow or fsspec"):
        find_pictures("nosuch://bucket/folder")
    with pytest.raises(UserError, match=r"missing\.png cannot be read"):
        dataclasses.replace(stored[0], path=f"{pictures}/missing.png").source()


def test_a_jpeg_is_left_to_gpus_wherever_it_lies(tmp_path: Path) -> None:
    from trt_yolov6.data.images import read_image
    from trt_yolov6.data.jpeg import Jpeg, open_image
    from trt_yolov6.serving.ray.pictures import find_pictures

    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    for name in ("a.jpg", "b.png"):
        cv2.imwrite(str(tmp_path / name), image)
    for source in (tmp_path, f"file://{tmp_path}"):
        photo, drawing = find_pictures(source)
        opened = open_image(*photo.source())
        assert isinstance(opened, Jpeg)
        assert np.array_equal(opened.read(), read_image(*photo.source()))
        other = open_image(*drawing.source())
        assert isinstance(other, np.ndarray)
        assert np.array_equal(other, image[..., ::-1])


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize("is_address", [False, True])
def test_parts_tell_what_is_done(tmp_path: Path, form: PartFormat, is_address: bool) -> None:
    place = tmp_path / "out"
    folder = ResultFolder(f"file://{place}" if is_address else place)
    assert folder.names() == []
    job = {"engine": "a", "source": "s"}
    open_job(folder, job)
    rows = [
        {"file": f"{n}.jpg", "width": 4, "height": 3, "detections": [found] * (n % 3)}
        for n, found in enumerate(
            [{"box": [0.0, 0.5, 1.25, 2.0], "score": 0.5, "class": 1, "name": "ü"}] * 25
        )
    ]
    with PartWriter(folder, form, job, rows=10) as writer:
        for row in rows[:12]:
            writer.add(json.dumps(row))
    failing = PartWriter(folder, form, job, rows=10)
    with contextlib.suppress(ZeroDivisionError), failing:
        for row in rows[12:]:
            failing.add(json.dumps(row))
        raise ZeroDivisionError
    assert list(files_in(folder)) == [row["file"] for row in rows]
    assert rows_of(place) == rows
    assert len(parts.part_names(folder)) == 4
    open_job(folder, job)
    with pytest.raises(UserError, match="holds results of another engine"):
        open_job(folder, {"engine": "b", "source": "s"})
    (place / f"part-000001.{form}").write_bytes(b"PAR1 cut off")
    with pytest.raises(UserError, match=r"part-000001.* is damaged"):
        list(files_in(folder))
    shutil.rmtree(place)


@pytest.mark.parametrize("known", [False, True])
def test_an_engine_is_read_here_and_loaded_there(tiny: Path, tmp_path: Path, known: bool) -> None:
    here = tmp_path / "here" / "tiny.onnx"
    here.parent.mkdir()
    if known:
        build_engine(graph_from_onnx(tiny), backend="onnxruntime", output=here)
    else:
        shutil.copy(tiny, here)
    files, facts = read_engine(here, "auto", LoadOptions())
    assert len(files.contents) == 1 + known  # its manifest goes with it
    engine, folder = load_here(files, "auto", LoadOptions())
    with engine:
        assert folder is None
        assert engine.path == here
        expected = engine.facts
    assert facts == expected
    # On another machine the path is nobody's, or another's.
    here.write_bytes(b"another")
    for is_there in (True, False):
        if not is_there:
            shutil.rmtree(here.parent)
        engine, folder = load_here(files, "auto", LoadOptions())
        assert folder is not None
        with engine, folder:
            assert engine.path.parent == Path(folder.name)
            assert engine.facts == expected


def test_folders_that_cannot_be_written_or_are_another_s_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "out", f"file://{tmp_path}/file/out"):
        with pytest.raises(UserError, match=r"cannot be .*(choose another|check `output`)"):
            open_job(ResultFolder(place), {"engine": "a"})
    folder = ResultFolder(tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "part-000001.jsonl").write_text("")
    with pytest.raises(UserError, match="holds parts but no"):
        open_job(folder, {"engine": "a"})
    (tmp_path / "out" / parts.JOB_FILE).write_text("[1")
    with pytest.raises(UserError, match="is damaged"):
        open_job(folder, {"engine": "a"})


def test_listings_are_of_pictures_that_can_be_found(pictures: Path, tmp_path: Path) -> None:
    from trt_yolov6.serving.ray.pictures import find_pictures

    listing = tmp_path / "list.txt"
    for encoding in ("utf-8", "utf-8-sig"):
        listing.write_text(f"{pictures}/0002.png\n", encoding)
        for address in (listing, f"file://{listing}"):
            assert [one.name for one in find_pictures(address)] == [f"{pictures}/0002.png"]
    for text, address, said in (
        ("# nothing\n", str(listing), "lists no image"),
        ("0002.png\n", f"file://{listing}", "a listing in a store needs addresses"),
        ("s3://[/x\n", str(listing), r"s3://\[/x is not an address"),
    ):
        listing.write_text(text)
        with pytest.raises(UserError, match=said):
            find_pictures(address)
    listing.write_bytes(b"\xff\xfe")
    for address in (str(listing), f"file://{listing}"):
        with pytest.raises(UserError, match=r"cannot be (read as a listing|listed)"):
            find_pictures(address)


def test_a_part_does_not_wait_for_ever(tmp_path: Path) -> None:
    with PartWriter(ResultFolder(tmp_path), "jsonl", {}, seconds=0) as writer:
        writer.add('{"file": "a", "width": 1, "height": 1, "detections": []}')
        writer.flush_if_due()
        assert [row["file"] for row in rows_of(tmp_path)] == ["a"]
        writer.flush_if_due()
    assert len(list(tmp_path.glob("part-*"))) == 1


def test_where_no_cluster_answers_nothing_is_left(
    tiny: Path, pictures: Path, tmp_path: Path
) -> None:
    # Neither a folder nor a job that the next one would have to fit. Ray is connected to here.
    arguments: list[str | Path] = ["--engine", tiny, "--source", pictures, "--ray", "127.0.0.1:9"]
    arguments += ["--output", tmp_path / "runs" / "out"]
    command = [sys.executable, "-m", "trt_yolov6", "infer", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "does not lead to a cluster" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_mistakes_cost_one_line(
    tiny: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def complaint(*arguments: str) -> str:
        base = ["infer", "--engine", str(tiny), "--source", str(pictures)]
        assert main([*base, "--output", str(tmp_path / "out"), *arguments]) == 2
        text = capsys.readouterr().err
        assert text.count("\n") == 1
        return text

    assert "give json, csv or yolo" in complaint("--format", "parquet")
    assert "give jsonl or parquet" in complaint("--format", "yolo", "--ray", "local")
    assert "one --format" in complaint("--format", "jsonl", "parquet", "--ray", "local")
    assert "--frames" in complaint("--frames", "3", "--ray", "local")
    odd = pictures / os.fsdecode(b"\xff.png")
    odd.write_bytes(b"")
    assert "is not a name in UTF-8" in complaint("--format", "parquet", "--ray", "local")
    odd.unlink()
    within = "--output", str(pictures / "below"), "--ray", "local"
    assert "below lies within the source and holds images" in complaint(*within)
    assert not (tmp_path / "out").exists()
