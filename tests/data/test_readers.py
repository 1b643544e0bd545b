import contextlib
import gzip
import hashlib
import itertools
import json
import os
import random
import re

import pytest
import zstandard

from common.files import MARK, MAX_LINE_BYTES
from data.base.documents import document, source_shards
from data.base.readers import decode, post_text, read_documents, read_documents_of

TEXTS = [f"def f{i}(x):\n    return 'é' + x * {i}\n" for i in range(12)]
OURS = [document(text, f"code:{i}.py", score=i) for i, text in enumerate(TEXTS)]
POSTS = b"""<?xml version="1.0" encoding="utf-8"?>
<posts>
  <row Id="4" PostTypeId="1" AcceptedAnswerId="6" Score="3" Title="How to add?" Tags="&lt;python-3.x&gt;"
   Body="&lt;p&gt;With &lt;code&gt;&amp;lt;b&amp;gt;&lt;/code&gt;:&lt;/p&gt;
&lt;pre&gt;&lt;code&gt;def f():&#xA;    return 1&#xA;&lt;/code&gt;&lt;/pre&gt;" />
  <row Id="5" PostTypeId="5" Body="A wiki" />
  <row Id="6" PostTypeId="2" ParentId="4" Score="1" Body="&lt;p&gt;The accepted one&lt;/p&gt;" />
  <row Id="7" PostTypeId="2" ParentId="4" Score="9" Body="Of more votes" />
  <row Id="8" PostTypeId="1" Score="2" Title="No answer is accepted" Tags="|list|python|" Body="?" />
  <row Id="9" PostTypeId="2" ParentId="8" Score="1" Body="Good" />
  <row Id="10" PostTypeId="2" ParentId="8" Score="4" Body="Better" />
  <row Id="11" PostTypeId="2" ParentId="8" Score="0" Body="Bad" />
  <row Id="12" PostTypeId="1" Score="5" Title="Closed" Tags="&lt;python&gt;" ClosedDate="2020" Body="?" />
  <row Id="13" PostTypeId="1" Score="0" Title="Nobody likes it" Tags="&lt;python&gt;" Body="?" />
  <row Id="14" PostTypeId="1" Score="5" Title="Of C" Tags="&lt;c&gt;&lt;pythonic&gt;" Body="?" />
  <row Id="15" PostTypeId="2" ParentId="14" Score="5" Body="Of C" />
  <row Id="16" PostTypeId="1" Score="5" Title="Waits" Tags="&lt;python&gt;" Body="?" />
  <row Id="x" PostTypeId="1" Score="5" Tags="&lt;python&gt;" Body="?" />
</posts>
"""  # noqa: E501
LEFT_OUT = {"neither question nor answer": 1, "answer that is not the best": 2, "of low score": 2,
            "closed, as duplicates are": 1, "not about Python": 1, "malformed": 1,
            "answer without its question": 1, "question without an answer": 1}  # fmt: skip


def lines(*records) -> bytes:
    made = (r if isinstance(r, bytes) else json.dumps(r).encode() + b"\n" for r in records)
    return b"".join(made)


def read(path, data=None):
    """Return the documents of a file with this content, and bad records as (reason, position)."""
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


def test_a_question_about_python_comes_with_its_best_answer(tmp_path):
    told = []
    (tmp_path / "Posts.xml").write_bytes(POSTS)
    found = list(read_documents_of(tmp_path / "Posts.xml", lambda *bad: told.append(bad)))
    code = "```python\ndef f():\n    return 1\n```"
    first = f"# How to add?\n\nWith `<b>`:\n\n{code}\n\n## Answer\n\nThe accepted one\n"
    second = "# No answer is accepted\n\n?\n\n## Answer\n\nBetter\n"
    assert [(d["origin"], d["text"]) for d in found] == [("Posts.xml:4", first),
                                                         ("Posts.xml:8", second)]  # fmt: skip
    [(reason, rows, what)] = told
    assert (reason, rows) == ("posts left out", 14)
    counts = dict(part.split(" ", 1)[::-1] for part in re.split(", (?=[0-9])", what))
    assert counts == {why: str(n) for why, n in LEFT_OUT.items()}
    cut, bad = read(tmp_path / "Posts.xml.gz", POSTS[: POSTS.index(b'<row Id="9"')])
    assert [d["text"] for d in cut] == [first]
    assert bad[0] == ("damaged file", 6)


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("a<br>b<br/>c<hr />d", "a\nb\nc\n\nd\n"),
        ("a <pre class='x'><code>if x:\n    y &lt; <b>z</b>\n\n\n    w</code></pre>b",
         "a\n\n```python\nif x:\n    y < z\n\n\n    w\n```\n\nb\n"),
        ("<pre>    if x:\n        y</pre>", "```python\nif x:\n    y\n```\n"),
        ("<pre>$ ls -l</pre>", "```\n$ ls -l\n```\n"),
        ("<pre><pre>never closed", "```\nnever closed\n```\n"),
        ('<a href="x" title="y">link</a> &amp;amp; <code>k</code>', "link &amp; `k`\n"),
        ("<ul><li>one</li><li>two</li></ul>", "- one\n- two\n"),
        ("<table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>2</td></tr></table>",
         "a | b\n1 | 2\n"),
        ("1 < 2", "1 < 2\n"),
    ],
)  # fmt: skip
def test_markup(markup, text):
    assert post_text(markup) == text


