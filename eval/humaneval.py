"""Score a checkpoint, or samples made elsewhere, on HumanEval (Chen et al. 2021).

python -m eval.humaneval --problems HumanEval.jsonl.gz --checkpoint out/run/checkpoint
"""

from common.config import parse, run
from data.base.benchmarks import read_problems
from eval.harness import BODY, Evaluation, evaluate


def main() -> None:
    config = parse(Evaluation)
    evaluate(config, "HumanEval", read_problems(config.problems), BODY)


if __name__ == "__main__":
    run(main)
