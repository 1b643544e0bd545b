import json
import math
import sys
import types
from pathlib import Path

import pytest
from tiers import best

from common.config import UserError
from data.base.benchmarks import Mbpp, read_mbpp, read_problems
from eval import exercises, humaneval, mbpp
from eval.harness import BODY, trim_to_body
from sandbox.execute import Verdict, run_checks
from sandbox.self_check import LOOP_S, check, self_check, slowdown

TIER = best()
PROBLEMS = [
    {
        "task_id": f"T/{name}",
        "prompt": f'def {name}(a, b):\n    """{name} of a and b."""\n',
        "canonical_solution": f"    return a {op} b\n",
        "entry_point": name,
        "test": f"def check(candidate):\n    assert candidate(5, 3) == {answer}\n",
    }
    for name, op, answer in (("add", "+", 8), ("sub", "-", 2))
]
ROWS = [
    {
        "task_id": i,
        "text": f"Write a function to add {i}.",
        "code": f"def check(x):\r\n    return x + {i}",  # two of MBPP's are called check
        "test_list": [f"assert check(1) == {i + 1}", f"assert check(0) == {i}"],
        "test_setup_code": "",
    }
    for i in (2, 3, 4, 11, 12, 511)
]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def problems(tmp_path):
    return write(tmp_path / "problems.jsonl", PROBLEMS)


@pytest.fixture
def command(monkeypatch, in_process):
    """Run a command in this process: (exit status, stdout, stderr)."""
    monkeypatch.setattr("eval.harness.slowdown", lambda **limits: 1.0)  # 0.3 s each
    return lambda module, *arguments: in_process(module.main, *arguments, "--sandbox", TIER)


@pytest.fixture
def model(monkeypatch):
    """A model that gives a prompt which holds a key of `model.answers` its next completion."""
    seen = types.SimpleNamespace(answers={}, prompts=[], options={}, context=10_000)

    class Generator:
        @classmethod
        def load(cls, checkpoint, device="auto"):
            return cls()

        def fits(self, prompt, new_tokens=1):
            return len(prompt) + new_tokens <= seen.context

        def generate(self, prompts, **options):
            print("a library that prints")
            seen.prompts, seen.options = prompts, options
            return [next(k for key, k in seen.answers.items() if key in p).pop(0) for p in prompts]

    monkeypatch.setitem(sys.modules, "sample", types.SimpleNamespace(Generator=Generator))
    return seen


def samples_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]


def test_samples_with_a_known_score(command, problems, tmp_path):
    good, bad = "    return a + b\n", "    return a * b\n"
    rows = [{"task_id": "T/add", "completion": c} for c in [good] * 3 + [bad] * 7]
    rows += [{"task_id": "T/sub", "completion": c} for c in [good] * 9 + ["    while 1: pass\n"]]
    samples, out = write(tmp_path / "samples.jsonl", rows), tmp_path / "out"
    status, stdout, _ = command(
        exercises, "--problems", problems, "--samples", samples, "--out", out, "--json",
        "--timeout_s", "0.5",
    )  # fmt: skip
    assert status == 0
    result = json.loads(stdout)  # one object and nothing else
    assert result["pass@1"] == pytest.approx(0.15)
    assert result["pass@10"] == pytest.approx(0.5)
    assert result["counts"] == {"passed": 3, "failed": 16, "timeout": 1}
    assert result["problems"] == 2
    assert result["samples_per_problem"] == 10
    assert "NOT protected" in result["limits"]
    assert result["protocol"] == "function body"
    assert result["sandbox"] == TIER
    assert result["intervals"]["pass@1"] == result["ci95"]
    assert result["intervals"]["pass@10"][0] < 0.5 < result["intervals"]["pass@10"][1]
    assert result["timeouts"]["slowdown"] >= 1
    assert 0.5 <= result["timeouts"]["shortest_s"] <= result["timeouts"]["longest_s"]
    assert json.loads((out / "results.json").read_text()) == result
    written = samples_of(out)
    assert [s["completion"] for s in written] == [row["completion"] for row in rows]
    assert [s["passed"] for s in written] == [True] * 3 + [False] * 17
    assert written[-1]["status"] == "timeout"
    assert "AssertionError" in written[5]["detail"]
    assert [s["result"] for s in written[::19]] == ["passed", "timed out"]
    assert written[5]["result"].startswith("failed: ")
    plus = [json.loads(line) for line in (out / "evalplus.jsonl").read_text().splitlines()]
    assert plus[0]["solution"] == PROBLEMS[0]["prompt"] + good
    assert [p["base_status"] for p in plus[::19]] == ["pass", "timeout"]
    rows = [line.split("\t") for line in (out / "problems.tsv").read_text().splitlines()]
    assert [row[:5] for row in rows[1:]] == [
        ["T/add", "10", "3", "0", "0.300"],
        ["T/sub", "10", "0", "1", "0.000"],
    ]