BOTH = {"text": None, "content": "x = 1\n", "sha256": "00", "origin": "theirs", "id": "7"}


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", lines(BOTH)),
        ("a.jsonl", b"\xef\xbb\xbf" + lines(BOTH)),
        ("a.jsonl", lines(BOTH | {"content": "\ufeffx = 1\n"})),
        ("a.json.gz", lines(BOTH)),
        ("a.ndjson", lines(BOTH)),
        ("a.ndjson.zst", lines(BOTH)),
    ],
)
def test_lines_as_others_write_them(tmp_path, name, data):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    read(tmp_path / "deep" / "er" / name, data)
    [found] = read_documents([tmp_path])
    assert found == document("x = 1\n", f"{name}:1")


@pytest.mark.parametrize("end", [".gz", ".zst"])
@pytest.mark.parametrize("tail", [b"\n", b"\r\n", bytes(512)])
def test_padding_behind_a_compressed_file_loses_nothing(tmp_path, end, tail):
    path = tmp_path / f"a.jsonl{end}"
    read(path, lines(*OURS))
    path.write_bytes(path.read_bytes() * 2 + tail)
    assert read(path) == (OURS * 2, [])
    path.write_bytes(path.read_bytes() + b"garbage")
    assert read(path) == (OURS * 2, [("damaged file", 2 * len(OURS) + 1)])


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("# -*- coding: latin-1 -*-\nx = 'é'\n".encode("latin-1"),
         "# -*- coding: latin-1 -*-\nx = 'é'\n"),
        ("x = 'é'\n".encode("utf-16"), "x = 'é'\n"),
        ("x = 'é'\n".encode("utf-8-sig"), "x = 'é'\n"),
        (b"# coding: nonsense\n", None),
        (b"# coding: undefined\n", None),
        ("x = 'é'\n".encode("latin-1"), None),
    ],
)  # fmt: skip
def test_encodings(tmp_path, data, text):
    if text:
        assert decode(data) == text
    else:
        with pytest.raises(UnicodeDecodeError):
            decode(data)


def test_outputs_below_a_source_are_no_shards_of_it(tmp_path):
    for name in ("raw", "raw/removed", "mine/deep"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.jsonl").touch()
    (tmp_path / "raw" / MARK).touch()
    assert source_shards(tmp_path) == [tmp_path / "mine" / "deep" / "a.jsonl"]
    assert source_shards(tmp_path / "raw") == [tmp_path / "raw" / "a.jsonl"]


def test_what_is_no_file_is_quarantined(tmp_path):
    (tmp_path / "a.jsonl").symlink_to("a.jsonl")
    (tmp_path / "b.jsonl").symlink_to("nowhere")
    os.mkfifo(tmp_path / "c.jsonl")
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jsonl")
    with open(name, "wb") as f:
        f.write(lines({"text": "x"}))
    shards = source_shards(tmp_path)
    assert [read(path) for path in shards[:3]] == [([], [("unreadable", 1)])] * 3
    assert read(shards[3]) == ([document("x", "caf\ufffd.jsonl:1")], [])


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
    columns = {"text": [None, "b"], "content": ["é".encode(), b"c"]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "c.parquet")
    assert [d["text"] for d in read(tmp_path / "c.parquet")[0]] == ["é", "b"]
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
