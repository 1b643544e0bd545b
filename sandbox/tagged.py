"""Values as tagged JSON: what a check and a candidate say to each other across the sandbox.

None, bool, str, list and small ints are themselves; each other value is an object with one key, its
type: {"float": "0x1.8p+1"}, {"tuple": [1, 2]}, {"dict": [[key, value], ...]}. What is decoded is
built here from exact builtin types, so no object of the sender's can answer for itself when it is
compared. Standard library only, as the sandbox imports it.
"""

import builtins
import itertools
import json
from collections.abc import Callable, ItemsView, Iterator, KeysView, ValuesView
from decimal import Decimal
from fractions import Fraction

MAX_BYTES = 16 << 20  # of a message; no answer of a benchmark comes near it
MAX_ITEMS = 100_000  # that an iterator may give
BIG = 1 << 62  # ints from here on travel as hex: decimal digits take quadratic time, and Python
# refuses to read more than 4300 of them


def encode(value, other: Callable[[object], object]) -> object:
    """Encode for json.dumps; `other(x)` stands for an x that is no data, such as a function.

    A value of a derived class (Counter, namedtuple, IntEnum) is sent as the builtin that it is.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value) if -BIG < value < BIG else {"int": hex(value)}
    if isinstance(value, float):
        return {"float": float.hex(value)}
    if isinstance(value, list):
        return [encode(x, other) for x in value]
    if isinstance(value, dict):
        pairs = [[encode(k, other), encode(v, other)] for k, v in value.items()]
        return {"dict": pairs}
    if isinstance(value, complex):
        return {"complex": [value.real.hex(), value.imag.hex()]}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    for kind in (tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [encode(x, other) for x in value]}
    if isinstance(value, type) and getattr(builtins, value.__name__, None) is value:
        return {"type": value.__name__}
    if isinstance(value, range):
        return {"range": [encode(x, other) for x in (value.start, value.stop, value.step)]}
    if isinstance(value, (Decimal, Fraction)):
        return {"Decimal" if isinstance(value, Decimal) else "Fraction": str(value)}
    if isinstance(value, (Iterator, KeysView, ValuesView, ItemsView)):
        items = [encode(x, other) for x in itertools.islice(value, MAX_ITEMS + 1)]
        if len(items) > MAX_ITEMS:
            raise OverflowError(f"an iterator of more than {MAX_ITEMS} items")
        return {"iterator": items}
    return {"remote": other(value)}


def decode(value, remote: Callable[[object], object]):
    """Return the inverse of `encode`; `remote(x)` is the object for what `other` gave.

    Raises ValueError, TypeError, OverflowError, ArithmeticError or AttributeError for what `encode`
    cannot have made.
    """
    if value is None or isinstance(value, (bool, str, int)):
        return value
    if isinstance(value, list):
        return [decode(x, remote) for x in value]
    if isinstance(value, float) or len(value) != 1:
        raise ValueError(f"not a tagged value: {value!r:.80}")
    [(tag, inner)] = value.items()
    if tag == "float":
        return float.fromhex(inner)
    if tag == "int":
        return int(inner, 16)
    if tag == "dict":
        return {decode(k, remote): decode(v, remote) for k, v in inner}
    if tag == "complex":
        return complex(*map(float.fromhex, inner))
    if tag == "bytes":
        return bytes.fromhex(inner)
    if tag in ("Decimal", "Fraction"):
        return {"Decimal": Decimal, "Fraction": Fraction}[tag](inner)
    if tag == "type" and isinstance(getattr(builtins, inner, None), type):
        return getattr(builtins, inner)
    if tag == "remote":
        return remote(inner)
    kinds = {"tuple": tuple, "set": set, "frozenset": frozenset, "iterator": iter}
    if tag == "range":
        return range(*decode(inner, remote))
    return kinds[tag]([decode(x, remote) for x in inner])


def dumps(message) -> bytes:
    """Return a message as one line. Raises OverflowError if it is longer than MAX_BYTES.

    Not escaped to ASCII: an escaped pair of lone surrogates would be read as one character.
    """
    line = json.dumps(message, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
    if len(line) > MAX_BYTES:
        raise OverflowError(f"a message of {len(line)} bytes, want at most {MAX_BYTES}")
    return line


def loads(line: bytes):
    """Return the message of a whole line. Raises ValueError or RecursionError for what is none."""
    if line[-1:] != b"\n":
        raise ValueError(f"a message that is cut short, or of more than {MAX_BYTES} bytes")
    return json.loads(line.decode("utf-8", "surrogatepass"))
