"""The documents' and docstrings' language: words that CONTRIBUTING replaces by plainer ones."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

BANNED = {
    "anew": r"\banew\b",
    "behind, for after": r"\bbehind\b",
    "beside, for next to or besides": r"\bbeside\b",
    "so many, for a number": r"\bso many\b",
    "is no X, for is not a X": r"(?<![Tt]here )\b(?:is|are|was) no (?!longer|more|less|fast)\w+",
    "be it": r"\bbe it\b",
    "Return what": r"\bReturn what\b",
    "but for, for except": r"\bbut for\b",
    "None for what is none": r"\bwhat is none\b|(?<![Tt]here )\bis none[.,;]",
    "Tell, for Return or Report": r'"""Tell\b',
    "a docstring that makes no sense alone": r'"""(?:Of|As|What|How|Whether|Those|Such) ',
    "does not tell, for is not known": r"\b(?:does|do) not tell\b",
}
"""By what is wrong with it, a pattern."""

PLACES = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *("benchmarks", "calib", "docs", "engines", "examples", "samples", "scripts", "tests"),
    *(
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "trt_yolov6").iterdir())
        if path.name != "__pycache__"
    ),
)


def _texts(place: Path) -> list[Path]:
    if place.is_file():
        return [place]
    return sorted(path for path in place.rglob("*") if path.suffix in (".py", ".md"))


@pytest.mark.parametrize("place", PLACES)
def test_words_that_have_a_plainer_one_are_not_used(place: str) -> None:
    found = []
    for path in _texts(ROOT / place):
        if path in (ROOT / "CONTRIBUTING.md", Path(__file__)):  # they list the words
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            found += [
                f"{path.relative_to(ROOT)}:{number}: {wrong}: {line.strip()}"
                for wrong, pattern in BANNED.items()
                if re.search(pattern, line)
            ]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("line", "is_banned"),
    [
        ("Return the boxes behind the head.", True),
        ("It is no list.", True),
        ("It is no longer a list; there is no list.", False),
        ('"""Of each layer."""', True),
        ('"""Offset of each layer."""', False),
        ("besides, the images are known again", False),
    ],
)
def test_the_patterns_find_the_words_and_nothing_else(line: str, is_banned: bool) -> None:
    assert any(re.search(pattern, line) for pattern in BANNED.values()) == is_banned


def _words_of(error: ast.Call) -> str:
    """Return an error's text, values left out, without the commands that it has in backticks."""
    parts = [
        node.value
        for node in ast.walk(error)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    pieces = "".join(parts).split("`")
    return " ".join(text for i, text in enumerate(pieces) if i % 2 == 0 or " " not in text)


@pytest.mark.parametrize(
    "package", sorted({path.parent for path in (ROOT / "trt_yolov6").rglob("*.py")}), ids=str
)
def test_errors_outside_the_command_line_name_parameters(package: Path) -> None:
    """Python's callers know no options; `cli` puts them in the place of parameters."""
    if package.name == "cli":
        return
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {_words_of(node)}"
        for path in package.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("UserError", "MissingDependencyError", "ClassesDifferError")
        and re.search(r"(?<![\w-])--[a-z]", _words_of(node))
    ]
    assert not found, "\n" + "\n".join(found)
