import json
import math
from array import array
from collections import (
    Counter,
    OrderedDict,
    UserDict,
    UserList,
    UserString,
    defaultdict,
    deque,
    namedtuple,  # fmt: skip
)
from datetime import date, datetime, timedelta
from decimal import Decimal
from enum import IntEnum
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.tagged import MUTABLE, decode, dumps, encode, loads, replace

hashable = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.binary(max_size=9)
    | st.text(st.characters(), max_size=9) | st.complex_numbers(allow_nan=False, max_magnitude=9)
    | st.decimals(allow_nan=False) | st.fractions(),
    lambda x: st.tuples(x, x) | st.frozensets(x, max_size=3),
    max_leaves=6,
)  # fmt: skip
values = st.recursive(
    hashable | st.sets(hashable, max_size=3),
    lambda x: st.lists(x, max_size=3) | st.tuples(x) | st.dictionaries(hashable, x, max_size=3),
    max_leaves=9,
)


def refuse(value):
    raise AssertionError(value)


def through(value, other=refuse, remote=refuse):
    return decode(loads(dumps(encode(value, other))), remote)


def same(a, b) -> bool:
    """Return True if equal with the same types at every depth and the same dict key order."""
    if type(a) is not type(b) or a != b:
        return False
    if isinstance(a, float):
        return math.copysign(1, a) == math.copysign(1, b)
    if isinstance(a, dict):
        return all(same(x, y) for x, y in zip(a.items(), b.items()))
    return all(map(same, a, b)) if isinstance(a, (list, tuple)) else True


@given(values)
def test_round_trip_is_exact(value):
    assert same(through(value), value)


def test_hard_cases():
    for value in (
        "\ud83d\ude00",  # two lone surrogates, not one UTF-16 character
        "\ud800\n\u2028\0",
        10**5000,  # too long for Python's decimal conversion
        -(1 << 62), (1 << 62) - 1, -0.0, math.inf, 5e-324, range(1, 9, 3), int,
        {(1, "a"): {frozenset({2}): [b"\xff", 1j]}}, [], (), set(), {},
        Decimal("1.50"), Fraction(1, 3), bytearray(b"\xff"), array("d", [0.5]),
        deque([1, (2,)], 3), Counter("aab"), OrderedDict(b=1, a=2), defaultdict(int, a=1),
        date(2024, 2, 29), datetime(2024, 2, 29, 1, 2, 3, 4), timedelta(-1, 2, 3),
        UserList([1]), UserDict(a=[1]), UserString("a"), {1: "a"}.keys(), {1: "a"}.items(),
    ):  # fmt: skip
        assert same(through(value), value)
    assert math.isnan(through([math.nan])[0])


def test_an_object_cannot_speak_for_itself():
    class Equal(str):
        __eq__ = __ne__ = lambda *a: True
        __hash__ = str.__hash__

    class Data(UserList):
        __eq__ = Equal.__eq__

    derived = [Equal("x"), Data([1]), namedtuple("P", "x y")(1, 2), IntEnum("C", "red").red]
    assert same(through(derived), ["x", UserList([1]), (1, 2), 1])
    assert through(Counter("aab"))["c"] == through(defaultdict(int))["c"] == 0
    assert through([object()], lambda x: 7, lambda number: f"remote {number}") == ["remote 7"]


def test_iterators_and_views():
    for value in (iter([1, 2]), map(int, "12"), (x for x in (1, 2)), {3: 1, 4: 2}.values()):
        assert list(through(value)) == [1, 2]
        assert through(value) != [1, 2]
    with pytest.raises(OverflowError):
        through(iter(int, 1))


@pytest.mark.parametrize("value", [
    [1, 2], bytearray(b"ab"), deque([1, 2], 5), array("i", [1]), {1: 2}, {1, 2}, Counter("a"),
    defaultdict(int, a=1), OrderedDict(a=1)])  # fmt: skip
def test_a_changed_argument(value):
    assert isinstance(value, MUTABLE)
    same_object, new = value, through(value)
    value.clear() if hasattr(value, "clear") else value.pop()
    replace(value, new)
    assert same_object == new
    with pytest.raises(TypeError):
        replace(value, tuple(value))


@pytest.mark.parametrize(
    "message",
    [
        {}, {"bytes": "x"}, {"float": "1"}, {"int": 5}, {"list": []}, {"tuple": 3},
        {"dict": [[[], 1]]}, {"type": "print"}, {"a": 1, "b": 2}, {"Fraction": "1/0"},
        {"range": [1, 2, 0]},
    ],
)  # fmt: skip
def test_what_encode_cannot_have_made(message):
    with pytest.raises((ValueError, TypeError, ArithmeticError, LookupError)):
        decode(loads(json.dumps(message).encode() + b"\n"), refuse)
