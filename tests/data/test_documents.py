import gzip
import json

import pytest
import zstandard

from common.config import UserError
from common.files import new_folder, read_jsonl, write_json
from data.base.documents import DocumentFile, ShardWriter, document, shard_files
from data.base.readers import read_documents

RECORDS = [{"text": f"número {i}\n", "n": i} for i in range(20)]
LINES = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in RECORDS).encode()


def write(path, data=LINES):
    """Write `data`, compressed according to the suffix of `path`."""
    packed = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)
    path.write_bytes(packed(data))
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_reads_what_was_written_and_names_a_bad_line(tmp_path, name):
    assert list(read_jsonl(write(tmp_path / name, LINES.rstrip() + b"\n\n  \n"))) == RECORDS
    with pytest.raises(UserError, match=f"{name} line 21:"):
        list(read_jsonl(write(tmp_path / name, LINES + b"{")))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_a_compressed_file_cut_anywhere_is_an_error(tmp_path, name):
    whole = write(tmp_path / name).read_bytes()
    path = tmp_path / f"cut-{name}"
    for size in range(name.endswith("gz"), len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=name):
            list(read_jsonl(path))


def test_the_writers_start_shards_and_count_bytes(tmp_path):
    records = [document("é" * 50 + str(i), f"o{i}", extra=i) for i in range(10)]
    with ShardWriter(tmp_path, shard_bytes=500) as writer:
        for record in records:
            writer.write(record)
    assert len(shard_files(tmp_path)) == writer.shards > 2
    assert list(read_documents([tmp_path])) == records
    with DocumentFile(tmp_path / "one.jsonl.zst") as file:
        for record in records:
            file.write(record)
    assert (file.documents, file.bytes) == (10, 10 * 101)
    assert list(read_documents([file.path])) == records


def test_a_document_is_named_by_its_hash():
    record = document("abc", "there", more=1)
    assert record.pop("sha256").startswith("ba7816bf8f01cfea414140de5dae2223")  # FIPS 180-4
    assert record == {"id": "ba7816bf8f01cfea", "origin": "there", "text": "abc", "more": 1}


def fill(out, text):
    with new_folder(out) as folder:
        (folder / "data.txt").write_text("half")
        (folder / "data.txt").write_text(text)
        write_json(folder / "summary.json", {"text": text})


def test_new_folder_replaces_what_it_wrote_if_the_block_succeeds(tmp_path):
    out = tmp_path / "deep" / "out"
    for text in ("old", "new"):
        fill(out, text)
        assert (out / "data.txt").read_text() == text
    with pytest.raises(TypeError):
        fill(out, object())
    assert (out / "data.txt").read_text() == "new"
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_an_interrupt_between_the_renames_loses_nothing(tmp_path, monkeypatch):
    fill(tmp_path / "out", "old")

    def interrupted(out, made):
        out.rename(made.with_name("old"))
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr("common.files.replace_folder", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fill(tmp_path / "out", "new")
    with pytest.raises(TypeError):
        fill(tmp_path / "out", object())
    assert (tmp_path / "out" / "data.txt").read_text() == "old"


def test_new_folder_has_one_writer(tmp_path, monkeypatch):
    twice = pytest.raises(UserError, match="another run is writing it")
    with new_folder(tmp_path / "out"), twice, new_folder(tmp_path / "out"):
        pytest.fail("entered")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    ranks = pytest.raises(UserError, match="start it without mpirun")
    with ranks, new_folder(tmp_path / "out"):
        pytest.fail("entered")


def test_new_folder_refuses_what_is_not_its_own_and_its_inputs(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "summary.json").write_text("{}")  # a common name
    (tmp_path / "file").write_text("years of work")
    for name in ("mine", "file"):
        with pytest.raises(UserError, match=f"{name} .*no nanophi stage wrote it"):
            fill(tmp_path / name, "new")
    (tmp_path / "empty").mkdir()
    fill(tmp_path / "empty", "new")  # an empty folder holds nothing to lose
    fill(tmp_path / "out", "old")
    for reads in ("out", "out/data.txt", "x/../out"):
        refused = pytest.raises(UserError, match="holds the input")
        with refused, new_folder(tmp_path / "out", [tmp_path / reads]):
            pytest.fail("entered")
