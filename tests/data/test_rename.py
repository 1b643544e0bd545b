"""Exercises with renamed arguments."""

import ast

import pytest

from data.base.documents import ShardWriter, document
from data.base.readers import read_documents
from experiments import rename

HEAD = "def widen(values, by):\n"
PROMPT = HEAD + '    """Add by to each of values, and a 1.\n\n    >>> widen([2], 3)\n'
SOLUTION = "    # values stay as they are\n    return [x + by for x in values] + [1]\n"


def write(folder, text, n=1, **fields):
    folder.mkdir(exist_ok=True)
    with ShardWriter(folder) as writer:
        for i in range(n):
            writer.write(document(text, f"document {i}", **fields))
    return folder


def exercises(tmp_path, n=40, prompt=PROMPT + '    [5, 1]\n    """\n'):
    fields = {"prompt": prompt, "solution": SOLUTION, "entry_point": "widen", "task": 7}
    return write(tmp_path / "exercises", prompt + SOLUTION, n, **fields)


@pytest.fixture
def command(in_process, tmp_path):
    words = write(tmp_path / "raw", "zebra = quark if values else by\n" * 9)

    def call(*arguments):
        flags = ("--words", words, "--out", tmp_path / "out")
        return in_process(rename.main, *map(str, (*flags, *arguments)))

    return call


def test_code_and_docstring_get_the_same_names_and_run_as_before(command, tmp_path):
    status, stdout, stderr = command("--source", exercises(tmp_path), "--frac", 0.5)
    assert status == 0, stderr
    made, changed, words = list(read_documents([tmp_path / "out"])), 0, set()
    for e in made:
        assert e["text"] == e["prompt"] + e["solution"]
        [function] = ast.parse(e["text"]).body
        first, second = (a.arg for a in function.args.args)
        assert ast.get_docstring(function).startswith(f"Add {second} to each of {first}, and a 1.")
        scope = {}
        exec(e["text"], scope)
        assert scope["widen"]([2], 3) == [5, 1]
        assert e["task"] == 7
        changed += first != "values"
        words |= {*first.split("_"), *second.split("_")}
    assert 0 < changed < len(made) == 40
    assert f"40 exercises, {changed} renamed" in stdout
    assert {"zebra", "quark", "values"} <= words  # plus random letters
    assert len(words) > 4


@pytest.mark.parametrize("prompt", [HEAD, 'def widen():\n    """Widen."""\n'])
def test_what_has_no_docstring_or_no_arguments_stays(command, tmp_path, prompt):
    _, stdout, _ = command("--source", exercises(tmp_path, 1, prompt), "--frac", 1)
    assert [e["prompt"] for e in read_documents([tmp_path / "out"])] == [prompt]
    assert "1 exercises, 0 renamed" in stdout


def test_mistakes_are_told(command, tmp_path):
    plain = write(tmp_path / "code", "x = 1\n")
    for arguments, message in (
        (["--source", plain], "not exercises: no entry_point"),
        (["--source", exercises(tmp_path, 1), "--frac", 2], "frac is 2.0, want from 0 to 1"),
        (["--source", plain, "--words", tmp_path / "none"], "want existing documents"),
    ):
        status, _, stderr = command(*arguments)
        assert (status, message in stderr) == (2, True), stderr
        assert not (tmp_path / "out").exists()
