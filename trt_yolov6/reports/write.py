"""The report in its three forms: a page, Markdown, CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from trt_yolov6 import __version__
from trt_yolov6.common.files import check_writable, write_bytes
from trt_yolov6.errors import UserError
from trt_yolov6.reports import sections
from trt_yolov6.reports.material import Material
from trt_yolov6.reports.tables import CSV_HEAD, NOTHING, csv_rows, overview, quantization, rows_of


def write_report(material: Material, path: str | Path, title: str = "") -> Path:
    """Write a report in the form that the file's ending names: `.html`, `.md` or `.csv`.

    Without a `title`, the data set and the models make one.

    Raises:
        UserError: the ending is another one, or the file cannot be written.
    """
    path = check_form(path)
    text = FORMS[path.suffix.lower()](material, title)
    # Names of files that are not UTF-8 hold what cannot be encoded.
    write_bytes(path, text.encode(errors="replace"))
    return path


def check_form(path: str | Path) -> Path:
    """Return the path of a report; quick, so ask for all of them before the first is written.

    Raises:
        UserError: its ending names no form, or it cannot be written to.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMS:
        raise UserError(
            f"`output` {path} is not a format of reports; give names that end in "
            f"{', '.join(FORMS)}."
        )
    check_writable(path)
    return path


def html_of(material: Material, title: str = "") -> str:
    """Return the report as one HTML page that needs no other file and no network."""
    environment = Environment(
        loader=PackageLoader("trt_yolov6.reports", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"px": "{:.1f}".format, "percent": _percent}
    return environment.get_template("page.html.jinja").render(
        title=title or title_of(material),
        subtitle=subtitle_of(material),
        style=_resource("page.css"),
        script=_resource("page.js"),
        version=__version__,
        **sections.page_values(material),
    )


def markdown_of(material: Material, title: str = "") -> str:
    """Return the report's tables in Markdown."""
    rows = rows_of(material)
    head, cells = overview(rows)
    parts = [
        f"# {_plain(title or title_of(material))}",
        _plain(subtitle_of(material)),
        _table(head, [list(map(str, row)) for row in cells]),
    ]
    found = quantization(rows)
    if found:
        parts.append("## Cost of quantization")
        body = [
            [
                label,
                name,
                NOTHING if row.ap is None else f"{100 * row.ap:.2f}",
                NOTHING if change is None else f"{change:+.2f}",
            ]
            for label, own in found
            for name, row, change in own
        ]
        parts.append(_table(["Model", "Precision", "AP, %", "to float, points"], body))
    for ranking in material.rankings:
        parts.append(f"## Sensitivity by {ranking.metric}: {_plain(ranking.file)}")
        layers = [
            [name, NOTHING if value is None else f"{value:.4g}"]
            for name, value in ranking.layers[: sections.SHOWN_LAYERS]
        ]
        parts.append(_table(["Layer", ranking.metric], layers))
    notes = sorted({row.engine["note"] for row in rows if row.engine["note"]})
    notes += [text for one in material.comparisons for text in one.value["left_out"]]
    parts += [_plain(note) for note in notes]
    if any(row.disturbed(batch) for row in rows for batch in row.timings):
        parts.append("\\* Other processes disturbed too many runs.")
    return "\n\n".join(parts) + "\n"


def csv_of(material: Material) -> str:
    """Return one line an engine and batch size, numbers as they were measured."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(CSV_HEAD)
    for row in csv_rows(rows_of(material)):
        writer.writerow([_inert(value) for value in row])
    return buffer.getvalue()


FORMS: dict[str, Callable[[Material, str], str]] = {
    ".html": html_of,
    ".md": markdown_of,
    ".csv": lambda material, title: csv_of(material),
}
"""The report's text, by the ending of its file."""


def title_of(material: Material) -> str:
    """Return a title: the models and the data set."""
    rows = rows_of(material)
    labels = list(dict.fromkeys(row.label for row in rows))
    models = ", ".join(labels) if len(labels) <= 3 else f"{len(labels)} models"
    data = material.comparisons[0].value["data"]
    return f"{models} on {Path(str(data['root'])).name or 'data'}, {data['split']}"


def subtitle_of(material: Material) -> str:
    """Return where and when it was measured."""
    values = [comparison.value for comparison in material.comparisons]
    devices = dict.fromkeys(engine["device"] for value in values for engine in value["engines"])
    images = max(value["data"]["images"] for value in values)
    dates = ", ".join(dict.fromkeys(str(value["date"])[:10] for value in values))
    return f"{', '.join(devices)} · {images} images · {dates}"


def _percent(share: float) -> str:
    """Return a share of 0..1 in per cent; what is beyond, or not a number, is cut off."""
    return f"{100 * min(1.0, max(0.0, share)) if math.isfinite(share) else 100:.2f}"


def _resource(name: str) -> Markup:
    return Markup((files("trt_yolov6.reports") / name).read_text(encoding="utf-8"))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(_plain, line))} |" for line in lines)


def _plain(text: str) -> str:
    """Return a text that Markdown shows as it is: no table, link, code or HTML comes of it."""
    text = " ".join(str(text).split())
    for mark in "\\`|[]<>*_":
        text = text.replace(mark, "\\" + mark)
    return text


def _inert(value: object) -> object:
    """Return a value that no spreadsheet takes for a formula."""
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return "'" + value
    return value
