"""Pickles that would harm the unpickler itself are refused, and no others."""

from __future__ import annotations

import copyreg
import io
import os
import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trt_yolov6.checkpoints.inert_pickle import Shell, load_inert
from trt_yolov6.errors import UserError

FILE = Path("x.pt")
LIMIT = 100


def nested(depth: int, innermost: Any = 1) -> Any:
    """A tuple in a tuple in a tuple ..."""
    for _ in range(depth):
        innermost = (innermost,)
    return innermost


def loaded(value: Any, protocol: int = 2) -> Any:
    return load_inert(pickle.dumps(value, protocol), FILE)


def assert_damaged(content: bytes) -> None:
    with pytest.raises(UserError, match=r"x\.pt is damaged"):
        load_inert(content, FILE)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda some: (
        st.lists(some)
        | st.tuples(some, some, some, some)
        | st.tuples(some)
        | st.dictionaries(st.text(), some)
        | st.dictionaries(st.text(), some).map(OrderedDict)
    ),
)


@given(PLAIN, st.sampled_from([0, 1, 2, 3, 4, 5]))
def test_plain_values_arrive_as_they_are(value: Any, protocol: int) -> None:
    assert loaded(value, protocol) == value


@given(st.sets(st.integers()) | st.frozensets(st.text()), st.sampled_from([2, 4]))
def test_sets_arrive_as_they_are(value: Any, protocol: int) -> None:
    assert loaded(value, protocol) == value


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_tuples_may_be_nested_to_the_limit_and_no_deeper(protocol: int) -> None:
    assert loaded(nested(LIMIT), protocol) == nested(LIMIT)
    assert_damaged(pickle.dumps(nested(LIMIT + 1), protocol))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda deep: (deep, 1),
        lambda deep: (1, deep, 2),
        lambda deep: (1, 2, 3, deep),
        lambda deep: (deep, 1, 2, 3),
        lambda deep: frozenset([deep]),
    ],
    ids=["two", "three", "first of four", "last of four", "frozenset"],
)
def test_every_kind_of_nesting_counts(wrap: Any) -> None:
    assert loaded(wrap(nested(LIMIT - 1)), 4) == wrap(nested(LIMIT - 1))
    assert_damaged(pickle.dumps(wrap(nested(LIMIT)), 4))


def named(module: str, name: str) -> bytes:
    """A pickle that calls what a name stands for, with one number."""
    return pickle.PROTO + b"\x02c" + f"{module}\n{name}\n".encode() + b"K\x05\x85R."


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("yolov6.layers.common", "RepVGGBlock"),
        ("yolov6", "Model"),
        ("torch.nn", "Parameter"),
        ("torch.nn.modules.conv", "Conv2d"),
        ("torch", "FloatStorage"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("__builtin__", "getattr"),
    ],
)
def test_what_a_checkpoint_needs_becomes_a_shell_that_does_nothing(module: str, name: str) -> None:
    shell = load_inert(named(module, name), FILE)
    assert isinstance(shell, Shell)
    assert shell.origin == f"{module.replace('__builtin__', 'builtins')}.{name}"
    assert shell.args == (5,)
    assert shell.state is None


def test_instances_of_one_class_are_shells_of_one_class() -> None:
    conv, other = named("torch.nn", "Conv2d"), named("torch.nn", "Linear")
    # Protocol 0 ends with a dot; the values are put into one list.
    content = b"(" + conv[:-1] + conv[:-1] + other[:-1] + b"l."
    first, second, third = load_inert(content, FILE)
    assert type(first) is type(second)
    assert type(first) is not type(third)


def test_a_name_of_any_length_is_said_in_a_line() -> None:
    with pytest.raises(UserError) as caught:
        load_inert(named("yolov6x", "m" * 1000), FILE)
    assert f"holds yolov6x.{'m' * 72}, not a YOLOv6" in str(caught.value)


