"""Tagged JSON: the wire format between check and candidate, across the sandbox.

None, bool, str, list, float and small ints stand for themselves; any other value is an object with
its type as the only key: {"tuple": [1, 2]}, {"bytes": "ff"}, {"dict": [[key, value], ...]}.
Decoding builds exact types, so the sender cannot override comparisons. Standard library only, as
the sandbox imports it.
"""

import builtins
import itertools
import json
from array import array
from collections import Counter, OrderedDict, UserDict, UserList, UserString, defaultdict, deque
from collections.abc import Callable, ItemsView, Iterator, KeysView, ValuesView
from datetime import date, datetime, timedelta
from decimal import Decimal
from fractions import Fraction

MAX_BYTES = 64 << 20  # per message; HumanEval+'s longest answers are lists of 10^6 numbers
MAX_ITEMS = 100_000  # per iterator
BIG = 1 << 62  # larger ints travel as hex: parsing decimal takes quadratic time, and Python refuses
# more than 4300 digits
PLAIN = {type(None), bool, str, float, int}
# Types without items: (encode for JSON, decode).
FLAT = {
    bytes: (bytes.hex, bytes.fromhex),
    bytearray: (bytearray.hex, bytearray.fromhex),
    complex: (lambda z: [z.real.hex(), z.imag.hex()], lambda z: complex(*map(float.fromhex, z))),
    Decimal: (str, Decimal),
    Fraction: (str, Fraction),
    datetime: (datetime.isoformat, datetime.fromisoformat),
    date: (date.isoformat, date.fromisoformat),
}
BUILD = {kind.__name__: build for kind, (_, build) in FLAT.items()} | {"int": lambda x: int(x, 16)}


def pairs(mapping) -> list:
    return [list(pair) for pair in mapping.items()]


def taken(iterator: Iterator) -> list:
    items = list(itertools.islice(iterator, MAX_ITEMS + 1))
    if len(items) > MAX_ITEMS:
        raise OverflowError(f"an iterator of more than {MAX_ITEMS} items")
    return items


# Types sent as a list of items, derived types first: (list items, rebuild).
COLLECTIONS = {
    tuple: (list, tuple),
    set: (list, set),
    frozenset: (list, frozenset),
    Counter: (pairs, lambda x: Counter(dict(x))),
    OrderedDict: (pairs, OrderedDict),
    defaultdict: (lambda x: [x.default_factory, pairs(x)], lambda x: defaultdict(*x)),
    dict: (pairs, dict),
    range: (lambda x: [x.start, x.stop, x.step], lambda x: range(*x)),
    timedelta: (lambda x: [x.days, x.seconds, x.microseconds], lambda x: timedelta(*x)),
    deque: (lambda x: [list(x), x.maxlen], lambda x: deque(*x)),
    array: (lambda x: [x.typecode, x.tolist()], lambda x: array(*x)),
    UserList: (list, UserList),
    UserDict: (pairs, lambda x: UserDict(dict(x))),
    UserString: (lambda x: [str(x)], lambda x: UserString(*x)),
    KeysView: (list, lambda x: dict.fromkeys(x).keys()),
    ValuesView: (list, lambda x: dict(enumerate(x)).values()),
    ItemsView: (lambda x: list(map(list, x)), lambda x: dict(x).items()),
    Iterator: (taken, iter),
}
BUILD_COLLECTION = {kind.__name__: build for kind, (_, build) in COLLECTIONS.items()}
MUTABLE = (list, bytearray, deque, array, dict, set)  # types a callee can change in place


def replace(value, new) -> None:
    """Replace the content of `value`, a MUTABLE, by that of `new`. Raises TypeError otherwise."""
    if type(new) is not type(value) or not isinstance(value, MUTABLE):
        raise TypeError(f"a {type(value).__name__} cannot become a {type(new).__name__}")
    if isinstance(value, (list, bytearray, array)):
        value[:] = new
    else:
        value.clear()
        (value.extend if isinstance(value, deque) else value.update)(new)


def encode(value, other: Callable[[object], object]) -> object:
    """Encode for json.dumps; non-data x, such as a function, is sent as `other(x)`.

    A derived class (namedtuple, IntEnum) is sent as its nearest supported base type.
    """
    if value is None or isinstance(value, (bool, str, float)):
        return value
    if isinstance(value, int):
        return int(value) if -BIG < value < BIG else {"int": hex(value)}
    if isinstance(value, list):
        if set(map(type, value)) <= PLAIN and all(-BIG < x < BIG for x in value if type(x) is int):
            return value  # fast path: a tenth of the time
        return [encode(x, other) for x in value]
    for kind, (flat, _) in FLAT.items():
        if isinstance(value, kind):
            return {kind.__name__: flat(value)}
    for kind, (items, _) in COLLECTIONS.items():
        if isinstance(value, kind):
            return {kind.__name__: [encode(x, other) for x in items(value)]}
    if isinstance(value, type) and getattr(builtins, value.__name__, None) is value:
        return {"type": value.__name__}
    return {"remote": other(value)}


def decode(value, remote: Callable[[object], object]):
    """Invert `encode`; `remote(x)` maps the output of `other` back to an object.

    Raises ValueError, TypeError, LookupError or ArithmeticError for input `encode` cannot produce.
    """
    if type(value) in PLAIN:
        return value
    if isinstance(value, list):
        if set(map(type, value)) <= PLAIN:
            return value[:]  # a copy: the message keeps the arguments as sent
        return [decode(x, remote) for x in value]
    if len(value) != 1:
        raise ValueError(f"not a tagged value: {value!r:.80}")
    [(tag, inner)] = value.items()
    if tag == "remote":
        return remote(inner)
    if tag == "type":
        if not isinstance(kind := getattr(builtins, inner, None), type):
            raise ValueError(f"no type: {inner!r:.80}")
        return kind
    if tag in BUILD:
        return BUILD[tag](inner)
    return BUILD_COLLECTION[tag]([decode(x, remote) for x in inner])


def dumps(message) -> bytes:
    """Serialise a message to one line. Raises OverflowError beyond MAX_BYTES.

    Not escaped to ASCII: an escaped pair of lone surrogates would be read as one character.
    """
    line = json.dumps(message, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
    if len(line) > MAX_BYTES:
        raise OverflowError(f"a message of {len(line)} bytes, want at most {MAX_BYTES}")
    return line


def loads(line: bytes):
    """Parse one complete line. Raises ValueError or RecursionError for an invalid message."""
    if line[-1:] != b"\n":
        raise ValueError(f"a message that is cut short, or of more than {MAX_BYTES} bytes")
    return json.loads(line.decode("utf-8", "surrogatepass"))
