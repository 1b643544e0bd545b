"""Dependencies of a program, and their hash."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from common.code import closure, code_hash

# program: (files in its closure, prefixes of files not in it)
HOLDS = {
    "train": (
        "train.py model.py kernels/attention.py kernels/tuning.json data/loader.py data/shards.py "
        "common/checkpoint.py common/runlog.py tokenizer/__init__.py tokenizer/byte_level.py "
        "eval/gold.py",
        "eval/bits.py eval/harness.py sandbox/ tools/ bench/ data/filter.py data/base/ sample.py "
        "kernels/decode.py",
    ),
    "data.exercises": (
        "data/synthetic/families.py data/synthetic/concepts.txt",
        "eval/ train.py model.py kernels/",
    ),
    "eval.humaneval": (  # runs some sandbox files without importing them
        "eval/harness.py sandbox/supervise.py sandbox/tagged.py sample.py kernels/decode.py",
        "train.py data/filter.py bench/",
    ),
}


@pytest.mark.parametrize("program", HOLDS)
def test_closure_holds_what_a_program_uses_and_nothing_else(program):
    found = {file.relative_to(ROOT).as_posix() for file in closure(program)}
    inside, outside = (words.split() for words in HOLDS[program])
    assert set(inside) <= found
    assert [file for file in found if file.startswith(tuple(outside))] == []


@pytest.fixture
def tree(tmp_path) -> Path:
    for name in ("common", "data", "kernels", "sandbox", "tokenizer", "eval", "bench"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    return tmp_path


def ask(tree: Path, *words: str) -> list[str]:
    """Return the words a bare Python prints; -S hides all packages but the standard library."""
    done = subprocess.run([sys.executable, "-S", *words], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_an_edit_changes_the_hash_of_what_uses_the_file(tree):
    programs = ["train", "data.filter", "sandbox.self_check"]
    code = f"from common.code import code_hash\nfor p in {programs}: print(code_hash(p))"
    hashes = [code_hash(program) for program in programs]
    assert ask(tree, "-c", code) == hashes  # independent of the tree's location
    for file, changed in [
        ("kernels/tuning.json", [True, False, False]),
        ("data/filter.py", [False, True, False]),
        ("sandbox/tagged.py", [False, False, True]),
        ("common/config.py", [True, True, True]),
        ("bench/ops.py", [False, False, False]),
    ]:
        with open(tree / file, "a") as f:
            f.write("\n")
        before, hashes = hashes, ask(tree, "-c", code)
        assert [a != b for a, b in zip(before, hashes)] == changed, file


@pytest.mark.parametrize(("line", "found"), [
    ("import a.b.c", "a/__init__.py a/b/__init__.py a/b/c.py"),
    ("from a.b import c", "a/__init__.py a/b/__init__.py a/b/c.py"),
    ("from a.b import name", "a/__init__.py a/b/__init__.py"),
    ("def f():\n    from a import top", "a/__init__.py a/top.py top.py"),  # which imports top
    ("run([python, '-m', 'a.b.c'])", "a/__init__.py a/b/__init__.py a/b/c.py"),
    ("print('top', 'a.nothing', 'a.b.c and more', 'top.py', 'a.', f'a.{x}')", ""),
    ("import os.path, torch.nn, top", "top.py"),
    ("import top\ndef f(:", ""),
])  # fmt: skip
def test_how_a_file_is_used(tmp_path, line, found):
    (tmp_path / "common").mkdir()
    shutil.copy(ROOT / "common/code.py", tmp_path / "common")
    (tmp_path / "a/b").mkdir(parents=True)
    for file in ("a/__init__.py", "a/b/__init__.py", "a/b/c.py", "top.py"):
        (tmp_path / file).touch()
    (tmp_path / "a/top.py").write_text("import top")
    (tmp_path / "program.py").write_text(f"{line}\n")
    printed = ask(tmp_path, "-m", "common.code", "program")
    assert printed == [f"program:{name}" for name in sorted([*found.split(), "program.py"])]
