"""The report: what is in it, that nothing of a file becomes markup, and that browsers show it."""

from __future__ import annotations

import base64
import copy
import csv
import html.parser
import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from support.chromium import Chromium, find_chromium

from trt_yolov6.cli import main
from trt_yolov6.common.files import write_json
from trt_yolov6.errors import UserError
from trt_yolov6.reports.material import read_material
from trt_yolov6.reports.sections import pareto
from trt_yolov6.reports.tables import NOTHING, quantization, rows_of
from trt_yolov6.reports.write import csv_of, html_of, markdown_of, write_report

ENGINES = (
    # label, precision, AP, ms at batch 1, ms at batch 32
    ("yolov6n", "fp32", 0.352, 5.0, 101.0),
    ("yolov6n", "int8", 0.340, 3.0, 60.0),
    ("yolov6n", "int8:6", 0.349, 3.4, 71.0),
    ("yolov6s", "fp32", 0.431, 11.0, 260.0),
    ("yolov6s", "int8", 0.420, 7.0, 150.0),
    ("yolov6s", "int8:6", 0.428, 7.9, 171.0),
    ('a <b>bold</b> & "quoted" model', "fp16", None, 30.0, 800.0),
)

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>"


def engine_record(label: str, precision: str, ap: float | None) -> dict[str, Any]:
    quantized = precision.startswith("int8")
    share = {"int8_share_of_multiply_adds": 0.91} if quantized else None
    return {
        "engine": f"{label} {precision}",
        "label": label,
        "model": label,
        "precision": precision,
        "backend": "onnxruntime",
        "backend_version": "1.0",
        "device": "A CPU",
        "threads": None,
        "note": "",
        "image_size": [640, 640],
        "parameters": 4_320_000,
        "flops": 11_100_000_000,
        "bytes": 17_000_000,
        "calibration": share,
        "float_layers": ["a", "b"] if quantized else [],
        "AP": ap,
        "AP50": None if ap is None else ap + 0.15,
        "AP75": ap,
        "APs": ap,
        "APm": ap,
        "APl": ap,
        "images": 72,
    }


def timing_record(engine: str, batch: int, ms: float) -> dict[str, Any]:
    return {
        "engine": engine,
        "batch": batch,
        "engine_file": "engines/x.onnx",
        "engine_sha256": "0" * 64,
        "latency_ms": {
            "median": ms,
            "interval": [0.97 * ms, 1.03 * ms],
            "p90": 1.1 * ms,
            "p99": 1.2 * ms,
        },
        "throughput_fps": 1e3 * batch / ms,
        "runs": 80,
        "quiet_runs": 70,
        "disturbed": False,
        "waited": 0.01,
        "date": "2026-01-02T03:04:05+00:00",
    }


@pytest.fixture
def results(tmp_path: Path) -> dict[str, Any]:
    """Results of seven engines at two batch sizes, with layers and an example."""
    picture = np.full((120, 160, 3), 200, np.uint8)
    encoded = cv2.imencode(".jpg", picture)[1].tobytes()
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "0.jpg").write_bytes(encoded)
    names = [f"{label} {precision}" for label, precision, *_ in ENGINES]
    layers = [
        {
            "name": f"backbone.stages.{index}.conv",
            "operator": "Conv" if index < 20 else "",
            "precision": "fp32" if index < 20 else "",
            "ms": 0.1 + 0.01 * index,
            "roofline_ms": 0.06 if index < 18 else None,
            "bound": "arithmetic" if index < 18 else "",
        }
        for index in range(24)
    ]
    return {
        "schema": 1,
        "kind": "comparison",
        "package": "0",
        "date": "2026-01-02T03:04:05+00:00",
        "environment": {
            "cpu": {"model": "A CPU", "threads": 2},
            "cpu_clock": {"mhz": 2600.0, "max_mhz": None, "governor": None},
            "gpus": [],
            "system": HOSTILE,
            "packages": {"onnxruntime": "1.0"},
        },
        "data": {
            "root": "cells",
            "split": "val",
            "annotations_sha256": "a" * 64,
            "images_sha256": "b" * 64,
            "images": 72,
            "class_names": ["RBC", HOSTILE],
        },
        "settings": {
            "rounds": 8,
            "duration": 10.0,
            "confidence": 0.03,
            "iou": 0.65,
            "max_detections": 300,
            "border": 0,
        },
        "engines": [engine_record(label, precision, ap) for label, precision, ap, *_ in ENGINES],
        "timings": [
            timing_record(name, batch, ms)
            for batch, column in ((1, 3), (32, 4))
            for name, ms in zip(names, [float(row[column] or 0) for row in ENGINES], strict=True)
        ],
        "ratios": [],
        "ceilings": [
            {
                "device": "A CPU",
                "bytes_per_second": 4e10,
                "flops": {"fp32": 2e11},
                "how": "a product",
            }
        ],
        "layers": [{"engine": names[0], "batch": 1, "computed_in": "", "layers": layers}],
        "examples": [
            {
                "file": HOSTILE,
                "picture": "examples/0.jpg",
                "width": 160,
                "height": 120,
                "annotated": [[10, 10, 60, 60, 1.0, 0]],
                "detections": {
                    name: [[12, 11, 61, 58, 0.9, 0], [80, 40, 120, 90, 0.5, 1]] for name in names
                },
            }
        ],
        "left_out": [HOSTILE],
    }


