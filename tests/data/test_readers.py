import contextlib
import gzip
import hashlib
import itertools
import json
import random

import pytest
import zstandard

from common.files import MAX_LINE_BYTES
from data.base.documents import document
from data.base.readers import post_text, read_documents_of

TEXTS = [f"def f{i}(x):\n    return 'é' + x * {i}\n" for i in range(12)]
OURS = [document(text, f"code:{i}.py", score=i) for i, text in enumerate(TEXTS)]
POSTS = b"""<?xml version="1.0" encoding="utf-8"?>
<posts>
  <row Id="4" PostTypeId="1" Title="How to add?" Body="&lt;p&gt;With &amp;lt;b&amp;gt;:&lt;/p&gt;
&lt;pre&gt;&lt;code&gt;def f():&#xA;    return 1&#xA;&lt;/code&gt;&lt;/pre&gt;" Tags="&lt;python&gt;" />
  <row Id="5" PostTypeId="5" />
  <row Id="6" PostTypeId="2" Body="&lt;ul&gt;&lt;li&gt;one&lt;/li&gt;&lt;li&gt;two&lt;/li&gt;&lt;/ul&gt;" />
</posts>
"""  # noqa: E501


def lines(*records) -> bytes:
    made = (r if isinstance(r, bytes) else json.dumps(r).encode() + b"\n" for r in records)
    return b"".join(made)


def read(path, data=None):
    """The documents of a file with this content, and what was bad as (reason, position)."""
    if data is not None:
        packed = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)
        path.write_bytes(packed(data))
    bad = []
    documents = list(read_documents_of(path, lambda why, at, what: bad.append((why, at))))
    return documents, bad


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "\xff"}\n', "not UTF-8"),
        (b'{"text": "\\ud800"}\n', "lone surrogate"),
        (b'{"text": "a\\u0000"}\n', "NUL"),
        (b'{"text": "a"\n', "not JSON"),
        (b'{"text": "a", "n": ' + b"1" * 5000 + b"}\n", "not JSON"),
        (lines({**OURS[0], "n": float("nan")}), "not JSON"),
        (lines({**OURS[0], "n": "\ud800"}), "lone surrogate"),
        (b'{"text": ' + b"[" * 1_000_000 + b"}\n", "nested too deeply"),
        (b"[1]\n", "not an object"),
        (b'{"text": 3}\n', "no text or content"),
        (b'{"text": "' + b"a" * MAX_LINE_BYTES + b'"}\n', "line too long"),
        (lines({**OURS[0], "text": "other"}), "wrong sha256"),
        (lines({**OURS[0], "id": "0" * 16}), "wrong sha256"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_bad_line_is_named_and_reading_goes_on(tmp_path, line, reason):
    found, bad = read(tmp_path / "a.jsonl.zst", lines(*OURS[2:5], line, *OURS[5:]))
    assert found == OURS[2:]
    assert bad == [(reason, 4)]


@pytest.mark.parametrize("end", [".gz", ".zst"])
def test_what_stands_before_the_cut_is_read(tmp_path, end):
    path = tmp_path / f"a.jsonl{end}"
    many = [document(f"{i} {random.Random(i).random()}", "x") for i in range(5000)]
    read(path, lines(*many))
    path.write_bytes(path.read_bytes()[:-40_000])
    found, bad = read(path)
    assert 1000 < len(found) < 5000
    assert found == many[: len(found)]
    assert bad == [("damaged file", len(found) + 1)]


def test_posts(tmp_path):
    found, bad = read(tmp_path / "Posts.xml.gz", POSTS)
    assert not bad
    first = "How to add?\n\nWith <b>:\n\ndef f():\n    return 1\n"
    assert [d["text"] for d in found] == [first, "one\ntwo\n"]
    assert [d["origin"] for d in found] == ["Posts.xml.gz:1", "Posts.xml.gz:3"]
    assert read(tmp_path / "Posts.xml", POSTS[:-20])[1] == [("damaged file", 3)]


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("a<br>b<br/>c<hr />d", "a\nb\nc\n\nd\n"),
        ("<pre><code>if x:\n    y &lt; z\n\n\n    w</code></pre>", "if x:\n    y < z\n\n    w\n"),
        ('<a href="x" title="y">link</a> &amp;amp; <kbd>k</kbd>', "link &amp; k\n"),
        ("1 < 2", "1 < 2\n"),
    ],
)
def test_markup(markup, text):
    assert post_text("", markup) == text


def test_parquet_as_the_stack_has_it(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="the extra parquet is not installed")
    pyarrow = pytest.importorskip("pyarrow")
    columns = {
        "hexsha": ["0"] * 200,
        "content": [None if i == 7 else "a\0" if i == 8 else f"x = {i}\n" for i in range(200)],
        "max_stars_repo_name": [f"user/repo{i}" for i in range(200)],
        "max_stars_repo_path": ["pkg/m.py"] * 200,
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet", row_group_size=90)
    found, bad = read(tmp_path / "a.parquet")
    good = [i for i in range(200) if i not in (7, 8)]
    assert found == [document(f"x = {i}\n", f"user/repo{i}/pkg/m.py") for i in good]
    assert bad == [("no text or content", 8), ("NUL", 9)]
    parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "b.parquet")
    assert read(tmp_path / "b.parquet") == ([], [("no text or content", 1)])


def test_a_bomb_takes_no_memory(tmp_path, cli):
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(bytes(1 << 20)) * 200)
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from data.base.readers import read_documents_of\n"
        "before, bad = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []\n"
        "assert not list(read_documents_of(Path(sys.argv[1]), lambda *a: bad.append(a[0])))\n"
        "print(*bad, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    *said, grown_kb = cli("-c", code, tmp_path / "a.jsonl.zst").stdout.split()
    assert (said, int(grown_kb) < 100_000) == (["line", "too", "long"], True)


def test_no_damage_stops_a_reader(tmp_path):
    rng = random.Random(0)
    good = {"ours.jsonl": lines(*OURS), "Posts.xml": POSTS}
    for name in list(good):
        good[f"{name}.gz"] = gzip.compress(good[name], mtime=0)
        good[f"{name}.zst"] = zstandard.compress(good[name])
    with contextlib.suppress(ImportError):
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"content": TEXTS * 20}), tmp_path / "a")
        good["a.parquet"] = (tmp_path / "a").read_bytes()
    for name, i in itertools.product(good, range(40)):
        data, bad = bytearray(good[name]), []
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data))
            if i % 2:
                data[at] ^= 1 << rng.randrange(8)
            else:
                data[at : at + rng.randrange(40)] = rng.randbytes(rng.randrange(40))
        (tmp_path / name).write_bytes(data)
        for found in read_documents_of(tmp_path / name, lambda *what, bad=bad: bad.append(what)):
            assert found["sha256"] == hashlib.sha256(found["text"].encode()).hexdigest()
            assert "\0" not in found["text"]
            json.dumps(found, allow_nan=False, ensure_ascii=False).encode()
        assert all(reason and position >= 1 for reason, position, _ in bad)
