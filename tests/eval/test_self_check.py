"""What a check of the references gave may be read again, in the same circumstances only."""

import pytest
from test_eval import COMPLETE, PROBLEMS, command, problems, write  # noqa: F401, fixtures

import sandbox.self_check
from eval import humaneval
from sandbox.self_check import remembered

LIMITS = {"tier": "C", "timeout_s": 3.0}


@pytest.fixture
def ask(tmp_path):
    """ask(problems, ...): whether they were checked anew."""
    made, file = [], tmp_path / "new" / "checks.json"

    def call(rows, **limits):
        def work():
            made.append(1)
            return {p["task_id"]: float("inf") for p in rows}

        before = len(made)
        found = remembered(file, rows, work, **LIMITS | limits)
        assert found == {p["task_id"]: float("inf") for p in rows}
        return len(made) > before

    call.file = file
    return call


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"self-check": 3}'])
def test_the_same_is_checked_once_whatever_the_file_held(ask, damage):
    ask.file.parent.mkdir()
    ask.file.write_text(damage)
    assert [ask(PROBLEMS), ask(PROBLEMS)] == [True, False]


def test_anything_else_is_checked_anew(ask):
    for field in PROBLEMS[0]:
        ask(PROBLEMS)
        assert ask([PROBLEMS[0] | {field: PROBLEMS[0][field] + " "}, *PROBLEMS[1:]])
    assert ask(PROBLEMS, timeout_s=4.0)
    assert ask(PROBLEMS, tier="B")


@pytest.mark.parametrize(("target", "new"), [
    ("platform.node", lambda: "another machine"), ("sys.version", "4.0"),
    ("sys.executable", "/another/python"), ("os.geteuid", lambda: 4321),
    ("code_hash", lambda program: "other code"), ("BOOT", None)])  # fmt: skip
def test_another_machine_checks_for_itself(ask, monkeypatch, tmp_path, target, new):
    boot = tmp_path / "boot"
    boot.write_text("started again\n")
    ask(PROBLEMS)
    monkeypatch.setattr(f"sandbox.self_check.{target}", new or boot)
    assert ask(PROBLEMS)


def test_of_an_evaluation(command, problems, tmp_path, monkeypatch):  # noqa: F811
    """The second one runs the samples alone; a failed check is not remembered."""
    samples, numbers = write(tmp_path / "samples.jsonl", COMPLETE), []

    def counted(checks, run=sandbox.self_check.run_all, **limits):
        numbers.append(len(checks))
        return run(checks, **limits)

    monkeypatch.setattr("sandbox.self_check.run_all", counted)
    monkeypatch.setattr("eval.harness.run_all", counted)

    def evaluate(problems, checks):
        arguments = ("--problems", problems, "--samples", samples)
        return command(humaneval, *arguments, "--self_check", tmp_path / checks)

    assert evaluate(problems, "checks.json")[0] == 0
    assert evaluate(problems, "checks.json")[0] == 0
    assert numbers == [8, 2, 2]  # of two problems: a reference and three wrong ones each
    bad = [PROBLEMS[0] | {"canonical_solution": "    return 7\n"}, PROBLEMS[1]]
    bad = write(tmp_path / "bad.jsonl", bad)
    assert "the reference failed" in evaluate(bad, "other.json")[2]
    assert not (tmp_path / "other.json").exists()