@pytest.fixture
def files(tmp_path: Path, results: dict[str, Any]) -> list[Path]:
    write_json(tmp_path / "results.json", results)
    ranking = {
        "metric": "snr",
        "layers": [{"name": f"layer {i}", "value": 10.0 + i} for i in range(20)]
        + [{"name": HOSTILE, "value": None}],
    }
    write_json(tmp_path / "sensitivity.json", ranking)
    return [tmp_path, tmp_path / "sensitivity.json"]


class Outline(html.parser.HTMLParser):
    """Tags, texts and embedded or outside addresses of a page; checks that tags are balanced."""

    VOID = ("meta", "link", "br", "rect", "circle", "path", "polyline", "use", "image")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_has_every_part_and_needs_nothing_from_outside(files: list[Path]) -> None:
    page = html_of(read_material(files))
    outline = Outline(page)
    text = " ".join(outline.texts)
    for title in (
        "Accuracy and speed",
        "All engines",
        "Cost of quantization",
        "Sensitivity of layers",
        "Time of layers",
        "Examples",
        "Environment and method",
    ):
        assert title in text
    for tag, name, value in outline.attributes:
        if name in ("src", "href", "xlink:href", "srcset", "action"):
            assert value.startswith(("data:", "#")), (tag, name, value[:80])
    assert "@import" not in page
    assert "url(" not in page


def test_the_page_says_that_a_cpu_computes_low_precision_in_float(
    tmp_path: Path, results: dict[str, Any]
) -> None:
    def text_of(backend: str, device: str) -> str:
        value = copy.deepcopy(results)
        for engine in value["engines"]:
            engine |= {"backend": backend, "device": device}
        folder = tmp_path / backend / device.split()[0]
        write_json(folder / "results.json", value)
        return " ".join(Outline(html_of(read_material([folder]))).texts)

    assert "in float. Its AP is right" in " ".join(text_of("onnxruntime", "AMD EPYC").split())
    for backend, device in (("tensorrt", "NVIDIA T4"), ("onnxruntime", "GPU 0 through CUDA")):
        assert "Its AP is right" not in text_of(backend, device)


def test_a_picture_is_embedded_once_and_drawn_for_every_engine(files: list[Path]) -> None:
    outline = Outline(html_of(read_material(files)))
    pictures = [
        value for tag, name, value in outline.attributes if tag == "image" and name == "href"
    ]
    assert len(pictures) == 1
    content = base64.b64decode(pictures[0].removeprefix("data:image/jpeg;base64,"))
    decoded = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    assert decoded is not None
    assert decoded.shape == (120, 160, 3)
    assert outline.tags.count("use") == len(ENGINES)


def test_nothing_of_a_file_becomes_markup(files: list[Path]) -> None:
    material = read_material(files)
    page = html_of(material, title=HOSTILE)
    outline = Outline(page)
    assert outline.tags.count("script") == 1
    assert "img" not in outline.tags
    assert "b" not in outline.tags
    assert not [name for _, name, _ in outline.attributes if name.startswith("on")]
    assert HOSTILE in " ".join(outline.texts)
    markdown = markdown_of(material, title=HOSTILE)
    assert "<script>" not in markdown.replace("\\<", "")


def test_the_table_is_the_results(files: list[Path], results: dict[str, Any]) -> None:
    text = " ".join(Outline(html_of(read_material(files))).texts)
    assert "35.2" in text
    assert "5.00 ± 0.15" in text
    lines = list(csv.DictReader(io.StringIO(csv_of(read_material(files)))))
    assert len(lines) == len(results["timings"])
    found = {(line["engine"], line["batch"]): line for line in lines}
    line = found["yolov6s int8", "32"]
    assert float(line["AP"]) == 0.42
    assert float(line["latency_ms"]) == 150.0
    assert float(line["throughput_fps"]) == 1e3 * 32 / 150
    assert found['a <b>bold</b> & "quoted" model fp16', "1"]["AP"] == ""


