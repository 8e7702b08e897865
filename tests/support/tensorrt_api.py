"""The Python API of a TensorRT release, as facts, and the same facts as a type stub.

`facts` reads them from an imported module (the classes that this package may touch, their members,
and the signatures that pybind11 writes at the top of every docstring). `scripts/tensorrt_api.py`
stores them for several releases in tests/data/tensorrt_api.json. `stub` turns one release's facts
into a .pyi file, against which `test_tensorrt_api.py` type-checks the engines, and `package_stub`
those of all releases into `trt_yolov6/engines/tensorrt/api.pyi`, which mypy and editors read.

A member's fact is one of

    (self, flags: int = ...) -> INetworkDefinition      a method; overloads are joined by ` ; `
    -> int                                              a property to read
    <-> int                                             a property to read and write
    <- object                                           a property to write
    = Severity                                          a constant
    override (self, tensor_name, shape)                 known from the class's description only
"""

from __future__ import annotations

import ast
import ctypes
import inspect
import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

SNAPSHOT = Path(__file__).parents[1] / "data" / "tensorrt_api.json"
PACKAGE = Path(__file__).parents[2] / "trt_yolov6" / "engines" / "tensorrt"
STUB = PACKAGE / "api.pyi"

Facts = dict[str, dict[str, str]]
"""Class (qualified name; "" is the module) -> member -> fact."""

CLASSES = (
    "Builder",
    "BuilderFlag",
    "ComputeCapability",
    "CudaGraphStrategy",
    "DataType",
    "Dims",
    "DynamicShapesKernelSpecializationStrategy",
    "EngineInspector",
    "ExecutionContextAllocationStrategy",
    "IBuilderConfig",
    "ICudaEngine",
    "IExecutionContext",
    "IHostMemory",
    "IInt8Calibrator",
    "IInt8EntropyCalibrator2",
    "IInt8MinMaxCalibrator",
    "ILayer",
    "ILogger",
    "ILogger.Severity",
    "INetworkDefinition",
    "IOptimizationProfile",
    "IOutputAllocator",
    "IProfiler",
    "IProgressMonitor",
    "IRuntimeCache",
    "IRuntimeConfig",
    "ITensor",
    "ITimingCache",
    "LayerInformationFormat",
    "Logger",
    "MemoryPoolType",
    "NetworkDefinitionCreationFlag",
    "OnnxParser",
    "ParserError",
    "PreviewFeature",
    "ProfilingVerbosity",
    "Runtime",
    "TacticSource",
    "TensorIOMode",
)
"""The classes whose facts are kept. Others are known by name only."""

_BASES = "(bases)"

_CPP = {
    "IBuilder": "Builder",
    "IEngineInspector": "EngineInspector",
    "IParserError": "ParserError",
    "IRuntime": "Runtime",
}
"""C++ classes with another name in Python, which signatures show by mistake."""

_NAME = re.compile(r"\b[A-Z]\w+(?:\.[A-Z]\w+)?(?!\w)").findall
"""The classes that a fact names."""

_OF_CALIBRATORS = (
    "get_batch_size",
    "get_batch",
    "read_calibration_cache",
    "write_calibration_cache",
)

_MUST_OVERRIDE = {
    "IInt8Calibrator": _OF_CALIBRATORS,
    "ILogger": ("log",),
    "IOutputAllocator": ("reallocate_output", "notify_shape"),
    "IProfiler": ("report_layer_time",),
    "IProgressMonitor": ("phase_start", "step_complete", "phase_finish"),
}
"""Methods that classes derived from these have to define, or TensorRT calls a pure virtual one."""


_MAY_BE_NONE = {
    "build_serialized_network",
    "create_execution_context",
    "create_timing_cache",
    "deserialize_cuda_engine",
    "get_batch",  # ends the calibration
    "read_calibration_cache",
}
"""Methods that return a null pointer when they fail, or may be given one, as no signature says."""


# --- facts from a module ------------------------------------------------------------------------


