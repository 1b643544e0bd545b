"""What a program depends on, and the hash of it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from common.code import closure, code_hash

# program: (what its closure holds among others, what it has nothing of)
HOLDS = {
    "train": (
        "train.py model.py kernels/attention.py kernels/tuning.json data/loader.py data/shards.py "
        "common/checkpoint.py common/runlog.py tokenizer/__init__.py tokenizer/byte_level.py",
        "eval/ sandbox/ tools/ bench/ data/filter.py data/base/ sample.py kernels/decode.py",
    ),
    "data.filter": (
        "data/filter.py data/base/stage.py data/base/syntax.py data/base/ranks.py common/files.py",
        "eval/ sandbox/ kernels/ data/collect.py train.py model.py",
    ),
    "data.exercises": (  # one of these is imported when it is asked for, one is text
        "data/synthetic/families.py data/synthetic/concepts.py data/synthetic/concepts.txt",
        "eval/ train.py model.py kernels/",
    ),
    "sandbox.self_check": (  # of these only execute is imported: it starts the others
        "sandbox/execute.py sandbox/supervise.py sandbox/candidate.py sandbox/tagged.py",
        "eval/ train.py model.py kernels/",
    ),
    "eval.humaneval": (
        "eval/harness.py sandbox/tagged.py sample.py model.py kernels/decode.py",
        "train.py data/filter.py bench/",
    ),
}


def paths(*programs) -> set[str]:
    return {file.relative_to(ROOT).as_posix() for file in closure(*programs)}


@pytest.mark.parametrize("program", HOLDS)
def test_closure_holds_what_a_program_uses_and_nothing_else(program):
    found = paths(program)
    inside, outside = (words.split() for words in HOLDS[program])
    assert set(inside) - found == set()
    assert [file for file in found if file.startswith(tuple(outside))] == []
    assert all((ROOT / file).is_file() for file in found)


def test_a_program_that_is_not_there():
    with pytest.raises(ValueError, match="trian: no such module"):
        closure("trian")


# ---- in a copy of the project, which is edited ----


@pytest.fixture
def tree(tmp_path) -> Path:
    for name in ("common", "data", "kernels", "sandbox", "tokenizer", "eval", "bench"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    return tmp_path


def ask(tree: Path, *words: str) -> list[str]:
    """Return the words that a bare Python prints: -S leaves it the standard library alone."""
    done = subprocess.run([sys.executable, "-S", *words], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def hashes(tree: Path) -> dict[str, str]:
    programs = ("train", "data.filter", "sandbox.self_check")
    code = f"from common.code import code_hash\nfor p in {programs}: print(code_hash(p))"
    return dict(zip(programs, ask(tree, "-c", code), strict=True))


@pytest.mark.parametrize(("file", "changed"), [
    ("kernels/tuning.json", {"train"}),
    ("data/filter.py", {"data.filter"}),
    ("sandbox/tagged.py", {"sandbox.self_check"}),
    ("common/config.py", {"train", "data.filter", "sandbox.self_check"}),
    ("bench/ops.py", set()),
])  # fmt: skip
def test_an_edit_changes_the_hash_of_what_uses_the_file(tree, file, changed):
    before = hashes(tree)
    assert before == {program: code_hash(program) for program in before}  # wherever the tree is
    with open(tree / file, "a") as f:
        f.write("\n")
    after = hashes(tree)
    assert {program for program in before if after[program] != before[program]} == changed


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