def test_markdown_has_as_many_cells_in_every_row(files: list[Path]) -> None:
    text = markdown_of(read_material(files))
    first = text.split("\n\n")[2].splitlines()
    assert len(first) == len(ENGINES) + 2
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in first}) == 1
    assert "| yolov6n | int8:6 | 34.90 | -0.30 |" in text


def test_quantization_is_held_against_the_models_own_float_engine(files: list[Path]) -> None:
    found = dict(quantization(rows_of(read_material(files))))
    assert list(found) == ["yolov6n", "yolov6s"]
    assert [round(change or 0, 6) for *_, change in found["yolov6s"]] == [0, -1.1, -0.3]


def test_engines_of_one_checkpoint_are_one_model_whatever_their_names(
    tmp_path: Path, results: dict[str, Any]
) -> None:
    named = ("whole", "eight bits", "eight bits, small", "other", "other", "other", "last")
    origins = ("a", "a", "a", "b", "b", "b", "c")
    for engine, name, origin in zip(results["engines"], named, origins, strict=True):
        engine |= {"label": name, "origin_sha256": origin}
    results["engines"][2]["image_size"] = [320, 320]
    write_json(tmp_path / "results.json", results)
    found = quantization(rows_of(read_material([tmp_path])))
    called = [(title, [name for name, *_ in own]) for title, own in found]
    # By their own names where their labels differ, in which a precision may come twice.
    assert called == [
        ("yolov6n", ["yolov6n fp32", "yolov6n int8"]),
        ("other", ["fp32", "int8", "int8:6"]),
    ]
    assert round(found[0][1][1][2] or 0, 6) == -1.2


def test_the_front_holds_what_no_other_engine_beats(files: list[Path]) -> None:
    rows = [row for row in rows_of(read_material(files)) if row.ap is not None]
    names = [row.name for row in pareto(rows, 1)]
    # By latency; yolov6n in float is beaten by nothing in AP below yolov6s's 7 ms.
    assert names == [
        "yolov6n int8",
        "yolov6n int8:6",
        "yolov6n fp32",
        "yolov6s int8",
        "yolov6s int8:6",
        "yolov6s fp32",
    ]


def test_tried_float_layers_are_drawn_and_what_the_marks_stand_for(
    tmp_path: Path, results: dict[str, Any]
) -> None:
    found = copy.deepcopy(results)
    engine = next(one for one in found["engines"] if one["precision"] == "int8:6")
    sets = [((), 0.90, 0.0), (("a",), 0.89, 0.01), (("b",), 0.92, 0.02), (("a", "b"), 0.95, 0.03)]
    engine["calibration"]["tried"] = [
        {"decides": "float layers", "float_layers": layers, "agreement": value, "slowdown": time}
        for layers, value, time in sets
    ]
    write_json(tmp_path / "tried" / "results.json", found)
    page = html_of(read_material([tmp_path / "tried"]))
    figure = next(one for one in page.split("<figure>") if "4 sets of float layers" in one)
    keys = re.findall(r'class="mark (\w+)".*?</svg>([^<]+)</span>', figure)
    assert keys == [
        ("fp16", "built"),
        ("int8", "best within its time"),
        ("other", "another set"),
    ]
    drawn = re.findall(r'<g class="point (\w+)".*?aria-label="([^"]+)"', figure)
    assert [kind for kind, _ in drawn] == ["other", "int8", "int8", "fp16"]
    assert drawn[-1][1] == "2 in float, built: agreement 95.0 %, 3.0 % slower"


def test_what_results_lack_says_how_to_get_it(tmp_path: Path, results: dict[str, Any]) -> None:
    bare = copy.deepcopy(results)
    bare.update(layers=[], examples=[], ceilings=[])
    bare["engines"] = bare["engines"][:1]
    bare["timings"] = bare["timings"][:1]
    write_json(tmp_path / "bare" / "results.json", bare)
    text = " ".join(Outline(html_of(read_material([tmp_path / "bare"]))).texts)
    for command in (
        "--precisions fp32,int8,int8:6",
        "trt-yolov6 sensitivity --json",
        "--examples 3",
    ):
        assert command in text