def facts(module: ModuleType) -> Facts:
    """Return the facts of a TensorRT module, which has to import but needs no GPU or library."""
    found: Facts = {"": _module_facts(module)}
    for name in CLASSES:
        owner: Any = module
        for part in name.split("."):
            owner = getattr(owner, part, None)
        if owner is not None:
            found[name] = _class_facts(owner)
    return found


def _module_facts(module: ModuleType) -> dict[str, str]:
    found = {"__version__": "= str"}
    for name, value in vars(module).items():
        if isinstance(value, type) and name in CLASSES:
            found[name] = "class"
        elif name in ("nptype", "volume"):
            found[name] = str(inspect.signature(value))
        elif isinstance(value, getattr(module, "DataType", ())):
            found[name] = "= DataType"
    return dict(sorted(found.items()))


def _class_facts(owner: type) -> dict[str, str]:
    bases = [base.__qualname__ for base in owner.__bases__ if "pybind11" not in base.__module__]
    found = {_BASES: ", ".join(bases)} if bases else {}
    members = getattr(owner, "__members__", None)
    if members is not None:
        found["__members__"] = "= enum"
    for name, value in vars(owner).items():
        if name.startswith("_") and name not in ("__init__", "__getitem__", "__len__"):
            continue
        if name.startswith("add_") and owner.__name__ == "INetworkDefinition":
            continue  # some sixty layers; networks come from a parser here
        if isinstance(value, property):
            found[name] = _property(value)
        elif isinstance(value, type):
            if value.__qualname__ == f"{owner.__qualname__}.{name}":
                found[name] = "class"
        elif callable(value) and (signatures := _signatures(value.__doc__)):
            found[name] = signatures
        elif hasattr(type(value), "__members__"):
            found[name] = f"= {type(value).__qualname__}"
    if members is not None:
        for name in ("__init__", "name", "value"):
            found.pop(name, None)
    for name, arguments in re.findall(r"def (\w+)\((self, [\w, ]+)\):", owner.__doc__ or ""):
        found.setdefault(name, f"override ({arguments})")
    if members is None and _has_buffer(owner):
        found["__buffer__"] = "(self, flags: int) -> memoryview"
    return dict(sorted(found.items()))


def _has_buffer(owner: type) -> bool:
    """Say whether instances give their bytes to `bytes()` (slot 1 of a type is bf_getbuffer)."""
    slot = ctypes.pythonapi.PyType_GetSlot
    slot.restype = ctypes.c_void_p
    slot.argtypes = [ctypes.py_object, ctypes.c_int]
    return bool(slot(owner, 1))


def _signatures(doc: str | None) -> str:
    """Return the signatures at the top of a docstring by pybind11; nothing where there are none."""
    lines = (doc or "").strip().splitlines()
    if not lines or not (head := re.match(r"(\w+)\(", lines[0])):
        return ""
    if any(line.startswith("Overloaded function") for line in lines[:3]):
        start = re.compile(rf"\s*\d+\. ({head[1]}\(.*)")
        found = [match[1] for line in lines if (match := start.match(line))]
    else:
        found = lines[:1]
    return " ; ".join(_plain(signature[signature.index("(") :]) for signature in found)


def _property(value: property) -> str:
    if value.fget is None:
        return "<- object"
    match = re.search(r"-> (.+)", value.fget.__doc__ or "")
    kind = "object" if match is None else _plain(f"() -> {match[1]}").removeprefix("() -> ")
    return f"-> {kind}" if value.fset is None else f"<-> {kind}"


