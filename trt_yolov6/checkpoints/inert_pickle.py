"""Pickles read without running anything that they ask for.

A pickle is a program. Here it can only build plain containers and inert shells: every class or
function it names becomes a `Shell`, which remembers its arguments and its state and does nothing.
What no checkpoint of YOLOv6 needs is refused by name.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from trt_yolov6.errors import UserError

STORAGES = {
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
"""PyTorch's storage classes and the dtype that each stands for."""

# What a checkpoint may name beyond classes of these packages. All of it becomes shells.
_ADMITTED_PACKAGES = ("yolov6", "torch.nn")
_ADMITTED = {
    *(("torch", name) for name in (*STORAGES, *STORAGES.values(), "Size", "device")),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    # The authors' fused models carry bound methods, which pickle writes as a call of getattr.
    ("builtins", "getattr"),
    # NumPy's numbers in the state of an optimizer or of a learning rate schedule.
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
    ("_codecs", "encode"),
}
_PYTHON_2_NAMES = {"__builtin__": "builtins", "copy_reg": "copyreg"}

EXPORT_IT = (
    "export it to ONNX with the code that it comes from and give that to `trt-yolov6 build --onnx`"
)
"""Advice for a checkpoint that is refused."""

DAMAGE = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    NotImplementedError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
)
"""Exceptions that reading a damaged pickle or archive may raise."""


def damaged(path: Path, what: str) -> UserError:
    """Return the refusal of a file that is not as it was written."""
    return UserError(f"{path} is damaged: {what}; copy or download it again.")


class Shell:
    """An inert stand-in for an instance, or for the result of a call, of what a pickle names."""

    # Without a __dict__, and with a __setstate__ that pickle finds first, no state that a pickle
    # gives can shadow a method here or alter a class.
    __slots__ = ("args", "state")
    origin: str = ""
    """Full name of what this stands for, such as `torch.nn.modules.conv.Conv2d`."""

    args: tuple[Any, ...]
    state: Any

    def __init__(self, *args: Any, **_ignored: Any) -> None:
        self.args = args
        self.state = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class StorageReference(NamedTuple):
    """Place of a tensor's values in an archive, as the pickle says: nothing is checked yet."""

    dtype: str
    key: str
    """Name of the record."""
    numel: int


class _PlainDict(dict[Any, Any]):
    """Stands for OrderedDict, without the attributes that one may carry."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


_CONTAINERS: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): _PlainDict,
    ("builtins", "dict"): _PlainDict,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "list"): list,
}
"""Types that a pickle may call. Not `tuple`, which no pickler writes so: made of lists, tuples nest
deeper than `_check_opcodes` sees."""


def load_inert(content: bytes, path: Path) -> Any:
    """Return the object tree of a pickle: plain values, containers, shells and storage references.

    `path` is the file that it comes from, for messages.

    Raises:
        UserError: the pickle is damaged, or names what no checkpoint needs.
    """
    try:
        _check_opcodes(content)
        return _InertUnpickler(content, path).load()
    except DAMAGE as error:
        raise damaged(path, f"its pickle cannot be read ({type(error).__name__})") from error


class _InertUnpickler(pickle.Unpickler):
    """Resolves every global to a container or to a shell class of its own."""

    def __init__(self, content: bytes, path: Path) -> None:
        super().__init__(io.BytesIO(content), encoding="utf-8")
        self._path = path
        self._classes: dict[tuple[str, str], type[Shell]] = {}

    def find_class(self, module_name: str, global_name: str) -> Any:
        """Return the stand-in for a global, or refuse the file."""
        module = _PYTHON_2_NAMES.get(module_name, module_name)
        key = (module, global_name)
        if key in _CONTAINERS:
            return _CONTAINERS[key]
        in_package = any(
            module == package or module.startswith(f"{package}.") for package in _ADMITTED_PACKAGES
        )
        if not in_package and key not in _ADMITTED:
            raise UserError(_refusal(self._path, module, global_name))
        if key not in self._classes:
            body = {"__slots__": (), "origin": f"{module}.{global_name}"}
            self._classes[key] = type("Shell", (Shell,), body)
        return self._classes[key]

    def persistent_load(self, pid: Any) -> StorageReference:
        """Return a reference to a record; nothing is read yet."""
        match pid:
            case ("storage", type() as kind, str(key), str(), int(numel)) if issubclass(
                kind, Shell
            ):
                dtype = STORAGES.get(kind.origin.removeprefix("torch."))
                if dtype is not None:
                    return StorageReference(dtype, key, numel)
        raise pickle.UnpicklingError("a tensor is stored in a way that is not known")


def _refusal(path: Path, module: str, name: str) -> str:
    full_name = f"{module}.{name}"[:80]
    package = module.partition(".")[0]
    if package == "torch" or package in sys.stdlib_module_names:
        return (
            f"{path} asks for {full_name} when it is loaded, which no YOLOv6 checkpoint needs; "
            "nothing of it was run: get the file from a source that you trust."
        )
    return f"{path} holds {full_name}, not a YOLOv6; {EXPORT_IT}."


_FILLING = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")
"""Opcodes that alter a value which stays where it is."""
_NESTING = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "FROZENSET", "REDUCE", "NEWOBJ", "NEWOBJ_EX")
"""Opcodes that wrap values in one whose hash depends on theirs, or may."""
_DEEPEST = 100


class _Effect(NamedTuple):
    """Effect of an opcode on the pickle's stack."""

    taken: int
    """Values that it takes; those below the mark, if it takes all that lie above one."""
    takes_mark: bool
    given: int
    """Values that it leaves there."""
    fills: bool
    nests: bool