def test_the_answer_marks_a_latency_that_others_disturbed(
    tmp_path: Path, results: dict[str, Any]
) -> None:
    for timing in results["timings"]:
        timing["disturbed"] = timing["engine"] == "yolov6n int8"
    write_json(tmp_path / "results.json", results)
    text = " ".join(" ".join(Outline(html_of(read_material([tmp_path]))).texts).split())
    assert "yolov6s fp32 , AP 43.1 % at 11.00 ms (batch 1)" in text
    assert "yolov6n int8 , 3.000 ms * with AP 34.0 %" in text


def test_a_layer_of_no_time_is_shown(tmp_path: Path, results: dict[str, Any]) -> None:
    # A profile in whole microseconds says 0 for what is quicker.
    for layer in results["layers"][0]["layers"]:
        layer["ms"] = 0.0
    write_json(tmp_path / "results.json", results)
    assert "0.0 %" in html_of(read_material([tmp_path]))


@pytest.mark.parametrize("picture", ["a\0.jpg", 5000 * "a", "examples", "none.jpg", ""])
def test_a_picture_that_is_no_file_is_missing(
    tmp_path: Path, results: dict[str, Any], picture: str
) -> None:
    results["examples"][0]["picture"] = picture
    write_json(tmp_path / "results.json", results)
    assert "1 picture could not be found" in html_of(read_material([tmp_path]))


def test_names_that_are_not_utf_8_are_reported_with_question_marks(
    tmp_path: Path, results: dict[str, Any]
) -> None:
    # As Python has the name of a file in Latin-1.
    results["engines"][0]["label"] = os.fsdecode(b"caf\xe9")
    write_json(tmp_path / "results.json", results)
    for name in ("r.html", "r.md", "r.csv"):
        written = write_report(read_material([tmp_path]), tmp_path / name)
        assert "caf?" in written.read_text("utf-8")


def test_results_name_no_picture_outside_their_folder(
    tmp_path: Path, results: dict[str, Any]
) -> None:
    (tmp_path / "inside").mkdir()
    outside = results["examples"][0] | {"picture": "../examples/0.jpg"}
    write_json(tmp_path / "inside" / "results.json", results | {"examples": [outside]})
    page = html_of(read_material([tmp_path / "inside"]))
    assert "data:image/jpeg" not in page
    assert "could not be found" in page


def test_several_comparisons_are_told_apart(tmp_path: Path, results: dict[str, Any]) -> None:
    for name in ("one", "two"):
        write_json(tmp_path / name / "results.json", results)
    rows = rows_of(read_material([tmp_path / "one", tmp_path / "two"]))
    assert len({row.name for row in rows}) == 2 * len(ENGINES)
    assert rows[0].name == "yolov6n fp32 (one)"
    # By their paths, where their folders are called the same.
    write_json(tmp_path / "other" / "one" / "results.json", results)
    rows = rows_of(read_material([tmp_path / "one", tmp_path / "other" / "one"]))
    assert len({row.name for row in rows}) == 2 * len(ENGINES)


@pytest.mark.parametrize(
    ("part", "key", "said"),
    [
        ("data", "annotations_sha256", "another data set"),
        ("data", "images_sha256", "other images"),
        ("settings", "confidence", "another confidence"),
    ],
)
def test_ap_of_something_else_is_not_put_next_to_it(
    tmp_path: Path, results: dict[str, Any], part: str, key: str, said: str
) -> None:
    write_json(tmp_path / "one" / "results.json", results)
    other = {**results, part: {**results[part], key: 0.25 if part == "settings" else "c" * 64}}
    write_json(tmp_path / "two" / "results.json", other)
    with pytest.raises(UserError, match=rf"two.results\.json is of {said} than in .*one"):
        read_material([tmp_path / "one", tmp_path / "two"])


def test_the_next_baseline_is_a_comparison_whatever_the_order(
    files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", *map(str, files[::-1]), "--output", str(tmp_path / "x.md")]) == 0
    baseline = capsys.readouterr().out.split("--baseline ")[1].strip()
    assert json.loads(Path(baseline).read_text())["kind"] == "comparison"


def test_the_command_writes_three_forms(
    files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = [str(tmp_path / f"out/report{suffix}") for suffix in (".html", ".md", ".csv")]
    assert main(["report", *map(str, files), "--output", *outputs]) == 0
    assert all(Path(path).stat().st_size > 500 for path in outputs)
    for command, words in (
        (["report", str(tmp_path / "none")], "none"),
        (["report", str(files[1])], "no results of a comparison"),
        (
            ["report", str(files[0]), "--output", str(tmp_path / "x.md"), str(tmp_path / "x.pdf")],
            ".html",
        ),
    ):
        capsys.readouterr()
        assert main(command) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1
        assert words in error
    assert not (tmp_path / "x.md").exists()
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"metric": "snr", "layers": [{"name": 1}]}))
    with pytest.raises(UserError, match="damaged"):
        read_material([files[0], other])


