"""Score a checkpoint, or existing samples, on MBPP's test split (Austin et al. 2021).

python -m eval.mbpp --problems mbpp.jsonl --checkpoint out/run/checkpoint --protocol docstring

Reads mbpp.jsonl (500 test problems), sanitized-mbpp.json (257), or EvalPlus's MBPP+ (all its
problems, in its own format or MBPP's). The literature uses two prompts; their scores differ, so
each result names its protocol:
    docstring   the task and its first test in a docstring; the model writes the code below
    three-shot  the paper's: three solved tasks, then this one, code between [BEGIN] and [DONE]
"""

from dataclasses import dataclass
from pathlib import Path

from common.config import UserError, parse, run
from data.base.benchmarks import Mbpp, check_problems, read_mbpp, read_rows
from eval import plus
from eval.harness import Evaluation, Protocol, evaluate

TEST_IDS = range(11, 511)  # Austin et al. 2021, arXiv 2108.07732
SHOT_IDS = (2, 3, 4)  # same source
DOCSTRING_STOP = ("\nclass ", "\nassert ", '\n"""', "\nprint", "\nif ", "<|endoftext|>")
STOP = {"docstring": DOCSTRING_STOP, "three-shot": ("[DONE]", "<|endoftext|>")}


@dataclass(frozen=True)
class MbppEvaluation(Evaluation):
    """Score a checkpoint, or existing samples, on the test split of MBPP."""

    protocol: str = "docstring"  # prompt: docstring or three-shot


def main() -> None:
    config = parse(MbppEvaluation)
    if config.protocol not in STOP:
        raise UserError(f"--protocol {config.protocol!r}: want {' or '.join(STOP)}")
    name, problems = convert(config.problems, read_rows(config.problems), config.protocol)
    evaluate(config, name, problems, Protocol(config.protocol, STOP[config.protocol], False))


def convert(path: Path, rows: list[dict], protocol: str = "docstring") -> tuple[str, list[dict]]:
    """Return the benchmark's name and its problems as `protocol` prompts. Raises UserError."""
    if any("plus_input" in row for row in rows):
        name, problems = "MBPP+", plus.convert(path, rows)
    else:
        name, rows = read_mbpp(path)
        shots = three_shots(path, rows) if protocol == "three-shot" else ""
        problems = [problem(row, shots) for row in rows if row.plus or row.id in TEST_IDS]
    if name == "MBPP+" and protocol != "docstring":
        raise UserError(f"--protocol {protocol}: MBPP+ scores the example tasks; use docstring")
    return name, check_problems(path, problems)


def problem(row: Mbpp, shots: str) -> dict:
    """Convert a row to HumanEval's format: the model writes the whole function under test.

    With `shots`, the context holds them and the task; otherwise the prompt is a docstring.
    """
    def tests(*parts: str) -> str:
        # Run before check() is defined: two references are named check, too.
        return "\n".join([row.imports, row.setup, *parts, "", "def check(_):", "    pass", ""])

    docstring = f'"""\n{row.text}\n{row.tests[0]}\n"""\n'  # InCoder's format (Fried 2022)
    return {
        "task_id": f"MBPP/{row.id}",
        "context": shots + ask(row) if shots else "",
        "prompt": "" if shots else docstring,
        "canonical_solution": row.code.rstrip() + "\n",
        "entry_point": row.entry_point,
        "setup": row.imports,
        "test": tests(*row.tests),
        **({"plus_test": tests(plus.mend(row.plus))} if row.plus else {}),
    }


def three_shots(path: Path, rows: list[Mbpp]) -> str:
    """Return the three solved example tasks."""
    shots = [row for row in rows if row.id in SHOT_IDS]
    if len(shots) < len(SHOT_IDS):
        raise UserError(f"{path}: lacks task_id {SHOT_IDS}, the shots of --protocol three-shot")
    return "".join(f"{ask(row)}{row.code.rstrip()}\n[DONE]\n\n" for row in shots)


def ask(row: Mbpp) -> str:
    """Return the paper's prompt (Austin et al. 2021), up to the code."""
    tests = "\n".join(row.tests)
    return (
        f"You are an expert Python programmer, and here is your task: {row.text} "
        f"Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    )


if __name__ == "__main__":
    run(main)