class StorageType(pickle.Pickler):
    """Writes a storage as PyTorch does: a reference by `persistent_id`."""

    def __init__(self, file: io.BytesIO, pid: Any) -> None:
        super().__init__(file, 2)
        self._pid = pid

    def persistent_id(self, value: Any) -> Any:
        return self._pid if value == "here" else None


def stored(pid: Any) -> Any:
    """Return the value of a pickle that refers to a storage by `pid`."""
    file = io.BytesIO()
    StorageType(file, pid).dump("here")
    return load_inert(file.getvalue(), FILE)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(torch.FloatStorage, "float32"), (torch.HalfStorage, "float16"), (torch.LongStorage, "int64")],
)
def test_a_storage_becomes_a_reference_to_its_record(kind: type, dtype: str) -> None:
    assert stored(("storage", kind, "17", "cpu", 5)) == (dtype, "17", 5)


@pytest.mark.parametrize(
    "pid",
    [
        "17",
        ("storage", torch.FloatStorage, "17", "cpu"),
        ("module", torch.FloatStorage, "17", "cpu", 5),
        ("storage", torch.nn.Conv2d, "17", "cpu", 5),
        ("storage", "FloatStorage", "17", "cpu", 5),
        ("storage", torch.FloatStorage, 17, "cpu", 5),
        ("storage", torch.FloatStorage, "17", "cpu", "5"),
    ],
)
def test_a_storage_of_another_kind_is_refused(pid: Any) -> None:
    with pytest.raises(UserError, match=r"x\.pt is damaged"):
        stored(pid)


@given(st.lists(st.integers(0, 4), min_size=1), st.sampled_from([0, 1, 2, 3, 4, 5]))
def test_what_is_one_value_stays_one(places: list[int], protocol: int) -> None:
    """Whatever slot of the memo it comes from."""
    parts = [[number] for number in range(5)]
    found = loaded([parts[place] for place in places], protocol)
    for one, place in zip(found, places, strict=True):
        assert one == [place]
        assert one is found[places.index(place)]


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_a_list_may_contain_itself(protocol: int) -> None:
    value: list[Any] = []
    value.append(value)
    found = loaded(value, protocol)
    assert found[0] is found


@pytest.mark.parametrize(
    ("module", "name", "reason"),
    [
        ("os", "system", "asks for os.system when it is loaded"),
        ("builtins", "eval", "asks for builtins.eval"),
        ("torch", "load", "asks for torch.load"),
        ("torch.nnx", "Module", "asks for torch.nnx.Module"),
        ("torch.hub", "load", "asks for torch.hub.load"),
        ("yolov6x.models", "Model", "holds yolov6x.models.Model, not a YOLOv6"),
        ("ultralytics.nn", "Model", "holds ultralytics.nn.Model, not a YOLOv6"),
    ],
)
def test_what_no_checkpoint_needs_is_refused_by_name(module: str, name: str, reason: str) -> None:
    with pytest.raises(UserError, match=re.escape(reason)):
        load_inert(named(module, name), FILE)


def test_neighbours_of_a_deep_value_do_not_count_as_deeper() -> None:
    deep = nested(LIMIT)
    value: Any
    for value in (
        [deep, (1, 2, 3, 4), (5,)],
        [(1, 2, 3, 4), deep, frozenset([(1, 2)])],
        {"a": deep, "b": (1, 2, 3, 4)},
        OrderedDict(a=deep, b=(1, 2, 3, 4)),
    ):
        assert loaded(value, 4) == value


def test_a_value_taken_from_the_memo_is_as_deep_as_it_was() -> None:
    once = nested(60)
    assert loaded([once, nested(LIMIT - 60, once)]) == [once, nested(LIMIT)]
    assert_damaged(pickle.dumps([once, nested(LIMIT - 59, once)], 2))


def test_lists_and_dictionaries_which_have_no_hash_may_be_nested_deeper() -> None:
    value: Any = 1
    for _ in range(2 * LIMIT):
        value = [{"a": value}]
    assert loaded(value) == value


