"""What a check of the references gave may be read again, in the same circumstances only."""

import json

import pytest
from test_eval import COMPLETE, PROBLEMS, TIER, command, problems, write  # noqa: F401, fixtures

import sandbox.self_check
from eval import humaneval
from sandbox.self_check import remembered, self_check

LIMITS = {"tier": "C", "timeout_s": 3.0}


@pytest.fixture
def ask(tmp_path):
    """ask(problems, ...): (what was found, whether it was checked anew)."""
    made = []

    def call(rows, name="self-check", **limits):
        def work():
            made.append(1)
            return {p["task_id"]: float("inf") for p in rows}

        before = len(made)
        found = remembered(tmp_path / "new" / "checks.json", name, rows, work, **LIMITS | limits)
        return found, len(made) > before

    call.file = tmp_path / "new" / "checks.json"
    return call


def test_the_same_is_checked_once(ask):
    first, anew = ask(PROBLEMS)
    assert anew
    assert ask(PROBLEMS) == (first, False)
    assert ask(PROBLEMS, name="others")[1]
    assert ask(PROBLEMS) == (first, False)  # and both are kept
    assert not ask(PROBLEMS, name="others")[1]


@pytest.mark.parametrize("change", [
    *({k: PROBLEMS[0][k] + " "} for k in PROBLEMS[0]), {"timeout_s": 4.0}, {"tier": "B"},
    {"memory_mb": 1}])  # fmt: skip
def test_anything_else_is_checked_anew(ask, change):
    ask(PROBLEMS)
    problem = {k: v for k, v in change.items() if k in PROBLEMS[0]}
    limits = {k: v for k, v in change.items() if k not in PROBLEMS[0]}
    assert ask([PROBLEMS[0] | problem, *PROBLEMS[1:]], **limits)[1]
    assert ask(PROBLEMS[:1])[1]


@pytest.mark.parametrize(("target", "new"), [
    ("sandbox.self_check.platform.node", lambda: "another machine"),
    ("sandbox.self_check.sys.version", "4.0"),
    ("sandbox.self_check.sys.executable", "/another/python"),
    ("sandbox.self_check.os.geteuid", lambda: 4321),
    ("sandbox.self_check.code_hash", lambda program: "other code"),
    ("sandbox.self_check.BOOT", None)])  # fmt: skip
def test_another_machine_checks_for_itself(ask, monkeypatch, tmp_path, target, new):
    if new is None:
        new = tmp_path / "boot"
        new.write_text("started again\n")
    ask(PROBLEMS)
    monkeypatch.setattr(target, new)
    assert ask(PROBLEMS)[1]


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"self-check": 3}', '{"self-check": {}}'])
def test_a_damaged_file_is_no_check(ask, damage):
    found, _ = ask(PROBLEMS)
    ask.file.write_text(damage)
    assert ask(PROBLEMS) == (found, True)
    assert ask(PROBLEMS) == (found, False)


def test_what_failed_is_not_remembered(ask, tmp_path):
    file = tmp_path / "checks.json"

    def work():
        wrong = PROBLEMS[0] | {"canonical_solution": "    return 7\n"}
        return self_check([wrong], timeout_s=0.4, tier=TIER)

    for _ in range(2):
        with pytest.raises(sandbox.self_check.UserError, match="the reference failed"):
            remembered(file, "self-check", PROBLEMS, work, **LIMITS)
    assert not file.exists()


def test_of_an_evaluation(command, problems, tmp_path, monkeypatch):  # noqa: F811
    """The second one runs the samples alone, and scores the same."""
    samples = write(tmp_path / "samples.jsonl", COMPLETE)
    numbers = []

    def counted(checks, run=sandbox.self_check.run_all, **limits):
        numbers.append(len(checks))
        return run(checks, **limits)

    monkeypatch.setattr("sandbox.self_check.run_all", counted)
    monkeypatch.setattr("eval.harness.run_all", counted)
    scores = []
    for _ in range(2):
        status, stdout, _ = command(humaneval, "--problems", problems, "--samples", samples,
                                    "--self_check", tmp_path / "checks.json", "--json")  # fmt: skip
        assert status == 0
        scores.append(json.loads(stdout))
    assert numbers == [8, 2, 2]  # of two problems: a reference and three wrong ones each
    assert scores[0]["pass@1"] == scores[1]["pass@1"]
    assert scores[0]["timeouts"]["shortest_s"] == scores[1]["timeouts"]["shortest_s"]
