import pytest
from test_filter import write_source

from data.base.documents import document
from data.base.readers import read_documents
from experiments.pairs import Config, cut_pairs, pairs

SOURCE = '''import functools


class Counter:
    """Counts."""

    @functools.cache
    def up(self, by: int = 1) -> int:
        """Count up.

        By one, or more.
        """
        # A comment before the code belongs to the code.
        self.n += by

        return self.n

    def silent(self):
        return self.n


def outer(x,
          y):
    r"""Outer \\d."""
    def inner(z):
        'Inner.'
        return z
    return inner(x) + y


def only_documented():
    """Nothing else."""


async def asynchronous():
    """Not the shape of an exercise."""
    return 1
'''


def cut(text):
    return [(name, prompt, solution) for _, name, prompt, solution in cut_pairs(text)]


def test_functions_methods_and_nested_functions():
    assert cut(SOURCE) == [
        (
            "up",
            'def up(self, by: int = 1) -> int:\n    """Count up.\n\n'
            '    By one, or more.\n    """\n',
            "    # A comment before the code belongs to the code.\n"
            "    self.n += by\n\n    return self.n\n",
        ),
        (
            "outer",
            'def outer(x,\n          y):\n    r"""Outer \\d."""\n',
            "    def inner(z):\n        'Inner.'\n        return z\n    return inner(x) + y\n",
        ),
        ("inner", "def inner(z):\n    'Inner.'\n", "    return z\n"),
    ]


@pytest.mark.parametrize(
    "text",
    [
        'def f():\n    """doc"""; x = 1\n    return x\n',
        'if 1:\n    def f():\n        """doc\n  less indented"""\n        return 1\n',
        "def f():\n    f'''{doc}'''\n    return 1\n",
        "def f():\n    return 1\n",
    ],
)
def test_what_lines_cannot_cut_is_left_out(text):
    assert cut(text) == []


def test_a_run(tmp_path):
    long = SOURCE.replace("return self.n", "return self.n + " + " + ".join(["self.n"] * 400))
    source = write_source(tmp_path / "raw", [SOURCE, SOURCE + "\n# again\n", long, "print 'x'\n"])
    summary = pairs(Config(source=(source,), out=tmp_path / "out"))
    found = list(read_documents([tmp_path / "out"]))
    assert [d["entry_point"] for d in found] == ["up", "outer", "inner"]
    assert [d["origin"] for d in found] == ["code:0.py:8", "code:0.py:22", "code:0.py:25"]
    for d in found:
        again = document(d["prompt"] + d["solution"], d["origin"])
        assert {k: d[k] for k in again} == again
    counts = {"documents": 3, "too_long": 1, "does_not_parse": 1, "documents_in": 4}
    assert {k: summary[k] for k in counts} == counts
    assert summary["left_out"] == {"duplicate": 5}
    assert summary["bytes"] == sum(len(d["text"]) for d in found)
