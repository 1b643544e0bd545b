"""Score a checkpoint, or samples made elsewhere, on a file of problems in HumanEval's format.

python -m eval.humaneval --problems HumanEval.jsonl.gz --checkpoint out/run
python -m eval.humaneval --problems HumanEvalPlus.jsonl.gz --checkpoint out/run
python -m eval.humaneval --problems out/demo/exercises/heldout.jsonl --checkpoint out/run

HumanEval+ is read in EvalPlus's own format, which gives two scores, and in HumanEval's (OriginFmt),
where the base tests and the others are one.
"""

from common.config import UserError, parse, run
from common.files import read_jsonl
from data.base.benchmarks import check_problems
from eval import plus
from eval.harness import BODY, Evaluation, evaluate


def main() -> None:
    config = parse(Evaluation)
    rows = list(read_jsonl(config.problems))
    if any("assertion" in row or "test_list" in row for row in rows):
        raise UserError(f"{config.problems} is of MBPP's kind: use python -m eval.mbpp")
    problems = check_problems(config.problems, plus.convert(config.problems, rows))
    name, slash, _ = problems[0]["task_id"].partition("/")  # HumanEval, exercises, unseen
    harder = any("plus_test" in p or "def assertion(out, exp, atol)" in p["test"] for p in problems)
    evaluate(config, (name if slash else config.problems.stem) + "+" * harder, problems, BODY)


if __name__ == "__main__":
    run(main)