def _plain(signature: str) -> str:
    """Return a signature as every release of pybind11 would write it, in names a stub knows."""
    text = re.sub(r"= <[^>]*>", "= ...", signature.strip())
    text = re.sub(r"(?:\w+::)+(\w+)", lambda match: _CPP.get(match[1], match[1]), text)
    text = re.sub(r"\w+<[^>]*>", "object", text)  # a C++ type that has no Python name
    text = re.sub(r"\b(?:tensorrt\w*\.)+", "", text)
    text = re.sub(r"\b(?:typing|typing_extensions|collections\.abc|types)\.", "", text)
    text = text.replace("SupportsInt | SupportsIndex", "int").replace("SupportsInt", "int")
    text = text.replace("SupportsFloat | SupportsIndex", "float").replace("SupportsFloat", "float")
    text = re.sub(r"numpy\.ndarray(\[[^\]]*\])?", "object", text)
    text = re.sub(r"\bbuffer\b", "Buffer", text)
    text = re.sub(r"\b(?:CapsuleType|capsule|handle)\b", "object", text)
    text = re.sub(r"\b(?:List|Tuple|Dict)\b", lambda match: match[0].lower(), text)
    text = re.sub(r"^\((?:self|arg0): [\w.]+", "(self", text)
    try:
        function = ast.parse(f"def f{text}: ...").body[0]
    except SyntaxError:
        # A parameter without a default after others that have one (TensorRT 8): no default is told.
        function = ast.parse(f"def f{re.sub(r' = [^,)]+', '', text)}: ...").body[0]
    assert isinstance(function, ast.FunctionDef)
    arguments = function.args
    arguments.defaults = [ast.Constant(...) for _ in arguments.defaults]
    returned = "" if function.returns is None else f" -> {ast.unparse(function.returns)}"
    return f"({ast.unparse(arguments)}){returned}".replace("=...", " = ...")


# --- several releases in one file ---------------------------------------------------------------


def write_snapshot(path: Path, releases: Mapping[str, Facts]) -> None:
    """Write the facts of several releases, each fact once with the releases where it holds."""
    merged: dict[str, dict[str, dict[str, list[str]]]] = {}
    for release, found in releases.items():
        for owner, members in found.items():
            for member, fact in members.items():
                merged.setdefault(owner, {}).setdefault(member, {}).setdefault(fact, []).append(
                    release
                )
    lines = []
    for owner, entries in sorted(merged.items()):
        lines.append(f"  {json.dumps(owner)}: {{")
        shown = []
        for member, variants in sorted(entries.items()):
            value = {
                fact: "all" if len(known) == len(releases) else ", ".join(known)
                for fact, known in variants.items()
            }
            shown.append(f"    {json.dumps(member)}: {json.dumps(value)}")
        lines.append(",\n".join(shown))
        lines.append("  },")
    lines[-1] = "  }"
    body = "\n".join(lines)
    path.write_text(f'{{"releases": {json.dumps(list(releases))},\n "facts": {{\n{body}\n}}}}\n')


def read_snapshot(path: Path = SNAPSHOT) -> dict[str, Facts]:
    """Return release ("tensorrt 11.4.0.106") -> its facts."""
    content = json.loads(path.read_text())
    releases: dict[str, Facts] = {release: {} for release in content["releases"]}
    for owner, members in content["facts"].items():
        for member, variants in members.items():
            for fact, known in variants.items():
                for release in releases if known == "all" else known.split(", "):
                    releases[release].setdefault(owner, {})[member] = fact
    return releases


# --- facts to a stub ----------------------------------------------------------------------------


def used_names() -> set[str]:
    """Return the names of members that the package's code for TensorRT may mean.

    Those are attributes, imported names, methods of its own classes, and constants in quotes.
    """
    used: set[str] = set()
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Attribute(attr=str(name)) | ast.alias(name=str(name)):
                    used.add(name)
                case ast.Constant(value=str(name)) if name.isupper():
                    used.add(name)
                case ast.ClassDef(body=body):
                    used.update(item.name for item in body if isinstance(item, ast.FunctionDef))
    return used


