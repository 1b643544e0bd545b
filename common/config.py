"""Parse command lines and TOML files into frozen dataclasses.

A command's options are the fields of one dataclass; the comment after a field is its help text:

    out: Path                     # folder to write (required: no default)
    source: tuple[str, ...] = ()  # a tuple field may be repeated
    max_mb: float = 0.0           # --max_mb=3, --max_mb 3 and --max-mb 3 are the same
    verbose: bool = False         # --verbose or --verbose=false

With `toml=True`, a first argument without dashes is a TOML file. It overrides the defaults, and
flags override it.
"""

import argparse
import dataclasses
import difflib
import errno
import inspect
import os
import re
import select
import sys
import tomllib
import types
from pathlib import Path
from typing import get_args, get_origin, get_type_hints


class UserError(ValueError):
    """An error the user can fix; `run` prints it as one line (what, where, what to do)."""


def printable(text: str) -> str:
    """Escape unprintable characters: control characters, lone surrogates, ..."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def require(config, name: str, ok: bool, want: str) -> None:
    """Raise UserError "`name` is VALUE, want `want`" unless `ok`."""
    if not ok:
        raise UserError(f"{name} is {getattr(config, name)!r}, want {want}")


def run(main) -> None:
    """Call `main()`; print a UserError, or an OSError on a file, as one line and exit with 2.

    Escape characters that stdout's encoding lacks.
    """
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
    except UserError as e:
        print(f"error: {printable(str(e))}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        stdout = select.poll()
        stdout.register(sys.stdout.fileno(), 0)
        if not stdout.poll(0):  # another pipe broke
            raise
        # The reader of our output, such as head, has exited. Leave nothing to flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as e:
        full = e.errno in (errno.ENOSPC, errno.EDQUOT)
        if not (e.filename or full):
            raise
        told = f"{e.filename}: {e.strerror}" if e.filename else e.strerror
        to_do = "free some space, then rerun the command" if full else "use another path"
        print(f"error: {printable(told)}; {to_do}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def parse(cls, argv: list[str] | None = None, toml: bool = False, hidden: type | None = None):
    """Parse the command line (default `sys.argv[1:]`) into an instance of the dataclass `cls`.

    --help omits the fields that `cls` inherits from `hidden`.
    """
    argv = sys.argv[1:] if argv is None else argv
    types_, comments, fields = get_type_hints(cls), _comments(cls), dataclasses.fields(cls)
    required = [f.name for f in fields if f.default is dataclasses.MISSING]
    left_out = {f.name for f in dataclasses.fields(hidden)} if hidden else ()
    parser = argparse.ArgumentParser(
        description=inspect.cleandoc(cls.__doc__),
        epilog=f"The options of {hidden.__module__}.py override CONFIG.toml." if hidden else None,
        allow_abbrev=False,
        exit_on_error=False,
        usage="%(prog)s" + " [CONFIG.toml]" * toml + " [--key=value ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for f in fields:
        default = "required" if f.name in required else f"default: {_show(f.default)}"
        parser.add_argument(
            f"--{f.name}",
            *{f"--{f.name.replace('_', '-')}"} - {f"--{f.name}"},
            dest=f.name,
            action="append" if get_origin(types_[f.name]) is tuple else "store",
            **({"nargs": "?", "const": "true"} if types_[f.name] is bool else {}),
            metavar=_type_name(types_[f.name]),
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS
            if f.name in left_out
            else f"{comments.get(f.name, '')} ({default})".replace("%", "%%"),
        )
    path = argv[0] if toml and argv and not argv[0].startswith("-") else None
    try:
        flags, unknown = parser.parse_known_args(argv[1:] if path else argv)
    except argparse.ArgumentError as e:
        raise UserError(str(e)) from None
    if unknown:
        key = unknown[0].split("=")[0]
        if toml and key.endswith(".toml"):
            raise UserError(f"the configuration {key} must be the first argument")
        near = _nearest(key, [f"--{f.name}" for f in fields])
        raise UserError(f"unknown argument {key!r}{near}; --help lists the options")
    values = _from_toml(Path(path), types_) if path else {}
    values |= {k: _convert(v, types_[k], f"--{k}") for k, v in vars(flags).items()}
    if missing := [name for name in required if name not in values]:
        raise UserError(f"missing required option --{missing[0]}; --help lists the options")
    return cls(**values)


def differences(config) -> dict:
    """Return the fields of `config` that differ from their defaults, as {name: value}."""
    values = {f: getattr(config, f.name) for f in dataclasses.fields(config)}
    return {f.name: value for f, value in values.items() if value != f.default}


def _from_toml(path: Path, types_: dict) -> dict:
    try:
        values = tomllib.loads(path.read_text())
    except OSError as e:
        raise UserError(f"cannot read config {path}: {e.strerror}") from None
    except ValueError as e:  # TOML, or UTF-8
        raise UserError(f"{path} is not valid TOML: {e}") from None
    for key in values:
        if key not in types_:
            raise UserError(f"{path}: unknown key {key!r}{_nearest(key, list(types_))}")
    return {k: _convert(v, types_[k], f"{path}: {k}") for k, v in values.items()}


def _convert(value, want, where: str):
    """Convert `value` (a flag's text or a TOML value) to `want`; an int may become a float."""
    if get_origin(want) is tuple:
        items = value if isinstance(value, list) else [value]
        return tuple(_convert(item, get_args(want)[0], where) for item in items)
    if isinstance(want, types.UnionType):  # X | None
        want = next(t for t in get_args(want) if t is not type(None))
    error = UserError(f"{where}: got {value!r}, want {_type_name(want)}")
    if want is bool:
        if str(value) not in ("true", "false", "True", "False"):
            raise error
        return str(value).lower() == "true"
    if isinstance(value, bool) or (want in (str, Path) and not isinstance(value, str)):
        raise error
    if want is int and (isinstance(value, float) or not re.fullmatch(r"[+-]?\d[\d_]*", str(value))):
        raise error
    try:
        converted = want(value)
        if want is Path:
            converted = converted.expanduser()  # a shell does not expand --out=~/x
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: ~nobody
        raise error from None
    if converted != converted:  # NaN, which range checks would miss
        raise error
    return converted


def _comments(cls) -> dict[str, str]:
    """Return {field: the comment after it, plus continuation lines}, read from the source."""
    found, name = {}, None
    for klass in reversed(cls.__mro__[:-1]):
        for line in inspect.getsource(klass).splitlines():
            if m := re.match(r"    (\w+): [^#]*#\s*(.*)", line):
                name = m[1]
                found[name] = m[2]
            elif name and (m := re.match(r"\s+#\s*(.*)", line)):
                found[name] += " " + m[1]
            else:
                name = None
    return found


def _nearest(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def _type_name(t) -> str:
    if get_origin(t) is tuple:
        return _type_name(get_args(t)[0])
    if isinstance(t, types.UnionType):
        return "|".join(_type_name(a) for a in get_args(t) if a is not type(None))
    return {bool: "true|false", Path: "path", str: "text"}.get(t, t.__name__)


def _show(value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if value in ("", None, ()):
        return "none"
    if isinstance(value, tuple):
        return ", ".join(map(_show, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
