"""Score a checkpoint, or existing samples, on problems in HumanEval's format.

python -m eval.humaneval --problems HumanEval.jsonl.gz --checkpoint out/run
python -m eval.humaneval --problems HumanEvalPlus.jsonl.gz --checkpoint out/run
python -m eval.humaneval --problems out/demo/exercises/heldout.jsonl --checkpoint out/run

Reads HumanEval+ in EvalPlus's own format, which gives base and plus scores, or in HumanEval's
(OriginFmt), which merges both sets of tests into one.
"""

from pathlib import Path

from common.config import UserError, parse, run
from common.files import read_jsonl
from data.base.benchmarks import check_problems
from eval import plus
from eval.harness import BODY, Evaluation, evaluate


def convert(path: Path, rows: list[dict]) -> tuple[str, list[dict]]:
    """Return the benchmark's name and its problems. Raises UserError."""
    if any("assertion" in row or "test_list" in row for row in rows):
        raise UserError(f"{path} is in MBPP's format: use python -m eval.mbpp")
    problems = check_problems(path, plus.convert(path, rows))
    name, slash, _ = problems[0]["task_id"].partition("/")  # HumanEval, exercises, unseen
    harder = any("plus_test" in p or "def assertion(out, exp, atol)" in p["test"] for p in problems)
    return (name if slash else path.stem) + "+" * harder, problems


def main() -> None:
    config = parse(Evaluation)
    evaluate(config, *convert(config.problems, list(read_jsonl(config.problems))), BODY)


if __name__ == "__main__":
    run(main)