def package_stub(releases: Mapping[str, Facts], used: Collection[str] | None = None) -> str:
    """Return the text of api.pyi: what any release has, and which have it.

    Where releases differ in a signature, it is the newest one's.

    Args:
        releases: facts by release.
        used: names of members to keep; None: all.
    """
    merged: Facts = {}
    known: dict[tuple[str, str], list[str]] = {}
    # The newest first; what only TensorRT-RTX has comes last.
    order = {release: ("rtx" in release, -place) for place, release in enumerate(releases)}
    for release in sorted(order, key=order.__getitem__):
        for owner, members in releases[release].items():
            for member, fact in members.items():
                special = not member[0].isalpha() or fact == "class"
                if used is None or special or member in used:
                    mine = merged.setdefault(owner, {})
                    if mine.setdefault(member, fact).startswith("->") and fact.startswith("<->"):
                        mine[member] = fact  # writable in an older one
                    known.setdefault((owner, member), []).append(release)
    kept = {name for name in merged if name and (used is None or name in used)}
    while more := _named(merged, kept) & merged.keys() - kept:
        kept |= more
    merged[""] = {
        name: fact for name, fact in merged[""].items() if fact != "class" or name in kept
    }
    notes = {
        place: f"only {_shortened(names)}"
        for place, names in known.items()
        if len(names) < len(releases) and not place[1].startswith("(")
    }
    text = stub(
        {owner: dict(sorted(merged[owner].items())) for owner in ("", *sorted(kept))}, notes
    )
    title = "TensorRT's API as the engines use it; written by scripts/tensorrt_api.py."
    return f'"""{title}"""\n\n{text}'


def _shortened(releases: Sequence[str]) -> str:
    """Return releases by product, each with two parts of its version."""
    products: dict[str, list[str]] = {}
    for release in reversed(releases):
        product, version = release.split()
        products.setdefault(product, []).append(".".join(version.split(".")[:2]))
    return "; ".join(f"{name} {', '.join(products[name])}" for name in sorted(products))


def _named(found: Facts, owners: Collection[str]) -> set[str]:
    """Return the classes that the facts of some classes name."""
    facts = (fact for owner in owners for fact in found[owner].values())
    return {name for fact in facts for name in _NAME(fact)}


def stub(found: Facts, notes: Mapping[tuple[str, str], str] | None = None) -> str:
    """Return a .pyi file for the facts of one release.

    What pybind11's signatures leave out is added: TensorRT takes None for any object and a sequence
    of numbers for `Dims`, and a class to derive from is abstract. `Api` is the type of the module.

    Args:
        found: the facts.
        notes: comments on members, by class and name.
    """
    lines = [
        "from abc import ABCMeta, abstractmethod",
        "from collections.abc import Iterator, Sequence",
        "from typing import Any, ClassVar, NoReturn, overload",
        "",
        "from typing_extensions import Buffer",
        "",
        *module_class(found, notes),
        "",
        "class _Enum:",
        "    name: str",
        "    value: int",
        "    def __init__(self, value: int) -> None: ...",
        "    def __int__(self) -> int: ...",
        "    def __index__(self) -> int: ...",
        "",
    ]
    known = {"Buffer", "None", "Sequence", *found}
    lines += [f"class {name}: ..." for name in sorted(_named(found, found) - known)]
    for owner in found:
        if owner and "." not in owner:
            lines += _class(found, owner, "", notes)
    text = "\n".join(lines) + "\n"
    text = re.sub(r"\btuple\b(?!\[)", "tuple[Any, ...]", text)
    return re.sub(r"\blist\b(?!\[)", "list[Any]", text)


def module_class(found: Facts, notes: Mapping[tuple[str, str], str] | None = None) -> list[str]:
    """Return the lines of `Api`, the type of the module, which is a parameter in the code."""
    lines = ["from . import api as _this", "", "class Api:"]
    lines.append('    """A module, `tensorrt` or `tensorrt_rtx`."""')
    for name, fact in found[""].items():
        if fact.startswith("("):
            lines += _method("", name, fact.replace("(", "(self, ", 1), "    ")
        else:
            # By the module's name, as the class has a member of the same name.
            kind = f"type[_this.{name}]" if fact == "class" else fact[2:]
            kind = "_this.DataType" if kind == "DataType" else kind
            lines.append(f"    {name}: {kind}{_noted(notes, '', name)}")
    return lines