def test_checkpoint(command, model, problems, tmp_path):
    model.answers |= {
        "def add": ["\n    return a + b\n\nadd(", "\n    return a\n"],
        "def sub": ["\n    return a - b", "\n    return a - b"],
    }
    status, stdout, _ = command(
        humaneval, "--problems", problems, "--checkpoint", "run", "--samples_per_problem", 2,
        "--temperature", 0.5, "--seed", 7, "--out", tmp_path / "out", "--json", "--strip_prompt",
    )  # fmt: skip
    result = json.loads(stdout)
    assert status == 0
    assert result["pass@1"] == 0.75
    assert result["benchmark"] == "HumanEval"
    assert [p[:7] for p in model.prompts] == ["def add"] * 2 + ["def sub"] * 2
    assert all(p.endswith('b."""') for p in model.prompts)
    assert model.options["stop"] == BODY.stop
    assert model.options["seed"] == 7
    assert result["cut"] == {"stop": list(BODY.stop), "to_body": True}
    assert result["config"]["temperature"] == 0.5
    assert result["config"]["checkpoint"] == "run"
    assert samples_of(tmp_path / "out")[0]["completion"] == "\n    return a + b\n\n"


def test_prompt_beyond_the_context_fails_and_is_counted(command, model, tmp_path):
    long = PROBLEMS[0] | {"prompt": "# long\n" * 100 + PROBLEMS[0]["prompt"]}
    problems = write(tmp_path / "problems.jsonl", [long, PROBLEMS[1]])
    model.answers |= {"def sub": ["\n    return a - b"]}
    model.context = 200
    status, stdout, _ = command(
        humaneval, "--problems", problems, "--checkpoint", "run",
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert status == 0
    assert "prompts too long: 1" in stdout
    assert " 50.0 %" in stdout
    assert model.prompts == [PROBLEMS[1]["prompt"]]
    assert "too long" in samples_of(tmp_path / "out")[0]["detail"]


def test_samples_run_as_they_stand_unless_trimmed(command, problems, tmp_path):
    helper = "    return plus(a, b)\n\ndef plus(a, b):\n    return a + b\n"
    rows = [{"task_id": p["task_id"], "completion": helper} for p in PROBLEMS]
    samples = write(tmp_path / "samples.jsonl", rows)
    arguments = ("--problems", problems, "--samples", samples, "--json")
    assert json.loads(command(humaneval, *arguments)[1])["pass@1"] == 0.5
    result = json.loads(command(humaneval, *arguments, "--trim")[1])
    assert result["pass@1"] == 0
    assert result["cut"]["to_body"]


COMPLETE = [{"task_id": p["task_id"], "completion": "    pass"} for p in PROBLEMS]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([*COMPLETE, {"task_id": "T/mul", "completion": ""}], "sample 3: no problem 'T/mul'"),
        ([COMPLETE[0], {"task_id": "T/sub"}], "sample 2 (T/sub): no 'completion' string"),
        ([COMPLETE[0], {"task_id": "T/sub", "completion": 1}], "no 'completion' string"),
        (COMPLETE[:1], "no sample for 1 of 2 problems, as 'T/sub'"),
        ([], "no sample for 2 of 2"),
    ],
)
def test_samples_that_do_not_match(command, problems, tmp_path, rows, message):
    samples, out = write(tmp_path / "samples.jsonl", rows), tmp_path / "out"
    out.mkdir()
    before = sorted(tmp_path.rglob("*"))
    status, stdout, stderr = command(
        humaneval, "--problems", problems, "--samples", samples, "--out", out
    )
    assert status == 2
    assert stdout == ""
    assert stderr.startswith("error: ")
    assert message in stderr
    assert stderr.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "one of --checkpoint and --samples"),
        (["--checkpoint", "run", "--samples", "s"], "one of --checkpoint and --samples"),
        (["--checkpoint", "run", "--samples_per_problem", "5"], "needs --temperature"),
        (["--checkpoint", "run", "--timeout_s", "0"], "--timeout_s"),
        (["--checkpoint", "run", "--limit", "-1"], "--limit"),
    ],
)
def test_options_that_make_no_sense(command, problems, options, message):
    status, _, stderr = command(exercises, "--problems", problems, *options)
    assert status == 2
    assert message in stderr


