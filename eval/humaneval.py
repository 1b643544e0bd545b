"""Score a checkpoint, or samples made elsewhere, on a file of problems in HumanEval's format.

python -m eval.humaneval --problems HumanEval.jsonl.gz --checkpoint out/run
python -m eval.humaneval --problems out/demo/exercises/heldout.jsonl --checkpoint out/run
"""

from common.config import parse, run
from data.base.benchmarks import read_problems
from eval.harness import BODY, Evaluation, evaluate


def main() -> None:
    config = parse(Evaluation)
    problems = read_problems(config.problems)
    name, slash, _ = problems[0]["task_id"].partition("/")  # HumanEval, exercises, unseen
    evaluate(config, name if slash else config.problems.stem, problems, BODY)


if __name__ == "__main__":
    run(main)