def _noted(notes: Mapping[tuple[str, str], str] | None, owner: str, name: str) -> str:
    note = (notes or {}).get((owner, name))
    return f"  # {note}" if note else ""


def _class(
    found: Facts, owner: str, indent: str, notes: Mapping[tuple[str, str], str] | None
) -> list[str]:
    members = found[owner]
    required = _MUST_OVERRIDE.get(owner, ())
    is_enum = "__members__" in members
    # TensorRT's own logger has the method that its base asks for; calibrators do not.
    base = "" if owner == "Logger" else members.get(_BASES, "")
    inherited = found.get(base, {})
    is_abstract = required or base in _MUST_OVERRIDE
    bases = [members.get(_BASES), "_Enum" if is_enum else ""]
    bases.append("metaclass=ABCMeta" if is_abstract else "")
    lines = [f"{indent}class {owner.rpartition('.')[2]}({', '.join(filter(None, bases))}):"]
    inner = indent + "    "
    if is_enum:
        lines.append(f"{inner}__members__: ClassVar[dict[str, {owner}]]")
    for name, fact in members.items():
        if name in ("__members__", _BASES) or (inherited.get(name) == fact and name != "__init__"):
            continue
        before = len(lines)
        if fact == "class":
            lines += _class(found, f"{owner}.{name}", inner, notes)
            continue
        if fact == "= enum":
            continue
        if fact.startswith("= "):
            lines.append(f"{inner}{name}: ClassVar[{fact[2:]}]")
        elif fact.startswith("-> "):
            lines += [f"{inner}@property", f"{inner}def {name}(self) {fact}: ..."]
        elif fact.startswith(("<-> ", "<- ")):
            kind = fact.partition(" ")[2]
            accepted = _accepting(kind)
            kind = "NoReturn" if fact.startswith("<- ") else kind
            if accepted == kind:
                lines.append(f"{inner}{name}: {kind}")
            else:
                lines += [
                    f"{inner}@property",
                    f"{inner}def {name}(self) -> {kind}: ...",
                    f"{inner}@{name}.setter",
                    f"{inner}def {name}(self, value: {accepted}) -> None: ...",
                ]
        else:
            if name in required:
                lines.append(f"{inner}@abstractmethod")
            lines += _method(owner, name, fact, inner)
        lines[before] += _noted(notes, owner, name)
    if owner == "Dims":
        lines.append(f"{inner}def __iter__(self) -> Iterator[int]: ...")
    if lines[-1].endswith("):"):
        lines.append(f"{inner}...")
    return lines


def _method(owner: str, name: str, fact: str, indent: str) -> list[str]:
    signatures = fact.removeprefix("override ").split(" ; ")
    lines = []
    for signature in signatures:
        function = ast.parse(f"def f{signature}: ...").body[0]
        assert isinstance(function, ast.FunctionDef)
        for argument in function.args.args:
            if argument.annotation is None and argument.arg != "self":
                argument.annotation = ast.Name("Any")
            elif argument.annotation is not None and owner not in _MUST_OVERRIDE:
                argument.annotation = ast.parse(
                    _accepting(ast.unparse(argument.annotation)), mode="eval"
                ).body
        returned = "Any" if function.returns is None else ast.unparse(function.returns)
        if name in _MAY_BE_NONE:
            returned += " | None"
        if len(signatures) > 1:
            lines.append(f"{indent}@overload")
        lines.append(f"{indent}def {name}({ast.unparse(function.args)}) -> {returned}: ...")
    return lines


def _accepting(kind: str) -> str:
    """Return the type to accept where pybind11 says `kind`."""
    if kind == "Dims":
        return "Dims | Sequence[int]"
    return f"{kind} | None" if _NAME(kind) == [kind] and kind != "Buffer" else kind