@pytest.mark.parametrize("call", [pickle.REDUCE, pickle.NEWOBJ])
def test_a_tuple_is_not_made_of_a_list_that_hides_its_depth(call: bytes) -> None:
    make = pickle.GLOBAL + b"builtins\ntuple\n" + pickle.EMPTY_LIST + pickle.BINGET + b"\x00"
    deeper = pickle.BINPUT + b"\x00" + pickle.POP + make + pickle.APPEND + pickle.TUPLE1 + call
    content = pickle.EMPTY_TUPLE + (LIMIT + 1) * deeper + b"."
    assert pickle.loads(content) == nested(LIMIT + 1, ())
    with pytest.raises(UserError, match=r"builtins\.tuple"):
        load_inert(content, FILE)


def test_a_memo_slot_is_no_number_above_the_opcodes_before_it() -> None:
    # Slot 1 is named by the third opcode, 5 of 4 before it by the fifth.
    assert load_inert(pickle.PROTO + b"\x02" + pickle.NONE + pickle.BINPUT + b"\x02.", FILE) is None
    assert_damaged(pickle.PROTO + b"\x02" + pickle.NONE + pickle.BINPUT + b"\x03.")
    assert_damaged(pickle.NONE + pickle.LONG_BINPUT + b"\xff\xff\xff\x7f.")
    assert_damaged(pickle.NONE + pickle.PUT + b"1000000000\n.")


@pytest.mark.parametrize(
    "content",
    [
        pickle.EXT1 + b"\x01.",
        pickle.EXT2 + b"\x01\x00.",
        pickle.TUPLE1 + b".",
        pickle.NONE + pickle.TUPLE2 + b".",
        pickle.TUPLE + b".",
        pickle.MARK + pickle.APPENDS + b".",
        pickle.BINGET + b"\x00.",
        pickle.NONE,
        b"",
    ],
    ids=["extension 1", "extension 2", "empty", "one of two", "no mark", "no list", "no memo",
         "no end", "nothing"],
)  # fmt: skip
def test_what_no_pickler_writes_is_refused(content: bytes) -> None:
    assert_damaged(content)


def test_an_extension_that_the_process_knows_is_refused_as_well() -> None:
    content = pickle.EXT1 + b"\xf0."
    copyreg.add_extension("os", "getcwd", 0xF0)
    try:
        # From then on it comes out of a cache, and no `find_class` is asked.
        assert pickle.loads(content) is os.getcwd
        assert_damaged(content)
    finally:
        copyreg.remove_extension("os", "getcwd", 0xF0)
        copyreg.clear_extension_cache()


def test_a_mark_that_is_popped_is_gone() -> None:
    # A tuple of two, in whose making a mark was set and taken back.
    content = pickle.MARK + pickle.NONE + pickle.MARK + pickle.POP + pickle.NONE + pickle.TUPLE
    assert load_inert(content + b".", FILE) == (None, None)
    # What is popped with all above its mark leaves the depth of what is below.
    content = pickle.dumps(nested(LIMIT - 1), 2)[:-1]
    content += pickle.MARK + pickle.NONE + pickle.POP_MARK + pickle.TUPLE1
    assert load_inert(content + b".", FILE) == nested(LIMIT)


def test_a_mark_that_is_popped_hides_no_depth() -> None:
    deep = pickle.dumps(nested(LIMIT), 2)[2:-1]  # without protocol and end
    assert_damaged(pickle.MARK + deep + pickle.MARK + pickle.POP + pickle.TUPLE + b".")
    assert_damaged(pickle.MARK + pickle.MARK + pickle.POP + deep + pickle.TUPLE + b".")
    # A value that is popped counts no more.
    content = pickle.MARK + deep + pickle.POP + pickle.NONE + pickle.TUPLE + b"."
    assert load_inert(content, FILE) == (None,)
