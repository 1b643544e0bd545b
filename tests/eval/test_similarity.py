import json

import pytest

from eval import similarity
from eval.scores import mean
from eval.similarity import difference


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def evaluation(folder, passed: dict[str, list[bool]], model="out/run", benchmark="HumanEval"):
    """Write a folder as an evaluation does."""
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
    other = evaluation(tmp_path / "other", {"c": [False], "d": [True]}, model="peer")
    first, second = json.loads(command(ours, other, "--report", report, "--json")[1])
    assert first["total"]["pass@1"] == pytest.approx(0.5)
    strict, loose = first["taus"]["0.95"], first["taus"]["0.8"]
    assert strict["similar"]["problems"] == 1
    assert strict["similar"]["pass@1"] == 1
    assert strict["other"]["pass@1"] == pytest.approx(1 / 3)
    assert loose["similar"]["pass@1"] == pytest.approx(0.75)
    assert loose["difference"]["pass@1"] == pytest.approx(0.5)
    assert second["model"] == "peer"
    row = second["taus"]["0.95"]  # no similar problem
    assert (row["similar"], row["difference"], row["other"]["pass@1"]) == (None, None, 0.5)
    status, stdout, stderr = command(ours, other, "--report", report)
    assert status == 0, stderr
    assert [line.split()[0] for line in stdout.splitlines()[2:4]] == ["0.95", "0.80"]
    assert "75.0 (" in stdout


def test_newcombe():
    # Newcombe 1998, table II, method 10 (a): 56/70 - 48/80 is 0.0524 to 0.3339.
    found = difference(mean([1.0] * 56 + [0.0] * 14), mean([1.0] * 48 + [0.0] * 32))
    assert found["pass@1"] == pytest.approx(0.2)
    assert found["ci95"] == pytest.approx([0.0524, 0.3339], abs=1e-4)


def test_errors(command, report, tmp_path):
    unknown = evaluation(tmp_path / "ours", {"z": [True]})
    assert "'z'" in command(unknown, "--report", report)[2]
    assert "at least one folder" in command("--report", report)[2]
    assert "results.json" in command(tmp_path, "--report", report)[2]
    path = write(tmp_path / "bad.jsonl", [{"task_id": "a"}])
    assert "data.decontaminate's" in command(unknown, "--report", path)[2]
