"""Score a checkpoint, or samples made elsewhere, on MBPP's test split (Austin et al. 2021).

python -m eval.mbpp --problems mbpp.jsonl --checkpoint out/run/checkpoint --protocol docstring

The file is mbpp.jsonl (500 test problems) or sanitized-mbpp.json (257). The literature prompts in
two ways, and their scores differ, so each result names its own:
    docstring   the task and its first test in a docstring; the model writes the code below
    three-shot  the paper's own: three solved tasks, then this one, code between [BEGIN] and [DONE]
"""

import ast
import json
from dataclasses import dataclass
from pathlib import Path

from common.config import UserError, parse, run
from common.files import read_jsonl
from eval.harness import Evaluation, Protocol, check_ids, evaluate

TEST_IDS = range(11, 511)  # Austin et al. 2021, arXiv 2108.07732
SHOT_IDS = (2, 3, 4)  # the same
DOCSTRING_STOP = ("\nclass ", "\nassert ", '\n"""', "\nprint", "\nif ", "<|endoftext|>")
SHOT_STOP = ("[DONE]", "<|endoftext|>")


@dataclass(frozen=True)
class MbppEvaluation(Evaluation):
    """Score a checkpoint, or samples made elsewhere, on the test split of MBPP."""

    protocol: str = "docstring"  # docstring or three-shot


def main() -> None:
    config = parse(MbppEvaluation)
    if config.protocol not in ("docstring", "three-shot"):
        raise UserError(f"--protocol {config.protocol!r}: want docstring or three-shot")
    name, rows = read_rows(config.problems)
    if config.protocol == "docstring":
        shots, protocol = "", Protocol("docstring", DOCSTRING_STOP, to_body=False)
    else:
        shots = three_shots(config.problems, rows)
        protocol = Protocol("three-shot", SHOT_STOP, to_body=False)
    problems = [problem(row, shots) for row in rows if row["id"] in TEST_IDS]
    check_ids(config.problems, problems)
    evaluate(config, name, problems, protocol)


def read_rows(path: Path) -> tuple[str, list[dict]]:
    """The benchmark's name, and its rows in one form for both files: id, text, code, tests, setup.

    Raises UserError for a file that cannot be read, or a row that lacks a field.
    """
    if path.suffix == ".json":
        try:
            rows = json.loads(path.read_text())
        except (OSError, ValueError) as e:
            raise UserError(f"{path}: cannot be read as JSON: {e}") from None
    else:
        rows = list(read_jsonl(path))
    try:
        sanitized = any("prompt" in row for row in rows)
        text = "prompt" if sanitized else "text"
        return "MBPP sanitized" if sanitized else "MBPP", [
            {
                "id": int(row["task_id"]),
                "text": _lf(row[text]),
                "code": _lf(row["code"]).rstrip() + "\n",
                "tests": [_lf(test).strip() for test in row["test_list"]],
                "setup": "\n".join(
                    row["test_imports"] if sanitized else [_lf(row["test_setup_code"])]
                ),
            }
            for row in rows
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise UserError(f"{path}: not MBPP: {e!r}") from None


def problem(row: dict, shots: str) -> dict:
    """The problem record of a row: a model writes the whole function, which tests call by name.

    With `shots` the record's context is those and the task, else its prompt is a docstring.
    """
    # The tests run before check() is defined: two of the references are called check, too.
    tests = "\n".join([row["setup"], *row["tests"]])
    docstring = f'"""\n{row["text"]}\n{row["tests"][0]}\n"""\n'  # as InCoder's (Fried 2022)
    return {
        "task_id": f"MBPP/{row['id']}",
        "context": shots + ask(row) if shots else "",
        "prompt": "" if shots else docstring,
        "canonical_solution": row["code"],
        "entry_point": entry_point(row),
        "test": f"{tests}\n\ndef check(candidate):\n    pass\n",
    }


def entry_point(row: dict) -> str:
    """The name of the function under test: the last in the reference that the first test calls."""
    called = {n.id for n in ast.walk(ast.parse(row["tests"][0])) if isinstance(n, ast.Name)}
    return [n.name for n in ast.parse(row["code"]).body if getattr(n, "name", "") in called][-1]


def three_shots(path: Path, rows: list[dict]) -> str:
    """The solved tasks that precede the one to solve."""
    shots = {row["id"]: row for row in rows if row["id"] in SHOT_IDS}
    if len(shots) < len(SHOT_IDS):
        raise UserError(f"{path}: lacks task_id {SHOT_IDS}, the examples of --protocol three-shot")
    return "".join(f"{ask(shots[i])}{shots[i]['code']}[DONE]\n\n" for i in SHOT_IDS)


def ask(row: dict) -> str:
    """The paper's wording (Austin et al. 2021), up to where the code begins."""
    tests = "\n".join(row["tests"])
    return (
        f"You are an expert Python programmer, and here is your task: {row['text']} "
        f"Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    )


def _lf(text: str) -> str:
    return text.replace("\r\n", "\n")


if __name__ == "__main__":
    run(main)
