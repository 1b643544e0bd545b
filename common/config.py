"""Command lines and TOML files as typed, frozen dataclasses; shared by every entry point.

A command's options are the fields of one dataclass. The comment behind a field is its help text, so
that help cannot drift from code:

    @dataclass(frozen=True)
    class Config:
        \"\"\"What the command does, in a sentence.\"\"\"
        out: Path                     # folder to write (a field without a default is required)
        source: tuple[str, ...] = ()  # a tuple field may be given several times
        max_mb: float = 0.0           # megabytes of text to keep, 0 = all
        verbose: bool = False         # a bool is --verbose or --verbose=false

    config = parse(Config)            # sys.argv; --max_mb=3, --max_mb 3 and --max-mb 3 are the same

Where `toml=True`, a first argument without dashes names a TOML file whose values replace the
defaults; flags come last. Unknown keys, from file or flag, are errors that name the nearest field.
"""

import argparse
import dataclasses
import difflib
import inspect
import re
import sys
import tomllib
import types
from pathlib import Path
from typing import get_args, get_origin, get_type_hints


class UserError(ValueError):
    """Something the user can mend: printed by `run` as one line (what, where, what to do)."""


def run(main) -> None:
    """Call `main()`; print a UserError as one line on stderr and exit with status 2."""
    try:
        main()
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def parse(cls, argv: list[str] | None = None, toml: bool = False):
    """An instance of the dataclass `cls` from the command line (default `sys.argv[1:]`).

    Raises UserError for an unknown key, a wrong type or a missing required option, from flag or
    file. `--help` prints every field with its default and meaning, and exits.
    """
    argv = sys.argv[1:] if argv is None else argv
    types_, comments = get_type_hints(cls), _comments(cls)
    parser = argparse.ArgumentParser(
        description=inspect.cleandoc(cls.__doc__),
        allow_abbrev=False,
        exit_on_error=False,
        usage="%(prog)s" + " [CONFIG.toml]" * toml + " [--key=value ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for f in dataclasses.fields(cls):
        required = f.default is dataclasses.MISSING
        many = get_origin(types_[f.name]) is tuple
        default = "required" if required else f"default: {_show(f.default)}"
        parser.add_argument(
            f"--{f.name}",
            *{f"--{f.name.replace('_', '-')}"} - {f"--{f.name}"},
            dest=f.name,
            action="append" if many else "store",
            **({"nargs": "?", "const": "true"} if types_[f.name] is bool else {}),
            metavar=_type_name(types_[f.name]),
            default=argparse.SUPPRESS,
            help=f"{comments.get(f.name, '')} ({default})".replace("%", "%%"),
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
        known = [f"--{f.name}" for f in dataclasses.fields(cls)]
        raise UserError(f"unknown argument {key!r}{_nearest(key, known)}; --help lists the options")
    values = _from_toml(cls, Path(path), types_) if path else {}
    values |= {k: _convert(v, types_[k], f"--{k}") for k, v in vars(flags).items()}
    missing = [
        f.name
        for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING and f.name not in values
    ]
    if missing:
        raise UserError(f"missing required option --{missing[0]}; --help lists the options")
    return cls(**values)


def differences(config) -> dict:
    """The fields of `config` that differ from their defaults, as {name: value}."""
    return {
        f.name: getattr(config, f.name)
        for f in dataclasses.fields(config)
        if getattr(config, f.name) != f.default
    }


def _from_toml(cls, path: Path, types_: dict) -> dict:
    try:
        values = tomllib.loads(path.read_text())
    except OSError as e:
        raise UserError(f"cannot read config {path}: {e.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{path} is not valid TOML: {e}") from None
    for key in values:
        if key not in types_:
            raise UserError(f"{path}: unknown key {key!r}{_nearest(key, list(types_))}")
    return {k: _convert(v, types_[k], f"{path}: {k}") for k, v in values.items()}


def _convert(value, want, where: str):
    """`value` (a string from a flag, or a TOML value) as type `want`; only int widens, to float."""
    if get_origin(want) is tuple:
        items = value if isinstance(value, list) else [value]
        return tuple(_convert(item, get_args(want)[0], where) for item in items)
    if isinstance(want, types.UnionType):  # X | None
        want = next(t for t in get_args(want) if t is not type(None))
    error = UserError(f"{where}: got {value!r}, want {_type_name(want)}")
    if want is bool:
        if isinstance(value, bool):
            return value
        if value in ("true", "false"):
            return value == "true"
        raise error
    if isinstance(value, bool) or (want in (str, Path) and not isinstance(value, str)):
        raise error
    if want is int and isinstance(value, str):
        value = value.replace("_", "")
        if not re.fullmatch(r"[+-]?\d+", value):
            raise error
    if want is int and isinstance(value, float):
        raise error
    try:
        return want(value)
    except (TypeError, ValueError):
        raise error from None


def _comments(cls) -> dict[str, str]:
    """{field: the comment behind it, with the comment lines that continue it}, from the source."""
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
    return f"{value:g}" if isinstance(value, float) else str(value)