# --- in a browser


@pytest.fixture
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium here: `apt-get install chromium`, or name one in CHROMIUM")
    with Chromium(program, tmp_path_factory.mktemp("profile")) as one:
        yield one


def test_in_a_browser_it_opens_clean_sorts_and_fits_a_phone(
    files: list[Path], tmp_path: Path, browser: Chromium
) -> None:
    page = tmp_path / "report.html"
    page.write_text(html_of(read_material(files)), encoding="utf-8")

    for width in (1200, 390):
        for dark in (False, True):
            browser.open(page, width=width, dark=dark)
            assert browser.complaints() == []
            assert browser.requests() == [page.resolve().as_uri()]
            # Wide tables scroll by themselves, never the page.
            assert browser.evaluate("document.documentElement.scrollWidth") == width
            assert browser.evaluate("document.documentElement.dataset.theme") == (
                "dark" if dark else "light"
            )
            assert contrast(browser, "body") > 7
            for kind in ("fp32", "fp16", "int8"):
                assert contrast(browser, f".legend .{kind} .dot", "fill") > 3, (kind, dark)
    # No text of a chart is too small to read on a phone, none lies over another.
    assert browser.evaluate(SMALLEST_TEXT) >= 10
    assert browser.evaluate(OVERLAPS) == []

    browser.open(page, width=1200)
    aps = (
        "[...document.querySelectorAll('table.sorts tbody tr')].map(row => row.cells[3].innerText)"
    )
    press = "document.querySelectorAll('table.sorts th button')[3].click()"
    before = browser.evaluate(aps)
    browser.evaluate(press)
    assert browser.evaluate(aps) == ["34.0", "34.9", "35.2", "42.0", "42.8", "43.1", NOTHING]
    browser.evaluate(press)
    assert browser.evaluate(aps) == ["43.1", "42.8", "42.0", "35.2", "34.9", "34.0", NOTHING]
    assert before != browser.evaluate(aps)
    sorted_by = "document.querySelectorAll('table.sorts th')[3].getAttribute('aria-sort')"
    assert browser.evaluate(sorted_by) == "descending"

    browser.evaluate("document.getElementById('theme').click()")
    assert browser.evaluate("document.documentElement.dataset.theme") == "dark"
    browser.evaluate("document.querySelector('.point').focus()")
    assert "AP 35.2 %" in browser.evaluate("document.getElementById('tip').innerText")
    browser.evaluate("document.querySelector('.point').blur()")
    assert browser.evaluate("document.getElementById('tip').hidden")
    assert browser.complaints() == []


def contrast(browser: Chromium, selector: str, what: str = "color") -> float:
    """Return the contrast (WCAG 2) of an element's text or fill with the page's background."""
    script = f"""(() => {{
        const parts = (text) => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
        const light = (text) => parts(text).map((value) => {{
            const share = value / 255;
            return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
        }}).reduce((sum, value, index) => sum + value * [0.2126, 0.7152, 0.0722][index], 0);
        const own = light(getComputedStyle(document.querySelector("{selector}")).{what});
        const ground = light(getComputedStyle(document.body).backgroundColor);
        return (Math.max(own, ground) + 0.05) / (Math.min(own, ground) + 0.05);
    }})()"""
    return float(browser.evaluate(script))


SMALLEST_TEXT = """Math.min(...[...document.querySelectorAll('svg.chart text')].map((text) => {
    const chart = text.ownerSVGElement;
    const scale = chart.getBoundingClientRect().width / chart.viewBox.baseVal.width;
    return parseFloat(getComputedStyle(text).fontSize) * scale;
}))"""

OVERLAPS = """(() => {
    const found = [];
    for (const chart of document.querySelectorAll('svg.chart')) {
        const texts = [...chart.querySelectorAll('text')];
        const boxes = texts.map((text) => text.getBoundingClientRect());
        boxes.forEach((a, i) => boxes.slice(i + 1).forEach((b, j) => {
            if (Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
                && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 2) {
                found.push([texts[i].textContent, texts[i + 1 + j].textContent]);
            }
        }));
    }
    return found;
})()"""
