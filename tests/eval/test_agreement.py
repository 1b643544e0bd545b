import json

import pytest

from common.config import UserError
from eval import agreement


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows(*verdicts):
    return [{"task_id": "T/1", "completion": c, "passed": p, "result": r} for c, p, r in verdicts]


def test_counts_and_disagreements(tmp_path, monkeypatch, capsys):
    ours = rows(("a", True, "passed"), ("b", False, "failed: no"), ("c", False, "failed: x"))
    official = rows(("b", True, "passed"), ("a", True, "passed"), ("c", False, "timed out"))
    ours, official = write(tmp_path / "a.jsonl", ours), write(tmp_path / "b.jsonl", official)
    monkeypatch.setattr("sys.argv", ["x", "--ours", str(ours), "--official", str(official)])
    agreement.main()
    out = capsys.readouterr().out
    table, _, shown = out.partition("\n\n")
    assert [line.split()[-2:] for line in table.splitlines()[1:]] == [["1", "0"], ["1", "1"]]
    assert shown == "T/1: ours 'failed: no', official 'passed'\nb\n"


def test_other_samples(tmp_path):
    one = agreement.read(write(tmp_path / "a.jsonl", rows(("a", True, ""))))
    two = agreement.read(write(tmp_path / "b.jsonl", rows(("a", True, ""), ("b", True, ""))))
    with pytest.raises(UserError, match="1 samples have a verdict from one harness alone"):
        agreement.match(one, two)
    with pytest.raises(UserError, match="line 1: want task_id"):
        agreement.read(write(tmp_path / "c.jsonl", [{"task_id": "T/1"}]))