def test_runs_as_a_module(cli, problems, tmp_path):
    samples = write(tmp_path / "samples.jsonl", COMPLETE)
    done = cli("-m", "eval.humaneval", "--problems", problems, "--samples", samples)
    assert done.returncode == 0
    assert done.stderr == ""
    assert "2 problems x 1 sample\n" in done.stdout
    assert "pass@1" in done.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"canonical_solution": "    return 7\n"}, "T/add: the reference failed AssertionError"),
        ({"canonical_solution": "    while 1: pass\n"}, "T/add: the reference timed out"),
        ({"test": "def check(candidate):\n    candidate(1, 2)\n"}, "T/add: the wrong solution"),
        ({"test": "def check(candidate):\n    assert candidate(1, 2)\n"}, "(return 'wrong')"),
        ({"test": "def check(c):\n    assert not c(0, 0)\n"}, "(pass) passed"),
        (
            {"test": "def check(c):\n    try: assert c(5, 3) == 8\n    except ValueError: pass\n"},
            "(raise ValueError) passed",
        ),
    ],
)
def test_self_check_refuses(change, message):
    with pytest.raises(UserError) as e:
        self_check([PROBLEMS[0] | change, PROBLEMS[1]], timeout_s=0.4, tier=TIER)
    assert message in str(e.value)
    assert "T/sub" not in str(e.value)


