import json

import pytest

from common.config import UserError
from eval import similarity
from eval.scores import mean, read_result
from eval.similarity import difference, read_report


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def evaluation(folder, passed: dict[str, list[bool]], model="out/run", benchmark="HumanEval"):
    """A folder as an evaluation writes it."""
    rows = [{"task_id": t, "passed": p} for t, ps in passed.items() for p in ps]
    write(folder / "samples.jsonl", rows)
    rates = [sum(p) / len(p) for p in passed.values()]
    result = {"benchmark": benchmark, "protocol": "function body", **mean(rates)}
    (folder / "results.json").write_text(json.dumps(result | {"config": {"checkpoint": model}}))
    return folder


@pytest.fixture
def report(tmp_path):
    close = {"a": (2, 5), "b": (0, 1), "c": (0, 0), "d": (0, 0)}
    rows = [{"task_id": t, "close": {"0.95": x, "0.8": y}} for t, (x, y) in close.items()]
    return write(tmp_path / "report" / "problems.jsonl", rows)


@pytest.fixture
def command(in_process):
    return lambda *arguments: in_process(similarity.main, *arguments)


def test_split(command, report, tmp_path):
    passed = {"a": [True, True], "b": [True, False], "c": [False, False], "d": [True, False]}
    ours = evaluation(tmp_path / "ours", passed)
    other = evaluation(tmp_path / "other", {t: [False] for t in passed}, model="peer")
    out = tmp_path / "table.json"
    status, stdout, stderr = command(ours, other, "--report", report, "--out", out)
    assert status == 0, stderr
    first, second = json.loads(out.read_text())
    assert first["total"]["pass@1"] == pytest.approx(0.5)
    strict, loose = first["taus"]["0.95"], first["taus"]["0.8"]
    assert strict["similar"]["problems"] == 1
    assert strict["similar"]["pass@1"] == 1
    assert strict["other"]["pass@1"] == pytest.approx(1 / 3)
    assert loose["similar"]["pass@1"] == pytest.approx(0.75)
    assert loose["other"]["pass@1"] == pytest.approx(0.25)
    assert loose["difference"]["pass@1"] == pytest.approx(0.5)
    assert second["model"] == "peer"
    assert second["taus"]["0.8"]["similar"]["pass@1"] == 0
    assert [line.split()[0] for line in stdout.splitlines()[2:4]] == ["0.95", "0.80"]
    assert "75.0 (" in stdout


def test_a_side_without_problems(command, report, tmp_path):
    ours = evaluation(tmp_path / "ours", {"c": [True], "d": [True]})
    stdout = json.loads(command(ours, "--report", report, "--json")[1])
    row = stdout[0]["taus"]["0.95"]
    assert row["similar"] is None
    assert row["difference"] is None
    assert row["other"]["pass@1"] == 1
    assert command(ours, "--report", report)[0] == 0


def test_newcombe():
    # Newcombe 1998, table II, method 10 (a): 56/70 - 48/80 is 0.0524 to 0.3339.
    a = mean([1.0] * 56 + [0.0] * 14)
    b = mean([1.0] * 48 + [0.0] * 32)
    found = difference(a, b)
    assert found["pass@1"] == pytest.approx(0.2)
    assert found["ci95"] == pytest.approx([0.0524, 0.3339], abs=1e-4)


def test_errors(command, report, tmp_path):
    unknown = evaluation(tmp_path / "ours", {"z": [True]})
    assert "'z'" in command(unknown, "--report", report)[2]
    assert "at least one folder" in command("--report", report)[2]
    assert "results.json" in command(tmp_path, "--report", report)[2]
    bad = write(tmp_path / "bad.jsonl", [{"task_id": "a"}])
    with pytest.raises(UserError, match="line 1"):
        read_report(bad)
    with pytest.raises(UserError, match="no problems"):
        read_report(write(tmp_path / "empty.jsonl", []))
    (unknown / "results.json").write_text("{}")
    with pytest.raises(UserError, match="benchmark"):
        read_result(unknown)
    (unknown / "results.json").write_text("half {")
    with pytest.raises(UserError, match="no evaluation's"):
        read_result(unknown)