def _effect(opcode: pickletools.OpcodeInfo) -> _Effect:
    taken = [kind.name for kind in opcode.stack_before]
    takes_mark = "mark" in taken
    return _Effect(
        taken.index("mark") if takes_mark else len(taken),
        takes_mark,
        len(opcode.stack_after),
        opcode.name in _FILLING,
        opcode.name in _NESTING,
    )


_EFFECTS = {opcode.name: _effect(opcode) for opcode in pickletools.opcodes}
_PUTS = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}
_GETS = {"GET", "BINGET", "LONG_BINGET"}
_EXTENSIONS = {"EXT1", "EXT2", "EXT4"}
_PUSHES = {
    name
    for name, effect in _EFFECTS.items()
    if effect == (0, False, 1, False, False) and name not in {"MARK", *_GETS, *_EXTENSIONS}
}
"""Opcodes that push one plain value, most of a pickle with those of the memo."""


def _check_opcodes(content: bytes) -> None:
    """Refuse what would harm the unpickler itself; nothing is built to find out.

    The memo is allocated up to the largest slot that is named; extension codes bypass `find_class`;
    and hashing a tuple nested a million deep overflows the stack of the process. So this follows
    the pickle's stack and notes how deep each value on it is nested.
    """
    depths: list[int] = []
    marks: list[int] = []
    memo: dict[int, int] = {}
    for position, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        name = opcode.name
        if name in _PUSHES:
            depths.append(0)
        elif name in _PUTS:
            slot = len(memo) if name == "MEMOIZE" else int(argument or 0)
            if slot > position:
                raise pickle.UnpicklingError("memo slot out of range")
            memo[slot] = depths[-1]
        elif name in _GETS:
            depths.append(memo[int(argument or 0)])
        elif name == "MARK":
            marks.append(len(depths))
        elif name in _EXTENSIONS:
            raise pickle.UnpicklingError("extension code")
        elif name == "POP" and marks and marks[-1] == len(depths):
            marks.pop()
        else:
            taken, takes_mark, given, fills, nests = _EFFECTS[name]
            start = (marks.pop() if takes_mark else len(depths)) - taken
            if start < 0:
                raise pickle.UnpicklingError("empty stack")
            depth = depths[start] if fills else max(depths[start:], default=0) + nests
            if depth > _DEEPEST:
                raise pickle.UnpicklingError("values nested too deep")
            depths[start:] = [depth] * given
