import ast
import json
import sys
import types

import pytest
from test_eval import TIER, lines, write

from data.base.benchmarks import read_problems
from eval import robustness
from eval.perturb import PERTURBATIONS
from eval.robustness import paired
from sandbox.execute import run_checks
from sandbox.self_check import check

PROMPT = '''from typing import List


def helper(x, numbers):
    return x in numbers


def count_near(numbers: List[int], limit: int = 3) -> int:
    """ Count the numbers that are smaller than limit, and return the result "given" so.
    Everything otherwise remaining should be ignored altogether.

    >>> count_near([1, 5])
    1
    >>> count_near([])
    0

    Negative numbers matter.
    """
'''
PROBLEM = {
    "task_id": "T/0",
    "prompt": PROMPT,
    "canonical_solution": "    return sum(n < limit and helper(n, numbers) for n in numbers)\n",
    "entry_point": "count_near",
    "test": "def check(candidate):\n    assert candidate([1, 5, -2]) == 2\n"
    "    assert candidate([1, 5], 9) == 2\n    assert candidate([9]) == 0\n",
}


def perturbed(name: str, **changes: str) -> dict | None:
    return PERTURBATIONS[name]({**PROBLEM, **changes})


def docstring(prompt: str) -> str:
    return ast.get_docstring(ast.parse(prompt).body[-1])


def test_the_reference_still_passes_and_only_the_prompt_changes():
    before, checks = json.dumps(PROBLEM), []
    for name, perturb in PERTURBATIONS.items():
        p = perturb(PROBLEM)
        assert json.dumps(PROBLEM) == before
        assert p["prompt"] != PROMPT
        assert p == perturb(PROBLEM), "not the same twice"
        if name not in ("rename_function", "rename_arguments", "two_spaces"):
            assert p == {**PROBLEM, "prompt": p["prompt"]}
        checks += [check(p, body, 20) for body in (p["canonical_solution"], "    return -1\n")]
    statuses = [v.status for v in run_checks(checks, tier=TIER)]
    assert statuses == ["passed", "failed"] * len(PERTURBATIONS)


def test_rename_function():
    p = perturbed("rename_function")
    assert p["entry_point"] == "func"
    assert "count_near" not in p["prompt"]
    assert ">>> func([1, 5])" in p["prompt"]
    verb = PROMPT.replace("count_near", "count")
    p = perturbed("rename_function", entry_point="count", prompt=verb)
    assert "Count the numbers" in p["prompt"]
    assert perturbed("rename_function", prompt=PROMPT.replace("helper", "func")) is None


def test_rename_arguments():
    p = perturbed("rename_arguments")
    assert "def count_near(given_numbers: List[int], given_limit: int = 3)" in p["prompt"]
    assert "smaller than given_limit," in p["prompt"]
    assert p["canonical_solution"].count("given_numbers") == 2


def test_reworded():
    doc = docstring(perturbed("reworded")["prompt"])
    assert doc.startswith(
        'Tally the numbers that are smaller than limit, and give back the outcome "given" so.\n'
        "Everything in any other case remaining"
    )
    assert ">>> count_near([1, 5])\n1" in doc


def test_layout():
    assert perturbed("other_quotes")["prompt"] == PROMPT.replace('"""', "'''")
    assert perturbed("other_quotes", prompt=PROMPT.replace("matter.", "'''")) is None
    halved = perturbed("two_spaces")["prompt"]
    assert '\n  """ Count' in halved
    assert "   " not in halved


def test_humaneval_keeps_its_meaning(shared_eval):
    problems = read_problems(shared_eval / "HumanEval.jsonl.gz")
    checks, names = [], []
    for name, perturb in PERTURBATIONS.items():
        applied = [p for p in map(perturb, problems) if p]
        assert len(applied) >= 155, name
        checks += [check(p, p["canonical_solution"], 60) for p in applied[::16]]  # all pass
        names += [(name, p["task_id"]) for p in applied[::16]]
    verdicts = run_checks(checks, tier=TIER)
    assert [n for n, v in zip(names, verdicts) if v.status != "passed"] == []


def test_paired_interval():
    # Bonett and Price: with 10 of 50 lost and 2 gained, (11 - 3) / 52 and its spread.
    before, after = [1.0] * 10 + [0.0] * 40, [0.0] * 10 + [1.0] * 2 + [0.0] * 38
    found = paired(before, after)
    assert found["drop"] == pytest.approx(8 / 50)
    spread = 1.959964 * ((11 / 52 + 3 / 52 - (8 / 52) ** 2) / 52) ** 0.5
    assert found["ci95"] == pytest.approx([8 / 52 - spread, 8 / 52 + spread])


def test_command(monkeypatch, in_process, tmp_path):
    """Use a model that solves the problem only with its original quotes and indentation."""

    def generate(prompts, **options):
        known = '    """ Count the numbers'
        return [PROBLEM["canonical_solution"] if known in p else "    return -1\n" for p in prompts]

    model = types.SimpleNamespace(fits=lambda prompt: True, generate=generate)
    generator = types.SimpleNamespace(load=lambda checkpoint, **options: model)
    monkeypatch.setitem(sys.modules, "sample", types.SimpleNamespace(Generator=generator))
    monkeypatch.setattr("eval.harness.slowdown", lambda **limits: 1.0)
    problems = write(tmp_path / "problems.jsonl", [PROBLEM, {**PROBLEM, "task_id": "T/1"}])
    arguments = ["--problems", problems, "--checkpoint", "x", "--sandbox", TIER]
    assert "rename_function" in in_process(robustness.main, *arguments, "--only", "caps")[2]

    out, names = tmp_path / "out", ["other_quotes", "two_spaces", "rename_function"]
    only = [f"--only={n}" for n in names]
    status, stdout, stderr = in_process(robustness.main, *arguments, "--out", out, "--json", *only)
    assert status == 0, stderr
    result = json.loads(stdout)
    assert result == json.loads((out / "results.json").read_text())
    assert (result["pass@1"], result["problems"]) == (1, 2)
    found = {name: row["drop"] for name, row in result["perturbations"].items()}
    assert found == {"other_quotes": 1, "two_spaces": 1, "rename_function": 0}
    asked = [p["task_id"] for p in lines(out / "problems.jsonl")]
    assert asked[:3] == ["T/0", "T/1", "T/0@other_quotes"]
    arguments[2:4] = "--samples", out / "samples.jsonl"  # rescore the written samples
    again = json.loads(in_process(robustness.main, *arguments, "--json", *only)[1])
    assert again["perturbations"] == result["perturbations"]
