import contextlib
import gzip
import hashlib
import json
import random

import pytest
import zstandard

from common.files import MAX_LINE_BYTES
from data.base.documents import document
from data.base.readers import post_text, read_documents_of

DAMAGED = 400  # inputs
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


def test_documents_of_others_are_named_by_file_and_line(tmp_path):
    found, bad = read(tmp_path / "a.jsonl.gz", lines({"text": "a"}, {"content": "b", "n": 1}))
    assert found == [document("a", "a.jsonl.gz:1"), document("b", "a.jsonl.gz:2")]
    assert not bad


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


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("plain", "plain\n"),
        ("<p>a</p>\n\n\n<p>b</p>", "a\n\nb\n"),
        ("a<br>b<br/>c<hr />d", "a\nb\nc\n\nd\n"),
        ("<pre><code>if x:\n    y &lt; z\n\n\n    w</code></pre>", "if x:\n    y < z\n\n    w\n"),
        ('<a href="x" title="y">link</a> &amp;amp; <kbd>k</kbd>', "link &amp; k\n"),
        ("1 < 2", "1 < 2\n"),
    ],
)
def test_markup(markup, text):
    assert post_text("", markup) == text


@pytest.mark.parametrize("hostile", ["<", "<a", "<a" + "a" * 99, " ", "&", "<!--", "\n", " <p"])
def test_hostile_markup_takes_no_time(hostile):
    # Some of these take minutes with an expression that backtracks.
    post_text("", hostile * (200_000 // len(hostile)) + "x")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'<!DOCTYPE p [<!ENTITY a "aa">]><posts><row Body="&a;"/></posts>', "damaged file"),
        (b'<!DOCTYPE p SYSTEM "file:///etc/passwd"><posts/>', "damaged file"),
        (POSTS[:-20], "damaged file"),
        (b'<posts><row Body="' + b"a" * (1 << 19) + b'"/></posts>', "document too long"),
        (b'<posts><row Body="' + b"a" * (1 << 22), "damaged file"),
    ],
    ids=["entity", "external", "cut", "long body", "endless attribute"],
)  # fmt: skip
def test_posts_that_are_bad(tmp_path, data, reason):
    _, bad = read(tmp_path / "Posts.xml", data)
    assert [why for why, _ in bad] == [reason]


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


@pytest.mark.parametrize(
    ("name", "data", "times"),
    [
        ("a.jsonl.gz", bytes(1 << 20), 200),
        ("a.jsonl.zst", b"\n" * (1 << 20), 4),
        ("Posts.xml.zst", b"<a>" * (1 << 19), 50),
        ("Posts.xml.zst", b"<row Body='" + b"a" * (1 << 20), 200),
    ],
    ids=["zeros", "empty lines", "nesting", "attribute"],
)
def test_a_bomb_takes_no_memory(tmp_path, cli, name, data, times):
    """`data`, compressed, `times` times: up to 200 MB from a file of kilobytes."""
    path = tmp_path / name
    packed = {".gz": gzip.compress, ".zst": zstandard.compress}[path.suffix](data)
    path.write_bytes(packed * times)
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from data.base.readers import read_documents_of\n"
        "before, bad = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []\n"
        "assert not list(read_documents_of(Path(sys.argv[1]), lambda *a: bad.append(1)))\n"
        "print(len(bad), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    bad, grown_kb = map(int, cli("-c", code, path).stdout.split())
    assert grown_kb < 100_000
    assert bad or not data.strip()


def damage(data: bytes, rng: random.Random) -> bytes:
    """`data` with one to four faults."""
    data = bytearray(data)
    nasty = [b"\0", b"\xff", b"\\ud800", b"[" * 5000, b'{"a":' * 3000, b"9" * 5000, b"\n" * 100,
             b"<!DOCTYPE a>", b"&#0;", b"<row ", b'"', b"PAR1", bytes(300), b"\x28\xb5\x2f\xfd",
             b"\x1f\x8b\x08"]  # fmt: skip
    for _ in range(rng.randint(1, 4)):
        at, to = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        match rng.randrange(6):
            case 0 if data:
                data[at % len(data)] ^= 1 << rng.randrange(8)
            case 1:
                del data[at:]
            case 2:
                del data[at : min(to, at + 50)]
            case 3:
                data[at:at] = rng.choice(nasty)
            case 4:
                data[at:to] = rng.randbytes(rng.randrange(40))
            case 5:
                data[at:at] = data[at:to]
    return bytes(data)


def test_no_damage_stops_a_reader(tmp_path):
    rng = random.Random(0)
    foreign = lines(*({"content": text, "stars": i / 3} for i, text in enumerate(TEXTS)))
    good = {"ours.jsonl": lines(*OURS), "theirs.jsonl": foreign, "Posts.xml": POSTS}
    for name in list(good):
        good[f"{name}.gz"] = gzip.compress(good[name], mtime=0)
        good[f"{name}.zst"] = zstandard.compress(good[name])
    with contextlib.suppress(ImportError):
        import pyarrow.parquet

        table = pyarrow.table({"content": TEXTS * 20})
        pyarrow.parquet.write_table(table, tmp_path / "a", compression="zstd", row_group_size=60)
        good["a.parquet"] = (tmp_path / "a").read_bytes()
    for i in range(DAMAGED):
        name = rng.choice(list(good))
        path, bad = tmp_path / name, []
        inner = good[name.rsplit(".", 1)[0]] if name.endswith((".gz", ".zst")) else None
        if inner and rng.random() < 0.5:  # damage beneath the compression
            packed = gzip.compress if name.endswith(".gz") else zstandard.compress
            path.write_bytes(packed(damage(inner, rng)))
        else:
            path.write_bytes(damage(good[name], rng))
        for found in read_documents_of(path, lambda *what, bad=bad: bad.append(what)):
            assert found["sha256"] == hashlib.sha256(found["text"].encode()).hexdigest(), i
            assert "\0" not in found["text"]
            json.dumps(found, allow_nan=False, ensure_ascii=False).encode()
        for reason, position, what in bad:
            assert reason
            assert position >= 1
            assert len(what) <= max(200, MAX_LINE_BYTES)
