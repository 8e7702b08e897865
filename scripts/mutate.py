"""Which small changes to a module do its tests not notice?

    python scripts/mutate.py trt_yolov6/common/statistics.py tests/test_intervals.py --count 40

Changes one operator, number, condition or bound of a slice at a time and runs the tests, without
the slow ones, until one fails. What no test noticed is printed with its line: either it changes
nothing that matters, or a test is missing. Exit code 1 if more than `--allow` went unnoticed.

A process is forked for every change once PyTorch and ONNX Runtime are imported: importing them
takes longer than the tests do, and mutmut and cosmic-ray import them again each time.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import random
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType

ROOT = Path(__file__).resolve().parents[1]

SWAPPED: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.And: ast.Or, ast.Or: ast.And,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
EXTREMES = {"min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum"}
HEAVY = (
    "torch",
    "onnx",
    "onnxruntime",
    "cv2",
    "scipy.optimize",
    "hypothesis",
    "pytest",
    "numpy",
    "onnx_graphsurgeon",
    "onnxscript",
    "PIL.Image",
    "pycocotools.cocoeval",
)


@dataclass(frozen=True)
class Change:
    """A small change to a module."""

    line: int
    what: str
    place: int
    """Index of the node that changes, as `ast.walk` counts them."""
    number: int
    """Which of the ways to change it."""

    def made_to(self, tree: ast.Module) -> ast.Module:
        """Return the module with this change."""
        changed = copy.deepcopy(tree)
        _change(list(ast.walk(changed))[self.place], self.number)
        return changed


def changes(tree: ast.Module) -> Iterator[Change]:
    """Yield the changes that there are.

    Annotations, texts, decorators and what is imported for annotations stay.
    """
    skipped = {id(node) for part in _left_alone(tree) for node in ast.walk(part)}
    for place, node in enumerate(ast.walk(tree)):
        if id(node) in skipped:
            continue
        for number in range(_variants(node)):
            changed = copy.deepcopy(node)
            _change(changed, number)
            what = f"{ast.unparse(node)}  ->  {ast.unparse(changed)}".replace("\n", " ")[:150]
            yield Change(getattr(node, "lineno", 0), what, place, number)


def _left_alone(tree: ast.Module) -> Iterator[ast.AST]:
    for owner in ast.walk(tree):
        yield from getattr(owner, "decorator_list", ())
        for part in (getattr(owner, "annotation", None), getattr(owner, "returns", None)):
            if part is not None:
                yield part
        if isinstance(owner, ast.If) and ast.unparse(owner.test) == "TYPE_CHECKING":
            yield owner


def _variants(node: ast.AST) -> int:
    """Return how many ways there are to change a node."""
    if isinstance(node, ast.Compare):
        return sum(type(op) in SWAPPED for op in node.ops)
    if isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp):
        return int(type(node.op) in SWAPPED)
    if isinstance(node, ast.Constant):
        return int(isinstance(node.value, bool | int | float))
    if isinstance(node, ast.UnaryOp):
        return int(isinstance(node.op, ast.Not | ast.USub))
    if isinstance(node, ast.Slice):
        return (node.lower is not None) + (node.upper is not None)
    if isinstance(node, ast.Name | ast.Attribute):
        return int(_name(node) in EXTREMES and isinstance(node.ctx, ast.Load))
    if isinstance(node, ast.If | ast.While | ast.IfExp):
        return 2
    return int(isinstance(node, ast.Continue | ast.Break))


def _change(node: ast.AST, number: int) -> None:
    if isinstance(node, ast.Compare):
        places = [place for place, op in enumerate(node.ops) if type(op) in SWAPPED]
        node.ops[places[number]] = SWAPPED[type(node.ops[places[number]])]()  # type: ignore[call-overload]
    elif isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp):
        node.op = SWAPPED[type(node.op)]()  # type: ignore[assignment]
    elif isinstance(node, ast.Constant):
        value = node.value
        assert isinstance(value, bool | int | float)
        node.value = not value if isinstance(value, bool) else value + 1
    elif isinstance(node, ast.UnaryOp):
        # Twice the same operator, of which the first undoes this one.
        node.operand = ast.UnaryOp(node.op, node.operand)
    elif isinstance(node, ast.Slice):
        ends = [end for end in ("lower", "upper") if getattr(node, end) is not None]
        setattr(node, ends[number], None)
    elif isinstance(node, ast.Name):
        node.id = EXTREMES[node.id]
    elif isinstance(node, ast.Attribute):
        node.attr = EXTREMES[node.attr]
    elif isinstance(node, ast.If | ast.While | ast.IfExp):
        node.test = ast.Constant(bool(number))
    else:
        node.__class__ = ast.Pass


def _name(node: ast.Name | ast.Attribute) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr


class Changed(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from the code given."""

    def __init__(self, name: str, path: Path, code: CodeType) -> None:
        self._name, self._path, self._code = name, path, code

    def find_spec(
        self, fullname: str, path: object, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._name:
            return None
        return importlib.util.spec_from_file_location(fullname, self._path, loader=self)

    def exec_module(self, module: ModuleType) -> None:
        exec(self._code, module.__dict__)


def run(
    path: Path, tree: ast.Module, tests: list[str], cpu_seconds: int | None
) -> tuple[int, float]:
    """Run the tests over a module; return the status, 0 if all passed, and processor seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    child = os.fork()
    if not child:
        status = 70
        try:
            nothing = os.open(os.devnull, os.O_WRONLY)
            for number in (1, 2):
                os.dup2(nothing, number)
            if cpu_seconds is not None:  # an endless loop is a change that was noticed
                resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
            code = compile(ast.fix_missing_locations(tree), path, "exec")
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            sys.meta_path.insert(0, Changed(name.removesuffix(".__init__"), path, code))
            import pytest

            options = ["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", "--no-header"]
            status = int(pytest.main([*options, "--hypothesis-seed=0", *tests]))
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return status, used


def main() -> int:
    """Run as the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("module", type=Path)
    parser.add_argument("tests", nargs="+", help="files or node ids; pytest's options after --")
    parser.add_argument(
        "--count", type=int, help="this many changes, drawn at random (default: all)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lines", help="only changes in these lines: FIRST-LAST")
    parser.add_argument("--allow", type=float, default=0.1, help="share that may go unnoticed")
    options = parser.parse_args()
    os.chdir(ROOT)
    sys.path[0] = str(ROOT)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    path = options.module.resolve()
    tree = ast.parse(path.read_text())
    for name in HEAVY:
        importlib.import_module(name)
    status, seconds = run(path, tree, options.tests, None)
    if status:
        print("The tests fail without any change.")
        return 2
    chosen = list(changes(tree))
    if options.lines:
        first, last = map(int, options.lines.split("-"))
        chosen = [change for change in chosen if first <= change.line <= last]
    if options.count is not None and options.count < len(chosen):
        chosen = random.Random(options.seed).sample(chosen, options.count)
    print(f"{options.module}: {len(chosen)} changes, {seconds:.1f} s for the tests", flush=True)
    start, missed = time.monotonic(), 0
    for change in sorted(chosen, key=lambda change: change.line):
        status, _ = run(path, change.made_to(tree), options.tests, int(2 * seconds) + 3)
        if not status:
            missed += 1
            print(f"  {options.module}:{change.line}: {change.what}", flush=True)
    noticed = len(chosen) - missed
    print(f"{noticed} of {len(chosen)} noticed, in {time.monotonic() - start:.0f} s")
    return int(missed > options.allow * len(chosen))


if __name__ == "__main__":
    sys.exit(main())