def test_no_score_from_a_broken_sandbox(command, problems, tmp_path, monkeypatch):
    verdicts = [Verdict("passed", ""), Verdict("infrastructure", "no such sandbox")]
    samples = write(tmp_path / "samples.jsonl", COMPLETE)
    monkeypatch.setattr(
        "eval.harness.self_check", lambda problems, *_, **limits: {"T/add": 0.1, "T/sub": 0.1}
    )
    monkeypatch.setattr("sandbox.self_check.run_checks", lambda programs, **limits: verdicts)
    out = tmp_path / "out"
    status, stdout, stderr = command(
        humaneval, "--problems", problems, "--samples", samples, "--out", out, "--json"
    )
    assert status == 2
    assert stdout == ""
    assert not out.exists()
    assert "no score, as 1 of 2" in stderr
    assert "no such sandbox" in stderr


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{k: v for k, v in PROBLEMS[0].items() if k != "test"}], "problem 1: no 'test' string"),
        ([PROBLEMS[0], PROBLEMS[0]], "2 problems have the task_id 'T/add'"),
        ([], "no problems"),
    ],
)
def test_problems_that_are_none(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        read_problems(write(tmp_path / "problems.jsonl", rows))


@pytest.mark.parametrize(
    ("completion", "kept"),
    [
        ("    return 1", "    return 1"),
        ("    return 1\n\nprint(f(2))\n", "    return 1\n\n"),
        ("\n    x = 1\n\n    return x\ndef g():\n    pass", "\n    x = 1\n\n    return x\n"),
        ("    x = 1\n# why\n\n    return x\n@g\n", "    x = 1\n# why\n\n    return x\n"),
        ("\treturn 1\r\n\r\nassert f(1)", "\treturn 1\r\n\r\n"),
        ("return 1", ""),
        ("", ""),
    ],
)
def test_trim_to_body(completion, kept):
    assert trim_to_body(completion) == kept


# What the demo's base model wrote, at temperature 1 and without stop strings, and what is kept.
WRITTEN = [
    (
        "    [heamed the and cp in ``}._tensor\n)\n\n\nasserter.\n\n    red = int\n",
        "    [heamed the and cp in ``}._tensor\n",
    ),
    (
        "    if `iter + (ity.\n    For cctions=cls)\n\n\ndef __scutation(self):\n",
        "    if `iter + (ity.\n    For cctions=cls)\n\n",
    ),
    (
        '    """Rerioreding function are Hity\n    """\n\n    Seb):\n        return, '
        "chone = entultius\n\n\ndefaknew_options_exce(b_l",
        '    """Rerioreding function are Hity\n    """\n\n    Seb):\n        return, '
        "chone = entultius\n\n\n",
    ),
    (
        '    rame string[:52  day in x\n    "is mquest ...\n\n\nclass index FtR bes import len(ti',
        '    rame string[:52  day in x\n    "is mquest ...\n\n',
    ),
    ("    # 1\n    # 1\n", "    # 1\n    # 1\n"),
    (
        "    return sum(x + 1 for x in v if 5 <= x)\n",
        "    return sum(x + 1 for x in v if 5 <= x)\n",
    ),
]


@pytest.mark.parametrize(("written", "kept"), WRITTEN)
def test_trim_of_what_a_model_wrote(written, kept):
    assert BODY.trim(written) == kept


def test_untrimmed_completion_is_recorded(command, model, problems, tmp_path):
    model.answers |= {"def add": ["    return a + b\nx = 1\n"], "def sub": ["    return a - b\n"]}
    out = tmp_path / "out"
    command(humaneval, "--problems", problems, "--checkpoint", "run", "--out", out)
    add, sub = samples_of(out)
    assert (add["completion"], add["untrimmed"]) == (
        "    return a + b\n",
        "    return a + b\nx = 1\n",
    )
    assert "untrimmed" not in sub


def test_evalplus_solutions_are_read(command, problems, tmp_path):
    solutions = [
        "def plus(a, b):\n    return a + b\n\ndef add(a, b):\n    return plus(a, b)\n",
        "def sub(a, b):\n    return b - a\n",
    ]
    rows = [{"task_id": p["task_id"], "solution": s} for p, s in zip(PROBLEMS, solutions)]
    samples = write(tmp_path / "samples.jsonl", rows)
    result = json.loads(
        command(humaneval, "--problems", problems, "--samples", samples, "--json")[1]
    )
    assert result["pass@1"] == 0.5


def test_timeouts_follow_the_machine_and_the_reference(command, tmp_path, monkeypatch):
    slow = {"canonical_solution": "    import time; time.sleep(0.5); return a + b\n"}
    problems = write(tmp_path / "problems.jsonl", [PROBLEMS[0] | slow, PROBLEMS[1]])
    rows = [{"task_id": p["task_id"], "completion": "    pass"} for p in PROBLEMS]
    samples = write(tmp_path / "samples.jsonl", rows)
    monkeypatch.setattr("eval.harness.slowdown", lambda **limits: 3.0)
    monkeypatch.setattr("eval.harness.self_check", lambda *_, **__: {"T/add": 0.5, "T/sub": 0.1})
    arguments = ("--problems", problems, "--samples", samples, "--json", "--timeout_s", "0.4")
    timeouts = json.loads(command(humaneval, *arguments)[1])["timeouts"]
    assert timeouts["slowdown"] == 3.0
    assert timeouts["shortest_s"] == pytest.approx(1.2)
    assert timeouts["longest_s"] == pytest.approx(2.0)


def test_slowdown_is_the_loops_time(monkeypatch):
    verdicts = [Verdict("passed", "", s) for s in (0.2, 0.9, 0.4, 0.1, 0.5, 0.4)]
    monkeypatch.setattr("sandbox.self_check.run_checks", lambda checks, **limits: verdicts)
    assert slowdown(workers=2) == pytest.approx(0.4 / LOOP_S)
    monkeypatch.undo()
    assert slowdown(workers=1, tier=TIER) >= 1.0


def test_trim_cuts_at_the_first_stop_string():
    assert BODY.trim("    a\n#\n\ndef g(): pass") == "    a"
    assert BODY.trim("    a\n\n\nx = 1") == "    a\n\n\n"
    assert BODY.trim("    a") == "    a"


@pytest.mark.parametrize("protocol", ["docstring", "three-shot"])
def test_mbpp(command, model, tmp_path, protocol):
    path = write(tmp_path / "mbpp.jsonl", ROWS)
    model.answers |= {
        "add 11": ["\ndef check(x):\n    return x + 11\n"],
        "add 12": ["\ndef check(x):\n    return x + 11\n"],
    }
    status, stdout, stderr = command(
        mbpp, "--problems", path, "--checkpoint", "run", "--protocol", protocol, "--json"
    )
    assert status == 0, stderr
    result = json.loads(stdout)
    assert result["protocol"] == protocol
    assert result["benchmark"] == "MBPP"
    assert result["problems"] == 2
    assert result["pass@1"] == 0.5
    if protocol == "docstring":
        want = '"""\nWrite a function to add 11.\nassert check(1) == 12\n"""\n'
        assert model.prompts[0] == want
    else:
        assert model.options["stop"][0] == "[DONE]"
        assert model.prompts[0].count("[BEGIN]") == 4
        assert model.prompts[0].count("[DONE]") == 3
        assert model.prompts[0].endswith(
            "here is your task: Write a function to add 11. Your code should pass these tests:\n\n"
            "assert check(1) == 12\nassert check(0) == 11\n[BEGIN]\n"
        )
        assert "[BEGIN]\ndef check(x):\n    return x + 2\n[DONE]\n\nYou are" in model.prompts[0]


def test_mbpp_entry_point_is_the_function_under_test():
    code = (
        "class Pair:\n    pass\ndef size(p):\n    return 1\ndef total(ps):\n    return size(ps)\n"
    )
    row = Mbpp(0, "", code, ["assert total([Pair()]) == 1"], "")
    assert row.entry_point == "total"


def test_mbpp_files_that_are_none(command, tmp_path):
    for rows, options, message in [
        ([{"task_id": 11, "text": "Add.", "code": ""}], [], "not MBPP: KeyError('test_list')"),
        (PROBLEMS, [], "not MBPP: ValueError"),
        (ROWS[2:], ["--protocol", "three-shot"], "lacks task_id (2, 3, 4)"),
        (ROWS[:3], [], "no problems"),
        (ROWS, ["--protocol", "other"], "want docstring or three-shot"),
    ]:
        path = write(tmp_path / "mbpp.jsonl", rows)
        status, _, stderr = command(mbpp, "--problems", path, "--checkpoint", "run", *options)
        assert status == 2
        assert message in stderr


def test_humaneval_references_pass_and_empty_bodies_fail(shared_eval):
    problems = read_problems(shared_eval / "HumanEval.jsonl.gz")[:20]
    seconds = self_check(problems, timeout_s=15, tier=TIER)
    assert seconds.keys() == {p["task_id"] for p in problems}
    assert max(seconds.values()) < math.inf
    empty = run_checks([check(p, "    pass\n", 15) for p in problems], tier=TIER)
    assert {v.status for v in empty} == {"failed"}


@pytest.mark.parametrize("file", ["mbpp.jsonl", "sanitized-mbpp.json"])
def test_mbpp_references_pass(shared_eval, file):
    name, rows = read_mbpp(shared_eval / file)
    shots = mbpp.three_shots(file, rows)
    odd = {56, 349, 367, 137}  # called check; a set-up that needs the solution; imports
    chosen = [r for r in rows if r.id in odd or 11 <= r.id < 31]
    for problems in ([mbpp.problem(row, s) for row in chosen] for s in ("", shots)):
        seconds = self_check(problems, timeout_s=15, tier=TIER)
        assert max(seconds.values()) < math.inf
    assert ("sanitized" in name) == ("sanitized" in file)
    assert sum(row.id in mbpp.TEST_IDS for row in rows) == (257 if "sanitized" in file else 500)


def test_a_real_checkpoint_scores_zero(cli, command, problems, tiny, tokens, tmp_path):
    run_folder = tmp_path / "run"
    done = cli(
        "train.py", *tiny, "--seq_len=64", "--max_steps=1", "--data", tokens, "--out", run_folder
    )
    assert done.returncode == 0, done.stderr
    status, stdout, stderr = command(
        exercises,
        "--problems",
        problems,
        "--checkpoint",
        run_folder,
        "--max_new_tokens",
        8,
        "--json",
    )
    assert status == 0, stderr
    result = json.loads(stdout)
    assert result["pass@1"] == 0
    assert result["prompts_too_long"] == 0
