"""Score a checkpoint on the held-out exercises.

python -m eval.exercises --checkpoint out/run/checkpoint --problems out/exercises/heldout.jsonl
"""

from common.config import parse, run
from data.base.benchmarks import read_problems
from eval.harness import BODY, Evaluation, evaluate


def main() -> None:
    config = parse(Evaluation)
    evaluate(config, "exercises", read_problems(config.problems), BODY)


if __name__ == "__main__":
    run(main)
