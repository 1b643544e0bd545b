"""The problems of benchmark files, as what training data must not come close to."""

import ast
import json
from dataclasses import dataclass
from pathlib import Path

from common.config import UserError
from common.files import read_jsonl
from data.base.ast_match import Function, functions
from data.base.syntax import parse_python


@dataclass(frozen=True)
class Problem:
    """A benchmark's problem."""

    task_id: str
    docstring: str
    function: Function  # the solution; its text has the docstring, too


def read_problems(path: Path) -> list[Problem]:
    """The problems of a file in HumanEval's format, of mbpp.jsonl or of sanitized-mbpp.json.

    Raises UserError for a file that cannot be read, or that is of another kind.
    """
    try:
        rows = json.loads(path.read_text()) if path.suffix == ".json" else list(read_jsonl(path))
        return [_problem(row) for row in rows]
    except OSError as e:
        raise UserError(f"--benchmarks {path}: {e.strerror}") from None
    except (LookupError, TypeError, ValueError, SyntaxError, AttributeError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(
            f"--benchmarks {path}: neither HumanEval's format nor MBPP's: {e!r}"
        ) from None


def _problem(row: dict) -> Problem:
    if "entry_point" in row:
        task_id, source = row["task_id"], row["prompt"] + row["canonical_solution"]
        wanted = {row["entry_point"]}
    else:
        task_id, source = f"MBPP/{row['task_id']}", row["code"].replace("\r\n", "\n")
        test = parse_python(row["test_list"][0])
        wanted = {n.id for n in ast.walk(test) if isinstance(n, ast.Name)}
    function = [f for f in functions(source) if f.name in wanted][-1]
    if "entry_point" in row:
        # Not ast.get_docstring: one of HumanEval's stands behind an import.
        texts = [
            n.value for n in parse_python(function.text).body[0].body if isinstance(n, ast.Expr)
        ]
        docstring = next((t.value for t in texts if isinstance(t, ast.Constant)), "")
        return Problem(task_id, str(docstring), function)
    docstring = row["text"] if "text" in row else row["prompt"]
    text = f'"""{docstring}"""\n{function.text}'
    return Problem(task_id, docstring, Function(function.name, text, function.nodes))
