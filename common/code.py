"""Find the project files a program depends on, and hash them.

    python3 -m common.code data.filter train     print PROGRAM:FILE lines for the Makefile

Standard library only: make runs this before anything is installed.
"""

import ast
import functools
import hashlib
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATA = (".txt", ".json", ".jsonl")  # data files that modules read from their own folder


def closure(*programs: str | Path) -> list[Path]:
    """Return the sorted project files that `programs` (dotted names or files) depend on."""
    found, todo = set(), set()
    for program in programs:
        if isinstance(program, str) and not module_file(program):
            raise ValueError(f"{program}: no such module in {ROOT}")
        todo |= files_of(program) if isinstance(program, str) else {program.resolve()}
    while todo:
        found.add(file := todo.pop())
        todo |= dependencies(file) - found
    return sorted(found)


@functools.cache
def code_hash(*programs: str | Path) -> str:
    """Hash the names and contents of closure(*programs), cached at the first call."""
    digest = hashlib.blake2b(digest_size=16)
    for file in closure(*programs):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(ROOT).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


@functools.cache
def dependencies(file: Path) -> set[Path]:
    """Return the project files that `file` depends on directly.

    Count every import, also inside functions, and every string that is a module's dotted name, as
    in [sys.executable, "-m", "sandbox.supervise"]. A module that mentions __file__ depends on the
    data files in and below its folder. A file that does not parse has no dependencies.
    """
    if file.suffix != ".py":
        return set()
    try:
        tree = ast.parse(file.read_bytes())
    except SyntaxError:
        return set()
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = found.union(*(files_of(alias.name) for alias in node.names))
        elif isinstance(node, ast.ImportFrom):  # the imported name may itself be a module
            found = found.union(*(files_of(f"{node.module}.{alias.name}") for alias in node.names))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # Skip names without a dot: "train" is also a data split.
            if re.fullmatch(r"\w+(\.\w+)+", node.value) and module_file(node.value):
                found |= files_of(node.value)
        elif isinstance(node, ast.Name) and node.id == "__file__" and file.parent != ROOT:
            found |= {p for p in file.parent.rglob("*") if p.suffix in DATA}
    return found


def files_of(name: str) -> set[Path]:
    """Return the project files that `import name` runs: the module and its packages' __init__."""
    parts = name.split(".")
    found = {module_file(".".join(parts[: i + 1])) for i in range(len(parts))}
    return found - {None}


@functools.cache
def module_file(name: str) -> Path | None:
    """Return the file of module or package `name`, or None if it is outside this project."""
    path = ROOT / name.replace(".", "/")
    files = (path.with_suffix(".py"), path / "__init__.py")
    return next((file for file in files if file.is_file()), None)


if __name__ == "__main__":
    for program in sys.argv[1:]:
        for file in closure(program):
            print(f"{program}:{file.relative_to(ROOT)}")
